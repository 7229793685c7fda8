"""Find a learning rate: train at several, with two optimizers, and draw the losses that they reach.

    python examples/lr_sweep.py --data my.txt --jobs 2                # 10 runs, two at a time
    python examples/lr_sweep.py --data my.txt --devices 0 1 2 3       # or one at a time on each of four GPUs

Each run is a process with a folder of its own; the same command goes on where it was stopped. The defaults (0.9 million parameters,
10 runs of 200 updates) take about five minutes on two CPU cores. The sweep itself leaves a table (summary.csv) and all curves
(summary.png); what is drawn here, the last loss over the learning rate, is what one reads a rate from: take it left of the minimum, as
the loss rises steeply on its right.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from llmc.sweep import Sweep


def draw(sweep: Sweep, path: Path) -> None:
    """Draw the last validation loss of all runs over the learning rate, a line for each optimizer."""
    fig = Figure(figsize=(7, 4.5), layout="constrained")
    axes = fig.subplots()
    for optimizer in dict.fromkeys(run.varied["optimizer"] for run in sweep.runs):
        points = sorted(
            (
                run.varied["learning_rate"],
                run.results.get("val_loss", math.nan),
            )  # NaN, which is not drawn, if it failed
            for run in sweep.runs
            if run.varied["optimizer"] == optimizer
        )
        axes.plot(*zip(*points), marker="o", label=optimizer)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("last validation loss, nats per token")
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend()
    if sweep.best is not None:
        axes.set_title(f"best: {sweep.best.name}, {sweep.best.results['val_loss']:.4f}", fontsize="medium", loc="left")
    fig.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a text file, or a folder of them")
    parser.add_argument("--output", type=Path, default=Path("runs/lr_sweep"), help="the sweep's folder [%(default)s]")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3, 1e-2, 3e-2])
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "muon"], choices=["adamw", "muon"])
    parser.add_argument("--tokenizer", default="bpe:1024")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time on the CPU [%(default)s]")
    parser.add_argument("--devices", type=int, nargs="+", default=[], help="or GPUs, one run at a time on each")
    args = parser.parse_args(argv)

    # What `llmc sweep` reads from a TOML file: settings of all runs, and lists of which every combination is a run.
    sweep = Sweep.from_dict(
        {
            "output_dir": str(args.output),
            "jobs": args.jobs,
            "devices": args.devices,
            "settings": {
                "data": [args.data],
                "tokenizer": args.tokenizer,
                "layers": args.layers,
                "heads": max(1, args.channels // 64),
                "channels": args.channels,
                "seq_len": args.seq_len,
                "batch_size": args.batch_size,
                "max_steps": args.max_steps,
                "warmup_steps": args.max_steps // 10,
                "val_every": max(1, args.max_steps // 4),
                "sample_every": 0,
                "checkpoint_every": -1,
                "plot": False,
            },
            "grid": {"optimizer": args.optimizers, "learning_rate": args.rates},
        }
    )
    done = sweep.execute()  # a run that fails, as one that diverges, does not end the others
    draw(sweep, args.output / "learning_rate.png")
    print(f"{args.output / 'learning_rate.png'} has the losses over the learning rate")
    return 0 if done else 1


if __name__ == "__main__":
    raise SystemExit(main())
