"""Processes that meet, and are lost: by signals, by errors, by ending too early. They train nothing, so they are quick."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmc.distributed import cpus
from llmc.distributed.world import open_world
from llmc.training.settings import TrainConfig

HOST = re.escape(socket.gethostname())
LOST = r"connection lost \(killed, or out of memory\?\)"
# A rank: meets the others with the settings of argv[1], and runs the lines of argv[2].
RANK = """
import json, os, signal, sys, time
from llmc.distributed.world import open_world
from llmc.training.settings import TrainConfig
w = open_world(TrainConfig(**json.loads(sys.argv[1])))
w.at("step 12")
exec(sys.argv[2])
w.close()
"""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Ranks:
    """Processes that were started by hand, as on several hosts."""

    def __init__(self, size: int, code: str, *, environ: dict[str, str] | None = None, **settings: Any) -> None:
        launchers = ("OMP_NUM_THREADS", "PMI", "OMPI", "SLURM", "LLMC", "RANK", "WORLD_SIZE")
        self.environ = {k: v for k, v in os.environ.items() if not k.startswith(launchers)} | (environ or {})
        self.settings = {"dist_init": "tcp", "dist_host": "127.0.0.1", "dist_port": free_port(), "dist_timeout": 20.0}
        self.settings = {**self.settings, "processes": size, **settings}
        self.code = code
        self.processes = [self.start(rank) for rank in range(size)]

    def start(self, rank: int, **settings: Any) -> subprocess.Popen[str]:
        text = json.dumps({**self.settings, "rank": rank, **settings})
        command = [sys.executable, "-c", RANK, text, self.code]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.environ)

    def wait_for(self, line: str) -> None:
        """Read each rank's first line, which says where it is."""
        for process in self.processes:
            assert process.stdout is not None
            assert process.stdout.readline() == line + "\n"

    def ends(self, seconds: float = 20.0) -> list[tuple[int, str, str]]:
        """Return exit code, stdout and stderr of each."""
        deadline, found = time.monotonic() + seconds, []
        try:
            for process in self.processes:
                out, err = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
                err = re.sub(
                    r"(?m)^(waiting for ranks?|rank \d waits for) .*\n", "", err
                )  # of a machine where starting takes long
                found.append((process.returncode, out, err))
        finally:
            for process in self.processes:
                process.kill()
        return found


READY = "print('ready', flush=True)\n"


@pytest.mark.parametrize("meet", ["tcp", "fs"])
def test_three_processes_meet(tmp_path: Path, meet: str) -> None:
    code = (
        "p = w.share(b'x' * w.size if w.leads else None)\n"
        "w.agree('the settings', {'a': 1})\n"
        "w.barrier()\n"
        "n = w.cpus()\n"
        "own = sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else None\n"
        "print(json.dumps([w.gather([w.rank, w.local_rank, w.local_size, w.meet]), len(p), w.gather([n, own])]))\n"
    )
    settings: dict[str, Any] = {}
    if meet == "fs":
        settings = {"dist_init": "fs", "dist_host": "127.0.0.1", "dist_port": None, "dist_dir": str(tmp_path)}
        # what a run that was killed has left: nobody listens there any more
        from llmc.distributed.place import find_place
        from llmc.distributed.rendezvous import SharedFile

        job = find_place({}, TrainConfig(processes=3, **settings), True).job
        stale = SharedFile(str(tmp_path), job, 3)
        stale.write([("127.0.0.1", free_port())], b"old")
    ends = Ranks(3, code, **settings).ends()
    assert [(c, err) for c, _, err in ends] == [(0, "")] * 3
    results = [json.loads(out) for _, out, _ in ends]
    assert results[0] == results[1] == results[2]
    assert results[0][:2] == [[[r, r, 3, meet] for r in range(3)], 3]
    if hasattr(os, "sched_getaffinity"):
        everything = sorted(os.sched_getaffinity(0))
        shares = [cpu for _, own in results[0][2] for cpu in own]
        assert set(shares) <= set(everything) and (len(set(shares)) == len(shares) or len(everything) < 3)
        assert all(1 <= n <= len(own) for n, own in results[0][2])
    assert not list(tmp_path.iterdir()), "the file is gone when all are there"


@pytest.mark.parametrize("text", ["soon", "nan", "-1", "1"])
def test_a_limit_that_is_none(text: str):
    ((code, _, err),) = Ranks(1, READY, environ={"LLMC_HEARTBEAT_TIMEOUT": text}, processes=2).ends()
    assert code != 0 and f"LLMC_HEARTBEAT_TIMEOUT is '{text}', expected seconds, at least 2" in err


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_killed_and_stopped_ranks():
    """The others end with one line each; a barrier has no time limit, and still nobody hangs. Four runs at once, to wait once."""
    code = READY + "w.barrier() if w.rank != {} else time.sleep(60)"
    short = {"LLMC_HEARTBEAT_TIMEOUT": "2"}
    cases = [
        (Ranks(3, code.format(0)), 0, signal.SIGKILL),
        (Ranks(3, code.format(2)), 2, signal.SIGKILL),
        (Ranks(2, code.format(0), environ=short), 0, signal.SIGSTOP),
        (Ranks(2, code.format(1), environ=short), 1, signal.SIGSTOP),
    ]
    for ranks, _, _ in cases:
        ranks.wait_for("ready")
    time.sleep(2.2)  # two heartbeats: the rank's, and rank 0's to the others
    for ranks, victim, number in cases:
        ranks.processes[victim].send_signal(number)
    begin = time.monotonic()
    for ranks, victim, number in cases:
        others = [p for p in ranks.processes if p is not ranks.processes[victim]]
        for process in others:
            process.wait(20)
        ranks.processes[victim].kill()
        why = LOST if number == signal.SIGKILL else r"no sign of life for 2 s \(stopped, or its host is down\?\)"
        for rank, (exit_code, _, err) in enumerate(ranks.ends()):
            line = rf"rank {victim} on {HOST}: {why}(, last seen at step 12)?; rank {rank} ends\n"
            assert rank == victim or (exit_code == 75 and re.fullmatch(line, err)), (exit_code, err)
    assert time.monotonic() - begin < 15


def test_error_that_nobody_catches():
    """It ends all ranks, and its traceback is shown once."""
    (code0, _, err0), (code1, _, err1) = Ranks(2, "1 / 0 if w.rank else w.barrier()").ends()
    assert (code0, code1) == (75, 1)
    assert re.fullmatch(rf"rank 1 on {HOST}: ZeroDivisionError: division by zero; rank 0 ends\n", err0), err0
    assert (
        err1.startswith("Traceback") and err1.endswith("ZeroDivisionError: division by zero\n") and "ends" not in err1
    )


def test_rank_that_ends_too_early():
    ends = Ranks(2, "sys.exit(0) if w.rank else w.barrier()").ends()
    line = rf"rank 1 on {HOST}: it has ended, while rank 0 is at 'barrier'; rank \d ends\n"
    assert [c for c, _, _ in ends] == [75, 75] and all(re.fullmatch(line, err) for _, _, err in ends), ends


def test_values_that_differ():
    ends = Ranks(2, "w.agree('the data', {'file': ['a', w.rank]})\nprint('not reached')").ends()
    line = rf"rank 1 on {HOST}: the data differ: file is \['a', 1\], rank 0 on {HOST} has \['a', 0\]; rank \d ends\n"
    assert [(c, out) for c, out, _ in ends] == [(2, "")] * 2 and all(re.fullmatch(line, err) for _, _, err in ends), (
        ends
    )


def test_missing_rank():
    ranks = Ranks(1, "", dist_timeout=1.0, processes=3)
    ends = ranks.ends()
    assert ends == [(75, "", "ranks 1, 2 did not come within 1 s (1 of 3 are here); rank 0 ends\n")]


def test_no_token_on_a_network():
    config = TrainConfig(processes=2, dist_init="tcp", dist_host="203.0.113.7")
    with pytest.raises(
        ValueError, match=r"rank 0 listens at 203\.0\.113\.7, which other hosts can reach, and LLMC_TOKEN is not set"
    ):
        open_world(config, {})


def test_wrong_token_ends_that_rank_alone():
    ranks = Ranks(1, "w.barrier()", processes=2, environ={"LLMC_TOKEN": "right"})
    ranks.environ["LLMC_TOKEN"] = "wrong"
    wrong = ranks.start(1)
    _, err = wrong.communicate(timeout=15)
    assert wrong.returncode == 2 and re.search("did not let this rank in: LLMC_TOKEN is not the same on both", err)
    ranks.environ["LLMC_TOKEN"] = "right"
    ranks.processes.append(ranks.start(1))
    assert ranks.ends() == [(0, "", "")] * 2


# ---- CPUs ----


def test_shares_of_cpus():
    def core(cpu: int) -> int:  # CPUs n and n + 4 are one core
        return cpu % 4

    def shares(them: list[int], count: int) -> list[list[int]]:
        return [cpus.share_of(them, i, count, core) for i in range(count)]

    assert shares(list(range(8)), 2) == [[0, 4, 1, 5], [2, 6, 3, 7]]
    assert shares(list(range(8)), 3) == [[0, 4], [1, 5], [2, 6, 3, 7]]
    assert shares(list(range(8)), 8) == [[0], [4], [1], [5], [2], [6], [3], [7]]
    assert shares([0, 1], 3) == [[0], [1], [0]]
    assert shares([3, 7, 2], 2) == [[2], [3, 7]]
