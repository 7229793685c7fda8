"""What a run trains on: from its settings to token shards, a tokenizer and a vocabulary."""

from __future__ import annotations

import glob
import json
import re
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from llmc.checkpoint import finished_steps
from llmc.data.loader import find_shards
from llmc.data.tokenizer import Tokenizer
from llmc.datasets import text as text_data
from llmc.formats.manifest import DataFile
from llmc.formats.shards import is_shard
from llmc.system.fs import write_atomically
from llmc.training.settings import TrainConfig

DEFAULT_TOKENIZER = "bpe:1024"


@dataclass(frozen=True)
class Sources:
    """train, val: token files (val may be empty). tokenizer: None where the data are token files and none was found."""

    train: list[Path]
    val: list[Path]
    tokenizer: Tokenizer | None
    vocab_size: int
    description: str
    temporary: tempfile.TemporaryDirectory[str] | None = None  # what goes when this goes

    def fingerprint(self) -> list[DataFile]:
        """Return what a checkpoint remembers of its data: name, size and checksum of the ends of each file, not its place."""
        rows = []
        for path in [*self.train, *self.val]:
            with open(path, "rb") as file:
                head = file.read(1 << 20)
                size = file.seek(0, 2)
                file.seek(max(0, size - (1 << 20)))
                rows.append(DataFile(path.name, size, zlib.crc32(file.read(), zlib.crc32(head))))
        return rows


def _folder_shards(folder: Path) -> tuple[list[Path], list[Path]]:
    """(training, validation) token files of a folder, told apart by `val` in their names, as `llmc data` has it: text_val_000000.bin."""
    shards = sorted(p for p in folder.glob("*.bin") if p.is_file() and not p.name.startswith(".") and is_shard(p))
    val = [p for p in shards if re.search(r"(^|_)val(_|$)", p.stem)]
    return [p for p in shards if p not in val], val


def _matches(pattern: str, validation: bool) -> list[Path]:
    """The files of a path or glob; a folder without token files is one text. validation: of a folder, take its validation files."""
    path = Path(pattern)
    if path.is_dir():
        train, val = _folder_shards(path)
        if validation:
            return val or train or [path]
        if val and not train:
            raise ValueError(
                f"folder '{path}' has token files for validation only, as '{val[0].name}'; name files to train on"
            )
        return train or [path]
    if path.exists():
        return [path]
    found = sorted(Path(p) for p in glob.glob(pattern))
    if not found:
        raise FileNotFoundError(f"no files match '{pattern}'")
    return found


def _split_kinds(patterns: tuple[str, ...], what: str, validation: bool = False) -> tuple[list[Path], list[Path]]:
    """(token files, texts); not both."""
    paths = [p for pattern in patterns for p in _matches(pattern, validation)]
    bins = [p for p in paths if p.suffix == ".bin"]
    texts = [p for p in paths if p.suffix != ".bin"]
    if bins and texts:
        raise ValueError(f"{what} are token files and text at once: '{bins[0]}' and '{texts[0]}'; give one kind")
    return bins, texts


def prepare(config: TrainConfig, directory: Path | None) -> Sources:
    """Finds the data, and tokenises text into directory/data, or a temporary folder where there is no run directory."""
    bins, texts = _split_kinds(config.data, "the data")
    val_bins, val_texts = _split_kinds(config.val_data, "the validation data", validation=True)
    if bins and not config.val_data:
        val_bins = [p for folder in map(Path, config.data) if folder.is_dir() for p in _folder_shards(folder)[1]]
    if bins:
        if val_texts:
            raise ValueError("the data are token files, but the validation data are text; give token files for both")
        return _from_bins(config, find_shards(bins), find_shards(val_bins) if val_bins else [])
    if val_bins:
        raise ValueError("the data are text, but the validation data are token files; give text for both")
    return _from_text(config, texts, val_texts, directory)


def _from_bins(config: TrainConfig, train: list[Path], val: list[Path]) -> Sources:
    tokenizer = None
    if config.tokenizer is not None:
        tokenizer = Tokenizer.from_spec(config.tokenizer)
    else:
        tokenizer = Tokenizer.beside(train[0].parent) or Tokenizer.beside(Path.cwd())
    vocab_size = config.vocab_size or (tokenizer.vocab_size if tokenizer else 50257)
    description = ", ".join(config.data)
    return Sources(train, val, tokenizer, vocab_size, description)


def _from_text(config: TrainConfig, texts: list[Path], val_texts: list[Path], directory: Path | None) -> Sources:
    if texts:
        documents = list(text_data.read_documents(f for path in texts for f in text_data.text_files(path)))
        description = ", ".join(config.data)
    else:
        documents = text_data.language_reference()
        description = "Python's language reference"
    val_documents = list(text_data.read_documents(f for path in val_texts for f in text_data.text_files(path)))
    if not any(documents):
        raise ValueError(f"there is no text in {description}")
    spec = config.tokenizer or (DEFAULT_TOKENIZER if config.model is None else "gpt2")

    temporary = None
    if directory is None:
        temporary = tempfile.TemporaryDirectory(prefix="llmc-", ignore_cleanup_errors=True)
    folder = Path(temporary.name) if temporary is not None else Path(directory or "")
    data, remembered = folder / "data", folder / "data" / "source.json"
    source = {
        "tokenizer": spec,
        "documents": [len(documents), len(val_documents)],
        "crc32": zlib.crc32("\0".join([*documents, *val_documents]).encode("utf-8", "surrogatepass")),
    }
    train, val = data / "train.bin", data / "val.bin"
    saved = folder / ("tokenizer.json" if spec.endswith(".json") else "tokenizer.bin")
    try:
        unchanged = json.loads(remembered.read_text(encoding="utf-8")) == source and all(
            p.is_file() for p in (train, val, saved)
        )
    except (OSError, ValueError):
        unchanged = False
    if unchanged:
        tokenizer = Tokenizer.load(saved)
    else:
        if finished_steps(folder):  # the run's own tokenizer and data must not be lost
            if not config.allow_changes:
                raise ValueError(
                    f"{folder}: the text or the tokenizer is not what the run was trained on. Give the same, or --allow-changes to "
                    "go on with the new text and the run's tokenizer"
                )
            tokenizer = Tokenizer.load(saved)
        else:
            tokenizer = Tokenizer.from_spec(spec, text="\n\n".join(documents))
        tokens = text_data.tokenize(documents, tokenizer)
        if val_documents:
            text_data.write_pair(tokens, text_data.tokenize(val_documents, tokenizer), data, tokenizer.vocab_size)
        else:
            text_data.write_splits(tokens, data, tokenizer.vocab_size)
        tokenizer.save(saved)
        write_atomically(remembered, [json.dumps(source).encode()])
    vocab_size = config.vocab_size or tokenizer.vocab_size
    return Sources([train], [val], tokenizer, vocab_size, description, temporary)
