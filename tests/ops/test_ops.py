"""Every op of a backend against its formula in float64 (tests/oracle.py), on every kernel set that runs here.

Outputs are filled with NaN beforehand. Sizes: one row, one column, odd ones as 33, and sizes around those of the kernels' blocks.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import oracle
import pytest
from conftest import KERNEL_SETS, make_backend
from oracle import DTYPES, check, get, nans, put, rounded

from llmc import _llmc
from llmc.formats.state_file import join_master, split_master
from llmc.selfcheck.run import call_op, number_of

# Pairs of dtypes: of activations, and of the parameters' gradients.
MIXED = [("f32", "f32"), ("bf16", "bf16"), ("bf16", "f32")]


# ---- memory ----


@pytest.mark.parametrize("n", [0, 1, 33, 4096, 100_003])
def test_copy_converts_to_nearest_even(backend, rng, n):
    x = rng.standard_normal(n).astype(np.float32)
    for source, target in itertools.product(DTYPES, DTYPES):
        out = nans(backend, n, target)
        backend.copy(out, put(backend, x, source))
        np.testing.assert_array_equal(rounded(get(out), "f32"), rounded(rounded(x, source), target))
    integers = put(backend, x * 9, "i32")
    out = put(backend, np.full(n, 7), "i32")
    backend.copy(out, integers)
    np.testing.assert_array_equal(get(out), get(integers))


def test_rounding_of_special_values(backend):
    x = np.array([1.00390625, 1.01171875, -1.00390625, 3.3895314e38, np.inf, -np.inf, np.nan, 0.0, -0.0], np.float32)
    out = nans(backend, x.shape, "bf16")
    backend.copy(out, put(backend, x))  # the first three lie half-way between two bf16 numbers: the even one is right
    np.testing.assert_array_equal(rounded(get(out), "f32"), rounded(x, "bf16"))
    assert rounded(get(out), "f32")[:3].tolist() == [1.0, 1.015625, -1.0]


@pytest.mark.parametrize("dtype", ["f32", "bf16", "i32", "i16"])
def test_zero_and_new_memory_is_zero(backend, dtype):
    assert not rounded(get(backend.empty([3, 1, 11], dtype)), "f32").any()
    t = put(backend, np.full(33, 7), dtype)
    backend.zero(t)
    assert not rounded(get(t), "f32").any()


def test_read_and_write_a_part(backend):
    t = put(backend, np.arange(12.0).reshape(3, 4))
    t.write(5, np.array([50.0, 60.0], np.float32))
    assert t.read(4, 4).tolist() == [4.0, 50.0, 60.0, 7.0]
    for begin, count in [(-1, 2), (11, 2), (0, 13)]:
        with pytest.raises(ValueError, match="outside"):
            t.read(begin, count)
    with pytest.raises(ValueError, match="outside"):
        t.write(11, np.zeros(2, np.float32))


def test_host_arrays_that_do_not_fit(backend):
    t = backend.empty([3], "f32")
    for wrong in (np.zeros(2, np.float32), np.zeros(3, np.float64), np.zeros(6, np.uint16)):
        with pytest.raises(ValueError, match="does not fit"):
            t.from_host(wrong)
    with pytest.raises(ValueError, match="negative"):
        backend.empty([3, -1])
    with pytest.raises(ValueError, match="f64"):
        backend.empty([3], "f64")


def test_unknown_devices_and_options(backend):
    for name in ("tpu", "cuda:", "cuda:x", "cpu:1"):
        with pytest.raises(ValueError, match=f"'{name}'"):
            _llmc.Backend(name)
    with pytest.raises(ValueError, match="speed"):
        backend.set_option("speed", "11")


# ---- encoder ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_start", [False, True])
@pytest.mark.parametrize("B,T,C,V", [(1, 1, 1, 1), (2, 7, 33, 50), (3, 16, 64, 11)])
def test_encoder_forward(backend, rng, dtype, with_start, B, T, C, V):
    wte, wpe = rounded(rng.standard_normal((V, C)), dtype), rounded(rng.standard_normal((T + 5, C)), dtype)
    tokens, start = rng.integers(0, V, (B, T)), rng.integers(1, 6, B) if with_start else np.zeros(B, dtype=int)
    out = nans(backend, (B, T, C), dtype)
    t = [put(backend, tokens, "i32"), put(backend, wte, dtype), put(backend, wpe, dtype)]
    backend.encoder_forward(out, *t, put(backend, start, "i32") if with_start else None)
    check({"out": out}, oracle.encoder, tokens, wte, wpe, start)


@pytest.mark.parametrize("dtype,grad", [*MIXED, ("f32", "bf16")])
@pytest.mark.parametrize(
    "B,T,C,V,frequent",
    [(1, 1, 1, 1, 0), (2, 7, 33, 50, 0), (4, 65, 40, 3, 0), (4, 64, 40, 30, 0.6), (1, 200, 2056, 3, 0.9)],
)
def test_encoder_backward_adds(backend, rng, dtype, grad, B, T, C, V, frequent):
    dout, tokens = rounded(rng.standard_normal((B, T, C)), dtype), rng.integers(0, V, (B, T))
    tokens[rng.random((B, T)) < frequent] = V - 1  # one token whose positions fill several of CUDA's chunks
    before = rounded(rng.standard_normal((V, C)), grad), rounded(rng.standard_normal((T + 2, C)), grad)
    runs = []
    for _ in range(2):  # which give the same bits
        dwte, dwpe = (put(backend, x, grad) for x in before)
        backend.encoder_backward(dwte, dwpe, put(backend, dout, dtype), put(backend, tokens, "i32"))
        runs.append([dwte.to_host(), dwpe.to_host()])
    check({"dwte": dwte, "dwpe": dwpe}, oracle.encoder_gradient, *before, dout, tokens)
    for first, second in zip(*runs):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("token", [-1, 5])
def test_encoder_refuses_other_tokens(token):
    cpu = _llmc.Backend("cpu")
    tokens, table, wpe = put(cpu, [[0, token]], "i32"), cpu.empty([5, 4]), cpu.empty([2, 4])
    with pytest.raises(ValueError, match=f"token {token} .*1.* 5"):
        cpu.encoder_forward(cpu.empty([1, 2, 4]), tokens, table, wpe)
    with pytest.raises(ValueError, match=f"token {token} .*1.* 5"):
        cpu.encoder_backward(table, wpe, cpu.empty([1, 2, 4]), tokens)
    with pytest.raises(ValueError, match="wpe.* 2"):
        cpu.encoder_forward(cpu.empty([1, 2, 4]), put(cpu, [[0, 0]], "i32"), table, wpe, put(cpu, [1], "i32"))


# ---- layernorm ----

ROWS = [(1, 1), (1, 33), (5, 33), (7, 8), (19, 64), (19, 65), (130, 40), (9, 768), (3, 1600)]  # N, C
LONG_ROWS = [(2, 13000), (2, 25600)]  # of which CUDA reads a part again
BACKWARD_ROWS = [(300, 40), (517, 264), (2201, 16), (1061, 776)]  # the last two: more than CUDA's grid takes at once
BACKWARD_ROWS += [(4, 100), (2, 2056), (3, 769), (2, 6152)]  # rows shared by several warps, and too long for that


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N,C", ROWS + LONG_ROWS)
def test_layernorm_forward(backend, rng, dtype, N, C):
    x, weight, bias = (rounded(rng.standard_normal(s) + 0.5, dtype) for s in [(N, C), C, C])
    out, mean, rstd = nans(backend, (N, C), dtype), nans(backend, N), nans(backend, N)
    backend.layernorm_forward(out, mean, rstd, *(put(backend, t, dtype) for t in (x, weight, bias)))
    check({"out": out, "mean": mean, "rstd": rstd}, oracle.layernorm, x, weight, bias, ulps=2)


def test_layernorm_of_a_large_mean(backend, rng):
    """The variance is computed in a second pass, so that a variance of 1 is not lost beside a mean of 1000."""
    x = rounded(rng.standard_normal((4, 257)) + 1000, "f32")
    weight, bias = np.ones(257), np.zeros(257)
    out, mean, rstd = nans(backend, x.shape), nans(backend, 4), nans(backend, 4)
    backend.layernorm_forward(out, mean, rstd, *(put(backend, t) for t in (x, weight, bias)))
    check({"out": out, "mean": mean, "rstd": rstd}, oracle.layernorm, x, weight, bias)


@pytest.mark.parametrize("dtype,grad", MIXED)
@pytest.mark.parametrize("N,C", ROWS[1:] + BACKWARD_ROWS)
def test_layernorm_backward_adds(backend, rng, dtype, grad, N, C):
    x, dout, weight = (rounded(rng.standard_normal(s), dtype) for s in [(N, C), (N, C), C])
    before = [rounded(rng.standard_normal(s), d) for s, d in [((N, C), dtype), (C, grad), (C, grad), (C, grad)]]
    _, mean, rstd = oracle.layernorm(x, weight, weight)
    t = [put(backend, a, dtype) for a in (dout, x, weight)]
    t += [put(backend, mean), put(backend, rstd)]

    def gradients():
        return [put(backend, b, d) for b, d in zip(before, (dtype, grad, grad, grad))]

    dinp, dweight, dbias, dinp_sum = gradients()
    backend.layernorm_backward(dinp, dweight, dbias, dinp_sum, *t)

    def formula(a, b, c, *operands):
        return tuple(p + q for p, q in zip((a, b, c), oracle.layernorm_gradient(*operands)))

    check({"dinp": dinp, "dweight": dweight, "dbias": dbias}, formula, *before[:3], dout, x, weight)
    # The sum is of dinp as it was stored.
    check({"dinp_sum": dinp_sum}, lambda a, b: (a + b.sum(axis=0),), before[3], rounded(get(dinp), dtype), ulps=2)
    without = gradients()[:3]
    backend.layernorm_backward(*without, None, *t)
    for x, y in zip((dinp, dweight, dbias), without):
        np.testing.assert_array_equal(x.to_host(), y.to_host())


@pytest.mark.parametrize("dtype,grad", MIXED)
def test_layernorm_backward_of_one_channel(backend, dtype, grad):
    """Its output is the bias whatever comes in: the gradient is 0, but for rounding, which rstd = 1/sqrt(eps) magnifies."""
    dout, inp, weight = (rounded([x], dtype) for x in (0.7, 1.3, 0.9))
    t = [*(put(backend, x, dtype) for x in (dout, inp, weight)), put(backend, inp), put(backend, [1e-5**-0.5])]
    dinp, dweight, dbias = put(backend, [0.0], dtype), put(backend, [0.0], grad), put(backend, [0.0], grad)
    backend.layernorm_backward(dinp, dweight, dbias, None, *t)
    assert abs(get(dinp)[0]) <= 2**-23 * 0.7 * 0.9 * 1e-5**-0.5
    assert get(dweight)[0] == 0 and rounded(get(dbias), grad)[0] == rounded(dout, grad)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N,C", ROWS + LONG_ROWS)
def test_fused_residual_layernorm_is_its_parts(backend, rng, dtype, N, C):
    values = [rounded(rng.standard_normal(s), dtype) for s in [(N, C), (N, C), C, C]]
    a, b, weight, bias = (put(backend, x, dtype) for x in values)
    fused = [nans(backend, (N, C), dtype), nans(backend, (N, C), dtype), nans(backend, N), nans(backend, N)]
    parts = [nans(backend, (N, C), dtype), nans(backend, (N, C), dtype), nans(backend, N), nans(backend, N)]
    backend.fused_residual_layernorm_forward(*fused, a, b, weight, bias)
    backend.residual_forward(parts[0], a, b)
    backend.layernorm_forward(*parts[1:], parts[0], weight, bias)
    for x, y in zip(fused, parts):
        np.testing.assert_array_equal(x.to_host(), y.to_host())
    np.testing.assert_array_equal(rounded(get(fused[0]), "f32"), rounded(values[0] + values[1], dtype))


# ---- matmul ----

# N, C, OC: up to 8 rows go through another kernel than more; the last is larger than every block.
MATMULS = [(1, 1, 1), (1, 64, 50), (5, 33, 17), (8, 40, 33), (9, 7, 3), (33, 65, 40), (33, 64, 40), (64, 48, 96)]
MATMULS += [(70, 56, 24), (130, 257, 129), (300, 96, 600)]
# Up to 16 rows go through a kernel of their own on a GPU: by C how often its warps load, by OC how many columns a block takes.
FEW_ROWS = [(1, 768, 20), (2, 1032, 17), (3, 3208, 9), (8, 24, 8200), (9, 264, 70), (16, 1048, 33), (17, 264, 24)]
MANY_ROWS = [(300, 40, 20), (2600, 8, 33)]  # whose bias gradient is summed in several blocks


@pytest.mark.parametrize("dtype,out_dtype", MIXED)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("N,C,OC", MATMULS + FEW_ROWS)
def test_matmul_forward(backend, rng, dtype, out_dtype, with_bias, N, C, OC):
    x, weight, bias = (rounded(rng.standard_normal(s), dtype) for s in [(N, C), (OC, C), OC])
    out = nans(backend, (N, OC), out_dtype)
    operands = [x, weight, bias] if with_bias else [x, weight]
    backend.matmul_forward(out, *(put(backend, t, dtype) for t in operands))
    check({"out": out}, oracle.matmul, *operands, ulps=2 + C // 1024)  # tensor cores add in an order of their own


@pytest.mark.parametrize("dtype,grad", MIXED)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("N,C,OC", MATMULS + MANY_ROWS)
def test_matmul_backward(backend, rng, dtype, grad, accumulate, N, C, OC):
    dout, x, weight = (rounded(rng.standard_normal(s), dtype) for s in [(N, OC), (N, C), (OC, C)])
    before = [rounded(rng.standard_normal(s), grad) for s in [(OC, C), OC]]
    dinp = nans(backend, (N, C), dtype)
    dweight, dbias = (put(backend, b, grad) if accumulate else nans(backend, b.shape, grad) for b in before)
    backend.matmul_backward(dinp, dweight, dbias, *(put(backend, t, dtype) for t in (dout, x, weight)), accumulate)

    def formula(a, b, *operands):
        dx, dw, db = oracle.matmul_gradient(*operands)
        return (dx, a + dw, b + db) if accumulate else (dx, dw, db)

    check({"dinp": dinp, "dweight": dweight, "dbias": dbias}, formula, *before, dout, x, weight, ulps=2)


def test_matmul_backward_of_a_part(backend, rng):
    """A gradient that is None is not computed, and the others are the same without it."""
    shapes = [(9, 5), (3, 5), (3,)]
    dout, x, weight = (put(backend, rng.standard_normal(s)) for s in [(9, 3), (9, 5), (3, 5)])
    full = [nans(backend, s) for s in shapes]
    backend.matmul_backward(*full, dout, x, weight, False)
    for keep in range(3):
        part = [nans(backend, s) if i == keep else None for i, s in enumerate(shapes)]
        backend.matmul_backward(*part, dout, x, weight, False)
        np.testing.assert_array_equal(get(part[keep]), get(full[keep]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N,C,OC", MATMULS + FEW_ROWS)
def test_matmul_gelu_forward(backend, rng, dtype, N, C, OC):
    x, weight, bias = (rounded(rng.standard_normal(s), dtype) for s in [(N, C), (OC, C), OC])
    out, pre = nans(backend, (N, OC), dtype), nans(backend, (N, OC), dtype)
    t = [put(backend, a, dtype) for a in (x, weight, bias)]
    backend.matmul_gelu_forward(out, pre, *t)

    def formula(*operands):
        p = oracle.matmul(*operands)
        return oracle.gelu(p), p

    check({"out": out, "pre": pre}, formula, x, weight, bias, ulps=2 + C // 1024)
    parts = nans(backend, (N, OC), dtype)
    backend.matmul_forward(parts, *t)
    np.testing.assert_array_equal(pre.to_host(), parts.to_host())


@pytest.mark.parametrize("dtype,grad", MIXED)
@pytest.mark.parametrize("N,C,OC", MATMULS)
def test_matmul_gelu_backward(backend, rng, dtype, grad, N, C, OC):
    dout, x, weight, pre = (rounded(rng.standard_normal(s), dtype) for s in [(N, OC), (N, C), (OC, C), (N, C)])
    shapes = [((N, C), dtype), ((OC, C), grad), (OC, grad)]
    fused, parts = [nans(backend, *s) for s in shapes], [nans(backend, *s) for s in shapes]
    t = [put(backend, a, dtype) for a in (dout, x, weight, pre)]
    backend.matmul_gelu_backward(*fused, *t, False)

    def formula(dout, x, weight, pre):
        dx, dw, db = oracle.matmul_gradient(dout, x, weight)
        return oracle.gelu_gradient(pre, dx), dw, db

    check(dict(zip(("dinp", "dweight", "dbias"), fused)), formula, dout, x, weight, pre)
    backend.matmul_backward(*parts, *t[:3], False)
    for x, y in zip(fused[1:], parts[1:]):
        np.testing.assert_array_equal(x.to_host(), y.to_host())


# ---- weights that are kept packed ----


def test_packed_weights_follow_their_memory(backend, rng):
    """A weight that weights_changed() named may be kept packed; whatever writes to it, matmuls see the new values."""
    x, first, second = (rng.standard_normal(s) for s in [(20, 64), (96, 64), (96, 64)])
    inp, weight = put(backend, x, "bf16"), put(backend, first, "bf16")

    def matmuls():
        out, dinp = nans(backend, (20, 96), "bf16"), nans(backend, (20, 64), "bf16")
        backend.matmul_forward(out, inp, weight)
        backend.matmul_backward(dinp, None, None, out, None, weight, False)
        return np.concatenate([out.to_host(), dinp.to_host()], axis=1)

    def fresh():
        """The same from memory that was never named, and so is never packed."""
        unnamed = put(backend, get(weight), "bf16")
        out, dinp = nans(backend, (20, 96), "bf16"), nans(backend, (20, 64), "bf16")
        backend.matmul_forward(out, inp, unnamed)
        backend.matmul_backward(dinp, None, None, out, None, unnamed, False)
        return np.concatenate([out.to_host(), dinp.to_host()], axis=1)

    backend.weights_changed(weight)
    seen = [matmuls()]
    np.testing.assert_array_equal(seen[-1], fresh())
    np.testing.assert_array_equal(matmuls(), seen[-1])
    zeros = [backend.empty([96 * 64]) for _ in range(2)]
    step = _llmc.AdamWStep(1e-1, 0.9, 0.95, 1e-8, 0.0, 0.1, 0.05)
    writers = [
        lambda: weight.from_host(put(backend, second, "bf16").to_host()),
        lambda: weight.write(64 * 95, put(backend, first[0], "bf16").to_host()),
        lambda: backend.copy(weight, put(backend, first)),
        lambda: backend.adamw(weight, None, *zeros, put(backend, second, "bf16"), put(backend, [1.0]), step),
        lambda: backend.adamw_many(
            [_llmc.AdamWOperands(weight, None, *zeros, put(backend, first, "bf16"))], put(backend, [1.0]), step
        ),
        lambda: backend.zero(weight),
    ]
    for write in writers:
        write()
        seen.append(matmuls())
        np.testing.assert_array_equal(seen[-1], fresh())
        assert (seen[-1] != seen[-2]).any()


# ---- attention ----

# B, T, NH, HS: every head size of llm.c's descriptors, odd ones, and T around the sizes of the kernels' blocks.
ATTENTIONS = [
    (1, 1, 1, 1),
    (2, 1, 2, 64),
    (2, 7, 3, 11),
    (1, 33, 2, 16),
    (1, 70, 1, 33),
    (2, 48, 1, 64),
    (1, 49, 2, 80),
    (1, 97, 1, 96),
    (1, 130, 2, 128),
    (1, 65, 1, 127),
    (1, 70, 2, 16),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B,T,NH,HS", [*ATTENTIONS, (1, 1090, 1, 4)])  # the last: several tasks for a head
def test_attention_forward(backend, rng, dtype, B, T, NH, HS):
    qkv = rounded(rng.standard_normal((B, T, 3 * NH * HS)), dtype)
    out, lse = nans(backend, (B, T, NH * HS), dtype), nans(backend, (B, NH, T))
    backend.attention_forward(out, lse, put(backend, qkv, dtype), NH)
    check({"out": out, "lse": lse}, oracle.attention, qkv, NH, ulps=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B,T,NH,HS", ATTENTIONS)
def test_attention_backward(backend, rng, dtype, B, T, NH, HS):
    """out and lse come from the oracle, so that backward is not judged by an error of forward."""
    qkv, dout = (rounded(rng.standard_normal((B, T, c * NH * HS)), dtype) for c in (3, 1))
    out, lse = oracle.attention(qkv, NH)
    out, lse = rounded(out, dtype), rounded(lse, "f32")
    dqkv = nans(backend, (B, T, 3 * NH * HS), dtype)
    t = [put(backend, x, dtype) for x in (dout, qkv, out)]
    backend.attention_backward(dqkv, *t, put(backend, lse), NH)
    if T == 1:  # dq and dk are sums whose terms cancel to 0, but for rounding: they are judged together with dv
        together = lambda *a: np.concatenate(oracle.attention_gradient(*a), axis=-1)  # noqa: E731
        check({"dqkv": dqkv}, together, dout, qkv, out, lse, NH, ulps=4)
    else:
        parts = [put(backend, x, dtype) for x in np.split(get(dqkv), 3, axis=-1)]
        check(dict(zip(("dq", "dk", "dv"), parts)), oracle.attention_gradient, dout, qkv, out, lse, NH, ulps=2)


def test_attention_of_large_scores(backend, rng):
    """With scores of several hundred the softmax neither overflows nor loses its sum."""
    qkv = rounded(rng.standard_normal((1, 40, 3 * 16)) * 25, "f32")
    out, lse = nans(backend, (1, 40, 16)), nans(backend, (1, 1, 40))
    backend.attention_forward(out, lse, put(backend, qkv), 1)
    check({"out": out, "lse": lse}, oracle.attention, qkv, 1, ulps=2)


def test_attention_is_causal(backend, rng):
    """A change of later positions does not change a single bit of forward's earlier outputs."""
    qkv = rng.standard_normal((1, 60, 3 * 32))
    changed = qkv.copy()
    changed[:, 37:] = 1e4
    outs = []
    for x in (qkv, changed):
        out, lse = nans(backend, (1, 60, 32)), nans(backend, (1, 1, 60))
        backend.attention_forward(out, lse, put(backend, x), 1)
        outs.append(np.concatenate([get(out)[0, :37], get(lse)[0, 0, :37, None]], axis=1))
    np.testing.assert_array_equal(*outs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("NH,HS", [(1, 1), (3, 11), (4, 16), (2, 64), (1, 80), (1, 128), (1, 256)])
@pytest.mark.parametrize("maxT,first", [(50, [0, 3]), (1200, [127, 128])])  # on a GPU a block takes 128 keys
def test_attention_decode(backend, rng, dtype, T, NH, HS, maxT, first):
    B = 3
    start = np.array([*first, maxT - T])
    caches = rounded(rng.standard_normal((2, B, NH, maxT, HS)), dtype)
    qkv = rounded(rng.standard_normal((B, T, 3 * NH * HS)), dtype)
    t = [put(backend, x, dtype) for x in caches]
    out = nans(backend, (B, T, NH * HS), dtype)
    backend.attention_decode(out, *t, put(backend, qkv, dtype), put(backend, start, "i32"), NH)

    q, k, v = (oracle.heads(x, NH) for x in np.split(qkv, 3, axis=-1))
    for b, s in enumerate(start):
        caches[0, b, :, s : s + T], caches[1, b, :, s : s + T] = k[b], v[b]
    for tensor, cache in zip(t, caches):
        np.testing.assert_array_equal(rounded(get(tensor), "f32"), cache)

    def formula(q, keys, values):
        rows = []
        for b, s in enumerate(start):
            p, _ = oracle.probabilities(q[b], keys[b, :, : s + T])
            rows.append(p @ values[b, :, : s + T])
        return oracle.merge(np.stack(rows))

    check({"out": out}, formula, q, *caches, ulps=2 + maxT // 600)


def test_attention_decode_refuses_positions_beyond_the_cache():
    cpu = _llmc.Backend("cpu")
    cache = [cpu.empty([1, 1, 4, 8]) for _ in range(2)]
    with pytest.raises(ValueError, match="3.*5.* 4"):
        cpu.attention_decode(cpu.empty([1, 2, 8]), *cache, cpu.empty([1, 2, 24]), put(cpu, [3], "i32"), 1)


# ---- elementwise ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (33,), (5, 64), (3, 1000), (3, 7, 1001)])
def test_gelu_and_residual(backend, rng, dtype, shape):
    x, d = rounded(rng.standard_normal(shape) * 3, dtype), rounded(rng.standard_normal(shape), dtype)
    tx, td = put(backend, x, dtype), put(backend, d, dtype)
    y, dx, r = (nans(backend, shape, dtype) for _ in range(3))
    backend.gelu_forward(y, tx)
    backend.gelu_backward(dx, tx, td)
    backend.residual_forward(r, tx, td)
    check({"gelu": y}, oracle.gelu, x)
    check({"dinp": dx}, oracle.gelu_gradient, x, d)
    check({"sum": r}, np.add, x, d)
    in_place = put(backend, d, dtype)
    backend.gelu_backward(in_place, tx, in_place)
    np.testing.assert_array_equal(in_place.to_host(), dx.to_host())
    backend.residual_forward(tx, tx, td)
    np.testing.assert_array_equal(tx.to_host(), r.to_host())


def test_gelu_far_out(backend):
    x = np.float32([-1e8, -50.0, -9.0, 0.0, 9.0, 50.0, 1e8])
    y, dx = nans(backend, 7), nans(backend, 7)
    backend.gelu_forward(y, put(backend, x))
    backend.gelu_backward(dx, put(backend, x), put(backend, np.ones(7)))
    # From 9 on, tanh differs from 1 by less than f32 can tell.
    np.testing.assert_allclose(get(y), [0, 0, 0, 0, 9, 50, 1e8], rtol=2**-23, atol=1e-15)
    np.testing.assert_allclose(get(dx), [0, 0, 0, 0.5, 1, 1, 1], rtol=2**-23, atol=1e-12)


def test_gelu_is_exact_near_zero(backend):
    """Small inputs keep their relative precision."""
    x = np.float32([1e-3, -1e-4, 1e-6, 3e-9])
    y = nans(backend, 4)
    backend.gelu_forward(y, put(backend, x))
    np.testing.assert_allclose(get(y), oracle.gelu(x.astype(np.float64)), rtol=2**-22)


# ---- classifier ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "N,V,Vp",
    [(1, 1, 1), (1, 1, 128), (3, 5, 5), (5, 50, 128), (7, 4999, 5120), (2, 77, 77), (2, 77, 79)]
    + [(2, 8192, 8192), (3, 12301, 12352), (2, 9001, 9001)],  # more than CUDA keeps of a row
)
def test_classifier(backend, rng, dtype, N, V, Vp):
    x = rng.standard_normal((N, Vp)) * 4
    x[:, V:] = 1e4  # the padding must not count
    x = rounded(x, dtype)
    targets, dloss = rng.integers(0, V, N), 0.37
    targets[N // 2] = -1
    tt = put(backend, targets, "i32")
    logits, losses = put(backend, x, dtype), nans(backend, N)
    backend.crossentropy_forward(losses, logits, tt, V)
    np.testing.assert_array_equal(rounded(get(logits), "f32"), x)
    backend.crossentropy_softmax_backward(logits, tt, dloss, V)

    check({"losses": losses}, oracle.crossentropy, x, targets, V, ulps=2)
    check({"dlogits": logits}, oracle.crossentropy_gradient, x, targets, dloss, V, ulps=4)
    assert not rounded(get(logits), "f32")[:, V:].any()
    assert get(losses)[N // 2] == 0 and not rounded(get(logits), "f32")[N // 2].any()

    fused_losses, fused_logits = nans(backend, N), put(backend, x, dtype)
    backend.fused_classifier(fused_losses, fused_logits, tt, dloss, V)
    np.testing.assert_array_equal(fused_losses.to_host(), losses.to_host())
    np.testing.assert_array_equal(fused_logits.to_host(), logits.to_host())


@pytest.mark.parametrize("dtype", DTYPES)
def test_classifier_writes_only_one_element_of_the_target(backend, rng, dtype):
    """All other gradients are, bit for bit, what they are with another target: at the target's neighbours, and in the next row."""
    V = 37
    logits = put(backend, np.tile(rng.standard_normal(V), (V, 1)), dtype)
    targets = np.arange(V)[::-1]  # the first row's target is the last element before the second row
    backend.crossentropy_softmax_backward(logits, put(backend, targets, "i32"), 0.5, V)
    gradients = rounded(get(logits), "f32")
    gradients[np.arange(V), targets] = np.nan
    np.testing.assert_array_equal(np.nanmin(gradients, axis=0), np.nanmax(gradients, axis=0))


def test_classifier_of_a_hopeless_target(backend):
    """A loss of 300 is finite, though the probability of the target is too small for a float."""
    x = np.zeros((2, 16))
    x[:, 3] = 300.0
    losses, logits = nans(backend, 2), put(backend, x)
    backend.fused_classifier(losses, logits, put(backend, [0, 3], "i32"), 1.0, 10)
    assert get(losses).tolist() == [300.0, 0.0]
    # e^-300 is too small for a float: kernels give a number of about the smallest normal float in its place.
    np.testing.assert_allclose(get(logits)[0, :4], [-1.0, 0.0, 0.0, 1.0], atol=2.0**-125)


def test_classifier_refuses_other_targets():
    cpu = _llmc.Backend("cpu")
    with pytest.raises(ValueError, match="target 10"):
        cpu.fused_classifier(cpu.empty([2]), cpu.empty([2, 16]), put(cpu, [0, 10], "i32"), 1.0, 10)


# ---- sampling ----


@pytest.mark.parametrize("options", [(0.0,), (1.0,), (0.8, 3), (1.0, 0, 0.7)])
def test_sample_is_the_samplers_choice_for_each_row(backend, rng, options):
    """The sampler itself is judged in test_random.py. The padding behind V is not looked at."""
    N, V, Vp = 9, 31, 40
    logits, coins = (3 * rng.standard_normal((N, Vp))).astype(np.float32), rng.random(N, dtype=np.float32)
    logits[:, V:] = np.nan
    tokens = put(backend, np.full(N, -7), "i32")
    backend.sample(tokens, put(backend, logits), put(backend, coins), V, _llmc.SamplerOptions(*options))
    wanted = [_llmc.sample(row[:V], float(coin), *options) for row, coin in zip(logits, coins)]
    assert get(tokens).tolist() == wanted and len(set(wanted)) > 1


# ---- sums ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 33, 16384, 70_001, 600_001])
def test_sums_add(backend, rng, dtype, n):
    x = rounded(rng.standard_normal(n), dtype)
    squares, total = put(backend, [0.5]), put(backend, [0.25])
    backend.global_norm_squared(squares, put(backend, x, dtype))
    backend.sum(total, put(backend, x), 3.0)
    # Blocks of a few thousand elements are summed in f32, the blocks' sums in double: a few rounding errors, whatever the size.
    assert abs(get(squares)[0] - (0.5 + (x * x).sum())) <= 2**-21 * (0.5 + (x * x).sum())
    assert abs(get(total)[0] - (0.25 + 3 * x.sum())) <= 2**-23 * (0.25 + 3 * np.abs(x).sum())


@pytest.mark.parametrize(
    "squared,max_norm,norm,factor",
    [(4.0, 1.0, 2.0, 0.5), (0.25, 1.0, 0.5, 1.0), (1.0, 1.0, 1.0, 1.0), (0.0, 1.0, 0.0, 1.0), (9.0, 0.0, 3.0, 1.0)]
    + [(9.0, -1.0, 3.0, 1.0), (np.inf, 1.0, np.inf, np.nan), (np.nan, 1.0, np.nan, np.nan)]
    + [(np.nan, 0.0, np.nan, np.nan)],
)
def test_clip_factor(backend, squared, max_norm, norm, factor):
    digits = np.zeros(_llmc.NORM_DIGITS)
    digits[_llmc.UNIT_DIGIT] = np.floor(squared)
    digits[_llmc.UNIT_DIGIT - 1] = (squared % 1) * 2**16 if np.isfinite(squared) else 0
    for form in ([squared], digits):
        n, f = nans(backend, 1), put(backend, [7.0])
        backend.clip_factor(n, f, put(backend, form), max_norm)
        np.testing.assert_array_equal([np.isfinite(get(n)[0]), get(f)[0]], [np.isfinite(norm), factor])
        assert not np.isfinite(norm) or get(n)[0] == norm


# ---- the norm of all gradients ----


def number_in(digits):
    """Return the number that digits stand for, times 2^320, which is whole."""
    return sum(int(d) << 16 * k for k, d in enumerate(digits))


def norm_digits(backend, *gradients, out=None):
    out = out or backend.empty([_llmc.NORM_DIGITS])
    backend.gradient_norm_squared(out, list(gradients))
    return out


def norm_and_factor(backend, digits):
    norm, factor = nans(backend, 1), nans(backend, 1)
    backend.clip_factor(norm, factor, put(backend, digits), 1.0)
    return get(norm)[0], get(factor)[0]


@pytest.mark.parametrize("dtype,other", [("f32", "f32"), ("f32", "bf16"), ("bf16", "bf16")])
@pytest.mark.parametrize("sizes", [(), (0,), (1,), (33,), (1024, 1, 1025), (70_001, 16384, 33), (5,) * 150])
def test_gradient_norm_squared_adds(backend, rng, dtype, other, sizes):
    """Of tensors in any number, of both dtypes, at any address."""
    out, squares = norm_digits(backend, put(backend, [0.5])), 0.25
    for times in range(2):
        gradients = []
        for i, n in enumerate(sizes):
            kind = other if i % 2 else dtype
            x = rounded(rng.standard_normal((2, n)), kind)
            gradients.append(put(backend, x, kind)[times])  # the second row, of an odd n, is not aligned
            squares += (x[times] ** 2).sum()
        norm_digits(backend, *gradients, out=out)
        assert abs(number_of(get(out)) - squares) <= 2**-21 * squares
        norm, factor = norm_and_factor(backend, get(out))
        np.testing.assert_allclose([norm, factor], [squares**0.5, min(1, squares**-0.5)], rtol=2**-21)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_norm_of_a_gradient_that_is_not_finite(backend, rng, dtype, bad):
    """Also if the rest is added in other calls, or by other ranks."""
    x = rng.standard_normal(5000)
    x[3000] = bad  # the square of 1e30 is infinite in f32
    good = put(backend, rng.standard_normal(5000), dtype)
    out = norm_digits(backend, good, put(backend, x, dtype), good)
    norm_digits(backend, good, out=out)
    for digits in (get(out), get(out) + get(norm_digits(backend, good))):
        norm, factor = norm_and_factor(backend, digits)
        assert not np.isfinite(norm) and np.isnan(factor)


@pytest.fixture(scope="module", params=KERNEL_SETS)
def isa(request):
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_is_the_same_on_any_threads_ranks_and_pieces(isa, rng, dtype):
    """Its digits are the sum of those of blocks of 1024 elements, without an error."""
    shapes = [70_001, 1024, 3000, 5, 600_001, 1025]
    scales = [2.0 ** rng.integers(-30, 30, n // 1000 + 1).repeat(1000)[:n] for n in shapes]
    values = [rng.standard_normal(n) * scale for n, scale in zip(shapes, scales)]

    def digits_of(pieces, threads=2):
        backend = make_backend(isa, threads)
        return get(norm_digits(backend, *(put(backend, x, dtype) for x in pieces)))

    one = digits_of(values, 1)
    backend = make_backend(isa)
    exact = sum((rounded(x, dtype) ** 2).sum() for x in values)
    assert abs(number_of(one) - exact) <= 2**-21 * exact
    assert one.max() < 2**16 and one.min() == 0 and (one > 0).sum() > 4
    blocks = [x[i : i + 1024] for x in values[:4] for i in range(0, len(x), 1024)]
    assert number_in(digits_of(values[:4])) == sum(number_in(digits_of([b])) for b in blocks)
    for ranks in (2, 3, 4):
        pieces = [[] for _ in range(ranks)]
        for x in values:
            cuts = sorted(rng.integers(0, len(x) // 1024 + 1, ranks - 1) * 1024)
            for i, piece in enumerate(np.split(x, cuts)):
                pieces[i].append(piece)
        total = np.zeros(_llmc.NORM_DIGITS, np.float32)
        for mine in rng.permutation(ranks):
            total += digits_of([pieces[mine][i] for i in rng.permutation(len(values))], ranks)
        assert number_in(total) == number_in(one)
        assert norm_and_factor(backend, total) == norm_and_factor(backend, one)
        # Adding to digits that are a sum writes the one form of the sum.
        np.testing.assert_array_equal(get(norm_digits(backend, out=put(backend, total))), one)


def test_norm_has_the_range_of_f32(isa):
    """Squares from 2^-126 to 2^126 beside each other, none of which is lost; and sums of digits over 256 ranks."""
    cpu = make_backend(isa)
    out = get(norm_digits(cpu, *(put(cpu, [2.0**e]) for e in (-63, 0, 63, 63))))
    assert number_in(out) == (1 << 320 - 126) + (1 << 320) + (1 << 320 + 127)
    full = np.full(_llmc.NORM_DIGITS, 2.0**16 - 1, np.float32)
    full[_llmc.UNIT_DIGIT + 15 :] = 0  # below the square of the largest f32
    total = np.zeros_like(full)
    for _ in range(256):
        total += full
    assert number_in(total) == 256 * number_in(full)
    out = put(cpu, total)
    norm_digits(cpu, out=out)
    assert number_in(get(out)) == 256 * number_in(full) and get(out).max() < 2**16
    norm, _ = norm_and_factor(cpu, total)
    assert norm == np.float32(2.0**124)
    # A sum of 2^320 has no digits.
    assert not np.isfinite(get(norm_digits(cpu, out=put(cpu, np.full(_llmc.NORM_DIGITS, 2.0**17))))).all()


# ---- AdamW of many tensors ----


@pytest.mark.parametrize("dtype,grad", MIXED)
@pytest.mark.parametrize("master", [False, True])
def test_adamw_many_is_adamw_of_each(backend, rng, dtype, grad, master):
    """To the bit, for more tensors than a kernel takes at once, of any size and address, with decays, seeds and places of their own."""
    if master and dtype == "f32":
        pytest.skip("f32 weights have no master")
    sizes = [1, 33, 40_001, 0, 1024, 7, 2056, *[3] * 60]
    factor, operands, expected = put(backend, [0.5]), [], []
    for i, n in enumerate(sizes):
        values = [rng.standard_normal((2, n)) for _ in range(4)]
        values[2] **= 2
        kinds, row = (dtype, "f32", "f32", grad), int(i % 3 == 1)
        bits = rng.integers(-(2**15), 2**15, (2, n))
        decay, seed, first = 0.1 * i, 7 + i, 1000 * i
        both = []
        for _ in range(2):
            param, m, v, g = (put(backend, x, kind)[row] for x, kind in zip(values, kinds))
            both.append((param, put(backend, bits, "i16")[row] if master else None, m, v, g))
        operands.append(_llmc.AdamWOperands(*both[0], decay, seed, first))
        step = _llmc.AdamWStep(1e-2, 0.9, 0.95, 1e-8, decay, 0.1, 0.05, seed, first)
        backend.adamw(*both[1], factor, step)
        expected += [pair for pair in zip(*both) if pair[0]]
    before = [x.to_host() for x, _ in expected]
    step = _llmc.AdamWStep(1e-2, 0.9, 0.95, 1e-8, 7.0, 0.1, 0.05, 1234, 5678)
    backend.adamw_many(operands, put(backend, [np.nan]), step)
    for (x, _), old in zip(expected, before):
        np.testing.assert_array_equal(x.to_host(), old)
    backend.adamw_many(operands, factor, step)
    changed = 0
    for (x, y), old in zip(expected, before):
        np.testing.assert_array_equal(x.to_host(), y.to_host())
        changed += (x.to_host() != old).sum()
    assert changed > 2 * sum(sizes)
    backend.adamw_many([], factor, step)


def test_adamw_many_of_several_dtypes(backend, rng):
    """In one call."""
    factor, step = put(backend, [1.0]), _llmc.AdamWStep(1e-2, 0.9, 0.95, 1e-8, 0.0, 0.1, 0.05)
    kinds = [
        (dtype, grad, master) for dtype, grad in MIXED for master in (False, True) if dtype == "bf16" or not master
    ]
    many, each = [], []
    for dtype, grad, master in kinds:
        values = [rng.standard_normal(100), np.zeros(100), np.zeros(100), rng.standard_normal(100)]
        for made in (many, each):
            param, m, v, g = (put(backend, x, kind) for x, kind in zip(values, (dtype, "f32", "f32", grad)))
            made.append((param, backend.empty([100], "i16") if master else None, m, v, g))
    backend.adamw_many([_llmc.AdamWOperands(*t) for t in many], factor, step)
    for i, t in enumerate(each):
        backend.adamw(*t, factor, step)
        for x, y in zip(t, many[i]):
            if x:
                np.testing.assert_array_equal(x.to_host(), y.to_host())


def test_parts_of_a_tensor_are_rounded_as_the_whole(backend, rng):
    """Stochastic rounding goes by an element's place in the tensor, which `first` tells."""
    n, cut = 5000, 1024
    step = _llmc.AdamWStep(1e-1, 0.9, 0.95, 1e-8, 0.0, 0.1, 0.05, 11)
    values, factor = [rng.standard_normal(n), rng.standard_normal(n)], put(backend, [1.0])
    whole = [put(backend, values[0], "bf16"), None, backend.empty([n]), backend.empty([n]), put(backend, values[1])]
    backend.adamw(*whole, factor, step)
    parts = []
    for begin, end in ((0, cut), (cut, n)):
        param, g = put(backend, values[0][begin:end], "bf16"), put(backend, values[1][begin:end])
        m, v = backend.empty([end - begin]), backend.empty([end - begin])
        parts.append(_llmc.AdamWOperands(param, None, m, v, g, 0.0, 11, begin))
    backend.adamw_many(parts, factor, step)
    np.testing.assert_array_equal(np.concatenate([p.param.to_host() for p in parts]), whole[0].to_host())


# ---- Muon ----


@pytest.mark.parametrize("dtype,grad", MIXED)
@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_momentum(backend, rng, dtype, grad, nesterov):
    for n in (1, 33, 20_001):
        m, g = rounded(rng.standard_normal(n), "f32"), rounded(rng.standard_normal(n), grad)
        out, moment = nans(backend, n, dtype), put(backend, m)
        backend.muon_momentum(out, moment, put(backend, g, grad), put(backend, [0.5]), 0.9, nesterov)
        beta = float(np.float32(0.9))
        check({"out": out, "m": moment}, oracle.muon_momentum, m, g, 0.5, beta, nesterov, ulps=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_muon_update(backend, rng, dtype):
    numbers = [float(np.float32(x)) for x in (1e-2, 3.2, 0.1)]
    for n in (1, 33, 20_001):
        weights, direction = rounded(rng.standard_normal(n), "f32"), rounded(rng.standard_normal(n), dtype)
        high, low = split_master(weights.astype(np.float32))
        param, master = put(backend, weights, dtype), None
        if dtype == "bf16":
            param.from_host(high)
            master = put(backend, low, "i16")
        backend.muon_update(
            param, master, put(backend, direction, dtype), put(backend, [0.5]), _llmc.MuonStep(*numbers)
        )
        found = get(param) if master is None else join_master(param.to_host(), master.to_host())
        check({"param": found}, oracle.muon_update, weights, direction, *numbers, ulps=2)


def test_muon_rounds_parts_of_a_tensor_as_the_whole(backend, rng):
    """Without a master a weight is rounded up or down by its place in the tensor and the seed."""
    weights, direction, factor = rng.standard_normal(5000), rng.standard_normal(5000), put(backend, [1.0])
    rounds = []
    for parts, seed in ([(0, 5000)], 7), ([(0, 1024), (1024, 5000)], 7), ([(0, 5000)], 8):
        done = []
        for begin, end in parts:
            param = put(backend, weights[begin:end], "bf16")
            step = _llmc.MuonStep(1e-2, 1.0, 0.1, seed, begin)
            backend.muon_update(param, None, put(backend, direction[begin:end], "bf16"), factor, step)
            done.append(param.to_host())
        rounds.append(np.concatenate(done))
    np.testing.assert_array_equal(rounds[0], rounds[1])
    assert 0.2 < (rounds[0] != rounds[2]).mean() < 0.8
    w, d = rounded(weights, "bf16"), rounded(direction, "bf16")
    exact = oracle.muon_update(w, d, 1e-2, 1.0, 0.1)
    found = rounded((rounds[0].astype(np.uint32) << 16).view(np.float32), "f32")
    assert (np.abs(found - exact) <= 2**-7 * np.abs(exact) + 1e-6).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [np.nan, np.inf])
def test_muon_leaves_everything_alone_if_the_factor_is_not_finite(backend, rng, dtype, factor):
    values = rng.standard_normal((4, 40))
    out, param, direction = (put(backend, x, dtype) for x in values[:3])
    m, f = put(backend, values[3]), put(backend, [factor])
    before = [t.to_host() for t in (out, param, m)]
    backend.muon_momentum(out, m, direction, f, 0.9, True)
    backend.muon_update(param, None, direction, f, _llmc.MuonStep(1e-2, 1.0, 0.1))
    for t, old in zip((out, param, m), before):
        np.testing.assert_array_equal(t.to_host(), old)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_and_shifted_sum(backend, rng, dtype):
    for n in (1, 33, 130):
        x, y = (rounded(0.1 * rng.standard_normal((n, n)), dtype) for _ in range(2))  # nothing cancels on the diagonal
        tx, ty, out = put(backend, x, dtype), put(backend, y, dtype), nans(backend, (n, n), dtype)
        backend.scale(out, tx, put(backend, [0.25]), 3.0)
        check({"scale": out}, lambda x: 0.75 * x, x)
        for place in (out, ty):  # which may be one of the operands
            backend.shifted_sum(place, tx, ty, 3.5, -2.25, 1.75)
            check({"shifted_sum": place}, lambda x, y: 3.5 * np.eye(len(x)) - 2.25 * x + 1.75 * y, x, y, ulps=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 33), (33, 1), (33, 33), (40, 96), (130, 65)])
def test_newton_schulz(backend, rng, dtype, shape):
    """An iteration, and in f32 several, which bring the singular values near 1 from above and below."""
    x, k = rounded(3 * rng.standard_normal(shape), dtype), min(shape)
    for steps in (1, 2, 5) if dtype == "f32" else (1,):
        out, *grams = (nans(backend, s, dtype) for s in (shape, (k, k), (k, k)))
        norms = nans(backend, _llmc.NORM_DIGITS + 2)
        backend.newton_schulz(out, put(backend, x, dtype), *grams, norms, steps)
        # In bf16, X, the gram matrix and the polynomial are stored, each with half a unit's error.
        check({"out": out}, oracle.newton_schulz, x, steps, ulps=8)


def test_newton_schulz_makes_orthogonal(backend, rng):
    """Singular values of 1 to 1/20 all come out near 1, with the same singular vectors, in bf16 too; zeros stay zeros."""
    u, v = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (24, 40))
    x = (u * np.geomspace(1, 1 / 20, 24)) @ v[:24] * 1e-3
    for dtype, off in ("f32", 1e-4), ("bf16", 0.2):
        for tall in (False, True):
            shape = (40, 24) if tall else (24, 40)
            out, inp = nans(backend, shape, dtype), put(backend, x.T if tall else x, dtype)
            scratch = [backend.empty([24, 24], dtype) for _ in range(2)] + [backend.empty([_llmc.NORM_DIGITS + 2])]
            backend.newton_schulz(out, inp, *scratch, 5)
            y = rounded(get(out), "f32")
            inside = u.T @ (y.T if tall else y) @ v.T[:, :24]
            assert 0.6 < np.diag(inside).min() < np.diag(inside).max() < 1.3
            assert np.abs(inside - np.diag(np.diag(inside))).max() < off
            backend.newton_schulz(out, backend.empty(list(shape), dtype), *scratch, 5)
            assert not rounded(get(out), "f32").any()


# ---- shapes ----

F, I = "f32", "i32"
# For each op: its operands as (shape, dtype), in order, and its scalars. B 2, T 3, C 8, NH 2, OC 6, V 5, Vp 7, maxT 4.
OPERANDS = {
    "encoder_forward": ([((2, 3, 8), F), ((2, 3), I), ((7, 8), F), ((4, 8), F), ((2,), I)], []),
    "encoder_backward": ([((7, 8), F), ((4, 8), F), ((2, 3, 8), F), ((2, 3), I)], []),
    "layernorm_forward": ([((6, 8), F), ((6,), F), ((6,), F), ((6, 8), F), ((8,), F), ((8,), F)], []),
    "layernorm_backward": (
        [((6, 8), F), ((8,), F), ((8,), F), ((8,), F), ((6, 8), F), ((6, 8), F), ((8,), F), ((6,), F), ((6,), F)],
        [],
    ),
    "matmul_forward": ([((6, 6), F), ((6, 8), F), ((6, 8), F), ((6,), F)], []),
    "matmul_backward": ([((5, 8), F), ((6, 8), F), ((6,), F), ((5, 6), F), ((5, 8), F), ((6, 8), F)], [True]),
    "attention_forward": ([((2, 3, 8), F), ((2, 2, 3), F), ((2, 3, 24), F)], [2]),
    "attention_backward": ([((2, 3, 24), F), ((2, 3, 8), F), ((2, 3, 24), F), ((2, 3, 8), F), ((2, 2, 3), F)], [2]),
    "attention_decode": ([((2, 1, 8), F), ((2, 2, 4, 4), F), ((2, 2, 4, 4), F), ((2, 1, 24), F), ((2,), I)], [2]),
    "gelu_forward": ([((6, 8), F), ((6, 8), F)], []),
    "gelu_backward": ([((6, 8), F), ((6, 8), F), ((6, 8), F)], []),
    "residual_forward": ([((6, 8), F), ((6, 8), F), ((6, 8), F)], []),
    "crossentropy_forward": ([((6,), F), ((6, 7), F), ((6,), I)], [5]),
    "crossentropy_softmax_backward": ([((6, 7), F), ((6,), I)], [0.5, 5]),
    "fused_classifier": ([((6,), F), ((6, 7), F), ((6,), I)], [0.5, 5]),
    "sample": ([((6,), I), ((6, 7), F), ((6,), F)], [5, _llmc.SamplerOptions()]),
    "fused_residual_layernorm_forward": (
        [((6, 8), F), ((6, 8), F), ((6,), F), ((6,), F), ((6, 8), F), ((6, 8), F), ((8,), F), ((8,), F)],
        [],
    ),
    "matmul_gelu_forward": ([((5, 6), F), ((5, 6), F), ((5, 8), F), ((6, 8), F), ((6,), F)], []),
    "matmul_gelu_backward": (
        [((5, 8), F), ((6, 8), F), ((6,), F), ((5, 6), F), ((5, 8), F), ((6, 8), F), ((5, 8), F)],
        [True],
    ),
    "sum": ([((1,), F), ((6, 8), F)], [1.0]),
    "global_norm_squared": ([((1,), F), ((6, 8), F)], []),
    "clip_factor": ([((1,), F), ((1,), F), ((1,), F)], [1.0]),
    "adamw": (
        [((6, 8), "bf16"), ((6, 8), "i16"), ((6, 8), F), ((6, 8), F), ((6, 8), F), ((1,), F)],
        [_llmc.AdamWStep(1e-3, 0.9, 0.95, 1e-8, 0.0, 0.1, 0.05)],
    ),
    "adamw_many": (
        [((6, 8), "bf16"), ((6, 8), "i16"), ((6, 8), F), ((6, 8), F), ((6, 8), F), ((1,), F)],
        [_llmc.AdamWStep(1e-3, 0.9, 0.95, 1e-8, 0.0, 0.1, 0.05), 0.0],
    ),
    "gradient_norm_squared": ([((_llmc.NORM_DIGITS,), F), ((6, 8), F), ((5,), "bf16")], []),
    "muon_momentum": ([((6, 8), "bf16"), ((6, 8), F), ((6, 8), F), ((1,), F)], [0.9, True]),
    "muon_update": ([((6, 8), "bf16"), ((6, 8), "i16"), ((6, 8), "bf16"), ((1,), F)], [_llmc.MuonStep(1e-3, 1.0, 0.0)]),
    "scale": ([((6, 8), F), ((6, 8), F), ((1,), F)], [1.0]),
    "shifted_sum": ([((8, 8), F), ((8, 8), F), ((8, 8), F)], [1.0, 2.0, 3.0]),
    "newton_schulz": ([((6, 8), F), ((6, 8), F), ((6, 6), F), ((6, 6), F), ((_llmc.NORM_DIGITS + 2,), F)], [1]),
    "copy": ([((6, 8), F), ((6, 8), "bf16")], []),
}
# Ops that no shape and no dtype is wrong for.
ANY_TENSOR = {"zero", "weights_changed"}


def test_every_op_is_tested():
    """Each method of Backend that takes tensors has a row above, and a test that calls it by its name."""
    methods = {name: method.__doc__ or "" for name, method in vars(_llmc.Backend).items() if not name.startswith("_")}
    ops = {name for name, doc in methods.items() if "Tensor" in doc.split("->")[0]}
    assert ops == OPERANDS.keys() | ANY_TENSOR
    tests = Path(__file__).parents[1]
    text = "".join(
        p.read_text(encoding="utf-8") for folder in ("ops", "training") for p in (tests / folder).glob("*.py")
    )
    for op in ops:
        assert re.search(rf"(?<!_llmc)\.{op}\(", text), f"no test calls {op}"


# Operands whose last extent may be any, as (op, position): inputs of sums, and logits, whose vocabulary may be padded further.
FREE = {("sum", 1), ("global_norm_squared", 1), ("gradient_norm_squared", 1), ("gradient_norm_squared", 2)}
FREE |= {("crossentropy_forward", 1), ("crossentropy_softmax_backward", 0), ("fused_classifier", 1), ("sample", 1)}


def tensors_of(backend, operands):
    return [
        put(backend, np.ones(shape), dtype) if dtype != I else backend.empty(list(shape), I)
        for shape, dtype in operands
    ]


@pytest.mark.parametrize("op", OPERANDS)
def test_shapes_are_checked(op):
    """If an operand has a larger extent or another dtype, ValueError says what came and what would fit."""
    cpu = _llmc.Backend("cpu")
    operands, scalars = OPERANDS[op]
    call_op(cpu, op, tensors_of(cpu, operands), scalars)
    for i, (shape, dtype) in enumerate(operands):
        wrong = [] if (op, i) in FREE else [((*shape[:-1], shape[-1] + 1), dtype)]
        if not (op == "copy" and dtype in DTYPES):
            wrong.append((shape, "i16" if dtype != "i16" else "i32"))
        for bad in wrong:
            t = tensors_of(cpu, [*operands[:i], bad, *operands[i + 1 :]])
            # If two shapes contradict each other, the op may call either of them wrong.
            with pytest.raises(ValueError) as caught:
                call_op(cpu, op, t, scalars)
            message = str(caught.value)
            odd = {str(t[i]).removeprefix("Tensor(").removesuffix(")"), *map(str, bad[0]), str(np.prod(bad[0]))}
            assert any(x in message for x in odd), f"operand {i}: {message}"


def test_message_has_both_shapes():
    cpu = _llmc.Backend("cpu")
    t = tensors_of(cpu, OPERANDS["layernorm_forward"][0])
    with pytest.raises(ValueError, match=r"layernorm_forward: weight is f32 \(5\), expected f32 \(8\)"):
        cpu.layernorm_forward(*t[:4], cpu.empty([5]), t[5])


# Positions of the operands that may be None.
OPTIONAL = {
    "encoder_forward": {4},
    "layernorm_backward": {3},
    "matmul_forward": {3},
    "matmul_backward": {0, 1, 2},
    "matmul_gelu_forward": {4},
    "matmul_gelu_backward": {0, 1, 2, 6},
    "adamw": {1},
    "adamw_many": {1},
    "muon_update": {1},
}


@pytest.mark.parametrize("op", OPERANDS)
def test_missing_operands_are_refused(op):
    """None in place of a tensor that the op needs is a ValueError, also if all extents are 1, so that no shape could contradict."""
    cpu = _llmc.Backend("cpu")
    operands, scalars = OPERANDS[op]
    digits = _llmc.NORM_DIGITS
    stays = {24: 3, digits: digits, digits + 2: digits + 2}  # 3C stays 3C
    ones = [((*[1] * (len(shape) - 1), stays.get(shape[-1], 1)), dtype) for shape, dtype in operands]
    for shapes, numbers in [(operands, scalars), (ones, [1 if isinstance(x, int) else x for x in scalars])]:
        for i in range(len(shapes)):
            t = tensors_of(cpu, shapes)
            call_op(cpu, op, t, numbers)
            t[i] = None
            if i in OPTIONAL.get(op, ()):
                call_op(cpu, op, t, numbers)
            else:
                with pytest.raises(ValueError):
                    call_op(cpu, op, t, numbers)
    with pytest.raises(ValueError, match="missing"):
        cpu.zero(None)


def test_tensors_of_another_backend_are_refused():
    one, other = _llmc.Backend("cpu"), _llmc.Backend("cpu")
    with pytest.raises(ValueError, match="belongs to another backend"):
        one.zero(other.empty([3]))


# ---- threads ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_threads(rng, dtype):
    qkv, dout = rng.standard_normal((2, 150, 3 * 66)), rng.standard_normal((2, 150, 66))
    weight = rng.standard_normal((198, 66))
    results = []
    for threads in (1, 2, 3, 5):
        cpu = make_backend("cpu", threads)
        tq, td, tw = put(cpu, qkv, dtype), put(cpu, dout, dtype), put(cpu, weight, dtype)
        out, lse, dqkv = nans(cpu, (2, 150, 66), dtype), nans(cpu, (2, 2, 150)), nans(cpu, qkv.shape, dtype)
        cpu.attention_forward(out, lse, tq, 2)
        cpu.attention_backward(dqkv, td, tq, out, lse, 2)
        dinp, dw, db = nans(cpu, (2, 150, 66), dtype), nans(cpu, (198, 66)), nans(cpu, 198)
        cpu.matmul_backward(dinp, dw, db, dqkv, out, tw, False)
        norm = put(cpu, [0.0])
        cpu.global_norm_squared(norm, dw)
        results.append([t.to_host() for t in (out, lse, dqkv, dinp, dw, db, norm)])
    for other in results[1:]:
        for a, b in zip(results[0], other):
            np.testing.assert_array_equal(a, b)
