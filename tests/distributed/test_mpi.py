"""The Comm over MPI, by as many processes as there are ranks."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mpi import mpiexec
from namespaces import two_hosts, why_not

from llmc import _llmc
from llmc.distributed.mpi import open_comm

needs_mpi4py = pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="mpi4py is not installed")
RANK = str(Path(__file__).with_name("mpi_rank.py"))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks(size: int) -> None:
    done = mpiexec(size, RANK)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(done.stdout.split("\n")) == ["", *[f"rank {r} of {size}: all is well" for r in range(size)]]


def by_hand(rank: int, size: int, host: str, port: int) -> dict[str, Any]:
    """Return how a rank is started without an mpiexec, for Popen."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    return {
        "args": [sys.executable, RANK, str(rank), str(size), host, str(port)],
        "env": os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "LLMC_TOKEN": "a secret"},
    }


def all_is_well(ranks: list[subprocess.Popen[str]]) -> None:
    said = [rank.communicate(timeout=60) for rank in ranks]
    assert [out for out, _ in said] == [f"rank {r} of {len(ranks)}: all is well\n" for r in range(len(ranks))], said
    assert [rank.returncode for rank in ranks] == [0] * len(ranks)


@needs_mpi4py
def test_ranks_that_were_started_by_hand() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    all_is_well([subprocess.Popen(**by_hand(rank, 2, "127.0.0.1", port), **pipes) for rank in range(2)])


@needs_mpi4py
@pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
def test_ranks_that_were_started_by_hand_on_two_hosts(tmp_path: Path) -> None:
    with two_hosts(tmp_path) as hosts:
        starts = [by_hand(rank, 2, hosts[0].name, 29500) for rank in range(2)]
        all_is_well([host.start(how["args"], env=how["env"]) for host, how in zip(hosts, starts)])


def test_without_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)

    class World:
        rank, size, meet = 0, 2, "mpi"

    with pytest.raises(ValueError, match="several processes on CPUs exchange gradients by MPI.*pip install mpi4py"):
        open_comm(_llmc.Backend("cpu", 1), World())  # type: ignore[arg-type]
