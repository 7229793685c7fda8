"""The cases of every op, at odd sizes and at those of GPT-2 124M with few rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from llmc import _llmc
from llmc.formats.state_file import split_master
from llmc.selfcheck import formulas
from llmc.selfcheck.cases import F32, STORE, UNIT, Case, Draw, Given, Operand, Result, Same, norms
from llmc.selfcheck.formulas import Array
from llmc.values import VALUE_DTYPES

_RATES = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
_RATES |= {"correction1": 0.19, "correction2": 0.0975}
STEP: dict[str, Any] = {name: float(np.float32(value)) for name, value in _RATES.items()}  # as the op gets them


class Cases(Draw):
    """The cases of one dtype."""

    def groups(self) -> Iterator[Iterator[Case]]:
        """Yield the cases, those of related ops together."""
        for make in (self.copies, self.encoder, self.layernorm, self.matmul, self.gelu, self.residual, self.attention, self.decode,
                     self.classifier, self.sums, self.gradient_norm, self.adamw, self.muon, self.newton_schulz):  # fmt: skip
            yield make()
        if self.dtype == "f32":  # of tokens and of single numbers, which have no other dtype
            yield self.sample()
            yield self.clip_factor()

    def copies(self) -> Iterator[Case]:
        for n in (1, 33, 100_003):
            x = self.random(n)
            for other in ("f32", "bf16"):
                exact = x.astype(VALUE_DTYPES[other]).astype(np.float64)
                yield self.case("copy", f"{n} to {other}", Result("out", exact, 0.0, other), self.given(x))
            yield self.case("zero", f"{n}", Result("x", np.zeros(n), 0.0, self.dtype, x))

    def encoder(self) -> Iterator[Case]:
        for B, T, C, V, frequent in ((1, 1, 1, 1, 0), (2, 7, 33, 50, 0), (4, 65, 40, 30, 0.6), (2, 70, 768, 1000, 0.1)):
            size = f"{B}x{T}x{C}"
            tokens, start = self.rng.integers(0, V, (B, T)), self.rng.integers(1, 6, B)
            tokens[self.rng.random((B, T)) < frequent] = V - 1  # one token at many positions
            wte, wpe, dout = self.random(V, C), self.random(T + 5, C), self.random(B, T, C)
            ids = Given(tokens, "i32")
            for first in (start, None):
                at = np.zeros(B, int) if first is None else first
                exact = formulas.encoder(tokens, wte, wpe, at)
                given = None if first is None else Given(first, "i32")
                out = self.result("out", exact, np.abs(exact), 1)
                yield self.case("encoder_forward", size, out, ids, self.given(wte), self.given(wpe), given)
            for grad in self.gradient_dtypes():
                before = self.random(V, C, dtype=grad), self.random(T + 2, C, dtype=grad)
                exacts = formulas.encoder_gradient(*before, dout, tokens)
                scales = formulas.encoder_gradient(np.abs(before[0]), np.abs(before[1]), np.abs(dout), tokens)
                zipped = zip(("dwte", "dwpe"), exacts, scales, before)
                results = [self.result(n, e, s, 4, 0, grad, b) for n, e, s, b in zipped]
                yield self.case("encoder_backward", size, *results, self.given(dout), ids)

    def layernorm(self) -> Iterator[Case]:
        for N, C in ((1, 1), (5, 33), (130, 40), (19, 65), (2, 3001), (70, 768), (3, 1600)):
            size, real = f"{N}x{C}", C in (768, 1600)
            a, b, dout = (self.random(N, C) for _ in range(3))
            weight, bias = self.random(C), self.random(C)
            x = (a + b + 0.5).astype(VALUE_DTYPES[self.dtype]).astype(np.float64)
            operands: list[Operand] = [*self.normalized(x, weight, bias), *map(self.given, (x, weight, bias))]
            yield self.case("layernorm_forward", size, *operands, real=real)
            # What is normalized is the sum after its rounding, in the fused kernel too.
            total = (a + b).astype(np.float32).astype(VALUE_DTYPES[self.dtype]).astype(np.float64)
            residual = Result("residual", total, 0.0, self.dtype)
            operands = [residual, *self.normalized(total, weight, bias), *map(self.given, (a, b, weight, bias))]
            yield self.case("fused_residual_layernorm_forward", size, *operands, real=real)
            if C == 1:  # the exact gradient is 0, and its terms are magnified by 1/sqrt(eps)
                continue
            _, mean, rstd = formulas.layernorm(x, weight, bias)
            normal, g = (x - mean[:, None]) * rstd[:, None], np.abs(dout * weight)
            size_of_normal = np.abs(normal) + (np.abs(mean) * rstd)[:, None]
            for grad in self.gradient_dtypes():
                before = self.random(N, C), *(self.random(C, dtype=grad) for _ in range(3))
                exact = [p + q for p, q in zip(before, formulas.layernorm_gradient(dout, x, weight))]
                terms = g + g.mean(1, keepdims=True) + size_of_normal * (g * size_of_normal).mean(1, keepdims=True)
                scales = [rstd[:, None] * terms, (np.abs(dout) * size_of_normal).sum(0), np.abs(dout).sum(0)]
                zipped = zip(("dinp", "dweight", "dbias"), exact, scales, before, (self.dtype, grad, grad))
                results = [self.result(n, e, s + np.abs(b), 8, 0, d, b) for n, e, s, b, d in zipped]
                given = [*map(self.given, (dout, x, weight)), Given(mean, "f32"), Given(rstd, "f32")]
                yield self.case("layernorm_backward", size, *results, None, *given, real=real)
                # The sum is of dinp as it is stored, with the roundings of its elements, which are independent.
                off = np.broadcast_to(results[0].limit, (N, C))
                stored = np.minimum(off.sum(0), 3 * norms(off, 0))
                scale = np.abs(before[3]) + np.abs(exact[0]).sum(0)
                dinp_sum = self.result("dinp_sum", before[3] + exact[0].sum(0), scale, 8, stored, grad, before[3])
                yield self.case("layernorm_backward", size, *results, dinp_sum, *given, real=real)

    def normalized(self, x: Array, weight: Array, bias: Array) -> tuple[Result, Result, Result]:
        out, mean, rstd = formulas.layernorm(x, weight, bias)
        moved = (np.abs(x) + np.abs(x).mean(1, keepdims=True)) * rstd[
            :, None
        ]  # x less a mean, which is off by its own rounding
        return (
            self.result("out", out, moved * np.abs(weight) + np.abs(bias), 8),
            self.result("mean", mean, np.abs(x).mean(1), 8, dtype="f32"),
            self.result("rstd", rstd, rstd * (1 + np.abs(mean) * rstd), 8, dtype="f32"),
        )

    # N, C, OC: up to 8 rows, on a GPU up to 16, go through another kernel than more.
    ODD_MATMULS = ((1, 1, 1), (1, 64, 50), (5, 33, 17), (9, 7, 3), (2, 1032, 17), (16, 264, 33), (17, 264, 24), (33, 65, 40),
                   (64, 48, 96), (130, 257, 129))  # fmt: skip
    REAL_MATMULS = ((1, 768, 3072), (4, 768, 2304), (70, 768, 3072), (20, 3072, 768))

    def matmul(self) -> Iterator[Case]:
        for N, C, OC in (*self.ODD_MATMULS, *self.REAL_MATMULS):
            yield from self.matmul_of(N, C, OC, (N, C, OC) in self.REAL_MATMULS)
        # Logits, as generation has them. The weights repeat, which saves time; their period is no multiple of a kernel's block.
        N, C, OC, period = 3, 768, 50304, 1572
        x, weight = self.random(N, C), self.random(period, C)
        out = self.result("out", formulas.matmul(x, weight), np.outer(norms(x, 1), norms(weight, 1)), dtype="f32")
        out = Result("out", np.tile(out.exact, OC // period), np.tile(out.limit, OC // period), "f32")
        rows = Given(np.tile(weight.astype(VALUE_DTYPES[self.dtype]), (OC // period, 1)), self.dtype, packed=True)
        yield self.case("matmul_forward", f"{N}x{C}x{OC}", out, self.given(x), rows, None, real=True)

    def matmul_of(self, N: int, C: int, OC: int, real: bool) -> Iterator[Case]:
        size = f"{N}x{C}x{OC}"
        x, weight, bias, dout, pre = (self.random(*s) for s in ((N, C), (OC, C), (OC,), (N, OC), (N, C)))
        products, operands = np.outer(norms(x, 1), norms(weight, 1)), [self.given(x), self.given(weight, packed=real)]
        for with_bias in (False, True):
            exact = formulas.matmul(x, weight, bias if with_bias else None)
            scale = products + with_bias * np.abs(bias)
            given = [*operands, self.given(bias) if with_bias else None]
            twice = {"sum": np.abs(exact - bias) if with_bias else np.zeros(1)}
            for dtype in self.gradient_dtypes():
                out = replace(self.result("out", exact, scale, dtype=dtype), slack=twice)
                yield self.case("matmul_forward", size, out, *given, real=real)
        before_gelu = replace(self.result("pre", exact, scale), slack=twice)
        slope = np.abs(formulas.gelu_gradient(exact, np.ones_like(exact)))
        # GELU may see its argument before or after its rounding.
        gelu = self.result("out", formulas.gelu(exact), np.abs(exact), 4, 1.2 * slope * before_gelu.limit)
        gelu = replace(gelu, slack={"tanh": np.abs(exact), "sum": 1.2 * slope * twice["sum"]})
        yield self.case("matmul_gelu_forward", size, gelu, before_gelu, *given, real=real)

        exact_dinp, dweight, dbias = formulas.matmul_gradient(dout, x, weight)
        scale_dinp = np.outer(norms(dout, 1), norms(weight, 0))
        scales = np.outer(norms(dout, 0), norms(x, 0)), np.abs(dout).sum(0)
        through = np.abs(formulas.gelu_gradient(pre, np.ones_like(pre)))
        dinp = self.result("dinp", exact_dinp, scale_dinp)
        scale = np.abs(exact_dinp) * (1 + np.abs(pre))
        dinp_gelu = self.result("dinp", formulas.gelu_gradient(pre, exact_dinp), scale, 4, through * dinp.limit)
        dinp_gelu = replace(dinp_gelu, slack={"tanh": scale})
        given_back = [self.given(dout), self.given(x), self.given(weight, packed=real)]
        for grad in self.gradient_dtypes():
            for accumulate in (True,) if real else (False, True):
                before = [self.random(OC, C, dtype=grad), self.random(OC, dtype=grad)]
                results = []
                for name, exact, scale, b in zip(("dweight", "dbias"), (dweight, dbias), scales, before):
                    if accumulate:
                        result = self.result(name, exact + b, scale + np.abs(b), 8, 0, grad, b)
                        results.append(replace(result, slack={"sum": np.abs(exact)}))
                    else:
                        results.append(self.result(name, exact, scale, 8, 0, grad))
                yield self.case("matmul_backward", size, dinp, *results, *given_back, scalars=[accumulate], real=real)
                with_gelu: list[Operand] = [dinp_gelu, *results, *given_back, self.given(pre)]
                yield self.case("matmul_gelu_backward", size, *with_gelu, scalars=[accumulate], real=real)
        yield self.case("matmul_backward", size, None, results[0], None, *given_back, scalars=[True], real=real)

    def gelu(self) -> Iterator[Case]:
        for shape in ((1,), (33,), (5, 64), (3, 1001), (70, 3072)):
            size, x, dout = "x".join(map(str, shape)), self.random(*shape, scale=3), self.random(*shape)
            exact, gradient = formulas.gelu(x), formulas.gelu_gradient(x, dout)
            yield self.case("gelu_forward", size, self.result("out", exact, np.abs(x), 4), self.given(x))
            scale = np.abs(dout) * (1 + np.abs(x))
            dinp = self.result("dinp", gradient, scale, 4)
            yield self.case("gelu_backward", size, dinp, self.given(x), self.given(dout))
            in_place = self.result("dinp", gradient, scale, 4, before=dout)
            yield self.case("gelu_backward", f"{size} in place", in_place, self.given(x), Same(0))

    def residual(self) -> Iterator[Case]:
        for shape in ((1,), (33,), (3, 1001), (70, 768)):
            size, a, b = "x".join(map(str, shape)), self.random(*shape), self.random(*shape)
            exact = (a + b).astype(np.float32).astype(VALUE_DTYPES[self.dtype]).astype(np.float64)
            out, in_place = Result("out", exact, 0.0, self.dtype), Result("out", exact, 0.0, self.dtype, a)
            yield self.case("residual_forward", size, out, self.given(a), self.given(b))
            yield self.case("residual_forward", f"{size} in place", in_place, Same(0), self.given(b))

    # B, T, NH, HS: head sizes of all kernels and odd ones, T around the sizes of their blocks.
    ATTENTIONS = ((1, 1, 1, 1), (2, 7, 3, 11), (1, 70, 1, 33), (2, 1, 2, 64), (1, 65, 2, 64), (2, 64, 2, 64), (1, 129, 1, 80),
                  (1, 97, 1, 96), (1, 130, 1, 128), (1, 128, 1, 128), (1, 1024, 1, 64))  # fmt: skip

    def attention(self) -> Iterator[Case]:
        for B, T, NH, HS in self.ATTENTIONS:
            size, real = f"{B}x{T}x{NH}x{HS}", T >= 1024
            qkv, dout = self.random(B, T, 3 * NH * HS), self.random(B, T, NH * HS)
            q, k, v = (formulas.heads(x, NH) for x in np.split(qkv, 3, axis=-1))
            d = formulas.heads(dout, NH)
            p, lse = formulas.probabilities(q, k)
            exact, largest = p @ v, np.abs(q @ k.swapaxes(-1, -2)).max() / HS**0.5
            # exp magnifies what its argument, a score, is off by.
            c = 8 * (1 + largest)
            scale, extra = formulas.merge(p @ np.abs(v)), formulas.merge(self.rounded_factors(p, v))
            out = self.result("out", formulas.merge(exact), scale, c, extra)
            stats = self.result("lse", lse, np.abs(lse) + largest + 1, 32, dtype="f32")
            yield self.case("attention_forward", size, out, stats, self.given(qkv), scalars=[NH], real=real)

            # Backward gets out as it is stored.
            stored = formulas.merge(exact).astype(VALUE_DTYPES[self.dtype]).astype(np.float64)
            gradients = formulas.attention_gradient(dout, qkv, stored, lse, NH)
            o, by = formulas.heads(stored, NH), HS**-0.5
            dp, delta = d @ v.swapaxes(-1, -2), (d * o).sum(-1, keepdims=True)
            ds = p * (dp - delta) * by
            # dp and delta are sums that may cancel, so the scale of ds has theirs and not their difference.
            sums = norms(d, -1)[..., None] * norms(v, -1)[..., None, :] + (np.abs(d) * np.abs(o)).sum(-1, keepdims=True)
            ds_scale, turned = p * sums * by, p.swapaxes(-1, -2)
            limits = (
                c * F32 * (ds_scale @ np.abs(k)) + self.rounded_factors(ds, k),
                c * F32 * (ds_scale.swapaxes(-1, -2) @ np.abs(q)) + self.rounded_factors(ds.swapaxes(-1, -2), q),
                c * F32 * (turned @ np.abs(d)) + self.rounded_factors(turned, d),
            )
            extra = np.concatenate([formulas.merge(x) for x in limits], axis=-1)
            dqkv = self.result("dqkv", np.concatenate(gradients, axis=-1), 0, 0, extra)
            given = [self.given(dout), self.given(qkv), self.given(stored), Given(lse, "f32")]
            yield self.case("attention_backward", size, dqkv, *given, scalars=[NH], real=real)

    # B, T, NH, HS, positions that the caches have room for
    DECODES = (
        (3, 1, 3, 11, 50),
        (3, 1, 4, 16, 300),
        (3, 5, 2, 64, 50),
        (2, 1, 1, 80, 33),
        (2, 1, 1, 128, 130),
        (2, 1, 12, 64, 1024),
    )

    def decode(self) -> Iterator[Case]:
        for B, T, NH, HS, room in self.DECODES:
            start = np.linspace(0, room - T, B).astype(int)
            keys, values = self.random(B, NH, room, HS), self.random(B, NH, room, HS)
            qkv = self.random(B, T, 3 * NH * HS)
            q, k, v = (formulas.heads(x, NH) for x in np.split(qkv, 3, axis=-1))
            after = keys.copy(), values.copy()
            out, scale, extra = (np.empty((B, NH, T, HS)) for _ in range(3))
            largest = 0.0
            for b, s in enumerate(start):
                after[0][b, :, s : s + T], after[1][b, :, s : s + T] = k[b], v[b]
                seen, p = after[1][b, :, : s + T], formulas.probabilities(q[b], after[0][b, :, : s + T])[0]
                out[b], scale[b], extra[b] = p @ seen, p @ np.abs(seen), self.rounded_factors(p, seen)
                largest = max(largest, np.abs(q[b] @ after[0][b, :, : s + T].swapaxes(-1, -2)).max() / HS**0.5)
            caches = [Result(n, e, 0.0, self.dtype, x) for n, e, x in zip(("kcache", "vcache"), after, (keys, values))]
            merged = [formulas.merge(x) for x in (out, scale, extra)]
            result = self.result("out", merged[0], merged[1], 8 * (1 + largest), merged[2])
            operands: list[Operand] = [result, *caches, self.given(qkv), Given(start, "i32")]
            size = f"{B}x{T}x{NH}x{HS} of {room}"
            yield self.case("attention_decode", size, *operands, scalars=[NH], real=room == 1024)

    def classifier(self) -> Iterator[Case]:
        for N, V, Vp in ((1, 1, 128), (5, 50, 128), (2, 77, 79), (7, 4999, 5120), (3, 50257, 50304)):
            size, real, dloss = f"{N}x{V} of {Vp}", V == 50257, float(np.float32(0.37))
            logits = self.random(N, Vp, scale=4)
            logits[:, V:] = 1e4  # the padding must not count
            logits = logits.astype(VALUE_DTYPES[self.dtype]).astype(np.float64)
            targets = self.rng.integers(0, V, N)
            if N > 1:
                targets[N // 2] = -1
            x, ids = logits[:, :V], Given(targets, "i32")
            exact = formulas.crossentropy(logits, targets, V)
            spread = x.max(1) - x.min(1) + np.abs(x).max(1)  # the arguments of exp
            losses = self.result("losses", exact, np.where(targets < 0, 0, spread + 1), 4, dtype="f32")
            gradient = formulas.crossentropy_gradient(logits, targets, dloss, V)
            # A probability that float32 has no normal number for may be any below the smallest.
            share = np.where(targets[:, None] < 0, 0, np.abs(gradient) * (1 + spread[:, None]) + 2.0**-100)
            share[:, V:] = 0
            dlogits = self.result("dlogits", gradient, share, 4, before=logits)
            yield self.case("crossentropy_forward", size, losses, self.given(logits), ids, scalars=[V], real=real)
            yield self.case("crossentropy_softmax_backward", size, dlogits, ids, scalars=[dloss, V], real=real)
            yield self.case("fused_classifier", size, losses, dlogits, ids, scalars=[dloss, V], real=real)

    def sums(self) -> Iterator[Case]:
        for n in (1, 33, 70_001, 600_001):
            x, before = self.random(n), np.array([0.5])
            total = self.result("out", before + (x * x).sum(), 0.5 + (x * x).sum(), 8, dtype="f32", before=before)
            yield self.case("global_norm_squared", f"{n}", total, self.given(x), real=n > 100_000)
            if self.dtype == "f32":
                scale = 0.5 + 3 * np.abs(x).sum()
                total = self.result("out", before + 3 * x.sum(), scale, 2, dtype="f32", before=before)
                yield self.case("sum", f"{n}", total, self.given(x), scalars=[3.0], real=n > 100_000)

    def clip_factor(self) -> Iterator[Case]:
        for squared, largest, factor in ((4.0, 1.0, 0.5), (0.25, 1.0, 1.0), (9.0, 0.0, 1.0), (2.0, 1.0, 0.5**0.5)):
            digits = np.zeros(_llmc.NORM_DIGITS)
            digits[_llmc.UNIT_DIGIT], digits[_llmc.UNIT_DIGIT - 1] = squared // 1, squared % 1 * 2.0**16
            for size, given in ((f"{squared:g}", np.array([squared])), (f"{squared:g} in digits", digits)):
                results = [self.result(n, np.array([e]), e, 2) for n, e in (("norm", squared**0.5), ("factor", factor))]
                yield self.case("clip_factor", size, *results, self.given(given), scalars=[largest])

    def gradient_norm(self) -> Iterator[Case]:
        before = np.zeros(_llmc.NORM_DIGITS)
        before[_llmc.UNIT_DIGIT - 1] = 2.0**15  # 0.5
        for sizes in ((1,), (33, 0, 1025, 1), (20_000, 33, 70_001)):
            for other in self.gradient_dtypes():  # gradients of both dtypes in one call
                dtypes = [self.dtype, *[other] * (len(sizes) - 1)]
                gradients = [self.random(n, dtype=dtype) for n, dtype in zip(sizes, dtypes, strict=True)]
                exact = np.array([0.5 + sum((g * g).sum() for g in gradients)])
                total = replace(self.result("out", exact, exact, 8, dtype="f32", before=before), digits=True)
                given = [Given(g, dtype) for g, dtype in zip(gradients, dtypes, strict=True)]
                size = f"{'+'.join(map(str, sizes))} {other}"
                yield self.case("gradient_norm_squared", size, total, *given, real=max(sizes) > 40_000)

    def adamw(self) -> Iterator[Case]:
        for grad_dtype in self.gradient_dtypes():
            for master in (True, False) if self.dtype == "bf16" else (False,):
                for n, factor in ((1, 1.0), (33, 0.5), (70_001, 0.5)):
                    operands = self.adamw_operands(n, factor, grad_dtype, master)
                    rates = _llmc.AdamWStep(**STEP, seed=n)
                    given = Given(np.array([factor]), "f32")
                    yield self.case("adamw", f"{n}", *operands, given, scalars=[rates])
                sizes, decays = (33, 1, 2051), (0.1, 0.0, 0.3)
                operands = []
                for i, (n, decay) in enumerate(zip(sizes, decays, strict=True)):
                    operands += self.adamw_operands(n, 0.5, grad_dtype, master, decay, len(operands), f" {i}")
                given = Given(np.array([0.5]), "f32")
                scalars = [_llmc.AdamWStep(**STEP), *decays]
                yield self.case("adamw_many", "+".join(map(str, sizes)), *operands, given, scalars=scalars)

    def adamw_operands(self, n: int, factor: float, grad_dtype: str, master: bool, decay: float = STEP["weight_decay"], at: int = 0,
                       suffix: str = "") -> list[Operand]:  # fmt: skip
        """Return param, master, m, v and grad, whose positions are at and following."""
        grad = self.random(n, dtype=grad_dtype)
        # m has the gradient's sign, so nothing cancels.
        param = self.random(n, dtype="f32")
        m = np.copysign(self.random(n, dtype="f32"), grad)
        v = np.square(self.random(n, dtype="f32")).astype(np.float32).astype(np.float64)
        before = param if master else param.astype(VALUE_DTYPES[self.dtype]).astype(np.float64)
        step = STEP | {"weight_decay": float(np.float32(decay))}
        after, new_m, new_v = formulas.adamw(before, m, v, grad, factor, step)
        scale = np.abs(before) + 4 * np.abs(after - before)
        weights = self.weights(before, after, scale, master, at + 1, suffix)
        added = np.abs(factor * grad)
        first = self.result(f"m{suffix}", new_m, np.abs(m) + added, 2, dtype="f32", before=m)
        second = self.result(f"v{suffix}", new_v, v + added * added, 2, dtype="f32", before=v)
        return [*weights, first, second, Given(grad, grad_dtype)]

    def weights(
        self, before: Array, after: Array, scale: Array, master: bool, at: int, suffix: str = ""
    ) -> list[Operand]:
        """Return param and master, whose position is at, of an update."""
        # Without the lower bits a bf16 weight is rounded stochastically, to either neighbour.
        unit = UNIT["f32"] if master or self.dtype == "f32" else 2 * self.unit
        limit = STORE * unit * np.maximum(np.abs(after), np.abs(before)) + 8 * F32 * scale
        param = Result(f"param{suffix}", after, limit, self.dtype, before)
        if not master:
            return [param, None]
        high, below = split_master(before.astype(np.float32))
        return [replace(param, before=high.view(VALUE_DTYPES["bf16"]), master=at), Given(below, "i16")]

    def muon(self) -> Iterator[Case]:
        factor, beta = Given(np.array([0.5]), "f32"), float(np.float32(0.95))
        for n in (1, 33, 2051):
            for grad_dtype in self.gradient_dtypes():
                m, grad = self.random(n, dtype="f32"), self.random(n, dtype=grad_dtype)
                for nesterov in (False, True):
                    exact, moment = formulas.muon_momentum(m, grad, 0.5, beta, nesterov)
                    scale = np.abs(m) + np.abs(grad)
                    results = (
                        self.result("out", exact, scale, 4),
                        self.result("m", moment, scale, 2, dtype="f32", before=m),
                    )
                    given = Given(grad, grad_dtype), factor
                    yield self.case("muon_momentum", f"{n} {grad_dtype}", *results, *given, scalars=[beta, nesterov])
            for master in (True, False) if self.dtype == "bf16" else (False,):
                direction, (lr, by, decay) = self.random(n), (float(np.float32(x)) for x in (1e-2, 3.2, 0.1))
                param = self.random(n, dtype="f32" if master else self.dtype)
                after = formulas.muon_update(param, direction, lr, by, decay)
                weights = self.weights(param, after, np.abs(param) + 4 * np.abs(after - param), master, 1)
                step = _llmc.MuonStep(lr, by, decay, seed=n)
                yield self.case("muon_update", f"{n}", *weights, self.given(direction), factor, scalars=[step])

    def newton_schulz(self) -> Iterator[Case]:
        for n in (1, 33, 130):
            x, y = self.random(n, n, scale=0.1), self.random(n, n, scale=0.1)
            out = self.result("out", 0.375 * x, 0.375 * np.abs(x), 2)
            yield self.case("scale", f"{n}x{n}", out, self.given(x), Given(np.array([0.25]), "f32"), scalars=[1.5])
            one = np.eye(n)
            out = self.result("out", 3.5 * one - 2.25 * x + 1.75 * y, 3.5 * one + 3 * np.abs(x) + 2 * np.abs(y), 2)
            scalars = [3.5, -2.25, 1.75]
            yield self.case("shifted_sum", f"{n}x{n}", out, self.given(x), self.given(y), scalars=scalars)
        # A step in bf16 makes so large errors of those of the one before that a second would be checked by nothing.
        for R, C, steps in ((5, 133, 1), (133, 5, 1), (33, 200, 1), (96, 768, 1), (768, 96, 1), (5, 133, 2)):
            if steps > 1 and self.dtype == "bf16":
                continue
            x, k = self.random(R, C), min(R, C)
            exact = formulas.newton_schulz(x, steps)
            limit = self.newton_schulz_limit(x, steps)
            out = Result("out", exact, limit, self.dtype)
            scratch = [self.given(np.full((k, k), np.nan)) for _ in range(2)]
            norms = Given(np.full(_llmc.NORM_DIGITS + 2, np.nan), "f32")
            size = f"{R}x{C} {steps}"
            yield self.case(
                "newton_schulz", size, out, self.given(x), *scratch, norms, scalars=[steps], real=max(R, C) == 768
            )

    def newton_schulz_limit(self, x: Array, steps: int) -> Array:
        """Return how far off the results may be, as every product is stored, with half a unit's error, before the next one is made of it.

        Errors of the factors of a product are independent of each other: 5 standard deviations of their sum, as in rounded_factors().
        """
        a, b, c = formulas.NEWTON_SCHULZ
        tall = x.shape[0] > x.shape[1]
        x = (x.T if tall else x) / np.sqrt((x * x).sum())

        def product(p: Array, p_error: Array, q: Array, q_error: Array) -> Array:
            """Return the error of p @ q as it is stored."""
            parts = np.sqrt(np.square(p_error) @ np.square(q)) + np.sqrt(np.square(p) @ np.square(q_error))
            return np.asarray(parts + self.unit * np.abs(p @ q) + 8 * F32 * np.outer(norms(p, 1), norms(q, 0)))

        error = self.unit * np.abs(x)
        for _ in range(steps):
            gram = x @ x.T
            gram_error = 2.5 * product(x, error, x.T, error.T)
            square_error = product(gram, gram_error, gram, gram_error)
            polynomial = a * np.eye(len(x)) + b * gram + c * gram @ gram
            polynomial_error = abs(b) * gram_error + c * square_error + self.unit * np.abs(polynomial)
            error = product(polynomial, polynomial_error, x, error)
            x = polynomial @ x
        return STORE * (error.T if tall else error)

    def sample(self) -> Iterator[Case]:
        for N, V, Vp, temperature, top_k, top_p in ((9, 31, 40, 1.0, 0, 1.0), (9, 31, 40, 0.0, 0, 1.0), (9, 31, 40, 0.8, 3, 1.0),
                                                    (9, 31, 40, 1.0, 0, 0.7), (4, 50257, 50304, 0.7, 0, 1.0),
                                                    (4, 50257, 50304, 1.0, 50, 0.9)):  # fmt: skip
            logits = self.random(N, Vp, scale=3)
            logits[:, V:] = np.nan
            tokens, coins = np.empty(N, int), np.empty(N)
            for i, row in enumerate(logits[:, :V]):
                tokens[i], coins[i] = self.choose(row, temperature, top_k, top_p)
            if N > 8:
                tokens[3], coins[3] = 0, -1.0  # a row that is skipped
            options = _llmc.SamplerOptions(temperature, top_k, top_p)
            kind = f"{N}x{V} {temperature:g}/{top_k}/{top_p:g}"
            operands: list[Operand] = [
                Result("tokens", tokens, 0.0, "i32", np.full(N, -7)),
                Given(logits, "f32"),
                Given(coins, "f32"),
            ]
            yield self.case("sample", kind, *operands, scalars=[V, options], real=V > 50_000)

    def choose(self, logits: Array, temperature: float, top_k: int, top_p: float) -> tuple[int, float]:
        """Return a token, and a coin in the middle of its share, so that no rounding can move it to another."""
        if temperature == 0:
            return int(logits.argmax()), 0.5
        order = np.argsort(-logits, kind="stable")
        p = np.exp((logits[order] - logits[order[0]]) / temperature)
        p /= p.sum()
        kept = np.cumsum(p) - p < top_p
        if top_k:
            kept[top_k:] = False
        share = np.zeros(len(logits))
        share[order[kept]] = p[kept]
        share /= share.sum()
        rank = min(int(self.rng.integers(0, 5)), int(kept.sum()) - 1)  # one of the likeliest, whose share is wide
        token = int(order[rank])
        return token, float(share[:token].sum() + share[token] / 2)
