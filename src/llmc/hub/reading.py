"""Hugging Face's models read from the disk or the Hub: opened, checked, and imported into llm.c's file.

Weights may be safetensors or PyTorch files. No pickle runs code: PyTorch files are read with weights_only. A tensor is read when it
is asked for, one at a time: a model larger than memory can be imported.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from llmc import _llmc
from llmc.data.tokenizer import Tokenizer
from llmc.formats.json_files import read_object
from llmc.formats.model_file import is_pytorch_file, write_model_file
from llmc.formats.shards import content_of
from llmc.hub import gpt2
from llmc.hub.tokenizer import FILES as TOKENIZER_FILES
from llmc.hub.tokenizer import read_tokenizer
from llmc.models.config import GPT2Config
from llmc.system.fs import StrPath
from llmc.values import VALUE_DTYPES, canonical_dtype

Array = NDArray[Any]

# Where training programs put a model's tensors in a checkpoint of many things: nanoGPT, Lightning, DeepSpeed, ...
_STATE_KEYS = ("model", "state_dict", "model_state_dict", "module")
_CONVERT = (
    "If you trust the file: from safetensors.torch import save_file; save_file({k: v.contiguous() for k, v in "
    "torch.load(FILE, map_location='cpu', weights_only=False).items()}, 'model.safetensors')"
)


@dataclass(frozen=True)
class HubModel:
    """A Hugging Face model on the disk, whose tensors are read when they are asked for.

    Attributes:
        folder: the folder that it was found in.
        config: its shape.
        tensors: how the Hub stores each tensor, by llm.c's names and in the order of llm.c's file.
        readers: for each tensor in its weight files, by its bare name (gpt2.bare_name), a function that reads it.
        notes: what a user should know of how the model differs from its files.
    """

    folder: Path
    config: GPT2Config
    tensors: Mapping[str, gpt2.HubTensor]
    readers: Mapping[str, Callable[[], Array]]
    notes: tuple[str, ...]

    def tensor(self, name: str, layer: int = 0) -> Array:
        """Read a tensor.

        Args:
            name: llm.c's name.
            layer: number of the block, for a tensor that every block has.

        Returns:
            The tensor of that block in llm.c's layout, without padding, in the dtype of the file.

        Raises:
            llmc.Error: if it is missing, cannot be read, or has another shape or kind of dtype than it should.
        """
        tensor = self.tensors[name]
        hub_name = tensor.names[layer]
        if hub_name not in self.readers:
            others = gpt2.unknown_names(self.readers, self.tensors)
            raise _llmc.Error(
                f"{self.folder}: there is no tensor '{hub_name}': not a GPT-2, or not whole"
                + (f"; of unknown meaning are {_listed(others)}" if others else "")
            )
        array = self.readers[hub_name]()
        if array.shape != tensor.hub_shape:
            raise _llmc.Error(
                f"{self.folder}: tensor '{hub_name}' is {array.shape}, config.json makes it {tensor.hub_shape}"
            )
        if array.dtype not in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16):
            raise _llmc.Error(f"{self.folder}: tensor '{hub_name}' is {array.dtype}, expected floating point")
        return array.T if tensor.transposed else array

    def pieces(self, dtype: np.dtype[Any]) -> Iterator[Array]:
        """Read all tensors in the order of llm.c's file, as contiguous arrays of a dtype, padding included.

        Raises:
            llmc.Error: as tensor().
        """
        for name, tensor in self.tensors.items():
            for layer in range(len(tensor.names)):
                yield np.ascontiguousarray(self.tensor(name, layer).astype(dtype, copy=False))
                yield np.zeros((tensor.padding, *tensor.shape[1:]), dtype)

    def parameters(self) -> dict[str, NDArray[np.float32]]:
        """Read all tensors in float32, by the names and in the layouts of llmc.GPT2(...).parameters.

        Raises:
            llmc.Error: as tensor().
        """
        out = {}
        for name, tensor in self.tensors.items():
            layers = np.zeros((len(tensor.names), tensor.shape[0] + tensor.padding, *tensor.shape[1:]), np.float32)
            for layer in range(len(tensor.names)):
                layers[layer, : tensor.shape[0]] = self.tensor(name, layer)
            out[name] = layers if tensor.in_blocks else layers[0]
        return out


def open_hub_model(source: StrPath) -> HubModel:
    """Open a model; its configuration is read and checked, its tensors are not read yet.

    Args:
        source: a folder with config.json and weights, a weight file with config.json beside it, a checkpoint of nanoGPT's (ckpt.pt) or
            its folder, or a name on the Hub. What is on the disk goes before what is on the Hub.

    Raises:
        FileNotFoundError: if there is no such thing, or files are missing.
        llmc.Error: if it is damaged, or not a GPT-2 as llmc has it.
        ConnectionError: if the Hub cannot be reached.
        ImportError: if reading its files needs a package that is not installed.
    """
    path = Path(source)
    if path.is_file():
        folder, weights = path.parent, [path]
    elif path.is_dir():
        folder = path
        weights = _weight_files(folder)
    else:
        folder = download(os.fspath(source))
        weights = _weight_files(folder)
    config_file = folder / "config.json"
    readers: dict[str, Callable[[], Array]] = {}
    model_args = None
    for file in weights:
        if file.suffix == ".safetensors":
            found = _open_safetensors(file)
        else:
            found, model_args = _open_pytorch(file)
        for name, reader in found.items():
            if readers.setdefault(gpt2.bare_name(name), reader) is not reader:
                raise _llmc.Error(f"{file}: '{name}' is the second tensor {gpt2.bare_name(name)}: more than one model?")
    notes = []
    if model_args is not None:
        # Its linear layers are PyTorch's, (out, in); they may have no biases, and its GELU is the exact one.
        config = gpt2.nanogpt_config(model_args, weights[0])
        tensors = {k: replace(t, transposed=False) for k, t in gpt2.hub_tensors(config).items()}
        if not model_args.get("bias", True):
            for tensor in tensors.values():
                for name in tensor.names:
                    if name.endswith(".bias"):
                        readers.setdefault(name, partial(np.zeros, tensor.shape, np.float32))
        notes.append("nanoGPT computes GELU exactly, GPT-2 and llmc by tanh: losses differ in the fourth digit or so")
    elif config_file.is_file():
        config = gpt2.parse_config(read_object(config_file), config_file)
        tensors = gpt2.hub_tensors(config)
    else:
        raise FileNotFoundError(f"'{config_file}' is missing: it says what shape the model has")
    if others := gpt2.unknown_names(readers, tensors):
        notes.append(f"tensors that GPT-2 does not have are left out: {_listed(others)}")
    model = HubModel(folder, config, tensors, readers, tuple(notes))
    _check_tied(model)
    return model


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(f"'{name}'" for name in sorted(names)[:4]) + more


# What weights may also be stored in. Of these the last four can be read.
_OTHER_FORMATS = (".gguf", ".h5", ".msgpack", ".npz", ".onnx", ".safetensors", ".bin", ".pt", ".pth")


def _weight_files(folder: Path) -> list[Path]:
    """Find the weight files of a folder: one file, or the shards that an index names."""
    for whole in ("model.safetensors", "pytorch_model.bin", "ckpt.pt"):
        if (folder / whole).is_file():
            return [folder / whole]
        index = folder / f"{whole}.index.json"
        if index.is_file():
            names = set(read_object(index, "weight_map").values())
            for name in names:
                # A path out of the folder is not a shard of this model.
                if not isinstance(name, str) or Path(name).name != name:
                    raise _llmc.Error(f"{index}: names the shard {name!r}, expected a file of the same folder")
                if not (folder / name).is_file():
                    raise FileNotFoundError(f"{folder / name}: this shard is missing, though {index.name} names it")
            return [folder / name for name in sorted(names)]
    if (folder / "config.toml").is_file():
        raise FileNotFoundError(f"'{folder}' is a run directory of llmc's: every command takes it as it is")
    others = sorted(p.name for p in folder.iterdir() if p.suffix in _OTHER_FORMATS)
    raise FileNotFoundError(
        f"'{folder}' has no model.safetensors or pytorch_model.bin, whole or in shards, nor nanoGPT's ckpt.pt"
        + (f". It has {_listed(others)}: give a safetensors or PyTorch file of these by its path" if others else "")
    )


def _open_safetensors(path: Path) -> dict[str, Callable[[], Array]]:
    """Open a safetensors file; return a function for each tensor in it that reads the tensor."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as e:
        raise ImportError("safetensors files need a package: pip install safetensors") from e

    def reader(name: str) -> Callable[[], Array]:
        def read() -> Array:
            try:
                array: Array = file.get_tensor(name)
            except (SafetensorError, TypeError, AttributeError) as e:  # the latter two come of a dtype that NumPy lacks
                raise _llmc.Error(f"{path}: tensor '{name}' cannot be read: {e}") from e
            return array

        return read

    try:
        file: Any = safe_open(os.fspath(path), framework="np")
        return {name: reader(name) for name in file.keys()}
    except SafetensorError as e:
        raise _llmc.Error(f"{path}: not a safetensors file, or damaged: {e}") from e


def _open_pytorch(path: Path) -> tuple[dict[str, Callable[[], Array]], dict[str, Any] | None]:
    """Load a PyTorch file.

    Returns:
        A function for each tensor in it that makes the array, and nanoGPT's model_args, if the file is one of its checkpoints.
    """
    if content_of(path) == "a model":
        raise ValueError(f"{path}: a model file of llm.c's already: every command takes it as it is")
    if not is_pytorch_file(path):
        raise _llmc.Error(
            f"{path}: no model: neither llm.c's (.bin) nor a safetensors file (by their names), nor one that PyTorch wrote; or damaged"
        )
    try:
        import torch
    except ImportError as e:
        raise ImportError(
            f"{path} is a PyTorch file, which needs a package: pip install torch; or take the model's safetensors"
        ) from e

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as e:  # torch documents none; a damaged file raises a dozen kinds
        raise _llmc.Error(
            f"{path}: not a PyTorch checkpoint of plain tensors, or damaged: {str(e).splitlines()[0]}. {_CONVERT}"
        ) from e
    model_args = loaded.get("model_args") if isinstance(loaded, dict) else None
    state = loaded
    while isinstance(state, dict) and (inner := [state[k] for k in _STATE_KEYS if isinstance(state.get(k), dict)]):
        state = inner[0]
    if not isinstance(state, dict):
        raise _llmc.Error(f"{path}: holds a {type(state).__name__}, expected a dictionary of tensors")

    def reader(tensor: torch.Tensor) -> Callable[[], Array]:
        return lambda: tensor.detach().float().numpy() if tensor.is_floating_point() else tensor.numpy()

    readers = {str(name): reader(t) for name, t in state.items() if isinstance(t, torch.Tensor)}
    return readers, model_args if isinstance(model_args, dict) else None


def _check_tied(model: HubModel) -> None:
    head = model.readers.get(gpt2.TIED_HEAD)
    if head is not None and not np.array_equal(head(), model.tensor("wte"), equal_nan=True):
        raise _llmc.Error(f"{model.folder}: {gpt2.TIED_HEAD} is not wte.weight: llmc's GPT-2 ties the two")


def download(name: str) -> Path:
    """Download a model with its tokenizer from the Hub, unless Hugging Face's cache has it.

    Args:
        name: a name on the Hub, as "gpt2" or "owner/model".

    Returns:
        The folder in Hugging Face's cache.

    Raises:
        FileNotFoundError: if this cannot be a name on the Hub, or there is no GPT-2 under it.
        ConnectionError: if it cannot be downloaded.
        ImportError: if the package huggingface_hub is not installed.
    """
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.endswith((".bin", ".safetensors")):
        raise FileNotFoundError(
            f"there is no folder or file '{name}', and it is no name on the Hugging Face Hub either"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as e:
        raise ImportError(
            f"there is no folder '{name}'; to look for it on the Hugging Face Hub: pip install huggingface_hub safetensors"
        ) from e
    small = ["config.json", *TOKENIZER_FILES]
    try:
        for weights in ("model*.safetensors*", "pytorch_model*.bin*"):
            folder = Path(snapshot_download(name, allow_patterns=[*small, weights]))
            if any(folder.glob(weights)):
                return folder
    except (OSError, ValueError) as e:  # requests' and huggingface_hub's errors are subclasses of these
        raise ConnectionError(
            f"there is no folder '{name}' here, and it could not be had from the Hugging Face Hub: {type(e).__name__}: "
            f"{str(e).splitlines()[0] if str(e) else e!r}. Offline, download the model's folder elsewhere and give its path"
        ) from e
    raise FileNotFoundError(f"'{name}' on the Hugging Face Hub has no GPT-2 weights (safetensors or PyTorch)")


# ---- importing ----


def import_model(
    source: StrPath, out: StrPath, *, dtype: str = "f32", warn: Callable[[str], None] = warnings.warn
) -> HubModel:
    """Write a model as llm.c's file, and its tokenizer, if it has one, beside that file.

    Args:
        source: as of open_hub_model.
        out: the file to write. Its folder is made if it is missing.
        dtype: "f32" or "bf16", that of the file.
        warn: called with what the user should know: why no tokenizer came along, or how the model differs from its files.

    Returns:
        The model that was read.

    Raises:
        ValueError: if the dtype is unknown, or another model's tokenizer is where this one's belongs.
        IsADirectoryError: if out is a folder.
        FileNotFoundError, llmc.Error, ConnectionError, ImportError: as open_hub_model and read_tokenizer. Nothing is written then.
    """
    dtype, named_as_folder, out = canonical_dtype(dtype), os.fspath(out).endswith(("/", os.sep)), Path(out)
    if named_as_folder or out.is_dir():
        raise IsADirectoryError(f"'{out}' is a folder: give the file to write, as '{out / 'model.bin'}'")
    model = open_hub_model(source)
    for note in model.notes:
        warn(note)
    tokenizer = _tokenizer_of(model, warn)
    beside = Tokenizer.beside(out.parent) if tokenizer is not None else None
    if tokenizer is not None and beside is not None and beside.tokens != tokenizer.tokens:
        raise ValueError(
            f"'{out.parent}' has the tokenizer of another model: give a file in another folder, or remove that tokenizer"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_model_file(out, model.config.native(), dtype, model.pieces(VALUE_DTYPES[dtype]))
    if tokenizer is not None:
        tokenizer.save_beside_model(out.parent)
    return model


def _tokenizer_of(model: HubModel, warn: Callable[[str], None]) -> Tokenizer | None:
    """Read the model's tokenizer; if it has none that llmc can use, tell why."""
    size = model.config.vocab_size
    try:
        tokenizer = read_tokenizer(model.folder)
        if tokenizer is None:
            reason = f"{model.folder} has none"
        elif tokenizer.vocab_size > size:
            reason = f"{model.folder}: it has {tokenizer.vocab_size} tokens, the model a vocabulary of {size}"
        else:
            return tokenizer
    except ValueError as e:
        reason = str(e)
    warn(
        f"no tokenizer comes along ({reason}): give --tokenizer where one is needed, for GPT-2's vocabulary --tokenizer gpt2"
    )
    return None
