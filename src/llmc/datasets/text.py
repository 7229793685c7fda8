"""A data set of your own text: token shards of documents, with the end-of-text token before each document."""

from __future__ import annotations

import collections
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from llmc import _llmc
from llmc.data.documents import DocumentReader, Piece, input_size
from llmc.data.files import find_documents
from llmc.data.tokenize import token_stream
from llmc.data.tokenizer import Tokenizer
from llmc.datasets.common import TokenFiles, earlier_shards, need_told, remove_files, shard_name
from llmc.formats.shards import ShardWriter
from llmc.system.fs import SYSTEM, remove_temporaries

_BPE_SAMPLE = 64 << 20  # characters that a BPE is trained on
_COPY = 1 << 20  # tokens read at a time


def prepare(
    inputs: Iterable[str | Path],
    output: str | Path,
    *,
    tokenizer: str = "gpt2",
    column: str = "text",
    on_bad_record: str = "stop",
    separator: str = "",
    val: float = 0.1,
    val_inputs: Iterable[str | Path] = (),
    shard_size: int = 10**8,
    name: str = "text",
    workers: int = 0,
    overwrite: bool = False,
) -> TokenFiles:
    """Tokenise files and folders into name_train_%06d.bin and name_val_%06d.bin in output, with the tokenizer beside them.

    A text file is a document; JSON lines, JSON, CSV, TSV and Parquet have a document in each record. The input is streamed and read
    once: memory does not grow with its size, and it may come from a pipe. Records that are skipped are reported on stderr.

    Args:
        inputs: files, folders and globs, or "-" for the standard input; the files of a folder or glob are taken in sorted order.
        output: the folder to write, made if it is missing.
        tokenizer: as of Tokenizer.from_spec. bpe:N is trained on the first 64 million characters, as of Tokenizer.train_bpe.
        column, on_bad_record, separator: as of DocumentReader.
        val: the last part of the tokens, from 0 to below 1, that is for validation; 0 for none.
        val_inputs: files, folders and globs for validation, instead of a part of the inputs.
        shard_size: tokens in a file; the last file has the rest.
        name: what file names begin with.
        workers: threads that tokenise; 0 for as many as the process may use.
        overwrite: whether to replace shards of an earlier run with the same name.

    Raises:
        FileNotFoundError: if an input matches nothing.
        FileExistsError: if there are shards of an earlier run, and overwrite is not set.
        ValueError: if an argument is out of its range, a file is not what its suffix says, or there are too few tokens.
    """
    output = Path(output)
    if not 0 <= val < 1:
        raise ValueError(f"val is {val}, expected a fraction from 0 to below 1")
    reader = DocumentReader(column, on_bad_record, separator)
    found, val_found = find_documents(inputs), find_documents(val_inputs)
    files, val_files = found.files, val_found.files
    if not files:
        raise ValueError("no input files")
    for what, one in (("data", found), ("validation data", val_found)):
        if one.searched:
            tqdm.write(f"{what}: {one.describe()}", file=sys.stderr)  # like tqdm's bars
    earlier = earlier_shards(output, name, overwrite)

    def progress_bar(paths: list[Path], split: str) -> tqdm[None]:
        return tqdm(total=input_size(paths), unit="B", unit_scale=True, desc=f"tokenize {split}")

    def write(pieces: Iterator[Piece], split: str, bar: tqdm[None]) -> ShardWriter:
        with (
            ShardWriter(lambda i: output / shard_name(name, split, i), encoder.vocab_size, shard_size) as writer,
            need_told(writer, bar),
        ):
            for tokens in token_stream(pieces, encoder, workers):
                remove_files(earlier)
                writer.write(tokens)
        return writer

    with progress_bar(files, "train") as bar:
        pieces = reader.stream(files, bar.update)
        sample = None
        if tokenizer.startswith("bpe:"):
            sample, pieces = _sampled(pieces)
        encoder = Tokenizer.from_spec(tokenizer, text=sample)
        output.mkdir(parents=True, exist_ok=True)
        remove_temporaries(output)
        train = write(pieces, "train", bar)
    if train.total == 0:
        raise ValueError(f"there is no text in {', '.join(found.patterns)}")
    val_paths, val_tokens = [], 0
    if val_files:
        with progress_bar(val_files, "val") as bar:
            writer = write(reader.stream(val_files, bar.update), "val", bar)
        val_paths, val_tokens = writer.paths, writer.total
    elif val > 0:
        count = int(train.total * val)
        if count == 0 or train.total - count < 2 or train.total < 4:
            remove_files(train.paths)
            raise ValueError(f"{train.total} tokens are too few to hold out {val:g} of them: give --val 0")
        val_paths, val_tokens = _hold_out(train, count, output, name, encoder.vocab_size)
    encoder.save(output / encoder.file_name)
    for line in reader.report():
        tqdm.write(line, file=sys.stderr)  # like tqdm's bars
    return TokenFiles(train.paths, val_paths, train.total, val_tokens)


def _sampled(pieces: Iterator[Piece]) -> tuple[Iterator[str], Iterator[Piece]]:
    """Read the text that a BPE is trained on: the first characters, with a blank line between documents.

    Returns:
        That text, and all pieces, those of the text first: what comes from a pipe cannot be read again.
    """
    head: collections.deque[Piece] = collections.deque()
    size = 0
    for piece in pieces:
        head.append(piece)
        size += len(piece.text)
        if size >= _BPE_SAMPLE:
            break
    sample = ("\n\n" + piece.text if piece.first and i else piece.text for i, piece in enumerate(head))

    def all_pieces() -> Iterator[Piece]:
        while head:
            yield head.popleft()
        yield from pieces

    return sample, all_pieces()


def _hold_out(train: ShardWriter, count: int, output: Path, name: str, vocab_size: int) -> tuple[list[Path], int]:
    """Move the last tokens out of the training shards into validation shards, which are in the same order.

    Args:
        count: how many; one or two more or less, if a shard of a single token would come of it.

    Returns:
        The validation shards, and how many tokens they have.
    """
    pieces: list[Path] = []  # validation shards, from the last to the first
    moved = 0
    while moved < count:
        path, tokens = train.paths[-1], train.counts[-1]
        target = output / shard_name(name, "val", len(train.paths) - 1)
        here = min(max(count - moved, 2), tokens)
        if tokens - here < 2:
            if len(train.paths) == 1:
                break  # something is left to train on
            SYSTEM.rename(path, target)
            here = tokens
            train.paths.pop()
            train.counts.pop()
        else:
            _copy(path, tokens - here, tokens, target, vocab_size)
            _copy(path, 0, tokens - here, path, vocab_size)
            train.counts[-1] -= here
        pieces.append(target)
        moved += here
    renamed = [output / shard_name(name, "val", i) for i in range(len(pieces))]
    for old, new in zip(reversed(pieces), renamed):
        SYSTEM.rename(old, new)  # the number stays or falls, in ascending order: no shard is overwritten
    return renamed, moved


def _copy(source: Path, begin: int, end: int, target: Path, vocab_size: int) -> None:
    """Copy the tokens from begin to end of a shard into the shard target, which may be the source itself, in little memory."""
    size = _llmc.inspect_shard(source).token_bytes
    with ShardWriter(lambda i: target, vocab_size) as writer, open(source, "rb") as file:
        file.seek(1024 + begin * size)
        for at in range(begin, end, _COPY):
            raw = file.read(size * min(_COPY, end - at))
            writer.write(np.frombuffer(raw, dtype=f"<u{size}").astype(np.uint32))
