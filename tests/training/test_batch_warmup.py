"""Updates that grow: from one micro-batch to total_batch_size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import VOCAB, cut_at, same_weights, tiny_run, tiny_settings, weights

import llmc
from llmc.training.logs import StepInfo
from llmc.training.report import short_report, startup_report
from llmc.training.settings import resolve
from llmc.training.trainer import Trainer

pytest_plugins = ["thread_ranks"]

GROWING = {"total_batch_size": 128, "batch_warmup_steps": 5}
MICRO_BATCHES = [1, 1, 2, 2, 3, 4, 4, 4]  # of 32 tokens, in each of 8 updates


def test_each_update_has_its_micro_batches(tmp_path: Path) -> None:
    """A loop written by hand gives the same bits."""
    settings = tiny_settings(tmp_path, **GROWING)
    result = llmc.train(**settings)
    config = llmc.GPT2Config(num_layers=1, num_heads=2, channels=16, max_seq_len=16, vocab_size=VOCAB)
    model = llmc.GPT2(config, seed=42, threads=1)
    optimizer = llmc.AdamW(model)
    loader = llmc.DataLoader([Path(settings["data"][0])], 2, 16, shuffle=True, seed=42)
    lr = llmc.lr_schedule("cosine", 1e-2, 2, 8, 0.1)
    for step, count in enumerate(MICRO_BATCHES):
        model.zero_grad()
        for _ in range(count):
            inputs, targets = loader.next_batch()
            model.forward(inputs)
            model.backward(targets, 1 / count)
        optimizer.step(lr(step))
        assert model.mean_loss == result.history["train_loss"][step]
    assert same_weights({k: np.array(v) for k, v in model.parameters.items()}, weights(result))


def test_what_is_said_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Kind: a number that is that of a full update. The speed is that of what was done."""
    seen: list[StepInfo] = []
    trainer = Trainer(
        llmc.TrainConfig(**tiny_settings(tmp_path, **GROWING, progress="brief")),
        callbacks=[lambda trainer, info: seen.append(info)],
    )
    table = startup_report(trainer.run, 8)
    assert "from 32, 5 steps" in table and table.endswith("=> setting grad_accum_steps=4 (growing from 1)")
    assert "8 steps of 128 tokens (growing from 32 over 5 steps)" in short_report(trainer.run, 8)
    trainer.fit()
    assert f"trained 8 steps ({32 * sum(MICRO_BATCHES):,} tokens) in" in capsys.readouterr().out
    flops = trainer.model.config.flops_per_token(16)
    done = [round(info.flops_per_second * info.seconds / flops) for info in seen]
    assert done == [32 * count for count in MICRO_BATCHES]


@pytest.mark.parametrize("step", [1, 3, 6])
def test_resume_goes_on_growing(tmp_path: Path, step: int) -> None:
    whole = tiny_run(tmp_path / "whole", **GROWING)
    settings = cut_at(tmp_path, step, **GROWING)
    resumed = llmc.train(**settings)
    assert resumed.history["train_loss"] == whole.history["train_loss"][step:]
    assert same_weights(weights(whole), weights(resumed))


@pytest.mark.parametrize(("step", "fits"), [(3, 2), (5, 8)])
def test_resume_with_another_batch_size_sees_the_same_samples(tmp_path: Path, step: int, fits: int) -> None:
    """One that does not divide the first update is taken when the last small one is made."""
    settings = cut_at(tmp_path, step, **GROWING)
    del settings["total_batch_size"]  # the checkpoint has it
    assert Trainer(llmc.TrainConfig(**{**settings, "batch_size": 8})).config.batch_size == fits
    one, two = (Trainer(llmc.TrainConfig(**{**settings, "batch_size": size})) for size in (1, fits))
    for _ in range(3):
        assert one.train_step().loss == pytest.approx(two.train_step().loss, rel=1e-5)
    assert one.train_loader.state()["row"] == two.train_loader.state()["row"]


def test_ranks_are_one_process(tmp_path: Path, in_ranks: Callable[..., list[Any]]) -> None:
    settings = {
        "channels": 64,
        "batch_size": 1,
        "total_batch_size": 128,
        "batch_warmup_steps": 3,
        "first_batch_size": 32,
    }
    losses = []
    for ranks in (1, 2):
        given = tiny_settings(tmp_path / str(ranks), **settings)
        losses.append(in_ranks(ranks, lambda rank: llmc.train(**given))[0].history["train_loss"])  # noqa: B023
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_an_epoch_has_more_steps(tmp_path: Path) -> None:
    assert tiny_run(tmp_path / "a", max_steps=-1, total_batch_size=128).step == 4000 // 128 == 31
    grown = tiny_run(tmp_path / "b", max_steps=-1, **GROWING)
    assert grown.step == 5 + (4000 - 32 * sum(MICRO_BATCHES[:5])) // 128 == 34


def test_a_batch_that_never_is_whole_is_said(tmp_path: Path) -> None:
    settings = {**GROWING, "batch_warmup_steps": 8}
    remarks = Trainer(llmc.TrainConfig(**tiny_settings(tmp_path, **settings))).run.remarks
    assert remarks == ["warning: batch_warmup_steps is 8 of 8 steps in all: the last update has 96 of 128 tokens"]


def test_memory_for_adding_up_is_planned(tmp_path: Path) -> None:
    """Gradients of a micro-batch beside their sum, though the first update is one micro-batch."""
    whole = Trainer(llmc.TrainConfig(**tiny_settings(tmp_path / "a", total_batch_size=128))).run.memory
    grown = Trainer(llmc.TrainConfig(**tiny_settings(tmp_path / "b", **GROWING))).run.memory
    assert grown.gradients == whole.gradients == 2 * grown.parameters


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_batch_size": 32}, r"batch_warmup_steps is 5: expected a total_batch_size \(it is 32\) that is a multiple of first"),
        ({"first_batch_size": 96}, r"\(it is 128\) that is a multiple of first_batch_size \(96\) and greater"),
        ({"first_batch_size": 48}, "first_batch_size is 48, expected a multiple of .* 32: 64 is the nearest; or give --batch-size 1"),
        ({"batch_warmup_steps": 0, "first_batch_size": 32}, "first_batch_size is 32, but batch_warmup_steps is 0: expected the number"),
        ({"max_steps": -1, "total_batch_size": 8192, "first_batch_size": 4096}, r"less than the 4096 .*\(first_batch_size\)"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_run(tmp_path, **{**GROWING, **changes})


def test_processes_that_cannot_divide_the_first_update() -> None:
    saved = {"total_batch_size": 4096, "first_batch_size": 256, "batch_warmup_steps": 9}
    given = llmc.TrainConfig(batch_warmup_steps=9, seq_len=128)
    with pytest.raises(ValueError, match="first_batch_size is 256, .*; continue with 2 processes"):
        resolve(given, "cpu", ranks=4, saved=saved, begun=8)
    config = resolve(given, "cpu", ranks=4, saved=saved, begun=9)
    assert (config.batch_size, config.total_batch_size, config.first_batch_size) == (8, 4096, 256)
