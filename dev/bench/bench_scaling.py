"""Measures how a CPU step's time grows with threads, batch, sequence and model, beside what arithmetic and memory traffic predict.

    python dev/bench/bench_scaling.py --dtypes bf16 f32

The predicted time, the floor, is (6N + 6LCT) B T / peak + bytes of AdamW / read bandwidth. Both ceilings are measured in the same run
with as many threads. Models that do not fit in memory are not run; their time is predicted from the floor and the largest model's
"of floor".

Columns: what varies in this group of rows; model, B, T and threads; the measured seconds per step; GFLOP/s; the floor in seconds; the
floor as a share of the measured time, which is constant if the step scales as it should.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from bench_step import measure
from common import (
    Ceilings,
    add_common_arguments,
    machine,
    machine_line,
    measured_ceilings,
    print_table,
    step_work,
    write_json,
)

import llmc
from llmc import _llmc


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], choices=["f32", "bf16"])
    parser.add_argument("--models", nargs="+", default=["d6", "d12", "d24"])
    parser.add_argument("--predict", nargs="*", default=["d36", "d48"], help="models that are only predicted")
    parser.add_argument("--steps", type=int, default=3, help="timed steps per row (default 3)")
    add_common_arguments(parser)
    args = parser.parse_args()

    about = machine(args.threads)
    top = about["threads"]
    # (what varies, model, B, T, threads)
    runs = [("threads", "d12", 4, 64, n) for n in sorted({1, max(1, top // 2), top})]
    runs += [("B", "d12", B, 64, top) for B in (1, 2, 4, 8, 16)]
    runs += [("T", "d12", 1, T, top) for T in (64, 256, 1024)]
    runs += [("model", m, 1, 256, top) for m in args.models]
    ceilings: dict[tuple[str, int], Ceilings] = {}
    results: dict[str, Any] = {"machine": about, "rows": []}
    for dtype in args.dtypes:
        table, rate = [], 0.0
        for what, model, B, T, threads in runs:
            if (dtype, threads) not in ceilings:
                ceilings[dtype, threads] = measured_ceilings(_llmc.Backend("cpu", threads), dtype)
            t = statistics.median(measure(f"llmc {dtype}", model, B, T, args.steps, threads)["seconds"])
            work = step_work(model, dtype, B, T)
            floor = work.floor(ceilings[dtype, threads])
            rate = floor / t
            table.append(
                [what, model, B, T, threads, f"{t:.3f}", f"{work.flops / t / 1e9:.0f}", f"{floor:.3f}", f"{rate:.0%}"]
            )
            results["rows"].append({"dtype": dtype, "varies": what, "model": model, "B": B, "T": T, "threads": threads,
                                    "seconds": t, "flops": work.flops, "floor": floor})  # fmt: skip
        for model in args.predict:
            floor = step_work(model, dtype, 1, 1024).floor(ceilings[dtype, top])
            c = _llmc.config_from_descriptor(model)
            kept = llmc.GPT2Config.from_descriptor(model).num_parameters * llmc.AdamW.bytes_per_parameter(dtype, True)
            memory = _llmc.memory_plan(c, _llmc.ModelOptions(dtype, dtype), 1, 1024, True, kept).total
            table.append(["predicted", f"{model}, {memory / 1e9:.0f} GB", 1, 1024, top, f"{floor / rate:.1f}", "",
                          f"{floor:.1f}", f"{rate:.0%}"])  # fmt: skip
        print(f"\n{dtype}: {machine_line(about)}\n")
        print_table(["varies", "model", "B", "T", "threads", "s/step", "GFLOP/s", "floor s", "of floor"], table)
    write_json(args.json, results)


if __name__ == "__main__":
    main()
