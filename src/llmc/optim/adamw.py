"""AdamW over the parameters of a model."""

from __future__ import annotations

from llmc import _llmc
from llmc.models.gpt2 import GPT2
from llmc.values import check_seed


class AdamW:
    """AdamW (Loshchilov & Hutter 2019) with clipping by the global gradient norm.

    Weight decay applies to matrices and embeddings, not to biases and layernorms (decay_all: to everything, as llm.c's CPU
    program does). bf16 models keep the 16 bits below each bf16 weight, so updates act on f32 weights, at 2 bytes each;
    master_weights=False rounds stochastically instead. Moments are f32.

    A gradient whose norm is infinite or not a number changes nothing: neither weights nor moments.

    beta1, beta2: llm.c's train_gpt2.cu uses 0.9 and 0.95, its CPU program 0.9 and 0.999.
    grad_clip: largest global gradient norm; 0 for no clipping.
    """

    def __init__(
        self,
        model: GPT2,
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
        self.model = model
        self.step_count = 0
        self.native = _llmc.AdamW(
            model.native,
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
        """One update. Queues the work and returns; nothing waits."""
        self.model.native.materialize_gradients()  # where no backward() came between zero_grad() and this
        self.native.step(lr, self.step_count)
        self.step_count += 1

    @property
    def norm(self) -> float:
        """Global norm of the gradients of the last step, before clipping. Waits for the device."""
        return self.native.norm()
