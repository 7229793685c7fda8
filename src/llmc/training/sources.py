"""The data of a run: token shards, a tokenizer and a vocabulary, as its settings name them."""

from __future__ import annotations

import json
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc.checkpoint import finished_steps, model_file
from llmc.data.documents import TEXT_SUFFIXES, DocumentReader, language_reference
from llmc.data.files import document_files, shards_of_folder, shards_or_documents
from llmc.data.tokenize import tokenize, write_pair, write_splits
from llmc.data.tokenizer import Tokenizer, tokenizer_file
from llmc.formats.manifest import DataFile
from llmc.system.fs import write_atomically
from llmc.training.settings import TrainConfig

DEFAULT_TOKENIZER = "bpe:1024"


@dataclass(frozen=True)
class Sources:
    """The data of a run.

    Attributes:
        train: token files to train on.
        val: token files for validation, maybe none.
        tokenizer: None if the data are token files and no tokenizer was found.
        vocab_size: number of token ids of the model.
        description: the data's name in a report.
        temporary: the folder that holds the files, removed together with this object; None if the files are to stay.
        tokenized: the run directory or temporary folder that has the tokens of a text, and what is remembered of that text; None
            if the data are token files.
    """

    train: list[Path]
    val: list[Path]
    tokenizer: Tokenizer | None
    vocab_size: int
    description: str
    temporary: tempfile.TemporaryDirectory[str] | None = None
    tokenized: tuple[str, dict[str, Any]] | None = None

    def fingerprint(self) -> list[DataFile]:
        """Compute what a checkpoint remembers of its data, so that a resumed run can tell whether they are the same.

        Returns:
            For each file its name without the folder, its size in bytes, and the CRC-32 of its first and last MiB.
        """
        rows = []
        for path in [*self.train, *self.val]:
            with open(path, "rb") as file:
                head = file.read(1 << 20)
                size = file.seek(0, 2)
                file.seek(max(0, size - (1 << 20)))
                rows.append(DataFile(path.name, size, zlib.crc32(file.read(), zlib.crc32(head))))
        return rows


def prepare(config: TrainConfig, directory: Path | None) -> Sources:
    """Find the data of a run, and tokenise them if they are text.

    Args:
        config: the settings; `data`, `val_data`, `tokenizer`, `vocab_size`, `model` and `allow_changes` are read.
        directory: the run directory, whose subfolder `data` keeps the tokens of a text; None for a temporary folder.

    Raises:
        FileNotFoundError: if a path or glob matches nothing.
        ValueError: if training and validation data are of different kinds, there is no text, or the text or the tokenizer is not
            the one that the run in the directory was trained on.
    """
    shards, texts = shards_or_documents(config.data, "the data")
    val_shards, val_texts = shards_or_documents(config.val_data, "the validation data", validation=True)
    if shards and not config.val_data:
        val_shards = [p for folder in map(Path, config.data) if folder.is_dir() for p in shards_of_folder(folder)[1]]
    if shards:
        if val_texts:
            raise ValueError("the data are token files, but the validation data are text; give token files for both")
        return _from_shards(config, shards, val_shards)
    if val_shards:
        raise ValueError("the data are text, but the validation data are token files; give text for both")
    return _from_text(config, texts, val_texts, directory)


def prepare_beside(config: TrainConfig, tokenized: tuple[str, dict[str, Any]] | None) -> Sources:
    """Find the data of a run whose rank 0 has prepared them already, as another rank.

    Args:
        config: as of prepare().
        tokenized: that of rank 0's Sources. If its folder is seen from here, its tokens are used; else the text is tokenised into a
            temporary folder.

    Raises:
        FileNotFoundError, ValueError: as of prepare().
    """
    if tokenized is not None:
        folder, source = Path(tokenized[0]), tokenized[1]
        if (tokenizer := _tokenized(folder, source)) is not None:
            train, val = _token_files(folder)
            return Sources([train], [val], tokenizer, config.vocab_size or tokenizer.vocab_size, "rank 0's tokens")
    return prepare(config, None)


def _from_shards(config: TrainConfig, train: list[Path], val: list[Path]) -> Sources:
    tokenizer = None
    if config.tokenizer is not None:
        tokenizer = Tokenizer.from_spec(config.tokenizer)
    else:
        tokenizer = Tokenizer.beside(train[0].parent) or Tokenizer.beside(Path.cwd())
    vocab_size = config.vocab_size or (tokenizer.vocab_size if tokenizer else 50257)
    description = ", ".join(config.data)
    return Sources(train, val, tokenizer, vocab_size, description)


def _read_texts(paths: list[Path]) -> list[str]:
    return list(DocumentReader().documents(file for path in paths for file in document_files(path, TEXT_SUFFIXES)))


def _from_text(config: TrainConfig, texts: list[Path], val_texts: list[Path], directory: Path | None) -> Sources:
    if texts:
        documents = _read_texts(texts)
        description = ", ".join(config.data)
    else:
        documents = language_reference()
        description = "Python's language reference"
    val_documents = _read_texts(val_texts)
    if not any(documents):
        raise ValueError(f"there is no text in {description}")
    spec = config.tokenizer or _tokenizer_of(config.model)

    temporary = None
    if directory is None:
        temporary = tempfile.TemporaryDirectory(prefix="llmc-", ignore_cleanup_errors=True)
    folder = Path(temporary.name) if temporary is not None else Path(directory or "")
    source = {
        "tokenizer": spec,
        "documents": [len(documents), len(val_documents)],
        "crc32": zlib.crc32("\0".join([*documents, *val_documents]).encode("utf-8", "surrogatepass")),
    }
    train, val = _token_files(folder)
    saved = _tokenizer_file(folder, source)
    if (tokenizer := _tokenized(folder, source)) is None:
        if finished_steps(folder):  # the tokenizer that the run's weights belong to must not be lost
            if not config.allow_changes:
                raise ValueError(
                    f"{folder}: the text or the tokenizer is not what the run was trained on. Give the same, or --allow-changes to "
                    "go on with the new text and the run's tokenizer"
                )
            tokenizer = Tokenizer.load(saved)
        else:
            tokenizer = Tokenizer.from_spec(spec, text="\n\n".join(documents))
        tokens = tokenize(documents, tokenizer)
        if val_documents:
            write_pair(tokens, tokenize(val_documents, tokenizer), train.parent, tokenizer.vocab_size)
        else:
            write_splits(tokens, train.parent, tokenizer.vocab_size)
        tokenizer.save(saved)
        write_atomically(_remembered(folder), [json.dumps(source).encode()])
    vocab_size = config.vocab_size or tokenizer.vocab_size
    return Sources([train], [val], tokenizer, vocab_size, description, temporary, (str(folder.absolute()), source))


def _tokenizer_of(model: str | None) -> str:
    """Return the tokenizer that fits a model: the one beside its weights, else GPT-2's; for the small model one is trained."""
    if model is None:
        return DEFAULT_TOKENIZER
    weights = model_file(model)
    beside = None if weights is None else tokenizer_file(weights.parent)
    return "gpt2" if beside is None else str(beside)


def _token_files(folder: Path) -> tuple[Path, Path]:
    return folder / "data" / "train.bin", folder / "data" / "val.bin"


def _tokenizer_file(folder: Path, source: dict[str, Any]) -> Path:
    return folder / ("tokenizer.json" if source["tokenizer"].endswith(".json") else "tokenizer.bin")


def _remembered(folder: Path) -> Path:
    return folder / "data" / "source.json"


def _tokenized(folder: Path, source: dict[str, Any]) -> Tokenizer | None:
    """Return the tokenizer in a folder if it and the tokens there are those of a text, else None."""
    files = (*_token_files(folder), _tokenizer_file(folder, source))
    try:
        unchanged = json.loads(_remembered(folder).read_text(encoding="utf-8")) == source
    except (OSError, ValueError):
        return None
    return Tokenizer.load(files[-1]) if unchanged and all(p.is_file() for p in files) else None
