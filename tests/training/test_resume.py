"""Resuming: it gives the same bits and refuses what does not fit; runs go on if a save or a log fails."""

from __future__ import annotations

import errno
import glob
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
from disks import FailingFs
from runs import cut_at, same_weights, tiny_run, tiny_settings, weights

import llmc
from llmc.checkpoint import Checkpointer, FoundCheckpoint, finished_steps
from llmc.cli import train_main
from llmc.formats.manifest import signed
from llmc.formats.shards import write_shard
from llmc.formats.state_file import join_master
from llmc.formats.stream import CheckpointDamaged
from llmc.system.fs import Fs, shell_word
from llmc.training.logs import LineConsole, Log, Logs, MainLog, StepInfo
from llmc.training.settings import SAME_ON_RESUME, SETTINGS, defaults, load_toml, resolve
from llmc.training.sources import prepare
from llmc.training.trainer import Trainer, TrainingStopped


def everything(trainer: Trainer) -> list[Any]:
    """Return all state of a trainer: weights, moments, masters, data order, generators, windows of losses and norms."""
    rows = trainer.optimizer.state()
    tensors = [t.to_host() for row in rows.values() for t in (*row.moments, row.master) if t is not None]
    loader = trainer.train_loader.state()
    windows = [trainer.loss_outliers.state(), trainer.grad_outliers.state()]
    return [
        *trainer.model.parameters.values(),
        *tensors,
        loader,
        windows,
        trainer.optimizer.rng_state,
        trainer.step,
    ]


def equal(a: list[Any], b: list[Any]) -> bool:
    def same(x: Any, y: Any) -> bool:
        if isinstance(x, dict):
            return x.keys() == y.keys() and all(
                np.array_equal(x[k], y[k]) if k != "rng" else repr(x[k]) == repr(y[k]) for k in x
            )
        return np.array_equal(
            np.asarray(x).view(np.uint8) if isinstance(x, np.ndarray) else x,
            np.asarray(y).view(np.uint8) if isinstance(y, np.ndarray) else y,
        )

    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("master_weights", [True, False])
@pytest.mark.parametrize("background", [True, False])
def test_resume_is_bit_identical(tmp_path: Path, dtype: str, master_weights: bool, background: bool) -> None:
    options = {"dtype": dtype, "master_weights": master_weights, "async_save": background, "total_batch_size": 64}
    whole = Trainer(llmc.TrainConfig(**tiny_settings(tmp_path / "whole", **options)))
    whole.fit()
    options["checkpoint_every"] = 3

    class Stop(llmc.Callback):
        def on_step(self, trainer: Trainer, info: Any) -> None:
            if info.step == 4:
                raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        llmc.train(**tiny_settings(tmp_path / "cut", **options), callbacks=[Stop()])
    resumed = Trainer(llmc.TrainConfig(**tiny_settings(tmp_path / "cut", **options, resume=True)))
    assert resumed.step == 3
    resumed.fit()
    assert equal(everything(whole), everything(resumed))
    log = {line.split()[0]: line for line in (tmp_path / "cut/run/main.log").read_text().splitlines() if "trl" in line}
    log_whole = {
        line.split()[0]: line for line in (tmp_path / "whole/run/main.log").read_text().splitlines() if "trl" in line
    }
    assert log == log_whole


def test_resume_with_another_batch_size_sees_the_same_samples(tmp_path: Path) -> None:
    settings = cut_at(tmp_path, 3, total_batch_size=128, batch_size=4)
    same = Trainer(llmc.TrainConfig(**settings))
    other = Trainer(llmc.TrainConfig(**{**settings, "batch_size": 2}))
    for _ in range(70):  # past the end of an epoch
        a = np.concatenate([same.train_loader.next_batch()[0] for _ in range(2)])
        b = np.concatenate([other.train_loader.next_batch()[0] for _ in range(4)])
        assert np.array_equal(a, b)


@pytest.mark.parametrize(("old", "new"), [("f32", "bf16"), ("bf16", "f32")])
def test_resume_in_another_dtype(tmp_path: Path, old: str, new: str) -> None:
    settings = cut_at(tmp_path, 4, dtype=old)
    before = Trainer(llmc.TrainConfig(**settings))
    after = Trainer(llmc.TrainConfig(**{**settings, "dtype": new}))
    whole, narrow = (before, after) if old == "f32" else (after, before)
    rows = narrow.optimizer.state()
    for name, array in whole.model.parameters.items():
        joined = join_master(
            narrow.model.parameter_tensors()[name].to_host().ravel(), rows[name].master.to_host().ravel()
        )
        assert np.array_equal(joined, array.ravel()), name
    assert abs(before.train_step().loss - after.train_step().loss) < 0.02


def test_resume_from_a_checkpoint_of_llm_c(tmp_path: Path) -> None:
    """llm.c's DONE file is empty, and its state file does not have llmc's mark."""
    settings = cut_at(tmp_path, 3)
    run = Path(settings["output_dir"])
    (run / "DONE_00000003").write_bytes(b"")
    state = bytearray((run / "state_00000003_00000.bin").read_bytes())
    state[24:28] = bytes(4)
    (run / "state_00000003_00000.bin").write_bytes(state)
    trainer = Trainer(llmc.TrainConfig(**settings))
    assert trainer.step == 3
    trainer.fit()
    assert same_weights(
        {k: np.array(v) for k, v in trainer.model.parameters.items()}, weights(tiny_run(tmp_path / "whole"))
    )


def test_resume_without_a_checkpoint_begins_anew(tmp_path: Path) -> None:
    assert same_weights(weights(tiny_run(tmp_path / "a", resume=True)), weights(tiny_run(tmp_path / "b")))


def test_data_that_vanish_do_not_keep_a_run_from_saving(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path)
    trainer = Trainer(llmc.TrainConfig(**settings))
    trainer.train_step()
    Path(settings["data"][0]).rename(tmp_path / "gone.bin")
    trainer.save()
    Path(tmp_path / "gone.bin").rename(settings["data"][0])
    assert Trainer(llmc.TrainConfig(**settings, resume=True)).step == 1


# ---- what is refused ----


@pytest.mark.parametrize("changes", [{"learning_rate": 1.0}, {"warmup_steps": 9}, {"seed": 1}, {"shuffle": False}])
def test_changed_settings_are_refused_unless_allowed(tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = cut_at(tmp_path, 2)
    (name,) = changes
    with pytest.raises(ValueError, match=f"the checkpoint of step 2 was made with other settings: {name} was "):
        Trainer(llmc.TrainConfig(**{**settings, **changes}))
    assert Trainer(llmc.TrainConfig(**{**settings, **changes, "allow_changes": True})).step == 2


# ---- a run that has ended, and a longer one ----


def test_a_run_that_has_ended_says_so_and_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tiny_settings(tmp_path, sample_every=8, progress="lines")
    first = llmc.train(**settings)
    run = str(tmp_path / "run")
    before = {path: path.read_bytes() for path in sorted((tmp_path / "run").iterdir()) if path.name != "config.toml"}
    capsys.readouterr()
    assert train_main(["--resume", run]) == 0
    loss = first.history["val_loss"][-1]
    expected = f"{run} is finished: step 8 of 8, validation loss {loss:.4f}. To go on:\n  llmc train --resume {run} --max-steps 16\n"
    assert capsys.readouterr().out == expected.replace(f"resume {run}", f"resume {shell_word(run)}")
    assert before == {path: path.read_bytes() for path in before}
    again = llmc.train(**settings, resume=True)
    assert again.step == 8 and not again.history["step"] and not again.stopped_early
    assert same_weights(weights(first), weights(again))


def test_a_run_that_was_killed_before_its_last_validation_makes_it(tmp_path: Path) -> None:
    class Kill(llmc.Callback):
        def on_eval(self, trainer: Trainer, step: int, loss: float) -> None:
            if step == 8:
                raise RuntimeError("power cut")

    settings = tiny_settings(tmp_path)
    with pytest.raises(RuntimeError, match="power cut"):
        llmc.train(**settings, callbacks=[Kill()])
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if '"step": 8' not in line))
    assert llmc.train(**settings, resume=True).history["val_step"] == [8]
    assert llmc.train(**settings, resume=True).history["val_step"] == []


@pytest.mark.parametrize(
    ("schedule", "step", "said"),
    [
        ("cosine", 8, "the learning rate is 0.0065 from step 8 on, as cosine over 16 steps has it; over 8 steps it was 0.001 at its end"),
        ("cosine", 4, "the learning rate is 0.00955 from step 4 on, as cosine over 16 steps has it; over 8 steps it was 0.00775 there"),
        ("linear", 8, "the learning rate is 0.00614 from step 8 on, as linear over 16 steps has it; over 8 steps it was 0.001 at its end"),
        ("wsd", 8, "the learning rate is 0.01 from step 8 on, as wsd over 16 steps has it, and falls from step 12 on; over 8 steps"),
        ("wsd", 4, "the learning rate goes on at 0.01, and falls from step 12 on"),
        ("constant", 8, "the learning rate goes on at 0.01"),
    ],
)  # fmt: skip
def test_a_longer_run_needs_no_consent_and_says_what_happens_to_the_rate(
    tmp_path: Path, schedule: str, step: int, said: str
) -> None:
    settings = cut_at(tmp_path, step, schedule=schedule, final_lr_frac=0.1)
    longer = Trainer(llmc.TrainConfig(**{**settings, "max_steps": 16}))
    (remark,) = longer.run.remarks
    assert remark.startswith(f"max_steps was 8, is 16: {said}")
    whole = llmc.lr_schedule(schedule, 1e-2, 2, 16, 0.1)
    assert [longer.lr(s) for s in range(17)] == [whole(s) for s in range(17)]
    if (schedule, step) == ("cosine", 8):
        assert longer.fit().history["step"] == list(range(8, 16))
        assert said in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_run_cannot_be_shorter_than_it_is(tmp_path: Path) -> None:
    settings = cut_at(tmp_path, 5)
    for allowed in (False, True):
        with pytest.raises(ValueError, match=r"max_steps is 4, but .*run is at step 5: expected 5 or more"):
            Trainer(llmc.TrainConfig(**{**settings, "max_steps": 4, "allow_changes": allowed}))
    assert Trainer(llmc.TrainConfig(**{**settings, "max_steps": 5})).fit().history["step"] == []
    assert Trainer(llmc.TrainConfig(**{**settings, "max_steps": 7})).fit().step == 7
    epoch = {**settings, "max_steps": -1, "total_batch_size": 32 * 64, "allow_changes": True}
    with pytest.raises(ValueError, match=r"max_steps is -1 \(one epoch: 1 step\), but .*run is at step 7"):
        Trainer(llmc.TrainConfig(**epoch))


def test_a_run_that_is_resumed_without_a_number_of_steps_keeps_its_own(tmp_path: Path) -> None:
    """-y 1 with no -x would mean the default's, and end a longer run early."""
    settings = cut_at(tmp_path, 5, max_steps=900)
    trainer = Trainer(llmc.TrainConfig(**{**settings, "max_steps": None}))
    assert trainer.total_steps == 900 and not trainer.run.remarks


def test_a_setting_that_an_older_checkpoint_does_not_have_was_its_default(tmp_path: Path) -> None:
    settings = cut_at(tmp_path, 2)
    done = Path(settings["output_dir"]) / "DONE_00000002"
    manifest = json.loads(done.read_bytes())["manifest"]
    newer = ("muon_momentum", "beta2", "shuffle")  # as if they had been added after the checkpoint was written
    for name in newer:
        assert name in SAME_ON_RESUME
        del manifest["config"][name]
    done.write_text(signed(manifest))
    assert Trainer(llmc.TrainConfig(**settings)).step == 2
    with pytest.raises(ValueError, match="other settings: beta2 was 0.95, is 0.9"):
        Trainer(llmc.TrainConfig(**{**settings, "beta2": 0.9}))


def test_a_small_run_goes_on_without_what_its_llmc_did_not_have(tmp_path: Path) -> None:
    """Though a new one has it: its optimizer, its order of samples and its weights are those of llm.c's defaults."""
    settings = cut_at(tmp_path, 2)
    done = Path(settings["output_dir"]) / "DONE_00000002"
    manifest = json.loads(done.read_bytes())["manifest"]
    newer = {"optimizer": "adamw", "rows_per_sample": 0, "position_init": "normal"}
    for name, value in newer.items():
        assert settings.pop(name) == manifest["config"].pop(name) == value != SETTINGS[name].small
    done.write_text(signed(manifest))
    config = Trainer(llmc.TrainConfig(**settings)).config
    assert {name: getattr(config, name) for name in newer} == newer
    with pytest.raises(ValueError, match="position_init was normal, is sines"):
        Trainer(llmc.TrainConfig(**settings, position_init="sines"))


def test_a_resumed_run_keeps_its_warm_up(tmp_path: Path) -> None:
    """That which it began with, by whatever rule: older ones had 40 steps however short the run."""
    flags = {"warmup_steps": None, "max_steps": 30}
    settings = cut_at(tmp_path, 2, **flags)
    assert load_toml(tmp_path / "run" / "config.toml")["warmup_steps"] == 15
    assert Trainer(llmc.TrainConfig(**settings)).config.warmup_steps == 15
    older = cut_at(tmp_path / "older", 2, warmup_steps=40, max_steps=30)
    resumed = Trainer(llmc.TrainConfig(**{**older, **flags}))
    assert resumed.config.warmup_steps == 40
    assert [resumed.lr(step) for step in range(30)] == [1e-2 * (step + 1) / 40 for step in range(30)]


def test_defaults_are_those_of_a_run_with_that_model() -> None:
    assert defaults(None)["warmup_steps"] == 90 and "model" not in defaults(None)
    assert defaults("d12")["warmup_steps"] == 0 and defaults("d12")["model"] == "d12"


def test_a_generator_at_zero_is_refused_in_a_checkpoint_of_llmc(tmp_path: Path) -> None:
    """llm.c may save a zero, in whose place a seed is taken; a manifest that has one is wrong."""
    settings = cut_at(tmp_path, 2)
    run = Path(settings["output_dir"])
    done, state = run / "DONE_00000002", run / "state_00000002_00000.bin"
    manifest = json.loads(done.read_bytes())["manifest"]
    manifest["state"]["optimizer_rng"] = 0
    done.write_text(signed(manifest))
    with pytest.raises(ValueError, match="rng_state is 0"):
        Trainer(llmc.TrainConfig(**settings))
    done.write_bytes(b"")
    raw = bytearray(state.read_bytes())
    raw[24:28], raw[80:88] = bytes(4), bytes(8)
    state.write_bytes(raw)
    assert Trainer(llmc.TrainConfig(**settings)).optimizer.rng_state == 13371337


def test_changed_data_are_refused(tmp_path: Path) -> None:
    settings = cut_at(tmp_path, 2)
    write_shard(Path(settings["data"][0]), np.zeros(4000, dtype=np.uint32), vocab_size=61)
    with pytest.raises(ValueError, match=r"the data changed \(train.bin\)"):
        Trainer(llmc.TrainConfig(**settings))


def test_consent_holds_for_one_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Kind: what one command line writes that a later one obeys."""
    settings = tiny_settings(tmp_path, max_steps=2)
    run = str(tmp_path / "run")
    (tmp_path / "c.toml").write_text(llmc.TrainConfig(**settings).to_toml())
    assert train_main(["--config", str(tmp_path / "c.toml")]) == 0
    assert train_main(["--resume", run, "--max-steps", "4", "--beta1", "0.8", "--allow-changes"]) == 0
    assert finished_steps(run) == [2, 4]
    kept = load_toml(tmp_path / "run" / "config.toml")
    assert kept["max_steps"] == 4 and not of_call(kept)
    assert train_main(["--resume", run, "--seed", "7"]) == 2
    assert "seed was 42, is 7" in capsys.readouterr().err
    with open(tmp_path / "run" / "config.toml", "a") as file:  # as an older llmc wrote it
        file.write("allow_changes = true\nmax_restarts = 3\nprogress = 'lines'\n")
    assert train_main(["--resume", run, "--seed", "7"]) == 2
    assert train_main(["--resume", run]) == 0


def of_call(names: Iterable[str]) -> set[str]:
    return {name for name in names if SETTINGS[name].on_resume == "given anew"}


def test_which_settings_hold_for_one_call() -> None:
    """They are consent, the place of the run, who computes and watches it; a new setting is to be thought of here."""
    # fmt: off
    assert of_call(SETTINGS) == {
        "output_dir", "resume", "allow_changes", "progress", "processes", "rank", "gpus_per_node", "dist_init", "dist_dir",
        "dist_host", "dist_port", "dist_timeout", "max_restarts", "zero_stage",
    }
    # fmt: on
    config = llmc.TrainConfig(
        **{name: SETTINGS[name].default for name in SETTINGS},
    )
    assert not of_call(resolve(config.replace(allow_changes=True), "cpu").to_dict())


# ---- the data of a run that is resumed: kind: what a run has is not asked for again ----


@pytest.fixture
def text_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Train on a text that is named by a relative path; return the run directory. The present directory is then another."""
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    monkeypatch.chdir(tmp_path / "first")
    Path("my.txt").write_text("one two three. " * 200)
    text = {"data": ("my.txt",), "val_data": (), "tokenizer": "bpe:270", "vocab_size": None, "output_dir": "run"}
    tiny_run(tmp_path, **text)
    monkeypatch.chdir(tmp_path / "second")
    return tmp_path / "first" / "run"


MORE = ["--max-steps", "9"]


def test_resume_from_another_directory_finds_the_text(text_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("my.txt").write_text("another text of the same name. " * 200)
    assert train_main(["--resume", str(text_run), *MORE]) == 0
    assert "own tokens" not in capsys.readouterr().out and finished_steps(text_run) == [8, 9]
    (text_run.parent / "my.txt").write_text("four five six. " * 200)  # a text that is there is compared
    assert train_main(["--resume", str(text_run)]) == 2
    assert "is not what the run was trained on" in capsys.readouterr().err


def test_resume_with_a_text_that_may_not_be_read(text_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = text_run.parent / "my.txt"
    text.chmod(0)
    if os.access(text, os.R_OK):
        pytest.skip("this user, or this system, reads any file")
    assert train_main(["--resume", str(text_run), "--progress", "lines", *MORE]) == 0
    assert "going on from the run's own tokens in " in capsys.readouterr().out


@pytest.mark.parametrize("what", ["the text is gone", "run and tokens on another machine"])
def test_resume_without_the_text(text_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    if what == "the text is gone":
        (text_run.parent / "my.txt").unlink()
    else:
        text_run = Path(shutil.move(text_run, tmp_path / "second" / "moved"))
        shutil.rmtree(tmp_path / "first")
    assert train_main(["--resume", str(text_run), "--progress", "lines", *MORE]) == 0
    assert "no files match 'my.txt': going on from the run's own tokens in " in capsys.readouterr().out
    assert finished_steps(text_run) == [8, 9]
    assert train_main(["--resume", str(text_run), "--data", "other.txt"]) == 2  # which this call names
    assert "no files match 'other.txt'" in capsys.readouterr().err


def test_a_run_keeps_the_tokenizer_that_was_found_beside_its_model(
    text_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model may be named by a relative path, too, or be gone."""
    source = text_run / "data" / "source.json"
    monkeypatch.setattr("llmc.training.sources._tokenizer_of", lambda model: "gpt2")
    config = llmc.TrainConfig(**load_toml(text_run / "config.toml"), output_dir=str(text_run), resume=True)
    found = prepare(config.replace(tokenizer=None), text_run)
    assert found.tokenizer is not None and 257 < found.tokenizer.vocab_size <= 270
    assert json.loads(source.read_text())["tokenizer"] == "bpe:270"


def test_standard_input_and_the_language_reference_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = {"val_data": (), "tokenizer": "bpe:270", "vocab_size": None}
    monkeypatch.setattr("llmc.training.sources.library_docstrings", list)
    monkeypatch.setattr("llmc.training.sources.language_reference", lambda: ["of one Python. " * 200])
    tiny_run(tmp_path, **text, data=())
    monkeypatch.setattr("llmc.training.sources.language_reference", lambda: ["of the next Python. " * 200])
    assert tiny_run(tmp_path, **text, data=(), resume=True).step == 8
    config = llmc.TrainConfig(**tiny_settings(tmp_path, **text, data=("-",)))
    (tmp_path / "run" / "config.toml").write_text(config.to_toml())
    assert tiny_run(tmp_path, **text, data=("-",), resume=True).step == 8


def test_token_files_and_their_tokenizer_from_another_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "a [glob]", tmp_path / "second"
    second.mkdir()
    settings = tiny_settings(first, data=("data/tr*.bin",), val_data=("data/val.bin",), output_dir="run")
    monkeypatch.chdir(first)
    llmc.Tokenizer.train_bpe("one two three. " * 20, 61 + 200).save("mine.bin")
    settings.update(tokenizer="mine.bin", vocab_size=300, max_steps=2)
    llmc.train(**settings)
    monkeypatch.chdir(second)
    run = str(first / "run")
    assert train_main(["--resume", run, *MORE]) == 0
    assert load_toml(first / "run" / "config.toml")["data"] == [glob.escape(str(first)) + os.sep + "data/tr*.bin"]
    assert finished_steps(run)[-1] == 9
    (first / "data").rename(second / "elsewhere")
    assert train_main(["--resume", run]) == 2
    said = capsys.readouterr().err
    assert "no files match" in said and "give --data with the place where the run's data are now" in said
    assert train_main(["--resume", run, "--data", "elsewhere/train.bin", "--val-data", "elsewhere/val.bin"]) == 0


def test_config_toml_holds_every_name(tmp_path: Path) -> None:
    """Kind: a name that the run takes must not break the file that keeps it. What is no Unicode, no TOML holds."""
    (tmp_path / "c.toml").write_bytes(
        llmc.TrainConfig(data=("del\x7f", "\x01\u2028"), prompt="\udcff").to_toml(str(tmp_path)).encode()
    )
    values = load_toml(tmp_path / "c.toml")
    assert values["data"] == ["del\x7f", "\x01\u2028"] and values["prompt"] == "?"


def test_a_wrong_value_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("layers = 0\n")
    with pytest.raises(ValueError, match=r"c\.toml: layers is 0, expected 1 to 2147483647"):
        load_toml(tmp_path / "c.toml")


def test_changed_text_is_refused_before_anything_is_overwritten(tmp_path: Path) -> None:
    text = tmp_path / "my.txt"
    text.write_text("one two three. " * 200)
    shape = {"data": (str(text),), "val_data": (), "tokenizer": "bpe:270", "vocab_size": None}
    tiny_run(tmp_path, **shape, checkpoint_every=8)
    run = tmp_path / "run"
    before = {name: (run / name).read_bytes() for name in ("data/train.bin", "tokenizer.bin")}
    text.write_text("four five six. " * 200)
    for resume in (True, False):
        with pytest.raises(ValueError, match="is not what the run was trained on|has checkpoints of an earlier run"):
            tiny_run(tmp_path, **shape, resume=resume)
    assert before == {name: (run / name).read_bytes() for name in before}
    trainer = Trainer(llmc.TrainConfig(**tiny_settings(tmp_path, **shape, resume=True, allow_changes=True)))
    assert trainer.step == 8 and trainer.tokenizer is not None
    assert (run / "tokenizer.bin").read_bytes() == before["tokenizer.bin"]
    assert "four" in trainer.tokenizer.decode(int(t) for t in trainer.train_loader.next_batch()[0].ravel())


def test_a_run_directory_in_use_is_not_overwritten(tmp_path: Path) -> None:
    settings = cut_at(tmp_path, 2)
    with pytest.raises(ValueError, match=r"has checkpoints of an earlier run \(step 2\): continue it with --resume"):
        Trainer(llmc.TrainConfig(**{**settings, "resume": False}))


def test_damage_is_named_and_the_run_goes_on_from_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = cut_at(tmp_path, 1)
    trainer = Trainer(llmc.TrainConfig(**settings))
    trainer.train_step()
    trainer.save()
    path = tmp_path / "run" / "state_00000002_00000.bin"
    path.write_bytes(path.read_bytes()[:-1])
    assert Trainer(llmc.TrainConfig(**settings)).step == 1
    printed = capsys.readouterr().out
    assert "checkpoint of step 2 is damaged and passed over" in printed and path.name in printed


def test_no_whole_checkpoint_is_an_error(tmp_path: Path) -> None:
    settings = cut_at(tmp_path, 2)
    (Path(settings["output_dir"]) / "model_00000002.bin").unlink()
    with pytest.raises(CheckpointDamaged, match="no checkpoint is whole"):
        Trainer(llmc.TrainConfig(**settings))


def test_one_process_at_a_time_in_a_run_directory(tmp_path: Path) -> None:
    trainer = Trainer(llmc.TrainConfig(**tiny_settings(tmp_path)))
    with filelock.FileLock(tmp_path / "run" / ".lock", timeout=0):
        with pytest.raises(llmc.Error, match="another process"):
            trainer.fit()
        before = (tmp_path / "run" / "config.toml").read_bytes()
        with pytest.raises(llmc.Error, match="another process"):  # nor does it write there
            Trainer(llmc.TrainConfig(**tiny_settings(tmp_path, learning_rate=0.5)))
        assert (tmp_path / "run" / "config.toml").read_bytes() == before
    assert trainer.fit().step == 8


# ---- what a run keeps ----


def test_checkpoint_every(tmp_path: Path) -> None:
    """-n 0 saves at the end only, whatever the model; -n -1 never saves."""
    tiny_run(tmp_path)
    assert finished_steps(tmp_path / "run") == [8]
    tiny_run(tmp_path / "never", checkpoint_every=-1)
    assert finished_steps(tmp_path / "never" / "run") == []


def test_keep_and_major(tmp_path: Path) -> None:
    tiny_run(tmp_path, checkpoint_every=1, keep_checkpoints=2, major_every=3)
    assert finished_steps(tmp_path / "run") == [3, 6, 7, 8]
    models = sorted(p.name for p in (tmp_path / "run").glob("model_*.bin"))
    assert models == [f"model_{s:08d}.bin" for s in (3, 6, 7, 8)]


def test_best_model_is_kept(tmp_path: Path) -> None:
    result = tiny_run(tmp_path, save_best=True, max_steps=40, val_every=5)
    best = llmc.GPT2.from_checkpoint(tmp_path / "run" / "best.bin")
    loader = llmc.DataLoader([tmp_path / "data" / "val.bin"], 2, 16)
    loss = np.mean([best.evaluate(*loader.next_batch()) for _ in range(2)])
    assert loss == pytest.approx(min(result.history["val_loss"][1:]), abs=1e-6)


def test_what_fails_after_the_last_step_does_not_cost_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Trainer, **options: Any) -> str:
        if self.step < 8:
            return "a sample"
        raise RuntimeError("no sample")

    monkeypatch.setattr(Trainer, "sample", fail)
    with pytest.raises(RuntimeError, match="no sample"):
        tiny_run(tmp_path, sample_every=8)
    FoundCheckpoint.open(tmp_path / "run", 8).verify()


# ---- saves that fail ----


def test_on_save_error_stop(tmp_path: Path) -> None:
    fs = FailingFs()
    fs.fail_at(3, OSError(errno.ENOSPC, "No space left on device"))
    trainer = Trainer(llmc.TrainConfig(**tiny_settings(tmp_path, checkpoint_every=2, on_save_error="stop")), fs=fs)
    with pytest.raises(TrainingStopped, match=r"No space left on device.*; there is no earlier one"):
        trainer.fit()


class SmallDisk(Fs):
    """A disk with some bytes free, however much is written."""

    def __init__(self, free: int) -> None:
        self.free = free

    def free_bytes(self, path: Path) -> int:
        return self.free


def test_failed_final_save_is_an_error(tmp_path: Path) -> None:
    disk = SmallDisk(10**9)
    trainer = Trainer(llmc.TrainConfig(**tiny_settings(tmp_path, checkpoint_every=3)), fs=disk)

    class Fill(llmc.Callback):
        def on_step(self, trainer: Trainer, info: StepInfo) -> None:
            disk.free = 1000 if info.step == 6 else disk.free

    trainer.callbacks.append(Fill())
    with pytest.raises(TrainingStopped, match=r"needs \d\d\.\d kB, 1\.0 kB are free.*; that of step 6 is untouched"):
        trainer.fit()


@pytest.mark.parametrize("on_save_error", ["continue", "stop"])
def test_no_room_for_a_checkpoint_is_found_before_the_first_step(tmp_path: Path, on_save_error: str) -> None:
    """Kind: what is found late and could be known at the start."""
    settings = tiny_settings(tmp_path, on_save_error=on_save_error)
    with pytest.raises(OSError, match=r"1\.0 kB are free: make room.*--checkpoint-every -1"):
        Trainer(llmc.TrainConfig(**settings), fs=SmallDisk(1000))
    assert not (tmp_path / "run" / "config.toml").exists()
    trainer = Trainer(llmc.TrainConfig(**{**settings, "checkpoint_every": -1}), fs=SmallDisk(1000))
    assert trainer.fit().step == 8


def test_what_the_checkpoints_need_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tiny_settings(tmp_path, checkpoint_every=2, progress="lines")
    Trainer(llmc.TrainConfig(**settings), fs=SmallDisk(10**9)).fit()
    said = capsys.readouterr().out
    assert re.search(r"a checkpoint needs \d\d\.\d kB, 4 of them \d{3}\.\d kB; 1\.0 GB are free\n", said)
    files = [p for p in (tmp_path / "run").iterdir() if p.name.startswith(("model_", "state_"))]
    assert len(files) == 8 and 0.25e6 < sum(p.stat().st_size for p in files) < 0.35e6
    again = {**settings, "output_dir": str(tmp_path / "again")}
    Trainer(llmc.TrainConfig(**again), fs=SmallDisk(150_000)).fit()
    assert "so that not all can be saved: --keep-checkpoints" in capsys.readouterr().out
    again = {**settings, "output_dir": str(tmp_path / "third"), "on_save_error": "stop"}
    with pytest.raises(OSError, match="4 of them.*--keep-checkpoints N"):
        Trainer(llmc.TrainConfig(**again), fs=SmallDisk(150_000))
    Trainer(llmc.TrainConfig(**{**again, "keep_checkpoints": 1}), fs=SmallDisk(150_000)).fit()


@pytest.mark.parametrize(
    ("keep", "major", "there", "step", "total", "every", "most"),
    [
        (0, 0, [], 0, 8, 3, 3),  # 3, 6 and 8
        (0, 0, [3], 4, 8, 3, 2),
        (0, 0, [], 0, 8, 0, 1),
        (0, 0, [8], 8, 8, 3, 0),
        (2, 0, [], 0, 100, 1, 3),
        (2, 0, [4, 5], 5, 100, 1, 1),
        (1, 10, [], 0, 100, 5, 12),
        (5, 0, [], 0, 8, 4, 2),
    ],
)
def test_how_many_checkpoints_are_ahead(
    tmp_path: Path, keep: int, major: int, there: list[int], step: int, total: int, every: int, most: int
) -> None:
    for done in there:
        (tmp_path / f"DONE_{done:08d}").touch()
    assert Checkpointer(tmp_path, keep=keep, major_every=major).most_ahead(step, total, every) == most


def test_failed_background_save_is_reported(tmp_path: Path) -> None:
    fs = FailingFs()
    fs.fail_at(3, OSError(errno.ENOSPC, "No space left on device"))
    config = llmc.TrainConfig(**tiny_settings(tmp_path, checkpoint_every=2, async_save=True))
    result = Trainer(config, fs=fs).fit()
    assert result.step == 8 and finished_steps(tmp_path / "run") == [4, 6, 8]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("No space left on device" in row.get("text", "") for row in rows)


def test_any_other_error_of_a_background_save_ends_the_run(tmp_path: Path) -> None:
    class Broken(Fs):
        def rename(self, old: Path, new: Path) -> None:
            if new.name.startswith("model_"):
                raise RuntimeError("a mistake")
            super().rename(old, new)

    config = llmc.TrainConfig(**tiny_settings(tmp_path, checkpoint_every=2, async_save=True))
    with pytest.raises(RuntimeError, match="a mistake"):
        Trainer(config, fs=Broken()).fit()


# ---- logs ----


def test_a_log_that_cannot_be_written_is_left_out(tmp_path: Path) -> None:
    class Full(Log):
        def step(self, info: StepInfo) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    console = io.StringIO()
    logs = Logs([LineConsole(console), Full(), MainLog(tmp_path / "main.log", append=False)])
    for step in range(3):
        logs.step(StepInfo(step, 3, 1.0, 1.0, 1e-3, 1.0, 1.0, 1.0, None, "f32", 0.0, 0.0))
    logs.close()
    assert console.getvalue().count("Full cannot be written and is left out") == 1
    assert len((tmp_path / "main.log").read_text().splitlines()) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="a disk that is always full is of Linux")
def test_a_log_on_a_full_disk_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tiny_settings(tmp_path, progress="lines")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    assert llmc.train(**settings).step == 8
    assert capsys.readouterr().out.count("MetricsLog cannot be written and is left out") == 1
    assert len((tmp_path / "run" / "main.log").read_text().splitlines()) == 11


def test_logs_go_on_below_a_torn_line(tmp_path: Path) -> None:
    settings = cut_at(tmp_path, 4)
    for name in ("main.log", "metrics.jsonl"):
        with open(tmp_path / "run" / name, "ab") as file:
            file.write(b"s:4 t")
    llmc.train(**settings)
    lines = (tmp_path / "run" / "main.log").read_text().splitlines()
    assert "s:4 t" in lines and any(line.startswith("s:4 trl:") for line in lines)
