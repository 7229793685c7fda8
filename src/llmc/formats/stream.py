"""What the binary formats share: tensors as pieces of a file, and a reader that ends in an error instead of a short read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llmc import _llmc

_CHUNK = 4 << 20  # elements moved at a time


class CheckpointDamaged(_llmc.Error):
    """A checkpoint that is not whole; the message names the file and what is wrong with it."""


class ReadableTensor(Protocol):
    """A tensor of a backend, or a copy of one in host memory."""

    @property
    def numel(self) -> int: ...
    def read(self, begin: int, count: int) -> NDArray[Any]:
        """Return a flat array of count elements; bfloat16 comes as uint16."""


def chunks(numel: int) -> Iterator[tuple[int, int]]:
    """Yield (begin, count) of the parts in which a tensor of numel elements is moved."""
    for begin in range(0, numel, _CHUNK):
        yield begin, min(_CHUNK, numel - begin)


def pieces(tensor: ReadableTensor) -> Iterator[NDArray[Any]]:
    """Yield a tensor's elements as flat arrays, a chunk at a time."""
    for begin, count in chunks(tensor.numel):
        yield tensor.read(begin, count)


class Reader:
    """Reads a file in order.

    Every method raises CheckpointDamaged if the file is shorter than what is asked of it.
    """

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file, self._path = file, path
        self._left = os.fstat(file.fileno()).st_size

    def take(self, count: int) -> bytes:
        """Return the next count bytes."""
        if count > self._left:
            raise CheckpointDamaged(f"{self._path}: truncated: {count} more bytes expected, {self._left} left")
        self._left -= count
        data = self._file.read(count)
        if len(data) != count:
            raise CheckpointDamaged(f"{self._path}: cannot be read to its end")
        return data

    def floats(self, count: int) -> NDArray[np.float32]:
        """Return the next count float32."""
        return np.frombuffer(self.take(4 * count), dtype="<f4")

    def integers(self) -> NDArray[np.int32]:
        """Return the next array of int32, which a uint64 with its length precedes."""
        count = int.from_bytes(self.take(8), "little")
        if count > self._left // 4:
            raise CheckpointDamaged(f"{self._path}: announces {count} integers, {self._left} bytes are left")
        return np.frombuffer(self.take(4 * count), dtype="<i4")

    def end(self) -> None:
        """Raise CheckpointDamaged if anything is left."""
        if self._left:
            raise CheckpointDamaged(f"{self._path}: {self._left} bytes too long")
