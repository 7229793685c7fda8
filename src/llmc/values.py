"""Values that many modules take: names of dtypes, seeds."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

# NumPy's dtypes of the names that canonical_dtype returns.
NUMPY_DTYPES: dict[str, np.dtype[Any]] = {"f32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16)}

_DTYPES = {
    "f32": "f32",
    "fp32": "f32",
    "float32": "f32",
    "bf16": "bf16",
    "bfloat16": "bf16",
}


def canonical_dtype(name: str) -> str:
    """'f32' or 'bf16' for any of their usual names; ValueError for another."""
    try:
        return _DTYPES[name]
    except KeyError:
        raise ValueError(f"unknown dtype '{name}': expected one of {', '.join(_DTYPES)}") from None


def check_seed(seed: int, bits: int, lowest: int = 0) -> None:
    """ValueError where a seed does not fit its generator."""
    if not lowest <= seed < 2**bits:
        raise ValueError(f"seed is {seed}, expected {lowest} to 2^{bits} - 1")
