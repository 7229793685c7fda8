"""The whole model: against llmc.reference in PyTorch, and against itself when the same result is computed in another way.

Parity is judged as the ops are (tests/oracle.py): the truth is the reference in float64, the peer is the reference in
the model's dtype, and llmc may be twice as far from the truth as PyTorch is.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, randomize
from oracle import DTYPES, ULP, error

import llmc
from llmc import _llmc
from llmc.models.model import default_classifier_rows
from llmc.reference import GPT

NAMES = "wte wpe ln1w ln1b qkvw qkvb attprojw attprojb ln2w ln2b fcw fcb fcprojw fcprojb lnfw lnfb".split()
TORCH = {"f32": torch.float32, "bf16": torch.bfloat16}


def reference(model, dtype):
    """Return the PyTorch model with the model's weights, which computes in dtype."""
    gpt = GPT(model.config)
    gpt.load_llmc(model.parameters)
    return gpt.to(dtype)


def run_reference(model, dtype, x, y):
    gpt = reference(model, dtype)
    logits, loss = gpt(torch.from_numpy(x), torch.from_numpy(y))
    loss.backward()
    return logits.detach().double().numpy(), loss.item(), gpt.gradients()


def train(model, x, y, scale=1.0):
    model.zero_grad()
    model.forward(x)
    model.backward(y, scale)
    return model.mean_loss, {name: np.array(g, np.float64) for name, g in model.gradients.items()}


def assert_same(a, b):
    assert a[0] == b[0]
    for name in NAMES:
        np.testing.assert_array_equal(a[1][name], b[1][name], err_msg=name)


# ---- parity ----


def allowed(peer, exact):
    """Return twice PyTorch's errors, in the norm and in the worst element. The worst element is a single number, which some build may
    have right by luck, so the error in the norm is allowed for it too."""
    whole, worst = error(peer, exact)
    return 2 * np.array([whole, max(whole, worst)])


CONFIGS = {
    "tiny": TINY,
    "one of everything": llmc.GPT2Config(max_seq_len=8, vocab_size=1, num_layers=1, num_heads=1, channels=2),
    "heads of 64": llmc.GPT2Config(max_seq_len=64, vocab_size=300, num_layers=3, num_heads=2, channels=128),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name,B,T", [("tiny", 3, 19), ("tiny", 1, 1), ("one of everything", 2, 5), ("heads of 64", 2, 50)]
)
def test_parity_with_pytorch(tiny, rng, dtype, name, B, T):
    """Loss, logits and all 16 gradients are as near to the truth as PyTorch's."""
    config = CONFIGS[name]
    model = tiny(config, dtype=dtype)
    x, y = rng.integers(0, config.vocab_size, (2, B, T), dtype=np.int32)
    y[0, T // 2] = -1  # an ignored target
    exact_logits, exact_loss, exact = run_reference(model, torch.float64, x, y)
    peer_logits, peer_loss, peer = run_reference(model, TORCH[dtype], x, y)
    loss, gradients = train(model, x, y)
    # PyTorch's one number may be right by luck, so a loss may besides be off by an ulp of the dtype, times a few nats.
    assert abs(loss - exact_loss) <= 2 * abs(peer_loss - exact_loss) + ULP[dtype] * max(1.0, exact_loss)
    np.testing.assert_array_less(error(model.logits(x), exact_logits), allowed(peer_logits, exact_logits) + ULP[dtype])
    assert list(gradients) == NAMES
    for n in NAMES:
        if not exact[n].any():  # one token, one position: its gradient is 0 in every dtype
            assert np.abs(gradients[n]).max() <= ULP[dtype], n
            continue
        # Rounding errors are relative to the terms of a gradient's sum; the largest terms are wte's.
        floor = ULP[dtype] * max(1.0, np.abs(exact["wte"]).max() / np.abs(exact[n]).max())
        assert (error(gradients[n], exact[n]) <= allowed(peer[n], exact[n]) + floor).all(), n


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip,decay", [(0.0, 0.0), (0.5, 0.1)])
def test_ten_steps_of_adamw(tiny, tokens, dtype, clip, decay):
    """Losses of ten updates on three batches in turn. PyTorch trains f32 weights for bf16, as llmc's master weights are."""
    batches = [tokens(2, 20) for _ in range(3)]
    lr, betas, eps = 3e-3, (0.9, 0.95), 1e-8

    def train_llmc(dtype):
        model = tiny(dtype=dtype)
        optimizer = llmc.AdamW(model, betas=betas, eps=eps, weight_decay=decay, grad_clip=clip)
        losses = []
        for step in range(10):
            b = batches[step % 3]
            model.zero_grad()
            model.forward(b[:, :-1])
            model.backward(b[:, 1:])
            optimizer.step(lr)
            losses.append(model.mean_loss)
        return model, np.array(losses)

    def train_pytorch(dtype, start):
        gpt = reference(start, dtype)
        optimizer = gpt.configure_optimizer(lr, betas, eps, decay)
        losses = []
        for step in range(10):
            b = torch.from_numpy(batches[step % 3])
            _, loss = gpt(b[:, :-1], b[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(gpt.parameters(), clip)
            optimizer.step()
            losses.append(loss.item())
        return gpt, np.array(losses)

    model, losses = train_llmc(dtype)
    exact, truth = train_pytorch(torch.float64, tiny(dtype=dtype))
    assert truth[-3:].mean() < truth[:3].mean() - 0.5  # it learns
    if dtype == "f32":
        peer, others = train_pytorch(torch.float32, tiny(dtype=dtype))
        assert np.abs(losses - truth).max() <= 2 * np.abs(others - truth).max() + 10 * ULP["f32"] * truth.max()
        weights, truths, peers = dict(model.parameters), exact.parameters_llmc(), peer.parameters_llmc()
        for values in (weights, truths, peers):
            # A key's bias adds the same to all scores of a query: its gradient is 0, and AdamW makes steps of the noise.
            values["qkvb"] = np.delete(np.asarray(values["qkvb"]), np.s_[TINY.channels : 2 * TINY.channels], axis=1)
        for name, value in truths.items():
            # One weight in a hundred is left out: if a gradient is about 0, AdamW may step either way, in llmc and in PyTorch.
            distance, other = (np.quantile(np.abs(w[name] - value), 0.99) for w in (weights, peers))
            assert distance <= 2 * other + 10 * ULP["f32"] * np.abs(value).max(), name
    else:
        # Activations are rounded at every op, so the comparison is with PyTorch's bf16 at the first step, and
        # afterwards with staying near the truth: no more than that first distance, ten times over.
        with torch.no_grad():
            b = torch.from_numpy(batches[0])
            _, first = reference(tiny(dtype=dtype), torch.bfloat16)(b[:, :-1], b[:, 1:])
        unit = 2 * abs(first.item() - truth[0]) + ULP["bf16"] * truth[0]
        assert abs(losses[0] - truth[0]) <= unit and np.abs(losses - truth).max() <= 10 * unit


# ---- one result, however it is computed ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_recompute_levels_are_identical(tiny, tokens, dtype):
    x, y = tokens(2, 19), tokens(2, 19)
    results = [train(tiny(dtype=dtype, recompute=level), x, y) for level in (0, 1, 2)]
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [12, 20, 29, 1, 7, 56])
def test_chunks_of_the_classifier(tiny, tokens, dtype, rows):
    """Logits computed by chunks of rows give the same, up to the order of sums, which may be another in matmuls of fewer rows."""
    x, y = tokens(3, 19), tokens(3, 19)
    whole, chunks = (tiny(dtype=dtype, grad_dtype="f32", classifier_rows=r) for r in (1024, rows))
    results = [(train(m, x, y), m.logits(x), m.evaluate(x, y)) for m in (chunks, whole)]
    ((loss, gradients), logits, mean), ((loss1, gradients1), logits1, mean1) = results
    assert (loss, mean) == pytest.approx((loss1, mean1), rel=2 * ULP["f32"])
    assert (error(logits, logits1) <= 4 * ULP[dtype]).all()
    for name in NAMES:
        assert (error(gradients[name], gradients1[name]) <= 8 * ULP[dtype]).all(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(tokens, dtype):
    """Losses, gradients and weights of three updates have the same bits for any number of threads."""
    config = llmc.GPT2Config(max_seq_len=70, vocab_size=300, num_layers=2, num_heads=3, channels=66)
    batches = [tokens(3, 71, 300) for _ in range(3)]
    results = []
    for threads in (1, 2, 3, 5):
        model = llmc.GPT2(config, dtype=dtype, threads=threads)
        optimizer = llmc.AdamW(model)
        losses = []
        for b in batches:
            model.zero_grad()
            model.forward(b[:, :-1])
            model.backward(b[:, 1:])
            optimizer.step(1e-2)
            losses += [model.mean_loss, optimizer.norm]
        results.append((losses, model.all_parameters().to_host(), dict(model.gradients)))
    for other in results[1:]:
        assert other[0] == results[0][0]
        np.testing.assert_array_equal(other[1], results[0][1])
        for name in NAMES:
            np.testing.assert_array_equal(other[2][name], results[0][2][name])


@pytest.mark.parametrize("dtype,grad_dtype", [("f32", "f32"), ("bf16", "f32"), ("bf16", "bf16")])
def test_accumulation_equals_the_large_batch(tiny, tokens, dtype, grad_dtype):
    """Four micro-batches of one row are one batch of four: the same sum in another order, rounded once per micro-batch."""
    x, y = tokens(4, 19), tokens(4, 19)
    model = tiny(dtype=dtype, grad_dtype=grad_dtype)
    loss, large = train(model, x, y)
    model.zero_grad()
    for row in range(4):
        model.forward(x[row : row + 1])
        model.backward(y[row : row + 1], 0.25)
    # Few rows and many go through different kernels. They sum in different orders, so a bf16 activation may be rounded the other way.
    assert model.mean_loss == pytest.approx(loss, rel=4 * ULP["f32"] if dtype == "f32" else ULP["bf16"] / 8)
    for name in NAMES:
        # The gradients of bf16 activations are rounded at another scale, and by the way those of parameters.
        allowed = 8 * ULP["f32"] if dtype == "f32" else 4 * ULP["bf16"]
        assert (error(model.gradients[name], large[name]) <= allowed).all(), name


def test_accumulation_in_f32_is_finer(tiny, tokens):
    """With f32 gradients of a bf16 model the sum over many micro-batches is nearer to the truth than with bf16 gradients."""
    x, y = tokens(40, 19), tokens(40, 19)

    def accumulate(**dtypes):
        model = tiny(**dtypes)
        model.zero_grad()
        for row in range(40):
            model.forward(x[row : row + 1])
            model.backward(y[row : row + 1], 1 / 40)
        return np.array(model.gradients["fcw"], np.float64)

    truth = run_reference(tiny(dtype="bf16"), torch.float64, x, y)[2]["fcw"]
    fine, coarse = accumulate(dtype="bf16", grad_dtype="f32"), accumulate(dtype="bf16", grad_dtype="bf16")
    assert error(fine, truth)[0] < error(coarse, truth)[0]


def test_gradients_add_until_zero_grad(tiny, tokens):
    x, y = tokens(2, 19), tokens(2, 19)
    model = tiny()
    once = train(model, x, y)
    model.forward(x)
    model.backward(y)
    assert model.mean_loss == pytest.approx(2 * once[0])
    for name in NAMES:
        np.testing.assert_allclose(model.gradients[name], 2 * once[1][name], rtol=1e-5, atol=1e-6)
    assert_same(train(model, x, y), once)


def test_zero_grad_shows_zeros(tiny, tokens):
    """Gradients are zeros in views taken before zero_grad() and after."""
    model = tiny()
    train(model, tokens(2, 19), tokens(2, 19))
    before = model.gradients["fcw"]
    assert before.any()
    model.zero_grad()
    if model.device == "cpu":
        assert not before.any()
    assert not any(g.any() for g in model.gradients.values())


def test_a_loss_that_nobody_computed_is_an_error(tiny, tokens):
    x, y = tokens(2, 19), tokens(2, 19)
    model = tiny()
    optimizer = llmc.AdamW(model)
    with pytest.raises(llmc.Error, match=r"no gradients were measured yet"):
        _ = optimizer.norm

    def no_loss():
        with pytest.raises(llmc.Error, match=r"no loss: backward\(targets\) computes it"):
            _ = model.mean_loss

    no_loss()
    model.forward(x)
    no_loss()
    model.evaluate(x, y)
    model.logits(x)
    no_loss()
    loss, _ = train(model, x, y)
    model.evaluate(y, x)  # which returns its own, and leaves that of training
    assert model.mean_loss == loss
    model.zero_grad()
    no_loss()


# ---- evaluation ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_evaluation_is_forward(tiny, tokens, dtype):
    """The loss of training, from the memory of one layer; by token, too; and the logits' own cross-entropy."""
    x, y = tokens(3, 19), tokens(3, 19)
    y[1, 3:9] = -1
    model = tiny(dtype=dtype)
    loss, gradients = train(model, x, y)
    assert model.evaluate(x, y) == pytest.approx(loss, rel=2 * ULP["f32"])
    by_token = model.token_losses(x, y)
    assert not by_token[1, 3:9].any() and by_token.mean(dtype=np.float64) == pytest.approx(loss, rel=2 * ULP["f32"])
    logits = model.logits(x).astype(np.float64)
    assert logits.shape == (3, 19, TINY.vocab_size)
    lse = np.log(np.exp(logits).sum(axis=-1))
    expected = np.where(y < 0, 0, lse - np.take_along_axis(logits, np.maximum(y, 0)[..., None], axis=-1)[..., 0])
    np.testing.assert_allclose(by_token, expected, atol=2 * ULP["f32"] * np.abs(logits).max())
    assert_same((loss, model.gradients), (loss, gradients))  # evaluate() left the gradients as they were


def test_backward_needs_its_forward(tiny, tokens):
    model, x = tiny(), tokens(2, 19)
    for prepare in (lambda: None, lambda: model.evaluate(x, x), lambda: model.logits(x), lambda: train(model, x, x)):
        prepare()
        with pytest.raises(ValueError, match="forward"):
            model.backward(x)
    model.forward(x)
    with pytest.raises(ValueError, match=r"targets .*\(1, 38\).*\(2, 19\)"):
        model.backward(x.reshape(1, 38))
    model.backward(x)  # backward() still belongs to the forward() before evaluate()


# ---- the padding of the vocabulary ----


def test_padding_is_neither_learned_nor_sampled(tiny, tokens):
    model = tiny()
    padding = np.arange(TINY.vocab_size, TINY.padded_vocab_size)
    assert len(padding) == 67
    x = tokens(3, 19)
    loss, logits = model.evaluate(x, x), model.logits(x)
    _, gradients = train(model, x, x)
    assert not gradients["wte"][padding].any()
    optimizer = llmc.AdamW(model, weight_decay=0.1)
    optimizer.step(1e-2)
    assert not np.asarray(model.parameters["wte"])[padding].any()
    # Whatever those rows hold changes nothing else: no loss, no logit, no gradient, no sample.
    fresh, wte = tiny(), np.array(tiny().parameters["wte"])
    wte[padding] = 100.0
    fresh.parameters["wte"] = wte
    assert fresh.evaluate(x, x) == loss
    np.testing.assert_array_equal(fresh.logits(x), logits)
    assert_same(train(fresh, x, x)[:1] + (gradients,), (train(tiny(), x, x)[0], gradients))
    assert max(fresh.generate([1, 2], 200, temperature=5.0)) < TINY.vocab_size


# ---- generation ----


def reforward(model, prompt, count, **options):
    """Generate without a cache: each token from the whole context. A full context is shortened as GPT2.generate documents."""
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **options}
    coin = _llmc.XorShift(options.pop("seed", 1337))
    limit, tokens, new = model.config.max_seq_len, list(prompt), []
    context = list(prompt) if len(prompt) <= limit else tokens[-(limit // 2) :]
    for _ in range(count):
        if len(context) > limit:
            context = tokens[-(limit // 2) :]
        logits = model.logits(np.array([context], np.int32))[0, -1]
        token = _llmc.sample(logits, coin.randfloat32(), *options.values())
        tokens.append(token)
        new.append(token)
        context = [*context, token]
    return new


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {}, {"temperature": 0.7, "top_k": 9, "top_p": 0.8, "seed": 5}]
)
@pytest.mark.parametrize("length", [1, 7, 18, 19, 20, 45])
def test_generation_is_reforward(tiny, rng, options, length):
    """Prompts are short, as long as the context, and longer; generation goes on for several times max_seq_len."""
    model = tiny()
    prompt = rng.integers(0, TINY.vocab_size, length).tolist()
    assert model.generate(prompt, 50, **options) == reforward(model, prompt, 50, **options)


def test_generation_in_bf16_is_near_reforward(tiny, rng):
    """Logits are compared, not tokens: the keys are rounded alike in both, but sums are taken in other orders."""
    model = tiny(dtype="bf16")
    x = rng.integers(0, TINY.vocab_size, 19, dtype=np.int32)
    cache = model.kv_cache(1, 19)
    rows = [cache.prefill(0, x[:5])] + [cache.decode(x[i : i + 1])[0] for i in range(5, 19)]
    full = model.logits(x[None])[0, 4:].astype(np.float64)
    truth = reference(model, torch.float64)(torch.from_numpy(x[None]))[0][0, 4:].detach().numpy()
    assert (error(rows, truth) <= 2 * error(full, truth)).all()


def test_a_batch_of_prompts_is_each_alone(tiny, rng):
    """Prompts have different lengths, and one stops early; prompt i draws from seed + i."""
    model = tiny()
    prompts = [rng.integers(0, TINY.vocab_size, n).tolist() for n in (3, 1, 25, 19)]
    alone = [model.generate(p, 40, seed=7 + i) for i, p in enumerate(prompts)]
    assert model.generate(prompts, 40, seed=7) == alone
    stop = alone[0][5]
    cut = [a[: a.index(stop)] if stop in a else a for a in alone]
    assert len(cut[0]) <= 5 and model.generate(prompts, 40, seed=7, stop_token=stop) == cut


def test_streaming(tiny):
    model = tiny()
    assert list(model.stream([1, 2, 3], 30)) == model.generate([1, 2, 3], 30)
    first = model.generate([1, 2, 3], 30)
    assert list(model.stream([1, 2, 3], 30, stop_token=first[4])) == first[: first.index(first[4])]
    assert list(model.stream([1, 2, 3], 30, stop_token=[first[6], first[4], 10**6])) == first[: first.index(first[4])]
    assert list(model.stream([1], 0)) == [] and model.generate([1], 0) == []


def test_prompts_as_arrays(tiny):
    model = tiny()
    rows = np.array([[1, 2, 3], [4, 5, 6]])
    assert model.generate(rows, 9) == model.generate(rows.tolist(), 9) == model.generate(list(rows), 9)
    assert list(model.stream(rows[0], 9)) == model.generate(rows[0].astype(np.uint16), 9) == model.generate(rows, 9)[0]


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("text", TypeError, "got text: a tokenizer's encode"),
        (["one", "two"], TypeError, "got text"),
        ([[1], "two"], TypeError, "got text"),
        (b"bytes", TypeError, "got text"),
        (5, ValueError, r"one row of token ids, got shape \(\)"),
        (None, ValueError, "must be integers, got NoneType"),
        ({"input_ids": [1]}, ValueError, "must be integers, got dict"),
        ([1, [2]], ValueError, "rows of one length"),
        ([-(2**40)], ValueError, "id -1099511627776 does not fit 32 bits"),
        ([2**70], ValueError, "must be integers, got object"),
        (np.zeros((2, 2, 2), int), ValueError, r"one row of token ids, got shape \(2, 2\)"),
        ([1.5], ValueError, "must be integers, got float64"),
        ([True], ValueError, "must be integers, got bool"),
        ([2**40], ValueError, "does not fit 32 bits"),
        ([], ValueError, "the prompt is empty"),
        ([[1], []], ValueError, "the prompt is empty"),
    ],
)
def test_what_is_no_prompt(tiny, prompt, error, message):
    with pytest.raises(error, match=message):
        tiny().generate(prompt, 3)


def test_options_of_generation_are_checked_at_once(tiny):
    """stream() is called, not read: who prints the prompt first hears of a wrong option before."""
    model = tiny()
    for name, value in {
        "max_new_tokens": -1, "temperature": math.nan, "top_k": 2**70, "top_p": 0, "seed": 0, "stop_token": [-1],
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} is "):
            model.stream([1], **{"max_new_tokens": 3, name: value})
    for name, value in {"max_new_tokens": 2**70, "top_k": -1}.items():
        with pytest.raises(ValueError, match=f"{name} is {value}, expected 0 to 2147483647"):
            model.generate([1], **{"max_new_tokens": 3, name: value})
    for name, value in {"max_new_tokens": 1.5, "top_k": "3", "stop_token": "a"}.items():
        with pytest.raises(TypeError, match=f"{name} is {value!r}"):
            model.stream([1], **{"max_new_tokens": 3, name: value})
    with pytest.raises(ValueError, match="one row of token ids, got shape"):
        model.stream([[1, 2]], 3)
    with pytest.raises(ValueError, match="threads is -1, expected 0 to 1024"):
        llmc.GPT2(TINY, threads=-1)


def test_generation_errors(tiny):
    model = tiny()
    for call, message in [
        (lambda: model.generate([[1], []], 5), "empty"),
        (lambda: model.generate([], 5), "empty"),
        (lambda: model.generate([1, 61], 5), "token 61 .* 61"),
        (lambda: model.generate([-1], 5), "token -1"),
        (lambda: model.generate([1], 5, top_p=0.0), "top_p is 0"),
        (lambda: model.generate([1], 5, seed=0), "seed is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_cache_errors(tiny):
    model = tiny()
    with pytest.raises(ValueError, match="max_len.* 20.* 19"):
        model.kv_cache(1, 20)
    with pytest.raises(ValueError, match="B is 0"):
        model.kv_cache(0, 5)
    cache = model.kv_cache(2, 5)
    for call, message in [
        (lambda: cache.prefill(2, [1]), "sequence 2"),
        (lambda: cache.prefill(0, []), "no tokens"),
        (lambda: cache.prefill(0, [1] * 6), " 6.* 5"),
        (lambda: cache.decode([1]), "1 .* 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    assert cache.length(0) == 0


# ---- configurations and memory ----

DESCRIPTORS = {
    "d6": (6, 384, 6, 30_357_504),
    "d12": (12, 768, 12, 124_475_904),
    "gpt2:d12": (12, 768, 12, 124_475_904),
    "d24": (24, 1024, 16, 354_871_296),
    "d36": (36, 1280, 20, 774_090_240),
    "d48": (48, 1600, 25, 1_557_686_400),
    "d60": (60, 1920, 30, 2_754_259_200),
    "d72": (72, 2880, 30, 7_316_887_680),
    "d84": (84, 3456, 36, 12_220_657_920),
    "gpt3:c384": (6, 384, 6, 30_750_720),
    "gpt3:c768": (12, 768, 12, 125_262_336),
    "gpt3:c1024": (24, 1024, 16, 355_919_872),
    "gpt3:c1536": (24, 1536, 16, 760_372_224),
    "gpt3:c2048": (24, 2048, 16, 1_315_819_520),
    "gpt3:c2560": (32, 2560, 32, 2_651_673_600),
    "gpt3:c4096": (32, 4096, 32, 6_658_596_864),
    "gpt3:c12288": (96, 12288, 96, 174_604_836_864),
}


@pytest.mark.parametrize("depth", [1, 2, 7, 13, 37, 96, 1000])
def test_a_depth_that_llm_c_has_not(depth):
    """The rule is d6's and d12's, which it gives too: heads of 64 channels, as many as layers."""
    for name in (f"d{depth}", f"gpt2:d{depth}"):
        assert llmc.GPT2Config.from_descriptor(name) == llmc.GPT2Config(1024, 50257, depth, depth, 64 * depth, 50304)
    for llm_c in (6, 12):
        assert DESCRIPTORS[f"d{llm_c}"][:3] == (llm_c, 64 * llm_c, llm_c)


@pytest.mark.parametrize("descriptor", DESCRIPTORS)
def test_descriptors(descriptor):
    L, C, NH, parameters = DESCRIPTORS[descriptor]
    config = llmc.GPT2Config.from_descriptor(descriptor)
    length = 2048 if descriptor.startswith("gpt3") else 1024
    assert config == llmc.GPT2Config(length, 50257, L, NH, C, 50304)
    assert config.num_parameters == parameters
    plan = _llmc.memory_plan(config.native(), _llmc.ModelOptions(), 1, 1, True, 8 * parameters)
    assert (plan.parameters, plan.gradients, plan.optimizer) == (4 * parameters, 4 * parameters, 8 * parameters)


def test_descriptor_changes():
    config = llmc.GPT2Config.from_descriptor("d6", vocab_size=257, max_seq_len=64)
    assert (config.vocab_size, config.padded_vocab_size, config.max_seq_len, config.num_layers) == (257, 384, 64, 6)


@pytest.mark.parametrize(
    "descriptor,message",
    [
        ("gpt3:c5140", "5140"),
        (
            "d12foo",
            "'d12foo': expected dN, N layers: 6, 12, 24, .*any other N up to 1000 with 64 N channels in N heads",
        ),
        *(
            (name, f"descriptor '{name}': expected dN")
            for name in ("d0", "d012", "d-1", "d1001", "d99999999999", "d", "gpt2:")
        ),
        ("gpt3:c999", "'gpt3:c999': expected gpt3:cN, N channels, N one of 384, 768"),
        ("gpt4", "expected dN, .*; or gpt3:cN, N channels: 384, 768"),
        ("", "expected dN"),
    ],
)
def test_unknown_descriptors(descriptor, message):
    with pytest.raises(ValueError, match=message):
        llmc.GPT2Config.from_descriptor(descriptor)


def test_config_of_another_family():
    assert llmc.GPT2Config.from_native(TINY.native()) == TINY
    with pytest.raises(llmc.Error, match="is a SimpleNamespace, expected a GPT2Config"):  # with the same fields
        llmc.GPT2Config.from_native(SimpleNamespace(**asdict(TINY)))


def test_impossible_configs():
    for changes, message in [
        ({"channels": 770}, "channels 770.*num_heads 12"),
        ({"num_layers": 0}, "num_layers"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_heads": -12}, "num_heads"),
        ({"padded_vocab_size": 50000}, "padded_vocab_size 50000.*vocab_size 50257"),
        ({"channels": 12 << 40}, "out of range"),
    ]:
        with pytest.raises(ValueError, match=message):
            llmc.GPT2Config(**changes)


@pytest.mark.parametrize(
    "dtype,grad_dtype,master", [("f32", "f32", True), ("bf16", "bf16", True), ("bf16", "f32", False)]
)
@pytest.mark.parametrize("recompute", [0, 1, 2])
def test_memory_plan_is_what_is_there(tiny, dtype, grad_dtype, master, recompute):
    """The plan has the sizes of the tensors that are there; activations are counted here once more, one by one."""
    B, T, rows = 3, 19, 7
    model = tiny(dtype=dtype, grad_dtype=grad_dtype)
    options = _llmc.ModelOptions(dtype, grad_dtype, recompute, rows)
    optimizer_bytes = model.num_parameters * llmc.AdamW.bytes_per_parameter(dtype, master)
    plan = _llmc.memory_plan(TINY.native(), options, B, T, True, optimizer_bytes)
    size = {"f32": 4, "bf16": 2}
    assert plan.parameters == model.num_parameters * size[dtype]
    assert plan.gradients == sum(model.gradient_tensors()[n].numel for n in NAMES) * size[grad_dtype]
    optimizer = llmc.AdamW(model, master_weights=master)
    assert 0 <= optimizer.bytes - plan.optimizer < 256 * 60  # each tensor is aligned to 256 bytes
    L, C, NH, Vp, N = TINY.num_layers, TINY.channels, TINY.num_heads, TINY.padded_vocab_size, B * T
    kept = L * (3 + 1 + 1 + 4 + 1)  # qkv, atty, residual2, fch, residual3
    kept += (1 if recompute == 2 else L) * 2 + (1 if recompute else L) * 4  # ln1, ln2; fch_gelu
    kept += 1 + 1 + 1 + 1 + 1 + 4  # encoded, lnf, branch, dresidual, dbranch, dhidden
    statistics = L * (4 + NH) + 2 + 1  # mean and rstd of ln1 and ln2, lse; of lnf; losses
    account = (kept * N * C + rows * Vp) * size[dtype] + statistics * N * 4 + 2 * N * 4
    assert 0 <= plan.activations - account < 256 * 30
    assert plan.total == plan.parameters + plan.gradients + plan.optimizer + plan.activations
    twice = _llmc.memory_plan(TINY.native(), options, B, T, True, optimizer_bytes, micro_gradients=True)
    assert twice.gradients == 2 * plan.gradients and twice.total == plan.total + plan.gradients
    evaluation = _llmc.memory_plan(TINY.native(), options, B, T, False, optimizer_bytes)
    assert evaluation.gradients == evaluation.optimizer == 0 and evaluation.activations < plan.activations


def test_no_buffer_is_quadratic_in_time():
    """Twice the context takes twice the memory, and logits exist for a chunk of rows only, never (B, T, Vp)."""
    config = llmc.GPT2Config(max_seq_len=1 << 16).native()
    plans = [_llmc.memory_plan(config, _llmc.ModelOptions(), 1, T).activations for T in (1 << 15, 1 << 16)]
    assert plans[1] < 2.01 * plans[0]
    assert plans[0] - _llmc.memory_plan(
        config, _llmc.ModelOptions(classifier_rows=1), 1, 1 << 15
    ).activations == pytest.approx(1023 * 50304 * 4, abs=512)


def test_shapes_may_change_from_batch_to_batch(tiny, tokens):
    """One model takes a larger, a smaller and a larger batch, and computes each as a new model does."""
    model = tiny()
    for B, T in [(1, 4), (3, 19), (2, 7), (4, 19), (1, 1)]:
        x = tokens(B, T)
        assert_same(train(model, x, x), train(tiny(), x, x))


# ---- parameters as arrays ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_are_views(tokens, dtype):
    """On the CPU writing into an item writes into the model, for as long as the item is kept."""
    model, x = llmc.GPT2(TINY, dtype=dtype), tokens(2, 19)
    assert list(model.parameters) == list(model.gradients) == NAMES
    losses = [model.evaluate(x, x)]
    view = model.parameters["fcw"]
    assert view.shape == (2, 132, 33) and not view.flags.owndata
    for factor in (3, 2):
        view *= factor
        losses.append(model.evaluate(x, x))
        other = llmc.GPT2(TINY, dtype=dtype)
        other.parameters["fcw"] = view
        assert other.evaluate(x, x) == losses[-1]
    assert len(set(losses)) == 3
    del model  # the view keeps the memory
    assert view.any()


# ---- activations as arrays ----


@pytest.mark.parametrize("recompute", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_are_what_forward_computed(tiny, tokens, dtype, recompute):
    """Each from another one, by its formula in float64; and backward leaves them as they are."""
    model, x = tiny(dtype=dtype, recompute=recompute), tokens(2, 5)
    with pytest.raises(llmc.Error, match="no activations"):
        model.activations  # noqa: B018
    model.forward(x)
    a = {name: np.array(array, np.float64) for name, array in model.activations.items()}
    p = {name: np.array(array, np.float64) for name, array in model.parameters.items()}
    shared = {0: set(), 1: {"fch_gelu"}, 2: {"fch_gelu", "ln1", "ln2"}}[recompute]
    B, T, L, NH, C = 2, 5, 2, 3, 33
    of_layers = {
        "ln1": (C,),
        "ln1_mean": (),
        "ln1_rstd": (),
        "qkv": (3 * C,),
        "atty": (C,),
        "residual2": (C,),
        "ln2": (C,),
    }
    of_layers |= {"ln2_mean": (), "ln2_rstd": (), "fch": (4 * C,), "fch_gelu": (4 * C,), "residual3": (C,)}
    shapes = {name: (L, B, T, *shape) for name, shape in of_layers.items() if name not in shared}
    shapes |= {"encoded": (B, T, C), "lse": (L, B, NH, T), "lnf": (B, T, C), "lnf_mean": (B, T), "lnf_rstd": (B, T)}
    assert {name: array.shape for name, array in a.items()} == shapes

    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == "f32" else {"rtol": 0.03, "atol": 0.1}
    np.testing.assert_allclose(a["encoded"], p["wte"][x] + p["wpe"][:T], **close)
    stream = [a["encoded"], *a["residual3"]]
    for l in range(L):
        np.testing.assert_allclose(a["ln1_mean"][l], stream[l].mean(-1), **close)
        np.testing.assert_allclose(a["ln2_rstd"][l], (a["residual2"][l].var(-1) + 1e-5) ** -0.5, **close)
        np.testing.assert_allclose(
            a["residual2"][l], stream[l] + a["atty"][l] @ p["attprojw"][l].T + p["attprojb"][l], **close
        )
        q, k, v = a["qkv"][l].reshape(B, T, 3, NH, C // NH).transpose(2, 0, 3, 1, 4)
        scores = np.where(np.tri(T, dtype=bool), q @ k.swapaxes(2, 3) / np.sqrt(C // NH), -np.inf)
        np.testing.assert_allclose(a["lse"][l], np.log(np.exp(scores).sum(-1)), **close)
        att = np.exp(scores - a["lse"][l][..., None]) @ v
        np.testing.assert_allclose(a["atty"][l], att.swapaxes(1, 2).reshape(B, T, C), **close)
    np.testing.assert_allclose(a["lnf_mean"], stream[L].mean(-1), **close)
    model.backward(x)
    for name, array in model.activations.items():
        np.testing.assert_array_equal(array.astype(np.float64), a[name], err_msg=name)


def test_activations_are_views_that_keep_their_memory(tokens):
    """Of a batch of the same size the next forward() writes into a view; for a larger one the model takes other memory."""
    model, x = llmc.GPT2(TINY), tokens(2, 7)
    model.forward(x)
    view = model.activations["lnf"]
    first = view.copy()
    assert not view.flags.owndata and not view.flags.writeable
    assert np.shares_memory(view, model.activations["lnf"])
    model.forward(tokens(2, 7))
    assert not np.array_equal(view, first) and np.array_equal(view, model.activations["lnf"])
    model.forward(x)
    model.forward(tokens(4, 19))
    assert model.activations["lnf"].shape == (4, 19, 33)
    np.testing.assert_array_equal(view, first)
    with pytest.raises(KeyError):
        model.activations["wte"]
    model.evaluate(x, x)  # in the memory of one layer
    with pytest.raises(llmc.Error, match="evaluate"):
        model.activations  # noqa: B018
    model.forward(x)
    view = model.activations["lnf"]
    del model
    np.testing.assert_array_equal(view, first)


def test_table_of_parameters(tiny):
    """The table's shapes are those of the tensors; matrices and embeddings decay; only wte is padded."""
    table = _llmc.parameter_table(TINY.native())
    shapes = {name: tuple(t.shape) for name, t in tiny().parameter_tensors().items()}
    assert [s.name for s in table] == NAMES
    assert {s.name: s.shape for s in table} == TINY.parameter_shapes == shapes
    assert {s.name for s in table if not s.per_layer} == {"wte", "wpe", "lnfw", "lnfb"}
    assert {s.name for s in table if s.decay} == {"wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw"}
    padding = TINY.padded_vocab_size - TINY.vocab_size
    assert padding > 0 and {s.name: s.padding for s in table if s.padding} == {"wte": padding}


def test_models_on_one_backend(device, tokens):
    backend, x = _llmc.Backend(device), tokens(2, 19)
    models = [llmc.GPT2(TINY, backend=backend, seed=s) for s in (1, 1, 2)]
    assert all(m.backend is backend and m.device == backend.info().name for m in models)
    a, b, c = (m.evaluate(x, x) for m in models)
    assert a == b != c


def test_parameters_refuse_nonsense(tiny):
    model = tiny()
    with pytest.raises(KeyError, match="nothing"):
        model.parameters["nothing"]
    with pytest.raises(KeyError, match="nothing"):
        model.parameters["nothing"] = 0
    with pytest.raises(ValueError, match=r"lnfw .*\(33,\).*\(34,\)"):
        model.parameters["lnfw"] = np.zeros(34)


# ---- arguments ----


def test_inputs_that_cannot_be(tiny, tokens):
    model, good = tiny(), tokens(2, 5)
    for inputs, message in [
        ([[0, 61]], "token 61 .*1.* 61"),
        ([[-1, 0]], "token -1"),
        (np.zeros((1, 20), int), "T is 20.* 19"),
        (np.zeros((0, 4), int), "B is 0 and T is 4"),
        (np.zeros((4, 0), int), "B is 4 and T is 0"),
        ([1, 2, 3], r"inputs .*\(B, T\)"),
        ([[0.5]], "float64"),
        ([[2**40]], "32 bits"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.forward(inputs)
        with pytest.raises(ValueError, match=message):
            model.logits(inputs)
    model.forward(good)
    with pytest.raises(ValueError, match="token 61 .*9"):
        model.backward(np.where(np.arange(10).reshape(2, 5) == 9, 61, good))
    with pytest.raises(ValueError, match=r"targets .*\(2, 4\).*\(2, 5\)"):
        model.evaluate(good, good[:, :4])
    for options, message in [
        ({"dtype": "f16"}, "f16"),
        ({"recompute": 3}, "recompute is 3"),
        ({"classifier_rows": 0}, "classifier_rows is 0"),
        ({"backend": model.backend, "threads": 2}, "threads 2"),
        ({"device": "tpu"}, "tpu"),
        ({"dtype": "f32", "grad_dtype": "bf16"}, "f32"),
    ]:
        with pytest.raises(ValueError, match=message):
            llmc.GPT2(TINY, **options)


def test_rows_of_logits_by_device_and_memory(device):
    """A model that is given none takes what its device has room for: there is no batch yet to plan for."""
    config = llmc.GPT2Config()  # 124M

    def on_a_gpu(free, dtype="bf16"):
        gpu = SimpleNamespace(info=lambda: SimpleNamespace(name="cuda:0", free_bytes=free))
        return default_classifier_rows(gpu, config, dtype)

    bf16_row = 2 * config.padded_vocab_size
    assert on_a_gpu(80 << 30) == on_a_gpu(80 << 30, "f32") == 16384
    assert on_a_gpu(16 * 16384 * bf16_row) == 16384
    assert on_a_gpu(16 * 16384 * bf16_row - 1) == on_a_gpu(16 * 16384 * bf16_row, "f32") == 4096
    assert on_a_gpu(16 * 4096 * bf16_row - 1) == on_a_gpu(1) == 1024
    model = llmc.GPT2(TINY, device=device)
    assert model.classifier_rows == (1024 if device == "cpu" else 16384)
    assert llmc.GPT2(TINY, device=device, classifier_rows=5).classifier_rows == 5


def test_seeds(tokens):
    x = tokens(2, 19)
    losses = [llmc.GPT2(TINY, seed=s).evaluate(x, x) for s in (42, 42, 43, None)]
    assert losses[0] == losses[1] != losses[2]
    assert losses[3] == pytest.approx(math.log(TINY.vocab_size))  # all weights are 0, so every token is equally likely


def test_randomize_makes_attention_matter(tiny, tokens):
    """With these weights the order of the context changes the result, as the tests above assume."""
    x = tokens(1, 19)
    model = tiny()
    randomize(model)
    swapped = x.copy()
    swapped[0, :18] = x[0, :18][::-1]
    assert abs(model.logits(x)[0, -1] - model.logits(swapped)[0, -1]).max() > 0.1
