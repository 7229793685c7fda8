"""Bits per byte: what a loss comes to for each byte of the text, which does not depend on how a tokenizer cuts it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmc.data.tokenizer import Tokenizer


def byte_lengths(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Return how many bytes of text each id stands for, (vocab_size,); 0 for special tokens, as end-of-text, which are no text."""
    lengths = np.array([len(token) for token in tokenizer.tokens], np.int64)
    lengths[list(tokenizer.special)] = 0
    return lengths


def count_bytes(targets: NDArray[Any], lengths: NDArray[np.int64]) -> int:
    """Return how many bytes of text tokens stand for.

    Args:
        targets: token ids of any shape, none negative. One beyond the tokenizer's stands for none.
        lengths: as of byte_lengths().
    """
    return int(lengths[targets[targets < len(lengths)]].sum())


def bytes_per_token(batches: Iterable[tuple[NDArray[Any], NDArray[Any]]], tokenizer: Tokenizer) -> float | None:
    """Return how many bytes of text a target of some batches stands for on average, or None if they are no text at all.

    Args:
        batches: inputs and targets, as of a DataLoader.
        tokenizer: what the tokens were made with.
    """
    lengths = byte_lengths(tokenizer)
    tokens = count = 0
    for _, targets in batches:
        tokens += targets.size
        count += count_bytes(targets, lengths)
    return count / tokens if count else None


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Return a loss in nats per token as bits per byte of the text.

    The losses of special tokens, which stand for no byte, are part of it: a model must foresee where a document ends as well.
    """
    return loss / (math.log(2) * bytes_per_token)


def nats_per_token(bits_per_byte: float, bytes_per_token: float) -> float:
    """Return bits per byte of a text as nats per token."""
    return bits_per_byte * math.log(2) * bytes_per_token
