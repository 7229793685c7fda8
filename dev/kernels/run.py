"""Checks the kernels of this folder and times them: the versions of an op beside each other, from naive to fast.

    python dev/kernels/run.py layernorm                        # all ops whose names begin so, on the CPU
    python dev/kernels/run.py layernorm_forward --device cuda  # on a GPU
    python dev/kernels/run.py gelu --device emulated           # CUDA kernels on a CPU: checked, not timed
    python dev/kernels/run.py matmul --versions cpu_1 cpu_5 --shape N=256 --threads 1
    python dev/kernels/run.py all --check                      # small and odd shapes alone, nothing is timed
    python dev/kernels/run.py layernorm --device cuda --build --arch sm_90     # compile only: registers and spills

A folder is an op; its op.py says what the op computes (README.md). Each version is compiled by itself: by the system's C++ compiler
($CXX), by nvcc ($NVCC), or for the emulated device by the C++ compiler. Then it is checked: random operands, outputs full of NaNs,
shapes whose sizes are odd, and the op's formula in float64, from which no element of an output may be farther than op.py allows. Then
versions are timed in turns; the table has medians. The last lines are other libraries, and llmc's own op.

Columns: error is the largest, relative to the largest element of the output, or the norm of all relative to the output's norm, if that is
larger, as a share of what op.py allows; GFLOP/s by the operations that the formula needs, GB/s
by reading each input and writing each output once, whatever a version really does. The lines above a table are what the machine reaches
at most.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import ctypes
import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from llmc import _llmc
from llmc.values import MEMORY_DTYPES, VALUE_DTYPES

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from common import machine, machine_line, measured_ceilings, print_table

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
BUILD = ROOT / "build" / "kernels"

DEVICES = ("cpu", "cuda", "emulated")
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
        return int(self.name.split("_")[1])


class Op:
    """An op: its folder, and what its op.py says.

    op.py has:
        SHAPE: sizes by name, in the order in which kernels take them; SMALL: a list of such, for checks; CUDA, if there: sizes that
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
        self.gpu_shape: dict[str, int] = self.shape | getattr(self.module, "GPU_SHAPE", {})
        self.small: list[dict[str, int]] = self.module.SMALL
        self.outputs: dict[str, tuple[str, ...]] = self.module.OUTPUTS

    @property
    def title(self) -> str:
        return str(self.module.__doc__).split("\n", 1)[0]

    def shape_on(self, device: str) -> dict[str, int]:
        """Return the sizes at which the op is timed."""
        return {**self.shape, **(getattr(self.module, "CUDA", {}) if device == "cuda" else {})}

    def versions(self, device: str = "cpu", names: Sequence[str] | None = None) -> list[Version]:
        """Return the versions for a device, by their numbers. names: only those whose names begin with one of these."""
        suffix, prefix = (".cpp", "cpu_") if device == "cpu" else (".cu", "cuda_")
        found = sorted(map(Version, self.folder.glob(f"{prefix}*{suffix}")), key=lambda v: v.number)
        return [v for v in found if names is None or any(f"{v.name}_".startswith(f"{name}_") for name in names)]

    def version(self, name: str) -> Version:
        """Return the one version whose name is `name`, or begins with it: "cpu_1"."""
        for device in ("cpu", "cuda"):
            for version in self.versions(device, [name]):
                return version
        raise KernelError(f"{self.name} has no version '{name}'")

    def inputs(self, shape: Mapping[str, int], dtype: str, seed: int) -> Arrays:
        """Return random inputs as they lie in memory."""
        values: dict[str, Any] = self.module.inputs(np.random.default_rng(seed), **shape)
        return {k: _stored(v, self.dtype_of(k, dtype)) if isinstance(v, np.ndarray) else v for k, v in values.items()}

    def dtype_of(self, name: str, dtype: str) -> str:
        return "f32" if name in self.module.F32 else dtype

    def output_arrays(self, inputs: Arrays, shape: Mapping[str, int], dtype: str) -> Arrays:
        """Return arrays for the outputs: copies of the inputs that they start from, or NaNs."""
        arrays: Arrays = {}
        for name, sizes in self.outputs.items():
            kind = self.dtype_of(name, dtype)
            array = _aligned(tuple(_product(size, shape) for size in sizes), MEMORY_DTYPES[kind])
            array[...] = inputs[name] if name in inputs else _stored(np.full((), np.nan), kind)
            arrays[name] = array
        return arrays

    def truth(self, inputs: Arrays, dtype: str) -> dict[str, np.ndarray]:
        """Return the outputs in float64, of the values that the inputs really have."""
        exact = {k: _values(v, self.dtype_of(k, dtype)) if isinstance(v, np.ndarray) else v for k, v in inputs.items()}
        results = self.module.oracle(**exact)
        return dict(zip(self.outputs, results if isinstance(results, tuple) else (results,), strict=True))

    def errors(
        self, results: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray], dtype: str
    ) -> dict[str, float]:
        """Return the error of each output as a share of what is allowed, infinite for one that is not finite."""
        return {
            name: _error(_values(array, self.dtype_of(name, dtype)), truth[name]) / self.module.limit(name, dtype)
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
    found = [i for i, line in enumerate(lines) if re.match(start, line) and not line.endswith(";")]
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


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Return an array at a multiple of 64 bytes, a cache line, with guards around it."""
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.full(size + 3 * _GUARD, 0xA5, np.uint8)
    begin = _GUARD + -memory.ctypes.data % 64
    return memory[begin : begin + size].view(dtype).reshape(shape)


def _guards_are_whole(array: np.ndarray) -> bool:
    memory = array
    while isinstance(memory.base, np.ndarray):
        memory = memory.base
    begin = array.ctypes.data - memory.ctypes.data
    return bool((memory[:begin] == 0xA5).all() and (memory[begin + array.nbytes :] == 0xA5).all())


def _stored(x: np.ndarray, dtype: str) -> np.ndarray:
    """Return numbers as they lie in memory: floats rounded to f32, or to bf16 as their 16 bits; integers as int32."""
    kind = np.dtype(np.int32) if x.dtype.kind == "i" else VALUE_DTYPES[dtype]
    memory = np.dtype(np.int32) if x.dtype.kind == "i" else MEMORY_DTYPES[dtype]
    array = _aligned(x.shape, memory)
    array[...] = x.astype(kind).view(memory)
    return array


def _values(x: np.ndarray, dtype: str) -> np.ndarray:
    """Return in float64 what _stored() stored."""
    if x.dtype == np.uint16:
        return x.view(ml_dtypes.bfloat16).astype(np.float64)
    return x if x.dtype == np.int32 else x.astype(np.float64)


def _error(x: np.ndarray, truth: np.ndarray) -> float:
    if x.shape != truth.shape:
        raise KernelError(f"an output has shape {x.shape}, expected {truth.shape}")
    if not np.isfinite(x).all():
        return float("inf")
    largest = np.abs(x - truth).max(initial=0.0) / max(np.abs(truth).max(initial=0.0), 1e-30)
    norm = np.linalg.norm(x - truth) / max(np.linalg.norm(truth), 1e-30)
    return float(max(largest, norm))


# ---- compiling ----


@functools.cache
def cxx() -> str:
    """Return the C++ compiler."""
    for name in filter(None, [os.environ.get("CXX"), "c++", "g++", "clang++"]):
        if path := shutil.which(name):
            return path
    raise KernelError("no C++ compiler was found: install g++ or clang++, or name one by CXX=...")


@functools.cache
def nvcc() -> str:
    """Return CUDA's compiler."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    for name in filter(None, [os.environ.get("NVCC"), "nvcc", str(home / "bin" / "nvcc")]):
        if path := shutil.which(name):
            return path
    raise KernelError("no nvcc was found: install the CUDA toolkit, name one by NVCC=..., or use --device emulated")


@functools.cache
def _accepted(*flags: str) -> bool:
    """Return whether the C++ compiler can make a program with these flags."""
    command = [cxx(), *flags, "-x", "c++", "-", "-o", os.devnull]
    return subprocess.run(command, input="int main() {}", capture_output=True, text=True).returncode == 0


@functools.cache
def _cpu_flags() -> list[str]:
    flags = ["-std=c++20", "-ffp-contract=fast", "-fno-math-errno", "-Wall"]
    for choice in (["-march=native"], ["-mcpu=native"], []):
        if _accepted(*choice):
            flags += choice
            break
    if _accepted("-fopenmp"):
        flags.append("-fopenmp")
    else:
        print(f"{cxx()} has no OpenMP: versions with threads run with one", file=sys.stderr)
    return flags


@functools.cache
def _macros() -> frozenset[str]:
    """Return the names of the macros that the C++ compiler defines for this CPU."""
    command = [cxx(), *_cpu_flags(), "-dM", "-E", "-x", "c++", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return frozenset(re.findall(r"^#define (\w+)", done.stdout, re.MULTILINE))


@functools.cache
def _gpu_arch() -> str:
    """Return what nvcc calls the GPU's architecture, as "sm_90"."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as e:
        raise KernelError(f"nvidia-smi does not say what GPU there is: {e}") from None
    return "sm_" + done.stdout.strip().replace(".", "")


def missing(version: Version, device: str) -> list[str]:
    """Return what a version needs and the CPU, or its compiler, or the GPU does not have."""
    if device == "emulated" or not version.needs:
        return []
    there = _macros() if device == "cpu" else {_gpu_arch(), _gpu_arch() + "a"}
    return [need for need in version.needs if need not in there]


def emulated(text: str, path: Path) -> str:
    """Return CUDA source as C++ for dev/cuda_emulation: launches and shared memory become calls. Lines stay where they were."""
    align = r"(?:__align__\(\d+\)\s+|alignas\(\d+\)\s+)?"
    kind = r"([\w:]+(?:<[^;=]*?>)?)"
    text = re.sub(
        rf"extern\s+__shared__\s+{align}{kind}\s+(\w+)\[\]\s*;",
        r"\1* const \2 = reinterpret_cast<\1*>(cuda_emulation::dynamic_shared());",
        text,
    )
    text = re.sub(
        rf"__shared__\s+{align}{kind}\s+(\w+)((?:\s*\[[^\]]*\])*)\s*;",
        r"auto& \2 = cuda_emulation::shared_variable<\1\3, decltype([] {})>();",
        text,
    )
    launch = re.compile(r"([A-Za-z_][\w:]*\s*(?:<[^<>;{}]*(?:<[^<>;{}]*>[^<>;{}]*)*>)?)\s*<<<(.*?)>>>\s*\(", re.DOTALL)
    text = launch.sub(
        lambda m: f"emulated_launch({_launch(m[2])}, [](auto... arguments) {{ {m[1]}(arguments...); }})(", text
    )
    return f'#line 1 "{path.as_posix()}"\n{text}'


def _launch(configuration: str) -> str:
    """Return grid, block and bytes of shared memory as arguments of a function."""
    parts, depth = [""], 0
    for c in configuration:
        depth += (c in "({[") - (c in ")}]")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    grid, block, shared = [*parts, "0"][:3]
    return f"dim3({grid}), dim3({block}), static_cast<std::size_t>({shared})"


def _headers() -> bytes:
    """Return the text of all that a kernel includes, for the key of what is built."""
    parts = ["csrc/cpu/simd/*.h", "csrc/core/*.h", "csrc/cuda/ptx*.cuh", "dev/cuda_emulation/*"]
    files = [*FOLDER.glob("*.h"), *FOLDER.glob("*.cuh"), *(f for part in parts for f in ROOT.glob(part))]
    return b"".join(f.read_bytes() for f in sorted(files))


def _compile(command: Sequence[str | Path], key: str, name: str, suffix: str, text: str | None = None) -> Path:
    """Run a compiler, unless the same was built before, and return what it wrote. text: of the source, in the place of @."""
    digest = hashlib.sha256("\0".join([*map(str, command), key, text or ""]).encode() + _headers()).hexdigest()[:16]
    target = BUILD / f"{name}.{digest}{suffix}"
    if target.exists():
        return target
    BUILD.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}{suffix}")
    stand_in = partial.with_suffix(".cpp")
    if text is not None:
        stand_in.write_text(text, encoding="utf-8")
    words = [str(stand_in) if word == "@" else str(word) for word in command]
    done = subprocess.run([*words, "-o", str(partial)], capture_output=True, text=True)
    stand_in.unlink(missing_ok=True)
    if done.returncode != 0:
        raise KernelError(f"{name} does not compile:\n{' '.join(words)}\n{done.stderr.strip()}")
    target.with_suffix(".log").write_text(done.stdout + done.stderr, encoding="utf-8")
    of_text = re.compile(rf"{re.escape(name)}\.[0-9a-f]{{16}}{re.escape(suffix.rpartition('.')[0])}\.(so|o|log)")
    for old in BUILD.glob(f"{name}.*"):  # of earlier texts
        if of_text.fullmatch(old.name) and old.stem != target.stem:
            old.unlink(missing_ok=True)
    partial.replace(target)
    return target


@functools.cache
def _emulator(optimize: str) -> Path:
    source = ROOT / "dev" / "cuda_emulation" / "emulator.cpp"
    return _compile(
        [cxx(), *_emulation_flags(optimize), "-c", source], source.read_text(encoding="utf-8"), "emulator", ".o"
    )


def _emulation_flags(optimize: str) -> list[str]:
    include = ["-I", str(ROOT / "dev" / "cuda_emulation"), "-I", str(ROOT / "csrc"), "-I", str(FOLDER)]
    flags = ["-std=c++20", optimize, "-fPIC", "-fvisibility=hidden", "-DLLMC_CUDA_EMULATION", "-pthread"]
    return [*flags, "-Wall", "-Wno-unknown-pragmas", *include]


def build(version: Version, device: str = "cpu", optimize: str = "-O3", arch: str = "native") -> Path:
    """Compile a version, unless that was done before, and return the library.

    Args:
        version: what is compiled.
        device: "cpu", "cuda" or "emulated".
        optimize: the C++ compiler's flag.
        arch: nvcc's -arch.
    """
    include = ["-I", str(ROOT / "csrc"), "-I", str(FOLDER)]
    text, name = version.source, f"{version.op}-{version.name}"
    if device == "cpu":
        command = [cxx(), *_cpu_flags(), optimize, *version.flags, "-shared", "-fPIC", "-fvisibility=hidden", *include]
        return _compile([*command, version.path], text, name, ".so")
    if device == "cuda":
        code = f"-arch={arch}"
        for arch in version.needs:  # for that alone, because other code would lack its instructions
            code = f"--generate-code=arch={arch.replace('sm', 'compute')},code={arch}"
        options = ["-std=c++20", "-O3", code, "--expt-relaxed-constexpr", "-Xptxas=-v", "-shared"]
        options += ["-Xcompiler=-fPIC,-fvisibility=hidden", *version.flags, *include]
        return _compile([nvcc(), *options, version.path], text, name, f".{arch}.so")
    command = [cxx(), *_emulation_flags(optimize), "-shared", "@", _emulator(optimize)]
    return _compile(command, "", name, ".emulated.so", emulated(text, version.path))


def build_all(versions: Iterable[Version], device: str, optimize: str = "-O3", arch: str = "native") -> None:
    """Compile versions side by side."""
    versions = list(versions)
    if device == "emulated" and versions:
        _emulator(optimize)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in [pool.submit(build, version, device, optimize, arch) for version in versions]:
            done.result()


def registers(library: Path) -> str:
    """Return what nvcc said of a library's kernels: the most registers of a thread, and bytes that were spilled."""
    log = library.with_suffix(".log").read_text(encoding="utf-8")
    used = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    return f"{max(used, default=0)} registers, {spilled} bytes spilled"


# ---- running ----


class Bound:
    """Something that computes an op, with its operands: a version, or a library."""

    def __init__(self, name: str, title: str, dtype: str) -> None:
        self.name, self.title, self.dtype = name, title, dtype

    def run(self) -> None:
        """Compute once."""
        raise NotImplementedError

    def seconds(self) -> float:
        """Compute once, and return the time that it took."""
        begin = time.perf_counter()
        self.run()
        return time.perf_counter() - begin

    def results(self) -> dict[str, np.ndarray]:
        """Return the outputs as they lie in memory."""
        raise NotImplementedError

    def close(self) -> None:
        """Give memory back."""


def _check_signature(version: Version, expected: str) -> None:
    found = re.search(r"KERNEL\s+void\s+run\(([^)]*)\)", version.source)
    if found is None:
        raise KernelError(f"{version.op}/{version.path.name} has no `KERNEL void run(...)`")
    text = re.sub(r"\s+", " ", found[1]).replace("std::", "").strip()
    if text != expected:
        raise KernelError(f"{version.op}/{version.path.name}: run takes\n  {text}\nexpected\n  {expected}")


def _arguments(pointers: Iterable[Any], shape: Mapping[str, int]) -> list[Any]:
    values = [ctypes.c_float(p) if isinstance(p, float) else ctypes.c_void_p(p) for p in pointers]
    return [*values, *(ctypes.c_int64(n) for n in shape.values())]


class CpuKernel(Bound):
    """A version for the CPU."""

    def __init__(
        self, op: Op, version: Version, inputs: Arrays, shape: Mapping[str, int], threads: int, optimize: str
    ) -> None:
        super().__init__(version.name, version.title, version.dtype)
        _check_signature(version, op.signature(inputs, version.dtype))
        library = ctypes.CDLL(str(build(version, "cpu", optimize)))
        library.set_threads(threads)
        self.outputs = op.output_arrays(inputs, shape, version.dtype)
        read = [x for name, x in inputs.items() if name not in op.outputs]
        self.inputs = read  # kept alive
        pointers = [x.ctypes.data if isinstance(x, np.ndarray) else x for x in [*self.outputs.values(), *read]]
        self.call, self.arguments = library.run, _arguments(pointers, shape)
        self.call.restype = None

    def run(self) -> None:
        self.call(*self.arguments)

    def results(self) -> dict[str, np.ndarray]:
        for name, array in self.outputs.items():
            if not _guards_are_whole(array):
                raise KernelError(f"{self.name} writes outside of {name}")
        return self.outputs


class CudaKernel(Bound):
    """A version for CUDA, on a GPU or on the emulated device."""

    def __init__(
        self,
        op: Op,
        version: Version,
        inputs: Arrays,
        shape: Mapping[str, int],
        device: str,
        optimize: str,
        arch: str,
    ) -> None:
        super().__init__(version.name, version.title, version.dtype)
        _check_signature(version, op.signature(inputs, version.dtype))
        self.library = library = ctypes.CDLL(str(build(version, device, optimize, arch)))
        for function in (library.device_malloc, library.device_free, library.copy_to_device, library.copy_to_host):
            function.restype = None
        library.device_malloc.restype, library.device_malloc.argtypes = ctypes.c_void_p, [ctypes.c_int64]
        library.device_free.argtypes = [ctypes.c_void_p]
        library.copy_to_device.argtypes = library.copy_to_host.argtypes = [
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int64,
        ]
        library.error_of_device.restype = library.device_name.restype = ctypes.c_char_p
        library.stop_watch.restype, library.start_watch.restype = ctypes.c_double, None
        self.memory: list[int] = []
        self.outputs = op.output_arrays(inputs, shape, version.dtype)
        read = [x for name, x in inputs.items() if name not in op.outputs]
        pointers = [self._on_device(x) if isinstance(x, np.ndarray) else x for x in [*self.outputs.values(), *read]]
        self.call, self.arguments = library.run, _arguments(pointers, shape)
        self.call.restype = None

    def _on_device(self, array: np.ndarray) -> int:
        pointer = self.library.device_malloc(array.nbytes)
        self._raise()
        self.memory.append(pointer)
        self.library.copy_to_device(pointer, array.ctypes.data, array.nbytes)
        self._raise()
        return int(pointer)

    def _raise(self) -> None:
        if error := self.library.error_of_device():
            raise KernelError(f"{self.name}: {error.decode()}")

    def run(self) -> None:
        self.call(*self.arguments)

    def seconds(self) -> float:
        self.library.start_watch()
        self.call(*self.arguments)
        elapsed: float = self.library.stop_watch()
        self._raise()
        return elapsed

    def results(self) -> dict[str, np.ndarray]:
        for array, pointer in zip(self.outputs.values(), self.memory):
            self.library.copy_to_host(array.ctypes.data, pointer, array.nbytes)
            self._raise()
        return self.outputs

    def close(self) -> None:
        for pointer in self.memory:
            self.library.device_free(pointer)
        self.memory = []
        self._raise()


class LlmcOp(Bound):
    """llmc's own op, by _llmc.Backend."""

    def __init__(self, op: Op, inputs: Arrays, shape: Mapping[str, int], dtype: str, device: str, threads: int) -> None:
        self.backend = _llmc.Backend(device, threads)
        info = self.backend.info()
        super().__init__(f"llmc_{dtype}", f"llmc's own op, {info.isa or info.description}", dtype)
        self.op, self.shape = op, dict(shape)
        self.outputs = op.output_arrays(inputs, shape, dtype)
        self.tensors: dict[str, Any] = {}
        for name, array in {**inputs, **self.outputs}.items():
            if isinstance(array, np.ndarray):
                kind = "i32" if array.dtype == np.int32 else op.dtype_of(name, dtype)
                self.tensors[name] = self.backend.empty(list(array.shape), kind)
                self.tensors[name].from_host(array)
                self.backend.weights_changed(self.tensors[name])
            else:
                self.tensors[name] = array
        self.profile = _llmc.Profile(self.backend) if device == "cuda" else None

    def run(self) -> None:
        self.op.module.llmc(self.backend, self.tensors, self.shape)
        if self.profile is None:
            self.backend.synchronize()

    def seconds(self) -> float:
        if self.profile is None:
            return super().seconds()
        self.profile.start("before")
        self.run()
        self.profile.stop()
        return sum(seconds for name, _, seconds in self.profile.intervals() if name != "before")

    def results(self) -> dict[str, np.ndarray]:
        return {name: self.tensors[name].to_host() for name in self.outputs}


class Peer(Bound):
    """NumPy or PyTorch, on the CPU. Its time includes making the arrays that it returns."""

    def __init__(
        self, library: str, op: Op, inputs: Arrays, shape: Mapping[str, int], dtype: str, threads: int
    ) -> None:
        title = {"numpy": f"NumPy {np.__version__}", "torch": "PyTorch"}[library]
        operands = dict(inputs)
        if library == "torch":
            import torch

            torch.set_num_threads(threads)
            title += f" {torch.__version__}"
            for name, x in inputs.items():
                if isinstance(x, np.ndarray):
                    bits = x.view(np.int16) if x.dtype == np.uint16 else x
                    tensor = torch.from_numpy(bits.copy())
                    operands[name] = tensor.view(torch.bfloat16) if x.dtype == np.uint16 else tensor
        super().__init__(f"{library}_{dtype}", title, dtype)
        self.function = getattr(op.module, library)
        self.operands, self.shape, self.returned = operands, dict(shape), {}

    def run(self) -> None:
        self.returned = self.function(self.operands, self.shape)

    def results(self) -> dict[str, np.ndarray]:
        def array(x: Any) -> np.ndarray:
            if isinstance(x, np.ndarray):
                return x
            x = x.detach().contiguous()
            bits = x.view(dtype=__import__("torch").int16) if x.element_size() == 2 else x
            values: np.ndarray = bits.numpy()
            return values.view(np.uint16) if x.element_size() == 2 else values

        return {name: array(x) for name, x in self.returned.items()}


@dataclasses.dataclass
class Result:
    """What was found of one version at one shape."""

    op: str
    version: str
    title: str
    device: str
    dtype: str
    shape: dict[str, int]
    error: float  # the largest of the outputs', as a share of what is allowed: above 1 it is wrong
    seconds: float | None = None  # the median; None if it was not timed
    flops: float = 0.0
    bytes: float = 0.0

    @property
    def gflops(self) -> float | None:
        return self.flops / self.seconds / 1e9 if self.seconds and self.flops else None

    @property
    def gbs(self) -> float | None:
        return self.bytes / self.seconds / 1e9 if self.seconds else None


def default_threads() -> int:
    """Return how many threads llmc takes if it is not told."""
    return int(_llmc.Backend("cpu").info().threads)


def _contenders(
    op: Op,
    device: str,
    versions: Sequence[Version],
    threads: int,
    optimize: str,
    arch: str,
    peers: Sequence[str],
    shape: Mapping[str, int],
    inputs: Callable[[str], Arrays],
) -> Iterable[Callable[[], Bound]]:
    """Yield functions that make the contenders, in the order of the table."""
    for version in versions:
        if device == "cpu":
            yield lambda v=version: CpuKernel(op, v, inputs(v.dtype), shape, threads, optimize)
        else:
            yield lambda v=version: CudaKernel(op, v, inputs(v.dtype), shape, device, optimize, arch)
    dtypes = [d for d in ("f32", "bf16") if any(v.dtype == d for v in versions)]
    if device == "cpu":
        if "numpy" in peers and hasattr(op.module, "numpy") and "f32" in dtypes:
            yield lambda: Peer("numpy", op, inputs("f32"), shape, "f32", threads)
        if "torch" in peers and hasattr(op.module, "torch") and importlib.util.find_spec("torch"):
            for dtype in [d for d in dtypes if d in getattr(op.module, "TORCH", dtypes)]:
                yield lambda d=dtype: Peer("torch", op, inputs(d), shape, d, threads)
    if "llmc" in peers and hasattr(op.module, "llmc") and (device == "cpu" or (device == "cuda" and _has_cuda())):
        for dtype in dtypes:
            yield lambda d=dtype: LlmcOp(op, inputs(d), shape, d, device, threads)


@functools.cache
def _has_cuda() -> bool:
    try:
        return "emulated" not in str(_llmc.Backend("cuda").info().description)
    except _llmc.Error:
        return False


def measure(
    op: str | Op,
    device: str = "cpu",
    versions: Sequence[str] | None = None,
    *,
    shape: Mapping[str, int] | None = None,
    threads: int = 0,
    budget: float = 0.5,
    timed: bool = True,
    small: bool = False,
    peers: bool | Sequence[str] = True,
    optimize: str = "-O3",
    arch: str = "native",
    seed: int = 0,
) -> list[Result]:
    """Check an op's versions, and time them in turns.

    Args:
        op: the op, or its name.
        device: "cpu", "cuda", or "emulated", where nothing is timed.
        versions: the beginnings of names, as ["cpu_1", "cpu_3_vectors"]; all if None. Those of which something is missing() are
            left out.
        shape: sizes that differ from the op's SHAPE, by name.
        threads: of the CPU; 0 for as many as llmc would take.
        budget: seconds for each version.
        timed: False checks at the shapes of SMALL alone.
        small: times at the last of SMALL in place of SHAPE.
        peers: whether NumPy, PyTorch and llmc's own op are there too, or which of them: ["numpy", "torch", "llmc"].
        optimize: the C++ compiler's flag.
        arch: nvcc's -arch.
        seed: of the operands.

    Returns:
        A result for each version and peer. The error is the largest of all shapes that were checked.

    Raises:
        KernelError: if a version does not compile, has another signature, or fails on the device.
    """
    op = find_op(op) if isinstance(op, str) else op
    threads = threads or default_threads()
    others = peers if not isinstance(peers, bool) else ["numpy", "torch", "llmc"] if peers else []
    timed = timed and device != "emulated"
    chosen = [v for v in op.versions(device, versions) if not missing(v, device)]
    if not chosen:
        raise KernelError(f"{op.name} has no version {' '.join(versions or [])} for {device}")
    if unknown := set(shape or ()) - set(op.shape):
        raise KernelError(f"{op.name} has no size {', '.join(sorted(unknown))}: expected {', '.join(op.shape)}")
    final = {**(op.small[-1] if small else op.shape_on(device)), **(shape or {})}
    build_all(chosen, device, optimize, arch)
    results: list[Result] = []
    for number, sizes in enumerate([*op.small, final] if timed else op.small):
        last = timed and number == len(op.small)
        of_dtype = functools.cache(functools.partial(op.inputs, sizes, seed=seed + number))
        truth = functools.cache(lambda dtype, of_dtype=of_dtype: op.truth(of_dtype(dtype), dtype))
        kept: list[Bound] = []
        make_all = _contenders(op, device, chosen, threads, optimize, arch, others, sizes, of_dtype)
        for position, make in enumerate(make_all):
            bound = make()
            bound.run()
            shares = op.errors(bound.results(), truth(bound.dtype), bound.dtype)
            error = max(shares.values(), default=0.0)
            if number == 0:
                results.append(Result(op.name, bound.name, bound.title, device, bound.dtype, dict(sizes), error))
            else:
                results[position].error = max(results[position].error, error)
            if last:
                kept.append(bound)
            else:
                bound.close()
        if last:
            for result, bound, seconds in zip(results, kept, _in_turns(kept, budget)):
                outputs = op.output_arrays(of_dtype(bound.dtype), sizes, bound.dtype)
                result.shape, result.seconds = dict(sizes), seconds
                result.flops = op.module.flops(**sizes)
                result.bytes = op.bytes(of_dtype(bound.dtype), outputs)
                bound.close()
    return results


def _in_turns(contenders: Sequence[Bound], budget: float) -> list[float]:
    """Time each until its budget is spent, one measurement a turn, and return the medians."""
    times: list[list[float]] = [[bound.seconds()] for bound in contenders]  # a second run: the first was the check
    spent = [t[0] for t in times]
    for _ in range(1000):
        going = [i for i, s in enumerate(spent) if s < budget]
        if not going:
            break
        for i in going:
            begin = time.perf_counter()
            times[i].append(contenders[i].seconds())
            spent[i] += time.perf_counter() - begin
    return [statistics.median(t[1:] or t) for t in times]


def call(version: Version, device: str = "cpu", *, shape: Mapping[str, int], threads: int = 0, **inputs: Any) -> Arrays:
    """Run one version on inputs of one's own, and return its outputs by name.

    Args:
        version: find_op("layernorm_forward").version("cpu_1").
        device: "cpu", "cuda" or "emulated".
        shape: all sizes by name.
        threads: of the CPU; 0 for as many as llmc would take.
        inputs: the op's inputs by name; arrays are rounded to the version's dtype.
    """
    op = find_op(version.op)
    order = op.inputs(op.small[0], version.dtype, 0)
    if set(order) != set(inputs):
        raise KernelError(f"{op.name} takes {', '.join(order)}, not {', '.join(inputs)}")
    stored = {
        name: _stored(np.asarray(inputs[name]), op.dtype_of(name, version.dtype))
        if isinstance(like, np.ndarray)
        else float(inputs[name])
        for name, like in order.items()
    }
    sizes = {name: shape[name] for name in op.shape}
    bound = (
        CpuKernel(op, version, stored, sizes, threads or default_threads(), "-O3")
        if device == "cpu"
        else CudaKernel(op, version, stored, sizes, device, "-O3", "native")
    )
    bound.run()
    outputs = bound.results()
    bound.close()
    views = {"f32": np.float32, "bf16": ml_dtypes.bfloat16}
    return {name: x.view(views[op.dtype_of(name, version.dtype)]) for name, x in outputs.items()}


# ---- the program ----


def table(results: Sequence[Result]) -> list[list[str]]:
    """Return the lines of a table of results."""

    def number(x: float | None, digits: int) -> str:
        return "" if x is None else f"{x:,.{digits}f}"

    return [
        [
            f"{r.version}: {r.title}",
            f"{r.error:.2f}" if r.error <= 1 else f"WRONG {r.error:.3g}",
            number(r.seconds and r.seconds * 1e3, 3),
            number(r.gflops, 1),
            number(r.gbs, 1),
            number(results[0].seconds / r.seconds if r.seconds and results[0].seconds else None, 1),
        ]
        for r in results
    ]


HEADER = ["version", "error / allowed", "ms", "GFLOP/s", "GB/s", "times the first"]


def _sizes(text: str) -> tuple[str, int]:
    name, _, value = text.partition("=")
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"'{text}': expected NAME=NUMBER, as N=1024")
    return name, int(value)


def _arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", help="an op, the beginning of the names of several, or 'all'")
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--versions", nargs="+", metavar="NAME", help="only versions whose names begin so")
    parser.add_argument("--shape", nargs="+", type=_sizes, default=[], metavar="NAME=NUMBER", help="other sizes")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU (default: as many as llmc takes)")
    parser.add_argument("--check", action="store_true", help="check only, at small and odd shapes")
    parser.add_argument("--small", action="store_true", help="time at a small shape, briefly")
    parser.add_argument("--build", action="store_true", help="compile only")
    parser.add_argument("--arch", default="native", help="nvcc's -arch (default: native)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code: 1 if a version is wrong, 2 if it could not be run."""
    args = _arguments_of(argv)
    names = op_names(args.op)
    if not names:
        print(
            f"run.py: no op begins with '{args.op}': expected one of {', '.join(op_names())}, or all", file=sys.stderr
        )
        return 2
    try:
        return _build_only(args, names) if args.build else _measure_all(args, names)
    except KernelError as e:
        print(f"run.py: {e}", file=sys.stderr)
        return 2


def _build_only(args: argparse.Namespace, names: Sequence[str]) -> int:
    for name in names:
        versions = find_op(name).versions(args.device, args.versions)
        if args.device == "cpu":
            versions = [v for v in versions if not missing(v, "cpu")]
        build_all(versions, args.device, arch=args.arch)
        for version in versions:
            library = build(version, args.device, arch=args.arch)
            print(f"{name}/{version.name}: {registers(library) if args.device == 'cuda' else 'compiled'}")
    return 0


def _measure_all(args: argparse.Namespace, names: Sequence[str]) -> int:
    about = machine(args.threads)
    timed = not args.check and args.device != "emulated"
    if args.device == "cuda":
        about["card"] = _card(args.arch)
        print(about["card"])
    else:
        print(machine_line(about))
    if timed and args.device == "cpu" and not args.small:
        backend = _llmc.Backend("cpu", args.threads)
        for dtype in ("f32", "bf16"):
            top = measured_ceilings(backend, dtype)
            about[f"ceilings_{dtype}"] = dataclasses.asdict(top)
            print(f"at most, {dtype}: {top}")
    written: list[dict[str, Any]] = []
    wrong = False
    for name in names:
        op = find_op(name)
        found = op.versions(args.device, args.versions)
        lacking = {version.name: missing(version, args.device) for version in found}
        for version, needs in lacking.items():
            if needs:
                print(f"{name}/{version} is left out: there is no {' '.join(needs)} here")
        if all(lacking.values()):
            continue
        results = measure(
            op,
            args.device,
            args.versions,
            shape=dict(args.shape),
            threads=args.threads,
            budget=0.05 if args.small else 0.5,
            timed=timed,
            small=args.small,
            arch=args.arch,
        )
        where = ", ".join(f"{k}={v}" for k, v in results[0].shape.items()) if timed else "small shapes"
        print(f"\n{op.name} ({where}): {op.title}\n")
        print_table(HEADER if timed else HEADER[:2], [row if timed else row[:2] for row in table(results)])
        wrong = wrong or any(not r.error <= 1 for r in results)
        written += [dataclasses.asdict(r) | {"gflops": r.gflops, "gbs": r.gbs} for r in results]
    if not written:
        print(f"run.py: none of {', '.join(names)} has such a version for {args.device}", file=sys.stderr)
        return 2
    if args.json:
        args.json.write_text(json.dumps({"machine": about, "results": written}, indent=1) + "\n", encoding="utf-8")
    return 1 if wrong else 0


def _card(arch: str) -> str:
    """Return the name of the GPU."""
    version = next(v for name in op_names() for v in find_op(name).versions("cuda"))
    library = ctypes.CDLL(str(build(version, "cuda", arch=arch)))
    library.device_name.restype = library.error_of_device.restype = ctypes.c_char_p
    name = library.device_name().decode()
    if error := library.error_of_device():
        raise KernelError(f"no GPU can be used: {error.decode()} (--device emulated runs CUDA kernels on a CPU)")
    return str(name)


if __name__ == "__main__":
    sys.exit(main())
