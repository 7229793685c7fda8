"""What is held out of a text for validation: its end, or pieces from all over it."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

HOLDOUTS = ("end", "spread")
_FRACTION = 0.1
_SHORTEST = 2000  # characters of a piece
_MOST = 64  # pieces
_GOLDEN = (5**0.5 - 1) / 2


def hold_out(documents: Sequence[str], holdout: str = "end") -> tuple[list[str], list[str]]:
    """Hold a tenth of a text out for validation, before it is tokenised: so the same text for all tokenizers, of which none learnt from it.

    A piece begins and ends between paragraphs, lines or words, if there is such a place near. A document that is cut becomes several.

    Args:
        documents: the text.
        holdout: "end" for the last tenth. "spread" for the last tenth of each of up to 64 parts of equal length; these come in an order
            in which the first few are from all over the text as well.

    Returns:
        The documents to train on, and those to validate on.

    Raises:
        ValueError: if one of them would be empty.
    """
    size = sum(map(len, documents))
    parts = min(max(int(_FRACTION * size) // _SHORTEST, 1), _MOST) if holdout == "spread" else 1
    length = int(_FRACTION * size / parts)
    ends = [size * (part + 1) // parts for part in range(parts)]
    marks = [mark for end in ends for mark in (end - length, end)]  # where a piece begins and where it ends
    train: list[str] = []
    held: list[list[str]] = [[] for _ in ends]
    at = 0  # of the document, in the whole text
    for document in documents:
        first, last = bisect.bisect_right(marks, at), bisect.bisect_left(marks, at + len(document))
        cuts = [0, *(_boundary(document, mark - at, length // 2) for mark in marks[first:last]), len(document)]
        for passed, (begin, end) in enumerate(zip(cuts, cuts[1:]), first):
            text = document[begin:end]
            if text or not document:
                (held[passed // 2] if passed % 2 else train).append(text)
        at += len(document)
    order = sorted(range(parts), key=lambda part: part * _GOLDEN % 1)
    val = [text for part in order for text in held[part]]
    if not any(train) or not any(val):
        raise ValueError(f"{size} characters are too few to train on and to validate with")
    return train, val


def _boundary(text: str, begin: int, width: int) -> int:
    """Return the first place in text[begin : begin + width] that is between paragraphs, else lines, else words; begin if there is none."""
    for separator in ("\n\n", "\n", " "):
        if (found := text.find(separator, begin, begin + width)) >= 0:
            return found + len(separator)
    return begin
