"""Ops at the sizes of training, and on tensors of more than 2^31 elements, where an index of 32 bits would wrap around.

On the emulated device rows are short, so that the same grids of thousands of blocks take seconds; tensors of 2^31 elements need a GPU.
Of a large result some windows are compared: the first rows, the last, and those in the middle or around element 2^31.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from oracle import NUMPY, check, get, nans, put, rounded

from llmc import _llmc

pytestmark = pytest.mark.cuda

V, VP = 50257, 50304
T = 1024
N = 64 * T  # rows of a micro-batch
LARGE = 2**31 + 3 * 2**20  # elements, at least


class Pattern:
    """Values of a tensor of any size: a block of random numbers again and again. Its length is a prime, so rows differ."""

    def __init__(self, rng: np.random.Generator, dtype: str = "bf16", scale: float = 1.0) -> None:
        self.dtype = dtype
        self.block = (scale * rng.standard_normal(1_000_003, np.float32)).astype(NUMPY[dtype])

    def fill(self, t: _llmc.Tensor) -> _llmc.Tensor:
        raw = self.block.view(np.uint16) if self.dtype == "bf16" else self.block
        for begin in range(0, t.numel, raw.size):
            t.write(begin, raw[: t.numel - begin])
        return t

    def tensor(self, backend: _llmc.Backend, *shape: int) -> _llmc.Tensor:
        return self.fill(backend.empty(list(shape), self.dtype))

    def at(self, indices: Any) -> Any:
        """Return the values of these elements in float64."""
        return self.block[np.asarray(indices) % self.block.size].astype(np.float64)

    def rows(self, rows: Any, C: int) -> Any:
        return self.at(np.asarray(rows)[:, None] * C + np.arange(C))


def part(t: _llmc.Tensor, begin: int, count: int) -> Any:
    x = t.read(begin, count)
    return x.view(NUMPY["bf16"]) if t.dtype == "bf16" else x


def part_rows(t: _llmc.Tensor, rows: Any, C: int) -> Any:
    """Return some rows of a tensor, which are consecutive."""
    return part(t, int(rows[0]) * C, len(rows) * C).reshape(len(rows), C)


def windows(rows: int, C: int = 1, width: int = 32) -> list[Any]:
    """Return three windows of rows: the first, the last, and around element 2^31 or in the middle."""
    width = min(width, rows)
    middle = min(2**31 // C if rows * C > 2**31 else rows // 2, rows - width // 2)
    return [np.arange(b, b + width) for b in (0, max(0, middle - width // 2), rows - width)]


@pytest.fixture(scope="module")
def emulated(cuda) -> bool:
    return "emulated" in cuda.info().description


@pytest.fixture(scope="module")
def C(emulated) -> int:
    return 16 if emulated else 768


# ---- the sizes of 124M, B = 64 ----


@pytest.mark.parametrize("fused", [False, True])
def test_layernorm_forward(cuda, rng, C, fused):
    x, y, w, b = (Pattern(rng) for _ in range(4))
    out, residual = nans(cuda, (N, C), "bf16"), nans(cuda, (N, C), "bf16")
    mean, rstd = nans(cuda, N), nans(cuda, N)
    weight, bias = w.tensor(cuda, C), b.tensor(cuda, C)
    if fused:
        cuda.fused_residual_layernorm_forward(
            residual, out, mean, rstd, x.tensor(cuda, N, C), y.tensor(cuda, N, C), weight, bias
        )
    else:
        cuda.layernorm_forward(out, mean, rstd, x.tensor(cuda, N, C), weight, bias)
    assert np.isfinite(get(mean)).all() and np.isfinite(get(rstd)).all()
    for rows in windows(N):
        inp = rounded(x.rows(rows, C) + y.rows(rows, C), "bf16") if fused else x.rows(rows, C)
        if fused:
            np.testing.assert_array_equal(part_rows(residual, rows, C).astype(np.float64), inp)
        results = {
            "out": part_rows(out, rows, C),
            "mean": part(mean, rows[0], len(rows)),
            "rstd": part(rstd, rows[0], len(rows)),
        }
        check(results, oracle.layernorm, inp, w.at(range(C)), b.at(range(C)), ulps=4)


def test_layernorm_backward(cuda, rng, C):
    x, d, w, before = (Pattern(rng) for _ in range(4))
    dinp, dweight, dbias = before.tensor(cuda, N, C), put(cuda, np.zeros(C)), put(cuda, np.zeros(C))
    inp, weight, mean, rstd = x.tensor(cuda, N, C), w.tensor(cuda, C), nans(cuda, N), nans(cuda, N)
    cuda.layernorm_forward(nans(cuda, (N, C), "bf16"), mean, rstd, inp, weight, weight)
    cuda.layernorm_backward(dinp, dweight, dbias, None, d.tensor(cuda, N, C), inp, weight, mean, rstd)
    for rows in windows(N):

        def gradient(dout, x, weight, before):
            return before + oracle.layernorm_gradient(dout, x, weight)[0]

        check(
            {"dinp": part_rows(dinp, rows, C)},
            gradient,
            *(p.rows(rows, C) for p in (d, x)),
            w.at(range(C)),
            before.rows(rows, C),
        )
    everything = np.arange(N)
    operands = d.rows(everything, C), x.rows(everything, C), w.at(range(C))
    check({"dweight": dweight, "dbias": dbias}, lambda *o: oracle.layernorm_gradient(*o)[1:], *operands, ulps=64)


@pytest.mark.parametrize("gelu", [False, True])
def test_matmul_forward(cuda, rng, C, gelu):
    OC = 4 * C
    x, w, b = Pattern(rng), Pattern(rng, scale=C**-0.5), Pattern(rng)
    out, pre = nans(cuda, (N, OC), "bf16"), nans(cuda, (N, OC), "bf16")
    operands = x.tensor(cuda, N, C), w.tensor(cuda, OC, C), b.tensor(cuda, OC)
    if gelu:
        cuda.matmul_gelu_forward(out, pre, *operands)
    else:
        cuda.matmul_forward(out, *operands)

    def formula(*operands):
        product = oracle.matmul(*operands)
        return (oracle.gelu(product), product) if gelu else product

    for rows in windows(N):
        results = {"out": part_rows(out, rows, OC)} | ({"pre": part_rows(pre, rows, OC)} if gelu else {})
        check(results, formula, x.rows(rows, C), w.rows(range(OC), C), b.at(range(OC)), ulps=4)


@pytest.mark.parametrize("gelu", [False, True])
def test_matmul_backward(cuda, rng, C, gelu):
    """The second linear layer of a block, whose input's gradient goes through GELU; weights' gradients add to what there was."""
    wide = 4 * C
    d, x, w, pre = Pattern(rng), Pattern(rng), Pattern(rng, scale=C**-0.5), Pattern(rng)
    before = Pattern(rng, "f32")
    dinp, dweight, dbias = nans(cuda, (N, wide), "bf16"), before.tensor(cuda, C, wide), put(cuda, np.zeros(C))
    operands = d.tensor(cuda, N, C), x.tensor(cuda, N, wide), w.tensor(cuda, C, wide)
    if gelu:
        cuda.matmul_gelu_backward(dinp, dweight, dbias, *operands, pre.tensor(cuda, N, wide), True)
    else:
        cuda.matmul_backward(dinp, dweight, dbias, *operands, True)

    def input_gradient(dout, weight, pre):
        dx = dout @ weight
        return oracle.gelu_gradient(pre, dx) if gelu else dx

    for rows in windows(N):
        operands = d.rows(rows, C), w.rows(range(C), wide), pre.rows(rows, wide)
        check({"dinp": part_rows(dinp, rows, wide)}, input_gradient, *operands, ulps=4)
    everything = np.arange(N)
    check({"dbias": dbias}, lambda dout: dout.sum(axis=0), d.rows(everything, C), ulps=64)
    for rows in windows(C, width=2):
        dout = d.at(everything[:, None] * C + rows)
        columns = np.arange(0, wide, max(1, wide // 16))
        inp = x.at(everything[:, None] * wide + columns)
        found = part_rows(dweight, rows, wide)[:, columns]
        # A sum of 65,536 products, in the f32 of tensor cores: on an H100 5e-5 off. Were 256 rows left out, it would be 0.06.
        check(
            {"dweight": found}, lambda b, d, x: b + d.T @ x, before.rows(rows, wide)[:, columns], dout, inp, ulps=1024
        )


def test_classifier(cuda, rng, emulated):
    rows = 5 if emulated else 16384
    x = Pattern(rng, scale=3.0)
    logits, losses = x.tensor(cuda, rows, VP), nans(cuda, rows)
    targets = rng.integers(0, V, rows)
    targets[[0, 2, rows - 1]] = V - 1, -1, 0
    cuda.fused_classifier(losses, logits, put(cuda, targets, "i32"), 0.5, V)
    assert np.isfinite(get(losses)).all() and not get(losses)[targets < 0].any()
    for some in windows(rows, width=3):
        z, t = x.rows(some, VP), targets[some]
        check({"losses": part(losses, some[0], len(some))}, oracle.crossentropy, z, t, V, ulps=8)
        check({"dlogits": part_rows(logits, some, VP)}, oracle.crossentropy_gradient, z, t, 0.5, V, ulps=2)


@pytest.mark.parametrize("attention", ["auto", "flash", "simple"])
def test_attention(cuda, rng, emulated, attention):
    B, NH, HS, length = (2, 1, 64, 192) if emulated else (8, 12, 64, T)
    C = NH * HS
    x, d = Pattern(rng), Pattern(rng)
    qkv, dout = x.tensor(cuda, B, length, 3 * C), d.tensor(cuda, B, length, C)
    out, lse, dqkv = (
        nans(cuda, (B, length, C), "bf16"),
        nans(cuda, (B, NH, length)),
        nans(cuda, (B, length, 3 * C), "bf16"),
    )
    cuda.set_option("attention", attention)
    try:
        cuda.attention_forward(out, lse, qkv, NH)
        cuda.attention_backward(dqkv, dout, qkv, out, lse, NH)
    finally:
        cuda.set_option("attention", "auto")
    found, found_lse, found_gradient = get(out), get(lse), get(dqkv)
    for b, h in {(0, 0), (B // 2, NH // 2), (B - 1, NH - 1)}:
        head = slice(h * HS, (h + 1) * HS)
        of_head = [slice(i * C + h * HS, i * C + (h + 1) * HS) for i in range(3)]
        inputs = x.rows(range(b * length, (b + 1) * length), 3 * C)[None]
        inputs = np.concatenate([inputs[..., s] for s in of_head], axis=-1)
        results = {"out": found[b : b + 1, :, head], "lse": found_lse[b : b + 1, h : h + 1]}
        check(results, lambda qkv: oracle.attention(qkv, 1), inputs, ulps=8)
        dhead = d.rows(range(b * length, (b + 1) * length), C)[None, :, head]
        stored = results["out"].astype(np.float64), results["lse"].astype(np.float64)
        gradients = {name: found_gradient[b : b + 1, :, s] for name, s in zip(("dq", "dk", "dv"), of_head)}
        check(gradients, lambda *o: oracle.attention_gradient(*o, 1), dhead, inputs, *stored, ulps=8)


def test_encoder(cuda, rng, C):
    B = N // T
    e, p, d, before = (Pattern(rng) for _ in range(4))
    tokens = np.minimum(rng.zipf(1.2, (B, T)) - 1, V - 1)  # as in a text, some tokens come very often
    tokens[-1, -1] = V - 1
    out, inp = nans(cuda, (B, T, C), "bf16"), put(cuda, tokens, "i32")
    cuda.encoder_forward(out, inp, e.tensor(cuda, VP, C), p.tensor(cuda, T, C), None)
    for rows in windows(N):
        expected = e.rows(tokens.reshape(-1)[rows], C) + p.rows(rows % T, C)
        np.testing.assert_array_equal(part_rows(out, rows, C).astype(np.float64), rounded(expected, "bf16"))
    start = before.tensor(cuda, VP, C)
    dwte, dwpe = cuda.empty([VP, C]), put(cuda, np.zeros((T, C)))
    cuda.copy(dwte, start)
    cuda.encoder_backward(dwte, dwpe, d.tensor(cuda, B, T, C), inp)
    columns = np.unique([0, 1, C // 2, C - 1])
    dout = d.at(np.arange(N)[:, None] * C + columns)
    sums = before.at(np.arange(VP)[:, None] * C + columns)
    np.add.at(sums, tokens.reshape(-1), dout)
    np.testing.assert_allclose(get(dwte)[:, columns], sums, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(get(dwpe)[:, columns], dout.reshape(B, T, -1).sum(axis=0), rtol=1e-4, atol=1e-4)


def test_gelu_and_residual(cuda, rng, C, emulated):
    n = (1 << 18) + 5 if emulated else N * 4 * C
    x, y = Pattern(rng), Pattern(rng)
    a, b = x.tensor(cuda, n), y.tensor(cuda, n)
    elementwise(cuda, x, y, a, b, n)


def elementwise(cuda, x, y, a, b, n):
    """Run the elementwise ops, whose result takes the place of an operand, and compare windows."""
    ops = [
        ("gelu_forward", lambda: cuda.gelu_forward(b, a), lambda x, y: oracle.gelu(x), 2),
        ("gelu_backward", lambda: cuda.gelu_backward(b, a, b), oracle.gelu_gradient, 4),
        ("residual_forward", lambda: cuda.residual_forward(b, a, b), np.add, 1),
    ]
    for name, run, formula, ulps in ops:
        y.fill(b)
        run()
        for some in windows(n, width=4096):
            check({name: part(b, some[0], len(some))}, formula, x.at(some), y.at(some), ulps=ulps)


def test_adamw_and_norm(cuda, rng, emulated):
    n = (1 << 18) + 5 if emulated else 124_475_904
    update(cuda, rng, n, "f32")


def update(cuda, rng, n, grad_dtype):
    """Make one step of AdamW over n parameters of bf16 with master weights, and compare windows and the gradient's norm."""
    step = {
        "lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "correction1": 0.5, "correction2": 0.25
    }  # fmt: skip
    p, m, v, g = Pattern(rng), Pattern(rng, "f32"), Pattern(rng, "f32"), Pattern(rng, grad_dtype)
    v.block = np.abs(v.block)
    param, master, grad = p.tensor(cuda, n), cuda.empty([n], "i16"), g.tensor(cuda, n)
    m1, v1, norm = m.tensor(cuda, n), v.tensor(cuda, n), put(cuda, [0])
    cuda.global_norm_squared(norm, grad)
    whole, rest = divmod(n, g.block.size)
    squares = g.block.astype(np.float64) ** 2
    assert get(norm)[0] == pytest.approx(whole * squares.sum() + squares[:rest].sum(), rel=1e-5)
    native = _llmc.AdamWStep(**step, seed=1)
    cuda.adamw(param, master, m1, v1, grad, put(cuda, [0.5]), native)
    for some in windows(n, width=4096):
        expected = oracle.adamw(p.at(some), m.at(some), v.at(some), g.at(some), 0.5, step)
        upper = part(param, some[0], len(some)).view(np.uint16).astype(np.uint32) << 16
        found = (upper + part(master, some[0], len(some)).astype(np.int32).view(np.uint32)).view(np.float32)
        results = found, part(m1, some[0], len(some)), part(v1, some[0], len(some))
        for result, exact in zip(results, expected):
            np.testing.assert_allclose(result, exact, rtol=1e-5, atol=1e-6)


# ---- more than 2^31 elements ----


@pytest.fixture
def room(cuda, emulated) -> Iterator[Any]:
    """Return a function that skips the test if the card has not as many bytes. A user's processes take turns."""
    if emulated:
        pytest.skip("2^31 elements take too long on the emulated device")
    with contextlib.ExitStack() as stack:
        try:
            import fcntl
        except ImportError:
            fcntl = None  # type: ignore[assignment]
        if fcntl:
            file = stack.enter_context(open(Path(tempfile.gettempdir()) / f"llmc_large_tests_{os.getuid()}.lock", "w"))
            fcntl.flock(file, fcntl.LOCK_EX)

        def need(gigabytes: float) -> None:
            free = cuda.info().free_bytes / 2**30
            if free < gigabytes + 4:  # what other tests take beside this one
                pytest.skip(f"needs {gigabytes + 4:.0f} GB of the card's memory, {free:.0f} are free")

        yield need
        cuda.synchronize()


def test_large_elementwise(cuda, rng, room):
    room(9)
    x, y = Pattern(rng), Pattern(rng)
    n = LARGE + 5  # the last vector is not whole
    elementwise(cuda, x, y, x.tensor(cuda, n), cuda.empty([n], "bf16"), n)


def test_large_copy_and_sum(cuda, rng, room):
    room(13)
    x = Pattern(rng)
    x.block = (x.block.astype(np.float32) + 1).astype(x.block.dtype)  # so that a part that is left out shows in the sum
    n = LARGE + 5
    narrow, wide, total = x.tensor(cuda, n), cuda.empty([n]), put(cuda, [0])
    cuda.copy(wide, narrow)
    for some in windows(n, width=4096):
        np.testing.assert_array_equal(part(wide, some[0], len(some)), x.at(some))
    cuda.zero(narrow)
    cuda.copy(narrow, wide)
    for some in windows(n, width=4096):
        np.testing.assert_array_equal(part(narrow, some[0], len(some)).astype(np.float64), x.at(some))
    cuda.sum(total, wide, 2.0)
    values = x.block.astype(np.float64)
    expected = 2 * (n // values.size * values.sum() + values[: n % values.size].sum())
    assert get(total)[0] == pytest.approx(expected, rel=1e-6)


def test_large_adamw(cuda, rng, room):
    room(33)
    update(cuda, rng, LARGE + 5, "f32")


def test_large_layernorm(cuda, rng, room):
    room(14)
    C = 768
    rows = LARGE // C + 1
    x, d, w = (Pattern(rng) for _ in range(3))
    inp, out, weight = x.tensor(cuda, rows, C), cuda.empty([rows, C], "bf16"), w.tensor(cuda, C)
    mean, rstd = nans(cuda, rows), nans(cuda, rows)
    cuda.layernorm_forward(out, mean, rstd, inp, weight, weight)
    for some in windows(rows, C):
        check(
            {"out": part_rows(out, some, C)},
            lambda *o: oracle.layernorm(*o)[0],
            x.rows(some, C),
            *[w.at(range(C))] * 2,
            ulps=4,
        )
    cuda.zero(out)
    dweight, dbias = put(cuda, np.zeros(C)), put(cuda, np.zeros(C))
    cuda.layernorm_backward(out, dweight, dbias, None, d.tensor(cuda, rows, C), inp, weight, mean, rstd)
    for some in windows(rows, C):
        operands = d.rows(some, C), x.rows(some, C), w.at(range(C))
        check({"dinp": part_rows(out, some, C)}, lambda *o: oracle.layernorm_gradient(*o)[0], *operands)
    everything = np.arange(rows)
    for column in (0, C - 1):
        expected = d.at(everything * C + column).sum()
        assert get(dbias)[column] == pytest.approx(expected, abs=0.1)


def test_large_classifier(cuda, rng, room):
    room(5)
    rows = LARGE // VP + 1
    x = Pattern(rng, scale=3.0)
    logits, losses = x.tensor(cuda, rows, VP), nans(cuda, rows)
    targets = rng.integers(0, V, rows)
    cuda.fused_classifier(losses, logits, put(cuda, targets, "i32"), 0.5, V)
    assert np.isfinite(get(losses)).all()
    for some in windows(rows, VP, width=4):
        z, t = x.rows(some, VP), targets[some]
        check({"losses": part(losses, some[0], len(some))}, oracle.crossentropy, z, t, V, ulps=8)
        check({"dlogits": part_rows(logits, some, VP)}, oracle.crossentropy_gradient, z, t, 0.5, V, ulps=2)


def test_large_matmul(cuda, rng, room):
    """A result, and then an input, of more than 2^31 elements."""
    room(5)
    C, rows = 64, LARGE // VP + 1
    x, w = Pattern(rng), Pattern(rng, scale=C**-0.5)
    out, inp, weight = cuda.empty([rows, VP], "bf16"), x.tensor(cuda, rows, C), w.tensor(cuda, VP, C)
    cuda.matmul_forward(out, inp, weight, None)
    for some in windows(rows, VP, width=8):
        check({"out": part_rows(out, some, VP)}, oracle.matmul, x.rows(some, C), w.rows(range(VP), C), ulps=4)
    d = Pattern(rng)
    d.fill(out)
    dinp, dweight, dbias = nans(cuda, (rows, C), "bf16"), nans(cuda, (VP, C)), nans(cuda, VP)
    cuda.matmul_backward(dinp, dweight, dbias, out, inp, weight, False)
    for some in windows(rows, VP, width=8):
        check({"dinp": part_rows(dinp, some, C)}, np.matmul, d.rows(some, VP), w.rows(range(VP), C), ulps=4)
    everything = np.arange(rows)
    for some in windows(VP, width=2):
        dout = d.at(everything[:, None] * VP + some)
        check({"dweight": part_rows(dweight, some, C)}, lambda d, x: d.T @ x, dout, x.rows(everything, C), ulps=1024)
        check({"dbias": part(dbias, some[0], len(some))}, lambda d: d.sum(axis=0), dout, ulps=64)


def test_large_encoder(cuda, rng, room):
    room(6)
    C = 768
    B = LARGE // (C * T) + 1
    e, p, d = (Pattern(rng) for _ in range(3))
    tokens = rng.integers(0, V, (B, T))
    out, inp = cuda.empty([B, T, C], "bf16"), put(cuda, tokens, "i32")
    cuda.encoder_forward(out, inp, e.tensor(cuda, VP, C), p.tensor(cuda, T, C), None)
    for rows in windows(B * T, C):
        expected = e.rows(tokens.reshape(-1)[rows], C) + p.rows(rows % T, C)
        np.testing.assert_array_equal(part_rows(out, rows, C).astype(np.float64), rounded(expected, "bf16"))
    d.fill(out)
    dwte, dwpe = put(cuda, np.zeros((VP, C))), put(cuda, np.zeros((T, C)))
    cuda.encoder_backward(dwte, dwpe, out, inp)
    columns = np.array([0, C - 1])
    dout, sums = d.at(np.arange(B * T)[:, None] * C + columns), np.zeros((VP, 2))
    np.add.at(sums, tokens.reshape(-1), dout)
    np.testing.assert_allclose(get(dwte)[:, columns], sums, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(get(dwpe)[:, columns], dout.reshape(B, T, -1).sum(axis=0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("attention", ["auto", "flash"])
def test_large_attention(cuda, rng, room, attention):
    room(16)
    NH, HS = 12, 64
    C = NH * HS
    B = LARGE // (3 * C * T) + 1
    x, d = Pattern(rng), Pattern(rng)
    qkv, dout, dqkv = x.tensor(cuda, B, T, 3 * C), d.tensor(cuda, B, T, C), cuda.empty([B, T, 3 * C], "bf16")
    out, lse = cuda.empty([B, T, C], "bf16"), cuda.empty([B, NH, T])
    cuda.set_option("attention", attention)
    cuda.set_option("deterministic", "off")  # else cuDNN takes B * NH * T * T values more
    try:
        cuda.attention_forward(out, lse, qkv, NH)
        cuda.attention_backward(dqkv, dout, qkv, out, lse, NH)
    finally:
        cuda.set_option("attention", "auto")
        cuda.set_option("deterministic", "on")
    for b, h in ((0, 0), (2**31 // (3 * C * T), 5), (B - 1, NH - 1)):
        rows, head = range(b * T, (b + 1) * T), slice(h * HS, (h + 1) * HS)
        of_head = [slice(i * C + h * HS, i * C + (h + 1) * HS) for i in range(3)]
        inputs = np.concatenate([x.rows(rows, 3 * C)[:, s] for s in of_head], axis=-1)[None]
        results = {"out": part_rows(out, rows, C)[None, :, head], "lse": part(lse, (b * NH + h) * T, T)[None, None]}
        check(results, lambda qkv: oracle.attention(qkv, 1), inputs, ulps=8)
        stored = results["out"].astype(np.float64), results["lse"].astype(np.float64)
        gradient = part_rows(dqkv, rows, 3 * C)[None]
        gradients = {name: gradient[..., s] for name, s in zip(("dq", "dk", "dv"), of_head)}
        check(
            gradients,
            lambda *o: oracle.attention_gradient(*o, 1),
            d.rows(rows, C)[None, :, head],
            inputs,
            *stored,
            ulps=8,
        )
