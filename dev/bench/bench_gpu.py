"""GPU training throughput: the card's ceilings, then llmc beside PyTorch (compiled, bf16 autocast, SDPA, fused AdamW) and, where
its binary is given, llm.c, on the same card in the same run; and llmc's time by op beside what the ceilings allow.

    python dev/bench/bench_gpu.py --json results.json            # 124M, 350M and 1558M: about 15 minutes on one H100
    python dev/bench/bench_gpu.py --short                        # 124M alone, about 2 minutes
    python dev/bench/bench_gpu.py --dry-run                      # a rehearsal on the CPU: tiny sizes, the same table and JSON

Every contender runs in a process of its own, with the card to itself, on random tokens. A step is one update of --total-batch
tokens in micro-batches of B sequences; figures are medians over the steps after the first two. MFU is llm.c's: 6 N + 6 L C T
FLOP per token, over the card's peak. Memory is what the process took of the card.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import llmc
from llmc import _llmc
from llmc.mfu import peak_flops

MODELS = {"d12": 64, "d24": 32, "d48": 16}  # descriptor -> B: 124M, 350M, 1558M
TINY = {"max_seq_len": 32, "vocab_size": 250, "num_layers": 2, "num_heads": 2, "channels": 64}


# ---- what is measured ----


def config_of(args: argparse.Namespace) -> llmc.GPT2Config:
    return llmc.GPT2Config(**TINY) if args.dry_run else llmc.GPT2Config.from_descriptor(args.model)


def tokens(config: llmc.GPT2Config, B: int, T: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, config.vocab_size, (B, T + 1), dtype=np.int32)


def medians(args: argparse.Namespace, step: Callable[[], float]) -> dict[str, Any]:
    """Runs step() for args.seconds and at least three times, after two to warm up; step returns the loss."""
    loss = 0.0
    start = time.perf_counter()
    for _ in range(2):
        loss = step()
    warm_up, times = time.perf_counter() - start, []
    end = time.perf_counter() + args.seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        loss = step()
        times.append(time.perf_counter() - start)
    return {"step_seconds": statistics.median(times), "steps": len(times), "warm_up_seconds": warm_up, "loss": loss}


def run_llmc(args: argparse.Namespace) -> dict[str, Any]:
    config, B, T = config_of(args), args.batch, args.seq_len
    device = "cpu" if args.dry_run else "cuda"
    before = _llmc.Backend(device).info().free_bytes
    model = llmc.GPT2(config, device=device, dtype="bf16", recompute=args.recompute)
    if not args.dry_run:
        model.native.backend.set_option("attention", args.attention)
    optimizer = llmc.AdamW(model, weight_decay=0.1)
    data = tokens(config, B, T)
    micro_steps = args.total_batch // (B * T)

    def step() -> float:
        model.zero_grad()
        for _ in range(micro_steps):
            model.forward(data[:, :-1])
            model.backward(data[:, 1:], scale=1 / micro_steps)
        optimizer.step(1e-4)
        return model.mean_loss

    result = medians(args, step)
    info = model.native.backend.info()
    return {**result, "memory_bytes": max(0, before - info.free_bytes), "options": info.options}


def run_torch(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from llmc.reference import GPT

    config, B, T = config_of(args), args.batch, args.seq_len
    device = "cpu" if args.dry_run else "cuda"
    torch.set_float32_matmul_precision("high")
    # The vocabulary is padded, as everyone does who wants PyTorch to be fast here.
    padded = llmc.GPT2Config(
        max_seq_len=config.max_seq_len, vocab_size=config.padded_vocab_size, num_layers=config.num_layers,
        num_heads=config.num_heads, channels=config.channels,
    )  # fmt: skip
    before = 0 if args.dry_run else torch.cuda.mem_get_info()[0]
    model = GPT(padded, attention="flash").to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=not args.dry_run
    )
    run = model if args.dry_run else torch.compile(model)
    data = torch.from_numpy(tokens(config, B, T)).to(device, torch.int64)
    inputs, targets = data[:, :-1].contiguous(), data[:, 1:].contiguous()
    micro_steps = args.total_batch // (B * T)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        for _ in range(micro_steps):
            with torch.autocast(device, dtype=torch.bfloat16):
                _, loss = run(inputs, targets)
            (loss / micro_steps).backward()
            total += loss.detach() / micro_steps
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(total)

    result = medians(args, step)
    memory = 0 if args.dry_run else before - torch.cuda.mem_get_info()[0]
    return {**result, "memory_bytes": memory, "options": f"torch {torch.__version__}"}


def run_llm_c(args: argparse.Namespace) -> dict[str, Any]:
    """llm.c's train_gpt2cu, whose own step lines are read."""
    from llmc.data import write_shard

    config = config_of(args)
    steps = 3 + max(3, int(args.seconds))
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder, "random_000.bin")
        count = args.total_batch * 2 + 1
        write_shard(shard, np.random.default_rng(0).integers(0, config.vocab_size, count), vocab_size=config.vocab_size)
        flags = {"-i": shard, "-j": shard, "-e": args.model, "-b": args.batch, "-t": args.seq_len, "-d": args.total_batch,
                 "-x": steps, "-v": 0, "-s": 0, "-h": 0, "-r": args.recompute, "-ge": 1, "-c": 0.1, "-l": 1e-4}  # fmt: skip
        command = [str(args.llm_c), *(str(x) for pair in flags.items() for x in pair)]
        out = subprocess.run(command, capture_output=True, text=True, timeout=600)
    lines = re.findall(r"^step +\d+/\d+ \| loss +([\d.]+).*?\| +([\d.]+) ms", out.stdout, re.MULTILINE)
    if out.returncode or len(lines) < 4:
        raise llmc.Error(f"{args.llm_c} ended with {out.returncode}: {(out.stderr or out.stdout)[-300:]}")
    times = [float(ms) / 1e3 for _, ms in lines[2:]]
    memory = re.search(r"device memory usage: (\d+) MiB", out.stdout)
    return {"step_seconds": statistics.median(times), "steps": len(times), "loss": float(lines[-1][0]),
            "memory_bytes": int(memory[1]) << 20 if memory else 0, "options": "-ge 1"}  # fmt: skip


def run_ceilings(args: argparse.Namespace) -> dict[str, Any]:
    """What the card reaches at most, by PyTorch's copy and products of random matrices."""
    import torch

    device = "cpu" if args.dry_run else "cuda"
    n = 256 if args.dry_run else 8192

    def seconds(run: Callable[[], object], repeats: int = 3 if args.dry_run else 20) -> float:
        times = []
        for _ in range(repeats + 3):
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times[3:])

    x = torch.randn((1 << 20) if args.dry_run else (1 << 29), device=device, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    out: dict[str, Any] = {
        "copy_bytes_per_second": 2 * x.numel() * 2 / seconds(lambda: y.copy_(x)),
        "bf16_flops": 2 * n**3 / seconds(lambda: a @ b),
    }
    try:
        a8, b8 = a.to(torch.float8_e4m3fn), b.t().contiguous().to(torch.float8_e4m3fn).t()
        one = torch.ones((), device=device)
        out["fp8_flops"] = 2 * n**3 / seconds(lambda: torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16))
    except (RuntimeError, AttributeError, TypeError) as e:
        out["fp8_flops"] = None
        out["fp8_reason"] = str(e).splitlines()[0]
    return out


def run_ops(args: argparse.Namespace) -> dict[str, Any]:
    """Time of each op at the model's sizes, and its floor: the larger of its bytes and its FLOP at the measured ceilings."""
    config, B, T = config_of(args), args.batch, args.seq_len
    L, C, NH, Vp = config.num_layers, config.channels, config.num_heads, config.padded_vocab_size
    be = _llmc.Backend("cpu" if args.dry_run else "cuda")
    if not args.dry_run:
        be.set_option("attention", args.attention)
    N, rows = B * T, min(B * T, 1024 if args.dry_run else 8192)
    rng = np.random.default_rng(0)

    def random(*shape: int, dtype: str = "bf16") -> _llmc.Tensor:
        """Random values in a small block, repeated: zeros would make products run faster than they do."""
        t = be.empty(list(shape), dtype)
        block = rng.standard_normal(min(t.numel, 1 << 20), np.float32)
        raw = (block.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bf16" else block
        for begin in range(0, t.numel, raw.size):
            t.write(begin, raw[: t.numel - begin])
        return t

    def integers(*shape: int) -> _llmc.Tensor:
        t = be.empty(list(shape), "i32")
        t.from_host(rng.integers(0, config.vocab_size, shape, dtype=np.int32))
        return t

    def seconds(run: Callable[[], object]) -> float:
        run()
        be.synchronize()
        repeats = 2 if args.dry_run else 10
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        be.synchronize()
        return (time.perf_counter() - start) / repeats

    U = 2 * N * C  # bytes of one (B, T, C) bf16 tensor
    causal = 2 * B * T * (T + 1) * C  # FLOP of both products of attention, forward
    x, dx, residual = (random(B, T, C) for _ in range(3))
    wide, dwide, gelu = (random(B, T, 4 * C) for _ in range(3))
    qkv, dqkv = random(B, T, 3 * C), random(B, T, 3 * C)
    mean, rstd, lse = be.empty([B, T]), be.empty([B, T]), be.empty([B, NH, T])
    vector, dvector = random(C), random(C)
    measured: list[tuple[str, int, float, float, float]] = []  # name, calls per micro-batch, seconds, FLOP, bytes

    def op(name: str, calls: int, run: Callable[[], object], flop: float, size: float) -> None:
        measured.append((name, calls, seconds(run), flop, size))

    ids, wpe = integers(B, T), random(config.max_seq_len, C)
    wte, dwte, dwpe = random(Vp, C), random(Vp, C), random(config.max_seq_len, C)
    op("encoder forward", 1, lambda: be.encoder_forward(x, ids, wte, wpe), 0, 2 * U)
    op("encoder backward", 1, lambda: be.encoder_backward(dwte, dwpe, dx, ids), 0, 2 * U)
    op("residual + layernorm forward", 2 * L, lambda: be.fused_residual_layernorm_forward(
        residual, x, mean, rstd, x, dx, vector, vector), 0, 4 * U)  # fmt: skip
    op("layernorm backward", 2 * L + 1, lambda: be.layernorm_backward(
        dx, dvector, dvector, x, residual, vector, mean, rstd), 0, 4 * U)  # fmt: skip
    for name, out, inp, dout, dinp in (
        ("qkv", qkv, x, dqkv, dx), ("attproj", x, residual, dx, residual), ("fcproj", x, gelu, dx, dwide)
    ):  # fmt: skip
        OC, IC = out.shape[2], inp.shape[2]
        w, dw, bias, dbias = random(OC, IC), random(OC, IC), random(OC), random(OC)
        product, traffic = 2.0 * N * OC * IC, 2.0 * (N * (OC + IC) + OC * IC)
        op(f"{name} forward", L, lambda o=out, i=inp, w=w, b=bias: be.matmul_forward(o, i, w, b), product, traffic)
        if name == "fcproj":
            op("fcproj backward, with GELU's", L, lambda dw=dw, w=w, db=dbias: be.matmul_gelu_backward(
                dwide, dw, db, dx, gelu, w, wide, True), 2 * product, 2 * traffic + 2 * 4 * U)  # fmt: skip
        else:
            op(f"{name} backward", L, lambda di=dinp, dw=dw, db=dbias, do=dout, i=inp, w=w: be.matmul_backward(
                di, dw, db, do, i, w, True), 2 * product, 2 * traffic)  # fmt: skip
    w, dw, bias, dbias = random(4 * C, C), random(4 * C, C), random(4 * C), random(4 * C)
    op("fc forward, with GELU", L, lambda: be.matmul_gelu_forward(gelu, wide, x, w, bias), 8.0 * N * C * C, 9 * U)
    op("fc backward", L, lambda: be.matmul_backward(dx, dw, dbias, dwide, x, w, True), 16.0 * N * C * C, 10 * U)
    if args.recompute:
        op("GELU again", L, lambda: be.gelu_forward(gelu, wide), 0, 8 * U)
    op("attention forward", L, lambda: be.attention_forward(x, lse, qkv, NH), causal, 4 * U)
    op("attention backward", L, lambda: be.attention_backward(dqkv, dx, qkv, x, lse, NH), 2.5 * causal, 8 * U)
    logits, losses, targets, some = random(rows, Vp), be.empty([rows]), integers(rows), random(rows, C)
    chunks = -(-N // rows)
    op("logits forward", chunks, lambda: be.matmul_forward(logits, some, wte), 2.0 * rows * C * Vp, 2.0 * rows * Vp)
    op("softmax, loss, gradient", chunks, lambda: be.fused_classifier(
        losses, logits, targets, 1e-6, config.vocab_size), 0, 4.0 * rows * Vp)  # fmt: skip
    op("logits backward", chunks, lambda: be.matmul_backward(some, dwte, None, logits, some, wte, True),
       4.0 * rows * C * Vp, 4.0 * rows * Vp)  # fmt: skip
    P = config.num_parameters
    part = min(P, 1 << 27)  # AdamW is measured on so many parameters, and scaled
    p, g, low = random(part), random(part), be.empty([part], "i16")
    m, v, factor, norm = be.empty([part]), be.empty([part]), be.empty([1]), be.empty([1])
    factor.from_host(np.ones(1, np.float32))
    adamw = _llmc.AdamWStep(
        lr=1e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, correction1=0.1, correction2=0.05
    )
    micro_steps = args.total_batch // (B * T)
    once = P / part / micro_steps  # calls per micro-batch of what is done once a step
    for name, run, size in (
        ("AdamW", lambda: be.adamw(p, low, m, v, g, factor, adamw), 26.0),
        ("gradient norm", lambda: be.global_norm_squared(norm, g), 2.0),
    ):
        measured.append((name, once, seconds(run), 0.0, size * part))  # type: ignore[arg-type]
    return {"ops": [dict(zip(("op", "calls", "seconds", "flop", "bytes"), row)) for row in measured]}


WORKERS = {"llmc": run_llmc, "torch": run_torch, "llm.c": run_llm_c, "ceilings": run_ceilings, "ops": run_ops}


# ---- who runs it, and what becomes of it ----


def in_a_process(args: argparse.Namespace, what: str, model: str, batch: int, attention: str) -> dict[str, Any]:
    """The worker's result, or {"failed": why}."""
    command = [
        sys.executable,
        __file__,
        "--worker",
        what,
        "--model",
        model,
        "--batch",
        str(batch),
        "--attention",
        attention,
    ]
    command += ["--seq-len", str(args.seq_len), "--total-batch", str(args.total_batch), "--seconds", str(args.seconds)]
    command += ["--recompute", str(args.recompute)]
    command += ["--dry-run"] * args.dry_run + (["--llm-c", str(args.llm_c)] if args.llm_c else [])
    print(f"... {what} {model} B={batch} {attention if what in ('llmc', 'ops') else ''}", file=sys.stderr, flush=True)
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=args.limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"longer than {args.limit} s"}
    lines = out.stdout.strip().splitlines()
    if out.returncode or not lines:
        return {"failed": (out.stderr.strip().splitlines() or [f"exit code {out.returncode}"])[-1][:200]}
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def attentions(args: argparse.Namespace) -> list[str]:
    if args.attention != "all":
        return [args.attention]
    if args.dry_run:
        return ["simple"]
    backend = _llmc.Backend("cuda")
    usable = ["flash"]
    try:
        backend.set_option("attention", "cudnn")
        usable.append("cudnn")
    except llmc.Error as e:
        print(f"without cuDNN's attention: {e}", file=sys.stderr)
    return usable


def print_table(header: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    for n, row in enumerate([header, *rows]):
        print("| " + " | ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]) + " |")
        if n == 0:
            print("|" + "|".join("-" * (w + 2) for w in widths) + "|")


def throughput_row(run: dict[str, Any], peak: float | None) -> list[str]:
    name = f"{run['model']} B={run['batch']} {run['who']}"
    if "failed" in run:
        return [name, "failed: " + run["failed"], "", "", "", ""]
    mfu = f"{100 * run['flops'] / peak:.1f}%" if peak else "-"
    return [name, f"{run['tokens_per_second']:,.0f}", mfu, f"{1e3 * run['step_seconds']:.1f}",
            f"{run['memory_bytes'] / 2**30:.1f}", f"{run['loss']:.3f}"]  # fmt: skip


def op_rows(ops: list[dict[str, Any]], ceilings: dict[str, Any]) -> list[list[str]]:
    rows, total, total_floor = [], 0.0, 0.0
    for o in ops:
        took = o["calls"] * o["seconds"]
        floor = o["calls"] * max(o["flop"] / ceilings["bf16_flops"], o["bytes"] / ceilings["copy_bytes_per_second"])
        o["floor_seconds"] = floor
        total, total_floor = total + took, total_floor + floor
        rows.append(
            [o["op"], f"{o['calls']:.3g}", f"{1e3 * took:.3f}", f"{1e3 * floor:.3f}", f"{100 * floor / took:.0f}%"]
        )
    rows.append(
        ["a micro-batch", "", f"{1e3 * total:.2f}", f"{1e3 * total_floor:.2f}", f"{100 * total_floor / total:.0f}%"]
    )
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", metavar="MODEL[:B]", help=f"default: {' '.join(f'{m}:{b}' for m, b in MODELS.items())}"
    )
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--total-batch", type=int, default=524288, help="tokens per update")
    parser.add_argument("--attention", default="all", help="simple, flash, cudnn, or all that are fast and here")
    parser.add_argument(
        "--recompute", type=int, default=0, choices=(0, 1, 2), help="as of llmc.GPT2, for llmc and llm.c"
    )
    parser.add_argument("--seconds", type=float, default=15, help="per contender and model")
    parser.add_argument("--limit", type=float, default=420, help="seconds after which a contender is given up")
    parser.add_argument("--llm-c", type=Path, metavar="FILE", help="llm.c's train_gpt2cu")
    parser.add_argument("--no-torch", action="store_true", help="without PyTorch as a contender")
    parser.add_argument("--short", action="store_true", help="124M alone, fewer steps")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on the CPU")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--worker", choices=sorted(WORKERS), help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.dry_run and not args.worker:
        args.models, args.seq_len, args.total_batch, args.seconds = ["tiny:2"], 32, 128, 0.2
    if args.short:
        args.models, args.seconds = args.models or ["d12:64"], min(args.seconds, 5)
    return args


def main() -> int:
    args = parse()
    if args.worker:
        print(json.dumps(WORKERS[args.worker](args)))
        return 0
    models = [m.partition(":") for m in args.models] if args.models else [(m, ":", str(b)) for m, b in MODELS.items()]
    backend = _llmc.Backend("cpu" if args.dry_run else "cuda")
    info, peak = backend.info(), peak_flops(backend, "bf16")
    del backend
    results: dict[str, Any] = {
        "rehearsal": args.dry_run, "date": datetime.datetime.now().isoformat(timespec="minutes"), "device": info.description,
        "peak_bf16_flops": peak, "llmc": llmc.__version__, "cuda": _llmc.cuda_status(), "seq_len": args.seq_len,
        "total_batch": args.total_batch, "runs": [], "ops": {},
    }  # fmt: skip
    ceilings = in_a_process(args, "ceilings", "d12", 1, "simple")
    results["ceilings"] = ceilings
    for model, _, b in models:
        batch = int(b or MODELS[model])
        contenders = [("llmc", a) for a in attentions(args)]
        contenders += [] if args.no_torch else [("torch", "simple")]
        contenders += [("llm.c", "simple")] if args.llm_c else []
        for who, attention in contenders:
            run = in_a_process(args, who, model, batch, attention)
            if "failed" not in run:
                rate = args.total_batch / run["step_seconds"]
                config = llmc.GPT2Config(**TINY) if args.dry_run else llmc.GPT2Config.from_descriptor(model)
                run |= {"tokens_per_second": rate, "flops": rate * config.flops_per_token(args.seq_len)}
            results["runs"].append(
                {"model": model, "batch": batch, "who": f"{who} {attention}" if who == "llmc" else who, **run}
            )
        fastest = attentions(args)[-1]
        results["ops"][model] = in_a_process(args, "ops", model, batch, fastest)
    mark = "REHEARSAL ON THE CPU, tiny sizes: no figure here says anything of a GPU. " if args.dry_run else ""
    print(f"\n{mark}{info.description}, T={args.seq_len}, {args.total_batch} tokens per update")
    if "failed" in ceilings:
        print(f"ceilings: failed: {ceilings['failed']}")
    else:
        fp8 = f"{ceilings['fp8_flops'] / 1e12:.2f}" if ceilings["fp8_flops"] else "-"
        copy, bf16 = ceilings["copy_bytes_per_second"] / 1e9, ceilings["bf16_flops"] / 1e12
        print(f"ceilings: copy {copy:.1f} GB/s, bf16 {bf16:.2f} TFLOP/s, fp8 {fp8} TFLOP/s")
    for model, measured in results["ops"].items():
        print(f"\n{model}: time by op, per micro-batch")
        if "failed" in measured or "failed" in ceilings:
            print(f"failed: {measured.get('failed', 'no ceilings')}")
            continue
        print_table(["op", "calls", "ms", "floor ms", "of it"], op_rows(measured["ops"], ceilings))
    print()
    print_table(["", "tokens/s", "MFU", "ms/update", "GiB", "loss"], [throughput_row(r, peak) for r in results["runs"]])
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return 1 if any("failed" in r for r in [*results["runs"], ceilings, *results["ops"].values()]) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except llmc.Error as error:
        sys.exit(f"bench_gpu: {error}; --dry-run rehearses on the CPU" if "--worker" not in sys.argv else str(error))
