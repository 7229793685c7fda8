"""Train many runs over lists of settings, and compare them in a table and a plot. The same command continues a stopped sweep.

`pydoc llmc.sweep` shows the format of the TOML file; scripts/sweep_lr.toml is llm.c's learning-rate sweep.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to a parser."""
    parser.add_argument("file", metavar="SWEEP.toml", help="the sweep")
    parser.add_argument("--dry-run", action="store_true", help="only list the runs")


def run(args: argparse.Namespace) -> int:
    """Execute the sweep; return the exit code: 0 if all runs are done, 1 if one failed, 128 + n if signal n stopped it."""
    from llmc.sweep import Sweep

    sweep = Sweep.load(args.file)
    if args.dry_run:
        print("\n".join(run.name for run in sweep.runs))
        return 0
    done = sweep.execute(pass_on_signal=False)
    if sweep.stopped_by:
        return 128 + sweep.stopped_by
    return 0 if done else 1
