"""matmul, the forward pass of a linear layer: out = inp weight^T + bias.

Rows of inp are tokens, rows of weight output channels: an element of out is the dot product of two rows, and a bias.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc.selfcheck import formulas

SHAPE = {"N": 1024, "C": 768, "OC": 3072}  # the first matmul of GPT-2 124M's feed-forward layer, 1024 tokens
GPU_SHAPE = {"N": 16 * 1024}
SMALL = [
    {"N": 1, "C": 1, "OC": 1},
    {"N": 5, "C": 33, "OC": 7},
    {"N": 67, "C": 65, "OC": 81},
    {"N": 130, "C": 72, "OC": 136},
    {"N": 64, "C": 800, "OC": 96},
]

OUTPUTS = {"out": ("N", "OC")}
F32: set[str] = set()


def inputs(rng: np.random.Generator, N: int, C: int, OC: int) -> dict[str, Any]:
    return {
        "inp": rng.standard_normal((N, C)),
        "weight": rng.standard_normal((OC, C)),
        "bias": rng.standard_normal(OC),
    }


def oracle(inp: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return formulas.matmul(inp, weight, bias)


def limit(name: str, dtype: str) -> float:
    """Return the error that is allowed, relative to the largest element."""
    if dtype == "bf16":
        # Rounding once costs a quarter of it. llmc's op on a GPU rounds odd sizes before it adds the bias, too.
        return 2.0**-7
    # A sum of C products in f32 is off by up to C units in the last place, in practice by sqrt(C) of them at most: 90 for the
    # longest that is measured anywhere, 8192.
    return 128 * 2.0**-23


def flops(N: int, C: int, OC: int) -> float:
    return 2.0 * N * C * OC  # a multiply-add is two; the bias is not counted


def llmc(backend: Any, t: dict[str, Any], shape: dict[str, int]) -> None:
    backend.matmul_forward(t["out"], t["inp"], t["weight"], t["bias"])


def numpy(t: dict[str, np.ndarray], shape: dict[str, int]) -> dict[str, np.ndarray]:
    return {"out": formulas.matmul(t["inp"], t["weight"], t["bias"])}


def torch(t: dict[str, Any], shape: dict[str, int]) -> dict[str, Any]:
    import torch

    return {"out": torch.nn.functional.linear(t["inp"], t["weight"], t["bias"])}
