"""Plots of training runs: loss, HellaSwag, learning rate, gradient norm and speed, several runs over each other.

Reads llm.c's main.log (`s:<step> <stream>:<value> ...`, one event a line) and llmc's metrics.jsonl. A run that was resumed has
logged some steps twice: the last value counts.
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
from llmc.training.settings import load_toml

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Published by llm.c (dev/vislog.ipynb): OpenAI's GPT-2 checkpoints on FineWeb's validation shard, and their HellaSwag acc_norm.
BASELINES = {
    "124M": {"val_loss": 3.424958, "hellaswag": 0.294463},
    "350M": {"val_loss": 3.083089, "hellaswag": 0.375224},
    "774M": {"val_loss": 3.000580, "hellaswag": 0.431986},
    "1558M": {"val_loss": 2.831273, "hellaswag": 0.488946},
}
# Brown et al. 2020, for models of about the same size; GPT-3's weights are not public, so it has no loss on FineWeb.
GPT3_HELLASWAG = {"124M": 0.337, "350M": 0.436, "774M": 0.510, "1558M": 0.547}

_LOG_NAMES = {"trl": "train_loss", "tel": "val_loss", "eval": "hellaswag", "lr": "lr", "norm": "norm"}
_LOG_VALUE = re.compile(r"(\w+):(\S+)")
_METRICS = {
    "train": {"loss": "train_loss", "lr": "lr", "norm": "norm", "tokens_per_second": "tokens_per_second"},
    "validation": {"loss": "val_loss"},
}


@dataclass
class Run:
    """The numbers of one run. series: "train_loss", "val_loss", "hellaswag", "lr", "norm", "tokens_per_second", each by step.

    tokens_per_step: None where the run does not say (llm.c's logs do not).
    unreadable: lines passed over because they were cut off, as by a machine that lost its power.
    """

    name: str
    series: dict[str, dict[int, float]] = field(default_factory=dict)
    tokens_per_step: int | None = None
    unreadable: int = 0

    def xy(self, name: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Steps and values of a series, by step."""
        points = sorted(self.series.get(name, {}).items())
        return np.array([s for s, _ in points], np.int64), np.array([v for _, v in points], np.float64)

    def best(self, name: str) -> tuple[int, float] | None:
        """(step, value) of the lowest loss, or of the highest for "hellaswag"; None where nothing finite was logged."""
        sign = -1.0 if name == "hellaswag" else 1.0
        finite = [(s, v) for s, v in self.series.get(name, {}).items() if np.isfinite(v)]
        return min(finite, key=lambda point: sign * point[1]) if finite else None

    def _set(self, name: str, step: int, value: float) -> None:
        self.series.setdefault(name, {})[step] = value


def read_run(path: StrPath, name: str | None = None) -> Run:
    """A run directory (main.log, metrics.jsonl, config.toml), or one log file.

    FileNotFoundError where there is no log, ValueError where the file is not one.
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
    for log in logs:  # metrics.jsonl last, for its numbers are not rounded
        _read_log(run, log)
    if (folder / "config.toml").is_file():
        tokens = load_toml(folder / "config.toml").get("total_batch_size")
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
    """Mean over the window's values around each one; at the ends over those there are."""
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
    """All runs in one figure.

    x: "steps" or "tokens"; tokens are steps times tokens_per_step, by default what each run says.
    window: training loss and norm are smoothed over this many steps.
    baselines: sizes of GPT-2 whose published loss and accuracy are drawn ("124M", "350M", "774M", "1558M").
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
    names = [run.name for run in runs]
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
    """Reads run directories or logs and writes one figure; the suffix of out says what kind (.png, .svg, .pdf)."""
    import matplotlib

    form = Path(out).suffix.lstrip(".").lower()
    if form not in ("png", "svg", "pdf"):
        raise ValueError(f"'{out}' must end in .png, .svg or .pdf")
    fig = figure(
        [read_run(run) for run in runs], x=x, tokens_per_step=tokens_per_step, window=window, baselines=baselines
    )
    buffer = io.BytesIO()
    dateless = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}  # the same runs make the same file
    with matplotlib.rc_context({"svg.hashsalt": "llmc"}):
        fig.savefig(buffer, format=form, dpi=110, metadata=dateless.get(form))
    write_atomically(out, [buffer.getvalue()])
