"""This project's build backend (PEP 517): scikit-build-core, with NVIDIA's compiler and headers added to a CUDA build's requirements.

If a CUDA build is asked for (-C cmake.define.USE_CUDA=ON, USE_CUDNN=ON, USE_NCCL=ON), those parts of NVIDIA's compiler and headers that
this system lacks are required as wheels from PyPI, and cmake/NvidiaWheels.cmake finds them in the build environment. Any other build
requires nothing from NVIDIA.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scikit_build_core import build as _build
from scikit_build_core.build import *  # noqa: F403

_ConfigSettings = Mapping[str, Any] | None


def _defined(name: str, config_settings: _ConfigSettings) -> bool:
    """Return whether CMake's option is on: by pip's -C, or by the environment variables that scikit-build-core reads."""
    settings = config_settings or {}
    value = settings.get(f"cmake.define.{name}", settings.get(f"skbuild.cmake.define.{name}"))
    if value is None:
        text = f"{os.environ.get('SKBUILD_CMAKE_DEFINE', '')};{os.environ.get('CMAKE_ARGS', '')}"
        found = re.findall(rf"(?:^|[\s;])(?:-D)?{name}(?::\w+)?=(\w+)", text)
        value = found[-1] if found else "OFF"
    return str(value[-1] if isinstance(value, list) else value).upper() in {"1", "ON", "YES", "TRUE", "Y"}


def _system_nvcc() -> str | None:
    """Return the path of the nvcc that cmake/NvidiaWheels.cmake would take from this system, or None if there is none."""
    if os.environ.get("CUDACXX"):
        return shutil.which(os.environ["CUDACXX"])
    places = [os.path.join(os.environ[v], "bin") for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    places += [*os.environ.get("PATH", "").split(os.pathsep), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(places))


def _has_header(name: str, nvcc: str | None) -> bool:
    """Return whether this system has a header of NVIDIA's, beside nvcc or in a usual place."""
    roots = [os.environ.get(v) for v in ("CUDA_HOME", "CUDA_PATH", "CUDNN_PATH", "NCCL_HOME")] + ["/usr", "/usr/local"]
    if nvcc:
        roots.append(str(Path(nvcc).resolve().parent.parent))
    return any(root and Path(root, "include", name).is_file() for root in roots)


def cuda_requirements(config_settings: _ConfigSettings = None) -> list[str]:
    """Return the wheels that the build needs because this system lacks what is in them.

    Args:
        config_settings: what pip's -C gave, as PEP 517 hands it over.

    Returns:
        Requirements, as "nvidia-cublas>=13.0,<14"; none if no CUDA build is asked for.
    """
    cudnn, nccl = _defined("USE_CUDNN", config_settings), _defined("USE_NCCL", config_settings)
    if not (cudnn or nccl or _defined("USE_CUDA", config_settings)):
        return []
    required: list[str] = []
    major = "13"
    nvcc = _system_nvcc()
    if nvcc:
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
        found = re.search(r"release (\d+)\.", version)
        major = found[1] if found else major
    else:
        parts = ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime", "cuda-cccl")
        required += [f"nvidia-{part}==13.0.*" for part in parts]
    if not _has_header("cublasLt.h", nvcc):
        required.append("nvidia-cublas>=13.0,<14" if major == "13" else f"nvidia-cublas-cu{major}")
    if cudnn:
        if not _has_header("cudnn.h", nvcc):
            required.append(f"nvidia-cudnn-cu{major}>=9.1,<10")
        if not _has_header("cudnn_frontend.h", nvcc):
            required.append("nvidia-cudnn-frontend>=1.15,<1.19")  # later ones need more packages and NVRTC's headers
    if nccl and os.name != "nt" and not _has_header("nccl.h", nvcc):
        required.append(f"nvidia-nccl-cu{major}>=2.20,<3")
    return required


def get_requires_for_build_wheel(config_settings: _ConfigSettings = None) -> list[str]:
    """Return the requirements of a build of a wheel (PEP 517)."""
    return [*_build.get_requires_for_build_wheel(config_settings), *cuda_requirements(config_settings)]


def get_requires_for_build_editable(config_settings: _ConfigSettings = None) -> list[str]:
    """Return the requirements of an editable build (PEP 660)."""
    return [*_build.get_requires_for_build_editable(config_settings), *cuda_requirements(config_settings)]
