# %% [markdown]
# # AdamW, and how to train in 16 bits
#
# The optimizer is the line that changes the weights. This text derives Adam, its correction of bias, and the weight
# decay of AdamW; checks llmc's kernel against PyTorch, bit for bit where that can be; and then asks what happens if
# the weights have only 16 bits. With small learning rates most updates are less than half of a bfloat16's last place.
# Rounded to nearest they are lost, and training falls behind. llmc keeps the 16 bits that are missing, in a way that
# costs two bytes for each weight and not four.
#
# Every number below is printed by the code above it, and
#
#     python doc/adamw/adamw.py
#
# in a clone prints all of them again, for your machine, in two minutes.

# %%
import functools
import inspect
import os
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import ml_dtypes
import numpy as np

import llmc
from llmc import _llmc
from llmc.data.python_texts import language_reference
from llmc.formats.state_file import join_master, split_master
from llmc.selfcheck import formulas

here = Path(__file__).parent if "__file__" in globals() else Path.cwd()
root = next(p for p in [here, *here.parents] if (p / "dev" / "kernels").is_dir())
sys.path.insert(0, str(root / "dev" / "kernels"))
import run  # noqa: E402  source() shows code of the tree

SMALL = os.environ.get("LLMC_SMALL") == "1"  # tests set it: small sizes, few steps, the same code
rng = np.random.default_rng(1)
plt.rcParams.update({"figure.figsize": (7, 3.6), "figure.dpi": 90, "axes.grid": True, "grid.alpha": 0.3})

# %% [markdown]
# ## 1. One rate for all weights?
#
# Gradient descent moves each weight against its gradient, $p \leftarrow p - \eta\,g$, with one learning rate $\eta$
# for all. Is that fair? Here is a small GPT-2 (two layers of 128 channels), which learns the bytes of Python's
# language reference, and the size of the gradients of its tensors after some steps:

# %%
text = np.frombuffer("\n".join(language_reference()).encode(), np.uint8).astype(np.int32)
split = text.size * 9 // 10  # the last tenth is for validation
config = llmc.GPT2Config(max_seq_len=64, vocab_size=256, num_layers=2, num_heads=4, channels=128)
B, T = 8, 64


def batch(step):
    """The rows of a step: B pieces of T + 1 bytes from random places of the text."""
    starts = np.random.default_rng([7, step]).integers(0, split - T, B)
    return np.stack([text[s : s + T + 1] for s in starts])


def train_step(model, optimizer, step, lr):
    rows = batch(step)
    model.zero_grad()
    model.forward(rows[:, :-1])
    model.backward(rows[:, 1:])
    optimizer.step(lr)


model = llmc.GPT2(config, seed=1)
optimizer = llmc.AdamW(model)
warm = 20 if SMALL else 200
for step in range(warm):
    train_step(model, optimizer, step, 1e-3 * min(1, (step + 1) / 20))


def rms(x):
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


beta1, beta2, eps = 0.9, 0.95, 1e-8
sizes = {}
for name, state in optimizer.state().items():
    m, v = (t.to_host() / (1 - beta**warm) for t, beta in zip(state.moments, (beta1, beta2)))
    sizes[name] = rms(model.gradients[name]), rms(m / (np.sqrt(v) + eps))
gradient_sizes, step_sizes = np.array(list(sizes.values())).T
fig, ax = plt.subplots()
ax.semilogy(gradient_sizes, "o", label="gradient")
ax.semilogy(step_sizes, "s", label="Adam's step, before the learning rate")
ax.set_xticks(range(len(sizes)), list(sizes), rotation=60)
ax.set(ylabel="root mean square of the tensor")
_ = ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
for what, values in (("gradients:", gradient_sizes), ("steps:", step_sizes)):
    least, most = min(values), max(values)
    print(f"{what:10s} {least:.1e} to {most:.1e}, a factor of {most / least:.1f}")

# %% [markdown]
# A rate that is right for the largest of them hardly moves the smallest. Adam
# ([Kingma & Ba 2014](https://arxiv.org/abs/1412.6980)) divides each weight's gradient by its usual size. What remains
# is a pure number of about 1, so that $\eta$ is a speed: how far a weight moves in a step, in its own units.
#
# ## 2. Two averages and their bias
#
# Adam keeps two numbers for each weight, its *moments*: an average of the gradient, and one of its square.
#
# $$m_t = \beta_1 m_{t-1} + (1-\beta_1)\,g_t \qquad v_t = \beta_2 v_{t-1} + (1-\beta_2)\,g_t^2$$
#
# Both begin at 0. Unrolled, $m_t$ is a sum of all gradients, with weights that fall off into the past:
#
# $$m_t = (1-\beta_1)\sum_{i=1}^{t}\beta_1^{\,t-i}\,g_i$$
#
# An average has weights that add up to 1. Do these? By the sum of a geometric series,
#
# $$(1-\beta_1)\sum_{i=1}^{t}\beta_1^{\,t-i} = (1-\beta_1)\,\frac{1-\beta_1^t}{1-\beta_1} = 1-\beta_1^t$$
#
# They do not: the rest, $\beta_1^t$, is the weight of the 0 in the beginning. So $m_t$ and $v_t$ are too small, in
# the first steps by much, and dividing by what the weights add up to makes true averages of them:
#
# $$\hat m_t = \frac{m_t}{1-\beta_1^t} \qquad \hat v_t = \frac{v_t}{1-\beta_2^t} \qquad\qquad
# p \leftarrow p - \eta\,\frac{\hat m_t}{\sqrt{\hat v_t}+\epsilon}$$
#
# Without this the errors of both would not cancel, because of the root: for a gradient that is always the same, the
# first step would be $(1-\beta_1)/\sqrt{1-\beta_2}$ instead of 1. With $\beta_2 = 0.999$, Adam's default, that is
# three times too large, and some steps later six times, just when the weights are random. llm.c's and llmc's
# $\beta_2$ for GPT-2 is 0.95, as GPT-3's was.

# %%
t = np.arange(1, 101)
fig, ax = plt.subplots()
uncorrected = {b2: (1 - beta1**t) / np.sqrt(1 - b2**t) for b2 in (0.95, 0.99, 0.999)}
for b2, values in uncorrected.items():
    ax.plot(t, values, label=f"beta2 = {b2}, uncorrected")
ax.axhline(1, color="black", lw=1, label="corrected")
ax.set(xlabel="step", ylabel="step for a constant gradient")
_ = ax.legend()
for b2, values in uncorrected.items():
    print(f"beta2 = {b2:5}: the first step would be {values[0]:.2f}, the largest {max(values):.2f}")

# %% [markdown]
# Two more remarks on the formula. If a weight's gradients are mostly noise, $\hat m$ is small beside $\sqrt{\hat v}$,
# and the weight moves slowly: the figure of section 1 has steps well below 1. And $\epsilon = 10^{-8}$ matters only
# for weights whose gradients are that small; for all others the step does not change if the loss is multiplied by a
# constant.
#
# ## 3. Weight decay, decoupled
#
# A pull of all weights towards 0 keeps them from growing without a reason. The old way adds $\frac\lambda2 p^2$ to
# the loss, so $\lambda p$ to the gradient. With plain gradient descent that is the same as shrinking the weight by
# $\eta\lambda p$ in each step. With Adam it is not: $\lambda p$ is then divided by $\sqrt{\hat v}$ as everything else
# is, so weights with large gradients are hardly pulled, and those with small ones at full speed. AdamW
# ([Loshchilov & Hutter 2019](https://arxiv.org/abs/1711.05101)) takes the decay out of the gradient:
#
# $$p \leftarrow p - \eta\left(\frac{\hat m_t}{\sqrt{\hat v_t}+\epsilon} + \lambda\,p\right)$$
#
# Here is a weight whose gradient is pure noise of some size. The decay alone would leave of it
# $(1-\eta\lambda)^{\text{steps}}$, which is the line:


# %%
def decayed(noise, decoupled, steps, lr=1e-3, decay=0.1, copies=512):
    """What is left of a weight of 1 on average, after so many steps with gradients that are noise of a given size."""
    noises = np.random.default_rng(3)
    p, m, v = np.ones(copies), np.zeros(copies), np.zeros(copies)
    for t in range(1, steps + 1):
        g = noise * noises.standard_normal(copies) + (0 if decoupled else decay * p)
        m, v = m + (1 - beta1) * (g - m), v + (1 - beta2) * (g * g - v)
        step = m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + eps)
        p = p - lr * (step + (decay * p if decoupled else 0))
    return p.mean()


noises, steps = np.logspace(-3, 1, 5 if SMALL else 17), 200 if SMALL else 1000
left = {
    "decay in the gradient": [decayed(s, False, steps) for s in noises],
    "decoupled": [decayed(s, True, steps) for s in noises],
}
fig, ax = plt.subplots()
for name, values in left.items():
    ax.semilogx(noises, values, ".-", label=name)
ax.axhline((1 - 1e-4) ** steps, color="black", lw=1, label="the decay alone")
ax.set(xlabel="size of the gradient's noise", ylabel=f"weight after {steps} steps")
_ = ax.legend()
for name, values in left.items():
    print(f"{name:22s} {min(values):+.3f} to {max(values):+.3f}")

# %% [markdown]
# llmc, as llm.c, decays matrices and embeddings, and leaves biases and layernorms alone: a layernorm's weight has its
# place at 1, not at 0.

# %%
specs = _llmc.parameter_table(config.native())
print("decay:   ", *(s.name for s in specs if s.decay))
print("no decay:", *(s.name for s in specs if not s.decay))

# %% [markdown]
# ## 4. The kernel, beside PyTorch
#
# In NumPy, as llmc's tests have it (`factor` is for clipping: if the norm of all gradients together is larger than 1,
# all are made smaller alike; the `correction`s are $1-\beta^t$):

# %%
print(inspect.getsource(formulas.adamw))

# %% [markdown]
# And in C++, for a vector of weights at a time; a `Vec` is as many floats as the CPU has in a register, and the same
# lines are compiled for each instruction set ([`rows.h`](../../csrc/cpu/simd/rows.h)). `fma(a, b, c)` is $a\,b+c$ and
# `fnma(a, b, c)` is $-a\,b+c$, with one rounding:

# %%
print(run.source("csrc/cpu/simd/rows.h", "lerp"))
print(run.source("csrc/cpu/simd/rows.h", "adamw_update"))

# %% [markdown]
# Three programs now make ten updates from the same weights with the same gradients: llmc's kernel, PyTorch's
# `torch.optim.AdamW`, and the formula in double precision. How far are they from each other? The unit is the *ulp*,
# the distance from one float32 to the next.

# %%
size, lr, decay = 1 << 14, 3e-4, 0.1
start = rng.standard_normal(size).astype(np.float32)
gradients = rng.standard_normal((10, size)).astype(np.float32)


def adamw_step(t, seed=0, lr=lr):
    return {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": decay,
            "correction1": 1 - beta1**t, "correction2": 1 - beta2**t, "seed": seed}  # fmt: skip


def by_formula():
    p, m, v = start.astype(np.float64), np.zeros(size), np.zeros(size)
    for t, g in enumerate(gradients, 1):
        p, m, v = formulas.adamw(p, m, v, g.astype(np.float64), 1.0, adamw_step(t))
    return p


def by_llmc():
    backend = _llmc.Backend("cpu")
    p, m, v, g, factor = (backend.empty([n], "f32") for n in (size, size, size, size, 1))
    p.from_host(start), backend.zero(m), backend.zero(v), factor.from_host(np.ones(1, np.float32))
    for t, gradient in enumerate(gradients, 1):
        g.from_host(gradient)
        backend.adamw(p, None, m, v, g, factor, _llmc.AdamWStep(**adamw_step(t)))
    return p.to_host()


def by_torch():
    import torch

    p = torch.nn.Parameter(torch.tensor(start))
    optimizer = torch.optim.AdamW([p], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay)
    for gradient in gradients:
        p.grad = torch.tensor(gradient)
        optimizer.step()
    return p.detach().numpy()


def compare(a, b, what):
    ulps = np.abs(a.astype(np.float64) - b) / np.spacing(np.abs(b).astype(np.float32))
    same = f", equal bits {np.mean(a == b):.2%}" if a.dtype == b.dtype else ""
    print(f"{what:34s} mean {ulps.mean():5.2f} ulp, largest {ulps.max():5.2f}{same}")
    return ulps.max()


ours = by_llmc()
assert compare(ours, by_formula(), "llmc and the formula in float64:") < 16
try:
    theirs = None if SMALL else by_torch()  # its import alone takes longer than all the rest
except ImportError:
    theirs = None
    print("PyTorch is not installed: nothing to compare with")
if theirs is not None:
    compare(theirs, by_formula(), "PyTorch and the formula:")
    compare(ours, theirs, "llmc and PyTorch:")

# %% [markdown]
# Equal to a few units (most in weights that passed near 0, where the unit is tiny), and not equal in all bits. Why
# not? Floating-point arithmetic has no associative law: whoever adds in another order, or fuses another pair of
# operations, rounds otherwise. Both kernels can be repeated in NumPy, float32, if each operation is done in the
# kernel's order. NumPy has no `fma`, but the product of two float32 is exact in float64, so its sum with a third is
# rounded there and once more to float32, which next to never makes a difference:


# %%
def fma(a, b, c):
    return (np.float64(a) * np.float64(b) + np.float64(c)).astype(np.float32)


def like_llmc():
    f = np.float32
    p, m, v = start, np.zeros(size, f), np.zeros(size, f)
    b1, b2 = f(beta1), f(beta2)
    for t, g in enumerate(gradients, 1):
        inverse1, inverse2 = f(1) / f(1 - beta1**t), f(1) / f(1 - beta2**t)
        m = fma(b1, m, fma(-b1, g, g))
        v = fma(b2, v, fma(-b2, g * g, g * g))
        p = fma(-f(lr), fma(f(decay), p, (m * inverse1) / (np.sqrt(v * inverse2) + f(eps))), p)
    return p


def like_torch():
    f = np.float32
    p, m, v = start, np.zeros(size, f), np.zeros(size, f)
    for t, g in enumerate(gradients, 1):
        p = p * f(1 - lr * decay)  # the decay first
        m = fma(f(1 - beta1), g - m, m)
        v = fma(f(1 - beta2) * g, g, v * f(beta2))
        root = np.sqrt(v) / f((1 - beta2**t) ** 0.5) + f(eps)
        p = p + f(-lr / (1 - beta1**t)) * m / root
    return p


compare(ours, like_llmc(), f"llmc ({_llmc.Backend('cpu').info().isa}) and its order:")
if theirs is not None:
    compare(theirs, like_torch(), "PyTorch and its order:")

# %% [markdown]
# So the three differ by the order of their roundings, and by nothing else. (The two comparisons are exact on a CPU
# that has `fma`, if the compilers use it where they did here.)
#
# ## 5. Weights of 16 bits
#
# A bfloat16 is the upper half of a float32: sign, 8 bits of exponent, and 7 bits of the mantissa instead of 23. It
# covers the same range, with two to three decimal digits. Matmuls on it are faster, on a GPU and on a CPU that has
# the instructions ([performance.md](../performance.md)), and all weights are half as large.
#
# Between 1 and 2 the next bfloat16 is $2^{-7}$ away. A weight that is rounded to nearest therefore stays where it is
# if the update is less than $2^{-8}$, half of that: relative to the weight, between 0.2 and 0.4 %. How large are real
# updates? Take the model from above, with its weights rounded to bfloat16, and let Adam make one step at several
# learning rates:

# %%
bf16 = ml_dtypes.bfloat16
print("learning rate   updates that change no bit of a bfloat16 weight")
for rate in (1e-3, 3e-4, 1e-4, 3e-5, 1e-5):
    lost = total = 0
    for name, state in optimizer.state().items():
        m, v = (t.to_host().ravel() / (1 - beta**warm) for t, beta in zip(state.moments, (beta1, beta2)))
        p = model.parameters[name].ravel().astype(bf16)
        update = rate * m / (np.sqrt(v) + eps)
        moved = update != 0  # rows of the embedding for bytes that never came have none
        lost += np.sum((p.astype(np.float32) - update).astype(bf16)[moved] == p[moved])
        total += moved.sum()
    print(f"{rate:13.0e}   {lost / total:.1%}")

# %% [markdown]
# These updates are not delayed, they are lost: the next one starts from the same weight, and is lost too. The smaller
# the rate, the more of training is lost, and every schedule ends with small rates.
#
# There are two remedies. **Stochastic rounding** rounds up with a probability equal to the part that is cut off. Then
# a few of the updates move the weight, by too much: right on average, and noisy. **Master weights** keep the weight
# in float32 and give the model a rounded copy. In miniature, a weight of 1 that gets a thousand updates of $10^{-4}$:

# %%
count = 1000
p, exact = {"to nearest": bf16(1), "stochastic": bf16(1), "master in float32": np.float32(1)}, 1.0
tracks = {name: [] for name in p}
for _ in range(count):
    p["to nearest"] = bf16(np.float32(p["to nearest"]) + np.float32(1e-4))
    bits = (np.float32(p["stochastic"]) + np.float32(1e-4)).view(np.uint32)
    up = int(bits) % 2**16 > rng.integers(2**16)
    p["stochastic"] = np.uint16((int(bits) >> 16) + up).view(bf16)
    p["master in float32"] = p["master in float32"] + np.float32(1e-4)
    for name, value in p.items():
        tracks[name].append(float(value.astype(bf16)))
fig, ax = plt.subplots()
for name, values in tracks.items():
    ax.plot(values, label=name)
ax.set(xlabel="updates of 1e-4", ylabel="bfloat16 weight")
_ = ax.legend()
print(*(f"{name}: {values[-1]:.4f}" for name, values in tracks.items()), f"exact: {1 + count * 1e-4:.4f}", sep="   ")

# %% [markdown]
# ## 6. The master weight, split
#
# The usual master is a float32 beside the bfloat16, four bytes more for each weight. But the bfloat16 *is* the upper
# half of that float32, so half of the master is stored twice. llmc stores the other half alone, 16 bits that complete
# the weight:

# %%
print(run.source("csrc/core/master.h", "join_master"))
print(run.source("csrc/core/master.h", "split_master"))

# %% [markdown]
# One thing needs care. The model should see the weight *rounded*, not cut off: the nearest bfloat16, which is the
# upper half plus one if the lower half is $2^{15}$ or more. So the lower half that is stored is the *difference* of
# the bit patterns, as a signed number between $-2^{15}$ and $2^{15}-1$. Bit patterns are integers, in the same order
# as the numbers they stand for (of one sign), so adding the difference gives back each bit, whatever the exponent
# does:

# %%
weights = np.array([1.0, 3.14159274, -0.1, 0.02000001, 1.99999, 1.00390625], np.float32)
high, low = split_master(weights)
for w, h, l in zip(weights, high, low):
    u = int(w.view(np.uint32))
    pattern = f"{u >> 31:01b} {u >> 23 & 255:08b} {u >> 16 & 127:07b}|{u & 65535:016b}"
    print(f"{w:11.8f} = {pattern}   bf16 {float(h.view(bf16)):10.7f} = {h:04x}   difference {l:+6d}")
# Random bit patterns, up to the largest float32 that does not round to infinity.
every = rng.integers(0, 0x7F7F8000, 1 << (16 if SMALL else 22), dtype=np.uint32).view(np.float32)
every = np.concatenate([every, -every])
high, low = split_master(every)
assert np.array_equal(join_master(high, low).view(np.uint32), every.view(np.uint32))
same = high.view(bf16) == every.astype(bf16)
assert np.all(every.view(np.uint32)[~same] % 2**16 == 2**15)  # ties
print(
    f"{every.size:,} weights: all joined again to the bit; {same.mean():.4%} of the bf16 are what ml_dtypes rounds to"
)

# %% [markdown]
# (The few that are not are ties, in the middle between two bfloat16: this rounds them away from 0, IEEE to the even
# one. Both are equally near.) The 1.99999 shows the carry: its nearest bfloat16 is 2, with another exponent, and the
# difference is negative.
#
# The optimizer's kernel joins, updates and splits in one pass, so there is never a float32 copy. On the GPU too
# ([`adamw.cu`](../../csrc/cuda/adamw.cu)):

# %%
print(run.source("csrc/cpu/simd/rows.h", "adamw_bf16"))

# %% [markdown]
# ## 7. Four ways to train
#
# The same model four times, from the same weights: in float32; in bfloat16 with split masters; with stochastic
# rounding; and rounded to nearest, for which we forget the lower halves after each update. The learning rate falls
# from $10^{-3}$ to 0, as schedules do. What is a difference? For comparison the model in float32 once more, from
# other random weights.


# %%
def validation_loss(model):
    starts = np.random.default_rng(8).integers(split, text.size - T, 32 if SMALL else 256)
    rows = np.stack([text[s : s + T + 1] for s in starts])
    return float(np.mean(model.token_losses(rows[:, :-1], rows[:, 1:]), dtype=np.float64))


def curve(kind, steps, every):
    seed = 2 if "seed" in kind else 1
    model = llmc.GPT2(config, dtype="f32" if "float32" in kind else "bf16", seed=seed)
    optimizer = llmc.AdamW(model, weight_decay=0.1, master_weights=kind != "stochastic")
    losses = []
    for step in range(steps):
        train_step(model, optimizer, step, 1e-3 * min(1, (step + 1) / 50) * (1 - step / steps))
        if kind == "to nearest":
            for state in optimizer.state().values():
                state.master.from_host(np.zeros(state.master.shape, np.int16))
        if (step + 1) % every == 0:
            losses.append(validation_loss(model))
    return losses


steps, every = (20, 10) if SMALL else (1000, 50)
kinds = ("float32", "split masters", "stochastic", "to nearest", "float32, another seed")
curves = {kind: curve(kind, steps, every) for kind in kinds}
at = np.arange(every, steps + 1, every)
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
for kind, losses in curves.items():
    style = {"label": kind, "color": "gray" if "seed" in kind else None, "lw": 1 if "seed" in kind else 1.5}
    left.plot(at, losses, **style)
    right.plot(at, np.array(losses) - curves["float32"], **style)
left.set(xlabel="step", ylabel="validation loss (nats per byte)")
right.set(xlabel="step", ylabel="the same, less float32's")
_ = left.legend()
for kind, losses in curves.items():
    print(f"{kind:22s} {losses[-1]:.4f}   {losses[-1] - curves['float32'][-1]:+.4f}")

# %% [markdown]
# Rounded to nearest, the model falls behind, and more so towards the end, where the rate is small. With split masters
# it stays with float32; with stochastic rounding it goes a way of its own, as another seed does, and neither is
# better or worse on a model as small as this one. llmc's default is the split master: it has no noise, a checkpoint
# has the whole weight, and a run in float32 can go on from it. With `--no-master-weights` they are rounded
# stochastically, which saves the two bytes.
#
# ## 8. What it costs
#
# Memory for each weight, in bytes, with gradients in the model's dtype (on a GPU llmc keeps them in float32 if it is
# not told otherwise: two bytes more for bf16):

# %%
state_bytes = llmc.AdamW.bytes_per_parameter
table = {
    "float32": (4, 4, state_bytes("f32", False)),
    "bf16, float32 master (llm.c)": (2, 2, 12),
    "bf16, split master": (2, 2, state_bytes("bf16", True)),
    "bf16, stochastic rounding": (2, 2, state_bytes("bf16", False)),
}
models = {name: llmc.GPT2Config.from_descriptor(d).num_parameters for name, d in (("124M", "d12"), ("1558M", "d48"))}
print(f"{'':30s} weight  gradient  m, v, master   sum ", *(f"{name:>9s}" for name in models))
for name, parts in table.items():
    total = sum(parts)
    sizes = (f"{total * n / 2**30:5.1f} GiB" for n in models.values())
    print(f"{name:30s} {parts[0]:6d}  {parts[1]:8d}  {parts[2]:12d}  {total:4d} ", *sizes)

# %% [markdown]
# And time. For each weight the kernel does some 20 operations, on 22 to 28 bytes that are read or written. That is
# far less arithmetic than a CPU or a GPU can do while the memory delivers 28 bytes, so AdamW is as fast as the
# memory. Beside it the copy of a large array, which does nothing else:

# %%
backend = _llmc.Backend("cpu")
size = 1 << (18 if SMALL else 24)


def tensors(*dtypes):
    made = [backend.empty([size], dtype) for dtype in dtypes]
    for t in made:
        backend.zero(t)  # so that the system has assigned memory to all pages
    return made


a, b = tensors("f32", "f32")
factor = backend.empty([1])
factor.from_host(np.ones(1, np.float32))
step = _llmc.AdamWStep(**adamw_step(10, seed=5))
runs = {"copy": (functools.partial(backend.copy, b, a), 8)}
for name, dtype, master in (("float32", "f32", None), ("split masters", "bf16", "i16"), ("stochastic", "bf16", None)):
    p, g, m, v, *low = tensors(dtype, dtype, "f32", "f32", *filter(None, [master]))
    moved = 2 * 8 + {"f32": 3 * 4, "bf16": 3 * 2}[dtype] + (2 * 2 if master else 0)  # all but the gradient both ways
    runs[name] = functools.partial(backend.adamw, p, low[0] if low else None, m, v, g, factor, step), moved

times = {name: [] for name in runs}
for _ in range(2 if SMALL else 20):  # in turns, so that what disturbs one disturbs all
    for name, (function, _) in runs.items():
        begin = time.perf_counter()
        function()
        times[name].append(time.perf_counter() - begin)
for name, (_, moved) in runs.items():
    ns = min(times[name]) / size * 1e9
    print(f"{name + ':':15s} {moved:2d} bytes in {ns:.2f} ns for each weight, {moved / ns:6.1f} GB/s")

# %% [markdown]
# By this count AdamW may be faster than the copy. Nearly all that it writes it has read before, while the lines
# that a copy overwrites come from memory first, which nobody counts: with them a copy moves 12 bytes, not 8.
# (Stochastic rounding also computes a hash for each weight, one by one.)
#
# ## Try it
#
# - Set `beta1 = 0` above. What does the figure of section 1 show now, and why?
# - Let section 7 run with a rate of $10^{-4}$ from beginning to end. Which of the four curves changes most?
# - `adamw_bf16` takes the bits for stochastic rounding from a hash of the weight's index and a seed. Why not from a
#   generator with a state? (What would it mean for threads, and for equal bits on any number of them?)
# - Moments are float32 here. What would go wrong with $v$ in bfloat16, with $\beta_2 = 0.999$? (Section 5 has the
#   answer: by how much does $v$ change in a step?)
