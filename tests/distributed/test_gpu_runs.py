"""Whole runs of two ranks on GPUs: on one host and on two, and what ends them. On the emulated device, by NCCL's stand-in."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from namespaces import Host, two_hosts, why_not
from runs import tiny_settings

import llmc
from llmc import _llmc
from llmc.distributed import nccl

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("emulated")]

TRAIN = ["-m", "llmc", "train", "--config", "settings.toml", "--rank"]
KILL = """
import json, os, sys
import llmc

class Fails(llmc.Callback):
    def on_step(self, trainer, info):
        if info.step == 2 and trainer.run.world.rank == 1:
            os.kill(os.getpid(), 9)

with open("settings.json") as file:
    llmc.train(**json.load(file) | {"rank": int(sys.argv[1])}, callbacks=[Fails()])
"""


@pytest.fixture(scope="module")
def emulated(cuda: _llmc.Backend) -> None:
    if "emulated" not in cuda.info().description:
        pytest.skip("several ranks want several GPUs, or the emulated device")


@pytest.fixture(scope="module")
def alone(emulated: None, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Return the losses of a process that trains alone, on the batches of two ranks."""
    folder = tmp_path_factory.mktemp("alone")
    llmc.train(**settings_in(folder), total_batch_size=64)
    return losses(folder)


def settings_in(folder: Path, **changes: Any) -> dict[str, Any]:
    return tiny_settings(folder, **{"device": "cuda", "max_steps": 4, "val_every": 0} | changes)


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def run_ranks(
    folder: Path, command: list[str], hosts: tuple[Host, Host] | None = None, **changes: Any
) -> list[tuple[int, str]]:
    """Run two ranks, each by Python with these arguments and its number; return their exit codes and what they say on stderr."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = settings_in(folder, processes=2, dist_port=port, **changes)
    (folder / "settings.json").write_text(json.dumps(config))
    (folder / "settings.toml").write_text(llmc.TrainConfig(**config).to_toml())
    environment = os.environ | {
        "LLMC_EMULATION_DEVICES": "2",
        "LLMC_EMULATION_SHARED": str(folder),
        "LLMC_TOKEN": "a secret",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(llmc.__file__).parents[1]),
    }
    ranks = []
    for rank in range(2):
        argv = [sys.executable, *command, str(rank)]
        if hosts:
            ranks.append(hosts[rank].start(argv, cwd=folder, env=environment))
        else:
            pipe = subprocess.PIPE
            ranks.append(subprocess.Popen(argv, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True))
    try:
        said = [rank.communicate(timeout=60)[1] for rank in ranks]
        return [(rank.returncode, text) for rank, text in zip(ranks, said)]
    finally:
        for rank in ranks:
            rank.kill()


def check(folder: Path, ends: list[tuple[int, str]], alone: list[float]) -> None:
    assert [code for code, _ in ends] == [0, 0], ends
    np.testing.assert_allclose(losses(folder), alone, rtol=2e-3)  # bf16; each update changes the loss by more
    assert (folder / "run" / "DONE_00000004").exists()


def test_two_ranks_train_as_one_process_does(tmp_path: Path, alone: list[float]) -> None:
    check(tmp_path, run_ranks(tmp_path, TRAIN, dist_init="tcp", dist_host="127.0.0.1"), alone)


@pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
def test_two_hosts_train_to_the_same_bits(tmp_path: Path, alone: list[float]) -> None:
    results = []
    files = "model_00000004.bin", "state_00000004_00000.bin"
    with two_hosts(tmp_path) as hosts:
        for meet, where in (("tcp", {"dist_host": "hosta"}), ("fs", {"dist_dir": str(tmp_path)})):
            (folder := tmp_path / meet).mkdir()
            check(folder, run_ranks(folder, TRAIN, hosts, dist_init=meet, **where), alone)
            results.append([(folder / "run" / file).read_bytes() for file in files])
    assert results[0] == results[1]


def test_two_ranks_on_one_gpu_are_refused(tmp_path: Path) -> None:
    ends = run_ranks(tmp_path, TRAIN, dist_init="fs", dist_dir=str(tmp_path), device="cuda:1")
    for rank, (code, said) in enumerate(ends):
        assert code == 2
        assert "it has the same GPU as rank 0 (GPU-00000000-0000-0000-0000-000000000001): start one" in said
        assert said.endswith(f"; rank {rank} ends\n")


def test_a_rank_is_killed(tmp_path: Path) -> None:
    """The other one waits for its GPU, which waits for the rank that is lost."""
    (tmp_path / "fail.py").write_text(KILL)
    ends = run_ranks(tmp_path, ["fail.py"], max_steps=1000, dist_init="fs", dist_dir=str(tmp_path))
    code, said = ends[0]
    assert code == 75
    assert said.startswith("rank 1 on ") and "connection lost" in said and said.endswith("; rank 0 ends\n"), said
    assert ends[1][0] == -9


class Watched:
    """A Comm, and the World that hears of it."""

    rank, size, timeout, leads = 0, 2, 0.5, True

    def __init__(self, error: str = "") -> None:
        self.error, self.begin, self.heard = error, time.monotonic(), list[str]()
        self.told = threading.Event()

    def check(self) -> None:
        if self.error:
            raise _llmc.Error(self.error)

    def pending(self) -> tuple[float, str]:
        return time.monotonic() - self.begin, "reduce_scatter"

    def share(self, value: bytes | None = None) -> bytes:
        return value or b""

    def at(self, text: str) -> None:
        self.heard.append(f"at {text}")

    def overdue(self, text: str) -> None:
        self.heard.append(text)
        self.told.set()

    def give_up(self, reason: str) -> None:
        self.heard.append(f"give up: {reason}")
        self.told.set()


def test_what_is_heard_of_a_comm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LONG", "INTERVAL", "GRACE"):
        monkeypatch.setattr(nccl, name, 0.1)
    comms = {text: Watched(text) for text in ("", "a rank has left")}
    monkeypatch.setattr(_llmc, "nccl_comm", lambda backend, rank, size, nccl_id, timeout: comms[nccl_id.decode()])
    for text, comm in comms.items():
        monkeypatch.setattr(_llmc, "nccl_id", text.encode)
        assert nccl.open_comm(None, comm) is comm  # type: ignore[arg-type]
        assert comm.told.wait(10)
    *before, last = comms[""].heard
    assert set(before) == {"at reduce_scatter"} and last == "it has waited 0.5 s for reduce_scatter"
    assert comms["a rank has left"].heard == ["give up: a rank has left"]
