"""FineWeb and FineWeb-Edu (Penedo et al. 2024): text from the web, for serious pretraining.

From the Hub's Parquet files, tokenised here; or the same shards as others have tokenised them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from llmc import _llmc
from llmc.data.documents import data_files, read_pieces
from llmc.data.tokenize import token_stream
from llmc.data.tokenizer import Tokenizer
from llmc.datasets.download import Remote, fetch, hub_files
from llmc.datasets.text import Written, earlier_shards, remove_all, shard_name
from llmc.formats.shards import ShardWriter
from llmc.system.fs import remove_temporaries

REPOSITORIES = {"classic": "HuggingFaceFW/fineweb", "edu": "HuggingFaceFW/fineweb-edu"}
SAMPLES = {"10B": "sample/10BT", "100B": "sample/100BT"}
NAMES = {"classic": "fineweb", "edu": "edu_fineweb"}
# Shards of GPT-2's tokens, 10^8 in each, of the 100B samples.
MIRRORS = {"classic": "chrisdryden/FineWebTokenizedGPT2", "edu": "karpathy/fineweb-edu-100B-gpt2-token-shards"}


def prepare(
    output: str | Path,
    *,
    kind: str = "classic",
    version: str = "10B",
    shard_size: int = 10**8,
    shards: int | None = None,
    source: str | Path | None = None,
    tokenizer: str = "gpt2",
    workers: int = 0,
    overwrite: bool = False,
) -> Written:
    """Writes llm.c's shards fineweb_val_000000.bin, fineweb_train_000001.bin, ... (edu_fineweb_... for edu).

    Documents follow each other across shards; the first shard is for validation. Parquet files are fetched one at a time, as they
    are needed.
    kind: classic or edu. version: 10B or 100B. shards: stop after this many; None for all.
    source: Parquet files (or any that llmc.datasets.text takes) or their folder, where you have them already.
    """
    _check(kind, version, shards)
    encoder = Tokenizer.from_spec(tokenizer)
    folder, name = Path(output), NAMES[kind]
    earlier = earlier_shards(folder, name, overwrite)
    paths = (
        data_files(Path(source)) if source is not None else _fetched(hub_files(REPOSITORIES[kind], SAMPLES[version]))
    )
    folder.mkdir(parents=True, exist_ok=True)
    remove_temporaries(folder)
    pieces = chain.from_iterable(read_pieces(path) for path in paths)
    writer = ShardWriter(
        lambda i: folder / shard_name(name, "train" if i else "val", i), encoder.vocab_size, shard_size
    )
    limit = None if shards is None else shards * shard_size
    stream = token_stream(pieces, encoder, workers)
    with tqdm(total=limit, unit="tok", unit_scale=True, desc=name) as bar, writer:
        for tokens in stream:
            remove_all(earlier)
            if limit is not None:
                tokens = tokens[: limit - writer.total]
            writer.write(tokens)
            bar.update(len(tokens))
            if writer.total == limit:
                break
        stream.close()
    if not writer.paths:
        raise ValueError("there are no documents in the input")
    encoder.save(folder / encoder.file_name)
    return Written(writer.paths[1:], writer.paths[:1], sum(writer.counts[1:]), writer.counts[0])


def prepare_mirror(output: str | Path, *, kind: str = "classic", shards: int | None = None) -> Written:
    """Downloads shards of the 100B sample that are tokenised already: for validation one, for training the first `shards`."""
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
    return Written(paths[len(val) :], paths[: len(val)], sum(counts[len(val) :]), sum(counts[: len(val)]))


def _check(kind: str, version: str, shards: int | None) -> None:
    if kind not in REPOSITORIES or version not in SAMPLES:
        raise ValueError(f"FineWeb {kind} {version}: expected classic or edu, and 10B or 100B")
    if shards is not None and shards < 1:
        raise ValueError(f"shards is {shards}, expected 1 or more")


def _fetched(files: list[Remote]) -> Iterator[Path]:
    for i, file in enumerate(files):
        tqdm.write(f"file {i + 1} of {len(files)}: {file.name}", file=sys.stderr)  # as the bars
        yield fetch(file)
