"""The training loop: what it computes, prints and refuses; it can be stopped and called again."""

from __future__ import annotations

import base64
import html
import json
import math
import os
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from runs import VOCAB, cut_at, same_weights, tiny_data, tiny_run, tiny_settings, weights

import llmc
from llmc import _llmc
from llmc.checkpoint import finished_steps
from llmc.cli import main, train_main
from llmc.commands.train import parse
from llmc.formats.shards import read_shard
from llmc.plot import read_run
from llmc.training.logs import StepInfo
from llmc.training.memory import check_memory
from llmc.training.outliers import OutlierDetector
from llmc.training.report import startup_report
from llmc.training.settings import SETTINGS, load_toml, resolve
from llmc.training.trainer import Callback, Trainer, TrainingStopped


def test_loss_falls_and_history_is_complete(tmp_path: Path) -> None:
    result = tiny_run(tmp_path, max_steps=60)
    history = result.history
    assert history["step"] == list(range(60)) and history["val_step"] == [*range(0, 60, 4), 60]
    assert history["train_loss"][0] == pytest.approx(math.log(VOCAB), abs=0.2)
    assert history["val_loss"][-1] < history["val_loss"][0] - 1.0
    assert result.run_dir == tmp_path / "run" and result.step == 60 and result.stopped_by == 0


def test_the_loop_is_model_and_optimizer(tmp_path: Path) -> None:
    """A loop written by hand over GPT2, AdamW, DataLoader and lr_schedule gives the same bits."""
    settings = tiny_settings(tmp_path, total_batch_size=64, weight_decay=0.1)
    result = llmc.train(**settings)
    config = llmc.GPT2Config(num_layers=1, num_heads=2, channels=16, max_seq_len=16, vocab_size=VOCAB)
    model = llmc.GPT2(config, seed=42, threads=1)
    optimizer = llmc.AdamW(model, weight_decay=0.1)
    loader = llmc.DataLoader([Path(settings["data"][0])], 2, 16, shuffle=True, seed=42)
    lr = llmc.lr_schedule("cosine", 1e-2, 2, 8, 0.1)
    losses = []
    for step in range(8):
        model.zero_grad()
        for _ in range(2):
            inputs, targets = loader.next_batch()
            model.forward(inputs)
            model.backward(targets, 0.5)
        optimizer.step(lr(step))
        losses.append(model.mean_loss)
    assert losses == result.history["train_loss"]
    assert same_weights({k: np.array(v) for k, v in model.parameters.items()}, weights(result))


def test_same_seed_same_bits(tmp_path: Path) -> None:
    first, second = tiny_run(tmp_path / "a"), tiny_run(tmp_path / "b", threads=2)
    assert same_weights(weights(first), weights(second))
    other = tiny_run(tmp_path / "c", seed=43)
    assert not same_weights(weights(first), weights(other))


def test_two_models_train_in_one_process(tmp_path: Path) -> None:
    """Two models take steps in turns, and each gets the weights that it would get alone."""
    alone = weights(tiny_run(tmp_path / "alone"))
    a = Trainer(llmc.TrainConfig(**tiny_settings(tmp_path / "a")))
    b = Trainer(llmc.TrainConfig(**tiny_settings(tmp_path / "b", seed=7)))
    for _ in range(8):
        a.train_step()
        b.train_step()
    assert same_weights(alone, {k: np.array(v) for k, v in a.model.parameters.items()})


def test_fit_again(tmp_path: Path) -> None:
    trainer = Trainer(llmc.TrainConfig(**tiny_settings(tmp_path)))
    first = weights(trainer.fit())
    again = trainer.fit()
    assert again.step == 8 and same_weights(first, weights(again))
    trainer.total_steps = 12
    assert trainer.fit().step == 12


def test_callbacks(tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []

    class Note(Callback):
        def on_step(self, trainer: Trainer, info: StepInfo) -> None:
            seen.append(("step", info.step))

        def on_eval(self, trainer: Trainer, step: int, loss: float) -> None:
            seen.append(("eval", step))

        def on_save(self, trainer: Trainer, step: int, directory: Path) -> None:
            assert (directory / f"DONE_{step:08d}").is_file()
            seen.append(("save", step))

    llmc.train(**tiny_settings(tmp_path, max_steps=4, checkpoint_every=2), callbacks=[Note()])
    # fmt: off
    assert seen == [
        ("eval", 0), ("step", 0), ("step", 1), ("save", 2), ("step", 2), ("step", 3), ("save", 4), ("eval", 4),
    ]
    # fmt: on


def test_functions_and_other_objects_are_callbacks(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Validations:  # of no class of ours, and with one method
        def on_eval(self, trainer: Trainer, step: int, loss: float) -> None:
            seen.append(step)

    callbacks = [lambda trainer, info: seen.append((trainer.step, info.step)), Validations()]
    trainer = Trainer(llmc.TrainConfig(**tiny_settings(tmp_path, max_steps=2, checkpoint_every=1)), callbacks=callbacks)
    trainer.fit()
    assert seen == [0, (1, 0), (2, 1), 2]


class _Misspelt(Callback):
    def on_stepp(self, trainer: Trainer, info: StepInfo) -> None: ...


class _Short(Callback):
    def on_eval(self, trainer: Trainer, loss: float) -> None: ...


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (lambda trainer, info: None, r"callbacks is <lambda>, expected a list: callbacks=\[...\]"),
        (_Misspelt(), "callbacks is a _Misspelt, expected a list"),
        ("on_step", "callbacks is 'on_step', expected a list"),
        ([lambda info: None], r"callbacks\[0\], on_step: <lambda> cannot be called with \(trainer, info\): too many"),
        ([lambda: None], "too many positional arguments"),
        ([Callback, print], r"callbacks\[0\] is the class Callback, expected an object of it: Callback\(\)"),
        (
            [_Misspelt()],
            r"callbacks\[0\] has a method on_stepp, and a run calls on_step, on_eval, on_save; did you mean on_step\?",
        ),
        ([_Short()], r"on_eval: on_eval cannot be called with \(trainer, step, loss\)"),
        (
            [Callback()],
            r"is a Callback, expected a function f\(trainer, info\), or an object with on_step or on_eval or",
        ),
        ([None], r"callbacks\[0\] is a NoneType, expected a function"),
        (["f"], r"callbacks\[0\] is 'f', expected a function"),
    ],
)
def test_what_is_no_callback_is_refused_at_once(callbacks: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        llmc.train(data="these data are not looked for", callbacks=callbacks)


@pytest.mark.parametrize("name", ["on_step", "on_eval", "callback"])
def test_callbacks_are_no_settings(name: str) -> None:
    with pytest.raises(ValueError, match=rf"'{name}' is no setting: callbacks=\[f\] calls f\(trainer, info\)"):
        llmc.train(**{name: print})


def test_how_a_run_is_shown(tmp_path: Path) -> None:
    pyplot = "matplotlib.pyplot" in sys.modules
    config = llmc.TrainConfig(**tiny_settings(tmp_path, max_steps=2))
    assert repr(llmc.TrainConfig()) == "TrainConfig()" and repr(llmc.TrainConfig(layers=2)) == "TrainConfig(layers=2)"
    assert eval(repr(config), vars(llmc)) == config
    trainer = Trainer(config)
    where = repr(str(tmp_path / "run"))
    assert repr(trainer) == f"Trainer(step 0 of 2, run_dir={where}, {trainer.model})"
    result = trainer.fit()
    loss, val = result.history["train_loss"][-1], result.history["val_loss"][-1]
    assert repr(result) == f"TrainResult(step=2, train_loss={loss:.4f}, val_loss={val:.4f}, run_dir={where})"

    page = result._repr_html_()
    (picture,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(picture).startswith(b"\x89PNG") and html.escape(repr(result)) in page
    assert len(result.plot().axes) > 1  # beside the loss
    assert ("matplotlib.pyplot" in sys.modules) == pyplot  # which has figures of its own, and a backend with windows

    empty = llmc.TrainResult({name: [] for name in result.history}, None, result.model, None, 0, signal.SIGINT)
    assert repr(empty) == "TrainResult(step=0, stopped by Ctrl-C)" and "<img" not in empty._repr_html_()


def test_overfit_learns_one_batch(tmp_path: Path) -> None:
    result = tiny_run(tmp_path, overfit=True, max_steps=150, final_lr_frac=1.0, val_every=0)
    assert result.history["train_loss"][-1] < 0.1


def test_one_epoch(tmp_path: Path) -> None:
    assert tiny_run(tmp_path, max_steps=-1, val_every=0).step == 4000 // 32


@pytest.mark.parametrize(
    ("changes", "context", "sample"),
    [
        ({}, 16, 16),
        ({"layers": None, "heads": None, "channels": None}, 16, 16),  # the small model
        ({"max_seq_len": 24}, 24, 16),
        ({"sample_tokens": 20}, 16, 16),
        ({"model": "d2", "layers": None, "heads": None, "channels": None}, 1024, 16),
        ({"model": "d2", "seq_len": 80, "layers": None, "heads": None, "channels": None}, 1024, 64),
    ],
)
def test_a_model_has_the_positions_that_are_trained(
    tmp_path: Path, changes: dict[str, Any], context: int, sample: int
) -> None:
    """Unless its context is given, or a descriptor has one. No sample stands on positions that are not learned."""
    trainer = Trainer(llmc.TrainConfig(**tiny_settings(tmp_path, **{"max_seq_len": None, **changes})))
    assert (trainer.model.config.max_seq_len, trainer.config.sample_tokens) == (context, sample)
    said = startup_report(trainer.run, 1)
    assert (f"positions from {trainer.config.seq_len} on are not learned" in said) == (context > trainer.config.seq_len)


@pytest.mark.parametrize(
    ("changes", "warmup", "said"),
    [
        ({"max_steps": 20}, 10, ""),
        ({"max_steps": -1}, 62, ""),  # one epoch
        ({"max_steps": 5}, 2, ""),
        ({"max_steps": 400}, 90, ""),
        ({"max_steps": 2, "model": "d1", "layers": None, "heads": None, "channels": None}, 0, ""),
        ({"warmup_steps": 20}, 20, "warning: warmup_steps is 20 of 8 steps in all: the learning rate rises to 0.004 of 0.01,"),
        ({"warmup_steps": 8}, 8, "rises to 0.01 of 0.01, and never falls"),
        ({"warmup_steps": 7}, 7, ""),
        ({"warmup_steps": 8, "schedule": "constant"}, 8, ""),
        ({"warmup_steps": 7, "schedule": "wsd"}, 7, "wsd decays from step 6 of 8 on: the learning rate drops from 0.01 to"),
    ],
)  # fmt: skip
def test_the_warm_up_reaches_the_highest_rate(tmp_path: Path, changes: dict[str, Any], warmup: int, said: str) -> None:
    """By default it does; a run whose settings say otherwise says so in its log."""
    trainer = Trainer(llmc.TrainConfig(**tiny_settings(tmp_path, **{"warmup_steps": None, **changes})))
    assert trainer.config.warmup_steps == warmup
    rates = [trainer.lr(step) for step in range(trainer.total_steps)]
    assert said.startswith("warn") or max(rates) == pytest.approx(1e-2)
    assert len(trainer.run.remarks) == bool(said) and said in "".join(trainer.run.remarks)


# ---- logs ----


def test_main_log_matches_llm_c(tmp_path: Path) -> None:
    tiny_run(tmp_path, max_steps=2, val_every=2)
    lines = (tmp_path / "run" / "main.log").read_text().splitlines()
    patterns = [
        r"s:0 tel:\d\.\d{4}",
        r"s:0 trl:\d\.\d{4} lr:0\.005000 norm:\d\.\d\d",
        r"s:1 trl:.*",
        r"s:2 tel:\d\.\d{4}",
    ]
    assert len(lines) == 4 and all(re.fullmatch(p, line) for p, line in zip(patterns, lines))


def test_metrics_are_json(tmp_path: Path) -> None:
    tiny_run(tmp_path, max_steps=3)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in steps] == [0, 1, 2]
    assert {"loss", "norm", "lr", "seconds", "tokens_per_second", "flops_per_second", "loss_z", "skipped"} <= set(
        steps[0]
    )
    assert rows[0]["kind"] == "start" and (rows[0]["step"], rows[0]["total_steps"]) == (0, 3)
    assert rows[-1]["kind"] == "end" and rows[-1]["mean_milliseconds"] > 0


def test_loss_curve(tmp_path: Path) -> None:
    tiny_run(tmp_path, plot=True)
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


# ---- outliers and losses that are not finite ----


def test_outlier_detector_judges_against_the_window_before() -> None:
    detector, rng = OutlierDetector(), np.random.default_rng(0)
    window = rng.normal(5.0, 0.5, 128)
    assert all(math.isnan(detector.update(float(x))) for x in window)
    expected = (9.0 - window.mean()) / window.std()
    assert detector.update(9.0) == pytest.approx(expected, rel=1e-12)
    shifted = np.append(window[1:], 9.0)
    assert math.isnan(detector.update(math.nan)) and math.isnan(detector.update(math.inf))
    # Far past 11.3, the most that a value can have in a window of 128 that it belongs to.
    assert detector.update(1e6) == pytest.approx((1e6 - shifted.mean()) / shifted.std(), rel=1e-9)


class _Poison(Callback):
    """Write NaN into a weight before each of the given steps, and restore the weight after it."""

    def __init__(self, steps: set[int]) -> None:
        self.steps, self.saved = steps, 0.0

    def on_step(self, trainer: Trainer, info: StepInfo) -> None:
        weight = trainer.model.parameters["lnfw"]
        if info.step in self.steps:
            weight[0] = self.saved
        if info.step + 1 in self.steps:
            self.saved = float(weight[0])
            weight[0] = math.nan


def test_nan_step_is_skipped_and_counted(tmp_path: Path) -> None:
    trainer = Trainer(llmc.TrainConfig(**tiny_settings(tmp_path, val_every=0)), callbacks=[_Poison({3})])
    before: dict[str, Any] = {}

    class Compare(Callback):
        def on_step(self, trainer: Trainer, info: StepInfo) -> None:
            now = {k: np.array(v) for k, v in trainer.model.parameters.items()}
            if info.step == 3:
                assert info.skipped.startswith("loss nan")
                assert all(np.array_equal(now[k], before[k], equal_nan=True) for k in now if k != "lnfw")
            before.update(now)

    trainer.callbacks.insert(0, Compare())
    result = trainer.fit()
    assert trainer.skipped_steps == 1 and trainer.bad_steps == 0 and trainer.optimizer.step_count == 7
    assert math.isnan(result.history["train_loss"][3])
    metrics = tmp_path / "run" / "metrics.jsonl"
    rows = [json.loads(line, parse_constant=pytest.fail) for line in metrics.read_text().splitlines()]  # NaN is no JSON
    assert [row["loss"] is None for row in rows if row["kind"] == "train"] == [i == 3 for i in range(8)]
    old = metrics.read_text().replace("null", '"nan"')
    for text in (metrics.read_text(), old):
        metrics.write_text(text)
        assert math.isnan(read_run(metrics).series["train_loss"][3]) and read_run(metrics).unreadable == 0
        assert main(["watch", str(tmp_path / "run"), "--once"]) == 0
    assert all(np.isfinite(v).all() for v in weights(result).values())


def test_many_nan_steps_stop_the_run_and_name_the_checkpoint(tmp_path: Path) -> None:
    config = llmc.TrainConfig(**tiny_settings(tmp_path, checkpoint_every=2, max_bad_steps=3))

    class Break(Callback):
        def on_step(self, trainer: Trainer, info: StepInfo) -> None:
            if info.step == 2:
                trainer.model.parameters["lnfw"][0] = math.nan

    with pytest.raises(TrainingStopped, match=r"not finite in 3 updates in a row.*checkpoint is of step 2"):
        Trainer(config, callbacks=[Break()]).fit()


def test_outlier_steps_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.training.outliers.WINDOW", 4)
    trainer = Trainer(llmc.TrainConfig(**tiny_settings(tmp_path, skip_grad_z=3.0, val_every=0)))
    trainer.grad_outliers.set_state([1e-6, 1.1e-6, 0.9e-6, 1e-6])
    assert trainer.train_step().skipped.startswith("grad z-score")
    assert trainer.optimizer.step_count == 0


# ---- stopping ----


def losses(monkeypatch: pytest.MonkeyPatch, values: dict[int, float]) -> None:
    """Let validation at the given steps find these losses, whatever the weights are."""

    def evaluate(self: llmc.GPT2, inputs: Any, targets: Any) -> float:
        return values[trainers[-1].step]

    trainers: list[Trainer] = []
    validate = Trainer.validate

    def noted(self: Trainer) -> float:
        trainers.append(self)
        return validate(self)

    monkeypatch.setattr(llmc.GPT2, "evaluate", evaluate)
    monkeypatch.setattr(Trainer, "validate", noted)


LOSSES = {0: 4.0, 2: 3.0, 4: 3.5, 6: 2.0, 8: 2.0, 10: 2.5, 12: math.nan, 14: 1.0, 16: 0.5}
EARLY = "stopped early at step 12 of 16: the last 3 validations were not below the loss of 2.0000 of step 6, whose model is best.bin"


@pytest.mark.parametrize("checkpoint_every", [0, 4])
def test_patience(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], checkpoint_every: int
) -> None:
    """The run ends as at its last step: saved, with a sample. It is known to have ended if it is resumed, and goes on if told."""
    losses(monkeypatch, LOSSES)
    settings = tiny_settings(
        tmp_path, max_steps=16, val_every=2, patience=3, save_best=True, sample_every=100, progress="lines"
    )
    settings["checkpoint_every"] = checkpoint_every
    result = llmc.train(**settings)
    assert (result.step, result.stopped_early, result.stopped_by) == (12, True, 0)
    assert result.history["val_step"] == [0, 2, 4, 6, 8, 10, 12]
    said = capsys.readouterr().out
    assert f"{EARLY}\ngenerating:" in said and said.count(" --patience 6\n") == 1
    assert finished_steps(tmp_path / "run")[-1] == 12
    for patience in (3, 2):
        again = llmc.train(**{**settings, "resume": True, "patience": patience})
        assert (again.step, again.stopped_early, again.history["val_step"]) == (12, True, [])
        assert f"was {EARLY}. To go on:\n  llmc train --resume " in (said := capsys.readouterr().out)
        assert said.endswith(f" --patience {2 * patience}\n") and said.count("\n") == 2
    more = llmc.train(**{**settings, "resume": True, "patience": 4})
    assert (more.step, more.stopped_early) == (16, False)


@pytest.mark.parametrize("step", [8, 12])
@pytest.mark.parametrize("place", ["before", "in", "after"])
def test_patience_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, place: str) -> None:
    """A run whose last checkpoint is from before, in or after the validation of its step counts each validation once."""
    losses(monkeypatch, LOSSES)
    settings = tiny_settings(tmp_path, max_steps=16, val_every=2, patience=3, sample_every=2)

    def cut(at: str, trainer: Trainer) -> str:
        if trainer.step == step and at == place:
            trainer.save()
            raise RuntimeError("cut")
        return ""

    class Cut(Callback):
        def on_step(self, trainer: Trainer, info: StepInfo) -> None:
            cut("before", trainer)

        def on_eval(self, trainer: Trainer, step: int, loss: float) -> None:
            cut("in", trainer)

    monkeypatch.setattr(Trainer, "sample", lambda trainer, **options: cut("after", trainer))
    with pytest.raises(RuntimeError, match="cut"):
        llmc.train(**settings, callbacks=[Cut()])
    place = ""
    result = llmc.train(**settings, resume=True)
    assert (result.step, result.stopped_early) == (12, True)


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends the process there")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_finishes_the_step_and_saves(tmp_path: Path, number: int) -> None:
    class Kill(Callback):
        def on_step(self, trainer: Trainer, info: StepInfo) -> None:
            if info.step == 3:
                os.kill(os.getpid(), number)

    trainer = Trainer(llmc.TrainConfig(**tiny_settings(tmp_path)), callbacks=[Kill()])
    result = trainer.fit(pass_on_signal=False)
    assert result.stopped_by == number and result.step == 4
    assert (tmp_path / "run" / "DONE_00000004").is_file()
    resumed = tiny_run(tmp_path, resume=True)
    assert same_weights(weights(resumed), weights(tiny_run(tmp_path / "whole")))


@pytest.mark.skipif(sys.platform == "win32", reason="no terminals of POSIX")
def test_a_run_whose_terminal_is_closed_is_saved(tmp_path: Path) -> None:
    """SIGHUP comes, and from there on each write to the terminal is an error."""
    import pty

    settings = tiny_settings(tmp_path, progress="lines", max_steps=10**6, val_every=0, plot=False)
    (tmp_path / "c.toml").write_text(llmc.TrainConfig(**settings).to_toml())
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-m", "llmc", "train", "--config", str(tmp_path / "c.toml")])
    printed = b""
    while not re.search(rb"step +3/", printed):
        printed += os.read(terminal, 4096)  # an OSError if the run ends
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129
    assert len(finished_steps(tmp_path / "run")) == 1


class Signal(Callback):
    """Sends a signal to this process after the first update."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_step(self, trainer: Trainer, info: StepInfo) -> None:
        os.kill(os.getpid(), self.number)


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends the process there")
@pytest.mark.parametrize("handled", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_has_its_effect_when_all_is_saved(tmp_path: Path, number: signal.Signals, handled: bool) -> None:
    """A loop over runs ends, unless the program has a handler of its own. Kind: a library must not swallow a signal."""
    seen: list[int] = []
    before = signal.getsignal(number)
    signal.signal(number, (lambda n, frame: seen.append(n)) if handled else before)
    done = []
    try:
        for i in range(2):
            result = llmc.train(**tiny_settings(tmp_path / str(i)), callbacks=[Signal(number)])
            done.append((result.step, result.stopped_by))
    except (KeyboardInterrupt, SystemExit) as e:
        done.append(getattr(e, "code", "interrupted"))
    finally:
        signal.signal(number, before)
    if handled:
        assert done == [(1, number)] * 2 and seen == [number] * 2
    else:
        assert done == [128 + number if number == signal.SIGTERM else "interrupted"]
    assert [finished_steps(tmp_path / str(i) / "run") for i in range(2)] == [[1], [1] if handled else []]


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends the process there")
@pytest.mark.parametrize(("number", "called"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_the_command_has_the_exit_code_of_the_signal(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    called: str,
) -> None:
    config = tiny_settings(tmp_path, progress="lines")
    (tmp_path / "c.toml").write_text(llmc.TrainConfig(**config).to_toml())
    monkeypatch.setattr(Trainer, "_after_step", lambda trainer, info: os.kill(os.getpid(), number))
    assert train_main(["--config", str(tmp_path / "c.toml")]) == 128 + number
    printed = capsys.readouterr()
    assert f"stopped by {called} after step 1, saved; continue with:\n  llmc train --resume" in printed.out
    assert not printed.err


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends the process there")
def test_signal_ends_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal ends an evaluation, which may take long, after the batch that it computes."""
    evaluated = 0

    def evaluate(model: llmc.GPT2, inputs: Any, targets: Any) -> float:
        nonlocal evaluated
        evaluated += 1
        if evaluated == 4:  # the second batch of the second validation
            os.kill(os.getpid(), signal.SIGINT)
        return 1.0

    monkeypatch.setattr(llmc.GPT2, "evaluate", evaluate)
    trainer = Trainer(llmc.TrainConfig(**tiny_settings(tmp_path, val_every=3)))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert (trainer.step, evaluated) == (3, 4)
    assert (tmp_path / "run" / "DONE_00000003").is_file()
    assert trainer.validate() == 1.0  # the trainer can be used again
    assert trainer.fit().step == 8


# ---- settings that cannot be ----


ODD: list[Any] = [
    -1,
    0,
    1,
    2**31,
    -(2**70),
    2**70,
    10**400,
    -0.5,
    math.nan,
    math.inf,
    -math.inf,
    "x",
    True,
    None,
    [1],
    {},
    b"x",
]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_takes_a_value_or_names_itself(name: str) -> None:
    """Kind: any value of any setting is taken or is one error that names the setting; a new setting needs bounds."""
    taken = []
    for value in ODD:
        try:
            config = llmc.TrainConfig(**{name: value})
        except ValueError as e:
            assert name in str(e) or "dtype" in name
            continue
        taken.append(getattr(config, name))
        try:
            resolve(config, "cpu")
        except ValueError as e:
            assert name in str(e) or name in ("processes", "seq_len", "batch_size")  # which make up total_batch_size
    numbers = [v for v in taken if isinstance(v, (int, float))]
    assert not any(math.isnan(v) for v in numbers)
    assert all(abs(v) < 2**32 for v in numbers if isinstance(v, int))  # as the kernels' numbers are
    if SETTINGS[name].kind in (int, float):
        assert any(v not in taken for v in (-1, 0, -0.5, 2**70))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"total_batch_size": 33},
            r"total_batch_size is 33, expected a multiple of batch_size \* seq_len = 2 \* 16 = 32: 32 is the nearest$",
        ),
        ({"batch_size": 4, "total_batch_size": 96}, r"= 4 \* 16 = 64: 128 is the nearest; or give --batch-size 3$"),
        ({"batch_size": 64, "total_batch_size": 2**31 - 1}, "= 1024: 2147482624 is the nearest$"),
        ({"seq_len": 17}, "seq_len is 17, but the model's max_seq_len is 16"),
        ({"channels": 17}, "channels 17 is not divisible by num_heads 2"),
        ({"model": "d13x"}, "d13x"),
        ({"schedule": "step"}, "schedule is 'step', expected one of cosine, linear, constant, wsd"),
        ({"recompute": 3}, "recompute is 3"),
        ({"processes": 8}, "processes is 8"),
        ({"vocab_size": 12}, "vocab"),
        ({"layers": 0}, "layers is 0, expected 1 to 2147483647"),
        ({"batch_size": 2.5}, "batch_size is 2.5, expected int"),
        ({"learning_rte": 1.0}, "unknown setting 'learning_rte'; did you mean learning_rate"),
        ({"lr": 1.0}, "unknown setting 'lr'; did you mean learning_rate"),
        ({"dtype": "fp7"}, "fp7"),
        ({"gpu_info_every": 5}, "the device is cpu"),
        ({"val_steps": 0}, "val_steps is 0, expected -1"),
        ({"seed": -1}, "seed is -1, expected 0 to 4294967295"),
        ({"data_seed": 2**32}, "data_seed is 4294967296"),
        ({"learning_rate": [1e-3]}, "learning_rate is .0.001., expected float"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"beta2": 1.0}, "beta2 is 1.0"),
        ({"checkpoint_every": -2}, "checkpoint_every is -2"),
        ({"patience": 3, "val_data": ()}, "patience is 3, but there are no validation data"),
        ({"patience": 3, "val_every": 0}, "patience is 3, but val_every is 0"),
        ({"patience": -1}, "patience is -1, expected 0"),
        (
            {"max_steps": -1, "total_batch_size": 32 * 1000},
            "the data hold 4000 tokens, less than the 32000 of one update",
        ),
    ],
)
def test_refused_settings(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, llmc.Error), match=message):
        tiny_run(tmp_path, **changes)


def test_settings_go_through_toml(tmp_path: Path) -> None:
    config = llmc.TrainConfig(grad_clip=math.inf, data=("a b.txt", "c\\d.txt"), prompt='"quoted" \n é')
    (tmp_path / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    assert llmc.TrainConfig(**load_toml(tmp_path / "config.toml")) == config


def test_a_damaged_hellaswag_file_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "h.bin").write_bytes(bytes(2000))
    with pytest.raises(llmc.Error, match="magic 0 version 0, expected an eval file"):
        tiny_run(tmp_path, hellaswag=True, hellaswag_data=str(tmp_path / "h.bin"))


def test_a_missing_package_is_found_before_the_data_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kind: what is found late and could be known at the start."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        tiny_run(tmp_path, wandb="project", data=("nothing",))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_bf16_without_bf16_arithmetic_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    monkeypatch.setenv("LLMC_ISA", "baseline")
    tiny_run(tmp_path, device="cpu", dtype=dtype, max_steps=1, progress="lines")
    said = "note: baseline has no bf16 arithmetic: bf16 saves memory" in capsys.readouterr().out
    assert said == (dtype == "bf16")


def test_more_processes_than_memory_holds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("llmc.commands.train.available_host_memory", lambda: 10**9)
    assert train_main(["--processes", "1000"]) == 1
    assert "1000 processes take at least 40.0 GB before they train, 1.0 GB are free" in capsys.readouterr().err


def test_data_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no files match '.*nothing-\*\.bin'"):
        tiny_run(tmp_path, data=(str(tmp_path / "nothing-*.bin"),))


def test_not_enough_memory_is_an_error_before_allocating(tmp_path: Path) -> None:
    with pytest.raises(MemoryError, match=r"needs [\d.]+ GB on cpu, [\d.]+ GB are free"):
        tiny_run(tmp_path, model="d48", layers=None, heads=None, channels=None, max_seq_len=None, batch_size=512)


class FakeGpu:
    """A GPU with `free` bytes of free memory, of which ops take 1 MB for themselves."""

    def __init__(self, free: int) -> None:
        self.free = free

    def info(self) -> SimpleNamespace:
        return SimpleNamespace(name="cuda:0", isa="sm_90", free_bytes=self.free)

    def workspace_bytes(self, *_: object) -> int:
        return 1 << 20


def test_a_gpu_recomputes_only_what_it_must() -> None:
    config = llmc.GPT2Config()  # 124M
    batch: dict[str, Any] = {"dtype": "bf16", "grad_dtype": "f32", "B": 32, "T": 1024}
    batch["optimizer_bytes"] = lambda dtype: 10 * config.num_parameters

    def need(recompute: int, rows: int) -> int:
        plan = _llmc.memory_plan(
            config.native(),
            _llmc.ModelOptions("bf16", "f32", recompute, rows),
            32,
            1024,
            True,
            10 * config.num_parameters,
        )
        return plan.total + (1 << 20)

    def choice(free: int, recompute: int | None = None, rows: int | None = None) -> tuple[int, int]:
        gpu: Any = FakeGpu(free)
        plan, *chosen = check_memory(gpu, config, recompute=recompute, classifier_rows=rows, **batch)
        assert plan.total + (1 << 20) == need(*chosen) <= free
        return tuple(chosen)  # type: ignore[return-value]

    assert choice(80 << 30) == (0, 16384)
    for level, rows, next_best in [
        (0, 16384, (0, 4096)),
        (0, 4096, (0, 1024)),
        (0, 1024, (1, 16384)),
        (1, 1024, (2, 4096)),
    ]:
        assert choice(need(level, rows)) == (level, rows)
        assert choice(need(level, rows) - 1) == next_best
    assert choice(need(0, 16384) - 1, rows=16384) == (1, 16384)
    assert choice(80 << 30, recompute=2, rows=100) == (2, 100)
    with pytest.raises(MemoryError, match=r"on cuda:0.*workspace 0\.00.*--batch-size 31 fits"):
        choice(need(2, 1024) - 1)


@pytest.mark.parametrize(
    ("B", "rows", "free"),
    [(64, None, 800_000), (61, None, 500_000), (64, 64, 500_000), (60, 60, 3_200_000), (50, 100, 800_000), (77, 77, 1_500_000)],
)  # fmt: skip
def test_what_the_memory_error_names_works_as_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, B: int, rows: int | None, free: int
) -> None:
    """Kind: advice that is not what it says. Each piece of it is typed, and no larger batch size would do."""
    monkeypatch.setattr("llmc.training.memory.available_memory", lambda backend: free)
    settings = tiny_settings(tmp_path, layers=3, batch_size=B, classifier_rows=16, recompute=0, max_steps=1)
    settings["val_data"] = settings["data"]  # with enough tokens for a batch
    total = -1 if rows is None else rows * 16
    (tmp_path / "c.toml").write_text(llmc.TrainConfig(**settings, total_batch_size=total).to_toml())

    def advice(*more: str) -> list[str]:
        try:
            Trainer(parse(["--config", str(tmp_path / "c.toml"), *more]))
        except MemoryError as e:
            return str(e).partition("). ")[2].split("; ")
        return []

    pieces = advice()
    if (B, rows) == (60, 60):
        assert pieces[1:] == ["--recompute 2 fits", "--dtype bf16 fits"]
    assert pieces and all(" fits" in piece for piece in pieces)
    for piece in pieces:
        flags, _, remark = piece.partition(" fits")
        assert ("--total-batch-size" in flags) == (rows is None and "tokens" not in remark and "--batch-size" in flags)
        assert advice(*flags.split()) == [], piece
        if "--batch-size" in flags:
            first, size, *others = flags.split()
            larger = [b for b in range(int(size) + 1, B) if "tokens" in remark or (rows or B) % b == 0]
            assert not larger or advice(first, str(larger[0]), *others)
            keeps = "tokens" not in remark
            config = resolve(parse(["--config", str(tmp_path / "c.toml"), *flags.split()]), "cpu")
            assert config.total_batch_size == (rows or B if keeps else int(size)) * 16


def test_no_batch_size_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = cut_at(tmp_path, 1)
    monkeypatch.setattr("llmc.training.memory.available_memory", lambda backend: 50_000)
    with pytest.raises(
        MemoryError, match=r"No batch size fits: make room, or continue it on a machine with more memory$"
    ):
        llmc.train(**settings)
    with pytest.raises(MemoryError, match="or choose a smaller model or a shorter --seq-len$"):
        tiny_run(tmp_path / "new")


def test_the_estimate_of_a_batch_size_divides_the_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.training.memory.available_memory", lambda backend: 600_000)
    free, given, resumed = (Trainer(llmc.TrainConfig(**tiny_settings(tmp_path / "a"))).run, *(
        Trainer(llmc.TrainConfig(**settings)).run
        for settings in (tiny_settings(tmp_path / "b", total_batch_size=24 * 16), cut_at(tmp_path / "c", 1, batch_size=8))
    ))  # fmt: skip

    def estimate(run: Any) -> int:
        return int(re.search(r"estimated maximum batch size: (\d+)", startup_report(run, 1))[1])  # type: ignore[index]

    most = estimate(free)
    assert most not in (12, 24) and 12 < most and (estimate(given), estimate(resumed)) == (12 if most < 24 else 24, 8)


@pytest.mark.skipif(
    os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_unwritable_run_directory(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o500)
    with pytest.raises(PermissionError, match="cannot be written to"):
        tiny_run(tmp_path)


def test_run_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(OSError):
        tiny_run(tmp_path)
    assert (tmp_path / "run").read_text() == "mine"


def test_a_data_file_that_vanishes(tmp_path: Path) -> None:
    """If the next shard is gone when its turn comes, one error names it, and the checkpoint stays."""
    first, _ = tiny_data(tmp_path / "data")
    second = tmp_path / "data" / "train2.bin"
    second.write_bytes(Path(first).read_bytes())

    class Vanish(Callback):
        def on_step(self, trainer: Trainer, info: StepInfo) -> None:
            if info.step == 3:
                for path in (Path(first), second):
                    path.rename(path.with_suffix(".gone"))

    settings = tiny_settings(tmp_path, data=(first, str(second)), max_steps=500, checkpoint_every=1, keep_checkpoints=2)
    with pytest.raises((llmc.Error, OSError), match=r"train2?\.bin"):
        llmc.train(**settings, callbacks=[Vanish()])
    assert finished_steps(tmp_path / "run")


def test_rows_are_drawn_one_by_one_or_as_they_follow_each_other(tmp_path: Path) -> None:
    """With llm.c's order the rows of a batch are neighbours in the text; drawn one by one they come from all over it, each once."""
    first_rows = {}
    for rows in (0, 1):
        trainer = Trainer(llmc.TrainConfig(**tiny_settings(tmp_path / str(rows), rows_per_sample=rows)))
        tokens = read_shard(trainer.sources.train[0])
        places = {tuple(map(int, tokens[at : at + 16])): at // 16 for at in range(0, len(tokens) - 16, 16)}
        first_rows[rows] = [
            places[tuple(map(int, row))] for _ in range(100) for row in trainer.train_loader.next_batch()[0]
        ]
    pairs = {rows: np.diff(np.reshape(found, (-1, 2)), axis=1).ravel() for rows, found in first_rows.items()}
    assert (pairs[0] == 1).all()
    assert (pairs[1] == 1).mean() < 0.1
    assert all(len(set(found)) == 200 for found in first_rows.values())


def test_positions_begin_as_sines(tmp_path: Path) -> None:
    """Positions are like those near them, whatever the seed; all other weights are those of normal positions."""
    models = {
        name: Trainer(llmc.TrainConfig(**tiny_settings(tmp_path / name, position_init=name))).model
        for name in ("normal", "sines")
    }
    wpe = models["sines"].parameters["wpe"]
    assert np.sqrt((wpe**2).mean()) == pytest.approx(0.05)
    like = wpe @ wpe.T
    assert (np.diff(like[0, :5]) < 0).all() and (np.diag(like) > np.diag(like, 1).max()).all()
    for name, value in models["normal"].parameters.items():
        assert np.array_equal(value, models["sines"].parameters[name]) == (name != "wpe")
