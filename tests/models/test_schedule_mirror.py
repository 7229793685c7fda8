"""The model's schedule written once more, in Python over the bound ops: losses and gradients are equal to the last bit.

So csrc/model/gpt2.cpp cannot skip or repeat an op, or hand it the wrong buffer, without a difference here. The mirror keeps
every activation in a tensor of its own.
"""

from __future__ import annotations

import numpy as np
import pytest
from conftest import TINY
from oracle import put

import llmc

PER_LAYER = "ln1w ln1b qkvw qkvb attprojw attprojb ln2w ln2b fcw fcb fcprojw fcprojb".split()


class Mirror:
    """The weights and gradients of a model, as tensors by name and layer, and its forward and backward passes."""

    def __init__(self, model: llmc.GPT2) -> None:
        self.config, self.ops, self.rows = model.config, model.backend, model.classifier_rows
        self.dtype, self.grad_dtype = model.dtype, model.grad_dtype
        self.p, self.g = {}, {}
        for name, array in model.parameters.items():
            layers = enumerate(array) if name in PER_LAYER else [(None, array)]
            for l, a in layers:
                self.p[name, l] = put(self.ops, a, self.dtype)
                self.g[name, l] = self.ops.empty(list(a.shape), self.grad_dtype)
        self.loss = self.ops.empty([1])
        # As ranks would: the CPU adds the whole gradients of a micro-batch to the sum of those before it.
        self.whole = self.ops.info().name == "cpu" and self.grad_dtype == "f32"

    def new(self, *shape, dtype=None):
        return self.ops.empty(list(shape), dtype or self.dtype)

    def step(self, inputs, targets, scale):
        """Add a micro-batch's gradients and loss. The first call adds gradients to zeros, while the model may overwrite them."""
        if not self.whole:
            return self._step(inputs, targets, scale)
        sums, self.g = self.g, {key: self.ops.empty(t.shape, t.dtype) for key, t in self.g.items()}
        self._step(inputs, targets, scale)
        for key, t in sums.items():
            self.ops.residual_forward(t, t, self.g[key])
        self.g = sums

    def _step(self, inputs, targets, scale):
        ops, p, g, c = self.ops, self.p, self.g, self.config
        (B, T), C, L, NH, V, Vp = inputs.shape, c.channels, c.num_layers, c.num_heads, c.vocab_size, c.padded_vocab_size
        N, ids = B * T, put(ops, inputs, "i32")

        def norm(x, name, l=None, residual=None, branch=None):
            """Return (out, mean, rstd) of the layernorm of x, or of the sum of two tensors."""
            out, mean, rstd = self.new(N, C), self.new(N, dtype="f32"), self.new(N, dtype="f32")
            weight, bias = p[name + "w", l], p[name + "b", l]
            if branch is None:
                ops.layernorm_forward(out, mean, rstd, x, weight, bias)
            else:
                ops.fused_residual_layernorm_forward(x, out, mean, rstd, residual, branch, weight, bias)
            return out, mean, rstd

        x = self.new(B, T, C)
        ops.encoder_forward(x, ids, p["wte", None], p["wpe", None])
        ln1 = norm(x, "ln1", 0)
        kept = []
        for l in range(L):
            qkv, atty, lse = self.new(B, T, 3 * C), self.new(B, T, C), self.new(B, NH, T, dtype="f32")
            branch, residual2, residual3 = self.new(N, C), self.new(N, C), self.new(N, C)
            fch, fch_gelu = self.new(N, 4 * C), self.new(N, 4 * C)
            ops.matmul_forward(qkv, ln1[0], p["qkvw", l], p["qkvb", l])
            ops.attention_forward(atty, lse, qkv, NH)
            ops.matmul_forward(branch, atty, p["attprojw", l], p["attprojb", l])
            ln2 = norm(residual2, "ln2", l, residual=x, branch=branch)
            ops.matmul_gelu_forward(fch_gelu, fch, ln2[0], p["fcw", l], p["fcb", l])
            ops.matmul_forward(branch, fch_gelu, p["fcprojw", l], p["fcprojb", l])
            following = ("ln1", l + 1) if l + 1 < L else ("lnf", None)
            after = norm(residual3, *following, residual=residual2, branch=branch)
            kept.append((x, ln1, qkv, atty, lse, residual2, ln2, fch, fch_gelu))
            x, ln1 = residual3, after
        lnf, mean, rstd = ln1

        # The classifier, by chunks of rows.
        losses = self.new(N, dtype="f32")
        dlnf = np.empty((N, C), np.uint16 if self.dtype == "bf16" else np.float32)
        for begin in range(0, N, self.rows):
            count = min(self.rows, N - begin)
            part, dpart, logits = self.new(count, C), self.new(count, C), self.new(count, Vp)
            part.from_host(lnf.to_host()[begin : begin + count])
            ops.matmul_forward(logits, part, p["wte", None])
            loss = self.new(count, dtype="f32")
            ops.fused_classifier(loss, logits, put(ops, targets.ravel()[begin : begin + count], "i32"), scale / N, V)
            ops.matmul_backward(dpart, g["wte", None], None, logits, part, p["wte", None], True)
            losses.write(begin, loss.to_host())
            dlnf[begin : begin + count] = dpart.to_host()
        ops.sum(self.loss, losses, scale / N)

        dbranch, dx, dhidden = self.new(N, C), self.new(N, C), self.new(N, 4 * C)
        dbranch.from_host(dlnf)

        def norm_backward(name, l, below, inp, statistics):
            """below: the bias, and its layer, that was added to inp last."""
            gradients = g[name + "w", l], g[name + "b", l], g.get(below)
            ops.layernorm_backward(dx, *gradients, dbranch, inp, p[name + "w", l], *statistics)

        def linear_backward(name, l, dinp, dout, inp, bias=True):
            dbias = g[name + "b", l] if bias else None
            ops.matmul_backward(dinp, g[name + "w", l], dbias, dout, inp, p[name + "w", l], True)

        norm_backward("lnf", None, ("fcprojb", L - 1), x, (mean, rstd))

        for l, (x, ln1, qkv, atty, lse, residual2, ln2, fch, fch_gelu) in reversed(list(enumerate(kept))):
            ops.matmul_gelu_backward(dhidden, g["fcprojw", l], None, dx, fch_gelu, p["fcprojw", l], fch, True)
            linear_backward("fc", l, dbranch, dhidden, ln2[0])
            norm_backward("ln2", l, ("attprojb", l), residual2, ln2[1:])
            datty, dqkv = self.new(B, T, C), self.new(B, T, 3 * C)
            linear_backward("attproj", l, datty, dx, atty, bias=False)
            ops.attention_backward(dqkv, datty, qkv, atty, lse, NH)
            linear_backward("qkv", l, dbranch, dqkv, ln1[0])
            norm_backward("ln1", l, ("fcprojb", l - 1), x, ln1[1:])
        shaped = self.new(B, T, C)
        ops.copy(shaped, dx)
        ops.encoder_backward(g["wte", None], g["wpe", None], shaped, ids)


@pytest.mark.parametrize("dtype,grad_dtype", [("f32", "f32"), ("bf16", "f32"), ("bf16", "bf16")])
@pytest.mark.parametrize("recompute", [0, 2])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_mirror(tiny, device, tokens, dtype, grad_dtype, recompute, micro_batches):
    # cuBLASLt chooses kernels by alignment, too. With 128 channels all tensors begin at multiples of 256 bytes, as the mirror's do.
    config = llmc.GPT2Config(max_seq_len=19, vocab_size=61, num_layers=2, num_heads=2, channels=128)
    # 57 rows of logits: five chunks, the last of 5.
    options = {"dtype": dtype, "grad_dtype": grad_dtype, "recompute": recompute, "classifier_rows": 13}
    model = tiny(TINY if device == "cpu" else config, **options)
    if device != "cpu":
        # Recomputed GELU is by llmc's kernel, but inside of a matmul it is cuBLASLt's, which in bf16 may be an ulp off.
        model.backend.set_option("fused_gelu", "off")
    mirror = Mirror(model)
    model.zero_grad()
    for _ in range(micro_batches):
        x, y = tokens(3, 19), tokens(3, 19)
        y[1, 2] = -1
        model.forward(x)
        model.backward(y, 1 / micro_batches)
        mirror.step(x, y, 1 / micro_batches)
        assert mirror.loss.to_host()[0] == np.float32(model.mean_loss)
    for (name, l), tensor in mirror.g.items():
        gradient = model.gradient_tensors()[name].to_host()
        np.testing.assert_array_equal(tensor.to_host(), gradient if l is None else gradient[l], err_msg=f"{name} {l}")
