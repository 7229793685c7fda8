"""Shows where the time of a training step goes: by op on a CPU or a GPU, and by kernel on a GPU that has NVIDIA's profilers.

    python dev/profile.py                                                # d12, B=4, T=64, f32, on the CPU
    python dev/profile.py -e d12 --layers 2 -b 4 -t 1024 --dtype bf16    # two layers tell as much as twelve, sooner
    python dev/profile.py --device cuda --dtype bf16 -b 64 -t 1024       # on a GPU; by kernel too, if nsys or ncu is installed

Nothing need be installed for the ops: each tells the profile that it begins (csrc/core/profile.h), and its time lasts until the next
one begins, on the device's clock. So the rows add up to the step. "else" is what belongs to no op: Python, checks of tokens, allocations;
on a GPU also what it waits for. A step is an update with one micro-batch: zero_grad, forward, backward, clipping and AdamW (or Muon),
on random tokens, without recorded graphs. Profiled steps and others take turns, and both medians are printed: their difference is what
the profile itself costs. (On a GPU kernels of different ops no longer overlap.) The rows are those of the profiled step whose time is the
median.

Columns: op; phase; its extents, in the order of csrc/core/dims.h (matmuls: rows, channels in, channels out); calls; ms; share of the
step; GFLOP/s and GB/s of what the op has to compute, read and write; the floor as a share of the time. The floor is the arithmetic at
the first ceiling or the bytes at the second, whichever is longer. Operands that are in a cache take less: more than 100 %.

By kernel: nsys gives times alone and costs nearly nothing; ncu also the bytes of DRAM and the use of the tensor cores, as llm.c's
profile_gpt2cu.py does, but runs each kernel several times, in one step, and needs access to the performance counters.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import dataclasses
import io
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent / "bench"))
from common import adamw_bytes, machine, machine_line, print_table, write_json

import llmc
from llmc import _llmc
from llmc.system.flops import peak_flops

PHASES = ("forward", "classifier", "backward", "optimizer", "else")


# ---- the work of an op ----


def op_work(name: str, extents: Sequence[int], dtype: str, phase: str = "") -> tuple[float, float] | None:
    """Return the FLOP of an op, and the bytes that it has to read and write; None of an op that is not known here.

    Args:
        name: of the op.
        extents: as the profile has them.
        dtype: of activations, parameters and their gradients: "f32" or "bf16".
        phase: of the step. In the optimizer's, newton_schulz asks matmul_backward for one of its two products.
    """
    size = 2 if dtype == "bf16" else 4

    def matmul(N: int, C: int, OC: int, products: int = 1, gelu: int = 0) -> tuple[float, float]:
        return 2.0 * products * N * C * OC, size * (products * (N * C + OC * C + N * OC) + gelu)

    def attention(B: int, T: int, C: int, products: int, tensors: int) -> tuple[float, float]:
        return products * float(B * C * T * (T + 1)), size * tensors * B * T * C  # the causal half of the products

    def elementwise(n: int, tensors: int) -> tuple[float, float]:
        return 0.0, size * tensors * n

    known: dict[str, Callable[..., tuple[float, float]]] = {
        "matmul_forward": matmul,
        "matmul_gelu_forward": lambda N, C, OC: matmul(N, C, OC, 1, N * OC),
        "matmul_backward": lambda N, C, OC: matmul(N, C, OC, 1 if phase == "optimizer" else 2),
        "matmul_gelu_backward": lambda N, C, OC: matmul(N, C, OC, 2, N * C),
        "attention_forward": lambda B, T, C, NH: attention(B, T, C, 2, 4),
        "attention_backward": lambda B, T, C, NH: attention(B, T, C, 5, 8),
        "layernorm_forward": lambda N, C: elementwise(N * C, 2),
        "layernorm_backward": lambda N, C: elementwise(N * C, 4),
        "fused_residual_layernorm_forward": lambda N, C: elementwise(N * C, 4),
        "encoder_forward": lambda B, T, C, Vp, maxT: elementwise(B * T * C, 3),
        "encoder_backward": lambda B, T, C, Vp, maxT: elementwise(B * T * C, 4),
        "gelu_forward": lambda n: elementwise(n, 2),
        "gelu_backward": lambda n: elementwise(n, 3),
        "residual_forward": lambda n: elementwise(n, 3),
        "fused_classifier": lambda N, V, Vp: elementwise(N * Vp, 2),
        "gradient_norm_squared": lambda n: (2.0 * n, size * n),
        "muon_momentum": lambda n: (0.0, (8 + 2 * size) * n),
        "muon_update": lambda n: (0.0, (3 * size + 4 * (dtype == "bf16")) * n),
        "scale": lambda n: elementwise(n, 2),
        "shifted_sum": lambda N: elementwise(N * N, 3),
        "adamw_many": lambda n: (0.0, adamw_bytes(dtype) * n),
    }
    return known[name](*extents) if name in known else None


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches at most. flops is None if nobody knows it."""

    flops: float | None
    read: float  # bytes/s

    def __str__(self) -> str:
        arithmetic = f"{self.flops / 1e9:,.0f} GFLOP/s" if self.flops else "arithmetic unknown"
        return f"ceilings: {arithmetic}, read {self.read / 1e9:,.1f} GB/s"

    def floor(self, work: tuple[float, float]) -> float:
        """Return the seconds below which nobody can do the work."""
        return max(work[0] / self.flops if self.flops else 0.0, work[1] / self.read)


def measure_ceilings(backend: _llmc.Backend, dtype: str) -> Ceilings:
    """Measure the sum of 512 MB, and on a CPU multiply-adds on registers alone; a GPU's arithmetic is what its data sheet says."""
    size = 512 << 20
    x, total, profile = backend.empty([size // 4]), backend.empty([1]), _llmc.Profile(backend)
    backend.zero(x)  # so that the system has assigned memory to all pages
    profile.start("else")
    for _ in range(6):
        backend.sum(total, x)
    profile.stop()
    return Ceilings(peak_flops(backend, dtype), size / min(t for name, _, t in profile.intervals() if name == "sum"))


# ---- the steps ----


@dataclass(frozen=True)
class Row:
    """What a step spends on the calls of an op with the same extents, in one phase."""

    phase: str
    op: str
    extents: tuple[int, ...]
    calls: int
    seconds: float


@dataclass(frozen=True)
class Steps:
    """What was measured. rows: of the step of `profiled` whose time is the median."""

    rows: list[Row]
    profiled: list[float]  # seconds of the profiled steps, on the device's clock
    others: list[float]  # seconds of the others, by the wall clock
    busy: float  # processor time of the steps over time and threads


def phase_of(mark: str, op: str, extents: Sequence[int], padded_vocab_size: int) -> str:
    """Return the phase of an op. The classifier runs in backward(), on logits, and sums its losses."""
    if mark == "backward" and (op == "sum" or (padded_vocab_size in extents and op != "encoder_backward")):
        return "classifier"
    return mark


def rows_of(intervals: Iterable[tuple[str, Sequence[int], float]], padded_vocab_size: int) -> list[Row]:
    """Add up the intervals of a step by phase, op and extents. Those that are marks' name the phase of what follows.

    Ops whose work nobody counts, as copies of a few numbers, are added up whatever their extents.
    """
    calls: dict[tuple[str, str, tuple[int, ...]], list[float]] = defaultdict(list)
    mark = "else"
    for name, extents, seconds in intervals:
        if name in PHASES:
            mark = name
            calls["else", "else", ()].append(seconds)
        else:
            counted = tuple(extents) if op_work(name, extents, "f32") else ()
            calls[phase_of(mark, name, extents, padded_vocab_size), name, counted].append(seconds)
    rows = [Row(*key, len(times), sum(times)) for key, times in calls.items()]
    return sorted(rows, key=lambda row: (PHASES.index(row.phase), -row.seconds))


class Trainer:
    """A model with an optimizer and one micro-batch of random tokens."""

    def __init__(self, args: argparse.Namespace) -> None:
        config = llmc.GPT2Config.from_descriptor(args.model)
        if args.layers:
            config = dataclasses.replace(config, num_layers=args.layers)
        if args.seq_len > config.max_seq_len:
            raise ValueError(f"-t is {args.seq_len}, but {args.model} has {config.max_seq_len} positions")
        self.model = llmc.GPT2(
            config, device=args.device, dtype=args.dtype, recompute=args.recompute, threads=args.threads
        )
        self.backend = self.model.backend
        if self.backend.runs_ahead:
            self.backend.set_option("graphs", "off")  # a recorded graph would hide the ops
        self.optimizer = llmc.Muon(self.model) if args.optimizer == "muon" else llmc.AdamW(self.model)
        rng = np.random.default_rng(0)
        self.tokens = rng.integers(0, config.vocab_size, (2, args.batch_size, args.seq_len), dtype=np.int32)

    def step(self, mark: Callable[[str], None] = lambda name: None) -> None:
        """Make an update. mark: is called with the name of what begins."""
        mark("forward")
        self.model.zero_grad()
        self.model.forward(self.tokens[0])
        mark("backward")
        self.model.backward(self.tokens[1])
        mark("optimizer")
        self.optimizer.step(1e-4)
        mark("else")
        self.backend.synchronize()

    def measure(self, steps: int) -> Steps:
        """Make as many profiled steps, and others in turns with them, after two of each that warm up."""
        profile = _llmc.Profile(self.backend)
        threads = self.backend.info().threads
        measured: list[tuple[float, list[Row]]] = []
        others, busy = [], []
        for _ in range(2 + steps):
            begin, processor = time.perf_counter(), time.process_time()
            self.step()
            others.append(time.perf_counter() - begin)
            busy.append((time.process_time() - processor) / (threads * others[-1]))
            profile.start("else")
            self.step(profile.mark)
            profile.stop()
            rows = rows_of(profile.intervals(), self.model.config.padded_vocab_size)
            measured.append((sum(row.seconds for row in rows), rows))
        del measured[:2], others[:2], busy[:2]
        middle = sorted(measured, key=lambda m: m[0])[len(measured) // 2]
        return Steps(middle[1], [seconds for seconds, _ in measured], others, sorted(busy)[len(busy) // 2])


# ---- kernels ----


@dataclass(frozen=True)
class Kernel:
    """A kernel in all steps that a profiler saw. The last two are ncu's: bytes of DRAM, and percent of the tensor cores' cycles."""

    name: str
    calls: int
    seconds: float
    dram_bytes: float | None = None
    tensor: float | None = None


def kernel_name(text: str) -> str:
    """Return a kernel's name without what it returns, its namespaces, and its arguments. Kernels of libraries have theirs cut as well."""
    for part in ("(anonymous namespace)::", "<unnamed>::"):
        text = text.replace(part, "")
    text = re.split(r"[<(]", text)[0].strip()
    return text.rsplit(" ", 1)[-1].rsplit("::", 1)[-1]


def csv_rows(text: str, first: str) -> list[dict[str, str]]:
    """Return the rows of the table in a profiler's output, which has other lines before it. first: the first column's name."""
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.lstrip('"').startswith(first)), len(lines))
    end = next((i for i in range(begin, len(lines)) if not lines[i].strip()), len(lines))
    return list(csv.DictReader(io.StringIO("\n".join(lines[begin:end]))))


def number(text: str) -> float:
    """Return a number that is written with commas between the thousands."""
    return float(text.replace(",", ""))


def nsys_kernels(text: str) -> list[Kernel]:
    """Read `nsys stats --report cuda_gpu_kern_sum --format csv`."""
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for row in csv_rows(text, "Time (%)"):
        one = found[kernel_name(row["Name"])]
        one[0] += number(row["Instances"])
        one[1] += number(row["Total Time (ns)"]) * 1e-9
    return by_time(Kernel(name, int(calls), seconds) for name, (calls, seconds) in found.items())


NCU_METRICS = {
    "time": "gpu__time_duration.sum",
    "read": "dram__bytes_read.sum",
    "written": "dram__bytes_write.sum",
    "tensor": "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active",
}


def ncu_kernels(text: str) -> list[Kernel]:
    """Read what ncu writes by `--csv --print-units base --metrics ...`: a row for each metric of each call, times in nanoseconds."""
    calls: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    names = {}
    for row in csv_rows(text, "ID"):
        names[row["ID"]] = kernel_name(row["Kernel Name"])
        if row["Metric Value"].strip() not in ("", "n/a"):  # as that of tensor cores where there are none
            calls[row["ID"]][row["Metric Name"]] += number(row["Metric Value"])
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for call, metrics in calls.items():
        found[names[call]].append(metrics)

    def kernel(name: str, metrics: list[dict[str, float]]) -> Kernel:
        seconds = sum(m[NCU_METRICS["time"]] for m in metrics) * 1e-9
        dram = sum(m[NCU_METRICS["read"]] + m[NCU_METRICS["written"]] for m in metrics)
        tensor = sum(m[NCU_METRICS["tensor"]] * m[NCU_METRICS["time"]] for m in metrics) * 1e-9
        return Kernel(name, len(metrics), seconds, dram, tensor / seconds if seconds else 0.0)

    return by_time(kernel(name, metrics) for name, metrics in found.items())


def by_time(kernels: Iterable[Kernel]) -> list[Kernel]:
    """Return the kernels, those that take longest first."""
    return sorted(kernels, key=lambda k: -k.seconds)


def find_profiler(wanted: str) -> tuple[str, str] | None:
    """Return the name and the path of a profiler. wanted: "nsys", "ncu", or "auto" for the first there is.

    Raises:
        FileNotFoundError: if the one that is wanted by its name is not there.
    """
    for name in ("nsys", "ncu") if wanted == "auto" else (wanted,):
        path = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
        if path:
            return name, path
    if wanted == "auto":
        return None
    raise FileNotFoundError(f"{wanted} is neither on the PATH nor in /usr/local/cuda/bin")


def measure_kernels(
    profiler: tuple[str, str], args: argparse.Namespace, argv: Sequence[str]
) -> tuple[list[Kernel], int]:
    """Run this script under a profiler, which sees a few steps of it alone; return the kernels, and the number of steps.

    Raises:
        RuntimeError: if it has seen none.
    """
    name, path = profiler
    steps = args.steps if name == "nsys" else 1
    script = [sys.executable, __file__, *argv, "--captured", str(steps)]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report")
        if name == "nsys":
            first = [path, "profile", "--trace=cuda", "--sample=none", "--cpuctxsw=none", "--capture-range=cudaProfilerApi",
                     "--capture-range-end=stop", "-o", str(report), *script]  # fmt: skip
            then = [path, "stats", "--report", "cuda_gpu_kern_sum", "--format", "csv", f"{report}.nsys-rep"]
        else:
            first = [path, "--profile-from-start", "off", "--clock-control", "none", "--csv", "--print-units", "base",
                     "--metrics", ",".join(NCU_METRICS.values()), "--log-file", str(report), *script]  # fmt: skip
            then = []
        said = ""
        text = ""
        for command in filter(None, (first, then)):
            done = subprocess.run(command, capture_output=True, text=True)
            said += done.stdout + done.stderr
            text = done.stdout
            if done.returncode != 0:
                break
        if name == "ncu" and report.is_file():
            text = report.read_text(encoding="utf-8")
            said += text
        kernels = (nsys_kernels if name == "nsys" else ncu_kernels)(text)
    if not kernels:
        raise RuntimeError(f"{name} has seen no kernels. The last that it said:\n" + "\n".join(said.splitlines()[-8:]))
    return kernels, steps


def run_captured(args: argparse.Namespace) -> None:
    """Make steps that a profiler is to see, after two that it is not. The driver tells it, because that needs no toolkit."""
    trainer = Trainer(args)
    driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    for _ in range(2):
        trainer.step()
    driver.cuProfilerStart()
    for _ in range(args.captured):
        trainer.step()
    driver.cuProfilerStop()


# ---- tables ----


def print_ops(steps: Steps, dtype: str, top: Ceilings | None) -> list[dict[str, Any]]:
    """Print the table by op, and one by phase; return the rows of the first for JSON."""
    total = sum(row.seconds for row in steps.rows)
    lines, records = [], []
    for row in steps.rows:
        work = op_work(row.op, row.extents, dtype, row.phase)
        flops, bytes_ = (row.calls * x for x in work) if work else (None, None)
        floor = row.calls * top.floor(work) if work and top else None
        records.append({**dataclasses.asdict(row), "flops": flops, "bytes": bytes_, "floor": floor})

        def rate(amount: float | None, form: str, seconds: float = row.seconds) -> str:
            return format(amount / seconds, form) if amount and seconds else ""

        lines.append([row.op, row.phase if row.op != row.phase else "", "x".join(map(str, row.extents)), row.calls,
                      f"{row.seconds * 1e3:.2f}", f"{row.seconds / total:.1%}", rate(flops and flops / 1e9, ",.0f"),
                      rate(bytes_ and bytes_ / 1e9, ",.1f"), rate(floor, ".0%")])  # fmt: skip
    ops = sum(row.calls for row in steps.rows if row.op != "else")
    lines.append(["step", "", "", ops, f"{total * 1e3:.2f}", "100.0%", "", "", ""])
    print_table(["op", "phase", "extents", "calls", "ms", "share", "GFLOP/s", "GB/s", "of floor"], lines)
    print()
    phases = [(p, sum(row.seconds for row in steps.rows if row.phase == p)) for p in PHASES]
    print_table(["phase", "ms", "share"], [[p, f"{t * 1e3:.2f}", f"{t / total:.1%}"] for p, t in phases])
    return records


def print_kernels(kernels: Sequence[Kernel], steps: int) -> None:
    """Print the table by kernel, per step."""
    total = sum(k.seconds for k in kernels)
    rows = []
    for k in kernels:
        more = [] if k.dram_bytes is None else [f"{k.dram_bytes / k.seconds / 1e9:,.0f}", f"{k.tensor:.0f}%"]
        ms = k.seconds / steps * 1e3
        rows.append([k.name, f"{k.calls / steps:.4g}", f"{ms:.3f}", f"{k.seconds / total:.1%}", *more])
    more = [] if kernels[0].dram_bytes is None else ["DRAM GB/s", "tensor cores"]
    print_table(["kernel", "calls", "ms", "share", *more], rows)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-e", "--model", default="d12", help="d12, gpt3:c768, ... [d12]")
    add("--layers", type=int, help="in place of the model's")
    add("-b", "--batch-size", type=int, default=4, metavar="B", help="rows [4]")
    add("-t", "--seq-len", type=int, default=64, metavar="T", help="tokens of a row [64]")
    add("--dtype", choices=["f32", "bf16"], default="f32", help="[f32]")
    add("--optimizer", choices=["adamw", "muon"], default="adamw", help="[adamw]")
    add("--recompute", type=int, choices=[0, 1, 2], default=1, help="as of llmc-train [1]")
    add("--device", default="cpu", help="cpu, cuda or cuda:N [cpu]")
    add("--threads", type=int, default=0, help="CPU threads [as many as the process may use]")
    add("--steps", type=int, default=5, help="profiled steps [5]")
    add("--kernels", choices=["auto", "nsys", "ncu", "none"], default="auto",
        help="profiler of a GPU's kernels; auto: the first that is installed [auto]")  # fmt: skip
    add("--no-ceilings", action="store_true", help="do not measure what the device can do, which takes a second")
    add("--json", type=Path, metavar="FILE", help="also write the results to this file")
    add("--captured", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if min(args.batch_size, args.seq_len, args.steps, args.layers or 1) < 1:
        parser.error("-b, -t, --steps and --layers are at least 1")
    if args.device == "cpu" and args.kernels in ("nsys", "ncu"):
        parser.error(f"--kernels {args.kernels} is for a GPU: --device cuda")
    return args


def main(argv: Sequence[str]) -> None:
    """Run the profile and print its tables."""
    args = parse_arguments(argv)
    if args.captured:
        return run_captured(args)
    on_gpu = args.device != "cpu"
    profiler = find_profiler(args.kernels) if on_gpu and args.kernels != "none" else None
    trainer = Trainer(args)
    info, config = trainer.backend.info(), trainer.model.config
    about = machine(args.threads)
    print(f"{info.description}, {info.isa}; {info.options}" if on_gpu else machine_line(about))
    top = None if args.no_ceilings else measure_ceilings(trainer.backend, args.dtype)
    shape = (
        f"{args.model}, {config.num_layers} layers, B={args.batch_size} T={args.seq_len} {args.dtype}, {args.optimizer}"
    )
    print(shape if top is None else f"{shape}; {top}")
    steps = trainer.measure(args.steps)
    middle = sorted(steps.others)[len(steps.others) // 2]
    profiled = sorted(steps.profiled)[len(steps.profiled) // 2]
    flops = config.flops_per_token(args.seq_len) * args.batch_size * args.seq_len
    print(f"a step takes {middle * 1e3:.2f} ms, {flops / middle / 1e9:,.0f} GFLOP/s; profiled {profiled * 1e3:.2f} ms"
          + ("" if on_gpu else f"; processors busy {steps.busy:.0%}"))  # fmt: skip
    print()
    results: dict[str, Any] = {
        "machine": about | ({"gpu": info.description, "options": info.options} if on_gpu else {}),
        "model": args.model, "layers": config.num_layers, "B": args.batch_size, "T": args.seq_len, "dtype": args.dtype,
        "optimizer": args.optimizer,
        "ceilings": top and dataclasses.asdict(top), "seconds": steps.others, "profiled_seconds": steps.profiled,
        "busy": steps.busy, "ops": print_ops(steps, args.dtype, top),
    }  # fmt: skip
    if profiler:
        del trainer  # its memory is the profiled process's
        print(f"\nkernels, by {profiler[0]}:\n", flush=True)
        kernels, count = measure_kernels(profiler, args, argv)
        print_kernels(kernels, count)
        results["kernels"] = {"by": profiler[0], "steps": count, "rows": [dataclasses.asdict(k) for k in kernels]}
    elif on_gpu and args.kernels == "auto":
        print("\nNot by kernel: there is neither nsys nor ncu, which the CUDA toolkit has.")
    write_json(args.json, results)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (llmc.Error, ValueError, OSError, RuntimeError) as e:
        sys.exit(f"profile.py: error: {e}")
