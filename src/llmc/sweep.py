"""Many runs over lists of settings, one process each: n at a time on a CPU, or one per GPU.

A sweep is a TOML file::

    output_dir = "runs/lr"            # holds a folder for each run, the summary and the plot
    jobs = 2                          # runs at a time on the CPU [1]
    devices = [0, 1, 2, 3]            # or GPUs: one run at a time on each of them, with device = "cuda"

    [settings]                        # what all runs share: fields of TrainConfig
    data = ["my.txt"]

    [grid]                            # there is a run for every combination of values from these lists
    learning_rate = [3e-5, 1e-4, 3e-4, 1e-3]

    [[runs]]                          # any number of these tables: each is combined with the whole grid
    model = "d6"

sweep.json is written after each run and says which runs are done, so the same command continues a sweep that was stopped. A run
that was half-way resumes from its newest checkpoint if it wrote any. Ctrl-C and SIGTERM (Windows: Ctrl-Break too) stop every run
after its present step, with a checkpoint; a second one stops them at once.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmc import _llmc
from llmc.distributed.place import find_launcher
from llmc.formats.metrics import read_rows
from llmc.optim.schedule import warmup_problem
from llmc.system.fs import write_atomically
from llmc.system.signals import caught_signals, pass_on, signal_name
from llmc.system.toml import load_toml_file
from llmc.training.logs import LineConsole
from llmc.training.settings import TrainConfig, check_names, defaults

_KEYS = {"output_dir", "jobs", "devices", "settings", "grid", "runs"}


@dataclass
class SweepRun:
    """One run of a sweep.

    Attributes:
        name: made from what varies, as "learning_rate=0.001"; also the name of its folder.
        varied: the settings that tell it from the other runs.
        settings: all settings that the sweep gives it.
        status: "" before it has run, then "done" or "failed: ...".
        results: its last "train_loss", "val_loss", "best_val_loss" and "tokens_per_second", as far as they were logged.
    """

    name: str
    varied: dict[str, Any]
    settings: dict[str, Any]
    status: str = ""
    results: dict[str, float] = field(default_factory=dict)


@dataclass
class Sweep:
    """A list of runs, and the devices that they run on.

    Attributes:
        output_dir: the folder that holds a folder for each run, sweep.json and the summary.
        runs: all runs, in the order in which they start.
        jobs: how many run at a time on the CPU.
        devices: numbers of GPUs, each of which has one run at a time; empty for runs on the CPU.
        stopped_by: the number of the signal that ended execute(), or 0.
    """

    output_dir: Path
    runs: list[SweepRun]
    jobs: int
    devices: list[int]
    stopped_by: int = 0

    @staticmethod
    def load(path: str | Path) -> Sweep:
        """Read a sweep from a TOML file.

        Raises:
            ValueError: if the file has an unknown key or setting, a value of the wrong kind, or two runs that are the same.
        """
        values = load_toml_file(path)
        for key in values:
            if key not in _KEYS:
                raise ValueError(f"{path}: unknown key '{key}', expected {', '.join(sorted(_KEYS))}")
        settings, grid, listed = values.get("settings", {}), values.get("grid", {}), values.get("runs", [{}])
        if not isinstance(listed, list) or not listed:
            raise ValueError(f"{path}: runs is {listed!r}, expected tables: [[runs]]")
        for name, table in (("settings", settings), ("grid", grid), *(("runs", row) for row in listed)):
            if not isinstance(table, dict):
                raise ValueError(f"{path}: {name} holds {table!r}, expected a table of settings")
            check_names(table, str(path))
            if "output_dir" in table:
                raise ValueError(
                    f"{path}: {name}.output_dir: each run has a folder of its own in the sweep's output_dir"
                )
        for name, choices in grid.items():
            if not isinstance(choices, list) or not choices:
                raise ValueError(f"{path}: grid.{name} is {choices!r}, expected a list of values")
        jobs, devices, folder = values.get("jobs", 1), values.get("devices", []), values.get("output_dir")
        if not _is_count(jobs) or jobs < 1:
            raise ValueError(f"{path}: jobs is {jobs!r}, expected a number of at least 1")
        if not isinstance(devices, list) or not all(map(_is_count, devices)) or len(set(devices)) != len(devices):
            raise ValueError(f"{path}: devices is {devices!r}, expected a list of different GPU numbers")
        if not isinstance(folder, str) or not folder:
            raise ValueError(
                f"{path}: output_dir is " + ("missing" if folder is None else f"{folder!r}, expected a path")
            )
        combinations = [
            {**row, **dict(zip(grid, chosen))} for row in listed for chosen in itertools.product(*grid.values())
        ]
        configs = []
        for varied in combinations:
            config = TrainConfig(**{**settings, **varied})  # raises an error for a wrong setting, before any run starts
            if devices and config.device not in ("auto", "cuda"):
                raise ValueError(f"{path}: device is '{config.device}', but devices lists GPUs: leave one of them out")
            if config in configs:
                raise ValueError(f"{path}: two runs are the same: {_name(varied)}")
            configs.append(config)
        runs = [SweepRun(n, v, {**settings, **v}) for n, v in zip(_names(combinations), combinations)]
        return Sweep(Path(folder), runs, jobs, devices)

    def execute(self, report: Callable[[str], object] | None = None, *, pass_on_signal: bool = True) -> bool:
        """Execute the runs that are not done yet. If one fails, the others go on.

        Args:
            report: called with each line that tells how the sweep goes; None prints it.
            pass_on_signal: let a signal that stopped the sweep have its effect, as Trainer.fit() does; False returns.

        Returns:
            Whether all runs are done.

        Raises:
            KeyboardInterrupt, SystemExit: as of Trainer.fit(), when all runs have stopped.
            ValueError: before any run starts, if a launcher started several processes of this sweep.
            llmc.Error: the same, if the sweep lists GPUs and this build has no CUDA.
        """
        report = report or LineConsole().text
        launched = find_launcher(os.environ)
        if launched and launched.size > 1:
            raise ValueError(
                f"{launched.name} started {launched.size} processes, but a sweep is one, and starts its runs itself: start it without "
                f"a launcher, and if each run is to have {launched.size} processes, put processes = {launched.size} into [settings]"
            )
        if self.devices and not _llmc.cuda_built():
            raise _llmc.Error(f"devices lists GPUs, but CUDA is {_llmc.cuda_status()}; `jobs` is for the CPU")
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self._read_status()
        waiting = []
        for run in self.runs:
            if run.status == "done":
                report(f"{run.name}: done before")
            else:
                waiting.append(run)
                values = {**defaults(run.settings.get("model")), **run.settings}
                schedule = (
                    values[n] for n in ("schedule", "learning_rate", "warmup_steps", "max_steps", "final_lr_frac")
                )
                if (
                    "warmup_steps" in run.settings
                    and values["max_steps"] > 0
                    and (problem := warmup_problem(*schedule))
                ):
                    report(f"warning: {run.name}: {problem}")
        free: list[int | None] = list(self.devices) or [None] * self.jobs  # None: a turn on the CPU
        running: list[tuple[SweepRun, int | None, subprocess.Popen[bytes]]] = []
        # One thread starts, stops and waits for all runs, so no run can start after the signal was passed on to the others.
        with caught_signals() as signals:
            passed_on = 0
            try:
                while running or (waiting and not signals):
                    while waiting and free and not signals:
                        run, gpu = waiting.pop(0), free.pop(0)
                        try:
                            running.append((run, gpu, self._start(run, gpu)))
                        except OSError as e:
                            free.append(gpu)
                            self._finish(run, f"failed: {e}", report)
                    while passed_on < len(signals):
                        passed_on += 1
                        for _, _, child in running:
                            _stop(child)
                    for entry in list(running):
                        run, gpu, child = entry
                        code = child.poll()
                        if code is None:
                            continue
                        running.remove(entry)
                        free.append(gpu)
                        if code == 0:
                            self._finish(run, "done", report)
                        elif signals:
                            report(f"{run.name}: stopped")
                        else:
                            output = self.output_dir / run.name / "output.txt"
                            self._finish(run, f"failed: exit code {code}, see {output}", report)
                    time.sleep(0.05)
            except BaseException:
                for _, _, child in running:
                    _stop(child)
                for _, _, child in running:
                    child.wait()
                raise
        self.stopped_by = signals[0] if signals else 0
        if self.stopped_by:
            done = sum(run.status == "done" for run in self.runs)
            report(
                f"stopped by {signal_name(self.stopped_by)}, {done} of {len(self.runs)} runs done; the same command goes on"
            )
            if pass_on_signal:
                pass_on(self.stopped_by)
        else:
            self._summarise(report)
        return all(run.status == "done" for run in self.runs)

    def _start(self, run: SweepRun, gpu: int | None) -> subprocess.Popen[bytes]:
        folder = self.output_dir / run.name
        folder.mkdir(parents=True, exist_ok=True)
        chosen = {**run.settings, "output_dir": folder.as_posix(), "resume": True, "progress": "lines"}
        environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}  # for output.txt: all files of a run are UTF-8
        if gpu is not None:
            chosen["device"] = "cuda"
            environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
        else:
            environment["OMP_NUM_THREADS"] = str(max(1, _llmc.default_threads() // self.jobs))
        settings = folder / "sweep.toml"
        settings.write_text(TrainConfig(**chosen).to_toml(), encoding="utf-8")
        # A terminal sends Ctrl-C to a whole process group. With a group of its own a run receives it once: from the sweep.
        group: dict[str, Any] = {"start_new_session": True}
        if sys.platform == "win32":
            group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        with open(folder / "output.txt", "ab") as output:
            return subprocess.Popen(
                [*_TRAIN, "--config", str(settings)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                **group,
            )

    def _finish(self, run: SweepRun, status: str, report: Callable[[str], object]) -> None:
        run.status = status
        run.results = _results(self.output_dir / run.name)
        self._write_status()
        report(f"{run.name}: {status}")

    def _write_status(self) -> None:
        rows = {run.name: {"status": run.status, "settings": run.settings, "results": run.results} for run in self.runs}
        write_atomically(self.output_dir / "sweep.json", [json.dumps(rows, indent=1, default=str).encode()])

    def _read_status(self) -> None:
        path = self.output_dir / "sweep.json"
        if not path.is_file():
            return
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
            done = {name: (row["settings"], row["results"]) for name, row in rows.items() if row["status"] == "done"}
        except (ValueError, AttributeError, KeyError, TypeError) as e:
            raise _llmc.Error(f"{path} is damaged ({e!r}); remove it to run everything again") from e
        for run in self.runs:
            if run.name in done:
                settings, results = done[run.name]
                if settings != json.loads(json.dumps(run.settings, default=str)):
                    raise ValueError(
                        f"{path}: run '{run.name}' was done with other settings; choose another output_dir"
                    )
                run.status, run.results = "done", results

    def _summarise(self, report: Callable[[str], object]) -> None:
        varied = list(dict.fromkeys(name for run in self.runs for name in run.varied))
        columns = [*varied, "train_loss", "val_loss", "best_val_loss", "tokens_per_second", "status"]
        rows = [
            [
                *(run.varied.get(n, "") for n in varied),
                *(f"{run.results[c]:.5g}" if c in run.results else "" for c in columns[len(varied) : -1]),
                run.status,
            ]
            for run in self.runs
        ]
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(columns)
        writer.writerows(rows)
        write_atomically(self.output_dir / "summary.csv", [text.getvalue().encode()])
        report(_table(columns, rows))
        folders = [
            self.output_dir / run.name for run in self.runs if (self.output_dir / run.name / "main.log").is_file()
        ]
        if folders:
            from llmc.plot import plot_runs

            note = plot_runs(folders, self.output_dir / "summary.png")
            if note:
                report(f"note: summary.png: {note}")
            report(f"summary.csv and summary.png are in {self.output_dir}")


_TRAIN = [sys.executable, "-m", "llmc", "train"]


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Ask a run to save a checkpoint and end. The second call ends it at once."""
    if sys.platform == "win32":
        child.send_signal(signal.CTRL_BREAK_EVENT)
    else:
        child.send_signal(signal.SIGTERM)  # does nothing if the run has ended


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _names(combinations: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a folder name for each run. It has whole paths if their last parts are alike, and a number if even these are."""
    short = [_name(varied) for varied in combinations]
    names = [n if short.count(n) == 1 else _name(v, whole=True) for n, v in zip(short, combinations)]
    seen: Counter[str] = Counter()
    for i, name in enumerate(names):
        seen[name] += 1
        if seen[name] > 1:
            names[i] = f"{name}-{seen[name]}"
    return names


def _name(varied: Mapping[str, Any], whole: bool = False) -> str:
    def plain(value: Any) -> str:
        if isinstance(value, list):
            return "+".join(map(plain, value))
        text = Path(value).stem if isinstance(value, str) and not whole else str(value)
        return "".join(c if c.isalnum() or c in "+-." else "_" for c in text)

    return ",".join(f"{name}={plain(value)}" for name, value in varied.items()) or "run"


def _results(folder: Path) -> dict[str, float]:
    """Return the last numbers of a run; none if it has logged nothing."""
    out: dict[str, float] = {}
    path = folder / "metrics.jsonl"
    for row in read_rows(path) if path.is_file() else ():
        if row.get("kind") == "train":
            out["train_loss"], out["tokens_per_second"] = float(row["loss"]), float(row["tokens_per_second"])
        elif row.get("kind") == "validation":
            out["val_loss"] = float(row["loss"])
            out["best_val_loss"] = min(out["val_loss"], out.get("best_val_loss", out["val_loss"]))
    return out


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    texts = [[str(cell) for cell in row] for row in [columns, *rows]]
    widths = [max(len(row[i]) for row in texts) for i in range(len(columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in texts]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
