"""GPT-2 on the Hugging Face Hub: the names and layouts of its tensors, and its config.json.

The Hub's matrices are (in, out), those of llm.c (out, in); the Hub's vocabulary has no padding.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc import _llmc
from llmc.models.config import GPT2Config

PREFIX = "transformer."  # of all tensors of a model with a head; OpenAI's files on the Hub are without
# Modules that hold a model as a whole or a part of it, and whose names come into those of its tensors: transformers' and nanoGPT's
# "transformer" and "model", torch.compile, DataParallel and DDP, FSDP, DeepSpeed. No tensor of GPT-2 has such a part in its own name.
_WRAPPERS = frozenset(
    (
        "transformer",
        "model",
        "_orig_mod",
        "module",
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
        "_forward_module",
    )
)
# The causal mask, which old versions of transformers and of nanoGPT saved.
_MASK = re.compile(r"h\.\d+\.attn\.(masked_)?bias")
TIED_HEAD = "lm_head.weight"  # some files have it; it must be equal to wte

# For llm.c's name of a tensor its name on the Hub, in which {l} is the number of the block, and whether the Hub has it transposed.
_TENSORS = {
    "wte": ("wte.weight", False),
    "wpe": ("wpe.weight", False),
    "ln1w": ("h.{l}.ln_1.weight", False),
    "ln1b": ("h.{l}.ln_1.bias", False),
    "qkvw": ("h.{l}.attn.c_attn.weight", True),
    "qkvb": ("h.{l}.attn.c_attn.bias", False),
    "attprojw": ("h.{l}.attn.c_proj.weight", True),
    "attprojb": ("h.{l}.attn.c_proj.bias", False),
    "ln2w": ("h.{l}.ln_2.weight", False),
    "ln2b": ("h.{l}.ln_2.bias", False),
    "fcw": ("h.{l}.mlp.c_fc.weight", True),
    "fcb": ("h.{l}.mlp.c_fc.bias", False),
    "fcprojw": ("h.{l}.mlp.c_proj.weight", True),
    "fcprojb": ("h.{l}.mlp.c_proj.bias", False),
    "lnfw": ("ln_f.weight", False),
    "lnfb": ("ln_f.bias", False),
}


@dataclass(frozen=True)
class HubTensor:
    """How the Hub stores one of llm.c's tensors.

    Attributes:
        names: its names on the Hub, without PREFIX: one for each block, or a single one for a tensor outside of the blocks.
        in_blocks: whether every block has one, so that llm.c's tensor has a leading axis of blocks.
        shape: the shape of one block's tensor in llm.c's layout, without padding.
        padding: number of rows of zeros that follow in llm.c's tensor.
        transposed: whether the Hub stores the matrix as (in, out).
    """

    names: list[str]
    in_blocks: bool
    shape: tuple[int, ...]
    padding: int
    transposed: bool

    @property
    def hub_shape(self) -> tuple[int, ...]:
        """The shape of each of the Hub's tensors."""
        return self.shape[::-1] if self.transposed else self.shape


def hub_tensors(config: GPT2Config) -> dict[str, HubTensor]:
    """Return how the Hub stores each tensor, by llm.c's names and in the order of llm.c's file."""
    tensors = {}
    for spec in _llmc.parameter_table(config.native()):
        hub_name, transposed = _TENSORS[spec.name]
        rows, *columns = spec.shape[1:] if spec.per_layer else spec.shape
        names = [hub_name.format(l=l) for l in range(config.num_layers if spec.per_layer else 1)]
        tensors[spec.name] = HubTensor(names, spec.per_layer, (rows - spec.padding, *columns), spec.padding, transposed)
    return tensors


def bare_name(name: str) -> str:
    """Return the name of a tensor without those of the modules around it, wherever they stand and however often."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def unknown_names(names: Iterable[str], tensors: Mapping[str, HubTensor]) -> list[str]:
    """Return those of some bare names that no tensor of the model has."""
    known = {TIED_HEAD, *(name for tensor in tensors.values() for name in tensor.names)}
    return [name for name in names if name not in known and not _MASK.fullmatch(name)]


def nanogpt_config(model_args: Mapping[str, Any], path: Path) -> GPT2Config:
    """Return the model's shape that a checkpoint of nanoGPT names.

    Args:
        model_args: what the checkpoint has under this name.
        path: the file, for error messages.

    Raises:
        llmc.Error: if a size is missing, or out of range.
    """
    sizes = {
        "n_positions": "block_size",
        "vocab_size": "vocab_size",
        "n_layer": "n_layer",
        "n_head": "n_head",
        "n_embd": "n_embd",
    }
    return parse_config({name: model_args.get(theirs) for name, theirs in sizes.items()}, path)


def parse_config(values: dict[str, Any], path: Path) -> GPT2Config:
    """Check what a config.json says, and return the model's shape.

    Args:
        values: the file's fields; a missing one has transformers' default.
        path: the file, for error messages.

    Raises:
        llmc.Error: if it is not a GPT-2 as llmc has it, or a value is out of range.
    """
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


def config_values(config: GPT2Config, dtype: str, roles: Mapping[str, int]) -> dict[str, Any]:
    """Return the fields of config.json for a model.

    Args:
        config: the model's shape.
        dtype: "f32" or "bf16", that of the tensors beside it.
        roles: ids of special tokens; those of "bos", "eos" and "pad" are written.
    """
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        **{f"{role}_token_id": roles[role] for role in ("bos", "eos", "pad") if role in roles},
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "n_ctx": config.max_seq_len,
        "n_embd": config.channels,
        "n_head": config.num_heads,
        "n_inner": None,
        "n_layer": config.num_layers,
        "n_positions": config.max_seq_len,
        "tie_word_embeddings": True,
        "torch_dtype": {"f32": "float32", "bf16": "bfloat16"}[dtype],
        "vocab_size": config.vocab_size,
    }
