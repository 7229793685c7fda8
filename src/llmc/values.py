"""Values that many modules take: dtypes by name and in NumPy, seeds; names that are not known; how counts and bytes are shown."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np

_DTYPES = {
    "f32": "f32",
    "fp32": "f32",
    "float32": "f32",
    "bf16": "bf16",
    "bfloat16": "bf16",
}

# The NumPy dtype of an array of values, by _llmc's name of the dtype.
VALUE_DTYPES: dict[str, np.dtype[Any]] = {"f32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16)}

# The NumPy dtype in which _llmc.Tensor hands out and takes its memory: bf16 as its 16 bits, because pybind11 knows no bfloat16.
MEMORY_DTYPES: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "bf16": np.dtype(np.uint16),
    "i32": np.dtype(np.int32),
    "i16": np.dtype(np.int16),
}


def canonical_dtype(name: str) -> str:
    """Return 'f32' or 'bf16' for any usual name of the two, as 'float32'.

    Raises:
        ValueError: if the name is another.
    """
    try:
        return _DTYPES[name]
    except KeyError:
        raise ValueError(f"unknown dtype '{name}': expected one of {', '.join(_DTYPES)}") from None


def counted(number: int, noun: str) -> str:
    """Return "1 step", or "2,000 steps"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def decimal_bytes(count: float) -> str:
    """Return a number of bytes in the unit, from bytes to GB, that makes it easy to read."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:.0f} bytes"


def check_seed(seed: int, bits: int, lowest: int = 0) -> None:
    """Check that a random generator whose seed has so many bits can take this seed.

    Args:
        seed: the seed.
        bits: size of the generator's seed: 32 or 64.
        lowest: the smallest seed that the generator takes; 1 if 0 would make it stand still.

    Raises:
        TypeError: if the seed is no integer.
        ValueError: if the seed is less than lowest or needs more bits.
    """
    if not isinstance(seed, (int, np.integer)):
        raise TypeError(f"seed is {seed!r}, expected a whole number")
    if not lowest <= seed < 2**bits:
        raise ValueError(f"seed is {seed}, expected {lowest} to 2^{bits} - 1")


def check_number(name: str, value: Any) -> None:
    """Check that value is a number.

    Args:
        name: what an error calls it.

    Raises:
        TypeError: if it is none.
    """
    if not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} is {value!r}, expected a number")


def check_whole(name: str, value: Any, least: int, most: int = 2**31 - 1) -> int:
    """Return value, a whole number from least to most.

    Args:
        name: what an error calls it.

    Raises:
        TypeError: if it is no integer.
        ValueError: if it is out of its range.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} is {value!r}, expected a whole number")
    if not least <= value <= most:
        raise ValueError(f"{name} is {value}, expected {least} to {most}")
    return int(value)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return, for an error, the question which of the known names is meant by another: "; did you mean --layers?". Empty: none.

    Names are meant that differ in dashes, underscores and capital letters alone; else those that have it as a word (--steps:
    --max-steps, ...) or whose words begin with its letters (--lr: --learning-rate); else the one that is most like it.
    """
    names = [n for n in known if not n.startswith("--no-")]
    asked = re.sub("[-_]", "", name).lower()
    if name.startswith("-") and len(asked) == 1:
        return ""
    found = [n for n in names if re.sub("[-_]", "", n).lower() == asked]
    if not found:
        words = {n: re.findall("[^-_]+", n) for n in names if not re.match("-[^-]", n)}
        found = [n for n, w in words.items() if asked in w or (len(w) > 1 and asked == "".join(part[0] for part in w))]
    found = found or difflib.get_close_matches(name, names, 1)
    return f"; did you mean {' or '.join(found)}?" if found else ""
