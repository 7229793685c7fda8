"""metrics.jsonl: everything that a run logs, one JSON object in each line.

Every row has a kind and a time; doc/formats.md lists the other keys by kind. NaN and infinities are null, for JSON has neither, and are
read as NaN; older files have the strings "nan", "inf" and "-inf", which float() takes. After a run was resumed, a step may appear twice,
and the later row is valid. A line that a crash cut off is no JSON.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def nan_to_null(values: Mapping[str, Any]) -> Row:
    """Return values for JSON: None stands for NaN and infinities, which it lacks."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def null_to_nan(values: Mapping[str, Any]) -> Row:
    """Return values of JSON: NaN for what is null."""
    return {key: math.nan if value is None else value for key, value in values.items()}


def format_row(kind: str, **values: Any) -> str:
    """Return a row of the present time as a line with its end."""
    row = {"kind": kind, "time": round(time.time(), 3), **nan_to_null(values)}
    return json.dumps(row, allow_nan=False) + "\n"


def parse_row(line: str | bytes) -> Row:
    """Return the row of a line, with NaN for what is null.

    Raises:
        ValueError: if the line is not a JSON object.
    """
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"a row is {row!r:.60}, expected an object")
    return null_to_nan(row)


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file; lines that are not whole are passed over."""
    with open(path, "rb") as file:
        for line in file:
            yield from _whole_row(line)


def follow_rows(path: Path, interval: float) -> Iterator[Row | None]:
    """Yield the rows of a file that is being written, without end, each when its line is whole; None if there is nothing new.

    Args:
        path: the file.
        interval: seconds to wait after a None.
    """
    with open(path, "rb") as file:
        rest = b""
        while True:
            *lines, rest = (rest + file.read()).split(b"\n")
            for line in lines:
                yield from _whole_row(line)
            yield None
            time.sleep(interval)


def _whole_row(line: bytes) -> Iterator[Row]:
    try:
        yield parse_row(line)
    except ValueError:  # what a crash left; the run that resumed goes on below it
        pass
