"""The average of the weights: its formula, what a run evaluates and keeps, and that training does not notice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from runs import cut_at, tiny_run, tiny_settings

import llmc
from llmc.checkpoint import CheckpointDamaged, FoundCheckpoint, finished_steps, newest_model
from llmc.optim.average import WeightAverage
from llmc.training.trainer import Trainer


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_formula(dtype: str) -> None:
    """Against float64, to the roundings of f32: one of the product and one of the sum for each update."""
    config = llmc.GPT2Config(max_seq_len=8, vocab_size=33, num_layers=1, num_heads=1, channels=16)
    model = llmc.GPT2(config, dtype=dtype, threads=1, seed=1)
    average = WeightAverage(model, decay=0.5)
    weights = model.parameters["wte"]
    expected, rng = weights.astype(np.float64), np.random.default_rng(0)
    largest = np.abs(expected)
    for n in range(1, 11):
        weights[...] = rng.standard_normal(weights.shape).astype(weights.dtype)
        decay = np.float64(np.float32(min(0.5, (1 + n) / (10 + n))))
        average.update(n)
        expected = decay * expected + (1 - decay) * weights.astype(np.float64)
        largest = np.maximum(largest, np.abs(weights.astype(np.float64)))
    before = weights.copy()
    got = average.tensor.to_host()[: expected.size].reshape(expected.shape)
    assert np.all(np.abs(got - expected) <= 10 * 2 * 2.0**-24 * largest)
    with average.in_place(), average.in_place():
        np.testing.assert_array_equal(model.parameters["wte"], got.astype(weights.dtype))
    np.testing.assert_array_equal(model.parameters["wte"], before)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_run_evaluates_and_keeps_the_average(tmp_path: Path, dtype: str) -> None:
    plain = tiny_run(tmp_path / "plain", dtype=dtype, keep_checkpoints=1, checkpoint_every=4)
    settings = tiny_settings(
        tmp_path / "average", dtype=dtype, keep_checkpoints=1, checkpoint_every=4, ema_decay=0.6, save_best=True
    )
    trainer = Trainer(llmc.TrainConfig(**settings))
    result = trainer.fit()
    assert result.history["train_loss"] == plain.history["train_loss"]
    run = tmp_path / "average" / "run"
    assert (run / "model_00000008.bin").read_bytes() == (plain.run_dir / "model_00000008.bin").read_bytes()
    assert [path.name for path in run.glob("average_*")] == ["average_00000008.bin"]
    assert newest_model(run) == run / "average_00000008.bin"
    average = llmc.GPT2.from_checkpoint(newest_model(run), dtype=dtype, threads=1)
    trainer.val_loader.reset()
    losses = [average.evaluate(*trainer.val_loader.next_batch()) for _ in range(2)]
    assert result.history["val_loss"][-1] == np.mean(losses) != plain.history["val_loss"][-1]
    best = llmc.GPT2.from_checkpoint(run / "best.bin", threads=1)
    np.testing.assert_array_equal(best.parameters["wte"], average.parameters["wte"])


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_resume_is_bit_identical(tmp_path: Path, dtype: str) -> None:
    whole = tiny_run(tmp_path / "whole", dtype=dtype, ema_decay=0.9)
    settings = cut_at(tmp_path / "cut", 4, dtype=dtype, ema_decay=0.9)
    resumed = llmc.train(**settings)
    for name in ("model_00000008.bin", "average_00000008.bin"):
        assert (whole.run_dir / name).read_bytes() == (resumed.run_dir / name).read_bytes()
    assert resumed.history["val_loss"][-1] == whole.history["val_loss"][-1]


def test_an_average_that_begins_later_begins_as_the_weights_are(tmp_path: Path) -> None:
    settings = cut_at(tmp_path, 4)
    with pytest.raises(ValueError, match="ema_decay"):
        Trainer(llmc.TrainConfig(**settings, ema_decay=0.9))
    trainer = Trainer(llmc.TrainConfig(**settings, ema_decay=0.9, allow_changes=True))
    np.testing.assert_array_equal(trainer.run.average.tensor.to_host(), trainer.model.all_parameters().to_host())


def test_a_damaged_average_damages_its_checkpoint(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, ema_decay=0.9, checkpoint_every=4).run_dir
    path = run / "average_00000008.bin"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointDamaged, match=path.name):
        FoundCheckpoint.open(run, 8).verify()
    with pytest.warns(UserWarning, match="step 8 is damaged"):
        assert newest_model(run) == run / "average_00000004.bin"
    assert finished_steps(run) == [4, 8]
