"""JSON files as Hugging Face's folders have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmc import _llmc
from llmc.system.fs import write_atomically


def read_text(path: Path) -> str:
    """Read a text file in UTF-8.

    Raises:
        llmc.Error: if it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise _llmc.Error(f"{path}: damaged: {e}") from e


def read_object(path: Path, key: str | None = None, *, missing_ok: bool = False) -> dict[str, Any]:
    """Read a JSON file that is one object.

    Args:
        path: the file.
        key: the field whose value, an object too, is wanted; None for the whole file.
        missing_ok: return an empty object if there is no such file.

    Raises:
        llmc.Error: if the file is not JSON, or has no such object.
    """
    if missing_ok and not path.is_file():
        return {}
    try:
        value = json.loads(read_text(path))
        value = value if key is None else value[key]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise _llmc.Error(f"{path}: damaged: {type(e).__name__}: {e}") from e
    if not isinstance(value, dict):
        raise _llmc.Error(f"{path}: expected an object, found {type(value).__name__}")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a value as an indented JSON file, which appears whole or not at all."""
    write_atomically(path, [(json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()])
