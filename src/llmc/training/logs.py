"""Where a run's numbers go: the terminal, llm.c's main.log, metrics.jsonl, TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib.util
import io
import math
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from llmc.formats.metrics import format_row
from llmc.training.settings import RunConfig, TrainConfig


@dataclass(frozen=True)
class StepInfo:
    """What is known about one training step.

    Attributes:
        step: counted from 0.
        total_steps: of the run.
        loss: mean over the step's tokens, in nats.
        norm: 2-norm of the gradients, before clipping.
        lr: learning rate of the update.
        seconds: duration of the whole step.
        tokens_per_second: average over the last steps.
        flops_per_second: of this step, as GPT2Config.flops_per_token counts them.
        mfu: model FLOPs utilisation: percent of what the device can reach; None if that is not known.
        dtype: of parameters and activations.
        loss_z, grad_z: z-scores of loss and norm; NaN until there are enough steps.
        skipped: why the update was not made; empty if it was.
    """

    step: int
    total_steps: int
    loss: float
    norm: float
    lr: float
    seconds: float
    tokens_per_second: float
    flops_per_second: float
    mfu: float | None
    dtype: str
    loss_z: float
    grad_z: float
    skipped: str = ""


class Log:
    """Receives what a run tells, and ignores it. A subclass overrides the methods whose news it keeps."""

    def start(self, table: str, short: str) -> None:
        """Take note of the start of a run. table: llm.c's table of parameters; short: the same in a few lines."""

    def step(self, info: StepInfo) -> None:
        """Take note of a training step."""

    def validation(self, step: int, loss: float) -> None:
        """Take note of a validation loss, in nats."""

    def hellaswag(self, step: int, correct: int, total: int) -> None:
        """Take note of how many of HellaSwag's examples were answered correctly."""

    def text(self, message: str) -> None:
        """Take note of a message for the user."""

    def close(self) -> None:
        """Write what is left, and close files."""


def _open_log(path: Path, append: bool) -> TextIO:
    file = open(path, "a+b" if append else "wb")
    if append and file.seek(0, os.SEEK_END) > 0:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":  # the run was killed while it wrote this line
            file.write(b"\n")
    return io.TextIOWrapper(file, encoding="utf-8", newline="\n")


class MainLog(Log):
    """Writes llm.c's main.log: `s:<step> trl:<loss> lr:<lr> norm:<norm>`, `tel:` for validation loss, `eval:` for HellaSwag.

    Args:
        path: the file.
        append: keep what the file has, for a run that was resumed.
    """

    def __init__(self, path: Path, append: bool) -> None:
        self._file = _open_log(path, append)

    def _line(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()

    def step(self, info: StepInfo) -> None:
        self._line(f"s:{info.step} trl:{info.loss:.4f} lr:{info.lr:.6f} norm:{info.norm:.2f}")

    def validation(self, step: int, loss: float) -> None:
        self._line(f"s:{step} tel:{loss:.4f}")

    def hellaswag(self, step: int, correct: int, total: int) -> None:
        self._line(f"s:{step} eval:{correct / total:.4f}")

    def close(self) -> None:
        self._file.close()


class MetricsLog(Log):
    """Writes metrics.jsonl: all numbers and messages, one JSON object in each line (llmc.formats.metrics).

    Args:
        path: the file.
        append: keep what the file has, for a run that was resumed.
    """

    def __init__(self, path: Path, append: bool) -> None:
        self._file = _open_log(path, append)

    def _row(self, kind: str, **values: Any) -> None:
        self._file.write(format_row(kind, **values))
        self._file.flush()

    def step(self, info: StepInfo) -> None:
        values = {k: v for k, v in vars(info).items() if k not in ("total_steps", "dtype")}
        self._row("train", **values)

    def validation(self, step: int, loss: float) -> None:
        self._row("validation", step=step, loss=loss)

    def hellaswag(self, step: int, correct: int, total: int) -> None:
        self._row("hellaswag", step=step, correct=correct, total=total)

    def text(self, message: str) -> None:
        self._row("message", text=message)

    def close(self) -> None:
        self._row("end")
        self._file.close()


def step_line(info: StepInfo) -> str:
    """Return llm.c's line for a step. It names the dtype, where llm.c always writes 'bf16'."""
    mfu = "--.-%" if info.mfu is None else f"{info.mfu:.1f}%"
    line = (
        f"step {info.step + 1:4d}/{info.total_steps} | loss {info.loss:7.6f} ({_z(info.loss_z)}z)"
        f"| norm {info.norm:6.4f} ({_z(info.grad_z)}z)| lr {info.lr:.2e} | {info.seconds * 1000:.2f} ms"
        f" | {mfu} {info.dtype} MFU | {info.tokens_per_second:.0f} tok/s"
    )
    return line + (f" | update skipped: {info.skipped}" if info.skipped else "")


def _z(z: float) -> str:
    return "+nan" if math.isnan(z) else f"{z:+.2f}"


class LineConsole(Log):
    """Prints the lines that llm.c prints.

    Args:
        out: the stream to print to; None is stdout.
    """

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout

    def _print(self, line: str, end: str = "\n") -> None:
        encoding = getattr(self._out, "encoding", None) or "utf-8"
        # A character that the console's encoding lacks must not end the run.
        self._out.write((line + end).encode(encoding, errors="replace").decode(encoding))
        self._out.flush()

    def start(self, table: str, short: str) -> None:
        self._print(table)

    def step(self, info: StepInfo) -> None:
        self._print(step_line(info))

    def validation(self, step: int, loss: float) -> None:
        self._print(f"val loss {loss:f}")

    def hellaswag(self, step: int, correct: int, total: int) -> None:
        self._print(f"HellaSwag: {correct}/{total} = {correct / total:f}")

    def text(self, message: str) -> None:
        self._print(message)


def _columns(out: TextIO) -> int | None:
    """Return the width of the terminal, or None if out is not one."""
    try:
        return os.get_terminal_size(out.fileno()).columns
    except (OSError, ValueError):
        return None


class BarConsole(LineConsole):
    """Shows a progress bar with the newest numbers, and prints everything else above it.

    Args:
        total: steps of the run.
        start: steps done before, by the run that this one continues.
        out: the terminal; None is stdout.
    """

    def __init__(self, total: int, start: int, out: TextIO | None = None) -> None:
        super().__init__(out)
        # A terminal that does not know its width reports 0, and tqdm would show nothing then.
        known = _columns(self._out) != 0
        self._bar = tqdm(
            total=total,
            initial=start,
            file=self._out,
            dynamic_ncols=known,
            ncols=None if known else 100,
            nrows=None if known else 24,
            unit="step",
            bar_format="{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )
        self._validation = math.nan

    def _print(self, line: str, end: str = "\n") -> None:
        with self._bar.external_write_mode(file=self._out):
            super()._print(line, end)

    def start(self, table: str, short: str) -> None:
        self._print(short)

    def step(self, info: StepInfo) -> None:
        if info.skipped:
            self._print(f"step {info.step + 1}: update skipped: {info.skipped}")
        speed = (
            f"{info.flops_per_second / 1e9:.0f} GFLOP/s"
            if info.flops_per_second < 1e13
            else f"{info.mfu or 0:.1f}% MFU"
        )
        if info.mfu is not None and info.flops_per_second < 1e13:
            speed += f" ({info.mfu:.0f}% of peak)"
        postfix = f"loss {info.loss:.4f}, {info.tokens_per_second:,.0f} tok/s, {speed}"
        if not math.isnan(self._validation):
            postfix = f"val {self._validation:.4f}, " + postfix
        self._bar.set_postfix_str(postfix, refresh=False)
        self._bar.update()

    def validation(self, step: int, loss: float) -> None:
        self._validation = loss
        self._print(f"step {step}: val loss {loss:.4f}")

    def close(self) -> None:
        self._bar.close()


def check_packages(config: TrainConfig) -> None:
    """Check that there are the packages of the logs that the settings ask for.

    Raises:
        ImportError: naming the one that is missing.
    """
    for wanted, what, package in (
        (config.tensorboard, "TensorBoard events need", "tensorboardX"),
        (config.wandb, "logging to Weights & Biases needs", "wandb"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise ImportError(f"{what} a package: pip install {package}")


class TensorBoardLog(Log):
    """Writes TensorBoard events into a directory. The package tensorboardX must be there: check_packages()."""

    def __init__(self, directory: Path) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(directory))

    def step(self, info: StepInfo) -> None:
        for name in ("loss", "norm", "lr", "tokens_per_second"):
            self._writer.add_scalar(f"train/{name}", getattr(info, name), info.step)

    def validation(self, step: int, loss: float) -> None:
        self._writer.add_scalar("validation/loss", loss, step)

    def hellaswag(self, step: int, correct: int, total: int) -> None:
        self._writer.add_scalar("hellaswag/acc_norm", correct / total, step)

    def close(self) -> None:
        self._writer.close()


class WandbLog(Log):
    """Sends the numbers to Weights & Biases. The package wandb must be there: check_packages().

    Args:
        project: its name there.
        directory: the folder for wandb's files; None leaves the choice to wandb.
        settings: the run's settings by name.
    """

    def __init__(self, project: str, directory: Path | None, settings: dict[str, Any]) -> None:
        import wandb

        self._run = wandb.init(project=project, dir=None if directory is None else str(directory), config=settings)

    def step(self, info: StepInfo) -> None:
        names = ("loss", "norm", "lr", "tokens_per_second")
        self._run.log({f"train/{n}": getattr(info, n) for n in names}, step=info.step)

    def validation(self, step: int, loss: float) -> None:
        self._run.log({"validation/loss": loss}, step=step)

    def hellaswag(self, step: int, correct: int, total: int) -> None:
        self._run.log({"hellaswag/acc_norm": correct / total}, step=step)

    def close(self) -> None:
        self._run.finish()


class Logs(Log):
    """Several logs as one. If one cannot be written, as on a full disk, it is dropped with a warning, and the run goes on."""

    def __init__(self, logs: Iterable[Log]) -> None:
        self._logs = list(logs)

    def _each(self, call: Callable[[Log], None]) -> None:
        for log in list(self._logs):
            try:
                if log in self._logs:  # the warning about another log may have failed in this one, and dropped it
                    call(log)
            except OSError as e:
                if isinstance(log, LineConsole):  # the program that reads the output has ended: `llmc-train | head`
                    raise
                self._logs.remove(log)
                self.text(f"warning: {type(log).__name__} cannot be written and is left out from here on: {e}")

    def start(self, table: str, short: str) -> None:
        self._each(lambda log: log.start(table, short))

    def step(self, info: StepInfo) -> None:
        self._each(lambda log: log.step(info))

    def validation(self, step: int, loss: float) -> None:
        self._each(lambda log: log.validation(step, loss))

    def hellaswag(self, step: int, correct: int, total: int) -> None:
        self._each(lambda log: log.hellaswag(step, correct, total))

    def text(self, message: str) -> None:
        self._each(lambda log: log.text(message))

    def close(self) -> None:
        self._each(lambda log: log.close())


def open_logs(config: RunConfig, run_dir: Path | None, step: int, total_steps: int) -> Logs:
    """Open the logs that the settings ask for.

    Args:
        config: progress, tensorboard and wandb choose.
        run_dir: None if no log is kept in files.
        step: updates made so far; if there are any, files are continued.
        total_steps: of the whole run, for the bar.
    """
    mode = config.progress
    if mode == "auto":
        # Open MPI gives rank 0 a terminal of its own, wherever the output goes.
        mode = "bar" if sys.stdout.isatty() and "OMPI_COMM_WORLD_RANK" not in os.environ else "lines"
    logs: list[Log] = []
    if mode == "bar":
        logs.append(BarConsole(total_steps, step))
    elif mode == "lines":
        logs.append(LineConsole())
    if run_dir is not None:
        logs += [MainLog(run_dir / "main.log", step > 0), MetricsLog(run_dir / "metrics.jsonl", step > 0)]
        if config.tensorboard:
            logs.append(TensorBoardLog(run_dir))
    if config.wandb:
        logs.append(WandbLog(config.wandb, run_dir, config.to_dict()))
    return Logs(logs)
