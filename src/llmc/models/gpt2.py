"""GPT2: the family of GPT-2 and GPT-3."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from llmc import _llmc
from llmc.models.config import GPT2Config
from llmc.models.model import Model


class GPT2(Model):
    """GPT-2 / GPT-3 (Radford et al. 2019; Brown et al. 2020, dense attention) with tied embeddings.

    A training step::

        model.zero_grad()
        model.forward(inputs)            # (B, T) int32
        model.backward(targets)          # (B, T) int32; gradients add up over calls
        optimizer.step(lr)
        print(model.mean_loss)

    Args:
        config: the model's shape.
        device: "cpu", "cuda" or "cuda:N".
        dtype: "f32" or "bf16", of parameters and activations; all sums are f32 either way.
        grad_dtype: of the parameters' gradients; by default "f32" on a GPU, else dtype. "f32" with dtype "bf16" adds micro-batches
            up without rounding.
        recompute: what backward computes again instead of keeping: 0 nothing, 1 GELU, 2 GELU and layernorm.
        classifier_rows: rows of logits that exist at a time; by default 1,024, on a GPU up to 16,384 as its free memory allows.
        threads: CPU threads; 0 for as many as the process may use.
        seed: of the random weights (numerically PyTorch's for the same seed), 0 to 2^32 - 1; None leaves them zero.
        backend: an existing llmc.Backend to live on, in place of device and threads.

    Raises:
        ValueError: if a dtype is unknown, or a number is out of range.
        llmc.Error: if the device is not there, or has no memory for the parameters.
    """

    family: ClassVar[str] = "GPT-2"
    config: GPT2Config
    _native: _llmc.GPT2

    def __init__(
        self,
        config: GPT2Config,
        *,
        device: str = "cpu",
        dtype: str = "f32",
        grad_dtype: str | None = None,
        recompute: int = 1,
        classifier_rows: int | None = None,
        threads: int = 0,
        seed: int | None = 42,
        backend: _llmc.Backend | None = None,
    ) -> None:
        super().__init__(
            config,
            _llmc.GPT2,
            device=device,
            dtype=dtype,
            grad_dtype=grad_dtype,
            recompute=recompute,
            classifier_rows=classifier_rows,
            threads=threads,
            seed=seed,
            backend=backend,
        )

    @classmethod
    def from_descriptor(cls, descriptor: str, **options: Any) -> GPT2:
        """Make a model with random weights from a descriptor such as 'd12' or 'gpt3:c768'.

        Args:
            descriptor: as of GPT2Config.from_descriptor.
            options: as of GPT2.
        """
        return cls(GPT2Config.from_descriptor(descriptor), **options)

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike[str], *, dtype: str | None = None, **options: Any) -> GPT2:
        """Load a model from llm.c's file (version 3 f32 or 5 bf16).

        Args:
            path: the file.
            dtype: "f32" or "bf16", to which the weights are converted; by default the file's.
            options: as of GPT2.

        Raises:
            llmc.Error: if the file cannot be read, is not a model file, or is damaged.
        """
        config, file_dtype, _ = _llmc.inspect_checkpoint(path)
        model = cls(GPT2Config.from_native(config), dtype=dtype or file_dtype, seed=None, **options)
        model._native.load_checkpoint(path)
        return model


def sines(positions: int, channels: int, rms: float = 0.05) -> NDArray[np.float32]:
    """Return embeddings of positions that say from the first step on which are near each other: the Transformer's (Vaswani et al. 2017).

    The sines of geometrically falling frequencies, from 1 to a quarter of a period over all positions, then their cosines.

    Args:
        positions, channels: the shape; an odd last channel is 0.
        rms: the root of the mean square of the values.
    """
    frequencies = np.geomspace(1.0, 0.5 * np.pi / positions, max(channels // 2, 1))[: channels // 2]
    angles = np.arange(positions)[:, None] * frequencies
    table = np.zeros((positions, channels), np.float32)
    table[:, : 2 * len(frequencies)] = rms * np.sqrt(2) * np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return table
