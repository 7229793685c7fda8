"""Comm over NCCL: one rank on a GPU; and several processes on the emulated device, which a stand-in for NCCL connects."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llmc
from llmc import _llmc

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("cuda")]

RANKS = Path(__file__).with_name("nccl_ranks.py")


@pytest.fixture
def nccl_id(cuda: _llmc.Backend) -> bytes:
    try:
        return _llmc.nccl_id()
    except _llmc.Error as e:
        if "emulated" in cuda.info().description:  # the build that has this device has the stand-in
            raise
        pytest.skip(str(e))


@pytest.fixture
def comm(cuda: _llmc.Backend, nccl_id: bytes) -> _llmc.Comm:
    return _llmc.nccl_comm(cuda, 0, 1, nccl_id)


@pytest.fixture
def in_ranks(cuda: _llmc.Backend, nccl_id: bytes) -> Callable[..., list[Any]]:
    """Return a function that runs a part of nccl_ranks.py in processes, one for each rank, and returns their results."""
    if "emulated" not in cuda.info().description:
        pytest.skip("several ranks want several GPUs, or the emulated device")

    def run(part: str, size: int, *, lost: int = 0, timeout: float = 60.0, **settings: Any) -> list[Any]:
        """lost: how many of the last ranks are expected to end by a signal, or are killed when the others have ended."""
        environment = os.environ | {
            "LLMC_EMULATION_DEVICES": str(max(size, 1)),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(llmc.__file__).parents[1]),
        }
        processes = []
        for rank in range(max(size, 1)):
            arguments = [part, str(rank), str(size), nccl_id.hex(), str(timeout), json.dumps(settings)]
            command = [sys.executable, str(RANKS), *arguments]
            processes.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
        try:
            results = []
            for process in processes[: len(processes) - lost]:
                out, err = process.communicate(timeout=100)
                assert process.returncode == 0, err
                results.append(json.loads(out.splitlines()[-1]))
            return results
        finally:
            for process in processes:
                process.kill()
                process.communicate()

    return run


@pytest.mark.parametrize("dtype", ["f32", "bf16", "i32", "i16"])
def test_nccl_with_one_rank(cuda: _llmc.Backend, comm: _llmc.Comm, dtype: str) -> None:
    assert (comm.rank, comm.size) == (0, 1)
    raw = np.arange(1, 5001).astype({"f32": np.float32, "bf16": np.uint16, "i32": np.int32, "i16": np.int16}[dtype])
    for collective in ("all_reduce", "reduce_scatter", "all_gather", "broadcast"):
        xs = [cuda.empty([5000], dtype), cuda.empty([1], dtype)]
        for x in xs:
            x.from_host(raw[: x.numel])
        if dtype in ("i32", "i16") and collective in ("all_reduce", "reduce_scatter"):
            with pytest.raises(ValueError, match=f"{collective}: {dtype} .5000. is not of floats"):
                getattr(comm, collective)(xs)
            continue
        comm.wait(getattr(comm, collective)(xs))
        for x in xs:
            np.testing.assert_array_equal(x.to_host(), raw[: x.numel])
    assert comm.sum([1.5, -2.0]) == [1.5, -2.0]
    comm.barrier()
    comm.check()


def test_nccl_begins_after_what_is_queued(cuda: _llmc.Backend, comm: _llmc.Comm) -> None:
    """A collective reads what ops before it wrote, and ops after wait() read what it wrote."""
    n = 1 << (18 if "emulated" in cuda.info().description else 22)
    a, b, c = (cuda.empty([n]) for _ in range(3))
    a.from_host(np.ones(n, np.float32))
    for _ in range(20):
        cuda.residual_forward(b, a, b)
    comm.all_reduce([b])
    comm.wait()
    cuda.residual_forward(c, b, b)
    np.testing.assert_array_equal(c.to_host(), np.full(n, 40.0))


def test_nccl_checks_its_arguments(cuda: _llmc.Backend, comm: _llmc.Comm, nccl_id: bytes) -> None:
    with pytest.raises(ValueError, match="rank 2 of 2"):
        _llmc.nccl_comm(cuda, 2, 2, nccl_id)
    with pytest.raises(ValueError, match="an NCCL id has"):
        _llmc.nccl_comm(cuda, 0, 1, b"short")
    with pytest.raises(ValueError, match="the timeout is 0 s"):
        _llmc.nccl_comm(cuda, 0, 1, nccl_id, timeout=0.0)
    with pytest.raises(ValueError, match="NCCL needs a CUDA backend"):
        _llmc.nccl_comm(_llmc.Backend("cpu"), 0, 1, nccl_id)
    with pytest.raises(ValueError, match="root is 1 of 1"):
        comm.broadcast([cuda.empty([3])], 1)
    with pytest.raises(ValueError, match="ticket 1 of 0"):
        comm.wait(1)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_overlapped_reduction(cuda: _llmc.Backend, comm: _llmc.Comm, dtype: str) -> None:
    """Gradients go through NCCL while backward goes on; with one rank that does not change them."""
    config = llmc.GPT2Config(max_seq_len=32, vocab_size=128, num_layers=2, num_heads=1, channels=64)
    tokens = np.random.default_rng(2).integers(0, 128, (1, 33)).astype(np.int32)

    def gradients(sharded: bool | None) -> tuple[float, list[np.ndarray]]:
        model = llmc.GPT2(config, backend=cuda, dtype=dtype, seed=5)
        model.zero_grad()
        begin = time.perf_counter()
        sink = None
        if sharded is not None:
            sink = _llmc.Reduction(comm, llmc.AdamW(model, comm=comm).partition if sharded else None)
            sink.begin([2.0])
        model.forward(tokens[:, :-1])
        model.backward(tokens[:, 1:], sink=sink)
        if sink is not None:
            assert sink.notes() == [2.0]
            assert 0.0 < sink.own_seconds() < time.perf_counter() - begin
        return model.mean_loss, [g.to_host() for g in model.gradient_tensors().values()]

    loss, alone = gradients(None)
    for sharded in (False, True):
        reduced_loss, reduced = gradients(sharded)
        assert reduced_loss == loss
        for gradient, expected in zip(reduced, alone):
            np.testing.assert_array_equal(gradient, expected)


def test_devices_have_names_of_their_own(cuda: _llmc.Backend) -> None:
    uuid = cuda.info().uuid
    assert uuid.startswith("GPU-") and len(uuid) == 40
    assert _llmc.Backend("cuda").info().uuid == uuid
    assert _llmc.Backend("cpu").info().uuid == ""


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_collectives(in_ranks: Callable[..., list[Any]], size: int) -> None:
    results = in_ranks("collectives", size)
    assert all(r == results[0] for r in results)


def test_ops_before_and_behind_collectives(in_ranks: Callable[..., list[Any]]) -> None:
    # b: 4 + 8; c: 2 + 4; each rank: 2 a + b + c
    assert in_ranks("order", 2) == [[2.0 + 12.0 + 6.0], [4.0 + 12.0 + 6.0]]


def test_a_rank_that_waits_for_something_else_does_its_part(in_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    assert in_ranks("apart", 3, word=str(tmp_path / "word")) == [3.0] * 3


def test_a_rank_that_never_comes(cuda: _llmc.Backend, nccl_id: bytes) -> None:
    with pytest.raises(_llmc.Error, match=r"rank 0 of 2 has waited 0.2 s for the others \(the start\)"):
        _llmc.nccl_comm(cuda, 0, 2, nccl_id, timeout=0.2)


def test_a_rank_that_dies(in_ranks: Callable[..., list[Any]]) -> None:
    first, second = in_ranks("killed", 3, lost=1)
    assert first == [first[0]] * 4 and "rank 2 has left" in first[0]
    assert len(second) == 1 and "rank 2 has left" in second[0]


def test_a_rank_that_dies_while_another_frees_memory(in_ranks: Callable[..., list[Any]]) -> None:
    [[heard]] = in_ranks("killed", 2, lost=1, watcher=0, frees=True)
    assert "rank 1 has left" in heard


def test_a_rank_that_is_stopped(in_ranks: Callable[..., list[Any]]) -> None:
    [heard] = in_ranks("killed", 2, lost=1, timeout=0.5, stopped=True)
    assert heard == ["nccl: rank 0 of 2 has waited 0.5 s for the others (sum)"] * 4
    assert in_ranks("killed", 2, lost=1, stopped=True, watcher=0) == [["all_reduce"]]


@pytest.mark.parametrize(
    "optimizer,dtype,sharded,size",
    [("Muon", "f32", True, 2), ("AdamW", "bf16", True, 4), ("AdamW", "f32", False, 2)],
)
def test_ranks_train_as_one_process_does(
    in_ranks: Callable[..., list[Any]], optimizer: str, dtype: str, sharded: bool, size: int
) -> None:
    settings = {"optimizer": optimizer, "dtype": dtype, "sharded": sharded}
    [alone] = in_ranks("train", 0, **settings)
    results = in_ranks("train", size, **settings)
    assert all(r == results[0] for r in results)
    tolerance = 1e-5 if dtype == "f32" else 5e-3
    np.testing.assert_allclose(results[0]["losses"], alone["losses"], rtol=tolerance)
    np.testing.assert_allclose(results[0]["norms"], alone["norms"], rtol=10 * tolerance)
    assert alone["losses"][-1] < alone["losses"][0] - 0.05
