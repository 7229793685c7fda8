"""One rank of test_mpi.py: mpiexec -n N python mpi_rank.py, or by hand python mpi_rank.py R N HOST PORT; with conftest.py on the path.

Prints "rank R of N: all is well", or ends with an error. What was never exchanged does not keep it from ending.
"""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from test_host_comm import by_threads, many_collectives

from llmc import _llmc
from llmc.distributed.mpi import open_comm
from llmc.distributed.world import open_world


class Watch:
    """What open_comm asks of a World."""

    def __init__(self, rank: int, size: int, timeout: float = 60.0) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        self.places: list[str] = []
        self.late: list[str] = []

    meet = "mpi"

    def gather(self, value: object) -> list[object]:
        raise AssertionError("MPI has told who is who")

    def at(self, text: str) -> None:
        self.places.append(text)

    def overdue(self, text: str) -> None:
        self.late.append(text)


def check_collectives(rank: int, size: int, backend: _llmc.Backend) -> None:
    """Ranks need not have MPI's order."""
    compare(open_comm(backend, watch := Watch(size - 1 - rank, size)), backend)
    assert not watch.late


def compare(comm: _llmc.Comm, backend: _llmc.Backend) -> None:
    found = many_collectives(comm, backend)
    expected = by_threads(comm.size, many_collectives)[comm.rank]
    assert len(found) == len(expected)
    for a, b in zip(expected, found):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()


def check_disagreement(rank: int, size: int, backend: _llmc.Backend) -> None:
    comm, x, y = open_comm(backend, Watch(rank, size)), backend.empty([5000]), backend.empty([4])
    with pytest.raises(
        _llmc.Error, match=f"ranks disagree: rank 0 is in all_reduce #1, .*; rank {size - 1} is in all_g"
    ):
        comm.wait(comm.all_gather([y]) if rank == size - 1 else comm.all_reduce([x]))


def check_time_limit(rank: int, size: int, backend: _llmc.Backend) -> None:
    """Rank 0 is late. Those who wait tell where they are, then that it takes too long, and may free what was to be exchanged."""
    comm, x = open_comm(backend, watch := Watch(rank, size, 0.2 if rank else 60.0)), backend.empty([5000])
    with patch("llmc.distributed.mpi.LONG", 0.1), patch("llmc.distributed.mpi.GRACE", 0.1):
        if rank == 0:
            time.sleep(0.6)
            comm.all_reduce([x])
        else:
            with pytest.raises(_llmc.Error, match="all_reduce #1, .*: has waited 0 s for other ranks"):
                comm.wait(comm.all_reduce([x]))
            with pytest.raises(_llmc.Error, match="has waited"):
                comm.barrier()
            assert watch.places == ["all_reduce #1, 1 tensors, 5000 elements"]
            assert watch.late == [f"it has waited 0.2 s for {watch.places[0]}"]


def check_arguments(rank: int, size: int, backend: _llmc.Backend) -> None:
    from mpi4py import MPI

    with pytest.raises(
        ValueError, match=f"rank {rank} of {size + 1}, but MPI knows of {size}: .* mpiexec -n {size + 1}"
    ):
        open_comm(backend, Watch(rank, size + 1))
    with patch("mpi4py.MPI.Query_thread", lambda: MPI.THREAD_FUNNELED):
        with pytest.raises(ValueError, match="for one thread only"):
            open_comm(backend, Watch(rank, size))


def send_at_the_end(rank: int, size: int, backend: _llmc.Backend) -> None:
    """The others need what a rank sends that does not wait for it, and ends."""
    global comm, x
    comm, x = open_comm(backend, Watch(rank, size)), backend.empty([5000])
    comm.broadcast([x])
    if rank > 0:
        time.sleep(0.2)
        comm.wait()


def check_started_by_mpiexec(backend: _llmc.Backend) -> str:
    from mpi4py.MPI import COMM_WORLD as world

    checks = [check_arguments, check_collectives]
    if world.size > 1:
        checks += [check_disagreement, check_time_limit]
    for check in checks:
        check(world.rank, world.size, backend)
        world.Barrier()
    send_at_the_end(world.rank, world.size, backend)
    return f"rank {world.rank} of {world.size}"


def check_started_by_hand(rank: int, size: int, host: str, port: int, backend: _llmc.Backend) -> str:
    """Ranks that met by TCP exchange tensors by MPI, if it is MPICH; others say what to do."""
    met = {"dist_init": "tcp", "dist_host": host, "dist_port": port, "dist_dir": "", "dist_timeout": 60.0}
    world = open_world(SimpleNamespace(processes=size, rank=rank, gpus_per_node=1, max_restarts=0, **met))
    assert (world.rank, world.size) == (rank, size)
    try:
        comm = world.open_comm(backend)
    except ValueError as e:
        assert "only MPICH's processes can meet without its launcher" in str(e) and f"mpiexec -n {size}" in str(e)
    else:
        compare(comm, backend)
        world.barrier()
        world.close()  # as `llmc train` does, before the process ends
    return f"rank {rank} of {size}"


def main() -> None:
    backend = _llmc.Backend("cpu", 1)
    if len(sys.argv) > 1:
        rank, size, host, port = sys.argv[1:]
        who = check_started_by_hand(int(rank), int(size), host, int(port), backend)
    else:
        who = check_started_by_mpiexec(backend)
    print(f"{who}: all is well\n", end="", flush=True)


if __name__ == "__main__":
    main()
