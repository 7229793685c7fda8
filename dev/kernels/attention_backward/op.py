"""causal attention, backward: the gradients of queries, keys and values from that of the output.

p = exp(q k^T scale - lse);  dv = p^T dout;  dp = dout v^T;  ds = p (dp - delta) with delta = sum(dout out) for each query;
dq = ds k scale;  dk = ds^T q scale. dqkv is laid out as qkv; out and lse come from the forward pass.
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
SMALL = [{"B": B, "T": T, "NH": NH} for B, T, NH in ((1, 1, 1), (2, 7, 3), (1, 64, 2), (1, 65, 1), (1, 130, 2))]

OUTPUTS = {"dqkv": ("B", "T", "3*NH*64")}
F32 = {"lse"}


def inputs(rng: np.random.Generator, B: int, T: int, NH: int) -> dict[str, Any]:
    qkv, dout = rng.standard_normal((B, T, 3 * NH * HS)), rng.standard_normal((B, T, NH * HS))
    with ThreadPoolExecutor() as pool:  # a sequence at a time: the matrices of all of them would take gigabytes
        out, lse = zip(*pool.map(lambda x: formulas.attention(x[None], NH), qkv))
    return {"dout": dout, "qkv": qkv, "out": np.concatenate(out), "lse": np.concatenate(lse)}


def oracle(dout: np.ndarray, qkv: np.ndarray, out: np.ndarray, lse: np.ndarray) -> np.ndarray:
    def one_sequence(*arrays: np.ndarray) -> np.ndarray:
        gradients = formulas.attention_gradient(*(x[None] for x in arrays), lse.shape[1])
        return np.concatenate(gradients, axis=-1)

    with ThreadPoolExecutor() as pool:
        return np.concatenate(list(pool.map(one_sequence, dout, qkv, out, lse)))


def limit(name: str, dtype: str) -> float:
    """Return the error that is allowed, relative to the largest element."""
    if dtype == "bf16":
        # p and ds are rounded to bf16, and so is the result; the first rows have too few terms to average it out.
        return 2.0**-7
    return 32 * 2.0**-23  # twice that of the forward pass: dp - delta is a difference of two sums


def flops(B: int, T: int, NH: int) -> float:
    return 10.0 * HS * B * NH * T * (T + 1) / 2  # five matmuls over the pairs of a query and a key that it sees


def llmc(backend: Any, t: dict[str, Any], shape: dict[str, int]) -> None:
    backend.attention_backward(t["dqkv"], t["dout"], t["qkv"], t["out"], t["lse"], shape["NH"])


def numpy(t: dict[str, np.ndarray], shape: dict[str, int]) -> dict[str, np.ndarray]:
    NH = shape["NH"]
    q, k, v = (formulas.heads(x, NH) for x in np.split(t["qkv"], 3, axis=-1))
    dout, out = (formulas.heads(t[name], NH) for name in ("dout", "out"))
    scale = np.float32(1 / math.sqrt(HS))
    p = q @ k.swapaxes(-1, -2) * scale
    p = np.tril(np.exp(p - t["lse"][..., None], out=p))
    ds = p * (dout @ v.swapaxes(-1, -2) - (dout * out).sum(-1, keepdims=True)) * scale
    gradients = ds @ k, ds.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ dout
    return {"dqkv": np.concatenate([formulas.merge(g) for g in gradients], axis=-1)}


def torch(t: dict[str, Any], shape: dict[str, int]) -> dict[str, Any]:
    import torch

    if t["qkv"].is_cuda:  # the kernels behind autograd, whose forward pass runs once, with the check
        if "graph" not in t:
            qkv = t["qkv"].requires_grad_()
            q, k, v = qkv.unflatten(-1, (3, shape["NH"], HS)).permute(2, 0, 3, 1, 4)
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            t["graph"] = out.transpose(1, 2).flatten(2), qkv
        return {"dqkv": torch.autograd.grad(*t["graph"], t["dout"], retain_graph=True)[0]}
    q, k, v = t["qkv"].unflatten(-1, (3, shape["NH"], HS)).permute(2, 0, 3, 1, 4)
    dout, out = (t[name].unflatten(-1, (shape["NH"], HS)).transpose(1, 2) for name in ("dout", "out"))
    # What autograd calls for scaled_dot_product_attention on a CPU.
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    gradients = backward(dout, q, k, v, out, t["lse"].contiguous(), 0.0, True)
    return {"dqkv": torch.cat([g.transpose(1, 2).flatten(2) for g in gradients], dim=-1)}
