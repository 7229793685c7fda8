"""AdamW over the parameters of a model."""

from __future__ import annotations

from llmc import _llmc
from llmc.models.config import ModelConfig
from llmc.models.model import Model
from llmc.optim.optimizer import Optimizer, check_arguments


class AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019) with clipping by the global gradient norm.

    Weight decay applies to matrices and embeddings, not to biases and layernorms (decay_all: to everything, as llm.c's CPU
    program does). bf16 models keep the 16 bits below each bf16 weight, so updates act on f32 weights, at 2 bytes each;
    master_weights=False rounds stochastically instead. Moments are f32.

    Args:
        model: whose parameters it updates.
        betas: decays of the two moments. llm.c's train_gpt2.cu uses 0.9 and 0.95, its CPU program 0.9 and 0.999.
        eps: added to the root of the second moment.
        weight_decay: decoupled, times the learning rate.
        grad_clip: largest global gradient norm; 0 for no clipping.
        decay_all: decay every parameter.
        master_weights: keep the 16 bits below each bf16 weight.
        seed: of stochastic rounding, 1 to 2^64 - 1.
        comm: the ranks among which the work is divided (ZeRO-1): each keeps moments and masters of its pieces of the parameters
            and updates these. Gradients have been reduced by an _llmc.Reduction with the optimizer's partition; weights arrive
            from the other ranks until the model is used next, so a Tensor of them that was taken before must not be read in
            between.

    Raises:
        TypeError: if model is no model.
        ValueError: if a number is out of range.
    """

    name = "adamw"

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
        comm: _llmc.Comm | None = None,
    ) -> None:
        check_arguments(model, seed)
        native = _llmc.AdamW(
            model._native,
            beta1=betas[0],
            beta2=betas[1],
            eps=eps,
            weight_decay=weight_decay,
            grad_clip=grad_clip,
            decay_all=decay_all,
            master_weights=master_weights,
            seed=seed,
            comm=comm,
        )
        super().__init__(native, has_masters=master_weights and model.dtype == "bf16")
        self._options = f"betas={betas}, eps={eps}, weight_decay={weight_decay}, grad_clip={grad_clip}"

    def __repr__(self) -> str:
        return f"AdamW({self._options}; {self.step_count:,} updates made)"

    @staticmethod
    def bytes_per_parameter(dtype: str, master_weights: bool) -> int:
        """Return how many bytes moments and master weights take for each weight of a model of a dtype, 'f32' or 'bf16'."""
        return _llmc.AdamW.bytes_per_parameter(dtype, master_weights)

    @staticmethod
    def planned_bytes(config: ModelConfig, dtype: str, master_weights: bool, ranks: int = 1) -> int:
        """Return about how many bytes `bytes` will be for a model of that shape, on each of so many ranks (ZeRO-1)."""
        return -(-config.num_parameters * AdamW.bytes_per_parameter(dtype, master_weights) // ranks)
