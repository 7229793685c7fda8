# %% [markdown]
# # Layernorm, from the formula to the GPU
#
# Layernorm is the smallest op of GPT-2 that has everything in it: a sum over a row, a gradient that has to be
# derived, sums over columns that threads must share, and a speed that the memory decides. This text takes it from the
# formula to the kernels that llmc runs, and measures each step.
#
# You need Python, some C, and the derivative of a quotient. Every number below is printed by the code above it, and
#
#     python doc/layernorm/layernorm.py
#
# in a clone prints all of them again, for your machine, in a minute or two. It needs llmc installed and a C++
# compiler. (The figures are in the notebook alone.)

# %%
import dataclasses
import functools
import inspect
import json
import os
import sys
import time
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
plt.rcParams.update({"figure.figsize": (7, 3.6), "figure.dpi": 90, "axes.grid": True, "grid.alpha": 0.3})

# %% [markdown]
# ## 1. The formula
#
# A transformer adds the output of each of its blocks to the *residual stream*: a vector of $C$ numbers (*channels*)
# for each token, 768 in GPT-2 124M. Nothing limits how large these numbers grow. So every block looks at the stream
# through a layernorm ([Ba, Kiros & Hinton 2016](https://arxiv.org/abs/1607.06450)), which brings each token's vector
# to mean 0 and variance 1, and then gives each channel a scale $w_i$ and a shift $b_i$ of its own, which are learned:
#
# $$\mu = \frac1C\sum_i x_i \qquad v = \frac1C\sum_i (x_i-\mu)^2 \qquad r = \frac{1}{\sqrt{v+\epsilon}}
# \qquad n_i = (x_i-\mu)\,r \qquad y_i = n_i w_i + b_i$$
#
# $\epsilon = 10^{-5}$ keeps the root away from 0 if all $x_i$ are equal. The code calls $r$ `rstd`, the reciprocal of
# the standard deviation. All tokens of a batch together are a matrix of $N = B\,T$ rows, one for each token, and no
# row knows of another.
#
# In NumPy it is five lines. These are the ones by which llmc's tests, and `llmc check`, judge the kernels:

# %%
print(inspect.getsource(formulas.layernorm))

N, C = 4, 8
x, weight, bias = 3 + 2 * rng.standard_normal((N, C)), rng.standard_normal(C), rng.standard_normal(C)
out, mean, rstd = formulas.layernorm(x, weight, bias)
normal = (x - mean[:, None]) * rstd[:, None]
print("means of the rows of n:    ", np.array2string(normal.mean(axis=1), precision=1))
print("variances of the rows of n:", np.array2string(normal.var(axis=1), precision=6))

# %% [markdown]
# The variances are a little less than 1: they are $v/(v+\epsilon)$.
#
# ## 2. The gradient, on paper
#
# Training asks the question backwards. Some loss $L$ depends on $y$, and the layers above have computed
# $dy_i = \partial L/\partial y_i$ for each element. Wanted are $\partial L/\partial w_i$, $\partial L/\partial b_i$
# and $\partial L/\partial x_i$.
#
# **Weight and bias.** In each row $y_i = n_i w_i + b_i$, and the same $w_i$ and $b_i$ serve all rows. What reaches
# the loss on several ways adds up:
#
# $$\frac{\partial L}{\partial w_i} = \sum_{\text{rows}} dy_i\,n_i \qquad \frac{\partial L}{\partial b_i} = \sum_{\text{rows}} dy_i$$
#
# **Input.** Look at one row. First from $y$ to $n$: let
#
# $$g_i = \frac{\partial L}{\partial n_i} = dy_i\,w_i.$$
#
# Then from $n$ to $x$. An $x_i$ is in its own $n_i$, but through $\mu$ and $r$ it is in every other $n_j$ of the row
# too. So we need all $\partial n_j/\partial x_i$, and go through the formulas in their order.
#
# $$\frac{\partial \mu}{\partial x_i} = \frac1C$$
#
# For the variance, the chain rule gives
#
# $$\frac{\partial v}{\partial x_i} = \frac1C \sum_j 2\,(x_j-\mu)\left(\delta_{ij} - \frac1C\right)
#   = \frac2C\,(x_i-\mu) - \frac{2}{C^2}\underbrace{\sum_j (x_j-\mu)}_{0} = \frac2C\,(x_i-\mu)$$
#
# where $\delta_{ij}$ is 1 if $i=j$ and else 0. The last sum vanishes because $\mu$ is the mean: a small change of the
# mean does not change the variance. For the reciprocal root,
#
# $$\frac{\partial r}{\partial x_i} = -\frac12 (v+\epsilon)^{-3/2}\,\frac{\partial v}{\partial x_i}
#   = -\frac12\, r^3\cdot \frac2C (x_i-\mu) = -\frac{r^2}{C}\,n_i$$
#
# and with both, by the product rule on $n_j = (x_j-\mu)\,r$:
#
# $$\frac{\partial n_j}{\partial x_i} = \left(\delta_{ij} - \frac1C\right) r + (x_j-\mu)\,\frac{\partial r}{\partial x_i}
#   = r\left(\delta_{ij} - \frac1C - \frac{n_i n_j}{C}\right)$$
#
# It remains to sum over everything that $x_i$ reaches:
#
# $$\frac{\partial L}{\partial x_i} = \sum_j g_j\,\frac{\partial n_j}{\partial x_i}
#   = r\Big(g_i - \underbrace{\tfrac1C\textstyle\sum_j g_j}_{\text{avg}(g)} - n_i\,
#   \underbrace{\tfrac1C\textstyle\sum_j g_j n_j}_{\text{avg}(g\,n)}\Big)$$
#
# That is all. The matrix of $C \times C$ derivatives never has to exist: two averages over the row are enough. And of
# the forward pass only $\mu$ and $r$ have to be kept, two numbers for each row, because $n$ follows from them and
# $x$.

# %%
print(inspect.getsource(formulas.layernorm_gradient))

# %% [markdown]
# ### What the formula says
#
# The derivatives of a row are the matrix $J = r\,(I - \frac1C \mathbf 1\mathbf 1^T - \frac1C n\,n^T)$. It takes out
# of $g$ its part along $\mathbf 1 = (1, \dots, 1)$ and its part along $n$, and multiplies the rest by $r$. It has to
# be so: layernorm undoes a shift of the whole row, which is a step along $\mathbf 1$, and a stretching of the row,
# which is a step along $n$. What the output does not feel has no gradient.
#
# So $J$ should have the eigenvalue 0 for $\mathbf 1$, about 0 for $n$ (exactly $r\,\epsilon/(v+\epsilon)$: $\epsilon$
# makes the undoing imperfect), and $r$ for all other directions. Here is $J$ by the formula, with its eigenvalues:

# %%
n, r = normal[0], rstd[0]
J = r * (np.eye(C) - np.ones((C, C)) / C - np.outer(n, n) / C)
print("eigenvalues of J:    ", np.array2string(np.linalg.eigvalsh(J), precision=6, suppress_small=True))
print(f"r = {r:.6f}, and along n: {r * 1e-5 / (x[0].var() + 1e-5):.6f}")

# %% [markdown]
# ### The same, mechanically
#
# One can also go back through the forward pass step by step, without thinking, as PyTorch's autograd does. Each line
# below is the transposed of one line of the forward pass. The result is the same, but each step has an array of its
# own, and the second sum (`dcentered.mean`) must wait for the first (`dr`). In the formula above both sums come from
# one pass over the row. The thinking was worth while.


# %%
def gradient_by_steps(dout, x, weight):
    centered = x - x.mean(axis=1, keepdims=True)
    r = 1 / np.sqrt((centered**2).mean(axis=1, keepdims=True) + 1e-5)
    dnormal = dout * weight  # out = normal weight + bias
    dcentered = dnormal * r  # normal = centered r
    dr = (dnormal * centered).sum(axis=1, keepdims=True)
    dvariance = -0.5 * r**3 * dr  # r = (variance + eps)^(-1/2)
    dcentered += 2 / x.shape[1] * centered * dvariance  # variance = avg(centered^2)
    return dcentered - dcentered.mean(axis=1, keepdims=True)  # centered = x - avg(x)


dout = rng.standard_normal((N, C))
dx, dweight, dbias = formulas.layernorm_gradient(dout, x, weight)
difference = np.abs(gradient_by_steps(dout, x, weight) - dx).max()
print(f"largest difference: {difference:.1e}, of values up to {np.abs(dx).max():.2f}")

# %% [markdown]
# ## 3. Is it right?
#
# Two derivations by the same person may share a mistake. A check that knows only the forward pass is better. With
# $f(x) = \sum dy\cdot y(x)$, whose gradient is what backward computes, nudge one $x_i$ by $h$ and see how $f$
# changes:
#
# $$\frac{f(x+h) - f(x)}{h} \quad\text{(one-sided)} \qquad\qquad \frac{f(x+h) - f(x-h)}{2h}\quad\text{(central)}$$
#
# Which $h$? Taylor's series says that a smaller one is better: the one-sided quotient is wrong by about
# $\frac h2 f''$, the central one by $\frac{h^2}6 f'''$. But $f$ is only known to its rounding, about $\varepsilon f$,
# where $\varepsilon = 2^{-53}$ in double precision. The difference of two nearly equal numbers keeps that error, and
# the division by $h$ makes it large: $\varepsilon f/h$. The two errors are equal near
# $h = \sqrt\varepsilon \approx 10^{-8}$, or for the central quotient $h = \sqrt[3]\varepsilon \approx 5\cdot10^{-6}$,
# and there half of the digits, or two thirds, are right. No $h$ gives more.
#
# The way out is the **complex step** ([Squire & Trapp 1998](https://doi.org/10.1137/S003614459631241X)). Let $h$ go
# in the imaginary direction:
#
# $$f(x + ih) = f(x) + ih\,f'(x) - \frac{h^2}2 f''(x) - \dots \qquad\Longrightarrow\qquad
# f'(x) = \frac{\operatorname{Im} f(x+ih)}{h} + O(h^2)$$
#
# Nothing is subtracted, so nothing cancels, and $h$ can be $10^{-30}$: then $h^2$ is below any rounding. All it needs
# is a forward pass that takes complex numbers, without `abs`, `max` or a branch on a value. `formulas.layernorm` is
# such a function.


# %%
def quotients(f, x, h, kind):
    """Return the derivative of f by each element of x: "one-sided", "central" or "complex"."""
    gradient = np.empty_like(x)
    for i in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[i] = h
        if kind == "one-sided":
            gradient[i] = (f(x + step) - f(x)) / step[i]
        elif kind == "central":
            gradient[i] = (f(x + step) - f(x - step)) / (2 * step[i])
        else:
            gradient[i] = f(x + 1j * step).imag / h
    return gradient


def loss(z):
    d, w, b = (t.astype(z.real.dtype) for t in (dout, weight, bias))
    return (d * formulas.layernorm(z, w, b)[0]).sum()


def error_of(gradient):
    return np.linalg.norm(gradient - dx) / np.linalg.norm(dx)


steps = np.logspace(-16, 0, 17 if SMALL else 65)
curves = {
    "one-sided": [error_of(quotients(loss, x, h, "one-sided")) for h in steps],
    "central": [error_of(quotients(loss, x, h, "central")) for h in steps],
    "central, float32": [error_of(quotients(loss, x.astype(np.float32), h, "central")) for h in steps if h > 1e-8],
    "complex step": [error_of(quotients(loss, x, h, "complex")) for h in steps],
}
fig, ax = plt.subplots()
for name, errors in curves.items():
    ax.loglog(steps[-len(errors) :], np.maximum(errors, 1e-17), ".-", ms=4, label=name)
ax.set(xlabel="step h", ylabel="relative error of the gradient", ylim=(1e-17, 1e2))
_ = ax.legend(loc="center left")
for name, errors in curves.items():
    best = int(np.argmin(errors))
    print(f"{name:17s} smallest error {errors[best]:.1e}, at h = {steps[-len(errors) :][best]:.0e}")

# %% [markdown]
# Each V has an arm on the right that falls with $h$ (slope 1, and 2 for the central quotient), which is Taylor's
# error, and one on the left that rises as $1/h$, which is rounding. In float32, in which the kernels compute,
# differences give four or five digits at best, and at most steps fewer: they find a gradient that is wrong, but not
# one that is not quite right. The complex step has no left arm. At $h = 10^{-30}$ it confirms the whole derivation,
# to the last bits:

# %%
h = 1e-30
print(f"dx:      relative error {error_of(quotients(loss, x, h, 'complex')):.1e}")
by_weight = quotients(lambda z: (dout * formulas.layernorm(x, z, bias)[0]).sum(), weight, h, "complex")
by_bias = quotients(lambda z: (dout * formulas.layernorm(x, weight, z)[0]).sum(), bias, h, "complex")
print(f"dweight: relative error {np.linalg.norm(by_weight - dweight) / np.linalg.norm(dweight):.1e}")
print(f"dbias:   relative error {np.linalg.norm(by_bias - dbias) / np.linalg.norm(dbias):.1e}")
assert error_of(quotients(loss, x, h, "complex")) < 1e-14

# %% [markdown]
# From here on these NumPy formulas, in double precision, are the *oracle*: what kernels are compared with. (In llmc's
# tests too: [`test_layernorm`](../../tests/ops/test_oracle.py#L23) checks the formulas by the complex step, and
# [`test_layernorm_backward_adds`](../../tests/ops/test_ops.py#L162) the kernels by the formulas.)
#
# ## 4. The variance in float32
#
# There are several ways to compute a variance, equal on paper:
#
# - **two passes**: the mean first, then the average of $(x_i-\mu)^2$;
# - **one pass** by $v = \text{avg}(x^2) - \mu^2$: both sums at once;
# - **shifted**: one pass too, over $x_i - s$ for some number $s$ near the mean, for example the row's first element;
#   the variance does not feel the shift;
# - **Welford's** ([1962](https://doi.org/10.1080/00401706.1962.10490022)): one pass that keeps a mean and a sum of
#   squared deviations of what it has seen, and corrects both with each element.
#
# The one-pass formula subtracts two numbers of the size of $\mu^2$ to get one of the size of $v$. Each has an error
# of about $\varepsilon\mu^2$, with $\varepsilon = 6\cdot10^{-8}$ in float32, so the variance is off by about
# $\varepsilon\mu^2/v$, relatively, and by several times as much if a long sum was rounded at every step. If the
# mean is a thousand standard deviations away from 0, hardly a digit is left, and the result may even be negative:
# then $r$ is not a number. Here are all four, in float32, for rows whose mean is further and further away from 0:


# %%
def one_pass(x):
    total = squares = np.zeros(len(x), x.dtype)
    for column in x.T:
        total, squares = total + column, squares + column * column
    mean = total / x.dtype.type(x.shape[1])
    return squares / x.dtype.type(x.shape[1]) - mean * mean


def two_passes(x):
    total = squares = np.zeros(len(x), x.dtype)
    for column in x.T:
        total = total + column
    mean = total / x.dtype.type(x.shape[1])
    for column in x.T:
        squares = squares + (column - mean) ** 2
    return squares / x.dtype.type(x.shape[1])


def shifted(x):
    return one_pass(x - x[:, :1])


def welford(x):
    mean = squares = np.zeros(len(x), x.dtype)
    for count, column in enumerate(x.T, 1):
        before = column - mean
        mean = mean + before / x.dtype.type(count)
        squares = squares + before * (column - mean)
    return squares / x.dtype.type(x.shape[1])


distances = np.logspace(-1, 5, 7 if SMALL else 25)
rows = rng.standard_normal((4 if SMALL else 64, 768))
errors = {f.__name__: [] for f in (one_pass, shifted, welford, two_passes)}
for distance in distances:
    row = (rows + distance).astype(np.float32)  # the input itself is rounded; that is no fault of the formulas
    exact = row.astype(np.float64).var(axis=1)
    for f in (one_pass, shifted, welford, two_passes):
        errors[f.__name__].append(np.sqrt(np.mean((f(row) / exact - 1) ** 2)))
fig, ax = plt.subplots()
for name, values in errors.items():
    ax.loglog(distances, values, ".-", ms=4, label=name.replace("_", " "))
ax.set(xlabel="mean of the row / its standard deviation", ylabel="relative error of the variance", ylim=(1e-8, 1e6))
_ = ax.legend()
for distance in (1, 100, 1e4):
    at = int(np.argmin(np.abs(np.log(distances / distance))))
    print(
        f"mean / std = {distances[at]:8.0f}:",
        *(f"{name} {values[at]:.0e}" for name, values in errors.items()),
        sep="   ",
    )

# %% [markdown]
# Read the figure from the left. One pass fails early. Welford's rounds its mean in every step, and loses more with
# each. Two passes lose digits only if the mean is thousands of standard deviations away, because the mean itself is
# rounded, and its error enters squared. There the shifted pass is better: the difference of two floats that are
# nearly equal is exact. But it hangs on one element. In trained transformers a few channels are hundreds of times
# as large as the others ([Sun et al. 2024](https://arxiv.org/abs/2402.17762)); if the shift is one of them, it is
# the one-pass formula again:

# %%
outlier = rows.copy()
outlier[:, 0] = 1000
row, exact = outlier[:, 1:].astype(np.float32), outlier[:, 1:].astype(np.float32).astype(np.float64).var(axis=1)
by_outlier = one_pass(row - np.float32(1000))
print(f"rows of mean 0, shifted by 1000: relative error {np.sqrt(np.mean((by_outlier / exact - 1) ** 2)):.0e}")
print(f"two passes:                      relative error {np.sqrt(np.mean((two_passes(row) / exact - 1) ** 2)):.0e}")

# %% [markdown]
# Two passes have no such case, and are simple. What does the second pass cost? Not a second reading of the memory: a
# row of 768 float32 has 3 kB, and stays in the first cache, on a GPU in registers or shared memory. Welford's method
# saves a reading that was free, and pays with a division for each element and with a chain in which each step waits
# for the one before. It is the right one if data come as a stream that nobody can keep. llmc takes two passes,
# everywhere.
#
# ## 5. The loop in C++
#
# Now the same in C++, as one would first write it. This file is version 1 of
# [`dev/kernels/layernorm_forward`](../../dev/kernels/README.md), a folder with one file for each step of what
# follows, and with a program that checks and times them, [`run.py`](../../dev/kernels/run.py).

# %%
print(run.source("dev/kernels/layernorm_forward/cpu_1_naive.cpp"))

# %% [markdown]
# `mean` and `rstd` are outputs too: backward needs them. Here are all versions for the CPU, from this first one on,
# then NumPy, PyTorch if it is installed, and llmc's own op. Each is first checked: random numbers, odd sizes, outputs
# full of NaNs beforehand, and float64 as the judge; "error" is a share of what is allowed.


# %%
def measured(op, versions):
    """Check and time an op's versions for the CPU, and print the table."""
    quick = {"versions": versions, "small": True, "budget": 0.02, "optimize": "-O1", "peers": False} if SMALL else {}
    results = run.measure(op, **quick)
    print(f"{op}, {', '.join(f'{name}={size}' for name, size in results[0].shape.items())}")
    print(f"{'version':20s} {'error':>5s} {'ms':>9s} {'GB/s':>6s} {'times the first':>16s}")
    for r in results:
        print(
            f"{r.version:20s} {r.error:5.2f} {r.seconds * 1e3:9.3f} {r.gbs:6.1f} {results[0].seconds / r.seconds:16.1f}"
        )
    return results


info = _llmc.Backend("cpu").info()
print(f"{info.description}, {info.threads} threads; llmc's kernels: {info.isa}\n")
forward = measured("layernorm_forward", ["cpu_1", "cpu_4"])

# %% [markdown]
# Go through them in order. (The notebook's machine has two cores, and others use it too: a time may differ by a
# third or a half from one table to the next. Version 6 and llmc's own op, for example, do the same.)
#
# **1, naive.** The sum of a row is a chain: each addition waits until the one before is done, and that takes three or
# four cycles. The compiler must not break the chain, because the sum of floats depends on the order, and C++ promises
# the order that is written. So the CPU, which could do dozens of additions in that time, does one.
#
# **2, Welford** and **3, shifted**: fewer passes, as in section 4. Welford's division makes the chain longer. The
# shifted pass (by the mean of the first 16 numbers, in case that one of them is an outlier) has two chains that run
# side by side, and one loop less.
#
# **4, `omp simd`** allows the compiler to make several partial sums, as many as a vector register has places. This is
# the step that counts, and it costs one line.
#
# **5, vectors** spelled out, with four independent sums, so that the chain of one does not hold up the others. If you
# know C, but not C++: `[=](int64_t i, int n) { ... }` is a function without a name, like Python's `lambda`, and
# `template <class Term>` lets the compiler make a version of `sum_of` for each of the two that are given to it, with no
# call left in the loop.

# %%
print(run.source("dev/kernels/layernorm_forward/cpu_5_vectors.cpp"))

# %% [markdown]
# `Vec` is a vector of as many floats as the CPU has in a register, 16 with AVX-512; `load(p, n)` takes the first `n`
# of them and zeros for the rest, so that rows of any length have no separate end; `for_vectors` of
# [`vectors.h`](../../dev/kernels/vectors.h) walks over a row in this way. `set1(a)` is a vector of equal numbers,
# `sum(v)` adds up the places of one, and `fma(a, b, c)` is $ab+c$, rounded once. llmc's own kernel is this one, in
# [`rows.h`](../../csrc/cpu/simd/rows.h), compiled for each instruction set.
#
# **6, threads.** Rows know nothing of each other, so each thread takes some. **7, stores past the caches** and **8,
# bfloat16** change only how many bytes move. That they help says what the kernel now waits for. (llmc's own op, which
# adds threads to 5, does without the stores of 7, although they are faster here: in a training step a matmul reads next
# what layernorm wrote, and it should be in the caches.)
#
# ## 6. Bound by memory
#
# Count the work for one element. Arithmetic: 1 addition for the mean, 3 operations for the variance, 4 for the
# output. Memory: 4 bytes to read and 4 to write. That is one operation for each byte. What can the machine do?


# %%
def fastest(*functions, repeats=3 if SMALL else 30):
    """The shortest time of each function, in seconds. They take turns, so that what disturbs one disturbs all."""
    times = [[] for _ in functions]
    for _ in range(repeats):
        for function, its in zip(functions, times):
            begin = time.perf_counter()
            function()
            its.append(time.perf_counter() - begin)
    return [min(its) for its in times]


backend = _llmc.Backend("cpu")


def filled(*shape, dtype="f32"):
    t = backend.empty(list(shape), dtype)
    backend.zero(t)  # so that the system has assigned memory to all pages
    return t


size = 1 << (20 if SMALL else 28)
a, b = filled(size // 4), filled(size // 4)
peak = _llmc.cpu_peak_flops("f32", info.threads)
memory = 2 * size / min(fastest(lambda: backend.copy(b, a)))  # bytes a second, read and written
print(f"multiply-adds on registers alone: {peak / 1e9:7.1f} GFLOP/s")
print(f"a copy of a large array:          {memory / 1e9:7.1f} GB/s")
print(f"operations that fit into the time of a byte: {peak / memory:.0f}")


def bars(results, copy_speed):
    """Draw how long each version takes, beside a copy of as many bytes at a speed in bytes a second."""
    _, ax = plt.subplots(figsize=(7, 0.5 + 0.28 * len(results)))
    names = [r.version for r in results]
    colors = {"cpu": "tab:blue", "cuda": "tab:blue", "llmc": "tab:orange"}
    ms, copy_ms = [r.seconds * 1e3 for r in results], results[0].bytes / copy_speed * 1e3
    bar = ax.barh(names, ms, color=[colors.get(name.split("_")[0], "gray") for name in names])
    ax.bar_label(bar, [f"{value:.3g}" for value in ms], padding=3, bbox={"fc": "white", "ec": "none", "pad": 1})
    ax.axvline(copy_ms, color="black", ls=":", label="a copy of as many bytes, in float32")
    ax.set(xlabel=f"{results[0].op}, ms", xscale="log", xlim=(min(copy_ms, *ms) / 3, max(ms) * 3))
    ax.xaxis.set_minor_formatter("")
    ax.invert_yaxis()
    ax.grid(False)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1))


bars(forward, memory)

# %% [markdown]
# Layernorm offers one operation for each byte where the machine could do so many. So its arithmetic, once it is
# vectorised, is free, and the best that it can do is to be as fast as a copy. (A matmul is the opposite:
# $N \times C$ times $C \times C$ does $2C$ operations for each element, $C/4$ for each byte: 192 for 768 channels.) The
# *roofline* shows both limits: no op can be above the line.

# %%
naive, *_, ours = (r for r in forward if r.dtype == "f32")
intensity = np.logspace(-1, 3, 50)
fig, ax = plt.subplots()
ax.loglog(intensity, np.minimum(intensity * memory, peak) / 1e9, color="black", label="what the machine can do")
for r, marker in ((naive, "o"), (ours, "s")):
    ax.plot(r.flops / r.bytes, r.gflops, marker, label=f"layernorm forward, {r.version}")
ax.axvline(2 * 768 / 8, color="gray", ls=":", label="a matmul of 768 x 768 (where, not how fast)")
ax.set(xlabel="operations for each byte", ylabel="GFLOP/s")
_ = ax.legend()

# %% [markdown]
# How much is a byte? It depends on where the bytes are. If input and output fit into the caches, all is faster. Here
# are llmc's op and the copy, for more and more rows:

# %%
C = 768
weight_t, bias_t = filled(C), filled(C)
counts = [2**k for k in range(4, 9 if SMALL else 17)]
speeds = {"layernorm forward": [], "copy": []}


def one_size(N):
    """Seconds of layernorm and of a copy of N rows."""
    x_t, y_t, mean_t, rstd_t = filled(N, C), filled(N, C), filled(N), filled(N)
    return fastest(
        lambda: backend.layernorm_forward(y_t, mean_t, rstd_t, x_t, weight_t, bias_t),
        lambda: backend.copy(y_t, x_t),
    )


for N in counts:
    for values, seconds in zip(speeds.values(), one_size(N)):
        values.append(8 * N * C / seconds / 1e9)
fig, ax = plt.subplots()
for name, values in speeds.items():
    ax.semilogx([8 * N * C for N in counts], values, ".-", label=name)
for name, size in (("L1", info.l1_bytes), ("L2", info.l2_bytes)):
    ax.axvline(size * info.threads, color="gray", ls=":")
    ax.text(size * info.threads, 0.5, f" {name} of all threads", color="gray")
ax.set(xlabel="bytes of input and output", ylabel="GB/s, read and written", ylim=(0, None))
_ = ax.legend(loc="upper right")
for N, a, b in zip(counts, *speeds.values()):
    print(f"N = {N:6d}: {8 * N * C / 2**20:7.2f} MiB, layernorm {a:6.1f} GB/s, copy {b:6.1f} GB/s: {a / b:.0%}")

# %% [markdown]
# For few rows the start of the threads counts, then arithmetic, while all is in the caches; on the right, where
# training is, layernorm goes the way of the copy.
#
# So one optimization is left: to move fewer bytes. The addition before a layernorm, `residual = a + b`, reads two
# arrays and writes one, and layernorm then reads that one again. llmc's fused op does both with a row while it is in
# the cache:

# %%
N = 64 if SMALL else 8192
a_t, b_t, r_t, y_t, mean_t, rstd_t = filled(N, C), filled(N, C), filled(N, C), filled(N, C), filled(N), filled(N)
fused = functools.partial(
    backend.fused_residual_layernorm_forward, r_t, y_t, mean_t, rstd_t, a_t, b_t, weight_t, bias_t
)


def apart():
    backend.residual_forward(r_t, a_t, b_t)
    backend.layernorm_forward(y_t, mean_t, rstd_t, r_t, weight_t, bias_t)


apart_s, fused_s = fastest(apart, fused)
print(f"addition, then layernorm: {apart_s * 1e3:.3f} ms for 5 passes over N C elements")
print(f"fused:                    {fused_s * 1e3:.3f} ms for 4 ({apart_s / fused_s:.2f} times)")

# %% [markdown]
# ## 7. Backward
#
# The formula of section 2, as loops. All three outputs are *added to* what is there: `dinp`, because the residual
# stream also has a way past the layernorm, on which its gradient has already arrived; `dweight` and `dbias`,
# because an update may consist of several *micro-batches*, parts of its batch that are computed one after the
# other.

# %%
print(run.source("dev/kernels/layernorm_backward/cpu_1_naive.cpp"))
backward = measured("layernorm_backward", ["cpu_1", "cpu_4"])
bars(backward, memory)

# %% [markdown]
# **2** and **3** are what they were in forward. New is **4, threads**. Rows of `dinp` are independent, but `dweight`
# is a sum over all rows, to which every thread wants to add.
#
# The obvious way is a sum for each thread, and their total at the end. It is fast and right, but then the total
# depends on how many threads there are, because floats add up differently in another order:

# %%
rows_dout = rng.standard_normal((4096, C)).astype(np.float32)


def total_of(parts):
    """Sum the rows in float32, in so many parts, and the parts in their order."""
    sums = [np.add.accumulate(part, axis=0)[-1] for part in np.array_split(rows_dout, parts)]
    return np.add.accumulate(sums, axis=0)[-1]


for threads in (2, 3, 4):
    other = np.mean(total_of(threads) != total_of(1))
    print(f"{threads} threads: {other:.0%} of the sums have other bits than those of one thread")

# %% [markdown]
# The errors are tiny, but a training run that cannot be repeated cannot be debugged. So the rows are cut into blocks
# of 128, whatever the number of threads; each block has a sum of its own, and in the end the sums of the blocks are
# added in order. Threads may take the blocks as they come:

# %%
print(run.source("dev/kernels/layernorm_backward/cpu_4_threads.cpp", "run"))

op = run.find_op("layernorm_backward")
shape = {"N": 1000, "C": C}
inputs = op.module.inputs(np.random.default_rng(5), **shape)
one, two = (run.call(op.version("cpu_4"), shape=shape, threads=t, **inputs) for t in (1, 2))
print("the same bits with 1 and 2 threads:", all(np.array_equal(one[name], two[name]) for name in one))

# %% [markdown]
# llmc does it so, [on the CPU](../../csrc/cpu/layernorm.cpp) and [on the GPU](../../csrc/cuda/layernorm.cu), and for
# every sum of this kind. Such a sum costs little: the blocks' sums are small beside the rows.
#
# ### A sum on the way
#
# Backward waits for memory, too: it reads `dout`, `inp` and `dinp`, and writes `dinp`. While `dinp` is at hand, in
# registers or a block of its rows in the cache, anything else about it costs little. The layer below ended
# in $\text{residual} = \dots + x W^T + b$. The gradient of that bias is the sum over all rows of the residual
# stream's gradient, which is just what layernorm's backward has written. So llmc's op has one more output,
# `dinp_sum`:

# %%
sizes = {"dinp": (N, C), "dout": (N, C), "inp": (N, C), "dweight": (C,), "dbias": (C,), "dinp_sum": (C,), "total": (1,)}
t = {name: filled(*shape) for name, shape in sizes.items()}
given = t["dout"], t["inp"], weight_t, mean_t, rstd_t
outputs = t["dinp"], t["dweight"], t["dbias"]
without, with_sum, again = fastest(
    lambda: backend.layernorm_backward(*outputs, None, *given),
    lambda: backend.layernorm_backward(*outputs, t["dinp_sum"], *given),
    lambda: backend.sum(t["total"], t["dinp"]),
)
print(f"backward:                    {without * 1e3:.3f} ms")
print(f"backward with dinp_sum:      {with_sum * 1e3:.3f} ms, {(with_sum - without) * 1e3:+.3f}")
print(f"reading dinp again, at least {again * 1e3:.3f} ms more")

# %% [markdown]
# (Less than nothing, as may stand in the second line, says that the sum costs less than two measurements of the same
# thing differ.)
#
# In [`gpt2.cpp`](../../csrc/model/gpt2.cpp) the biases of the attention's projection and of the feed-forward layer's
# get their gradients in this way. On an H100 the sum adds 1 % to the kernel where a kernel of its own would add 28 %
# ([performance.md](../performance.md), "Bias gradients are sums over rows").
#
# ## 8. On the GPU
#
# A GPU has thousands of threads, which run in *warps* of 32 that do the same instruction at once. What matters for an
# op that is bound by memory is how a warp reads: if its 32 threads ask for 32 neighbouring floats, that is one access
# of 128 bytes; if they ask for 32 floats far apart, it is 32 accesses of 32 bytes each, of which an eighth is used.
#
# So the first version, which gives each thread a row as a CPU would, is a bad one:

# %%
print(run.source("dev/kernels/layernorm_forward/cuda_1_naive.cu", "layernorm_forward"))

# %% [markdown]
# The next give a row to a *block* of threads (2), which have a small, fast *shared memory* and can wait for each
# other at a *barrier*; then to a single warp (3), whose threads add up by *shuffles*: each reads a register of its
# neighbour 16 places away, then 8, 4, 2, 1, and all have the sum. No shared memory, no barrier:

# %%
print(run.source("dev/kernels/layernorm_forward/cuda_3_warp.cu", "warp_sum"))
print(run.source("dev/kernels/layernorm_forward/cuda_3_warp.cu", "layernorm_forward"))

# %% [markdown]
# The last step (4) is to read 16 bytes in each access, and to keep the row in shared memory between the passes, so
# that it comes from memory once. In bfloat16 (5) that is eight numbers at a time. Both are how
# [`layernorm.cu`](../../csrc/cuda/layernorm.cu) does it.
#
# In backward there are again the sums over all rows, and now some hundred blocks that want to add. Version 1 gives
# them a kernel of their own, with a thread for each column: in order, but 768 threads are few for a GPU. Version 2
# lets every warp add what it has by atomic additions, in whatever order they arrive: other bits in each run. Version
# 3 sums pieces of the rows, then the pieces, in order, as section 7 does; but that is a second kernel, which reads
# everything again. Version 4 reads once: a fixed number of blocks walks over the rows, each thread keeps in registers
# the sums of its columns, and a small second kernel adds the blocks' sums in their order:

# %%
print(run.source("dev/kernels/layernorm_backward/cuda_4_one_read.cu", "layernorm_backward"))

# %% [markdown]
# These kernels run without a GPU too, over [`dev/cuda_emulation`](../cuda.md), which is slow but finds wrong sums and
# accesses outside of an array. So all are checked here, before any is timed:

# %%
try:
    for op in ("layernorm_forward", "layernorm_backward"):
        some = {"versions": ["cuda_1"], "optimize": "-O1"} if SMALL else {}
        for r in run.measure(op, "emulated", peers=False, **some):
            print(f"{op:19s} {r.version:17s} error {r.error:.2f} of what is allowed")
except run.KernelError as e:
    print("no emulation here:", str(e).split("\n")[0])

# %% [markdown]
# And these are the times of a real GPU, which `run.py --device cuda --json` has written into
# [`dev/kernels/results`](../../dev/kernels/README.md):

# %%
fields = [field.name for field in dataclasses.fields(run.Result)]
for path in sorted((root / "dev" / "kernels" / "results").glob("*.json")):
    data = json.loads(path.read_text(encoding="utf-8"))
    about, rows = data["machine"], [run.Result(**{name: r[name] for name in fields}) for r in data["results"]]
    for op in ("layernorm_forward", "layernorm_backward"):
        results = [r for r in rows if r.op == op]
        if not results:  # this card has measured other ops
            continue
        print(f"{about['card']}, {about['date'][:10]}; a copy: {about['copy_gbs']:,.0f} GB/s")
        print(f"{op}, {', '.join(f'{name}={size}' for name, size in results[0].shape.items())}")
        for r in results:
            times = results[0].seconds / r.seconds
            print(f"{r.version:18s} {r.seconds * 1e6:9.1f} us {r.gbs:7,.0f} GB/s {times:7.1f} times the first")
        print()
        bars(results, about["copy_gbs"] * 1e9)
        plt.gca().set_title(about["card"], loc="left", fontsize="medium")

# %% [markdown]
# To read and write side by side is the largest step. With 16 bytes an access, forward in float32 comes within a
# fifth of a copy's speed. In bf16 half of the bytes take more than half of the time, so there memory is not all
# that it waits for. In backward the order of a sum was worth more thought than its arithmetic: atomic additions are
# not even fast, because all rows queue up at the same few addresses.
#
# ## Where to go from here
#
# You have seen one op in all its forms: formula, gradient, oracle, loop, vectors, threads, GPU. Every other op of
# llmc is made in the same way, and [adding a kernel](../adding_a_kernel.md) does it for RMSNorm, a simpler relative
# of layernorm, with each file that has to change.
#
# Try it:
#
# - Derive the gradient of RMSNorm, $y_i = x_i\,w_i / \sqrt{\text{avg}(x^2)+\epsilon}$, and check it by the complex
#   step. What is in its null space?
# - Leave the last term of `dx` out, $n_i\,\text{avg}(g\,n)$. How wrong is the gradient then? Would central
#   differences in float32 have shown it? And with $C = 768$ in place of 8?
# - Write `dev/kernels/layernorm_forward/cpu_9_mine.cpp`: a version of 5 with one sum, or eight, in place of four.
#   `python dev/kernels/run.py layernorm_forward --versions cpu_5 cpu_9 --threads 1 --shape N=64` says whether it is
#   right and how fast. Why does it matter less with `--shape N=100000`? If yours is faster, the exercise in
#   [dev/kernels](../../dev/kernels/README.md) shows how a version gets into llmc itself.
# - The CPU's versions of backward read a row of `inp` and `dout` in both of their loops. Does the second time cost?
#   Estimate, from the sizes of a row and of the caches, then measure.
