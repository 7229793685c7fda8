"""The Comm over MPI, by as many processes as there are ranks."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmc import _llmc
from llmc.distributed.mpi import open_comm

# Of Open MPI, which else refuses more ranks than cores, and root.
ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
}


def mpiexec(size: int, *command: str) -> subprocess.CompletedProcess[str]:
    """Run ranks under the mpiexec of this environment, else of the system; skip if there is none."""
    if importlib.util.find_spec("mpi4py") is None:
        pytest.skip("mpi4py is not installed")
    launcher = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
    if launcher is None:
        pytest.skip("there is no mpiexec: pip install mpich")
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    environment = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(
        [launcher, "-n", str(size), sys.executable, *command],
        env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


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
