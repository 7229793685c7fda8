"""What dev/ci/gpu_check.py runs in processes of its own, with the build on the path: python dev/ci/gpu_stages.py STAGE --results FILE.

Each figure goes to FILE at once, as a line of JSON, and to stdout for people. The exit status is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from bench_gpu import TINY, choose, make_model, parse_settings, print_table, tokens
from common import append_json

import llmc
from llmc import _llmc
from llmc.selfcheck.devices import options_of


class Stage:
    def __init__(self, args: argparse.Namespace) -> None:
        self.name: str = args.stage
        self.dry_run: bool = args.dry_run
        self.results: Path = args.results
        self.failed = False

    def keep(self, what: str, **row: Any) -> None:
        append_json(self.results, {"what": what, "stage": self.name, **row})

    def check(self, name: str, figure: float, limit: float) -> None:
        """Keep and print a figure, which must be at most the limit; NaN is a failure."""
        ok = bool(figure <= limit)
        self.failed |= not ok
        self.keep("check", check=name, figure=float(figure), limit=float(limit), ok=ok)
        print(f"{'ok    ' if ok else 'FAILED'} {name}: {figure:.2e}, limit {limit:.2e}", flush=True)


def usable_attentions(backend: _llmc.Backend) -> list[str]:
    usable = ["simple", "flash"]
    before = options_of(backend)["attention"]
    for attention in ("wgmma", "cudnn"):
        try:
            backend.set_option("attention", attention)
            usable.append(attention)
        except _llmc.Error as e:
            print(f"without {attention}: {e}", flush=True)
    backend.set_option("attention", before)
    return usable


def widen(host: Any) -> Any:
    """Return what to_host() gives as f32; it gives bf16 as uint16."""
    return (host.astype(np.uint32) << 16).view(np.float32) if host.dtype == np.uint16 else host


# ---- smoke: every op of training at real shapes, beside PyTorch on the same card ----


def smoke(stage: Stage) -> None:
    """Every op gets fresh random bf16 inputs. The oracle is PyTorch in f32; an op may be at most twice as far from it as PyTorch's own bf16
    op is, in the 2-norm and in the worst element."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.backends.cuda.matmul.allow_tf32 = False
    dry, device = stage.dry_run, "cpu" if stage.dry_run else "cuda"
    N, C, NH, V, Vp = (64, 64, 1, 250, 256) if dry else (65536, 768, 12, 50257, 50304)
    torch.manual_seed(time.time_ns() % 2**32)
    bf16, f32 = torch.bfloat16, torch.float32
    be = _llmc.Backend("cuda")

    def random(*shape: int, scale: float = 1.0) -> Any:
        return (scale * torch.randn(*shape, device=device)).to(bf16)

    def put(x: Any) -> _llmc.Tensor:
        kinds = {bf16: ("bf16", torch.uint16), f32: ("f32", f32), torch.int64: ("i32", torch.int32)}
        dtype, raw = kinds[x.dtype]
        t = be.empty(list(x.shape), dtype)
        host = x.to(raw) if x.dtype == torch.int64 else x.contiguous().view(raw)
        t.from_host(host.cpu().numpy())
        return t

    def get(t: _llmc.Tensor) -> Any:
        host = torch.from_numpy(t.to_host())
        return (host.view(bf16) if t.dtype == "bf16" else host).to(device)

    def blank(*shape: int) -> _llmc.Tensor:
        """Return a tensor of NaNs, so that elements that an op does not write are noticed."""
        return put(torch.full(shape, math.nan, device=device, dtype=bf16))

    def errors(x: Any, exact: Any) -> tuple[float, float]:
        d = x.float() - exact
        top = float(exact.abs().max())
        return float(d.norm() / exact.norm()), float(d.abs().max()) / top

    def compare(name: str, result: Any, pytorch: Any, exact: Any) -> None:
        """Check that a result is at most twice as far from the exact one as PyTorch's, and 2^-12 besides."""
        for kind, a, b in zip(("norm", "worst"), errors(result, exact), errors(pytorch, exact)):
            stage.check(f"{name}, {kind}", a, 2 * b + 2.0**-12)

    def gradients(run: Callable[..., Any], dout: Any, *inputs: Any) -> list[Any]:
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        run(*leaves).backward(dout)
        return [x.grad for x in leaves]

    def tanh_gelu(x: Any) -> Any:
        return F.gelu(x, approximate="tanh")

    def matmuls() -> None:
        for name, IC, OC in (("qkv", C, 3 * C), ("attproj", C, C), ("fc", C, 4 * C), ("fcproj", 4 * C, C)):
            x, dout = random(N, IC), random(N, OC)
            w, bias = random(OC, IC, scale=0.02), random(OC, scale=0.1)
            tx, tw, tb, td = map(put, (x, w, bias, dout))
            out, pre = blank(N, OC), blank(N, OC)
            exact = x.float() @ w.float().T + bias.float()
            pytorch = F.linear(x, w, bias)
            be.matmul_forward(out, tx, tw, tb)
            compare(f"{name} forward", get(out), pytorch, exact)
            if name == "fc":
                be.matmul_gelu_forward(out, pre, tx, tw, tb)
                compare("fc forward with GELU, before it", get(pre), pytorch, exact)
                compare("fc forward with GELU", get(out), tanh_gelu(pytorch), tanh_gelu(exact))
            dinp, dw, db = blank(N, IC), blank(OC, IC), blank(OC)
            be.matmul_backward(dinp, dw, db, td, tx, tw, False)
            wide = dout.float() @ w.float()
            compare(f"{name} backward, dinp", get(dinp), dout @ w, wide)
            sums = dout.float().T @ x.float(), dout.float().sum(0)
            compare(f"{name} backward, dweight", get(dw), dout.T @ x, sums[0])
            compare(f"{name} backward, dbias", get(db), sums[1].to(bf16), sums[1])
            if name == "fcproj":
                before = random(N, IC)
                be.matmul_gelu_backward(dinp, dw, db, td, tx, tw, put(before), False)
                slope = gradients(tanh_gelu, torch.ones_like(wide), before.float())[0]
                rounded = gradients(tanh_gelu, dout @ w, before)[0]
                compare("fcproj backward with GELU, dinp", get(dinp), rounded, wide * slope)
                compare("fcproj backward with GELU, dweight", get(dw), dout.T @ x, sums[0])

    def layernorms() -> None:
        a, b, dout = random(N, C), random(N, C), random(N, C)
        w, bias = 1 + random(C, scale=0.1), random(C, scale=0.1)

        def norm(x: Any, w: Any, b: Any) -> Any:
            return F.layer_norm(x, (C,), w, b)

        total = a + b
        tw, tb = put(w), put(bias)
        residual, out, mean, rstd = blank(N, C), blank(N, C), be.empty([N]), be.empty([N])
        be.fused_residual_layernorm_forward(residual, out, mean, rstd, put(a), put(b), tw, tb)
        compare("residual", get(residual), total, a.float() + b.float())
        compare("layernorm forward", get(out), norm(total, w, bias), norm(total.float(), w.float(), bias.float()))
        grads = [put(torch.zeros_like(x)) for x in (a, w, w, w)]
        be.layernorm_backward(*grads, put(dout), residual, tw, mean, rstd)
        exact = gradients(norm, dout.float(), total.float(), w.float(), bias.float())
        pytorch = gradients(norm, dout, total, w, bias)
        pytorch, exact = ([*found, found[0].sum(dim=0)] for found in (pytorch, exact))
        for name, g, t, e in zip(("dinp", "dweight", "dbias", "dinp_sum"), grads, pytorch, exact):
            compare(f"layernorm backward, {name}", get(g), t, e)

    def classifier() -> None:
        """Check all losses, and the gradients of some rows: the first, the last, and 30 at random."""
        free = be.info().free_bytes
        rows = N if dry else min(N, int(0.8 * free) // (2 * Vp))
        stage.keep("note", classifier_rows=rows)
        logits, targets = be.empty([rows, Vp], "bf16"), torch.randint(0, V, (rows,), device=device)
        piece = min(rows, 4096)
        wanted = sorted({0, rows - 1, *np.random.default_rng().integers(0, rows, 30).tolist()})
        kept, exact_losses = {}, []
        for begin in range(0, rows, piece):
            x = 3 * random(min(piece, rows - begin), Vp)
            logits.write(begin * Vp, x.view(torch.uint16).cpu().numpy().reshape(-1))
            y = targets[begin : begin + piece]
            exact_losses.append(F.cross_entropy(x[:, :V].float(), y, reduction="none"))
            kept.update({i: x[i - begin].clone() for i in wanted if begin <= i < begin + piece})
        losses, scale = be.empty([rows]), 1 / rows
        be.fused_classifier(losses, logits, put(targets), scale, V)
        exact = torch.cat(exact_losses)
        stage.check(f"classifier, {rows} losses", float((get(losses) - exact).abs().max()), 1e-4)
        x = torch.stack([kept[i] for i in wanted])
        y = targets[torch.tensor(wanted, device=device)]
        slope = torch.softmax(x[:, :V].float(), 1)
        slope[torch.arange(len(wanted), device=device), y] -= 1
        slope = F.pad(slope * scale, (0, Vp - V))
        dlogits = np.stack([logits.read(i * Vp, Vp) for i in wanted])
        compare("classifier, dlogits", torch.from_numpy(dlogits).view(bf16).to(device), slope.to(bf16), slope)

    def attention() -> None:
        B, T = (2, 70) if dry else (4, 1024)
        qkv, dout = random(B, T, 3 * C), random(B, T, C)

        def sdpa(kind: Any) -> Callable[[Any], Any]:
            def run(qkv: Any) -> Any:
                q, k, v = (x.view(B, T, NH, C // NH).transpose(1, 2) for x in qkv.split(C, 2))
                with sdpa_kernel(kind):
                    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                return out.transpose(1, 2).reshape(B, T, C)

            return run

        math_, flash = sdpa(SDPBackend.MATH), sdpa(SDPBackend.FLASH_ATTENTION)
        exact, pytorch = math_(qkv.float()), flash(qkv)
        exact_d, pytorch_d = gradients(math_, dout.float(), qkv.float())[0], gradients(flash, dout, qkv)[0]
        tq, td = put(qkv), put(dout)
        kinds = [(a, d) for a in usable_attentions(be) for d in (("off", "on") if a == "cudnn" else ("on",))]
        for kind, deterministic in kinds:
            choose(be, {"attention": kind, "deterministic": deterministic})
            name = f"attention {kind}" + (f" deterministic={deterministic}" if kind == "cudnn" else "")
            out, lse, dqkv = blank(B, T, C), be.empty([B, NH, T]), blank(B, T, 3 * C)
            be.attention_forward(out, lse, tq, NH)
            be.attention_backward(dqkv, td, tq, out, lse, NH)
            compare(f"{name} forward", get(out), pytorch, exact)
            for part, g, t, e in zip(("dq", "dk", "dv"), *(x.split(C, 2) for x in (get(dqkv), pytorch_d, exact_d))):
                compare(f"{name} backward, {part}", g, t, e)

    def encoder() -> None:
        B, T = (2, N // 2) if dry else (64, 1024)
        ids, wte, wpe, dout = torch.randint(0, V, (B, T), device=device), random(Vp, C), random(T, C), random(B, T, C)
        tids, out = put(ids), blank(B, T, C)
        be.encoder_forward(out, tids, put(wte), put(wpe))
        compare("encoder forward", get(out), wte[ids] + wpe, wte[ids].float() + wpe.float())
        dwte, dwpe = put(torch.zeros_like(wte)), put(torch.zeros_like(wpe))
        be.encoder_backward(dwte, dwpe, put(dout), tids)
        flat = dout.float().view(-1, C)
        exact = torch.zeros(Vp, C, device=device).index_add_(0, ids.view(-1), flat)
        compare("encoder backward, dwte", get(dwte), exact.to(bf16), exact)
        compare("encoder backward, dwpe", get(dwpe), dout.float().sum(0).to(bf16), dout.float().sum(0))

    def adamw() -> None:
        """Check one step from zero moments, with weights of 16 + 16 bits, against PyTorch's AdamW in f32."""
        n = 5000 if dry else 1 << 26
        p, g = random(n), random(n, scale=0.01)
        weight = p.float().requires_grad_()
        optimizer = torch.optim.AdamW([weight], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        weight.grad = g.float()
        optimizer.step()
        tp, low, m, v = put(p), be.empty([n], "i16"), be.empty([n]), be.empty([n])
        one = put(torch.ones(1, device=device))
        rates = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
        be.adamw(tp, low, m, v, put(g), one, _llmc.AdamWStep(**rates, correction1=1 - 0.9, correction2=1 - 0.95))
        joined = (tp.to_host().astype(np.uint32) << 16) + low.to_host().astype(np.uint32)
        exact, state = weight.detach(), optimizer.state[weight]
        limit = 8 * 2.0**-23
        for name, result, expected in (
            ("weights", torch.from_numpy(joined.view(np.float32)).to(device), exact),
            ("m", get(m), state["exp_avg"]), ("v", get(v), state["exp_avg_sq"]),
        ):  # fmt: skip
            stage.check(f"AdamW, {name}, norm", errors(result, expected)[0], limit)

    for part in (matmuls, layernorms, attention, encoder, adamw, classifier):
        try:
            part()
        except Exception as e:  # the other parts still run
            print(f"{part.__name__}: {type(e).__name__}: {e}", flush=True)
            stage.check(f"{part.__name__} ran", math.nan, 0.0)
    info = be.info()
    fallbacks = info.fallbacks
    print(f"options: {info.options}; fallbacks: {fallbacks or 'none'}", flush=True)
    stage.keep("note", options=info.options, fallbacks=fallbacks)
    stage.check("kernels that were not the ones asked for", float(bool(fallbacks)), 0.0)


# ---- profile: one micro-batch, and a few tokens, kernel by kernel ----

DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
HOST = ("cuda_runtime", "cuda_driver")


def summary(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Summarize a Chrome trace, in microseconds: time by kernel, when the device was idle and what came before and after, the
    host's calls."""
    device = sorted((e for e in events if e.get("cat") in DEVICE), key=lambda e: float(e["ts"]))
    host = [e for e in events if e.get("cat") in HOST]
    if not device:
        raise RuntimeError("the profiler saw no kernel")
    calls: dict[str, list[float]] = {}
    for e in device:
        calls.setdefault(e["name"], []).append(float(e["dur"]))
    api: dict[str, list[float]] = {}
    for e in host:
        api.setdefault(e["name"], []).append(float(e["dur"]))
    launched = {e["args"]["correlation"]: float(e["ts"]) for e in host if "correlation" in e.get("args", {})}
    busy, end, gaps = 0.0, float(device[0]["ts"]), []
    previous = ""
    for e in device:
        begin, until = float(e["ts"]), float(e["ts"]) + float(e["dur"])
        if begin > end:
            # The kernel was launched when the device was idle already, or almost: the host was late.
            late = launched.get(e.get("args", {}).get("correlation"), -math.inf) > end - 5
            gaps.append((begin - end, previous, e["name"], late))
        busy += max(0.0, until - max(begin, end))
        end, previous = max(end, until), e["name"]
    span = end - float(device[0]["ts"])

    def total(times: dict[str, list[float]]) -> list[tuple[str, int, float]]:
        return sorted(((name, len(t), sum(t)) for name, t in times.items()), key=lambda row: -row[2])

    return {
        "span_us": span, "busy_us": busy, "gap_us": sum(g[0] for g in gaps), "gaps": len(gaps),
        "host_late": sum(g[3] for g in gaps), "host_late_us": sum(g[0] for g in gaps if g[3]),
        "largest_gaps": sorted(gaps, reverse=True)[:12], "launches": len(device), "kernels": total(calls), "api": total(api),
    }  # fmt: skip


def profiled(run: Callable[[], object]) -> dict[str, Any]:
    """Return summary() of what run() does on the device. PyTorch's profiler sees llmc's kernels too: CUPTI sees the whole process."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as p:
            run()
            torch.cuda.synchronize()
        p.export_chrome_trace(str(path))
        return summary(json.loads(path.read_text())["traceEvents"])


def invented() -> dict[str, Any]:
    """Return the summary of a made-up trace, for the rehearsal, which has no device to profile."""
    events: list[dict[str, Any]] = []
    for i, (ts, launch) in enumerate([(100, 50), (112, 60), (150, 140)]):
        events.append({"cat": "kernel", "name": f"k{i % 2}", "ts": ts, "dur": 10.0, "args": {"correlation": i}})
        name = {"cat": "cuda_runtime", "name": "cudaLaunchKernel"}
        events.append({**name, "ts": launch, "dur": 2.0, "args": {"correlation": i}})
    s = summary(events)
    assert (s["span_us"], s["busy_us"], s["gap_us"], s["host_late"]) == (60, 30, 30, 1), s
    return s


def shown(name: str) -> str:
    """Return a kernel's name without the parts that all names have."""
    for word in ("void ", "llmc::", "(anonymous namespace)::", "cuda::", "__nv_bfloat16"):
        name = name.replace(word, "bf16" if word == "__nv_bfloat16" else "")
    return name[:95]


def print_summary(s: dict[str, Any], per: int, unit: str) -> None:
    print(f"per {unit}: {s['span_us'] / per / 1e3:.3f} ms from first to last, device busy {s['busy_us'] / per / 1e3:.3f} ms; "
          f"{s['launches'] / per:.0f} kernels and copies; idle {s['gap_us'] / per / 1e3:.3f} ms in {s['gaps'] / per:.0f} gaps, of which "
          f"{s['host_late_us'] / per / 1e3:.3f} ms in {s['host_late'] / per:.0f} because the host was late")  # fmt: skip
    rows = [
        [shown(n), f"{c / per:.1f}", f"{t / per / 1e3:.4f}", f"{t / c:.1f}", f"{100 * t / s['span_us']:.1f}%"]
        for n, c, t in s["kernels"][:45]
    ]
    print_table(["kernel", "calls", "ms", "us each", "of the span"], rows)
    print("the largest gaps:")
    for us, before, after, late in s["largest_gaps"]:
        print(f"  {us:8.1f} us{', host late' if late else ''}: {shown(before)[:50]} -> {shown(after)[:50]}")
    print("the host's calls, ms:")
    for n, c, t in s["api"][:8]:
        print(f"  {t / per / 1e3:8.4f} in {c / per:7.1f} {n}")
    sys.stdout.flush()


def bench_args(stage: Stage) -> tuple[argparse.Namespace, int, int]:
    args = argparse.Namespace(dry_run=stage.dry_run, model="d12", recompute=0)
    return args, *((2, 32) if stage.dry_run else (64, 1024))


def profile_micro_batch(stage: Stage) -> None:
    import torch

    if not stage.dry_run:
        torch.cuda.init()
    usable = usable_attentions(_llmc.Backend("cuda"))
    for attention, more in (("cudnn", "deterministic=off "), ("wgmma", ""), ("flash", "")):
        if attention in usable:
            profile_settings(stage, f"attention={attention} {more}rows=16384")


def profile_settings(stage: Stage, text: str) -> None:
    """Profile three micro-batches in a row, and an optimizer step."""
    args, B, T = bench_args(stage)
    model = make_model(args, parse_settings(text), "cuda")
    optimizer = llmc.AdamW(model, weight_decay=0.1)
    data, backend = tokens(model.config, B, T), model.backend

    def micro_batches(count: int) -> None:
        for _ in range(count):
            model.forward(data[:, :-1])
            model.backward(data[:, 1:], scale=1e-3)

    def timed(run: Callable[[], object]) -> float:
        backend.synchronize()
        start = time.perf_counter()
        run()
        backend.synchronize()
        return time.perf_counter() - start

    model.zero_grad()
    micro_batches(2)
    optimizer.step(1e-4)
    model.zero_grad()
    micro_batches(1)  # the first micro-batch of an update overwrites gradients, the others add
    alone, three = timed(lambda: micro_batches(1)), timed(lambda: micro_batches(3)) / 3
    print(f"\n{text}: without the profiler {1e3 * alone:.2f} ms alone, {1e3 * three:.2f} ms each of three")
    stage.keep("micro-batch", settings=text, alone_seconds=alone, of_three_seconds=three)
    for unit, per, run in (
        ("micro-batch", 3, lambda: micro_batches(3)),
        ("optimizer step", 1, lambda: optimizer.step(1e-4)),
    ):
        s = invented() if stage.dry_run else profiled(run)
        stage.keep("profile", settings=text, unit=unit, per=per, **s)
        print_summary(s, per, unit)


def generation(stage: Stage) -> None:
    """Measure tokens/s as dev/bench/bench_generate.py counts them, and what a token's time is spent on."""
    import torch

    if not stage.dry_run:
        torch.cuda.init()
    args, _, _ = bench_args(stage)
    few, many, prompt = (2, 20, 4) if stage.dry_run else (4, 100, 64)
    model = make_model(args, {}, "cuda")
    weights = 2 * model.num_parameters
    for B in (1, 16):
        prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, (B, prompt)).tolist()
        for temperature in (0.0, 1.0):

            def run(count: int, prompts: Any = prompts, temperature: float = temperature) -> None:
                model.generate(prompts, count, temperature=temperature)

            run(few)
            times = []
            for count in (few, many):
                start = time.perf_counter()
                run(count)
                times.append(time.perf_counter() - start)
            each = (times[1] - times[0]) / (many - few)
            row = {"B": B, "temperature": temperature, "seconds_per_token": each, "tokens_per_second": B / each}
            stage.keep("generation", **row, weight_bytes=weights, options=model.backend.info().options)
            print(f"B={B}, temperature {temperature:g}: {B / each:,.0f} tokens/s in all, {1e6 * each:.0f} us for one of each "
                  f"sequence, weights read at {weights / each / 1e9:.0f} GB/s", flush=True)  # fmt: skip
    for B in (1, 16):
        start_tokens = np.zeros(B, np.int32)
        cache = model.kv_cache(B, 32)
        steps = 3 if stage.dry_run else 20
        cache.decode(start_tokens)
        start = time.perf_counter()
        for _ in range(steps):
            cache.decode(start_tokens)
        inside = (time.perf_counter() - start) / steps  # each step waits, and copies all logits
        cache = model.kv_cache(B, 32)
        print(f"\nB={B}: decode() alone {1e6 * inside:.0f} us a token; below, steps as generate() queues them")
        stage.keep("decode", B=B, seconds_per_token=inside)

        def decode(cache: _llmc.KVCache = cache, tokens: Any = start_tokens, steps: int = steps) -> None:
            coins, options = np.full(len(tokens), 0.5, np.float32), _llmc.SamplerOptions()
            for step in range(steps):
                cache.queue_tokens(None if step else tokens, coins, options)
                if step > 0:
                    cache.read_tokens()
            cache.read_tokens()

        s = invented() if stage.dry_run else profiled(decode)
        stage.keep("profile", unit="token", B=B, per=steps, **s)
        print_summary(s, steps, "token")


# ---- parity with PyTorch ----


def parity(stage: Stage) -> None:
    """Compare llmc on the GPU with llmc.reference in PyTorch, of the same weights."""
    import torch

    from llmc.reference import GPT

    torch.backends.cuda.matmul.allow_tf32 = False
    device = "cpu" if stage.dry_run else "cuda"
    config, B, T = (
        (llmc.GPT2Config(**TINY), 1, 20) if stage.dry_run else (llmc.GPT2Config.from_descriptor("d12"), 4, 512)
    )
    rng = np.random.default_rng(1)
    inputs, targets = (rng.integers(0, config.vocab_size, (B, T), dtype=np.int32) for _ in range(2))
    x, y = (torch.from_numpy(a).to(device, torch.int64) for a in (inputs, targets))

    def reference(model: llmc.GPT2, dtype: torch.dtype) -> tuple[Any, float, dict[str, Any]]:
        net = GPT(config)
        net.load_llmc({n: widen(t.to_host()) for n, t in model.parameter_tensors().items()})
        net.to(device, dtype)
        logits, loss = net(x, y)
        assert loss is not None
        loss.backward()
        return logits.detach().float().cpu().numpy(), float(loss.detach()), net.gradients()

    def computed(model: llmc.GPT2) -> tuple[Any, float, dict[str, Any]]:
        logits = model.logits(inputs)
        model.zero_grad()
        model.forward(inputs)
        model.backward(targets)
        return logits, model.mean_loss, {n: widen(t.to_host()) for n, t in model.gradient_tensors().items()}

    def worst(a: dict[str, Any], b: dict[str, Any]) -> float:
        return max(float(np.linalg.norm(a[n] - b[n]) / np.linalg.norm(b[n])) for n in b)

    model = llmc.GPT2(config, device="cuda", dtype="f32")
    logits, loss, gradients = computed(model)
    logits_t, loss_t, gradients_t = reference(model, torch.float32)
    stage.check("f32 logits", float(np.abs(logits - logits_t).max()), 1e-3)
    stage.check("f32 loss", abs(loss - loss_t), 1e-5)
    stage.check("f32 gradients", worst(gradients, gradients_t), 1e-3)
    del model

    # bf16 may be twice as far from f32 as PyTorch's own bf16 is.
    model = llmc.GPT2(config, device="cuda", dtype="bf16")
    logits_t, loss_t, gradients_t = reference(model, torch.float32)
    logits_b, _, gradients_b = reference(model, torch.bfloat16)
    scale = float(np.abs(logits_t).max())
    for attention in usable_attentions(model.backend):
        model.backend.set_option("attention", attention)
        logits, loss, gradients = computed(model)
        limit = 2 * float(np.abs(logits_b - logits_t).max()) / scale
        stage.check(f"bf16 {attention} logits", float(np.abs(logits - logits_t).max()) / scale, limit)
        stage.check(f"bf16 {attention} loss", abs(loss - loss_t), 2e-2)
        stage.check(f"bf16 {attention} gradients", worst(gradients, gradients_t), 2 * worst(gradients_b, gradients_t))


# ---- the first steps of training, beside the CPU's ----


def steps(stage: Stage) -> None:
    """Compare ten steps on the GPU with the CPU's. Training is chaotic, so the steps are few and the limit is measured: 4 times the most
    that the CPU's own losses move when one weight changes by its smallest part: by 1e-6 to 1e-4 of itself in f32, and there the
    losses' own rounding counts too, and by one unit in the last place in bf16. A learning rate that is 1% off must exceed it."""
    import pydoc_data.topics

    joined = "".join(pydoc_data.topics.topics[k] for k in sorted(pydoc_data.topics.topics))
    text = np.frombuffer(joined.encode("ascii", "replace"), np.uint8).astype(np.int32)
    L, C, NH, B, T = (2, 64, 1, 2, 32) if stage.dry_run else (4, 256, 4, 4, 128)
    config = llmc.GPT2Config(max_seq_len=T, vocab_size=128, num_layers=L, num_heads=NH, channels=C)

    def losses(
        device: str, dtype: str, options: dict[str, str] | None = None, change: tuple[str, float] | None = None,
        lr: float = 3e-4,
    ) -> Any:  # fmt: skip
        model = llmc.GPT2(config, device=device, dtype=dtype)
        choose(model.backend, options or {})
        if change:
            name, relative = change
            w = np.array(model.parameters[name]).astype(np.float32)
            w[np.unravel_index(np.abs(w).argmax(), w.shape)] *= 1 + relative
            model.parameters[name] = w
        optimizer = llmc.AdamW(model, weight_decay=0.1)
        history = []
        for step in range(10):
            at = step * 7919 % (len(text) - B * T - 1)
            piece = text[at : at + B * T + 1]
            model.zero_grad()
            model.forward(piece[:-1].reshape(B, T))
            model.backward(piece[1:].reshape(B, T))
            optimizer.step(lr)
            history.append(model.mean_loss)
        return np.array(history)

    attentions = usable_attentions(_llmc.Backend("cuda"))
    for dtype, changes, rounding in (("f32", (1e-6, 1e-5, 1e-4), 2.0**-22), ("bf16", (2.0**-7, -(2.0**-7)), 0.0)):
        base = losses("cpu", dtype)

        def moved(other: Any, base: Any = base) -> float:
            return float(np.abs(other / base - 1).max())

        weights = ("wte", "qkvw", "fcw")
        spread = max(moved(losses("cpu", dtype, change=(w, c))) for w in weights for c in changes)
        limit = 4 * max(spread, rounding)
        stage.keep("note", dtype=dtype, spread=spread, losses=base.tolist())
        for attention in attentions if dtype == "bf16" else ["simple"]:
            on_gpu = losses("cuda", dtype, {"attention": attention})
            stage.check(f"{dtype} {attention}, ten losses", moved(on_gpu), limit)
        seen = moved(losses("cpu", dtype, lr=1.01 * 3e-4))
        stage.check(f"{dtype}, the limit is below what a learning rate 1% off does", limit, seen)


STAGES = {
    "smoke": smoke, "profile": profile_micro_batch, "generation": generation, "parity": parity, "steps": steps,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    stage = Stage(args)
    STAGES[args.stage](stage)
    return 1 if stage.failed else 0


if __name__ == "__main__":
    sys.exit(main())
