"""FineWeb and FineWeb-Edu (Penedo et al. 2024): text from the web, for serious pretraining.

prepare() tokenises the Hub's Parquet files; prepare_mirror() downloads shards of the same text that others have tokenised.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from llmc import _llmc
from llmc.data.documents import DocumentReader
from llmc.data.files import find_documents
from llmc.data.tokenize import token_stream
from llmc.data.tokenizer import Tokenizer
from llmc.datasets.common import TokenFiles, earlier_shards, need_told, put_tokenizer, remove_files, shard_name
from llmc.datasets.download import Remote, fetch, hub_files
from llmc.formats.shards import ShardWriter
from llmc.system.fs import remove_temporaries

REPOSITORIES = {"classic": "HuggingFaceFW/fineweb", "edu": "HuggingFaceFW/fineweb-edu"}
SAMPLES = {"10B": "sample/10BT", "100B": "sample/100BT"}
NAMES = {"classic": "fineweb", "edu": "edu_fineweb"}
# Repositories with the 100B samples as shards of 10^8 of GPT-2's tokens.
MIRRORS = {"classic": "chrisdryden/FineWebTokenizedGPT2", "edu": "karpathy/fineweb-edu-100B-gpt2-token-shards"}


def prepare(
    output: str | Path,
    *,
    kind: str = "classic",
    version: str = "10B",
    shard_size: int = 10**8,
    shards: int | None = None,
    source: str | Path | None = None,
    column: str = "text",
    on_bad_record: str = "stop",
    tokenizer: str = "gpt2",
    workers: int = 0,
    overwrite: bool = False,
) -> TokenFiles:
    """Write llm.c's shards fineweb_val_000000.bin, fineweb_train_000001.bin, ... (edu_fineweb_... for edu).

    Documents follow each other across shards; the first shard is for validation. Parquet files are fetched one at a time, as they
    are needed.

    Args:
        output: the folder to write.
        kind: classic or edu.
        version: 10B or 100B, the size of the sample in tokens.
        shard_size: tokens in a file; the last file has the rest.
        shards: number of files after which to stop; None for all.
        source: a Parquet file (or another that llmc.datasets.text takes) or a folder of them, if you have them already; None to
            download them.
        column, on_bad_record: as of DocumentReader.
        tokenizer: as of Tokenizer.from_spec.
        workers: threads that tokenise; 0 for as many as the process may use.
        overwrite: whether to replace shards of an earlier run.

    Raises:
        ConnectionError: if a file cannot be downloaded.
        FileExistsError: if there are shards of an earlier run, and overwrite is not set.
        ValueError: if kind or version is another, shards is less than 1, or there are no documents.
    """
    _check(kind, version, shards)
    encoder = Tokenizer.from_spec(tokenizer)
    folder, name = Path(output), NAMES[kind]
    earlier = earlier_shards(folder, name, overwrite)
    paths = (
        find_documents(source).files
        if source is not None
        else _fetched(hub_files(REPOSITORIES[kind], SAMPLES[version]))
    )
    folder.mkdir(parents=True, exist_ok=True)
    remove_temporaries(folder)
    reader = DocumentReader(column, on_bad_record)
    writer = ShardWriter(
        lambda i: folder / shard_name(name, "train" if i else "val", i), encoder.vocab_size, shard_size
    )
    limit = None if shards is None else shards * shard_size
    stream = token_stream(reader.stream(paths), encoder, workers)
    with tqdm(total=limit, unit="tok", unit_scale=True, desc=name) as bar, writer, need_told(writer, bar):
        for tokens in stream:
            if not writer.total:
                put_tokenizer(encoder, folder, earlier)
            remove_files(earlier)
            if limit is not None:
                tokens = tokens[: limit - writer.total]
            bar.update(len(tokens))
            writer.write(tokens)
            if writer.total == limit:
                break
        stream.close()
    if not writer.paths:
        raise ValueError("there are no documents in the input")
    for line in reader.report():
        tqdm.write(line, file=sys.stderr)
    return TokenFiles(writer.paths[1:], writer.paths[:1], sum(writer.counts[1:]), writer.counts[0])


def prepare_mirror(output: str | Path, *, kind: str = "classic", shards: int | None = None) -> TokenFiles:
    """Download shards of the 100B sample that are tokenised already.

    Args:
        output: the folder to write.
        kind: classic or edu.
        shards: number of shards to train on; None for all. The shard for validation comes besides.

    Raises:
        ConnectionError: if the shards cannot be downloaded.
        ValueError: if kind is another, or shards is less than 1.
    """
    _check(kind, "100B", shards)
    folder, name = Path(output), NAMES[kind]
    files = [
        f for f in hub_files(MIRRORS[kind]) if Path(f.name).name.startswith(name + "_") and f.name.endswith(".bin")
    ]
    val = [f for f in files if Path(f.name).name.startswith(f"{name}_val_")]
    train = [f for f in files if Path(f.name).name.startswith(f"{name}_train_")][:shards]
    if not val or not train:
        raise ConnectionError(f"{MIRRORS[kind]} has {len(val)} shards for validation and {len(train)} for training")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [fetch(Remote(f.url, Path(f.name).name, f.sha256, f.size), folder) for f in tqdm(val + train, unit="shard")]
    counts = [_llmc.inspect_shard(path).tokens for path in paths]
    return TokenFiles(paths[len(val) :], paths[: len(val)], sum(counts[len(val) :]), sum(counts[: len(val)]))


def _check(kind: str, version: str, shards: int | None) -> None:
    if kind not in REPOSITORIES or version not in SAMPLES:
        raise ValueError(f"FineWeb {kind} {version}: expected classic or edu, and 10B or 100B")
    if shards is not None and shards < 1:
        raise ValueError(f"shards is {shards}, expected 1 or more")


def _fetched(files: list[Remote]) -> Iterator[Path]:
    """Download files one by one, each when it is asked for."""
    for i, file in enumerate(files):
        tqdm.write(f"file {i + 1} of {len(files)}: {file.name}", file=sys.stderr)  # like tqdm's bars
        yield fetch(file)
