"""The first hour: what README.md and the documents give to be typed is typed, in their order, in a fresh folder and at small size.

A command that needs more than this machine has (a download, a GPU, Slurm, hours) is in LEFT_OUT with its reason; its options are
compared with those of its program then. What a document gives and no table here knows is run, so a new command is tried at once.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import pydoc
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import documents
import mpi
import pytest
from runs import called

import llmc
from llmc.cli import COMMANDS, main, train_main
from llmc.distributed.launcher import find_mpiexec

ROOT = documents.ROOT
RUN = "runs/20261123-120000"
TEXT = "the cat sat on the mat. the dog sat on the log.\nonce upon a time a bird sat on both, and sang.\n"

# Patterns of commands that are not run here, and why. Their options must be those of their programs nevertheless.
LEFT_OUT = {
    "pip install*": "changes this environment; .ci/run installs llmc by it",
    "python3 -m venv*": "makes an environment; .ci/run does",
    "git clone*": "there is a clone",
    "cd *": "there is a clone",
    ". .venv/bin/activate": "there is an environment",
    "pytest*": "it is what runs this",
    "cmake *": "compiles for minutes; dev/ci/emulation.sh does",
    "python dev/make_stubs.py*": "needs the developers' tools; .ci/run does it",
    "python dev/check_links.py*": "changes the documents; tests/project/test_docs.py",
    "python dev/ci/check_sass.py*": "needs a CUDA build; dev/ci/cuda.sh does it",
    "python dev/kernels/run.py*": "compiles and measures, for minutes; tests/kernels/test_kernels.py",
    "python doc/*": "measures, for minutes; tests/docs/test_tutorials.py",
    "python dev/make_notebooks.py*": "measures, for minutes; tests/docs/test_tutorials.py",
    "sphinx-build*": "needs its extra; .ci/run does it",
    "python dev/bench/*": "measures, for minutes",
    "python dev/profile.py*": "measures; tests/programs/test_profile.py",
    "*dev/stress/*": "runs for minutes to hours",
    "LLMC_ISA=avx2 python dev/bench/*": "measures, for minutes",
    "dev/gpu_check.sh*": "compiles for minutes, for a GPU",
    "llmc check*": "takes half a minute; tests/programs/test_check.py",
    "llmc data tinyshakespeare": "downloads; tests/data/test_datasets.py",
    "llmc data tinystories": "downloads; tests/data/test_datasets.py",
    "llmc data fineweb*": "downloads; tests/data/test_datasets.py",
    "llmc data hellaswag*": "downloads; tests/data/test_datasets.py",
    "llmc-train --data data/nanogpt --tokenizer gpt2 -e d12": "tiktoken downloads gpt2",
    "python -m llmc.lm_eval": "needs its extra; tests/models/test_lm_eval.py",
    "python -m llmc.train_gpt2": "trains 124M; tests/programs/test_train_gpt2.py",
    "python -m llmc.reference": "trains 124M; tests/models/test_reference.py",
    "OMP_NUM_THREADS=4 llmc-train": "a pattern, not a command",
    "*llmc-train *...*": "a pattern, not a command; tests/distributed",
    "torchrun *...": "a pattern, not a command; tests/distributed",
    "llmc-train --processes N*": "a pattern, not a command; tests/distributed",
    "llmc-train --processes": "the name of an option",
    "llmc-train --data": "the name of an option",
    "python dev/data/<name>.py": "a pattern, not a command; tests/data/test_dev_data.py",
    "llmc generate *--interactive": "reads what is typed; tests/programs/test_generate.py",
    "llmc data text input.txt --tokenizer bpe:1024 --output tinyshakespeare": "needs that text; tests/data/test_datasets.py",
    "llmc data text linux-doc.jsonl*": "needs the text of a Debian package; tests/data/test_datasets.py",
    "scripts/run.sh *": "needs the data and a GPU; tests/programs/test_scripts.py",
    "scripts/run_gpt2_124M.sh*": "needs the data and a GPU; tests/programs/test_scripts.py",
    "*scripts/pyrun_gpt2_124M.sh*": "needs PyTorch, and its data; tests/programs/test_scripts.py",
    "scripts/multi_node/*": "needs two machines; tests/programs/test_scripts.py",
    "sbatch *": "needs Slurm; tests/programs/test_scripts.py",
    "powershell *": "needs the data; tests/programs/test_scripts.py",
    "python examples/*": "trains for minutes; tests/programs/test_examples.py",
    "llmc sweep scripts/sweep_lr.toml": "trains 124M on four GPUs; tests/programs/test_scripts.py",
}

# What is typed in place of a command: RUN is RUN in all of them, and these have a name or a number that stands for another besides.
TYPED = {
    f"llmc train --resume {RUN} --max-steps 1800": f"llmc train --resume {RUN} --max-steps 6",
    "llmc-train --data FOLDER": "llmc-train --data shards",
    "llmc import SOURCE OUT.bin": "llmc import hf OUT.bin",
}

# Packages that commands need and `pip install .` does not bring.
NEEDS = {"*.parquet*": "pyarrow", "llmc import *": "safetensors", "llmc export *": "safetensors", "*.gguf": "gguf"}

# Options that make a command small: those of the first pattern that it fits.
# A picture takes longer than the rest of a run, and `llmc plot` makes one; the curve of a run: tests/programs/test_cli.py.
SHAPE = "--layers 1 --heads 2 --channels 16 --no-plot"
SMALL = {
    "llmc[- ]train *--resume *": "",  # as small as the run that it resumes
    "llmc-train --processes *": f"{SHAPE} --max-steps 2 -t 16 -b 2 -v 0 -s 0 --tokenizer bytes --dist-timeout 60",
    "*llmc[- ]train*": f"{SHAPE} --max-steps 3 -t 32 -b 2 -v 2 -m 1 -s 2 -g 16",
    "*llmc data text *": "--tokenizer bpe:300",  # gpt2 is downloaded
    "llmc generate *": "-n 8",
}

# Of the README's Python blocks.
SMALL_SETTINGS = {
    "layers": 1,
    "heads": 2,
    "channels": 16,
    "seq_len": 32,
    "batch_size": 2,
    "max_steps": 3,
    "val_every": 2,
    "plot": False,
}


def typed(words: list[str]) -> str:
    return " ".join(words)


def left_out(words: list[str]) -> str | None:
    """Return the pattern of LEFT_OUT that a command fits."""
    return next((pattern for pattern in LEFT_OUT if fnmatchcase(typed(words), pattern)), None)


def simple_commands(command: documents.Command) -> Iterator[list[str]]:
    """Return the words of each of the commands that `&&` joins."""
    words = command.words()
    while words:
        end = words.index("&&") if "&&" in words else len(words)
        yield words[:end]
        words = words[end + 1 :]


EVERY = [
    (document, words)
    for document in documents.DOCUMENTS
    for command in documents.commands(document)
    if not command.shell
    for words in simple_commands(command)
]


@pytest.fixture(scope="module")
def user_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the folder of a user who has a text, other files, shards of it, and a run that was stopped after two of four steps."""
    folder = tmp_path_factory.mktemp("user")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_user_files()
    return folder


@pytest.fixture
def fresh(user_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a copy of that folder."""
    monkeypatch.chdir(shutil.copytree(user_files, tmp_path / "user"))
    return Path.cwd()


def make_user_files() -> None:
    Path("my_texts").mkdir()
    for name in ("my.txt", "my_texts/1.txt"):
        Path(name).write_text(TEXT * 150, encoding="utf-8")
    Path("notes.jsonl").write_text(json.dumps({"body": TEXT}) + "\n", encoding="utf-8")
    Path("sweep.toml").write_text(
        'output_dir = "sweep"\n[settings]\ndata = ["my.txt"]\ntokenizer = "bytes"\nlayers = 1\nheads = 2\nchannels = 16\n'
        "seq_len = 16\nbatch_size = 2\nmax_steps = 2\nplot = false\nsample_every = 0\n[grid]\nlearning_rate = [1e-3]\n"
    )
    for name in ("train.bin", "val.bin"):  # nanoGPT's
        Path(name).write_bytes(bytes(range(100)) * 20)
    if importlib.util.find_spec("pyarrow"):
        from pyarrow import parquet, table

        parquet.write_table(table({"body": [TEXT]}), "table.parquet")
    call(main, ["data", "text", "my.txt", "--tokenizer", "bpe:300", "-o", "shards"])
    options = "--data my.txt --max-steps 4 -n 2 --warmup-steps 1 -t 32 -b 2 -m 1 -g 16 -s 0".split()
    call(train_main, [*options, "-o", RUN, *SHAPE.split()])
    Path(RUN, "DONE_00000004").unlink()
    if importlib.util.find_spec("safetensors"):
        call(main, ["export", RUN, "hf"])


def call(program: Any, arguments: list[str]) -> str:
    """Call the main function of a program; return what it shows. Its exit code must be 0."""
    done = called(program, *arguments)
    assert done.returncode == 0, done
    return done.stdout + done.stderr


def program_of(words: list[str]) -> tuple[Any, list[str]] | None:
    """Return the function behind `llmc`, `llmc-train` or `python -m llmc`, and its arguments; None for other programs."""
    if words[:3] == ["python", "-m", "llmc"]:
        return main, words[3:]
    programs = {"llmc": main, "llmc-train": train_main}
    return (programs[words[0]], words[1:]) if words[0] in programs else None


def to_run(document: Path) -> Iterator[list[str]]:
    """Return the commands of a document that are run in this process."""
    for of, words in EVERY:
        needed = [package for pattern, package in NEEDS.items() if fnmatchcase(typed(words), pattern)]
        if of == document and left_out(words) is None and "--processes" not in words:
            if all(importlib.util.find_spec(package) for package in needed):
                yield (
                    TYPED[typed(words)].split() if typed(words) in TYPED else [RUN if w == "RUN" else w for w in words]
                )


def small(words: list[str]) -> list[str]:
    """Return the options that make this command small."""
    return next((options.split() for pattern, options in SMALL.items() if fnmatchcase(typed(words), pattern)), [])


def run(words: list[str]) -> None:
    """Run a command as a user would, in the present folder: in this process, or by a shell if it asks for what a shell does."""
    if "|" in words or "=" in words[0]:
        run_in_shell(words)
        return
    if words[0] == "pydoc":
        assert pydoc.locate(words[1]) is not None
        return
    found = program_of(words)
    assert found is not None, f"'{typed(words)}' is no command that this test can run: LEFT_OUT takes it, with a reason"
    program, arguments = found
    names_a_command = program is main and typed(arguments) in ("", *(set(COMMANDS) - {"info", "check"}), "data text")
    assert call(program, [*arguments, *(["--help"] if names_a_command else small(words))])


def run_in_shell(words: list[str]) -> None:
    """Run a command by a POSIX shell, if there is one, with the programs that pip installed, or else with some in their place."""
    if sys.platform == "win32":
        return
    installed, here = Path(sys.executable).parent, Path("bin").absolute()
    here.mkdir(exist_ok=True)
    for name, arguments in (("llmc", "llmc"), ("llmc-train", "llmc train")):
        (here / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {arguments} "$@"\n')
        (here / name).chmod(0o755)
    line = " ".join(word if word == "|" or "*" in word else shlex.quote(word) for word in [*words, *small(words)])
    environment = os.environ | {"PATH": os.pathsep.join([str(installed), str(here), os.environ["PATH"]])}
    done = subprocess.run(["sh", "-c", line], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{line}: {done}"


@pytest.mark.parametrize(
    "document", [d for d in documents.DOCUMENTS if any(to_run(d))], ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_what_is_typed_works(document: Path, fresh: Path) -> None:
    for words in to_run(document):
        run(words)


def test_many_processes_as_typed(fresh: Path) -> None:
    """The same, for commands that start ranks: by the installed script, if there is one."""
    try:
        find_mpiexec()
    except ImportError as e:
        pytest.skip(str(e))
    (words,) = [words for _, words in EVERY if "--processes" in words and left_out(words) is None]
    script = shutil.which(words[0], path=str(Path(sys.executable).parent))
    line = [*([script] if script else [sys.executable, "-m", "llmc", "train"]), *words[1:], *small(words)]
    environment = os.environ | mpi.ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done


def test_tables_name_commands_of_documents() -> None:
    """What no document gives to be typed any more leaves the tables."""
    given = {typed(words) for _, words in EVERY}
    assert set(LEFT_OUT) <= {pattern for line in given for pattern in LEFT_OUT if fnmatchcase(line, pattern)}
    assert set(TYPED) <= given
    assert all(any(fnmatchcase(line, pattern) for line in given) for pattern in NEEDS)
    for reason in LEFT_OUT.values():
        assert all((ROOT / path).exists() for path in re.findall(r"(?:tests|dev|\.ci)/[\w./]+", reason)), reason


def options_of(words: list[str]) -> str | None:
    """Return a text that has the options of a program: its help or its source; None if the program is not ours."""
    words = list(itertools.dropwhile(lambda word: "=" in word, words))
    for name in ("llmc-train", "llmc"):  # behind mpirun and srun too
        if name in words:
            words = words[words.index(name) :]
    found = program_of(words)
    if found:
        program, arguments = found
        names = list(itertools.takewhile(lambda word: not word.startswith("-"), arguments)) if program is main else []
        return call(program, [*names[: 2 if names[:1] == ["data"] else 1], "--help"])
    if words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2])
    path = ROOT / words[words[0] == "python"]
    if not path.is_file():
        return None
    if path.suffix == ".sh" and "more flags of llmc-train" in path.read_text(encoding="utf-8"):
        return call(train_main, ["--help"])
    beside = (
        [path.with_name("common.py")] if path.suffix == ".py" else [ROOT / "src" / "llmc" / "reference" / "__main__.py"]
    )
    return "".join(file.read_text(encoding="utf-8") for file in [path, *beside] if file.is_file())


def assert_options_exist(words: list[str]) -> None:
    """Assert that the options of a command are in the help, or in the source, of its program, if that is one of ours."""
    ours = re.split(r"\bllmc(?:-train)?\b", typed(words))[-1].split()
    text = options_of(words)
    for option in (word for word in ours if text and re.fullmatch(r"--?[a-z][a-z-]*", word)):
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", text), f"'{typed(words)}': there is no {option}"


@pytest.mark.parametrize("pattern", LEFT_OUT)
def test_what_is_left_out_has_options_that_there_are(pattern: str) -> None:
    for words in (words for _, words in EVERY if fnmatchcase(typed(words), pattern)):
        assert_options_exist(words)


WINDOWS = {
    "powershell": r"py -m venv \.venv|\.venv\\Scripts\\Activate\.ps1|\$env:[A-Z_]+ = \w+|pip install \S+|(llmc|llmc-train)( .*)?",
    "bat": r"py -m venv \.venv|\.venv\\Scripts\\activate\.bat|set [A-Z_]+=\w+|pip install \S+|(llmc|llmc-train)( .*)?",
}


@pytest.mark.parametrize("shell", WINDOWS)
def test_windows_commands_are_right_in_their_shell(shell: str) -> None:
    """They are read, because no such shell is here: no single quotes, which cmd does not know, and no &&, which PowerShell 5 does not."""
    lines = [c.text for document in documents.DOCUMENTS for c in documents.commands(document) if c.shell == shell]
    assert lines
    for line in lines:
        assert re.fullmatch(WINDOWS[shell], line) and not re.search(r"'|&&|\\$", line), line
        words = shlex.split(line, posix=False)
        if words[0] in ("llmc", "llmc-train"):
            assert_options_exist(words)


def test_both_shells_of_windows_do_the_same() -> None:
    def plain(shell: str) -> list[str]:
        lines = [c.text for c in documents.commands(ROOT / "README.md") if c.shell == shell]
        lines = [re.sub(r"[Aa]ctivate\.(ps1|bat)", "activate", line) for line in lines]
        return [re.sub(r"(?:set |\$env:)(\w+) ?= ?", r"\1=", line) for line in lines]

    assert plain("powershell") == plain("bat")


def test_python_blocks_of_the_readme(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At small size: settings and models are replaced by smaller ones, and the endless loader ends."""
    train, loader, model = llmc.train, llmc.DataLoader, llmc.GPT2.from_descriptor("d1")
    blocks = documents.python_blocks(ROOT / "README.md")
    monkeypatch.setattr(llmc, "train", lambda **settings: train(**{**settings, **SMALL_SETTINGS}))
    monkeypatch.setattr(llmc, "DataLoader", lambda *files, **options: itertools.islice(loader(*files, **options), 1))
    monkeypatch.setattr(llmc.GPT2, "from_descriptor", lambda name: model)
    names: dict[str, Any] = {}
    assert len(blocks) == 2
    for block in blocks:
        call(lambda _, block=block: exec(block, names), [])
    assert Path("model.bin").is_file() and names["model"].mean_loss > 0
