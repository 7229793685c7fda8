"""Who am I: every launcher's environment, made up, and every trap in them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from llmc.distributed.place import find_place, first_host, must_launch
from llmc.training.settings import TrainConfig

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "hosta",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "1",
}
HYDRA = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "2", "MPI_LOCALNRANKS": "4", "PMI_FD": "9"}
SBATCH = {
    "SLURM_JOB_ID": "814",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "0",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_NNODES": "2",
}
SRUN = {**SBATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "5", "SLURM_STEP_NUM_NODES": "2"}


def place(environ: dict[str, str], mpi4py: bool = True, **settings: Any) -> dict[str, Any]:
    found = dataclasses.asdict(find_place(environ, TrainConfig(**settings), mpi4py))
    return {name: value for name, value in found.items() if name != "job"}


def test_alone():
    assert place({}) == {
        "rank": 0,
        "size": 1,
        "meet": "alone",
        "launcher": "",
        "host": "",
        "port": 0,
        "directory": "",
        "warning": "",
    }
    assert place({}, dist_init="mpi")["meet"] == place({}, dist_init="tcp")["meet"] == "alone"
    assert (
        place({"RANK": "0", "WORLD_SIZE": "1"})["meet"] == place({"PMI_RANK": "0", "PMI_SIZE": "1"})["meet"] == "alone"
    )
    assert place({"WORLD_SIZE": "8"})["meet"] == "alone", "a set that is not complete is none"


@pytest.mark.parametrize(
    ("environ", "rank", "size", "meet", "launcher"),
    [
        (TORCHRUN, 3, 4, "tcp", "torchrun"),
        (OPEN_MPI, 1, 4, "mpi", "Open MPI's mpirun"),
        (HYDRA, 2, 4, "mpi", "mpiexec"),
        ({**SRUN, "PMIX_RANK": "5"}, 5, 16, "mpi", "srun"),
        ({**SRUN, "PMI_RANK": "5", "PMI_SIZE": "16"}, 5, 16, "mpi", "srun"),
        ({**SRUN, "MASTER_ADDR": "gpu07"}, 5, 16, "tcp", "srun"),
        # mpirun within an allocation: its numbers count, and Hydra's proxy, which srun starts, is one of few tasks
        ({**SRUN, **HYDRA, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, 2, 4, "mpi", "mpiexec"),
        ({**SBATCH, **OPEN_MPI}, 1, 4, "mpi", "Open MPI's mpirun"),
        # torchrun under srun: one task per host
        ({**SRUN, **TORCHRUN}, 3, 4, "tcp", "torchrun"),
    ],
)
def test_launchers(environ: dict[str, str], rank: int, size: int, meet: str, launcher: str) -> None:
    found = place(environ)
    assert (found["rank"], found["size"], found["meet"], found["launcher"]) == (rank, size, meet, launcher)
    assert not must_launch(environ, TrainConfig())


def test_torchrun_port_is_not_its_own():
    assert (place(TORCHRUN)["host"], place(TORCHRUN)["port"]) == ("hosta", 29501)
    assert place({**TORCHRUN, "LLMC_PORT": "4000"})["port"] == 4000
    assert place({**TORCHRUN, "LLMC_PORT": "4000"}, dist_port=5000)["port"] == 5000
    with pytest.raises(ValueError, match="MASTER_PORT is '65535', expected the number of a port"):
        place({**TORCHRUN, "MASTER_PORT": "65535"})
    with pytest.raises(ValueError, match="dist_init is mpi, but torchrun does not start processes for MPI"):
        place(TORCHRUN, dist_init="mpi")


def test_batch_script_is_alone():
    """Slurm's names are there in a batch script that has not called srun yet, and in shells."""
    found = place(SBATCH)
    assert (found["size"], found["meet"]) == (1, "alone")
    assert found["warning"].startswith("16 tasks are allocated, but srun was not used")
    for step in ("4294967291", "4294967290", "batch", "extern"):
        assert place({**SBATCH, "SLURM_STEP_ID": step})["meet"] == "alone"
    assert must_launch(SBATCH, TrainConfig(processes=4))


def test_srun_without_pmi():
    with pytest.raises(
        ValueError, match=r"srun offers no PMI \(srun --mpi=pmix\): export MASTER_ADDR .* and LLMC_TOKEN"
    ):
        place(SRUN)
    with pytest.raises(ValueError, match=r"mpi4py is not installed \(pip install mpi4py\): export MASTER_ADDR"):
        place({**SRUN, "PMIX_RANK": "5"}, mpi4py=False)
    with pytest.raises(ValueError, match=r"srun does not start processes for MPI \(srun --mpi=pmix\)"):
        place(SRUN, dist_init="mpi")
    # asked for, tcp takes the first host of the step; jobs that share a host have ports of their own
    found = place(SRUN, dist_init="tcp")
    assert (found["host"], found["port"]) == ("gpu07", 20814)
    assert place({**SRUN, "SLURM_STEP_NUM_NODES": "1"})["host"] == "127.0.0.1"
    found = place(SRUN, dist_init="fs", dist_dir="/shared")
    assert (found["rank"], found["size"], found["directory"]) == (5, 16, "/shared")
    assert find_place(SRUN, TrainConfig(dist_init="fs", dist_dir="/shared"), True).job == "814.0"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu07", "gpu07"),
        ("gpu[07-09,12],login", "gpu07"),
        ("a1,a2", "a1"),
        ("n[3,5]-ib", "n3-ib"),
        ("r[1-2]n[01-04]", "r1n01"),
        ("", ""),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_mpirun_without_mpi4py():
    with pytest.raises(
        ImportError, match=r"Open MPI's mpirun started 4 processes, but mpi4py.*pip install mpi4py.*--dist-init tcp"
    ):
        place(OPEN_MPI, mpi4py=False)
    one_host = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    found = place(one_host, mpi4py=False, dist_init="tcp")
    assert (found["rank"], found["size"], found["meet"], found["host"]) == (1, 4, "tcp", "127.0.0.1")
    with pytest.raises(ValueError, match=r"host of rank 0 is not given: dist_host \(-ps\), or MASTER_ADDR"):
        place(OPEN_MPI, dist_init="tcp")


def test_by_hand():
    by_hand = {"processes": 4, "rank": 2, "dist_init": "tcp", "dist_host": "hosta"}
    found = place({}, **by_hand)
    assert (found["rank"], found["size"], found["meet"], found["host"], found["port"]) == (2, 4, "tcp", "hosta", 12345)
    found = place({}, processes=4, rank=2, dist_init="fs", dist_dir="/shared")
    assert (found["meet"], found["directory"], found["host"]) == ("fs", "/shared", "")
    # llm.c's scripts give -pr under srun: the flags win over all
    assert (place(SRUN, **by_hand)["rank"], place(SRUN, **by_hand)["size"]) == (2, 4)
    assert place({**SRUN, "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}, **by_hand)["rank"] == 2
    with pytest.raises(ValueError, match=r"dist_init is fs, but dist_dir \(-pf\) is not given"):
        place({}, processes=4, rank=2, dist_init="fs")


@pytest.mark.parametrize(
    ("environ", "settings", "message"),
    [
        (
            {},
            {"processes": 2, "rank": 2, "dist_init": "tcp"},
            r"rank is 2 of 2 processes: ranks count from 0 \(-pn, -pr\)",
        ),
        ({}, {"rank": 1}, "rank is 1 of 1 processes"),
        ({}, {"processes": 4}, "processes is 4, and nothing has started them: mpiexec -n 4 or"),
        ({}, {"dist_dir": "/shared"}, "dist_dir is /shared, but dist_init is None: the folder is of fs"),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, {"processes": 4}, "processes is 4, but mpiexec started 1"),
        (HYDRA, {"processes": 8}, "processes is 8, but mpiexec started 4"),
        (HYDRA, {"processes": 4, "rank": 1}, "rank is 1, but mpiexec says 2"),
        (
            HYDRA,
            {"processes": 4, "dist_init": "tcp"},
            r"rank is 0, but mpiexec says that this is rank 2: give each process its number \(-pr\)",
        ),
        (HYDRA, {"max_restarts": 2}, "max_restarts is 2, but mpiexec started the processes"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, {}, "torchrun says rank 4 of 4"),
    ],
)
def test_contradictions(environ: dict[str, str], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        place(environ, **settings)


def test_agreeing_flags_and_who_launches():
    assert place(HYDRA, processes=4)["rank"] == 2
    assert must_launch({}, TrainConfig(processes=4)) and must_launch({}, TrainConfig(max_restarts=1))
    assert must_launch({}, TrainConfig(processes=4, dist_init="mpi"))
    assert not must_launch({}, TrainConfig())
    assert not must_launch({}, TrainConfig(processes=4, dist_init="tcp", dist_host="a"))
    assert not must_launch(HYDRA, TrainConfig(processes=4))


def test_job_is_the_same_on_all_ranks_and_tells_runs_apart():
    def job(environ: dict[str, str] | None = None, **settings: Any) -> str:
        return find_place(environ or {}, TrainConfig(processes=2, dist_init="fs", **settings), True).job

    assert job(dist_dir="a", rank=0) == job(dist_dir="a", rank=1) != job(dist_dir="b")
    assert job({"LLMC_JOB_ID": "mine"}, dist_dir="a") == "mine"
