"""Who this process is among those that a launcher, or a person, started: its rank, how many there are, and how they may meet.

Each launcher tells it in environment variables of its own; llm.c's flags tell it where there is no launcher. Everything here is
decided from the environment and the settings alone, so that each trap is a test.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


class Settings(Protocol):
    """The settings that are read here: TrainConfig has them, and may have more."""

    @property
    def processes(self) -> int: ...
    @property
    def rank(self) -> int: ...
    @property
    def dist_init(self) -> str | None: ...
    @property
    def dist_dir(self) -> str: ...
    @property
    def dist_host(self) -> str: ...
    @property
    def dist_port(self) -> int | None: ...
    @property
    def dist_timeout(self) -> float: ...
    @property
    def max_restarts(self) -> int: ...


@dataclass(frozen=True)
class Place:
    """This process among all.

    Attributes:
        rank, size: its number, and how many there are.
        meet: "alone", "mpi", "tcp" or "fs".
        launcher: what started it, for messages; empty if nothing did.
        host, port: tcp: where rank 0 listens.
        directory: fs: the shared folder.
        job: what tells this start from others, the same on every rank.
        warning: a line that the user should see.
    """

    rank: int
    size: int
    meet: str
    launcher: str = ""
    host: str = ""
    port: int = 0
    directory: str = ""
    job: str = ""
    warning: str = ""


@dataclass(frozen=True)
class Launched:
    """What a launcher says. one_host: whether it says that all processes are on this host."""

    name: str
    rank: int
    size: int
    one_host: bool = False
    mpi: bool = True  # whether it can start programs of MPI


DEFAULT_PORT = 12345  # llm.c's
# Step ids that Slurm gives to what srun did not start: the batch script, an interactive shell, what joins a running job.
_NO_STEP = {"batch", "interactive", "extern", *(str(2**32 - n) for n in range(1, 17))}


def find_launcher(environ: Mapping[str, str]) -> Launched | None:
    """Return what the launcher that started this process says, or None if there was none. The first complete set of names counts."""

    def numbers(rank: str, size: str) -> tuple[int, int] | None:
        values = environ.get(rank, ""), environ.get(size, "")
        return (int(values[0]), int(values[1])) if values[0].isdecimal() and values[1].isdecimal() else None

    def one_host(size: int, *names: str) -> bool:
        return any(environ.get(name) == str(size) for name in names)

    if found := numbers("RANK", "WORLD_SIZE"):
        return Launched("torchrun", *found, one_host=one_host(found[1], "LOCAL_WORLD_SIZE"), mpi=False)
    if found := numbers("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"):
        return Launched("Open MPI's mpirun", *found, one_host=one_host(found[1], "OMPI_COMM_WORLD_LOCAL_SIZE"))
    pmi = numbers("PMI_RANK", "PMI_SIZE")
    step = environ.get("SLURM_STEP_ID", "")
    if step and step.lower() not in _NO_STEP:
        size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
        found = numbers("SLURM_PROCID", size)
        # srun sets PMI's names too if it speaks PMI. If Hydra did, it also says MPI_LOCALRANKID, and the numbers are Hydra's.
        if found and (pmi is None or (pmi == found and "MPI_LOCALRANKID" not in environ)):
            speaks_mpi = pmi is not None or "PMIX_RANK" in environ
            nodes = environ.get("SLURM_STEP_NUM_NODES", environ.get("SLURM_NNODES"))
            return Launched("srun", *found, one_host=nodes == "1", mpi=speaks_mpi)
    if pmi:
        return Launched("mpiexec", *pmi, one_host=one_host(pmi[1], "MPI_LOCALNRANKS"))
    return None


def find_place(environ: Mapping[str, str], settings: Settings, mpi4py: bool | None = None) -> Place:
    """Return who this process is.

    Args:
        environ: the environment's variables.
        settings: the run's settings. Where they name ranks themselves (dist_init tcp or fs, and processes), they win.
        mpi4py: whether mpi4py is installed; None looks for it.

    Raises:
        ValueError: if environment and settings contradict each other or say too little; the message says what to do.
        ImportError: if MPI would be needed and mpi4py is not installed.
    """
    if mpi4py is None:
        mpi4py = importlib.util.find_spec("mpi4py") is not None
    launched = find_launcher(environ)
    if settings.rank >= settings.processes and (settings.rank or settings.processes < 1):
        raise ValueError(f"rank is {settings.rank} of {settings.processes} processes: ranks count from 0 (-pn, -pr)")
    if settings.dist_dir and settings.dist_init != "fs":
        raise ValueError(f"dist_dir is {settings.dist_dir}, but dist_init is {settings.dist_init}: the folder is of fs")
    if settings.dist_init in ("tcp", "fs") and settings.processes > 1:
        return _by_hand(environ, settings, launched)
    if launched is None or launched.size <= 1:
        return _alone(environ, settings, launched)
    _check_agreement(settings, launched)
    meet = settings.dist_init or _usual_meeting(environ, launched, mpi4py)
    if meet == "mpi":
        _check_mpi(launched, mpi4py)
        return Place(launched.rank, launched.size, "mpi", launched.name, settings.dist_host)
    return _meeting(meet, environ, settings, launched, launched.rank, launched.size)


def must_launch(environ: Mapping[str, str], settings: Settings) -> bool:
    """Whether this process should start the run's processes instead of being one: no launcher did, and nobody did by hand."""
    by_hand = settings.dist_init in ("tcp", "fs") or settings.rank > 0
    return find_launcher(environ) is None and not by_hand and (settings.processes > 1 or settings.max_restarts > 0)


def _by_hand(environ: Mapping[str, str], settings: Settings, launched: Launched | None) -> Place:
    if launched and launched.size == settings.processes and settings.rank == 0 and launched.rank:
        raise ValueError(
            f"processes is {settings.processes} and rank is 0, but {launched.name} says that this is rank {launched.rank}: "
            "give each process its number (-pr), or leave out -pn"
        )
    name = launched.name if launched else ""
    one_host = launched is not None and launched.one_host
    by_hand = Launched(name, settings.rank, settings.processes, one_host)
    return _meeting(settings.dist_init or "", environ, settings, by_hand, settings.rank, settings.processes)


def _alone(environ: Mapping[str, str], settings: Settings, launched: Launched | None) -> Place:
    if settings.processes > 1:
        started = f"but {launched.name} started 1" if launched else "and nothing has started them"
        raise ValueError(
            f"processes is {settings.processes}, {started}: mpiexec -n {settings.processes} or `llmc-train --processes "
            f"{settings.processes}` starts them; started by hand, each needs --rank and --dist-init tcp or fs"
        )
    tasks = environ.get("SLURM_NTASKS", "")
    warning = ""
    if launched is None and tasks.isdecimal() and int(tasks) > 1:
        warning = f"{tasks} tasks are allocated, but srun was not used: this is one process alone; start it with srun"
    return Place(0, 1, "alone", launched.name if launched else "", warning=warning)


def _check_agreement(settings: Settings, launched: Launched) -> None:
    if settings.processes not in (1, launched.size):
        raise ValueError(f"processes is {settings.processes}, but {launched.name} started {launched.size}")
    if settings.rank not in (0, launched.rank):
        raise ValueError(f"rank is {settings.rank}, but {launched.name} says {launched.rank}")
    if launched.rank >= launched.size:
        raise ValueError(f"{launched.name} says rank {launched.rank} of {launched.size}: ranks count from 0")
    if settings.max_restarts > 0:
        raise ValueError(
            f"max_restarts is {settings.max_restarts}, but {launched.name} started the processes, and only what started them can "
            "do so again"
        )


def _usual_meeting(environ: Mapping[str, str], launched: Launched, mpi4py: bool) -> str:
    if launched.name == "srun":
        if launched.mpi and mpi4py:
            return "mpi"
        if environ.get("MASTER_ADDR") or launched.one_host:
            return "tcp"
        lacks = (
            "mpi4py is not installed (pip install mpi4py)" if launched.mpi else "srun offers no PMI (srun --mpi=pmix)"
        )
        raise ValueError(
            f"srun started {launched.size} processes on several hosts, and {lacks}: export MASTER_ADDR (the host of rank 0) and "
            "LLMC_TOKEN (a secret) before srun, or give --dist-init fs --dist-dir with a folder that all hosts share"
        )
    return "mpi" if launched.mpi else "tcp"


def _check_mpi(launched: Launched, mpi4py: bool) -> None:
    if not launched.mpi:
        hint = " (srun --mpi=pmix)" if launched.name == "srun" else ""
        raise ValueError(f"dist_init is mpi, but {launched.name} does not start processes for MPI{hint}")
    if not mpi4py:
        raise ImportError(
            f"{launched.name} started {launched.size} processes, but mpi4py, by which they would meet, is not installed: "
            'pip install mpi4py (in a clone of llmc: pip install ".[mpi]"); processes on GPUs can do without: --dist-init tcp'
        )


def _meeting(
    meet: str, environ: Mapping[str, str], settings: Settings, launched: Launched, rank: int, size: int
) -> Place:
    """Return the Place of a rank that meets the others by TCP or by a shared folder."""
    host, port, directory = "", 0, ""
    if meet == "tcp":
        host, port = _server(environ, settings, launched), _port(environ, settings)
    else:
        directory = settings.dist_dir
        if not directory:
            raise ValueError("dist_init is fs, but dist_dir (-pf) is not given: a folder that all hosts share")
        host = settings.dist_host
    job = environ.get("LLMC_JOB_ID", "")
    if not job and "SLURM_JOB_ID" in environ and "SLURM_STEP_ID" in environ:
        job = f"{environ['SLURM_JOB_ID']}.{environ['SLURM_STEP_ID']}"
    if not job:
        shared = repr((meet, size, settings.dist_host, port, directory))
        job = hashlib.sha256(shared.encode()).hexdigest()[:16]
    return Place(rank, size, meet, launched.name, host, port, directory, job)


def _server(environ: Mapping[str, str], settings: Settings, launched: Launched) -> str:
    """Return the name or address of the host of rank 0."""
    if host := settings.dist_host or environ.get("MASTER_ADDR", ""):
        return host
    if launched.one_host:
        return "127.0.0.1"
    if launched.name == "srun":
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
        if host := first_host(nodes):
            return host
    raise ValueError("dist_init is tcp, but the host of rank 0 is not given: dist_host (-ps), or MASTER_ADDR")


def _port(environ: Mapping[str, str], settings: Settings) -> int:
    """Return the port of rank 0. It is never MASTER_PORT itself, which torchrun's own server may hold."""
    if settings.dist_port is not None:
        return settings.dist_port
    for name, add in (("LLMC_PORT", 0), ("MASTER_PORT", 1)):
        if name in environ:
            text = environ[name]
            if not text.isdecimal() or not 0 < int(text) + add < 65536:
                raise ValueError(f"{name} is '{text}', expected the number of a port")
            return int(text) + add
    if environ.get("SLURM_JOB_ID", "").isdecimal():  # two jobs may share a host
        return 20000 + int(environ["SLURM_JOB_ID"]) % 10000
    return DEFAULT_PORT


def first_host(nodes: str) -> str:
    """Return the first name of Slurm's list of hosts: gpu07 of "gpu[07-09,12],login"."""
    first = re.match(r"(?:[^\[,]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0]) if first else ""
