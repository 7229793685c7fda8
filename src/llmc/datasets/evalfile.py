"""Writes llm.c's files of multiple-choice questions (HellaSwag, MMLU); llmc.evals reads them, and has their layout."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llmc.data.tokenizer import Tokenizer
from llmc.evals import Example
from llmc.system.fs import write_atomically

_MAGIC, _VERSION = 20240522, 1
_START = 0xFFFF
_MAX_BYTES = 0xFFFF  # of an example, and of examples: the fields have 16 bits


def ids(tokenizer: Tokenizer, text: str) -> NDArray[np.uint16]:
    """The text's tokens in the 16 bits that the format has. ValueError where a token does not fit."""
    tokens = tokenizer.encode(text)
    if tokens and max(tokens) >= _START:
        raise ValueError(f"token {max(tokens)}; an eval file holds ids below {_START}")
    return np.asarray(tokens, dtype=np.uint16)


def write_evalfile(path: str | os.PathLike[str], examples: Sequence[Example]) -> None:
    """ValueError, naming the example, for what the format cannot hold."""
    if not 0 < len(examples) <= _MAX_BYTES:
        raise ValueError(f"an eval file holds 1 to {_MAX_BYTES} examples, got {len(examples)}")
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
        size = 2 * (5 + len(body))
        if size > _MAX_BYTES:
            raise ValueError(f"example {i}: {size} bytes, an eval file holds at most {_MAX_BYTES} each")
        if max(body) >= _START:
            raise ValueError(f"example {i}: token {max(body)}; an eval file holds ids below {_START}")
        parts.append(np.asarray([_START, size, i, example.label, len(example.endings), *body], dtype="<u2"))
        longest = max(longest, size)
    header = struct.pack("<4i", _MAGIC, _VERSION, len(examples), longest).ljust(1024, b"\0")
    write_atomically(path, [header, np.concatenate(parts)])
