"""Follow a run from another terminal: show its newest numbers as they come."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

from llmc.arguments import above_zero
from llmc.formats.metrics import Row, follow_rows, read_rows
from llmc.optim.schedule import BatchSchedule
from llmc.training.logs import BarConsole, BriefConsole, StepInfo, shows_bar
from llmc.training.run_dir import in_use
from llmc.training.settings import load_toml


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to a parser."""
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--once", action="store_true", help="show what is there and end")
    parser.add_argument("--interval", type=above_zero, default=1.0, metavar="SECONDS", help="[%(default)s]")


def run(args: argparse.Namespace) -> int:
    """Show what a run logs, as the run itself would, until it ends; return the exit code, 0."""
    directory = Path(args.run)
    path = directory / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"'{directory}' is no run directory: it has no metrics.jsonl")
    config = load_toml(directory / "config.toml")
    batch = BatchSchedule.of({"total_batch_size": 1, **config})
    watched = _Watched(config.get("max_steps", -1), config.get("val_every", 0), batch)
    abandoned = False
    for row in read_rows(path) if args.once else follow_rows(path, args.interval):
        if row is not None:
            watched.show(row)
        elif watched.ended or abandoned:
            break
        else:
            abandoned = not in_use(directory)  # what the process wrote at last may not have been read yet
    if args.once and not watched.ended:
        abandoned = not in_use(directory)
    watched.finish(abandoned)
    return 0


class _Watched:
    """A run as its rows tell of it, shown with the times at which they were written.

    Args:
        max_steps: the run's setting, for runs that were begun before their first row told how many steps they have.
        val_every: the run's setting.
        batch: the tokens of its steps.
    """

    def __init__(self, max_steps: int, val_every: int, batch: BatchSchedule) -> None:
        self.ended = False
        self._total, self._step, self._time = max(0, max_steps), 0, 0.0
        self._begun = False

        def clock() -> float:
            return self._time

        bar = shows_bar()
        self._console = (
            BarConsole(clock=clock, batch=batch) if bar else BriefConsole(val_every, clock=clock, batch=batch)
        )

    def show(self, row: Row) -> None:
        """Show a row."""
        kind = row.get("kind")
        self._time = float(row.get("time", self._time))
        self.ended = kind == "end"
        if kind == "start":
            self._total, self._step = int(row["total_steps"]), int(row["step"])
        if kind == "start" or (not self._begun and kind != "message"):
            self._begun = True
            self._console.start(self._step, self._total, "", "")
        if kind == "train":
            self._step = int(row["step"]) + 1
            self._console.step(_step_info(row, self._total))
        elif kind == "validation":
            bits = row.get("bits_per_byte")
            self._console.validation(int(row["step"]), float(row["loss"]), None if bits is None else float(bits))
        elif kind == "hellaswag":
            self._console.hellaswag(int(row["step"]), int(row["correct"]), int(row["total"]))
        elif kind == "message":
            self._console.text(str(row["text"]))

    def finish(self, abandoned: bool) -> None:
        """Show the newest numbers, and say how the run ended, if it has. abandoned: no process trains in it."""
        self._console.finish(None)
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(self._time))
        steps = f"after step {self._step} of {self._total}" if self._total else f"after step {self._step}"
        if self.ended:
            self._console.text(f"the run ended on {when} {steps}")
        elif abandoned:
            self._console.text(f"no process trains here any more: the run broke off on {when} {steps}")


def _step_info(row: Row, total_steps: int) -> StepInfo:
    names = ("loss", "norm", "lr", "seconds", "tokens_per_second", "flops_per_second", "loss_z", "grad_z")
    mfu = float(row.get("mfu", math.nan))
    return StepInfo(
        step=int(row["step"]),
        total_steps=total_steps,
        mfu=None if math.isnan(mfu) else mfu,
        dtype="",
        skipped=str(row.get("skipped", "")),
        **{name: float(row.get(name, math.nan)) for name in names},
    )
