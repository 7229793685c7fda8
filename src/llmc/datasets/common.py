"""What the data sets share: the names of their shards, and what they do about those of an earlier run."""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from llmc.data.roles import ROLES_FILE
from llmc.data.tokenizer import TABLE_FILES, Tokenizer, tokenizer_file
from llmc.formats.shards import ShardWriter
from llmc.system.fs import FULL
from llmc.values import decimal_bytes


@dataclass(frozen=True)
class TokenFiles:
    """The token files of a data set.

    Attributes:
        train, val: the files, in order; maybe none for validation.
        train_tokens, val_tokens: how many tokens they have together.
    """

    train: list[Path]
    val: list[Path]
    train_tokens: int
    val_tokens: int


def shard_name(name: str, split: str, index: int) -> str:
    """Return llm.c's name of a shard: fineweb_train_000001.bin."""
    return f"{name}_{split}_{index:06d}.bin"


def earlier_shards(directory: Path, name: str, overwrite: bool) -> list[Path]:
    """Find the shards of an earlier run, which must not be mixed with new ones: the new ones may be fewer.

    Args:
        directory: the output folder.
        name: what the names of the shards begin with.
        overwrite: whether there may be any.

    Returns:
        The files, for remove_files.

    Raises:
        FileExistsError: if there are some and overwrite is not set.
    """
    earlier = [
        p for split in ("train", "val") for p in directory.glob(f"{glob.escape(name)}_{split}_" + "[0-9]" * 6 + ".bin")
    ]
    if earlier and not overwrite:
        raise FileExistsError(f"{directory} already has {len(earlier)} shards of '{name}': --overwrite replaces them")
    return earlier


def put_tokenizer(tokenizer: Tokenizer, folder: Path, own: Collection[Path]) -> None:
    """Save a tokenizer beside token files. A folder has one: that of all its token files, or of its model.

    Call it once the first new tokens are there, so that what an interruption leaves has its tokenizer.

    Args:
        tokenizer: of the new files.
        folder: the output folder.
        own: files in it that are replaced.

    Raises:
        FileExistsError: if it has other files with another tokenizer.
    """
    beside = tokenizer_file(folder)
    if beside is not None and Tokenizer.load(beside).tokens != tokenizer.tokens:
        tokenizers = [folder / name for name in (*TABLE_FILES, "tokenizer.json", ROLES_FILE)]
        others = [p for p in folder.glob("*.bin") if p not in (*own, *tokenizers) and not p.name.startswith(".")]
        if others:
            raise FileExistsError(
                f"{folder}: {others[0].name} there has another tokenizer, {beside.name}: give another folder (-o)"
            )
        for path in tokenizers:
            path.unlink(missing_ok=True)
    tokenizer.save(folder / tokenizer.file_name)


def remove_files(paths: list[Path]) -> None:
    """Remove files and empty the list, so that a second call does nothing.

    Call it once the first new tokens are there: if the input cannot be read, the earlier shards stay.
    """
    while paths:
        paths.pop().unlink(missing_ok=True)


@contextlib.contextmanager
def need_told(writer: ShardWriter, bar: tqdm[None]) -> Iterator[None]:
    """Add to the error of a full disk how much all files of the writer need, judged by the part of the input that the bar has."""
    try:
        yield
    except OSError as e:
        if e.errno in FULL and e.strerror and bar.n and bar.total:
            e.strerror += f"; all files need about {decimal_bytes(writer.bytes * bar.total / bar.n)}"
            if writer.paths:
                e.strerror += f" (complete, and kept: {len(writer.paths)})"
        raise
