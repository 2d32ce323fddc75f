"""Atomic writes: a reader finds the old file or the new one, never a part of either."""

import json
import os
from pathlib import Path
from typing import Any


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
