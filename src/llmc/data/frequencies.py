"""What counting alone reaches: the loss of a model that knows only how frequent tokens are, or which token follows which."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmc import _llmc
from llmc.formats.shards import read_shard

MOST_COUNTED = 1 << 22  # tokens: a quarter of a second, and 150 MB for a moment
_PIECES = 64
_UNSEEN = 0.5  # times that every token was seen before the first one was counted
_DISCOUNT = 0.75  # of the count of each pair


@dataclass(frozen=True)
class FrequencyLosses:
    """Mean cross-entropies in nats per token.

    Attributes:
        unigram: of a model that knows how frequent each token is.
        bigram: of one that knows which token follows which.
        counted: number of training tokens that the frequencies are from.
        total: number of all of them.
    """

    unigram: float
    bigram: float
    counted: int
    total: int


class Frequencies:
    """How often tokens, and pairs of neighbours, occur. With V tokens, N of them counted, c(a) pairs that begin with a, and n(a)
    different ones among them, the probabilities are

        p(b)     = (c(b) + 1/2) / (N + V/2)
        p(b | a) = max(c(ab) - 3/4, 0) / c(a) + 3/4 n(a) / c(a) p(b)

    (Krichevsky and Trofimov 1981; Ney, Essen and Kneser 1994: absolute discounting); p(b | a) is p(b) if there is no a.

    Args:
        pieces: texts as arrays (n,) of token ids, at least one of them with two. A pair does not go from one into the next.
        vocab_size: V.
    """

    def __init__(self, pieces: Iterable[NDArray[Any]], vocab_size: int) -> None:
        kept = list(pieces)
        tokens = np.concatenate(kept)
        counts = np.bincount(tokens, minlength=vocab_size)
        self.counted = tokens.size
        self._size = len(counts)
        self._token: NDArray[Any] = (counts + _UNSEEN) / (tokens.size + _UNSEEN * self._size)
        # A pair is one number, so that there is no table of V * V; for GPT-2's vocabulary it fits into 32 bits.
        self._number = np.dtype(np.uint32 if self._size**2 <= 1 << 32 else np.uint64).type
        numbers = np.concatenate([self._pairs(piece[:-1], piece[1:]) for piece in kept])
        self._seen, self._count = np.unique(numbers, return_counts=True)
        first = (self._seen // self._number(self._size)).astype(np.int64)
        self._first_count = np.bincount(first, self._count, minlength=self._size)
        self._different = np.bincount(first, minlength=self._size)

    def _pairs(self, first: NDArray[Any], second: NDArray[Any]) -> NDArray[Any]:
        pairs: NDArray[Any] = first.astype(self._number) * self._number(self._size) + second.astype(self._number)
        return pairs

    def tokens(self, tokens: NDArray[Any]) -> NDArray[np.float64]:
        """Return p(b) for an array of tokens b."""
        p: NDArray[np.float64] = self._token[tokens]
        return p

    def pairs(self, first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.float64]:
        """Return p(b | a) for arrays of a and of b of the same shape."""
        number = self._pairs(first, second)
        place = np.minimum(np.searchsorted(self._seen, number), self._seen.size - 1)
        count = np.where(self._seen[place] == number, self._count[place], 0)
        begun = self._first_count[first]
        total = np.maximum(begun, 1)  # an a that was not seen leaves all of the probability to p(b)
        share = np.where(begun > 0, _DISCOUNT * self._different[first] / total, 1.0)
        p: NDArray[np.float64] = np.maximum(count - _DISCOUNT, 0) / total + share * self._token[second]
        return p


def frequency_losses(
    shards: Sequence[_llmc.ShardInfo],
    batches: Iterable[tuple[NDArray[np.int32], NDArray[np.int32]]],
    vocab_size: int,
    most: int = MOST_COUNTED,
) -> FrequencyLosses:
    """Measure what the frequencies in training data say about batches of validation data.

    Args:
        shards: the token files to train on. Of more than `most` tokens 64 pieces are counted, evenly spread over them.
        batches: inputs and targets, as of a DataLoader.
        vocab_size: number of token ids.
        most: how many tokens are counted.

    Raises:
        OSError, llmc.Error: if a file cannot be read.
        ValueError: if there are no batches.
    """
    known = Frequencies(_spread(shards, most), vocab_size)
    logs = np.zeros(2)
    count = 0
    for inputs, targets in batches:
        logs += np.log(known.tokens(targets)).sum(), np.log(known.pairs(inputs, targets)).sum()
        count += targets.size
    if count == 0:
        raise ValueError("there are no batches to measure")
    unigram, bigram = (-logs / count).tolist()
    return FrequencyLosses(unigram, bigram, known.counted, sum(shard.tokens for shard in shards))


def _spread(shards: Sequence[_llmc.ShardInfo], most: int) -> Iterator[NDArray[Any]]:
    """Yield the tokens of all files, or of 64 pieces of them, which have no more than `most` tokens together."""
    ends = np.cumsum([shard.tokens for shard in shards])
    if ends[-1] <= most:
        yield from (read_shard(shard.path) for shard in shards)
        return
    length = max(2, most // _PIECES)
    for begin in np.linspace(0, ends[-1] - length, _PIECES).astype(np.int64).tolist():
        i = int(np.searchsorted(ends, begin, side="right"))
        start = begin - int(ends[i] - shards[i].tokens)
        yield read_shard(shards[i].path)[start : start + length]
