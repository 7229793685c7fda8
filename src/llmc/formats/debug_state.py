"""llm.c's debug state: a batch, and what the reference made of it.

After the header: inputs and targets (B*T int32 each), logits (B*T*V f32, without the padding), the loss (f32), then the gradients of
the 16 parameters in file order (f32, wte padded), and at last the losses of the first steps of training on this batch (f32; see
LOSS_RECIPE). llm.c writes no losses there and its header says 0; it reads llmc's files as its own.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llmc import _llmc
from llmc.system.fs import StrPath, write_atomically

Floats = NDArray[np.float32]

_MAGIC, _VERSION = 20240327, 2
_HEADER = struct.Struct("<5i 1004x")  # magic, version, B, T, number of losses

# How the losses come about: AdamW as in llm.c's test_gpt2.cu and train_gpt2.py, one batch over and over.
LOSS_RECIPE = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0, "grad_clip": 1.0}


@dataclass(frozen=True)
class DebugState:
    """A batch, and what a model makes of it.

    Attributes:
        inputs, targets: (B, T) token ids.
        logits: (B, T, vocab_size).
        loss: the mean over the batch.
        gradients: of all parameters, by llm.c's names and in the order of the file.
        losses: before each of the first steps of training on the batch; may be empty.
    """

    inputs: NDArray[np.int32]
    targets: NDArray[np.int32]
    logits: Floats
    loss: float
    gradients: Mapping[str, Floats]
    losses: list[float] = field(default_factory=list)


class ModelShape(Protocol):
    """What the file depends on of a model's GPT2Config."""

    @property
    def max_seq_len(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def num_parameters(self) -> int: ...
    @property
    def parameter_shapes(self) -> Mapping[str, tuple[int, ...]]: ...


def write_debug_state(path: StrPath, state: DebugState) -> None:
    """Write a debug state; the file appears whole or not at all."""
    B, T = state.inputs.shape
    header = _HEADER.pack(_MAGIC, _VERSION, B, T, len(state.losses))
    arrays = [state.inputs.astype("<i4"), state.targets.astype("<i4"), state.logits, np.float32(state.loss)]
    arrays += [state.gradients[name] for name in state.gradients]
    arrays += [np.array(state.losses)]
    floats = (a if a.dtype == np.int32 else np.ascontiguousarray(a, dtype="<f4") for a in map(np.asarray, arrays))
    write_atomically(path, [header, *(a.reshape(-1).view(np.uint8) for a in floats if a.size)])


def read_debug_state(path: StrPath, config: ModelShape) -> DebugState:
    """Read a debug state of a model of the given shape.

    Raises:
        FileNotFoundError: if there is no such file.
        llmc.Error: if it is damaged, or of a model of another shape.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no debug state '{path}'; `python -m llmc.reference` writes one beside its model"
        )
    size = path.stat().st_size
    if size < _HEADER.size:
        raise _llmc.Error(f"{path}: {size} bytes are too few for a debug state, whose header has {_HEADER.size}")
    with open(path, "rb") as file:
        magic, version, B, T, num_losses = _HEADER.unpack(file.read(_HEADER.size))
    if (magic, version) != (_MAGIC, _VERSION):
        raise _llmc.Error(
            f"{path}: magic {magic} version {version}, expected a debug state ({_MAGIC} version {_VERSION})"
        )
    if B < 1 or not 1 <= T <= config.max_seq_len or not 0 <= num_losses <= 1000:
        raise _llmc.Error(
            f"{path}: announces {B} rows of {T} tokens and {num_losses} losses; the model's context is {config.max_seq_len}"
        )
    V = config.vocab_size
    expected = _HEADER.size + 4 * (2 * B * T + B * T * V + 1 + config.num_parameters + num_losses)
    if size != expected:
        raise _llmc.Error(f"{path}: {size} bytes, expected {expected} for this model and B = {B}, T = {T}")
    with open(path, "rb") as file:
        file.seek(_HEADER.size)
        inputs, targets = (np.fromfile(file, "<i4", B * T).reshape(B, T) for _ in range(2))
        logits = np.fromfile(file, "<f4", B * T * V).reshape(B, T, V)
        loss = float(np.fromfile(file, "<f4", 1)[0])
        gradients = {
            name: np.fromfile(file, "<f4", math.prod(shape)).reshape(shape)
            for name, shape in config.parameter_shapes.items()
        }
        losses = np.fromfile(file, "<f4", num_losses).tolist()
    return DebugState(inputs, targets, logits, loss, gradients, losses)
