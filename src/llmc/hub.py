"""Hugging Face's GPT-2: safetensors and PyTorch checkpoints in, safetensors with config and tokenizer out.

The only module that knows their names. Their matrices are (in, out), ours (out, in); their vocabulary is not padded. Tensors go
through one at a time, so that a model larger than memory can be converted.

No pickle runs code here: PyTorch files are read with weights_only.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from llmc import _llmc
from llmc.checkpoint import newest_model
from llmc.data.tokenizer import EOT, JsonTokenizer, Tokenizer
from llmc.models.config import GPT2Config
from llmc.models.gpt2 import GPT2
from llmc.system.fs import StrPath, write_atomically
from llmc.values import canonical_dtype

Array = NDArray[Any]

HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # OpenAI's four

# llm.c's name, theirs, whether theirs is transposed; those of a block within transformer.h.<layer>.
_WHOLE = {"wte": "wte.weight", "wpe": "wpe.weight", "lnfw": "ln_f.weight", "lnfb": "ln_f.bias"}
_BLOCK = {
    "ln1w": ("ln_1.weight", False),
    "ln1b": ("ln_1.bias", False),
    "qkvw": ("attn.c_attn.weight", True),
    "qkvb": ("attn.c_attn.bias", False),
    "attprojw": ("attn.c_proj.weight", True),
    "attprojb": ("attn.c_proj.bias", False),
    "ln2w": ("ln_2.weight", False),
    "ln2b": ("ln_2.bias", False),
    "fcw": ("mlp.c_fc.weight", True),
    "fcb": ("mlp.c_fc.bias", False),
    "fcprojw": ("mlp.c_proj.weight", True),
    "fcprojb": ("mlp.c_proj.bias", False),
}
_ORDER = ("wte", "wpe", *_BLOCK, "lnfw", "lnfb")
_PREFIX = "transformer."
_NUMPY = {"f32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16)}


def _shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Of each tensor in llm.c's layout, without the layers and the padding."""
    shapes = {}
    for spec in _llmc.parameter_table(config.native()):
        rows, *rest = spec.shape[1:] if spec.per_layer else spec.shape
        shapes[spec.name] = (rows - spec.padding, *rest)
    return shapes


# ---- reading ----


@dataclass(frozen=True)
class HubModel:
    """A Hugging Face GPT-2 on the disk: its configuration, and where each tensor is.

    readers: for each of their names, a function that reads the tensor.
    """

    folder: Path
    config: GPT2Config
    readers: Mapping[str, Callable[[], Array]]

    def tensor(self, name: str, layer: int | None = None) -> Array:
        """By llm.c's name and in its layout, of one layer where there are several. llmc.Error where it is missing or misshapen."""
        if name in _WHOLE:
            theirs, transposed = _WHOLE[name], False
        else:
            theirs, transposed = _BLOCK[name]
            theirs = f"h.{layer}.{theirs}"
        reader = self.readers.get(theirs) or self.readers.get(_PREFIX + theirs)
        if reader is None:
            raise _llmc.Error(f"{self.folder}: there is no tensor '{theirs}': not a GPT-2, or not whole")
        array = reader()
        shape = _shapes(self.config)[name]
        expected = shape[::-1] if transposed else shape
        if array.shape != expected:
            raise _llmc.Error(f"{self.folder}: tensor '{theirs}' is {array.shape}, config.json makes it {expected}")
        if array.dtype not in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16):
            raise _llmc.Error(f"{self.folder}: tensor '{theirs}' is {array.dtype}, expected floating point")
        return array.T if transposed else array

    def pieces(self, dtype: np.dtype[Any]) -> Iterator[Array]:
        """All tensors in llm.c's order as contiguous arrays, wte padded with zeros."""
        config = self.config
        for name in _ORDER:
            for layer in range(config.num_layers) if name in _BLOCK else [None]:
                yield np.ascontiguousarray(self.tensor(name, layer).astype(dtype, copy=False))
            if name == "wte":
                yield np.zeros((config.padded_vocab_size - config.vocab_size, config.channels), dtype)

    def parameters(self) -> dict[str, NDArray[np.float32]]:
        """All tensors in f32 by llm.c's names, as of llmc.GPT2(...).parameters."""
        out = {}
        for name in _ORDER:
            if name in _BLOCK:
                out[name] = np.stack([self.tensor(name, l).astype(np.float32) for l in range(self.config.num_layers)])
            else:
                out[name] = self.tensor(name).astype(np.float32)
        padding = self.config.padded_vocab_size - self.config.vocab_size
        out["wte"] = np.pad(out["wte"], ((0, padding), (0, 0)))
        return out


def open_hub_model(source: StrPath) -> HubModel:
    """A folder that has config.json and weights, a weight file with config.json beside it, or a name on the Hub.

    FileNotFoundError where there is no such thing, llmc.Error where it is damaged or no GPT-2, ConnectionError where the Hub cannot
    be reached.
    """
    path = Path(source)
    if path.is_file():
        folder, weights = path.parent, [path]
    elif path.is_dir():
        folder = path
        weights = _weight_files(folder)
    else:
        folder = _download(os.fspath(source))
        weights = _weight_files(folder)
    config = _read_config(folder / "config.json")
    readers: dict[str, Callable[[], Array]] = {}
    for file in weights:
        readers.update(_open_safetensors(file) if file.suffix == ".safetensors" else _open_pytorch(file))
    model = HubModel(folder, config, readers)
    _check_tied(model)
    return model


def _weight_files(folder: Path) -> list[Path]:
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if (folder / whole).is_file():
            return [folder / whole]
        index = folder / f"{whole}.index.json"
        if index.is_file():
            names = set(_json(index, "weight_map").values())
            for name in names:
                # A path out of the folder is not a shard of this model.
                if not isinstance(name, str) or Path(name).name != name:
                    raise _llmc.Error(f"{index}: names the shard {name!r}, expected a file of the same folder")
                if not (folder / name).is_file():
                    raise FileNotFoundError(f"{folder / name}: this shard is missing, though {index.name} names it")
            return [folder / name for name in sorted(names)]
    raise FileNotFoundError(f"'{folder}' has no model.safetensors or pytorch_model.bin, whole or in shards")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise _llmc.Error(f"{path}: damaged: {e}") from e


def _json(path: Path, key: str | None = None) -> dict[str, Any]:
    try:
        value = json.loads(_text(path))
        value = value if key is None else value[key]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise _llmc.Error(f"{path}: damaged: {type(e).__name__}: {e}") from e
    if not isinstance(value, dict):
        raise _llmc.Error(f"{path}: expected an object, found {type(value).__name__}")
    return value


def _read_config(path: Path) -> GPT2Config:
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' is missing: it says what shape the model has")
    values = _json(path)
    if values.get("model_type", "gpt2") != "gpt2":
        raise _llmc.Error(f"{path}: a model of type '{values['model_type']}', llmc has gpt2 only")
    channels = values.get("n_embd", 768)
    known: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
        ("activation_function", "gelu_new", ("gelu_new", "gelu_pytorch_tanh")),
        ("layer_norm_epsilon", 1e-5, (1e-5,)),
        ("n_inner", None, (None, 4 * channels if isinstance(channels, int) else None)),
        ("scale_attn_weights", True, (True,)),
        ("scale_attn_by_inverse_layer_idx", False, (False,)),
        ("add_cross_attention", False, (False,)),
        ("tie_word_embeddings", True, (True,)),
    )
    for key, default, possible in known:
        if values.get(key, default) not in possible:
            raise _llmc.Error(f"{path}: {key} is {values[key]!r}, llmc's GPT-2 has {possible[-1]!r}")
    sizes = {
        "max_seq_len": values.get("n_positions", 1024),
        "vocab_size": values.get("vocab_size", 50257),
        "num_layers": values.get("n_layer", 12),
        "num_heads": values.get("n_head", 12),
        "channels": channels,
    }
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise _llmc.Error(f"{path}: {name} is {value!r}, expected a positive number")
    try:
        return GPT2Config(**sizes)
    except ValueError as e:
        raise _llmc.Error(f"{path}: {e}") from e


def _open_safetensors(path: Path) -> dict[str, Callable[[], Array]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as e:
        raise ImportError("safetensors files need a package: pip install safetensors") from e

    def reader(name: str) -> Callable[[], Array]:
        def read() -> Array:
            try:
                array: Array = file.get_tensor(name)
            except (SafetensorError, TypeError, AttributeError) as e:  # the latter two: a dtype that NumPy lacks
                raise _llmc.Error(f"{path}: tensor '{name}' cannot be read: {e}") from e
            return array

        return read

    try:
        file: Any = safe_open(os.fspath(path), framework="np")
        return {name: reader(name) for name in file.keys()}
    except SafetensorError as e:
        raise _llmc.Error(f"{path}: not a safetensors file, or damaged: {e}") from e


def _open_pytorch(path: Path) -> dict[str, Callable[[], Array]]:
    try:
        import torch
    except ImportError as e:
        raise ImportError(f"{path} is a PyTorch file, which needs torch; or take the model's safetensors") from e

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as e:  # torch names no exceptions; a damaged file raises a dozen kinds
        raise _llmc.Error(
            f"{path}: not a PyTorch checkpoint of plain tensors, or damaged: {str(e).splitlines()[0]}"
        ) from e
    if not isinstance(loaded, dict):
        raise _llmc.Error(f"{path}: holds a {type(loaded).__name__}, expected a dictionary of tensors")

    def reader(tensor: torch.Tensor) -> Callable[[], Array]:
        return lambda: tensor.detach().float().numpy() if tensor.is_floating_point() else tensor.numpy()

    return {str(name): reader(t) for name, t in loaded.items() if isinstance(t, torch.Tensor)}


def _check_tied(model: HubModel) -> None:
    head = model.readers.get("lm_head.weight")
    if head is not None and not np.array_equal(head(), model.tensor("wte"), equal_nan=True):
        raise _llmc.Error(f"{model.folder}: lm_head.weight is not wte.weight: llmc's GPT-2 ties the two")


def _download(name: str) -> Path:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.endswith((".bin", ".safetensors")):
        raise FileNotFoundError(
            f"there is no folder or file '{name}', and it is no name on the Hugging Face Hub either"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as e:
        raise ImportError(
            f"there is no folder '{name}'; to look for it on the Hugging Face Hub: pip install huggingface_hub"
        ) from e
    small = ["config.json", "vocab.json", "merges.txt", "tokenizer.json"]
    try:
        for weights in ("model*.safetensors*", "pytorch_model*.bin*"):
            folder = Path(snapshot_download(name, allow_patterns=[*small, weights]))
            if any(folder.glob(weights)):
                return folder
    except (OSError, ValueError) as e:  # requests' and huggingface_hub's errors are of these
        raise ConnectionError(
            f"there is no folder '{name}' here, and it could not be had from the Hugging Face Hub: {type(e).__name__}: "
            f"{str(e).splitlines()[0] if str(e) else e!r}. Offline, download the model's folder elsewhere and give its path"
        ) from e
    raise FileNotFoundError(f"'{name}' on the Hugging Face Hub has no GPT-2 weights (safetensors or PyTorch)")


# ---- importing ----


def import_model(source: StrPath, out: StrPath, *, dtype: str = "f32") -> HubModel:
    """Writes a llm.c model file; and its tokenizer beside it where the source has one (save_tokenizer). Errors as of open_hub_model."""
    dtype = canonical_dtype(dtype)
    model = open_hub_model(source)
    header = _llmc.checkpoint_header(model.config.native(), dtype)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, _chain([header], model.pieces(_NUMPY[dtype])))
    if (tokenizer := read_tokenizer(model.folder)) is not None:
        save_tokenizer(tokenizer, Path(out).parent)
    return model


def _chain(head: list[bytes], arrays: Iterable[Array]) -> Iterator[Any]:
    yield from head
    for array in arrays:
        if array.size:
            yield array.reshape(-1).view(np.uint8)


def load_model(source: StrPath, *, dtype: str | None = None, **options: Any) -> GPT2:
    """A model from wherever it is: a llm.c file, a run directory (its newest checkpoint), or what open_hub_model reads.

    dtype: by default the file's; f32 for a Hugging Face model. options: as of GPT2.
    """
    path = Path(source)
    if path.is_dir() and (newest := newest_model(path)) is not None:
        path = newest
    elif (path / "config.toml").is_file():
        raise FileNotFoundError(f"run directory '{path}' has no finished checkpoint")
    if path.is_file() and path.suffix == ".bin" and _is_llmc(path):
        return GPT2.from_checkpoint(path, dtype=dtype, **options)
    if path.suffix == ".bin" and not path.exists():
        raise FileNotFoundError(f"there is no model file '{path}'")
    hub = open_hub_model(source)
    model = GPT2(hub.config, dtype=dtype or "f32", seed=None, **options)
    for name, array in hub.parameters().items():
        model.parameters[name] = array
    return model


def _is_llmc(path: Path) -> bool:
    """pytorch_model.bin, a zip file or a pickle, has the same suffix."""
    with open(path, "rb") as file:
        return file.read(2) not in (b"PK", b"\x80\x02")


# ---- exporting ----


def export_model(
    source: StrPath | GPT2,
    folder: StrPath,
    *,
    dtype: str | None = None,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes model.safetensors (or shards and their index), config.json, and tokenizer files where a tokenizer is given.

    source: a model, or what load_model reads. dtype: by default the model's. `transformers` loads the folder.
    """
    model = source if isinstance(source, GPT2) else load_model(source)
    form = _NUMPY[canonical_dtype(dtype or model.dtype)]
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}, expected a positive number")
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model a vocabulary of {model.config.vocab_size}: not a pair"
        )
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    for stale in (*out.glob("model*.safetensors"), out / "model.safetensors.index.json"):
        stale.unlink(missing_ok=True)  # of an earlier export, in another number of shards

    shards: list[list[_Entry]] = [[]]
    for entry in _entries(model, form):
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
        _write_json(out / "model.safetensors.index.json", index)
    for name, shard in zip(names, shards):
        write_atomically(out / name, _safetensors(shard, form))
    _write_json(out / "config.json", _config_json(model.config, form, tokenizer))
    if tokenizer is not None:
        write_tokenizer(tokenizer, out, model.config.max_seq_len)


@dataclass(frozen=True)
class _Entry:
    name: str
    shape: tuple[int, ...]
    bytes: int
    read: Callable[[], Array]


def _entries(model: GPT2, form: np.dtype[Any]) -> Iterator[_Entry]:
    """Their tensors in our order; an entry's array is made when it is read."""
    parameters, config = model.parameters, model.config

    def read(name: str, layer: int | None, transposed: bool) -> Array:
        array = parameters[name] if layer is None else parameters[name][layer]
        array = array[: config.vocab_size] if name == "wte" else array
        return np.ascontiguousarray((array.T if transposed else array).astype(form, copy=False))

    for name, shape in _shapes(config).items():
        size = math.prod(shape) * form.itemsize
        if name in _WHOLE:
            yield _Entry(_PREFIX + _WHOLE[name], shape, size, partial(read, name, None, False))
            continue
        theirs, transposed = _BLOCK[name]
        target = shape[::-1] if transposed else shape
        for l in range(config.num_layers):
            yield _Entry(f"{_PREFIX}h.{l}.{theirs}", target, size, partial(read, name, l, transposed))


def _safetensors(entries: list[_Entry], form: np.dtype[Any]) -> Iterator[Any]:
    """The format: the header's length in 8 bytes, a JSON header padded to 8, then the tensors."""
    kind = "F32" if form == np.float32 else "BF16"
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for e in entries:
        header[e.name] = {"dtype": kind, "shape": e.shape, "data_offsets": [at, at + e.bytes]}
        at += e.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for e in entries:
        yield e.read().reshape(-1).view(np.uint8)


def _config_json(config: GPT2Config, form: np.dtype[Any], tokenizer: Tokenizer | None) -> dict[str, Any]:
    eot = tokenizer.eot_token if tokenizer is not None else config.vocab_size - 1
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "n_ctx": config.max_seq_len,
        "n_embd": config.channels,
        "n_head": config.num_heads,
        "n_inner": None,
        "n_layer": config.num_layers,
        "n_positions": config.max_seq_len,
        "tie_word_embeddings": True,
        "torch_dtype": "float32" if form == np.float32 else "bfloat16",
        "vocab_size": config.vocab_size,
    }


def _write_json(path: Path, value: Any) -> None:
    write_atomically(path, [(json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()])


# ---- tokenizers ----


def _byte_letters() -> list[str]:
    """GPT-2's printable letter for each byte: itself where it is printable in Latin-1, else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def read_tokenizer(folder: StrPath) -> Tokenizer | None:
    """A Hugging Face folder's tokenizer, as llm.c's table where that can say it; None where there is none.

    From vocab.json and merges.txt, or tokenizer.json. A tokenizer.json that splits or merges in another way than GPT-2's is taken as
    it is (JsonTokenizer). llmc.Error where it is damaged, or its ids are not in the order of its merges.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file() and not _is_gpt2s(_json(folder / "tokenizer.json")):
        return Tokenizer.load(folder / "tokenizer.json")
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        path = folder / "vocab.json"
        vocab = _json(path)
        lines = _text(folder / "merges.txt").splitlines()
        merges: list[Any] = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    elif (folder / "tokenizer.json").is_file():
        path = folder / "tokenizer.json"
        whole = _json(path)
        try:
            vocab = {**whole["model"]["vocab"], **{t["content"]: t["id"] for t in whole.get("added_tokens") or []}}
            merges = [m.split(" ") if isinstance(m, str) else m for m in whole["model"]["merges"]]
        except (KeyError, TypeError, AttributeError) as e:
            raise _llmc.Error(f"{path}: not a byte-level BPE: {type(e).__name__}: {e}") from e
    else:
        return None
    if EOT not in vocab:
        raise _llmc.Error(f"{path}: has no token {EOT}")
    ids = sorted(i for i in vocab.values() if isinstance(i, int))
    if ids != list(range(len(vocab))):
        raise _llmc.Error(f"{path}: its {len(vocab)} tokens do not have the ids 0 to {len(vocab) - 1}")
    byte_of = {letter: b for b, letter in enumerate(_byte_letters())}
    tokens = [b""] * len(vocab)
    try:
        for text, i in vocab.items():
            tokens[i] = EOT.encode() if text == EOT else bytes(byte_of[letter] for letter in text)
        made = [vocab[a + b] for a, b in merges]
    except (KeyError, ValueError, TypeError) as e:
        raise _llmc.Error(f"{path}: not a byte-level BPE: {type(e).__name__}: {e}") from e
    if any(a >= b for a, b in zip(made, made[1:])):
        raise _llmc.Error(
            f"{path}: its ids are not in the order of its merges, so llm.c's tokenizer file cannot hold it"
        )
    try:
        return Tokenizer(tokens, vocab[EOT], folder.name)
    except ValueError as e:
        raise _llmc.Error(f"{path}: {e}") from e


def _is_gpt2s(whole: dict[str, Any]) -> bool:
    """Whether a tokenizer.json makes of a text what the same vocabulary and merges do in GPT-2's tokenizer."""
    model, split = whole.get("model"), whole.get("pre_tokenizer")
    if not isinstance(model, dict) or not isinstance(split, dict):
        return False
    return (
        model.get("type", "BPE") == "BPE"
        and not any(model.get(key) for key in ("dropout", "byte_fallback", "ignore_merges", "end_of_word_suffix"))
        and whole.get("normalizer") is None
        and split.get("type") == "ByteLevel"
        and not split.get("add_prefix_space", True)
        and split.get("use_regex", True)
    )


def find_tokenizer(source: StrPath) -> Tokenizer | None:
    """The tokenizer beside a model: the one that its run was trained with (Tokenizer.beside), or that of a Hugging Face folder
    (read_tokenizer); None where there is neither. source: as of load_model.
    """
    path = Path(source)
    folder = path if path.is_dir() else path.parent
    if not path.exists():
        folder = _download(os.fspath(source))
    for name in ("tokenizer.bin", "gpt2_tokenizer.bin"):
        if (folder / name).is_file():
            return Tokenizer.load(folder / name)
    if (folder / "vocab.json").is_file():
        return read_tokenizer(folder)
    return Tokenizer.beside(folder)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> Path:
    """As gpt2_tokenizer.bin, tokenizer.bin for another vocabulary than GPT-2's, or tokenizer.json where it is one; which it was."""
    path = folder / tokenizer.file_name
    if path.name == "tokenizer.bin" and tokenizer.vocab_size == 50257:
        path = folder / "gpt2_tokenizer.bin"
    tokenizer.save(path)
    return path


def tokenizer_for(source: StrPath, vocab_size: int, spec: str | None = None) -> Tokenizer:
    """The tokenizer of a model: the one that spec means (Tokenizer.from_spec), else the one beside it, else GPT-2's where the
    vocabulary is GPT-2's. ValueError where there is none, or it has more tokens than the model.
    """
    tokenizer = find_tokenizer(source) if spec is None else Tokenizer.from_spec(spec)
    if tokenizer is None and vocab_size == 50257:
        tokenizer = Tokenizer.gpt2()
    if tokenizer is None:
        raise ValueError(f"there is no tokenizer beside '{source}': give one")
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, the model's vocabulary {vocab_size}"
        )
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: StrPath, max_seq_len: int) -> None:
    """tokenizer_config.json, and vocab.json and merges.txt or the tokenizer.json that it came from, as `transformers` reads them."""
    folder = Path(folder)
    for stale in ("vocab.json", "merges.txt", "tokenizer.json"):
        (folder / stale).unlink(missing_ok=True)  # of an earlier export, with another tokenizer
    is_json = isinstance(tokenizer, JsonTokenizer)
    eot = tokenizer.tokens[tokenizer.eot_token].decode()
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast" if is_json else "GPT2Tokenizer",
        "model_max_length": max_seq_len,
        "add_prefix_space": False,
        **{f"{role}_token": eot for role in ("bos", "eos", "unk")},
    }
    _write_json(folder / "tokenizer_config.json", config)
    if is_json:
        tokenizer.save(folder / tokenizer.file_name)
        return
    letters = _byte_letters()

    def spelled(token: bytes) -> str:
        return "".join(letters[b] for b in token)

    names = [EOT if i == tokenizer.eot_token else spelled(token) for i, token in enumerate(tokenizer.tokens)]
    _write_json(folder / "vocab.json", {name: i for i, name in enumerate(names)})
    ranks = {token: i for i, token in enumerate(tokenizer.tokens) if i != tokenizer.eot_token}
    merges = [
        f"{spelled(a)} {spelled(b)}"
        for token, i in ranks.items()
        if len(token) > 1
        for a, b in [_parts(token, i, ranks)]
    ]
    write_atomically(folder / "merges.txt", [("#version: 0.2\n" + "".join(m + "\n" for m in merges)).encode()])


def _parts(token: bytes, rank: int, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens of which this one was merged: what the merges before it make of its bytes."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        best, at = min((ranks.get(a + b, rank), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
        if best >= rank:
            raise ValueError(f"token {rank} ({token!r}) is not a merge of two earlier ones")
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]
