"""TinyStories (Eldan and Li 2023): short stories that a small model can learn to write."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from llmc.data.documents import Piece
from llmc.data.tokenize import token_stream
from llmc.data.tokenizer import Tokenizer
from llmc.datasets.archive import unpacked
from llmc.datasets.common import TokenFiles, need_told, put_tokenizer
from llmc.datasets.download import fetch, hub_files
from llmc.formats.shards import ShardWriter

REPOSITORY, ARCHIVE = "roneneldan/TinyStories", "TinyStories_all_data.tar.gz"


def prepare(
    output: str | Path, *, source: str | Path | None = None, tokenizer: str = "gpt2", workers: int = 0
) -> TokenFiles:
    """Write TinyStories_val.bin of the first JSON file, and TinyStories_train.bin of the others in order.

    Stories are shuffled within a file as llm.c does it. (llm.c joins the files in the order in which its processes finish.)

    Args:
        output: the folder to write.
        source: the archive, or a folder of its JSON files, if you have it already; None to download the archive.
        tokenizer: as of Tokenizer.from_spec.
        workers: threads that tokenise; 0 for as many as the process may use.

    Raises:
        ConnectionError: if the archive cannot be downloaded.
        FileNotFoundError: if the source does not exist, or has fewer than two JSON files.
        ValueError: if the archive or a JSON file is damaged.
    """
    encoder = Tokenizer.from_spec(tokenizer)
    files = _stories(Path(source) if source is not None else None)
    folder = Path(output)
    targets = {split: folder / f"TinyStories_{split}.bin" for split in ("val", "train")}
    folder.mkdir(parents=True, exist_ok=True)
    put_tokenizer(encoder, folder, targets.values())
    totals = {}
    for split, paths in (("val", files[:1]), ("train", files[1:])):
        with (
            tqdm(total=len(paths), unit="file", desc=f"tokenize {split}") as bar,
            ShardWriter(lambda i, target=targets[split]: target, encoder.vocab_size) as writer,  # type: ignore[misc]
            need_told(writer, bar),
        ):
            for tokens in token_stream(_documents(paths, bar), encoder, workers):
                writer.write(tokens)
        totals[split] = writer
    train, val = totals["train"], totals["val"]
    return TokenFiles(train.paths, val.paths, train.total, val.total)


def _documents(paths: list[Path], bar: tqdm[None]) -> Iterator[Piece]:
    for index, path in enumerate(paths):
        try:
            stories = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path}: not JSON: {e}") from e
        if not isinstance(stories, list) or not all(
            isinstance(s, dict) and isinstance(s.get("story"), str) for s in stories
        ):
            raise ValueError(f"{path}: expected an array of records with a 'story'")
        random.Random(1337 + index).shuffle(stories)
        for story in stories:
            yield Piece(story["story"].strip(), True)
        bar.update()


def _stories(source: Path | None) -> list[Path]:
    """List the JSON files in order, downloading and unpacking the archive if need be."""
    if source is None:
        found = [f for f in hub_files(REPOSITORY) if f.url.endswith(ARCHIVE)]
        if not found:
            raise ConnectionError(f"{REPOSITORY} has no {ARCHIVE} any more: name one with --source")
        source = fetch(found[0])
    if source.is_file():
        source = unpacked(source, "tinystories", ".json")
    elif not source.is_dir():
        raise FileNotFoundError(f"'{source}' does not exist: expected {ARCHIVE}, or a folder of its JSON files")
    files = sorted(source.glob("*.json"))
    if len(files) < 2:
        raise FileNotFoundError(
            f"folder '{source}' has {len(files)} JSON files; the first is for validation, so expected 2 or more"
        )
    return files
