"""The C++ program train_gpt2 against the same training in Python. (The tests of test_gpt2 are in test_gpt2_program.py.)"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc.formats.shards import write_shard

pytest.importorskip("torch", reason="torch is not installed")
from test_gpt2_program import needs_apps, run_app

pytestmark = needs_apps

CONFIG = llmc.GPT2Config(max_seq_len=64, vocab_size=257, num_layers=2, num_heads=2, channels=32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llmc.GPT2(CONFIG, seed=1).save(tmp_path / "gpt2_124M.bin")
    llmc.Tokenizer.byte_level().save(tmp_path / "gpt2_tokenizer.bin")
    data = tmp_path / "dev" / "data" / "tinyshakespeare"
    data.mkdir(parents=True)
    rng = np.random.default_rng(0)
    write_shard(data / "tiny_shakespeare_train.bin", rng.integers(97, 110, 3000))
    write_shard(data / "tiny_shakespeare_val.bin", rng.integers(97, 110, 1500))
    return tmp_path


def test_train_gpt2_equals_python(folder: Path) -> None:
    """Without options it makes llm.c's forty steps and prints its lines."""
    code, out = run_app("train_gpt2", cwd=folder)
    assert code == 0, out
    model = llmc.GPT2.from_checkpoint(folder / "gpt2_124M.bin")
    optimizer = llmc.AdamW(model, betas=(0.9, 0.999), grad_clip=0.0)
    train = llmc.DataLoader(folder / "dev/data/tinyshakespeare/tiny_shakespeare_train.bin", 4, 64, shuffle=True)
    val = llmc.DataLoader(folder / "dev/data/tinyshakespeare/tiny_shakespeare_val.bin", 4, 64)
    losses, val_losses = [], []
    for step in range(41):
        if step % 10 == 0:
            val.reset()
            val_losses.append(np.mean([model.evaluate(*val.next_batch()) for _ in range(5)]))
        inputs, targets = train.next_batch()
        model.zero_grad()
        model.forward(inputs)
        model.backward(targets)
        losses.append(model.mean_loss)
        optimizer.step(1e-4)
    printed = [float(x) for x in re.findall(r"^step \d+: train loss (\S+) \(took \S+ ms\)$", out, re.M)]
    np.testing.assert_allclose(printed, losses, atol=2e-6)
    np.testing.assert_allclose([float(x) for x in re.findall(r"^val loss (\S+)$", out, re.M)], val_losses, atol=2e-6)
    assert losses[-1] < losses[0] - 0.1
    head = out.splitlines()[:10]
    assert head[:3] == ["[GPT-2]", "max_seq_len: 64", "vocab_size: 257"]
    assert head[8:] == ["train dataset num_batches: 11", "val dataset num_batches: 5"]
    assert out.count("generating:\n---\n") == 2


def test_options(folder: Path) -> None:
    code, out = run_app(
        "train_gpt2", "-x", "2", "-b", "2", "-t", "16", "-v", "0", "-s", "1", "-g", "5", "-p", "bf16", "-o", "out.bin",
        "-tk", "absent.bin", cwd=folder,
    )  # fmt: skip
    assert code == 0, out
    assert "val loss" not in out and re.search(r"generating:\n---\n(\d+ ){4}\n---", out)
    assert llmc.GPT2.from_checkpoint(folder / "out.bin").dtype == "bf16"


def test_paths_in_any_language(folder: Path) -> None:
    """Files whose names no code page of Windows has are found, and shown as they were typed."""
    place = folder / "träin 测试 🙂"
    (folder / "dev" / "data" / "tinyshakespeare").rename(place)
    for name in ("gpt2_124M.bin", "gpt2_tokenizer.bin"):
        (folder / name).rename(place / name)
    train, val = (f"{place.name}/tiny_shakespeare_{split}.bin" for split in ("train", "val"))
    code, out = run_app(
        "train_gpt2", "-e", f"{place.name}/gpt2_124M.bin", "-tk", f"{place.name}/gpt2_tokenizer.bin", "-i", train, "-j", val,
        "-x", "1", "-s", "0", "-o", f"{place.name}/新.bin", cwd=folder,
    )  # fmt: skip
    assert code == 0 and f"wrote {place.name}/新.bin" in out and "there is no tokenizer" not in out, out
    assert llmc.GPT2.from_checkpoint(place / "新.bin").config == CONFIG
    code, out = run_app("test_gpt2", f"{place.name}/新.bin", f"{place.name}/无.bin", cwd=folder)
    assert code == 1 and f"{place.name}/无.bin: no such debug state" in out, out


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["-q", "1"], 2, "unknown argument '-q'"),
        (["-x"], 2, "-x needs a value"),
        (["-x", "ten"], 2, "-x is 'ten'"),
        (["-b", "4.5"], 2, "-b is '4.5'"),
        (["-b", "0"], 2, "positive"),
        (["-t", "65"], 2, "max_seq_len is 64"),
        (["-g", "65"], 2, "context 64"),
        (["-p", "f16"], 2, "'f16'"),
        (["-device", "tpu"], 2, "tpu"),
        (["-e", "absent.bin"], 1, "absent.bin: no such model checkpoint"),
        (["-i", "absent.bin"], 1, "absent.bin"),
        (["-tk", "gpt2_124M.bin"], 1, "gpt2_124M.bin"),
    ],
)
def test_errors(folder: Path, arguments: list[str], code: int, message: str) -> None:
    got, out = run_app("train_gpt2", *arguments, cwd=folder)
    assert (got, message in out) == (code, True), out
