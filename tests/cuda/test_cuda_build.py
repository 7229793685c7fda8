"""Which of NVIDIA's wheels a build asks for, and where their libraries are looked for. No GPU, toolkit or wheel is needed."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

from llmc.system import cuda_libs

BACKEND = Path(__file__).parents[2] / "cmake" / "build_backend.py"


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Load the build backend as on a system without CUDA."""
    pytest.importorskip("scikit_build_core", reason="scikit-build-core is not installed: pip install '.[test]'")
    spec = importlib.util.spec_from_file_location("build_backend", BACKEND)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "_system_nvcc", lambda: None)
    monkeypatch.setattr(module, "_has_header", lambda name, nvcc: False)
    monkeypatch.chdir(BACKEND.parents[1])  # the folder in which a frontend calls it
    for variable in ("SKBUILD_CMAKE_DEFINE", "CMAKE_ARGS"):
        monkeypatch.delenv(variable, raising=False)
    return module


def names(requirements: list[str]) -> set[str]:
    return {r.split("=")[0].split(">")[0] for r in requirements}


@pytest.mark.parametrize(
    "settings", [None, {}, {"cmake.define.USE_CUDA": "OFF"}, {"cmake.define.LLMC_BUILD_APPS": "ON"}]
)
def test_a_cpu_build_asks_for_nothing(backend, settings):
    assert backend.cuda_requirements(settings) == []
    assert not any("nvidia" in r for r in backend.get_requires_for_build_wheel(settings))


def test_a_cuda_build_brings_compiler_and_headers(backend):
    compiler = {"nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime", "nvidia-cuda-cccl"}
    assert names(backend.cuda_requirements({"cmake.define.USE_CUDA": "ON"})) == compiler | {"nvidia-cublas"}
    cudnn = names(backend.cuda_requirements({"cmake.define.USE_CUDNN": ["ON"]}))  # implies CUDA
    assert cudnn == compiler | {"nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-cudnn-frontend"}
    assert set(backend.cuda_requirements({"cmake.define.USE_CUDA": "1"})) <= set(
        backend.get_requires_for_build_editable({"cmake.define.USE_CUDA": "1"})
    )


@pytest.mark.parametrize(
    "variable,value", [("CMAKE_ARGS", "-G Ninja -DUSE_CUDA:BOOL=ON"), ("SKBUILD_CMAKE_DEFINE", "A=1;USE_CUDA=ON")]
)
def test_flags_by_environment(backend, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    assert "nvidia-cuda-nvcc" in names(backend.cuda_requirements())


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for nvcc is a shell script")
@pytest.mark.parametrize("release,major", [("12.4, V12.4.131", "12"), ("13.0, V13.0.88", "13")])
def test_wheels_match_the_systems_compiler(backend, monkeypatch, tmp_path, release, major):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}'\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(backend, "_system_nvcc", lambda: str(nvcc))
    wanted = names(backend.cuda_requirements({"cmake.define.USE_CUDNN": "ON"}))
    assert wanted == {
        "nvidia-cublas" if major == "13" else "nvidia-cublas-cu12",
        f"nvidia-cudnn-cu{major}",
        "nvidia-cudnn-frontend",
    }


def test_headers_of_the_system_are_not_downloaded(backend, monkeypatch):
    monkeypatch.setattr(backend, "_has_header", lambda name, nvcc: name != "cudnn_frontend.h")
    wanted = names(backend.cuda_requirements({"cmake.define.USE_CUDNN": "ON"}))
    assert "nvidia-cudnn-frontend" in wanted and not wanted & {"nvidia-cublas", "nvidia-cudnn-cu13"}


def test_library_directories(monkeypatch, tmp_path):
    lib = "bin" if cuda_libs.os.name == "nt" else "lib"
    for folder in ("site/nvidia/cu13", "site/nvidia/cudnn", "toolkit"):
        (tmp_path / folder / lib).mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    found = [Path(d) for d in cuda_libs.library_directories()]
    assert tmp_path / "site/nvidia/cu13" / lib in found and tmp_path / "toolkit" / lib in found
    assert found.index(tmp_path / "site/nvidia/cudnn" / lib) < found.index(tmp_path / "toolkit" / lib)
