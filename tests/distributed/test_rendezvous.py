"""The star of connections in one process: a real server and real sockets, in which each rank is a thread."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import queue
import socket
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmc import _llmc
from llmc.distributed import rendezvous, world
from llmc.distributed.frames import Decoder, FrameError, encode
from llmc.distributed.lifeline import Lifeline
from llmc.distributed.place import Place
from llmc.distributed.rendezvous import SharedFile, StartError, addresses_of, join, listen, listen_at, meet_by_mpi
from llmc.distributed.server import Member, Server
from llmc.distributed.world import World

TOKEN = b"a secret"


class Star:
    """A server, and the ranks that have come to it. ends has (rank, line, code) of each that was ended."""

    def __init__(self, size: int, timeout: float = 20.0, silence: float = 20.0, may_return: bool = True) -> None:
        self.size, self.silence = size, silence
        self.ends: queue.Queue[tuple[int, str, int]] = queue.Queue()
        self.said: list[str] = []
        self.listener = listen("127.0.0.1", 0)
        self.address = addresses_of([self.listener])[0]
        options: dict[str, Any] = {"timeout": timeout, "silence": silence, "may_return": may_return}
        self.server = Server([self.listener], TOKEN, self.member(0), say=self.said.append, **options)
        self.ranks: dict[int, Lifeline] = {0: self.hold(self.server.local_end(), 0)}
        self.server.start()

    def member(self, number: int, **changes: Any) -> Member:
        return dataclasses.replace(Member(number, self.size, f"host{number}", f"node{number}", "1.0", "job"), **changes)

    def hold(self, sock: socket.socket, rank: int, decoder: Decoder | None = None) -> Lifeline:
        def end(line: str, code: int) -> None:
            self.ends.put((rank, line, code))

        lifeline = Lifeline(sock, rank, "host0", silence=self.silence, decoder=decoder, end=end)
        lifeline.start()
        return lifeline

    def connect(self, number: int, token: bytes = TOKEN, timeout: float = 10.0, persist: bool = False, **changes: Any):
        return join(lambda: ([self.address], token), self.member(number, **changes), timeout, persist=persist)

    def join(self, rank: int) -> None:
        sock, decoder = self.connect(rank)
        self.ranks[rank] = self.hold(sock, rank, decoder)

    def all_here(self) -> Star:
        for rank in range(1, self.size):
            self.join(rank)
        for lifeline in self.ranks.values():
            assert lifeline.started()["hosts"] == [f"host{r}" for r in range(self.size)]
        return self

    def ended(self, count: int) -> dict[int, tuple[str, int]]:
        """Wait until so many ranks were ended, and return the line and exit code of each."""
        found = [self.ends.get(timeout=10) for _ in range(count)]
        return {rank: (line, code) for rank, line, code in found}

    def close(self) -> None:
        for lifeline in self.ranks.values():
            lifeline._sock.close()
        self.server.join(5)  # it ends with rank 0


@pytest.fixture
def stars() -> Iterator[Any]:
    made: list[Star] = []

    def make(*args: Any, **options: Any) -> Star:
        made.append(Star(*args, **options))
        return made[-1]

    yield make
    for star in made:
        star.close()


def together(calls: list[Any]) -> list[Any]:
    """Call all at once, each in a thread, and return what they return."""
    results: list[Any] = [None] * len(calls)

    def run(i: int) -> None:
        results[i] = calls[i]()

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(15)
        assert not thread.is_alive()
    return results


def worlds(star: Star, nodes: list[str]) -> list[World]:
    hosts = [f"host{r}" for r in range(star.size)]
    return [World(r, hosts, nodes, "tcp", 10.0, star.ranks[r]) for r in range(star.size)]


# ---- what a World offers ----


def test_values_travel(stars):
    star = stars(3).all_here()
    ranks = worlds(star, ["a", "b", "a"])
    assert [(w.local_rank, w.local_size, w.leads, w.host) for w in ranks] == [
        (0, 2, True, "host0"),
        (0, 1, False, "host1"),
        (1, 2, False, "host2"),
    ]
    assert (
        together([lambda w=w: w.gather({"rank": w.rank, "x": 0.1}) for w in ranks])
        == [[{"rank": r, "x": 0.1} for r in range(3)]] * 3
    )
    big = os.urandom(3_000_000)  # more than a socket takes at once
    assert together([lambda w=w: w.share(big if w.leads else None) for w in ranks]) == [big] * 3
    assert (
        together([lambda w=w: w.share_value({"rank": w.rank, "x": None}) for w in ranks])
        == [{"rank": 0, "x": None}] * 3
    )
    assert together([w.barrier for w in ranks]) == [None] * 3
    assert together([lambda w=w: w.agree("the settings", {"a": [1, "é", math.nan]}) for w in ranks]) == [None] * 3
    assert together([w.close for w in ranks]) == [None] * 3
    star.server.join(5)
    assert star.ends.empty() and not star.server._thread.is_alive()
    with pytest.raises(_llmc.Error, match=r"close\(\) was called"):
        ranks[1].barrier()


def test_alone():
    w = World.alone()
    assert (w.rank, w.size, w.local_rank, w.local_size, w.leads, w.meet) == (0, 1, 0, 1, True, "alone")
    assert (
        w.share(b"x") == b"x"
        and w.share_value([None]) == [None]
        and w.gather(1) == [1]
        and w.cpus(3) == 3
        and w.cpus() == 0
    )
    w.agree("a", {"b": 1})
    w.barrier()
    w.at("x")
    w.overdue("x")
    w.fail("x")
    with pytest.raises(ValueError, match="rank 0 shares None"):
        w.share()


def test_disagreement_ends_all_by_the_same_words(stars, monkeypatch):
    star = stars(3).all_here()
    left: list[tuple[str, int]] = []
    monkeypatch.setattr(world, "leave", lambda line, code: left.append((line, code)))
    values = [{"seed": 1}, {"seed": 1}, {"seed": 2}]
    together([lambda w=w: w.agree("the settings", values[w.rank]) for w in worlds(star, ["a"] * 3)])
    why = "rank 2 on host2: the settings differ: seed is 2, rank 0 on host0 has 1"
    assert sorted(left) == [(f"{why}; rank {r} ends", 2) for r in range(3)]


def test_ranks_that_do_not_do_the_same_are_ended(stars):
    star = stars(2).all_here()
    ranks = worlds(star, ["a"] * 2)
    for call in (ranks[0].barrier, lambda: ranks[1].gather(1)):
        threading.Thread(target=call, daemon=True).start()
    ends = star.ended(2)
    assert {code for _, code in ends.values()} == {1}
    assert "the ranks do not do the same: it is at '" in ends[0][0] and "while rank " in ends[0][0]


def test_two_ranks_on_one_gpu_are_refused(stars, monkeypatch):
    star = stars(3).all_here()
    left: list[tuple[str, int]] = []
    monkeypatch.setattr(world, "leave", lambda line, code: left.append((line, code)))
    together([lambda w=w: w._refuse_shared_gpus(f"GPU-{w.rank % 2}") for w in worlds(star, ["a"] * 3)])
    why = "rank 2 on host2: it has the same GPU as rank 0 (GPU-0): start one process per GPU"
    assert sorted(left) == [(f"{why}; rank {r} ends", 2) for r in range(3)]


# ---- who is let in ----


def test_scanner_slow_client_and_wrong_token_hold_nobody_up(stars):
    star = stars(2)
    silent = socket.create_connection(star.address)
    scanners = [socket.create_connection(star.address) for _ in range(5)]
    for scanner, data in zip(
        scanners, [b"GET / HTTP/1.1\r\n\r\n", b"\0", b"\0\0\0\2{}", b"\xff" * 5000, encode({"rank": 1})]
    ):
        scanner.sendall(data)
    with pytest.raises(StartError, match="did not let this rank in: LLMC_TOKEN is not the same on both") as e:
        star.connect(1, token=b"another")
    assert e.value.code == 2
    star.all_here()
    for sock in (silent, *scanners):
        sock.close()
    assert star.ends.empty()


def test_server_that_does_not_know_the_token_is_not_believed():
    """What listens at rank 0's address answers as llmc does, but without the secret."""
    listener = listen("127.0.0.1", 0)

    def pretend() -> None:
        sock, _ = listener.accept()
        sock.sendall(encode({"llmc": "nonce"}))
        sock.recv(4096)
        sock.sendall(encode({"mac": "0" * 64, "refused": ""}))
        sock.recv(1)

    threading.Thread(target=pretend, daemon=True).start()
    member = Member(1, 2, "h", "n", "1", "j")
    with pytest.raises(StartError, match="does not know LLMC_TOKEN"):
        join(lambda: (addresses_of([listener]), TOKEN), member, 5, persist=False)
    listener.close()


def test_what_is_no_llmc_is_tried_again_until_the_time_is_up():
    listener = listen("127.0.0.1", 0)

    def answer() -> None:
        for _ in range(2):
            sock, _ = listener.accept()
            sock.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

    threading.Thread(target=answer, daemon=True).start()
    begin = time.monotonic()
    with pytest.raises(
        StartError, match=r"rank 0 could not be reached within 0\.3 s: .*what listens there is not llmc"
    ) as e:
        join(lambda: (addresses_of([listener]), TOKEN), Member(1, 2, "h", "n", "1", "j"), 0.3, persist=False)
    assert e.value.code == 75 and time.monotonic() - begin < 5
    listener.close()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"size": 8}, "it was started as one of 8 ranks, rank 0 on host0 as one of 3"),
        ({"version": "2.0"}, "it has llmc 2.0, rank 0 on host0 has 1.0"),
        ({"rank": 7}, "ranks count from 0 to 2"),
        ({"rank": 1, "host": "host1"}, "it was started twice on this host: each process needs a number of its own"),
        ({"rank": 1, "host": "other"}, "it was started on host1 too: each process needs a number of its own"),
    ],
)
def test_ranks_that_do_not_fit_end_all_by_name(stars, changes, why):
    star = stars(3)
    star.join(1)
    sock, decoder = star.connect(2, **changes)
    star.ranks[9] = star.hold(sock, 9, decoder)
    ends = star.ended(3)
    rank, host = changes.get("rank", 2), changes.get("host", "host2")
    assert {r: line for r, (line, _) in ends.items()} == {
        r: f"rank {rank} on {host}: {why}; rank {r} ends" for r in (0, 1, 9)
    }
    assert {code for _, code in ends.values()} == {2}


def test_another_run_at_the_same_port(stars):
    star = stars(2)
    with pytest.raises(StartError, match="belongs to another run than this rank's, which is 'tomorrow'"):
        star.connect(1, job="tomorrow")
    star.all_here()


def test_missing_ranks_are_named(stars):
    star = stars(4, timeout=0.5)
    star.join(2)
    ends = star.ended(2)
    why = "ranks 1, 3 did not come within 0.5 s (2 of 4 are here)"
    assert ends == {r: (f"{why}; rank {r} ends", 75) for r in (0, 2)}


def test_waiting_is_told(stars, monkeypatch):
    star = stars(4, timeout=100)
    star.join(2)
    star.server._next_notice = 0.0
    deadline = time.monotonic() + 10
    while not star.said and time.monotonic() < deadline:
        time.sleep(0.02)
    assert star.said[0] in [f"waiting for ranks 1, 3 (2 of 4 are here), {s} s left" for s in (99, 100)]


def test_late_rank_and_one_that_comes_again(stars):
    star = stars(3)
    sock, _ = star.connect(2)
    sock.close()  # killed while it waits, and started anew
    time.sleep(0.3)
    star.join(1)
    star.join(2)
    for lifeline in star.ranks.values():
        lifeline.started()
    assert star.ends.empty()


def test_client_waits_for_a_late_server(stars):
    sock = socket.create_server(("127.0.0.1", 0))
    address = sock.getsockname()[:2]
    sock.close()
    member = Member(1, 2, "h", "n", "1", "job")
    late: list[socket.socket] = []

    def open_late() -> None:
        time.sleep(0.5)
        server = Server(
            [listen(*address)], TOKEN, Member(0, 2, "h", "n", "1", "job"), timeout=5, silence=5, may_return=True
        )
        late.append(server.local_end())
        server.start()

    threading.Thread(target=open_late, daemon=True).start()
    found, _ = join(lambda: ([address], TOKEN), member, 10, persist=False)
    for sock in (found, *late):
        sock.close()


@pytest.mark.parametrize(
    ("launcher", "library", "message"),
    [
        (
            "mpiexec",
            "Open MPI v5.0.11, package: ...",
            "mpiexec started 4 processes, but mpi4py uses Open MPI v5.0.11, which sees 1: start",
        ),
        (
            "srun",
            "MPICH Version:      5.0.2\nMPICH ...",
            "srun started 4 processes, but mpi4py uses MPICH Version: 5.0.2, which sees 1: start",
        ),
        (
            "Open MPI's mpirun",
            "MPICH Version:\t4.3\n",
            "Open MPI's mpirun started 4 processes, but mpi4py uses MPICH Version: 4.3: start",
        ),
    ],
)
def test_another_mpi_than_the_launchers(monkeypatch, launcher, library, message):
    mpi = types.SimpleNamespace(
        COMM_WORLD=types.SimpleNamespace(size=1), Get_library_version=lambda: library, Is_initialized=lambda: True
    )
    monkeypatch.setitem(sys.modules, "mpi4py", types.SimpleNamespace(rc=types.SimpleNamespace(), MPI=mpi))
    with pytest.raises(ValueError, match=message):
        meet_by_mpi(Place(0, 4, "mpi", launcher), "node")


# ---- who is lost ----


def test_lost_rank_is_named_with_where_it_was(stars):
    star = stars(3).all_here()
    star.ranks[2].at = "step 12"
    time.sleep(0.1)
    deadline = time.monotonic() + 5
    while star.server._ranks[2].at != "step 12" and time.monotonic() < deadline:
        time.sleep(0.02)
    star.ranks[2]._sock.shutdown(socket.SHUT_RDWR)
    ends = star.ended(3)
    why = "rank 2 on host2: connection lost (killed, or out of memory?), last seen at step 12"
    assert {r: ends[r] for r in (0, 1)} == {r: (f"{why}; rank {r} ends", 75) for r in (0, 1)}


def test_silent_rank_is_lost(stars):
    """A stopped process, or one whose host is down: the connection stands, and nothing comes."""
    star = stars(2, silence=0.6)
    sock, _ = star.connect(1)
    ends = star.ended(1)
    assert ends[0] == ("rank 1 on host1: no sign of life for 0.6 s (stopped, or its host is down?); rank 0 ends", 75)
    sock.close()


def test_silent_server_is_lost():
    here, there = socket.socketpair()
    ends: queue.Queue[tuple[str, int]] = queue.Queue()
    lifeline = Lifeline(there, 1, "host0", silence=0.4, end=lambda line, code: ends.put((line, code)))
    lifeline.start()
    here.sendall(encode({"t": "beat", "at": "step 3"}))
    line, code = ends.get(timeout=10)
    why = "no sign of life for 0.4 s (stopped, or its host is down?), last seen at step 3"
    assert (line, code) == (f"rank 0 on host0: {why}; rank 1 ends", 75)
    here.close()


@pytest.mark.parametrize(("code", "others"), [(1, 75), (2, 2), (130, 130)])
def test_failure_is_told(stars, code, others):
    star = stars(3).all_here()
    begin = time.monotonic()
    worlds(star, ["a"] * 3)[1].fail("ZeroDivisionError: division\nby zero", code)
    assert time.monotonic() - begin < 3
    ends = star.ended(2)
    assert ends == {r: (f"rank 1 on host1: ZeroDivisionError: division by zero; rank {r} ends", others) for r in (0, 2)}


def test_overdue_names_who_is_behind(stars, monkeypatch):
    for module in ("lifeline", "server"):
        monkeypatch.setattr(f"llmc.distributed.{module}.BEAT", 0.1)
    star = stars(3).all_here()
    ranks = worlds(star, ["a"] * 3)
    for w, step in zip(ranks, (12, 12, 11)):
        w.at(f"step {step}, forward", step)
    time.sleep(0.3)
    ranks[1].overdue("it has waited 600 s for all_reduce")
    ends = star.ended(3)
    complaint = "rank 1 on host1: it has waited 600 s for all_reduce"
    assert {line for line, _ in ends.values()} == {
        f"rank 2 on host2: it is behind, last seen at step 11, forward ({complaint}); rank {r} ends" for r in range(3)
    }


def test_rank_that_has_ended_is_not_waited_for(stars):
    star = stars(2).all_here()
    ranks = worlds(star, ["a"] * 2)
    threading.Thread(target=ranks[0].barrier, daemon=True).start()
    star.ranks[1].send({"t": "bye"})
    assert star.ended(2)[0] == ("rank 1 on host1: it has ended, while rank 0 is at 'barrier'; rank 0 ends", 75)


def test_nobody_is_lost_after_a_pause_of_all(stars, monkeypatch):
    """A machine that slept: when it wakes up, everybody's last sign of life is old."""
    star = stars(2, silence=2.0).all_here()
    real = time.monotonic
    jump = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: real() + jump[0])
    jump[0] = 1000.0
    time.sleep(1.0)
    assert star.ends.empty()
    together([w.close for w in worlds(star, ["a"] * 2)])


# ---- frames, addresses, files ----


def test_frames():
    decoder = Decoder()
    data = encode({"a": [1, None, "é"]}) + encode({})
    for i in range(len(data)):
        decoder.feed(data[i : i + 1])
    assert decoder.next() == {"a": [1, None, "é"]} and decoder.next() == {} and decoder.next() is None
    for bad in (b"\0\0\0\2[]", b"\0\0\0\2{,", b"\0\1\0\0", b"\0\0\0\1\xff", b"\0\0\x0f\xf0" + b"[" * 4080):
        decoder = Decoder()
        decoder.feed(bad)
        with pytest.raises(FrameError):
            decoder.next()
    with pytest.raises(ValueError, match="JSON cannot say"):
        encode({"a": b"bytes"})


def test_where_rank_0_listens(monkeypatch):
    sockets = listen_at("127.0.0.1", 0)
    port = sockets[0].getsockname()[1]
    assert [a[0] for a in addresses_of(sockets)] == ["127.0.0.1"], "that interface alone"
    with pytest.raises(
        ValueError, match=rf"cannot listen at 127.0.0.1:{port}: .*choose another port \(--dist-port, or LLMC_PORT"
    ):
        listen_at("127.0.0.1", port)
    sockets[0].close()
    with pytest.raises(
        ValueError, match=r"cannot listen at 203\.0\.113\.7:4000: .*rank 0 must run on the host that dist_host names"
    ):
        listen_at("203.0.113.7", 4000)
    with pytest.raises(ValueError, match="the host of rank 0, 'no.such.host.invalid', has no address"):
        listen_at("no.such.host.invalid", 4000)
    # a host whose own name is loopback to itself, as on Debian
    monkeypatch.setattr(rendezvous, "resolve", lambda host: "127.0.0.1")
    monkeypatch.setattr(rendezvous, "own_addresses", lambda: ["::1"] if socket.has_ipv6 else [])
    sockets = listen_at("its-own-name", port)
    assert "127.0.0.1" in [a[0] for a in addresses_of(sockets)] and len(sockets) == 1 + socket.has_ipv6
    for sock in sockets:
        sock.close()
    (sock,) = listen_at("its-own-name", port, other_hosts=False)
    assert sock.getsockname()[0] == "127.0.0.1", "without a token that interface alone"
    sock.close()


def test_shared_file(tmp_path: Path):
    file = SharedFile(str(tmp_path), "814.0/x", 2)
    assert file.path.name == "llmc-814.0_x.json"
    assert file.read() == f"{file.path} is not there yet"
    file.path.write_text("{")
    assert file.read() == f"{file.path} is damaged"
    file.write([("127.0.0.1", 4000)], TOKEN)
    assert SharedFile(str(tmp_path), "814.0/x", 2).read() == ([("127.0.0.1", 4000)], TOKEN)
    assert SharedFile(str(tmp_path), "814.0/x", 3).read() == f"{file.path} is of another run"
    if sys.platform != "win32":
        assert file.path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == [file.path.name], "no temporary file is left"
    newer = SharedFile(str(tmp_path), "814.0/x", 2)
    newer.write([("127.0.0.1", 4001)], b"newer")
    file.remove()
    assert newer.path.exists(), "a newer run's file stays"
    newer.remove()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="which is no folder on"):
        SharedFile(str(tmp_path / "none"), "1", 2)


def test_stale_file_is_not_taken(stars, tmp_path: Path):
    """A file that an earlier run left: its port is closed, or another program's by now. The rank waits for the new one."""
    file = SharedFile(str(tmp_path), "job", 2)
    other = listen("127.0.0.1", 0)
    star = stars(2)
    file.write(addresses_of([other]), TOKEN)

    def answer() -> None:
        sock, _ = other.accept()
        sock.sendall(encode({"llmc": "x"}))
        sock.close()
        other.close()
        file.write([star.address], b"an older token")  # this run's port, by chance
        time.sleep(0.5)
        file.write([star.address], TOKEN)

    threading.Thread(target=answer, daemon=True).start()
    sock, decoder = join(file.read, star.member(1), 10, persist=True)
    star.ranks[1] = star.hold(sock, 1, decoder)
    assert star.ranks[1].started()["hosts"] == ["host0", "host1"]
    assert json.loads(file.path.read_text())["token"] == TOKEN.hex()
