"""Plots of training runs: loss, HellaSwag, learning rate, gradient norm and speed, several runs over each other.

Reads llm.c's main.log (`s:<step> <stream>:<value> ...`, one event a line) and llmc's metrics.jsonl. A resumed run may have logged a
step twice: the last value counts.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmc.formats.metrics import parse_row
from llmc.system.fs import StrPath, write_atomically
from llmc.system.toml import load_toml_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# llm.c published these (dev/vislog.ipynb): the loss of OpenAI's GPT-2 checkpoints on FineWeb's validation shard, in nats, and their
# HellaSwag acc_norm.
BASELINES = {
    "124M": {"val_loss": 3.424958, "hellaswag": 0.294463},
    "350M": {"val_loss": 3.083089, "hellaswag": 0.375224},
    "774M": {"val_loss": 3.000580, "hellaswag": 0.431986},
    "1558M": {"val_loss": 2.831273, "hellaswag": 0.488946},
}
# HellaSwag of GPT-3 models of about the same size (Brown et al. 2020). Their weights are not public, so there is no loss on FineWeb.
GPT3_HELLASWAG = {"124M": 0.337, "350M": 0.436, "774M": 0.510, "1558M": 0.547}

_LOG_NAMES = {"trl": "train_loss", "tel": "val_loss", "eval": "hellaswag", "lr": "lr", "norm": "norm"}
_LOG_VALUE = re.compile(r"(\w+):(\S+)")
_METRICS = {
    "train": {"loss": "train_loss", "lr": "lr", "norm": "norm", "tokens_per_second": "tokens_per_second"},
    "validation": {"loss": "val_loss"},
}


@dataclass
class Run:
    """The numbers that one run logged.

    Attributes:
        name: what the legend calls the run.
        series: values by step, for each of "train_loss", "val_loss", "hellaswag", "lr", "norm" and "tokens_per_second" that the
            run logged.
        tokens_per_step: tokens of one update; None if the run does not say, as llm.c's logs do not.
        unreadable: number of lines that were skipped because they are cut off, as by a machine that lost its power.
    """

    name: str
    series: dict[str, dict[int, float]] = field(default_factory=dict)
    tokens_per_step: int | None = None
    unreadable: int = 0

    def xy(self, name: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return a series in the order of steps, for plotting.

        Args:
            name: a key of series; one that is not there gives empty arrays.

        Returns:
            Steps and values, both of shape (n,), int64 and float64.
        """
        points = sorted(self.series.get(name, {}).items())
        return np.array([s for s, _ in points], np.int64), np.array([v for _, v in points], np.float64)

    def best(self, name: str) -> tuple[int, float] | None:
        """Return step and value of the best point of a series: the highest of "hellaswag", the lowest of any other.

        Returns:
            (step, value), or None if the series has no finite value.
        """
        sign = -1.0 if name == "hellaswag" else 1.0
        finite = [(s, v) for s, v in self.series.get(name, {}).items() if np.isfinite(v)]
        return min(finite, key=lambda point: sign * point[1]) if finite else None

    def _set(self, name: str, step: int, value: float) -> None:
        self.series.setdefault(name, {})[step] = value


def read_run(path: StrPath, name: str | None = None) -> Run:
    """Read the numbers that a run logged.

    Args:
        path: a run directory with main.log, metrics.jsonl or both, or one such file.
        name: what the legend calls the run; None is the name of its directory.

    Raises:
        FileNotFoundError: if there is no log.
        ValueError: if the file is not a log.
    """
    path = Path(path)
    if path.is_dir():
        logs = [path / n for n in ("main.log", "metrics.jsonl") if (path / n).is_file()]
        if not logs:
            raise FileNotFoundError(f"'{path}' has neither main.log nor metrics.jsonl: it is not a run directory")
    elif path.is_file():
        logs = [path]
    else:
        raise FileNotFoundError(f"there is no run directory or log file '{path}'")
    folder = logs[0].parent
    run = Run(name or folder.resolve().name)
    for log in logs:  # metrics.jsonl comes last: its numbers are not rounded, and replace those of main.log
        _read_log(run, log)
    if (folder / "config.toml").is_file():
        tokens = load_toml_file(folder / "config.toml").get("total_batch_size")
        run.tokens_per_step = tokens if isinstance(tokens, int) and tokens > 0 else None
    return run


def _read_log(run: Run, path: Path) -> None:
    read = _read_metric if path.suffix == ".jsonl" else _read_line
    good = bad = 0
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                read(run, line)
                good += 1
            except (ValueError, KeyError, TypeError, AttributeError):
                bad += 1
    if bad > good:
        raise ValueError(
            f"'{path}' is not a training log: {bad} of its {good + bad} lines are no 's:<step> <name>:<value>'"
        )
    run.unreadable += bad


def _read_line(run: Run, line: str) -> None:
    (first, step), *values = _LOG_VALUE.findall(line)
    if first != "s" or not values:
        raise ValueError(line)
    for name, value in values:
        if name in _LOG_NAMES:
            run._set(_LOG_NAMES[name], int(step), float(value))


def _read_metric(run: Run, line: str) -> None:
    row = parse_row(line)
    kind = row["kind"]
    for key, name in _METRICS.get(kind, {}).items():
        run._set(name, int(row["step"]), float(row[key]))
    if kind == "hellaswag":
        run._set("hellaswag", int(row["step"]), row["correct"] / row["total"])


def smooth(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Return the running mean of values.

    Args:
        values: shape (n,).
        window: how many values around each one are averaged; fewer at the two ends. 1 returns values as they are.

    Returns:
        The means, of shape (n,).
    """
    if window <= 1 or len(values) == 0:
        return values
    kernel = np.ones(min(window, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


# Title and series of each panel; a panel without data is left out.
_PANELS = (
    ("loss", ("train_loss", "val_loss")),
    ("HellaSwag accuracy", ("hellaswag",)),
    ("learning rate", ("lr",)),
    ("gradient norm", ("norm",)),
    ("tokens/s", ("tokens_per_second",)),
)


def figure(
    runs: Sequence[Run],
    *,
    x: str = "steps",
    tokens_per_step: int | None = None,
    window: int = 1,
    baselines: Sequence[str] = (),
) -> Figure:
    """Draw all runs into one figure, which has a panel for each kind of number that was logged.

    Args:
        runs: the runs, as from read_run().
        x: the horizontal axis: "steps" or "tokens".
        tokens_per_step: tokens of one update, for x = "tokens"; None takes what each run says.
        window: training loss and gradient norm are averaged over so many steps.
        baselines: sizes of GPT-2 ("124M", "350M", "774M", "1558M") whose published loss and accuracy are drawn as lines.

    Raises:
        ValueError: if x or a baseline is unknown, if there is nothing to plot, or if a run does not say its tokens per step and
            tokens_per_step is None.
    """
    from matplotlib.figure import Figure

    if x not in ("steps", "tokens"):
        raise ValueError(f"x is '{x}', expected steps or tokens")
    for size in baselines:
        if size not in BASELINES:
            raise ValueError(f"there is no baseline '{size}', only {', '.join(BASELINES)}")
    panels = [p for p in _PANELS if any(run.series.get(name) for run in runs for name in p[1])]
    if not panels:
        raise ValueError("there is nothing to plot: no step, validation or HellaSwag result was logged")
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    fig = Figure(figsize=(7 * columns, 4 * rows), layout="constrained")
    names = _labels(runs)
    for i, (title, series) in enumerate(panels):
        axes = fig.add_subplot(rows, columns, i + 1)
        for number, run in enumerate(runs):
            factor = 1 if x == "steps" else _tokens_per_step(run, tokens_per_step)
            _draw(axes, run, names[number], series, f"C{number % 10}", factor, window)
        if title == "loss":
            _log_scale(axes)
        _draw_baselines(axes, title, baselines)
        axes.set_title(title)
        axes.set_xlabel(x)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    return fig


def _tokens_per_step(run: Run, given: int | None) -> int:
    tokens = given or run.tokens_per_step
    if tokens is None:
        raise ValueError(
            f"run '{run.name}' does not say how many tokens a step has (its config.toml would): give tokens_per_step"
        )
    return tokens


def _labels(runs: Sequence[Run]) -> list[str]:
    # Bytes of a folder's name that are not UTF-8 cannot be drawn, and between two "$" matplotlib reads a formula.
    names = [run.name.encode(errors="replace").decode().replace("$", r"\$") for run in runs]
    return [n if names.count(n) == 1 else f"{n} ({i + 1})" for i, n in enumerate(names)]


def _draw(axes: Axes, run: Run, label: str, series: tuple[str, ...], color: str, factor: int, window: int) -> None:
    for name in series:
        steps, values = run.xy(name)
        if not len(steps):
            continue
        xs = steps * factor
        if name == "train_loss":
            axes.plot(xs, smooth(values, window), color=color, alpha=0.5, linewidth=1, label=f"{label}, training")
        elif name == "val_loss":
            axes.plot(xs, values, color=color, marker=".", label=f"{label}, validation")
        else:
            axes.plot(xs, smooth(values, window) if name == "norm" else values, color=color, linewidth=1, label=label)


def _log_scale(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(LogLocator(subs=[1 + i / 5 for i in range(45)]))
    axes.yaxis.set_minor_formatter(StrMethodFormatter(""))


def _draw_baselines(axes: Axes, title: str, sizes: Sequence[str]) -> None:
    for i, size in enumerate(sizes):
        style = ("--", ":", "-.", (0, (1, 3)))[i % 4]
        if title == "loss":
            axes.axhline(
                BASELINES[size]["val_loss"], color="grey", linestyle=style, label=f"GPT-2 {size}, FineWeb validation"
            )
        elif title == "HellaSwag accuracy":
            axes.axhline(BASELINES[size]["hellaswag"], color="grey", linestyle=style, label=f"GPT-2 {size}")
            axes.axhline(GPT3_HELLASWAG[size], color="tan", linestyle=style, label=f"GPT-3 of about {size}")


def plot_runs(
    runs: Sequence[StrPath],
    out: StrPath,
    *,
    x: str = "steps",
    tokens_per_step: int | None = None,
    window: int = 1,
    baselines: Sequence[str] = (),
) -> None:
    """Read runs and write one figure of them all.

    Args:
        runs: run directories or log files, as read_run() takes them.
        out: the file to write; its suffix says the format: .png, .svg or .pdf.
        x, tokens_per_step, window, baselines: as of figure().

    Raises:
        FileNotFoundError: if a run has no log.
        ValueError: if out has another suffix, a file is not a log, or as of figure().
    """
    import matplotlib

    file_format = Path(out).suffix.lstrip(".").lower()
    if file_format not in ("png", "svg", "pdf"):
        raise ValueError(f"'{out}' must end in .png, .svg or .pdf")
    fig = figure(
        [read_run(run) for run in runs], x=x, tokens_per_step=tokens_per_step, window=window, baselines=baselines
    )
    buffer = io.BytesIO()
    dateless = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}  # so that the same runs make the same file
    with matplotlib.rc_context({"svg.hashsalt": "llmc"}):
        fig.savefig(buffer, format=file_format, dpi=110, metadata=dateless.get(file_format))
    write_atomically(out, [buffer.getvalue()])
