"""Token shards: llm.c's files of token ids, uint16 or uint32, behind a header.

csrc/core/dataloader.cpp reads them in training, and checks their headers for everybody.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import struct
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmc import _llmc
from llmc.system.fs import (
    SYSTEM,
    StrPath,
    named_errors,
    shell_word,
    temporary_name,
    unstage,
    write_all,
    write_atomically,
)

_UINT16 = (20240520, 1)  # magic, version
_UINT32 = (20240801, 7)
_HEADER = struct.Struct("<3i 1012x")  # magic, version, number of tokens

MAX_SHARD_TOKENS = 2**31 - 1  # the header counts in an int32

# What content_of() may call a file that has to do with tokens.
TOKENS = "a token file"
ARRAY = "a NumPy array"
BARE_IDS = "token ids of uint16 without a header, as nanoGPT writes them"
TEXT = "text"

_MAGICS = {  # a file's first four bytes
    **{struct.pack("<i", magic): TOKENS for magic, _ in (_UINT16, _UINT32)},
    struct.pack("<i", 20240326): "a model",
    struct.pack("<i", 20240327): "a debug state",
    struct.pack("<i", 20240328): "a tokenizer",
    struct.pack("<i", 20240522): "an eval file",
    struct.pack("<i", 20240527): "the state of a run",
    b"\x93NUM": ARRAY,
}
_GPT2_IDS = 50304  # GPT-2's vocabulary, padded
_SAMPLE = 1 << 16  # bytes by which a file of another program is recognised


def content_of(path: StrPath) -> str | None:
    """Tell by its first bytes what a file seems to be.

    Returns:
        TOKENS, ARRAY, BARE_IDS, TEXT, or the name of another of llm.c's files, as "a tokenizer"; None for anything else, a pipe among it.
    """
    if not Path(path).is_file():
        return None  # a pipe would lose what is read of it
    with open(path, "rb") as file:
        head = file.read(4)
        if head in _MAGICS:
            return _MAGICS[head]
        head += file.read(_SAMPLE - 4)
        size = file.seek(0, 2)
    if len(head) >= 64 and b"\0" not in head:
        with contextlib.suppress(UnicodeDecodeError):
            codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut
            return TEXT
    headed = len(head) >= 1024 and not any(head[12:1024])  # as llm.c's files are: a damaged one
    # Of bytes that are no ids nearly a quarter of the pairs is above.
    if size and size % 2 == 0 and not headed and int(np.frombuffer(head, "<u2").max()) < _GPT2_IDS:
        return BARE_IDS
    return None


def is_shard(path: StrPath) -> bool:
    """Return whether a file begins as a token file does."""
    return content_of(path) == TOKENS


def check_token_file(path: StrPath) -> None:
    """Refuse a file that is clearly something else than a token file of llm.c's; of any other, inspect_shard() tells the damage.

    Raises:
        ValueError: says what the file seems to be, and how to convert it if it has tokens.
    """
    content = content_of(path)
    if content in (ARRAY, BARE_IDS):
        command = f"llmc data tokens {shell_word(path)} -o data/mine" + (
            " --dtype uint16" if content == BARE_IDS else ""
        )
        raise ValueError(f"{path}: seems to be {content}, not a token file of llm.c's. If so, convert it: {command}")
    if content not in (TOKENS, None):
        raise ValueError(f"{path}: {content}, not a token file. Name the token files, or their folder")


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
        TypeError: if tokens are text.
        ValueError: for no tokens, more than 2^31 - 1, or ids that are no integers or do not fit 32 bits.
    """
    array = np.asarray(tokens)
    if array.dtype.kind in "SUT":
        raise TypeError("token ids must be integers, got text: a tokenizer's encode(text) makes them of it")
    if array.dtype.kind not in "iu" and array.size:
        raise ValueError(f"token ids must be integers, got {array.dtype}")
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
        shard_size: tokens in each file; the last has the rest. If the rest is a single token, from which nothing can be learned, the
            file before has it. None writes one file.
    """

    def __init__(self, path_of: Callable[[int], Path], vocab_size: int, shard_size: int | None = None) -> None:
        if shard_size is not None and not 2 <= shard_size < MAX_SHARD_TOKENS:
            raise ValueError(f"shard size is {shard_size} tokens, expected 2 to 2^31 - 2")
        self.paths: list[Path] = []
        self.counts: list[int] = []
        self._path_of, self._vocab_size = path_of, vocab_size
        self._limit = shard_size or MAX_SHARD_TOKENS
        self._single = shard_size is None
        self._dtype = np.dtype(_token_format(vocab_size)[1])
        self._file: int | None = None  # its descriptor
        self._count = self._given = 0
        # A token that follows a full file, until another shows that it is not the last.
        self._held = np.empty(0, np.uint32)

    @property
    def total(self) -> int:
        """The number of tokens written so far."""
        return sum(self.counts) + self._count + self._held.size

    @property
    def bytes(self) -> int:
        """The number of bytes of the tokens that write() was given, written or not."""
        return self._given * self._dtype.itemsize

    def write(self, tokens: NDArray[np.uint32]) -> None:
        """Append tokens.

        Raises:
            ValueError: if a token is outside of the vocabulary, or one file cannot hold them all.
            OSError: if the system refuses; the message names the file, and what was written of it.
        """
        if tokens.size and int(tokens.max()) >= self._vocab_size:
            raise ValueError(f"token {tokens.max()} is outside of the vocabulary of {self._vocab_size}")
        self._given += tokens.size
        if self._held.size and tokens.size:
            tokens, self._held = np.concatenate([self._held, tokens]), self._held[:0]
        while tokens.size:
            if self._count == self._limit:
                if self._single:
                    raise ValueError(
                        f"{self._path_of(0)}: a token file holds at most 2^31 - 1 tokens: give a shard size"
                    )
                if tokens.size == 1:
                    self._held = tokens
                    return
                self._finish()
            part, tokens = tokens[: self._limit - self._count], tokens[self._limit - self._count :]
            self._append(part)

    def _append(self, tokens: NDArray[np.uint32]) -> None:
        if self._file is None:
            target = self._path_of(len(self.paths))
            SYSTEM.make_directory(target.parent)
            self._file = SYSTEM.open_new(temporary_name(target))
            self._write(bytes(_HEADER.size))  # filled in at the end
        self._write(tokens.astype(self._dtype))
        self._count += tokens.size

    def _write(self, data: Any) -> None:
        assert self._file is not None
        target = self._path_of(len(self.paths))
        with named_errors(target, temporary_name(target)):
            write_all(self._file, data)

    def _finish(self) -> None:
        assert self._file is not None
        target = self._path_of(len(self.paths))
        if self._count < 2:
            raise ValueError(
                f"{target}: {self._count} token is too few for a token file: nothing can be learned from it"
            )
        os.lseek(self._file, 0, os.SEEK_SET)
        self._write(_shard_header(self._count, self._vocab_size))
        with named_errors(target, temporary_name(target)):
            SYSTEM.fsync(self._file)
            self._close()
            SYSTEM.rename(temporary_name(target), target)
            SYSTEM.fsync_directory(target.parent)
        self.paths.append(target)
        self.counts.append(self._count)
        self._count = 0

    def _close(self) -> None:
        descriptor, self._file = self._file, None
        if descriptor is not None:
            SYSTEM.close(descriptor)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._count:
                if self._held.size:
                    self._append(self._held)
                    self._held = self._held[:0]
                self._finish()
        finally:
            self._close()
            unstage(self._path_of(len(self.paths)))


def read_shard(path: StrPath) -> NDArray[Any]:
    """Map the tokens of a file into memory.

    Raises:
        llmc.Error: if it is no whole token file.
    """
    info = _llmc.inspect_shard(path)
    return np.memmap(path, dtype=f"<u{info.token_bytes}", mode="r", offset=_HEADER.size, shape=(info.tokens,))
