"""Many runs over lists of settings: a table and a plot of all of them. The same command continues a sweep that was stopped.

`pydoc llmc.sweep` shows the format of the TOML file; scripts/sweep_lr.toml is llm.c's learning-rate sweep.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="SWEEP.toml")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and end")


def run(args: argparse.Namespace) -> int:
    from llmc.sweep import Sweep

    sweep = Sweep.load(args.file)
    if args.dry_run:
        print("\n".join(run.name for run in sweep.runs))
        return 0
    done = sweep.execute()
    if sweep.stopped_by:
        return 128 + sweep.stopped_by
    return 0 if done else 1
