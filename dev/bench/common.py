"""What the benchmarks share: timing, the machine's description, tables and JSON."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from llmc import _llmc
    from llmc.models.config import GPT2Config


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --threads and --json to a parser."""
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: as many as the process may use)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")


# What keeps other libraries to AVX2 where LLMC_ISA=avx2 keeps llmc to it: OpenBLAS, PyTorch's own kernels, oneDNN, MKL.
PEERS_ON_AVX2 = {
    "OPENBLAS_CORETYPE": "Haswell",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


def environment_of_peers() -> dict[str, str]:
    """Return the variables that keep other libraries to the instructions that LLMC_ISA leaves to llmc."""
    return PEERS_ON_AVX2 if os.environ.get("LLMC_ISA") == "avx2" else {}


def machine(threads: int = 0) -> dict[str, Any]:
    """Describe the hardware and software that figures of this process belong to. threads: of the CPU; 0 is the default number."""
    from llmc import _llmc

    info = _llmc.Backend("cpu", threads).info()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return {
        "date": datetime.datetime.now().isoformat(timespec="minutes"),
        "command": " ".join(["python", *sys.argv]),
        "cpu": info.description,
        "isa": info.isa,
        "caches": [info.l1_bytes, info.l2_bytes, info.l3_bytes],
        "threads": info.threads,
        "memory_gb": round(info.total_bytes / 1e9, 1),
        "system": platform.platform(),
        "compiler": _llmc.compiler,
        "llmc": _llmc.__version__,
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
    }


def machine_line(about: dict[str, Any]) -> str:
    """Return in one line what machine() returned of the CPU, its caches and the kernel set."""
    caches = ", ".join(f"L{i} {size >> 10} KB" for i, size in enumerate(about["caches"], 1) if size)
    return f"{about['cpu']}, {caches or 'caches unknown'}; {about['threads']} threads of {about['isa']}"


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches at most."""

    flops: float  # FLOP/s
    read: float  # bytes/s
    copy: float  # bytes/s, the sum of those read and those written

    def __str__(self) -> str:
        return f"{self.flops / 1e9:.0f} GFLOP/s, read {self.read / 1e9:.1f} GB/s, copy {self.copy / 1e9:.1f} GB/s"


def measured_ceilings(backend: _llmc.Backend, dtype: str, clock: Callable[[], float] = time.perf_counter) -> Ceilings:
    """Measure the ceilings with the backend's threads: multiply-adds on registers alone, the sum of 512 MB, and its copy."""
    from llmc import _llmc

    size = 512 << 20
    a, b, total = backend.empty([size // 4]), backend.empty([size // 4]), backend.empty([1])
    for t in (a, b):
        backend.zero(t)  # so that the system has assigned memory to all pages
    read = size / min(sample(lambda: backend.sum(total, a), 0.3, clock))
    copy = 2 * size / min(sample(lambda: backend.copy(b, a), 0.3, clock))
    return Ceilings(_llmc.cpu_peak_flops(dtype, backend.info().threads), read, copy)


@dataclass(frozen=True)
class StepWork:
    """What a training step has to do, whoever does it."""

    flops: float  # 6N + 6LCT a token, as llm.c counts them: half of a full attention
    bytes: float  # that AdamW reads and writes

    def floor(self, top: Ceilings) -> float:
        """Return the seconds below which no step can be."""
        return self.flops / top.flops + self.bytes / top.read


def adamw_bytes(dtype: str) -> int:
    """Return the bytes that AdamW reads and writes for a parameter: both moments, the parameter and its gradient, and bf16's master."""
    return 28 if dtype == "f32" else 26


def step_work(model: str, dtype: str, B: int, T: int) -> StepWork:
    """Return the work of a step. model: a descriptor, as "d12"; dtype: "f32" or "bf16"; B, T: rows and tokens per row."""
    from llmc import GPT2Config

    config = GPT2Config.from_descriptor(model)
    return StepWork(float(config.flops_per_token(T) * B * T), float(adamw_bytes(dtype) * config.num_parameters))


def newton_schulz_flops(config: GPT2Config, steps: int = 5) -> int:
    """Return the FLOP of Muon's iterations in one update: three products each, 4 k k n + 2 k k k for matrices of sides k <= n."""
    C = config.channels
    # Queries, keys, values and the projection; the two of the feed-forward layer.
    sides = [(C, C)] * 4 + [(C, 4 * C)] * 2
    return steps * config.num_layers * sum(4 * k * k * n + 2 * k**3 for k, n in sides)


def peak_rss() -> int:
    """Return the most memory that this process has held, in bytes."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def timed(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Call run once and return how long it took, in the seconds of the clock."""
    start = clock()
    run()
    return clock() - start


def sample(run: Callable[[], object], budget: float, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Measure run several times, after a first time that warms up.

    Args:
        run: what is measured.
        budget: seconds; it runs as often as fits in them, and at least three times.
        clock: what measures.

    Returns:
        The times, in the seconds of the clock.
    """
    timed(run)
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < 3 or time.perf_counter() < end:
        times.append(timed(run, clock))
    return times


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean of positive values."""
    return statistics.geometric_mean(values)


def normal_bf16(rng: np.random.Generator, *shape: int) -> NDArray[np.uint16]:
    """Return normally distributed bf16 values as their bits. They are f32 values rounded towards zero."""
    return (rng.standard_normal(shape, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table. The first column is aligned to the left, the others to the right."""
    cells = [[str(c) for c in header]] + [[str(c) for c in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for number, row in enumerate(cells):
        aligned = [row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        print("| " + " | ".join(aligned) + " |")
        if number == 0:
            print("|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|")
    sys.stdout.flush()


def write_json(path: Path | None, results: dict[str, Any]) -> None:
    """Write results to a file, if there is a path."""
    if path is not None:
        path.write_text(json.dumps(results, indent=1) + "\n")


def append_json(path: Path, row: dict[str, Any]) -> None:
    """Append a line of JSON to a file and flush it to the disk, so that it stays if something hangs or is killed later."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
