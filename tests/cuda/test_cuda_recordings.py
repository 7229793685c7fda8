"""Recordings (CUDA graphs) and the second stream: the same bits as without them, whatever happens in between.

dev/ci/check_recordings.cpp has what a model does not meet: ops that cannot be recorded, and mistakes among them. It is run where
LLMC_APPS names the folder that has it; dev/ci/emulation.sh builds it and runs this.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from llmc import _llmc

pytestmark = pytest.mark.cuda

B = 3


@pytest.fixture
def backend(cuda):
    """Return a backend that has recorded nothing yet."""
    return _llmc.Backend("cuda")


def model(backend, seed=1, recompute=0):
    config = _llmc.GPT2Config(
        max_seq_len=64, vocab_size=61, padded_vocab_size=64, num_layers=2, num_heads=3, channels=48
    )
    m = _llmc.GPT2(config, backend, _llmc.ModelOptions("bf16", "f32", recompute, classifier_rows=13))
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


def test_what_a_model_does_not_meet(cuda):
    folder = os.environ.get("LLMC_APPS")
    if folder is None:
        pytest.skip("LLMC_APPS does not name a folder with the C++ programs (dev/ci/emulation.sh does)")
    done = subprocess.run([Path(folder) / "check_recordings", "cuda"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- training ----

TRAINING = [
    {"graphs": "on"},
    {"overlap": "on"},
    {"graphs": "on", "overlap": "on"},
    {"overlap": "on", "bias_gradient": "product"},
]


def train(options, recompute=0, between=lambda m, step: None):
    """Return the bits of all gradients and weights after each update, and the backend."""
    backend = _llmc.Backend("cuda")
    for name, value in options.items():
        backend.set_option(name, value)
    m = model(backend, recompute=recompute)
    opt, rng, bits = _llmc.AdamW(m, weight_decay=0.1), np.random.default_rng(4), []
    for step in range(3):  # the first is queued, the second recorded, the third launched
        m.zero_grad()
        for _ in range(2):
            tokens = rng.integers(0, 61, (2, 18))
            m.forward(tokens[:, :-1])
            m.backward(tokens[:, 1:], 1 / 2)
        bits.append([m.gradient(name).to_host().tobytes() for name in m.parameter_names()])
        bits[-1].append(np.float32(m.loss()).tobytes())
        opt.step(1e-2)
        bits[-1].append(m.all_parameters().to_host().tobytes())
        bits[-1].append(between(m, step))
    return bits, backend


@functools.cache
def train_plainly(bias_gradient, recompute):
    return train({"bias_gradient": bias_gradient}, recompute)


@pytest.mark.parametrize("options", TRAINING, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
@pytest.mark.parametrize("recompute", [0, 2])
def test_training(cuda, options, recompute):
    bits, backend = train(options, recompute)
    wanted, plain = train_plainly(options.get("bias_gradient", "sum"), recompute)
    assert bits == wanted
    # Forward, and the first and the later backward passes of an update.
    assert recorded(plain) == 0 and recorded(backend) == (3 if "graphs" in options else 0)
    assert backend.info().fallbacks == plain.info().fallbacks


def test_training_with_other_things_between(cuda):
    """Evaluations take the same memory for other shapes; a longer one moves it; an option is set; a forward pass fails."""

    def between(m, step):
        if step == 0:
            m.backend.set_option("fused_gelu", "on")
        if step == 1:
            with pytest.raises(ValueError, match="vocabulary"):
                m.forward(np.full((2, 33), 1000))
        x = np.full((2, 40), 3, np.int32)
        return [m.evaluate(x[:, :n], x[:, :n]) for n in (7, 17 + 15 * step)]

    bits, backend = train({"graphs": "on", "overlap": "on"}, between=between)
    assert bits == train({}, between=between)[0]
    assert recorded(backend) > 2


def test_overlap_takes_memory_of_its_own(cuda):
    backend = _llmc.Backend("cuda")
    before = backend.workspace_bytes(8, 1024, 768, 12, "bf16")
    backend.set_option("overlap", "on")
    more = backend.workspace_bytes(8, 1024, 768, 12, "bf16") - before
    assert (32 << 20) < more < (40 << 20)
