"""World: the processes that train one model together, as one of them sees it.

A star of TCP connections to rank 0 carries control only (who is there, small values, who is lost), never tensors; those travel by
the Comm that open_comm() makes. All ranks call the collective methods in the same order.
"""

from __future__ import annotations

import socket
from typing import Any

from llmc import _llmc


class World:
    """The processes of a run. One that trains alone has a World of size 1, whose every method works and waits for nobody.

    Attributes:
        rank, size: this process's number, and how many there are.
        local_rank, local_size: the same among the processes of this host.
        hosts: the name of each rank's host.
        meet: how the ranks found each other: "alone", "mpi", "tcp" or "fs".
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    hosts: list[str]
    meet: str

    @classmethod
    def alone(cls) -> World:
        """Return the World of a process that trains alone."""
        world = cls()
        world.rank, world.size, world.local_rank, world.local_size = 0, 1, 0, 1
        world.hosts, world.meet = [socket.gethostname()], "alone"
        return world

    @property
    def leads(self) -> bool:
        """Whether this process is rank 0, which logs and saves."""
        return self.rank == 0

    @property
    def host(self) -> str:
        """The name of this process's host."""
        return self.hosts[self.rank]

    def share(self, value: bytes | None = None) -> bytes:
        """Return rank 0's value; the other ranks' own is not looked at."""
        assert value is not None
        return value

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, by rank. A value is anything that JSON can say."""
        return [value]

    def agree(self, what: str, values: dict[str, Any]) -> None:
        """End every rank unless all have rank 0's values; the line names a rank that differs, its host, the key and both values.

        Args:
            what: what the values are of: "the settings", "the data".
            values: of this rank, by name, as JSON can say them.
        """

    def barrier(self) -> None:
        """Wait for every rank, as long as it takes."""

    def at(self, text: str) -> None:
        """Note where this rank is ("step 12, reduce_scatter"), for the messages of the others if it is lost. It costs nothing."""

    def overdue(self, text: str) -> None:
        """Tell that a collective has waited longer than the time limit allows. Ends every rank with a line that names those behind.

        Args:
            text: what was waited for: "all_reduce of step 12 has waited 600 s".
        """

    def fail(self, reason: str, code: int = 1) -> None:
        """Tell the other ranks why this one ends; each prints it and ends. The caller then ends this process itself.

        Args:
            reason: in one line, as "ZeroDivisionError: division by zero".
            code: the exit code that the caller will have. The others have it too if it is 2 (wrong arguments), else 75.
        """

    def open_comm(self, backend: _llmc.Backend) -> _llmc.Comm:
        """Return the Comm by which the tensors of a backend travel: MPI for a CPU, NCCL for a GPU. All ranks call it.

        Raises:
            ValueError: if the ranks cannot exchange tensors so, and what to do.
        """
        raise ValueError("a process that trains alone has nobody to exchange tensors with")

    def cpus(self, threads: int = 0) -> int:
        """Divide the CPUs of each host among its ranks, and bind this process to its own. Call it before the Backend is opened.

        Args:
            threads: a number that the user asked for, or 0.

        Returns:
            The number of threads for the Backend: threads, or as many as this rank has CPUs (0 for a process alone: all).
        """
        return threads

    def close(self) -> None:
        """End regularly: wait until all ranks have come here, for a while, and let go of them."""


def open_world(settings: Any) -> World:
    """Find out who this process is, meet the others, and return the World. It is opened once in a process: later calls return the same.

    Args:
        settings: anything that has processes, rank, gpus_per_node, dist_init, dist_dir, dist_host, dist_port and dist_timeout
            as TrainConfig has them.

    Raises:
        ValueError: if environment and settings contradict each other, or say too little.
    """
    return World.alone()
