"""Plot training runs: loss, HellaSwag, learning rate, gradient norm, speed.

Reads run directories of llmc and main.log files of llm.c, and draws several runs over each other.
"""

from __future__ import annotations

import argparse

from llmc.arguments import whole
from llmc.plot import BASELINES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to a parser."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory, or a log file (main.log, metrics.jsonl)")
    parser.add_argument("-o", "--output", default="runs.png", help="figure to write: .png, .svg or .pdf [runs.png]")
    parser.add_argument("--x", choices=("steps", "tokens"), default="steps", help="horizontal axis [steps]")
    parser.add_argument("--tokens-per-step", type=whole(1), help="for --x tokens, if a run does not say (llm.c's logs)")
    parser.add_argument(
        "--smooth", type=whole(1), metavar="N", help="average training loss and norm over N steps [a 40th of the run]"
    )
    parser.add_argument(
        "--bits-per-byte",
        action=argparse.BooleanOptionalAction,
        help="draw validation losses in bits per byte of the text [if the runs have different vocabularies, and all know them]",
    )
    parser.add_argument("--title", help="heading of the figure [of one run its name and its best loss]")
    parser.add_argument(
        "--baseline",
        action="append",
        default=[],
        choices=tuple(BASELINES),
        help="draw the loss and accuracy that llm.c published for this size of GPT-2, of whose vocabulary the run must be; repeatable",
    )


def run(args: argparse.Namespace) -> int:
    """Write the figure, and print the best loss and accuracy of each run; return the exit code, 0."""
    from llmc.plot import plot_runs, read_run

    note = plot_runs(
        args.runs,
        args.output,
        x=args.x,
        tokens_per_step=args.tokens_per_step,
        window=args.smooth,
        baselines=args.baseline,
        title=args.title,
        bits_per_byte=args.bits_per_byte,
    )
    for path in args.runs:
        found = read_run(path)
        best = [
            f"{what} {point[1]:.4f} at step {point[0]}"
            for what, name in (
                ("training loss", "train_loss"),
                ("validation loss", "val_loss"),
                ("bits per byte", "val_bits_per_byte"),
                ("HellaSwag", "hellaswag"),
            )
            if (point := found.best(name)) is not None
        ]
        print(
            f"{path}: best {', '.join(best)}" + (f"; {found.unreadable} lines unreadable" if found.unreadable else "")
        )
    if note:
        print(f"note: {note}")
    print(args.output)
    return 0
