"""Train many runs over lists of settings, and compare them in a table and a plot. A sweep is a TOML file:

    output_dir = "runs/lr"            # holds a folder for each run, the summary and the plot
    jobs = 2                          # runs at a time on the CPU [1]
    # devices = [0, 1, 2, 3]          # or GPUs: one run at a time on each of them, with device = "cuda"

    [settings]                        # what all runs share: settings of llmc train, with underscores
    data = ["my.txt"]
    max_steps = 200

    [grid]                            # there is a run for every combination of values from these lists
    learning_rate = [3e-5, 1e-4, 3e-4, 1e-3]

    [[runs]]                          # any number of these tables: each is combined with the whole grid
    layers = 4

    [[runs]]
    layers = 8

sweep.json is written after each run and says which runs are done, so the same command continues a sweep that was stopped. A run
that was half-way resumes from its newest checkpoint if it wrote any. Ctrl-C, SIGTERM and SIGHUP (Windows: Ctrl-Break) stop every run
after its present step, with a checkpoint; a second one stops them at once. scripts/sweep_lr.toml is llm.c's learning-rate sweep.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to a parser."""
    parser.add_argument("file", metavar="SWEEP.toml", help="the sweep")
    parser.add_argument("--dry-run", action="store_true", help="list the runs, and say how many steps they make")


def run(args: argparse.Namespace) -> int:
    """Execute the sweep; return the exit code: 0 if all runs are done, 1 if one failed, 128 + n if signal n stopped it."""
    from llmc.sweep import Sweep

    sweep = Sweep.load(args.file)
    if args.dry_run:
        print("\n".join(run.name for run in sweep.runs))
        print(sweep.describe())
        return 0
    done = sweep.execute(pass_on_signal=False)
    if sweep.stopped_by:
        return 128 + sweep.stopped_by
    return 0 if done else 1
