"""Ranks on two hosts that meet by the network, by a shared file or by MPI train to the bits of one process, and end if the cable is cut."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from namespaces import Host, two_hosts, why_not
from runs import tiny_settings

import llmc
from llmc.distributed.launcher import find_mpiexec
from llmc.training.trainer import Trainer

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
    pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="needs mpi4py, and MPICH's mpiexec"),
]


def settings_in(folder: Path, **changes: Any) -> llmc.TrainConfig:
    """Return the settings of a run whose updates have two rows: one for each of two ranks, or two micro-batches of one process."""
    return llmc.TrainConfig(**tiny_settings(folder, batch_size=1, total_batch_size=32, **changes))


def start(a: Host, b: Host, folder: Path, config: llmc.TrainConfig) -> subprocess.Popen[str]:
    """Start a rank on each of two hosts, by the mpiexec of MPICH. What a rank prints on stderr is in FOLDER/stderr.HOST."""
    (folder / "settings.toml").write_text(config.to_toml())
    launch = [find_mpiexec(), "-launcher", "ssh", "-launcher-exec", str(a.remote_shell), "-hosts", f"{a.name},{b.name}"]
    rank = ["sh", "-c", 'exec "$0" -m llmc train --config settings.toml 2> stderr.$(hostname)', sys.executable]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LLMC_TOKEN": "a secret", "LLMC_HEARTBEAT_TIMEOUT": "2"}
    return a.start([*launch, "-n", "2", *rank], cwd=folder, env=environment)


def result(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for kind in ("model", "state") for file in run.glob(f"{kind}_*")}


@pytest.mark.parametrize("meet", ["mpi", "tcp", "fs"])
def test_two_hosts_train_to_the_bits_of_one_process(tmp_path: Path, meet: str) -> None:
    changes = {"mpi": {}, "tcp": {"dist_host": "hosta", "dist_port": 29500}, "fs": {"dist_dir": str(tmp_path)}}[meet]
    Trainer(settings_in(tmp_path, output_dir=str(tmp_path / "alone"))).fit()
    with two_hosts(tmp_path) as (a, b):
        config = settings_in(tmp_path, dist_init=meet, progress="lines", **changes)
        process = start(a, b, tmp_path, config)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said + (tmp_path / "stderr.hosta").read_text()
    assert re.search(r"num_processes +\| 2 ", said)
    assert (tmp_path / "stderr.hostb").exists()  # there was a rank
    assert len(alone := result(tmp_path / "alone")) == 2
    assert result(tmp_path / "run") == alone


def test_the_cable_is_cut(tmp_path: Path) -> None:
    with two_hosts(tmp_path) as (a, b):
        start(a, b, tmp_path, settings_in(tmp_path, max_steps=100_000, val_every=0))
        wait(lambda: (tmp_path / "run" / "metrics.jsonl").exists(), 30)
        a.cut()
        wait(lambda: not ranks_in(tmp_path), 10)
    for host, lost in (("a", "rank 1 on hostb"), ("b", "rank 0 on hosta")):
        assert f"{lost}: no sign of life for 2 s" in (tmp_path / f"stderr.host{host}").read_text()


def wait(done: Any, seconds: float) -> None:
    begin = time.monotonic()
    while not done():
        assert time.monotonic() - begin < seconds
        time.sleep(0.05)


def ranks_in(folder: Path) -> list[int]:
    """Return the processes that train in a folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if "settings.toml" in process.cmdline() and process.cwd() == str(folder):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found
