# %% [markdown]
# # Matmul, from three loops towards the peak
#
# More than nine tenths of the arithmetic of a training step are one operation, the product of two matrices. Three
# loops compute it. The same three loops, in another order and cut into pieces, are more than fifty times faster on
# one core, and this text goes there step by step. Each step is a file of
# [`dev/kernels/matmul`](../../dev/kernels/README.md), is explained, and is measured.
#
# You need Python and some C. Every number below is printed by the code above it, and
#
#     python doc/matmul/matmul.py
#
# in a clone prints all of them again, for your machine.

# %%
import json
import os
import sys
import time
from pathlib import Path

for library in ("OPENBLAS", "MKL"):  # NumPy takes one thread here, as the kernels do until section 6
    os.environ[f"{library}_NUM_THREADS"] = "1"

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

here = Path(__file__).parent if "__file__" in globals() else Path.cwd()
root = next(p for p in [here, *here.parents] if (p / "dev" / "kernels").is_dir())
sys.path.insert(0, str(root / "dev" / "kernels"))
import run  # noqa: E402  the kernels of dev/kernels, and the stopwatch

from llmc import GPT2Config, _llmc  # noqa: E402
from llmc.selfcheck import formulas  # noqa: E402

SMALL = os.environ.get("LLMC_SMALL") == "1"  # tests set it: small sizes, few repeats, the same code
rng = np.random.default_rng(1)
plt.rcParams.update({"figure.figsize": (7, 3.6), "figure.dpi": 110, "axes.grid": True, "grid.alpha": 0.3})

# %% [markdown]
# ## 1. The formula, and how much of it there is
#
# A linear layer takes $N$ tokens, each a row of $C$ numbers, and makes $O$ numbers of each:
#
# $$\text{out}_{n,o} = b_o + \sum_{c=1}^{C} \text{inp}_{n,c}\, W_{o,c} \quad\text{or}\quad \text{out} = \text{inp}\,W^T + b$$
#
# Each element of the output is the dot product of a row of the input and a row of the weight, $C$ multiplications and
# $C$ additions. That makes $2\,N\,C\,O$ floating-point operations (FLOP).
#
# How many does GPT-2 124M need? Four linear layers in each of 12 blocks, and the classifier, which has an output for
# each token of the vocabulary. Beside them there is attention; all other ops together (layernorm, GELU, additions)
# are too few to count.

# %%
config = GPT2Config.from_descriptor("d12")
C, V, L, T = config.channels, config.vocab_size, config.num_layers, config.max_seq_len
layers = {
    "qkv, (C, 3C)": 2 * C * 3 * C * L,
    "attention's projection, (C, C)": 2 * C * C * L,
    "fc, (C, 4C)": 2 * C * 4 * C * L,
    "fc's projection, (4C, C)": 2 * 4 * C * C * L,
    "classifier, (C, V)": 2 * C * V,
    "attention, T = 1024": 2 * 2 * C * (T + 1) / 2 * L,  # q k and p v, for the positions up to the token's own
}
total = sum(layers.values())
for name, flop in layers.items():
    print(f"{name:32s} {flop / 1e6:7.1f} MFLOP a token   {flop / total:5.1%}")

# %% [markdown]
# ## 2. Backward: two more of the same
#
# Training needs the derivatives of a loss $L$ by the input, which the layers below are waiting for, and by the
# weight. The layers above hand down $d\text{out}_{n,o} = \partial L / \partial\, \text{out}_{n,o}$; $d\text{inp}$,
# $dW$ and $db$ are meant in the same way.
#
# **Input.** $\text{inp}_{n,c}$ is in all $O$ outputs of its row, in each with the factor $W_{o,c}$. What reaches the
# loss by several ways adds up:
#
# $$d\text{inp}_{n,c} = \sum_o d\text{out}_{n,o}\, W_{o,c} \quad\text{or}\quad d\text{inp} = d\text{out}\; W$$
#
# **Weight.** $W_{o,c}$ is in output $o$ of all $N$ rows, in each with the factor $\text{inp}_{n,c}$:
#
# $$dW_{o,c} = \sum_n d\text{out}_{n,o}\, \text{inp}_{n,c} \quad\text{or}\quad dW = d\text{out}^T\; \text{inp}$$
#
# **Bias.** $b_o$ is in output $o$ of all rows, with the factor 1: $db_o = \sum_n d\text{out}_{n,o}$, a column's sum.
#
# So a layer is three matmuls, of $2\,N\,C\,O$ FLOP each. As every weight takes part in one multiply-add per token,
# this is where the rule of thumb comes from that training costs 6 FLOP per parameter and token. They differ in what
# is summed over, and in how the operands lie in memory:
#
# | | result | summed over | left operand | right operand |
# |---|---|---|---|---|
# | forward | out (N, O) | C | inp | W, transposed |
# | dinp | (N, C) | O | dout | W |
# | dweight | (O, C) | N | dout, transposed | inp |
#
# Is the derivation right? The complex step tells it to the last bit. For a function that is real for real numbers,
#
# $$f(x + ih) = f(x) + i h f'(x) + O(h^2)$$
#
# so $f'(x)$ is the imaginary part over $h$, and with $h = 10^{-30}$ nothing is left of the rest. Here for the loss
# $\sum d\text{out}\cdot\text{out}$:

# %%
inp, weight, dout = rng.standard_normal((3, 5)), rng.standard_normal((4, 5)), rng.standard_normal((3, 4))
dinp, dweight, dbias = formulas.matmul_gradient(dout, inp, weight)


def derivative(function, x):
    """Return the derivatives of a function by all elements of x, by complex steps."""
    result = np.empty_like(x)
    for at in np.ndindex(x.shape):
        stepped = x.astype(complex)
        stepped[at] += 1e-30j
        result[at] = function(stepped).imag / 1e-30
    return result


by_input = derivative(lambda x: (dout * formulas.matmul(x, weight)).sum(), inp)
by_weight = derivative(lambda w: (dout * formulas.matmul(inp, w)).sum(), weight)
print(f"largest difference: dinp {np.abs(dinp - by_input).max():.1e}, dweight {np.abs(dweight - by_weight).max():.1e}")

# %% [markdown]
# In the following we make the forward pass fast. What makes the other two fast is the same, as section 8 shows.
#
# ## 3. What the machine can do
#
# Two numbers bound every kernel. One is the **peak**: how many FLOP a core does in a second if all its operands are
# in registers. The other is the **bandwidth**: how many bytes a second come from memory. Both are measured here, with
# one thread; the peak by multiply-adds that use nothing but registers.

# %%
backend = _llmc.Backend("cpu", 1)
count = (1 if SMALL else 512) * 2**20 // 4
floats = backend.empty([count])
backend.zero(floats)
total_of_them = backend.empty([1])


def seconds(function, *arguments, before=lambda: None, repeats=3 if SMALL else 7):
    """Return the median time of some calls, after one that warms up. before: is called before each, and not counted."""
    times = []
    for _ in range(repeats + 1):
        before()
        begin = time.perf_counter()
        function(*arguments)
        times.append(time.perf_counter() - begin)
    return float(np.median(times[1:]))


peak = {dtype: _llmc.cpu_peak_flops(dtype, 1) / 1e9 for dtype in ("f32", "bf16")}
bandwidth = 4 * count / 1e9 / seconds(backend.sum, total_of_them, floats)
info = backend.info()
print(f"{info.description}, kernels for {info.isa}")
print(f"one core: {peak['f32']:.0f} GFLOP/s in f32, {peak['bf16']:.0f} in bf16, reads {bandwidth:.1f} GB/s")
print(f"so a float from memory takes as long as {4 * peak['f32'] / bandwidth:.0f} FLOP")

# %% [markdown]
# What counts is how often a number is used once it was loaded. If each matrix is read or written once, a matmul does
#
# $$\frac{2\,N\,C\,O}{4\,(N C + C O + N O)} \quad \text{FLOP per byte of f32.}$$
#
# For $N = 1$, one token as in generation, that is about ½: each weight is loaded for one multiply-add, and memory
# is all that matters. For many tokens it is a hundred and more. The graph below, a *roofline* ([Williams, Waterman
# & Patterson 2009](https://doi.org/10.1145/1498765.1498785)), has both bounds: no kernel can be above the roof. The
# points are llmc's op, for $C = 768$ and $O = 3072$, the layer `fc` of GPT-2 124M, and growing $N$. Before each
# measurement half a gigabyte of something else is read, so that the operands have left the caches.

# %%
FC = {"C": 48, "OC": 64} if SMALL else {"C": 768, "OC": 3072}


def on_backend(backend, *shape):
    """Return a tensor of the backend with normally distributed numbers, and the same numbers for NumPy."""
    tensor, x = backend.empty(list(shape)), rng.standard_normal(shape, dtype=np.float32)
    tensor.from_host(x)
    return tensor, x


def read_something_else():
    backend.sum(total_of_them, floats)


tokens = [1, 8, 32] if SMALL else [1, 4, 16, 64, 256, 1024]
points = {"llmc": [], "NumPy": []}
(w, weight), (b, bias) = on_backend(backend, FC["OC"], FC["C"]), on_backend(backend, FC["OC"])
for N in tokens:
    (i, inp), (o, out) = on_backend(backend, N, FC["C"]), on_backend(backend, N, FC["OC"])
    flop, byte = 2 * N * FC["C"] * FC["OC"], 4 * (inp.size + weight.size + bias.size + out.size)
    for name, call in {
        "llmc": (backend.matmul_forward, o, i, w, b),
        "NumPy": (formulas.matmul, inp, weight, bias),
    }.items():
        points[name].append((flop / byte, flop / seconds(*call, before=read_something_else) / 1e9))

x = np.geomspace(0.1, 1000, 200)
plt.figure()
plt.loglog(x, np.minimum(peak["f32"], x * bandwidth), color="black", label="the roof, f32, one core")
for name, of_n in points.items():
    plt.plot(*zip(*of_n, strict=True), "o-", label=name)
    print(
        f"{name:6s}",
        *(f"N={n}: {gflops:.1f}" for n, (_, gflops) in zip(tokens, of_n, strict=True)),
        "GFLOP/s",
        sep="  ",
    )
for N, at in zip(tokens, points["llmc"], strict=True):
    plt.annotate(f"N={N}", at, xytext=(5, -11), textcoords="offset points")
plt.xlabel("FLOP per byte of all operands")
plt.ylabel("GFLOP/s")
plt.legend(loc="lower right")
plt.show()

# %% [markdown]
# For training, $N$ is a thousand tokens and more. There the roof is the peak, and the task is: **keep the
# multiply-adds busy**. Everything that follows is about getting their operands to them in time.
#
# ## 4. One step at a time
#
# All versions are measured now, in turns, with one thread. Below, each one's result is printed beside its code.
# (Others use the notebook's machine too: the same op may differ by a fifth from one table to the next.)

# %%
QUICK = {"budget": 0.01, "optimize": "-O1"} if SMALL else {"budget": 0.5}


def measured(versions, threads=1, peers=("numpy", "llmc"), **shape):
    """Check and time versions in turns, beside other libraries. Returns results by name."""
    results = run.measure("matmul", versions=versions, threads=threads, peers=peers, shape=FC | shape, **QUICK)
    wrong = [r.version for r in results if not r.error <= 1]
    assert not wrong, wrong
    return {r.version: r for r in results}


N = 32 if SMALL else 1024
found = measured(None, peers=("numpy", "llmc") if SMALL else ("numpy", "torch", "llmc"), N=N)


def show(version, function="run"):
    """Show a function of a version, and how fast it is."""
    path = next((root / "dev" / "kernels" / "matmul").glob(f"{version}_*"))
    print(run.source(path.relative_to(root), function), end="\n\n")
    r = found[path.stem]
    print(
        f"// {path.stem}: {r.seconds * 1e3:.1f} ms, {r.gflops:.1f} GFLOP/s, {r.gflops / peak[r.dtype]:.1%} of the peak"
    )


# %% [markdown]
# ### 4.1 The formula
#
# Both rows of a dot product are read in order. There is nothing wrong with how this uses memory, and yet:

# %%
show("cpu_1")

# %% [markdown]
# The sum is the trouble. Each addition needs the result of the one before, and takes 4 cycles on most CPUs. A core
# could begin two multiply-adds a cycle, each on a vector of 8 or 16 numbers. We get one number in 4 cycles: a 64th or
# 128th of that.
#
# Could the compiler not make 16 sums of the one, and add them at the end? It may not. Addition of floats is not
# associative, another order gives other bits, and a compiler keeps the bits that the program asks for (but for
# `-ffast-math`).
#
# ### 4.2 Another order of the loops
#
# *We* may choose another order. With the loop over $o$ innermost, neighbouring sums are made side by side, and none
# waits for another. For vectors, neighbours in $o$ have to be neighbours in memory, so the weight is transposed
# first.

# %%
show("cpu_2")

# %% [markdown]
# Now every multiply-add loads a weight and a sum, and stores a sum. A core can load two vectors a cycle and store
# one, if they are in the L1 cache; the whole weight passes by for each row of inp, and comes from further away.
#
# ### 4.3 Sums in registers
#
# The remedy for too many loads is to use each one several times. Take a *tile* of the output, 4 rows by 2 vectors,
# and keep its 8 sums in registers while $c$ runs from the first to the last. In each step 2 vectors of weights and 4
# numbers of inp are loaded, and make 8 vector multiply-adds: each weight is used 4 times, each input $2 W$ times,
# where $W$ is the width of a vector. The sums are stored once.

# %%
show("cpu_3", "tile")

# %% [markdown]
# `Vec` is a vector register, [as wide as the CPU has them](../../dev/kernels/vectors.h). One would like to write
# `float sum[4][32]` instead and leave the rest to the compiler. That was tried: gcc 12 kept none of it in registers,
# and the version was no faster than the first.
#
# ### 4.4 Packing
#
# This should be fast, and is not. Look at the addresses: the rows of the transposed weight are $4\,O$ bytes apart,
# 12288 for our shape. Each load of a step is in another page of memory, and the first level of the table that
# translates page numbers (the TLB) has less than a hundred entries. Worse, 12288 is a multiple of 4096. A cache
# places a line by some bits of its address, and those are the same for all rows: of the L1 cache's 64 places for
# lines, of which each takes 8 or 12, the whole strip of 768 rows competes for two or three.
#
# So the columns that a tile needs are first copied to where they are neighbours. All rows of inp use the copy, so the
# copying costs one move for each $N$ multiply-adds. This is *packing*, and nothing else has changed:

# %%
show("cpu_4")

# %% [markdown]
# ### 4.5 All registers
#
# A multiply-add takes 4 cycles, and two begin in each: 8 have to be under way at any time. Our tile has exactly 8
# sums, so whatever comes late is lost time. AVX-512 and NEON have 32 vector registers: a tile of 8 rows by 3 vectors
# takes 24 for sums, 3 for weights, and one for the input, and does with 11 loads 24 multiply-adds, where there were 6
# for 8. (AVX2 has 16 registers: 6 rows by 2 vectors.) The inner loop is called the *micro-kernel*.

# %%
show("cpu_5", "tile")

# %% [markdown]
# ### 4.6 Blocks for the caches
#
# The micro-kernel has to be fed. Its strip of weights, $C \times 48$ floats, should come from L1 or L2 each time that
# another tile needs it, and the rows of inp should too. For $C = 768$ a strip has 147 KB, more than L1; a layer with
# $C = 3072$ has strips of 590 KB, and rows of inp that are a multiple of 4096 bytes apart.
#
# So the reduction is cut too, into *stretches*, and the rows into *blocks*, which are packed as the strips are. Five
# loops around the micro-kernel keep near what is needed soon. This is how the fast matrix libraries do it ([Goto &
# van de Geijn 2008](https://doi.org/10.1145/1356052.1356053), [Van Zee & van de Geijn
# 2015](https://doi.org/10.1145/2764454)).

# %%
show("cpu_6")
print("//")
for depth in (60, 90) if SMALL else (3072, 8192):
    longer = measured(["cpu_5", "cpu_6"], C=depth, OC=32 if SMALL else 768, N=N)
    print(f"// C = {depth}:", *(f"{name} {r.gflops:.1f} GFLOP/s" for name, r in longer.items()), sep="   ")

# %% [markdown]
# How much the blocks bring depends on the CPU. An L2 cache of 2 MB, as servers have, holds whole strips even of a
# long reduction, and rows that are read in order are fetched ahead by the CPU itself. On one with 256 or 512 KB,
# neither strips nor rows would stay.
#
# Here are the pieces, for $N = 1024$, $C = 768$, $O = 3072$: a tile of out is the sum over the stretches of a panel
# of inp times a strip of the weight. In a picture at true scale the strip is a line, and the panel and tile are not
# visible at all, so these are drawn larger.

# %%
fig, axis = plt.subplots(figsize=(7.2, 5.2))
axis.set_axis_off()
axis.set_aspect("equal")
N0, C0, O0 = 1024, 768, 1536  # O at half its size
gap = 90
matrices = {
    "inp (N, C)": (-C0 - gap, -N0, C0, N0),
    "weight, transposed (C, O)": (0, gap, O0, C0),
    "out (N, O)": (0, -N0, O0, N0),
}
for name, (left, bottom, width, height) in matrices.items():
    axis.add_patch(Rectangle((left, bottom), width, height, facecolor="0.94", edgecolor="0.4"))
    axis.text(left + 12, bottom + height - 16, name, va="top", fontsize=9)
block = -C0 - gap + 384  # where the block of inp begins
pieces = [  # left, bottom, width, height, color, name, where it stands
    (block, -650, 384, 192, "#9ecae1", "block: L2", (block, -448), "left"),
    (0, gap, O0, 384, "#fdd0a2", "stretch: L3", (660, gap + 300), "left"),
    (560, gap, 70, 384, "#e6550d", "strip: L1", (545, gap + 300), "right"),
    (block, -560, 384, 36, "#3182bd", "panel", (block - 15, -560), "right"),
    (560, -560, 70, 36, "#31a354", "tile: registers", (645, -560), "left"),
]
for left, bottom, width, height, color, name, (x, y), align in pieces:
    axis.add_patch(Rectangle((left, bottom), width, height, facecolor=color, edgecolor="0.3", linewidth=0.6))
    axis.text(x, y, name, va="bottom", ha=align, fontsize=9)
axis.set_xlim(-C0 - gap - 20, O0 + 20)
axis.set_ylim(-N0 - 20, C0 + gap + 20)
plt.show()

# %% [markdown]
# ## 5. Where we are

# %%
single = {name: r for name, r in found.items() if r.dtype == "f32" and name != "cpu_7_threads"}
for name, r in single.items():
    print(f"{name:22s} {r.gflops:8.1f} GFLOP/s {r.gflops / peak['f32']:7.1%} of the peak   {r.title}")

plt.figure()
bars = plt.barh(
    list(single), [r.gflops for r in single.values()], color=["C0" if n.startswith("cpu") else "C1" for n in single]
)
plt.bar_label(bars, fmt=" %.1f")
plt.axvline(peak["f32"], color="black", linestyle="--", label="peak of one core, f32")
plt.xlim(0, 1.25 * max(peak["f32"], *(r.gflops for r in single.values())))
plt.gca().invert_yaxis()
plt.xlabel("GFLOP/s")
plt.legend(loc="upper right")
plt.show()

# %% [markdown]
# Does it hold for other sizes? Square matrices, from those that fit into L1 to those that need L3. Sizes that are a
# multiple of 1024 (4096 bytes) are the hard ones, see 4.4: compare each with its neighbour. Version 3 suffers, and
# those that pack do not. (The rows of 1536 floats, 6144 bytes, are nearly as bad: every second one competes for the
# same places.)

# %%
sizes = [16, 33] if SMALL else [32, 64, 128, 256, 512, 768, 1000, 1024, 1536, 2040, 2048]
curves = ["cpu_3_register_tile", "cpu_4_packed", "cpu_5_full_registers", "cpu_6_cache_blocks", "numpy_f32", "llmc_f32"]
by_size = [measured([c for c in curves if c.startswith("cpu")], N=n, C=n, OC=n) for n in sizes]
plt.figure()
for name in curves:
    plt.plot(sizes, [r[name].gflops for r in by_size], "o-", markersize=3, label=name)
plt.axhline(peak["f32"], color="black", linestyle="--")
plt.xscale("log", base=2)
plt.xlabel("N = C = O")
plt.ylabel("GFLOP/s, one thread")
plt.legend(fontsize=8)
plt.show()
print("size     ", *(f"{n:7d}" for n in sizes))
for name in curves:
    print(f"{name:22s}"[:9], *(f"{r[name].gflops:7.1f}" for r in by_size))

# %% [markdown]
# ## 6. Threads
#
# A matmul is easy to share: each thread takes blocks of rows. The strips of a stretch are packed once, by all threads
# together. No element of out has two owners, so nothing has to be added up between threads, and the order of each sum
# is that of one thread. The result is the same bits for any number of threads. llmc promises that of all its ops
# ([doc/design.md](../design.md)).

# %%
show("cpu_7")
threads = run.default_threads()
for count in sorted({1, threads}):
    for name, r in measured(["cpu_7"], threads=count, N=N).items():
        if name in ("cpu_7_threads", "llmc_f32"):
            print(f"{name:14s} {count} threads: {r.gflops:7.1f} GFLOP/s")

shape = {"N": 200, "C": 70, "OC": 50}
operands = {
    name: rng.standard_normal(size) for name, size in {"inp": (200, 70), "weight": (50, 70), "bias": 50}.items()
}
matmul = run.find_op("matmul")
one, all_of_them = (run.call(matmul.version("cpu_7"), shape=shape, threads=n, **operands)["out"] for n in (1, threads))
print("the same bits:", np.array_equal(one, all_of_them))

# %% [markdown]
# ## 7. bf16
#
# A bf16 number is the upper half of a float: the same range, but 8 significant bits instead of 24. Operands take half
# of the memory, and a circuit that multiplies 8 bits by 8 is a ninth of one that multiplies 24 by 24. So CPUs and
# GPUs have units for it that multiply whole little matrices. Sums are f32 still, and only the result is rounded.
#
# Intel's is AMX: eight *tile registers* of 1 KB each, and an instruction that adds the product of two tiles to a
# third. Everything around it is what we know: packing, blocks, tiles of sums that stay in registers, just larger
# ones. Where there is no AMX, this version is left out.

# %%
amx = next((root / "dev" / "kernels" / "matmul").glob("cpu_8_*"))
print(run.source(amx.relative_to(root), "multiply"), end="\n\n")
for name, r in found.items():
    if r.dtype == "bf16":
        print(f"// {name:16s} {r.gflops:8.1f} GFLOP/s {r.gflops / peak['bf16']:7.1%} of the peak in bf16")
if amx.stem not in found:
    print("// this CPU has no AMX")

# %% [markdown]
# What is lost to the peak of bf16 here? The multiply-adds have become so fast that all else is slow beside them:
# packing, which is a few moves for each number, and the rounding of the output. llmc packs a weight once for each
# update of the weights, not in each matmul.
#
# ## 8. The other two products, and the rest of the way
#
# For dinp and dweight the operands lie otherwise in memory. But that matters to nobody except packing, which copies
# them anyway: the micro-kernel sees panels and strips. llmc has two ways to pack, along the reduction and across it
# ([`pack_rows` and `pack_columns`](../../csrc/cpu/simd/gemm.h)), and with them the same loops make all three
# products:

# %%
print(run.source("csrc/cpu/simd/gemm.h", "pack_columns"))

everyone = _llmc.Backend("cpu", threads)
(i, _), (dinp, _) = on_backend(everyone, N, FC["C"]), on_backend(everyone, N, FC["C"])
(w, _), (dweight, _) = on_backend(everyone, FC["OC"], FC["C"]), on_backend(everyone, FC["OC"], FC["C"])
(dout, _), (out, _) = on_backend(everyone, N, FC["OC"]), on_backend(everyone, N, FC["OC"])
products = {
    "forward": (everyone.matmul_forward, out, i, w, None),
    "dinp": (everyone.matmul_backward, dinp, None, None, dout, None, w, False),
    "dweight": (everyone.matmul_backward, None, dweight, None, dout, i, w, False),
}
for name, call in products.items():
    print(f"// llmc, {threads} threads, {name:8s} {2 * N * FC['C'] * FC['OC'] / seconds(*call) / 1e9:7.1f} GFLOP/s")

# %% [markdown]
# Beyond `cpu_7`, [`gemm.h`](../../csrc/cpu/simd/gemm.h) has these, each of which was measured before it stayed
# ([doc/performance.md](../performance.md)):
#
# - Packing fetches the next strip ahead. inp is read in place, unless its rows are a multiple of 4096 bytes apart.
# - What is done to the result (bias, GELU, its gradient, addition to earlier gradients, rounding) happens while a
#   strip of it is in the cache: the *epilogue*.
# - Blocks follow from the sizes of this machine's caches, and tasks from the number of threads. The order of sums
#   follows from $C$ alone.
# - Few rows, as in generation, have a kernel of their own, which reads the weight once, unpacked.
#
# ## 9. On a GPU
#
# A GPU has the same problem, an order of magnitude further: tens of TFLOP/s, and memory that feeds a fraction of
# that. The same ideas answer it, under other names. What the caches do by themselves on a CPU is done by hand:
# *shared memory* is a small memory of each multiprocessor into which a block of threads copies what it will use
# again.
#
# | version | on a CPU this is |
# |---|---|
# | `cuda_1`: a thread for each element | `cpu_1`, thousands of times side by side |
# | `cuda_2`: tiles in shared memory | packing into blocks for the cache |
# | `cuda_3`: 8 x 8 sums in the registers of a thread | the tile in registers |
# | `cuda_4`: vectors, and two buffers | vectors; prefetching |
# | `cuda_5`: tensor cores, bf16 | AMX |
# | `cuda_6`: a pipeline of asynchronous copies | what a CPU's out-of-order execution does by itself |
# | `cuda_7`: Hopper's warpgroup matmul | nothing is like it: operands are read from shared memory by the unit itself |

# %%
print(run.source("dev/kernels/matmul/cuda_3_register_tiles.cu", "matmul"))

# %% [markdown]
# With tensor cores a warp of 32 threads holds the sums together, and operands have to reach its threads just as the
# instruction wants them. `cuda_6` has all that a GPU since Ampere offers: `ldmatrix` brings operands into place, and
# tiles in shared memory are filled by copies that nobody waits for until three steps later. On Hopper an instruction
# of four warps reads its operands from shared memory by itself, and runs on while they do something else. Its loop is
# the shortest:

# %%
print(run.source("dev/kernels/matmul/cuda_7_bf16_wgmma.cu", "matmul"))

# %% [markdown]
# CUDA kernels run here too, without a GPU, on an emulated device that checks them but cannot time them:
#
#     python dev/kernels/run.py matmul --device emulated
#
# Times are those of the GPUs on which `python dev/kernels/run.py matmul --device cuda --json FILE` was run, and which
# [dev/kernels/results](../../dev/kernels/README.md) has. Not every card has measured every version at every shape.

# %%
files = [json.loads(path.read_text()) for path in sorted((root / "dev" / "kernels" / "results").glob("*.json"))]
tables = {}  # by card and sizes
for file in files:
    for r in [r for r in file["results"] if r["op"] == "matmul"]:
        sizes = ", ".join(f"{name}={size}" for name, size in r["shape"].items())
        tables.setdefault(f"{file['machine']['card']}, {file['machine']['date'][:10]}, {sizes}", []).append(r)
for title, results in tables.items():
    print(title)
    ours = {r["dtype"]: r["gflops"] for r in results if r["version"].startswith("llmc")}
    for r in results:
        share = f"{r['gflops'] / ours[r['dtype']]:7.1%} of llmc's" if r["dtype"] in ours else ""
        print(f"  {r['version']:26s} {r['gflops'] / 1e3:7.1f} TFLOP/s {share}   {r['title']}")
    plt.figure()
    bars = plt.barh([r["version"] for r in results], [r["gflops"] / 1e3 for r in results])
    plt.bar_label(bars, fmt=" %.1f")
    plt.xscale("log")
    plt.margins(x=0.2)
    plt.gca().invert_yaxis()
    plt.xlabel("TFLOP/s")
    plt.title(title, fontsize="medium")
    plt.show()
if not tables:
    print("dev/kernels/results has no matmul: run.py was not run on a GPU")

# %% [markdown]
# llmc leaves the large matmuls of a GPU to NVIDIA's cuBLASLt, which such a table has as llmc's own op. Its kernels
# use wider instructions of the same kind, have copies made by a unit of their own (TMA), and give some warps nothing
# else to do than to start them.
#
# ## 10. Exercises
#
# A version is one file: copy one, change it, and `python dev/kernels/run.py matmul --versions cpu_6 cpu_9` says
# whether it is right, and whether it is faster.
#
# 1. In `cpu_6_cache_blocks.cpp`, change `kStretch` and `kBlock`. From which sizes on do they matter on your machine?
#    Run it with `--shape C=3072 OC=768` too.
# 2. Read inp in place in `cpu_6`, instead of packing it. For which $C$ is it faster, for which slower, and why?
# 3. `cpu_7` gives a thread whole blocks of rows. With 64 tokens and 16 threads most of them have nothing to do. Share
#    out the columns, too. (llmc's way is `Grid` in [`csrc/cpu/matmul.cpp`](../../csrc/cpu/matmul.cpp).)
# 4. What has to change in `cpu_6` to compute dweight, (O, C) = dout (N, O) transposed times inp (N, C)? (Only
#    `pack`.)
# 5. In `cpu_8` both operands of `multiply` come from L2. Let a part of the right strip stay in L1 while the rows of a
#    block pass by, and the sums wait in memory meanwhile. ([`amx_gemm.h`](../../csrc/cpu/simd/amx_gemm.h) does that.)
# 6. `cuda_5` asks for the next step's numbers only when the last step is done. Let it ask before, as `cuda_4` does.
# 7. `fetch` of `cuda_6` computes each address anew: 64-bit multiplications and four comparisons for 16 bytes. Let a
#    thread keep what does not change from step to step. How much of the way to cuBLASLt is that?
# 8. Let `cuda_6` walk through the blocks in another order, so that those that run at the same time share more of what
#    is in the L2 cache.
#
# How to carry a version that is faster into `csrc/`: [dev/kernels/README.md](../../dev/kernels/README.md).
