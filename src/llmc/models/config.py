"""The shape of a model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from llmc import _llmc
from llmc.values import check_whole


@dataclass(frozen=True)
class ModelConfig(ABC):
    """The shape of a model of any family: the numbers that each family has.

    Attributes:
        max_seq_len: the longest context.
        vocab_size: V, the number of tokens.
        num_layers: L.
        num_heads: NH.
        channels: C.
        padded_vocab_size: Vp, the number of logits. Those from vocab_size on are never sampled and never learned.
    """

    max_seq_len: int
    vocab_size: int
    num_layers: int
    num_heads: int
    channels: int
    padded_vocab_size: int

    @abstractmethod
    def native(self) -> Any:
        """Return the shape in the extension's type of the family.

        Raises:
            ValueError: if a number is out of range.
        """

    @property
    def head_size(self) -> int:
        """HS, the channels of one head."""
        return self.channels // self.num_heads

    @cached_property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor by llm.c's name, in file order, with a leading L if every layer has one."""
        return {spec.name: spec.shape for spec in _llmc.parameter_table(self.native())}

    @cached_property
    def num_parameters(self) -> int:
        """Number of elements of all tensors, padding included, as llm.c counts."""
        return sum(math.prod(shape) for shape in self.parameter_shapes.values())

    def flops_per_token(self, T: int) -> int:
        """Return the FLOP per token of a training step with rows of T tokens: 6 N + 6 L C T.

        This is llm.c's count. It takes half of a full attention, because that is causal.
        """
        return 6 * self.num_parameters + 6 * self.num_layers * self.channels * T


@dataclass(frozen=True)
class GPT2Config(ModelConfig):
    """The shape of a GPT-2 or GPT-3. The defaults are GPT-2 124M.

    Attributes:
        max_seq_len: the longest context, and the number of learned positions.
        vocab_size: V, the number of tokens.
        num_layers: L.
        num_heads: NH.
        channels: C, a multiple of num_heads.
        padded_vocab_size: Vp, the number of rows of wte. Those from vocab_size on stay zero, are never sampled and never learned. 0
            becomes the next multiple of 128.

    Raises:
        TypeError: if a number is no whole number.
        ValueError: if a number is out of range.
    """

    max_seq_len: int = 1024
    vocab_size: int = 50257
    num_layers: int = 12
    num_heads: int = 12
    channels: int = 768
    padded_vocab_size: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_whole(name, value, -(2**63), 2**63 - 1)
        if self.padded_vocab_size == 0:
            object.__setattr__(self, "padded_vocab_size", (self.vocab_size + 127) // 128 * 128)
        self.native()  # checks the numbers

    @staticmethod
    def from_descriptor(descriptor: str, **changes: int) -> GPT2Config:
        """Return the shape that one of llm.c's descriptors names.

        Args:
            descriptor: 'd12' or 'gpt2:d12' for GPT-2 of so many layers: d6, d12, d24, d36, d48, d60, d72 and d84 are llm.c's (d12 is
                GPT-2 124M), any other number N of layers has 64 N channels in N heads. 'gpt3:c384' .. 'gpt3:c12288' for GPT-3 of so
                many channels.
            changes: fields that replace the descriptor's: from_descriptor("d6", vocab_size=257).

        Raises:
            ValueError: if the descriptor is unknown, or a number is out of range.
        """
        values = _fields(_llmc.config_from_descriptor(descriptor))
        if "vocab_size" in changes:
            values["padded_vocab_size"] = 0
        return GPT2Config(**{**values, **changes})

    @staticmethod
    def from_native(config: _llmc.GPT2Config) -> GPT2Config:
        """Return the same shape as the extension's type holds.

        Raises:
            llmc.Error: if it is the shape of another family.
        """
        if not isinstance(config, _llmc.GPT2Config):
            raise _llmc.Error(f"the model's shape is a {type(config).__name__}, expected a GPT2Config")
        return GPT2Config(**_fields(config))

    def native(self) -> _llmc.GPT2Config:
        """Return the shape in the extension's type.

        Raises:
            ValueError: if a number is out of range.
        """
        return _llmc.GPT2Config(**_fields(self))


_FIELDS = tuple(f.name for f in fields(GPT2Config))


def _fields(config: object) -> dict[str, int]:
    return {name: getattr(config, name) for name in _FIELDS}
