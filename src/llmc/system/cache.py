"""Where files go that can be made or downloaded again."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_directory() -> Path:
    """Return the folder for llmc's files: LLMC_CACHE, or one in the system's place for caches. It need not exist."""
    if configured := os.environ.get("LLMC_CACHE"):
        return Path(configured)
    home = Path(os.path.expanduser("~"))
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local", "llmc", "Cache")
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "llmc"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache", "llmc")


def tune_file() -> Path:
    """Return the file in which the CUDA backend keeps the algorithms that timing chose for matmuls: LLMC_CUDA_TUNE_FILE, or one here.

    The variable is read here and not in C++, which would not get it as UTF-8 on Windows.
    """
    if configured := os.environ.get("LLMC_CUDA_TUNE_FILE"):
        return Path(configured)
    return cache_directory() / "cublaslt_algorithms.tsv"
