"""`llmc-train --processes N`: exit codes, restarts, signals, and that nothing is left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from llmc.distributed import launcher
from llmc.distributed.launcher import find_mpiexec, launcher_is_gone, options_of, run_processes

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")


def has_mpi() -> bool:
    try:
        find_mpiexec()
    except ImportError:
        return False
    return True


mpi = pytest.mark.skipif(not has_mpi(), reason="mpi4py and an mpiexec are not installed (pip install '.[mpi]')")


def run(tmp_path: Path, code: str, processes: int = 1, **options: Any) -> tuple[int, list[str]]:
    """Run lines of Python as the ranks; return the exit code, and what the launcher said."""
    script = tmp_path / "program.py"
    script.write_text(f"import os, signal, sys, time\nfrom pathlib import Path\nhere = Path({str(tmp_path)!r})\n{code}")
    said: list[str] = []
    exit_code = run_processes(["first"], processes, say=said.append, program=[sys.executable, str(script)], **options)
    return exit_code, said


@pytest.mark.parametrize("code", [0, 1, 2, 75, 130, 143])
def test_exit_codes_and_which_of_them_begin_anew(tmp_path: Path, code: int) -> None:
    text = "print(*sys.argv[1:], file=open(here / 'log', 'a'))\n"
    text += f"sys.exit({code} if sys.argv[1:] == ['first'] else 0)\n"
    assert run(tmp_path, text)[0] == code
    assert (tmp_path / "log").read_text() == "first\n"
    begins_anew = code in (1, 75)
    result, said = run(tmp_path, text, max_restarts=2, again=lambda: ["first", "--resume"])
    assert result == (0 if begins_anew else code)
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines == ["first", "first"] + ["first --resume"] * begins_anew
    assert said == [f"llmc-train: the run ended with exit code {code}; beginning anew (1 of 2)"] * begins_anew


def test_restarts_are_counted(tmp_path: Path) -> None:
    code, said = run(tmp_path, "sys.exit(3)", max_restarts=2)
    assert code == 3 and [re.findall(r"\d of \d", line) for line in said] == [["1 of 2"], ["2 of 2"]]


@posix
def test_killed_process_is_begun_anew(tmp_path: Path) -> None:
    text = "first = not (here / 'log').exists()\n(here / 'log').write_text('')\nif first: os.kill(os.getpid(), 9)\n"
    assert run(tmp_path, text, max_restarts=1)[0] == 0


def signal_soon(path: Path, count: int, numbers: list[int], pause: float = 1.3) -> threading.Thread:
    """Send signals to this process once so many ranks have written into a file."""

    def send() -> None:
        deadline = time.monotonic() + 20
        while (not path.exists() or path.read_text().count("ready") < count) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(pause)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


# Each rank notes the signals that it gets, and ends half a second after the first.
NOTES = """
got = []
log = os.open(here / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def note(number, frame):
    os.write(log, f"signal {number}\\n".encode())
    got.append(number)
signal.signal(signal.SIGINT, note)
signal.signal(signal.SIGTERM, note)
os.write(log, b"ready\\n")
for _ in range(400):
    time.sleep(0.05)
    if got and ends:
        time.sleep(0.5)
        sys.exit(128 + got[0])
"""


@posix
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=mpi)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_each_rank_gets_a_signal_once(tmp_path: Path, processes: int, number: int) -> None:
    """No matter what mpiexec does with it, and no run begins anew after it."""
    thread = signal_soon(tmp_path / "log", processes, [number, number], pause=0.1)  # the second is an echo
    code, said = run(tmp_path, "ends = True\n" + NOTES, processes, max_restarts=1)
    thread.join()
    assert (code, said) == (128 + number, [])
    assert (
        sorted((tmp_path / "log").read_text().splitlines())
        == ["ready"] * processes + [f"signal {int(number)}"] * processes
    )


@posix
def test_second_signal_ends_all_at_once(tmp_path: Path) -> None:
    thread = signal_soon(tmp_path / "log", 1, [signal.SIGINT, signal.SIGINT])
    begin = time.monotonic()
    code, _ = run(tmp_path, "ends = False\n" + NOTES)
    assert code == 130 and time.monotonic() - begin < 15
    thread.join()


@posix
@mpi
def test_rank_that_dies_alone_does_not_hold_the_others(tmp_path: Path) -> None:
    """The others wait for it in MPI_Init, where no lifeline helps."""
    text = (
        "import psutil\n(here / str(os.getpid())).touch()\nwhile len(list(here.iterdir())) < 3: time.sleep(0.05)\n"
        "time.sleep(1)\nsys.exit(0) if str(os.getpid()) == min(p.name for p in here.iterdir()) else time.sleep(60)\n"
    )
    begin = time.monotonic()
    code, _ = run(tmp_path, text, 2, patience=0.5)
    assert code != 0 and time.monotonic() - begin < 20


@posix
def test_ranks_end_with_a_launcher_that_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not launcher_is_gone({})
    script = tmp_path / "launch.py"
    script.write_text(
        "import sys\nfrom llmc.distributed.launcher import run_processes\n"
        "code = 'import time; from llmc.distributed.launcher import launcher_is_gone as gone; print(gone(), flush=True)\\n'\n"
        "code += 'while not gone(): time.sleep(0.05)\\nprint(True, flush=True)'\n"
        "run_processes([], 1, program=[sys.executable, '-c', code])\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "False\n"
    process.kill()
    process.wait()
    assert process.stdout.read() == "True\n"  # and its end: the rank has ended
    process.stdout.close()


def test_mpiexec_is_found_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "mpiexec.exe" if sys.platform == "win32" else "mpiexec"
    own, path = tmp_path / "own", tmp_path / "path"
    for folder in (own, path):
        folder.mkdir()
    (path / name).touch(0o755)
    monkeypatch.setattr(launcher.sys, "executable", str(own / "python"))
    monkeypatch.setattr(launcher.sysconfig, "get_path", lambda which: str(own))
    monkeypatch.setattr(launcher.importlib.util, "find_spec", lambda name: object())
    assert Path(find_mpiexec({"PATH": str(path)})) == path / name
    (own / name).touch(0o755)
    assert Path(find_mpiexec({"PATH": str(path)})) == own / name, "the one beside Python first"
    with pytest.raises(ImportError, match=r"mpi4py is installed, but no mpiexec was found: pip install mpi4py"):
        (own / name).unlink()
        find_mpiexec({"PATH": ""})
    monkeypatch.setattr(launcher.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"several processes need MPI: pip install mpi4py"):
        find_mpiexec({"PATH": str(path)})


def test_options_of_each_mpiexec():
    assert options_of("mpiexec (Open MPI) 5.0.11") == ["--bind-to", "none", "--oversubscribe"]
    assert options_of("HYDRA build details:\n    Version: 5.0.2") == ["-disable-auto-cleanup"]
    assert options_of("Intel(R) MPI Library for Linux* OS, Version 2021.15") == options_of("") == []
