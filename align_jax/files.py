"""Files: written whole or not at all, and read without trust in what they are or hold."""

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align_jax.text import brief

# What the operating system refuses to whoever writes, and what to do.
_REFUSALS = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "your share of the disk is full: free some space",
    errno.EFBIG: "files may not grow that large here: raise the limit (`ulimit -f`)",
    errno.EMFILE: "this process may open no more files: raise the limit (`ulimit -n`)",
    errno.ENFILE: "this machine can open no more files: close some",
}


def refusal(error: Exception) -> str | None:
    """What the system refused and what to do, for the errors of full disks and reached limits.

    Libraries wrap what the system said in errors of their own; its words are looked for in them.
    """
    said = str(error)
    found = (n for n in _REFUSALS if getattr(error, "errno", None) == n or os.strerror(n) in said)
    return next((_REFUSALS[number] for number in found), None)


def write_file(path: Path, content: bytes) -> None:
    """Writes beside `path`, then renames: a reader finds the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """`write_file` of `content` as JSON; configs and arrays in it become objects and lists."""
    text = json.dumps(content, indent=2, default=plain_values) + "\n"
    write_file(path, text.encode("utf-8"))


def plain_values(value: Any) -> Any:
    """The `default` of `json.dumps` for what our JSON files hold: configs and arrays."""
    return value.to_dict() if hasattr(value, "to_dict") else value.tolist()


def irregular(path: str | os.PathLike) -> str | None:
    """What is at a path in place of a regular file: "is a pipe"; None if it is one, or missing.

    Opening a pipe waits for its other end, and some devices are read without end.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # ValueError: a NUL in the path
        if os.path.islink(path):
            return f"is a link that leads nowhere (to {os.readlink(path)})"
        return None
    kinds = {
        stat.S_ISDIR: "is a directory",
        stat.S_ISFIFO: "is a pipe",
        stat.S_ISSOCK: "is a socket",
        stat.S_ISCHR: "is a device",
        stat.S_ISBLK: "is a device",
    }
    return next((name for matches, name in kinds.items() if matches(mode)), None)


def load_json(path: str | os.PathLike) -> Any:
    """The value in a JSON file.

    Raises:
      OSError: the file is missing or cannot be read.
      ValueError: no regular file, not UTF-8, or not JSON; see `parse_json`.
    """
    if found := irregular(path):
        raise ValueError(f"it {found}, expected a regular file")
    return parse_json(Path(path).read_text(encoding="utf-8"))


def parse_json(text: str) -> Any:
    """`json.loads` for text that anybody may have written.

    Raises:
      ValueError: broken JSON (then it is a `json.JSONDecodeError`), a key that an object has
        twice, a number of thousands of digits, or nesting too deep for Python.
    """
    with _plain_errors():
        return _DECODER.decode(text)


def parse_json_at(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at `start`, and where it ends; errors as `parse_json`."""
    with _plain_errors():
        return _DECODER.raw_decode(text, start)


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    try:
        yield
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except ValueError as error:
        if str(error).startswith("Exceeds the limit"):  # Python's bound, a guard against stalling
            raise ValueError("a number has more than 4,300 digits") from error
        raise


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"an object has the key {brief(twice)} twice")
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
