"""The Comm over MPI, by as many processes as there are ranks."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from mpi import mpiexec

from llmc import _llmc
from llmc.distributed.mpi import open_comm

RANK = str(Path(__file__).with_name("mpi_rank.py"))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks(size: int) -> None:
    done = mpiexec(size, RANK)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(done.stdout.split("\n")) == ["", *[f"rank {r} of {size}: all is well" for r in range(size)]]


def test_ranks_that_were_started_by_hand() -> None:
    if importlib.util.find_spec("mpi4py") is None:
        pytest.skip("mpi4py is not installed")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    ranks = [
        subprocess.Popen(
            [sys.executable, RANK, str(rank), "3", str(port)], env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(3)
    ]  # fmt: skip
    said = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert said == [f"rank {rank} of 3: all is well\n" for rank in range(3)]
    assert [rank.returncode for rank in ranks] == [0, 0, 0]


def test_without_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)

    class World:
        rank, size, meet = 0, 2, "mpi"

    with pytest.raises(ValueError, match="several processes on CPUs exchange gradients by MPI.*pip install mpi4py"):
        open_comm(_llmc.Backend("cpu", 1), World())  # type: ignore[arg-type]
