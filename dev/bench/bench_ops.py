"""Measures each op of a training step on the CPU, beside what this machine can do at most.

    python dev/bench/bench_ops.py --seq 64 1024 --dtypes f32 bf16        # every op of a step of d12 at B=4
    python dev/bench/bench_ops.py --torch --only matmul                  # matmuls beside PyTorch's (oneDNN, MKL)

The ceilings are measured in the same run: FLOP/s of multiply-adds on registers alone, in the kernel set that runs
(_llmc.cpu_peak_flops); bytes/s of the sum of a large array (read) and of its copy. An op's floor is the time of its arithmetic at the
first ceiling or of its bytes at the second, whichever is longer; each tensor is read or written once. Operands rotate through as many
copies as a step has layers, so that the caches hold no more of them than in a step.

Columns: op and shape; the median time of a call in ms; GFLOP/s and GB/s; the floor as a share of the time; time * calls in a step.
With --torch: PyTorch's time in ms, and how many times faster llmc is.

On a machine that is not quiet, --cpu-time measures processor time on one thread instead of elapsed time.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from common import add_common_arguments, geometric_mean, machine, normal_bf16, print_table, sample, write_json

from llmc import _llmc

Run = Callable[[], object]


@dataclass(frozen=True)
class Op:
    """One op at one shape."""

    name: str
    shape: str
    calls: int  # in a step
    flops: float  # of a call
    bytes: float  # that a call reads and writes
    make: Callable[[], Run]  # returns a function that runs the op once
    torch: Callable[[], Run] | None = None  # the same for PyTorch, if it has such an op


class Operands:
    """Makes the tensors of ops, in as many copies as a step has layers."""

    def __init__(self, backend: _llmc.Backend, dtype: str, copies: int) -> None:
        self.backend: Any = backend  # not _llmc.Backend, whose type stubs do not say which operands may be None
        self.dtype, self.copies = dtype, copies
        self.rng = np.random.default_rng(0)
        self.noise = normal_bf16(self.rng, 1 << 20)

    def tensor(self, *shape: int, dtype: str | None = None, parameter: bool = False) -> _llmc.Tensor:
        """Return a tensor of random numbers, a million of them repeated; one of integers stays as it was allocated."""
        t = self.backend.empty(list(shape), dtype or self.dtype)
        noise = self.noise if t.dtype == "bf16" else (self.noise.astype(np.uint32) << 16).view(np.float32)
        if t.dtype in ("i16", "i32"):
            return t
        for begin in range(0, t.numel, noise.size):
            t.write(begin, noise[: min(noise.size, t.numel - begin)])
        if parameter:
            self.backend.weights_changed(t)
        return t

    def cycle(self, make: Callable[[], tuple[Any, ...]], copies: int | None = None) -> Iterator[tuple[Any, ...]]:
        """Make several tuples of operands, and return an endless iterator over them."""
        return itertools.cycle([make() for _ in range(copies or self.copies)])


def step_ops(o: Operands, B: int, T: int, C: int, L: int, NH: int, V: int, classifier_rows: int) -> Iterator[Op]:
    """Yield the ops of one training step, in the shapes of the schedule (csrc/model/gpt2.cpp) when it recomputes GELU.

    Args:
        o: makes the operands.
        B, T, C, L, NH, V: shape of the batch and the model.
        classifier_rows: rows of logits that exist at a time.
    """
    be, N, size = o.backend, B * T, 2 if o.dtype == "bf16" else 4
    Vp = (V + 127) // 128 * 128
    R = min(N, classifier_rows)
    chunks = -(-N // R)

    for name, K, M in (
        ("qkv", C, 3 * C),
        ("attproj", C, C),
        ("fc", C, 4 * C),
        ("fcproj", 4 * C, C),
        ("classifier", C, Vp),
    ):
        count, calls = (R, chunks) if name == "classifier" else (N, L)
        yield from matmuls(o, name, count, K, M, calls, gelu=name in ("fc", "fcproj"))

    HS, pairs = C // NH, B * NH * T * (T + 1) / 2
    shape = f"B={B} T={T} NH={NH} HS={HS}"

    def attention(op: Callable[..., None], backward: bool) -> Run:
        def operands() -> tuple[Any, ...]:
            qkv, out, lse = o.tensor(B, T, 3 * C), o.tensor(B, T, C), o.tensor(B, NH, T, dtype="f32")
            be.attention_forward(out, lse, qkv, NH)
            return (o.tensor(B, T, 3 * C), o.tensor(B, T, C), qkv, out, lse, NH) if backward else (out, lse, qkv, NH)

        cycle = o.cycle(operands)
        return lambda: op(*next(cycle))

    yield Op(
        "attention_forward", shape, L, 4 * HS * pairs, size * 4 * N * C, lambda: attention(be.attention_forward, False)
    )
    yield Op(
        "attention_backward",
        shape,
        L,
        10 * HS * pairs,
        size * 8 * N * C,
        lambda: attention(be.attention_backward, True),
    )

    def rows(op: Callable[..., None], *kinds: str) -> Run:
        one = {
            "x": lambda: o.tensor(N, C),
            "h": lambda: o.tensor(N, 4 * C),
            "s": lambda: o.tensor(N, dtype="f32"),
            "w": lambda: o.tensor(C),
            "g": lambda: o.tensor(C, dtype="f32"),
        }
        cycle = o.cycle(lambda: tuple(one[k]() for k in kinds))
        return lambda: op(*next(cycle))

    n = N * C
    yield Op(
        "residual+layernorm",
        f"{N}x{C}",
        2 * L,
        9 * n,
        size * 4 * n,
        lambda: rows(be.fused_residual_layernorm_forward, *"xxssxxww"),
    )
    yield Op(
        "layernorm_backward",
        f"{N}x{C}",
        2 * L + 1,
        15 * n,
        size * 4 * n,
        lambda: rows(be.layernorm_backward, *"xgggxxwss"),
    )
    yield Op("gelu_forward", f"{N}x{4 * C}", L, 0, size * 8 * n, lambda: rows(be.gelu_forward, *"hh"))

    def classifier() -> Run:
        logits, losses, targets = o.tensor(R, Vp), o.tensor(R, dtype="f32"), o.tensor(R, dtype="i32")
        return lambda: be.fused_classifier(losses, logits, targets, 1e-3, V)

    yield Op("fused_classifier", f"{R}x{V}", chunks, 0, size * 2 * R * Vp, classifier)

    def encoder(backward: bool) -> Run:
        wte, wpe, x = o.tensor(Vp, C), o.tensor(T, C), o.tensor(B, T, C)
        tokens = o.tensor(B, T, dtype="i32")
        tokens.from_host(o.rng.integers(0, V, (B, T), dtype=np.int32))
        if backward:
            return lambda: be.encoder_backward(wte, wpe, x, tokens)
        return lambda: be.encoder_forward(x, tokens, wte, wpe)

    yield Op("encoder_forward", f"{N}x{C}", 1, 0, size * 3 * n, lambda: encoder(False))
    yield Op("encoder_backward", f"{N}x{C}", 1, 0, size * 4 * n, lambda: encoder(True))

    P = Vp * C + 1024 * C + L * (12 * C * C + 13 * C) + 2 * C

    def adamw() -> Run:
        factor, master = o.tensor(1, dtype="f32"), None
        factor.from_host(np.ones(1, np.float32))
        p, g, m, v = o.tensor(P), o.tensor(P), be.empty([P]), be.empty([P])
        for t in (m, v):
            be.zero(t)
        if o.dtype == "bf16":
            master = be.empty([P], "i16")
        step = _llmc.AdamWStep(1e-6, 0.9, 0.95, 1e-8, 0.1, 0.1, 0.05)
        operands = [_llmc.AdamWOperands(p, master, m, v, g, 0.1)]
        return lambda: be.adamw_many(operands, factor, step)

    yield Op("adamw_many", f"{P / 1e6:.0f}M", 1, 0, P * (16 + 3 * size + (4 if o.dtype == "bf16" else 0)), adamw)

    def norm() -> Run:
        g, out = o.tensor(P), be.empty([_llmc.NORM_DIGITS])
        return lambda: be.gradient_norm_squared(out, [g])

    yield Op("gradient_norm_squared", f"{P / 1e6:.0f}M", 1, 2 * P, P * size, norm)


def matmuls(o: Operands, name: str, N: int, C: int, OC: int, calls: int, gelu: bool) -> Iterator[Op]:
    """Yield the matmuls of one linear layer: forward, dinp, and dweight, with dbias if layernorm's backward does not sum it.

    Args:
        o: makes the operands.
        name: of the layer. The classifier has no bias, and its weight exists once.
        N, C, OC: rows, channels in, channels out.
        calls: in a step.
        gelu: whether GELU comes before the layer (if C > OC) or after it.
    """
    be, size = o.backend, 2 if o.dtype == "bf16" else 4
    shape = f"{N}x{OC}x{C}"
    classifier, sums = name == "classifier", name in ("qkv", "fc")
    copies = 1 if classifier else None
    flops = 2.0 * N * C * OC

    def forward() -> Run:
        cycle = o.cycle(lambda: (o.tensor(N, OC), o.tensor(N, OC) if gelu and C < OC else None, o.tensor(N, C),
                                 o.tensor(OC, C, parameter=True), None if classifier else o.tensor(OC)), copies)  # fmt: skip

        def run() -> None:
            out, pre, inp, weight, bias = next(cycle)
            if pre is None:
                be.matmul_forward(out, inp, weight, bias)
            else:
                be.matmul_gelu_forward(out, pre, inp, weight, bias)

        return run

    def dinp() -> Run:
        cycle = o.cycle(lambda: (o.tensor(N, C), o.tensor(N, OC), o.tensor(OC, C, parameter=True),
                                 o.tensor(N, C) if gelu and C > OC else None), copies)  # fmt: skip

        def run() -> None:
            out, dout, weight, pre = next(cycle)
            if pre is None:
                be.matmul_backward(out, None, None, dout, None, weight)
            else:
                be.matmul_gelu_backward(out, None, None, dout, None, weight, pre)

        return run

    def dweight() -> Run:
        cycle = o.cycle(
            lambda: (o.tensor(OC, C), o.tensor(OC) if sums else None, o.tensor(N, OC), o.tensor(N, C)), copies
        )
        weight = o.tensor(OC, C)

        def run() -> None:
            dw, db, dout, inp = next(cycle)
            be.matmul_backward(None, dw, db, dout, inp, weight, False)

        return run

    bytes_ = size * (N * C + OC * C + N * OC)
    yield Op(
        f"matmul {name} forward",
        shape,
        calls,
        flops,
        bytes_ + size * N * OC * (gelu and C < OC),
        forward,
        lambda: torch_matmul(o, N, C, OC, copies, "forward"),
    )
    yield Op(
        f"matmul {name} dinp",
        shape,
        calls,
        flops,
        bytes_ + size * N * C * (gelu and C > OC),
        dinp,
        lambda: torch_matmul(o, N, C, OC, copies, "dinp"),
    )
    yield Op(
        f"matmul {name} dweight",
        shape,
        calls,
        flops,
        bytes_,
        dweight,
        lambda: torch_matmul(o, N, C, OC, copies, "dweight"),
    )


def torch_matmul(o: Operands, N: int, C: int, OC: int, copies: int | None, which: str) -> Run:
    """Return a function that makes the same matmul in PyTorch, into an existing output.

    It leaves out bias and GELU, because PyTorch makes a separate pass over memory for each. which: "forward", "dinp" or "dweight".
    """
    import torch

    dtype = torch.bfloat16 if o.dtype == "bf16" else torch.float32

    def operands() -> tuple[Any, ...]:
        inp, weight, dout = (torch.randn(s, dtype=dtype) for s in ((N, C), (OC, C), (N, OC)))
        if which == "forward":
            return inp, weight.t(), torch.empty(N, OC, dtype=dtype)
        if which == "dinp":
            return dout, weight, torch.empty(N, C, dtype=dtype)
        return dout.t(), inp, torch.empty(OC, C, dtype=dtype)

    cycle = o.cycle(operands, copies)

    def run() -> None:
        a, b, out = next(cycle)
        torch.mm(a, b, out=out)

    return run


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches at most."""

    flops: float  # FLOP/s
    read: float  # bytes/s
    copy: float  # bytes/s, the sum of those read and those written


def ceilings(backend: _llmc.Backend, dtype: str, clock: Callable[[], float]) -> Ceilings:
    """Measure the ceilings with the backend's threads."""
    threads = backend.info().threads
    size = 512 << 20
    a, b, total = backend.empty([size // 4]), backend.empty([size // 4]), backend.empty([1])
    for t in (a, b):
        backend.zero(t)  # so that the system has assigned memory to all pages
    read = size / min(sample(lambda: backend.sum(total, a), 0.3, clock))
    copy = 2 * size / min(sample(lambda: backend.copy(b, a), 0.3, clock))
    return Ceilings(_llmc.cpu_peak_flops(dtype, threads), read, copy)


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="d12")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--dtypes", nargs="+", default=["f32", "bf16"], choices=["f32", "bf16"])
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="ops whose name contains one of these")
    parser.add_argument("--torch", action="store_true", help="measure PyTorch's matmuls too, in turn")
    parser.add_argument("--seconds", type=float, default=0.5, help="how long each op is measured (default 0.5)")
    parser.add_argument("--cpu-time", action="store_true", help="measure processor time, on one thread")
    add_common_arguments(parser)
    args = parser.parse_args()

    threads = 1 if args.cpu_time else args.threads
    clock = time.thread_time if args.cpu_time else time.perf_counter
    backend = _llmc.Backend("cpu", threads)
    if args.torch:
        import torch

        torch.set_num_threads(backend.info().threads)
    config = _llmc.config_from_descriptor(args.model)
    C, L, NH, V = config.channels, config.num_layers, config.num_heads, config.vocab_size
    results: dict[str, Any] = {"machine": machine(threads), "tables": []}
    for dtype in args.dtypes:
        top = ceilings(backend, dtype, clock)
        for T in args.seq:
            print(f"\n{args.model} B={args.batch} T={T} {dtype}, {backend.info().threads} threads of {backend.info().isa}: "
                  f"{top.flops / 1e9:.0f} GFLOP/s, read {top.read / 1e9:.1f} GB/s, copy {top.copy / 1e9:.1f} GB/s\n")  # fmt: skip
            rows, records, ratios, total, floor_total = [], [], [], 0.0, 0.0
            # The classifier's operands exist once; the others as often as there are layers, up to about 2 GB.
            copies = max(2, min(L, int(2e9 / (args.batch * T * 12 * C * 4 + 12 * C * C * 4))))
            for op in step_ops(Operands(backend, dtype, copies), args.batch, T, C, L, NH, V, 1024):
                if args.only and not any(text in op.name for text in args.only):
                    continue
                run = op.make()
                if args.torch and op.torch:
                    times, torch_times = alternate(run, op.torch(), args.seconds, clock)
                else:
                    times, torch_times = sample(run, args.seconds, clock), []
                del run
                t = statistics.median(times)
                floor = max(op.flops / top.flops, op.bytes / top.read)
                total += t * op.calls
                floor_total += floor * op.calls
                record: dict[str, Any] = {"op": op.name, "shape": op.shape, "seconds": t, "best": min(times), "calls": op.calls,
                          "flops": op.flops, "bytes": op.bytes, "floor": floor}  # fmt: skip
                row = [op.name, op.shape, f"{t * 1e3:.2f}", f"{op.flops / t / 1e9:.0f}" if op.flops else "",
                       f"{op.bytes / t / 1e9:.1f}", f"{floor / t:.0%}", f"{t * op.calls * 1e3:.1f}"]  # fmt: skip
                if args.torch:
                    if torch_times:
                        record["torch_seconds"] = statistics.median(torch_times)
                        ratios.append(record["torch_seconds"] / t)
                        row += [f"{record['torch_seconds'] * 1e3:.2f}", f"{ratios[-1]:.2f}"]
                    else:
                        row += ["", ""]
                rows.append(row)
                records.append(record)
            header = ["op", "shape", "ms", "GFLOP/s", "GB/s", "of floor", "ms/step"]
            rows.append(
                ["step", "", "", "", "", f"{floor_total / total:.0%}", f"{total * 1e3:.0f}"] + ["", ""] * args.torch
            )
            print_table(header + ["PyTorch ms", "x faster"] * args.torch, rows)
            if ratios:
                print(
                    f"\nmatmuls against PyTorch's: geometric mean {geometric_mean(ratios):.2f}, least {min(ratios):.2f}"
                )
            results["tables"].append({"dtype": dtype, "T": T, "ceilings": vars(top), "ops": records})
    write_json(args.json, results)


def alternate(first: Run, second: Run, budget: float, clock: Callable[[], float]) -> tuple[list[float], list[float]]:
    """Measure two functions in turn, with a pause before each in which the threads of the other go to sleep."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(3):
        for samples, run in zip(times, (first, second), strict=True):
            time.sleep(0.05)
            samples += sample(run, budget / 3, clock)
    return times


if __name__ == "__main__":
    main()
