"""The configurations of the published runs (scripts/): they mean the same as llm.c's scripts, and both start."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import tiny_data

from llmc.commands.train import parse
from llmc.sweep import Sweep

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"

# The flags in llm.c's scripts/*.sh.
LLM_C = {
    "gpt2_124M": "-i dev/data/fineweb10B/fineweb_train_*.bin -j dev/data/fineweb10B/fineweb_val_*.bin -o log_gpt2_124M -v 250 -s 20000 "
    "-g 144 -h 1 -b 64 -t 1024 -d 524288 -r 0 -z 1 -c 0.1 -l 0.0006 -q 0.0 -u 700 -n 5000 -y 1 -e d12",
    "gpt2_350M": "-i dev/data/fineweb100B/fineweb_train_*.bin -j dev/data/fineweb100B/fineweb_val_*.bin -o log_gpt2_350M -v 250 "
    "-s 100000 -g 144 -h 1 -b 64 -t 1024 -d 524288 -r 0 -z 1 -c 0.1 -l 0.0003 -q 0.0 -u 700 -n 2000 -x 60000 -y 1 -e d24",
    "gpt2_774M": "-i dev/data/fineweb100B/fineweb_train_*.bin -j dev/data/fineweb100B/fineweb_val_*.bin -o log_gpt2_774M -v 250 "
    "-s 300000 -g 144 -h 1 -b 32 -t 1024 -d 524288 -r 0 -z 1 -c 0.1 -l 0.00025 -q 0.0 -u 700 -n 4000 -x 286102 -y 1 -e d36",
    "gpt2_1558M": "-i dev/data/edu_fineweb100B/edu_fineweb_train_*.bin -j dev/data/edu_fineweb100B/edu_fineweb_val_*.bin "
    "-o log_gpt2_1558M -v 250 -s 300000 -g 384 -h 1 -b 16 -t 1024 -d 1048576 -r 0 -z 1 -c 0.1 -k cosine -l 0.0006 -q 0.1 -u 700 "
    "-n 2000 -x 32000 -ge 1 -y 1 -e d48",
    "gpt3_125M": "-i dev/data/fineweb100B/fineweb_train_*.bin -j dev/data/fineweb100B/fineweb_val_*.bin -o log_gpt3_125M -v 250 "
    "-s 20000 -g 144 -h 1 -b 32 -t 2048 -d 524288 -r 0 -z 1 -c 0.1 -l 0.0006 -q 0.1 -u 700 -n 10000 -nk 5 -nm 50000 -ge 1 -sl 7.0 -sg 7.0 "
    "-y 1 -x 572204 -e gpt3:c768",
}


@pytest.mark.parametrize("name", LLM_C)
def test_the_configuration_is_that_of_llm_c(name: str) -> None:
    assert parse(["--config", str(SCRIPTS / f"{name}.toml")]) == parse(LLM_C[name].split())


def test_the_run_by_muon_is_that_of_llm_c_with_another_optimizer() -> None:
    """It differs in what doc/recipes.md has reasons for, and in its folder."""
    muon, adamw = parse(["--config", str(SCRIPTS / "gpt2_124M_muon.toml")]), parse(LLM_C["gpt2_124M"].split())
    ours = ("optimizer", "learning_rate", "schedule", "max_steps", "checkpoint_every", "output_dir")
    assert muon.optimizer == "muon"
    assert muon.replace(**{name: getattr(adamw, name) for name in ours}) == adamw
    assert muon.max_steps is not None and muon.warmup_steps is not None
    assert 1 < muon.checkpoint_every < muon.max_steps
    tokens = muon.max_steps * muon.total_batch_size
    assert tokens < 10e9  # what FineWeb's sample has
    assert muon.warmup_steps < (1 - muon.decay_frac) * muon.max_steps


def small(folder: Path) -> list[str]:
    """Return flags that make two steps of any run: with a small model and small data, in FOLDER/log, shown as by llm.c."""
    train, val = tiny_data(folder / "data")
    shape = "--layers 1 --heads 2 --channels 16 --max-seq-len 16 --vocab-size 61 --progress lines --no-plot"
    return f"-i {train} -j {val} -o {folder / 'log'} -x 2 -b 2 -t 16 -d 64 -m 1 -g 4 -h 0 {shape}".split()


@pytest.mark.parametrize("name", LLM_C)
def test_llm_c_flags_train(name: str, tmp_path: Path) -> None:
    """Two steps with llm.c's command line, on a small model and small data, which are put at the places that it names."""
    flags, (_, train, _, val, *others) = LLM_C[name].split(), small(tmp_path)
    for pattern, file in ((flags[1], train), (flags[3], val)):
        place = tmp_path / pattern.replace("*", "000001")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    command = [sys.executable, "-m", "llmc", "train", *flags, *others]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "step    2/2 | loss" in done.stdout and (tmp_path / "log" / "DONE_00000002").is_file()


def test_the_run_by_muon_starts(tmp_path: Path) -> None:
    """Two steps of it with a small model and small data."""
    config = str(SCRIPTS / "gpt2_124M_muon.toml")
    command = [sys.executable, "-m", "llmc", "train", "--config", config, *small(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "step    2/2 | loss" in done.stdout and "Muon, momentum 0.95" in done.stdout


@pytest.fixture(autouse=True)
def known_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away the variables that the scripts look at, and all GPUs but one."""
    for name in ("PYTHON", "LAUNCH", "LLMC_TOKEN", "LLMC_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")


def stub(folder: Path, name: str, body: str) -> None:
    """Write a shell script that stands for a program.

    It appends its arguments to the file NAME.calls, one a line and an empty line after the last, counts its calls in $count, and then
    executes body.
    """
    if sys.platform == "win32":
        pytest.skip("needs shell scripts in place of programs")
    log = 'printf "%s\\n" "$@" "" >> "${0##*/}".calls\ncount=$(grep -c "^$" "${0##*/}".calls)\n'
    (folder / name).write_text(f"#!/bin/sh\n{log}{body}\n")
    (folder / name).chmod(0o755)


def calls_of(folder: Path, name: str) -> list[list[str]]:
    """Return the arguments of each call of a stub."""
    file = folder / f"{name}.calls"
    return [call.split("\n") for call in file.read_text().split("\n\n")[:-1]] if file.exists() else []


def run_in(folder: Path, command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder whose programs come before all others."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]}")
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", **variables}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def run_script(shell: str, folder: Path, body: str, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run run.sh or run.ps1 with a stub in place of llmc-train."""
    stub(folder, "llmc-train", body)
    script = ["bash", str(SCRIPTS / "run.sh")] if shell == "bash" else ["pwsh", "-File", str(SCRIPTS / "run.ps1")]
    return run_in(folder, [*script, *argv])


SAVES_TWICE = '[ "$count" -ge 3 ] && exit 0\nmkdir -p {folder}\ntouch {folder}/DONE_0000000$count\nexit 1'


@pytest.mark.parametrize("shell", ["bash", "pwsh"])
@pytest.mark.parametrize(
    ("flags", "folder"),
    [("-b 8 -n 5 -d 2048", "log_gpt2_124M"), ("-o other", "other"), ("--output-dir=a/b", "a/b")],
)
def test_run_script_restarts_until_done(tmp_path: Path, shell: str, flags: str, folder: str) -> None:
    """A run that fails twice, each time after a new checkpoint, is started three times."""
    stub(tmp_path, "sleep", "")
    done = run_script(shell, tmp_path, SAVES_TWICE.format(folder=folder), "gpt2_124M", *flags.split())
    assert done.returncode == 0, done.stderr
    calls = calls_of(tmp_path, "llmc-train")
    assert len(calls) == 3
    assert all(Path(call[1]) == SCRIPTS / "gpt2_124M.toml" and call[2:] == flags.split() for call in calls)


@pytest.mark.parametrize("shell", ["bash", "pwsh"])
def test_run_script_takes_python_from_the_variable(tmp_path: Path, shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "a folder" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "$@" > python_calls\n')
    python.chmod(0o755)
    monkeypatch.setenv("PYTHON", str(python))
    done = run_script(shell, tmp_path, "exit 1", "gpt2_124M", "-x", "2")
    assert done.returncode == 0, done.stderr
    call = (tmp_path / "python_calls").read_text()
    assert call.startswith("-m llmc train --config ") and call.endswith("gpt2_124M.toml -x 2\n")
    assert not calls_of(tmp_path, "llmc-train")


@pytest.mark.skipif(sys.platform == "win32", reason="a PATH of symbolic links")
@pytest.mark.parametrize("shell", ["bash", "pwsh"])
def test_run_script_without_llmc_train_on_the_path(tmp_path: Path, shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script takes the first Python on the PATH."""
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    for name in ("bash", "pwsh", "dirname", "find", "sed", "tr", "grep", "sort", "tail", "sleep"):
        if program := shutil.which(name):
            (tmp_path / name).symlink_to(program)
    python = tmp_path / ("python3" if shell == "bash" else "python")
    python.write_text('#!/bin/sh\necho "$@" > python_calls\n')
    python.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    script = ["bash", str(SCRIPTS / "run.sh")] if shell == "bash" else ["pwsh", "-File", str(SCRIPTS / "run.ps1")]
    done = subprocess.run([*script, "gpt2_124M"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "python_calls").read_text().startswith("-m llmc train --config ")


@pytest.mark.parametrize("shell", ["bash", "pwsh"])
def test_run_script_does_not_repeat_what_fails(tmp_path: Path, shell: str) -> None:
    """A run that fails without a new checkpoint, one that was stopped, and unknown names are not started again."""
    body = "mkdir -p log_gpt2_124M\ntouch log_gpt2_124M/DONE_00000005\nexit 1"
    stub(tmp_path, "sleep", "")
    done = run_script(shell, tmp_path, body, "gpt2_124M")
    assert done.returncode == 1 and "no new checkpoint in log_gpt2_124M: not started again" in done.stderr
    for code in (2, 130, 143):
        assert run_script(shell, tmp_path, f"exit {code}", "gpt2_124M").returncode == code
    assert len(calls_of(tmp_path, "llmc-train")) == 2 + 3
    for argv in ([], ["sweep_lr"], ["gpt2_999M"]):
        wrong = run_script(shell, tmp_path, "exit 0", *argv)
        assert wrong.returncode == 2 and "gpt2_124M" in wrong.stderr and "sweep_lr" not in wrong.stderr
    assert len(calls_of(tmp_path, "llmc-train")) == 2 + 3


@pytest.mark.parametrize("name", LLM_C)
@pytest.mark.parametrize(
    ("gpus", "flags", "processes"), [(8, "", 8), (1, "", 1), (8, "--processes 4", 4), (0, "-pn 2", 2)]
)
def test_one_node(
    tmp_path: Path, name: str, gpus: int, flags: str, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script of a run starts as many processes as there are GPUs, or as it is told, with llm.c's settings."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    lines = [f"echo 'GPU {i}: NVIDIA H100 (UUID: GPU-{i})'" for i in range(gpus)]
    stub(tmp_path, "nvidia-smi", "\n".join(lines) or "exit 9")
    stub(tmp_path, "llmc-train", "exit 0")
    done = run_in(tmp_path, [str(SCRIPTS / f"run_{name}.sh"), *flags.split(), "-x", "7"])
    assert done.returncode == 0, done.stderr
    (call,) = calls_of(tmp_path, "llmc-train")
    assert parse(call) == parse(f"{LLM_C[name]} -pn {processes} -x 7".split())


def test_visible_gpus_are_counted(tmp_path: Path) -> None:
    stub(tmp_path, "llmc-train", "exit 0")
    assert run_in(tmp_path, [str(SCRIPTS / "run_gpt2_124M.sh")], CUDA_VISIBLE_DEVICES="2,3,5").returncode == 0
    (call,) = calls_of(tmp_path, "llmc-train")
    assert parse(call).processes == 3


# What llm.c's scripts for several nodes change in the run of 124M. They ask for 16 processes on 2 nodes.
MULTI_NODE = f"{LLM_C['gpt2_124M']} -o log_gpt2_124M_multi -d 2097152"


@pytest.mark.parametrize(
    ("flags", "meaning"),
    [
        ("-pi mpi", {"dist_init": "mpi"}),
        (
            "-pn 16 -pr 3 -pg 8 -ps 10.0.1.220 -pi tcp",
            {"processes": 16, "rank": 3, "dist_init": "tcp", "dist_host": "10.0.1.220"},
        ),
        (
            "-pn 16 -pr 3 -pg 8 -pf /shared/run -pi fs",
            {"processes": 16, "rank": 3, "dist_init": "fs", "dist_dir": "/shared/run"},
        ),
    ],
)
def test_llm_c_flags_of_several_nodes(flags: str, meaning: dict[str, object]) -> None:
    assert parse(f"{MULTI_NODE} {flags}".split()) == parse(MULTI_NODE.split()).replace(**meaning)


def test_mpi_on_several_nodes(tmp_path: Path) -> None:
    """It goes by run.sh, so it is begun anew after a loss."""
    stub(tmp_path, "llmc-train", "exit 1")
    stub(tmp_path, "sleep", "")
    stub(tmp_path, "mpirun", SAVES_TWICE.format(folder="log_gpt2_124M_multi"))
    script = str(SCRIPTS / "multi_node" / "run_gpt2_124M_mpi.sh")
    done = run_in(tmp_path, [script, "node1:8,node2:8,node3", "-x", "7"])
    assert done.returncode == 0, done.stderr
    calls = calls_of(tmp_path, "mpirun")
    assert len(calls) == 3 and calls[0] == calls[1] == calls[2]
    launcher, program = calls[0][:4], calls[0][4:]
    assert launcher == ["-np", "17", "--host", "node1:8,node2:8,node3"]
    assert program[0] == str(tmp_path / "llmc-train")
    assert parse(program[1:]) == parse(f"{MULTI_NODE} -x 7".split())
    assert "which machines? node1:8,node2:8" in run_in(tmp_path, [script]).stderr


def slurm_job(folder: Path, how: str, body: str, *argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a job's script as Slurm does, with a stub in place of srun."""
    stub(folder, "srun", body)
    stub(folder, "scontrol", "")
    stub(folder, "scancel", "")
    copy = folder / "slurm_script"
    copy.write_bytes((SCRIPTS / "multi_node" / f"run_gpt2_124M_{how}.sbatch").read_bytes())
    if not (folder / "scripts").exists():
        (folder / "scripts").symlink_to(SCRIPTS)
    known = {"SLURM_JOB_ID": "40123", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": "12"}
    return run_in(folder, ["bash", str(copy), *argv], **known, **variables)


@pytest.mark.parametrize(
    ("how", "meaning", "variable", "pattern"),
    [
        ("tcp", {"dist_init": "tcp"}, "LLMC_TOKEN", "[0-9a-f]{32}"),
        ("fs", {"dist_init": "fs", "dist_dir": "log_gpt2_124M_multi"}, "LLMC_JOB_ID", r"40123\.3"),
    ],
)
def test_slurm_jobs(tmp_path: Path, how: str, meaning: dict[str, object], variable: str, pattern: str) -> None:
    done = slurm_job(tmp_path, how, f"printenv {variable} > variable", "-x", "7", SLURM_RESTART_COUNT="3")
    assert done.returncode == 0, done.stderr
    (call,) = calls_of(tmp_path, "srun")
    at = call.index("llmc-train")
    assert call[:at] == ["--kill-on-bad-exit=0", "--mpi=none", "--cpus-per-task=12"]
    assert parse(call[at + 1 :]) == parse(f"{MULTI_NODE} -x 7".split()).replace(**meaning)
    assert re.fullmatch(pattern, (tmp_path / "variable").read_text().strip())
    if how == "fs":
        assert (tmp_path / "log_gpt2_124M_multi").is_dir()


NEAR_THE_END = "kill -USR1 $PPID; while ! [ -f scancel.calls ]; do sleep 0.01; done; exit 143"


@pytest.mark.parametrize(
    ("body", "restarts", "code", "again"),
    [
        ("exit 0", "0", 0, False),
        ("exit 1", "0", 1, False),
        ("exit 2", "0", 2, False),
        ("exit 75", "0", 75, True),
        ("exit 137", "19", 137, True),
        ("exit 75", "20", 75, False),
        ("exit 143", "0", 143, False),  # scancel
        (NEAR_THE_END, "0", 143, True),
        (NEAR_THE_END.replace("143", "0"), "0", 0, False),  # done meanwhile
    ],
)
def test_when_a_slurm_job_is_queued_again(tmp_path: Path, body: str, restarts: str, code: int, again: bool) -> None:
    done = slurm_job(tmp_path, "tcp", body, SLURM_RESTART_COUNT=restarts)
    assert done.returncode == code, done.stderr
    assert calls_of(tmp_path, "scontrol") == ([["requeue", "40123"]] if again else [])
    assert calls_of(tmp_path, "scancel") == ([["--signal=TERM", "40123"]] if "USR1" in body else [])


# In place of srun: two processes on this machine, by MPI.
SRUN = 'while [ "$1" != llmc-train ]; do shift; done\nexec mpiexec -n 2 "$@"'


@pytest.mark.parametrize("how", ["one node", "mpi", "tcp", "fs"])
def test_two_processes_train(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of a small model in two processes, as each of the scripts starts them."""
    if importlib.util.find_spec("mpi4py") is None:
        pytest.skip("needs mpi4py, and MPICH's mpiexec")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    stub(tmp_path, "llmc-train", f'exec "{sys.executable}" -m llmc train "$@"')
    if how == "one node":
        done = run_in(tmp_path, [str(SCRIPTS / "run_gpt2_124M.sh"), "--processes", "2", *small(tmp_path)])
    elif how == "mpi":
        done = run_in(tmp_path, [str(SCRIPTS / "multi_node" / "run_gpt2_124M_mpi.sh"), "localhost:2", *small(tmp_path)])
    else:
        done = slurm_job(tmp_path, how, SRUN, *small(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"num_processes +\| 2 ", done.stdout) and "step    2/2 | loss" in done.stdout
    assert (tmp_path / "log" / "DONE_00000002").is_file()


def test_what_slurm_is_asked_for() -> None:
    asked = [
        re.findall("^#SBATCH (.*)", file.read_text(encoding="utf-8"), re.MULTILINE)
        for file in sorted((SCRIPTS / "multi_node").glob("*.sbatch"))
    ]
    assert len(asked) == 2 and asked[0] == asked[1]
    assert {"--nodes=2", "--ntasks-per-node=8", "--requeue", "--signal=B:USR1@180"} <= set(asked[0])


def test_the_reference_under_torchrun(tmp_path: Path) -> None:
    """The script of the run in PyTorch has llm.c's flags, and those that it is given win."""
    stub(tmp_path, "python3", "exit 7")
    stub(tmp_path, "nvidia-smi", "exit 9")
    script = str(SCRIPTS / "pyrun_gpt2_124M.sh")
    without = run_in(tmp_path, [script], PYTHON="", PROCESSES="")
    assert without.returncode == 2 and "there is no GPU" in without.stderr
    stub(tmp_path, "nvidia-smi", "echo GPU 0: H100")
    assert run_in(tmp_path, [script, "--batch_size", "8"], PYTHON="", PROCESSES="").returncode == 7
    assert run_in(tmp_path, [script], PYTHON="", PROCESSES="2").returncode == 7
    call, other = calls_of(tmp_path, "python3")
    at = call.index("llmc.reference") + 1
    assert call[:at] == "-m torch.distributed.run --standalone --nproc-per-node=gpu -m llmc.reference".split()
    assert "--nproc-per-node=2" in other
    flags = "--input_bin dev/data/fineweb10B/fineweb_train_*.bin --input_val_bin dev/data/fineweb10B/fineweb_val_*.bin "
    flags += "--val_loss_every 250 --sample_every 0 --output_dir pylog_gpt2_124M --write_tensors 0 --model d12 --batch_size 32 "
    flags += "--sequence_length 1024 --total_batch_size 524288 --dtype bfloat16 --compile 1 --tensorcores 1 --flash 1 "
    flags += "--num_iterations 18865 --weight_decay 0.1 --zero_stage 1 --learning_rate 0.0006 --warmup_iters 700 "
    flags += "--learning_rate_decay_frac 0.0 --overfit_single_batch 0"
    assert other[at:] == flags.split()
    assert call[at:] == [*flags.split(), "--batch_size", "8"]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shellcheck() -> None:
    files = [str(path.relative_to(ROOT)) for kind in ("*.sh", "*.sbatch") for path in sorted(SCRIPTS.rglob(kind))]
    assert len(files) >= 10
    done = subprocess.run(["shellcheck", "-x", *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_sweep_file() -> None:
    rates = [run.varied["learning_rate"] for run in Sweep.load(SCRIPTS / "sweep_lr.toml").runs]
    assert rates == [3e-5, 1e-4, 3e-4, 1e-3]
