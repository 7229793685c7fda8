"""What takes part in a comparison: versions for the CPU and for CUDA, NumPy, PyTorch, and llmc's own ops."""

from __future__ import annotations

import abc
import ctypes
import functools
import importlib.util
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmc import _llmc

from .compiling import build
from .ops import Arrays, KernelError, Op, Version, guards_are_whole

# Bytes that are written before each measurement on a GPU of what is no version: more than any L2 cache has.
FLUSHED = 256 << 20


class Contender(abc.ABC):
    """Something that computes an op, with its operands."""

    def __init__(self, name: str, title: str, dtype: str) -> None:
        self.name, self.title, self.dtype = name, title, dtype

    @abc.abstractmethod
    def run(self) -> None:
        """Compute once."""

    def seconds(self) -> float:
        """Compute once, and return the time that it took."""
        begin = time.perf_counter()
        self.run()
        return time.perf_counter() - begin

    @abc.abstractmethod
    def results(self) -> dict[str, np.ndarray]:
        """Return the outputs as they lie in memory."""

    def close(self) -> None:  # noqa: B027  most have nothing to do
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


class CpuKernel(Contender):
    """A version for the CPU."""

    def __init__(
        self, op: Op, version: Version, inputs: Arrays, shape: Mapping[str, int], threads: int, optimize: str
    ) -> None:
        super().__init__(version.name, version.title, version.dtype)
        _check_signature(version, op.signature(inputs, version.dtype))
        library = ctypes.CDLL(str(build(version, "cpu", optimize)))
        library.set_threads(threads)
        self.outputs = op.output_arrays(inputs, shape, version.dtype)
        self.inputs = [x for name, x in inputs.items() if name not in op.outputs]
        operands = [*self.outputs.values(), *self.inputs]
        pointers = [x.ctypes.data if isinstance(x, np.ndarray) else x for x in operands]
        self.call, self.arguments = library.run, _arguments(pointers, shape)
        self.call.restype = None

    def run(self) -> None:
        self.call(*self.arguments)

    def results(self) -> dict[str, np.ndarray]:
        for name, array in self.outputs.items():
            if not guards_are_whole(array):
                raise KernelError(f"{self.name} writes outside of {name}")
        return self.outputs


class CudaLibrary:
    """The functions at the end of kernel.cuh, in the library of a version."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        types: dict[str, tuple[Any, list[Any]]] = {
            "device_malloc": (pointer, [count]),
            "device_free": (None, [pointer]),
            "copy_to_device": (None, [pointer, pointer, count]),
            "copy_to_host": (None, [pointer, pointer, count]),
            "device_name": (ctypes.c_char_p, []),
            "copy_seconds": (ctypes.c_double, [count]),
            "start_watch": (None, []),
            "stop_watch": (ctypes.c_double, []),
        }
        for name, (result, arguments) in types.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self.run, self.error = library.run, library.error_of_device
        self.run.restype, self.error.restype = None, ctypes.c_char_p
        self.library, self.name = library, path.name.split(".")[0]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Return a function that raises what the device reports."""

        def call(*arguments: Any) -> Any:
            result = getattr(self.library, name)(*arguments)
            if error := self.error():
                raise KernelError(f"{self.name}: {error.decode()}")
            return result

        return call


class CudaKernel(Contender):
    """A version for CUDA, on a GPU or on the emulated device."""

    def __init__(
        self, op: Op, version: Version, inputs: Arrays, shape: Mapping[str, int], device: str, optimize: str, arch: str
    ) -> None:
        super().__init__(version.name, version.title, version.dtype)
        _check_signature(version, op.signature(inputs, version.dtype))
        self.device = CudaLibrary(build(version, device, optimize, arch))
        self.outputs = op.output_arrays(inputs, shape, version.dtype)
        self.memory: list[int] = []
        read = [x for name, x in inputs.items() if name not in op.outputs]
        pointers = [self._on_device(x) if isinstance(x, np.ndarray) else x for x in [*self.outputs.values(), *read]]
        self.arguments = _arguments(pointers, shape)

    def _on_device(self, array: np.ndarray) -> int:
        pointer: int = self.device.device_malloc(array.nbytes)
        self.memory.append(pointer)
        self.device.copy_to_device(pointer, array.ctypes.data, array.nbytes)
        return pointer

    def run(self) -> None:
        self.device.run(*self.arguments)

    def seconds(self) -> float:
        self.device.start_watch()
        self.device.run(*self.arguments)
        elapsed: float = self.device.stop_watch()
        return elapsed

    def results(self) -> dict[str, np.ndarray]:
        for array, pointer in zip(self.outputs.values(), self.memory):
            self.device.copy_to_host(array.ctypes.data, pointer, array.nbytes)
        return self.outputs

    def close(self) -> None:
        while self.memory:
            self.device.device_free(self.memory.pop())


class LlmcOp(Contender):
    """llmc's own op, by _llmc.Backend."""

    def __init__(self, op: Op, inputs: Arrays, shape: Mapping[str, int], dtype: str, device: str, threads: int) -> None:
        self.backend = backend = _llmc.Backend(device, threads)
        super().__init__(f"llmc_{dtype}", f"llmc's own op{f', {backend.info().isa}' if device == 'cpu' else ''}", dtype)
        self.op, self.shape = op, dict(shape)
        self.outputs = op.output_arrays(inputs, shape, dtype)
        self.tensors: dict[str, Any] = {}
        for name, array in {**inputs, **self.outputs}.items():
            if isinstance(array, np.ndarray):
                kind = "i32" if array.dtype == np.int32 else op.dtype_of(name, dtype)
                self.tensors[name] = backend.empty(list(array.shape), kind)
                self.tensors[name].from_host(array)
                backend.weights_changed(self.tensors[name])
            else:
                self.tensors[name] = array
        # On a GPU the profile's events are the stopwatch, and the caches are emptied before, as by kernel.cuh.
        self.profile = _llmc.Profile(backend) if device == "cuda" else None
        self.flush = None if self.profile is None else backend.empty([FLUSHED // 4])

    def run(self) -> None:
        self.op.module.llmc(self.backend, self.tensors, self.shape)
        if self.profile is None:
            self.backend.synchronize()

    def seconds(self) -> float:
        if self.profile is None:
            return super().seconds()
        self.backend.zero(self.flush)
        self.profile.start("before")
        self.run()
        self.profile.stop()
        return sum(seconds for name, _, seconds in self.profile.intervals() if name != "before")

    def results(self) -> dict[str, np.ndarray]:
        return {name: self.tensors[name].to_host() for name in self.outputs}


class NumpyOp(Contender):
    """NumPy. Its time includes making the arrays that it returns."""

    def __init__(self, op: Op, inputs: Arrays, shape: Mapping[str, int]) -> None:
        super().__init__("numpy_f32", f"NumPy {np.__version__}", "f32")
        self.function, self.inputs, self.shape = op.module.numpy, inputs, dict(shape)
        self.returned: dict[str, np.ndarray] = {}

    def run(self) -> None:
        self.returned = self.function(self.inputs, self.shape)

    def results(self) -> dict[str, np.ndarray]:
        return self.returned


class TorchOp(Contender):
    """PyTorch. Its time includes making the tensors that it returns."""

    def __init__(self, op: Op, inputs: Arrays, shape: Mapping[str, int], dtype: str, device: str, threads: int) -> None:
        import torch

        super().__init__(f"torch_{dtype}", f"PyTorch {torch.__version__}", dtype)
        torch.set_num_threads(threads)
        self.function, self.shape, self.torch = op.module.torch, dict(shape), torch
        self.inputs = {k: self._tensor(x).to(device) if isinstance(x, np.ndarray) else x for k, x in inputs.items()}
        self.returned: dict[str, Any] = {}
        self.flush = torch.empty(FLUSHED, dtype=torch.uint8, device=device) if device == "cuda" else None

    def _tensor(self, x: np.ndarray) -> Any:
        if x.dtype == np.uint16:
            return self.torch.from_numpy(x.view(np.int16).copy()).view(self.torch.bfloat16)
        return self.torch.from_numpy(x.copy())

    def run(self) -> None:
        try:
            self.returned = self.function(self.inputs, self.shape)
        except RuntimeError as e:
            raise KernelError(f"{self.name}: {e}") from e

    def seconds(self) -> float:
        if self.flush is None:
            return super().seconds()
        begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        begin.record()
        self.run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3

    def results(self) -> dict[str, np.ndarray]:
        def array(x: Any) -> np.ndarray:
            x = x.detach().contiguous().cpu()
            if x.dtype == self.torch.bfloat16:
                bits: np.ndarray = x.view(self.torch.int16).numpy()
                return bits.view(np.uint16)
            values: np.ndarray = x.numpy()
            return values

        return {name: array(x) for name, x in self.returned.items()}


def contenders(
    op: Op,
    device: str,
    versions: Sequence[Version],
    shape: Mapping[str, int],
    inputs: Callable[[str], Arrays],
    threads: int,
    optimize: str,
    arch: str,
    peers: Sequence[str],
) -> Iterator[Contender]:
    """Yield those that take part, in the order of the table. inputs: returns the inputs for a dtype."""
    for version in versions:
        if device == "cpu":
            yield CpuKernel(op, version, inputs(version.dtype), shape, threads, optimize)
        else:
            yield CudaKernel(op, version, inputs(version.dtype), shape, device, optimize, arch)
    if device == "emulated":
        return
    dtypes = [dtype for dtype in ("f32", "bf16") if any(v.dtype == dtype for v in versions)]
    if "numpy" in peers and hasattr(op.module, "numpy") and device == "cpu" and "f32" in dtypes:
        yield NumpyOp(op, inputs("f32"), shape)
    if "torch" in peers and hasattr(op.module, "torch") and _torch_has(device):
        for dtype in [d for d in dtypes if d in getattr(op.module, "TORCH", dtypes)]:
            yield TorchOp(op, inputs(dtype), shape, dtype, device, threads)
    if "llmc" in peers and hasattr(op.module, "llmc") and (device == "cpu" or _llmc_has_a_gpu()):
        for dtype in dtypes:
            yield LlmcOp(op, inputs(dtype), shape, dtype, device, threads)


def _torch_has(device: str) -> bool:
    if not importlib.util.find_spec("torch"):
        return False
    import torch

    return device == "cpu" or torch.cuda.is_available()


@functools.cache
def _llmc_has_a_gpu() -> bool:
    try:
        return "emulated" not in str(_llmc.Backend("cuda").info().description)
    except _llmc.Error:
        return False
