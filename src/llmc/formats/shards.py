"""Token shards: llm.c's files of token ids, uint16 or uint32, behind a header.

csrc/core/dataloader.cpp reads them in training, and checks their headers for everybody.
"""

from __future__ import annotations

import codecs
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

_OTHER_FILES = {  # llm.c's other files, by their magic
    20240326: "a model",
    20240327: "a debug state",
    20240328: "a tokenizer",
    20240522: "an eval file",
    20240527: "the state of a run",
}
_GPT2_IDS = 50304  # GPT-2's vocabulary, padded
_SAMPLE = 1 << 16  # bytes by which a file of another program is recognised


def is_shard(path: StrPath) -> bool:
    """Return whether a file begins as a token file does."""
    if not Path(path).is_file():
        return False  # a pipe would lose what is read of it
    with open(path, "rb") as file:
        return file.read(4) in (struct.pack("<i", magic) for magic, _ in (_UINT16, _UINT32))


def foreign_tokens(path: StrPath) -> str | None:
    """Recognise the token files of other programs.

    Returns:
        "npy" for a NumPy array; "uint16" for a file that seems to be of ids and nothing else, as nanoGPT's train.bin; else None.
    """
    with open(path, "rb") as file:
        head = file.read(_SAMPLE)
        size = file.seek(0, 2)
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    if (
        other_file(path) or size % 2 or len(head) < 2 or (len(head) >= 1024 and not any(head[12:1024]))
    ):  # the last is a header
        return None
    # Of bytes that are no ids nearly a quarter of the pairs is above.
    return "uint16" if int(np.frombuffer(head[: len(head) // 2 * 2], "<u2").max()) < _GPT2_IDS else None


def _is_text(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def check_token_file(path: StrPath) -> None:
    """Refuse a file that is clearly something else than a token file of llm.c's; of any other, inspect_shard() tells the damage.

    Raises:
        ValueError: says what the file seems to be, and how to convert it if it has tokens.
    """
    if not Path(path).is_file() or is_shard(path):
        return
    if other := other_file(path):
        raise ValueError(f"{path}: {other}, not a token file. Name the token files, or their folder")
    if kind := foreign_tokens(path):
        what = "a NumPy array" if kind == "npy" else "token ids of uint16 without a header, as nanoGPT writes them"
        command = f"llmc data tokens {shell_word(path)} -o data/mine" + ("" if kind == "npy" else " --dtype uint16")
        raise ValueError(f"{path}: seems to be {what}, not a token file of llm.c's. If so, convert it: {command}")


def other_file(path: StrPath) -> str | None:
    """Return what a file is if it is another file of llm.c's, or text: "a tokenizer"; else None."""
    with open(path, "rb") as file:
        head = file.read(_SAMPLE)
    if b"\0" not in head and len(head) >= 64 and _is_text(head):
        return "text"
    return next((name for magic, name in _OTHER_FILES.items() if head.startswith(struct.pack("<i", magic))), None)


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
        self._held = np.empty(
            0, np.uint32
        )  # a token that follows a full file, until another shows that it is not the last

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
