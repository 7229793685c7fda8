"""A data set of your own text: token shards of documents, with the end-of-text token before each document."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from llmc import _llmc
from llmc.data.documents import DocumentReader
from llmc.data.files import find_documents
from llmc.data.tokenize import token_stream
from llmc.data.tokenizer import Tokenizer
from llmc.datasets.common import TokenFiles, earlier_shards, remove_files, shard_name
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
    val: float = 0.1,
    val_inputs: Iterable[str | Path] = (),
    shard_size: int = 10**8,
    name: str = "text",
    workers: int = 0,
    overwrite: bool = False,
) -> TokenFiles:
    """Tokenise files and folders into name_train_%06d.bin and name_val_%06d.bin in output, with the tokenizer beside them.

    A text file is a document; JSON lines, JSON, CSV, TSV and Parquet have a document in each record. The input is streamed: memory
    does not grow with its size.

    Args:
        inputs: files, folders and globs; the files of a folder or glob are taken in sorted order.
        output: the folder to write, made if it is missing.
        tokenizer: as of Tokenizer.from_spec. bpe:N is trained on the first 64 million characters.
        column: the field of a record that has the text.
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
    reader = DocumentReader(column)
    files, val_files = find_documents(inputs), find_documents(val_inputs)
    if not files:
        raise ValueError("no input files")
    earlier = earlier_shards(output, name, overwrite)
    encoder = Tokenizer.from_spec(tokenizer, text=_sample(files, reader) if tokenizer.startswith("bpe:") else None)
    output.mkdir(parents=True, exist_ok=True)
    remove_temporaries(output)

    def write(paths: list[Path], split: str) -> ShardWriter:
        size = sum(p.stat().st_size for p in paths)
        with (
            tqdm(total=size, unit="B", unit_scale=True, desc=f"tokenize {split}") as bar,
            ShardWriter(lambda i: output / shard_name(name, split, i), encoder.vocab_size, shard_size) as writer,
        ):
            pieces = (piece for path in paths for piece in reader.pieces(path, bar.update))
            for tokens in token_stream(pieces, encoder, workers):
                remove_files(earlier)
                writer.write(tokens)
        return writer

    train = write(files, "train")
    val_paths, val_tokens = [], 0
    if val_files:
        writer = write(val_files, "val")
        val_paths, val_tokens = writer.paths, writer.total
    elif val > 0:
        val_tokens = int(train.total * val)
        if val_tokens == 0:
            raise ValueError(f"{train.total} tokens are too few to hold out {val:g} of them: give --val 0")
        val_paths = _hold_out(train, val_tokens, output, name, encoder.vocab_size)
    encoder.save(output / encoder.file_name)
    return TokenFiles(train.paths, val_paths, train.total, val_tokens)


def _sample(files: list[Path], reader: DocumentReader) -> Iterator[str]:
    """Read the text that a BPE is trained on: the first characters of the files, with a blank line between documents."""
    size = 0
    for path in files:
        for piece in reader.pieces(path):
            yield "\n\n" + piece.text if piece.first and size else piece.text
            size += len(piece.text)
            if size >= _BPE_SAMPLE:
                return


def _hold_out(train: ShardWriter, count: int, output: Path, name: str, vocab_size: int) -> list[Path]:
    """Move the last count tokens out of the training shards into validation shards, which are in the same order.

    Returns:
        The validation shards.
    """
    pieces: list[Path] = []  # validation shards, from the last to the first
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
        SYSTEM.rename(old, new)  # the number stays or falls, in ascending order: no shard is overwritten
    return renamed


def _copy(source: Path, begin: int, end: int, target: Path, vocab_size: int) -> None:
    """Copy the tokens from begin to end of a shard into the shard target, which may be the source itself, in little memory."""
    size = _llmc.inspect_shard(source).token_bytes
    with ShardWriter(lambda i: target, vocab_size) as writer, open(source, "rb") as file:
        file.seek(1024 + begin * size)
        for at in range(begin, end, _COPY):
            raw = file.read(size * min(_COPY, end - at))
            writer.write(np.frombuffer(raw, dtype=f"<u{size}").astype(np.uint32))
