"""Measures training on a machine that is not idle: llmc and PyTorch with one and with several threads, beside K busy processes.

    python dev/bench/bench_busy.py                              # K = 0, 4, 12; 1 and 2 threads
    python dev/bench/bench_busy.py --busy 0 --other OLD/src     # the llmc of another folder too: what a change costs an idle machine

A step is forward, backward, clipping and AdamW, of what `llmc-train` trains if it is told nothing. Each measurement is a process of its
own, which has warmed up before the busy ones start, and the programs take turns. A busy process is an endless loop in Python.

Columns: K; the program and its threads; the median, least and greatest steps/s of the rounds; the median over that of the first program
with one thread, and, of an llmc with --other, over that of the other one with as many threads.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from bench_ranks import MODELS
from common import machine, print_table, write_json


def llmc_step(name: str, threads: int) -> Callable[[], object]:
    """Return a function that makes a step with llmc."""
    import numpy as np

    import llmc

    config, rows, T = MODELS[name]
    if isinstance(config, str):
        model = llmc.GPT2.from_descriptor(config, threads=threads)
    else:
        model = llmc.GPT2(llmc.GPT2Config(**config), threads=threads)
    optimizer = llmc.AdamW(model)
    inputs, targets = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, rows, T), dtype=np.int32)

    def step() -> object:
        model.zero_grad()
        model.forward(inputs)
        model.backward(targets)
        optimizer.step(1e-4)
        return model.mean_loss

    return step


def torch_step(name: str, threads: int) -> Callable[[], object]:
    """Return a function that makes a step with PyTorch, eagerly."""
    import torch
    from torch_gpt2 import GPT2

    from llmc import _llmc

    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    config, rows, T = MODELS[name]
    c = _llmc.config_from_descriptor(config) if isinstance(config, str) else _llmc.GPT2Config(**config)
    model = GPT2(c.padded_vocab_size, c.channels, c.num_heads, c.num_layers, c.max_seq_len)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    inputs, targets = torch.randint(0, c.vocab_size, (2, rows, T))

    def step() -> object:
        optimizer.zero_grad(set_to_none=True)
        loss = model(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def work(args: argparse.Namespace) -> None:
    """Warm up, say so, and when a line is read, make steps for args.seconds; print how many a second."""
    step = (torch_step if args.worker == "PyTorch" else llmc_step)(args.model, args.threads[0])
    for _ in range(5):
        step()
    print("ready", flush=True)
    sys.stdin.readline()
    steps, start = 0, time.perf_counter()
    while steps < 3 or time.perf_counter() - start < args.seconds:
        step()
        steps += 1
    print(steps / (time.perf_counter() - start))


def measure(program: str, threads: int, busy: int, args: argparse.Namespace) -> float:
    """Return the steps/s of one program beside so many busy processes."""
    env = dict(os.environ)
    if program == "other":
        env["PYTHONPATH"] = str(args.other.resolve())
    command = [sys.executable, __file__, "--worker", program, "--threads", threads, "--model", args.model]
    command += ["--seconds", args.seconds]
    with subprocess.Popen([*map(str, command)], stdin=-1, stdout=-1, text=True, env=env) as process:
        assert process.stdin is not None and process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise SystemExit(f"{program} with {threads} threads failed")
        neighbours = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
        try:
            time.sleep(0.5 if busy else 0.0)
            process.stdin.write("go\n")
            process.stdin.flush()
            return float(process.stdout.readline())
        finally:
            for neighbour in neighbours:
                neighbour.kill()
                neighbour.wait()


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="small", choices=list(MODELS))
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 4, 12], metavar="K", help="busy processes (0 4 12)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N", help="threads (1 2)")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each kind, in turn (default 5)")
    parser.add_argument("--seconds", type=float, default=5.0, help="that each makes steps for (default 5)")
    parser.add_argument("--other", type=Path, metavar="FOLDER", help="measure the llmc in this folder too")
    parser.add_argument("--no-torch", action="store_true", help="leave PyTorch out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    parser.add_argument("--worker", choices=["llmc", "other", "PyTorch"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args)

    programs = ["llmc", *(["other"] if args.other else []), *([] if args.no_torch else ["PyTorch"])]
    results: dict[str, Any] = {"machine": machine(), "model": args.model, "steps_per_second": {}}
    table = []
    for busy in args.busy:
        kinds = [(program, threads) for threads in args.threads for program in programs]
        rates: dict[tuple[str, int], list[float]] = {kind: [] for kind in kinds}
        for turn in range(args.rounds):
            for program, threads in kinds if turn % 2 == 0 else kinds[::-1]:
                rates[program, threads].append(measure(program, threads, busy, args))
        median = {kind: statistics.median(rate) for kind, rate in rates.items()}
        for program, threads in kinds:
            rate = rates[program, threads]
            beside = (
                f"{median['llmc', threads] / median['other', threads]:.3f}" if args.other and program == "llmc" else ""
            )
            table.append([
                busy, f"{program}, {threads}", f"{median[program, threads]:.2f}", f"{min(rate):.2f}", f"{max(rate):.2f}",
                f"{median[program, threads] / median[kinds[0]]:.2f}", beside,
            ])  # fmt: skip
        results["steps_per_second"][busy] = {
            f"{program}, {threads}": rates[program, threads] for program, threads in kinds
        }
    print_table(["K", "program, threads", "median", "least", "most", "of the first", "of the other"], table)
    write_json(args.json, results)


if __name__ == "__main__":
    main()
