"""Measures each op of a training step on the CPU, beside what this machine can do at most.

    python dev/bench/bench_ops.py --seq 64 1024 --dtypes f32 bf16               # every op of a step of d12 at B=4
    python dev/bench/bench_ops.py --peers numpy torch --only matmul             # matmuls beside NumPy's BLAS and PyTorch (oneDNN, MKL)
    LLMC_ISA=avx2 python dev/bench/bench_ops.py --peers numpy torch --only matmul --dtypes f32      # all of them kept to AVX2

The ceilings are measured in the same run: FLOP/s of multiply-adds on registers alone, in the kernel set that runs
(_llmc.cpu_peak_flops); bytes/s of the sum of a large array (read) and of its copy. An op's floor is the time of its arithmetic at the
first ceiling or of its bytes at the second, whichever is longer; each tensor is read or written once. Operands rotate through as many
copies as a step has layers, so that the caches hold no more of them than in a step.

Columns: op and shape; the median time of a call in ms; GFLOP/s and GB/s; the floor as a share of the time; time * calls in a step;
for each peer its GFLOP/s and how many times faster llmc is. Peers take turns with llmc, on as many threads. They make the product
alone, and so does llmc then; without peers llmc's matmuls include bias and GELU, as in a step.

On a machine that is not quiet, --cpu-time measures processor time on one thread instead of elapsed time. How fast a build is also
depends on where the system puts its code and data in memory: one process may be several percent faster than the next.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from common import (
    adamw_bytes,
    add_common_arguments,
    environment_of_peers,
    geometric_mean,
    machine,
    machine_line,
    measured_ceilings,
    normal_bf16,
    print_table,
    sample,
    write_json,
)

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
    peers: Mapping[str, Callable[[], Run]] = field(default_factory=dict)  # the same by other libraries


class Operands:
    """Makes the tensors of ops, in as many copies as a step has layers. peers: libraries that matmuls are compared with."""

    def __init__(self, backend: _llmc.Backend, dtype: str, copies: int, peers: Sequence[str] = ()) -> None:
        self.backend: Any = backend  # not _llmc.Backend, whose type stubs do not say which operands may be None
        self.dtype, self.copies, self.peers = dtype, copies, peers
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

    yield Op("adamw_many", f"{P / 1e6:.0f}M", 1, 0, P * adamw_bytes(o.dtype), adamw)

    def norm() -> Run:
        g, out = o.tensor(P), be.empty([_llmc.NORM_DIGITS])
        return lambda: be.gradient_norm_squared(out, [g])

    yield Op("gradient_norm_squared", f"{P / 1e6:.0f}M", 1, 2 * P, P * size, norm)


def matmuls(o: Operands, name: str, N: int, C: int, OC: int, calls: int, gelu: bool) -> Iterator[Op]:
    """Yield the matmuls of one linear layer: forward, dinp, and dweight, with dbias if layernorm's backward does not sum it.

    If they are compared with others, they are the products alone, without bias and GELU.

    Args:
        o: makes the operands.
        name: of the layer. The classifier has no bias, and its weight exists once.
        N, C, OC: rows, channels in, channels out.
        calls: in a step.
        gelu: whether GELU comes before the layer (if C > OC) or after it.
    """
    be, size = o.backend, 2 if o.dtype == "bf16" else 4
    shape = f"{N}x{OC}x{C}"
    alone = bool(o.peers)
    bias, sums, gelu = name != "classifier" and not alone, name in ("qkv", "fc") and not alone, gelu and not alone
    copies = 1 if name == "classifier" else None
    flops = 2.0 * N * C * OC

    def peers(which: str) -> dict[str, Callable[[], Run]]:
        return {
            library: lambda library=library: peer_matmul(library, o, N, C, OC, copies, which)  # type: ignore[misc]
            for library in o.peers
            if library == "torch" or o.dtype == "f32"
        }

    def forward() -> Run:
        cycle = o.cycle(lambda: (o.tensor(N, OC), o.tensor(N, OC) if gelu and C < OC else None, o.tensor(N, C),
                                 o.tensor(OC, C, parameter=True), o.tensor(OC) if bias else None), copies)  # fmt: skip

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
        peers("forward"),
    )
    yield Op(
        f"matmul {name} dinp",
        shape,
        calls,
        flops,
        bytes_ + size * N * C * (gelu and C > OC),
        dinp,
        peers("dinp"),
    )
    yield Op(
        f"matmul {name} dweight",
        shape,
        calls,
        flops,
        bytes_,
        dweight,
        peers("dweight"),
    )


def peer_matmul(library: str, o: Operands, N: int, C: int, OC: int, copies: int | None, which: str) -> Run:
    """Return a function that makes a product with another library, into an existing output.

    Args:
        library: "numpy" or "torch".
        o: says dtype and number of copies.
        N, C, OC: rows, channels in, channels out.
        copies: if not as many as o says.
        which: "forward", "dinp" or "dweight".
    """
    if library == "torch":
        import torch

        dtype = torch.bfloat16 if o.dtype == "bf16" else torch.float32
        array: Any = lambda *shape: torch.randn(shape, dtype=dtype)  # noqa: E731
        multiply: Any = torch.mm
    else:
        array = lambda *shape: o.rng.standard_normal(shape, dtype=np.float32)  # noqa: E731
        multiply = np.matmul

    def operands() -> tuple[Any, ...]:
        if which == "forward":
            return array(N, C), array(OC, C).T, array(N, OC)
        if which == "dinp":
            return array(N, OC), array(OC, C), array(N, C)
        return array(N, OC).T, array(N, C), array(OC, C)

    cycle = o.cycle(operands, copies)

    def run() -> None:
        a, b, out = next(cycle)
        multiply(a, b, out=out)

    return run


def restart_for_peers(threads: int) -> None:
    """Start this program again with the variables that NumPy's BLAS and PyTorch read when they are loaded, unless they are right."""
    limits = environment_of_peers() | {"OPENBLAS_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if any(os.environ.get(name) != value for name, value in limits.items()):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | limits)


def name_of_peer(library: str) -> str:
    """Say which library that is."""
    if library == "torch":
        import torch

        return f"PyTorch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]  # type: ignore[index, call-overload]
    core = os.environ.get("OPENBLAS_CORETYPE")
    return f"NumPy {np.__version__}, {blas['name']} {blas['version']}" + (f" for {core}" if core else "")


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="d12")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--dtypes", nargs="+", default=["f32", "bf16"], choices=["f32", "bf16"])
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="ops whose name contains one of these")
    parser.add_argument("--peers", nargs="+", default=[], choices=["numpy", "torch"],
                        help="libraries whose matmuls are measured too, in turn; NumPy has f32 alone")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=0.5, help="how long each op is measured (default 0.5)")
    parser.add_argument("--cpu-time", action="store_true", help="measure processor time, on one thread")
    add_common_arguments(parser)
    args = parser.parse_args()

    threads = 1 if args.cpu_time else args.threads
    clock = time.thread_time if args.cpu_time else time.perf_counter
    backend = _llmc.Backend("cpu", threads)
    if args.peers:
        restart_for_peers(backend.info().threads)
    if "torch" in args.peers:
        import torch

        torch.set_num_threads(backend.info().threads)
    config = _llmc.config_from_descriptor(args.model)
    C, L, NH, V = config.channels, config.num_layers, config.num_heads, config.vocab_size
    results: dict[str, Any] = {
        "machine": machine(threads),
        "peers": [name_of_peer(p) for p in args.peers],
        "tables": [],
    }
    print("\n".join([machine_line(results["machine"]), *results["peers"]]))
    for dtype in args.dtypes:
        top = measured_ceilings(backend, dtype, clock)
        for T in args.seq:
            print(f"\n{args.model} B={args.batch} T={T} {dtype}: {top}\n")
            rows, records, total, floor_total = [], [], 0.0, 0.0
            ratios: dict[str, dict[str, float]] = {p: {} for p in args.peers}
            # The classifier's operands exist once; the others as often as there are layers, up to about 2 GB.
            copies = max(2, min(L, int(2e9 / (args.batch * T * 12 * C * 4 + 12 * C * C * 4))))
            for op in step_ops(Operands(backend, dtype, copies, args.peers), args.batch, T, C, L, NH, V, 1024):
                if args.only and not any(text in op.name for text in args.only):
                    continue
                times = alternate([op.make(), *(make() for make in op.peers.values())], args.seconds, clock)
                t, *peer_times = (statistics.median(samples) for samples in times)
                floor = max(op.flops / top.flops, op.bytes / top.read)
                total += t * op.calls
                floor_total += floor * op.calls
                record: dict[str, Any] = {"op": op.name, "shape": op.shape, "seconds": t, "best": min(times[0]), "calls": op.calls,
                          "flops": op.flops, "bytes": op.bytes, "floor": floor}  # fmt: skip
                row = [op.name, op.shape, f"{t * 1e3:.2f}", f"{op.flops / t / 1e9:.0f}" if op.flops else "",
                       f"{op.bytes / t / 1e9:.1f}", f"{floor / t:.0%}", f"{t * op.calls * 1e3:.1f}"]  # fmt: skip
                found = dict(zip(op.peers, peer_times, strict=True))
                for peer in args.peers:
                    if peer not in found:
                        row += ["", ""]
                        continue
                    seconds = found[peer]
                    record[f"{peer}_seconds"] = seconds
                    ratios[peer][op.name] = seconds / t
                    row += [f"{op.flops / seconds / 1e9:.0f}", f"{seconds / t:.2f}"]
                rows.append(row)
                records.append(record)
            if not records:
                parser.error(f"no op has one of {args.only} in its name")
            header = ["op", "shape", "ms", "GFLOP/s", "GB/s", "of floor", "ms/step"]
            step = ["step", "", "", "", "", f"{floor_total / total:.0%}", f"{total * 1e3:.0f}"]
            rows.append(step + [""] * (2 * len(args.peers)))
            print_table(header + [text for p in args.peers for text in (f"{p} GFLOP/s", "x faster")], rows)
            for peer, ratio in ratios.items():
                if ratio:
                    least = min(ratio, key=lambda name, ratio=ratio: ratio[name])  # type: ignore[misc]
                    print(f"\nagainst {peer}: geometric mean {geometric_mean(list(ratio.values())):.2f}, least "
                          f"{ratio[least]:.2f} ({least})")  # fmt: skip
            results["tables"].append({"dtype": dtype, "T": T, "ceilings": vars(top), "ops": records})
    write_json(args.json, results)


def alternate(runs: Sequence[Run], budget: float, clock: Callable[[], float]) -> list[list[float]]:
    """Measure functions in turn, with a pause before each in which the threads of the others go to sleep."""
    if len(runs) == 1:
        return [sample(runs[0], budget, clock)]
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(3):
        for samples, run in zip(times, runs, strict=True):
            time.sleep(0.05)
            samples += sample(run, budget / 3, clock)
    return times


if __name__ == "__main__":
    main()
