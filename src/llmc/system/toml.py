"""TOML files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def load_toml_file(path: str | Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not TOML; the message names file and line.
    """
    with open(path, "rb") as file:
        try:
            return tomllib.load(file)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
            raise ValueError(f"{path}: not TOML: {e}") from e
