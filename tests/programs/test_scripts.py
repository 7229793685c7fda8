"""The configurations of the published runs (scripts/): they mean the same as llm.c's scripts, and both start."""

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

SCRIPTS = Path(__file__).parents[2] / "scripts"

# The flags in llm.c's scripts/*.sh.
LLM_C = {
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


@pytest.mark.parametrize("name", LLM_C)
def test_the_configuration_is_that_of_llm_c(name: str) -> None:
    assert parse(["--config", str(SCRIPTS / f"{name}.toml")]) == parse(LLM_C[name].split())


@pytest.mark.parametrize("name", LLM_C)
def test_llm_c_flags_train(name: str, tmp_path: Path) -> None:
    """Two steps with llm.c's command line, on a small model and small data."""
    train, val = tiny_data(tmp_path / "data")
    small = f"-i {train} -j {val} -o {tmp_path / 'log'} -x 2 -b 2 -t 16 -d 64 -m 1 -g 4 --layers 1 --heads 2 --channels 16 --max-seq-len 16"
    command = [sys.executable, "-m", "llmc", "train", *LLM_C[name].split(), *small.split(), "--vocab-size", "61"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "step    2/2 | loss" in done.stdout and (tmp_path / "log" / "DONE_00000002").is_file()


@pytest.fixture(autouse=True)
def no_python_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHON", raising=False)


def run_script(shell: str, folder: Path, body: str, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run run.sh or run.ps1 with a shell script in place of llmc-train.

    The script appends its arguments to the file `calls`, counts its calls in $count, and then executes body.
    """
    if sys.platform == "win32" or shutil.which(shell) is None:
        pytest.skip(f"needs {shell}, and a shell script in place of llmc-train")
    fake = folder / "llmc-train"
    fake.write_text(f'#!/bin/sh\necho "$@" >> calls\ncount=$(wc -l < calls)\n{body}\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    command = {"bash": ["bash", str(SCRIPTS / "run.sh")], "pwsh": ["pwsh", "-File", str(SCRIPTS / "run.ps1")]}[shell]
    return subprocess.run([*command, *argv], cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


SAVES_TWICE = '[ "$count" -ge 3 ] && exit 0\nmkdir -p {folder}\ntouch {folder}/DONE_0000000$count\nexit 1'


@pytest.mark.parametrize("shell", ["bash", "pwsh"])
@pytest.mark.parametrize(
    ("flags", "folder"),
    [("-b 8 -n 5 -d 2048", "log_gpt2_124M"), ("-o other", "other"), ("--output-dir=a/b", "a/b")],
)
def test_run_script_restarts_until_done(tmp_path: Path, shell: str, flags: str, folder: str) -> None:
    """A run that fails twice, each time after a new checkpoint, is started three times."""
    done = run_script(shell, tmp_path, SAVES_TWICE.format(folder=folder), "gpt2_124M", *flags.split())
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 3 and all(call.endswith(f"gpt2_124M.toml {flags}") for call in calls)


@pytest.mark.parametrize("shell", ["bash", "pwsh"])
def test_run_script_takes_python_from_the_variable(tmp_path: Path, shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "a folder" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "$@" > python_calls\n')
    python.chmod(0o755)
    monkeypatch.setenv("PYTHON", str(python))
    done = run_script(shell, tmp_path, "exit 1", "gpt2_124M", "-x", "2")
    assert done.returncode == 0, done.stderr
    call = (tmp_path / "python_calls").read_text()
    assert call.startswith("-m llmc train --config ") and call.endswith("gpt2_124M.toml -x 2\n")
    assert not (tmp_path / "calls").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="a PATH of symbolic links")
@pytest.mark.parametrize("shell", ["bash", "pwsh"])
def test_run_script_without_llmc_train_on_the_path(tmp_path: Path, shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script takes the first Python on the PATH."""
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    for name in ("bash", "pwsh", "dirname", "ls", "sed", "tr", "grep", "sort", "tail", "sleep"):
        if program := shutil.which(name):
            (tmp_path / name).symlink_to(program)
    python = tmp_path / ("python3" if shell == "bash" else "python")
    python.write_text('#!/bin/sh\necho "$@" > python_calls\n')
    python.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    script = ["bash", str(SCRIPTS / "run.sh")] if shell == "bash" else ["pwsh", "-File", str(SCRIPTS / "run.ps1")]
    done = subprocess.run([*script, "gpt2_124M"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "python_calls").read_text().startswith("-m llmc train --config ")


@pytest.mark.parametrize("shell", ["bash", "pwsh"])
def test_run_script_does_not_repeat_what_fails(tmp_path: Path, shell: str) -> None:
    """A run that fails without a new checkpoint, one that was stopped, and unknown names are not started again."""
    body = "mkdir -p log_gpt2_124M\ntouch log_gpt2_124M/DONE_00000005\nexit 1"
    done = run_script(shell, tmp_path, body, "gpt2_124M")
    assert done.returncode == 1 and "no new checkpoint in log_gpt2_124M: not started again" in done.stderr
    assert len((tmp_path / "calls").read_text().splitlines()) == 2
    (tmp_path / "calls").unlink()
    for code in (2, 130, 143):
        assert run_script(shell, tmp_path, f"exit {code}", "gpt2_124M").returncode == code
    assert len((tmp_path / "calls").read_text().splitlines()) == 3
    for argv in ([], ["sweep_lr"], ["gpt2_999M"]):
        wrong = run_script(shell, tmp_path, "exit 0", *argv)
        assert wrong.returncode == 2 and "gpt2_124M" in wrong.stderr and "sweep_lr" not in wrong.stderr
    assert len((tmp_path / "calls").read_text().splitlines()) == 3


def test_sweep_file() -> None:
    rates = [run.varied["learning_rate"] for run in Sweep.load(SCRIPTS / "sweep_lr.toml").runs]
    assert rates == [3e-5, 1e-4, 3e-4, 1e-3]
