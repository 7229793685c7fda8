"""metrics.jsonl: everything that a run tells, one JSON object a line, with its `kind` and `time`.

NaN and infinities are strings, because JSON has neither: float() reads both. A crash may cut off the last line; a run that resumes
writes on in the line below.
"""

from __future__ import annotations

import json
import math
import time
from typing import Any

FILE_NAME = "metrics.jsonl"


def encode_row(kind: str, **values: Any) -> str:
    """Return the line, its end included, of a row that is written now.

    Args:
        kind: "train", "validation", "hellaswag", "message" or "end".
        values: the row's other fields.
    """
    plain = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps({"kind": kind, "time": round(time.time(), 3), **plain}) + "\n"


def decode_row(line: str | bytes) -> dict[str, Any] | None:
    """Return the row in a line, or None if the line is not a whole one."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
