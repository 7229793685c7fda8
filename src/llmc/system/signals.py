"""Signals that ask a program to stop: Ctrl-C (SIGINT), SIGTERM, SIGHUP of a terminal that was closed, and Windows' SIGBREAK.

A training run (StopSignals) stops after its step or evaluation batch at the first signal, and at once at the second. The same signal
again within a second is not a second one: launchers pass a Ctrl-C on that the terminal has sent to everybody already, and SIGHUP as
SIGTERM. A sweep
(caught_signals) only takes note of them, and decides itself what to do. When all is saved, pass_on() lets the signal have its effect.
"""

from __future__ import annotations

import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

_Handler = Callable[[int, FrameType | None], None]

_STOP = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
_HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
ECHO = 1.0  # seconds in which the same signal again is no second one


def _install(names: tuple[str, ...], handler: _Handler) -> dict[int, Any]:
    """Install a handler for those of the signals that this system has, and return the handlers that it replaces, by number.

    Python allows this in the main thread alone; in any other thread no signal is caught.
    """
    replaced: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in names:
            number = getattr(signal, name, None)
            if number is None or (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):  # nohup's
                continue
            replaced[number] = signal.signal(number, handler)
    return replaced


def _restore(replaced: dict[int, Any]) -> None:
    for number, handler in replaced.items():
        signal.signal(number, handler)


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Catch every signal that asks to stop while the block runs.

    Yields:
        The numbers of the signals that came so far, oldest first; the list grows as they come. In a thread other than the main
        thread it stays empty.
    """
    caught: list[int] = []

    def catch(number: int, frame: FrameType | None) -> None:
        if number == _HANGUP:
            _leave_terminal()
        caught.append(number)

    replaced = _install(_STOP, catch)
    try:
        yield caught
    finally:
        _restore(replaced)


class StopRequested(BaseException):
    """Raised inside StopSignals.interruptible() by the first signal."""


class StopSignals:
    """Catches SIGINT, SIGTERM, SIGHUP and SIGBREAK while a `with` block runs. The second signal ends the process at once.

    In a thread other than the main thread it catches nothing.

    Attributes:
        received: the number of the first signal that came, or 0.
    """

    def __init__(self) -> None:
        self.received = 0
        self._received_at = 0.0
        self._interruptible = False
        self._replaced: dict[int, Any] = {}

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let the first signal break off the block. It is for work that loses nothing if it stops half-way: evaluation, sampling.

        Raises:
            StopRequested: when the signal comes, or at the start of the block if it came before.
        """
        if self.received:
            raise StopRequested
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False

    def __enter__(self) -> StopSignals:
        self._replaced = _install(_STOP, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _restore(self._replaced)
        self._replaced = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == _HANGUP:
            _leave_terminal()
        if self.received:
            same = number == self.received or _HANGUP in (number, self.received)
            if same and now - self._received_at < ECHO:
                return
            os._exit(128 + number)
        self.received, self._received_at = number, now
        if self._interruptible:
            self._interruptible = False
            raise StopRequested


def _leave_terminal() -> None:
    """Let what is written from now on go nowhere, if the terminal is gone: writing to it is an error, which would end the run unsaved."""
    for output in (1, 2):
        try:
            gone = stat.S_ISCHR(os.fstat(output).st_mode) and not os.isatty(output)
        except OSError:  # it was closed
            continue
        if gone:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, output)
            os.close(nowhere)


def signal_name(number: int) -> str:
    """Return what a user calls a signal: the keys that send it, or its name."""
    try:
        name = signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
    return {"SIGINT": "Ctrl-C", "SIGBREAK": "Ctrl-Break"}.get(name, name)


def pass_on(number: int) -> None:
    """Let a signal that was caught do what it does without that: call the program's own handler, if it has one, else raise.

    Raises:
        KeyboardInterrupt: for SIGINT.
        SystemExit: with 128 + number, for another.
    """
    handler = signal.getsignal(number)
    if callable(handler) and handler is not signal.default_int_handler:
        handler(number, None)
    elif number == signal.SIGINT:
        raise KeyboardInterrupt
    else:
        raise SystemExit(128 + number)
