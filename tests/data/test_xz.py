"""What xz reaches: against the program's own format, and when it is not known."""

from __future__ import annotations

import importlib.util
import lzma

import numpy as np
import pytest

from llmc.data.tokenizer import Tokenizer
from llmc.data.xz import text_of, xz_bits_per_byte

WORDS = np.random.default_rng(3).choice("the a cat dog sat on mat log and then it was".split(), 12_000)
TEXT = " ".join(WORDS).encode()


def test_bits_per_byte() -> None:
    before, text = TEXT[:40_000], TEXT[40_000:]
    sizes = [len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) for data in (TEXT, before)]
    assert xz_bits_per_byte(text, before) == pytest.approx(8 * (sizes[0] - sizes[1]) / len(text), rel=0.01)
    alone = xz_bits_per_byte(text, b"")
    assert alone is not None and alone > 1.5
    repeated = xz_bits_per_byte(text, text)
    assert repeated is not None and repeated < 0.05


def test_when_it_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert xz_bits_per_byte(TEXT, TEXT, most=2 * len(TEXT)) is not None
    assert xz_bits_per_byte(TEXT, TEXT, most=2 * len(TEXT) - 1) is None
    assert xz_bits_per_byte(b"", TEXT) is None
    assert xz_bits_per_byte(TEXT, b"", seconds=0) is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert xz_bits_per_byte(TEXT, b"") is None


def test_the_text_of_tokens() -> None:
    tokenizer = Tokenizer.train_bpe("a cat sat. " * 20, 270)
    tokens = np.array(tokenizer.encode("a cat, Grüße"))
    rows = [np.array([tokenizer.eot_token]), tokens[:4].reshape(2, 2), np.array([270, 9999]), tokens[4:]]
    assert text_of(rows, tokenizer) == "a cat, Grüße".encode()
