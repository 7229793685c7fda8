"""Token shards and batches."""

from __future__ import annotations

import glob
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmc import _llmc

StrPath = str | os.PathLike[str]

_UINT16 = (20240520, 1)  # magic, version
_UINT32 = (20240801, 7)


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


def write_shard(path: StrPath, tokens: ArrayLike, *, vocab_size: int | None = None) -> None:
    """Writes a llm.c token file: uint16 where the vocabulary fits (up to 65,536 ids), else uint32.

    The file appears whole or not at all. ValueError for no tokens, more than 2^31 - 1, or negative ones.
    """
    array = np.asarray(tokens)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"a token file holds one row of at least one token, got shape {array.shape}")
    if array.size > 2**31 - 1:
        raise ValueError(f"a token file holds at most 2^31 - 1 tokens, got {array.size}: write several")
    lowest, highest = int(array.min()), int(array.max())
    if lowest < 0 or highest >= 2**32:
        raise ValueError(f"token ids {lowest}..{highest} do not fit 32 bits without sign")
    wide = max(highest, (vocab_size or 1) - 1) > 0xFFFF
    magic, version = _UINT32 if wide else _UINT16
    header = struct.pack("<3i", magic, version, array.size).ljust(1024, b"\0")
    from llmc.fs import write_atomically

    write_atomically(path, [header, np.ascontiguousarray(array, dtype="<u4" if wide else "<u2")])


class DataLoader:
    """Batches of (inputs, targets) from llm.c token files.

    files: a path, a glob pattern, or several.
    batch_size, seq_len: B and T of a batch; targets are the inputs one token further.
    shuffle: shards and samples in an order drawn anew each epoch (Mersenne Twister, seed); else file order.
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
        self.files = find_shards(files)
        self.batch_size, self.seq_len = batch_size, seq_len
        self.native = _llmc.DataLoader(
            self.files, batch_size, seq_len, rank, ranks, shuffle, seed, vocab_size, rows_per_sample
        )

    def next_batch(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """inputs and targets, (B, T) each."""
        return self.native.next_batch()

    def __iter__(self) -> DataLoader:
        return self

    __next__ = next_batch

    def reset(self) -> None:
        """Begins a new epoch."""
        self.native.reset()

    @property
    def num_tokens(self) -> int:
        return self.native.num_tokens

    def num_batches(self, ranks: int = 1) -> int:
        """Global batches in an epoch, llm.c's way: all tokens / (B * T * ranks)."""
        return self.num_tokens // (self.batch_size * self.seq_len * ranks)

    def state(self) -> dict[str, Any]:
        """Where the loader stands, as plain values and arrays; set_state() continues from there, bit for bit."""
        return self.native.state()

    def set_state(self, state: dict[str, Any]) -> None:
        """ValueError where the state does not fit these files."""
        self.native.set_state(state)
