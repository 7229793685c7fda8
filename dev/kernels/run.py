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
import contextlib
import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from common import add_common_arguments, machine, machine_line, measured_ceilings, print_table, write_json
from harness.compiling import DEVICES, build, build_all, missing, registers
from harness.contenders import Contender, CpuKernel, CudaKernel, CudaLibrary, contenders
from harness.ops import Arrays, KernelError, Op, Version, find_op, op_names, source, stored

from llmc import _llmc

__all__ = ["HEADER", "KernelError", "Op", "Result", "Version", "call", "find_op", "measure", "op_names", "print_table"]
__all__ += ["source", "table"]


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
    return _llmc.default_threads()


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
        versions: names in full or by their numbers, as ["cpu_1", "cpu_3_vectors"]; all if None. Those of which something is
            missing() are left out.
        shape: sizes that differ from the op's SHAPE, by name.
        threads: of the CPU; 0 for as many as llmc would take.
        budget: seconds for each version.
        timed: False checks at the shapes of SMALL alone.
        small: times at the last of SMALL in place of SHAPE.
        peers: whether NumPy, PyTorch and llmc's own op are there too, or which of them: ["numpy", "torch", "llmc"].
        optimize: the C++ compiler's flag for versions for the CPU.
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
        raise KernelError(f"{op.name} has no version {' '.join(versions or [])} that runs here on {device}")
    if unknown := set(shape or ()) - set(op.shape):
        raise KernelError(f"{op.name} has no size {', '.join(sorted(unknown))}: expected {', '.join(op.shape)}")
    final = {**(op.small[-1] if small else op.shape_on(device)), **(shape or {})}
    build_all(chosen, device, optimize, arch)
    results: list[Result] = []
    for number, sizes in enumerate([*op.small, final] if timed else op.small):
        last = timed and number == len(op.small)
        of_dtype = functools.cache(functools.partial(op.inputs, sizes, seed=seed + number))
        truth = functools.cache(lambda dtype, of_dtype=of_dtype: op.truth(of_dtype(dtype), dtype))
        all_of_them = contenders(op, device, chosen, sizes, of_dtype, threads, optimize, arch, others)
        kept: list[Contender] = []
        with contextlib.ExitStack() as at_the_end:  # memory of the device is given back after a failure, too
            for position, contender in enumerate(all_of_them):
                at_the_end.callback(contender.close)
                contender.run()
                error = max(op.errors(contender.results(), truth(contender.dtype), contender.dtype).values())
                if number == 0:
                    results.append(
                        Result(op.name, contender.name, contender.title, device, contender.dtype, dict(sizes), error)
                    )
                else:
                    results[position].error = max(results[position].error, error)
                if last:
                    kept.append(contender)
                else:
                    contender.close()
            for result, contender, seconds in zip(results, kept, _in_turns(kept, budget)):
                outputs = op.output_arrays(of_dtype(contender.dtype), sizes, contender.dtype)
                result.shape, result.seconds = dict(sizes), seconds
                result.flops = op.module.flops(**sizes)
                result.bytes = op.bytes(of_dtype(contender.dtype), outputs)
    return results


def _in_turns(running: Sequence[Contender], budget: float) -> list[float]:
    """Time each until its budget is spent, one measurement a turn, and return the medians."""
    times: list[list[float]] = [[contender.seconds()] for contender in running]  # a second run: the first was the check
    spent = [t[0] for t in times]
    for _ in range(1000):
        going = [i for i, s in enumerate(spent) if s < budget]
        if not going:
            break
        for i in going:
            begin = time.perf_counter()
            times[i].append(running[i].seconds())
            spent[i] += time.perf_counter() - begin
    return [statistics.median(t[1:] or t) for t in times]


def call(
    version: Version,
    device: str = "cpu",
    *,
    shape: Mapping[str, int],
    threads: int = 0,
    optimize: str = "-O3",
    **inputs: Any,
) -> Arrays:
    """Run one version on inputs of one's own, and return its outputs by name.

    Args:
        version: find_op("layernorm_forward").version("cpu_1").
        device: "cpu", "cuda" or "emulated".
        shape: all sizes by name.
        threads: of the CPU; 0 for as many as llmc would take.
        optimize: the C++ compiler's flag for versions for the CPU.
        inputs: the op's inputs by name; arrays are rounded to the version's dtype.

    Raises:
        KernelError: if these are not the sizes and inputs of the op, or as measure() does.
    """
    op = find_op(version.op)
    if set(shape) != set(op.shape):
        raise KernelError(f"{op.name} has the sizes {', '.join(op.shape)}, not {', '.join(shape)}")
    sizes = {name: shape[name] for name in op.shape}
    expected = op.inputs(sizes, version.dtype, 0)
    if set(expected) != set(inputs):
        raise KernelError(f"{op.name} takes {', '.join(expected)}, not {', '.join(inputs)}")
    operands: Arrays = {}
    for name, like in expected.items():
        if isinstance(like, np.ndarray):
            array = np.asarray(inputs[name], np.int32 if like.dtype == np.int32 else np.float64)
            if array.shape != like.shape:  # a kernel would read what lies behind
                raise KernelError(f"{op.name}: {name} has shape {array.shape}, expected {like.shape}")
            operands[name] = stored(array, op.dtype_of(name, version.dtype))
        else:
            operands[name] = float(inputs[name])
    contender = (
        CpuKernel(op, version, operands, sizes, threads or default_threads(), optimize)
        if device == "cpu"
        else CudaKernel(op, version, operands, sizes, device, optimize, "native")
    )
    contender.run()
    outputs = contender.results()
    contender.close()
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
    parser.add_argument("--versions", nargs="+", metavar="NAME", help="only these versions: cpu_1 or cpu_1_naive")
    parser.add_argument("--shape", nargs="+", type=_sizes, default=[], metavar="NAME=NUMBER", help="other sizes")
    parser.add_argument("--check", action="store_true", help="check only, at small and odd shapes")
    parser.add_argument("--small", action="store_true", help="time at a small shape, briefly")
    parser.add_argument("--build", action="store_true", help="compile only")
    parser.add_argument("--arch", default="native", help="nvcc's -arch (default: native)")
    add_common_arguments(parser)
    args = parser.parse_args(argv)
    if args.threads < 0:
        parser.error(f"--threads {args.threads}: expected a number of threads, or 0")
    if args.json and not args.json.parent.is_dir():  # not after minutes of measuring
        parser.error(f"--json {args.json}: there is no folder {args.json.parent}")
    return args


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
    versions = [version for name in names for version in find_op(name).versions(args.device, args.versions)]
    if args.device == "cpu":  # nvcc compiles for a GPU that is not there
        versions = [version for version in versions if not missing(version, "cpu")]
    if not versions:
        raise _no_versions(args, names)
    build_all(versions, args.device, arch=args.arch)
    for version in versions:
        library = build(version, args.device, arch=args.arch)
        print(f"{version.op}/{version.name}: {registers(library) if args.device == 'cuda' else 'compiled'}")
    return 0


def _no_versions(args: argparse.Namespace, names: Sequence[str]) -> KernelError:
    wanted = f" {' '.join(args.versions)}" if args.versions else ""
    return KernelError(f"{', '.join(names)}: no version{wanted} for {args.device} that can be run here")


def _measure_all(args: argparse.Namespace, names: Sequence[str]) -> int:
    about = machine(args.threads)
    timed = not args.check and args.device != "emulated"
    if args.device == "cuda":
        about["card"], about["copy_gbs"] = _card(args.arch)
        print(f"{about['card']}, at most: copy {about['copy_gbs']:.0f} GB/s")
    else:
        print(machine_line(about))
    if timed and args.device == "cpu" and not args.small:
        backend = _llmc.Backend("cpu", args.threads)
        for dtype in ("f32", "bf16"):
            top = measured_ceilings(backend, dtype)
            about[f"ceilings_{dtype}"] = dataclasses.asdict(top)
            print(f"at most, {dtype}: {top}")
    written: list[dict[str, Any]] = []
    code = 0
    for name in names:
        op = find_op(name)
        found = op.versions(args.device, args.versions)
        lacking = {version.name: missing(version, args.device) for version in found}
        for version, needs in lacking.items():
            if needs:
                print(f"{name}/{version} is left out: there is no {' '.join(needs)} here")
        if all(lacking.values()):
            continue
        try:
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
        except KernelError as e:  # the other ops are measured nevertheless
            print(f"\nrun.py: {name}: {e}", file=sys.stderr)
            code = 2
            continue
        where = ", ".join(f"{k}={v}" for k, v in results[0].shape.items()) if timed else "small shapes"
        print(f"\n{op.name} ({where}): {op.title}\n")
        print_table(HEADER if timed else HEADER[:2], [row if timed else row[:2] for row in table(results)])
        code = max(code, int(any(not r.error <= 1 for r in results)))
        written += [dataclasses.asdict(r) | {"gflops": r.gflops, "gbs": r.gbs} for r in results]
        # Now, in case that a later op takes the process down.
        write_json(args.json, {"machine": about, "results": written})
    if not written and not code:
        raise _no_versions(args, names)
    return code


def _card(arch: str) -> tuple[str, float]:
    """Return the name of the GPU, and the GB/s of a copy of its memory: bytes read and bytes written."""
    version = next(v for name in op_names() for v in find_op(name).versions("cuda"))
    device = CudaLibrary(build(version, "cuda", arch=arch))
    try:
        name = device.device_name().decode()
    except KernelError as e:
        raise KernelError(f"no GPU can be used: {e} (--device emulated runs CUDA kernels on a CPU)") from None
    size = 1 << 30
    return name, 2 * size / min(device.copy_seconds(size) for _ in range(5)) / 1e9


if __name__ == "__main__":
    sys.exit(main())
