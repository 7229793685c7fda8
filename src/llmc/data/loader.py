"""Batches from token shards."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmc import _llmc
from llmc.system.fs import StrPath
from llmc.values import check_seed


def find_shards(patterns: StrPath | Sequence[StrPath]) -> list[Path]:
    """The files that one or more glob patterns match, sorted. FileNotFoundError where there are none."""
    if isinstance(patterns, (str, os.PathLike)):
        patterns = [patterns]
    found: list[Path] = []
    for pattern in patterns:
        text = os.fspath(pattern)
        matches = [text] if os.path.isfile(text) else sorted(glob.glob(text))
        if not matches:
            raise FileNotFoundError(f"no files match '{text}'")
        found += [Path(m) for m in matches]
    return found


class DataLoader:
    """Batches of (inputs, targets) from llm.c token files.

    files: a path, a glob pattern, or several.
    batch_size, seq_len: B and T of a batch; targets are the inputs one token further.
    shuffle: shards and samples in an order drawn anew each epoch (Mersenne Twister, seed from 0 to 2^32 - 1); else file order.
    rank, ranks: this process's rows of every global batch of ranks * batch_size rows.
    vocab_size: tokens outside of it are an error that names file and position.
    rows_per_sample: of the run that this one continues, where its batch size was another (DataLoader.state).

    The tail of a shard that fills no sample is not used. Iterating never ends: epochs follow each other.
    """

    def __init__(
        self,
        files: StrPath | Sequence[StrPath],
        batch_size: int,
        seq_len: int,
        *,
        shuffle: bool = False,
        seed: int = 42,
        rank: int = 0,
        ranks: int = 1,
        vocab_size: int = 0,
        rows_per_sample: int = 0,
    ) -> None:
        check_seed(seed, 32)
        self.files = find_shards(files)
        self.batch_size, self.seq_len = batch_size, seq_len
        self._native = _llmc.DataLoader(
            self.files, batch_size, seq_len, rank, ranks, shuffle, seed, vocab_size, rows_per_sample
        )

    def next_batch(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """inputs and targets, (B, T) each."""
        return self._native.next_batch()

    def __iter__(self) -> DataLoader:
        return self

    __next__ = next_batch

    def reset(self) -> None:
        """Begins a new epoch."""
        self._native.reset()

    @property
    def shards(self) -> list[_llmc.ShardInfo]:
        """The files with what their headers say, in the order given."""
        return self._native.shards

    @property
    def num_tokens(self) -> int:
        return self._native.num_tokens

    def num_batches(self, ranks: int = 1) -> int:
        """Global batches in an epoch, llm.c's way: all tokens / (B * T * ranks)."""
        return self.num_tokens // (self.batch_size * self.seq_len * ranks)

    def state(self) -> dict[str, Any]:
        """Where the loader stands, as plain values and arrays; set_state() continues from there, bit for bit."""
        return self._native.state()

    def set_state(self, state: dict[str, Any]) -> None:
        """ValueError where the state does not fit these files."""
        self._native.set_state(state)
