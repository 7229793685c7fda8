"""The formula of every op in NumPy, and how far from it a result may be.

Forward formulas take any floating dtype, complex ones too, and make no branch on a value, so that the complex step
gives their gradients to the last bit: Im f(x + ih) / h with h = 1e-30 has no cancellation (Squire & Trapp 1998).
The gradient formulas below are the fast ones, for real sizes; tests/test_oracle.py holds them to the complex step.

Evaluated in float64 a formula is the truth. Evaluated in float32, and rounded to the dtype where an op stores, it is
the peer: a result may be twice as far from the truth as its peer, plus one unit in the last place of the largest
element.
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
    """A tensor of the values of x, rounded to dtype."""
    x = np.ascontiguousarray(np.asarray(x).astype(NUMPY[dtype]))
    t = backend.empty(list(x.shape), dtype)
    t.from_host(x.view(np.uint16) if dtype == "bf16" else x)
    return t


def get(t: _llmc.Tensor) -> Array:
    """The values of a tensor; bf16 as ml_dtypes.bfloat16."""
    x: Array = t.to_host()
    return x.view(ml_dtypes.bfloat16) if t.dtype == "bf16" else x


def nans(backend: _llmc.Backend, shape: Any, dtype: str = "f32") -> _llmc.Tensor:
    """A place for a result: an element that the op does not write shows."""
    return put(backend, np.full(shape, np.nan), dtype)


def rounded(x: Any, dtype: str) -> Array:
    """x as dtype holds it, in float64."""
    return np.asarray(x).astype(NUMPY[dtype]).astype(np.float64)


# ---- tolerance ----


def error(x: Any, exact: Any) -> Array:
    """Of the whole (relative, in the 2-norm) and of the worst element (relative to the largest)."""
    x, exact = np.asarray(x).astype(np.float64), np.asarray(exact, np.float64)
    assert x.shape == exact.shape, f"shape {x.shape}, expected {exact.shape}"
    if not np.isfinite(x).all():
        return np.array([np.inf, np.inf])
    d = x - exact
    norm, largest = np.linalg.norm(exact), np.abs(exact).max(initial=0.0)
    return np.array([np.linalg.norm(d) / max(norm, 1e-30), np.abs(d).max(initial=0.0) / max(largest, 1e-30)])


def peers(formula: Callable[..., Any], *args: Any) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """The formula's results in float64 and in float32. Arguments are values that the op's dtype holds exactly."""

    def run(dtype: type) -> tuple[Array, ...]:
        converted = [a.astype(dtype) if isinstance(a, np.ndarray) and a.dtype.kind == "f" else a for a in args]
        results = formula(*converted)
        return results if isinstance(results, tuple) else (results,)

    return run(np.float64), run(np.float32)


def check(results: dict[str, _llmc.Tensor], formula: Callable[..., Any], *args: Any, ulps: int = 1) -> None:
    """Holds the op's results to the formula's, in order: each no further from float64 than twice its peer, and `ulps` ulps.

    ulps is 2 where a difference goes through exp, whose rounding is an absolute one, which a peer's may happen not to be; and where
    a result has so few elements that its peer's may happen to be exact.
    """
    exact, peer = peers(formula, *args)
    assert len(exact) == len(results)
    for (name, tensor), truth, other in zip(results.items(), exact, peer):
        allowed = 2 * error(rounded(other, tensor.dtype), truth) + ulps * ULP[tensor.dtype]
        found = error(get(tensor), truth)
        assert (found <= allowed).all(), f"{name}: error {found}, allowed {allowed}"


def complex_step(formula: Callable[[Array], Array], x: Array, dout: Array, h: float = 1e-30) -> Array:
    """The gradient of sum(dout * formula(x)) by x."""
    z = x.astype(np.complex128)
    gradient = np.empty(x.shape)
    for i in np.ndindex(x.shape):
        z[i] += 1j * h
        gradient[i] = (dout * formula(z).imag).sum() / h
        z[i] = x[i]
    return gradient


# ---- formulas ----


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
    with np.errstate(over="ignore"):  # 1 / inf is the 0 that is wanted
        return 1 / (1 + np.exp(-x))


_GELU = 2 * math.sqrt(2 / math.pi)


def gelu(x: Array) -> Array:
    """x/2 (1 + tanh(u/2)), written as x sigmoid(u): 1 + tanh cancels at negative x, in float64 too."""
    return x * _sigmoid(_GELU * (x + 0.044715 * x * x * x))


def gelu_gradient(x: Array, dout: Array) -> Array:
    u = _GELU * (x + 0.044715 * x * x * x)
    return dout * (_sigmoid(u) + x * _sigmoid(u) * _sigmoid(-u) * _GELU * (1 + 3 * 0.044715 * x * x))


def heads(x: Array, NH: int) -> Array:
    """(B, T, C) -> (B, NH, T, HS)"""
    B, T, C = x.shape
    return x.reshape(B, T, NH, C // NH).transpose(0, 2, 1, 3)


def merge(x: Array) -> Array:
    """(B, NH, T, HS) -> (B, T, C)"""
    B, NH, T, HS = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B, T, NH * HS)


def _probabilities(q: Array, k: Array) -> tuple[Array, Array]:
    """Of T queries that are the last of S positions; and the log-sum-exp of their scores."""
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
    """From what forward kept, as a backward pass has it."""
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
