"""Follow a run from another terminal: show its newest numbers as they come."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llmc.training.settings import load_toml


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to a parser."""
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--once", action="store_true", help="show what is there and end")
    parser.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="[%(default)s]")


def rows(path: Path, once: bool, interval: float) -> Iterator[dict[str, Any] | None]:
    """Read metrics.jsonl while a run writes it. A line is read only when it is complete.

    Args:
        path: the file.
        once: end after the rows that are there now.
        interval: seconds between looks at the file.

    Yields:
        Each row, and None each time that all rows so far are read.
    """
    with open(path, "rb") as file:
        rest = b""
        while True:
            rest += file.read()
            *lines, rest = rest.split(b"\n")
            for line in lines:
                try:
                    row = json.loads(line)
                except ValueError:  # a crash cut the line off; the resumed run writes on below it
                    continue
                if isinstance(row, dict):
                    yield row
            if once:
                return
            yield None
            time.sleep(interval)


def run(args: argparse.Namespace) -> int:
    """Show a progress bar with the newest numbers until the run ends; return the exit code, 0."""
    directory = Path(args.run)
    path = directory / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"'{directory}' is no run directory: it has no metrics.jsonl")
    config = load_toml(directory / "config.toml")
    total = config.get("max_steps", -1)
    with tqdm(total=total if total > 0 else None, unit="step", dynamic_ncols=True) as bar:
        losses: list[float] = []
        ended = False
        for row in rows(path, args.once, args.interval):
            if row is None:
                bar.refresh()
                if ended:
                    break
                continue
            ended = row.get("kind") == "end"
            if row.get("kind") == "train":
                losses.append(float(row["loss"]))
                recent = [x for x in losses[-20:] if math.isfinite(x)]
                mean = math.fsum(recent) / len(recent) if recent else math.nan
                bar.n = int(row["step"]) + 1
                bar.set_postfix_str(
                    f"loss {float(row['loss']):.4f} (mean of 20: {mean:.4f}), norm {float(row['norm']):.3f}, "
                    f"lr {float(row['lr']):.2e}, {float(row['tokens_per_second']):,.0f} tok/s",
                    refresh=False,
                )
            elif row.get("kind") == "validation":
                bar.write(f"step {row['step']}: val loss {float(row['loss']):.4f}")
            elif row.get("kind") == "hellaswag":
                bar.write(f"step {row['step']}: HellaSwag {row['correct']}/{row['total']}")
            elif row.get("kind") == "message":
                bar.write(str(row["text"]))
        bar.refresh()
    return 0
