"""What xz reaches: how many bits it needs for each byte of a text, if it has another one before."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from numpy.typing import NDArray

from llmc.data.tokenizer import Tokenizer

MOST = 4 << 20  # bytes of both texts
SECONDS = 20.0
_CHUNK = 1 << 16


def xz_bits_per_byte(text: bytes, before: bytes, most: int = MOST, seconds: float = SECONDS) -> float | None:
    """Measure what xz -9e adds for a text that follows another: the bits for both, less those for the other one alone.

    Args:
        text, before: the texts; before may be empty.
        most: how many bytes both may have.
        seconds: how long it may take.

    Returns:
        The bits for each byte of text; None if there are too many bytes, or none, if it would take too long, or if this Python was
        built without lzma.
    """
    if importlib.util.find_spec("_lzma") is None or not text or len(text) + len(before) > most:
        return None
    end = time.monotonic() + seconds
    with ThreadPoolExecutor(2) as pool:  # the compressor releases the interpreter
        both, alone = pool.map(lambda data: _compressed(data, end), (before + text, before))
    return None if both is None or alone is None else 8 * (both - alone) / len(text)


def text_of(arrays: Iterable[NDArray[Any]], tokenizer: Tokenizer) -> bytes:
    """Return the bytes of the text that tokens stand for.

    Args:
        arrays: token ids of any shape. Special tokens, and ids beyond the tokenizer's, are no text.
        tokenizer: what the tokens were made with.
    """
    table = [b"" if i in tokenizer.special else token for i, token in enumerate(tokenizer.tokens)]
    known = (tokens[tokens < len(table)] for tokens in arrays)
    return b"".join(b"".join(map(table.__getitem__, tokens.tolist())) for tokens in known)


def _compressed(data: bytes, end: float) -> int | None:
    """Return the bytes that xz makes of data, without the frame of its file; None if it takes until after end."""
    import lzma

    # The window is as large as the text: preset 9's own, 64 MiB, would take ten times the memory and find nothing more.
    window = max(4096, len(data))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": window}]
    compressor = lzma.LZMACompressor(lzma.FORMAT_RAW, filters=filters)
    size = 0
    for begin in range(0, len(data), _CHUNK):
        size += len(compressor.compress(data[begin : begin + _CHUNK]))
        if time.monotonic() > end:
            return None
    return size + len(compressor.flush())
