"""llm.c's files of multiple-choice questions (HellaSwag, MMLU): write_evalfile and read_evalfile.

Header: 256 int32: magic 20240522, version 1, number of examples, bytes of the longest. Then for each example uint16: 65535, its
bytes, its index, the label, the number of completions, then the context and each completion as a count and that many tokens.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmc import _llmc
from llmc.fs import write_atomically

MAGIC, VERSION = 20240522, 1
_START = 0xFFFF
_MAX_BYTES = 0xFFFF  # of an example, and of examples: the fields have 16 bits


@dataclass(frozen=True)
class Example:
    """A context, its completions (token ids), and which of them is right."""

    context: list[int]
    completions: list[list[int]]
    label: int


def write_evalfile(path: str | os.PathLike[str], examples: Sequence[Example]) -> None:
    """ValueError, naming the example, for what the format cannot hold."""
    if not 0 < len(examples) <= _MAX_BYTES:
        raise ValueError(f"an eval file holds 1 to {_MAX_BYTES} examples, got {len(examples)}")
    parts: list[NDArray[np.uint16]] = []
    longest = 0
    for i, example in enumerate(examples):
        if not 0 <= example.label < len(example.completions):
            raise ValueError(f"example {i}: label {example.label} of {len(example.completions)} completions")
        body = [len(example.context), *example.context]
        if not all((example.context, *example.completions)):
            raise ValueError(f"example {i}: an empty context or completion")
        for completion in example.completions:
            body += [len(completion), *completion]
        size = 2 * (5 + len(body))
        if size > _MAX_BYTES:
            raise ValueError(f"example {i}: {size} bytes, an eval file holds at most {_MAX_BYTES} each")
        if min(body) < 0 or max(body) >= _START:
            raise ValueError(f"example {i}: token {max(body)}; an eval file holds ids below {_START}")
        parts.append(np.asarray([_START, size, i, example.label, len(example.completions), *body], dtype="<u2"))
        longest = max(longest, size)
    header = struct.pack("<4i", MAGIC, VERSION, len(examples), longest).ljust(1024, b"\0")
    write_atomically(path, [header, np.concatenate(parts)])


def read_evalfile(path: str | os.PathLike[str]) -> list[Example]:
    """llmc.Error, naming the place, where the file is not one or is damaged."""
    path = Path(path)
    raw = path.read_bytes()
    if len(raw) < 1024:
        raise _llmc.Error(f"{path}: too short for an eval file: {len(raw)} bytes, its header alone has 1024")
    magic, version, count, longest = struct.unpack_from("<4i", raw)
    if magic != MAGIC or version != VERSION:
        raise _llmc.Error(f"{path}: magic {magic} version {version} in eval file, expected {MAGIC} version {VERSION}")
    if len(raw) % 2:
        raise _llmc.Error(f"{path}: {len(raw)} bytes, expected an even number")
    stream = np.frombuffer(raw, dtype="<u2", offset=1024).tolist()
    examples: list[Example] = []
    at = 0
    while at < len(stream):
        place = f"{path}: example {len(examples)} at byte {1024 + 2 * at}"
        if len(stream) - at < 6 or stream[at] != _START:
            raise _llmc.Error(f"{place}: does not begin with {_START} and a header")
        size, index, label, completions = stream[at + 1 : at + 5]
        end = at + size // 2
        if size % 2 or size > longest or end > len(stream) or index != len(examples):
            raise _llmc.Error(f"{place}: says {size} bytes and index {index}; {2 * (len(stream) - at)} bytes are left")
        lists, cursor = [], at + 5
        for _ in range(completions + 1):
            if cursor >= end or cursor + 1 + stream[cursor] > end:
                raise _llmc.Error(f"{place}: {completions} completions do not fit its {size} bytes")
            lists.append(stream[cursor + 1 : cursor + 1 + stream[cursor]])
            cursor += 1 + stream[cursor]
        if cursor != end or label >= completions or not all(lists):
            raise _llmc.Error(
                f"{place}: label {label} of {completions} completions, {2 * (end - cursor)} bytes left over"
            )
        examples.append(Example(lists[0], lists[1:], label))
        at = end
    if len(examples) != count or count < 1:
        raise _llmc.Error(f"{path}: {len(examples)} examples, the header announces {count}")
    return examples
