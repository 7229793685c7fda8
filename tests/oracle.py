"""The formula of every op in NumPy, and how far from it an op's result may be.

Forward formulas take any floating dtype, complex ones too, and never branch on a value. So the complex step gives their gradients to
the last bit: Im f(x + ih) / h with h = 1e-30 has no cancellation (Squire & Trapp 1998). It is slow, so there are formulas of gradients
too, and tests/ops/test_oracle.py compares them with the complex step.

A formula evaluated in float64 is the truth. Evaluated in float32, and rounded to the op's dtype at the end, it is the peer. An op's
result may be twice as far from the truth as the peer is, plus one unit in the last place of the largest element.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from llmc import _llmc

Array = np.ndarray[Any, Any]

DTYPES = ["f32", "bf16"]
NUMPY = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "i32": np.int32, "i16": np.int16}
ULP = {"f32": 2.0**-23, "bf16": 2.0**-8}


# ---- tensors ----


def put(backend: _llmc.Backend, x: Any, dtype: str = "f32") -> _llmc.Tensor:
    """Return a tensor of the backend with the values of x, rounded to dtype."""
    x = np.ascontiguousarray(np.asarray(x).astype(NUMPY[dtype]))
    t = backend.empty(list(x.shape), dtype)
    t.from_host(x.view(np.uint16) if dtype == "bf16" else x)
    return t


def get(t: _llmc.Tensor) -> Array:
    """Return the values of a tensor as an array; bf16 as ml_dtypes.bfloat16."""
    x: Array = t.to_host()
    return x.view(ml_dtypes.bfloat16) if t.dtype == "bf16" else x


def nans(backend: _llmc.Backend, shape: Any, dtype: str = "f32") -> _llmc.Tensor:
    """Return a tensor of NaNs for a result: an element that the op does not write stays NaN."""
    return put(backend, np.full(shape, np.nan), dtype)


def rounded(x: Any, dtype: str) -> Array:
    """Return the values of x rounded to dtype, in float64."""
    return np.asarray(x).astype(NUMPY[dtype]).astype(np.float64)


# ---- tolerance ----


def error(x: Any, exact: Any) -> Array:
    """Measure the error of x in two ways, and return both.

    Returns:
        The 2-norm of the error relative to that of exact, and the largest error of an element relative to the largest element. Both
        are infinite if x has an element that is not finite.
    """
    x, exact = np.asarray(x).astype(np.float64), np.asarray(exact, np.float64)
    assert x.shape == exact.shape, f"shape {x.shape}, expected {exact.shape}"
    if not np.isfinite(x).all():
        return np.array([np.inf, np.inf])
    d = x - exact
    norm, largest = np.linalg.norm(exact), np.abs(exact).max(initial=0.0)
    return np.array([np.linalg.norm(d) / max(norm, 1e-30), np.abs(d).max(initial=0.0) / max(largest, 1e-30)])


def peers(formula: Callable[..., Any], *args: Any) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Return the formula's results in float64 and in float32.

    args: the formula's arguments; arrays hold values that the op's dtype represents exactly, because the op gets the same.
    """

    def run(dtype: type) -> tuple[Array, ...]:
        converted = [a.astype(dtype) if isinstance(a, np.ndarray) and a.dtype.kind == "f" else a for a in args]
        results = formula(*converted)
        return results if isinstance(results, tuple) else (results,)

    return run(np.float64), run(np.float32)


def check(results: dict[str, _llmc.Tensor | Array], formula: Callable[..., Any], *args: Any, ulps: int = 1) -> None:
    """Assert that an op's results agree with the formula's.

    Args:
        results: the op's results, or parts of them as arrays, by names for the message, in the order in which the formula returns them.
        formula: the formula.
        args: its arguments, as of peers().
        ulps: how many units in the last place are allowed beside twice the peer's error. It is 2 for ops that take exp of a
            difference (the rounding error of the difference is absolute, and the peer may happen to have none), and for results
            of so few elements that the peer's may happen to be exact.
    """
    exact, peer = peers(formula, *args)
    assert len(exact) == len(results)
    for (name, result), truth, other in zip(results.items(), exact, peer):
        values = get(result) if isinstance(result, _llmc.Tensor) else result
        dtype = "f32" if values.dtype == np.float32 else "bf16"
        allowed = 2 * error(rounded(other, dtype), truth) + ulps * ULP[dtype]
        found = error(values, truth)
        assert (found <= allowed).all(), f"{name}: error {found}, allowed {allowed}"


def complex_step(formula: Callable[[Array], Array], x: Array, dout: Array, h: float = 1e-30) -> Array:
    """Return the gradient of sum(dout * formula(x)) with respect to x, by the complex step."""
    z = x.astype(np.complex128)
    gradient = np.empty(x.shape)
    for i in np.ndindex(x.shape):
        z[i] += 1j * h
        gradient[i] = (dout * formula(z).imag).sum() / h
        z[i] = x[i]
    return gradient


# ---- formulas: arguments, results and their shapes are those of the ops in csrc/core/backend.h ----


def encoder(tokens: Array, wte: Array, wpe: Array, start: Array) -> Array:
    return wte[tokens] + wpe[start[:, None] + np.arange(tokens.shape[1])]


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


def _probabilities(q: Array, k: Array) -> tuple[Array, Array]:
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
    p, lse = _probabilities(q, k)
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
