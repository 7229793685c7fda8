"""layernorm, forward: each row of C numbers gets mean 0 and variance 1, then a weight and a bias per column.

out = (inp - mean) rstd weight + bias, with rstd = 1 / sqrt(variance + 1e-5). mean and rstd are kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc.selfcheck import formulas

SHAPE = {"N": 8 * 1024, "C": 768}  # GPT-2 124M, 8 sequences of 1024 tokens
GPU_SHAPE = {"N": 32 * 1024}
SMALL = [{"N": 1, "C": 1}, {"N": 5, "C": 33}, {"N": 67, "C": 264}, {"N": 9, "C": 768}]

OUTPUTS = {"out": ("N", "C"), "mean": ("N",), "rstd": ("N",)}
F32 = {"mean", "rstd"}  # f32 in versions for bf16, too


def inputs(rng: np.random.Generator, N: int, C: int) -> dict[str, Any]:
    # The mean of a row is as large as its deviation: a version that forgets to subtract it is seen.
    return {
        "inp": rng.standard_normal((N, C)) + 1.0,
        "weight": rng.standard_normal(C),
        "bias": rng.standard_normal(C),
    }


def oracle(inp: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, ...]:
    return formulas.layernorm(inp, weight, bias)


def limit(name: str, dtype: str) -> float:
    """Return the error that is allowed, relative to the largest element."""
    if dtype == "bf16" and name == "out":
        return 2.0**-8  # rounding once costs half of it
    # A plain sum of C numbers in f32 is off by up to C/2 units in the last place, in practice by sqrt(C) of them.
    return 32 * 2.0**-23


def flops(N: int, C: int) -> float:
    return 8.0 * N * C  # mean 1, variance 3, output 4


def llmc(backend: Any, t: dict[str, Any], shape: dict[str, int]) -> None:
    backend.layernorm_forward(t["out"], t["mean"], t["rstd"], t["inp"], t["weight"], t["bias"])


def numpy(t: dict[str, np.ndarray], shape: dict[str, int]) -> dict[str, np.ndarray]:
    out, mean, rstd = formulas.layernorm(t["inp"], t["weight"], t["bias"])
    return {"out": out, "mean": mean, "rstd": rstd}


def torch(t: dict[str, Any], shape: dict[str, int]) -> dict[str, Any]:
    import torch

    out, mean, rstd = torch.native_layer_norm(t["inp"], [shape["C"]], t["weight"], t["bias"], 1e-5)
    if out.dtype == torch.bfloat16:  # then PyTorch keeps mean and rstd in bf16, too
        return {"out": out}
    return {"out": out, "mean": mean.ravel(), "rstd": rstd.ravel()}
