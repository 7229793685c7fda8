"""The Comm over MPI, by as many processes as there are ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from mpi import mpiexec

from llmc import _llmc
from llmc.distributed.mpi import open_comm


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks(size: int) -> None:
    done = mpiexec(size, str(Path(__file__).with_name("mpi_rank.py")))
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(done.stdout.split("\n")) == ["", *[f"rank {r} of {size}: all is well" for r in range(size)]]


def test_without_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)

    class World:
        rank, size = 0, 2

    with pytest.raises(ValueError, match="several processes on CPUs exchange gradients by MPI.*pip install mpi4py"):
        open_comm(_llmc.Backend("cpu", 1), World())  # type: ignore[arg-type]
