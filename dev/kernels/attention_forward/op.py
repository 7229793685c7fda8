"""causal attention, forward: out = softmax(q k^T / sqrt(HS)) v for each head, where a query sees the keys up to its own position.

qkv (B, T, 3C) holds the queries of all heads, then the keys, then the values, as the matmul before has made them; out is (B, T, C).
lse (B, NH, T), the logarithm of the sum of a row's exponentials, is all that the backward pass needs besides. The head size is
HS = C / NH = 64, as in every GPT-2.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from llmc.selfcheck import formulas

HS = 64

SHAPE = {"B": 1, "T": 1024, "NH": 12}  # GPT-2 124M, one sequence of 1024 tokens
GPU_SHAPE = {"B": 8}
# The blocks of the kernels have 32, 64 or 128 rows: one row, less than a block, whole blocks, a row more.
SMALL = [{"B": B, "T": T, "NH": NH} for B, T, NH in ((1, 1, 1), (2, 7, 3), (1, 64, 2), (1, 65, 1), (1, 130, 2))]

OUTPUTS = {"out": ("B", "T", "NH*64"), "lse": ("B", "NH", "T")}
F32 = {"lse"}


def inputs(rng: np.random.Generator, B: int, T: int, NH: int) -> dict[str, Any]:
    return {"qkv": rng.standard_normal((B, T, 3 * NH * HS))}


def oracle(qkv: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # A sequence at a time, side by side: the formula's matrices of all of them would take gigabytes.
    with ThreadPoolExecutor() as pool:
        parts = pool.map(lambda x: formulas.attention(x[None], x.shape[-1] // (3 * HS)), qkv)
    out, lse = zip(*parts)
    return np.concatenate(out), np.concatenate(lse)


def limit(name: str, dtype: str) -> float:
    """Return the error that is allowed, relative to the largest element."""
    if dtype == "bf16" and name == "out":
        return (
            2.0**-8
        )  # half of it for the rounding of the result, the rest for that of the probabilities, which averages out
    # A score is a sum of 64 products, and exp magnifies its rounding errors by the score's size, 5 or so.
    return 16 * 2.0**-23


def flops(B: int, T: int, NH: int) -> float:
    return 4.0 * HS * B * NH * T * (T + 1) / 2  # two matmuls over the pairs of a query and a key that it sees


def llmc(backend: Any, t: dict[str, Any], shape: dict[str, int]) -> None:
    backend.attention_forward(t["out"], t["lse"], t["qkv"], shape["NH"])


def numpy(t: dict[str, np.ndarray], shape: dict[str, int]) -> dict[str, np.ndarray]:
    q, k, v = (formulas.heads(x, shape["NH"]) for x in np.split(t["qkv"], 3, axis=-1))
    scores = q @ k.swapaxes(-1, -2) * np.float32(1 / math.sqrt(HS))
    scores += np.triu(np.full(scores.shape[-2:], -np.inf, np.float32), 1)
    largest = scores.max(axis=-1, keepdims=True)
    p = np.exp(scores - largest, out=scores)
    total = p.sum(axis=-1, keepdims=True)
    return {"out": formulas.merge(p @ v / total), "lse": (largest + np.log(total))[..., 0]}


def torch(t: dict[str, Any], shape: dict[str, int]) -> dict[str, Any]:
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = t["qkv"].unflatten(-1, (3, shape["NH"], HS)).permute(2, 0, 3, 1, 4)
    return {"out": scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)}
