"""Where pip and CUDA toolkits put NVIDIA's libraries. The extension opens these at first use (csrc/cuda/dynamic_library.cpp)."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

# Folders in the package nvidia. Packages of CUDA 13 share one, those of CUDA 12 have one each.
_WHEEL_FOLDERS = ("cu13", "cublas", "cudnn", "nccl")
_LIBRARY_FOLDERS = ("bin/x86_64", "bin") if os.name == "nt" else ("lib", "lib64")


def library_directories() -> list[str]:
    """Return the folders that may hold NVIDIA's libraries and exist: those of Python's packages first, then CUDA_HOME's and the like."""
    spec = importlib.util.find_spec("nvidia")
    wheels = list(spec.submodule_search_locations or []) if spec else []
    roots = [Path(wheel, folder) for wheel in wheels for folder in _WHEEL_FOLDERS]
    roots += [Path(os.environ[v]) for v in ("CUDA_HOME", "CUDA_PATH", "CUDNN_PATH", "NCCL_HOME") if os.environ.get(v)]
    if os.name != "nt":
        roots.append(Path("/usr/local/cuda"))
    return [str(root / folder) for root in roots for folder in _LIBRARY_FOLDERS if (root / folder).is_dir()]
