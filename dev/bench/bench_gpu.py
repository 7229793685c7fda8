"""Measures training throughput on a GPU: llmc beside PyTorch and llm.c, and llmc's time by op beside what the card can do at most.

    python dev/bench/bench_gpu.py --out results.jsonl            # 124M, 350M and 1558M: about 15 minutes on one H100
    python dev/bench/bench_gpu.py --short                        # 124M alone, about 2 minutes
    python dev/bench/bench_gpu.py --options                      # what each option is worth: one changed at a time
    python dev/bench/bench_gpu.py --parts llmc --settings 'attention=flash rows=1024' 'attention=flash rows=16384'
    python dev/bench/bench_gpu.py --dry-run                      # a rehearsal: tiny sizes, on the emulated device or the CPU

All are measured on the same card in the same run. PyTorch runs compiled, with bf16 autocast, SDPA and fused AdamW; llm.c runs if
--llm-c names its binary. Each program runs in a process of its own, with the card to itself, on random tokens. A step is one update of
--total-batch tokens in micro-batches of B sequences. Figures are medians over the steps after a warm-up of two micro-batches and an
optimizer step.

Columns of the last table: model, B, program and settings; tokens/s; MFU, which is 6 N + 6 L C T FLOP per token (as llm.c counts) over the
card's peak; ms per update; GiB of the card's memory that the program took; the last loss. Columns of the tables by op: the op; its
calls in a micro-batch; their time in ms; their floor in ms, which is the time of their arithmetic or of their bytes at the measured
ceilings, whichever is longer; the floor as a share of the time.

--out appends each figure as soon as it is known, one JSON object per line, so that nothing is lost if a later measurement hangs.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from common import append_json

import llmc
from llmc import _llmc
from llmc.models.model import default_classifier_rows
from llmc.selfcheck.devices import option_values, options_of
from llmc.system.flops import peak_flops

MODELS = {"d12": 64, "d24": 32, "d48": 16}  # descriptor -> B: 124M, 350M, 1558M
TINY = {"max_seq_len": 32, "vocab_size": 250, "num_layers": 2, "num_heads": 1, "channels": 64}
# What --settings may name beside the backend's options.
OF_THE_MODEL = ("rows", "grad_dtype", "recompute")


# ---- what is measured ----


def config_of(args: argparse.Namespace) -> llmc.GPT2Config:
    """Return the shape of the model that the arguments name; a tiny one in a rehearsal."""
    return llmc.GPT2Config(**TINY) if args.dry_run else llmc.GPT2Config.from_descriptor(args.model)


def device_of(args: argparse.Namespace) -> str:
    """Return "cuda", or "cpu" in a rehearsal without a GPU."""
    if args.dry_run:
        try:
            _llmc.Backend("cuda")
        except _llmc.Error:
            return "cpu"
    return "cuda"


def parse_settings(text: str) -> dict[str, str]:
    """Return the settings in a text like 'attention=flash rows=1024', by name."""
    return dict(pair.split("=", 1) for pair in text.split())


def tokens(config: llmc.GPT2Config, B: int, T: int) -> np.ndarray:
    """Return random tokens, (B, T + 1): inputs, and targets one token further."""
    return np.random.default_rng(0).integers(0, config.vocab_size, (B, T + 1), dtype=np.int32)


def fill(t: _llmc.Tensor, rng: np.random.Generator, scale: float = 1.0) -> None:
    """Fill a tensor with a block of random values, repeated. Matmuls of zeros would run too fast, and a billion draws take long."""
    block = scale * rng.standard_normal(min(t.numel, 1 << 20), np.float32)
    raw = (block.view(np.uint32) >> 16).astype(np.uint16) if t.dtype == "bf16" else block
    for begin in range(0, t.numel, raw.size):
        t.write(begin, raw[: t.numel - begin])


def choose(backend: _llmc.Backend, settings: dict[str, str]) -> None:
    """Set the backend's options. The CPU, on which a rehearsal may run, has none.

    Raises:
        llmc.Error: if this build or device lacks an option's value.
        ValueError: if an option or a value is unknown.
    """
    for name, value in settings.items():
        if name not in OF_THE_MODEL and backend.info().name != "cpu":
            backend.set_option(name, value)


def make_model(args: argparse.Namespace, settings: dict[str, str], device: str) -> llmc.GPT2:
    """Return a model in bf16 with random weights."""
    grad_dtype, recompute = settings.get("grad_dtype"), int(settings.get("recompute", args.recompute))
    options: dict[str, Any] = {"dtype": "bf16", "grad_dtype": grad_dtype, "recompute": recompute, "seed": None}
    if "rows" in settings:
        options["classifier_rows"] = int(settings["rows"])
    model = llmc.GPT2(config_of(args), device=device, **options)
    choose(model.backend, settings)
    fill(model.all_parameters(), np.random.default_rng(0), 0.02)
    for name in ("ln1w", "ln2w", "lnfw"):
        model.parameters[name] = np.ones(model.parameter_tensors()[name].shape)
    return model


def medians(args: argparse.Namespace, step: Callable[[int], float], micro_steps: int) -> dict[str, Any]:
    """Measure updates of one program.

    Args:
        args: args.updates is how many, or 0 for as many as fit in args.seconds, and at least three.
        step: makes an update of so many micro-batches and returns the loss.
        micro_steps: micro-batches of an update.

    Returns:
        "step_seconds" (the median), "steps" (all times), "warm_up_seconds" and "loss".
    """
    start = time.perf_counter()
    loss = step(min(2, micro_steps))
    warm_up, times = time.perf_counter() - start, []
    end = time.perf_counter() + args.seconds
    while len(times) < (args.updates or 3) or (not args.updates and time.perf_counter() < end):
        start = time.perf_counter()
        loss = step(micro_steps)
        times.append(time.perf_counter() - start)
    return {"step_seconds": statistics.median(times), "steps": times, "warm_up_seconds": warm_up, "loss": loss}


def run_llmc(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each of args.settings. All are measured in this process, each with a new model and backend."""
    for text in args.settings:
        settings = parse_settings(text)
        try:
            choose(_llmc.Backend(device_of(args)), settings)
        except _llmc.Error as e:
            yield {"settings": text, "left_out": str(e).splitlines()[0]}
            continue
        except ValueError as e:
            yield {"settings": text, "failed": str(e).splitlines()[0]}
            continue
        try:
            yield {"settings": text, **measure_llmc(args, settings)}
        except (_llmc.Error, ValueError) as e:
            yield {"settings": text, "failed": str(e).splitlines()[0]}
        gc.collect()


def measure_llmc(args: argparse.Namespace, settings: dict[str, str]) -> dict[str, Any]:
    """Measure updates of llmc with these settings."""
    config, B, T = config_of(args), args.batch, args.seq_len
    device = device_of(args)
    before = _llmc.Backend(device).info().free_bytes
    model = make_model(args, settings, device)
    if options_of(model.backend).get("attention") == "simple" and not args.dry_run and B * T > 4096:
        return {"left_out": "attention=simple takes minutes at this size"}
    optimizer = llmc.AdamW(model, weight_decay=0.1)
    data = tokens(config, B, T)

    def step(micro_steps: int) -> float:
        model.zero_grad()
        for _ in range(micro_steps):
            model.forward(data[:, :-1])
            model.backward(data[:, 1:], scale=1 / micro_steps)
        optimizer.step(1e-4)
        return model.mean_loss

    result = medians(args, step, args.total_batch // (B * T))
    info = model.backend.info()
    return {
        **result, "memory_bytes": max(0, before - info.free_bytes), "options": info.options,
        "rows": model.classifier_rows, "fallbacks": info.fallbacks,
    }  # fmt: skip


def run_torch(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the row of PyTorch."""
    import torch

    from llmc.reference import GPT

    config, B, T = config_of(args), args.batch, args.seq_len
    device = "cpu" if args.dry_run else "cuda"
    torch.set_float32_matmul_precision("high")
    # The vocabulary is padded, because PyTorch's matmuls are faster at such sizes.
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

    def step(micro_steps: int) -> float:
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

    result = medians(args, step, args.total_batch // (B * T))
    memory = 0 if args.dry_run else before - torch.cuda.mem_get_info()[0]
    yield {**result, "memory_bytes": memory, "options": f"torch {torch.__version__}"}


def run_llm_c(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the row of llm.c's train_gpt2cu, read from the lines that it prints for its steps."""
    from llmc.formats.shards import write_shard

    config = config_of(args)
    steps = 3 + max(3, int(args.seconds))
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder, "random_000.bin")
        count = args.total_batch * 2 + 1
        write_shard(shard, np.random.default_rng(0).integers(0, config.vocab_size, count), vocab_size=config.vocab_size)
        # It evaluates once before the steps and once after them: -v 0 would end it by a division by zero.
        flags = {"-i": shard, "-j": shard, "-e": args.model, "-b": args.batch, "-t": args.seq_len, "-d": args.total_batch,
                 "-x": steps, "-v": 2 * steps, "-m": 1, "-s": 0, "-h": 0, "-r": args.recompute, "-ge": 1,
                 "-c": 0.1, "-l": 1e-4}  # fmt: skip
        command = [str(args.llm_c), *(str(x) for pair in flags.items() for x in pair)]
        out = subprocess.run(command, capture_output=True, text=True, timeout=600)
    lines = re.findall(r"^step +\d+/\d+ \| loss +([\d.]+).*?\| +([\d.]+) ms", out.stdout, re.MULTILINE)
    if out.returncode or len(lines) < 4:
        raise llmc.Error(f"{args.llm_c} ended with {out.returncode}: {(out.stderr or out.stdout)[-300:]}")
    times = [float(ms) / 1e3 for _, ms in lines[2:]]
    memory = re.search(r"device memory usage: (\d+) MiB", out.stdout)
    yield {"step_seconds": statistics.median(times), "steps": times, "loss": float(lines[-1][0]),
           "memory_bytes": int(memory[1]) << 20 if memory else 0, "options": "-ge 1"}  # fmt: skip


def run_ceilings(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row of what the card reaches at most, in PyTorch's copy and matmuls of random matrices."""
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
    yield out


def run_ops(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each op at the model's sizes, with the first of args.settings: its time, FLOP and bytes."""
    config, B, T = config_of(args), args.batch, args.seq_len
    L, C, NH, Vp = config.num_layers, config.channels, config.num_heads, config.padded_vocab_size
    device, settings = device_of(args), parse_settings(args.settings[0])
    be = _llmc.Backend(device)
    choose(be, settings)
    # As many rows of logits at a time as a model has with these settings.
    N, rows = B * T, min(B * T, int(settings.get("rows", default_classifier_rows(be, config, "bf16"))))
    rng = np.random.default_rng(0)

    def random(*shape: int, dtype: str = "bf16") -> _llmc.Tensor:
        t = be.empty(list(shape), dtype)
        fill(t, rng)
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
    causal = 2 * B * T * (T + 1) * C  # FLOP of the two matmuls of attention's forward, of which half is masked
    x, dx, residual = (random(B, T, C) for _ in range(3))
    wide, dwide, gelu = (random(B, T, 4 * C) for _ in range(3))
    qkv, dqkv = random(B, T, 3 * C), random(B, T, 3 * C)
    mean, rstd, lse = be.empty([B, T]), be.empty([B, T]), be.empty([B, NH, T])
    vector, dvector = random(C), random(C)

    def op(name: str, calls: float, run: Callable[[], object], flop: float, size: float) -> dict[str, Any]:
        """Measure an op. calls: in a micro-batch; flop and size: operations and bytes of one call."""
        return {"op": name, "calls": calls, "seconds": seconds(run), "flop": flop, "bytes": size}

    ids, wpe = integers(B, T), random(config.max_seq_len, C)
    wte, dwte, dwpe = random(Vp, C), random(Vp, C), random(config.max_seq_len, C)
    yield op("encoder forward", 1, lambda: be.encoder_forward(x, ids, wte, wpe), 0, 2 * U)
    yield op("encoder backward", 1, lambda: be.encoder_backward(dwte, dwpe, dx, ids), 0, 2 * U)
    yield op("residual + layernorm forward", 2 * L, lambda: be.fused_residual_layernorm_forward(
        residual, x, mean, rstd, x, dx, vector, vector), 0, 4 * U)  # fmt: skip
    yield op("layernorm backward", 2 * L + 1, lambda: be.layernorm_backward(
        dx, dvector, dvector, dvector, x, residual, vector, mean, rstd), 0, 4 * U)  # fmt: skip
    for name, out, inp, dout, dinp in (
        ("qkv", qkv, x, dqkv, dx), ("attproj", x, residual, dx, residual), ("fcproj", x, gelu, dx, dwide)
    ):  # fmt: skip
        OC, IC = out.shape[2], inp.shape[2]
        w, dw, bias = random(OC, IC), random(OC, IC), random(OC)
        # The others' comes from layernorm's backward.
        dbias = random(OC) if name == "qkv" else None
        flop, traffic = 2.0 * N * OC * IC, 2.0 * (N * (OC + IC) + OC * IC)
        yield op(f"{name} forward", L, lambda o=out, i=inp, w=w, b=bias: be.matmul_forward(o, i, w, b), flop, traffic)
        if name == "fcproj":
            yield op("fcproj backward, with GELU's", L, lambda dw=dw, w=w, db=dbias: be.matmul_gelu_backward(
                dwide, dw, db, dx, gelu, w, wide, True), 2 * flop, 2 * traffic + 2 * 4 * U)  # fmt: skip
        else:
            yield op(f"{name} backward", L, lambda di=dinp, dw=dw, db=dbias, do=dout, i=inp, w=w: be.matmul_backward(
                di, dw, db, do, i, w, True), 2 * flop, 2 * traffic)  # fmt: skip
    w, dw, bias, dbias = random(4 * C, C), random(4 * C, C), random(4 * C), random(4 * C)
    yield op("fc forward, with GELU", L, lambda: be.matmul_gelu_forward(gelu, wide, x, w, bias), 8.0 * N * C * C, 9 * U)
    yield op("fc backward", L, lambda: be.matmul_backward(dx, dw, dbias, dwide, x, w, True), 16.0 * N * C * C, 10 * U)
    if args.recompute:
        yield op("GELU again", L, lambda: be.gelu_forward(gelu, wide), 0, 8 * U)
    yield op("attention forward", L, lambda: be.attention_forward(x, lse, qkv, NH), causal, 4 * U)
    yield op("attention backward", L, lambda: be.attention_backward(dqkv, dx, qkv, x, lse, NH), 2.5 * causal, 8 * U)
    logits, losses, targets, some = random(rows, Vp), be.empty([rows]), integers(rows), random(rows, C)
    chunks = -(-N // rows)
    yield op(
        "logits forward", chunks, lambda: be.matmul_forward(logits, some, wte), 2.0 * rows * C * Vp, 2.0 * rows * Vp
    )
    yield op("softmax, loss, gradient", chunks, lambda: be.fused_classifier(
        losses, logits, targets, 1e-6, config.vocab_size), 0, 4.0 * rows * Vp)  # fmt: skip
    yield op("logits backward", chunks, lambda: be.matmul_backward(some, dwte, None, logits, some, wte, True),
       4.0 * rows * C * Vp, 4.0 * rows * Vp)  # fmt: skip
    P = config.num_parameters
    part = min(P, 1 << 27)  # AdamW is measured on so many parameters, and its time scaled to all of them
    p, g, low = random(part), random(part), be.empty([part], "i16")
    m, v, factor, norm = be.empty([part]), be.empty([part]), be.empty([1]), be.empty([_llmc.NORM_DIGITS])
    factor.from_host(np.ones(1, np.float32))
    adamw = _llmc.AdamWStep(
        lr=1e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, correction1=0.1, correction2=0.05
    )
    operands = [_llmc.AdamWOperands(p, low, m, v, g, 0.1)]
    micro_steps = args.total_batch // (B * T)
    once = P / part / micro_steps  # calls in a micro-batch of an op that a step needs once
    for name, run, size in (
        ("AdamW", lambda: be.adamw_many(operands, factor, adamw), 26.0),
        ("gradient norm", lambda: be.gradient_norm_squared(norm, [g]), 2.0),
    ):
        yield op(name, once, run, 0.0, size * part)


WORKERS: dict[str, Callable[[argparse.Namespace], Iterable[dict[str, Any]]]] = {
    "llmc": run_llmc, "torch": run_torch, "llm.c": run_llm_c, "ceilings": run_ceilings, "ops": run_ops,
}  # fmt: skip


# ---- the parent: starts the workers, keeps and prints their results ----


def in_a_process(args: argparse.Namespace, what: str, **more: Any) -> Iterator[dict[str, Any]]:
    """Run a worker in a process of its own.

    Args:
        args: the worker's arguments.
        what: a key of WORKERS.
        more: arguments that replace those of args.

    Yields:
        The worker's rows as they come, and {"failed": why} as the last one if it fails or takes longer than args.limit.
    """
    job = {**vars(args), **more}
    print(f"... {what} {more.get('model', '')}", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, "--worker", what, json.dumps(job, default=str)]
    with tempfile.TemporaryFile("w+") as errors:
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        timer = threading.Timer(args.limit, worker.kill)
        timer.start()
        assert worker.stdout is not None
        for line in worker.stdout:
            if line.startswith("{"):
                yield json.loads(line)
        code, late = worker.wait(), not timer.is_alive()
        timer.cancel()
        if code:
            errors.seek(0)
            text = errors.read()
            print(text, file=sys.stderr, flush=True)
            last = (text.strip().splitlines() or [f"exit code {code}"])[-1][:200]
            yield {"failed": f"longer than {args.limit:.0f} s" if late else last}


def default_settings(args: argparse.Namespace) -> list[str]:
    """Return the settings to measure if none are given: the backend's defaults, and each fast attention that this build has."""
    backend = _llmc.Backend(device_of(args))
    if args.dry_run:
        return [""]
    usable = [""]
    for attention in ("flash", "wgmma", "cudnn"):
        try:
            backend.set_option("attention", attention)
            usable.append(f"attention={attention}")
        except _llmc.Error as e:
            print(f"without attention={attention}: {e}", file=sys.stderr)
    return usable


def one_changed(args: argparse.Namespace, base: str) -> list[str]:
    """Return base, then base with each single setting changed, then base again.

    The difference between the first and the last shows how far apart two measurements of the same are.
    """
    backend, settings = _llmc.Backend(device_of(args)), parse_settings(base)
    choose(backend, settings)
    out = [base]
    for name, value in options_of(backend).items():
        left_out = {("attention", "simple"), ("graphs", "off")}  # the slowest; the same as auto, in training
        others = [v for v in option_values(backend, name) if v != value and (name, v) not in left_out]
        out += [] if name == "tf32" else [f"{base} {name}={v}".strip() for v in others]  # tf32 is for f32 models
    N = args.batch * args.seq_len
    out += [f"{base} rows={rows}".strip() for rows in (1024, 4096, 16384, 65536) if rows <= N]
    return [*out, f"{base} grad_dtype=f32".strip(), f"{base} recompute=1".strip(), base]


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table. The first column is aligned to the left, the others to the right."""
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    for n, row in enumerate([header, *rows]):
        print("| " + " | ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]) + " |")
        if n == 0:
            print("|" + "|".join("-" * (w + 2) for w in widths) + "|")
    sys.stdout.flush()


def throughput_row(run: dict[str, Any], peak: float | None) -> list[str]:
    """Return the cells of one measurement. peak: the card's FLOP/s, if it is known."""
    name = f"{run['model']} B={run['batch']} {run['who']} {run.get('settings', '')}".strip()
    if "step_seconds" not in run:
        return [name, "failed" if "failed" in run else "left out", "", "", "", ""]
    mfu = f"{100 * run['flops'] / peak:.1f}%" if peak else "-"
    return [name, f"{run['tokens_per_second']:,.0f}", mfu, f"{1e3 * run['step_seconds']:.1f}",
            f"{run['memory_bytes'] / 2**30:.1f}", f"{run['loss']:.3f}"]  # fmt: skip


def op_rows(ops: list[dict[str, Any]], ceilings: dict[str, Any]) -> list[list[str]]:
    """Return the cells of each op, and of their sum. Its floor is the longer of the times of its bytes and of its operations."""
    rows, total, total_floor = [], 0.0, 0.0
    for o in ops:
        took = o["calls"] * o["seconds"]
        floor = o["calls"] * max(o["flop"] / ceilings["bf16_flops"], o["bytes"] / ceilings["copy_bytes_per_second"])
        total, total_floor = total + took, total_floor + floor
        rows.append(
            [o["op"], f"{o['calls']:.3g}", f"{1e3 * took:.3f}", f"{1e3 * floor:.3f}", f"{100 * floor / took:.0f}%"]
        )
    rows.append(
        ["a micro-batch", "", f"{1e3 * total:.2f}", f"{1e3 * total_floor:.2f}", f"{100 * total_floor / total:.0f}%"]
    )
    return rows


PARTS = ("ceilings", "llmc", "torch", "llm.c", "ops")


def parse() -> argparse.Namespace:
    """Return the arguments of this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", metavar="MODEL[:B]", help=f"default: {' '.join(f'{m}:{b}' for m, b in MODELS.items())}")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure; ops wants ceilings (default: all)")
    add("--settings", nargs="+", metavar="'NAME=VALUE ...'",
        help="settings of llmc: the backend's options, rows (of logits at a time), grad_dtype, recompute. Each is measured; ops takes the"
        " fastest, or the first if llmc is not among the parts. Default: '', and each fast attention that this build has")  # fmt: skip
    add("--options", action="store_true", help="llmc alone, the first of --settings and each setting changed alone")
    add("--seq-len", type=int, default=1024)
    add("--total-batch", type=int, default=524288, help="tokens per update")
    add("--recompute", type=int, default=0, choices=(0, 1, 2), help="recompute of llmc and llm.c")
    add("--seconds", type=float, default=15, help="how long each program is measured with each model")
    add("--updates", type=int, default=0, help="measure so many updates, however long they take")
    add("--limit", type=float, default=420, help="seconds after which a program is given up")
    add("--llm-c", type=Path, metavar="FILE", help="llm.c's train_gpt2cu")
    add("--short", action="store_true", help="124M alone, fewer steps")
    add("--dry-run", action="store_true", help="rehearse at tiny sizes")
    add("--out", type=Path, metavar="FILE", help="append each figure to it, as a line of JSON")
    add("--worker", nargs=2, metavar=("WHAT", "JOB"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.dry_run:
        args.models, args.seq_len, args.total_batch, args.seconds = ["tiny:2"], 32, 128, 0.2
    if args.short:
        args.models, args.seconds = args.models or ["d12:64"], min(args.seconds, 5)
    return args


def main() -> int:
    """Run the benchmark; return the exit code: 1 if something failed, else 0."""
    args = parse()
    if args.worker:
        for row in WORKERS[args.worker[0]](argparse.Namespace(**json.loads(args.worker[1]))):
            print(json.dumps(row), flush=True)
        return 0
    models = [m.partition(":") for m in args.models] if args.models else [(m, ":", str(b)) for m, b in MODELS.items()]
    backend = _llmc.Backend(device_of(args))
    info, peak = backend.info(), peak_flops(backend, "bf16")
    del backend
    failed = False

    def keep(what: str, row: dict[str, Any]) -> dict[str, Any]:
        nonlocal failed
        failed |= "failed" in row
        if args.out:
            append_json(args.out, {"what": what, **row})
        return row

    keep("card", {
        "rehearsal": args.dry_run, "date": datetime.datetime.now().isoformat(timespec="minutes"), "device": info.description,
        "peak_bf16_flops": peak, "llmc": llmc.__version__, "cuda": _llmc.cuda_status(), "seq_len": args.seq_len,
        "total_batch": args.total_batch,
    })  # fmt: skip
    ceilings = {}
    if "ceilings" in args.parts and not args.options:
        ceilings = [keep("ceilings", row) for row in in_a_process(args, "ceilings")][-1]
    runs: list[dict[str, Any]] = []
    ops: dict[str, list[dict[str, Any]]] = {}
    for model, _, b in models:
        args.model, args.batch = model, int(b or MODELS[model])
        settings = args.settings or default_settings(args)
        programs = [who for who in ("llmc", "torch", "llm.c") if who in args.parts and (who != "llm.c" or args.llm_c)]
        if args.options:
            programs, settings = ["llmc"], one_changed(args, settings[0])
        for who in programs:
            for run in in_a_process(args, who, model=model, settings=settings):
                run = {"model": model, "batch": args.batch, "who": who, **run}
                if "step_seconds" in run:
                    rate = args.total_batch / run["step_seconds"]
                    run |= {"tokens_per_second": rate, "flops": rate * config_of(args).flops_per_token(args.seq_len)}
                print(" ".join(throughput_row(run, peak)), file=sys.stderr, flush=True)
                runs.append(keep("run", run))
        if "ops" in args.parts and not args.options:
            of_llmc = [r for r in runs if r["model"] == model and r["who"] == "llmc" and "tokens_per_second" in r]
            best = max(of_llmc, key=lambda r: r["tokens_per_second"])["settings"] if of_llmc else settings[0]
            ops[f"{model}, {best or 'default settings'}"] = [
                keep("op", {"model": model, "settings": best, **row})
                for row in in_a_process(args, "ops", model=model, settings=[best])
            ]
    mark = "REHEARSAL, tiny sizes: no figure here says anything about a GPU. " if args.dry_run else ""
    print(f"\n{mark}{info.description}, T={args.seq_len}, {args.total_batch} tokens per update")
    if "copy_bytes_per_second" in ceilings:
        fp8 = f"{ceilings['fp8_flops'] / 1e12:.2f}" if ceilings["fp8_flops"] else "-"
        copy, bf16 = ceilings["copy_bytes_per_second"] / 1e9, ceilings["bf16_flops"] / 1e12
        print(f"ceilings: copy {copy:.1f} GB/s, bf16 {bf16:.2f} TFLOP/s, fp8 {fp8} TFLOP/s")
    elif ceilings:
        print(f"ceilings: failed: {ceilings['failed']}")
    for name, rows in ops.items():
        print(f"\n{name}: time by op, per micro-batch")
        whole = [row for row in rows if "failed" not in row]
        if "copy_bytes_per_second" in ceilings and whole:
            print_table(["op", "calls", "ms", "floor ms", "of floor"], op_rows(whole, ceilings))
        for row in rows:
            if "failed" in row:
                print(f"failed: {row['failed']}")
    if runs:
        print()
        print_table(["", "tokens/s", "MFU", "ms/update", "GiB", "loss"], [throughput_row(r, peak) for r in runs])
        for r in runs:
            for why in ("failed", "left_out"):
                if why in r:
                    print(f"{why.replace('_', ' ')}: {r['who']} {r.get('settings', '')}: {r[why]}")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except llmc.Error as error:
        sys.exit(f"bench_gpu: {error}; --dry-run rehearses without a GPU" if "--worker" not in sys.argv else str(error))
