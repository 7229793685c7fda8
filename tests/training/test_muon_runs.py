"""Runs with Muon: their checkpoints, resuming, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import VOCAB, cut_at, same_weights, tiny_run, tiny_settings, weights

import llmc
from llmc.checkpoint import finished_steps
from llmc.formats.manifest import signed
from llmc.formats.state_file import join_master
from llmc.training.report import short_report, startup_report
from llmc.training.trainer import Trainer

MUON: dict[str, Any] = {"optimizer": "muon", "weight_decay": 0.1, "total_batch_size": 64}
STATE = "state_00000003_00000.bin"
MATRICES = ("qkvw", "attprojw", "fcw", "fcprojw")


def test_the_settings_are_the_optimizers(tmp_path: Path) -> None:
    """A loop written by hand gives the same bits."""
    changes = {"muon_momentum": 0.9, "muon_lr_ratio": 3.0, "beta2": 0.99, "eps": 1e-7, "grad_clip": 0.5}
    settings = tiny_settings(tmp_path, **MUON, **changes)
    result = llmc.train(**settings)
    config = llmc.GPT2Config(num_layers=1, num_heads=2, channels=16, max_seq_len=16, vocab_size=VOCAB)
    model = llmc.GPT2(config, seed=42, threads=1)
    options: dict[str, Any] = {"betas": (0.9, 0.99), "eps": 1e-7, "weight_decay": 0.1, "grad_clip": 0.5}
    optimizer = llmc.Muon(model, momentum=0.9, lr_ratio=3.0, **options)
    loader = llmc.DataLoader([Path(settings["data"][0])], 2, 16, shuffle=True, seed=42)
    lr = llmc.lr_schedule("cosine", 1e-2, 2, 8, 0.1)
    for step in range(8):
        model.zero_grad()
        for _ in range(2):
            inputs, targets = loader.next_batch()
            model.forward(inputs)
            model.backward(targets, 0.5)
        optimizer.step(lr(step))
        assert model.mean_loss == result.history["train_loss"][step]
    assert same_weights({k: np.array(v) for k, v in model.parameters.items()}, weights(result))


@pytest.mark.parametrize(
    ("dtype", "master_weights", "background"), [("f32", True, True), ("bf16", True, True), ("bf16", False, False)]
)
def test_resume_is_bit_identical(tmp_path: Path, dtype: str, master_weights: bool, background: bool) -> None:
    options = {**MUON, "dtype": dtype, "master_weights": master_weights, "async_save": background}
    tiny_run(tmp_path / "whole", **options)
    settings = cut_at(tmp_path / "cut", 3, **options)
    llmc.train(**settings)
    for name in ("model_00000008.bin", "state_00000008_00000.bin"):
        assert (tmp_path / "cut/run" / name).read_bytes() == (tmp_path / "whole/run" / name).read_bytes()


def test_the_state_file_has_one_moment_of_matrices(tmp_path: Path) -> None:
    """As doc/formats.md says, and as large as is said before the first step."""
    settings = cut_at(tmp_path, 3, **MUON, dtype="bf16", shuffle=False)
    trainer = Trainer(llmc.TrainConfig(**settings))
    raw = (tmp_path / "run" / STATE).read_bytes()
    assert list(np.frombuffer(raw[:32], "<i4")) == [20240527, 2, 1, 0, 1, 0, int.from_bytes(b"llmc", "little"), 1]
    rows = trainer.optimizer.state()
    assert {name for name, row in rows.items() if len(row.moments) == 1} == set(MATRICES)
    first = [row.moments[0] for row in rows.values()]
    second = [row.moments[1] for name, row in rows.items() if name not in MATRICES]
    moments = np.concatenate([tensor.to_host().ravel() for tensor in first + second])
    high = np.concatenate([t.to_host().ravel() for t in trainer.model.parameter_tensors().values()])
    masters = join_master(high, np.concatenate([row.master.to_host().ravel() for row in rows.values()]))
    assert raw[1024:] == moments.tobytes() + masters.tobytes() and np.count_nonzero(moments) > len(moments) // 2
    files = (tmp_path / "run" / name for name in (STATE, "model_00000003.bin"))
    assert trainer._checkpointer is not None
    needed, _ = trainer._checkpointer.check_space(trainer.model, trainer.optimizer)
    assert needed == sum(path.stat().st_size - 1024 for path in files)


@pytest.mark.parametrize(("old", "new"), [("f32", "bf16"), ("bf16", "f32")])
def test_resume_in_another_dtype(tmp_path: Path, old: str, new: str) -> None:
    settings = cut_at(tmp_path, 3, **MUON, dtype=old)
    before, after = (Trainer(llmc.TrainConfig(**{**settings, "dtype": dtype})) for dtype in (old, new))
    for name, row in before.optimizer.state().items():
        for a, b in zip(row.moments, after.optimizer.state()[name].moments, strict=True):
            assert np.array_equal(a.to_host(), b.to_host()), name
    assert abs(before.train_step().loss - after.train_step().loss) < 0.02


# ---- another optimizer ----


@pytest.mark.parametrize(("old", "new"), [("adamw", "muon"), ("muon", "adamw")])
@pytest.mark.parametrize("allowed", [True, False])
def test_the_other_optimizer_is_refused(tmp_path: Path, old: str, new: str, allowed: bool) -> None:
    settings = cut_at(tmp_path, 3, optimizer=old)
    message = (
        f"the checkpoint of step 3 has the state of {old}, the run's optimizer is {new}: give --optimizer {old}, or"
    )
    with pytest.raises(ValueError, match=message):
        Trainer(llmc.TrainConfig(**{**settings, "optimizer": new, "allow_changes": allowed}))
    assert Trainer(llmc.TrainConfig(**settings)).step == 3


def test_a_new_run_with_the_weights_of_the_other(tmp_path: Path) -> None:
    cut_at(tmp_path, 3)
    anew = tiny_settings(tmp_path, **MUON, model=str(tmp_path / "run"), output_dir=str(tmp_path / "anew"))
    for name in ("layers", "heads", "channels", "max_seq_len"):
        del anew[name]
    assert llmc.train(**anew).step == 8 and finished_steps(tmp_path / "anew") == [8]


def test_a_checkpoint_of_llm_c_or_of_an_older_llmc_is_adamws(tmp_path: Path) -> None:
    settings = cut_at(tmp_path, 3)
    done, state = (tmp_path / "run" / name for name in ("DONE_00000003", STATE))
    manifest = json.loads(done.read_bytes())["manifest"]
    for name in ("optimizer", "muon_momentum", "muon_lr_ratio", "batch_warmup_steps", "first_batch_size", "decay_frac"):
        del manifest["config"][name]
    done.write_text(signed(manifest))
    assert Trainer(llmc.TrainConfig(**settings)).step == 3
    raw = bytearray(state.read_bytes())
    raw[24:28] = bytes(4)
    state.write_bytes(raw)
    done.write_bytes(b"")
    assert Trainer(llmc.TrainConfig(**settings)).step == 3
    with pytest.raises(ValueError, match="has the state of adamw, the run's optimizer is muon"):
        Trainer(llmc.TrainConfig(**{**settings, "optimizer": "muon"}))


# ---- what is said ----


@pytest.mark.parametrize(("dtype", "master_weights"), [("f32", True), ("bf16", True), ("bf16", False)])
def test_memory_is_planned(tmp_path: Path, dtype: str, master_weights: bool) -> None:
    shape = {"layers": 3, "channels": 64}
    trainer = Trainer(
        llmc.TrainConfig(**tiny_settings(tmp_path, **MUON, **shape, dtype=dtype, master_weights=master_weights))
    )
    assert 0 <= trainer.optimizer.bytes - trainer.run.memory.optimizer < 256 * 60  # each tensor is aligned to 256 bytes
    sizes = {name: tensor.numel for name, tensor in trainer.model.parameter_tensors().items()}
    whole = llmc.AdamW.planned_bytes(trainer.model.config, dtype, master_weights)
    assert trainer.run.memory.optimizer < whole - 4 * sum(sizes[name] for name in MATRICES) + 4 * sizes["fcw"]


def test_the_report_says_it(tmp_path: Path) -> None:
    run = Trainer(llmc.TrainConfig(**tiny_settings(tmp_path, **MUON, muon_lr_ratio=2.5))).run
    assert "| optimizer             | Muon, momentum 0.95, LR ratio 2.5 " in startup_report(run, 8)
    assert "of 64 tokens, Muon, f32, " in short_report(run, 8)
    plain = Trainer(llmc.TrainConfig(**tiny_settings(tmp_path / "plain"))).run
    assert "Muon" not in startup_report(plain, 8) + short_report(plain, 8)
