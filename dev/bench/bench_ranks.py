"""Measures what several processes on one machine cost: one process with N threads beside N ranks with a thread each, over MPI.

    python dev/bench/bench_ranks.py                    # needs mpi4py and an mpiexec (pip install mpi4py mpich)
    python dev/bench/bench_ranks.py --models d6 --rounds 5

All see the same batch, which the ranks divide. Each measurement is a group of processes of its own, and the kinds take turns, so that a
slow minute of the machine affects them all. A step is forward, backward, clipping and AdamW; with ranks, ZeRO-1.

Columns: the model, its rows and tokens per row; the kind ("alone": every rank trains on its part by itself, and sends nothing, so what
"N ranks" takes beyond it is the price of their exchanges, less what ZeRO-1 saves); the median and the least seconds per step; tokens/s of
the median; seconds of processor time that all ranks spend on a step, which other programs on the machine change little; MB that a rank
sends in a step, and what the model says: 2 (N-1)/N of the parameters' bytes; bytes of optimizer state per parameter of a rank, and what
the model says: 8/N (f32) or 10/N (bf16 with master weights).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import machine, print_table, write_json

from llmc.distributed.launcher import mpiexec_command

# Name -> configuration, rows of all ranks together, tokens per row. The first is the shape of what `llmc-train` trains if it is
# told nothing.
MODELS: dict[str, tuple[Any, int, int]] = {
    "small": ({"max_seq_len": 128, "vocab_size": 1024, "num_layers": 4, "num_heads": 4, "channels": 256}, 16, 128),
    "d6": ("d6", 4, 256),
    "d12": ("d12", 4, 256),
}


def work(args: argparse.Namespace) -> None:
    """Measure the steps of one process, alone or as a rank, and print the result as JSON if it is rank 0."""
    import numpy as np

    import llmc
    from llmc import _llmc
    from llmc.distributed.world import open_world

    world = open_world(llmc.TrainConfig(dist_timeout=60.0))
    backend = _llmc.Backend("cpu", world.cpus(args.threads))
    config, rows, T = MODELS[args.models[0]]
    if isinstance(config, str):
        model = llmc.GPT2.from_descriptor(config, dtype=args.dtype, backend=backend)
    else:
        model = llmc.GPT2(llmc.GPT2Config(**config), dtype=args.dtype, backend=backend)
    comm = None if world.size == 1 or args.worker == "alone" else world.open_comm(backend)
    optimizer = llmc.AdamW(model, comm=comm)
    sink = None if comm is None else _llmc.Reduction(comm, optimizer.partition)
    part = rows // world.size
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, rows, T), dtype=np.int32)
    inputs, targets = tokens[:, part * world.rank : part * (world.rank + 1)]

    def step() -> float:
        model.zero_grad()
        if sink is not None:
            sink.begin([0.0])
        model.forward(inputs)
        model.backward(targets, 1.0 / world.size, sink)
        optimizer.step(1e-4)
        return float(model.mean_loss)

    for _ in range(2):
        step()
    seconds, processor, losses, sent = [], [], [], comm.exchanges.bytes_sent if comm else 0
    world.barrier()
    for _ in range(args.steps):
        start, cpu = time.perf_counter(), time.process_time()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - cpu)
    parameters = model.num_parameters
    mine = {
        "seconds": seconds,
        "processor": processor,
        "losses": losses,
        "sent": (comm.exchanges.bytes_sent - sent) / args.steps if comm else 0,
        "state": optimizer.bytes,
        "parameters": parameters,
    }
    everyone = world.gather(mine)
    if world.leads:
        print(json.dumps(everyone))


def measure(kind: str, model: str, ranks: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what work() has measured, by rank. kind: "threads", "ranks" or "alone"."""
    command = [sys.executable, __file__, "--worker", kind, "--models", model, "--dtype", args.dtype]
    command += ["--steps", str(args.steps), "--threads", str(ranks if kind == "threads" else 1)]
    if kind != "threads":
        command = [*mpiexec_command(ranks), *command]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise SystemExit(f"{kind}: {done.stdout}{done.stderr}")
    result: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["small", "d6"], choices=list(MODELS))
    parser.add_argument("--dtype", default="f32", choices=["f32", "bf16"])
    parser.add_argument("--ranks", type=int, default=2, help="N (default 2)")
    parser.add_argument("--rounds", type=int, default=3, help="groups of processes of each kind, in turn (default 3)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each (default 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    parser.add_argument("--worker", choices=["threads", "ranks", "alone"], help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args)
    if any(MODELS[model][1] % args.ranks for model in args.models):
        parser.error("--ranks must divide the rows of each model")

    N, kinds = args.ranks, ("threads", "ranks", "alone")
    results: dict[str, Any] = {"machine": machine(N), "dtype": args.dtype, "ranks": N, "models": {}}
    table = []
    for model in args.models:
        runs: dict[str, list[list[dict[str, Any]]]] = {kind: [] for kind in kinds}
        for _ in range(args.rounds):
            for kind in kinds:
                runs[kind].append(measure(kind, model, N, args))
        _, rows, T = MODELS[model]
        for kind in kinds:
            # Ranks wait for each other, so any one tells; alone, the slower one counts.
            steps = [max(times) for run in runs[kind] for times in zip(*(rank["seconds"] for rank in run))]
            median, last = statistics.median(steps), runs[kind][-1]
            processor = statistics.median(
                sum(p) for run in runs[kind] for p in zip(*(rank["processor"] for rank in run))
            )
            parameters, width = last[0]["parameters"], 4 if args.dtype == "f32" else 2
            of_model = 2 * (N - 1) / N * parameters * width
            table.append([
                f"{model} {rows}x{T}", {"threads": f"1 process, {N} threads", "ranks": f"{N} ranks"}.get(kind, "alone"),
                f"{median:.4f}", f"{min(steps):.4f}", f"{rows * T / median:.0f}", f"{processor:.4f}",
                " ".join(f"{r['sent'] / 1e6:.2f}" for r in last) if kind == "ranks" else "",
                f"{of_model / 1e6:.2f}" if kind == "ranks" else "",
                " ".join(f"{r['state'] / parameters:.2f}" for r in last),
                f"{(8 if width == 4 else 10) / (N if kind == 'ranks' else 1):.2f}",
            ])  # fmt: skip
        results["models"][model] = runs
    print_table(
        ["model", "kind", "median s", "best s", "tokens/s", "CPU s", "MB sent", "model", "state B/par.", "model"], table
    )
    write_json(args.json, results)


if __name__ == "__main__":
    main()
