"""Fixtures: the devices of this machine, random numbers, tiny models and tiny token files."""

from __future__ import annotations

import os
import signal
import zlib
from collections.abc import Callable, Iterator
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
# The CPU backend with each kernel set that runs on this machine.
KERNEL_SETS = [f"cpu:{isa}" for isa in _llmc.isa()["usable"]]


@pytest.fixture(autouse=True)
def _signals_are_left_alone() -> Iterator[None]:
    """Fail a test that leaves a handler behind: what later tests send to themselves would end all of them."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    yield
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.fixture(params=["cpu", *CUDA])
def device(request: pytest.FixtureRequest) -> str:
    """Run the test with 'cpu', and with 'cuda' if there is a GPU."""
    name: str = request.param
    return name


@pytest.fixture(scope="module", params=[*KERNEL_SETS, *CUDA])
def backend(request: pytest.FixtureRequest) -> _llmc.Backend:
    """Run the test with a CPU backend of each kernel set that runs here, and with CUDA if there is a GPU."""
    return make_backend(request.param)


def make_backend(name: str, threads: int = 2) -> _llmc.Backend:
    """Make a backend. name: 'cuda', 'cpu', or as 'cpu:avx2' for another kernel set than the best."""
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


@pytest.fixture(scope="module")
def cuda() -> _llmc.Backend:
    """Return the GPU, real or emulated; the test is skipped if there is none."""
    try:
        return _llmc.Backend("cuda")
    except _llmc.Error as e:
        pytest.skip(str(e))


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Return a generator whose seed is made from the names of test and file: the same in every run, another for every test."""
    return np.random.default_rng(zlib.crc32(f"tests/{request.path.name}::{request.node.name}".encode()))


# No size is a multiple of 8, so that kernels meet partial vectors: V < Vp, head size 11, 19 positions.
TINY = llmc.GPT2Config(max_seq_len=19, vocab_size=61, num_layers=2, num_heads=3, channels=33)


@pytest.fixture
def tiny(device: str) -> Callable[..., llmc.GPT2]:
    """Return a function that makes a model of two small layers: tiny(dtype="bf16", ...). All its weights are random, biases too."""

    def make(config: llmc.GPT2Config = TINY, **options: object) -> llmc.GPT2:
        model = llmc.GPT2(config, device=device, **options)  # type: ignore[arg-type]
        randomize(model)
        return model

    return make


def randomize(model: llmc.Model, seed: int = 0, scale: float = 8.0) -> None:
    """Give the model random weights, so large that attention is not uniform, and no bias is 0 and no layernorm weight 1."""
    rng = np.random.default_rng(seed)
    for spec in _llmc.parameter_table(model.config.native()):
        values = 0.02 * scale * rng.standard_normal(spec.shape)
        if spec.name in ("ln1w", "ln2w", "lnfw"):
            values += 1.0
        values[len(values) - spec.padding :] = 0.0
        model.parameters[spec.name] = values


@pytest.fixture
def tokens(rng: np.random.Generator) -> Callable[..., np.ndarray]:
    """Return a function that draws tokens of TINY's vocabulary: tokens(B, T)."""

    def draw(B: int, T: int, vocab_size: int = TINY.vocab_size) -> np.ndarray:
        return rng.integers(0, vocab_size, (B, T), dtype=np.int32)

    return draw


@pytest.fixture
def shards(tmp_path: Path) -> Callable[..., list[Path]]:
    """Return a function that writes token files and returns their paths: shards([10, [5, 6, 7]]).

    A number n stands for the tokens 0 .. n-1. The names of the files sort in their order.
    """

    def write(contents: list[ArrayLike | int], *, vocab_size: int | None = None, name: str = "shard") -> list[Path]:
        paths = []
        for i, content in enumerate(contents):
            paths.append(tmp_path / f"{name}_{i:03d}.bin")
            write_shard(paths[-1], np.arange(content) if isinstance(content, int) else content, vocab_size=vocab_size)
        return paths

    return write
