"""The formula of every op in NumPy, by which `llmc check` and the tests judge the kernels.

Arguments, results and their shapes are those of the ops in csrc/core/backend.h. Forward formulas take any floating dtype, complex ones
too, and never branch on a value. So the complex step gives their gradients to the last bit, by which tests/ops/test_oracle.py judges
the formulas of gradients.
"""

# ruff: noqa: D103 (a formula says what it computes)

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def encoder(tokens: Array, wte: Array, wpe: Array, start: Array) -> Array:
    out: Array = wte[tokens] + wpe[start[:, None] + np.arange(tokens.shape[1])]
    return out


def encoder_gradient(dwte: Array, dwpe: Array, dout: Array, tokens: Array) -> tuple[Array, Array]:
    dwte, dwpe = dwte.copy(), dwpe.copy()
    np.add.at(dwte, tokens, dout)
    dwpe[: tokens.shape[1]] += dout.sum(axis=0)
    return dwte, dwpe


def layernorm(x: Array, weight: Array, bias: Array) -> tuple[Array, Array, Array]:
    mean = x.mean(axis=-1)
    centered = x - mean[..., None]
    rstd = 1 / np.sqrt((centered * centered).mean(axis=-1) + 1e-5)
    return centered * rstd[..., None] * weight + bias, mean, rstd


def layernorm_gradient(dout: Array, x: Array, weight: Array) -> tuple[Array, Array, Array]:
    _, mean, rstd = layernorm(x, weight, weight)
    normal, g = (x - mean[:, None]) * rstd[:, None], dout * weight
    dx = rstd[:, None] * (g - g.mean(axis=1, keepdims=True) - normal * (g * normal).mean(axis=1, keepdims=True))
    return dx, (dout * normal).sum(axis=0), dout.sum(axis=0)


def matmul(x: Array, weight: Array, bias: Array | None = None) -> Array:
    out: Array = x @ weight.T
    return out if bias is None else out + bias


def matmul_gradient(dout: Array, x: Array, weight: Array) -> tuple[Array, Array, Array]:
    return dout @ weight, dout.T @ x, dout.sum(axis=0)


def _sigmoid(x: Array) -> Array:
    with np.errstate(over="ignore"):  # exp may overflow to infinity: 1 / inf is 0, which is right
        return 1 / (1 + np.exp(-x))


_GELU = 2 * math.sqrt(2 / math.pi)


def gelu(x: Array) -> Array:
    """Compute x/2 (1 + tanh(u/2)), written as x sigmoid(u): for negative x, 1 + tanh would cancel, in float64 too."""
    return x * _sigmoid(_GELU * (x + 0.044715 * x * x * x))


def gelu_gradient(x: Array, dout: Array) -> Array:
    u = _GELU * (x + 0.044715 * x * x * x)
    return dout * (_sigmoid(u) + x * _sigmoid(u) * _sigmoid(-u) * _GELU * (1 + 3 * 0.044715 * x * x))


def heads(x: Array, NH: int) -> Array:
    """Split (B, T, C) into heads, (B, NH, T, HS)."""
    B, T, C = x.shape
    return x.reshape(B, T, NH, C // NH).transpose(0, 2, 1, 3)


def merge(x: Array) -> Array:
    """Join heads, (B, NH, T, HS), to (B, T, C)."""
    B, NH, T, HS = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B, T, NH * HS)


def probabilities(q: Array, k: Array) -> tuple[Array, Array]:
    """Return the attention probabilities of T queries, which are the last of S positions, and the log-sum-exp of their scores."""
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    T, S = scores.shape[-2:]
    hidden = np.arange(S)[None] > np.arange(S - T, S)[:, None]
    largest = np.where(hidden, -np.inf, scores.real).max(axis=-1, keepdims=True)
    e = np.where(hidden, 0, np.exp(np.where(hidden, 0, scores - largest)))
    total = e.sum(axis=-1, keepdims=True)
    return e / total, (np.log(total) + largest)[..., 0]


def attention(qkv: Array, NH: int) -> tuple[Array, Array]:
    q, k, v = (heads(x, NH) for x in np.split(qkv, 3, axis=-1))
    p, lse = probabilities(q, k)
    return merge(p @ v), lse


def attention_gradient(dout: Array, qkv: Array, out: Array, lse: Array, NH: int) -> tuple[Array, Array, Array]:
    """Return gradients of q, k and v, (B, T, C) each, computed from out and lse of forward, as a backward pass does."""
    q, k, v = (heads(x, NH) for x in np.split(qkv, 3, axis=-1))
    d, o, scale = heads(dout, NH), heads(out, NH), 1 / math.sqrt(q.shape[-1])
    hidden = np.triu(np.ones((q.shape[-2],) * 2, dtype=bool), 1)
    p = np.where(hidden, 0, np.exp(np.where(hidden, 0, q @ k.swapaxes(-1, -2) * scale - lse[..., None])))
    ds = p * (d @ v.swapaxes(-1, -2) - (d * o).sum(axis=-1, keepdims=True)) * scale
    return merge(ds @ k), merge(ds.swapaxes(-1, -2) @ q), merge(p.swapaxes(-1, -2) @ d)


def crossentropy(logits: Array, targets: Array, V: int) -> Array:
    x = logits[:, :V]
    largest = x.real.max(axis=1, keepdims=True)
    lse = np.log(np.exp(x - largest).sum(axis=1)) + largest[:, 0]
    return np.where(targets < 0, 0, lse - x[np.arange(len(x)), targets])


def crossentropy_gradient(logits: Array, targets: Array, dloss: float, V: int) -> Array:
    x = logits[:, :V]
    e = np.exp(x - x.max(axis=1, keepdims=True))
    gradient = np.zeros_like(logits)
    gradient[:, :V] = e / e.sum(axis=1, keepdims=True)
    gradient[np.arange(len(x)), targets] -= 1
    return np.where(targets[:, None] < 0, 0, gradient * dloss).astype(logits.dtype)


def adamw(
    param: Array, m: Array, v: Array, grad: Array, factor: float, step: dict[str, float]
) -> tuple[Array, Array, Array]:
    g = grad * factor
    m = step["beta1"] * m + (g - step["beta1"] * g)  # lerp(g, m, beta1) as llm.c computes it
    v = step["beta2"] * v + (g * g - step["beta2"] * (g * g))
    update = (m / step["correction1"]) / (np.sqrt(v / step["correction2"]) + step["eps"])
    return param - step["lr"] * (update + step["weight_decay"] * param), m, v


def muon_momentum(m: Array, grad: Array, factor: float, momentum: float, nesterov: bool) -> tuple[Array, Array]:
    """Return out and the new m."""
    g = grad * factor
    m = g + momentum * (m - g)
    return (g + momentum * (m - g) if nesterov else m), m


def muon_update(param: Array, direction: Array, lr: float, scale: float, weight_decay: float) -> Array:
    return param - lr * (scale * direction + weight_decay * param)


NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315


def newton_schulz(x: Array, steps: int) -> Array:
    """Return x with all its singular values near 1, as torch.optim.Muon computes it, but in the dtype of x."""
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / max(np.sqrt((x * x).sum()), x.dtype.type(1e-7))
    a, b, c = (x.dtype.type(value) for value in NEWTON_SCHULZ)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.T if tall else x
