"""Ranks of a run as threads of one process: they do all that ranks as processes do, but how they meet and how they end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest

from llmc import _llmc
from llmc.distributed.world import World
from llmc.training import trainer

R = TypeVar("R")

_here = threading.local()


class Lost(Exception):
    """What a rank gets in place of its end, if another has failed."""


class Meeting:
    """What the ranks have in common."""

    def __init__(self, size: int) -> None:
        self.values: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=60)
        self.failures: list[tuple[int, str, int]] = []  # rank, reason and exit code


class ThreadWorld(World):
    """The World of one of the threads."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        size = len(meeting.values)
        super().__init__(rank, [f"host{r}" for r in range(size)], ["here"] * size, "threads", 60.0)
        self.meeting = meeting

    def _gather(self, what: str, value: Any) -> list[Any]:
        meeting = self.meeting
        try:
            meeting.values[self.rank] = (what, value)
            meeting.barrier.wait()
            everyone = list(meeting.values)
            meeting.barrier.wait()
        except threading.BrokenBarrierError as e:
            raise Lost(f"rank {self.rank} lost another in {what}") from e
        assert {w for w, _ in everyone} == {what}, everyone
        return [v for _, v in everyone]

    def agree(self, what: str, values: dict[str, Any]) -> None:
        everyone = self._gather(what, values)
        for theirs in everyone:
            for key, first in everyone[0].items():
                if theirs.get(key) != first:
                    raise Lost(f"{what} differ: {key} is {theirs.get(key)!r}, rank 0 has {first!r}")

    def at(self, text: str, number: int | None = None) -> None:
        self.place = text

    def fail(self, reason: str, code: int = 1) -> None:
        if not self.meeting.barrier.broken:
            self.meeting.failures.append((self.rank, reason, code))
            self.meeting.barrier.abort()

    def open_comm(self, backend: _llmc.Backend) -> _llmc.Comm:
        backends = self._gather("open_comm", backend)
        comms = self._gather("comms", _llmc.thread_comms(backends) if self.leads else None)[0]
        return comms[self.rank]

    def cpus(self, threads: int = 0) -> int:
        return threads or 1


@pytest.fixture
def in_ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Return a function that calls body(rank) in so many ranks: in_ranks(4, body), and returns the results by rank.

    It raises the error of the rank that failed first. One rank is a process alone.
    """
    monkeypatch.setattr(trainer, "open_world", lambda settings: getattr(_here, "world", None) or World.alone())

    def run(size: int, body: Callable[[int], R]) -> list[R]:
        if size == 1:
            return [body(0)]
        meeting = Meeting(size)
        errors: dict[int, BaseException] = {}

        def rank(number: int) -> Any:
            _here.world = ThreadWorld(number, meeting)
            try:
                return body(number)
            except BaseException as e:
                # Without its traceback nothing keeps the rank's Comm, and so those that wait in it hear of its end.
                errors[number] = e.with_traceback(None)
                e.__context__ = e.__cause__ = None
            finally:
                _here.world = None
                if number in errors:
                    meeting.barrier.abort()

        with ThreadPoolExecutor(size) as pool:
            results = list(pool.map(rank, range(size)))
        if errors:
            first = meeting.failures[0][0] if meeting.failures else min(errors)
            raise next((e for e in errors.values() if not isinstance(e, Lost)), errors[first])
        return results

    return run
