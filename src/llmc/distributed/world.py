"""World: the processes that train one model together, as one of them sees it.

A star of TCP connections to rank 0 carries control only (who is there, small values, who is lost), never tensors; those travel by
the Comm that open_comm() makes. All ranks call the collective methods in the same order.
"""

from __future__ import annotations

import atexit
import base64
import faulthandler
import json
import os
import re
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from llmc import _llmc
from llmc.distributed import cpus
from llmc.distributed.launcher import launcher_is_gone
from llmc.distributed.lifeline import LOST, Lifeline, exit_now, leave, line_of
from llmc.distributed.place import Place, Settings, find_place
from llmc.distributed.rendezvous import (
    SharedFile,
    StartError,
    addresses_of,
    is_loopback,
    join,
    listen_anywhere,
    listen_at,
    meet_by_mpi,
    node_id,
    resolve,
)
from llmc.distributed.server import Member, Server


class World:
    """The processes of a run. One that trains alone has a World of size 1, whose every method works and waits for nobody.

    Attributes:
        rank, size: this process's number, and how many there are.
        local_rank, local_size: the same among the processes of this host, by ascending rank.
        hosts: the name of each rank's host.
        meet: how the ranks found each other: "alone", "mpi", "tcp" or "fs".
        timeout: the longest that a collective may wait, in seconds.
    """

    def __init__(
        self,
        rank: int,
        hosts: list[str],
        nodes: list[str],
        meet: str,
        timeout: float,
        lifeline: Lifeline | None = None,
        server: Server | None = None,
    ) -> None:
        self.rank, self.size, self.hosts, self.meet, self.timeout = rank, len(hosts), hosts, meet, timeout
        neighbours = [r for r in range(self.size) if nodes[r] == nodes[rank]]
        self.local_rank, self.local_size = neighbours.index(rank), len(neighbours)
        self._neighbours = neighbours
        self._lifeline, self._server = lifeline, server
        self._failed: int | None = None  # the exit code, if this rank has told that it fails
        self._before_close: list[Callable[[], None]] = []

    @classmethod
    def alone(cls) -> World:
        """Return the World of a process that trains alone."""
        return cls(0, [socket.gethostname()], [""], "alone", 0.0)

    @property
    def leads(self) -> bool:
        """Whether this process is rank 0, which logs and saves."""
        return self.rank == 0

    @property
    def host(self) -> str:
        """The name of this process's host."""
        return self.hosts[self.rank]

    def share(self, value: bytes | None = None) -> bytes:
        """Return rank 0's value on every rank. The other ranks' own is not looked at.

        Raises:
            ValueError: if rank 0 gives None.
        """
        if self.leads and value is None:
            raise ValueError("rank 0 shares None, expected bytes")
        text = base64.b64encode(value).decode() if self.leads and value is not None else None
        return base64.b64decode(self.share_value(text))

    def share_value(self, value: Any = None) -> Any:
        """Return rank 0's value on every rank, which is anything that JSON can say. The other ranks' own is not looked at."""
        return self._gather("share", value if self.leads else None)[0]

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, by rank. A value is anything that JSON can say."""
        return self._gather("gather", value)

    def agree(self, what: str, values: dict[str, Any]) -> None:
        """End every rank unless all have rank 0's values; the line names a rank that differs, its host, the key and both values.

        Args:
            what: what the values are of: "the settings", "the data".
            values: of this rank, by name, as JSON can say them.
        """
        everyone = self._gather(f"agree on {what}", values)
        for rank, theirs in enumerate(everyone):
            for key in sorted({*theirs, *everyone[0]}):
                here, there = theirs.get(key), everyone[0].get(key)
                if json.dumps(here, sort_keys=True) != json.dumps(there, sort_keys=True):  # a NaN agrees with a NaN
                    why = f"{what} differ: {key} is {here!r}, rank 0 on {self.hosts[0]} has {there!r}"
                    leave(line_of(rank, self.hosts[rank], why, self.rank), 2)

    def barrier(self) -> None:
        """Wait for every rank, as long as it takes: rank 0 may sample, save or tokenise for an hour. Only a lost rank ends it."""
        self._gather("barrier", None)

    def _gather(self, what: str, value: Any) -> list[Any]:
        if self.size == 1:
            return [value]
        if self._lifeline is None:
            raise _llmc.Error("the ranks of this process have been let go of: close() was called")
        return self._lifeline.gather(what, value)

    def at(self, text: str, number: int | None = None) -> None:
        """Note where this rank is, for the messages of the others if it is lost. It sends nothing, so it costs nothing.

        Args:
            text: as "step 12, reduce_scatter".
            number: grows as the run goes on, the same on every rank at the same place (a step): who has the lowest is behind.
        """
        if self._lifeline is not None:
            self._lifeline.at = text
            if number is not None:
                self._lifeline.number = number

    def overdue(self, text: str) -> None:
        """Tell that a collective has waited longer than timeout allows. It ends every rank, with a line that names one behind.

        Args:
            text: what was waited for: "it has waited 600 s for all_reduce of step 12".
        """
        if self._lifeline is not None:
            self._lifeline.send({"t": "overdue", "why": text})

    def fail(self, reason: str, code: int = 1) -> None:
        """Tell the other ranks why this one ends; each prints it and ends. The caller is to end this process then.

        Args:
            reason: in one line, as "ZeroDivisionError: division by zero".
            code: the exit code that the caller will have. The others end with it too if it is 2, 130 or 143 (wrong arguments, or
                stopped by a signal), else with 75.
        """
        if self._lifeline is not None:
            if self._failed is None:
                self._lifeline.fail(" ".join(reason.split())[:2000], code)
            self._failed = code

    def give_up(self, reason: str) -> None:
        """End this process and tell the others why, unless the run is over: for threads that find that a rank is out of reach."""
        if self._lifeline is not None:
            print(f"rank {self.rank} on {self.host}: {reason}", file=sys.stderr)
            self.fail(reason, LOST)
            exit_now(LOST)

    @contextmanager
    def failure_told(self) -> Iterator[None]:
        """Tell the other ranks of an error that leaves the block: they would wait for this one."""
        try:
            yield
        except BaseException as e:
            code = (
                130 if isinstance(e, KeyboardInterrupt) else 2 if isinstance(e, (ValueError, FileNotFoundError)) else 1
            )
            self.fail(described(e), code)
            raise

    def open_comm(self, backend: _llmc.Backend) -> _llmc.Comm:
        """Return the Comm by which the tensors of a backend travel: MPI for a CPU, NCCL for a GPU. All ranks call it.

        Raises:
            ValueError: if the ranks cannot exchange tensors so, and what to do.
        """
        if self.size == 1:
            raise ValueError("a process that trains alone has nobody to exchange tensors with")
        device = backend.info().name
        kinds = self._gather("devices", device.partition(":")[0])
        for rank, kind in enumerate(kinds):
            if kind != kinds[0]:
                why = f"its device is {kind}, that of rank 0 on {self.hosts[0]} is {kinds[0]}"
                leave(line_of(rank, self.hosts[rank], why, self.rank), 2)
        if not device.startswith("cuda"):
            from llmc.distributed import mpi

            return mpi.open_comm(backend, self)
        from llmc.distributed import nccl

        if os.environ.get("LLMC_ALLOW_SHARED_GPU") != "1":
            self._refuse_shared_gpus(backend.info().uuid)
        return nccl.open_comm(backend, self)

    def _refuse_shared_gpus(self, uuid: str) -> None:
        seen: dict[tuple[str, str], int] = {}
        for rank, (node, gpu) in enumerate(self._gather("GPUs", [node_id(), uuid])):
            first = seen.setdefault((node, gpu), rank)
            if first != rank:
                why = f"it has the same GPU as rank {first} ({gpu}): start one process per GPU"
                leave(line_of(rank, self.hosts[rank], why, self.rank), 2)

    def cpus(self, threads: int = 0) -> int:
        """Divide the CPUs of each host among its ranks, and bind this process to its own. Call it before the Backend is opened.

        CPUs that the launcher has bound ranks to stay as they are.

        Args:
            threads: a number that the user asked for, or 0.

        Returns:
            The number of threads for the Backend: threads, or OMP_NUM_THREADS, or as many as this rank has CPUs. A process alone
            gets back what it gave.
        """
        if self.size == 1:
            return threads
        usable, chosen = (
            _llmc.default_threads(),
            os.environ.get("OMP_NUM_THREADS"),
        )  # else what affinity and a quota allow
        everyone = self._gather("CPUs", cpus.usable_cpus())
        mine = everyone[self.rank]
        sharers = [r for r in self._neighbours if everyone[r] == mine]
        index, count = sharers.index(self.rank), len(sharers)
        if not chosen:
            usable = max(1, (usable - index + count - 1) // count)
        if mine is not None:
            part = cpus.share_of(mine, index, count)
            cpus.bind(part)
            if not chosen:
                usable = min(usable, len(part))
        return threads or usable

    def before_close(self, action: Callable[[], None]) -> None:
        """Have close() call something first, while the ranks can still hear each other. All ranks call it."""
        self._before_close.append(action)

    def close(self) -> None:
        """End regularly: wait until all ranks have come here, no longer than timeout, and let go of them.

        A run whose rank 0 may be busy for long calls barrier() before. After fail() it ends the process instead: the interpreter's
        own end would call MPI_Finalize, which waits for ranks that have gone.
        """
        if self._failed is not None:
            exit_now(self._failed)
        while self._before_close:
            self._before_close.pop()()
        lifeline, self._lifeline = self._lifeline, None
        if lifeline is not None:
            if not lifeline.close(self.timeout):
                why = f"it has waited {self.timeout:g} s for the other ranks to end"
                print(f"rank {self.rank} on {self.host}: {why}", file=sys.stderr)
                lifeline.fail(why, LOST)
                exit_now(LOST)
            if self._server is not None:
                self._server.join(3)


# ---- the World of this process ----

_world: World | None = None
_warned: set[str] = set()
_opening = threading.Lock()


def open_world(settings: Settings, environ: Mapping[str, str] = os.environ) -> World:
    """Find out who this process is, meet the others, and return the World. It is opened once in a process: later calls return the same.

    From then on an exception that nobody catches ends the other ranks too, and so does the end of a rank before the others'.

    Args:
        settings: the run's.
        environ: the environment's variables.

    Raises:
        ValueError, ImportError: if environment and settings contradict each other, or say too little. Ranks that do not find
            together end with a line on stderr instead.
    """
    global _world
    with _opening:
        if _world is None:
            place = find_place(environ, settings)
            if place.warning and place.warning not in _warned:
                _warned.add(place.warning)
                print(f"warning: {place.warning}", file=sys.stderr)
            if place.size == 1:
                return World.alone()
            _world = _meet(place, settings.dist_timeout, environ)
            sys.excepthook = _ends_all(_world)
            atexit.register(_world.close)
        return _world


def described(error: BaseException) -> str:
    """Return an error in a line, as Python shows it."""
    name, text = type(error).__name__, str(error)
    return f"{name}: {text}" if text else name


def _ends_all(world: World) -> Any:
    """Return an excepthook that tells the other ranks before it shows the error, and ends this process without waiting for them."""
    shown = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        code = 130 if issubclass(kind, KeyboardInterrupt) else 1
        world.fail("interrupted" if code == 130 else described(error), code)
        try:
            shown(kind, error, trace)
        finally:
            exit_now(code)

    return hook


def _silence(environ: Mapping[str, str], timeout: float) -> float:
    """Return the seconds without a sign of life after which a rank is lost."""
    text = environ.get("LLMC_HEARTBEAT_TIMEOUT", "")
    if not text:
        return min(60.0, timeout)
    if not re.fullmatch(r"\d+(\.\d+)?", text) or float(text) < 2:  # there is a heartbeat a second
        raise ValueError(f"LLMC_HEARTBEAT_TIMEOUT is '{text}', expected seconds, at least 2")
    return float(text)


def _meet(place: Place, timeout: float, environ: Mapping[str, str]) -> World:
    """Find rank 0 in the way that place says, and wait until all ranks are there."""
    node, rank, job = node_id(), place.rank, place.job
    silence = _silence(environ, timeout)
    sockets: list[socket.socket] = []
    addresses: list[tuple[str, int]] = []
    token = environ.get("LLMC_TOKEN", "").encode()
    file: SharedFile | None = None
    if place.meet == "mpi":
        # MPI's own start waits for all ranks, without a limit and with Python's lock: of the timers only one of C's ends that.
        faulthandler.dump_traceback_later(timeout, exit=True, file=2)
        try:
            rank, sockets, addresses, token = meet_by_mpi(place, node)
        finally:
            faulthandler.cancel_dump_traceback_later()
    elif place.meet == "tcp":
        if not token and not is_loopback(place.host):
            raise ValueError(
                f"rank 0 listens at {place.host}, which other hosts can reach, and LLMC_TOKEN is not set: give it the same secret on "
                "every host (export LLMC_TOKEN=$(openssl rand -hex 16))"
            )
        if rank == 0:
            sockets = listen_at(place.host, place.port, other_hosts=bool(token))
        addresses = [(resolve(place.host), place.port)]
    else:
        file = SharedFile(place.directory, job, place.size)
        if rank == 0:
            token = secrets.token_bytes(32)
            sockets = listen_anywhere(place.host)
            file.write(addresses_of(sockets), token)
    member = Member(rank, place.size, socket.gethostname(), node, _llmc.__version__, job)
    server: Server | None = None
    try:
        if rank == 0:
            server = Server(
                sockets,
                token,
                member,
                timeout=timeout,
                silence=silence,
                may_return=place.meet != "mpi",
                orphaned=launcher_is_gone,
                complete=file.remove if file is not None else lambda: None,
            )
            lifeline = Lifeline(server.local_end(), rank, member.host, silence=silence)
            server.start()
        else:
            candidates = file.read if file is not None else lambda: (addresses, token)
            sock, decoder = join(candidates, member, timeout, persist=file is not None)
            lifeline = Lifeline(sock, rank, "its host", silence=silence, decoder=decoder)
    except StartError as e:
        leave(f"rank {rank} on {member.host} ends: {e}", e.code)
    lifeline.start()
    start = lifeline.started()
    return World(rank, start["hosts"], start["nodes"], place.meet, timeout, lifeline, server)
