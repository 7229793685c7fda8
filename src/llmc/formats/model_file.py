"""llm.c's model file: a header of 256 int32, then all parameters in one dtype.

csrc/model/checkpoint.cpp is the home of the layout: it makes the header, and reads the file into a model. Here is the one writer
that flushes to the disk and publishes a file whole or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmc import _llmc
from llmc.formats.stream import Reader
from llmc.system.fs import SYSTEM, Fs, StrPath, write_atomically

_HEADER_BYTES = 1024


def is_pytorch_file(path: Path) -> bool:
    """Tell whether a file begins as PyTorch's do, which are zip files or, of old, pickles."""
    with open(path, "rb") as file:
        return file.read(2).startswith((b"PK", b"\x80"))


def model_file_pieces(config: _llmc.GPT2Config, dtype: str, parameters: Iterable[NDArray[Any]]) -> Iterator[Any]:
    """Yield the bytes of a model file.

    Args:
        config: the shape of the model.
        dtype: 'f32' or 'bf16'.
        parameters: all elements of all tensors in the order of the file, in arrays of any shape, whose items are of dtype.
            bfloat16 may come as any type of 16 bits.
    """
    yield _llmc.checkpoint_header(config, dtype)
    for array in parameters:
        if array.size:
            yield np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def write_model_file(
    path: StrPath, config: _llmc.GPT2Config, dtype: str, parameters: Iterable[NDArray[Any]], *, fs: Fs = SYSTEM
) -> None:
    """Write a model file, which appears whole or not at all. For the arguments see model_file_pieces().

    Raises:
        OSError: if the file cannot be written. What was there before is untouched.
    """
    write_atomically(path, model_file_pieces(config, dtype, parameters), fs=fs)


def read_f32_weights(path: Path, sizes: Iterable[int]) -> Iterator[NDArray[np.float32]]:
    """Yield the weights of a model file of f32, in arrays of the given sizes; yield nothing if it is bf16.

    Raises:
        CheckpointDamaged: if the file is too short.
        llmc.Error: if it is no model file.
    """
    _, file_dtype, _ = _llmc.inspect_checkpoint(path)
    if file_dtype != "f32":
        return
    with open(path, "rb") as file:
        reader = Reader(file, path)
        reader.take(_HEADER_BYTES)
        for size in sizes:
            yield reader.floats(size)
