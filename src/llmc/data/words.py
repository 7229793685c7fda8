"""Words: how GPT-2 splits text before the BPE, which merges inside a word alone, and at which places a text may be cut."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

import regex

# GPT-2's split: contractions, then words, numbers and punctuation, each with the blank before it, then runs of white space.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# Splits in tokenizer.json files, as Hugging Face writes them: of GPT-4 and Llama 3, of Qwen, of GPT-4o.
KNOWN_PATTERNS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)

LONGEST_WORD = 1 << 20  # characters: where a stream has more without a boundary, it is cut all the same

# Between two characters that match, every split has a boundary, whatever comes before and after: GPT-2's, and those of GPT-4, GPT-4o,
# Llama 3 and Qwen, in which a word may begin with punctuation and end in line breaks or slashes, and in which marks and apostrophes may
# belong to a word. It is searched for from the end.
_LAST_BOUNDARY = regex.compile(
    r"(?r)(?<=\S)(?= )|(?<=[\p{L}\p{N}])(?=[^\p{L}\p{N}\p{M}'\n])|(?<=\p{L})(?=\p{N})|(?<=\p{N})(?=\p{L})|(?<=\S\n)(?=[^\s/])"
)
_LOOKED_AT = 2  # characters before a place, which say whether it is a boundary


def last_boundary(text: str, begin: int = 0, end: int | None = None) -> int:
    """Find the last place in text[begin:end], not its end, at which its words end whatever comes after it; 0 if there is none."""
    # None, not a large number: regex takes positions as a C long, which has 32 bits on Windows.
    found = _LAST_BOUNDARY.search(text, begin, end)
    return found.start() if found else 0


def cut(rest: str, more: str) -> tuple[list[str], str]:
    """Cut a text that goes on.

    Args:
        rest: what the last call left, empty at first.
        more: the characters that come next.

    Returns:
        Pieces whose words are those of the whole text, but that a word is cut after LONGEST_WORD characters without a boundary; and the
        new rest. The places depend on the text alone if they are long words'.
    """
    text, begin = rest + more, max(0, len(rest) - _LOOKED_AT)  # the rest has no boundary
    pieces = []
    while len(text) > LONGEST_WORD and not last_boundary(text, begin, LONGEST_WORD + 1):
        pieces.append(text[:LONGEST_WORD])
        text, begin = text[LONGEST_WORD:], 0
    if end := last_boundary(text, begin):
        pieces.append(text[:end])
        text = text[end:]
    return pieces, text


def cut_all(texts: Iterable[str]) -> Iterator[str]:
    """Cut texts, each of which is whole, into pieces as of cut()."""
    for text in texts:
        rest = ""
        for begin in range(0, len(text), LONGEST_WORD):
            pieces, rest = cut(rest, text[begin : begin + LONGEST_WORD])
            yield from pieces
        if rest:
            yield rest


def may_have_long_words(text: str, length: int) -> bool:
    """Return whether a word of GPT-2's split may have `length` characters or more, in far less time than it takes to split the text.

    Such a word, but for a blank before it, is all white space or has none. So is then one of the blocks of half that length.
    """
    block = (length + 1) // 2
    return any(len(text[i : i + block].split(None, 1)) < 2 for i in range(0, len(text) - block + 1, block))


def split_long_words(text: str, length: int) -> Iterator[tuple[str, bool]]:
    """Split a text into its words of `length` characters or more, as GPT-2's split has them, and the texts between them.

    Yields:
        Parts of the text, and whether the part is such a word, or the white space before one.
    """
    for match in _long_words(length).finditer(text):
        yield match.group(), match.lastgroup == "long"


@functools.cache
def _long_words(length: int) -> regex.Pattern[str]:
    n = f"{{{length}}}"
    # White space before a long word is a part by itself: at the end of the part before, it would be split as that of the text's end.
    ahead = rf"\s?(?:\p{{L}}{n}|\p{{N}}{n}|[^\s\p{{L}}\p{{N}}]{n})|\s{n}"
    return regex.compile(rf"(?:(?!{ahead})(?:{GPT2_PATTERN}))++|(?P<long>{GPT2_PATTERN})")
