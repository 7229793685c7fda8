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
# in a clone prints all of them again, for your machine.

# %%
import inspect
import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

here = Path(__file__).parent if "__file__" in globals() else Path.cwd()
root = next(p for p in [here, *here.parents] if (p / "dev" / "kernels").is_dir())
sys.path.insert(0, str(root / "dev" / "kernels"))
import run  # noqa: E402  the kernels of dev/kernels, and the stopwatch

from llmc import _llmc  # noqa: E402
from llmc.selfcheck import formulas  # noqa: E402

SMALL = os.environ.get("LLMC_SMALL") == "1"  # tests set it: small sizes, few repeats, the same code
rng = np.random.default_rng(1)
plt.rcParams.update({"figure.figsize": (7, 3.6), "figure.dpi": 110, "axes.grid": True, "grid.alpha": 0.3})

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
#   = r\Big(g_i - \underbrace{\tfrac1C\textstyle\sum_j g_j}_{\text{avg}(g)} - n_i\,\underbrace{\tfrac1C\textstyle\sum_j g_j n_j}_{\text{avg}(g\,n)}\Big)$$
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
# below is the transposed of one line of the forward pass. The result is the same; it takes three sums where two are
# enough, and an array for each step. The thinking was worth while.


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
print(f"largest difference: {np.abs(gradient_by_steps(dout, x, weight) - dx).max():.1e}, of values up to {np.abs(dx).max():.2f}")

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
# $$f(x + ih) = f(x) + ih\,f'(x) - \frac{h^2}2 f''(x) - \dots \qquad\Longrightarrow\qquad f'(x) = \frac{\operatorname{Im} f(x+ih)}{h} + O(h^2)$$
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
    return (dout.astype(z.real.dtype) * formulas.layernorm(z, weight.astype(z.real.dtype), bias.astype(z.real.dtype))[0]).sum()


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
# error, and one on the left that rises as $1/h$, which is rounding. In float32, in which the kernels compute, a check
# by differences can hardly tell a wrong gradient from a right one. The complex step has no left arm. At
# $h = 10^{-30}$ it confirms the whole derivation, to the last bits:

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
# of about $\varepsilon\mu^2$, with $\varepsilon = 6\cdot10^{-8}$ in float32, so the variance is off by
# $\varepsilon\mu^2/v$, relatively. If the mean is a thousand standard deviations away from 0, not a digit is left,
# and the result may even be negative: then $r$ is not a number. Here are all four, in float32, for rows whose mean is
# further and further away from 0:


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
    print(f"mean / std = {distances[at]:8.0f}:", *(f"{name} {values[at]:.0e}" for name, values in errors.items()), sep="   ")

# %% [markdown]
# Read the figure from the left. One pass fails early. Two passes lose digits only if the mean is thousands of
# standard deviations away, because the mean itself is rounded, and its error enters squared. There the shifted pass
# is better: differences of neighbours are exact. But it hangs on one element. In a trained GPT-2 a few channels are
# hundreds of times as large as the others; if the shift is one of them, it is the one-pass formula again:

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
