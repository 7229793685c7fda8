"""Models written as a folder that Hugging Face's transformers loads.

A tensor is converted when it is written, one at a time: a model larger than memory can be exported.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmc.data.tokenizer import Tokenizer
from llmc.formats.json_files import write_json
from llmc.hub import gpt2
from llmc.hub.tokenizer import FILES as TOKENIZER_FILES
from llmc.hub.tokenizer import role_ids, write_tokenizer
from llmc.models.gpt2 import GPT2
from llmc.models.model import Model
from llmc.system.fs import StrPath, temporary_name, write_atomically
from llmc.values import VALUE_DTYPES, canonical_dtype


def export_model(
    model: Model,
    folder: StrPath,
    *,
    dtype: str | None = None,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a model as model.safetensors (or shards and their index) with config.json, and its tokenizer.

    All of it is written under another name first: if something fails, there is no folder, or an existing one is as it was.

    Args:
        model: the model.
        folder: the folder to write, made if it is missing. Weights of an earlier export in it are removed, and its tokenizer if there
            is another one to write.
        dtype: "f32" or "bf16", that of the file; None for the model's.
        tokenizer: the tokenizer to write; None for none.
        max_shard_bytes: the largest size of a file's tensors; a larger model is split into shards.

    Raises:
        ValueError: if the model is not a GPT-2, an argument is out of range, the tokenizer has more tokens than the model, or cannot be
            written as merges.
        OSError: if a file cannot be written.
    """
    model = exportable(model, tokenizer)
    dtype = canonical_dtype(dtype or model.dtype)
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}, expected a positive number")
    out = Path(folder)
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"'{out}' is a file, expected a folder")
    exists = out.is_dir()
    # On the same disk: beside the folder, or inside of it if it exists, as the one above it may be closed to the user.
    staged = temporary_name(out / "export" if exists else out)
    staged.mkdir(parents=True)
    try:
        _write_folder(model, staged, dtype, tokenizer, max_shard_bytes)
        if not exists:
            staged.rename(out)
            return
        new = {path.name for path in staged.iterdir()}
        for name in new:
            (staged / name).replace(out / name)
        weights = {path.name for path in out.glob("model*.safetensors")} | {"model.safetensors.index.json"}
        for name in (weights | set(TOKENIZER_FILES if tokenizer is not None else ())) - new:
            (out / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def exportable(model: Model, tokenizer: Tokenizer | None) -> GPT2:
    """Return the model, if it is one that can be exported with this tokenizer.

    Raises:
        ValueError: if it is not a GPT-2, or the tokenizer has more tokens than the model.
    """
    if not isinstance(model, GPT2):
        raise ValueError(f"the model is a {model.family}: only a GPT-2 can be exported")
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model a vocabulary of {model.config.vocab_size}: not a pair"
        )
    return model


def _write_folder(model: GPT2, out: Path, dtype: str, tokenizer: Tokenizer | None, max_shard_bytes: int) -> None:
    if tokenizer is not None:
        write_tokenizer(tokenizer, out, model.config.max_seq_len)  # first, as it may be refused
    shards: list[list[_Entry]] = [[]]
    for entry in _entries(model, VALUE_DTYPES[dtype]):
        if shards[-1] and sum(e.bytes for e in shards[-1]) + entry.bytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        index = {
            "metadata": {"total_size": sum(e.bytes for shard in shards for e in shard)},
            "weight_map": {e.name: name for name, shard in zip(names, shards) for e in shard},
        }
        write_json(out / "model.safetensors.index.json", index)
    for name, shard in zip(names, shards):
        write_atomically(out / name, _safetensors(shard, dtype))
    roles = role_ids(tokenizer) if tokenizer is not None else dict.fromkeys(("bos", "eos"), model.config.vocab_size - 1)
    write_json(out / "config.json", gpt2.config_values(model.config, dtype, roles))


@dataclass(frozen=True)
class _Entry:
    """A tensor of a safetensors file.

    Attributes:
        read: a function that makes the array.
    """

    name: str
    shape: tuple[int, ...]
    bytes: int
    read: Callable[[], NDArray[Any]]


def _entries(model: GPT2, dtype: np.dtype[Any]) -> Iterator[_Entry]:
    """List the tensors under the Hub's names, in the order of llm.c's file."""
    parameters = model.parameters

    def read(name: str, tensor: gpt2.HubTensor, layer: int) -> NDArray[Any]:
        array = parameters[name][layer] if tensor.in_blocks else parameters[name]
        array = array[: tensor.shape[0]]  # without the padding
        return np.ascontiguousarray((array.T if tensor.transposed else array).astype(dtype, copy=False))

    for name, tensor in gpt2.hub_tensors(model.config).items():
        size = math.prod(tensor.shape) * dtype.itemsize
        for layer, hub_name in enumerate(tensor.names):
            yield _Entry(gpt2.PREFIX + hub_name, tensor.hub_shape, size, partial(read, name, tensor, layer))


def _safetensors(entries: list[_Entry], dtype: str) -> Iterator[Any]:
    """Make a safetensors file: the header's length in 8 bytes, a JSON header padded to a multiple of 8, then the tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for e in entries:
        header[e.name] = {"dtype": dtype.upper(), "shape": e.shape, "data_offsets": [at, at + e.bytes]}
        at += e.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for e in entries:
        yield e.read().reshape(-1).view(np.uint8)
