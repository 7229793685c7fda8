# %% [markdown]
# # Attention, without its matrix
#
# Attention compares every token with every token before it: $T^2/2$ scores for each head. The formula writes them
# down as a matrix of $T \times T$ numbers, which was once what limited the length of a text. Flash attention computes
# the same numbers, and no such matrix ever exists. This text derives how, forward and backward, and measures each
# step, from the formula in NumPy to the kernels that llmc runs.
#
# You need Python, some C, and the derivative of a quotient. Every number below is printed by the code above it, and
#
#     python doc/attention/attention.py
#
# in a clone prints all of them again, for your machine.

# %%
import json
import os
import sys
import time
import tracemalloc
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from llmc import _llmc
from llmc.selfcheck import formulas

here = Path(__file__).parent if "__file__" in globals() else Path.cwd()
root = next(p for p in [here, *here.parents] if (p / "dev" / "kernels").is_dir())
sys.path.insert(0, str(root / "dev" / "kernels"))
import run  # noqa: E402  the kernels of dev/kernels, and the stopwatch

SMALL = os.environ.get("LLMC_SMALL") == "1"  # tests set it: small sizes, few repeats, the same code
rng = np.random.default_rng(1)
plt.rcParams.update({"figure.figsize": (7, 3.6), "figure.dpi": 110, "axes.grid": True, "grid.alpha": 0.3})

# %% [markdown]
# ## 1. The formula
#
# The matmul before attention has made three vectors for each token: a *query* $q_i$, what the token looks for; a
# *key* $k_j$, what it can be found by; and a *value* $v_j$, what it tells to whoever finds it. In GPT-2 they have 64
# channels in each of 12 *heads*, which do the same side by side and know nothing of each other. So all that follows
# is about one head.
#
# A query is compared with a key by their scalar product. The comparisons of a query, its *scores*, become
# probabilities by a softmax, and the output is the mean of the values with these probabilities:
#
# $$s_{ij} = \frac{q_i \cdot k_j}{\sqrt{64}} \qquad p_{ij} = \frac{e^{s_{ij}}}{\sum_{l \le i} e^{s_{il}}}
# \qquad o_i = \sum_{j \le i} p_{ij}\,v_j$$
#
# It is *causal*: $j$ goes up to $i$, because the model learns to predict the next token and must not look at it. The
# root keeps the scores at the size of a single channel: a sum of 64 products of random numbers is about 8 times as
# large as one of them, and a softmax of large scores is nearly all on one key and has nearly no gradient.
#
# Written with matrices, as one first writes it, with $-\infty$ for what may not be seen:


# %%
def probabilities(q, k):
    s = q @ k.T / q.shape[1] ** 0.5
    s = np.where(np.tri(len(s), dtype=bool), s, -np.inf)
    e = np.exp(s)
    return e / e.sum(axis=1, keepdims=True)


def naive(q, k, v):
    """Attention of one head by the formula: q, k, v are (T, HS)."""
    return probabilities(q, k) @ v


T, HS = 6, 64
q, k, v = rng.standard_normal((3, T, HS))
print(np.array2string(probabilities(q, k), precision=2, suppress_small=True))
print("differs from the formula that judges llmc's kernels by at most", end=" ")
expected, _ = formulas.attention(np.concatenate([q, k, v], axis=1)[None], 1)
print(f"{np.abs(naive(q, k, v) - expected[0]).max():.0e}")

# %% [markdown]
# Each row is a query and sums to 1. The first token sees nothing but itself.
#
# ## 2. Softmax, so that it does not overflow
#
# The largest float32 is about $3.4 \cdot 10^{38} = e^{88.7}$. A score of 89 makes its exponential infinite, and
# infinity divided by infinity is not a number. But a softmax does not change if the same number is added to all
# scores of a row, since $e^{s+c} = e^c e^s$, and $e^c$ cancels. So one takes away the row's largest score $m$. Then
# the largest exponential is $e^0 = 1$: nothing overflows, and the sum is at least 1. What underflows to 0 is too
# small to matter:
#
# $$p_j = \frac{e^{s_j - m}}{\sum_l e^{s_l - m}} \qquad m = \max_l s_l$$

# %%
row = np.float32([90, 88, 0])
with np.errstate(over="ignore", invalid="ignore"):
    print("as written: ", np.exp(row) / np.exp(row).sum())
print("less its max:", np.exp(row - row.max()) / np.exp(row - row.max()).sum())

# %% [markdown]
# The price is a third pass. A row has to be read once for its maximum, once for the sum, once for the result; and
# each needs the one before to be finished.
#
# ## 3. The online softmax
#
# Does it? Suppose that we walk along the keys, and keep the maximum so far, $m$, and the sum that belongs to it,
# $l = \sum e^{s_j - m}$. Now comes a new score $s$ that is larger than $m$. The sum was taken with the wrong maximum,
# but all its terms are wrong by the same factor, and it can be put right at once ([Milakov & Gimelshein
# 2018](https://arxiv.org/abs/1805.02867)):
#
# $$m' = \max(m, s) \qquad l' = l\,e^{m - m'} + e^{s - m'}$$
#
# because $e^{s_j - m}\,e^{m - m'} = e^{s_j - m'}$. And so with anything else that is linear in these exponentials,
# the output above all. Let $a = \sum_j e^{s_j - m}\,v_j$; then
#
# $$a' = a\,e^{m - m'} + e^{s - m'}\,v \qquad\text{and at the end}\qquad o = a / l.$$
#
# Three passes have become one, and no row of scores is needed, let alone a matrix.


# %%
def online(q, k, v):
    """Attention of one head, one key at a time; also the logarithm of each row's sum of exponentials."""
    T, HS = q.shape
    out, lse = np.empty_like(v), np.empty(T, v.dtype)
    for i in range(T):
        m, l, a = -np.inf, 0.0, np.zeros(HS, v.dtype)
        for j in range(i + 1):
            s = q[i] @ k[j] / np.sqrt(HS)
            larger = max(m, s)
            correction, e = np.exp(m - larger), np.exp(s - larger)  # the first correction is exp(-inf) = 0
            m, l, a = larger, l * correction + e, a * correction + e * v[j]
        out[i], lse[i] = a / l, m + np.log(l)
    return out, lse


out, lse = online(q, k, v)
print(f"largest difference from the formula: {np.abs(out - naive(q, k, v)).max():.0e}")

# %% [markdown]
# A state $(m, l, a)$ describes any set of keys, and two states can be merged in the same way:
#
# $$m = \max(m_1, m_2) \qquad l = l_1 e^{m_1 - m} + l_2 e^{m_2 - m} \qquad a = a_1 e^{m_1 - m} + a_2 e^{m_2 - m}$$
#
# So the keys may be cut into parts in any way, and the parts may be handled by whoever has time: a block of a loop, a
# thread, another GPU. This is the whole secret of what follows. Here a row of 1000 scores is cut at random places:


# %%
def state(s, v):
    m = s.max()
    e = np.exp(s - m)
    return m, e.sum(), e @ v


def merged(one, two):
    m = max(one[0], two[0])
    f1, f2 = np.exp(one[0] - m), np.exp(two[0] - m)
    return m, one[1] * f1 + two[1] * f2, one[2] * f1 + two[2] * f2


scores, values = 5 * rng.standard_normal(1000), rng.standard_normal((1000, HS))
whole = state(scores, values)
for parts in (2, 7, 100):
    cuts = np.sort(rng.choice(np.arange(1, 1000), parts - 1, replace=False))
    states = [state(s, v) for s, v in zip(np.split(scores, cuts), np.split(values, cuts))]
    rng.shuffle(states)
    total = states[0]
    for other in states[1:]:
        total = merged(total, other)
    print(f"{parts:3d} parts, merged in any order: {np.abs(total[2] / total[1] - whole[2] / whole[1]).max():.0e}")

# %% [markdown]
# ## 4. Blocks: flash attention
#
# One key at a time is the right idea in the wrong size. Processors are fast at matmuls of blocks, where each number
# that is loaded is used many times; with single rows, each is used once. So take 64 queries against 64 keys at a time
# ([Dao et al. 2022](https://arxiv.org/abs/2205.14135)): a block of $64 \times 64$ scores is one small matmul, its
# product with the values another, and between them every row updates its state. The block is 16 KB, so it never
# leaves the fastest memory that there is: the first cache of a CPU, or the shared memory or registers of a GPU.
#
# Causality is a gift. Of the $n^2$ blocks of $T = 64\,n$ tokens, those above the diagonal are not computed at all,
# those below need no mask, and only the $n$ on the diagonal do.


# %%
def flash(q, k, v, block=64):
    """Attention of one head in blocks, and lse. A block's scores are the largest matrix that exists."""
    T, HS = q.shape
    out, lse = np.empty_like(v), np.empty(T, v.dtype)
    for i0 in range(0, T, block):
        rows = np.arange(i0, min(i0 + block, T))
        m, l, a = np.full(len(rows), -np.inf, v.dtype), np.zeros(len(rows), v.dtype), np.zeros((len(rows), HS), v.dtype)
        for j0 in range(0, i0 + 1, block):
            keys = np.arange(j0, min(j0 + block, T))
            s = q[rows] @ k[keys].T * HS**-0.5
            if j0 == i0:
                s[keys[None, :] > rows[:, None]] = -np.inf
            larger = np.maximum(m, s.max(axis=1))
            correction, e = np.exp(m - larger), np.exp(s - larger[:, None])
            m, l = larger, l * correction + e.sum(axis=1)
            a = a * correction[:, None] + e @ v[keys]
        out[rows], lse[rows] = a / l[:, None], m + np.log(l)
    return out, lse


T = 150  # two blocks, and a part of one
q, k, v = rng.standard_normal((3, T, HS))
print(f"largest difference from the formula: {np.abs(flash(q, k, v)[0] - naive(q, k, v)).max():.0e}")

# %% [markdown]
# Which blocks are there? Empty ones are never touched:

# %%
n = 8
fig, ax = plt.subplots(figsize=(3.6, 3.6))
kind = np.where(np.arange(n)[None] < np.arange(n)[:, None], 2, np.where(np.eye(n) == 1, 1, 0))
ax.imshow(kind, cmap="Blues", vmin=0, vmax=3)
for i in range(n):
    for j in range(n):
        ax.text(j, i, ["", "masked", "whole"][kind[i, j]], ha="center", va="center", fontsize=6)
ax.set(xlabel="blocks of 64 keys", ylabel="blocks of 64 queries", title=f"T = {64 * n}")
ax.grid(False)
for T in (512, 1024, 8192):
    n = T // 64
    print(f"T = {T}: {n * (n + 1) // 2} of {n * n} blocks are computed, {(n + 1) / (2 * n):.1%}")

# %% [markdown]
# ### How much memory
#
# The peak of what both functions allocate, measured by Python's `tracemalloc`, which sees NumPy's arrays:


# %%
def peak_bytes(function, *arguments):
    tracemalloc.start()
    function(*arguments)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


lengths = [64, 128, 256] if SMALL else [128, 256, 512, 1024, 2048, 4096]
peaks = {"naive": [], "flash": []}
for T in lengths:
    q, k, v = rng.standard_normal((3, T, HS)).astype(np.float32)
    peaks["naive"].append(peak_bytes(naive, q, k, v))
    peaks["flash"].append(peak_bytes(flash, q, k, v))
fig, ax = plt.subplots()
for name, values in peaks.items():
    ax.loglog(lengths, np.array(values) / 2**20, ".-", label=f"{name}, measured")
ax.loglog(lengths, [4 * T * T / 2**20 for T in lengths], ":", color="gray", label="one matrix of $T^2$ float32")
ax.set(xlabel="T", ylabel="MiB for one head")
ax.set_xticks(lengths, lengths)
ax.minorticks_off()
_ = ax.legend()
for T, a, b in zip(lengths, *peaks.values()):
    print(f"T = {T:5d}: naive {a / 2**20:8.2f} MiB, flash {b / 2**20:6.2f} MiB")

# %% [markdown]
# The naive way has three such matrices at a time: the scores, their exponentials, the probabilities. Flash grows with
# $T$, because its output does. What the naive way needs is worse in training than it looks here: the backward pass
# needs the probabilities again, so those of all heads and layers would have to be kept. For GPT-2 124M:


# %%
for B, T in ((4, 1024), (64, 1024), (4, 8192)):
    layers, heads = 12, 12
    matrix, kept = layers * B * heads * T * T * 2, layers * B * heads * T * 4
    print(
        f"B = {B:2d}, T = {T:4d}: probabilities in bf16 {matrix / 2**20:7.0f} MiB, lse in float32 {kept / 2**20:4.1f} MiB"
    )

# %% [markdown]
# ## 5. Backward, on paper
#
# Given $do_i = \partial L/\partial o_i$ for each query, wanted are $dq_i$, $dk_j$ and $dv_j$. Go back through the
# formula.
#
# **Values.** $v_j$ is in $o_i$ with the factor $p_{ij}$, for each query that sees it, and so
#
# $$dv_j = \sum_{i \ge j} p_{ij}\,do_i.$$
#
# **Probabilities.** $p_{ij}$ is in $o_i$ with the factor $v_j$, so $dp_{ij} = do_i \cdot v_j$.
#
# **Scores.** Here the softmax comes in. With $e_j = e^{s_j}$ and $\Sigma = \sum_l e_l$, a row has $p_j = e_j/\Sigma$,
# and by the derivative of a quotient
#
# $$\frac{\partial p_j}{\partial s_l} = \frac{\delta_{jl}\,e_j\,\Sigma - e_j\,e_l}{\Sigma^2} = p_j\,(\delta_{jl} - p_l),$$
#
# where $\delta_{jl}$ is 1 if $j = l$ and else 0. Each score is in all probabilities of its row, and what reaches the
# loss in several ways adds up:
#
# $$ds_{il} = \sum_j dp_{ij}\,p_{ij}\,(\delta_{jl} - p_{il}) = p_{il}\,\Big(dp_{il} - \sum_j p_{ij}\,dp_{ij}\Big).$$
#
# The sum is the mean of the row's $dp$, weighted by the probabilities: call it $D_i$. It seems to need a whole row of
# $p$ and $dp$ before the first $ds$ can be computed. But
#
# $$D_i = \sum_j p_{ij}\,(do_i \cdot v_j) = do_i \cdot \sum_j p_{ij}\,v_j = do_i \cdot o_i,$$
#
# a scalar product of two rows that are there before anything else begins. This is the first of two observations on
# which flash attention's backward pass rests.
#
# **Queries and keys.** $s_{ij} = q_i \cdot k_j / \sqrt{64}$ is a product, so
#
# $$dq_i = \frac1{\sqrt{64}} \sum_{j \le i} ds_{ij}\,k_j \qquad dk_j = \frac1{\sqrt{64}} \sum_{i \ge j} ds_{ij}\,q_i.$$
#
# **The second observation.** All of this needs $p_{ij}$, which was thrown away. But with the logarithm of the row's
# sum, $lse_i = \log \sum_l e^{s_{il}} = m_i + \log l_i$, each probability comes back by itself, with no maximum and
# no sum:
#
# $$p_{ij} = e^{s_{ij} - lse_i}.$$
#
# So the forward pass keeps one number for each query, and the backward pass makes the scores again, block by block.
# That is a matmul more: backward has five, $q k^T$, $do\,v^T$, $p^T do$, $ds\,k$ and $ds^T q$, where with the matrix
# at hand it would have four. On GPUs Dao et al. found it faster all the same: reading the matrix took longer than
# making it again.


# %%
def flash_backward(dout, q, k, v, out, lse, block=64):
    """The gradients of q, k and v of one head. A block of keys stays, and blocks of queries pass by."""
    T, HS = q.shape
    scale = HS**-0.5
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    D = (dout * out).sum(axis=1)
    for j0 in range(0, T, block):
        keys = np.arange(j0, min(j0 + block, T))
        for i0 in range(j0, T, block):
            rows = np.arange(i0, min(i0 + block, T))
            p = np.exp(q[rows] @ k[keys].T * scale - lse[rows, None])
            if i0 == j0:
                p[keys[None, :] > rows[:, None]] = 0
            ds = p * (dout[rows] @ v[keys].T - D[rows, None]) * scale
            dv[keys] += p.T @ dout[rows]
            dq[rows] += ds @ k[keys]
            dk[keys] += ds.T @ q[rows]
    return dq, dk, dv


# %% [markdown]
# ### Checked by differences
#
# A derivative can always be checked by its definition: change one number a little, and see how the loss changes. With
# $L = \sum do \cdot o$ the gradient of $o$ is $do$. Central differences, in float64, for a few numbers of each array;
# the naive forward pass is the judge, so neither the blocks nor $lse$ are trusted:

# %%
T = 130
q, k, v, dout = rng.standard_normal((4, T, HS))
gradients = flash_backward(dout, q, k, v, *flash(q, k, v))
h = 1e-5
for name, x, gradient in zip("qkv", (q, k, v), gradients):
    largest = 0.0
    for _ in range(5 if SMALL else 30):
        at = rng.integers(T), rng.integers(HS)
        before = x[at]
        x[at] = before + h
        up = (dout * naive(q, k, v)).sum()
        x[at] = before - h
        down = (dout * naive(q, k, v)).sum()
        x[at] = before
        largest = max(largest, abs((up - down) / (2 * h) - gradient[at]))
    print(
        f"d{name}: by differences and by the formula at most {largest:.0e} apart; the largest is {np.abs(gradient).max():.1f}"
    )

# %% [markdown]
# There is a property to check, too. Queries and keys reach the loss only through their products: making all queries
# longer by one percent does the same to the scores as making all keys longer. So
# $\sum_i q_i \cdot dq_i = \sum_j k_j \cdot dk_j$, and both are $\sum_{ij} ds_{ij}\,s_{ij}$.

# %%
dq, dk, dv = gradients
print(f"sum of q dq: {(q * dq).sum():.12f}")
print(f"sum of k dk: {(k * dk).sum():.12f}")

# %% [markdown]
# ## 6. The same in C++
#
# [`dev/kernels/attention_forward`](../../dev/kernels/README.md) has one file for each step. The first is the formula:

# %%
print(run.source("dev/kernels/attention_forward/cpu_1_naive.cpp"))

# %% [markdown]
# Each version is first checked, at odd sizes, with outputs full of NaNs beforehand and float64 as the judge;
# "error" is a share of what is allowed. GFLOP/s count the operations that the causal formula needs, $4 \cdot 64$
# for each pair of a query and a key that it sees (in backward, for five matmuls, $10 \cdot 64$), whatever a version
# really does. The last lines are NumPy, PyTorch if it is installed, and llmc's own op. (Others use the notebook's
# machine too: a time may differ by a third from one table to the next.)


# %%
QUICK = {"optimize": "-O1", "peers": False} if SMALL else {}


def measured(op, versions):
    """Check and time an op's versions for the CPU, in SMALL only those named, and print the table."""
    quick = QUICK | {"versions": versions, "small": True, "budget": 0.02} if SMALL else {}
    results = run.measure(op, **quick)
    print(f"{op}, {', '.join(f'{name}={size}' for name, size in results[0].shape.items())}")
    print(f"{'version':24s} {'error':>5s} {'ms':>9s} {'GFLOP/s':>8s} {'times the first':>16s}")
    for r in results:
        faster = results[0].seconds / r.seconds
        print(f"{r.version:24s} {r.error:5.2f} {r.seconds * 1e3:9.3f} {r.gflops:8.1f} {faster:16.1f}")
    return results


info = _llmc.Backend("cpu").info()
print(f"{info.description}, {info.threads} threads; llmc's kernels: {info.isa}\n")
forward = measured("attention_forward", ["cpu_2", "cpu_4"])

# %% [markdown]
# **1, naive.** Twice the scores that are needed, and a matrix that is written three times and read four times. Each
# score is a chain of 64 additions of which each waits for the one before. The last product walks down the columns of
# $v$, so each number comes from another cache line.
#
# **2, rows.** A row of scores at a time, which stays in the first cache and ends at the diagonal. The loops of the
# last product are exchanged, so the compiler can make vectors of it.
#
# **3, online.** One pass. It is not faster: on a CPU, the row was in the first cache anyway, and the corrections are
# work. What it gains is that nothing has to be stored, and that is what the next step is made of.
#
# **4, blocks.** Flash attention, in plain loops. Every key that is loaded meets 64 queries, and the keys are
# transposed once, so that all inner loops run along a row and become vectors:

# %%
print(run.source("dev/kernels/attention_forward/cpu_4_blocks.cpp", "multiply"))
print(run.source("dev/kernels/attention_forward/cpu_4_blocks.cpp", "run"))

# %% [markdown]
# **5, vectors and threads.** Version 4 still writes each sum to the cache after every multiply-add, and calls `exp`
# of the C library for one number at a time. Version 5 keeps a tile of the result in registers, and has an exponential
# that does a whole vector: $e^x = 2^n e^r$ with a whole $n$ and $|r| \le \frac12 \ln 2$, where a short polynomial is
# exact to a rounding. Heads share nothing, so each is a task for a thread.

# %%
print(run.source("dev/kernels/attention_forward/cpu_5_vectors_threads.cpp", "multiply"))
print(run.source("dev/kernels/attention_forward/cpu_5_vectors_threads.cpp", "exp"))


# %% [markdown]
# How much do exponentials matter? There is one for each 256 operations of the two products. What does it cost beside
# them?


# %%
def fastest(function, repeats=3 if SMALL else 20):
    """The shortest time of several, in seconds."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return min(times[1:])


x = rng.standard_normal(1 << (12 if SMALL else 20)).astype(np.float32)
exponential = fastest(lambda: np.exp(x)) / x.size
peak = _llmc.cpu_peak_flops("f32", 1)
print(
    f"an exponential in NumPy: {exponential * 1e9:.2f} ns; 256 operations at the peak of one thread: {256 / peak * 1e9:.2f} ns"
)

# %% [markdown]
# So an exponential costs a good part of what its 256 operations cost, even if whole vectors of them are computed, as
# NumPy does. In bf16, where the products are faster, it weighs more still.
#
# ### Time against length
#
# All versions do work that grows with $T^2$; what differs is the factor. The naive one's matrix, $4T^2$ bytes,
# outgrows the caches one after the other, but its sums are so slow that memory keeps up with them for long:

# %%
lengths = [64, 128] if SMALL else [128, 256, 512, 1024, 2048]
shown = ["cpu_2", "cpu_4"] if SMALL else ["cpu_1", "cpu_2", "cpu_4", "cpu_5"]
curves = {}
for T in lengths:
    shape = {"B": 1, "T": T, "NH": 2}
    for r in run.measure("attention_forward", versions=shown, shape=shape, budget=0.01 if SMALL else 0.2, **QUICK):
        curves.setdefault(r.version, []).append(r.seconds)
fig, ax = plt.subplots(figsize=(7, 4.2))
for name, seconds in curves.items():
    ax.loglog(lengths, np.array(seconds) * 1e3, ".-", label=name)
steep = curves[next(iter(curves))][0] * 1e3 / lengths[0] ** 2
ax.loglog(lengths, [steep * T * T for T in lengths], ":", color="gray", label="proportional to $T^2$")
ax.set(xlabel="T", ylabel="ms for two heads")
ax.set_xticks(lengths, lengths)
ax.minorticks_off()
_ = ax.legend(fontsize=8)
for name, seconds in curves.items():
    print(f"{name:24s}", *(f"{1e3 * s:9.3f} ms" for s in seconds))

# %% [markdown]
# ## 7. Backward in C++
#
# The naive version has three matrices. Version 2 needs none: by the two observations of section 5, each pair of a
# query and a key can be done by itself.

# %%
print(run.source("dev/kernels/attention_backward/cpu_2_rows.cpp", "run"))

# %%
backward = measured("attention_backward", ["cpu_3"])

# %% [markdown]
# **3, blocks** is `flash_backward` above. The block of keys stays with its $dk$ and $dv$, and queries pass by, from
# the diagonal on. **4** has vectors and threads, as in forward. All sums are within a head, so no two threads add to
# one place, and the result has the same bits for any number of threads:

# %%
op = run.find_op("attention_backward")
version, shape = op.version("cpu_3" if SMALL else "cpu_4"), {"B": 1, "T": 100, "NH": 3}
inputs = op.module.inputs(np.random.default_rng(5), **shape)
optimize = QUICK.get("optimize", "-O3")
one, two = (run.call(version, shape=shape, threads=n, optimize=optimize, **inputs) for n in (1, 2))
print("the same bits with 1 and 2 threads:", all(np.array_equal(one[name], two[name]) for name in one))

# %% [markdown]
# llmc's own kernels ([`attention.h`](../../csrc/cpu/simd/attention.h), and for matrix units
# [`amx_attention.h`](../../csrc/cpu/simd/amx_attention.h)) are these blocks with other sizes: keys and values are
# packed once for each head, maxima of all rows are found first, and products run through the micro-kernel of the
# matmuls. In bf16, which is how one trains, a CPU with matrix units for it is far faster:

# %%
cpu = _llmc.Backend("cpu")
B, T, NH = (1, 64, 2) if SMALL else (1, 1024, 12)
for dtype in ("f32", "bf16"):
    t = {
        name: cpu.empty(list(size), dtype)
        for name, size in {
            "qkv": (B, T, 3 * NH * 64),
            "out": (B, T, NH * 64),
            "dout": (B, T, NH * 64),
            "dqkv": (B, T, 3 * NH * 64),
        }.items()
    }
    values = rng.standard_normal((B, T, 3 * NH * 64), dtype=np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)  # bf16 is the upper half of a float32
    t["qkv"].from_host(values if dtype == "f32" else bits)
    t["dout"].from_host(np.ascontiguousarray((values if dtype == "f32" else bits)[:, :, : NH * 64]))
    lse_t = cpu.empty([B, NH, T], "f32")
    there = fastest(lambda: cpu.attention_forward(t["out"], lse_t, t["qkv"], NH))  # noqa: B023
    back = fastest(lambda: cpu.attention_backward(t["dqkv"], t["dout"], t["qkv"], t["out"], lse_t, NH))  # noqa: B023
    pairs = B * NH * T * (T + 1) / 2 * 64
    print(f"llmc {dtype:4s} forward {there * 1e3:7.2f} ms, {4 * pairs / there / 1e9:6.1f} GFLOP/s", end="    ")
    print(f"backward {back * 1e3:7.2f} ms, {10 * pairs / back / 1e9:6.1f} GFLOP/s")

# %% [markdown]
# ## 8. On the GPU
#
# On a GPU the first question is how many bytes go through memory. A matrix of scores is too large for what is
# inside the chip, so each pass over it is counted. (What warps, blocks, shared memory and barriers are, [the text
# on layernorm](../layernorm/layernorm.py) says in section 8.)

# %%
B, T, NH = 8, 1024, 12
matrix, tensors = B * NH * T * T * 4, B * T * 4 * NH * 64 * 4
print(
    f"scores written, read three times and written twice by the softmax, read by the last product: {7 * matrix / 1e6:6.0f} MB"
)
print(
    f"queries, keys, values and output, each once:                                                {tensors / 1e6:6.0f} MB"
)

# %% [markdown]
# The versions in [`dev/kernels/attention_forward`](../../dev/kernels/README.md):
#
# 1. Three kernels, with the matrix between them.
# 2. The online softmax: a thread for each query, with the query and its output in registers. Nothing is stored
#    between.
# 3. Flash: a block of threads owns 64 queries and takes 64 keys at a time to shared memory. Each thread computes
#    $4 \times 4$ numbers of a product, so that a number that is loaded is used four times.
# 4. bf16 on *tensor cores*, which multiply a $16 \times 16$ matrix by a $16 \times 8$ one in one instruction. A warp
#    holds its scores in registers, in just the layout in which the next instruction wants its left operand. So scores
#    become probabilities, and these are multiplied by the values, without a detour ([Dao
#    2023](https://arxiv.org/abs/2307.08691)).
# 5. The next keys and values are copied while the present ones are computed.
#
# The heart of versions 4 and 5 is the loop over tiles of keys:

# %%
print(run.source("dev/kernels/attention_forward/cuda_5_bf16_pipelined.cu", "multiply_rows"))
print(run.source("dev/kernels/attention_forward/cuda_5_bf16_pipelined.cu", "attention"))

# %% [markdown]
# ### Backward, and who adds
#
# A CPU thread has a head to itself. A GPU needs more tasks than there are heads, so the blocks of a head are divided
# among blocks of threads. Then $dk_j$ and $dv_j$ are sums over all queries, and $dq_i$ is one over all keys: whoever
# owns the keys makes parts of $dq$ for others, and the other way round. Atomic additions would do, but their order,
# and so the last bits of the result, would differ from run to run. llmc has two kernels, one whose blocks own queries
# and one whose blocks own keys, and both make the scores again. Two matmuls more, seven in place of five, and each
# run gives the same bits:

# %%
print(run.source("dev/kernels/attention_backward/cuda_2_owners.cu", "backward"))

# %% [markdown]
# These kernels run without a GPU too, over [`dev/cuda_emulation`](../cuda.md), which is slow but notices a missing
# barrier or a copy that nobody waited for. So all are checked here:

# %%
try:
    for name in ("attention_forward", "attention_backward")[: 1 if SMALL else 2]:
        few = QUICK | {"versions": ["cuda_2"]} if SMALL else {"peers": False}
        for r in run.measure(name, "emulated", **few):
            print(f"{name} {r.version:26s} error {r.error:.2f} of what is allowed")
except run.KernelError as e:
    print("no emulation here:", str(e).split("\n")[0])

# %% [markdown]
# And these are times of a real GPU, from the files that `run.py --device cuda --json` has written:

# %%
measurements = 0
for path in sorted((root / "dev" / "kernels" / "results").glob("*.json")):
    data = json.loads(path.read_text())
    for name in ("attention_forward", "attention_backward"):
        results = [r for r in data["results"] if r["op"] == name and r["seconds"]]
        if results:
            sizes = ", ".join(f"{size}={n}" for size, n in results[0]["shape"].items())
            print(f"{data['machine']['card']}, {data['machine']['date']}: {name}, {sizes}")
        for r in results:
            faster = results[0]["seconds"] / r["seconds"]
            speed = f"{r['seconds'] * 1e6:9.1f} us {r['gflops'] / 1e3:7.1f} TFLOP/s {faster:7.1f} times the first"
            print(f"{r['version']:26s} {speed}")
            measurements += 1
if not measurements:
    print("dev/kernels/results has no times of these ops: run.py was not run on a GPU")

# %% [markdown]
# Look at the line `llmc_f32`: it is slower than version 3. In float32 llmc has no flash attention on a GPU, but a block
# of threads for each query, and backward works as in version 2. One trains in bf16 there; who needs float32 finds in
# version 3 what to carry over.
#
# ## Where to go from here
#
# llmc's kernels for GPUs are [`flash_forward.cu`](../../csrc/cuda/flash_forward.cu) and
# [`flash_backward.cu`](../../csrc/cuda/flash_backward.cu), for head sizes from 64 to 128, and for Hopper
# [`wgmma_forward.cu`](../../csrc/cuda/wgmma_forward.cu), whose tensor cores read their operands from shared memory by
# themselves. [performance.md](../performance.md) has what each gained, and what was tried and did not help. In
# generation one query meets all keys so far: there is no block of queries, and the cache of keys and values is what
# is read ([`attention_decode.cu`](../../csrc/cuda/attention_decode.cu)).
#
# An exercise: let a query see only the last 256 keys (*sliding-window attention*). What changes in `flash`? Which
# blocks can be skipped now? Then carry it into `cpu_4_blocks.cpp`, and into `oracle` in its `op.py`, and see how the
# time grows with $T$.
