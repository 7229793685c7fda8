"""Recordings (CUDA graphs): the same bits as without them, whatever happens between two launches.

dev/ci/check_recordings.cpp has what a model does not meet: ops that cannot be recorded, and mistakes among them.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

from llmc import _llmc

pytestmark = pytest.mark.cuda

B = 3


@pytest.fixture
def backend(cuda):
    """Return a backend that has recorded nothing yet."""
    return _llmc.Backend("cuda")


def model(backend, seed=1):
    config = _llmc.GPT2Config(
        max_seq_len=64, vocab_size=61, padded_vocab_size=64, num_layers=2, num_heads=3, channels=48
    )
    m = _llmc.GPT2(config, backend, _llmc.ModelOptions("bf16", "f32", 0, classifier_rows=13))
    m.init_weights(seed)
    return m


def recorded(backend):
    found = re.search(r"graphs \w+ \((\d+) recorded\)", backend.info().options)
    return int(found[1]) if found else 0


class Generation:
    """A cache whose sequences go on step by step, and the tokens of each step."""

    def __init__(self, m, seed):
        self.cache, self.tokens = _llmc.KVCache(m, B, 60), []
        self.coins = np.random.default_rng(seed).random((64, B)).astype(np.float32)
        for b in range(B):
            self.cache.prefill(b, np.arange(1, 3 + b))

    def step(self, *options):
        last = self.tokens[-1] if self.tokens else np.arange(B)
        self.cache.queue_tokens(np.array(last, np.int32), self.coins[len(self.tokens)], _llmc.SamplerOptions(*options))
        self.tokens.append(self.cache.read_tokens().tolist())


def without_graphs(steps):
    """Return what `steps` gives without recordings."""
    backend = _llmc.Backend("cuda")
    backend.set_option("graphs", "off")
    result = steps(backend)
    assert recorded(backend) == 0
    return result


def test_generation_is_recorded_once(backend):
    def steps(backend):
        g = Generation(model(backend), 1)
        for _ in range(8):
            g.step(0.9, 20, 0.95)
        return g.tokens

    assert steps(backend) == without_graphs(steps)
    assert recorded(backend) == 1 and backend.info().fallbacks == ""


def test_what_comes_between_two_launches(backend):
    def steps(backend):
        m = model(backend)
        g, log = Generation(m, 2), []
        for _ in range(3):
            g.step(1.0)
        for _ in range(3):  # other options of the sampler
            g.step(0.7, 5)
        g.cache.clear(1)
        g.cache.prefill(1, np.arange(30))  # a longer prompt than any before: the activations' memory moves
        for _ in range(3):
            g.step(0.7, 5)
        backend.set_option("fused_gelu", "on")
        for _ in range(3):
            g.step(0.7, 5)
        m.forward(np.zeros((2, 33), np.int32))
        m.backward(np.ones((2, 33), np.int32))  # scratch memory grows
        for _ in range(3):
            log.append(g.cache.decode(np.array(g.tokens[-1], np.int32)).tobytes())
            g.step(0.7, 5)
        m.init_weights(7)  # in place
        for _ in range(3):
            g.step(0.7, 5)
        return g.tokens, log

    assert steps(backend) == without_graphs(steps)
    assert recorded(backend) == 6


def test_two_caches_and_two_models(backend):
    def steps(backend):
        models = [model(backend, seed) for seed in (1, 2)]
        all_of_them = [Generation(models[i // 2], i) for i in range(4)]
        for _ in range(6):
            for g in all_of_them:
                g.step(1.0)
        return [g.tokens for g in all_of_them]

    assert steps(backend) == without_graphs(steps)
    assert recorded(backend) == 4


def test_a_model_that_is_freed(backend):
    def steps(backend):
        tokens = []
        for seed in range(3):  # each at the addresses of the one before, if the allocator will have it so
            g = Generation(model(backend, seed), seed)
            for _ in range(4):
                g.step(1.0)
            tokens.append(g.tokens)
            del g
        return tokens

    assert steps(backend) == without_graphs(steps)
    assert recorded(backend) == 3


def test_an_error_in_between(backend):
    def steps(backend):
        g = Generation(model(backend), 3)
        for _ in range(3):
            g.step(1.0)
        with pytest.raises(ValueError, match="temperature"):
            g.step(-1.0)
        with pytest.raises(ValueError, match="vocabulary"):
            g.cache.decode(np.full(B, 1000, np.int32))
        with pytest.raises(_llmc.Error, match="out of memory"):
            backend.empty([1 << 40])
        for _ in range(3):
            g.step(1.0)
        return g.tokens

    assert steps(backend) == without_graphs(steps)
    assert recorded(backend) == 1
