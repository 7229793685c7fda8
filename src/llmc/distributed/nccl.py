"""The Comm of tensors on GPUs: NCCL, and a thread that watches over it.

What a rank queues on its GPU waits for the other ranks there, where no call of the host's sees it; so a thread asks from time to
time whether NCCL has lost a rank, and how long a collective has been going on.
"""

from __future__ import annotations

import threading
import time
import weakref
from typing import Any, Protocol

from llmc import _llmc

INTERVAL = 0.25  # seconds between two looks
LONG = 1.0  # seconds after which the world is told where this rank is
GRACE = 3.0  # seconds in which the world names a rank that is lost, which NCCL does not


class World(Protocol):
    """What is asked of a World here: llmc.distributed.world."""

    rank: int
    size: int
    timeout: float

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""

    def share(self, value: bytes | None = None) -> bytes:
        """Return rank 0's value on every rank."""

    def overdue(self, text: str) -> None:
        """Tell that a collective has waited longer than the time limit allows."""

    def at(self, text: str) -> None:
        """Note where this rank is."""

    def give_up(self, reason: str) -> None:
        """End this process and the others."""


def open_comm(backend: _llmc.Backend, world: World) -> _llmc.Comm:
    """Return the Comm of a GPU's backend among the ranks. All of them call it.

    Args:
        backend: of a GPU that no other rank has.
        world: who this process is. It hears of a rank that NCCL has lost, and of a collective that takes longer than its timeout.
    """
    nccl_id = world.share(_llmc.nccl_id() if world.leads else None)
    comm = _llmc.nccl_comm(backend, world.rank, world.size, nccl_id, world.timeout)
    threading.Thread(target=_watch, args=(weakref.ref(comm), world), name="llmc NCCL", daemon=True).start()
    return comm


def _watch(reference: weakref.ref[Any], world: World) -> None:
    told = False
    while (comm := reference()) is not None:
        try:
            comm.check()
            seconds, op = comm.pending()
        except _llmc.Error as e:
            time.sleep(GRACE)
            return world.give_up(str(e))
        del comm
        if seconds > LONG and not told:
            world.at(op)
        if seconds > world.timeout and not told:
            told = True
            world.overdue(f"it has waited {world.timeout:g} s for {op}")
        time.sleep(INTERVAL)
