"""Many runs over lists of settings, one process each: n at a time on a CPU, or one per GPU.

A sweep is a TOML file::

    output_dir = "runs/lr"            # a folder per run in it, the summary and the plot beside them
    jobs = 2                          # runs at a time on the CPU [1]
    devices = [0, 1, 2, 3]            # or GPUs: one run at a time on each

    [settings]                        # of every run: the fields of TrainConfig
    data = ["my.txt"]

    [grid]                            # every combination of these lists
    learning_rate = [3e-5, 1e-4, 3e-4, 1e-3]

    [[runs]]                          # and these, one by one, each with every combination of the grid
    model = "d6"

What is done is written to sweep.json after each run, so the same command continues a sweep that was stopped; a run that was
half-way resumes from its own checkpoints where it wrote any.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmc import _llmc
from llmc.fs import write_atomically
from llmc.settings import TrainConfig, load_toml_file

_KEYS = {"output_dir", "jobs", "devices", "settings", "grid", "runs"}


@dataclass
class SweepRun:
    """One run: its name (from what varies), its settings, and how it went: "", "done" or "failed: ..."."""

    name: str
    varied: dict[str, Any]
    settings: dict[str, Any]
    status: str = ""
    results: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sweep:
    output_dir: Path
    runs: list[SweepRun]
    jobs: int
    devices: list[int]

    @staticmethod
    def load(path: str | Path) -> Sweep:
        """ValueError where the file has an unknown key or setting, or two runs are the same."""
        values = load_toml_file(path)
        for key in values:
            if key not in _KEYS:
                raise ValueError(f"{path}: unknown key '{key}', expected {', '.join(sorted(_KEYS))}")
        settings, grid, listed = values.get("settings", {}), values.get("grid", {}), values.get("runs", [{}])
        for table in (settings, grid, *listed):
            TrainConfig.check_names(table, str(path))
        for name, choices in grid.items():
            if not isinstance(choices, list) or not choices:
                raise ValueError(f"{path}: grid.{name} is {choices!r}, expected a list of values")
        runs = []
        for own in listed:
            for combination in itertools.product(*grid.values()):
                varied = {**own, **dict(zip(grid, combination))}
                chosen = {**settings, **varied}
                TrainConfig(**chosen)  # refuses what is wrong before anything runs
                runs.append(SweepRun(_name(varied), varied, chosen))
        names = [run.name for run in runs]
        if len(set(names)) != len(names):
            raise ValueError(f"{path}: two runs are the same: {next(n for n in names if names.count(n) > 1)}")
        jobs, devices = values.get("jobs", 1), values.get("devices", [])
        if not isinstance(jobs, int) or jobs < 1:
            raise ValueError(f"{path}: jobs is {jobs!r}, expected a number of at least 1")
        if "output_dir" not in values:
            raise ValueError(f"{path}: output_dir is missing")
        return Sweep(Path(values["output_dir"]), runs, jobs, list(devices))

    def execute(self, report: Any = print) -> bool:
        """Runs what is not done yet; whether every run is done. A failed run is reported, and the rest goes on."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self._recall()
        slots: queue.Queue[int | None] = queue.Queue()
        places: Sequence[int | None] = self.devices or [None] * self.jobs
        for place in places:
            slots.put(place)
        lock = threading.Lock()
        children: dict[str, subprocess.Popen[bytes]] = {}
        stopping = threading.Event()

        def one(run: SweepRun, slot: int | None) -> None:
            try:
                if not stopping.is_set():
                    status = self._execute_one(run, slot, children)
                    with lock:
                        if not stopping.is_set() or status == "done":
                            run.status = status
                            run.results = _results(self.output_dir / run.name)
                            self._remember()
                            report(f"{run.name}: {status}")
            finally:
                slots.put(slot)

        threads = []
        try:
            for run in self.runs:
                if run.status == "done":
                    report(f"{run.name}: done before")
                    continue
                slot = slots.get()
                thread = threading.Thread(target=one, args=(run, slot))
                thread.start()
                threads.append(thread)
            for thread in threads:
                thread.join()
        except BaseException:
            stopping.set()
            for child in list(children.values()):
                child.terminate()  # saves where it has a run directory, and ends
            for thread in threads:
                thread.join()
            raise
        self._summarise(report)
        return all(run.status == "done" for run in self.runs)

    def _execute_one(self, run: SweepRun, slot: int | None, children: dict[str, subprocess.Popen[bytes]]) -> str:
        folder = self.output_dir / run.name
        folder.mkdir(parents=True, exist_ok=True)
        config = TrainConfig(**{**run.settings, "output_dir": folder.as_posix(), "resume": True, "progress": "lines"})
        settings = folder / "sweep.toml"
        settings.write_text(config.to_toml(), encoding="utf-8")
        environment = dict(os.environ)
        if slot is not None:
            environment["CUDA_VISIBLE_DEVICES"] = str(slot)
        else:
            environment["OMP_NUM_THREADS"] = str(max(1, _llmc.default_threads() // self.jobs))
        with open(folder / "output.txt", "ab") as output:
            command = [sys.executable, "-m", "llmc", "train", "--config", str(settings)]
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
            )
            children[run.name] = child
            code = child.wait()
            del children[run.name]
        return "done" if code == 0 else f"failed: exit code {code}, see {folder / 'output.txt'}"

    def _remember(self) -> None:
        rows = {run.name: {"status": run.status, "settings": run.settings, "results": run.results} for run in self.runs}
        write_atomically(self.output_dir / "sweep.json", [json.dumps(rows, indent=1, default=str).encode()])

    def _recall(self) -> None:
        path = self.output_dir / "sweep.json"
        if not path.is_file():
            return
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as e:
            raise _llmc.Error(f"{path} is damaged ({e}); remove it to run everything again") from e
        for run in self.runs:
            row = rows.get(run.name)
            if row and row["status"] == "done":
                if row["settings"] != json.loads(json.dumps(run.settings, default=str)):
                    raise ValueError(
                        f"{path}: run '{run.name}' was done with other settings; choose another output_dir"
                    )
                run.status, run.results = "done", row["results"]

    def _summarise(self, report: Any) -> None:
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

            plot_runs(folders, self.output_dir / "summary.png")
            report(f"summary.csv and summary.png are in {self.output_dir}")


def _name(varied: Mapping[str, Any]) -> str:
    def plain(value: Any) -> str:
        text = Path(str(value)).stem if isinstance(value, str) else str(value)
        return "".join(c if c.isalnum() or c in "+-." else "_" for c in text)

    return ",".join(f"{name}={plain(value)}" for name, value in varied.items()) or "run"


def _results(folder: Path) -> dict[str, float]:
    """The last numbers of a run."""
    out: dict[str, float] = {}
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return out
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
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
