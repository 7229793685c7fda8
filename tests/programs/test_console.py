"""Consoles that lack characters: nothing that llmc prints ends a program on them. Windows has cp936 in China, cp1252 in the West."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TEXT = "naïve café 你好 世界 🙂👍 — the cat sat on the mat. " * 300
FOLDER = "träin 测试 🙂"
SHAPE = (
    "--layers 1 --heads 2 --channels 16 --max-seq-len 32 -t 32 -b 2 -x 3 -v 2 -m 1 -s 2 -g 16 --tokenizer bytes".split()
)

encodings = pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp936"])


def python(encoding: str, *argv: str, cwd: Path) -> subprocess.CompletedProcess[bytes]:
    """Run Python as on a console of this encoding, and assert that its output has this encoding and no traceback."""
    environment = {**os.environ, "PYTHONUTF8": "0", "PYTHONIOENCODING": encoding, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *argv], cwd=cwd, env=environment, capture_output=True, timeout=120)
    for out in (done.stdout, done.stderr):
        assert "Traceback" not in out.decode(encoding) and "UnicodeEncodeError" not in out.decode(encoding), out.decode(
            encoding
        )
    return done


# Runs each of several command lines as `python -m` does, in one process, and writes its exit code after its output.
MODULES = """
import json, runpy, sys
lines = json.loads(sys.argv[1])
for module, *sys.argv[1:] in lines:
    sys.stdout.reconfigure(errors="strict")  # as it is for a program that begins
    code = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as e:
        code = e.code
    for stream in (sys.stdout, sys.stderr):
        stream.write(f"<<exit {code}>>")
"""


def modules(encoding: str, *lines: list[str], cwd: Path) -> list[subprocess.CompletedProcess[bytes]]:
    """Run modules with their arguments, as python() does each."""
    done = python(encoding, "-c", MODULES, json.dumps(lines), cwd=cwd)
    assert done.returncode == 0, done
    out, err = (re.split(rb"<<exit (\d+)>>", stream) for stream in (done.stdout, done.stderr))
    return [
        subprocess.CompletedProcess(line, int(code), shown, said)
        for line, code, shown, said in zip(lines, out[1::2], out[::2], err[::2], strict=False)
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, and a run that was trained on it."""
    folder = tmp_path_factory.mktemp("console")
    (folder / f"{FOLDER}.txt").write_text(TEXT, encoding="utf-8")
    done = python("utf-8", "-m", "llmc", "train", "--data", f"{FOLDER}.txt", "-o", FOLDER, *SHAPE, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@encodings
@pytest.mark.parametrize("progress", ["lines", "bar"])
def test_training(encoding: str, progress: str, trained: Path, tmp_path: Path) -> None:
    command = ["-m", "llmc", "train", "--data", str(trained / f"{FOLDER}.txt"), "-o", FOLDER, "--progress", progress]
    done = python(encoding, *command, *SHAPE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert b"generating:" in done.stdout and list((tmp_path / FOLDER).glob("DONE_*"))
    (tmp_path / "sweep.toml").write_text(
        f'output_dir = "{FOLDER}-sweep"\n[settings]\ndata = [{str(trained / f"{FOLDER}.txt")!r}]\nlayers = 1\nheads = 2\n'
        "channels = 16\nmax_seq_len = 32\nseq_len = 32\nbatch_size = 2\nmax_steps = 2\ntokenizer = 'bytes'\n"
        "plot = false\n[grid]\nseed = [1, 2]\n",
        encoding="utf-8",
    )
    if progress == "lines":
        done = python(encoding, "-m", "llmc", "sweep", "sweep.toml", cwd=tmp_path)
        assert done.returncode == 0 and b"summary.csv" in done.stdout, done
        assert FOLDER in (tmp_path / f"{FOLDER}-sweep" / "seed=1" / "output.txt").read_text(encoding="utf-8")


@encodings
def test_commands(encoding: str, trained: Path, tmp_path: Path) -> None:
    run, text = str(trained / FOLDER), str(trained / f"{FOLDER}.txt")
    lines = [
        ["info"],
        ["generate", run, "你好 🙂", "-n", "16", "--past-eot", "--stats"],
        ["generate", run, "你好 🙂", "-n", "16", "--past-eot", "--samples", "2"],
        ["watch", "--once", run],
        ["plot", run, "-o", f"{FOLDER}.png"],
        ["eval", run, "--data", str(trained / FOLDER / "data" / "val.bin")],
        ["data", "text", text, "-tk", "bytes", "-o", FOLDER],
        ["import", run, f"{FOLDER}.bin"],  # a run directory is not a Hugging Face folder: the error names it
        ["generate", run, "é 你", "-n", "0"],
    ]
    *well, imported, shown = modules(encoding, *(["llmc", *argv] for argv in lines), cwd=tmp_path)
    assert len(well) == 7
    for done in well:
        assert done.returncode == 0 and done.stdout, done
    assert imported.returncode == 2 and imported.stderr
    assert shown.stdout.decode(encoding).splitlines() == [{"ascii": "? ?", "cp1252": "é ?", "cp936": "é 你"}[encoding]]


@encodings
def test_errors_name_the_file(encoding: str, tmp_path: Path) -> None:
    lines = (["generate", "测试 🙂"], ["train", "--data", "测试 🙂"], ["train", "测试 🙂"], ["测试 🙂"])
    ended = modules(encoding, *(["llmc", *argv] for argv in lines), cwd=tmp_path)
    assert len(ended) == 4
    for done in ended:
        assert done.returncode == 2 and rb"\U0001f642" in done.stderr, done


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="their file systems have names in Unicode alone")
def test_names_that_are_not_unicode(tmp_path: Path) -> None:
    """A name may have any bytes, and costs no more than a "?" in what is printed, drawn or written of it."""
    code = (
        "import os\n"
        "from llmc.cli import main\n"
        "text, run, tokens, picture = map(os.fsdecode, (b'\\xff.txt', b'run\\xff', b'tokens\\xff', b'\\xff.png'))\n"
        f"shape = {SHAPE!r}\n"
        "for argv in (\n"
        "    ['train', '--data', text, '-o', run, *shape], ['train', '--resume', run], ['plot', run, '-o', picture],\n"
        "    ['generate', run, 'é', '-n', '4'], ['watch', '--once', run], ['data', 'text', text, '-tk', 'bytes', '-o', tokens],\n"
        "    ['train', '--data', tokens, '-o', run + '2', '--no-plot', *shape], ['train', '--resume', run + '2']\n"
        "):\n"
        "    assert main(argv) == 0, argv\n"
        "assert main(['train', '--data', run + '3']) == 2\n"
    )
    with open(os.path.join(os.fsencode(tmp_path), b"\xff.txt"), "w", encoding="utf-8") as file:
        file.write(TEXT)
    (tmp_path / "script.py").write_text(code, encoding="utf-8")
    done = python("ascii", "script.py", cwd=tmp_path)
    assert done.returncode == 0 and b"run?: best training loss" in done.stdout, done
    assert rb"run\udcff3" in done.stderr


COMMANDS = "train generate info check data import export eval plot watch sweep".split()


@encodings
def test_help(encoding: str, tmp_path: Path) -> None:
    """The help calls the program by the name under which it was called."""
    programs = [["llmc"], *(["llmc", name] for name in COMMANDS), ["llmc.train_gpt2"], ["llmc.test_gpt2"]]
    ended = modules(encoding, *([*program, "--help"] for program in programs), cwd=tmp_path)
    assert len(ended) == len(programs)
    for program, done in zip(programs, ended, strict=True):
        assert done.returncode == 0 and done.stdout.startswith(f"usage: python -m {' '.join(program)}".encode()), done


@encodings
@pytest.mark.parametrize("progress", ["lines", "bar"])
def test_a_script_that_trains(encoding: str, progress: str, trained: Path, tmp_path: Path) -> None:
    """The library does not change the settings of the caller's stdout, and what it prints there raises no error."""
    code = (
        "import sys, llmc\n"
        f"llmc.train(data={str(trained / f'{FOLDER}.txt')!r}, output_dir={FOLDER!r}, layers=1, heads=2, channels=16, max_seq_len=32,\n"
        f"    seq_len=32, batch_size=2, max_steps=3, sample_every=2, sample_tokens=16, tokenizer='bytes',\n"
        f"    plot=False, progress={progress!r})\n"
        "assert sys.stdout.errors == 'strict'\n"
    )
    (tmp_path / "script.py").write_text(code, encoding="utf-8")
    done = python(encoding, "script.py", cwd=tmp_path)
    assert done.returncode == 0 and b"generating:" in done.stdout, done.stderr
