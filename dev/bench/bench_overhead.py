"""Measures what the training loop costs beside the training: logs, progress bar and checkpoints.

    python dev/bench/bench_overhead.py --model d12 --batch 4 --seq 64 --steps 20

It makes one run with main.log, metrics.jsonl and a progress bar, which saves two checkpoints in the background. Rows: a step without
any of that; the logs and the bar; how long the loop waits for a save to begin, the first time and later; and how much longer steps
take while a save is being written. Columns: the time, and the same in steps.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import print_table

import llmc
from llmc.formats.shards import write_shard
from llmc.training.logs import BarConsole, Logs, MainLog, MetricsLog


def main() -> int:
    """Run the benchmark; return the exit code, 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="d12")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtype", default="f32")
    args = parser.parse_args()

    import numpy as np

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = np.random.default_rng(0).integers(0, 50257, 200_000).astype(np.uint32)
        write_shard(folder / "train.bin", tokens, vocab_size=50257)
        # fmt: off
        settings: dict[str, Any] = {
            "data": (str(folder / "train.bin"),), "val_every": 0, "sample_every": 0, "plot": False, "model": args.model,
            "batch_size": args.batch, "seq_len": args.seq, "max_steps": 1000, "dtype": args.dtype,
        }
        # fmt: on
        trainer = llmc.Trainer(llmc.TrainConfig(output_dir=str(folder / "run"), progress="none", **settings))
        run = folder / "run"
        logs = Logs(
            [
                BarConsole(io.StringIO()),
                MainLog(run / "main.log", False),
                MetricsLog(run / "metrics.jsonl", False),
            ]
        )
        logs.start(0, 1000, "", "")
        trainer.train_step()

        step_times, log_times, busy_times, save_times = [], [], [], []
        for step in range(args.steps):
            if step in (args.steps // 3, 2 * args.steps // 3):
                start = time.perf_counter()
                trainer._save(background=True)
                save_times.append(time.perf_counter() - start)
            thread = trainer._checkpointer._thread if trainer._checkpointer else None
            busy = thread is not None and thread.is_alive()
            info = trainer.train_step()
            (busy_times if busy else step_times).append(info.seconds)
            start = time.perf_counter()
            logs.step(info)
            log_times.append(time.perf_counter() - start)
        logs.close()
        if trainer._checkpointer is not None:
            trainer._checkpointer.wait()

    step = statistics.median(step_times)
    rows = [
        ["a step", f"{1e3 * step:.1f} ms", ""],
        [
            "logs and bar, per step",
            f"{1e3 * statistics.median(log_times):.3f} ms",
            f"{100 * statistics.median(log_times) / step:.3f} %",
        ],
        [
            "a save holds the loop up",
            f"{1e3 * save_times[0]:.0f} ms, later {1e3 * save_times[-1]:.0f} ms",
            f"{save_times[0] / step:.2f} steps, later {save_times[-1] / step:.2f}",
        ],
    ]
    if busy_times:
        slower = statistics.mean(busy_times) - step
        rows.append(
            [
                "steps while it is written",
                f"{1e3 * slower:+.0f} ms",
                f"{len(busy_times) / len(save_times):.1f} of them a save",
            ]
        )
    print_table(["", "time", "share"], rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
