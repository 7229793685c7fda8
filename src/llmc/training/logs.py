"""Where a run's numbers go: the terminal, llm.c's main.log, metrics.jsonl, TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib.util
import io
import math
import os
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from llmc.formats.metrics import format_row
from llmc.optim.schedule import BatchSchedule
from llmc.system.terminal import harmless
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

    def start(self, step: int, total_steps: int, table: str, short: str) -> None:
        """Take note of the start of a run.

        Args:
            step: updates made before, by the run that this one continues.
            total_steps: of the whole run.
            table: llm.c's table of parameters.
            short: the same in a few lines.
        """

    def step(self, info: StepInfo) -> None:
        """Take note of a training step."""

    def validation(self, step: int, loss: float, bits_per_byte: float | None = None) -> None:
        """Take note of a validation loss, in nats per token, and of what it is in bits per byte, if a tokenizer is known."""

    def hellaswag(self, step: int, correct: int, total: int) -> None:
        """Take note of how many of HellaSwag's examples were answered correctly."""

    def text(self, message: str) -> None:
        """Take note of a message for the user. One of several lines has a layout of its own, as a sample has."""

    def finish(self, mean_milliseconds: float | None) -> None:
        """Take note that no step follows, only messages. mean_milliseconds: of a step, without the first; None if there are no others."""

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

    def validation(self, step: int, loss: float, bits_per_byte: float | None = None) -> None:
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
        self._mean_milliseconds: float | None = None

    def _row(self, kind: str, **values: Any) -> None:
        self._file.write(format_row(kind, **values))
        self._file.flush()

    def start(self, step: int, total_steps: int, table: str, short: str) -> None:
        self._row("start", step=step, total_steps=total_steps)

    def step(self, info: StepInfo) -> None:
        values = {k: v for k, v in vars(info).items() if k not in ("total_steps", "dtype")}
        self._row("train", **values)

    def validation(self, step: int, loss: float, bits_per_byte: float | None = None) -> None:
        known = {} if bits_per_byte is None else {"bits_per_byte": bits_per_byte}
        self._row("validation", step=step, loss=loss, **known)

    def hellaswag(self, step: int, correct: int, total: int) -> None:
        self._row("hellaswag", step=step, correct=correct, total=total)

    def text(self, message: str) -> None:
        self._row("message", text=message)

    def finish(self, mean_milliseconds: float | None) -> None:
        self._mean_milliseconds = mean_milliseconds

    def close(self) -> None:
        self._row("end", mean_milliseconds=self._mean_milliseconds)
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


_PLAIN_COLUMNS = 80  # of a terminal that does not know its width
_NOTEBOOK_COLUMNS = 100  # what a notebook's cell shows without a break, on most screens


def _is_notebook(out: TextIO) -> bool:
    return type(out).__module__ == "ipykernel.iostream"


def _is_terminal(out: TextIO) -> bool:
    # What a program puts in the place of stdout often has write() and flush() alone.
    return hasattr(out, "isatty") and out.isatty()


def _columns(out: TextIO) -> int | None:
    """Return how many characters a line of a terminal or a notebook holds, or None if out is neither."""
    if _is_notebook(out):
        return _NOTEBOOK_COLUMNS
    try:
        return (os.get_terminal_size(out.fileno()).columns or _PLAIN_COLUMNS) if _is_terminal(out) else None
    except (OSError, ValueError):
        return None


class Console(Log):
    """Prints messages. A line that is wider than the terminal goes on below at a word's begin.

    Args:
        out: the stream to print to; None is stdout.
    """

    def __init__(self, out: TextIO | None = None) -> None:
        # A program that pythonw or a service runs may have no standard output.
        self._out = out or sys.stdout or open(os.devnull, "w", encoding="utf-8")

    def _print(self, line: str) -> None:
        encoding = getattr(self._out, "encoding", None) or "utf-8"
        # A sample may have any characters: none must steer the terminal, nor end the run because the console's encoding lacks it.
        self._out.write((harmless(line) + "\n").encode(encoding, errors="replace").decode(encoding))
        self._out.flush()

    def _wrapped(self, text: str) -> str:
        columns = _columns(self._out)
        if columns is None:
            return text
        return "\n".join(
            textwrap.fill(line, columns, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
            for line in text.split("\n")
        )

    def text(self, message: str) -> None:
        self._print(message if "\n" in message else self._wrapped(message))


class LineConsole(Console):
    """Prints the lines that llm.c prints."""

    def start(self, step: int, total_steps: int, table: str, short: str) -> None:
        self._print(table)

    def step(self, info: StepInfo) -> None:
        self._print(step_line(info))

    def validation(self, step: int, loss: float, bits_per_byte: float | None = None) -> None:
        self._print(f"val loss {loss:f}" + ("" if bits_per_byte is None else f" | bits per byte {bits_per_byte:f}"))

    def hellaswag(self, step: int, correct: int, total: int) -> None:
        self._print(f"HellaSwag: {correct}/{total} = {correct / total:f}")

    def finish(self, mean_milliseconds: float | None) -> None:
        if mean_milliseconds is not None:
            self._print(f"total average iteration time: {mean_milliseconds:f} ms")


_ALIKE = BatchSchedule(1, 1, 0)  # a run all of whose steps have the same tokens


class _Pace:
    """How long a run takes, by its steps so far and all that comes between them. The first step, which warms up, is left out.

    Args:
        clock: returns the time in seconds.
        batch: the tokens of its steps, which take time in proportion.
    """

    def __init__(self, clock: Callable[[], float], batch: BatchSchedule) -> None:
        self._clock, self._batch = clock, batch
        self._start = clock()
        self._first: tuple[int, float] | None = None  # steps done after the first, and when
        self._last = (0, 0.0)  # the same after the newest

    def step(self, done: int) -> None:
        """Take note of a step. done: steps of the run that are made with it."""
        self._last = (done, self._clock())
        self._first = self._first or self._last

    def text(self, total: int) -> str:
        """Return how long the rest of so many steps will take, at the end how long all took; empty if that is not known.

        Args:
            total: steps of the whole run; 0 if that is not known.
        """
        done, now = self._last
        if total == 0:
            return ""
        if done >= total:
            return f"in {tqdm.format_interval(self._clock() - self._start)}"
        if self._first is None or done == self._first[0]:
            return ""
        first, so_far, all_of_them = (int(n) for n in self._batch.tokens_before([self._first[0], done, total]))
        each = (now - self._first[1]) / (so_far - first)
        return f"{tqdm.format_interval(each * (all_of_them - so_far))} left"


def validation_text(loss: float, bits_per_byte: float | None) -> str:
    """Return a validation loss as a line has it."""
    return f"val loss {loss:.4f}" + ("" if bits_per_byte is None else f" ({bits_per_byte:.4f} bits/byte)")


class BriefConsole(Console):
    """Prints a few lines about the run, and one at each validation.

    Args:
        every: print a line after so many steps without a validation; 0 or -1, as of val_every: twenty lines in the whole run.
        out: the stream to print to; None is stdout.
        clock: returns the time in seconds.
        batch: the tokens of the run's steps.
    """

    def __init__(
        self,
        every: int = 0,
        out: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        batch: BatchSchedule = _ALIKE,
    ) -> None:
        super().__init__(out)
        self._every, self._clock, self._batch = every, clock, batch
        self._total = 0
        self._pace = _Pace(clock, batch)
        self._last: StepInfo | None = None
        self._told = 0  # the step of the last line

    def start(self, step: int, total_steps: int, table: str, short: str) -> None:
        if short:
            self._print(self._wrapped(short))
        self._total, self._told = total_steps, step
        # A run that is watched may be resumed from an earlier step.
        if self._last is not None and self._last.step + 1 != step:
            self._last = None
        self._pace = _Pace(self._clock, self._batch)

    def step(self, info: StepInfo) -> None:
        # Whether a validation follows a step is known when the next step comes.
        every = self._every if self._every > 0 else max(1, self._total // 20)
        if self._last is not None and self._last.step + 1 - self._told >= every:
            self._tell(self._last.step + 1)
        self._warn_if_skipped(info)
        self._pace.step(info.step + 1)
        self._last = info

    def _warn_if_skipped(self, info: StepInfo) -> None:
        if info.skipped:
            self._print(f"{self._place(info.step + 1)}: update skipped: {info.skipped}")

    def _place(self, step: int) -> str:
        return f"step {step:{len(str(self._total))}}/{self._total}" if self._total else f"step {step}"

    def _tell(self, step: int, validation: str = "") -> None:
        """Print the line of a step. Without a step before it, as at the start, it has the validation loss alone."""
        self._told = step
        facts = [validation]
        if self._last is not None:
            facts.insert(0, f"train loss {self._last.loss:.4f}")
            facts += [f"{self._last.tokens_per_second:,.0f} tokens/s", self._pace.text(self._total)]
        self._print(f"{self._place(step)}: {', '.join(filter(None, facts))}")

    def validation(self, step: int, loss: float, bits_per_byte: float | None = None) -> None:
        self._tell(step, validation_text(loss, bits_per_byte))

    def hellaswag(self, step: int, correct: int, total: int) -> None:
        self._print(f"{self._place(step)}: HellaSwag {correct}/{total} = {correct / total:.4f}")

    def finish(self, mean_milliseconds: float | None) -> None:
        if self._last is not None and self._last.step + 1 > self._told:
            self._tell(self._last.step + 1)


_LEAST_BAR = 10


def bar_format(numbers: Sequence[str], columns: int, known: bool = True) -> str:
    """Return tqdm's format of a progress bar with as many of the numbers as leave it ten characters.

    Args:
        numbers: the most important first.
        columns: what a line holds.
        known: whether the number of steps is known; if it is not, there is no bar.
    """
    frame = "{percentage:3.0f}%|{bar}| " if known else ""
    room = columns - (len("100%|| ") + _LEAST_BAR if known else 0)
    while numbers and len(", ".join(numbers)) > room:
        numbers = numbers[:-1]
    return frame + ", ".join(numbers)


class BarConsole(BriefConsole):
    """Shows a progress bar with the newest numbers, and prints everything else above it. In a notebook the bar is a widget.

    Args:
        out: the terminal; None is stdout.
        clock: returns the time in seconds.
        batch: the tokens of the run's steps.
    """

    def __init__(
        self,
        out: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        batch: BatchSchedule = _ALIKE,
    ) -> None:
        super().__init__(out=out, clock=clock, batch=batch)
        self._bar: Any = None
        self._widget = False
        self._validation: tuple[float, float | None] | None = None

    def _print(self, line: str) -> None:
        if self._bar is None:
            super()._print(line)
        else:
            with self._bar.external_write_mode(file=self._out):
                super()._print(line)

    def start(self, step: int, total_steps: int, table: str, short: str) -> None:
        super().start(step, total_steps, table, short)
        if self._bar is None:
            kind, width = self._kind(), self._width()
            self._widget = kind is not tqdm
            # tqdm asks for the number of rows only to place several bars.
            sizes = {} if self._widget else {"ncols": width, "nrows": 24}
            self._bar = kind(
                total=total_steps or None, initial=step, file=self._out, bar_format=self._format(width), **sizes
            )
        else:
            self._bar.total, self._bar.n = total_steps or None, step
            self._fit()
            self._bar.refresh()

    def _kind(self) -> Any:
        if not _is_notebook(self._out):
            return tqdm
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about ipywidgets if it is missing: then this is the bar of a terminal
            from tqdm.autonotebook import tqdm as notebook_bar
        return notebook_bar

    def _width(self) -> int:
        # The last column stays free: some terminals go to the next line when it is filled.
        return (_columns(self._out) or _PLAIN_COLUMNS) - 1

    def _format(self, width: int) -> str:
        info, numbers = self._last, []
        loss, bits = self._validation or (None, None)
        if info is not None:
            numbers.append(f"loss {info.loss:.4f}")
        if loss is not None:
            numbers.append(f"val {loss:.4f}")
        if info is not None:
            done = info.step + 1
            speed = f"{info.flops_per_second / 1e9:,.0f} GFLOP/s"
            if info.mfu is not None:
                speed += f" ({info.mfu:.0f}% of peak)"
            numbers += [f"{info.tokens_per_second:,.0f} tok/s", self._pace.text(self._total)]
            numbers.append("" if bits is None else f"{bits:.3f} bits/byte")
            numbers += [self._place(done), speed, f"norm {info.norm:.2f}", f"lr {info.lr:.2e}"]
        return bar_format([n for n in numbers if n], width, known=self._total > 0)

    def _fit(self) -> None:
        """Let the bar have the newest numbers and the terminal's width when it is drawn next."""
        width = self._width()
        self._bar.bar_format = self._format(width)
        if not self._widget:
            self._bar.ncols = width

    def step(self, info: StepInfo) -> None:
        self._warn_if_skipped(info)
        self._pace.step(info.step + 1)
        self._last = info
        self._fit()
        self._bar.update(info.step + 1 - self._bar.n)

    def validation(self, step: int, loss: float, bits_per_byte: float | None = None) -> None:
        self._validation = loss, bits_per_byte
        self._fit()
        self._print(f"step {step}: {validation_text(loss, bits_per_byte)}")

    def finish(self, mean_milliseconds: float | None) -> None:
        """Leave the bar as it is now, so that what is printed from here on stands below it."""
        if self._bar is not None:
            self._fit()
            self._bar.close()
            self._bar = None

    def close(self) -> None:
        self.finish(None)


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

    def validation(self, step: int, loss: float, bits_per_byte: float | None = None) -> None:
        self._writer.add_scalar("validation/loss", loss, step)
        if bits_per_byte is not None:
            self._writer.add_scalar("validation/bits_per_byte", bits_per_byte, step)

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

    def validation(self, step: int, loss: float, bits_per_byte: float | None = None) -> None:
        known = {} if bits_per_byte is None else {"validation/bits_per_byte": bits_per_byte}
        self._run.log({"validation/loss": loss, **known}, step=step)

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
                if isinstance(log, Console):  # the program that reads the output has ended: `llmc-train | head`
                    raise
                self._logs.remove(log)
                self.text(f"warning: {type(log).__name__} cannot be written and is left out from here on: {e}")

    def start(self, step: int, total_steps: int, table: str, short: str) -> None:
        self._each(lambda log: log.start(step, total_steps, table, short))

    def step(self, info: StepInfo) -> None:
        self._each(lambda log: log.step(info))

    def validation(self, step: int, loss: float, bits_per_byte: float | None = None) -> None:
        self._each(lambda log: log.validation(step, loss, bits_per_byte))

    def hellaswag(self, step: int, correct: int, total: int) -> None:
        self._each(lambda log: log.hellaswag(step, correct, total))

    def text(self, message: str) -> None:
        self._each(lambda log: log.text(message))

    def finish(self, mean_milliseconds: float | None) -> None:
        self._each(lambda log: log.finish(mean_milliseconds))

    def close(self) -> None:
        self._each(lambda log: log.close())


def shows_bar() -> bool:
    """Return whether stdout is a notebook, or a terminal that can move its cursor back."""
    if _is_notebook(sys.stdout):
        return True
    # Open MPI gives rank 0 a terminal of its own, wherever the output goes.
    return _is_terminal(sys.stdout) and os.environ.get("TERM") != "dumb" and "OMPI_COMM_WORLD_RANK" not in os.environ


def open_logs(config: RunConfig, run_dir: Path | None, step: int) -> Logs:
    """Open the logs that the settings ask for.

    Args:
        config: progress, tensorboard and wandb choose.
        run_dir: None if no log is kept in files.
        step: updates made so far; if there are any, files are continued.
    """
    mode = config.progress
    if mode == "auto":
        mode = "bar" if shows_bar() else "brief"
    logs: list[Log] = []
    batch = BatchSchedule.of(config.to_dict())
    if mode == "bar":
        logs.append(BarConsole(batch=batch))
    elif mode == "brief":
        logs.append(BriefConsole(config.val_every, batch=batch))
    elif mode == "lines":
        logs.append(LineConsole())
    if run_dir is not None:
        logs += [MainLog(run_dir / "main.log", step > 0), MetricsLog(run_dir / "metrics.jsonl", step > 0)]
        if config.tensorboard:
            logs.append(TensorBoardLog(run_dir))
    if config.wandb:
        logs.append(WandbLog(config.wandb, run_dir, config.to_dict()))
    return Logs(logs)
