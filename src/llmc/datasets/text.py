"""Any text as token shards: documents, each preceded by the end-of-text token."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from llmc import _llmc
from llmc.data.documents import TEXT_SUFFIXES, Piece, data_files, read_documents, read_pieces
from llmc.data.tokenize import token_stream
from llmc.data.tokenizer import Tokenizer
from llmc.formats.shards import ShardWriter, write_shard
from llmc.system.fs import SYSTEM, remove_temporaries

__all__ = ["language_reference", "prepare", "read_documents", "text_files", "tokenize", "write_pair", "write_splits"]

_BPE_SAMPLE = 64 << 20  # characters that a BPE is trained on
_COPY = 1 << 20  # tokens


def text_files(path: Path) -> list[Path]:
    """A file, or the text files of a folder and its subfolders in sorted order."""
    return data_files(path, TEXT_SUFFIXES)


def language_reference() -> list[str]:
    """The text that every Python carries: the topics of its language reference. It differs a little between releases."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def tokenize(documents: Sequence[str], tokenizer: Tokenizer) -> NDArray[np.uint32]:
    """Token ids of all documents, end-of-text before each."""
    return np.concatenate(list(token_stream((Piece(d, True) for d in documents), tokenizer)))


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


# ---- streams of any length ----


@dataclass(frozen=True)
class Written:
    """Token files of a data set, and how many tokens they have."""

    train: list[Path]
    val: list[Path]
    train_tokens: int
    val_tokens: int


def shard_name(name: str, split: str, index: int) -> str:
    """llm.c's: fineweb_train_000001.bin."""
    return f"{name}_{split}_{index:06d}.bin"


def earlier_shards(directory: Path, name: str, overwrite: bool) -> list[Path]:
    """Shards of an earlier run, which must not mix with the new ones: there may be fewer of these. FileExistsError where there are some
    and overwrite is not set.
    """
    earlier = [
        p for split in ("train", "val") for p in directory.glob(f"{glob.escape(name)}_{split}_" + "[0-9]" * 6 + ".bin")
    ]
    if earlier and not overwrite:
        raise FileExistsError(f"{directory} already has {len(earlier)} shards of '{name}': --overwrite replaces them")
    return earlier


def remove_all(paths: list[Path]) -> None:
    """Empties the list too. Called with the first tokens at hand: input that cannot be read must not cost what is there."""
    while paths:
        paths.pop().unlink(missing_ok=True)


def prepare(
    inputs: Iterable[str | Path],
    output: str | Path,
    *,
    tokenizer: str = "gpt2",
    column: str = "text",
    val: float = 0.1,
    val_inputs: Iterable[str | Path] = (),
    shard_size: int = 10**8,
    name: str = "text",
    workers: int = 0,
    overwrite: bool = False,
) -> Written:
    """Tokenises files and folders into name_train_%06d.bin and name_val_%06d.bin in output, with the tokenizer beside them.

    Text files are a document each; JSON lines, JSON, CSV, TSV and Parquet have one in each record, under column. Folders and globs
    are taken in sorted order. The input is streamed: memory does not grow with it.

    tokenizer: as Tokenizer.from_spec. bpe:N is trained on the first 64 million characters.
    val: the last part of the tokens, for validation; 0 for none. val_inputs: other files for it instead.
    """
    output = Path(output)
    if not 0 <= val < 1:
        raise ValueError(f"val is {val}, expected a fraction from 0 to below 1")
    files, val_files = expand(inputs), expand(val_inputs)
    if not files:
        raise ValueError("no input files")
    earlier = earlier_shards(output, name, overwrite)
    encoder = Tokenizer.from_spec(tokenizer, text=_sample(files, column) if tokenizer.startswith("bpe:") else None)
    output.mkdir(parents=True, exist_ok=True)
    remove_temporaries(output)

    def write(paths: list[Path], split: str) -> ShardWriter:
        size = sum(p.stat().st_size for p in paths)
        with (
            tqdm(total=size, unit="B", unit_scale=True, desc=f"tokenize {split}") as bar,
            ShardWriter(lambda i: output / shard_name(name, split, i), encoder.vocab_size, shard_size) as writer,
        ):
            pieces = (piece for path in paths for piece in read_pieces(path, column, bar.update))
            for tokens in token_stream(_whole(pieces, encoder), encoder, workers):
                remove_all(earlier)
                writer.write(tokens)
        return writer

    train = write(files, "train")
    val_paths, val_tokens = [], 0
    if val_files:
        written = write(val_files, "val")
        val_paths, val_tokens = written.paths, written.total
    elif val > 0:
        val_tokens = int(train.total * val)
        if val_tokens == 0:
            raise ValueError(f"{train.total} tokens are too few to hold out {val:g} of them: give --val 0")
        val_paths = _hold_out(train, val_tokens, output, name, encoder.vocab_size)
    encoder.save(output / encoder.file_name)
    return Written(train.paths, val_paths, train.total, val_tokens)


def expand(inputs: Iterable[str | Path]) -> list[Path]:
    """Files, folders and globs as files. FileNotFoundError for what matches nothing."""
    files: list[Path] = []
    for item in inputs:
        path = Path(item)
        if path.exists():
            files += data_files(path)
            continue
        matches = sorted(Path(p) for p in glob.glob(str(item)))
        if not matches:
            raise FileNotFoundError(f"no files match '{item}'")
        files += [f for match in matches for f in data_files(match)]
    return files


def _whole(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[Piece]:
    """Pieces as they come, or documents joined again for a tokenizer with another split into words."""
    if tokenizer.cuts_at_blanks:
        yield from pieces
        return
    parts: list[str] = []
    for piece in pieces:
        if piece.first and parts:
            yield Piece("".join(parts), True)
            parts = []
        parts.append(piece.text)
    if parts:
        yield Piece("".join(parts), True)


def _sample(files: list[Path], column: str) -> str:
    parts: list[str] = []
    size = 0
    for path in files:
        for piece in read_pieces(path, column):
            parts.append("\n\n" + piece.text if piece.first and parts else piece.text)
            size += len(piece.text)
            if size >= _BPE_SAMPLE:
                return "".join(parts)
    return "".join(parts)


def _hold_out(train: ShardWriter, count: int, output: Path, name: str, vocab_size: int) -> list[Path]:
    """Moves the last count tokens out of the training shards into validation shards, and those are in order too."""
    pieces: list[Path] = []  # the last first
    left = count
    while left > 0:
        path, tokens = train.paths[-1], train.counts[-1]
        target = output / shard_name(name, "val", len(train.paths) - 1)
        if tokens <= left:
            SYSTEM.rename(path, target)
            train.paths.pop()
            train.counts.pop()
        else:
            _copy(path, tokens - left, tokens, target, vocab_size)
            _copy(path, 0, tokens - left, path, vocab_size)
            train.counts[-1] -= left
        pieces.append(target)
        left -= min(left, tokens)
    renamed = [output / shard_name(name, "val", i) for i in range(len(pieces))]
    for old, new in zip(reversed(pieces), renamed):
        SYSTEM.rename(old, new)  # to a lower number or its own, in ascending order: nothing is overwritten
    return renamed


def _copy(source: Path, begin: int, end: int, target: Path, vocab_size: int) -> None:
    """Tokens begin .. end of a shard into another, or into its own place, a few at a time."""
    size = _llmc.inspect_shard(source).token_bytes
    with ShardWriter(lambda i: target, vocab_size) as writer, open(source, "rb") as file:
        file.seek(1024 + begin * size)
        for at in range(begin, end, _COPY):
            raw = file.read(size * min(_COPY, end - at))
            writer.write(np.frombuffer(raw, dtype=f"<u{size}").astype(np.uint32))
