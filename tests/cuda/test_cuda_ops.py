"""What only the CUDA backend has: options, kinds of attention, the device's memory, tokens that it cannot refuse, models beside the CPU's.

Each op against its formula is in test_ops.py and test_optim.py, which run on every backend.
"""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
from oracle import DTYPES, check, error, get, nans, put, rounded

from llmc import _llmc

pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module")
def cpu():
    return _llmc.Backend("cpu", 1)


@pytest.fixture
def options(cuda):
    """Return set_option for one test; options are set back after it."""
    defaults = {"attention": "auto", "tf32": "off", "deterministic": "on", "fused_gelu": "auto"}
    defaults |= {"tune": "off", "bias_gradient": "sum"}
    changed = []

    def set_option(name, value):
        changed.append(name)
        cuda.set_option(name, value)

    yield set_option
    for name in changed:
        cuda.set_option(name, defaults[name])


# ---- memory ----


def test_info(cuda):
    info = cuda.info()
    assert info.name == "cuda:0" and info.isa.startswith("sm_") and 0 < info.free_bytes <= info.total_bytes


def test_denormals_are_rounded_to_bf16(cuda):
    x = np.float32([1e-40, -3e-39])  # the CPU's kernels flush them
    out = nans(cuda, 2, "bf16")
    cuda.copy(out, put(cuda, x))
    np.testing.assert_array_equal(rounded(get(out), "f32"), rounded(x, "bf16"))


def test_host_memory_may_be_reused(cuda, rng):
    """from_host has read the memory when it returns, even if the device is still busy."""
    host = np.empty(3 << 18, np.float32)  # larger than the staging buffers, which are used in turns
    tensors, wanted = [], []
    for _ in range(6):
        host[:] = rng.standard_normal(host.size)
        t = cuda.empty([host.size])
        t.from_host(host)
        tensors.append(t)
        wanted.append(host.copy())
    host[:] = np.nan
    for t, w in zip(tensors, wanted):
        np.testing.assert_array_equal(t.to_host(), w)


def test_out_of_memory_is_an_error_and_passes(cuda):
    with pytest.raises(_llmc.Error, match="out of memory"):
        cuda.empty([1 << 40])
    assert not get(cuda.empty([8])).any()


def test_unknown_choice_of_an_option(cuda):
    with pytest.raises(ValueError, match="attention.*'none'"):
        cuda.set_option("attention", "none")


# ---- encoder ----


def test_encoder_out_of_range_is_nan(cuda, rng):
    out = put(cuda, np.zeros((1, 4, 8)), "f32")
    table = put(cuda, rng.standard_normal((5, 8)), "f32")
    cuda.encoder_forward(out, put(cuda, [[0, -1, 5, 1 << 30]], "i32"), table, table, None)
    np.testing.assert_array_equal(np.isnan(get(out)).all(axis=2)[0], [False, True, True, True])
    dwte, dwpe = put(cuda, np.zeros((5, 8)), "f32"), put(cuda, np.zeros((6, 8)), "f32")
    dout = put(cuda, np.ones((1, 6, 8)), "f32")
    cuda.encoder_backward(dwte, dwpe, dout, put(cuda, [[4, -1, 5, 1 << 30, 4, 0]], "i32"))
    np.testing.assert_array_equal(get(dwte)[:, 0], [1, 0, 0, 0, 2])


# ---- matmul ----

MATMULS = [(1, 1, 1), (5, 33, 17), (64, 48, 96), (33, 64, 40), (1, 64, 50), (70, 56, 24)]  # N, C, OC


def test_tf32_is_less_exact_and_chosen(cuda, rng, options):
    x, w = rng.standard_normal((64, 96)), rng.standard_normal((64, 96))
    exact = rounded(x, "f32") @ rounded(w, "f32").T

    def run():
        out = nans(cuda, (64, 64))
        cuda.matmul_forward(out, put(cuda, x), put(cuda, w), None)
        return error(get(out), exact)[0]

    assert run() < 1e-5
    options("tf32", "on")
    assert 1e-5 < run() < 2e-3


# What cuBLASLt and cuDNN are allowed: they choose their own order of summation.
ULPS = {"f32": 8, "bf16": 4}


def gelu_ulps(dtype, fused):
    """Return the tolerance in ulps. cuBLASLt's GELU uses a less exact tanh: on an H100 its gradient is off by 2.6e-6 in the norm and
    by 5.2e-6 in the worst element, and f32 allows 1e-6. So it is not the default in f32, and 8e-6 is allowed for it."""
    return 64 if dtype == "f32" and fused == "on" else ULPS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fused", ["off", "on"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("N,C,OC", MATMULS)
def test_matmul_gelu_forward(cuda, rng, options, dtype, fused, with_bias, N, C, OC):
    options("fused_gelu", fused)
    operands = [rounded(rng.standard_normal(s), dtype) for s in [(N, C), (OC, C), OC]][: 2 + with_bias]
    out, pre = nans(cuda, (N, OC), dtype), nans(cuda, (N, OC), dtype)
    cuda.matmul_gelu_forward(out, pre, *(put(cuda, x, dtype) for x in operands))

    def formula(*operands):
        p = oracle.matmul(*operands)
        return oracle.gelu(p), p

    check({"out": out, "pre": pre}, formula, *operands, ulps=gelu_ulps(dtype, fused))


@pytest.mark.parametrize("dtype,grad", [("f32", "f32"), ("bf16", "f32"), ("bf16", "bf16")])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("option,choice", [("fused_gelu", "off"), ("fused_gelu", "on"), ("bias_gradient", "product")])
@pytest.mark.parametrize("N,C,OC", [*MATMULS, (300, 40, 20), (2600, 8, 33)])
def test_matmul_backward(cuda, rng, options, dtype, grad, accumulate, option, choice, N, C, OC):
    """Options change how it is computed: GELU in the matmul's kernel or in its own, the bias's gradient as a matmul."""
    options(option, choice)
    dout, x, weight, pre = (rounded(rng.standard_normal(s), dtype) for s in [(N, OC), (N, C), (OC, C), (N, C)])
    before = [rounded(rng.standard_normal(s), grad) for s in [(OC, C), OC]]
    dinp = nans(cuda, (N, C), dtype)
    dweight, dbias = (put(cuda, b, grad) if accumulate else nans(cuda, b.shape, grad) for b in before)
    operands = [put(cuda, a, dtype) for a in (dout, x, weight)]
    with_gelu = option == "fused_gelu"
    if with_gelu:
        cuda.matmul_gelu_backward(dinp, dweight, dbias, *operands, put(cuda, pre, dtype), accumulate)
    else:
        cuda.matmul_backward(dinp, dweight, dbias, *operands, accumulate)

    def gradient(dout, x, weight, pre):
        dx = oracle.matmul_gradient(dout, x, weight)[0]
        return oracle.gelu_gradient(pre, dx) if with_gelu else dx

    def sums(a, b, *operands):
        _, dw, db = oracle.matmul_gradient(*operands)
        return (a + dw, b + db) if accumulate else (dw, db)

    check({"dinp": dinp}, gradient, dout, x, weight, pre, ulps=gelu_ulps(dtype, choice))
    check({"dweight": dweight, "dbias": dbias}, sums, *before, dout, x, weight, ulps=ULPS[grad])


def test_slow_matmuls_are_counted(cuda):
    if "emulated" not in cuda.info().description:
        pytest.skip("only the emulated cuBLASLt lacks algorithms for certain")
    be = _llmc.Backend("cuda")  # a new one, which has counted no matmul yet

    def matmul(K):
        be.matmul_forward(
            nans(be, (3, 5), "f32"), put(be, np.ones((3, K)), "f32"), put(be, np.ones((5, K)), "f32"), None
        )

    matmul(8)
    assert be.info().fallbacks == ""
    matmul(14)
    matmul(7)
    assert be.info().fallbacks == "cuBLASLt had no algorithm for 2 matmuls, the largest 5 x 3 x 14"


# ---- attention ----

# B, T, NH, HS. The flash kernels take tiles of 64 rows, so some T are a row more than a multiple of 64. The simple kernels take
# every size; the others only bf16.
FLASH_SHAPES = [(B, T, NH, HS) for HS in (64, 80, 96, 128) for B, T, NH in [(1, 1, 1), (2, 70, 2), (1, 193, 1)]]
FLASH_SHAPES += [(1, 64, 3, 64), (3, 65, 1, 80), (1, 129, 2, 96), (2, 32, 1, 128)]
SIMPLE_SHAPES = [(1, 1, 1, 1), (2, 7, 3, 11), (1, 70, 2, 16), (2, 33, 1, 100), (1, 70, 2, 64)]
ATTENTIONS = [("simple", dtype, *shape) for dtype in DTYPES for shape in SIMPLE_SHAPES]
ATTENTIONS += [(kernel, "bf16", *shape) for kernel in ("flash", "cudnn") for shape in FLASH_SHAPES]
WGMMA_SHAPES = [
    (B, T, NH, 64) for B, T, NH in [(1, 1, 1), (2, 70, 2), (1, 192, 1), (3, 65, 2), (1, 129, 1), (1, 450, 2)]
]
ATTENTIONS += [("wgmma", "bf16", *shape) for shape in WGMMA_SHAPES]


@pytest.fixture(scope="module")
def hopper(cuda):
    """Return the GPU as a second backend; the emulated device is a Hopper GPU in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMC_EMULATION_CAPABILITY", "9.0")
        return _llmc.Backend("cuda")


@pytest.fixture
def with_attention(cuda, hopper):
    """Return a function that gives the GPU with one kind of attention chosen, for one test."""
    changed = []

    def choose(kernel):
        backend = hopper if kernel == "wgmma" else cuda
        try:
            backend.set_option("attention", kernel)
        except _llmc.Error as e:
            pytest.skip(str(e))
        changed.append(backend)
        return backend

    yield choose
    for backend in changed:
        backend.set_option("attention", "auto")


@pytest.mark.parametrize("kernel,dtype,B,T,NH,HS", ATTENTIONS)
def test_attention(with_attention, rng, kernel, dtype, B, T, NH, HS):
    cuda = with_attention(kernel)
    qkv, dout = (rounded(rng.standard_normal((B, T, c * NH * HS)), dtype) for c in (3, 1))
    out, lse, dqkv = nans(cuda, (B, T, NH * HS), dtype), nans(cuda, (B, NH, T)), nans(cuda, qkv.shape, dtype)
    cuda.attention_forward(out, lse, put(cuda, qkv, dtype), NH)
    check({"out": out}, lambda *a: oracle.attention(*a)[0], qkv, NH, ulps=ULPS[dtype])
    check({"lse": lse}, lambda *a: oracle.attention(*a)[1], qkv, NH, ulps=32)
    # Backward has its own inputs, so that an error in forward does not hide one in backward.
    out, lse = oracle.attention(qkv, NH)
    out, lse = rounded(out, dtype), rounded(lse, "f32")
    cuda.attention_backward(dqkv, *(put(cuda, x, dtype) for x in (dout, qkv, out)), put(cuda, lse), NH)
    parts = [put(cuda, x, dtype) for x in np.split(get(dqkv), 3, axis=2)]
    if T == 1:  # dq and dk are exactly 0: differences that cancel
        check({"dv": parts[2]}, lambda *a: oracle.attention_gradient(*a)[2], dout, qkv, out, lse, NH, ulps=ULPS[dtype])
    else:
        check(
            dict(zip(("dq", "dk", "dv"), parts)), oracle.attention_gradient, dout, qkv, out, lse, NH, ulps=ULPS[dtype]
        )


@pytest.mark.parametrize("kernel", ["simple", "flash", "wgmma", "cudnn"])
def test_attention_backward_runs_alike(with_attention, rng, kernel):
    cuda = with_attention(kernel)
    tq, to = put(cuda, rng.standard_normal((1, 130, 192)), "bf16"), put(cuda, rng.standard_normal((1, 130, 64)), "bf16")
    lse = put(cuda, np.full((1, 1, 130), 3.0), "f32")
    results = []
    for _ in range(2):
        dqkv = nans(cuda, (1, 130, 192), "bf16")
        cuda.attention_backward(dqkv, to, tq, to, lse, 1)
        results.append(dqkv.to_host())
    assert np.array_equal(*results)


@pytest.mark.parametrize("kernel", ["simple", "flash", "wgmma", "cudnn"])
def test_attention_of_large_scores(with_attention, rng, kernel):
    """Scores of some thousands, so that most weights are exactly 0 or 1."""
    cuda = with_attention(kernel)
    qkv = rounded(rng.standard_normal((1, 128, 3 * 128)) * np.repeat([40, 40, 1], 128), "bf16")
    dout = rounded(rng.standard_normal((1, 128, 128)), "bf16")
    out, lse, dqkv = nans(cuda, (1, 128, 128), "bf16"), nans(cuda, (1, 2, 128)), nans(cuda, qkv.shape, "bf16")
    cuda.attention_forward(out, lse, put(cuda, qkv, "bf16"), 2)
    check({"out": out}, lambda *a: oracle.attention(*a)[0], qkv, 2, ulps=ULPS["bf16"])
    exact, exact_lse = oracle.attention(qkv, 2)
    exact, exact_lse = rounded(exact, "bf16"), rounded(exact_lse, "f32")
    cuda.attention_backward(dqkv, *(put(cuda, x, "bf16") for x in (dout, qkv, exact)), put(cuda, exact_lse), 2)
    assert np.isfinite(get(dqkv)).all()
    check(
        {"dv": put(cuda, np.split(get(dqkv), 3, axis=2)[2], "bf16")},
        lambda *a: oracle.attention_gradient(*a)[2],
        dout, qkv, exact, exact_lse, 2, ulps=ULPS["bf16"],
    )  # fmt: skip


@pytest.mark.parametrize("gpu", ["cuda", "hopper"])
@pytest.mark.parametrize("dtype,T,kernels", [("bf16", 70, ["wgmma", "flash"]), ("f32", 64, ["simple"])])
def test_automatic_attention(request, rng, gpu, dtype, T, kernels):
    """auto chooses the best kernels that the GPU has, for a length that only evaluations have, and the simple ones for f32."""
    backend = request.getfixturevalue(gpu)

    def choose_first():
        for kernel in kernels:
            try:
                return backend.set_option("attention", kernel)
            except _llmc.Error:
                assert kernel == "wgmma"

    qkv, dout = (put(backend, rng.standard_normal((2, T, c)), dtype) for c in (192, 64))
    results = []
    for choose in (choose_first, lambda: backend.set_option("attention", "auto")):
        choose()
        out, lse = nans(backend, (2, T, 64), dtype), nans(backend, (2, 1, T), "f32")
        dqkv = nans(backend, (2, T, 192), dtype)
        backend.attention_forward(out, lse, qkv, 1)
        backend.attention_backward(dqkv, dout, qkv, out, lse, 1)
        results.append([t.to_host() for t in (out, lse, dqkv)])
    for automatic, expected in zip(*results):
        np.testing.assert_array_equal(automatic, expected)


def test_wgmma_needs_hopper(cuda):
    if cuda.info().isa == "sm_90":
        pytest.skip("this is a Hopper GPU")
    with pytest.raises(_llmc.Error, match="compute capability 9.0"):
        cuda.set_option("attention", "wgmma")


def test_automatic_attention_says_whether_it_has_cudnn(cuda, rng, options):
    options("attention", "auto")  # of a head size that wgmma does not take
    out, lse = nans(cuda, (1, 64, 80), "bf16"), nans(cuda, (1, 1, 64), "f32")
    cuda.attention_forward(out, lse, put(cuda, rng.standard_normal((1, 64, 240)), "bf16"), 1)
    assert np.isfinite(get(out)).all() and np.isfinite(get(lse)).all()
    try:
        _llmc.Backend("cuda").set_option("attention", "cudnn")
        expected = "attention auto (with cuDNN)"
    except _llmc.Error:
        expected = "attention auto (without cuDNN)"
    assert cuda.info().options.startswith(expected)


def test_workspace(cuda):
    """The workspace grows with the batch, and includes what encoder_backward takes."""
    small, large = (cuda.workspace_bytes(B, 1024, 768, 12, "bf16") for B in (1, 64))
    assert 32 << 20 < small < large
    assert large - small > 63 * 1024 * (4 * 4 + 2 * 768 * 4 // 32)


def test_gelu_far_out(cuda):
    """GELU is tested for larger numbers than on the CPU, whose gradient is off by 0.3 % at 1e12."""
    x, y, dx = put(cuda, [-1e12, 1e12]), nans(cuda, 2), nans(cuda, 2)
    cuda.gelu_forward(y, x)
    cuda.gelu_backward(dx, x, put(cuda, np.ones(2)))
    np.testing.assert_allclose(get(y), [0, 1e12], rtol=1e-6)
    np.testing.assert_allclose(get(dx)[0], 0, atol=1e-12)


# ---- classifier ----


def test_a_target_outside_of_the_vocabulary_is_nan_and_nothing_else(cuda):
    losses, logits = nans(cuda, 3), put(cuda, np.zeros((3, 16)))
    cuda.fused_classifier(losses, logits, put(cuda, [0, 3, 12], "i32"), 1.0, 10)
    assert np.isfinite(get(losses)[:2]).all() and np.isnan(get(losses)[2])
    assert np.isfinite(get(logits)[:2]).all() and np.isnan(get(logits)[2, :10]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V,Vp", [(13, 16), (9000, 9024)])
def test_classifier_of_extreme_logits(cuda, dtype, V, Vp):
    """-infinity has a probability of 0, the largest floats are like other numbers; NaN or +infinity makes its own row NaN only."""
    x = np.zeros((9, Vp))
    x[:, V:] = np.nan  # the padding is not read
    x[0, 1:V] = -np.inf  # all probabilities but one are 0
    x[1, : V - 1] = -np.inf
    x[2, : V // 2] = -np.inf
    x[3, 0], x[3, 1:V] = 3e38, -3e38
    x[4, :V] = -3e38
    x[5, 2] = np.nan
    x[6, V - 1] = np.inf
    x[7, :V] = -np.inf  # all probabilities would be 0
    targets = np.array([0, V - 1, V - 1, 0, 5, 3, 2, 1, 4])
    losses, logits = nans(cuda, 9), put(cuda, x, dtype)
    cuda.fused_classifier(losses, logits, put(cuda, targets, "i32"), 1.0, V)
    uniform = math.log(V)
    expected = [0, 0, math.log(V - V // 2), 0, uniform, np.nan, np.nan, np.nan, uniform]
    np.testing.assert_allclose(get(losses), expected, rtol=1e-5, atol=1e-6)
    d = get(logits)
    assert not d[:, V:].any()
    bad = np.isnan(d[:, :V]).any(axis=1)
    np.testing.assert_array_equal(bad, np.isnan(expected))
    wanted = np.zeros((9, V))
    wanted[2, V // 2 :] = 1 / (V - V // 2)
    wanted[[4, 8]] = 1 / V
    wanted[[2, 4, 8], targets[[2, 4, 8]]] -= 1
    np.testing.assert_allclose(d[~bad, :V], wanted[~bad], rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V,Vp", [(13, 16), (33, 64), (5, 5)])
def test_an_ignored_row_has_no_gradient(cuda, dtype, V, Vp):
    """A row with a negative target has no gradient, whatever its logits are."""
    logits = put(cuda, np.full((2, Vp), np.nan), dtype)
    losses = nans(cuda, 2)
    cuda.fused_classifier(losses, logits, put(cuda, [-1, -100], "i32"), 1.0, V)
    assert not get(losses).any() and not get(logits).any()


# ---- AdamW ----


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 33, 4096])
def test_stochastic_rounding_tosses_the_cpus_coins(cuda, cpu, rng, grad_dtype, n):
    values = rng.standard_normal((4, n))
    values[2] = values[2] ** 2
    step = _llmc.AdamWStep(1e-2, 0.9, 0.95, 1e-8, 0.1, 0.19, 0.0975, seed=12345)
    results = []
    for backend in (cuda, cpu):
        t = [put(backend, x, dtype) for x, dtype in zip(values, ("bf16", "f32", "f32", grad_dtype))]
        backend.adamw(t[0], None, *t[1:], put(backend, [0.5]), step)
        results.append([rounded(get(x), "f32") for x in t])
    on_gpu, on_cpu = results
    assert (on_gpu[0] == on_cpu[0]).mean() > 0.97
    for a, b in zip(on_gpu, on_cpu):
        assert (error(a, b) <= 2.0**-7).all()
    for a, b in zip(on_gpu[1:3], on_cpu[1:3]):
        assert (error(a, b) <= 2.0**-21).all()


# ---- sampling ----


def sampled(backend, logits, coins, V, *options):
    tokens = put(backend, np.full(len(coins), -7), "i32")
    backend.sample(tokens, put(backend, logits, "f32"), put(backend, coins, "f32"), V, _llmc.SamplerOptions(*options))
    return tokens.to_host().tolist()


@pytest.mark.parametrize("V, Vp", [(1, 1), (2, 7), (31, 32), (61, 128), (1023, 1024), (1025, 1025), (5003, 5008)])
def test_sample_as_the_host(cuda, rng, V, Vp):
    """The GPU samples as the host does: logits flat, peaked, with ties, of two values, with -inf; coins at both ends and between.

    Coin 0 only for the first rows: it takes the first token that top_k and top_p leave, and if the tail is less than
    what a double resolves, then which of it they leave depends on the order of the sum.
    """
    rows = rng.standard_normal((12, Vp)) * np.array([0.0, 1e-5, 0.1, 1, 3, 10, 40, 300, 3, 3, 3, 3])[:, None]
    rows[8] = np.round(rows[8])
    rows[9] = rows[9] > 0
    rows[10, rng.integers(0, Vp, Vp // 2)] = -np.inf
    rows[10, V - 1] = 0.5
    rows[11] = np.sort(rows[11])
    logits = rows.astype(np.float32)
    logits[:, V:] = np.nan  # the padding is not looked at
    for options in [(0.0,), (1.0,), (0.3,), (1e9,), (1.0, 1), (1.0, 2), (0.7, 40), (1.0, V - 1 or 1), (1.0, 0, 0.9),
                    (1.0, 0, 1e-6), (2.0, 0, 0.5), (1.0, 0, 0.999999), (0.8, 50, 0.95), (1.5, V, 0.3)]:  # fmt: skip
        coins = rng.random(len(logits)).astype(np.float32)
        coins[rng.choice(len(coins), 2, replace=False)] = 2.0**-24, 1 - 2.0**-24
        coins[rng.integers(0, 5)] = 0.0
        wanted = [_llmc.sample(row[:V], float(c), *options) for row, c in zip(logits, coins)]
        assert sampled(cuda, logits, coins, V, *options) == wanted, options


def test_sample_from_gpt2s_vocabulary(cuda, rng):
    V, Vp = 50257, 50304
    logits = (rng.standard_normal((2, Vp)) * 2 - 30).astype(np.float32)
    for options in [(0.0,), (1.0,), (0.8, 40), (1.0, 0, 0.95)]:
        coins = rng.random(2).astype(np.float32)
        wanted = [_llmc.sample(row[:V], float(c), *options) for row, c in zip(logits, coins)]
        assert sampled(cuda, logits, coins, V, *options) == wanted


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sample_faults(request, rng, device):
    """A row that no token can be chosen from gives a fault; a negative coin asks for no token, whatever the row holds."""
    backend = request.getfixturevalue(device)
    logits = np.array([[0, 1, 2], [0, np.nan, np.nan], [np.inf, 0, 1], [-np.inf] * 3, [np.nan] * 3, [2, 1, 0]])
    coins = np.array([0, 0, 0.5, 0.9, -1, 0.1])
    least = -(2**31)
    for temperature in (0.0, 1.0):
        first = 2 if temperature == 0 else 0
        assert sampled(backend, logits, coins, 3, temperature) == [first, -2, least, least + 1, 0, 0]


# ---- the model ----


def model(backend, dtype, grad, C=64, NH=1, recompute=1):
    config = _llmc.GPT2Config(max_seq_len=24, vocab_size=61, num_layers=2, num_heads=NH, channels=C)
    m = _llmc.GPT2(config, backend, _llmc.ModelOptions(dtype, grad, recompute, classifier_rows=13))
    m.init_weights(42)
    return m


@pytest.mark.parametrize("dtype,grad,tolerance", [("f32", "f32", 2e-5), ("bf16", "f32", 2e-2), ("bf16", "bf16", 2e-2)])
@pytest.mark.parametrize("attention,C,NH", [("simple", 33, 3), ("flash", 64, 1), ("wgmma", 64, 1)])
@pytest.mark.parametrize("recompute", [0, 1, 2])
def test_model_trains_as_on_the_cpu(with_attention, cpu, rng, dtype, grad, tolerance, attention, C, NH, recompute):
    cuda = with_attention(attention)
    tokens = rng.integers(0, 61, (6, 2, 21))
    losses, norms = [], []
    for be in (cuda, cpu):
        m = model(be, dtype, grad, C, NH, recompute)
        opt = _llmc.AdamW(m, weight_decay=0.1)
        history, norm = [], []
        for step in range(3):
            m.zero_grad()
            for micro in range(2):
                x = tokens[2 * step + micro]
                m.forward(x[:, :-1])
                m.backward(x[:, 1:], 0.5)
            opt.step(1e-2)
            history.append(m.loss())
            norm.append(opt.norm())
        losses.append(history)
        norms.append(norm)
    np.testing.assert_allclose(losses[0], losses[1], rtol=tolerance)
    np.testing.assert_allclose(norms[0], norms[1], rtol=3 * tolerance)


def test_overlapping_kernels_see_what_the_last_ones_wrote(cuda, rng):
    """Generation's kernels begin before the one before has ended. They read weights and keys at once, but not those that a kernel
    just before them writes."""
    x, w, z = (put(cuda, rng.standard_normal(s), "bf16") for s in [(16, 512), (512, 512), (8, 512)])
    qkv, caches = put(cuda, rng.standard_normal((3, 1, 1536)), "bf16"), rng.standard_normal((2, 3, 8, 300, 64))
    starts = [put(cuda, np.array([200, 128, 40]) + i, "i32") for i in range(4)]
    results = []
    for wait in (True, False):
        made, product = nans(cuda, (16, 512), "bf16"), nans(cuda, (8, 16), "bf16")
        cache = [put(cuda, c, "bf16") for c in caches]
        outs = [nans(cuda, (3, 1, 512), "bf16") for _ in starts]
        cuda.matmul_forward(made, x, w)
        if wait:
            cuda.synchronize()
        cuda.matmul_forward(product, z, made)
        for start, out in zip(starts, outs):
            cuda.attention_decode(out, *cache, qkv, start, 8)
            if wait:
                cuda.synchronize()
        results.append([t.to_host() for t in (made, product, *outs, *cache)])
    for a, b in zip(*results):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("C,NH", [(66, 3), (64, 2)])  # by simple kernels, and by those of few rows
@pytest.mark.parametrize("dtype,tolerance", [("f32", 1e-4), ("bf16", 5e-2)])
def test_generation_as_on_the_cpu(cuda, cpu, rng, dtype, tolerance, C, NH):
    prompt = rng.integers(0, 61, 5)
    logits = []
    for be in (cuda, cpu):
        m = model(be, dtype, "f32", C, NH)
        cache = _llmc.KVCache(m, 2, 20)
        rows = [cache.prefill(0, prompt), cache.prefill(1, prompt[:2])]
        for token in (3, 5):
            rows += list(cache.decode([token, token + 1]))
        full = m.logits(prompt[None])
        rows.append(full[0, -1])
        logits.append(np.array(rows))
    np.testing.assert_allclose(logits[0], logits[1], atol=tolerance * np.abs(logits[1]).max())
    np.testing.assert_allclose(logits[0][0], logits[0][-1], atol=tolerance * np.abs(logits[1]).max())


@pytest.mark.parametrize("C,NH", [(66, 3), (64, 2)])
@pytest.mark.parametrize("options", [(0.0,), (1.0,), (0.8, 9, 0.9)])
def test_tokens_chosen_on_the_device(cuda, rng, options, C, NH):
    """Steps queued ahead give the tokens of decode() and the host's choice, also beside a sequence with a negative coin."""
    m = model(cuda, "bf16", "f32", C, NH)
    caches = [_llmc.KVCache(m, 3, 20) for _ in range(2)]
    for cache in caches:
        for b in range(3):
            cache.prefill(b, np.arange(1, 3 + b))
    tokens, coins, wanted = np.array([5, 6, 7], np.int32), rng.random((8, 3)).astype(np.float32), []
    coins[:, 1] = -1
    for step in range(8):
        logits = caches[0].decode(tokens if step == 0 else np.array(wanted[-1], np.int32))
        wanted.append([_llmc.sample(logits[b], coins[step, b], *options) if b != 1 else 0 for b in range(3)])
    got, chooser = [], _llmc.SamplerOptions(*options)
    caches[1].queue_tokens(tokens, coins[0], chooser)
    for step in range(1, 8):
        caches[1].queue_tokens(None, coins[step], chooser)
        with pytest.raises(ValueError, match="two steps"):
            caches[1].queue_tokens(None, coins[step], chooser)
        got.append(caches[1].read_tokens().tolist())
    got.append(caches[1].read_tokens().tolist())
    assert got == wanted
    with pytest.raises(ValueError, match="no step"):
        caches[1].read_tokens()
    caches[1].clear(0)
    caches[1].prefill(0, [1, 2])
    with pytest.raises(ValueError, match="no tokens to go on from"):
        caches[1].queue_tokens(None, coins[0], chooser)


def test_a_run_repeats_itself(cuda, rng):
    tokens = rng.integers(0, 61, (2, 2, 25))
    results = []
    for _ in range(2):
        m = model(cuda, "bf16", "bf16")
        opt = _llmc.AdamW(m, master_weights=False)
        for step in range(2):
            m.zero_grad()
            m.forward(tokens[step, :, :-1])
            m.backward(tokens[step, :, 1:])
            opt.step(1e-2)
        results.append(m.all_parameters().to_host())
    assert np.array_equal(*results)


def test_a_nan_gradient_does_not_reach_the_weights(cuda, rng):
    m = model(cuda, "f32", "f32")
    opt = _llmc.AdamW(m)
    before = m.all_parameters().to_host()
    tokens = rng.integers(0, 61, (1, 9))
    m.zero_grad()
    m.forward(tokens[:, :-1])
    m.backward(tokens[:, 1:], float("nan"))
    opt.step(1e-2)
    assert math.isnan(opt.norm())
    np.testing.assert_array_equal(m.all_parameters().to_host(), before)
