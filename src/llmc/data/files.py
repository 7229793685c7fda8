"""The files that a user means by paths, folders and globs: token files to train on, documents to tokenise.

The rules, for every setting and command:

- A path that exists and is no folder is meant literally, whatever its name: a glob's characters, a dot before it, any suffix.
- A folder, and a glob (in the syntax of the module glob, without `**`), stand for the data among their files. A folder that a glob
  matches is searched like any other.
- Files and folders whose names begin with a dot are no data, nor are run directories. Links to folders are followed,
  each folder once.
- If there are token files (directly in a folder, or among a glob's matches), these are meant and nothing else. If some have `val` in
  their names, as `llmc data` writes them (text_val_000000.bin), and others have not, those are for validation, the others for
  training.
- If there is none, documents are meant: texts and files of records (TEXT_SUFFIXES, RECORD_SUFFIXES) in the folder, at any depth, or
  among the glob's matches. JSON, CSV and TSV (TABLE_SUFFIXES without those) are read if there is nothing else: beside texts they
  are often something else. If a glob matches no known suffix, all its matches are meant.
- What is passed over is counted by kind, so that a command can say it: Found.describe().
- The order is llm.c's: patterns as they are given, and the files of each by their whole path as a string.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmc.data.documents import STDIN, TABLE_SUFFIXES, TEXT_SUFFIXES, suffix_of
from llmc.formats.shards import ARRAY, BARE_IDS, TEXT, TOKENS, check_token_file, content_of, is_shard
from llmc.system.fs import StrPath
from llmc.values import counted

RECORD_SUFFIXES = (".jsonl", ".ndjson", ".parquet")


@dataclass
class Found:
    """What patterns stand for: token files, or documents.

    Attributes:
        patterns: the paths, folders and globs.
        files: the files to read, in order.
        val: of token files those for validation, if files are for training.
        tokens: whether files are token files.
        passed_over: what else is there, by kind.
        searched: whether a folder or a glob is among the patterns, so that there is something to tell.
    """

    patterns: list[str]
    files: list[Path] = field(default_factory=list)
    val: list[Path] = field(default_factory=list)
    tokens: bool = False
    passed_over: Counter[str] = field(default_factory=Counter)
    searched: bool = False

    def describe(self) -> str:
        """Return one line: "2 token files of sh, and 1 for validation; passed over: 1 .pdf"."""
        patterns = self.patterns if len(self.patterns) <= 4 else [*self.patterns[:3], "..."]
        line = f"{counted(len(self.files), 'token file' if self.tokens else 'file')} of {', '.join(patterns)}"
        if self.val:
            line += f", and {len(self.val)} for validation"
        return line + _passed_over(self.passed_over)


def matching_paths(pattern: StrPath) -> list[Path]:
    """Expand a path or a glob.

    Returns:
        The path itself if it exists, else the files and folders that the glob matches, in order.

    Raises:
        FileNotFoundError: if nothing matches.
    """
    text = os.fspath(pattern)
    if os.path.exists(text) or text == str(STDIN):
        return [Path(text)]
    found = _in_order(Path(match) for match in glob.glob(text))
    if not found:
        raise FileNotFoundError(f"no files match '{text}'")
    return found


def find_shards(patterns: StrPath | Sequence[StrPath], *, validation: bool = False) -> list[Path]:
    """Expand paths, folders and globs of token files.

    Args:
        patterns: one, or several.
        validation: which files a folder or glob stands for, if it has some for training and some for validation.

    Raises:
        FileNotFoundError: if one of the patterns matches nothing.
        TypeError: if one is no path, but a token id.
        ValueError: if one means files that are clearly something else than token files.
    """
    each = [_find(pattern, validation) for pattern in _listed(patterns)]
    for path in (path for found in each if not found.tokens for path in found.files):
        check_token_file(path)
    return [path for found in each for path in found.files]


def find_data(patterns: Sequence[str], what: str, *, validation: bool = False) -> Found:
    """Expand the paths, folders and globs of a run's data, which are token files or documents.

    Args:
        patterns: any number.
        what: the data's name in an error, as "the validation data".
        validation: as of find_shards().

    Raises:
        FileNotFoundError: if one of the patterns matches nothing.
        ValueError: if they are of both kinds, if a folder to train on has validation files only, or a file is neither kind.
    """
    each = [_find(pattern, validation) for pattern in patterns]
    tokens, documents = ([f.files[0] for f in each if f.files and f.tokens is kind] for kind in (True, False))
    if tokens and documents:
        raise ValueError(f"{what} are token files and text at once: '{tokens[0]}' and '{documents[0]}'; give one kind")
    return _together(each)


def find_documents(patterns: StrPath | Iterable[StrPath]) -> Found:
    """Expand paths, folders and globs of documents, whether or not token files are there too.

    Raises:
        FileNotFoundError: if one of the patterns matches nothing, or has no documents.
        ValueError: if a file that is named has tokens.
    """
    return _together(_documents(pattern) for pattern in _listed(patterns))


def is_validation(path: Path) -> bool:
    """Return whether a token file's name says that it is for validation: text_val_000000.bin, val.bin."""
    return re.search(r"(?<![a-z])val(id|idation)?(?![a-z])", path.stem, re.IGNORECASE) is not None


# ---- one pattern ----


def _listed(patterns: StrPath | Iterable[StrPath]) -> list[StrPath]:
    several = isinstance(patterns, Iterable) and not isinstance(patterns, (str, os.PathLike))
    listed: list[Any] = list(patterns) if several else [patterns]  # type: ignore[arg-type]
    for path in listed:
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(
                f"expected paths of files, got {type(patterns).__name__}; llmc.formats.shards.write_shard() writes token ids into a file"
            )
    return listed


def _together(each: Iterable[Found]) -> Found:
    whole = Found([])
    for one in each:
        whole.patterns += one.patterns
        whole.files += one.files
        whole.val += one.val
        whole.tokens |= one.tokens
        whole.passed_over += one.passed_over
        whole.searched |= one.searched
    return whole


def _passed_over(kinds: Counter[str]) -> str:
    listed = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
    hint = " (name them to read them)" if any(kind in TABLE_SUFFIXES for kind in kinds) else ""
    return f"; passed over: {listed}{hint}" if listed else ""


def _in_order(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=Path.as_posix)  # with "/" also on Windows, so that the order is the same everywhere


def _is_named(matches: list[Path], text: str) -> bool:
    """Return whether the matches of a pattern are one file, named literally."""
    return matches == [Path(text)] and not matches[0].is_dir()


def _find(pattern: StrPath, validation: bool) -> Found:
    text = os.fspath(pattern)
    matches = matching_paths(text)
    if _is_named(matches, text):
        tokens = matches[0].is_file() and (matches[0].suffix == ".bin" or is_shard(matches[0]))
        (check_token_file if tokens else _check_document)(matches[0])
        return Found([text], matches, tokens=tokens)
    beside = [p for match in matches for p in (_visible(match) if match.is_dir() else [match])]
    shards = _in_order({p for p in beside if p.suffix == ".bin" and is_shard(p)})
    if not shards and all(p.suffix == ".bin" for p in matches):
        shards = _in_order(matches)  # to be refused, by name
        for path in shards:
            check_token_file(path)
    if not shards:
        return _documents(text)
    val = [p for p in shards if is_validation(p)]
    train = [p for p in shards if not is_validation(p)]
    if val and not train and not validation and matches == [Path(text)]:
        raise ValueError(
            f"folder '{text}' has token files for validation only, as '{val[0].name}'; name files to train on"
        )
    # A tokenizer beside token files is not passed over, but used.
    rest = {p for p in beside if p.is_file() and p.stem not in ("tokenizer", "gpt2_tokenizer")}.difference(shards)
    others = Counter(map(_kind, _in_order(rest)))
    files, val = (val or train, []) if validation or not train else (train, val)
    return Found([text], files, val, tokens=True, passed_over=others, searched=True)


def _visible(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if not p.name.startswith(".")]


def _documents(pattern: StrPath) -> Found:
    text = os.fspath(pattern)
    matches = matching_paths(text)
    if _is_named(matches, text):
        _check_document(matches[0])
        return Found([text], matches)
    passed_over: Counter[str] = Counter()
    files = [p for match in matches if match.is_dir() for p in _walk(match, passed_over)]
    files = _in_order({*files, *_plain((p for p in matches if not p.is_dir()), passed_over)})
    usual = [p for p in files if suffix_of(p) in (*TEXT_SUFFIXES, *RECORD_SUFFIXES)]
    chosen = usual or [p for p in files if suffix_of(p) in TABLE_SUFFIXES]
    if not chosen:
        if all(match.is_dir() for match in matches):
            known = ", ".join(dict.fromkeys(TEXT_SUFFIXES + TABLE_SUFFIXES))
            others = _passed_over(passed_over + Counter(map(_kind, files)))
            raise FileNotFoundError(f"folder '{text}' has no text ({known}){others}")
        chosen = [p for p in matches if not p.is_dir()]
        for path in chosen:
            _check_document(path)
    taken = set(chosen)
    passed_over += Counter(_kind(p) for p in files if p not in taken)
    return Found([text], chosen, passed_over=passed_over, searched=True)


def _walk(top: Path, passed_over: Counter[str]) -> Iterator[Path]:
    """List the files of a folder at any depth, hidden ones aside, which are counted."""

    def stop(error: OSError) -> None:
        raise error

    # A link that leads to a folder seen before, or to one that has the top in it, is not followed: it would never end.
    real = Path(os.path.realpath(top))
    seen = {real, *real.parents}
    for where, folders, names in os.walk(top, onerror=stop, followlinks=True):
        if {"config.toml", "metrics.jsonl"} <= {*names}:  # else what a first run writes would be data of the second
            passed_over["run directory"] += 1
            folders.clear()
            continue
        passed_over["hidden"] += sum(name.startswith(".") for name in folders + names)
        kept = []
        for name in sorted(folders):
            target = Path(os.path.realpath(os.path.join(where, name)))
            if not name.startswith(".") and target not in seen:
                seen.add(target)
                kept.append(name)
        folders[:] = kept
        yield from _plain((Path(where, name) for name in names if not name.startswith(".")), passed_over)


def _plain(paths: Iterable[Path], passed_over: Counter[str]) -> Iterator[Path]:
    """Yield the files that can be read again and again; pipes, devices and broken links are counted."""
    for path in paths:
        if path.is_file():
            yield path
        else:
            passed_over["broken link" if path.is_symlink() else "no plain file"] += 1


def _kind(path: Path) -> str:
    """Return what a file that is passed over is counted as."""
    suffix = suffix_of(path)
    if suffix not in (".bin", ".npy"):
        return suffix or "without a suffix"
    content = content_of(path)
    if content in (ARRAY, BARE_IDS):
        return "of tokens to convert (llmc data tokens)"
    return f"{suffix} of {'tokens' if content == TOKENS else 'no tokens'}"


def _check_document(path: Path) -> None:
    content = content_of(path)
    if content == TOKENS:
        raise ValueError(f"{path}: a token file, not text; `llmc-train --data` takes it as it is")
    if content != TEXT and suffix_of(path) in (".bin", ".npy"):
        check_token_file(path)
