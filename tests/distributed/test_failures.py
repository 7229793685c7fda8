"""Nobody hangs: one of three ranks fails during a run under mpiexec, and soon all have ended, each with a line that says why.

`pytest` injects a few failures. `python tests/distributed/test_failures.py` injects all, and prints doc/distributed.md's table.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # for runs, if this is a program

from failing_rank import SIGNALS, STEP
from runs import tiny_settings

import llmc
from llmc.checkpoint import finished_steps, newest_good
from llmc.distributed.launcher import find_mpiexec
from llmc.training.trainer import Trainer

HERE = Path(__file__).parent
RANKS = 3
SILENCE = 2.0  # seconds without a sign of life, in place of a minute
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None or sys.platform == "win32", reason="needs MPI, and signals"
)
# A heartbeat a second says where a rank is.
SEEN = r"(, last seen at [a-z ]*step \d)?"
LOST = rf"connection lost \(killed, or out of memory\?\){SEEN}"
SILENT = rf"no sign of life for {SILENCE:g} s \(stopped, or its host is down\?\){SEEN}"

# What MPICH's mpiexec prints if it stumbles over a rank's end (seen once in a thousand, on a busy machine) and ends the others itself.
GAVE_UP = "process manager error"


@dataclass(frozen=True)
class Case:
    """A failure, and what is to follow.

    Attributes:
        how: what failing_rank.py does.
        said: what every other rank prints of the rank that fails, as a pattern; empty: nothing.
        code: the exit code of mpiexec; None: any but 0, since it may be that of the rank that fails, or of the others, as each MPI likes.
        saved: the steps of the checkpoints that are there afterwards.
        all_say: whether the rank that fails must print the line, too.
        settings: that differ from the usual ones.
        plain: whether mpiexec starts the ranks as it is. It ends a rank that is stopped sooner than llmc's launcher does.
        soon: seconds until all have ended.
        instead: what may be printed in place of a rank's line, as a pattern: by mpiexec, which ends ranks before they can say more, or by
            a rank that comes when the others have ended.
    """

    how: str
    said: str
    code: int | None
    saved: tuple[int, ...] = (STEP - 1,)
    all_say: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    plain: bool = False
    soon: float = 20.0
    instead: str = ""

    @property
    def rank(self) -> int:
        return int(self.how.split()[-1])


BY_TCP = {"dist_init": "tcp", "dist_host": "127.0.0.1", "dist_timeout": 3.0}
CASES = [
    Case("SIGKILL of rank 1", LOST, None, instead="[Ss]ignal 9"),
    Case("SIGKILL of rank 0", LOST, None, instead="[Ss]ignal 9"),
    Case("SIGSTOP of rank 1", SILENT, None, plain=True),
    Case("SIGSTOP of rank 0", SILENT, None, plain=True),
    Case("exception of rank 1", "ZeroDivisionError: division by zero", None),
    Case("exception of rank 0", "ZeroDivisionError: division by zero", None),
    Case("out of memory of rank 2", "MemoryError", None),
    Case("late of rank 1", r"rank 1 did not come within 3 s \(2 of 3 are here\)", 75, (), settings=BY_TCP),
    Case(
        "idle of rank 1",
        r"it is behind, last seen at .* \(rank \d on \S+: it has waited 3 s for .*\)",
        None,
        settings={"dist_timeout": 3.0},
    ),
    Case(
        "other arguments of rank 1", r"the settings differ: learning_rate is 0.02, rank 0 on \S+ has 0.01", 2, (), True
    ),
    Case(
        "other data of rank 2",
        r"the data differ: file 1 is 'val.bin of .*', rank 0 on \S+ has 'train.bin of .*'",
        2,
        (),
        True,
    ),
    Case(
        "other version of rank 1",
        r"it has llmc 9.9.9, rank 0 on \S+ has .*",
        2,
        (),
        all_say=True,
        instead=r"rank 2 on \S+ ends: rank 0 at \S+ did not let this rank in",
    ),
    Case("Ctrl-C of rank 1", "", 130, (STEP - 1, STEP + 1)),
    Case("SIGTERM of rank 2", "", 143, (STEP - 1, STEP + 1)),
]
IN_CI = (  # test_two_hosts.py has the silence of a host that is not reached
    "SIGKILL of rank 1",
    "exception of rank 1",
    "other arguments of rank 1",
    "SIGTERM of rank 2",
)


@dataclass
class Ended:
    """What was seen of a run.

    Attributes:
        code: mpiexec's exit code.
        seconds: from the failure until all had ended.
        lines: what was printed on stderr.
    """

    code: int
    seconds: float
    lines: list[str]


def write_settings(folder: Path, **changes: Any) -> dict[str, Any]:
    usual = {"checkpoint_every": STEP - 1, "max_steps": 400, "val_every": 0}
    settings = tiny_settings(folder, **{**usual, **changes})
    (folder / "settings.json").write_text(json.dumps(settings))
    return settings


def cli_command(folder: Path, settings: dict[str, Any], *argv: str) -> list[str]:
    (folder / "settings.toml").write_text(llmc.TrainConfig(**settings).to_toml())
    return [sys.executable, "-m", "llmc", "train", "--config", str(folder / "settings.toml"), *argv]


def wait_for_steps(run: Path, count: int) -> None:
    """Wait until a run has made more than count steps."""
    metrics, give_up = run / "metrics.jsonl", time.monotonic() + 30
    while not (metrics.exists() and metrics.read_text().count("\n") > count):
        assert time.monotonic() < give_up
        time.sleep(0.02)


# As `llmc-train --processes` does, with another program.
LAUNCH = """
import sys
from llmc.distributed.launcher import run_processes
sys.exit(run_processes(sys.argv[3:], int(sys.argv[1]), program=[sys.executable, sys.argv[2]]))
"""


def rank_command(how: str, folder: Path, plain: bool) -> list[str]:
    """Return the command that starts the ranks: mpiexec as it is, or as llmc's own launcher calls it."""
    program = [str(HERE / "failing_rank.py"), how, str(folder)]
    if not plain:
        return [sys.executable, "-c", LAUNCH, str(RANKS), *program]
    mpiexec = find_mpiexec()
    asked = subprocess.run([mpiexec, "--version"], capture_output=True, text=True).stdout
    options = ["--oversubscribe"] if "Open MPI" in asked else []
    return [mpiexec, *options, "-n", str(RANKS), sys.executable, *program]


@contextmanager
def started(command: list[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a run with its own session, its stderr in FOLDER/stderr; kill what is left of it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LLMC_HEARTBEAT_TIMEOUT": str(SILENCE)}
    environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    with open(folder / "stderr", "w") as stderr:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=stderr, stderr=stderr, text=True, start_new_session=True
        )
    try:
        yield process
    finally:
        for left in [process.pid, *left_of(folder)]:
            try:
                os.kill(left, signal.SIGKILL)
            except ProcessLookupError:
                pass
        process.wait()


def left_of(folder: Path) -> list[int]:
    """Return the processes whose arguments name the folder."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        arguments = process.info["cmdline"] or []
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(str(folder) in argument for argument in arguments):
            found.append(process.info["pid"])
    return found


def ended(process: subprocess.Popen[str], folder: Path, since: float) -> Ended:
    """Wait until the run has ended and nothing is left of it."""
    code = process.wait(timeout=60)
    while left_of(folder) and time.time() - since < 60:
        time.sleep(0.02)
    assert not left_of(folder)
    return Ended(code, time.time() - since, (folder / "stderr").read_text().splitlines())


def inject(case: Case, folder: Path) -> Ended:
    """Let the failure happen, and check what follows."""
    settings = dict(case.settings)
    if "dist_init" in settings:
        with socket.create_server(("127.0.0.1", 0)) as free:
            settings["dist_port"] = free.getsockname()[1]
    write_settings(folder, **settings)
    with started(rank_command(case.how, folder, case.plain), folder) as process:
        code = process.wait(timeout=60)
        seen = ended(process, folder, float((folder / "failed").read_text()))
    text = "\n".join(seen.lines)
    assert code == case.code if case.code is not None else code != 0, (code, text)
    for rank in range(RANKS):
        line = rf"(rank {case.rank} on \S+: )?{case.said}:?; rank {rank} ends"
        said = [one for one in seen.lines if case.said and re.fullmatch(line, one)]
        must = case.said and (case.all_say or rank != case.rank)
        assert len(said) <= 1, text
        instead = GAVE_UP in text or (case.instead and re.search(case.instead, text))
        assert said or not must or instead, (rank, text)
    assert seen.seconds < case.soon, (seen.seconds, text)
    check_checkpoints(folder / "run", case.saved)
    return seen


def check_checkpoints(run: Path, saved: tuple[int, ...]) -> None:
    assert tuple(finished_steps(run)) == saved
    if saved:
        found = newest_good(run, warn=pytest.fail)
        assert found is not None and found.step == saved[-1]


def late_to_mpi(folder: Path) -> Ended:
    """Let a rank come too late to the start of MPI itself, where the others can tell no more than where they wait."""
    write_settings(folder, dist_timeout=3.0)
    with started(rank_command("late of rank 1", folder, plain=True), folder) as process:
        process.wait(timeout=60)
        seen = ended(process, folder, float((folder / "failed").read_text()))
    assert seen.code != 0 and seen.seconds < 20, seen
    assert "Timeout (0:00:03)!" in seen.lines and any("in meet_by_mpi" in line for line in seen.lines), seen.lines
    return seen


# What starts the ranks, the signal that it gets, and the exit code that follows.
SIGNALS_TO_LAUNCHER = [
    ("llmc-train --processes 3", "Ctrl-C", 130),
    ("llmc-train --processes 3", "SIGTERM", 143),
    ("mpiexec", "Ctrl-C", 130),
    ("mpiexec", "SIGTERM", 143),
]


def signal_launcher(launcher: str, name: str, code: int, folder: Path) -> Ended:
    """Send a signal to what started the ranks, and check that they have saved once and ended."""
    settings = write_settings(folder, checkpoint_every=0, max_steps=100_000, progress="lines")
    if launcher == "mpiexec":
        command = rank_command("nothing", folder, plain=True)
    else:
        command = cli_command(folder, settings, "--processes", str(RANKS))
    with started(command, folder) as process:
        wait_for_steps(folder / "run", STEP)
        sent = time.time()
        process.send_signal(SIGNALS[name])
        seen = ended(process, folder, sent)
    assert seen.code == code, (seen.code, seen.lines)
    steps = tuple(finished_steps(folder / "run"))
    assert len(steps) == 1, seen.lines
    check_checkpoints(folder / "run", steps)
    again = f"  llmc train --resume {folder / 'run'}"
    again += "" if launcher == "mpiexec" else f" --processes {RANKS}"
    assert again in seen.lines, seen.lines
    return seen


@pytest.mark.parametrize("case", [case for case in CASES if case.how in IN_CI], ids=lambda case: case.how)
def test_nobody_hangs(case: Case, tmp_path: Path) -> None:
    inject(case, tmp_path)


def test_ctrl_c_to_the_launcher(tmp_path: Path) -> None:
    signal_launcher(*SIGNALS_TO_LAUNCHER[0], tmp_path)


def test_a_run_that_loses_a_rank_begins_anew_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    settings = tiny_settings(
        tmp_path, batch_size=1, total_batch_size=32, max_steps=120, checkpoint_every=20, val_every=0
    )
    alone = llmc.TrainConfig(**{**settings, "output_dir": str(tmp_path / "alone")})
    Trainer(alone).fit()
    command = cli_command(tmp_path, settings, "--processes", "2", "--max-restarts", "1")
    with started(command, tmp_path) as process:
        wait_for_steps(tmp_path / "run", 30)
        rank = next(pid for pid in left_of(tmp_path) if psutil.Process(pid).environ().get("PMI_RANK") == "1")
        os.kill(rank, signal.SIGKILL)
        ended(process, tmp_path, time.time())
    stderr = (tmp_path / "stderr").read_text()
    assert process.returncode == 0 and "beginning anew (1 of 1)" in stderr, stderr
    for kind in ("model_00000120.bin", "state_00000120_00000.bin"):
        assert (tmp_path / "run" / kind).read_bytes() == (tmp_path / "alone" / kind).read_bytes()


def main() -> None:
    print("| what | the other ranks print | exit code of mpiexec | checkpoints | all had ended after |")
    print("|---|---|---:|---|---:|")
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            seen = inject(case, Path(folder))
        said = next((f"`{line}`" for line in seen.lines if line.endswith(" ends")), "")
        print(f"| {case.how} | {said} | {seen.code} | {case.saved} | {seen.seconds:.1f} s |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        seen = late_to_mpi(Path(folder))
        print(
            f"| late to the start of MPI | `{seen.lines[0]}` ... | {seen.code} | | {seen.seconds:.1f} s |", flush=True
        )
    for launcher, name, code in SIGNALS_TO_LAUNCHER:
        with tempfile.TemporaryDirectory() as folder:
            seen = signal_launcher(launcher, name, code, Path(folder))
        print(f"| {name} to {launcher} | | {seen.code} | one more | {seen.seconds:.1f} s |", flush=True)


if __name__ == "__main__":
    main()
