# %% [markdown]
# # The classifier, and logits that never exist
#
# At its end GPT-2 has a vector of $C$ numbers for each token of the text, and 50,257 words and parts of words to choose the next token
# from. The classifier turns one into the other: it gives each word a score, makes probabilities of the scores, and measures in one number
# how wrong they are. Then it gives the gradient of that number to the layers below. There is little mathematics in it and a lot of
# memory, so this text spends half of its time on how to need less.
#
# You need Python, NumPy, and the derivative of a logarithm. Every number below is printed by the code above it, and
#
#     python doc/classifier/classifier.py
#
# in a clone prints all of them again, for your machine.

# %%
import inspect
import json
import os
import statistics
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import ml_dtypes
import numpy as np
import psutil
from matplotlib.ticker import NullFormatter

here = Path(__file__).parent if "__file__" in globals() else Path.cwd()
root = next(p for p in [here, *here.parents] if (p / "dev" / "kernels").is_dir())
sys.path.insert(0, str(root / "dev" / "kernels"))
import run  # noqa: E402  the kernels of dev/kernels, and the stopwatch
from common import Ceilings, measured_ceilings  # noqa: E402  of dev/bench, which run.py has made known

import llmc  # noqa: E402
from llmc import _llmc  # noqa: E402
from llmc.selfcheck import formulas  # noqa: E402

SMALL = os.environ.get("LLMC_SMALL") == "1"  # tests set it: small sizes, few repeats, the same code
rng = np.random.default_rng(3)
plt.rcParams.update({"figure.figsize": (7, 3.6), "figure.dpi": 110, "axes.grid": True, "grid.alpha": 0.3})

# %% [markdown]
# ## 1. From scores to a loss
#
# A row of the last layernorm's output, `lnf`, times a matrix with a row for each word of the vocabulary gives a score for each word, its
# *logit*. GPT-2 uses the matrix of its token embeddings for this, `wte`. With $N = B\,T$ tokens in a batch and $V$ words
#
# $$\text{logits}_{(N,V)} = \text{lnf}_{(N,C)}\;\text{wte}_{(V,C)}^{\mathsf T}$$
#
# All of this and the next two sections happens within a row of logits, $x_1 \dots x_V$. Softmax makes it a distribution, each part
# positive and all of them together 1:
#
# $$p_v = \frac{e^{x_v}}{\sum_w e^{x_w}}$$
#
# The loss is *cross-entropy*: how surprised the model is by the word $t$ that really comes next, the *target*.
#
# $$\ell = -\log p_t = \log\Big(\sum_w e^{x_w}\Big) - x_t$$
#
# Whoever knows nothing and gives all words the same probability has a loss of $\log V$, about 10.8 for GPT-2, and that is where training
# begins.
#
# Both formulas fail in float32, as soon as a logit is larger than 88:

# %%
x = np.array([100.0, 98.0, -60.0], np.float32)
with np.errstate(over="ignore", invalid="ignore"):
    print("softmax as it is written:  ", np.exp(x) / np.exp(x).sum())

# %% [markdown]
# A constant that is added to all logits cancels in $p_v$. So we may take the largest of them away, $m = \max_w x_w$. Then no exponential
# is larger than 1, and at least one is 1, so the sum is between 1 and $V$:
#
# $$p_v = \frac{e^{x_v-m}}{s} \qquad s = \sum_w e^{x_w-m} \qquad \ell = \log s - (x_t - m)$$
#
# The second trap is the logarithm of a probability. $e^{-150}$ is 0 in float32, whose smallest positive number is about $e^{-103}$, and
# $-\log 0$ is infinite. The right-hand form never makes the small number that it would then take the logarithm of:

# %%
e = np.exp(x - x.max())
p = e / e.sum()
with np.errstate(divide="ignore"):
    print("softmax, shifted:          ", p)
    print("-log p of the third:       ", -np.log(p[2]))
print("log s - (x - m) of it:     ", np.log(e.sum()) - (x[2] - x.max()))

# %% [markdown]
# $\log \sum_w e^{x_w} = m + \log s$ has a name, *log-sum-exp*. It is all that a row's loss and gradient need to know of the other words,
# one number, and we meet it again in [attention](../attention/attention.py), where it is what the backward pass keeps of a softmax.
#
# ## 2. The gradient
#
# How does the loss change if one logit does? Only $x_t$ stands in $\ell$ by itself, and every $x_v$ is in the log-sum-exp:
#
# $$\frac{\partial}{\partial x_v}\log\sum_w e^{x_w} = \frac{e^{x_v}}{\sum_w e^{x_w}} = p_v
# \qquad\text{so}\qquad \frac{\partial \ell}{\partial x_v} = p_v - [v = t]$$
#
# where $[v=t]$ is 1 for the target and 0 for all others. What had looked like a quotient of sums has a gradient that is a subtraction:
# probability minus truth. Two things can be read from it. The gradient of a row sums to 0: what the target gains, all others lose, each
# as much as it had. And it is exactly the probability of the wrong words that is pushed down; a row that is predicted well gives almost
# no gradient.

# %%
words = 12
x, target = rng.standard_normal(words), 4
x[target] = 1.2
p = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
truth = np.arange(words) == target
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3), sharex=True)
left.bar(range(words), p, color=["C1" if t else "C0" for t in truth])
left.set(title="probabilities p", xlabel="word (orange: the target)")
right.bar(range(words), p - truth, color=["C1" if t else "C0" for t in truth])
right.axhline(0, color="k", lw=0.8)
right.set(title="gradient of the loss, p - [v = t]", xlabel="word")
fig.tight_layout()
plt.show()
print(f"the gradient sums to {(p - truth).sum():.1e}")

# %% [markdown]
# The loss of a batch is the mean over its $N$ tokens, so each row's gradient is divided by $N$.
#
# Two details of a real vocabulary. 50,257 is no number that memory or tensor cores like, so llmc, as llm.c, gives the matrix 50,304 rows,
# a multiple of 128. The last 47 are *padding*: they take no part in the sum, and their gradient is 0. And a target below 0 says that a
# token does not count, for instance because it is part of a question whose answer is to be learned: its loss and its gradient are 0.
#
# On paper it is right; is it in code? These are the lines by which llmc's tests, and `llmc check`, judge the kernels:

# %%
print(inspect.getsource(formulas.crossentropy))
print(inspect.getsource(formulas.crossentropy_gradient))

# %% [markdown]
# We test the second against the first in two ways. *Central differences* move a logit by $\pm h$ and look what the loss does. They are
# wrong by a multiple of $h^2$ because of the curve, and by the rounding of the loss over $h$, so about ten digits are the most they can
# show. The *complex step* moves it by $ih$ instead: the imaginary part of the loss over $h$ is the derivative, and as nothing is
# subtracted, $h$ may be $10^{-30}$ ([Squire & Trapp 1998](https://doi.org/10.1137/S003614459631241X)).

# %%
N, V, Vp = 3, 7, 8
logits, targets = 2 * rng.standard_normal((N, Vp)), np.array([2, -1, 6])  # the second row does not count
gradient = formulas.crossentropy_gradient(logits, targets, 1 / N, V)


def loss(logits):
    return formulas.crossentropy(logits, targets, V).sum() / N


def moved(n, v, step):
    result = logits.astype(type(step))
    result[n, v] += step
    return result


h = 1e-5
each = [(n, v) for n in range(N) for v in range(Vp)]
central = np.array([(loss(moved(n, v, h)) - loss(moved(n, v, -h))) / (2 * h) for n, v in each]).reshape(N, Vp)
complex_step = np.array([loss(moved(n, v, 1e-30j)).imag / 1e-30 for n, v in each]).reshape(N, Vp)
print(f"central differences: off by {np.abs(central - gradient).max():.1e}")
print(f"complex step:        off by {np.abs(complex_step - gradient).max():.1e}")

# %% [markdown]
# ## 3. A row at a time
#
# `dev/kernels/classifier` has this op in several versions, from naive to fast, a file each. They get the logits and the targets, and
# leave losses and, *in place of the logits*, the gradient. The first is the book's: three functions, each over all rows, with the
# probabilities in an array of their own between them.

# %%
print(run.source("dev/kernels/classifier/cpu_1_naive.cpp"))

# %% [markdown]
# It walks three times through arrays that do not fit into any cache. The second version takes one row after the other through all three
# steps: 201 KB, which stay in the L2 cache from the first loop to the last. It needs no probabilities, because $p_v$ is only ever an
# intermediate of the gradient, and no second array, because nobody asks for a logit again once its gradient is known:

# %%
print(run.source("dev/kernels/classifier/cpu_2_in_place.cpp"))

# %% [markdown]
# The sum is a `double`, though all else is float32. See what happens otherwise: in float32 the sum of $V$ positive numbers, one after the
# other, soon is so much larger than the next number that most of its digits fall off.

# %%
V = 5_000 if SMALL else 50_257
row = (4 * rng.standard_normal(V)).astype(np.float32)
e = np.exp(row - row.max())
exact = e.astype(np.float64).sum()
chain = np.cumsum(e)[-1]  # one after the other, in float32
lanes = np.add.reduce([np.cumsum(e[i::16])[-1] for i in range(16)])  # 16 chains, as 16 lanes of a vector make them
print(f"{V} exponentials, one after the other: relative error {abs(chain - exact) / exact:.1e}")
print(f"in 16 partial sums:                       relative error {abs(lanes - exact) / exact:.1e}")

# %% [markdown]
# Partial sums are the better cure, and they come for free with what version 3 is about. Nearly all of the time so far goes into calls of
# `std::exp`, one number each, and into maxima and sums that wait for the one before. Split $x = n\ln 2 + r$ with a whole number $n$ and
# $|r| \le \frac{\ln 2}{2}$: then $e^x = 2^n e^r$. The first factor is a matter of the exponent's bits, and for the second, on so short an
# interval, a polynomial of degree 7 is right to the last bit or two. No branch and no table: 8 or 16 numbers go through it at once.

# %%
print(run.source("dev/kernels/classifier/cpu_3_vectors.cpp", "exponential"))

# %% [markdown]
# Version 4 tries an idea that we need on the GPU, the *online softmax* ([Milakov & Gimelshein 2018](https://arxiv.org/abs/1805.02867)).
# Maximum and sum seem to need two passes, because the sum is relative to the maximum. But if a larger maximum $m'$ turns up, the sum so
# far can be corrected, $s' = s\,e^{m-m'} + e^{x-m'}$, and one pass gives both. It saves reading and costs exponentials. Version 5 shares
# the rows among threads. Version 6 stores bf16: half the bytes, but two exponentials for each logit, because $e^{x-m}$ rounded to bf16
# would spoil the gradient.

# %%
backend = _llmc.Backend("cpu")
if SMALL:
    top = Ceilings(flops=1e11, read=1e10, copy=1e10)  # not measured
    quick = {"versions": ["cpu_1", "cpu_3"], "small": True, "budget": 0.01, "optimize": "-O1", "peers": False}
    results = run.measure("classifier", **quick)
else:
    top = measured_ceilings(backend, "f32")
    results = run.measure("classifier", shape={"N": 512}, budget=1.5)
sizes = ", ".join(f"{name}={size}" for name, size in results[0].shape.items())
print(f"{sizes}; {backend.info().threads} threads; a copy of memory: {top.copy / 1e9:.1f} GB/s\n")
run.print_table(run.HEADER, run.table(results))

# %%
fig, axis = plt.subplots(figsize=(7, 0.3 * len(results) + 1))
colours = {"cpu": "C0", "llmc": "C2"}
for place, r in enumerate(results[::-1]):
    axis.barh(r.version, r.gbs, color=colours.get(r.version.split("_")[0], "C7"))
    axis.text(r.gbs, place, f" {r.gbs:.1f}", va="center", fontsize=8)
axis.axvline(top.copy / 1e9, color="k", ls=":", label="a copy of memory, all threads")
axis.legend(fontsize=8)
axis.set(title="The classifier on this CPU", xlabel="GB/s: logits read once, gradients written once")
fig.tight_layout()
plt.show()

# %% [markdown]
# The column that counts is GB/s: the op has to read each logit once and write each gradient once, so a version that is as fast as a copy
# is done. (Others use the notebook's machine too: a time may differ by a third from one table to the next.) The first two are far from
# it, because they compute, number by number, for longer than memory would need. NumPy and PyTorch have vectors too, but each of their
# steps walks through all rows and makes a new array. The online version is slower than the one before: the row lies in a cache, and
# reading it once more costs less than the additional exponentials with which one pass pays for that. For the same reason bf16 is no
# faster than float32 on a CPU with few cores: what it waits for is arithmetic, of which it has more. llmc's own kernel,
# [`classifier`](../../csrc/cpu/simd/rows.h#L163), has the passes of version 3 in float32 and of version 6 in bf16, and shares rows among
# threads as version 5 does.
#
# ## 4. How large logits are
#
# So the arithmetic of the classifier is cheap. Its memory is not. A micro-batch of 64 sequences of 1,024 tokens, of which a GPU takes
# several for an update:

# %%
Vp = 50_304
print(f"{'':34}{'float32':>12}{'bf16':>12}")
for B in (4, 16, 64):
    N = B * 1024
    print(f"logits of {B:2} x 1,024 tokens{N * Vp * 4 / 1e9:>18.2f} GB{N * Vp * 2 / 1e9:>9.2f} GB")
config = llmc.GPT2Config()  # 124M
print(f"all weights of GPT-2 124M{config.num_parameters * 4 / 1e9:>19.2f} GB{config.num_parameters * 2 / 1e9:>9.2f} GB")

# %% [markdown]
# A program that keeps logits, probabilities and gradient apart, as llm.c's `train_gpt2.c`, has them three times. Its `train_gpt2.cu` has
# them once, and lets the gradient take their place, as version 2 does. Beside all else that a training step has to keep, that is still
# much. llmc can be asked what a step of GPT-2 124M would need, without making the model:


# %%
def plan(B, rows, dtype="bf16"):
    options = _llmc.ModelOptions(dtype, "f32", recompute=1, classifier_rows=rows)
    return _llmc.memory_plan(
        config.native(),
        options,
        B,
        1024,
        optimizer_bytes=_llmc.AdamW.bytes_per_parameter(dtype, True) * config.num_parameters,
    )


batches = [4, 8, 16, 32, 64]
whole = [plan(B, B * 1024).total / 1e9 for B in batches]
chunks = {rows: [plan(B, rows).total / 1e9 for B in batches] for rows in (16_384, 1_024)}
fig, axis = plt.subplots()
axis.plot(batches, whole, "o-", label="all logits at once")
for rows, totals in chunks.items():
    axis.plot(batches, totals, "o-", label=f"{rows:,} rows of logits at a time")
axis.set(
    xlabel="sequences of 1,024 tokens in a micro-batch",
    ylabel="GB",
    title="Memory of a training step, GPT-2 124M in bf16",
    ylim=0,
)
axis.legend()
fig.tight_layout()
plt.show()
print(f"64 sequences: {whole[-1]:.1f} GB with all logits, {chunks[1024][-1]:.1f} GB with 1,024 rows of them at a time")

# %% [markdown]
# ## 5. Chunks of rows
#
# What does the backward pass do with the gradient of the logits, once it has it? Two matmuls, and after them it is never needed again:
#
# $$\text{dlnf}_{(N,C)} = \text{dlogits}_{(N,V)}\,\text{wte}_{(V,C)} \qquad\qquad
# \text{dwte}_{(V,C)} = \text{dlogits}^{\mathsf T}_{(V,N)}\,\text{lnf}_{(N,C)}$$
#
# A row of dlnf depends on one row of dlogits. And dwte is a sum over rows, which can be made in parts. So *nothing ever needs two rows of
# logits at the same time*. Take a chunk of rows: its logits, their softmax, losses and gradient, its rows of dlnf, its part of dwte. Then
# the next chunk, in the same memory. The logits of all tokens are never there.
#
# This asks for one thing: the gradient must be known as soon as the logits are, without waiting for the loss. It is, since $\partial
# L/\partial\ell_n = 1/N$ for every token. So llmc's forward pass stops before the logits, and it is the backward pass that computes them,
# for the first time: nothing is done twice.


# %%
def by_chunks(lnf, wte, targets, V, rows):
    losses, dlnf, dwte = np.empty(len(lnf)), np.empty_like(lnf), np.zeros_like(wte)
    for begin in range(0, len(lnf), rows):
        chunk = slice(begin, begin + rows)
        logits = lnf[chunk] @ wte.T
        losses[chunk] = formulas.crossentropy(logits, targets[chunk], V)
        dlogits = formulas.crossentropy_gradient(logits, targets[chunk], 1 / len(lnf), V)
        dlnf[chunk] = dlogits @ wte
        dwte += dlogits.T @ lnf[chunk]
    return losses.mean(), dlnf, dwte


N, C, V, Vp = 40, 16, 300, 384
lnf, wte, targets = rng.standard_normal((N, C)), rng.standard_normal((Vp, C)), rng.integers(0, V, N)
one = by_chunks(lnf, wte, targets, V, rows=N)
for rows in (1, 7, 16):
    other = by_chunks(lnf, wte, targets, V, rows)
    print(f"{rows:2} rows at a time: off by", ", ".join(f"{np.abs(a - b).max():.0e}" for a, b in zip(other, one)))

# %% [markdown]
# In llmc the same three lines are three ops; [`Model::classifier_backward`](../../csrc/model/model.cpp#L77) is that loop in C++, and
# `classifier_rows` is its step. Every op can be called from Python, so here is the loop once more, on the real kernels. `tensor[i]` is
# part `i` of a tensor, in the same memory.


# %%
def tensor(x, dtype):
    t = backend.empty(list(x.shape), dtype)
    x = x.astype({"f32": np.float32, "bf16": ml_dtypes.bfloat16, "i32": np.int32}[dtype])
    t.from_host(x.view(np.uint16) if dtype == "bf16" else x)
    return t


class Classifier:
    """lnf, wte and targets on the backend, and where losses and gradients go. Rows are in chunks: (chunks, rows, ...)."""

    def __init__(self, lnf, wte, targets, V, rows, dtype="f32", grad_dtype="f32"):
        N, C = lnf.shape
        self.N, self.V, self.chunks = N, V, N // rows
        self.lnf = tensor(lnf.reshape(-1, rows, C), dtype)
        self.wte = tensor(wte, dtype)
        self.targets = tensor(targets.reshape(-1, rows), "i32")
        self.losses = backend.empty([self.chunks, rows])
        self.dlnf = backend.empty([self.chunks, rows, C], dtype)
        self.dwte = backend.empty(list(wte.shape), grad_dtype)
        backend.weights_changed(self.wte)
        for result in (self.losses, self.dlnf, self.dwte):
            backend.zero(result)  # the system gives memory when it is first written: now, and not when time is measured

    def run(self, logits):
        for i in range(self.chunks):
            backend.matmul_forward(logits, self.lnf[i], self.wte)
            backend.fused_classifier(self.losses[i], logits, self.targets[i], 1 / self.N, self.V)
            backend.matmul_backward(self.dlnf[i], self.dwte, None, logits, self.lnf[i], self.wte, accumulate=i > 0)


# %% [markdown]
# How much memory does it take, and how much time does it cost? We ask the system for the memory of this process, before there are logits
# and after the loop.

# %%
N, C, V, Vp = (256, 32, 1_000, 1_024) if SMALL else (2_048, 256, 50_257, 50_304)
choices = [N >> k for k in range(4 if SMALL else 8)]  # rows of a chunk
lnf = rng.standard_normal((N, C), np.float32)
wte = 0.1 * rng.standard_normal((Vp, C), np.float32)
targets = rng.integers(0, V, N)
memory, times = {}, {rows: [] for rows in choices}
for repeat in range(2 if SMALL else 4):
    for rows in choices[::-1]:
        job = Classifier(lnf, wte, targets, V, rows)
        before = psutil.Process().memory_info().rss
        memory_of_logits = backend.empty([rows, Vp])
        backend.zero(memory_of_logits)
        begin = time.perf_counter()
        job.run(memory_of_logits)
        if repeat:  # the first warms up
            times[rows].append(time.perf_counter() - begin)
            memory[rows] = psutil.Process().memory_info().rss - before
        del job, memory_of_logits
seconds = [statistics.median(times[rows]) for rows in choices]
fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4))
left.loglog(choices, [max(memory[rows], 0) / 1e6 for rows in choices], "o-", base=2, label="measured")
left.loglog(choices, [rows * Vp * 4 / 1e6 for rows in choices], "k:", base=2, label="rows * Vp * 4 bytes")
left.set_yscale("log")
left.set(title="memory of the logits", xlabel="rows of a chunk", ylabel="MB")
left.legend()
right.plot(choices, [s / seconds[0] for s in seconds], "o-")
right.set_xscale("log", base=2)
right.set(title="time, relative to all rows at once", xlabel="rows of a chunk", ylim=0)
for axis in (left, right):
    axis.set_xticks(choices, [f"{rows:,}" for rows in choices], rotation=45, fontsize=8)
    axis.xaxis.set_minor_formatter(NullFormatter())
fig.tight_layout()
plt.show()
for rows, s in zip(choices, seconds):
    print(f"{rows:5,} rows: {memory[rows] / 1e6:7.1f} MB, {s * 1e3:7.1f} ms")

# %% [markdown]
# Memory falls with the rows, as it must. Time grows little at first, and much when chunks are small. Why?
#
# Each chunk reads the whole matrix wte twice, for the logits and for dlnf, and reads and writes all of dwte once. With weights of $s$
# bytes and a gradient in float32 that is $(2s + 8)\,VC$ bytes a chunk. Its three matmuls are $6\,VC$ operations for each row. Memory
# needs as long as arithmetic if
#
# $$\text{rows} = \frac{2s+8}{6}\cdot\frac{\text{operations per second}}{\text{bytes per second}}$$
#
# and with ten times as many rows it needs a tenth. The machine's two speeds, measured:

# %%
speeds = {
    "this CPU, float32": (4, top.flops, top.copy),
    "an H100 (SXM), bf16, by its data sheet": (2, 989e12, 3.35e12),
}
for name, (s, flops, bandwidth) in speeds.items():
    rows = (2 * s + 8) / 6 * flops / bandwidth
    print(f"{name}: {flops / 1e12:.2f} TFLOP/s, {bandwidth / 1e9:.0f} GB/s: as long at {rows:,.0f} rows")

# %% [markdown]
# A GPU computes faster in proportion to its memory, so it wants larger chunks. Therefore `classifier_rows` is 1,024 by default on a CPU,
# and up to 16,384 on a GPU, as its free memory allows ([`default_classifier_rows`](../../src/llmc/models/model.py#L30)).
#
# ## 6. The same bits?
#
# Does it matter for the result how many rows a chunk has? In real numbers no. In floating point the sum dwte is cut into other parts, so
# its rounding is another. We compare it, for chunks of all sizes, with float64, in three combinations of dtypes: of weights and
# activations, and of dwte.

# %%
N, C, V, Vp = (512, 32, 250, 256) if SMALL else (4_096, 64, 1_000, 1_024)
lnf = rng.standard_normal((N, C), np.float32).astype("f4")
wte = (0.1 * rng.standard_normal((Vp, C), np.float32)).astype("f4")
targets = rng.integers(0, V, N)
sizes = [N >> k for k in range(6 if SMALL else 9)]


def widened(t):
    x = t.to_host()
    return x.view(ml_dtypes.bfloat16).astype(np.float32) if x.dtype == np.uint16 else x


names = ("losses", "dlnf", "dwte")
fig, axis = plt.subplots()
for dtype, grad_dtype in (("f32", "f32"), ("bf16", "f32"), ("bf16", "bf16")):
    errors, same = [], []
    for rows in sizes:
        job = Classifier(lnf, wte, targets, V, rows, dtype, grad_dtype)
        job.run(backend.empty([rows, Vp], dtype))
        if rows == N:
            first = job
            exact = by_chunks(widened(job.lnf)[0].astype("f8"), widened(job.wte).astype("f8"), targets, V, rows=N)[2]
        errors.append(np.linalg.norm(widened(job.dwte) - exact) / np.linalg.norm(exact))
        same.append(
            [np.array_equal(getattr(job, k).to_host().ravel(), getattr(first, k).to_host().ravel()) for k in names]
        )
    axis.loglog(sizes, errors, "o-", base=2, label=f"{dtype}, dwte in {grad_dtype}")
    print(f"{dtype}, dwte in {grad_dtype}: error {errors[0]:.1e} at {N:,} rows, {errors[-1]:.1e} at {sizes[-1]}")
    for name, equal in zip(names, zip(*same)):
        print(
            f"    {name:6} has the bits of one chunk at", ", ".join(str(r) for r, e in zip(sizes, equal) if e), "rows"
        )
axis.set_yscale("log")
axis.set(xlabel="rows of a chunk", ylabel="relative error of dwte", title="What chunks do to rounding")
axis.set_xticks(sizes, [f"{rows:,}" for rows in sizes])
axis.xaxis.set_minor_formatter(NullFormatter())
axis.legend()
fig.tight_layout()
plt.show()

# %% [markdown]
# Losses and dlnf belong to one row each. They can only change where a matmul of fewer rows takes another path through the kernel. dwte is
# the sum that is cut: in float32 only its last bits change. In bf16, where each chunk rounds the sum so far to 8 bits, the error grows
# with the number of chunks. So a gradient in bf16 wants few chunks, or float32 (`grad_dtype="f32"`, the default on a GPU). For the same
# reason a run writes the `classifier_rows` that it has chosen into its config.toml, and a resumed run keeps them: the same bits need the
# same chunks.
#
# ## 7. On a GPU
#
# The kernel of a GPU is about memory alone; there is arithmetic in plenty. `dev/kernels/classifier` has seven versions of it. (What
# warps, blocks, shuffles and shared memory are, [the text on layernorm](../layernorm/layernorm.py) says in section 8. A *multiprocessor*
# is what a block runs on, alone or with others; an H100 has 132.)
#
# 1. **A thread per row**, the CPU's loops. A warp's 32 threads read 32 rows at once; of each 32 bytes fetched, 4 are used.
# 2. **A block per row.** Neighbours read neighbours. Maximum and sum go from thread to thread by shuffles and shared memory.
# 3. **Online softmax**: the row is read twice instead of three times.
# 4. **16 bytes an access**, 1,024 threads for a row, and the padding as logits of $-3\cdot10^{38}$, whose exponential is 0.
# 5. **bf16**, eight logits an access. The rows that are under way fit into the L2 cache of an H100, so the second pass does not go to
#    memory.
# 6. **A row in registers**: 1,024 threads have room for 57,344 logits of bf16. Each is read once, and no online sum is needed.
# 7. **The next row on its way to L2** while this one is computed, which a block that fills its multiprocessor would otherwise leave
#    undone.
#
# The heart of the fifth, which is [`classifier_kernel`](../../csrc/cuda/classifier.cu#L50) without its generality:

# %%
print(run.source("dev/kernels/classifier/cuda_5_bf16.cu", "fused_classifier"))

# %% [markdown]
# All seven are checked without a GPU as well, by `python dev/kernels/run.py classifier --device emulated`. These are times of a real one,
# from the files that `run.py --device cuda --json` has written:

# %%
found = sorted((root / "dev" / "kernels" / "results").glob("*.json"))
for path in found:
    data = json.loads(path.read_text())
    of_card = [r for r in data["results"] if r["op"] == "classifier" and r["seconds"]]
    if not of_card:
        continue
    fig, axis = plt.subplots(figsize=(7, 0.3 * len(of_card) + 1))
    for place, r in enumerate(of_card[::-1]):
        axis.barh(r["version"], r["gbs"], color="C2" if r["version"].startswith("llmc") else "C0")
        axis.text(r["gbs"], place, f" {r['gbs']:.0f}", va="center", fontsize=8)
    axis.set(title=data["machine"]["card"], xlabel="GB/s: logits read once, gradients written once")
    fig.tight_layout()
    plt.show()
    sizes = ", ".join(f"{name}={size}" for name, size in of_card[0]["shape"].items())
    print(f"{data['machine']['card']}, {data['machine']['date']}, {sizes}")
    for r in of_card:
        print(f"{r['version']:24}{r['seconds'] * 1e6:>10.0f} us{r['gbs']:>8.0f} GB/s")
if not found:
    print("dev/kernels/results has no file: run.py was not run on a GPU")

# %% [markdown]
# Versions 6 and 7 are here because they were tried, and lose to 5 on the H200: a row in registers is read once, but fills a
# multiprocessor, so nobody reads while it computes, and the second pass of version 5 did not go to memory anyway. llmc's own
# kernel has two loads of each thread under way in the second pass as well, and is a fifth faster than version 5.
#
# ## 8. Elsewhere, and further
#
# - **PyTorch**'s `cross_entropy` keeps the log-probabilities for its backward pass, and its gradient is a third array. Its logits in bf16
#   are usually widened to float32 first.
# - **llm.c** has the logits of a micro-batch in one buffer, in which its `fused_classifier` writes the gradient in place.
# - **Liger Kernel** ([Hsu et al. 2024](https://arxiv.org/abs/2410.10989)) brings the chunks of section 5 to PyTorch, as
#   `FusedLinearCrossEntropy`.
# - **Cut Cross-Entropy** ([Wijmans et al. 2024](https://arxiv.org/abs/2411.09009)) goes to the end of this road. It makes the logits tile
#   by tile in the fast memory of the GPU, keeps only log-sum-exp and the target's logit of each row, as flash attention does, and
#   computes the tiles again in the backward pass. Logits are then never in memory at all, at the price of a fourth matmul.
#
# Things to try, in a copy of a version (`dev/kernels/README.md` says how to run it):
#
# 1. Version 3 of the CPU stores $e^{x-m}$ and scales it in its last loop. Let it compute the exponential a second time instead, as
#    version 6 does, and drop the store. What is faster on your machine?
# 2. Teach a version targets of $-1$.
# 3. *z-loss* adds $\lambda \log^2 Z$ to a row's loss, with $\log Z$ the log-sum-exp, to keep logits from drifting. Derive its gradient
#    (it is $2\lambda\,p_v\log Z$), and add it. It needs one line in each of two places.
# 4. How large may `classifier_rows` be before the chunk's logits no longer fit into the L3 cache? Does it show in the time?
