"""Follow a run from another terminal: show its newest numbers as they come."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from tqdm import tqdm

from llmc.arguments import above_zero
from llmc.formats.metrics import follow_rows, read_rows
from llmc.training.settings import load_toml


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to a parser."""
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--once", action="store_true", help="show what is there and end")
    parser.add_argument("--interval", type=above_zero, default=1.0, metavar="SECONDS", help="[%(default)s]")


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
        for row in read_rows(path) if args.once else follow_rows(path, args.interval):
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
