"""llm.c's eval file: questions with several endings, one of them right, as token ids (HellaSwag, MMLU).

After the header, a stream of uint16 for each example: 65535, the example's size in bytes, its index, its label, the number of endings,
and then for the context and for each ending the number of its tokens and these.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmc import _llmc
from llmc.system.fs import StrPath, write_atomically

_MAGIC, _VERSION = 20240522, 1
_HEADER = struct.Struct("<4i 1008x")  # magic, version, number of examples, bytes of the longest
_START = 0xFFFF  # the number that an example begins with
_HEAD = 5  # numbers of an example before its tokens
_SHORTEST = _HEAD + 2 * 2  # numbers of the shortest example, whose context and only ending have one token each
_MOST = 0xFFFF  # bytes of an example, and examples in a file: their fields have 16 bits


@dataclass(frozen=True)
class Example:
    """A question.

    Attributes:
        label: index of the right ending.
        context: token ids of what comes first.
        endings: token ids of each ending.
    """

    label: int
    context: NDArray[np.uint16]
    endings: list[NDArray[np.uint16]]


def eval_tokens(tokens: Sequence[int]) -> NDArray[np.uint16]:
    """Return token ids in the 16 bits that the format has.

    Raises:
        ValueError: if an id does not fit.
    """
    if tokens and max(tokens) >= _START:
        raise ValueError(f"token {max(tokens)}; an eval file holds ids below {_START}")
    return np.asarray(tokens, dtype=np.uint16)


def write_eval_file(path: StrPath, examples: Sequence[Example]) -> None:
    """Write an eval file, which appears whole or not at all.

    Raises:
        ValueError: if the format cannot hold an example; the message names it.
    """
    if not 0 < len(examples) <= _MOST:
        raise ValueError(f"an eval file holds 1 to {_MOST} examples, got {len(examples)}")
    parts: list[NDArray[np.uint16]] = []
    longest = 0
    for i, example in enumerate(examples):
        if not 0 <= example.label < len(example.endings):
            raise ValueError(f"example {i}: label {example.label} of {len(example.endings)} endings")
        body = [len(example.context), *example.context.tolist()]
        if not all(map(len, (example.context, *example.endings))):
            raise ValueError(f"example {i}: an empty context or ending")
        for ending in example.endings:
            body += [len(ending), *ending.tolist()]
        size = 2 * (_HEAD + len(body))
        if size > _MOST:
            raise ValueError(f"example {i}: {size} bytes, an eval file holds at most {_MOST} each")
        if max(body) >= _START:
            raise ValueError(f"example {i}: token {max(body)}; an eval file holds ids below {_START}")
        parts.append(np.asarray([_START, size, i, example.label, len(example.endings), *body], dtype="<u2"))
        longest = max(longest, size)
    write_atomically(path, [_HEADER.pack(_MAGIC, _VERSION, len(examples), longest), np.concatenate(parts)])


def read_eval_file(path: StrPath) -> list[Example]:
    """Read the examples of an eval file.

    Raises:
        FileNotFoundError: if there is no such file.
        llmc.Error: if it is damaged; the message names the example.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no eval file '{path}'; `llmc data hellaswag` makes one")
    size = path.stat().st_size
    if size < _HEADER.size:
        raise _llmc.Error(f"{path}: {size} bytes are too few for an eval file, whose header has {_HEADER.size}")
    with open(path, "rb") as file:
        magic, version, count, _ = _HEADER.unpack(file.read(_HEADER.size))
        stream = np.frombuffer(file.read((size - _HEADER.size) // 2 * 2), "<u2")
    if (magic, version) != (_MAGIC, _VERSION):
        raise _llmc.Error(
            f"{path}: magic {magic} version {version}, expected an eval file ({_MAGIC} version {_VERSION})"
        )
    if not 0 < count <= len(stream) // _SHORTEST:
        raise _llmc.Error(f"{path}: announces {count} examples, but holds {len(stream)} numbers")
    examples = []
    at = 0
    for i in range(count):
        example, at = _read_example(stream, at, f"{path}: example {i}")
        examples.append(example)
    if at != len(stream) or size % 2:
        raise _llmc.Error(f"{path}: {size - _HEADER.size - 2 * at} bytes follow the last of its {count} examples")
    return examples


def _read_example(stream: NDArray[np.uint16], begin: int, where: str) -> tuple[Example, int]:
    """Return the example that begins in the stream, and where the next one does."""
    if begin + _HEAD >= len(stream):
        raise _llmc.Error(f"{where}: the file ends before it")
    start, num_bytes, _, label, num_endings = (int(x) for x in stream[begin : begin + _HEAD])
    end = begin + num_bytes // 2
    if start != _START or num_bytes % 2 or end > len(stream):
        raise _llmc.Error(
            f"{where}: begins with {start} and {num_bytes} bytes, expected {_START} and at most {2 * (len(stream) - begin)}"
        )
    if not 0 <= label < num_endings:
        raise _llmc.Error(f"{where}: its label is {label} of {num_endings} endings")
    parts: list[NDArray[np.uint16]] = []
    at = begin + _HEAD
    for _ in range(1 + num_endings):
        length = int(stream[at]) if at < end else 0
        if length == 0 or at + 1 + length > end:
            raise _llmc.Error(
                f"{where}: {'context' if not parts else f'ending {len(parts) - 1}'} is empty or longer than the example"
            )
        parts.append(stream[at + 1 : at + 1 + length])
        at += 1 + length
    if at != end:
        raise _llmc.Error(f"{where}: {2 * (end - at)} bytes are left over after its {num_endings} endings")
    return Example(label, parts[0], parts[1:]), end
