"""Models and their tokenizers, from wherever they are: a file of llm.c's, a run directory, a Hugging Face folder, the Hub."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from llmc.checkpoint import newest_model
from llmc.data.tokenizer import TABLE_FILES, Tokenizer
from llmc.formats.model_file import is_pytorch_file
from llmc.hub.reading import download, open_hub_model
from llmc.hub.tokenizer import read_tokenizer
from llmc.models.gpt2 import GPT2
from llmc.system.fs import StrPath


def load_model(source: StrPath, *, dtype: str | None = None, **options: Any) -> GPT2:
    """Load a model.

    Args:
        source: a model file of llm.c's, a run directory (whose newest whole checkpoint is taken), a Hugging Face folder or weight
            file, or a name on the Hub.
        dtype: "f32" or "bf16"; None for that of llm.c's file, or for f32 if it is a Hugging Face model.
        options: keyword arguments of GPT2: device, threads, ...

    Raises:
        FileNotFoundError: if there is no such model, or the run directory has no finished checkpoint.
        llmc.Error: if a file is damaged, or not a GPT-2 as llmc has it.
        ConnectionError: if it must be downloaded and the Hub cannot be reached.
        ImportError: if reading it needs a package that is not installed.
    """
    path = Path(source)
    if path.is_dir() and (newest := newest_model(path)) is not None:
        path = newest
    if path.is_file() and path.suffix == ".bin" and not is_pytorch_file(path):
        return GPT2.from_checkpoint(path, dtype=dtype, **options)
    if path.suffix == ".bin" and not path.exists():
        raise FileNotFoundError(f"there is no model file '{path}'")
    hub_model = open_hub_model(source)
    for note in hub_model.notes:
        warnings.warn(note, stacklevel=2)
    model = GPT2(hub_model.config, dtype=dtype or "f32", seed=None, **options)
    for name, array in hub_model.parameters().items():
        model.parameters[name] = array
    return model


def find_tokenizer(source: StrPath) -> Tokenizer | None:
    """Find the tokenizer beside a model: that of its run, or that of its Hugging Face folder.

    Args:
        source: as of load_model.

    Returns:
        The tokenizer; None if there is none.

    Raises:
        llmc.Error, ValueError: if the tokenizer is damaged, or of a kind that is not supported.
        ConnectionError: if the model must be downloaded and the Hub cannot be reached.
        ImportError: if reading it needs a package that is not installed.
    """
    path = Path(source)
    if path.exists():
        folder = path if path.is_dir() else path.parent
    else:
        folder = download(os.fspath(source))
    is_llm_c = any((folder / name).is_file() for name in TABLE_FILES)
    return Tokenizer.beside(folder) if is_llm_c else read_tokenizer(folder)


def tokenizer_for(source: StrPath, vocab_size: int, spec: str | None = None) -> Tokenizer:
    """Return the tokenizer to use with a model.

    Args:
        source: the model, as of load_model.
        vocab_size: number of its token ids.
        spec: the tokenizer that the user names (Tokenizer.from_spec); None for the one beside the model, or GPT-2's if there is none
            and the vocabulary has GPT-2's size.

    Raises:
        ValueError: if there is no tokenizer, or it has more tokens than the model.
        FileNotFoundError, llmc.Error, ConnectionError, ImportError: as find_tokenizer and Tokenizer.from_spec.
    """
    tokenizer = find_tokenizer(source) if spec is None else Tokenizer.from_spec(spec)
    if tokenizer is None and vocab_size == 50257:
        tokenizer = Tokenizer.gpt2()
    if tokenizer is None:
        raise ValueError(f"there is no tokenizer beside '{source}': name one, as --tokenizer gpt2")
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, the model's vocabulary {vocab_size}"
        )
    return tokenizer
