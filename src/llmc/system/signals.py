"""SIGINT, SIGTERM (and Windows' SIGBREAK): the first asks the run to stop after its step or evaluation batch, the second stops at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


class StopRequested(BaseException):
    """The first signal came inside of interruptible()."""


class StopSignals:
    """Catches the signals for as long as it is entered. Elsewhere than in the main thread it does nothing.

    received: the number of the signal that came, or 0.
    """

    def __init__(self) -> None:
        self.received = 0
        self._interruptible = False
        self._old: dict[int, Any] = {}

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Where nothing is lost by stopping half-way (evaluation, sampling): the first signal raises StopRequested here."""
        if self.received:
            raise StopRequested
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGBREAK"):
                if (number := getattr(signal, name, None)) is not None:
                    self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = number
        if self._interruptible:
            self._interruptible = False
            raise StopRequested
