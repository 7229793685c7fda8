"""Token ids that another program has written, as nanoGPT's train.bin or NumPy arrays, converted into token shards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from llmc.data.files import is_validation, matching_paths
from llmc.datasets.common import TokenFiles, earlier_shards, need_told, remove_files, shard_name
from llmc.formats.shards import ARRAY, BARE_IDS, TOKENS, ShardWriter, content_of
from llmc.system.fs import remove_temporaries

_PART = 1 << 20  # ids read at a time


def prepare(
    inputs: Iterable[str | Path],
    output: str | Path,
    *,
    dtype: str | None = None,
    vocab_size: int = 50257,
    shard_size: int = 10**8,
    name: str = "text",
    overwrite: bool = False,
) -> TokenFiles:
    """Copy rows of ids into name_train_%06d.bin, and those of files with `val` in their names into name_val_%06d.bin, in output.

    The ids are not changed, and not held in memory. The tokenizer that they belong to is yours to name when you train.

    Args:
        inputs: files and globs: NumPy's .npy with one row of integers, or files that hold ids and nothing else.
        output: the folder to write, made if it is missing.
        dtype: NumPy's name of the type of the ids in files without a header; in little-endian order.
        vocab_size: what all ids must be below. Up to 65,536 are written as uint16, else uint32.
        shard_size, name, overwrite: as of llmc.datasets.text.prepare().

    Raises:
        FileNotFoundError: if an input matches nothing.
        FileExistsError: if there are shards of an earlier run, and overwrite is not set.
        ValueError: if a file is not what it is said to be, or an id is outside of the vocabulary; the message names file and position.
    """
    output = Path(output)
    rows = [(path, _ids(path, dtype)) for pattern in inputs for path in matching_paths(pattern)]
    earlier = earlier_shards(output, name, overwrite)
    output.mkdir(parents=True, exist_ok=True)
    remove_temporaries(output)

    def write(split: str, files: Sequence[tuple[Path, NDArray[Any]]]) -> ShardWriter:
        total = sum(ids.size for _, ids in files)
        with (
            tqdm(total=total, unit="tok", unit_scale=True, desc=f"convert {split}", disable=not files) as bar,
            ShardWriter(lambda i: output / shard_name(name, split, i), vocab_size, shard_size) as writer,
            need_told(writer, bar),
        ):
            for path, ids in files:
                for at in range(0, ids.size, _PART):
                    part = np.asarray(ids[at : at + _PART])
                    wrong = np.flatnonzero((part < 0) | (part >= vocab_size))
                    if wrong.size:
                        raise ValueError(
                            f"{path}: id {part[wrong[0]]} at position {at + wrong[0]} is outside of the vocabulary of {vocab_size}: "
                            "are --dtype and --vocab-size right?"
                        )
                    remove_files(earlier)
                    bar.update(part.size)
                    writer.write(part.astype(np.uint32))
        return writer

    train = write("train", [row for row in rows if not is_validation(row[0])])
    val = write("val", [row for row in rows if is_validation(row[0])])
    return TokenFiles(train.paths, val.paths, train.total, val.total)


def _ids(path: Path, dtype: str | None) -> NDArray[Any]:
    """Map the ids of a file into memory."""
    if not path.is_file():
        raise ValueError(f"{path}: no file; name files of ids")
    content = content_of(path)
    if content == TOKENS:
        raise ValueError(f"{path}: a token file already: `llmc-train --data` takes it as it is")
    if content not in (ARRAY, BARE_IDS, None):
        raise ValueError(f"{path}: {content}, not token ids")
    if content == ARRAY:
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as e:
            raise ValueError(f"{path}: not a NumPy file of numbers: {e}") from e
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(f"{path}: an array of {array.dtype} of shape {array.shape}, expected one row of integers")
        return np.asarray(array)
    if dtype is None:
        raise ValueError(
            f"{path}: ids without a header do not say what type they are: give --dtype (nanoGPT writes uint16)"
        )
    kind, size = np.dtype(dtype).newbyteorder("<"), path.stat().st_size
    if size == 0 or size % kind.itemsize:
        raise ValueError(f"{path}: {size} bytes are no row of {dtype}")
    return np.memmap(path, dtype=kind, mode="r")
