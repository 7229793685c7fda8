"""A case of `llmc check`: an op, its operands, the exact results, and how far off each element may be.

Limits follow from the arithmetic, element by element:

    limit = unit(dtype) * |exact|  +  c * 2^-24 * scale

The first term is the rounding of the store: unit is 2^-24 for f32 and 2^-8 for bf16, half of a unit in the last place. The second is
that of the float32 arithmetic before it. The scale is what the op adds up, in absolute values (by Cauchy-Schwarz for matmuls, which have
too many), and c is a small number: sums in blocks, as of SIMD lanes and tensor cores, are off by some 2^-24 of that scale whatever
their length, while an element left out of a sum of 3072 is 2^-12 of it. Kernels that keep an intermediate result in bf16 are allowed its
rounding, which each formula says.

Inputs are rounded to the op's dtype first, so all formulas see what the op sees.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmc.selfcheck.formulas import Array
from llmc.values import VALUE_DTYPES

F32 = 2.0**-24
UNIT = {"f32": F32, "bf16": 2.0**-8, "i32": 0.0}
# A little more than the rounding itself, because what is rounded is not the exact value.
STORE = 1.02


@dataclass(frozen=True)
class Given:
    """An operand that the op reads. packed: weights_changed() names it first, so that its packed copy is used."""

    value: Array
    dtype: str
    packed: bool = False


@dataclass(frozen=True)
class Result:
    """An operand that the op writes, and what is right: |result - exact| <= limit for each element.

    before: its values beforehand; None for NaNs, so that an element that is not written is noticed. master: the position of the operand
    with the lower 16 bits of a bf16 weight; both together are the result. digits: the operand holds the digits of a number, as
    gradient_norm_squared writes them; the number is the result. slack: what an option's kernels may be off by besides, in
    units of a relative error by name: "tanh" of that of tanh, "sum" of that of a sum in bf16 which is rounded before it is added to.
    """

    name: str
    exact: Array
    limit: Array | float
    dtype: str
    before: Array | None = None
    master: int | None = None
    digits: bool = False
    slack: dict[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Same:
    """An operand that is the same tensor as the one at position `of`, for ops that work in place."""

    of: int


Operand = Given | Result | Same | None


@dataclass(frozen=True)
class Case:
    """An op with all its arguments. real: a size of 124M's, too large for a device that is emulated."""

    op: str
    dtype: str
    size: str
    operands: list[Operand]
    scalars: list[Any] = field(default_factory=list)
    real: bool = False


class Draw:
    """What draws operands of one dtype by one generator, and makes cases of them."""

    def __init__(self, dtype: str, seed: int) -> None:
        self.dtype, self.unit = dtype, UNIT[dtype]
        self.rng = np.random.default_rng([seed, len(dtype)])

    # ---- parts of cases ----

    def random(self, *shape: int, scale: float = 1.0, dtype: str | None = None) -> Array:
        """Return normal random numbers that the dtype represents exactly, as float64."""
        x = (scale * self.rng.standard_normal(shape, dtype=np.float32)).astype(VALUE_DTYPES[dtype or self.dtype])
        return x.astype(np.float64)

    def given(self, value: Array, packed: bool = False) -> Given:
        return Given(value, self.dtype, packed)

    def result(self, name: str, exact: Array, scale: Any, c: float = 8, extra: Any = 0.0, dtype: str | None = None,
               before: Array | None = None) -> Result:  # fmt: skip
        """Return a result with the limit that the module's docstring states, and `extra`."""
        dtype = dtype or self.dtype
        limit = STORE * UNIT[dtype] * np.abs(exact) + c * F32 * scale + extra
        return Result(name, exact, limit, dtype, before)

    def case(self, op: str, size: str, *operands: Operand, scalars: Any = (), real: bool = False) -> Case:
        return Case(op, self.dtype, size, list(operands), list(scalars), real)

    def gradient_dtypes(self) -> tuple[str, ...]:
        return ("f32",) if self.dtype == "f32" else ("bf16", "f32")

    def rounded_factors(self, a: Array, b: Array) -> Array:
        """Return what a @ b is off by if a is rounded to bf16 first: by 5 standard deviations, each factor's error having half a unit."""
        if self.dtype == "f32":
            return np.zeros((*a.shape[:-1], b.shape[-1]))
        return np.asarray(2.5 * self.unit * np.sqrt((a * a) @ (b * b)))


def norms(x: Array, axis: int) -> Array:
    """Return the 2-norms of rows (axis 1) or columns (axis 0)."""
    result: Array = np.sqrt(np.square(x).sum(axis))
    return result
