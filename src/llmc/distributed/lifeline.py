"""A rank's end of its connection to rank 0's server (server.py), and how a process ends because of another.

Each end sends a heartbeat every second, in which a rank says where it is. A connection that breaks, or from which nothing has come
for too long, ends every process, with a line that names the rank: a process that has lost another can only wait for ever, since
MPI's and NCCL's calls do not come back.
"""

from __future__ import annotations

import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from llmc.distributed.frames import MAX_BYTES, Decoder, FrameError, Message, encode

LOST = 75  # the exit code of a process that ends because another was lost: EX_TEMPFAIL, "try again"
BEAT = 1.0  # seconds between heartbeats
_LAST_WORDS = 0.3  # seconds in which every process can print its line before a launcher sees that one has ended, and kills the rest


def line_of(rank: int | None, host: str, reason: str, own_rank: int) -> str:
    """Return the line that rank own_rank prints when it ends because of another rank, or for a reason that is nobody's."""
    who = f"rank {rank} on {host}: " if rank is not None else ""
    return f"{who}{reason}; rank {own_rank} ends"


_leaving = threading.Lock()


def leave(line: str, code: int) -> NoReturn:
    """Print a line on stderr and end the process at once, without any clean-up that could wait for a lost rank.

    The first thread that comes here prints its line: what others see then is that the other ranks end, too.
    """
    _leaving.acquire()
    start = "\n" if sys.stderr is not None and sys.stderr.isatty() else ""  # a progress bar may stand there
    # Not through sys.stderr: another thread may hold its lock, and wait.
    try:
        os.write(2, f"{start}{line}\n".encode(errors="replace"))
    except OSError:
        pass
    time.sleep(_LAST_WORDS)
    exit_now(code)


def exit_now(code: int) -> NoReturn:
    """End the process, without the clean-up of the interpreter and of MPI."""
    flusher = threading.Thread(
        target=_flush, daemon=True
    )  # not here: another thread may hold a lock of the stream, and wait
    flusher.start()
    flusher.join(_LAST_WORDS)
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            pass


def last_seen(at: str) -> str:
    """Return where a rank was last, as the end of a reason; empty if it never said."""
    return f", last seen at {at}" if at else ""


class Lifeline:
    """A rank's end of its connection to the server.

    Args:
        sock: the connection; the server has let this rank in.
        rank: this process's.
        leader: the name of rank 0's host, as far as it is known.
        silence: seconds without a sign of life after which rank 0 is lost.
        decoder: with what has already come.
        end: called, with a line and an exit code, when this process is to end because of another.
    """

    def __init__(
        self,
        sock: socket.socket,
        rank: int,
        leader: str,
        *,
        silence: float,
        decoder: Decoder | None = None,
        end: Callable[[str, int], Any] = leave,
    ) -> None:
        self._thread = threading.Thread(target=self._hold, name="llmc lifeline", daemon=True)
        self._sock, self._rank, self._leader = sock, rank, leader
        self._decoder = decoder or Decoder()
        self._decoder.limit = MAX_BYTES
        self._silence, self._end = silence, end
        self._sending = threading.Lock()
        self._news = threading.Condition()
        self._values: dict[int, list[Any]] = {}  # of each gather, by its number
        self._calls = threading.Lock()
        self._count = 0  # of collective calls so far
        self.at, self.number = "", 0
        self._leader_at = ""
        self._started: Message | None = None
        self._ended = self._failing = False
        sock.setblocking(True)

    def start(self) -> None:
        """Read what comes and send heartbeats from now on."""
        self._thread.start()

    def _hold(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._sock, selectors.EVENT_READ)
            interval = min(BEAT, self._silence / 4)
            heard = last = time.monotonic()
            next_beat = 0.0
            while not self._ended:
                if not self._handle_all():
                    return
                now = time.monotonic()
                if now >= next_beat:
                    next_beat = now + interval
                    if self._sending.acquire(
                        blocking=False
                    ):  # else a message is being sent, which is a sign of life too
                        try:
                            self._transmit({"t": "beat", "at": self.at, "n": self.number})
                        finally:
                            self._sending.release()
                ready = selector.select(max(0.0, min(next_beat - now, self._silence / 8)))
                now = time.monotonic()
                if now - last > self._silence / 2:  # this process was stopped, or the machine slept
                    heard = now
                last = now
                if ready:
                    try:
                        data = self._sock.recv(1 << 16)
                    except OSError:
                        data = b""
                    if not data:
                        return self._lost(f"connection lost (killed, or out of memory?){last_seen(self._leader_at)}")
                    heard = now
                    self._decoder.feed(data)
                elif now - heard > self._silence:
                    why = f"no sign of life for {self._silence:g} s (stopped, or its host is down?)"
                    return self._lost(why + last_seen(self._leader_at))

    def _handle_all(self) -> bool:
        """Handle the messages that have come; return whether there is more to wait for."""
        try:
            while (message := self._decoder.next()) is not None:
                kind = message["t"]
                if kind == "end":
                    self._finish(message)
                    return False
                with self._news:
                    if kind == "beat":
                        self._leader_at = str(message["at"])
                    elif kind == "start":
                        self._started, self._leader = message, message["hosts"][0]
                    elif kind == "value":
                        self._values[message["n"]] = message["v"]
                    elif kind == "closed":
                        self._ended = True
                    self._news.notify_all()
        except (FrameError, KeyError) as e:
            self._lost(f"it sent what is no message of llmc ({e})")
            return False
        return not self._ended

    def _finish(self, message: Message) -> None:
        with self._news:
            self._ended = True
            self._news.notify_all()
        if not (self._failing and message["rank"] == self._rank):
            self._end(line_of(message["rank"], message["host"], message["why"], self._rank), message["code"])

    def _lost(self, why: str) -> None:
        with self._news:
            already, self._ended = self._ended or self._failing, True
            self._news.notify_all()
        if not already:
            self._end(line_of(0, self._leader, why, self._rank), LOST)

    def _transmit(self, message: Message) -> None:
        with suppress(OSError):  # the thread that reads sees it, too, and says so
            self._sock.sendall(encode(message))

    def send(self, message: Message) -> None:
        """Send a message. If the connection is broken, this process is about to end."""
        with self._sending:
            self._transmit(message)

    def wait(self, done: Callable[[], bool], seconds: float | None = None) -> bool:
        """Wait until done() is true, as far as what comes can make it so.

        Args:
            done: what is waited for.
            seconds: the longest time; None: no limit.

        Returns:
            Whether done() is true.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        with self._news:
            while not done():
                left = 1.0 if deadline is None else min(1.0, deadline - time.monotonic())
                if left <= 0:
                    return False
                self._news.wait(left)  # not longer: Windows handles Ctrl-C between two waits
        return True

    def started(self) -> Message:
        """Return the message of the start, when all ranks are there."""
        self.wait(lambda: self._started is not None)
        assert self._started is not None
        return self._started

    def gather(self, what: str, value: Any) -> list[Any]:
        """Return every rank's value. what: what the ranks are doing, to be the same on all."""
        with self._calls:
            self._count += 1
            n = self._count
            self.send({"t": "gather", "n": n, "what": what, "v": value})
            self.wait(lambda: n in self._values)
            return self._values.pop(n)

    def fail(self, reason: str, code: int) -> None:
        """Tell the others why this process ends, and give them time to hear it."""
        self._failing = True
        self.send({"t": "fail", "why": reason, "code": code})
        self.wait(lambda: self._ended, 2)
        time.sleep(_LAST_WORDS)

    def close(self, seconds: float) -> bool:
        """Say bye, and wait until all ranks have. Return whether they have within that time."""
        self.send({"t": "bye"})
        closed = self.wait(lambda: self._ended, seconds)
        if closed:
            self._thread.join(2)
            self._sock.close()
        return closed
