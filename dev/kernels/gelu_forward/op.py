"""gelu, forward: the activation function of the feed-forward layer, in the form with tanh (Hendrycks & Gimpel 2016).

out = inp/2 (1 + tanh(u)), u = sqrt(2/pi) (inp + 0.044715 inp^3), for each of N numbers
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc.selfcheck import formulas

SHAPE = {"N": 4 * 1024 * 3072}  # GPT-2 124M, 4 sequences of 1024 tokens, 4 * 768 channels
GPU_SHAPE = {"N": 16 * 1024 * 3072}
SMALL = [{"N": 1}, {"N": 33}, {"N": 4099}]

OUTPUTS = {"out": ("N",)}
F32: set[str] = set()


def inputs(rng: np.random.Generator, N: int) -> dict[str, Any]:
    inp = 3 * rng.standard_normal(N)
    inp[:8] = [0, -0.0, 1e-20, -5, -9, 9, -12, 12][: len(inp)]  # to where exp is 0 or infinite
    return {"inp": inp}


def oracle(inp: np.ndarray) -> np.ndarray:
    return formulas.gelu(inp)


def limit(name: str, dtype: str) -> float:
    """Return the error that is allowed, relative to the largest element, which is about 12."""
    # A unit in the last place of 12: tanh cancels against 1 if inp is negative, and leaves an absolute error of 1e-7 or less.
    return 2.0**-8 if dtype == "bf16" else 2.0**-23


def flops(N: int) -> float:
    return 0.0  # what exp costs depends on who counts


def llmc(backend: Any, t: dict[str, Any], shape: dict[str, int]) -> None:
    backend.gelu_forward(t["out"], t["inp"])


def numpy(t: dict[str, np.ndarray], shape: dict[str, int]) -> dict[str, np.ndarray]:
    return {"out": formulas.gelu(t["inp"])}


def torch(t: dict[str, Any], shape: dict[str, int]) -> dict[str, Any]:
    import torch

    return {"out": torch.nn.functional.gelu(t["inp"], approximate="tanh")}
