"""A training step of a whole model, and generation, beside GPT-2 in NumPy, which no kernel and nothing of csrc/model takes part in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc import _llmc
from llmc.formats.state_file import join_master
from llmc.models.config import GPT2Config
from llmc.models.gpt2 import GPT2
from llmc.optim.adamw import AdamW
from llmc.selfcheck import formulas
from llmc.selfcheck.cases import F32, UNIT
from llmc.selfcheck.formulas import Array
from llmc.selfcheck.run import Outcome, failed, get, judged
from llmc.values import VALUE_DTYPES

# eps is larger than the gradients, so that an update is nearly proportional to its gradient. With a small one it would be nearly the
# gradient's sign, which an element near 0 owes to rounding.
RATES = {"lr": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 0.01, "weight_decay": 0.1}

Named = dict[str, Array]


@dataclass(frozen=True)
class Exact:
    """A model's weights and a batch, and in float64 what a step makes of them."""

    config: GPT2Config
    dtype: str
    weights: Named
    inputs: Array
    targets: Array
    logits: Array
    loss: float
    gradients: Named
    norm: float
    updated: Named


def exact_step(config: GPT2Config, dtype: str, B: int, T: int, seed: int) -> Exact:
    """Draw weights and a batch, and compute a training step in float64.

    Args:
        config: the model's shape.
        dtype: "f32" or "bf16", to which the weights are rounded first.
        B, T: the batch's shape. One target in eight is ignored.
        seed: of weights and batch.
    """
    rng = np.random.default_rng([seed, T])
    weights: Named = {}
    for spec in _llmc.parameter_table(config.native()):
        # Biases and layernorms differ from 0 and 1, so they count, too. Embeddings are so small that logits are of the order of 1.
        scale = spec.shape[-1] ** -0.5 if len(spec.shape) - spec.per_layer == 2 else 0.3
        w = scale * rng.standard_normal(spec.shape, dtype=np.float32) + spec.name.endswith(("ln1w", "ln2w", "lnfw"))
        w[len(w) - spec.padding :] = 0
        weights[spec.name] = w.astype(VALUE_DTYPES[dtype]).astype(np.float64)
    inputs, targets = (rng.integers(0, config.vocab_size, (B, T), dtype=np.int32) for _ in range(2))
    targets[rng.random((B, T)) < 1 / 8] = -1
    logits, loss, gradients = gpt2(config, weights, inputs, targets)
    norm = float(np.sqrt(sum((g * g).sum() for g in gradients.values())))
    after = updated(config, weights, gradients, norm)
    return Exact(config, dtype, weights, inputs, targets, logits, loss, gradients, norm, after)


def gpt2(config: GPT2Config, p: Named, inputs: Array, targets: Array) -> tuple[Array, float, Named]:
    """Return logits (B, T, V), mean loss and gradients of GPT-2, in the dtype of its weights."""
    (B, T), C, NH, V = inputs.shape, config.channels, config.num_heads, config.vocab_size
    g = {name: np.zeros_like(w) for name, w in p.items()}
    x = formulas.encoder(inputs, p["wte"], p["wpe"], np.zeros(B, int)).reshape(B * T, C)
    kept = []
    for l in range(config.num_layers):
        before = x
        ln1 = formulas.layernorm(x, p["ln1w"][l], p["ln1b"][l])[0]
        qkv = formulas.matmul(ln1, p["qkvw"][l], p["qkvb"][l]).reshape(B, T, 3 * C)
        atty, lse = formulas.attention(qkv, NH)
        middle = x = x + formulas.matmul(atty.reshape(B * T, C), p["attprojw"][l], p["attprojb"][l])
        ln2 = formulas.layernorm(x, p["ln2w"][l], p["ln2b"][l])[0]
        fch = formulas.matmul(ln2, p["fcw"][l], p["fcb"][l])
        hidden = formulas.gelu(fch)
        x = x + formulas.matmul(hidden, p["fcprojw"][l], p["fcprojb"][l])
        kept.append((before, ln1, qkv, atty, lse, middle, ln2, fch, hidden))
    lnf = formulas.layernorm(x, p["lnfw"], p["lnfb"])[0]
    logits, flat = formulas.matmul(lnf, p["wte"]), targets.reshape(-1)
    loss = float(formulas.crossentropy(logits, flat, V).mean())

    def linear(name: str, l: int, dout: Array, inp: Array) -> Array:
        dinp, g[name + "w"][l], g[name + "b"][l] = formulas.matmul_gradient(dout, inp, p[name + "w"][l])
        return dinp

    dlogits = formulas.crossentropy_gradient(logits, flat, 1 / len(flat), V)
    dlnf, g["wte"], _ = formulas.matmul_gradient(dlogits, lnf, p["wte"])
    dx, g["lnfw"], g["lnfb"] = formulas.layernorm_gradient(dlnf, x, p["lnfw"])
    for l, (before, ln1, qkv, atty, lse, middle, ln2, fch, hidden) in reversed(list(enumerate(kept))):
        dfch = formulas.gelu_gradient(fch, linear("fcproj", l, dx, hidden))
        dln2, g["ln2w"][l], g["ln2b"][l] = formulas.layernorm_gradient(linear("fc", l, dfch, ln2), middle, p["ln2w"][l])
        dx = dx + dln2
        datty = linear("attproj", l, dx, atty.reshape(B * T, C)).reshape(B, T, C)
        dqkv = np.concatenate(formulas.attention_gradient(datty, qkv, atty, lse, NH), axis=-1).reshape(B * T, 3 * C)
        dln1, g["ln1w"][l], g["ln1b"][l] = formulas.layernorm_gradient(
            linear("qkv", l, dqkv, ln1), before, p["ln1w"][l]
        )
        dx = dx + dln1
    g["wte"], g["wpe"] = formulas.encoder_gradient(g["wte"], g["wpe"], dx.reshape(B, T, C), inputs)
    return logits.reshape(B, T, -1)[..., :V], loss, g


def updated(config: GPT2Config, weights: Named, gradients: Named, norm: float) -> Named:
    """Return the weights after AdamW's first update, with clipping to norm 1."""
    result = {}
    for spec in _llmc.parameter_table(config.native()):
        w = weights[spec.name]
        rates = {**RATES, "correction1": 1 - RATES["beta1"], "correction2": 1 - RATES["beta2"]}
        rates["weight_decay"] *= spec.decay
        zero = np.zeros_like(w)
        result[spec.name] = formulas.adamw(w, zero, zero, gradients[spec.name], min(1, 1 / norm), rates)[0]
    return result


def limit_of_norms(config: GPT2Config, unit: float) -> float:
    """Return how far a gradient or the logits may be off, in the 2-norm relative to theirs.

    Each layer stores 7 activations and 7 gradients of such one after the other. Their roundings are independent, so their squares add
    up; what lies between may magnify each of them, twice at most. The arithmetic in float32 counts as 4 more roundings of its own for each.
    """
    return float(2 * (unit + 4 * F32) * np.sqrt(14 * config.num_layers + 6))


def check_step(backend: Any, exact: Exact, kernel: str, unit: float = 0.0) -> Iterator[Outcome]:
    """Run the step on a backend, and generation with the same weights.

    Args:
        backend: an _llmc.Backend.
        exact: what to run, and what is right.
        kernel: what to call the kernels that the backend uses.
        unit: the largest relative error of an activation, if that is more than its rounding.

    Yields:
        Outcomes of the loss, of logits, of each parameter's gradient and of its update: the 2-norm of the error, relative to that of
        what is right.
    """
    size = "x".join(map(str, (*exact.inputs.shape, exact.config.channels)))
    limit = limit_of_norms(exact.config, max(unit, UNIT[exact.dtype]))

    def beside(op: str, name: str, x: Any, right: Array, stored: float = 0.0) -> Outcome:
        norm = float(np.linalg.norm(right))
        error = float(np.linalg.norm(np.asarray(x, np.float64) - right)) / norm
        return judged(op, kernel, exact.dtype, size, name, [error], [0.0], limit + stored / norm)

    op = "training step"
    try:
        model = GPT2(exact.config, dtype=exact.dtype, seed=None, backend=backend, recompute=1)
        for name, w in exact.weights.items():
            model.parameters[name] = w
        yield beside(op, "logits", model.logits(exact.inputs), exact.logits)
        betas, decay = (RATES["beta1"], RATES["beta2"]), RATES["weight_decay"]
        optimizer = AdamW(model, betas=betas, eps=RATES["eps"], weight_decay=decay, grad_clip=1.0)
        # What is recorded is recorded the second time, and launched the third.
        for _ in range(3 if backend.runs_ahead else 1):
            model.zero_grad()
            model.forward(exact.inputs)
            model.backward(exact.targets)
        yield beside(op, "loss", model.mean_loss, np.array(exact.loss))
        for name, tensor in model.gradient_tensors().items():
            yield beside(op, f"gradient of {name}", get(tensor), exact.gradients[name])
        yield beside(op, "norm of the gradients", optimizer.measure(), np.array(exact.norm))
        optimizer.apply(RATES["lr"])
        states = optimizer.state()
        for name, tensor in model.parameter_tensors().items():
            master = states[name].master
            high, low = tensor.to_host().reshape(-1), None if master is None else master.to_host().reshape(-1)
            after = get(tensor) if low is None else join_master(high, low)
            before, right = exact.weights[name], exact.updated[name]
            # An f32 weight may be rounded by more than its update is off.
            rounding = F32 * float(np.linalg.norm(before))
            yield beside(op, f"update of {name}", after.reshape(before.shape) - before, right - before, rounding)
        op = "generation"
        for name, w in exact.weights.items():
            model.parameters[name] = w
        yield beside(op, "logits", decoded(model, exact.inputs), exact.logits[:, -3:])
        lost = lost_by_choice(model, exact.inputs) / float(np.abs(exact.logits).max())
        yield judged(op, kernel, exact.dtype, size, "tokens", [lost], [0.0], 2 * limit)
    except Exception as e:  # whatever it is, the other kernels are still checked
        yield failed(backend, op, kernel, exact.dtype, size, e)


def decoded(model: GPT2, inputs: Array) -> Array:
    """Return the logits of the last three positions, with all before the last two encoded at once and these one by one."""
    (B, T), steps = inputs.shape, []
    cache = model.kv_cache(B, T)
    steps.append(np.stack([cache.prefill(b, inputs[b, : T - 2]) for b in range(B)]))
    steps += [cache.decode(np.ascontiguousarray(inputs[:, t])) for t in (T - 2, T - 1)]
    return np.stack(steps, axis=1)


def lost_by_choice(model: GPT2, inputs: Array) -> float:
    """Return by how much the logits of tokens that generation chose as the most likely are below the largest, at most."""
    prompt, count = inputs[:, : inputs.shape[1] // 2], 6
    text = np.concatenate([prompt, np.array(model.generate(prompt.tolist(), count, temperature=0.0))], axis=1)
    logits = model.logits(text)[:, prompt.shape[1] - 1 : -1]
    chosen = np.take_along_axis(logits, text[:, prompt.shape[1] :, None], axis=2)[..., 0]
    return float((logits.max(axis=2) - chosen).max())


def check_threads(exact: Exact, kernel: str, make_backend: Callable[[int], Any]) -> Outcome:
    """Compare the gradients of a step on two threads and on one, which are the same bits."""
    size = "x".join(map(str, (*exact.inputs.shape, exact.config.channels)))
    try:
        results = []
        for threads in (1, 2):
            model = GPT2(exact.config, dtype=exact.dtype, seed=None, backend=make_backend(threads))
            results.append(gradients_of(model, exact))
        differ = sum(int((a != b).sum()) for a, b in zip(*(r.values() for r in results)))
        return judged("threads 1 and 2", kernel, exact.dtype, size, "gradients that differ", [differ], [0], 0.0)
    except Exception as e:
        return failed(None, "threads 1 and 2", kernel, exact.dtype, size, e)


def gradients_of(model: GPT2, exact: Exact) -> Named:
    """Return the gradients of a model with these weights, in the memory's dtypes."""
    for name, w in exact.weights.items():
        model.parameters[name] = w
    model.zero_grad()
    model.forward(exact.inputs)
    model.backward(exact.targets)
    return {name: tensor.to_host() for name, tensor in model.gradient_tensors().items()}
