"""Show what this llmc is and what it found on this machine."""

from __future__ import annotations

import argparse
import platform
import sys

from llmc import _llmc
from llmc.system.memory import available_memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to a parser: it has none."""


def run(args: argparse.Namespace) -> int:
    """Print one line per fact; return the exit code, 0."""
    backend = _llmc.Backend("cpu")
    info = backend.info()
    isa = _llmc.isa()
    caches = {"L1": info.l1_bytes, "L2": info.l2_bytes, "L3": info.l3_bytes}
    rows = {
        "llmc": _llmc.__version__,
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "compiler": _llmc.compiler,
        "CPU": info.description,
        "caches": ", ".join(f"{name} {size >> 10} KB" for name, size in caches.items() if size) or "unknown",
        "memory": f"{info.total_bytes / 1e9:.1f} GB, {available_memory(backend) / 1e9:.1f} GB free",
        "kernel sets": f"built {', '.join(isa['built'])}; usable here {', '.join(isa['usable'])}; used {isa['used']}",
        "bf16": "multiplied as it is"
        if info.bf16_arithmetic
        else "widened to f32: it saves memory, in training hardly time",
        "threads": f"{info.threads}, {info.pinning}",
        "CUDA": _llmc.cuda_status(),
    }
    for name, value in rows.items():
        sys.stdout.write(f"{name + ':':13} {value}\n")
    return 0
