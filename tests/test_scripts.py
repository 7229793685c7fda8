"""The published runs: our configurations say what llm.c's scripts say, and both start."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from runs import tiny_data

from llmc.commands.train import parse
from llmc.sweep import Sweep

SCRIPTS = Path(__file__).parents[1] / "scripts"

# The flags of llm.c's scripts/*.sh.
LLMC = {
    "gpt2_124M": "-i dev/data/fineweb10B/fineweb_train_*.bin -j dev/data/fineweb10B/fineweb_val_*.bin -o log_gpt2_124M -v 250 -s 20000 "
    "-g 144 -h 1 -b 64 -t 1024 -d 524288 -r 0 -z 1 -c 0.1 -l 0.0006 -q 0.0 -u 700 -n 5000 -y 1 -e d12",
    "gpt2_350M": "-i dev/data/fineweb100B/fineweb_train_*.bin -j dev/data/fineweb100B/fineweb_val_*.bin -o log_gpt2_350M -v 250 "
    "-s 100000 -g 144 -h 1 -b 64 -t 1024 -d 524288 -r 0 -z 1 -c 0.1 -l 0.0003 -q 0.0 -u 700 -n 2000 -x 60000 -y 1 -e d24",
    "gpt2_774M": "-i dev/data/fineweb100B/fineweb_train_*.bin -j dev/data/fineweb100B/fineweb_val_*.bin -o log_gpt2_774M -v 250 "
    "-s 300000 -g 144 -h 1 -b 32 -t 1024 -d 524288 -r 0 -z 1 -c 0.1 -l 0.00025 -q 0.0 -u 700 -n 4000 -x 286102 -y 1 -e d36",
    "gpt2_1558M": "-i dev/data/edu_fineweb100B/edu_fineweb_train_*.bin -j dev/data/edu_fineweb100B/edu_fineweb_val_*.bin "
    "-o log_gpt2_1558M -v 250 -s 300000 -g 384 -h 1 -b 16 -t 1024 -d 1048576 -r 0 -z 1 -c 0.1 -k cosine -l 0.0006 -q 0.1 -u 700 "
    "-n 2000 -x 32000 -ge 1 -y 1 -e d48",
    "gpt3_125M": "-i dev/data/fineweb100B/fineweb_train_*.bin -j dev/data/fineweb100B/fineweb_val_*.bin -o log_gpt3_125M -v 250 "
    "-s 20000 -g 144 -h 1 -b 32 -t 2048 -d 524288 -r 0 -z 1 -c 0.1 -l 0.0006 -q 0.1 -u 700 -n 10000 -nk 5 -nm 50000 -ge 1 -sl 7.0 -sg 7.0 "
    "-y 1 -x 572204 -e gpt3:c768",
}


@pytest.mark.parametrize("name", LLMC)
def test_our_file_is_llmc_s_script(name: str) -> None:
    assert parse(["--config", str(SCRIPTS / f"{name}.toml")]) == parse(LLMC[name].split())


@pytest.mark.parametrize("name", LLMC)
def test_llmc_s_flags_train(name: str, tmp_path: Path) -> None:
    """llm.c's command line, two steps of it, on a small model and small data."""
    train, val = tiny_data(tmp_path / "data")
    small = f"-i {train} -j {val} -o {tmp_path / 'log'} -x 2 -b 2 -t 16 -d 64 -m 1 -g 4 --layers 1 --heads 2 --channels 16 --max-seq-len 16"
    command = [sys.executable, "-m", "llmc", "train", *LLMC[name].split(), *small.split(), "--vocab-size", "61"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "step    2/2 | loss" in done.stdout and (tmp_path / "log" / "DONE_00000002").is_file()


@pytest.mark.skipif(sys.platform == "win32" or shutil.which("bash") is None, reason="needs bash")
def test_run_script_restarts_until_done(tmp_path: Path) -> None:
    """A stand-in for llmc-train that fails twice."""
    fake = tmp_path / "llmc-train"
    fake.write_text('#!/bin/sh\necho "$@" >> calls\n[ "$(wc -l < calls)" -ge 3 ] || exit 1\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", str(SCRIPTS / "run.sh"), "gpt2_124M", "-b", "8"]
    assert subprocess.run(command, cwd=tmp_path, env=environment, timeout=60).returncode == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 3 and all(call.endswith("gpt2_124M.toml -b 8") for call in calls)


def test_sweep_file() -> None:
    assert [run.varied["learning_rate"] for run in Sweep.load(SCRIPTS / "sweep_lr.toml").runs] == [
        3e-5,
        1e-4,
        3e-4,
        1e-3,
    ]
