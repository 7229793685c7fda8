"""layernorm, backward: the gradients of the input, the weight and the bias.

With n = (inp - mean) rstd and g = dout weight, in each row:
    dinp += rstd (g - avg(g) - n avg(g n))
and over all rows:
    dweight += sum dout n    dbias += sum dout
All three are added to what is there: the input is a residual stream, which has a gradient already, and parameters collect the gradients of
several micro-batches.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc.selfcheck import formulas

SHAPE = {"N": 8 * 1024, "C": 768}  # GPT-2 124M, 8 sequences of 1024 tokens
GPU_SHAPE = {"N": 32 * 1024}
SMALL = [
    {"N": 1, "C": 2},
    {"N": 5, "C": 33},
    {"N": 300, "C": 40},
    {"N": 2200, "C": 8},
    {"N": 67, "C": 264},
    {"N": 19, "C": 768},
]

OUTPUTS = {"dinp": ("N", "C"), "dweight": ("C",), "dbias": ("C",)}
F32 = {"dweight", "dbias", "mean", "rstd"}  # f32 in versions for bf16, too
TORCH = ["f32"]  # for bf16 it wants mean and rstd rounded to bf16


def inputs(rng: np.random.Generator, N: int, C: int) -> dict[str, Any]:
    inp = rng.standard_normal((N, C)) + 1.0
    mean = inp.mean(axis=1)
    return {
        "dinp": rng.standard_normal((N, C)),
        "dweight": rng.standard_normal(C),
        "dbias": rng.standard_normal(C),
        "dout": rng.standard_normal((N, C)),
        "inp": inp,
        "weight": rng.standard_normal(C),
        "mean": mean,
        "rstd": 1 / np.sqrt(((inp - mean[:, None]) ** 2).mean(axis=1) + 1e-5),
    }


def oracle(
    dinp: np.ndarray,
    dweight: np.ndarray,
    dbias: np.ndarray,
    dout: np.ndarray,
    inp: np.ndarray,
    weight: np.ndarray,
    mean: np.ndarray,
    rstd: np.ndarray,
) -> tuple[np.ndarray, ...]:
    # Not formulas.layernorm_gradient, which computes mean and rstd anew: a version takes those that it is given.
    n, g = (inp - mean[:, None]) * rstd[:, None], dout * weight
    dx = rstd[:, None] * (g - g.mean(axis=1, keepdims=True) - n * (g * n).mean(axis=1, keepdims=True))
    return dinp + dx, dweight + (dout * n).sum(axis=0), dbias + dout.sum(axis=0)


def limit(name: str, dtype: str) -> float:
    """Return the error that is allowed, relative to the largest element."""
    if dtype == "bf16" and name == "dinp":
        return 2.0**-8  # rounding once costs half of it
    # A plain sum of N numbers is off by sqrt(N) units in the last place in practice: 90 of 8192 rows, beside a largest element that
    # grows as sqrt(N) itself.
    return 64 * 2.0**-23


def flops(N: int, C: int) -> float:
    return 15.0 * N * C  # n 2, g 1, sums 3, dweight and dbias 3, dinp 6


def llmc(backend: Any, t: dict[str, Any], shape: dict[str, int]) -> None:
    backend.layernorm_backward(
        t["dinp"], t["dweight"], t["dbias"], None, t["dout"], t["inp"], t["weight"], t["mean"], t["rstd"]
    )


def numpy(t: dict[str, np.ndarray], shape: dict[str, int]) -> dict[str, np.ndarray]:
    dx, dweight, dbias = formulas.layernorm_gradient(t["dout"], t["inp"], t["weight"])
    return {"dinp": t["dinp"] + dx, "dweight": t["dweight"] + dweight, "dbias": t["dbias"] + dbias}


def torch(t: dict[str, Any], shape: dict[str, int]) -> dict[str, Any]:
    import torch

    weight = t["weight"]
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        t["dout"], t["inp"], [shape["C"]], t["mean"][:, None], t["rstd"][:, None], weight, weight, [True, True, True]
    )
    return {"dinp": t["dinp"] + dx, "dweight": t["dweight"] + dweight, "dbias": t["dbias"] + dbias}
