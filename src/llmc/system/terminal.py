"""Text that a model wrote, on its way to a terminal."""

from __future__ import annotations

_CONTROLS = {c: "\ufffd" for c in (*range(32), *range(127, 160)) if chr(c) not in "\n\t"} | {ord("\r"): None}


def harmless(text: str) -> str:
    r"""Return the text without what steers a terminal: control characters but line breaks and tabs become U+FFFD, \r\n becomes \n."""
    return text.translate(_CONTROLS)
