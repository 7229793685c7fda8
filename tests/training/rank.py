"""One rank of test_ranks.py: mpiexec -n N python rank.py SETTINGS, a file with the settings of some runs, as JSON.

Trains one after the other, and writes what each came to into rank<R>.json beside SETTINGS. The ranks but the first are where they see no
run directory. A setting "kill" sends SIGTERM to the last rank after its second update.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import llmc
from llmc.distributed.world import open_world


class Kill(llmc.Callback):
    """Sends a signal to the last rank."""

    def on_step(self, trainer: llmc.Trainer, info: Any) -> None:
        if info.step == 1 and trainer.world.rank == trainer.world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def main(path: str) -> int:
    settings_file = Path(path).absolute()
    runs = json.loads(settings_file.read_text())
    world = open_world(llmc.TrainConfig())
    if world.rank:
        folder = tempfile.TemporaryDirectory()
        os.chdir(folder.name)
    code, rows = 0, []
    for settings in runs:
        callbacks = [Kill()] if settings.pop("kill", False) else []
        result = llmc.Trainer(llmc.TrainConfig(**settings), callbacks=callbacks).fit(pass_on_signal=False)
        rows.append({"end": result.step, "stopped_by": result.stopped_by, **result.history})
        code = 128 + result.stopped_by if result.stopped_by else 0
    assert not world.rank or os.listdir() == []
    settings_file.with_name(f"rank{world.rank}.json").write_text(json.dumps(rows))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
