"""Running the cases of `llmc check` on a backend, and judging what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc import _llmc
from llmc.formats.state_file import join_master
from llmc.selfcheck.cases import Case, Given, Result
from llmc.selfcheck.formulas import Array
from llmc.values import MEMORY_DTYPES, VALUE_DTYPES


@dataclass(frozen=True)
class Outcome:
    """One result of one case, or of a whole step, beside what is right.

    Attributes:
        op, dtype, size: of the case.
        kernel: the kernel set or the option by which it was computed.
        result: the name of the result.
        error, limit: of the element that is worst beside its limit. The error is infinite if an element is not a number, and if the op
            raised an exception.
        ratio: error over limit; above 1 the kernel is wrong.
        note: the exception, in words.
        fatal: the device takes no more calls, so nothing that comes later could tell anything.
    """

    op: str
    kernel: str
    dtype: str
    size: str
    result: str
    error: float
    limit: float
    ratio: float
    note: str = ""
    fatal: bool = False

    @property
    def ok(self) -> bool:
        """Whether the result is right; never if it is NaN."""
        return self.ratio <= 1

    def __str__(self) -> str:
        what = self.note or f"{self.result} is off by {self.error:.1e}, where {self.limit:.1e} is allowed"
        return f"{self.op} ({self.kernel}, {self.dtype}, {self.size}): {what}"


def run_case(backend: Any, case: Case, kernel: str) -> list[Outcome]:
    """Run a case on a backend.

    Args:
        backend: an _llmc.Backend.
        case: what to run.
        kernel: what to call the kernels that the backend uses.

    Returns:
        An outcome for each result; a single one if the op raised an exception.
    """
    try:
        tensors = _tensors(backend, case)
        call_op(backend, case.op, tensors, case.scalars)
        results = [(o, _values(tensors, i, o)) for i, o in enumerate(case.operands) if isinstance(o, Result)]
    except Exception as e:  # whatever it is, the other kernels are still checked, if the device still works
        return [failed(backend, case.op, kernel, case.dtype, case.size, e)]
    return [judged(case.op, kernel, case.dtype, case.size, o.name, x, o.exact, o.limit) for o, x in results]


def call_op(backend: Any, op: str, tensors: list[_llmc.Tensor | None], scalars: list[Any]) -> None:
    """Call an op with its tensors, in the order of its declaration, and its scalars.

    Those of adamw_many are param, master, m, v and grad of one parameter after another, and factor; and the step, and each
    parameter's weight decay.
    """
    call = getattr(backend, op)
    if op == "adamw_many":
        step, *decays = scalars
        operands = []
        for i, decay in enumerate(decays):
            param, master, m, v, grad = tensors[5 * i : 5 * i + 5]
            operands.append(_llmc.AdamWOperands(param, master, m, v, grad, decay))
        call(operands, tensors[-1], step)
    elif op == "gradient_norm_squared":
        call(tensors[0], tensors[1:])
    else:
        call(*tensors, *scalars)


def number_of(digits: Array) -> float:
    """Return the number whose digits gradient_norm_squared has written."""
    places = 16.0 * (np.arange(_llmc.NORM_DIGITS) - _llmc.UNIT_DIGIT)
    return float((digits * 2.0**places).sum())


def judged(op: str, kernel: str, dtype: str, size: str, result: str, x: Any, exact: Any, limit: Any) -> Outcome:
    """Return the outcome of a result x, whose every element may differ from `exact` by at most `limit`."""
    x, exact = np.asarray(x, np.float64), np.asarray(exact, np.float64)
    if x.shape != exact.shape:
        raise ValueError(f"{op}: {result} has shape {x.shape}, expected {exact.shape}")
    limit = np.broadcast_to(np.asarray(limit, np.float64), exact.shape)
    error = np.abs(x - exact)
    error[~np.isfinite(x)] = np.inf
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(error == 0, 0.0, error / limit)
    at = int(ratio.argmax())
    return Outcome(op, kernel, dtype, size, result, float(error.flat[at]), float(limit.flat[at]), float(ratio.flat[at]))


def failed(backend: Any | None, op: str, kernel: str, dtype: str, size: str, error: BaseException) -> Outcome:
    """Return the outcome of an op that raised an exception.

    Args:
        backend: is asked whether it still works.
        op, kernel, dtype, size: of the outcome.
        error: the exception.

    Raises:
        MemoryError: if memory was too small, which says nothing of the kernel.
    """
    if isinstance(error, MemoryError) or "out of memory" in str(error):
        why = str(error) or "no more memory"
        raise MemoryError(f"there is not enough memory to check {op} ({kernel}, {dtype}, {size}): {why}") from error
    fatal = False
    try:
        if backend is not None:
            backend.synchronize()
    except _llmc.Error:  # as after an illegal access to memory of a GPU
        fatal = True
    return Outcome(op, kernel, dtype, size, "", np.inf, 0.0, np.inf, f"{type(error).__name__}: {error}", fatal)


def put(backend: Any, x: Any, dtype: str) -> _llmc.Tensor:
    """Return a tensor of the backend with the values of x, which the dtype represents exactly."""
    kind = VALUE_DTYPES.get(dtype, MEMORY_DTYPES[dtype])
    tensor: _llmc.Tensor = backend.empty(list(np.shape(x)), dtype)
    tensor.from_host(np.ascontiguousarray(np.asarray(x).astype(kind, copy=False)).view(MEMORY_DTYPES[dtype]))
    return tensor


def get(tensor: _llmc.Tensor) -> Array:
    """Return the values of a tensor."""
    return tensor.to_host().view(VALUE_DTYPES.get(tensor.dtype, MEMORY_DTYPES[tensor.dtype]))


def _tensors(backend: Any, case: Case) -> list[_llmc.Tensor | None]:
    tensors: list[_llmc.Tensor | None] = []
    for o in case.operands:
        if isinstance(o, Given):
            tensor = put(backend, o.value, o.dtype)
            if o.packed:
                backend.weights_changed(tensor)
            tensors.append(tensor)
        elif isinstance(o, Result):
            before = np.full(np.shape(o.exact), np.nan) if o.before is None else o.before
            tensors.append(put(backend, before, o.dtype))
        else:
            tensors.append(None if o is None else tensors[o.of])
    return tensors


def _values(tensors: list[_llmc.Tensor | None], at: int, result: Result) -> Array:
    tensor, master = tensors[at], None if result.master is None else tensors[result.master]
    assert tensor is not None
    if result.digits:
        return np.array([number_of(get(tensor))])
    return get(tensor) if master is None else join_master(tensor.to_host(), master.to_host())
