"""The shape of a GPT-2 or GPT-3 model."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property

from llmc import _llmc


@dataclass(frozen=True)
class GPT2Config:
    """The shape of a model. The defaults are GPT-2 124M.

    max_seq_len: longest context, and number of learned positions.
    vocab_size: number of tokens. wte has padded_vocab_size rows; the ones past vocab_size stay zero, are never sampled and
        never learned.
    num_layers, num_heads, channels: channels must be divisible by num_heads.
    """

    max_seq_len: int = 1024
    vocab_size: int = 50257
    num_layers: int = 12
    num_heads: int = 12
    channels: int = 768
    padded_vocab_size: int = 0

    def __post_init__(self) -> None:
        if self.padded_vocab_size == 0:
            object.__setattr__(self, "padded_vocab_size", (self.vocab_size + 127) // 128 * 128)
        self.native()  # validates

    @staticmethod
    def from_descriptor(descriptor: str, **changes: int) -> GPT2Config:
        """Make the shape that a descriptor of llm.c names.

        Args:
            descriptor: 'd6' to 'd84' by depth ('d12' is GPT-2 124M), or 'gpt3:c384' to 'gpt3:c12288' by channels.
            changes: fields to replace, as in from_descriptor("d6", vocab_size=257).

        Raises:
            ValueError: if the descriptor is unknown, or the shape is impossible.
        """
        values = _fields(_llmc.config_from_descriptor(descriptor))
        if "vocab_size" in changes:
            values["padded_vocab_size"] = 0
        return GPT2Config(**{**values, **changes})

    @staticmethod
    def from_native(config: _llmc.GPT2Config) -> GPT2Config:
        """Make it from the extension's type."""
        return GPT2Config(**_fields(config))

    def native(self) -> _llmc.GPT2Config:
        """Return it as the extension's type, which has checked it."""
        return _llmc.GPT2Config(**_fields(self))

    @property
    def head_size(self) -> int:
        """Channels of an attention head."""
        return self.channels // self.num_heads

    @cached_property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor by llm.c's name, in file order, with a leading L if every layer has one."""
        return {spec.name: spec.shape for spec in _llmc.parameter_table(self.native())}

    @cached_property
    def num_parameters(self) -> int:
        """The number of elements of all tensors, the padding of wte included, as llm.c counts."""
        return sum(math.prod(shape) for shape in self.parameter_shapes.values())

    def flops_per_token(self, T: int) -> int:
        """Return the operations of one training step per token of a context of T.

        It is llm.c's account, 6 N + 6 L C T, in which attention counts half because it is causal.
        """
        return 6 * self.num_parameters + 6 * self.num_layers * self.channels * T


_FIELDS = tuple(f.name for f in fields(GPT2Config))


def _fields(config: object) -> dict[str, int]:
    return {name: getattr(config, name) for name in _FIELDS}
