"""gelu, backward: the gradient of its input.

With s = 1 / (1 + e^-2u) and u = sqrt(2/pi) (inp + 0.044715 inp^3), out is inp s, so
dinp = dout (s + inp s (1 - s) 2u'), 2u' = 2 sqrt(2/pi) (1 + 3 * 0.044715 inp^2)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc.selfcheck import formulas

SHAPE = {"N": 4 * 1024 * 3072}  # GPT-2 124M, 4 sequences of 1024 tokens, 4 * 768 channels
GPU_SHAPE = {"N": 16 * 1024 * 3072}
SMALL = [{"N": 1}, {"N": 33}, {"N": 4099}]

OUTPUTS = {"dinp": ("N",)}
F32: set[str] = set()


def inputs(rng: np.random.Generator, N: int) -> dict[str, Any]:
    inp = 3 * rng.standard_normal(N)
    inp[:8] = [0, -0.0, 1e-20, -5, -9, 9, -12, 12][: len(inp)]  # to where exp is 0 or infinite
    return {"inp": inp, "dout": rng.standard_normal(N)}


def oracle(inp: np.ndarray, dout: np.ndarray) -> np.ndarray:
    return formulas.gelu_gradient(inp, dout)


def limit(name: str, dtype: str) -> float:
    """Return the error that is allowed, relative to the largest element."""
    # u' is about 10 where s (1 - s) is not yet 0, so that rounding u costs a dozen units in the last place.
    return 2.0**-8 if dtype == "bf16" else 16 * 2.0**-23


def flops(N: int) -> float:
    return 0.0  # what exp costs depends on who counts


def llmc(backend: Any, t: dict[str, Any], shape: dict[str, int]) -> None:
    backend.gelu_backward(t["dinp"], t["inp"], t["dout"])


def numpy(t: dict[str, np.ndarray], shape: dict[str, int]) -> dict[str, np.ndarray]:
    return {"dinp": formulas.gelu_gradient(t["inp"], t["dout"])}


def torch(t: dict[str, Any], shape: dict[str, int]) -> dict[str, Any]:
    import torch

    return {"dinp": torch.ops.aten.gelu_backward(t["dout"], t["inp"], approximate="tanh")}
