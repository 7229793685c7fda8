"""doc/tour.md shows the ops of a step as its program prints them."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path


def test_ops_of_a_step() -> None:
    text = (Path(__file__).parents[2] / "doc" / "tour.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^```python\n([\s\S]*?)^```", text, re.MULTILINE)
    _, shown = re.findall(r"^```text\n([\s\S]*?)^```", text, re.MULTILINE)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(program, {})
    assert printed.getvalue() == shown
