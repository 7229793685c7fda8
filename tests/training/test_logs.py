"""TensorBoard and Weights & Biases: whether their packages take what llmc gives them."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import tiny_run


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    tiny_run(tmp_path, tensorboard=True)
    (events,) = (tmp_path / "run").glob("events.out.tfevents.*")
    assert b"train/loss" in events.read_bytes()


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tiny_run(tmp_path, wandb="a-project")
    (written,) = (tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb")
    assert b"train/loss" in written.read_bytes()
