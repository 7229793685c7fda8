"""dev/data/*.py: llm.c's scripts, over llmc.datasets."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmc.data.python_texts import language_reference
from llmc.formats.shards import read_shard

SCRIPTS = Path(__file__).parents[2] / "dev" / "data"
NAMES = sorted(path.name for path in SCRIPTS.glob("*.py") if path.name != "common.py")


def run(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("name", NAMES)
def test_help(name: str) -> None:
    done = run(SCRIPTS / name, "--help")
    assert done.returncode == 0 and "--source" in done.stdout, done.stderr


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    """Copy the scripts, because they write into folders beside themselves."""
    (tmp_path / "data").mkdir()
    for path in SCRIPTS.glob("*.py"):
        shutil.copy(path, tmp_path / "data")
    return tmp_path / "data"


def test_from_a_local_source(scripts: Path, tmp_path: Path) -> None:
    text = "\n".join(language_reference())[:100_000]
    (tmp_path / "input.txt").write_bytes(text.encode())
    done = run(scripts / "tinyshakespeare.py", "--source", str(tmp_path / "input.txt"), "--tokenizer", "bytes")
    assert done.returncode == 0, done.stderr
    out = scripts / "tinyshakespeare"
    tokens = [*read_shard(out / "tiny_shakespeare_val.bin"), *read_shard(out / "tiny_shakespeare_train.bin")]
    assert bytes(t for t in tokens if t < 256).decode() == text and len(tokens) > 100_000
    assert "train on them: llmc-train -i" in done.stdout

    arguments = ("--source", str(tmp_path / "input.txt"), "--tokenizer", "bytes", "-s", "40000")
    for _ in range(2):  # the second run overwrites the files of the first
        done = run(scripts / "fineweb.py", *arguments)
        assert done.returncode == 0, done.stderr
        assert len(list((scripts / "fineweb10B").glob("fineweb_*.bin"))) == 3


def test_an_error_is_one_line(scripts: Path) -> None:
    done = run(scripts / "fineweb.py", "--source", "mistyped", "--tokenizer", "bytes")
    assert done.returncode == 2 and done.stderr == "fineweb.py: error: no files match 'mistyped'\n"
