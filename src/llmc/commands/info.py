"""Show what this llmc is and what it found on this machine: what a bug report needs."""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path

from llmc import _llmc
from llmc.system.memory import available_memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to a parser: it has none."""


def run(args: argparse.Namespace) -> int:
    """Print one line per fact; return the exit code, 0."""
    backend = _llmc.Backend("cpu")
    info = backend.info()
    isa = _llmc.isa()
    commit = _llmc.commit()
    caches = {"L1": info.l1_bytes, "L2": info.l2_bytes, "L3": info.l3_bytes}
    rows = {
        "llmc": f"{_llmc.__version__}{f', commit {commit}' if commit else ''}, in {Path(_llmc.__file__).parent}",
        "Python": f"{platform.python_version()} ({sys.executable})",
        "system": _system(),
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
        "packages": _packages(),
        "variables": _variables(),
    }
    for name, value in rows.items():
        sys.stdout.write(f"{name + ':':13} {value}\n")
    return 0


def _system() -> str:
    """Return the operating system: a name of a distribution, if it has one, and the kernel."""
    name = ""
    if sys.platform == "linux":
        try:
            name = platform.freedesktop_os_release()["PRETTY_NAME"] + ", "
        except (OSError, KeyError):
            pass
    return name + platform.platform()


def _packages() -> str:
    """Return the versions of the installed packages that llmc or one of its extras names."""
    try:
        required = metadata.requires("llmc-train") or []
    except metadata.PackageNotFoundError:
        return "unknown: llmc was not installed by pip"
    names = {re.split(r"[^\w.-]", line)[0] for line in required if "extra == 'dev'" not in line.replace('"', "'")}
    versions = {}
    for name in sorted(names - {"llmc-train"}):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _variables() -> str:
    """Return the environment variables that change what llmc does; of a secret only that it is set."""
    prefixes = ("LLMC_", "OMP_", "GOMP_", "KMP_", "CUDA_", "NCCL_", "TIKTOKEN_", "HF_", "SLURM_JOB_ID", "MPL")
    values = {name: os.environ[name] for name in sorted(os.environ) if name.startswith(prefixes)}
    shown = [f"{name}={'(set)' if 'TOKEN' in name.split('_')[1:] else value}" for name, value in values.items()]
    return " ".join(shown) or "none"
