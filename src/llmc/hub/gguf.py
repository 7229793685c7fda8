"""Models written as a GGUF file, which llama.cpp and the programs built on it run.

The package gguf makes the file's head: metadata, tokenizer, and the table of tensors. These follow it here, one at a time: a model
larger than memory can be exported.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmc.data.roles import EOT
from llmc.data.tokenizer import Tokenizer
from llmc.hub import gpt2
from llmc.hub.tokenizer import gpt2_vocabulary, role_ids
from llmc.hub.writing import exportable
from llmc.models.gpt2 import GPT2
from llmc.models.model import Model
from llmc.system.fs import StrPath, write_atomically
from llmc.values import VALUE_DTYPES, canonical_dtype

# For llm.c's name of a tensor its name in llama.cpp's GPT-2, in which {l} is the number of the block. Matrices are (out, in) in both.
# There is no output.weight: llama.cpp takes token_embd.weight for it then.
_NAMES = {
    "wte": "token_embd.weight",
    "wpe": "position_embd.weight",
    "ln1w": "blk.{l}.attn_norm.weight",
    "ln1b": "blk.{l}.attn_norm.bias",
    "qkvw": "blk.{l}.attn_qkv.weight",
    "qkvb": "blk.{l}.attn_qkv.bias",
    "attprojw": "blk.{l}.attn_output.weight",
    "attprojb": "blk.{l}.attn_output.bias",
    "ln2w": "blk.{l}.ffn_norm.weight",
    "ln2b": "blk.{l}.ffn_norm.bias",
    "fcw": "blk.{l}.ffn_up.weight",
    "fcb": "blk.{l}.ffn_up.bias",
    "fcprojw": "blk.{l}.ffn_down.weight",
    "fcprojb": "blk.{l}.ffn_down.bias",
    "lnfw": "output_norm.weight",
    "lnfb": "output_norm.bias",
}


def export_gguf(model: Model, path: StrPath, tokenizer: Tokenizer, *, dtype: str | None = None) -> None:
    """Write a model and its tokenizer as a GGUF file, which appears whole or not at all.

    Args:
        model: the model.
        path: the file to write. Its folder is made if it is missing.
        tokenizer: the tokenizer, without which llama.cpp runs no model.
        dtype: "f32" or "bf16", that of the matrices and the token embedding; None for the model's. The others are always f32, because
            llama.cpp wants them so; no bit of a bf16 model is lost.

    Raises:
        ValueError: if the model is not a GPT-2, the dtype is unknown, the tokenizer has more tokens than the model, or GGUF cannot
            express it because its rules are not GPT-2's.
        IsADirectoryError: if path is a folder.
        ImportError: if the package gguf is not installed.
        OSError: if the file cannot be written.
    """
    model, path = exportable(model, tokenizer), Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"'{path}' is a folder: give the file to write, as '{path / 'model.gguf'}'")
    dtype = canonical_dtype(dtype or model.dtype)
    tensors = list(_tensors(model, dtype))
    head, alignment = _head(model, dtype, tokenizer, tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, _pieces(head, tensors, alignment))


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file, (out, in) or (n,).

    Attributes:
        array: the model's parameter, of which read() makes a copy in dtype.
    """

    name: str
    array: NDArray[Any]
    dtype: np.dtype[Any]

    @property
    def bytes(self) -> int:
        """The size of its data, without the padding after it."""
        return self.array.size * self.dtype.itemsize

    def read(self) -> NDArray[np.uint8]:
        """Return its data."""
        return np.ascontiguousarray(self.array.astype(self.dtype, copy=False)).reshape(-1).view(np.uint8)


def _tensors(model: GPT2, dtype: str) -> Iterator[_Tensor]:
    parameters = model.parameters
    for name, tensor in gpt2.hub_tensors(model.config).items():
        # llama.cpp adds vectors and positions to activations of f32, and has no such sum of two dtypes.
        kept = VALUE_DTYPES["f32" if len(tensor.shape) == 1 or name == "wpe" else dtype]
        layers = parameters[name] if tensor.in_blocks else parameters[name][None]
        for l, array in enumerate(layers):
            yield _Tensor(_NAMES[name].format(l=l), array[: tensor.shape[0]], kept)  # without the padding


def _head(model: GPT2, dtype: str, tokenizer: Tokenizer, tensors: list[_Tensor]) -> tuple[bytes, int]:
    """Make what comes before the tensors; return it, and the number of which their offsets must be multiples."""
    try:
        from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
    except ImportError as e:
        raise ImportError("a GGUF file needs a package: pip install gguf") from e
    types = {"f32": GGMLQuantizationType.F32, "bf16": GGMLQuantizationType.BF16}
    type_of = {VALUE_DTYPES[name]: kind for name, kind in types.items()}
    config = model.config
    with tempfile.TemporaryDirectory() as folder:
        writer = GGUFWriter(Path(folder) / "head.gguf", "gpt2")
        writer.add_block_count(config.num_layers)
        writer.add_context_length(config.max_seq_len)
        writer.add_embedding_length(config.channels)
        writer.add_feed_forward_length(4 * config.channels)
        writer.add_head_count(config.num_heads)
        writer.add_layer_norm_eps(1e-5)
        writer.add_file_type({"f32": LlamaFileType.ALL_F32, "bf16": LlamaFileType.MOSTLY_BF16}[dtype])
        writer.add_vocab_size(config.vocab_size)
        _add_tokenizer(writer, tokenizer, config.vocab_size)
        for t in tensors:
            writer.add_tensor_info(t.name, t.array.shape, t.dtype, t.bytes, raw_dtype=type_of[t.dtype])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return (Path(folder) / "head.gguf").read_bytes(), writer.data_alignment


def _add_tokenizer(writer: Any, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Add a tokenizer's metadata. writer: a GGUFWriter; vocab_size: the model's, which may have ids without a token."""
    from gguf import TokenType

    try:
        vocabulary = gpt2_vocabulary(tokenizer)
    except ValueError as e:
        raise ValueError(
            f"{e}, so GGUF cannot hold it. Export a folder, and try llama.cpp's convert_hf_to_gguf.py, which knows some more"
        ) from e
    names = {i: name for name, i in vocabulary.ids.items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([names.get(i, f"[PAD{i}]") for i in range(vocab_size)])

    def type_of(i: int) -> TokenType:
        if i in vocabulary.special:
            return TokenType.CONTROL
        if i in vocabulary.added:
            return TokenType.USER_DEFINED
        return TokenType.NORMAL if i in names else TokenType.UNUSED

    writer.add_token_types([type_of(i) for i in range(vocab_size)])
    # llama.cpp wants merges, and bytes have none. What stands for them then is a pair that no text has.
    writer.add_token_merges([f"{a} {b}" for a, b in vocabulary.merges or [(EOT, EOT)]])
    roles = role_ids(tokenizer)
    for role, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
        ("sep", writer.add_sep_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        if role in roles:
            add(roles[role])
    writer.add_add_bos_token(False)  # a prompt has no end-of-text token before it, as in `llmc generate`


def _pieces(head: bytes, tensors: list[_Tensor], alignment: int) -> Iterator[Any]:
    yield head
    yield bytes(-len(head) % alignment)
    for t in tensors:
        yield t.read()
        yield bytes(-t.bytes % alignment)
