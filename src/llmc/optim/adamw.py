"""AdamW over the parameters of a model."""

from __future__ import annotations

from typing import NamedTuple

from llmc import _llmc
from llmc.models.model import Model
from llmc.values import check_seed


class ParameterState(NamedTuple):
    """What AdamW keeps of one parameter.

    m, v: the moments, f32, as many elements as the parameter.
    master: the 16 bits (i16) below each weight of a bf16 parameter; None without master weights.
    """

    m: _llmc.Tensor
    v: _llmc.Tensor
    master: _llmc.Tensor | None


class AdamW:
    """AdamW (Loshchilov & Hutter 2019) with clipping by the global gradient norm.

    Weight decay applies to matrices and embeddings, not to biases and layernorms (decay_all: to everything, as llm.c's CPU
    program does). bf16 models keep the 16 bits below each bf16 weight, so updates act on f32 weights, at 2 bytes each;
    master_weights=False rounds stochastically instead. Moments are f32.

    A gradient whose norm is infinite or not a number changes nothing: neither weights nor moments.

    beta1, beta2: llm.c's train_gpt2.cu uses 0.9 and 0.95, its CPU program 0.9 and 0.999.
    eps: added to the root of the second moment.
    weight_decay: decoupled, times the learning rate.
    grad_clip: largest global gradient norm; 0 for no clipping.
    seed: of stochastic rounding, 1 to 2^64 - 1.
    """

    def __init__(
        self,
        model: Model,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        grad_clip: float = 1.0,
        decay_all: bool = False,
        master_weights: bool = True,
        seed: int = 13371337,
    ) -> None:
        check_seed(seed, 64)
        self._native = _llmc.AdamW(
            model._native,
            beta1=betas[0],
            beta2=betas[1],
            eps=eps,
            weight_decay=weight_decay,
            grad_clip=grad_clip,
            decay_all=decay_all,
            master_weights=master_weights,
            seed=seed,
        )

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
        """Global norm of the gradients that were measured last, before clipping. Waits for the device."""
        return self._native.norm()

    # ---- for checkpoints ----

    @property
    def step_count(self) -> int:
        """Updates made so far, by which the moments' bias is corrected."""
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
        return {name: ParameterState(*tensors) for name, tensors in self._native.state().items()}

    @property
    def bytes(self) -> int:
        """Memory of the moments and master weights."""
        return self._native.bytes
