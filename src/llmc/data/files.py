"""The files that a user means by paths, folders and globs: token shards to train on, documents to tokenise.

The rules, for every setting and command:

- A path that exists is meant literally, even if its name has the characters of a glob.
- Anything else is a glob. It must match something; its matches are sorted.
- A folder of token files stands for the shards directly in it. Those with `val` in their names, as `llmc data` writes them
  (text_val_000000.bin), are for validation, the others for training.
- A folder of documents stands for all files in it, at any depth, that have a known suffix.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from llmc.data.documents import STDIN, TABLE_SUFFIXES, TEXT_SUFFIXES, suffix_of
from llmc.formats.shards import is_shard
from llmc.system.fs import StrPath


def matching_paths(pattern: StrPath) -> list[Path]:
    """Expand a path or a glob.

    Args:
        pattern: a path, or a glob in the syntax of the module glob, without `**`.

    Returns:
        The path itself if it exists, else the files and folders that the glob matches, in sorted order.

    Raises:
        FileNotFoundError: if nothing matches.
    """
    text = os.fspath(pattern)
    if os.path.exists(text) or text == str(STDIN):
        return [Path(text)]
    found = sorted(Path(match) for match in glob.glob(text))
    if not found:
        raise FileNotFoundError(f"no files match '{text}'")
    return found


# ---- token shards ----


def find_shards(patterns: StrPath | Sequence[StrPath]) -> list[Path]:
    """Expand paths and globs of token files; folders are not searched.

    Args:
        patterns: one path or glob, or several.

    Returns:
        The matches of each pattern in turn, in llm.c's order: sorted by the whole path as a string, not folder by folder.

    Raises:
        FileNotFoundError: if one of the patterns matches nothing.
    """
    if isinstance(patterns, (str, os.PathLike)):
        patterns = [patterns]
    return [path for pattern in patterns for path in sorted(matching_paths(pattern), key=os.fspath)]


def shards_of_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """List the token files of a folder.

    Returns:
        The files to train on, and those for validation, each sorted. Files that are not token files are left out.
    """
    shards = sorted(p for p in folder.glob("*.bin") if p.is_file() and not p.name.startswith(".") and is_shard(p))
    val = [p for p in shards if re.search(r"(^|_)val(_|$)", p.stem)]
    return [p for p in shards if p not in val], val


def shards_or_documents(
    patterns: Sequence[str], what: str, *, validation: bool = False
) -> tuple[list[Path], list[Path]]:
    """Expand the paths, folders and globs of a run's data, which are token files or documents.

    Args:
        patterns: a folder without token files is kept as it is, to be searched for documents.
        what: the data's name in an error, as "the validation data".
        validation: whether a folder stands for its validation files, if it has any, instead of its training files.

    Returns:
        Token files, and files and folders of documents; one of the two lists is empty.

    Raises:
        FileNotFoundError: if one of the patterns matches nothing.
        ValueError: if they are of both kinds, or if a folder to train on has validation files only.
    """
    paths = [path for pattern in patterns for path in _shards_or_path(pattern, validation)]
    shards = [p for p in paths if p.suffix == ".bin"]
    documents = [p for p in paths if p.suffix != ".bin"]
    if shards and documents:
        raise ValueError(f"{what} are token files and text at once: '{shards[0]}' and '{documents[0]}'; give one kind")
    return shards, documents


def _shards_or_path(pattern: str, validation: bool) -> list[Path]:
    folder = Path(pattern)
    if not folder.is_dir():
        return matching_paths(pattern)
    train, val = shards_of_folder(folder)
    if validation:
        return val or train or [folder]
    if val and not train:
        raise ValueError(
            f"folder '{folder}' has token files for validation only, as '{val[0].name}'; name files to train on"
        )
    return train or [folder]


# ---- documents ----


def document_files(path: Path, suffixes: tuple[str, ...] = TEXT_SUFFIXES + TABLE_SUFFIXES) -> list[Path]:
    """List the documents that a path stands for.

    Args:
        path: a file, taken whatever its suffix, or a folder, searched with its subfolders.
        suffixes: the suffixes, in lower case, of the files to take from a folder.

    Returns:
        The files, sorted; at least one.

    Raises:
        FileNotFoundError: if the path does not exist, or the folder has no such file.
    """
    if path == STDIN or (path.exists() and not path.is_dir()):  # a pipe, too
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"'{path}' does not exist")
    files = sorted(p for p in path.rglob("*") if p.is_file() and suffix_of(p) in suffixes)
    if not files:
        raise FileNotFoundError(f"folder '{path}' has no text ({', '.join(suffixes)})")
    return files


def find_documents(patterns: Iterable[StrPath]) -> list[Path]:
    """Expand paths, folders and globs of documents, with or without fields.

    Raises:
        FileNotFoundError: if one of the patterns matches nothing, or a folder has no documents.
    """
    return [file for pattern in patterns for path in matching_paths(pattern) for file in document_files(path)]
