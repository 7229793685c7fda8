"""The training loop: what it computes, prints and refuses; it can be stopped and called again."""

from __future__ import annotations

import io
import json
import math
import os
import re
import select
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
from llmc.cli import train_main
from llmc.commands.train import parse
from llmc.training.logs import BarConsole, LineConsole, StepInfo, step_line
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


def test_overfit_learns_one_batch(tmp_path: Path) -> None:
    result = tiny_run(tmp_path, overfit=True, max_steps=150, final_lr_frac=1.0, val_every=0)
    assert result.history["train_loss"][-1] < 0.1


def test_one_epoch(tmp_path: Path) -> None:
    assert tiny_run(tmp_path, max_steps=-1, val_every=0).step == 4000 // 32


# ---- logs ----


def info(**changes: Any) -> StepInfo:
    # fmt: off
    values: dict[str, Any] = {
        "step": 9, "total_steps": 40, "loss": 4.123456, "norm": 1.5, "lr": 3e-4, "loss_z": math.nan, "grad_z": -0.5,
        "seconds": 0.25, "tokens_per_second": 1000.4, "flops_per_second": 1e11, "mfu": 12.34, "dtype": "bf16",
    }
    # fmt: on
    return StepInfo(**{**values, **changes})


def test_step_line_matches_llm_c() -> None:
    expected = "step   10/40 | loss 4.123456 (+nanz)| norm 1.5000 (-0.50z)| lr 3.00e-04 | 250.00 ms | 12.3% bf16 MFU | 1000 tok/s"
    assert step_line(info()) == expected
    assert "--.-% f32 MFU" in step_line(info(mfu=None, dtype="f32"))


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
    assert rows[-1]["kind"] == "end"


def test_lines_survive_a_console_without_the_characters() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    LineConsole(out).text("Käse \u6f22")
    out.flush()
    assert raw.getvalue().strip() == b"K?se ?"


def test_bar_shows_the_numbers() -> None:
    out = io.StringIO()
    bar = BarConsole(40, 9, out)
    bar.validation(8, 4.5)
    bar.step(info())
    bar.close()
    text = out.getvalue()
    assert (
        "step 8: val loss 4.5000" in text and "loss 4.1235" in text and "1,000 tok/s" in text and "100 GFLOP/s" in text
    )


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
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_has_the_exit_code_of_the_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    config = tiny_settings(tmp_path, progress="lines")
    (tmp_path / "c.toml").write_text(llmc.TrainConfig(**config).to_toml())
    monkeypatch.setattr(Trainer, "_after_step", lambda trainer, info: os.kill(os.getpid(), number))
    assert train_main(["--config", str(tmp_path / "c.toml")]) == 128 + number
    printed = capsys.readouterr()
    assert f"stopped by signal {int(number)} after step 1, saved; continue with: llmc train --resume" in printed.out
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
    batch["optimizer_bytes"] = lambda dtype: 10

    def need(recompute: int, rows: int) -> int:
        plan = _llmc.memory_plan(
            config.native(), _llmc.ModelOptions("bf16", "f32", recompute, rows), 32, 1024, True, 10
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
        return int(re.search("estimated maximum batch size: (.*)", startup_report(run, 1))[1])  # type: ignore[index]

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


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are of POSIX")
def test_bar_in_a_terminal_that_does_not_know_its_width() -> None:
    import pty

    controller, terminal = pty.openpty()
    with open(terminal, "w", encoding="utf-8") as out:
        bar = BarConsole(40, 9, out)
        bar.step(info())
        bar.close()
        text = ""
        while "loss 4.1235" not in text:  # the output may arrive in several parts
            assert select.select([controller], [], [], 10)[0], text
            text += os.read(controller, 10000).decode()
    os.close(controller)
