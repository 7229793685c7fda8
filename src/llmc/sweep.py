"""Many runs over lists of settings, one process each: n at a time on a CPU, or one per GPU.

`llmc sweep --help` shows the TOML file that says which (llmc.commands.sweep).
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from llmc import _llmc
from llmc.checkpoint import finished_steps
from llmc.distributed.place import find_launcher
from llmc.formats.metrics import Row, follow_rows, nan_to_null, null_to_nan, read_rows
from llmc.optim.schedule import warmup_problem
from llmc.system.fs import shell_word, write_atomically
from llmc.system.signals import caught_signals, pass_on, signal_name
from llmc.system.toml import load_toml_file
from llmc.training.logs import BarConsole, Console, bar_format, shows_bar, validation_text
from llmc.training.settings import SETTINGS, TrainConfig, check_effects, check_names, defaults
from llmc.training.summary import duration
from llmc.values import counted, did_you_mean

_KEYS = {"output_dir", "jobs", "devices", "settings", "grid", "runs"}

# Runs that differ in one of these have validation losses of different texts, or with different contexts.
_OTHER_TEXT = ("val_data", "holdout", "column", "document_separator", "seq_len")
# In one of these, of different tokens, whose losses compare in bits per byte alone.
_OTHER_TOKENS = ("tokenizer", "vocab_size")


@dataclass
class SweepRun:
    """One run of a sweep.

    Attributes:
        name: made from what varies, as "learning_rate=0.001"; also the name of its folder.
        varied: the settings that tell it from the other runs.
        settings: all settings that the sweep gives it.
        status: "" before it has run, then "done" or "failed: ...".
        results: its last "train_loss", "val_loss", "best_val_loss", "bits_per_byte" (what the last val_loss is in them) and
            "tokens_per_second", as far as they were logged.
    """

    name: str
    varied: dict[str, Any]
    settings: dict[str, Any]
    status: str = ""
    results: dict[str, float] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """How many steps it makes; -1: one epoch."""
        steps: int = self._values()["max_steps"]
        return steps

    def warmup_problem(self) -> str:
        """Return what is wrong with a warm-up that the sweep gives it, for its number of steps; empty: nothing."""
        values = self._values()
        names = ("schedule", "learning_rate", "warmup_steps", "max_steps", "final_lr_frac")
        if "warmup_steps" not in self.settings or self.steps < 1:
            return ""
        return warmup_problem(*(values[name] for name in names))

    def _values(self) -> dict[str, Any]:
        """Return its settings with the defaults of those that the sweep does not give."""
        return {**defaults(self.settings.get("model")), **self.settings}


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
        return Sweep.from_dict(load_toml_file(path), str(path))

    @staticmethod
    def from_dict(values: Mapping[str, Any], name: str = "the sweep") -> Sweep:
        """Make a sweep of what a TOML file would hold.

        Args:
            values: "output_dir", "jobs", "devices", "settings", "grid" and "runs", as `llmc sweep --help` explains them.
            name: what errors call it.

        Raises:
            ValueError: as of load().
        """
        for key in values:
            if key in SETTINGS and key not in _KEYS:
                raise ValueError(
                    f"{name}: '{key}' is a setting: put it under [settings], or a list of values under [grid]"
                )
            if key not in _KEYS:
                hint = did_you_mean(key, _KEYS) or f", expected {', '.join(sorted(_KEYS))}"
                raise ValueError(f"{name}: unknown key '{key}'{hint}")
        settings, grid, listed = values.get("settings", {}), values.get("grid", {}), values.get("runs", [{}])
        if not isinstance(listed, list) or not listed:
            raise ValueError(f"{name}: runs is {listed!r}, expected tables: [[runs]]")
        for part, table in (("settings", settings), ("grid", grid), *(("runs", row) for row in listed)):
            if not isinstance(table, dict):
                raise ValueError(f"{name}: {part} holds {table!r}, expected a table of settings")
            check_names(table, f"{name}: {part}")
            if "output_dir" in table:
                raise ValueError(
                    f"{name}: {part}.output_dir: each run has a folder of its own in the sweep's output_dir"
                )
        for setting, choices in grid.items():
            if not isinstance(choices, list) or not choices:
                raise ValueError(f"{name}: grid.{setting} is {choices!r}, expected a list of values")
        jobs, devices, folder = values.get("jobs", 1), values.get("devices", []), values.get("output_dir")
        if not _is_count(jobs) or jobs < 1:
            raise ValueError(f"{name}: jobs is {jobs!r}, expected a number of at least 1")
        if not isinstance(devices, list) or not all(map(_is_count, devices)) or len(set(devices)) != len(devices):
            raise ValueError(f"{name}: devices is {devices!r}, expected a list of different GPU numbers")
        if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder):
            raise ValueError(
                f"{name}: output_dir is " + ("missing" if folder is None else f"{folder!r}, expected a path")
            )
        combinations = [
            {**row, **dict(zip(grid, chosen))} for row in listed for chosen in itertools.product(*grid.values())
        ]
        configs = []
        for varied in combinations:
            try:
                config = TrainConfig(**{**settings, **varied})  # refuses a wrong setting before any run starts
                check_effects(config)
            except ValueError as e:
                raise ValueError(f"{name}: {e}") from e
            if devices and config.device not in ("auto", "cuda"):
                raise ValueError(f"{name}: device is '{config.device}', but devices lists GPUs: leave one of them out")
            if config in configs:
                raise ValueError(f"{name}: two runs are the same: {_name(varied)}")
            configs.append(config)
        runs = [SweepRun(n, v, {**settings, **v}) for n, v in zip(_names(combinations), combinations)]
        return Sweep(Path(folder), runs, jobs, devices)

    def describe(self) -> str:
        """Return in a line how many runs of how many steps there are, how many of them at a time, and where."""
        kinds = Counter(run.steps for run in self.runs)
        texts = [("one epoch" if steps < 0 else counted(steps, "step"), n) for steps, n in kinds.items()]
        count, whole = len(self.runs), sum(run.steps for run in self.runs)
        runs = counted(count, "run")
        if len(texts) == 1:
            what = f"{runs} of {texts[0][0]}" + (f", {whole:,} in all" if count > 1 and whole > 0 else "")
        else:
            what = f"{runs}: " + ", ".join(f"{n} of {text}" for text, n in texts)
            what += f", {whole:,} steps in all" if -1 not in kinds else ""
        return f"{what}; {min(count, len(self.devices) or self.jobs)} at a time; {self.output_dir} keeps them"

    @property
    def best(self) -> SweepRun | None:
        """The run whose last validation loss is the lowest, in bits per byte if all of them know that.

        None if there is none, or they are losses of different texts, or of different tokens and not known in bits per byte.
        """
        done = [
            run for run in self.runs if run.status == "done" and math.isfinite(run.results.get("val_loss", math.nan))
        ]
        in_bits = all("bits_per_byte" in run.results for run in done)
        # Without validation data of its own a run takes them from its data.
        of_data = () if all(run.settings.get("val_data") for run in self.runs) else ("data",)
        if self._differ(*_OTHER_TEXT, *of_data, *(() if in_bits else _OTHER_TOKENS)):
            return None
        return min(done, key=lambda run: run.results["bits_per_byte" if in_bits else "val_loss"], default=None)

    def _differ(self, *names: str) -> bool:
        """Return whether not all runs have the same of one of these settings."""
        return any(run.settings.get(name) != self.runs[0].settings.get(name) for run in self.runs for name in names)

    def execute(self, report: Callable[[str], object] | None = None, *, pass_on_signal: bool = True) -> bool:
        """Execute the runs that are not done yet. If one fails, the others go on.

        Args:
            report: called with each line that tells how the sweep goes; None prints it, and shows a bar in a terminal.
            pass_on_signal: let a signal that stopped the sweep have its effect, as Trainer.fit() does; False returns.

        Returns:
            Whether all runs are done.

        Raises:
            KeyboardInterrupt, SystemExit: as of Trainer.fit(), when all runs have stopped.
            ValueError: before any run starts, if a launcher started several processes of this sweep.
            llmc.Error: the same, if the sweep lists GPUs and this build has no CUDA.
        """
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
        with _Display(self, report) as display:
            self._execute(display)
        if self.stopped_by and pass_on_signal:
            pass_on(self.stopped_by)
        return all(run.status == "done" for run in self.runs)

    def _execute(self, display: _Display) -> None:
        display.text(self.describe())
        waiting = []
        for run in self.runs:
            if run.status == "done":
                display.run(run, "done before")
            else:
                run.status = ""
                waiting.append(run)
                if problem := run.warmup_problem():
                    display.run(run, f"warning: {problem}")
        free: list[int | None] = list(self.devices) or [None] * self.jobs  # None: a turn on the CPU
        running: list[tuple[SweepRun, int | None, subprocess.Popen[bytes]]] = []
        # One thread starts, stops and waits for all runs, so no run can start after the signal was passed on to the others.
        with caught_signals() as signals:
            passed_on = 0
            try:
                while running or (waiting and not signals):
                    while waiting and free and not signals:
                        run, gpu = waiting.pop(0), free.pop(0)
                        display.begin(run)
                        try:
                            running.append((run, gpu, self._start(run, gpu)))
                        except OSError as e:
                            free.append(gpu)
                            self._finish(run, f"failed: {e}", display)
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
                            self._finish(run, "done", display)
                        elif signals:
                            display.end(run, "stopped")
                        else:
                            self._finish(run, f"failed: {self._reason(run, code)}", display)
                    display.refresh()
                    time.sleep(0.05)
            except BaseException:
                for _, _, child in running:
                    _stop(child)
                for _, _, child in running:
                    child.wait()
                raise
        self.stopped_by = signals[0] if signals else 0
        display.close_bar()
        if self.stopped_by:
            done = sum(run.status == "done" for run in self.runs)
            display.text(
                f"stopped by {signal_name(self.stopped_by)}, {done} of {len(self.runs)} runs done; the same command goes on"
            )
        else:
            self._summarise(display)

    def _reason(self, run: SweepRun, code: int) -> str:
        """Return why a run failed: its exit code, and the last line that it printed."""
        output = self.output_dir / run.name / "output.txt"
        lines = output.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "it printed nothing")
        return f"exit code {code}: {last.strip()} ({output})"

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

    def _finish(self, run: SweepRun, status: str, display: _Display) -> None:
        run.status = status
        run.results = _results(self.output_dir / run.name)
        self._write_status()
        display.end(run, status)

    def _write_status(self) -> None:
        rows = {
            run.name: {"status": run.status, "settings": run.settings, "results": nan_to_null(run.results)}
            for run in self.runs
        }
        text = json.dumps(rows, indent=1, default=str, allow_nan=False)
        write_atomically(self.output_dir / "sweep.json", [text.encode()])

    def _read_status(self) -> None:
        path = self.output_dir / "sweep.json"
        if not path.is_file():
            return
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
            done = {
                name: (row["settings"], null_to_nan(row["results"]))
                for name, row in rows.items()
                if row["status"] == "done"
            }
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

    def _summarise(self, display: _Display) -> None:
        varied = list(dict.fromkeys(name for run in self.runs for name in run.varied))
        bits = ["bits_per_byte"] if any("bits_per_byte" in run.results for run in self.runs) else []
        columns = [*varied, "train_loss", "val_loss", "best_val_loss", *bits, "tokens_per_second", "status"]
        rows = [
            [
                *(run.varied.get(n, "") for n in varied),
                *(
                    f"{run.results[c]:{'.0f' if c == 'tokens_per_second' else '.5g'}}" if c in run.results else ""
                    for c in columns[len(varied) : -1]
                ),
                run.status.partition(":")[0],
            ]
            for run in self.runs
        ]
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(columns)
        writer.writerows(rows)
        write_atomically(self.output_dir / "summary.csv", [text.getvalue().encode()])
        best = self.best
        marks = ["*" if run is best else "" for run in self.runs]
        display.text(_table(["", *columns], [[mark, *row] for mark, row in zip(marks, rows)]))
        folders = [
            self.output_dir / run.name for run in self.runs if (self.output_dir / run.name / "main.log").is_file()
        ]
        if folders:
            from llmc.plot import plot_runs

            note = plot_runs(folders, self.output_dir / "summary.png")
            if note:
                display.text(f"note: summary.png: {note}")
            display.text(f"summary.csv and summary.png are in {self.output_dir}")
        if best is not None:
            of_what = " in bits per byte" if self._differ(*_OTHER_TOKENS) else ""
            display.text(f"* the best{of_what}: {best.name}, {_validated(best)}{self._next(best)}")

    def _next(self, run: SweepRun) -> str:
        """Return how to go on with a run, for the end of a line; nothing if it has no checkpoint."""
        folder = self.output_dir / run.name
        steps = finished_steps(folder)
        if not steps:
            return ""
        processes = run.settings.get("processes", 1)
        ranks = f" --processes {processes}" if processes > 1 else ""
        early = steps[-1] < run.steps  # patience ended it
        more = f"--patience {2 * run.settings.get('patience', 0)}" if early else f"--max-steps {2 * steps[-1]}"
        return f"; go on with it:\n  llmc train --resume {shell_word(folder)} {more}{ranks}"


class _Bar(BarConsole):
    """A bar over all runs of a sweep. Console.text() prints above it."""

    facts: Sequence[str] = ()

    def show(self, done: float, facts: Sequence[str]) -> None:
        """Draw the bar. done: runs that are, with parts of runs; facts: what stands beside it, the most important first."""
        self.facts, self._bar.n = facts, done
        self._fit()
        self._bar.refresh()

    def _format(self, width: int) -> str:
        return bar_format(self.facts, width)


class _Newest:
    """The newest numbers of a run, read while it writes them.

    Args:
        number: which run it is, from 1.
        path: its metrics.jsonl, which need not be there yet.
    """

    def __init__(self, number: int, path: Path) -> None:
        self.number = number
        self.begun = time.monotonic()
        self._path = path
        self._rows: Iterator[Row | None] | None = None
        self._total = 0
        self.done = 0.0  # part of its steps
        self.loss = math.nan

    def read(self) -> None:
        """Read what has come."""
        if self._rows is None and self._path.is_file():
            self._rows = follow_rows(self._path, 0)
        for row in self._rows or ():
            if row is None:
                break
            if row.get("kind") == "start":
                self._total = int(row["total_steps"])
            elif row.get("kind") == "train":
                self.loss = float(row["loss"])
                self.done = min(1, (int(row["step"]) + 1) / self._total) if self._total else 0


class _Display:
    """Tells how a sweep goes: a line for each run that has ended, and in a terminal a bar with the newest loss of those that run.

    Args:
        sweep: the sweep.
        report: called with each line; None prints it.
    """

    def __init__(self, sweep: Sweep, report: Callable[[str], object] | None) -> None:
        self._sweep = sweep
        self._console = _Bar() if report is None and shows_bar() else None
        self.text = report or (self._console or Console()).text
        self._running: dict[str, _Newest] = {}
        self._first: tuple[float, float] | None = None  # when the bar was drawn first, and what was done then
        self._next = 0.0

    def __enter__(self) -> _Display:
        if self._console is not None:
            self._console.start(0, len(self._sweep.runs), "", "")
        return self

    def __exit__(self, *error: object) -> None:
        self.close_bar()

    def begin(self, run: SweepRun) -> None:
        """Take note that a run begins."""
        self._running[run.name] = _Newest(self._number(run), self._sweep.output_dir / run.name / "metrics.jsonl")

    def end(self, run: SweepRun, status: str) -> None:
        """Tell how a run has ended."""
        begun = self._running.pop(run.name).begun
        loss = f", {_validated(run)}" if status == "done" and "val_loss" in run.results else ""
        self.run(run, f"{status}{loss}" + (f" in {duration(time.monotonic() - begun)}" if status == "done" else ""))
        self._next = 0.0

    def run(self, run: SweepRun, text: str) -> None:
        """Tell something of a run."""
        self.text(f"run {self._number(run)}/{len(self._sweep.runs)} {run.name}: {text}")

    def _number(self, run: SweepRun) -> int:
        return 1 + next(i for i, other in enumerate(self._sweep.runs) if other is run)

    def close_bar(self) -> None:
        """Leave the bar as it is; what comes is printed below."""
        self.refresh()
        if self._console is not None:
            self._console.close()
            self._console = None

    def refresh(self) -> None:
        """Draw the bar, if it is time."""
        now = time.monotonic()
        if self._console is None or now < self._next:
            return
        self._next = now + 0.5
        ended = sum(run.status != "" for run in self._sweep.runs)
        facts = [f"{ended}/{len(self._sweep.runs)} runs"]
        done = float(ended)
        for newest in self._running.values():
            newest.read()
            done += newest.done
            if not math.isnan(newest.loss):
                facts.append(f"run {newest.number} loss {newest.loss:.4f}")
        self._first = self._first or (now, done)
        if self._first[1] < done < len(self._sweep.runs):
            each = (now - self._first[0]) / (done - self._first[1])
            facts.insert(1, f"{tqdm.format_interval(each * (len(self._sweep.runs) - done))} left")
        self._console.show(done, facts)


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
            out["best_val_loss"] = float(np.fmin(out["val_loss"], out.get("best_val_loss", math.nan)))
            if "bits_per_byte" in row:
                out["bits_per_byte"] = float(row["bits_per_byte"])
    return out


def _validated(run: SweepRun) -> str:
    """Return a run's last validation loss as a line has it."""
    return validation_text(run.results["val_loss"], run.results.get("bits_per_byte"))


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    texts = [[str(cell) for cell in row] for row in [columns, *rows]]
    widths = [max(len(row[i]) for row in texts) for i in range(len(columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in texts]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
