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
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: as many as the process may use)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")


def machine(threads: int = 0) -> dict[str, Any]:
    """The hardware and software that a figure belongs to."""
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
        "threads": info.threads,
        "memory_gb": round(info.total_bytes / 1e9, 1),
        "system": platform.platform(),
        "compiler": _llmc.compiler,
        "llmc": _llmc.__version__,
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
    }


def peak_rss() -> int:
    """The most memory that this process has held, in bytes."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def timed(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    run()
    return clock() - start


def sample(run: Callable[[], object], budget: float, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Times of at least three runs, and as many as fit the budget in seconds; the first, which warms up, is not among them."""
    timed(run)
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < 3 or time.perf_counter() < end:
        times.append(timed(run, clock))
    return times


def geometric_mean(values: Sequence[float]) -> float:
    return statistics.geometric_mean(values)


def normal_bf16(rng: np.random.Generator, *shape: int) -> NDArray[np.uint16]:
    """Random bf16 values as bits, cut off from f32."""
    return (rng.standard_normal(shape, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A Markdown table; columns but the first are right-aligned."""
    cells = [[str(c) for c in header]] + [[str(c) for c in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for number, row in enumerate(cells):
        aligned = [row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        print("| " + " | ".join(aligned) + " |")
        if number == 0:
            print("|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|")
    sys.stdout.flush()


def write_json(path: Path | None, results: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(results, indent=1) + "\n")


def append_json(path: Path, row: dict[str, Any]) -> None:
    """One more line of JSON, on the disk when this returns: whatever hangs or is killed later, it is there."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
