"""Everything works in folders with spaces, letters of any language, brackets, and more than 260 characters (Windows' old limit)."""

from __future__ import annotations

import glob
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from runs import called

import llmc
from llmc import cli
from llmc.system.fs import shell_word

TEXT = "the cat sat on the mat. 你好 世界. the dog sat on the log. " * 300
SHAPE = "--layers 1 --heads 2 --channels 16 --max-seq-len 32 -t 32 -b 2 -v 2 -m 1 -s 0".split()


# Windows may refuse the long one; elsewhere there is no difference.
@pytest.fixture(params=["short", "long"] if sys.platform == "win32" else ["long"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "träin 测试 [x]"
    while request.param == "long" and len(str(path)) <= 260:
        path = path / "träin 测试 [x]"
    try:
        path.mkdir(parents=True)
    except OSError:
        if sys.platform == "win32" and request.param == "long":
            pytest.skip("Windows' long paths are not enabled here")
        raise
    (path / "my text 文.txt").write_text(TEXT, encoding="utf-8")
    return path


def run(*argv: str | Path, cwd: Path) -> str:
    """Call `llmc` with these arguments, assert that it succeeds, and return what it prints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setenv("OMP_NUM_THREADS", "1")  # of a sweep's runs
        done = called(cli.main, *map(str, argv))
    assert done.returncode == 0, done
    return done.stdout


def test_commands(folder: Path, tmp_path: Path) -> None:
    """All paths are absolute, because on Windows no process can have a long path as its current folder."""
    text, tokens, trained = folder / "my text 文.txt", folder / "tokens 词", folder / "run 跑"
    shown = run("data", "text", text, "-tk", "bytes", "-o", tokens, "-s", "8000", cwd=tmp_path)
    words = shlex.split(shown.partition("train on them: ")[2], posix=os.name == "posix")  # as a user would copy them
    train, val = (words[words.index(flag) + 1].strip('"') for flag in ("-i", "-j"))
    assert len(glob.glob(train)) > 1
    run("train", "-i", train, "-j", val, "-o", folder / "on tokens", "-x", "2", "--no-plot", *SHAPE, cwd=tmp_path)
    assert (folder / "on tokens" / "DONE_00000002").is_file()

    run("train", "--data", text, "--tokenizer", "bytes", "-o", trained, "-x", "4", "-n", "2", *SHAPE, cwd=tmp_path)
    (trained / "DONE_00000004").unlink()
    assert "from step 2" in run("train", "--resume", trained, cwd=tmp_path)
    assert (trained / "DONE_00000004").is_file() and (trained / "loss.png").is_file()
    assert run("generate", trained, "the", "-n", "8", "--past-eot", cwd=tmp_path).startswith("the")
    assert "validation: loss" in run("eval", trained, "--data", val, "--json", folder / "out.json", cwd=tmp_path)
    assert (folder / "out.json").is_file()
    assert "best" in run("plot", trained, folder / "on tokens", "-o", folder / "curves 图.png", cwd=tmp_path)
    assert "val loss" in run("watch", "--once", trained, cwd=tmp_path)

    sweep = folder / "sweep 扫.toml"
    sweep.write_text(
        f"output_dir = '{folder / 'sweep 扫'}'\n[settings]\ndata = ['{text}']\ntokenizer = 'bytes'\nlayers = 1\nheads = 2\nchannels = 16\n"
        "max_seq_len = 32\nseq_len = 32\nbatch_size = 2\nmax_steps = 2\nplot = false\n[grid]\nseed = [1, 2]\n",
        encoding="utf-8",
    )
    run("sweep", sweep, cwd=tmp_path)
    assert (folder / "sweep 扫" / "summary.png").is_file()


def test_hugging_face(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="safetensors is not installed: pip install safetensors")
    model = llmc.GPT2(llmc.GPT2Config(max_seq_len=16, vocab_size=257, num_layers=1, num_heads=2, channels=16))
    model.save(folder / "model 模.bin")
    run("export", folder / "model 模.bin", folder / "hf 模", "--tokenizer", "bytes", cwd=tmp_path)
    run("import", folder / "hf 模", folder / "back 模.bin", cwd=tmp_path)
    back = llmc.GPT2.from_checkpoint(folder / "back 模.bin")
    for name, array in model.parameters.items():
        assert np.array_equal(
            array[:257] if name == "wte" else array,
            back.parameters[name][:257] if name == "wte" else back.parameters[name],
        )
    assert llmc.GPT2.from_checkpoint(str(folder / "model 模.bin")).num_parameters == model.num_parameters


def test_errors_show_the_path(folder: Path) -> None:
    missing = folder / "none 无.bin"
    with pytest.raises(llmc.Error, match="none 无.bin: no such model checkpoint"):
        llmc.GPT2.from_checkpoint(missing)
    with pytest.raises(llmc.Error, match=re.escape(str(folder))):
        llmc.Tokenizer.load(missing)


def test_windows_limit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a path that is too long Windows only says that the file does not exist; llmc says what the limit is."""
    path = os.path.abspath("long/" * 60)
    error = FileNotFoundError(2, "No such file or directory", path)
    assert "LongPathsEnabled" not in cli._message(error)
    monkeypatch.setattr(sys, "platform", "win32")
    assert "LongPathsEnabled" in cli._message(error)
    assert "LongPathsEnabled" not in cli._message(FileNotFoundError(2, "No such file or directory", "short"))


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
@pytest.mark.parametrize("name", ["a b", "it's", "$HOME", "`x`", "a\nb", "sh/text_train_*.bin", '"', "\\", "runs/1"])
def test_a_suggested_command_names_the_file(name: str) -> None:
    said = subprocess.run(["sh", "-c", f"printf %s {shell_word(name)}"], capture_output=True, check=True, text=True)
    assert said.stdout == name
