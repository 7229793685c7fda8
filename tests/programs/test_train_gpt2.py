"""`python -m llmc.train_gpt2` prints llm.c's lines. (The tests of the C++ program of this name are in test_apps.py.)"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

import llmc
from llmc.formats.shards import write_shard

CONFIG = llmc.GPT2Config(max_seq_len=64, vocab_size=300, num_layers=1, num_heads=2, channels=16)


def run(folder: Path, *arguments: str, encoding: str = "utf-8") -> subprocess.CompletedProcess[str]:
    """Run the program in a folder, as on a console of this encoding that raises an error for characters that it lacks."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": f"{encoding}:strict"}
    command = [sys.executable, "-m", "llmc.train_gpt2", *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        encoding=encoding,
        timeout=120,
        check=False,
    )


def test_it_prints_the_lines_of_llm_c(tmp_path: Path) -> None:
    llmc.GPT2(CONFIG, seed=1).save(tmp_path / "model.bin")
    rng = np.random.default_rng(0)
    data = tmp_path / "data"
    data.mkdir()
    write_shard(data / "tiny_shakespeare_train.bin", rng.integers(97, 110, 3000))
    write_shard(data / "tiny_shakespeare_val.bin", rng.integers(97, 110, 1500))
    llmc.Tokenizer.byte_level().save(data / "tokenizer.bin")
    # Random bytes, and ids that the tokenizer lacks, become U+FFFD. ASCII has no such character; that must not end the program.
    done = run(tmp_path, "--model", "model.bin", "--data", "data", encoding="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:10] == [
        "[GPT-2]", "max_seq_len: 64", "vocab_size: 300", "padded_vocab_size: 384", "num_layers: 1", "num_heads: 2",
        "channels: 16", f"num_parameters: {CONFIG.num_parameters}", "train dataset num_batches: 11",
        "val dataset num_batches: 5",
    ]  # fmt: skip
    losses = re.findall(r"^step (\d+): train loss (\d+\.\d{6}) \(took \d+\.\d{6} ms\)$", done.stdout, re.M)
    assert [int(step) for step, _ in losses] == list(range(41)) and float(losses[-1][1]) < float(losses[0][1]) - 0.01
    assert len(re.findall(r"^val loss \d+\.\d{6}$", done.stdout, re.M)) == 5
    samples = re.findall(r"^generating:\n---\n(.*?)\n---$", done.stdout, re.M | re.S)
    assert len(samples) == 2 and "?" in samples[0]


def test_an_error_is_one_line(tmp_path: Path) -> None:
    done = run(tmp_path, "--model", "absent.bin")
    assert done.returncode in (1, 2) and len(done.stderr.splitlines()) == 1 and "absent.bin" in done.stderr
