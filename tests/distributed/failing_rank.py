"""A rank of a small run in which one rank fails: `mpiexec -n 3 python failing_rank.py HOW FOLDER`. test_failures.py starts it.

FOLDER/settings.json has the run's settings. When the failure happens, the rank that fails writes the time into FOLDER/failed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import llmc
from llmc import _llmc
from llmc.distributed.place import find_launcher
from llmc.training.trainer import Callback, StepInfo, Trainer

STEP = 5  # after which something fails
SIGNALS = {
    "SIGKILL": signal.SIGKILL,
    "SIGSTOP": signal.SIGSTOP,
    "Ctrl-C": signal.SIGINT,
    "SIGTERM": signal.SIGTERM,
}


def failing(folder: Path) -> None:
    (folder / "failed").write_text(str(time.time()))


class Fails(Callback):
    """Fails after a few steps, in the given way."""

    def __init__(self, how: str, folder: Path) -> None:
        self._how, self._folder = how, folder

    def on_step(self, trainer: Trainer, info: StepInfo) -> None:
        if trainer.step != STEP:
            return
        if self._how in (*SIGNALS, "exception", "out of memory", "idle"):
            failing(self._folder)
        if self._how in SIGNALS:
            os.kill(os.getpid(), SIGNALS[self._how])
        if self._how == "exception":
            raise ZeroDivisionError("division by zero")
        if self._how == "out of memory":
            bytearray(1 << 62)
        if self._how == "idle":
            time.sleep(1000)


class Waits(Callback):
    """Makes steps of 20 ms of what would be far less, so that there is time for signals."""

    def on_step(self, trainer: Trainer, info: StepInfo) -> None:
        time.sleep(0.02)


def main(how: str, folder: Path) -> int:
    launched = find_launcher(os.environ)
    assert launched is not None
    settings: dict[str, Any] = json.loads((folder / "settings.json").read_text())
    how, _, who = how.partition(" of rank ")
    callbacks: list[Callback] = [Waits()]
    if launched.rank == int(who or -1):
        if how in ("late", "other arguments", "other data", "other version"):
            failing(folder)
        if how == "late":
            time.sleep(5)
        if how == "other arguments":
            settings["learning_rate"] *= 2
        if how == "other data":
            settings["data"] = settings["val_data"]
        if how == "other version":
            _llmc.__version__ = "9.9.9"
        callbacks.append(Fails(how, folder))
    result = Trainer(llmc.TrainConfig(**settings), callbacks=callbacks).fit(pass_on_signal=False)
    return 128 + result.stopped_by if result.stopped_by else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
