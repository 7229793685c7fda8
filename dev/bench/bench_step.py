"""Measures a training step on the CPU: llmc beside PyTorch and llm.c.

    python dev/bench/bench_step.py --model d12 --batch 4 --seq 64 1024 --rounds 3
    python dev/bench/bench_step.py --seq 64 --llm-c ~/llm.c/train_gpt2     # llm.c too, which is B=4 T=64 only

A step is forward, backward, clipping and AdamW, always on the same random tokens. Each measurement is a process of its own, so that
its peak memory can be told, and the programs take turns, so that a slow minute of the machine affects them all. PyTorch runs eagerly
and compiled, in fp32, in bf16 autocast and with bf16 weights, with SDPA, fused AdamW and its threads bound to cores.

With LLMC_ISA=avx2 PyTorch is kept to AVX2 too. The first lines name the CPU, its caches, the kernel set, and the ceilings that were
measured in the same run: multiply-adds on registers alone, and the read bandwidth. No program can take a step in less than the floor:
its arithmetic at the first and AdamW's bytes at the second.

Columns: the program and its mode; the median and the least seconds per step; the floor as a share of the median; tokens/s and GFLOP/s
of the median step; peak memory in GB; busy: processor time of a step / (threads * elapsed time), which is well below 100 % if other
programs used the machine. Below the table: how many times faster llmc is than the fastest of PyTorch, and its memory as a multiple of
that one's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import (
    Ceilings,
    add_common_arguments,
    environment_of_peers,
    machine,
    machine_line,
    measured_ceilings,
    peak_rss,
    print_table,
    step_work,
    write_json,
)

PEERS = {
    "f32": ["llmc f32", "torch eager f32", "torch compile f32"],
    "bf16": ["llmc bf16", "torch eager autocast", "torch compile autocast", "torch eager bf16", "torch compile bf16"],
}


# ---- a worker: one peer, in its own process ----


def llmc_step(model: str, dtype: str, B: int, T: int, threads: int) -> Callable[[], float]:
    """Return a function that makes a step with llmc and returns the loss."""
    import numpy as np

    import llmc
    from llmc.optim.adamw import AdamW

    gpt2 = llmc.GPT2.from_descriptor(model, dtype=dtype, threads=threads)
    optimizer = AdamW(gpt2)
    tokens = np.random.default_rng(0).integers(0, gpt2.config.vocab_size, (2, B, T), dtype=np.int32)

    def step() -> float:
        gpt2.zero_grad()
        gpt2.forward(tokens[0])
        gpt2.backward(tokens[1])
        optimizer.step(1e-4)
        return gpt2.mean_loss

    return step


def torch_step(model: str, mode: str, B: int, T: int, threads: int) -> Callable[[], float]:
    """Return a function that makes a step with PyTorch and returns the loss. mode: as "compile autocast"."""
    import torch
    from torch_gpt2 import GPT2

    from llmc import _llmc

    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    c = _llmc.config_from_descriptor(model)
    gpt2 = GPT2(c.padded_vocab_size, c.channels, c.num_heads, c.num_layers, c.max_seq_len)
    if mode.endswith("bf16"):
        gpt2.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(gpt2.parameters(), lr=1e-4, fused=True)
    forward: Any = torch.compile(gpt2) if "compile" in mode else gpt2
    x, y = torch.randint(0, c.vocab_size, (2, B, T))

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled="autocast" in mode):
            loss = forward(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt2.parameters(), 1.0)
        optimizer.step()
        return float(loss.item())

    return step


def work(args: argparse.Namespace) -> None:
    """Measure the steps of args.worker in this process, and print the result as JSON."""
    kind, _, mode = args.worker.partition(" ")
    if kind == "ceilings":
        from llmc import _llmc

        return print(json.dumps(vars(measured_ceilings(_llmc.Backend("cpu", args.threads), mode))))
    make = llmc_step if kind == "llmc" else torch_step
    step = make(args.model, mode, args.batch, args.seq[0], args.threads)
    losses = [step()]
    if "compile" in mode:
        losses.append(step())
    times, busy = [], []
    for _ in range(args.steps):
        start, cpu = time.perf_counter(), time.process_time()
        losses.append(step())
        times.append(time.perf_counter() - start)
        busy.append((time.process_time() - cpu) / times[-1])
    print(json.dumps({"seconds": times, "busy": busy, "peak_bytes": peak_rss(), "losses": losses}))


# ---- the parent ----


def measure(peer: str, model: str, B: int, T: int, steps: int, threads: int) -> dict[str, Any]:
    """Measure steps of one program in a process of its own.

    Args:
        peer: one of PEERS' values, or "ceilings f32" or "ceilings bf16": here they would count as memory of the programs, which
            start as copies of this process.
        model: a descriptor, as "d12".
        B, T: rows and tokens per row.
        steps: number of timed steps.
        threads: of the CPU.

    Returns:
        "seconds" and "busy" of each step, "peak_bytes" and "losses"; or the fields of Ceilings.

    Raises:
        RuntimeError: if the process fails; it has the last line that the process wrote.
    """
    env = dict(os.environ)
    if peer.startswith("torch"):
        env |= {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"} | environment_of_peers()
    command = [sys.executable, __file__, "--worker", peer, "--model", model, "--batch", B, "--seq", T, "--steps", steps]
    done = subprocess.run([*map(str, command), "--threads", str(threads)], capture_output=True, text=True, env=env)
    if done.returncode != 0:
        raise RuntimeError(f"{peer}: " + (done.stderr.strip().splitlines() or ["no output"])[-1])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure_llm_c(binary: Path, steps: int, threads: int) -> dict[str, Any]:
    """Run llm.c's train_gpt2 in its folder, where it finds its checkpoint and data; end it after so many steps.

    Returns:
        What measure() returns, but for "busy" and "losses", which are empty.

    Raises:
        RuntimeError: if it ends before.
    """
    env = dict(os.environ) | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    process = subprocess.Popen(
        ["stdbuf", "-oL", str(binary.resolve())], cwd=binary.parent, stdout=subprocess.PIPE, text=True, env=env
    )
    assert process.stdout is not None
    times: list[float] = []
    for line in process.stdout:
        took = re.search(r"step \d+:.*took ([\d.]+) ms", line)
        if took:
            times.append(float(took[1]) / 1e3)
        if len(times) > steps:
            break
    process.terminate()
    process.stdout.close()
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = 0
    if len(times) <= steps:
        raise RuntimeError(f"{binary} printed {len(times)} steps, expected more than {steps}: does it find its files?")
    return {"seconds": times[1:], "busy": [], "peak_bytes": usage.ru_maxrss * 1024, "losses": []}


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="d12")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--dtypes", nargs="+", default=["f32", "bf16"], choices=["f32", "bf16"])
    parser.add_argument("--peers", nargs="+", metavar="TEXT", help="only peers whose name contains one of these")
    parser.add_argument("--rounds", type=int, default=3, help="processes per peer, in turn (default 3)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps per process (default 3)")
    parser.add_argument("--llm-c", type=Path, metavar="FILE", help="llm.c's train_gpt2, with its files beside it")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    add_common_arguments(parser)
    args = parser.parse_args()
    if args.worker:
        return work(args)

    about = machine(args.threads)
    threads = about["threads"]
    tops = {d: Ceilings(**measure(f"ceilings {d}", args.model, 1, 1, 1, threads)) for d in args.dtypes}
    print(machine_line(about))
    for dtype, top in tops.items():
        print(f"{dtype}: {top}")
    if limits := environment_of_peers():
        print("PyTorch: " + " ".join(f"{k}={v}" for k, v in limits.items()))
    results: dict[str, Any] = {
        "machine": about,
        "ceilings": {d: vars(top) for d, top in tops.items()},
        "model": args.model,
        "batch": args.batch,
        "tables": [],
    }
    for T in args.seq:
        peers = [p for d in args.dtypes for p in PEERS[d] if not args.peers or any(text in p for text in args.peers)]
        if args.llm_c and (args.model, args.batch, T) == ("d12", 4, 64):
            peers.append("llm.c")
        runs: dict[str, list[dict[str, Any]]] = {p: [] for p in peers}
        for _ in range(args.rounds):
            for peer in list(runs):
                try:
                    if peer == "llm.c":
                        runs[peer].append(measure_llm_c(args.llm_c, args.steps, threads))
                    else:
                        runs[peer].append(measure(peer, args.model, args.batch, T, args.steps, threads))
                except RuntimeError as error:
                    print(error, file=sys.stderr)
                    del runs[peer]
        steps = {d: step_work(args.model, d, args.batch, T) for d in args.dtypes}
        floors = {d: steps[d].floor(tops[d]) for d in args.dtypes}
        flop = steps[args.dtypes[0]].flops
        print(
            f"\n{args.model} B={args.batch} T={T}: {flop / 1e9:.0f} GFLOP per step; no step takes less than "
            + ", ".join(f"{floor:.3f} s in {d}" for d, floor in floors.items())
            + "\n"
        )
        table = {p: summary(r, args.batch * T, flop, threads, floors["f32" if p.endswith("f32") else "bf16"] if p != "llm.c"
                            else floors.get("f32")) for p, r in runs.items()}  # fmt: skip
        print_table(
            ["peer", "median s", "best s", "of floor", "tokens/s", "GFLOP/s", "peak GB", "busy"],
            [[p, f"{s['median']:.3f}", f"{s['best']:.3f}", f"{s['of_floor']:.0%}" if s["of_floor"] else "",
              f"{s['tokens_per_second']:.0f}", f"{s['flops'] / 1e9:.0f}", f"{s['peak_bytes'] / 1e9:.2f}",
              f"{s['busy']:.0%}" if s["busy"] else ""] for p, s in table.items()],
        )  # fmt: skip
        ratios = compare(table)
        print()
        for text, ratio in ratios.items():
            print(f"{text}: {ratio:.2f}")
        results["tables"].append({"T": T, "floors": floors, "peers": table, "ratios": ratios})
    write_json(args.json, results)


def summary(runs: list[dict[str, Any]], tokens: int, flop: float, threads: int, floor: float | None) -> dict[str, Any]:
    """Summarise the runs of one program, whose steps have so many tokens and FLOP, and would take `floor` seconds at best."""
    seconds = [t for r in runs for t in r["seconds"]]
    median, busy = statistics.median(seconds), [b for r in runs for b in r["busy"]]
    return {
        "median": median,
        "best": min(seconds),
        "of_floor": floor / median if floor else None,
        "seconds": seconds,
        "tokens_per_second": tokens / median,
        "flops": flop / median,
        "peak_bytes": max(r["peak_bytes"] for r in runs),
        "busy": statistics.median(busy) / threads if busy else None,
    }


def compare(table: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Compare llmc with llm.c and the fastest of PyTorch: the fastest fp32 mode for f32, the fastest of all modes for bf16."""
    ratios: dict[str, float] = {}
    for name in ("llmc f32", "llmc bf16"):
        peers = [p for p in table if p.startswith("torch") and (name == "llmc bf16" or p.endswith("f32"))]
        if name in table and peers:
            best = min(peers, key=lambda p: table[p]["median"])
            ratios[f"{name}: times faster than {best}"] = table[best]["median"] / table[name]["median"]
            ratios[f"{name}: memory over that of {best}"] = table[name]["peak_bytes"] / table[best]["peak_bytes"]
        if name in table and "llm.c" in table:
            ratios[f"{name}: times faster than llm.c"] = table["llm.c"]["median"] / table[name]["median"]
    return ratios


if __name__ == "__main__":
    main()
