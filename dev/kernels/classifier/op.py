"""classifier: softmax, cross-entropy and the gradient of both, which takes the place of the logits.

losses[n] = log(sum over v < V of e^logits[n, v]) - logits[n, targets[n]]
logits[n, v] becomes (softmax(logits[n])[v] - (1 if v is targets[n], else 0)) / N

Columns from V on only pad the vocabulary to a round number: they do not count, and their gradient is 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from harness.ops import KernelError

from llmc.selfcheck import formulas

SHAPE = {"N": 1024, "V": 50257, "Vp": 50304}  # GPT-2's vocabulary; llmc's default of classifier_rows
SMALL = [
    {"N": 1, "V": 1, "Vp": 8},
    {"N": 2, "V": 77, "Vp": 80},
    {"N": 5, "V": 50, "Vp": 128},
    {"N": 2, "V": 16500, "Vp": 16640},  # more than two steps of the threads of cuda_5
    {"N": 3, "V": 4999, "Vp": 5120},
]

OUTPUTS = {"losses": ("N",), "logits": ("N", "Vp")}
F32 = {"losses"}  # f32 in versions for bf16, too


def inputs(rng: np.random.Generator, N: int, V: int, Vp: int) -> dict[str, Any]:
    if V > Vp or Vp % 8 != 0:
        raise KernelError(
            f"classifier: V={V}, Vp={Vp}: expected V <= Vp, and Vp a multiple of 8, for loads of 16 bytes"
        )
    logits = 4 * rng.standard_normal((N, Vp))
    logits[:, V:] = 1e4  # the padding must not count
    return {"logits": logits, "targets": rng.integers(0, V, N)}


def oracle(logits: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, ...]:
    V = _vocabulary(logits)
    losses = formulas.crossentropy(logits, targets, V)
    return losses, formulas.crossentropy_gradient(logits, targets, 1 / len(logits), V)


def _vocabulary(logits: np.ndarray) -> int:
    return int((logits[0] < 1e3).sum())  # what inputs() has put behind it is larger


def limit(name: str, dtype: str) -> float:
    """Return the error that is allowed, relative to the largest element."""
    if dtype == "bf16" and name == "logits":
        return 2.0**-8  # rounding once costs half of it
    # The sum of V exponentials in f32. Vectors of four lanes, the narrowest, add V/4 numbers one after the other. Each addition is
    # off by up to 2^-24 of the sum: 7.5e-4 at worst. A sixth of that is allowed, which is several times what was ever seen.
    return 2.0**-13


def flops(N: int, V: int, Vp: int) -> float:
    return 5.0 * N * V  # a maximum, a difference, an exponential counted as one, a sum, a product


def llmc(backend: Any, t: dict[str, Any], shape: dict[str, int]) -> None:
    backend.fused_classifier(t["losses"], t["logits"], t["targets"], 1 / shape["N"], shape["V"])


def numpy(t: dict[str, np.ndarray], shape: dict[str, int]) -> dict[str, np.ndarray]:
    N, V = shape["N"], shape["V"]
    x, rows = t["logits"][:, :V], np.arange(N)
    e = np.exp(x - x.max(axis=1, keepdims=True))
    total = e.sum(axis=1, keepdims=True)
    losses = np.log(total[:, 0]) - np.log(e[rows, t["targets"]])
    gradient = np.zeros_like(t["logits"])
    np.multiply(e, 1 / (total * N), out=gradient[:, :V])
    gradient[rows, t["targets"]] -= 1 / N
    return {"losses": losses, "logits": gradient}


def torch(t: dict[str, Any], shape: dict[str, int]) -> dict[str, Any]:
    import torch

    logits = t["logits"].detach().requires_grad_()
    counted = logits[:, : shape["V"]].float()  # as autocast does it: the losses of bf16 logits would be bf16
    losses = torch.nn.functional.cross_entropy(counted, t["targets"].long(), reduction="none")
    losses.mean().backward()
    return {"losses": losses, "logits": logits.grad}
