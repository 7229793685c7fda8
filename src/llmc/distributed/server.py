"""The middle of the star of connections: a server in a thread of rank 0, to which each rank, rank 0 included, holds a lifeline.

It lets the ranks in, tells all when all are there, carries their values, and ends every process if one of them is lost.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from llmc.distributed.frames import MAX_BYTES, Decoder, FrameError, Message, encode
from llmc.distributed.lifeline import BEAT, LOST, last_seen

# Codes that the others take over: to begin anew does not help against wrong arguments, and who was asked to stop has not failed.
_PASSED_ON = (2, 130, 143)
_HANDSHAKE = 10.0  # seconds that a stranger has to say who it is
_STRANGERS = 256  # as many may be connected at a time


@dataclass(frozen=True)
class Member:
    """What a rank tells of itself when it comes.

    Attributes:
        rank, size: its number, and of how many it believes to be one.
        host: the name of its host.
        node: what tells hosts apart even if their names are equal.
        version: llmc's.
        job: what tells this start from others.
    """

    rank: int
    size: int
    host: str
    node: str
    version: str
    job: str


def proof(token: bytes, side: str, nonce: str, member: Message) -> str:
    """Return the HMAC by which one side shows that it knows the token: of its name, the other's nonce, and what the client said."""
    said = "\n".join([side, nonce, *(f"{k}={member[k]!r}" for k in sorted(member))])
    return hmac.new(token, said.encode(), hashlib.sha256).hexdigest()


@dataclass
class _Peer:
    """A connection, as the server sees it."""

    sock: socket.socket
    since: float  # when it was accepted
    heard: float  # when something last came
    decoder: Decoder = field(default_factory=Decoder)
    out: bytearray = field(default_factory=bytearray)
    nonce: str = field(default_factory=lambda: secrets.token_hex(32))
    member: Member | None = None  # None: a stranger
    at: str = ""
    number: int = 0
    bye: bool = False


class Server:
    """Rank 0's server: lets the ranks in, carries their values, and ends all if one is lost.

    Args:
        listeners: sockets that listen; the server closes them when all ranks are there.
        token: the secret that a rank must know.
        member: rank 0, which is let in by local_end().
        timeout: seconds in which all ranks must come.
        silence: seconds without a sign of life after which a rank is lost.
        may_return: whether a rank whose connection breaks before all are there may come again.
        orphaned: whether what started the ranks is gone without having ended them.
        complete: called when all are there, or when they will not be.
        say: prints a line.
    """

    def __init__(
        self,
        listeners: list[socket.socket],
        token: bytes,
        member: Member,
        *,
        timeout: float,
        silence: float,
        may_return: bool,
        orphaned: Callable[[], bool] = lambda: False,
        complete: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    ) -> None:
        self._thread = threading.Thread(target=self._serve, name="llmc server", daemon=True)
        self._listeners, self._token, self._member = listeners, token, member
        self._timeout, self._silence, self._may_return = timeout, silence, may_return
        self._orphaned, self._complete, self._say = orphaned, complete, say
        self._selector = selectors.DefaultSelector()
        self._peers: list[_Peer] = []
        self._ranks: dict[int, _Peer] = {}
        self._started = self._done = self._closed = False
        self._begin = time.monotonic()
        self._next_notice = self._begin + 5
        self._next_look = 0.0
        self._gathers: dict[int, dict[int, Message]] = {}
        self._overdue: tuple[float, int, str] | None = None  # when to judge, whose complaint, and its text
        for listener in listeners:
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ)

    def local_end(self) -> socket.socket:
        """Return rank 0's own connection. Call it before start()."""
        here, there = socket.socketpair()
        peer = self._add(here)
        peer.member = self._member
        peer.decoder.limit = MAX_BYTES
        self._ranks[0] = peer
        return there

    def start(self) -> None:
        """Serve from now on, until all ranks have said bye or one is lost."""
        self._thread.start()

    def join(self, seconds: float) -> None:
        """Wait until it has ended, not longer than that."""
        self._thread.join(seconds)

    def _serve(self) -> None:
        size, last = self._member.size, time.monotonic()
        tick = min(0.25, self._silence / 8)
        while not self._done:
            for key, events in self._selector.select(tick):
                if key.data is None:
                    self._accept(key.fileobj)  # type: ignore[arg-type]
                elif events & selectors.EVENT_WRITE:
                    self._flush(key.data)
                elif key.data in self._peers:  # an earlier event of this round may have dropped it
                    self._read(key.data)
            now = time.monotonic()
            if (
                now - last > self._silence / 2
            ):  # this process was stopped or the machine slept: others may have been, too
                for peer in self._peers:
                    peer.heard = now
            last = now
            if self._done:
                break
            self._drop_slow_strangers(now)
            if not self._started and len(self._ranks) == size:
                self._start()
            elif not self._started:
                self._wait_for_ranks(now)
            self._judge(now)
        self._close_listeners()
        self._complete()
        if self._closed:
            self._let_go()

    # ---- connections ----

    def _add(self, sock: socket.socket) -> _Peer:
        sock.setblocking(False)
        now = time.monotonic()
        peer = _Peer(sock, now, now)
        self._peers.append(peer)
        self._selector.register(sock, selectors.EVENT_READ, peer)
        return peer

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError:  # it is gone again, or there are no file descriptors left
            return
        strangers = [p for p in self._peers if p.member is None]
        if len(strangers) >= _STRANGERS:
            self._drop(strangers[0])
        self._send(peer := self._add(sock), {"llmc": peer.nonce})

    def _drop(self, peer: _Peer) -> None:
        """Close a connection. It is none of a rank that is still needed."""
        self._selector.unregister(peer.sock)
        self._peers.remove(peer)
        peer.sock.close()
        if peer.member is not None and self._ranks.get(peer.member.rank) is peer:
            del self._ranks[peer.member.rank]

    def _drop_slow_strangers(self, now: float) -> None:
        for peer in [p for p in self._peers if p.member is None and now - p.since > _HANDSHAKE]:
            self._drop(peer)

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            self._selector.unregister(listener)
            listener.close()
        self._listeners = []

    def _send(self, peer: _Peer, message: Message) -> None:
        peer.out += encode(message)
        self._flush(peer)

    def _flush(self, peer: _Peer) -> None:
        try:
            while peer.out:
                sent = peer.sock.send(peer.out)
                del peer.out[:sent]
        except BlockingIOError:
            pass
        except OSError:
            peer.out.clear()  # reading will tell that it is lost
        if peer in self._peers and not self._closed:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.out else 0)
            if self._selector.get_key(peer.sock).events != events:
                self._selector.modify(peer.sock, events, peer)

    def _read(self, peer: _Peer) -> None:
        try:
            data = peer.sock.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            return self._gone(peer)
        peer.heard = time.monotonic()
        peer.decoder.feed(data)
        try:
            while not self._done and peer in self._peers and (message := peer.decoder.next()) is not None:
                if peer.member is None:
                    self._admit(peer, message)
                else:
                    self._take(peer, peer.member, message)
        except (FrameError, KeyError, TypeError, ValueError):
            if peer.member is None:
                return self._drop(peer)
            self._end(peer.member.rank, "it sent what is no message of llmc", LOST)

    def _gone(self, peer: _Peer) -> None:
        if peer.member is None or (not self._started and self._may_return and peer.member.rank):
            return self._drop(peer)
        self._end(peer.member.rank, f"connection lost (killed, or out of memory?){last_seen(peer.at)}", LOST)

    # ---- the start ----

    def _admit(self, peer: _Peer, message: Message) -> None:
        """Let a stranger in that knows the token."""
        said = {k: message[k] for k in ("rank", "size", "host", "node", "version", "job", "nonce")}
        if not hmac.compare_digest(proof(self._token, "client", peer.nonce, said), str(message["mac"])):
            return self._drop(peer)
        nonce = said.pop("nonce")
        member = Member(**said)
        refused = "job" if member.job != self._member.job else ""
        answer = proof(self._token, "server", nonce, {**said, "nonce": peer.nonce, "refused": refused})
        self._send(peer, {"mac": answer, "refused": refused})
        if refused:
            return self._drop(peer)
        peer.member, peer.decoder.limit = member, MAX_BYTES
        if why := self._misfit(member):
            return self._end(member.rank, why, 2, member.host)
        self._ranks[member.rank] = peer

    def _misfit(self, member: Member) -> str:
        """Return why a process cannot be a rank of this run, though it belongs to it; empty if it can."""
        me = self._member
        if member.version != me.version:
            return f"it has llmc {member.version}, rank 0 on {me.host} has {me.version}"
        if member.size != me.size:
            return f"it was started as one of {member.size} ranks, rank 0 on {me.host} as one of {me.size}"
        if not 0 <= member.rank < me.size:
            return f"ranks count from 0 to {me.size - 1}"
        if member.rank in self._ranks:
            host = self._host(member.rank)
            where = f"on {host} too" if host != member.host else "twice on this host"
            return f"it was started {where}: each process needs a number of its own"
        return ""

    def _start(self) -> None:
        self._started = True
        self._close_listeners()
        for stranger in [p for p in self._peers if p.member is None]:
            self._drop(stranger)
        members = [m for r in range(self._member.size) if (m := self._ranks[r].member)]
        for peer in self._ranks.values():
            self._send(peer, {"t": "start", "hosts": [m.host for m in members], "nodes": [m.node for m in members]})
        self._complete()
        self._complete = lambda: None

    def _wait_for_ranks(self, now: float) -> None:
        missing = [r for r in range(self._member.size) if r not in self._ranks]
        here = f"({len(self._ranks)} of {self._member.size} are here)"
        left = self._begin + self._timeout - now
        if left <= 0:
            self._end(None, f"{_ranks(missing)} did not come within {self._timeout:g} s {here}", LOST)
        elif now >= self._next_notice:
            self._next_notice = now + 10
            self._say(f"waiting for {_ranks(missing)} {here}, {left:.0f} s left")

    # ---- the run ----

    def _take(self, peer: _Peer, member: Member, message: Message) -> None:
        kind = message["t"]
        if kind == "beat":
            peer.at, peer.number = str(message["at"]), int(message["n"])
            if member.rank == 0:  # its heartbeats, passed on, are the server's, which is in the same process
                for other in self._ranks.values():
                    self._send(other, {"t": "beat", "at": peer.at})
        elif kind == "gather":
            self._gather(member.rank, message)
        elif kind == "fail":
            self._end(member.rank, str(message["why"]), code if (code := int(message["code"])) in _PASSED_ON else LOST)
        elif kind == "overdue":
            if self._overdue is None:  # heartbeats that are on their way tell better who is behind
                self._overdue = time.monotonic() + 2 * BEAT, member.rank, str(message["why"])
        elif kind == "bye":
            peer.bye = True
            if all(p.bye for p in self._ranks.values()) and self._started:
                self._closed = True
                self._finish({"t": "closed"})
            self._check_ended()
        else:
            raise FrameError(f"unknown message {kind!r}")

    def _gather(self, rank: int, message: Message) -> None:
        n = int(message["n"])
        values = self._gathers.setdefault(n, {})
        values[rank] = message
        for other, theirs in values.items():
            if theirs["what"] != message["what"]:
                places = f"it is at '{message['what']}', while rank {other} is at '{theirs['what']}'"
                return self._end(rank, f"the ranks do not do the same: {places}", 1)
        if len(values) == self._member.size:
            del self._gathers[n]
            everything = [values[r]["v"] for r in range(self._member.size)]
            for peer in self._ranks.values():
                self._send(peer, {"t": "value", "n": n, "v": everything})
        self._check_ended()

    def _check_ended(self) -> None:
        """End everything if a rank waits for one that has said bye."""
        for values in self._gathers.values():
            for rank, peer in self._ranks.items():
                if peer.bye and rank not in values and not self._done:
                    waiting = next(iter(values))
                    why = f"it has ended, while rank {waiting} is at '{values[waiting]['what']}'"
                    return self._end(rank, why, LOST)

    def _judge(self, now: float) -> None:
        """End everything if a rank is silent, if one has complained of waiting too long, or if nobody wants the run any more."""
        for rank, peer in self._ranks.items():
            if now - peer.heard > self._silence and not peer.bye:
                why = f"no sign of life for {self._silence:g} s (stopped, or its host is down?){last_seen(peer.at)}"
                return self._end(rank, why, LOST)
        if now >= self._next_look:
            self._next_look = now + BEAT
            if self._orphaned():
                return self._end(None, "llmc-train, which started the ranks, has been killed", LOST)
        if self._overdue is not None and now >= self._overdue[0]:
            _, rank, why = self._overdue
            complaint = f"rank {rank} on {self._host(rank)}: {why}"
            behind = self._behind(rank)
            if behind is None:
                return self._end(None, f"{complaint}; no rank is behind it", LOST)
            self._end(behind, f"it is behind{last_seen(self._ranks[behind].at)} ({complaint})", LOST)

    def _behind(self, rank: int) -> int | None:
        """Return the rank that the others wait for: the one with the lowest number, or one that is elsewhere than the rank that waits."""
        peers = self._ranks
        slowest = min(peers, key=lambda r: peers[r].number)
        if peers[slowest].number < peers[rank].number:
            return slowest
        return next((r for r in sorted(peers) if peers[r].at != peers[rank].at), None)

    # ---- the end ----

    def _host(self, rank: int | None) -> str:
        peer = self._ranks.get(rank) if rank is not None else None
        return peer.member.host if peer and peer.member else ""

    def _end(self, rank: int | None, why: str, code: int, host: str = "") -> None:
        """Tell every process that it is to end, because of a rank or for a reason that is nobody's."""
        self._finish({"t": "end", "rank": rank, "host": host or self._host(rank), "why": why, "code": code})

    def _finish(self, message: Message) -> None:
        """Send the last message. Rank 0, with which this server ends, hears it last."""
        self._done = True
        others = [p for p in self._peers if p.member is not None and p is not self._ranks[0]]
        for peer in others:
            self._send(peer, message)
        deadline = time.monotonic() + 1
        while any(p.out for p in others) and time.monotonic() < deadline:
            time.sleep(0.01)
            for peer in others:
                self._flush(peer)
        self._send(self._ranks[0], message)

    def _let_go(self) -> None:
        """Wait until the others have closed their ends: a connection that is closed with something unread may lose what was sent."""
        deadline = time.monotonic() + 2
        while self._peers and time.monotonic() < deadline:
            for key, _ in self._selector.select(0.1):
                try:
                    if not key.data.sock.recv(1 << 16):
                        self._drop(key.data)
                except BlockingIOError:
                    pass
                except OSError:
                    self._drop(key.data)
        for peer in list(self._peers):
            self._drop(peer)
        self._selector.close()


def _ranks(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (f", ... ({len(numbers)} in all)" if len(numbers) > 8 else "")
    return f"rank{'s' if len(numbers) > 1 else ''} {shown}"
