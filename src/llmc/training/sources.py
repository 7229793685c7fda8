"""The data of a run: token shards, a tokenizer and a vocabulary, as its settings name them."""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc.checkpoint import finished_steps, model_file
from llmc.data.documents import DocumentReader
from llmc.data.files import find_data, is_validation
from llmc.data.holdout import hold_out
from llmc.data.python_texts import language_reference, library_docstrings
from llmc.data.tokenize import tokenize, write_pair
from llmc.data.tokenizer import Tokenizer, tokenizer_file
from llmc.formats.manifest import DataFile
from llmc.system.fs import write_atomically
from llmc.system.toml import load_toml_file
from llmc.training.settings import TrainConfig, load_toml

DEFAULT_TOKENIZER = "bpe:2048"


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


def prepare(config: TrainConfig, directory: Path | None, say: Callable[[str], None] = lambda line: None) -> Sources:
    """Find the data of a run, and tokenise them if they are text.

    A text is read again if a run is resumed, to see whether it is the same. If that cannot be, because it is not there any more, may not
    be read, came from standard input, or is what some Python brings along, the run goes on from its own tokens.

    Args:
        config: the settings; `data`, `val_data`, `tokenizer`, `vocab_size`, `model`, `resume` and `allow_changes` are read.
        directory: the run directory, whose subfolder `data` keeps the tokens of a text; None for a temporary folder.
        say: is told what folders and globs stand for, what was skipped in a text, or that the text is not there.

    Raises:
        FileNotFoundError: if a path or glob matches nothing.
        ValueError: if training and validation data are of different kinds, there is no text, or the text or the tokenizer is not
            the one that the run in the directory was trained on.
    """
    place = _place_of_data(config, directory)
    own = None if place is None or directory is None else _own_tokens(config, directory)
    if own is not None and (not config.data or "-" in (*config.data, *config.val_data)):
        return own
    try:
        return _prepare(config, directory, say)
    except (FileNotFoundError, PermissionError) as e:
        if own is not None:
            say(f"{e}: going on from the run's own tokens in {own.train[0].parent}")
            return own
        if place is None or isinstance(e, PermissionError):
            raise
        where = " or ".join(dict.fromkeys(filter(None, (place, os.getcwd()))))
        raise FileNotFoundError(f"{e} (in {where}): give --data with the place where the run's data are now") from e


def _place_of_data(config: TrainConfig, directory: Path | None) -> str | None:
    """Return where the data of a run that is resumed were when it began, maybe empty; None if it has others, or is a new run."""
    if directory is None or not config.resume or not (file := directory / "config.toml").is_file():
        return None
    before = TrainConfig(**{k: v for k, v in load_toml(file).items() if k in ("data", "val_data")})
    same = (before.data, before.val_data) == (config.data, config.val_data)
    return str(load_toml_file(file).get("directory", "")) if same else None


def _own_tokens(config: TrainConfig, directory: Path) -> Sources | None:
    """Return the tokens and the tokenizer that a run keeps in its directory, or None if it has them not, or not all."""
    source = _read_remembered(directory)
    if not source or not finished_steps(directory) or (tokenizer := _tokenized(directory, source)) is None:
        return None
    return _of_text(config, directory, tokenizer, source)


def validation_files(run: Path) -> list[Path]:
    """Find the token files that a run validates on.

    Args:
        run: a run directory.

    Raises:
        FileNotFoundError: if they are not there any more.
        ValueError: if the run has no validation data, or what is left of them is text.
    """
    own = _token_files(run)[1]
    if _read_remembered(run) and own.is_file():
        return [own]
    config = TrainConfig(**{k: v for k, v in load_toml(run / "config.toml").items() if k in ("data", "val_data")})
    try:
        data = find_data(config.val_data or config.data, "the validation data", validation=bool(config.val_data))
    except FileNotFoundError as e:
        raise FileNotFoundError(f"{e}: give --data with the place where the data of {run} are now") from e
    if not data.tokens:
        raise FileNotFoundError(f"{own} is not there, and the data of {run} are text: give --data")
    if not (files := data.files if config.val_data else data.val):
        raise ValueError(f"{run} has no validation data: give --data")
    return files


def _of_text(
    config: TrainConfig,
    folder: Path,
    tokenizer: Tokenizer,
    source: dict[str, Any],
    temporary: tempfile.TemporaryDirectory[str] | None = None,
) -> Sources:
    train, val = _token_files(folder)
    vocab_size = config.vocab_size or tokenizer.vocab_size
    remembered = (str(folder.absolute()), source)
    return Sources([train], [val], tokenizer, vocab_size, _description(config), temporary, remembered)


def _description(config: TrainConfig) -> str:
    return ", ".join(config.data) or "Python's language reference and docstrings"


def _prepare(config: TrainConfig, directory: Path | None, say: Callable[[str], None]) -> Sources:
    data = find_data(config.data, "the data")
    val_data = find_data(config.val_data, "the validation data", validation=True)
    if config.val_data and data.tokens != val_data.tokens:
        kinds = ("token files", "text") if data.tokens else ("text", "token files")
        raise ValueError(f"the data are {kinds[0]}, but the validation data are {kinds[1]}; give {kinds[0]} for both")
    if config.holdout != "end" and (data.tokens or config.val_data):
        why = "val_data is given" if config.val_data else "the data are token files"
        raise ValueError(f"holdout is {config.holdout}, but {why}: nothing is held out")
    for name, found in (("data", data), ("validation data", val_data)):
        if found.searched:
            say(f"{name}: {found.describe()}")
    named_val = [path.name for path in data.files if is_validation(path)]
    if data.tokens and not config.val_data and 0 < len(named_val) < len(data.files):
        say(
            f"note: {', '.join(named_val[:3])} (of {len(named_val)}) for validation are trained on, because they are named; "
            "name the folder, or put the glob in quotes, to validate on them"
        )
    if data.tokens:
        return _from_shards(config, data.files, val_data.files if config.val_data else data.val, directory)
    return _from_text(config, data.files, val_data.files, directory, say)


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
            return _of_text(config, folder, tokenizer, source)
    return prepare(config, None)


def _from_shards(config: TrainConfig, train: list[Path], val: list[Path], directory: Path | None) -> Sources:
    tokenizer = None
    if directory is not None and finished_steps(directory):
        tokenizer = Tokenizer.beside(directory)  # that of the run's weights, wherever it came from
    if tokenizer is None and config.tokenizer is not None:
        tokenizer = Tokenizer.from_spec(config.tokenizer)
    elif tokenizer is None:
        tokenizer = Tokenizer.beside(train[0].parent) or Tokenizer.beside(Path.cwd())
    vocab_size = config.vocab_size or (tokenizer.vocab_size if tokenizer else 50257)
    return Sources(train, val, tokenizer, vocab_size, _description(config))


def _from_text(
    config: TrainConfig, texts: list[Path], val_texts: list[Path], directory: Path | None, say: Callable[[str], None]
) -> Sources:
    reader = DocumentReader(config.column, config.on_bad_record, config.document_separator)
    documents = list(reader.documents(texts)) if texts else language_reference()
    val_documents = list(reader.documents(val_texts))
    more = [] if texts else library_docstrings()  # to train on alone: the hold-out is the language reference's
    if not texts and not more:
        say("note: this Python does not have its library as source: training on its language reference alone")
    for line in reader.report():
        say(line)
    if not any(documents):
        raise ValueError(f"there is no text in {_description(config)}")

    temporary = None
    if directory is None:
        temporary = tempfile.TemporaryDirectory(prefix="llmc-", ignore_cleanup_errors=True)
    folder = Path(temporary.name) if temporary is not None else Path(directory or "")
    before = _read_remembered(folder) if finished_steps(folder) else {}  # the weights of a run belong to its tokenizer
    source: dict[str, Any] = {
        "tokenizer": config.tokenizer or before.get("tokenizer") or _tokenizer_of(config.model),
        "documents": [len(documents) + len(more), len(val_documents)],
        "crc32": zlib.crc32("\0".join([*more, *documents, *val_documents]).encode("utf-8", "surrogatepass")),
    }
    if not val_documents:
        if config.holdout != "end":
            source["holdout"] = config.holdout
        documents, val_documents = hold_out(documents, config.holdout)
    # The reference is read twice for each time that the docstrings are: it is what the run is judged by.
    documents = [*more, *documents * (2 if more else 1)]
    train, _ = _token_files(folder)
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
            tokenizer = Tokenizer.from_spec(source["tokenizer"], text="\n\n".join(documents))
        tokens, val_tokens = tokenize(documents, tokenizer), tokenize(val_documents, tokenizer)
        write_pair(tokens, val_tokens, train.parent, tokenizer.vocab_size)
        tokenizer.save(saved)
        write_atomically(_remembered(folder), [json.dumps(source).encode()])
    return _of_text(config, folder, tokenizer, source, temporary)


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


def _read_remembered(folder: Path) -> dict[str, Any]:
    """Return what a folder remembers of the text whose tokens it has; empty if it has none, or that cannot be read."""
    try:
        source = json.loads(_remembered(folder).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return source if isinstance(source, dict) and isinstance(source.get("tokenizer"), str) else {}


def _tokenized(folder: Path, source: dict[str, Any]) -> Tokenizer | None:
    """Return the tokenizer in a folder if it and the tokens there are those of a text, else None."""
    files = (*_token_files(folder), _tokenizer_file(folder, source))
    whole = _read_remembered(folder) == source and all(p.is_file() for p in files)
    return Tokenizer.load(files[-1]) if whole else None
