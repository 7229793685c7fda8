"""What all optimizers share: an update in two halves, and the state that checkpoints keep."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from numpy.typing import NDArray

from llmc import _llmc
from llmc.models.model import Model
from llmc.values import check_seed


def check_arguments(model: object, seed: int) -> None:
    """Refuse what is no model, with a TypeError, and a seed that stochastic rounding cannot have, with a ValueError."""
    if not isinstance(model, Model):
        raise TypeError(f"model is a {type(model).__name__}, expected the model itself, whose parameters are updated")
    check_seed(seed, 64)


class ParameterState(NamedTuple):
    """What an optimizer keeps of one parameter.

    Attributes:
        moments: f32, each of as many elements as the parameter; how many there are depends on the optimizer.
        master: the 16 bits (i16) below each weight of a bf16 parameter; None without master weights.
    """

    moments: tuple[_llmc.Tensor, ...]
    master: _llmc.Tensor | None


class Optimizer:
    """An optimizer of a model's parameters, with clipping by the global gradient norm. Its subclasses construct it.

    A gradient whose norm is infinite or not a number changes nothing: neither weights nor moments.

    Attributes:
        name: as settings and state files have it.
        has_masters: whether it keeps master weights, on this rank or another.
    """

    name: ClassVar[str]

    def __init__(self, native: _llmc.Optimizer, has_masters: bool) -> None:
        self._native, self.has_masters = native, has_masters

    def step(self, lr: float) -> None:
        """Make one update, measure() and apply(). Queues the work and returns: nothing waits."""
        self._native.step(lr)

    def measure(self) -> float:
        """Return the global norm of the gradients, before clipping. Waits for the device."""
        return self._native.measure()

    def apply(self, lr: float) -> None:
        """Make the update with the gradients that measure() has measured. Queues the work and returns."""
        self._native.apply(lr)

    @property
    def norm(self) -> float:
        """Global norm of the gradients that were measured last, before clipping. Waits for the device.

        Raises:
            llmc.Error: if none were measured yet, by step() or measure().
        """
        return self._native.norm()

    # ---- for checkpoints ----

    @property
    def step_count(self) -> int:
        """Updates made so far, by which AdamW corrects the bias of its moments."""
        return self._native.step_count

    @step_count.setter
    def step_count(self, count: int) -> None:
        self._native.step_count = count

    @property
    def rng_state(self) -> int:
        """State of the generator that seeds stochastic rounding: xorshift*, 64 bits, never 0."""
        return self._native.rng_state

    @rng_state.setter
    def rng_state(self, state: int) -> None:
        self._native.rng_state = state

    def state(self) -> dict[str, ParameterState]:
        """Return what is kept of each parameter, by llm.c's names in file order: views of the device's memory."""
        return {name: ParameterState(*kept) for name, kept in self._native.state().items()}

    @property
    def sharded(self) -> bool:
        """Whether state() is that of what this rank updates only (ZeRO-1)."""
        return self._native.sharded

    @property
    def partition(self) -> _llmc.Partition | None:
        """Which rank updates what, for _llmc.Reduction; None if this process updates everything."""
        return self._native.partition

    def layers(self, name: str) -> int:
        """Return how many layers of a parameter are stacked; 1 if it has none."""
        return self._native.layers(name)

    def gather(self, name: str, kind: int, layer: int) -> _llmc.Tensor:
        """Return all of one layer's state, from all ranks, each of which calls this alike.

        Args:
            name: of the parameter.
            kind: which moment, from 0 on; the number of moments means the master.
            layer: from 0 on.

        Returns:
            As many elements as the layer has, flat; valid until the next call.
        """
        return self._native.gather(name, kind, layer)

    def scatter(self, name: str, kind: int, layer: int, values: NDArray[Any] | None) -> None:
        """Set all of one layer's state from rank 0's values; the other ranks pass None. Every rank calls this alike.

        Args:
            name, kind, layer: as of gather().
            values: as many elements as the layer has, contiguous: float32, or int16 for the master.
        """
        self._native.scatter(name, kind, layer, values)

    @property
    def bytes(self) -> int:
        """Memory that it takes: of moments and master weights, and scratch memory of its updates."""
        return self._native.bytes
