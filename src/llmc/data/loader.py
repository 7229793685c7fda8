"""Batches from files of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmc import _llmc
from llmc.data.files import find_shards
from llmc.system.fs import StrPath
from llmc.values import check_seed, check_whole, counted


class DataLoader:
    """An endless iterator over batches (inputs, targets) from llm.c's token files.

    Epoch follows epoch. The tail of a file that does not fill a sample is not used; so a file that does not fill one is not used at
    all, if another does.

    Args:
        files: a path, a folder, a glob pattern, or several of them, as of llmc.data.files: if a folder or a glob has files for training
            and for validation, those for training.
        batch_size: B, the rows of a batch.
        seq_len: T, the tokens of a row.
        shuffle: draw a new order of files and samples for each epoch (with a Mersenne Twister); if False, keep the order of the files.
        seed: of the order, from 0 to 2^32 - 1.
        rank, ranks: which of so many processes this is. A global batch has ranks * batch_size rows, and each process gets its own.
        vocab_size: tokens from this number on are an error that names file and position; 0 does not check.
        rows_per_sample: how many rows are shuffled together, to continue a run of another batch size: its state() holds the number.
            0 is ranks * batch_size.

    Raises:
        FileNotFoundError: if a pattern matches no file.
        llmc.Error: if a file is damaged, or all are too short for one batch.
        TypeError: if files are token ids, or a number is no whole number.
        ValueError: if an argument is out of range.
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
        check_whole("batch_size", batch_size, 1)
        check_whole("seq_len", seq_len, 1)
        self.files = find_shards(files)
        self.batch_size, self.seq_len = batch_size, seq_len
        needed = (rows_per_sample or ranks * batch_size) * seq_len + 1
        if len(self.files) > 1:
            self.files = [f for f in self.files if _llmc.inspect_shard(f).tokens >= needed] or self.files
        self._native = _llmc.DataLoader(
            self.files, batch_size, seq_len, rank, ranks, shuffle, seed, vocab_size, rows_per_sample
        )
        self._order = "shuffled" if shuffle else "in order"

    def __repr__(self) -> str:
        return (
            f"DataLoader({counted(len(self.files), 'file')}, {self.num_tokens:,} tokens, batch_size={self.batch_size}, "
            f"seq_len={self.seq_len}, {self._order})"
        )

    def next_batch(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return the next batch.

        Returns:
            Inputs and targets, (B, T) of int32 each; targets are the inputs one token further.

        Raises:
            llmc.Error: if a file cannot be read, or a token is outside of the vocabulary.
        """
        return self._native.next_batch()

    def __iter__(self) -> DataLoader:
        return self

    __next__ = next_batch

    def reset(self) -> None:
        """Begin a new epoch."""
        self._native.reset()

    @property
    def shards(self) -> list[_llmc.ShardInfo]:
        """The files with what their headers say, in the order given."""
        return self._native.shards

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all files."""
        return self._native.num_tokens

    def num_batches(self, ranks: int = 1) -> int:
        """Return the number of global batches in an epoch, as llm.c counts them: all tokens / (B * T * ranks), rounded down."""
        return self.num_tokens // (self.batch_size * self.seq_len * ranks)

    def state(self) -> dict[str, Any]:
        """Return where the loader stands, as a dict of plain values and arrays. set_state() continues from there, bit for bit."""
        return self._native.state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a state that state() returned.

        Raises:
            ValueError: if the state does not fit these files.
        """
        self._native.set_state(state)
