"""The oracle's formulas of gradients against the complex step. The tests of the ops rely on these formulas."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import oracle
import pytest


def assert_exact(x, y):
    assert (oracle.error(x, y) <= 1e-12).all()


def test_gelu(rng):
    x, dout = rng.standard_normal((2, 50)) * 3
    assert_exact(oracle.gelu_gradient(x, dout), oracle.complex_step(oracle.gelu, x, dout))


def test_layernorm(rng):
    x, dout, (weight, bias) = rng.standard_normal((4, 7)), rng.standard_normal((4, 7)), rng.standard_normal((2, 7))
    dx, dweight, dbias = oracle.layernorm_gradient(dout, x, weight)
    assert_exact(dx, oracle.complex_step(lambda z: oracle.layernorm(z, weight, bias)[0], x, dout))
    assert_exact(dweight, oracle.complex_step(lambda z: oracle.layernorm(x, z, bias)[0], weight, dout))
    assert_exact(dbias, oracle.complex_step(lambda z: oracle.layernorm(x, weight, z)[0], bias, dout))


def test_matmul(rng):
    x, weight, bias, dout = (rng.standard_normal(s) for s in [(3, 5), (4, 5), (4,), (3, 4)])
    dx, dweight, dbias = oracle.matmul_gradient(dout, x, weight)
    assert_exact(dx, oracle.complex_step(lambda z: oracle.matmul(z, weight, bias), x, dout))
    assert_exact(dweight, oracle.complex_step(lambda z: oracle.matmul(x, z, bias), weight, dout))
    assert_exact(dbias, oracle.complex_step(lambda z: oracle.matmul(x, weight, z), bias, dout))


@pytest.mark.parametrize("T", [1, 6])
def test_attention(rng, T):
    qkv, dout = rng.standard_normal((2, T, 18)), rng.standard_normal((2, T, 6))
    out, lse = oracle.attention(qkv, 2)
    got = np.concatenate(oracle.attention_gradient(dout, qkv, out, lse, 2), axis=-1)
    assert_exact(got, oracle.complex_step(lambda z: oracle.attention(z, 2)[0], qkv, dout))


def test_crossentropy(rng):
    logits, targets, dout = rng.standard_normal((4, 9)), np.array([0, -1, 6, 3]), np.full(4, 0.37)
    got = oracle.crossentropy_gradient(logits, targets, 0.37, 7)
    assert_exact(got, oracle.complex_step(lambda z: oracle.crossentropy(z, targets, 7), logits, dout))


def test_encoder(rng):
    tokens, wte, wpe = rng.integers(0, 3, (2, 5)), rng.standard_normal((4, 3)), rng.standard_normal((6, 3))
    dout, start = rng.standard_normal((2, 5, 3)), np.zeros(2, dtype=int)
    dwte, dwpe = oracle.encoder_gradient(np.zeros((4, 3)), np.zeros((6, 3)), dout, tokens)
    assert_exact(dwte, oracle.complex_step(lambda z: oracle.encoder(tokens, z, wpe, start), wte, dout))
    assert_exact(dwpe, oracle.complex_step(lambda z: oracle.encoder(tokens, wte, z, start), wpe, dout))


def test_guide(rng):
    """The formulas that doc/adding_a_kernel.md derives, and the test that it gives for them."""
    guide = (Path(__file__).parents[2] / "doc" / "adding_a_kernel.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n([\s\S]*?)^```", guide, re.MULTILINE)
    formulas = {**vars(oracle), "_sigmoid": vars(oracle)["gelu"].__globals__["_sigmoid"]}
    for start in ("def rmsnorm(", "def silu("):
        (block,) = [b for b in blocks if b.startswith(start)]
        exec(block, formulas)
    names = {"oracle": SimpleNamespace(**formulas), "assert_exact": assert_exact}
    (block,) = [b for b in blocks if b.startswith("def test_rmsnorm(rng)")]
    exec(block, names)
    names["test_rmsnorm"](rng)
    x, dout = rng.standard_normal((2, 50)) * 3
    assert_exact(formulas["silu_gradient"](x, dout), oracle.complex_step(formulas["silu"], x, dout))
