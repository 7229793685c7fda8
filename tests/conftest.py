"""Fixtures: the devices that are here, seeds, tiny models and tiny token files."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import ArrayLike

import llmc
from llmc import _llmc
from llmc.formats.shards import write_shard


def _has_cuda() -> bool:
    try:
        _llmc.Backend("cuda")
    except _llmc.Error:
        return False
    return True


CUDA = [pytest.param("cuda", marks=pytest.mark.cuda)] if _has_cuda() else []
# Every kernel set of the CPU backend that runs on this machine.
KERNEL_SETS = [f"cpu:{isa}" for isa in _llmc.isa()["usable"]]


@pytest.fixture(params=["cpu", *CUDA])
def device(request: pytest.FixtureRequest) -> str:
    """'cpu', and 'cuda' where there is one."""
    name: str = request.param
    return name


@pytest.fixture(scope="module", params=[*KERNEL_SETS, *CUDA])
def backend(request: pytest.FixtureRequest) -> _llmc.Backend:
    """A backend of each kernel set that runs here, and CUDA where there is one."""
    return make_backend(request.param)


def make_backend(name: str, threads: int = 2) -> _llmc.Backend:
    """'cuda', 'cpu', or 'cpu:avx2' for a kernel set other than the best."""
    device, _, isa = name.partition(":")
    if device == "cuda":
        return _llmc.Backend(device)
    before = os.environ.get("LLMC_ISA")
    try:
        if isa:
            os.environ["LLMC_ISA"] = isa
        return _llmc.Backend("cpu", threads)
    finally:
        if isa and before is None:
            del os.environ["LLMC_ISA"]
        elif isa:
            os.environ["LLMC_ISA"] = before or ""


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Of a seed that is the test's own, and the same in every run, whatever folder the test is in."""
    return np.random.default_rng(zlib.crc32(f"tests/{request.path.name}::{request.node.name}".encode()))


# Nothing in it is a multiple of 8: V < Vp, head size 11, a context of 19.
TINY = llmc.GPT2Config(max_seq_len=19, vocab_size=61, num_layers=2, num_heads=3, channels=33)


@pytest.fixture
def tiny(device: str) -> Callable[..., llmc.GPT2]:
    """tiny(dtype="bf16", ...) -> a model of two small layers, whose weights are all random: biases and layernorms too."""

    def make(config: llmc.GPT2Config = TINY, **options: object) -> llmc.GPT2:
        model = llmc.GPT2(config, device=device, **options)  # type: ignore[arg-type]
        randomize(model)
        return model

    return make


def randomize(model: llmc.GPT2, seed: int = 0, scale: float = 8.0) -> None:
    """Weights large enough that attention is not uniform, and no bias is 0 and no layernorm weight 1."""
    rng = np.random.default_rng(seed)
    for name, shape in ((n, model.parameter_tensors()[n].shape) for n in model.parameters):
        values = 0.02 * scale * rng.standard_normal(shape)
        if name in ("ln1w", "ln2w", "lnfw"):
            values += 1.0
        if name == "wte":
            values[model.config.vocab_size :] = 0.0
        model.parameters[name] = values


@pytest.fixture
def tokens(rng: np.random.Generator) -> Callable[..., np.ndarray]:
    """tokens(B, T) -> random ids of TINY's vocabulary."""

    def draw(B: int, T: int, vocab_size: int = TINY.vocab_size) -> np.ndarray:
        return rng.integers(0, vocab_size, (B, T), dtype=np.int32)

    return draw


@pytest.fixture
def shards(tmp_path: Path) -> Callable[..., list[Path]]:
    """shards([10, 20], ...) writes a token file for each, named so that glob order is theirs; numbers stand for 0, 1, 2, ..."""

    def write(contents: list[ArrayLike | int], *, vocab_size: int | None = None, name: str = "shard") -> list[Path]:
        paths = []
        for i, content in enumerate(contents):
            paths.append(tmp_path / f"{name}_{i:03d}.bin")
            write_shard(paths[-1], np.arange(content) if isinstance(content, int) else content, vocab_size=vocab_size)
        return paths

    return write
