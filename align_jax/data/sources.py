"""Where records come from: JSON files, Hugging Face `datasets`, TFDS and what is built in.

    PATH.jsonl  PATH.jsonl.gz  PATH.json  PATH.json.gz
    hf:PATH_OR_NAME[@config][#split]   through `datasets`
    tfds:NAME[#split]                  through `tfds.data_source`, without TensorFlow
    builtin:NAME[#split]               data/builtin.py

Any of them may end in `:field=their_field[,...]`, where a file calls our fields otherwise:
`train.jsonl:prompt=question`. `their_field@role` makes a message of a string:
`train.jsonl:prompt=question@user`, for a model that is to see it through its chat template.

All records are validated before the first one is returned.
"""

from __future__ import annotations

import difflib
import gzip
import json
import logging
import os
import re
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from align_jax.data import builtin
from align_jax.data.records import OPTIONAL, REQUIRED, ROLES, Record, parse_record
from align_jax.errors import DataError
from align_jax.files import irregular, parse_json, parse_json_at
from align_jax.text import brief

FILE_TYPES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
INVALID = ("error", "drop")
# A compressed file may expand to this many bytes, or to this many times its size if that is more.
# Text rarely reaches 30 times; what exceeds 100 is made to fill the memory.
_EXPANDED_BYTES, _EXPANDED_TIMES = 2**26, 100
_FIELDS = re.compile(r":(\w+=[^,=:#/]+(?:,\w+=[^,=:#/]+)*)$")
_log = logging.getLogger(__name__)

Rows = Iterator[tuple[str, Any]]


def load_records(
    source: str, *, kind: str, limit: int | None = None, invalid: str = "error"
) -> list[Record]:
    """Reads and validates the records of `source`, at most the first `limit` of them.

    A record keeps its origin in `where`: "FILE:LINE" (from 1), or "SOURCE: row N" (from 0).
    `invalid="drop"` leaves out records that have the wrong fields (Anthropic's own file has pairs
    with two prompts) and logs how many; a file that cannot be read to its end is always an error.

    Raises DataError with one message: a source that is not there (and what is near it), broken
    JSON, not UTF-8, a file cut short, a wrong field, no records, a field renamed to one that the
    kind does not have.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}; expected at least 1, or none")
    if invalid not in INVALID:
        raise DataError(f"data.invalid is {invalid!r}; expected one of {', '.join(INVALID)}")
    source, fields = _split_fields(os.fspath(source), kind)
    if not source:
        raise DataError("no source of records is named; expected a path, hf:, tfds: or builtin:")
    scheme, colon, rest = source.partition(":")
    if colon and scheme in _SCHEMES:
        rows = _SCHEMES[scheme](rest)
    elif colon and scheme.isalpha() and not os.path.exists(source) and len(scheme) > 1:
        raise DataError(
            f"{source}: no kind of source is called '{scheme}:'; expected a path, or one of "
            + ", ".join(f"{name}:" for name in _SCHEMES)
        )
    else:
        rows = read_file(os.path.expanduser(source))
    records: list[Record] = []
    dropped: list[DataError] = []
    for where, raw in rows:
        try:
            renamed = _rename(raw, fields, where)
            records.append(parse_record(renamed, kind=kind, where=where))
        except DataError as error:
            if invalid == "error":
                raise
            dropped.append(error)
        if len(records) == limit:
            break
    if dropped:
        total = len(records) + len(dropped)
        what = f"{len(dropped)} of {total} records of {source} are invalid; the first: {dropped[0]}"
        if not records:
            raise DataError(what)
        _log.warning("left out: %s", what)
    if not records:
        raise DataError(f"{source}: the data set is empty; expected at least one record")
    return records


def load_as_configured(data: Any, source: str, *, kind: str) -> list[Record]:
    """`load_records` by the `limit` (0 reads all) and the `invalid` of a `config.data`."""
    return load_records(source, kind=kind, limit=data.limit or None, invalid=data.invalid)


class _Field(NamedTuple):
    """What a source calls one of our fields, and who says it if it is to be a message."""

    name: str
    role: str | None


def _split_fields(source: str, kind: str) -> tuple[str, dict[str, _Field]]:
    """`PATH:prompt=question@user` as `PATH` and {"prompt": _Field("question", "user")}."""
    found = _FIELDS.search(source)
    if not found or os.path.exists(os.path.expanduser(source)):
        return source, {}
    pairs = [pair.split("=") for pair in found[1].split(",")]
    fields = {}
    known = {name for form in REQUIRED.get(kind, ()) for name in form} | {*OPTIONAL.get(kind, ())}
    for name, theirs in pairs:
        if known and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"it has {', '.join(sorted(known))}"
            raise DataError(f"{source}: kind '{kind}' has no field '{name}'; {hint}")
        if name in fields:
            raise DataError(f"{source}: field '{name}' is renamed twice")
        theirs, at, role = theirs.partition("@")
        if at and role not in ROLES:
            raise DataError(f"{source}: no role '{role}'; expected one of {', '.join(ROLES)}")
        fields[name] = _Field(theirs, role or None)
    return source[: found.start()], fields


def _rename(raw: Any, fields: dict[str, _Field], where: str) -> Any:
    """The record under our names; what else it holds under these names is left out."""
    if not fields or not isinstance(raw, dict):
        return raw
    renamed = {}
    for name, (theirs, role) in fields.items():
        if theirs not in raw:
            raise DataError(
                f"{where}: field '{theirs}' is missing, which the source gives as '{name}'; the "
                f"record has {', '.join(map(repr, raw)) or 'no fields'}"
            )
        value = raw[theirs]
        if role and not isinstance(value, str):
            raise DataError(
                f"{where}: field '{theirs}': found {type(value).__name__}, expected a string, "
                f"which the source makes a message of ('@{role}')"
            )
        renamed[name] = [{"role": role, "content": value}] if role else value
    theirs = {field.name for field in fields.values()}
    return {name: value for name, value in raw.items() if name not in theirs} | renamed


def read_file(path: str) -> Rows:
    """("FILE:LINE", value) of each record of a JSON file, not validated; DataError as above."""
    if not os.path.isfile(path):
        raise DataError(_explain_no_file(path))
    if not path.endswith(FILE_TYPES):
        raise DataError(
            f"{path}: unknown type of file; expected a name that ends in {', '.join(FILE_TYPES)} "
            "(or hf:DIRECTORY for what `datasets` reads, Parquet among it)"
        )
    if path.removesuffix(".gz").endswith(".json"):
        text = "".join(line for _, line in _read_lines(path))
        if not text.strip():
            return
        if not text.lstrip().startswith("{"):
            yield from _parse_array(path, text)
            return
        # Many a file of JSON lines is called .json.
    for number, line in _read_lines(path):
        if line.strip():
            try:
                record = parse_json(line)
            except ValueError as error:
                raise _broken(path, number, error) from error
            if isinstance(record, list):
                raise DataError(
                    f"{path}:{number}: found {brief(record)}, a list, expected an object with "
                    "named fields; a file that is one array of records must be named .json"
                )
            yield f"{path}:{number}", record


def _read_lines(path: str) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        is_compressed = path.endswith(".gz")
        opener = gzip.open if is_compressed else open
        with opener(path, "rb") as file:
            lines = _bounded(file, path) if is_compressed else file
            for number, line in enumerate(lines, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                yield number, line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}:{number}: not UTF-8: byte 0x{error.object[error.start]:02x} at column "
            f"{error.start + 1}; expected UTF-8 text"
            + ("" if path.endswith(".gz") else " (a compressed file must be named .gz)")
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        problem = "is cut short" if isinstance(error, EOFError) else "is no sound gzip file"
        raise DataError(
            f"{path}: {problem} ({error}; {number} whole lines could be read): fetch it again"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _bounded(file: gzip.GzipFile, path: str) -> Iterator[bytes]:
    """The lines of a compressed file, up to a size that no honest text has."""
    size = os.path.getsize(path)
    left = limit = max(_EXPANDED_BYTES, _EXPANDED_TIMES * size)
    while line := file.readline(left + 1):
        left -= len(line)
        if left < 0:
            raise DataError(
                f"{path}: its {size:,} bytes expand to more than {limit:,}, over "
                f"{limit // max(size, 1)} times its size, as a file does that is made to fill the "
                "memory; if it is meant, unpack it with gunzip and name the file that comes out"
            )
        yield line


def _broken(path: str, line: int, error: ValueError) -> DataError:
    if not isinstance(error, json.JSONDecodeError):
        return DataError(f"{path}:{line}: broken JSON: {error}")
    near = error.doc[max(0, error.pos - 20) : error.pos + 20]
    return DataError(
        f"{path}:{line}: broken JSON: {error.msg} at column {error.colno}, near {near!r}"
    )


def _parse_array(path: str, text: str) -> Rows:
    """The elements of a JSON array, each with the line it begins on."""
    gap = re.compile(r"\s*")
    line, begin = 1, 0

    def skip(end: int) -> str:
        """Moves to what follows `end` and white space, and returns that character."""
        nonlocal line, begin
        after = gap.match(text, end).end()
        line += text.count("\n", begin, after)
        begin = after
        return text[after : after + 1]

    try:
        if skip(0) != "[":
            found, _ = parse_json_at(text, begin)
            raise DataError(f"{path}: found {type(found).__name__}, expected an array of records")
        if skip(begin + 1) == "]":
            return
        while True:
            record, end = parse_json_at(text, begin)
            yield f"{path}:{line}", record
            after = skip(end)
            if after == "]":
                break
            if after != ",":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, begin)
            skip(begin + 1)
        if skip(begin + 1):
            raise json.JSONDecodeError("Extra data", text, begin)
    except DataError:
        raise
    except ValueError as error:
        raise _broken(path, getattr(error, "lineno", line), error) from error


def _explain_no_file(path: str) -> str:
    """Why there is nothing to be read at a path, and what is near it."""
    if os.path.isdir(path):
        names = [name for name in _listed(path) if name.endswith(FILE_TYPES)]
        holds = f"it holds {', '.join(names[:8])}" if names else "it holds no JSON files"
        return f"{path}: is a directory, expected a file: {holds}; for `datasets` write hf:{path}"
    if found := irregular(path):
        return f"{path}: {found}, expected a regular file"
    parent = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(parent):
        while not os.path.isdir(parent):
            parent = os.path.dirname(parent)
        return f"{path}: no such file: its directory is missing too; {parent} is there"
    names = _listed(parent)
    near = difflib.get_close_matches(os.path.basename(path), names, n=1)
    if near:
        return (
            f"{path}: no such file; did you mean '{os.path.join(os.path.dirname(path), near[0])}'?"
        )
    files = [name for name in names if name.endswith(FILE_TYPES)][:8]
    holds = f"holds {', '.join(files)}" if files else "holds no JSON files"
    return f"{path}: no such file; {parent} {holds}"


def _listed(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror or error}") from error


def _read_huggingface(spec: str) -> Rows:
    import datasets

    source = f"hf:{spec}"
    path, _, split = spec.partition("#")
    split = split or "train"
    if not path:
        raise DataError(f"{source}: expected a directory or the name of a data set after 'hf:'")
    path, config = os.path.expanduser(path), None
    if not os.path.exists(path):
        path, _, config = path.partition("@")
    if os.path.isfile(path):
        raise DataError(f"{source}: is a file; expected a directory or the name of a data set")
    if path.startswith((".", "/", "~")) and not os.path.isdir(path):
        raise DataError(_explain_no_file(path).replace("no such file", "no such directory"))
    saved = [name for name in ("dataset_dict.json", "state.json") if _has(path, name)]
    try:
        if saved:
            data = datasets.load_from_disk(path)
            if isinstance(data, datasets.DatasetDict):
                if split not in data:
                    raise DataError(f"{source}: no split '{split}'; it has {', '.join(data)}")
                data = data[split]
        else:
            data = datasets.load_dataset(path, name=config or None, split=split)
    except DataError:
        raise
    # The library raises what its storage back ends raise, without a common base.
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(f"{source}: `datasets` cannot load it: {reason}") from error
    for row in range(len(data)):
        yield f"{source}: row {row}", data[row]


def _has(path: str, name: str) -> bool:
    return os.path.isfile(os.path.join(path, name))


def _read_tfds(spec: str) -> Rows:
    source = f"tfds:{spec}"
    name, _, split = spec.partition("#")
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(
            f"{source}: needs the package tensorflow-datasets (not TensorFlow): "
            "pip install tensorflow-datasets array-record"
        ) from error
    try:
        data = tfds.data_source(name, split=split or "train")
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(f"{source}: `tfds` cannot load it: {reason}") from error
    for row in range(len(data)):
        where = f"{source}: row {row}"
        yield where, _plain(data[row], where)


def _plain(value: Any, where: str) -> Any:
    """Bytes and numpy values as JSON has them; a dict of lists of messages as a list of dicts."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: not UTF-8: {value[:40]!r}") from error
    if isinstance(value, dict):
        plain = {name: _plain(one, where) for name, one in value.items()}
        columns = (plain.get("role"), plain.get("content"))
        if all(isinstance(column, list) for column in columns):
            roles, contents = columns
            return [
                {"role": role, "content": content}
                for role, content in zip(roles, contents, strict=True)
            ]
        return plain
    if hasattr(value, "tolist"):
        return _plain(value.tolist(), where)
    if isinstance(value, (list, tuple)):
        return [_plain(one, where) for one in value]
    return value


def _read_builtin(spec: str) -> Rows:
    name, _, split = spec.partition("#")
    for row, record in enumerate(builtin.load_builtin(name, split or None)):
        yield f"builtin:{spec}: row {row}", record


_SCHEMES = {"hf": _read_huggingface, "tfds": _read_tfds, "builtin": _read_builtin}
