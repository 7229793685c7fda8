"""Sweeps: all runs of a grid, a failing one among them; sweeps that signals stop, and that continue afterwards."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from runs import tiny_settings

import llmc.sweep
from llmc import _llmc
from llmc.sweep import Sweep
from llmc.system.toml import load_toml_file


def write(folder: Path, changes: dict[str, Any] | None = None, **tables: str) -> Path:
    """Write the file of a sweep of tiny runs, with changed settings and with other tables (TOML), and return its path."""
    settings = tiny_settings(folder, **{"max_steps": 3, "val_every": 3, **(changes or {})})
    for name in ("output_dir", "progress"):
        del settings[name]
    body = "\n".join(f"{k} = {json.dumps(list(v) if isinstance(v, tuple) else v)}" for k, v in settings.items())
    path = folder / "sweep.toml"
    rest = "\n".join(f"[{name}]\n{text}" for name, text in tables.items())
    path.write_text(f'output_dir = "{(folder / "sweep").as_posix()}"\njobs = 2\n[settings]\n{body}\n{rest}\n')
    return path


def test_grid_with_a_failure_and_restart(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"warmup_steps": 3},
        grid="learning_rate = [1e-3, 1e-2]\nval_data = ['missing.bin', "
        + repr(str(tmp_path / "data" / "val.bin"))
        + "]",
    )
    lines: list[str] = []
    sweep = Sweep.load(path)
    assert len(sweep.runs) == 4 and not sweep.execute(lines.append)
    assert sum("warmup_steps is 3 of 3 steps in all: the learning rate rises to" in line for line in lines) == 4
    status = {run.name: run.status for run in sweep.runs}
    assert sorted(s.split(":")[0] for s in status.values()) == ["done", "done", "failed", "failed"]
    rows = list(csv.DictReader((tmp_path / "sweep" / "summary.csv").read_text().splitlines()))
    assert [row["learning_rate"] for row in rows] == ["0.001", "0.001", "0.01", "0.01"]
    assert all(bool(row["val_loss"]) == (row["status"] == "done") for row in rows)
    assert (tmp_path / "sweep" / "summary.png").is_file()
    failed = next(run for run in sweep.runs if run.status.startswith("failed"))
    assert "missing.bin" in (tmp_path / "sweep" / failed.name / "output.txt").read_text()

    lines.clear()
    again = Sweep.load(path)
    again.execute(lines.append)
    assert sum("done before" in line for line in lines) == 2


def command(path: Path) -> subprocess.Popen[str]:
    """Start `llmc sweep` in a process group of its own, as a shell does."""
    return subprocess.Popen(
        [sys.executable, "-m", "llmc", "sweep", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_command(tmp_path: Path) -> None:
    path = write(tmp_path, grid="seed = [1, 2]")
    listed = subprocess.run(
        [sys.executable, "-m", "llmc", "sweep", str(path), "--dry-run"], capture_output=True, text=True, timeout=60
    )
    said = f"2 runs of 3 steps, 6 in all; 2 at a time; {tmp_path / 'sweep'} keeps them"
    assert (listed.returncode, listed.stdout.splitlines()) == (0, ["seed=1", "seed=2", said]), listed.stderr
    assert not (tmp_path / "sweep").exists()
    child = command(path)
    out, _ = child.communicate(timeout=120)
    assert child.returncode == 0 and said in out and "best_val_loss" in out, out
    for name in ("1/2 seed=1", "2/2 seed=2"):
        assert re.search(rf"^run {name}: done, val loss \d\.\d{{4}} in \d+\.\d s$", out, re.MULTILINE), out
    (best,) = re.findall(r"^\*  (\d)  ", out, re.MULTILINE)
    assert f"* the best: seed={best}, val loss" in out
    (command_line,) = re.findall(r"^  llmc (train --resume .*)$", out, re.MULTILINE)
    assert f"seed={best} --max-steps 6" in command_line
    for name in ("seed=1", "seed=2"):
        assert "step    3/3 | loss" in (tmp_path / "sweep" / name / "output.txt").read_text()


def lines_of(path: Path) -> int:
    return len(path.read_bytes().splitlines()) if path.is_file() else 0


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_stopped_sweep_saves_and_continues(tmp_path: Path, name: str) -> None:
    """Of three runs, two run at a time. SIGINT goes to the whole process group, as from a terminal."""
    number, called = getattr(signal, name), "Ctrl-C" if name == "SIGINT" else name
    path = write(tmp_path, {"max_steps": 100_000_000, "val_every": 0, "plot": False}, grid="seed = [1, 2, 3]")
    sweep = command(path)
    folders = [tmp_path / "sweep" / f"seed={i}" for i in (1, 2, 3)]
    end = time.monotonic() + 60
    while not all(lines_of(f / "main.log") > 3 for f in folders[:2]):
        assert sweep.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    children = psutil.Process(sweep.pid).children(recursive=True)
    assert len(children) >= 2
    try:
        if name == "SIGINT":
            os.killpg(sweep.pid, number)
        else:
            sweep.send_signal(number)
        out, _ = sweep.communicate(timeout=60)
        assert sweep.returncode == 128 + number and f"stopped by {called}, 0 of 3 runs done" in out, out
        assert not any(child.is_running() for child in children)
    finally:
        for child in children:
            if child.is_running():
                child.kill()
    assert not folders[2].exists()  # no run began after the signal
    steps = []
    for folder in folders[:2]:
        (done,) = folder.glob("DONE_*")
        steps.append(int(done.name[5:]))
        assert "saved; continue with" in (folder / "output.txt").read_text()

    # The same sweep, with a smaller number of steps, continues the two runs from their checkpoints.
    text = path.read_text().replace("max_steps = 100000000", f"max_steps = {max(steps) + 2}\nallow_changes = true")
    path.write_text(text.replace("seed = [1, 2, 3]", "seed = [1, 2]"))
    again = command(path)
    out, _ = again.communicate(timeout=120)
    assert again.returncode == 0, out
    for folder, step in zip(folders, steps):
        assert f"continuing {folder.as_posix()} from step {step}" in (folder / "output.txt").read_text()


STAND_IN = """
import json, os, pathlib, sys, time, tomllib
config = tomllib.loads(pathlib.Path(sys.argv[2]).read_text())
log = pathlib.Path(config["output_dir"], "..", "gpu.log")
gpu = os.environ["CUDA_VISIBLE_DEVICES"]
for state in ("begins", "ends"):
    with open(log, "a") as file:
        print(gpu, config["device"], state, file=file)
    end = time.monotonic() + 30
    while log.read_text().count("begins") < 2:  # until two runs have begun
        assert time.monotonic() < end
        time.sleep(0.01)
"""


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the stand-in reads TOML with the standard library")
def test_one_run_at_a_time_on_each_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of `llmc train` a program runs that writes down which GPU it was given."""
    path = write(tmp_path, grid="seed = [1, 2, 3, 4]")
    path.write_text(path.read_text().replace("jobs = 2", "devices = [0, 5]").replace('device = "cpu"', ""))
    monkeypatch.setattr(_llmc, "cuda_built", lambda: True)
    monkeypatch.setattr(llmc.sweep, "_TRAIN", [sys.executable, "-c", STAND_IN])
    assert Sweep.load(path).execute(lambda text: None)
    log = (tmp_path / "sweep" / "gpu.log").read_text().splitlines()
    for gpu in "05":
        lines = [line for line in log if line.startswith(gpu)]
        assert lines and lines == [f"{gpu} cuda begins", f"{gpu} cuda ends"] * (len(lines) // 2)
    assert len(log) == 8


STUBBORN = """
import os, pathlib, signal, sys, time, tomllib
folder = pathlib.Path(tomllib.loads(pathlib.Path(sys.argv[2]).read_text())["output_dir"])
came = []
def handle(number, frame):
    came.append(number)
    (folder / f"signal {len(came)}").touch()
    if len(came) == 2:
        os._exit(9)
signal.signal(signal.SIGTERM, handle)
(folder / "signal 0").touch()
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32" or sys.version_info < (3, 11), reason="POSIX signals; tomllib")
def test_a_second_signal_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of `llmc train` a program runs that ends only at the second signal."""
    monkeypatch.setattr(llmc.sweep, "_TRAIN", [sys.executable, "-c", STUBBORN])
    sweep = Sweep.load(write(tmp_path, grid="seed = [1, 2]"))

    def press() -> None:
        for count in (0, 1):
            while not all((tmp_path / "sweep" / f"seed={i}" / f"signal {count}").exists() for i in (1, 2)):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    presser = threading.Thread(target=press, daemon=True)
    presser.start()
    start = time.monotonic()
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):  # the program that runs the sweep is to end, too
        sweep.execute(lambda text: None)
    assert sweep.stopped_by == signal.SIGTERM
    assert time.monotonic() - start < 50  # the program would end by itself after 60
    presser.join()
    assert [run.status for run in sweep.runs] == ["", ""]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(_llmc.cuda_built(), reason="of a build without CUDA")
def test_gpus_of_a_build_without_cuda(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_text(path.read_text().replace("jobs = 2", "devices = [0]").replace('device = "cpu"', ""))
    with pytest.raises(_llmc.Error, match=r"devices lists GPUs, but CUDA is not built \(pip install"):
        Sweep.load(path).execute()
    assert not (tmp_path / "sweep").exists()


def test_under_a_launcher_of_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setenv("PMI_SIZE", "4")
    sweep = Sweep.load(write(tmp_path))
    with pytest.raises(ValueError, match=r"mpiexec started 4 processes, .* processes = 4 into \[settings\]"):
        sweep.execute()


def test_a_run_that_cannot_start_is_a_failed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is shown in a terminal: a bar, and the table below it."""
    path = write(tmp_path, grid="seed = [1, 2]")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "seed=1").write_text("in the way of the folder")
    sweep = Sweep.load(path)
    monkeypatch.setattr(llmc.sweep, "shows_bar", lambda: True)
    assert not sweep.execute()
    assert sweep.runs[0].status.startswith("failed: ") and sweep.runs[1].status == "done"
    shown = capsys.readouterr().out.splitlines()
    assert any(
        line.startswith("100%|") and line.endswith("| 2/2 runs")
        for line in "\n".join(shown).replace("\r", "\n").split("\n")
    )
    assert shown[-2].startswith("* the best: seed=2, val loss") and shown[-3].startswith("summary.csv")


def test_the_best(tmp_path: Path) -> None:
    """The lowest loss of runs that are done, if it is of the same tokens; a loss that is not finite is none."""
    sweep = Sweep.load(write(tmp_path, grid="seed = [1, 2, 3, 4]"))
    assert sweep.best is None
    for run, loss in zip(sweep.runs, (3.0, math.nan, 2.0, 1.0)):
        run.status, run.results = "done", {"val_loss": loss}
    sweep.runs[3].status = "failed: exit code 1"
    assert sweep.best is sweep.runs[2]
    for name, value in (("seq_len", 8), ("tokenizer", "bytes"), ("holdout", "spread"), ("val_data", ["other.bin"])):
        before = dict(sweep.runs[0].settings)
        sweep.runs[0].settings[name] = value
        assert sweep.best is None
        sweep.runs[0].settings = before


def test_the_best_of_different_tokenizers_is_that_in_bits_per_byte(tmp_path: Path, capsys) -> None:
    sweep = Sweep.load(write(tmp_path, grid='tokenizer = ["bytes", "bpe:300"]'))
    for run, loss, bits in zip(sweep.runs, (2.0, 4.0), (2.5, 1.5)):
        run.status, run.results = "done", {"val_loss": loss, "bits_per_byte": bits}
    assert sweep.best is sweep.runs[1]
    sweep.output_dir.mkdir()
    with llmc.sweep._Display(sweep, None) as display:
        sweep._summarise(display)
    table = capsys.readouterr().out
    assert table.endswith("\n* the best in bits per byte: tokenizer=bpe_300, val loss 4.0000 (1.5000 bits/byte)\n")
    assert [line.split() for line in table.splitlines()[2:4]] == [
        ["bytes", "2", "2.5", "done"],
        ["*", "bpe:300", "4", "1.5", "done"],
    ]
    sweep.runs[0].settings["seq_len"] = 8  # another context
    assert sweep.best is None
    del sweep.runs[0].settings["seq_len"], sweep.runs[0].results["bits_per_byte"]
    assert sweep.best is None


def test_steps(tmp_path: Path) -> None:
    path = write(tmp_path, grid="max_steps = [10, -1]")
    assert Sweep.load(path).describe().startswith("2 runs: 1 of 10 steps, 1 of one epoch; 2 at a time;")
    path = write(tmp_path, grid="max_steps = [10, 2000]\nseed = [1, 2]")
    assert (
        Sweep.load(path)
        .describe()
        .startswith("4 runs: 2 of 10 steps, 2 of 2,000 steps, 4,020 steps in all; 2 at a time;")
    )


def test_losses_that_are_not_finite(tmp_path: Path) -> None:
    rows = [{"kind": "validation", "loss": loss, "bits_per_byte": 1.5} for loss in (None, 4.0, 5.0, None)]
    rows.append({"kind": "train", "loss": None, "tokens_per_second": 9.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = llmc.sweep._results(tmp_path)
    assert (results["best_val_loss"], results["bits_per_byte"], results["tokens_per_second"]) == (4.0, 1.5, 9.0)
    assert math.isnan(results["val_loss"]) and math.isnan(results["train_loss"])

    sweep = Sweep.load(write(tmp_path))
    sweep.output_dir.mkdir()
    sweep.runs[0].status, sweep.runs[0].results = "done", results
    sweep._write_status()
    assert "NaN" not in (sweep.output_dir / "sweep.json").read_text()
    again = Sweep.load(write(tmp_path))
    again._read_status()
    assert math.isnan(again.runs[0].results["val_loss"]) and again.runs[0].results["best_val_loss"] == 4.0


def test_damaged_memory(tmp_path: Path) -> None:
    sweep = Sweep.load(write(tmp_path))
    (tmp_path / "sweep").mkdir()
    for text in ("{", "[1]", '{"run": 3}', '{"run": {}}'):
        (tmp_path / "sweep" / "sweep.json").write_text(text)
        with pytest.raises(_llmc.Error, match="sweep.json is damaged"):
            sweep.execute()


def test_names_of_paths(tmp_path: Path) -> None:
    path = write(tmp_path, grid="data = ['a/x.txt', 'b/x.txt', 'y.txt', ['y.txt', 'z.txt']]")
    names = [run.name for run in Sweep.load(path).runs]
    assert names == ["data=a_x.txt", "data=b_x.txt", "data=y", "data=y+z"]
    path = write(tmp_path, grid="prompt = ['a b', 'a_b']")
    assert [run.name for run in Sweep.load(path).runs] == ["prompt=a_b", "prompt=a_b-2"]


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"grid": "learning_rte = [1]"}, "unknown setting 'learning_rte'"),
        ({"grid": "learning_rate = 1"}, "expected a list of values"),
        ({"gird": "learning_rate = [1]"}, "unknown key 'gird'; did you mean grid"),
        ({"seed": "a = 1"}, r"'seed' is a setting: put it under \[settings\]"),
        ({"grid": "schedule = ['cosine', 'sine']"}, "schedule is 'sine'"),
        ({"grid": "seed = [1, 1]"}, "two runs are the same: seed=1"),
        ({"grid": "output_dir = ['a', 'b']"}, "grid.output_dir"),
        (
            {"grid": "muon_momentum = [0.9, 0.95]"},
            "sweep.toml: muon_momentum is 0.9, but optimizer is adamw: only muon has it",
        ),
    ],
)
def test_refused(tmp_path: Path, tables: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sweep.load(write(tmp_path, **tables))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("devices = 2", "devices is 2, expected a list of different GPU numbers"),
        ("devices = ['0']", r"devices is \['0'\], expected a list"),
        ("devices = [1, 1]", "expected a list of different GPU numbers"),
        ("devices = [0]", "device is 'cpu', but devices lists GPUs"),  # the settings ask for the cpu
        ("jobs = 0", "jobs is 0, expected a number of at least 1"),
        ("jobs = true", "jobs is True, expected a number"),
        ("runs = 3", "runs is 3, expected tables"),
        ("runs = [3]", "runs holds 3, expected a table of settings"),
        ("grid = [1]", r"grid holds \[1\], expected a table of settings"),
        ("output_dir = 5", "output_dir is 5, expected a path"),
        ("", "output_dir is missing"),
    ],
)
def test_values_of_the_wrong_kind(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path)
    kept = [old for old in path.read_text().splitlines() if not old.startswith(("jobs", "output_dir"))]
    if not line.startswith("output_dir") and line:
        kept.insert(0, 'output_dir = "sweep"')
    path.write_text("\n".join([line, *kept]))
    with pytest.raises(ValueError, match=message):
        Sweep.load(path)


def test_a_sweep_of_a_dictionary(tmp_path: Path) -> None:
    """It is what the same TOML file makes, and errors name no file."""
    path = write(tmp_path, grid="learning_rate = [1e-3, 1e-2]")
    values = load_toml_file(path)
    assert Sweep.from_dict(values) == Sweep.load(path)
    assert Sweep.from_dict({**values, "output_dir": Path(values["output_dir"])}) == Sweep.load(path)
    with pytest.raises(ValueError, match=r"^the sweep: grid\.learning_rate is 0\.1, expected a list of values"):
        Sweep.from_dict({**values, "grid": {"learning_rate": 0.1}})


def test_settings_that_are_no_table(tmp_path: Path) -> None:
    (tmp_path / "sweep.toml").write_text('output_dir = "sweep"\nsettings = 3\n')
    with pytest.raises(ValueError, match="settings holds 3, expected a table of settings"):
        Sweep.load(tmp_path / "sweep.toml")
