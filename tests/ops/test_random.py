"""The random generators and the sampler, against values that llm.c and PyTorch give."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import TINY

import llmc
from llmc import _llmc
from llmc.formats.shards import write_shard


def test_mt19937_golden():
    """The first draws of seed 42, and those that llm.c's rand.h states for seed 137: integers and normals from one generator.

    The normals stated there are PyTorch's, which computes fewer than 16 of them in double. rand.h computes in float, as llmc does, and
    differs from them by an ulp.
    """
    rng = _llmc.Mt19937(42)
    assert [rng.randint32() for _ in range(3)] == [1608637542, 3421126067, 4083286876]
    rng = _llmc.Mt19937(137)
    assert [rng.randint32() for _ in range(5)] == [4053805790, 2173880614, 380293709, 1237255315, 2986595568]
    few = [0.7947664260864258, 1.4369317293167114, -0.2292192131280899, 0.47556325793266296]
    few += [-0.6334410905838013, -0.5791953802108765, -0.0925704762339592, -0.8659197092056274]
    np.testing.assert_allclose(rng.normal(8), few, rtol=0, atol=2.0**-23)
    assert rng.randint32() == 2186503452
    many = [-1.2813878059387207, -2.646395683288574, -0.06569503247737885, 0.2180829495191574]
    np.testing.assert_allclose(rng.normal(16)[:4], many, rtol=0, atol=2.0**-23)
    assert rng.randint32() == 2756748748


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 31, 1000])
def test_normal_is_pytorchs(n):
    """PyTorch's vectorised log and cos differ in the last bits: 2^-22 of the largest deviation that a draw can have is allowed."""
    drawn = _llmc.Mt19937(1234).normal(n, 0.5, 2.0)
    expected = torch.empty(n).normal_(0.5, 2.0, generator=torch.Generator().manual_seed(1234)).numpy()
    np.testing.assert_allclose(drawn, expected, rtol=0, atol=2.0**-22 * 2 * math.sqrt(2 * math.log(1e12)))


def test_normal_has_the_moments_asked_for():
    x = _llmc.Mt19937(7).normal(1 << 16, 3.0, 0.5).astype(np.float64)
    assert abs(x.mean() - 3.0) < 4 * 0.5 / 2**8 and abs(x.std() - 0.5) < 4 * 0.5 / 2**8.5


# GPT-2 124M of seed 42, as llm.c's rand.h draws it: the first four values of each tensor.
D12 = {
    "wte": (0.0385382995, 0.0297456831, 0.0180143435, -0.0421104282),
    "wpe": (-0.00916235521, -0.018614769, -0.0294702277, -0.00321658584),
    "qkvw": (-0.0045566773, 0.00723999506, 0.0163001623, -0.0109933),
    "attprojw": (0.00113274355, 0.00542639615, 0.00018079413, 0.00136883021),
    "fcw": (-0.0111787794, 0.0200366024, 0.0382305384, 0.0188154224),
    "fcprojw": (0.00437752157, -0.00717385672, -0.00581803452, -0.00102986814),
}
# The first value of the second layer.
SECOND_LAYER = {"qkvw": 0.0248654913, "attprojw": -0.00435216958, "fcw": 0.0306944046, "fcprojw": -0.00515647139}


def test_initial_weights_golden():
    model = llmc.GPT2.from_descriptor("d12")
    tensors = model.parameter_tensors()
    for name, first in D12.items():
        np.testing.assert_allclose(tensors[name].read(0, 4), first, rtol=2e-7)
    for name, value in SECOND_LAYER.items():
        layer = tensors[name].numel // 12
        np.testing.assert_allclose(tensors[name].read(layer, 1), value, rtol=2e-7)
    for name in ("ln1w", "ln2w", "lnfw"):
        assert (model.parameters[name] == 1).all()
    for name in ("ln1b", "qkvb", "attprojb", "ln2b", "fcb", "fcprojb", "lnfb"):
        assert not model.parameters[name].any()
    assert not model.parameters["wte"][50257:].any()


@pytest.mark.parametrize("seed", [42, 7])
def test_initial_weights_are_pytorchs(seed):
    from llmc.reference import GPT

    config = llmc.GPT2Config(max_seq_len=10, vocab_size=61, num_layers=3, num_heads=3, channels=33)
    parameters, expected = llmc.GPT2(config, seed=seed).parameters, GPT(config, seed=seed).parameters_llmc()
    assert list(parameters) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(parameters[name], value, rtol=0, atol=4e-8)
    rounded = llmc.GPT2(config, seed=seed, dtype="bf16").parameters
    for name in rounded:
        np.testing.assert_array_equal(rounded[name], parameters[name].astype(rounded[name].dtype))


def test_xorshift_golden():
    coin = _llmc.XorShift(1337)
    assert [coin.randint32() for _ in range(4)] == [989205090, 818269915, 1335155955, 3876892996]
    coin = _llmc.XorShift(1337)
    np.testing.assert_allclose(
        [coin.randfloat32() for _ in range(4)], [0.230317235, 0.190518260, 0.310865164, 0.902659476], rtol=1e-8
    )
    coin = _llmc.XorShift(13371337)
    assert [coin.randint32() for _ in range(4)] == [740755583, 337499614, 90980514, 844950619]
    with pytest.raises(ValueError, match="seed is 0"):
        _llmc.XorShift(0)


def test_permutation_golden():
    """The order of tinyshakespeare's samples in llm.c: 1192 of B=4, T=64, and 74 of T=1024."""
    assert _llmc.Mt19937(42).permutation(1192)[:10] == [408, 791, 914, 1057, 81, 450, 299, 907, 582, 321]
    assert _llmc.Mt19937(42).permutation(74)[:10] == [29, 58, 10, 4, 11, 25, 63, 56, 72, 65]
    assert _llmc.Mt19937(42).permutation(0) == [] and _llmc.Mt19937(42).permutation(1) == [0]


# ---- the sampler ----


def sample(logits, coin, **options):
    return _llmc.sample(np.asarray(logits, np.float32), coin, **options)


def test_sampling_walks_the_probabilities_in_order():
    logits = np.log([0.1, 0.4, 0.2, 0.3])
    assert [sample(logits, c) for c in (0.0, 0.09, 0.11, 0.49, 0.51, 0.69, 0.71, 0.999)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [sample(logits, c, temperature=0.0) for c in (0.0, 0.999)] == [1, 1]
    # The top 2 are tokens 1 and 3; in the order of ids their probabilities are 4/7 and 3/7.
    assert [sample(logits, c, top_k=2) for c in (0.0, 0.57, 0.58, 0.999)] == [1, 1, 3, 3]
    # 0.4 + 0.3 exceed 0.6, so the nucleus is the same two tokens.
    assert [sample(logits, c, top_p=0.6) for c in (0.0, 0.57, 0.58, 0.999)] == [1, 1, 3, 3]
    assert [sample(logits, c, top_p=1e-6) for c in (0.0, 0.999)] == [1, 1]
    # Temperature 1/2 squares the probabilities: 1/30, 16/30, 4/30, 9/30.
    assert [sample(logits, c, temperature=0.5) for c in (0.03, 0.04, 0.56, 0.58, 0.69, 0.71)] == [0, 1, 1, 2, 2, 3]


def test_sampling_matches_llm_c(rng):
    """Without options, the token is the first whose running sum of probabilities exceeds the coin."""
    for _ in range(200):
        logits, coin = rng.standard_normal(61).astype(np.float32) * 3, rng.random(dtype=np.float32)
        p = np.exp(logits.astype(np.float64) - logits.max())
        below = np.cumsum(p / p.sum())
        if np.abs(below - coin).min() > 1e-6:  # skips coins so near to a sum that rounding decides
            assert sample(logits, float(coin)) == int(np.searchsorted(below, coin, side="right"))


def test_sampling_refuses_nonsense():
    for options, message in [
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            sample([0.0, 1.0], 0.5, **options)
    for logits in ([math.nan, math.nan], [-math.inf, -math.inf], [0.0, math.inf]):
        with pytest.raises(llmc.Error, match="cannot sample"):
            sample(logits, 0.5)
    with pytest.raises(llmc.Error, match="cannot sample"):
        sample([0.0, math.nan, 1.0], 0.5)


def test_seeds_out_of_range(tmp_path):
    write_shard(tmp_path / "data.bin", np.arange(100))
    model = llmc.GPT2(TINY)
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match=rf"seed is {seed}, expected 0 to 2\^32 - 1"):
            llmc.GPT2(TINY, seed=seed)
        with pytest.raises(ValueError, match=rf"seed is {seed}, expected 0 to 2\^32 - 1"):
            llmc.DataLoader(tmp_path / "data.bin", 1, 8, seed=seed)
    with pytest.raises(ValueError, match=r"seed is -1, expected 0 to 2\^64 - 1"):
        llmc.AdamW(model, seed=-1)
    with pytest.raises(ValueError, match=r"seed is -1, expected 1 to 2\^64 - 1"):
        model.generate([1], 3, seed=-1)
    # Each prompt has the seed after the last one's: the second wraps around to the lowest.
    assert len(model.generate([[1], [2]], 3, seed=2**64 - 1)) == 2
