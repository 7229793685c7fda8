"""Token shards: llm.c's files of token ids, uint16 or uint32, behind a header.

csrc/core/dataloader.cpp reads them in training, and checks their headers for everybody.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmc import _llmc
from llmc.system.fs import SYSTEM, StrPath, temporary_name, write_atomically

_UINT16 = (20240520, 1)  # magic, version
_UINT32 = (20240801, 7)
_HEADER = struct.Struct("<3i 1012x")  # magic, version, number of tokens

MAX_SHARD_TOKENS = 2**31 - 1  # the header counts in an int32


def is_shard(path: StrPath) -> bool:
    """Return whether a file begins as a token file does."""
    with open(path, "rb") as file:
        return file.read(4) in (struct.pack("<i", magic) for magic, _ in (_UINT16, _UINT32))


def _token_format(vocab_size: int) -> tuple[tuple[int, int], str]:
    """Return (magic and version, NumPy dtype): uint16 if vocab_size ids fit, else uint32."""
    return (_UINT32, "<u4") if vocab_size > 1 << 16 else (_UINT16, "<u2")


def _shard_header(count: int, vocab_size: int) -> bytes:
    (magic, version), _ = _token_format(vocab_size)
    return _HEADER.pack(magic, version, count)


def write_shard(path: StrPath, tokens: ArrayLike, *, vocab_size: int | None = None) -> None:
    """Write a token file, which appears whole or not at all.

    Args:
        path: the file.
        tokens: a row of token ids.
        vocab_size: number of ids that the file must be able to hold, if it is more than those in tokens. Up to 65,536 are written as
            uint16, else uint32.

    Raises:
        ValueError: for no tokens, more than 2^31 - 1, or ids that do not fit 32 bits.
    """
    array = np.asarray(tokens)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"a token file holds one row of at least one token, got shape {array.shape}")
    if array.size > MAX_SHARD_TOKENS:
        raise ValueError(f"a token file holds at most 2^31 - 1 tokens, got {array.size}: write several")
    lowest, highest = int(array.min()), int(array.max())
    if lowest < 0 or highest >= 2**32:
        raise ValueError(f"token ids {lowest}..{highest} do not fit 32 bits without sign")
    ids = max(highest + 1, vocab_size or 0)
    write_atomically(path, [_shard_header(array.size, ids), np.ascontiguousarray(array, dtype=_token_format(ids)[1])])


class ShardWriter:
    """Writes a stream of tokens into token files as it comes, without holding a file in memory.

    It is a context manager: leaving it finishes the last file, or drops it if an exception passes through. A file gets its name only
    when it is whole. `paths` and `counts` grow with every finished file.

    Args:
        path_of: returns the path of file 0, 1, ...
        vocab_size: number of token ids; up to 65,536 are written as uint16, else uint32.
        shard_size: tokens in each file; the last has the rest. None writes one file.
    """

    def __init__(self, path_of: Callable[[int], Path], vocab_size: int, shard_size: int | None = None) -> None:
        if shard_size is not None and not 1 <= shard_size <= MAX_SHARD_TOKENS:
            raise ValueError(f"shard size is {shard_size} tokens, expected 1 to 2^31 - 1")
        self.paths: list[Path] = []
        self.counts: list[int] = []
        self._path_of, self._vocab_size = path_of, vocab_size
        self._limit = shard_size or MAX_SHARD_TOKENS
        self._single = shard_size is None
        self._dtype = _token_format(vocab_size)[1]
        self._file: IO[bytes] | None = None
        self._count = 0

    @property
    def total(self) -> int:
        """The number of tokens written so far."""
        return sum(self.counts) + self._count

    def write(self, tokens: NDArray[np.uint32]) -> None:
        """Append tokens.

        Raises:
            ValueError: if a token is outside of the vocabulary, or one file cannot hold them all.
        """
        if tokens.size and int(tokens.max()) >= self._vocab_size:
            raise ValueError(f"token {tokens.max()} is outside of the vocabulary of {self._vocab_size}")
        while tokens.size:
            if self._file is None:
                if self._single and self.paths:
                    raise ValueError(f"{self.paths[0]}: a token file holds at most 2^31 - 1 tokens: give a shard size")
                self._open()
            assert self._file is not None
            part, tokens = tokens[: self._limit - self._count], tokens[self._limit - self._count :]
            self._file.write(part.astype(self._dtype).tobytes())
            self._count += part.size
            if self._count == self._limit:
                self._finish()

    def _open(self) -> None:
        target = self._path_of(len(self.paths))
        target.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(temporary_name(target), "wb")
        self._file.seek(_HEADER.size)

    def _finish(self) -> None:
        assert self._file is not None
        target = self._path_of(len(self.paths))
        self._file.seek(0)
        self._file.write(_shard_header(self._count, self._vocab_size))
        self._file.flush()
        SYSTEM.fsync(self._file.fileno())
        self._file.close()
        SYSTEM.rename(temporary_name(target), target)
        SYSTEM.fsync_directory(target.parent)
        self._file = None
        self.paths.append(target)
        self.counts.append(self._count)
        self._count = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        if kind is None:
            self._finish()
        else:
            self._file.close()
            temporary_name(self._path_of(len(self.paths))).unlink(missing_ok=True)
            self._file = None


def read_shard(path: StrPath) -> NDArray[Any]:
    """Map the tokens of a file into memory.

    Raises:
        llmc.Error: if it is no whole token file.
    """
    info = _llmc.inspect_shard(path)
    return np.memmap(path, dtype=f"<u{info.token_bytes}", mode="r", offset=_HEADER.size, shape=(info.tokens,))
