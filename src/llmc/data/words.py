"""Words: how GPT-2 splits text before the BPE, which merges inside a word alone, and at which places a text may be cut."""

from __future__ import annotations

# GPT-2's split: contractions, then words, numbers and punctuation, each with the blank before it, then runs of white space.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def last_boundary(text: str) -> int:
    """Find the last place at which a blank or line break follows a character that is not white space; 0 if there is none."""
    at = len(text)
    while (at := max(text.rfind(" ", 0, at), text.rfind("\n", 0, at))) > 0:
        if not text[at - 1].isspace():
            return at
    return 0
