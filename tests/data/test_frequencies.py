"""Frequencies of tokens and pairs against the formula written out with dictionaries, and what is counted of many files."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from llmc import DataLoader, _llmc
from llmc.data.frequencies import Frequencies, frequency_losses
from llmc.formats.shards import write_shard


@pytest.mark.parametrize("vocab_size", [7, 70_000])  # pairs of 32 bits and of 64
def test_formula(vocab_size: int) -> None:
    rng = np.random.default_rng(1)
    largest = vocab_size - 1
    pieces = [np.where(rng.random(40) < 0.3, largest, rng.integers(0, 4, 40)).astype(np.uint32) for _ in range(2)]
    known = Frequencies(pieces, vocab_size)
    tokens = Counter(int(t) for piece in pieces for t in piece)
    pairs = Counter((int(a), int(b)) for piece in pieces for a, b in zip(piece[:-1], piece[1:]))
    begun, different = Counter(), Counter()
    for (a, _), count in pairs.items():
        begun[a] += count
        different[a] += 1

    def p(b: int) -> float:
        return (tokens[b] + 0.5) / (80 + vocab_size / 2)

    ids = np.arange(vocab_size) if vocab_size < 100 else np.asarray([0, 1, 3, 5, 65_537, largest])
    for a in ids.tolist():
        expected = [
            max(pairs[a, b] - 0.75, 0) / begun[a] + 0.75 * different[a] / begun[a] * p(b) if begun[a] else p(b)
            for b in ids.tolist()
        ]
        np.testing.assert_allclose(known.pairs(np.full_like(ids, a), ids), expected, rtol=1e-12)
        everything = np.arange(vocab_size)
        assert math.isclose(known.pairs(np.full_like(everything, a), everything).sum(), 1, rel_tol=1e-9)
    np.testing.assert_allclose(known.tokens(ids), [p(b) for b in ids.tolist()], rtol=1e-12)
    assert math.isclose(known.tokens(np.arange(vocab_size)).sum(), 1, rel_tol=1e-9)


def test_losses_are_those_of_the_source(tmp_path):
    """Of a Markov chain both losses are known: the entropy of its tokens, and that of a token after another."""
    rng = np.random.default_rng(2)
    coins = rng.random(60_000)
    tokens = (np.cumsum(np.where(coins < 0.9, 1, 2)) % 8).astype(np.uint32)  # one further, or two
    for name, part in (("train", tokens[:50_000]), ("val", tokens[50_000:])):
        write_shard(tmp_path / f"{name}.bin", part, vocab_size=8)
    train, val = (DataLoader(tmp_path / f"{name}.bin", 4, 16) for name in ("train", "val"))
    found = frequency_losses(train.shards, [val.next_batch() for _ in range(100)], 8)
    assert found.unigram == pytest.approx(math.log(8), abs=0.01)
    assert found.bigram == pytest.approx(-(0.9 * math.log(0.9) + 0.1 * math.log(0.1)), abs=0.03)
    assert (found.counted, found.total) == (50_000, 50_000)
    with pytest.raises(ValueError, match="no batches"):
        frequency_losses(train.shards, [], 8)


def test_much_data_is_counted_in_pieces(tmp_path):
    """Three files of one token each, of 1,000, 5,000 and 4,000: the pieces are of all, as large as they are."""
    for i, count in enumerate((1000, 5000, 4000)):
        write_shard(tmp_path / f"{i}.bin", np.full(count, i, np.uint32), vocab_size=4)
    shards = [_llmc.inspect_shard(tmp_path / f"{i}.bin") for i in range(3)]
    batch = np.asarray([[0, 1, 2]], np.int32)

    def shares(most: int) -> np.ndarray:
        losses = [frequency_losses(shards, [(batch[:, i : i + 1],) * 2], 4, most) for i in range(3)]
        assert all(found.total == 10_000 and found.counted <= most for found in losses)
        return np.exp([-found.unigram for found in losses])

    np.testing.assert_allclose(shares(10_000), [0.1, 0.5, 0.4], atol=1e-3)
    np.testing.assert_allclose(shares(1_000), [0.1, 0.5, 0.4], atol=0.03)
