"""One rank of test_mpi.py: mpiexec -n N python mpi_rank.py, with conftest.py on the path.

Prints "rank R of N: all is well", or ends with an error. What was never exchanged does not keep it from ending.
"""

from __future__ import annotations

import time
from unittest.mock import patch

import pytest
from mpi4py import MPI
from test_host_comm import by_threads, many_collectives

from llmc import _llmc
from llmc.distributed.mpi import open_comm


class Watch:
    """What open_comm asks of a World."""

    def __init__(self, rank: int, size: int, timeout: float = 60.0) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        self.places: list[str] = []
        self.late: list[str] = []

    def at(self, text: str) -> None:
        self.places.append(text)

    def overdue(self, text: str) -> None:
        self.late.append(text)


def check_collectives(rank: int, size: int, backend: _llmc.Backend) -> None:
    """Ranks need not have MPI's order."""
    comm = open_comm(backend, watch := Watch(size - 1 - rank, size))
    found = many_collectives(comm, backend)
    expected = by_threads(size, many_collectives)[comm.rank]
    assert len(found) == len(expected)
    for a, b in zip(expected, found):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()
    assert not watch.late


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


def main() -> None:
    world, backend = MPI.COMM_WORLD, _llmc.Backend("cpu", 1)
    checks = [check_arguments, check_collectives]
    if world.size > 1:
        checks += [check_disagreement, check_time_limit]
    for check in checks:
        check(world.rank, world.size, backend)
        world.Barrier()
    send_at_the_end(world.rank, world.size, backend)
    print(f"rank {world.rank} of {world.size}: all is well\n", end="", flush=True)


if __name__ == "__main__":
    main()
