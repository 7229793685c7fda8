"""Muon over the matrices of a model, AdamW over the rest."""

from __future__ import annotations

import math

from llmc import _llmc
from llmc.models.config import ModelConfig
from llmc.models.model import Model
from llmc.optim.adamw import AdamW
from llmc.optim.optimizer import Optimizer, check_arguments
from llmc.values import MEMORY_DTYPES


class Muon(Optimizer):
    """Muon (Jordan et al. 2024) for the matrices of the layers; AdamW for embeddings, which are the head too, biases and layernorms.

    A matrix goes by its momentum, made orthogonal by Newton-Schulz iterations in the model's dtype, so that the update has all
    directions in equal measure. Queries, keys and values are three matrices. Moments are f32: one of a matrix, two of the rest.

    Args:
        model: whose parameters it updates.
        momentum: decay of the moment of matrices.
        nesterov: look one step ahead with it.
        ns_steps: Newton-Schulz iterations.
        lr_ratio: the learning rate of matrices, as a multiple of that of the rest.
        adjust_lr: how it follows from a matrix's rows R and columns C, as adjust_lr_fn of torch.optim.Muon: "match_rms_adamw" times
            0.2 sqrt(max(R, C)), with which AdamW's learning rate and decay fit (Liu et al. 2025), "original" times
            sqrt(max(1, R / C)).
        betas, eps: AdamW's, of the rest.
        weight_decay: decoupled, times the learning rate (of matrices: times lr_ratio, but not adjusted); of matrices and embeddings.
        grad_clip: largest global gradient norm, of all parameters; 0 for no clipping.
        master_weights: keep the 16 bits below each bf16 weight; False rounds stochastically.
        seed: of stochastic rounding, 1 to 2^64 - 1.
        comm: the ranks among which the work is divided, as of llmc.AdamW; but each layer's tensor of matrices has one owner, who
            updates all of it.

    Raises:
        TypeError: if model is no model.
        ValueError: if a number is out of range.
    """

    name = "muon"

    def __init__(
        self,
        model: Model,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        lr_ratio: float = 1.0,
        adjust_lr: str = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        grad_clip: float = 1.0,
        master_weights: bool = True,
        seed: int = 13371337,
        comm: _llmc.Comm | None = None,
    ) -> None:
        check_arguments(model, seed)
        native = _llmc.Muon(
            model._native,
            momentum=momentum,
            nesterov=nesterov,
            ns_steps=ns_steps,
            lr_ratio=lr_ratio,
            adjust_lr=adjust_lr,
            beta1=betas[0],
            beta2=betas[1],
            eps=eps,
            weight_decay=weight_decay,
            grad_clip=grad_clip,
            master_weights=master_weights,
            seed=seed,
            comm=comm,
        )
        super().__init__(native, has_masters=master_weights and model.dtype == "bf16")
        self._options = (
            f"momentum={momentum}, lr_ratio={lr_ratio}, adjust_lr='{adjust_lr}', betas={betas}, eps={eps}, "
            f"weight_decay={weight_decay}, grad_clip={grad_clip}"
        )

    def __repr__(self) -> str:
        return f"Muon({self._options}; {self.step_count:,} updates made)"

    @staticmethod
    def planned_bytes(config: ModelConfig, dtype: str, master_weights: bool, ranks: int = 1) -> int:
        """Return about how many bytes `bytes` will be for a model of that shape, on each of so many ranks at most (ZeRO-1)."""
        with_two_moments = AdamW.bytes_per_parameter(dtype, master_weights)
        whole = layer = matrix = gram = 0
        for spec in _llmc.parameter_table(config.native()):
            numel = math.prod(spec.shape)
            each = with_two_moments - 4 * (spec.matrices > 0)
            whole += each * numel
            if spec.matrices:
                layers, rows, columns = spec.shape
                layer = max(layer, each * numel // layers)
                rows //= spec.matrices
                matrix, gram = max(matrix, rows * columns), max(gram, min(rows, columns) ** 2)
        # A layer's matrices have one owner. For one of them at a time there are momentum, direction and two squares.
        state = whole if ranks == 1 else -(-whole // ranks) + layer
        return state + 2 * (matrix + gram) * MEMORY_DTYPES[dtype].itemsize
