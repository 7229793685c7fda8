"""Measures generation on the CPU with a cache of keys and values: tokens/s of llmc and PyTorch, and the memory bandwidth used.

    python dev/bench/bench_generate.py --model d12 --dtypes bf16 f32 --batch 1 4 16

A step gives each row of the batch one token and reads every weight once. So steps/s can be at most the machine's read bandwidth
divided by the bytes of the weights; that bandwidth is measured in the same run, with the sum of a large array. Both programs take the
most likely token. PyTorch runs the model of torch_gpt2.py in inference mode, with a cache allocated once. Each measurement is a
process of its own, and the two take turns.

Columns: dtype and batch size; tokens/s of llmc and of PyTorch, over all rows; how many times faster llmc is; GB/s at which llmc reads
weights; GB/s that the machine can read; the one as a share of the other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import add_common_arguments, machine, peak_rss, print_table, sample, write_json

from llmc import _llmc


def llmc_generator(args: argparse.Namespace) -> Callable[[int], None]:
    """Return a function that generates so many tokens after each prompt, with llmc."""
    import numpy as np

    import llmc

    model = llmc.GPT2.from_descriptor(args.model, dtype=args.dtypes[0], threads=args.threads)
    prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, (args.batch[0], args.prompt)).tolist()
    return lambda count: discard(model.generate(prompts, count, temperature=0.0))


def torch_generator(args: argparse.Namespace) -> Callable[[int], None]:
    """Return a function that generates so many tokens after each prompt, with PyTorch."""
    import torch
    from torch_gpt2 import GPT2

    if args.threads:
        torch.set_num_threads(args.threads)
    c = _llmc.config_from_descriptor(args.model)
    dtype = torch.bfloat16 if args.dtypes[0] == "bf16" else torch.float32
    model = GPT2(c.vocab_size, c.channels, c.num_heads, c.num_layers, c.max_seq_len).to(dtype).eval()
    B, P, NH = args.batch[0], args.prompt, c.num_heads
    prompts = torch.randint(0, c.vocab_size, (B, P))
    cache = torch.zeros(c.num_layers, 2, B, NH, P + max(args.tokens), c.channels // NH, dtype=dtype)

    @torch.inference_mode()
    def run(count: int) -> None:
        tokens = model.next_logits(prompts, cache, 0).argmax(-1, keepdim=True)
        for i in range(count - 1):
            tokens = model.next_logits(tokens, cache, P + i).argmax(-1, keepdim=True)

    return run


def discard(_: object) -> None:
    """Turn a call that returns something into one that returns nothing."""


def work(args: argparse.Namespace) -> None:
    """Measure one program in this process, and print seconds per step and peak memory as JSON."""
    run = (llmc_generator if args.worker == "llmc" else torch_generator)(args)
    few, many = args.tokens
    run(few)
    start = time.perf_counter()
    run(few)
    middle = time.perf_counter()
    run(many)
    end = time.perf_counter()
    # Both times contain that of the prompt, so their difference does not.
    per_step = ((end - middle) - (middle - start)) / (many - few)
    print(json.dumps({"seconds_per_step": per_step, "peak_bytes": peak_rss()}))


def read_bandwidth(backend: _llmc.Backend) -> float:
    """Measure how many bytes per second the backend's threads read from memory."""
    array, total = backend.empty([1 << 27]), backend.empty([1])
    backend.zero(array)
    return array.numel * 4 / min(sample(lambda: backend.sum(total, array), 0.3))


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="d12")
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "f32"], choices=["f32", "bf16"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt (default 64)")
    parser.add_argument("--tokens", type=int, nargs=2, default=[4, 68], metavar=("FEW", "MANY"),
                        help="measures the time of MANY new tokens minus that of FEW (default 4 68)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3, help="processes per program, in turn (default 3)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    add_common_arguments(parser)
    args = parser.parse_args()
    if args.worker:
        return work(args)

    about = machine(args.threads)
    backend = _llmc.Backend("cpu", args.threads)
    c = _llmc.config_from_descriptor(args.model)
    rows, records = [], []
    for dtype in args.dtypes:
        weights = _llmc.memory_plan(
            c, _llmc.ModelOptions(dtype, dtype), 1, 1
        ).parameters - c.max_seq_len * c.channels * (2 if dtype == "bf16" else 4)
        for B in args.batch:
            seconds: dict[str, list[float]] = {"llmc": [], "torch": []}
            bandwidths = []  # measured in each round: another user of the machine can halve it for a minute
            for _ in range(args.rounds):
                bandwidths.append(read_bandwidth(backend))
                for peer, times in seconds.items():
                    command = [sys.executable, __file__, "--worker", peer, "--model", args.model, "--dtypes", dtype]
                    command += ["--batch", str(B), "--prompt", str(args.prompt), "--threads", str(about["threads"])]
                    command += ["--tokens", *map(str, args.tokens)]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    times.append(json.loads(done.stdout.splitlines()[-1])["seconds_per_step"])
            llmc_seconds, torch_seconds = statistics.median(seconds["llmc"]), statistics.median(seconds["torch"])
            machine_reads, llmc_reads = statistics.median(bandwidths), weights / llmc_seconds
            rows.append([f"{dtype} B={B}", f"{B / llmc_seconds:.0f}", f"{B / torch_seconds:.0f}",
                         f"{torch_seconds / llmc_seconds:.2f}", f"{llmc_reads / 1e9:.1f}", f"{machine_reads / 1e9:.1f}",
                         f"{llmc_reads / machine_reads:.0%}"])  # fmt: skip
            records.append(
                {
                    "dtype": dtype,
                    "B": B,
                    "seconds_per_step": seconds,
                    "weight_bytes": weights,
                    "read_bandwidth": bandwidths,
                }
            )
    print(f"\n{args.model}, prompts of {args.prompt}, {about['threads']} threads of {about['isa']}\n")
    print_table(
        ["", "llmc tokens/s", "PyTorch tokens/s", "x faster", "weights GB/s", "machine reads GB/s", "share"], rows
    )
    results: dict[str, Any] = {"machine": about, "model": args.model, "rows": records}
    write_json(args.json, results)


if __name__ == "__main__":
    main()
