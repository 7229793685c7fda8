"""How far an op's result may be from its formula (llmc.selfcheck.formulas), and what judges the formulas themselves.

Forward formulas take complex numbers too, so the complex step gives their gradients to the last bit: Im f(x + ih) / h with h = 1e-30
has no cancellation (Squire & Trapp 1998). It is slow, so there are formulas of gradients too, and tests/ops/test_oracle.py compares
them with the complex step.

A formula evaluated in float64 is the truth. Evaluated in float32, and rounded to the op's dtype at the end, it is the peer. An op's
result may be twice as far from the truth as the peer is, plus one unit in the last place of the largest element.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from llmc import _llmc
from llmc.selfcheck.formulas import *  # noqa: F403
from llmc.selfcheck.formulas import Array

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
