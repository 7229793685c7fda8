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
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmc import _llmc
from llmc.formats.metrics import parse_row
from llmc.optim.schedule import BatchSchedule
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
_GPT2_VOCABULARIES = (50257, 50304)  # as it is, and padded

_LOG_FILES = ("main.log", "metrics.jsonl")
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
        series: values by step, for each of "train_loss", "val_loss", "val_bits_per_byte", "hellaswag", "lr", "norm" and
            "tokens_per_second" that the run logged.
        batch: the tokens of each update; None if the run does not say, as llm.c's logs do not.
        vocab_size: tokens that its losses choose among; None if the run does not say.
        unreadable: number of lines that were skipped because they are cut off, as by a machine that lost its power.
    """

    name: str
    series: dict[str, dict[int, float]] = field(default_factory=dict, repr=False)
    batch: BatchSchedule | None = None
    vocab_size: int | None = None
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
        self.series.setdefault(name, {})[step] = float(value)


def read_run(path: StrPath, name: str | None = None) -> Run:
    """Read the numbers that a run logged.

    Args:
        path: a run directory with main.log, metrics.jsonl or both, or one such file.
        name: what the legend calls the run; None is the name of its directory, or of a log file that is called neither of these.

    Raises:
        FileNotFoundError: if there is no log.
        ValueError: if the file is not a log.
    """
    path = Path(path)
    if path.is_dir():
        logs = [path / n for n in _LOG_FILES if (path / n).is_file()]
        if not logs:
            raise FileNotFoundError(f"'{path}' has neither main.log nor metrics.jsonl: it is not a run directory")
    elif path.is_file():
        logs = [path]
    else:
        raise FileNotFoundError(f"there is no run directory or log file '{path}'")
    folder = logs[0].parent
    own_name = path.is_file() and path.name not in _LOG_FILES  # as 124M.log
    run = Run(name or (path.stem if own_name else folder.resolve().name))
    for log in logs:  # metrics.jsonl comes last: its numbers are not rounded, and replace those of main.log
        _read_log(run, log)
    if (folder / "config.toml").is_file():
        settings = load_toml_file(folder / "config.toml")
        tokens = settings.get("total_batch_size")
        run.batch = BatchSchedule.of(settings) if isinstance(tokens, int) and tokens > 0 else None
    run.vocab_size = _vocab_size(folder)
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
        run._set(name, int(row["step"]), row[key])
    if kind == "validation" and "bits_per_byte" in row:  # the run knows its tokenizer
        run._set("val_bits_per_byte", int(row["step"]), row["bits_per_byte"])
    if kind == "hellaswag":
        run._set("hellaswag", int(row["step"]), row["correct"] / row["total"])


def _vocab_size(folder: Path) -> int | None:
    """Return the vocabulary of the newest checkpoint in a run directory, else of its tokenizer; None if it has neither."""
    for path in [*sorted(folder.glob("model_*.bin"), reverse=True), folder / "tokenizer.bin"]:
        try:
            if path.name == "tokenizer.bin":
                return int(_llmc.Tokenizer(path).vocab_size)
            return int(_llmc.inspect_checkpoint(path)[0].vocab_size)
        except (_llmc.Error, OSError):  # not there, or damaged: the curves can be drawn without
            pass
    return None


def smooth(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Return the running mean of values.

    Args:
        values: shape (n,). Those that are not finite are left out of the means.
        window: how many values are averaged, rounded up to an odd number: each with as many before it as after it. A curve begins
            steeply, so near its beginning there are fewer on both sides; near its end there are fewer after it. 1 returns values as
            they are.

    Returns:
        The means, of shape (n,); NaN if no value of a window is finite.
    """
    if window <= 1 or len(values) == 0:
        return values
    finite = np.isfinite(values)
    places = np.arange(len(values))
    reach = np.minimum(window // 2, places)
    first, last = places - reach, np.minimum(places + reach + 1, len(values))

    def sums(terms: NDArray[np.float64]) -> NDArray[np.float64]:
        before = np.concatenate([[0.0], np.cumsum(terms)])
        return np.asarray(before[last] - before[first])

    count = sums(finite.astype(np.float64))
    means = np.full(len(values), np.nan)
    np.divide(sums(np.where(finite, values, 0.0)), count, out=means, where=count > 0)
    return means


_VALIDATION = ("val_loss", "val_bits_per_byte")
_LOSS, _BITS = "loss", "validation, bits per byte"
# Title and series of each panel; a panel without data is left out. The first that is there is the large one.
_PANELS = (
    (_LOSS, ("train_loss", "val_loss")),
    ("HellaSwag accuracy", ("hellaswag",)),
    ("gradient norm", ("norm",)),
    ("learning rate", ("lr",)),
    ("tokens/s", ("tokens_per_second",)),
)
# Okabe and Ito's colours, which colour-blind readers tell apart too, without the yellow, which is too light for a line.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", ":", "-.")
_LONGEST_NAME = 36
_FEW = 4  # of more runs the means are drawn alone


def figure(
    runs: Sequence[Run],
    *,
    x: str = "steps",
    tokens_per_step: int | None = None,
    window: int | None = None,
    baselines: Sequence[str] = (),
    title: str | None = None,
    bits_per_byte: bool | None = None,
) -> Figure:
    """Draw all runs into one figure, which has a panel for each kind of number that was logged.

    Limits follow from the curves without single spikes and the first steps; points outside of them are marked at the edge.

    Args:
        runs: the runs, as from read_run().
        x: the horizontal axis: "steps" or "tokens".
        tokens_per_step: tokens of one update, for x = "tokens"; None takes what each run says.
        window: training loss and gradient norm are drawn thin as they are, and averaged over so many steps; 1 draws no mean, None
            takes a fortieth of a run.
        baselines: sizes of GPT-2 ("124M", "350M", "774M", "1558M") whose published loss and accuracy are drawn as lines.
        title: None says of one run its name and what it reached, and is none for several.
        bits_per_byte: draw validation losses as bits per byte of the text, in which runs of different tokenizers compare, in place of
            all losses per token; None does so if the vocabularies differ, every run knows them, and there are no baselines.

    Raises:
        ValueError: if x or a baseline is unknown, if a run has another vocabulary than the baselines, if there is nothing to plot, if
            a run does not say its tokens per step and tokens_per_step is None, or if bits_per_byte is asked for beside baselines, or
            of a run that knows none.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    if x not in ("steps", "tokens"):
        raise ValueError(f"x is '{x}', expected steps or tokens")
    _check_baselines(runs, baselines)
    panels = list(_PANELS)
    if _in_bits(runs, bits_per_byte, baselines):
        panels[0] = (_BITS, ("val_bits_per_byte",))
    panels = [p for p in panels if any(_is_worth_drawing(runs, name) for name in p[1])]
    if not panels:
        raise ValueError("there is nothing to plot: no step, validation or HellaSwag result was logged")
    batches = [_batch(run, 1 if x == "steps" else tokens_per_step) for run in runs]
    names, _ = _labels([run.name for run in runs])
    if title is None and len(runs) == 1:
        title = _title(names[0], runs[0])
    # Fonts are looked up when a text is made.
    with rc_context({"font.family": _fonts("".join(names) + (title or ""))[0]}):
        fig = Figure(figsize=(11 if len(panels) > 1 else 7.5, max(5.0, 1.6 * (len(panels) - 1))), layout="constrained")
        grid = fig.add_gridspec(
            max(1, len(panels) - 1), 2 if len(panels) > 1 else 1, width_ratios=[2, 1][: len(panels)]
        )
        for i, (heading, series) in enumerate(panels):
            axes = fig.add_subplot(grid[:, 0] if i == 0 else grid[i - 1, 1])
            _draw_panel(axes, heading, series, runs, batches, window, baselines)
            if i in (0, len(panels) - 1):
                axes.set_xlabel(x)
        if len(runs) > 1:
            _draw_legend(fig, names, runs, title, both=panels[0][0] == _LOSS)
        elif title:
            fig.suptitle(title, fontsize="large")
    return fig


def _in_bits(runs: Sequence[Run], asked: bool | None, baselines: Sequence[str]) -> bool:
    """Return whether to draw bits per byte in place of losses."""
    without = [run.name for run in runs if not run.series.get("val_bits_per_byte")]
    if asked is None:
        return not without and not baselines and len({run.vocab_size for run in runs}) > 1
    if asked and without:
        raise ValueError(
            f"run '{without[0]}' has no bits per byte: it was not validated, knew no tokenizer, or is an older llmc's or llm.c's"
        )
    if asked and baselines:
        raise ValueError(
            f"baseline {baselines[0]} is a loss in nats per token: bits_per_byte cannot be drawn beside it"
        )
    return asked


def _check_baselines(runs: Sequence[Run], baselines: Sequence[str]) -> None:
    for size in baselines:
        if size not in BASELINES:
            raise ValueError(f"there is no baseline '{size}', only {', '.join(BASELINES)}")
    for run in runs:
        if baselines and run.vocab_size not in (None, *_GPT2_VOCABULARIES):
            raise ValueError(
                f"baseline {baselines[0]} is a loss over GPT-2's vocabulary of 50,257 tokens, and run '{run.name}' has one of "
                f"{run.vocab_size:,}: losses per token of different vocabularies do not compare"
            )


def _is_worth_drawing(runs: Sequence[Run], name: str) -> bool:
    """Whether a series was logged; of learning rates, whether they are not all the same."""
    values = {v for run in runs for v in run.series.get(name, {}).values()}
    return len(values) > (1 if name == "lr" else 0)


def _batch(run: Run, given: int | None) -> BatchSchedule:
    batch = run.batch if given is None else BatchSchedule(given, given, 0)
    if batch is None:
        raise ValueError(
            f"run '{run.name}' does not say how many tokens a step has (its config.toml would): give tokens_per_step"
        )
    return batch


def _title(name: str, run: Run) -> str:
    steps = max(max(points) for points in run.series.values() if points)
    for series, text in (("val_loss", "validation loss"), ("train_loss", "training loss")):
        best = run.best(series)
        if best is not None:
            bits = run.series.get("val_bits_per_byte", {}).get(best[0]) if series == "val_loss" else None
            also = "" if bits is None else f" ({bits:.3f} bits per byte)"
            of = f" of {steps:,}" if best[0] != steps else ""
            return f"{name}: {text} {best[1]:.3f}{also} at step {best[0]:,}{of}"
    return name


# ---- names and fonts ----


def _labels(names: Sequence[str]) -> tuple[list[str], str]:
    """Return how the figure calls each run, and the characters that no font here has. Names are short if that tells them apart."""
    # Bytes of a folder's name that are not UTF-8 cannot be drawn, nor control characters.
    names = ["".join(c if c.isprintable() else "?" for c in name) for name in names]
    if len(names) > 1 and max(map(len, names)) > _LONGEST_NAME:  # as a sweep's: "learning_rate=0.001,batch_size=64"
        parts = [name.split(",") for name in names]
        common = set(parts[0]).intersection(*parts[1:])
        names = [",".join(p for p in own if p not in common) or ",".join(own) for own in parts]
    short = [_shortened(name) for name in names]
    if len(set(short)) == len(set(names)):
        names = short
    missing = _fonts("".join(names))[1]
    names = [name.translate(dict.fromkeys(map(ord, missing), "?")) for name in names]
    names = [n if names.count(n) == 1 else f"{n} ({i + 1})" for i, n in enumerate(names)]
    return [name.replace("$", r"\$") for name in names], missing  # between two "$" matplotlib reads a formula


def _shortened(name: str) -> str:
    """Return a name, or its begin and end."""
    half = _LONGEST_NAME // 2
    return name if len(name) <= _LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}"


def _fonts(text: str) -> tuple[list[str], str]:
    """Return the font families that a text needs, matplotlib's own first, and what characters no installed font has.

    matplotlib looks for each character in the families in turn, but finds none that it was not told of.
    """
    from matplotlib import font_manager, rcParams

    families = list(rcParams["font.family"])
    missing = set(text)
    missing -= _characters(font_manager.findfont(font_manager.FontProperties(family=families)), missing)
    for font in font_manager.fontManager.ttflist if missing else ():
        # matplotlib's "Last Resort" has a box for every character.
        found = set() if font.name.startswith("Last Resort") else _characters(font.fname, missing)
        if found:
            families.append(font.name)
            missing -= found
        if not missing:
            break
    return families, "".join(sorted(missing))


def _characters(font: str, wanted: set[str]) -> set[str]:
    """Return those of some characters that a font file has."""
    from matplotlib.font_manager import get_font

    try:
        known = get_font(font)
    except (OSError, RuntimeError):
        return set()
    return {c for c in wanted if known.get_char_index(ord(c))}


# ---- panels ----


@dataclass
class _Curve:
    """A series of a run as a panel draws it, at the places xs."""

    kind: str
    steps: NDArray[np.int64]
    xs: NDArray[np.int64]
    values: NDArray[np.float64]
    look: dict[str, Any]
    mean_over: int


def _draw_panel(
    axes: Axes,
    heading: str,
    series: tuple[str, ...],
    runs: Sequence[Run],
    batches: Sequence[BatchSchedule],
    window: int | None,
    baselines: Sequence[str],
) -> None:
    curves: list[_Curve] = []
    for number, (run, batch) in enumerate(zip(runs, batches)):
        for name in series:
            steps, values = run.xy(name)
            if len(steps):
                mean_over = 1
                if name in ("train_loss", "norm"):
                    mean_over = max(1, len(steps) // 40) if window is None else window
                look = _look(len(curves) if len(runs) == 1 else number)
                curves.append(_Curve(name, steps, batch.tokens_before(steps), values, look, mean_over))
    lines = _baseline_lines(heading, baselines)
    low, high = _limits(curves, heading, [value for value, _, _ in lines])
    for curve in curves:
        _draw(axes, curve, few=len(runs) <= _FEW)
    for value, _, color in lines:
        axes.axhline(value, color=color, linestyle="--", linewidth=1)
    _scale(axes, heading, low, high)
    _mark_outside(axes, curves, low, high)
    ends = [_end(curve) for curve in curves] if len(runs) == 1 and len(curves) > 1 else []
    _write_at_ends(axes, [*ends, *lines])
    vocabularies = sorted({run.vocab_size for run in runs if run.vocab_size is not None})
    if heading == _LOSS and len(vocabularies) > 1:
        heading += f" (vocabularies of {' and '.join(f'{v:,}' for v in vocabularies)} do not compare)"
    axes.set_title(heading, fontsize="medium", loc="left")
    axes.grid(alpha=0.25)
    axes.margins(x=0.02)
    axes.spines[["top", "right"]].set_visible(False)


def _look(number: int) -> dict[str, Any]:
    """Return colour and line style of a run, or of a curve of the only run, by its number."""
    return {"color": _COLORS[number % len(_COLORS)], "linestyle": _STYLES[number // len(_COLORS) % len(_STYLES)]}


def _draw(axes: Axes, curve: _Curve, few: bool) -> None:
    look = curve.look
    if curve.kind in _VALIDATION:
        marker = "o" if len(curve.xs) <= 30 else None
        axes.plot(curve.xs, curve.values, marker=marker, markersize=4, linewidth=1.6, label=curve.kind, **look)
        return
    if curve.mean_over == 1:
        marker = "." if len(curve.xs) < 3 else None
        axes.plot(curve.xs, curve.values, marker=marker, linewidth=1, label=curve.kind, **look)
        return
    if few:
        axes.plot(curve.xs, curve.values, linewidth=0.6, alpha=0.4, label=curve.kind, **look)
    mean = smooth(curve.values, curve.mean_over)
    axes.plot(curve.xs, mean, linewidth=1.2, alpha=0.9, label=f"{curve.kind}, mean", **look)


def _limits(curves: Sequence[_Curve], heading: str, also: Sequence[float]) -> tuple[float, float]:
    """Return the range of a panel: that of all curves but for single spikes and the first half per cent of the steps.

    Of validations alone it is that of all, because there may be few.
    """
    parts = [np.asarray(also, np.float64)]
    for curve in curves:
        first = 0 if heading == _BITS else curve.steps[-1] // 200
        later = curve.values[(curve.steps >= first) & np.isfinite(curve.values)]
        parts.append(later if curve.kind in _VALIDATION else later[~_spikes(later)])
    values = np.concatenate(parts)
    if heading in (_LOSS, _BITS):  # on a log scale
        values = values[values > 0]
    if not len(values):
        return 0.1, 1.0
    low, high = float(values.min()), float(values.max())
    if heading in (_LOSS, _BITS):
        room = max(1.01, (high / low) ** 0.05)
        return low / room, high * room
    if heading == "HellaSwag accuracy":
        room = max(0.01, 0.05 * (high - low))
        return low - room, high + room
    return 0.0, 1.08 * high if high > 0 else 1.0


def _spikes(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which values are far from the median of the five around them, as one step or two are that went wrong."""
    if len(values) < 5:
        return np.zeros(len(values), bool)
    # A run begins steeply, so the first values count thrice; the last may themselves be wrong.
    around = np.concatenate([values[[0, 0]], values, values[[-2, -3]]])
    medians = np.median(np.lib.stride_tricks.sliding_window_view(around, 5), axis=1)
    away = np.abs(values - medians)
    far: NDArray[np.bool_] = away > max(12.0 * float(np.median(away)), 0.1 * float(np.ptp(medians)))
    return far


def _mark_outside(axes: Axes, curves: Sequence[_Curve], low: float, high: float) -> None:
    """Mark the points that the range leaves out at its edge, and say how far they go."""
    above, below, wrong = [], [], 0
    for curve in curves:
        finite = np.isfinite(curve.values)
        over, under = finite & (curve.values > high), finite & (curve.values < low)
        for which, edge, marker in ((over, high, "^"), (under, low, "v"), (~finite, high, "x")):
            if which.any():
                at, label = curve.xs[which], "_outside"
                axes.plot(
                    at,
                    np.full(len(at), edge),
                    marker,
                    color=curve.look["color"],
                    markersize=5,
                    clip_on=False,
                    label=label,
                )
        above += curve.values[over].tolist()
        below += curve.values[under].tolist()
        wrong += int((~finite).sum())
    parts = [f"▲ to {max(above):.3g}"] if above else []
    parts += [f"▼ to {min(below):.3g}"] if below else []
    parts += [f"\N{MULTIPLICATION SIGN} {wrong:,} not finite"] if wrong else []
    if parts:
        axes.set_title(", ".join(parts), fontsize="x-small", loc="right", color="0.35")


def _scale(axes: Axes, heading: str, low: float, high: float) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator, StrMethodFormatter

    axes.set_ylim(low, high)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if heading in (_LOSS, _BITS):
        axes.set_yscale("log")
        # In a range of less than a factor of 5 round numbers are what one reads, not powers and their parts.
        locator = MaxNLocator(8, steps=[1, 2, 5, 10]) if high < 5 * low else LogLocator(subs=(1.0, 2.0, 5.0))
        axes.yaxis.set_major_locator(locator)
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        if heading == "tokens/s":
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        elif heading == "learning rate":
            axes.yaxis.set_major_formatter(lambda rate, _: _rate(rate))


def _rate(rate: float) -> str:
    """Return a learning rate as one writes it: 6e-4, not 6.0e-04."""
    mantissa, exponent = f"{rate:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if rate else "0"


def _baseline_lines(heading: str, sizes: Sequence[str]) -> list[tuple[float, str, str]]:
    """Return value, name and colour of the lines that a panel has for baselines."""
    lines = []
    for size in sizes:
        if heading == _LOSS:
            lines.append((BASELINES[size]["val_loss"], f"GPT-2 {size}, FineWeb", "0.4"))
        elif heading == "HellaSwag accuracy":
            lines.append((BASELINES[size]["hellaswag"], f"GPT-2 {size}", "0.4"))
            lines.append((GPT3_HELLASWAG[size], f"GPT-3, ~{size}", "#8C6D31"))
    return lines


def _end(curve: _Curve) -> tuple[float, str, str]:
    """Return where a curve ends, what it is called there, and its colour."""
    mean = smooth(curve.values, curve.mean_over)
    mean = mean[np.isfinite(mean)]
    name = {"train_loss": "training", "val_loss": "validation"}[curve.kind]
    return float(mean[-1]) if len(mean) else np.nan, name, curve.look["color"]


def _write_at_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write names where lines end, right of the panel, from the lowest up and each at least a line above the one below."""
    to_axes = axes.transScale + axes.transLimits
    last = -1.0
    for value, text, color in sorted(ends):
        if np.isfinite(value) and value > 0:
            last = max(float(to_axes.transform((1, value))[1]), last + 0.05)
            axes.text(1.01, last, text, color=color, fontsize="small", va="center", transform=axes.transAxes)


def _draw_legend(fig: Figure, names: Sequence[str], runs: Sequence[Run], title: str | None, both: bool) -> None:
    """Say which colour is which run, once for all panels, and if both losses are drawn, which line of a run is which."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **_look(i), label=name) for i, name in enumerate(names)]
    if both and all(any(run.series.get(name) for run in runs) for name in ("train_loss", "val_loss")):
        handles.append(Line2D([], [], color="0.4", linewidth=0.8, label="training"))
        handles.append(Line2D([], [], color="0.4", marker="o", markersize=4, label="validation"))
    width, height = fig.get_size_inches()
    columns = max(1, min(len(handles), int(14 * width) // (max(map(len, names)) + 8)))
    fig.set_size_inches(width, height + 0.2 * -(-len(handles) // columns) + (0.25 if title else 0))
    look: dict[str, Any] = {"fontsize": "small", "frameon": False, "title_fontsize": "large", "alignment": "left"}
    fig.legend(handles=handles, loc="outside upper left", ncols=columns, title=title, **look)


def plot_runs(
    runs: Sequence[StrPath],
    out: StrPath,
    *,
    x: str = "steps",
    tokens_per_step: int | None = None,
    window: int | None = None,
    baselines: Sequence[str] = (),
    title: str | None = None,
    bits_per_byte: bool | None = None,
) -> str:
    """Read runs and write one figure of them all.

    Args:
        runs: run directories or log files, as read_run() takes them.
        out: the file to write; its suffix says the format: .png, .svg or .pdf.
        x, tokens_per_step, window, baselines, title, bits_per_byte: as of figure().

    Returns:
        A note, if no font here has some characters of the runs' names, which are then drawn as "?"; else "".

    Raises:
        FileNotFoundError: if a run has no log.
        ValueError: if out has another suffix, a file is not a log, or as of figure().
    """
    import matplotlib

    file_format = Path(out).suffix.lstrip(".").lower()
    if file_format not in ("png", "svg", "pdf"):
        raise ValueError(f"'{out}' must end in .png, .svg or .pdf")
    found = _named_apart([read_run(run) for run in runs], runs)
    fig = figure(
        found,
        x=x,
        tokens_per_step=tokens_per_step,
        window=window,
        baselines=baselines,
        title=title,
        bits_per_byte=bits_per_byte,
    )
    buffer = io.BytesIO()
    dateless = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}  # so that the same runs make the same file
    with matplotlib.rc_context({"svg.hashsalt": "llmc"}):
        fig.savefig(buffer, format=file_format, dpi=110, metadata=dateless.get(file_format))
    write_atomically(out, [buffer.getvalue()])
    missing = _labels([run.name for run in found])[1]
    return f"no font here has {missing}: drawn as '?'; Noto Sans CJK is one that has most" if missing else ""


def _named_apart(runs: list[Run], paths: Sequence[StrPath]) -> list[Run]:
    """Put the folders that they are in before the names of runs that are called alike, as far as that tells them apart."""
    names = [run.name for run in runs]
    for run, path in zip(runs, paths):
        folder = Path(path).resolve()
        if names.count(run.name) > 1:
            run.name = "/".join((folder if folder.is_dir() else folder.parent).parts[-2:])
    return runs
