"""`llmc-train --processes N`: starts the ranks on this machine by the installed MPI's mpiexec, passes signals on, and begins anew.

Signals go to the ranks themselves: Open MPI's mpiexec answers Ctrl-C and SIGTERM by killing them within a second, MPICH's passes the
first on and kills at the second. So mpiexec has a session of its own, where the terminal's Ctrl-C does not reach it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from llmc.system.signals import ECHO, caught_signals

LAUNCHER = "LLMC_LAUNCHER"  # tells the ranks which process started them, so that they end if it is killed
_PATIENCE_IF_STOPPED = 5.0  # seconds that a rank may stay stopped once another has ended
_FINAL = (0, 2, 130, 143)  # done, wrong arguments, stopped by a person or a scheduler: to begin anew would not help


def find_mpiexec(environ: Mapping[str, str] = os.environ) -> str:
    """Return the path of mpiexec: the one that pip installed beside this Python, else the one on PATH.

    Raises:
        ImportError: if mpi4py is not installed, or no mpiexec; the message names the packages.
    """
    windows = sys.platform == "win32"
    packages = "mpi4py impi-rt" if windows else "mpi4py mpich"
    if importlib.util.find_spec("mpi4py") is None:
        raise ImportError(f"several processes need MPI: pip install {packages}")
    folders = [str(Path(sys.executable).parent), sysconfig.get_path("scripts")]
    if windows:  # Intel MPI's wheel, then MS-MPI's installer
        folders += [str(Path(sys.prefix) / "Library" / "bin"), environ.get("MSMPI_BIN", "")]
    for path in [*filter(None, folders), environ.get("PATH", "")]:
        if found := shutil.which("mpiexec", path=path):
            return found
    raise ImportError(
        f"mpi4py is installed, but no mpiexec was found: pip install {packages}, or put your MPI's on PATH"
    )


def options_of(version: str) -> list[str]:
    """Return the options for an mpiexec that has printed this for --version.

    The ranks divide the CPUs themselves, there may be more of them than CPUs, and if one is lost the others have a line to print
    before they end.
    """
    if "Open MPI" in version:
        return ["--bind-to", "none", "--oversubscribe"]
    if "HYDRA" in version and "Intel" not in version:
        return ["-disable-auto-cleanup"]
    return []


def mpiexec_command(processes: int) -> list[str]:
    """Return what stands before the command of each rank; errors as of find_mpiexec()."""
    mpiexec = find_mpiexec()
    asked = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, errors="replace", check=False)
    return [mpiexec, *options_of(asked.stdout + asked.stderr), "-n", str(processes)]


def run_processes(
    argv: Sequence[str],
    processes: int,
    max_restarts: int = 0,
    *,
    again: Callable[[], Sequence[str]] | None = None,
    program: Sequence[str] = (sys.executable, "-m", "llmc", "train"),
    patience: float = 15.0,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> int:
    """Run `llmc train` in several processes of this machine.

    Args:
        argv: the arguments of each.
        processes: how many.
        max_restarts: how often to begin anew after an end that was no regular one.
        again: returns the arguments for that; None: argv.
        program: what each process runs.
        patience: seconds after which the others are killed if one process has ended: they end together, but one that is stopped
            does not hear that, and those that wait in MPI_Init for one that never came there do not either.
        say: prints a line.

    Returns:
        The exit code of the ranks, as mpiexec gives it.

    Raises:
        ImportError: if there is no MPI.
    """
    prefix = mpiexec_command(processes) if processes > 1 else []
    with caught_signals() as signals:
        for restart in range(max_restarts + 1):
            command = [*program, *(again() if restart and again else argv)]
            code = _Run(prefix, command, processes, patience).wait(signals)
            if signals and code and code not in _FINAL:  # a rank that was still starting knows no signals
                code = 128 + signals[0]
            if code in _FINAL or signals or restart == max_restarts:
                break
            say(f"llmc-train: the run ended with exit code {code}; beginning anew ({restart + 1} of {max_restarts})")
    return code


class _Run:
    """One start of all ranks."""

    def __init__(self, prefix: list[str], program: list[str], processes: int, patience: float) -> None:
        self._program, self._processes, self._patience = program, processes, patience
        me = psutil.Process()
        options: dict[str, Any] = {"env": {**os.environ, LAUNCHER: f"{me.pid} {me.create_time()}"}}
        if sys.platform == "win32":
            options["creationflags"] = subprocess.CREATE_NEW_PROCESS_GROUP
        else:
            options["start_new_session"] = True
        self._child = subprocess.Popen([*prefix, *program], stdin=subprocess.DEVNULL, **options)
        self._root = psutil.Process(self._child.pid)
        self._ranks: set[psutil.Process] = set()

    def wait(self, signals: list[int]) -> int:
        """Wait for the end of all. signals: those that have come, which is a list that grows."""
        handled, last, first_end = 0, 0.0, 0.0
        try:
            while True:
                try:
                    code = self._child.wait(0.2)
                    break
                except subprocess.TimeoutExpired:
                    pass
                self._look_for_ranks()
                now = time.monotonic()
                while handled < len(signals):
                    number, handled = signals[handled], handled + 1
                    if handled == 1:
                        self._pass_on(number)
                    elif number != signals[0] or now - last > ECHO:
                        self._kill()
                        return 128 + number
                    last = now
                if not all(_runs(p) for p in self._ranks):
                    first_end = first_end or now
                    stopped = any(map(_stopped, self._ranks))
                    if now - first_end > (min(_PATIENCE_IF_STOPPED, self._patience) if stopped else self._patience):
                        self._kill()
        finally:
            self._kill()
        return code if code >= 0 else 128 - code

    def _look_for_ranks(self) -> None:
        if len(self._ranks) >= self._processes:
            return
        try:
            family = [self._root, *self._root.children(recursive=True)]
        except psutil.Error:
            return
        for process in family:
            try:
                if process.cmdline()[1:] == self._program[1:]:
                    self._ranks.add(process)
            except psutil.Error:
                pass

    def _pass_on(self, number: int) -> None:
        """Send a signal to each rank, once."""
        if sys.platform == "win32":
            self._child.send_signal(signal.CTRL_BREAK_EVENT)
            return
        if number == signal.SIGHUP:  # the terminal is gone
            number = signal.SIGTERM
        ranks = [p for p in self._ranks if _runs(p)]
        for process in ranks or [self._root]:
            try:
                process.send_signal(number)
            except psutil.Error:
                pass

    def _kill(self) -> None:
        """End at once what still runs of this start."""
        left = set(self._ranks)
        if self._child.poll() is None:
            try:
                left |= set(self._root.children(recursive=True))
            except psutil.Error:
                pass
            self._child.kill()
            self._child.wait()
        for process in left:
            try:
                process.kill()  # psutil sees to it that it is not another process by now
            except psutil.Error:
                pass


def _stopped(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_STOPPED)
    except psutil.Error:
        return False


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def started_by_launcher(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether run_processes() started this process."""
    return bool(environ.get(LAUNCHER))


def launcher_is_gone(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the process that started this one by run_processes() has ended without ending this one."""
    pid, _, began = environ.get(LAUNCHER, "").partition(" ")
    if not pid:
        return False
    try:
        return bool(psutil.Process(int(pid)).create_time() != float(began))
    except (psutil.Error, ValueError):
        return True
