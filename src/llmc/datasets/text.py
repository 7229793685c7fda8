"""Any text as token shards: documents, each preceded by the end-of-text token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmc.data import write_shard
from llmc.tokenizer import Tokenizer

_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".text")


def text_files(path: Path) -> list[Path]:
    """A file, or the text files of a folder and its subfolders in sorted order."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"'{path}' does not exist")
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in _TEXT_SUFFIXES)
    if not files:
        raise FileNotFoundError(f"folder '{path}' has no text files ({', '.join(_TEXT_SUFFIXES)})")
    return files


def read_documents(paths: Iterable[Path]) -> Iterator[str]:
    """One document per file. ValueError, naming file and byte, where one is not UTF-8."""
    for path in paths:
        try:
            yield path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as e:
            raise ValueError(f"{path}: not UTF-8 text: byte {e.start} is 0x{e.object[e.start]:02x}") from e


def language_reference() -> list[str]:
    """The text that every Python carries: the topics of its language reference. It differs a little between releases."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def tokenize(documents: Sequence[str], tokenizer: Tokenizer) -> NDArray[np.uint32]:
    """Token ids of all documents, end-of-text before each."""
    parts: list[NDArray[np.uint32]] = []
    for document in documents:
        parts.append(np.asarray([tokenizer.eot_token], dtype=np.uint32))
        parts.append(tokenizer.encode_to_numpy(document))
    return np.concatenate(parts)


def write_splits(
    tokens: NDArray[np.uint32], directory: Path, vocab_size: int, val_fraction: float = 0.1
) -> tuple[Path, Path]:
    """Writes train.bin and val.bin, the last val_fraction of the tokens."""
    cut = len(tokens) - int(len(tokens) * val_fraction)
    if cut == len(tokens) or cut == 0:
        raise ValueError(f"{len(tokens)} tokens are too few to train on and to validate with")
    return write_pair(tokens[:cut], tokens[cut:], directory, vocab_size)


def write_pair(
    train_tokens: NDArray[np.uint32], val_tokens: NDArray[np.uint32], directory: Path, vocab_size: int
) -> tuple[Path, Path]:
    """Writes train.bin and val.bin."""
    directory.mkdir(parents=True, exist_ok=True)
    train, val = directory / "train.bin", directory / "val.bin"
    write_shard(train, train_tokens, vocab_size=vocab_size)
    write_shard(val, val_tokens, vocab_size=vocab_size)
    return train, val
