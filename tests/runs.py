"""Tiny training runs for tests: their settings, their data and their weights afterwards; and programs called within the test."""

from __future__ import annotations

import contextlib
import io
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import llmc
from llmc.formats.shards import write_shard
from llmc.training.trainer import Trainer

VOCAB = 61


def tiny_data(folder: Path) -> tuple[str, str]:
    """Write two token files with a pattern that can be learned, and return the paths of training and validation data."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(5)
    for name, count in (("train", 4000), ("val", 400)):
        tokens = (np.arange(count) * 7 + rng.integers(0, 3, count)) % VOCAB
        write_shard(folder / f"{name}.bin", tokens.astype(np.uint32), vocab_size=VOCAB)
    return str(folder / "train.bin"), str(folder / "val.bin")


def tiny_settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return settings of a run of 8 steps in folder/run, with a model of 1 layer and 16 channels, that prints nothing.

    changes: settings that replace these.
    """
    train, val = tiny_data(folder / "data")
    # fmt: off
    settings: dict[str, Any] = {
        "data": (train,), "val_data": (val,), "output_dir": str(folder / "run"), "vocab_size": VOCAB,
        "layers": 1, "heads": 2, "channels": 16, "max_seq_len": 16, "seq_len": 16, "batch_size": 2, "max_steps": 8,
        "optimizer": "adamw", "muon_lr_ratio": 1.0, "schedule": "cosine", "final_lr_frac": 0.1, "rows_per_sample": 0,
        "position_init": "normal", "learning_rate": 1e-2, "warmup_steps": 2, "val_every": 4, "val_steps": 2, "sample_every": 0,
        "device": "cpu", "threads": 1, "progress": "none", "plot": False, "async_save": False,
    }
    # fmt: on
    return {**settings, **changes}


def tiny_run(folder: Path, **changes: Any) -> llmc.TrainResult:
    """Train with tiny_settings()."""
    return llmc.train(**tiny_settings(folder, **changes))


def cut_at(folder: Path, step: int, **options: Any) -> dict[str, Any]:
    """Train to a checkpoint of the given step; return the settings with which the run goes on."""
    settings = tiny_settings(folder, checkpoint_every=step, **options)
    trainer = Trainer(llmc.TrainConfig(**settings))
    for _ in range(step):
        trainer.train_step()
    trainer.save()
    return {**settings, "resume": True}


def weights(result: llmc.TrainResult) -> dict[str, Any]:
    """Return copies of all parameters, by name."""
    return {name: np.array(array) for name, array in result.model.parameters.items()}


def same_weights(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Return whether two results of weights() are equal to the bit."""
    return all(np.array_equal(a[name], b[name]) for name in a)


def called(main: Callable[[Sequence[str]], Any], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Call the main function of a program within this process, which saves its start; return its exit code and what it shows."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as e:  # as of a wrong option, and --help
            code = e.code
    return subprocess.CompletedProcess(arguments, code or 0, out.getvalue(), err.getvalue())
