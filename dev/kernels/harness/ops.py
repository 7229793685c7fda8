"""The ops of this folder, their versions, and arrays as kernels take them."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from llmc.values import MEMORY_DTYPES, VALUE_DTYPES

FOLDER = Path(__file__).resolve().parents[1]
ROOT = FOLDER.parents[1]

Arrays = dict[str, Any]  # by name: NumPy arrays as they lie in memory (bf16 as uint16), and floats


class KernelError(Exception):
    """A version that does not compile, does not fit its op, or failed on the device."""


# ---- ops and their versions ----


@dataclasses.dataclass(frozen=True)
class Version:
    """One file of an op's folder."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def op(self) -> str:
        return self.path.parent.name

    @property
    def dtype(self) -> str:
        """Return what its arrays hold: 'bf16' if its name says so, else 'f32'."""
        return "bf16" if "bf16" in self.name.split("_") else "f32"

    @property
    def source(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @property
    def title(self) -> str:
        """Return the first line of its comment."""
        return self.source.split("\n", 1)[0].removeprefix("//").strip()

    @property
    def flags(self) -> list[str]:
        """Return what a line `// flags: ...` adds to the compiler's."""
        return [flag for line in re.findall(r"^// flags:(.*)$", self.source, re.MULTILINE) for flag in line.split()]

    @property
    def needs(self) -> list[str]:
        """Return what a line `// needs: ...` says: macros that the compiler defines if the CPU has the instructions, or a GPU's arch."""
        return [need for line in re.findall(r"^// needs:(.*)$", self.source, re.MULTILINE) for need in line.split()]

    @property
    def number(self) -> int:
        number = self.name.split("_")[1]
        if not number.isdecimal():
            raise KernelError(
                f"{self.op}/{self.path.name}: expected a number behind the device, as in {self.name.partition('_')[0]}_1_naive"
            )
        return int(number)


class Op:
    """An op: its folder, and what its op.py says.

    op.py has:
        SHAPE: sizes by name, in the order in which kernels take them; SMALL: a list of such, for checks; GPU_SHAPE, if there: sizes that
            differ on a GPU, for which SHAPE is too small.
        OUTPUTS: the names of the outputs, in the order in which kernels take them, with their sizes: names, or products as "3*NH". An
            output that is also an input starts from that input's values (it is added to, or computed in place); others start as NaNs.
        F32: names of arrays that stay f32 in versions for bf16.
        inputs(rng, **shape): the inputs by name, in the order in which kernels take them: arrays of floats or integers, and floats.
        oracle(**inputs): the outputs, in float64.
        limit(name, dtype): the error of an output that is allowed.
        flops(**shape): the operations that the formula needs.
        llmc(backend, tensors, shape), numpy(arrays, shape), torch(tensors, shape): the same by others; any may be absent. The
            last two return outputs by name.
        TORCH: the dtypes for which PyTorch is asked, if not both.
    """

    def __init__(self, name: str) -> None:
        self.name, self.folder = name, FOLDER / name
        self.module = _module(self.folder / "op.py")
        self.shape: dict[str, int] = self.module.SHAPE
        self.small: list[dict[str, int]] = self.module.SMALL
        self.outputs: dict[str, tuple[str, ...]] = self.module.OUTPUTS

    @property
    def title(self) -> str:
        return str(self.module.__doc__).split("\n", 1)[0]

    def shape_on(self, device: str) -> dict[str, int]:
        """Return the sizes at which the op is timed."""
        return {**self.shape, **(getattr(self.module, "GPU_SHAPE", {}) if device == "cuda" else {})}

    def versions(self, device: str = "cpu", names: Sequence[str] | None = None) -> list[Version]:
        """Return the versions for a device, by their numbers. names: only these, in full or by numbers: ["cpu_1"]."""
        suffix, prefix = (".cpp", "cpu_") if device == "cpu" else (".cu", "cuda_")
        found = sorted(map(Version, self.folder.glob(f"{prefix}*{suffix}")), key=lambda v: (v.number, v.name))
        return [v for v in found if names is None or any(f"{v.name}_".startswith(f"{name}_") for name in names)]

    def version(self, name: str) -> Version:
        """Return the version of that name, or number: "cpu_1"."""
        for device in ("cpu", "cuda"):
            for version in self.versions(device, [name]):
                return version
        raise KernelError(f"{self.name} has no version '{name}'")

    def inputs(self, shape: Mapping[str, int], dtype: str, seed: int) -> Arrays:
        """Return random inputs as they lie in memory."""
        values: dict[str, Any] = self.module.inputs(np.random.default_rng(seed), **shape)
        return {k: stored(v, self.dtype_of(k, dtype)) if isinstance(v, np.ndarray) else v for k, v in values.items()}

    def dtype_of(self, name: str, dtype: str) -> str:
        return "f32" if name in self.module.F32 else dtype

    def output_arrays(self, inputs: Arrays, shape: Mapping[str, int], dtype: str) -> Arrays:
        """Return arrays for the outputs: copies of the inputs that they start from, or NaNs."""
        arrays: Arrays = {}
        for name, sizes in self.outputs.items():
            kind = self.dtype_of(name, dtype)
            array = aligned(tuple(_product(size, shape) for size in sizes), MEMORY_DTYPES[kind])
            array[...] = inputs[name] if name in inputs else stored(np.full((), np.nan), kind)
            arrays[name] = array
        return arrays

    def truth(self, inputs: Arrays, dtype: str) -> dict[str, np.ndarray]:
        """Return the outputs in float64, of the values that the inputs really have."""
        exact = {
            k: values_of(v, self.dtype_of(k, dtype)) if isinstance(v, np.ndarray) else v for k, v in inputs.items()
        }
        results = self.module.oracle(**exact)
        return dict(zip(self.outputs, results if isinstance(results, tuple) else (results,), strict=True))

    def errors(
        self, results: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray], dtype: str
    ) -> dict[str, float]:
        """Return the error of each output as a share of what is allowed, infinite if anything is not finite."""
        return {
            name: _error(values_of(array, self.dtype_of(name, dtype)), truth[name]) / self.module.limit(name, dtype)
            for name, array in results.items()
        }

    def bytes(self, inputs: Arrays, outputs: Arrays) -> int:
        """Return the bytes of all inputs and outputs."""
        return sum(a.nbytes for a in [*inputs.values(), *outputs.values()] if isinstance(a, np.ndarray))

    def signature(self, inputs: Arrays, dtype: str) -> str:
        """Return what `run` of a version has to look like."""

        def of(name: str, const: str) -> str:
            value = inputs.get(name)
            if value is not None and not isinstance(value, np.ndarray):
                return f"float {name}"
            if value is not None and value.dtype == np.int32:
                return f"{const}int32_t* {name}"
            return f"{const}{'float' if self.dtype_of(name, dtype) == 'f32' else 'bf16'}* {name}"

        read = [name for name in inputs if name not in self.outputs]
        return ", ".join(
            [of(n, "") for n in self.outputs] + [of(n, "const ") for n in read] + [f"int64_t {n}" for n in self.shape]
        )


@functools.cache
def find_op(name: str) -> Op:
    """Return the op of that name."""
    if not (FOLDER / name / "op.py").is_file():
        raise KernelError(f"there is no op '{name}': expected one of {', '.join(op_names())}")
    return Op(name)


def op_names(prefix: str = "all") -> list[str]:
    """Return the names of all ops, or of those that begin with a prefix."""
    names = sorted(path.parent.name for path in FOLDER.glob("*/op.py"))
    return [name for name in names if prefix == "all" or name.startswith(prefix)]


def _product(size: str, shape: Mapping[str, int]) -> int:
    return math.prod(shape[factor] if factor in shape else int(factor) for factor in size.split("*"))


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"kernels_{path.parent.name}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def source(path: str | Path, function: str | None = None) -> str:
    """Return the text of a file of the repository, or of a function of it, for the text of a tutorial.

    path: from the root of the repository. function: its name; the lines from the comment above it to its closing brace.
    """
    text = (ROOT / path).read_text(encoding="utf-8")
    if function is None:
        return text
    lines = text.split("\n")
    start = rf"[^\s#/}}].*\b{re.escape(function)}\("
    # Of a kernel with launch bounds, the name may stand on the next line.
    found = [
        i
        for i, line in enumerate(lines)
        if not line.endswith(";")
        and (
            re.match(start, line)
            or (lines[i - 1].startswith("__global__") and re.match(rf"\s+{re.escape(function)}\(", line))
        )
    ]
    if not found:
        raise KernelError(f"{path} has no function '{function}'")
    begin = end = found[0]
    while begin > 0 and re.match(r"//|template|__global__", lines[begin - 1]):
        begin -= 1
    while lines[end].rstrip() != "}" and not (end == found[0] and lines[end].rstrip().endswith("}")):
        end += 1
    return "\n".join(lines[begin : end + 1])


# ---- arrays ----

_GUARD = 64  # bytes before and after an output: a version must leave them as they are


def aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Return an array at a multiple of 64 bytes, a cache line, with guards around it."""
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.full(size + 3 * _GUARD, 0xA5, np.uint8)
    begin = _GUARD + -memory.ctypes.data % 64
    return memory[begin : begin + size].view(dtype).reshape(shape)


def guards_are_whole(array: np.ndarray) -> bool:
    memory = array
    while isinstance(memory.base, np.ndarray):
        memory = memory.base
    begin = array.ctypes.data - memory.ctypes.data
    return bool((memory[:begin] == 0xA5).all() and (memory[begin + array.nbytes :] == 0xA5).all())


def stored(x: np.ndarray, dtype: str) -> np.ndarray:
    """Return numbers as they lie in memory: floats rounded to f32, or to bf16 as their 16 bits; integers as int32."""
    kind = np.dtype(np.int32) if x.dtype.kind == "i" else VALUE_DTYPES[dtype]
    memory = np.dtype(np.int32) if x.dtype.kind == "i" else MEMORY_DTYPES[dtype]
    array = aligned(x.shape, memory)
    array[...] = x.astype(kind).view(memory)
    return array


def values_of(x: np.ndarray, dtype: str) -> np.ndarray:
    """Return in float64 what stored() stored."""
    if x.dtype == np.uint16:
        return x.view(ml_dtypes.bfloat16).astype(np.float64)
    return x if x.dtype == np.int32 else x.astype(np.float64)


def _error(x: np.ndarray, truth: np.ndarray) -> float:
    if x.shape != truth.shape:
        raise KernelError(f"an output has shape {x.shape}, expected {truth.shape}")
    if not (np.isfinite(x).all() and np.isfinite(truth).all()):
        return float("inf")
    largest = np.abs(x - truth).max(initial=0.0) / max(np.abs(truth).max(initial=0.0), 1e-30)
    norm = np.linalg.norm(x - truth) / max(np.linalg.norm(truth), 1e-30)
    return float(max(largest, norm))
