# Written by dev/make_stubs.py.
"""
The C++ core of llmc. Use it through the package llmc.
"""

from __future__ import annotations

import collections.abc
import os
import pathlib
import typing

import numpy
import numpy.typing

__all__: list[str] = [
    "GPT2",
    "NORM_DIGITS",
    "UNIT_DIGIT",
    "AdamW",
    "AdamWOperands",
    "AdamWStep",
    "Backend",
    "BpeEncoder",
    "Comm",
    "DataLoader",
    "DeviceInfo",
    "Error",
    "Exchange",
    "Exchanges",
    "GPT2Config",
    "GradientSink",
    "HostComm",
    "KVCache",
    "MemoryPlan",
    "Model",
    "ModelOptions",
    "Mt19937",
    "Muon",
    "MuonStep",
    "Optimizer",
    "ParameterSpec",
    "Partition",
    "Profile",
    "Reduction",
    "SamplerOptions",
    "ShardInfo",
    "Tensor",
    "Tokenizer",
    "XorShift",
    "caches_in",
    "checkpoint_header",
    "commit",
    "compiler",
    "config_from_descriptor",
    "cpu_peak_flops",
    "cuda_built",
    "cuda_status",
    "default_threads",
    "inspect_checkpoint",
    "inspect_shard",
    "isa",
    "memory_plan",
    "nccl_comm",
    "nccl_id",
    "parameter_table",
    "piece_of",
    "sample",
    "set_library_directories",
    "set_tune_file",
    "thread_comms",
    "token_ids",
    "token_of",
    "train_bpe",
]

class Error(RuntimeError):
    pass

class DeviceInfo:
    """
    A description of a backend's device.
    """
    def __repr__(self) -> str: ...
    @property
    def bf16_arithmetic(self) -> bool:
        """
        Whether bf16 is multiplied as it is; if not, it is widened to f32, which costs time.
        """
    @property
    def clock_hz(self) -> float:
        """
        The highest clock of its multiprocessors, in Hz.
        """
    @property
    def description(self) -> str:
        """
        The hardware, in words.
        """
    @property
    def fallbacks(self) -> str:
        """
        What was computed by slower means than chosen; empty if nothing was.
        """
    @property
    def free_bytes(self) -> int:
        """
        The memory that is free, in bytes.
        """
    @property
    def isa(self) -> str:
        """
        The kernel set: 'avx512', 'sm_90'.
        """
    @property
    def l1_bytes(self) -> int:
        """
        The L1 data cache of a CPU, in bytes; 0 if unknown.
        """
    @property
    def l2_bytes(self) -> int:
        """
        The L2 cache, which several CPUs may share, in bytes.
        """
    @property
    def l3_bytes(self) -> int:
        """
        The L3 cache, which several CPUs may share, in bytes; 0 if there is none.
        """
    @property
    def multiprocessors(self) -> int:
        """
        The multiprocessors of a GPU.
        """
    @property
    def name(self) -> str:
        """
        'cpu' or 'cuda:0'.
        """
    @property
    def options(self) -> str:
        """
        What set_option() has chosen.
        """
    @property
    def pinning(self) -> str:
        """
        How the CPU threads are bound to CPUs, in words.
        """
    @property
    def threads(self) -> int:
        """
        The CPU threads that ops use.
        """
    @property
    def total_bytes(self) -> int:
        """
        The memory of the device, in bytes; 0 if unknown.
        """
    @property
    def uuid(self) -> str:
        """
        What a GPU is known by, whichever number it has in a process; empty for others.
        """

class Tensor:
    """
    A contiguous array in a backend's memory.
    """
    def __getitem__(self, i: int) -> Tensor:
        """
        Return row i, a tensor of one extent less in the same memory.
        """
    def __repr__(self) -> str: ...
    def from_host(self, host: numpy.typing.NDArray[typing.Any]) -> None:
        """
        Copy an array of the same number of elements and dtype in; bf16 from uint16 or ml_dtypes.bfloat16.
        """
    def read(self, begin: int, count: int) -> numpy.typing.NDArray[typing.Any]:
        """
        Return a copy of the elements begin .. begin+count-1 in row-major order, (count); bf16 as uint16. Waits.
        """
    def to_host(self, out: numpy.typing.NDArray[typing.Any] | None = None) -> numpy.typing.NDArray[typing.Any]:
        """
        Copy the elements to a NumPy array, a new one or `out`, and return it; bf16 as uint16. Waits.
        """
    def write(self, begin: int, host: numpy.typing.NDArray[typing.Any]) -> None:
        """
        Copy an array in, to the elements from `begin` on in row-major order.
        """
    @property
    def dtype(self) -> str:
        """
        'f32', 'bf16', 'i32' or 'i16'.
        """
    @property
    def numel(self) -> int:
        """
        The number of elements.
        """
    @property
    def shape(self) -> tuple[typing.Any, ...]:
        """
        The extents.
        """

class AdamWStep:
    """
    The numbers of one AdamW step, which the host knows; correction1 and correction2 are 1 - beta^t.
    """
    def __init__(
        self,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        correction1: float,
        correction2: float,
        seed: int = 0,
        first: int = 0,
    ) -> None: ...

class AdamWOperands:
    """
    What adamw_many updates of one parameter, or of a part of one that begins at element `first`. The weight_decay, seed and first of its AdamWStep do not count.
    """
    def __init__(
        self,
        param: Tensor | None,
        master: Tensor | None,
        m: Tensor | None,
        v: Tensor | None,
        grad: Tensor | None,
        weight_decay: float = 0.0,
        seed: int = 0,
        first: int = 0,
    ) -> None: ...
    @property
    def grad(self) -> Tensor | None: ...
    @property
    def m(self) -> Tensor | None: ...
    @property
    def master(self) -> Tensor | None: ...
    @property
    def param(self) -> Tensor | None: ...
    @property
    def v(self) -> Tensor | None: ...

class MuonStep:
    """
    The numbers of muon_update: param -= lr (scale direction + weight_decay param).
    """
    def __init__(self, lr: float, scale: float, weight_decay: float, seed: int = 0, first: int = 0) -> None: ...

class SamplerOptions:
    """
    How a token is chosen from logits: csrc/core/sampler.h.
    """
    def __init__(self, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> None: ...
    def __repr__(self) -> str: ...

class Backend:
    """
    A device and its ops.

    Float tensors are f32 or bf16; statistics (mean, rstd, lse, losses, m, v) are f32, token ids i32. N is any number of rows. Formulas and rules of accumulation: csrc/core/backend.h.
    """
    def __init__(self, device: str = "cpu", threads: int = 0) -> None: ...
    def __repr__(self) -> str: ...
    def adamw(
        self, param: Tensor, master: Tensor, m: Tensor, v: Tensor, grad: Tensor, factor: Tensor, step: AdamWStep
    ) -> None:
        """
        Update param, m and v by the gradient grad * factor. master, i16 or None, holds the 16 bits below a bf16 param.
        """
    def adamw_many(self, operands: collections.abc.Sequence[AdamWOperands], factor: Tensor, step: AdamWStep) -> None:
        """
        Do for each of `operands` what adamw does, all at once.

        The Tensors of AdamWOperands are those of adamw.
        """
    def attention_backward(self, dqkv: Tensor, dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, NH: int) -> None:
        """
        Compute dqkv (B,T,3C) from dout (B,T,C) and what attention_forward read and wrote.
        """
    def attention_decode(
        self, out: Tensor, kcache: Tensor, vcache: Tensor, qkv: Tensor, start: Tensor, NH: int
    ) -> None:
        """
        Append the keys and values of qkv (B,T,3C) to the caches (B,NH,maxT,HS) at start (B) i32, and attend: out (B,T,C).
        """
    def attention_forward(self, out: Tensor, lse: Tensor, qkv: Tensor, NH: int) -> None:
        """
        Compute causal attention out (B,T,C) of qkv (B,T,3C), and lse (B,NH,T) for its backward.
        """
    def clip_factor(self, norm: Tensor, factor: Tensor, norm_squared: Tensor, max_norm: float) -> None:
        """
        Compute norm and factor = min(1, max_norm / norm), (1) f32 each, from norm_squared: (1), or the digits (NORM_DIGITS) of gradient_norm_squared.
        """
    def copy(self, out: Tensor, inp: Tensor) -> None:
        """
        Copy a tensor to one of its shape, converting between f32 and bf16.
        """
    def crossentropy_forward(self, losses: Tensor, logits: Tensor, targets: Tensor, V: int) -> None:
        """
        Compute losses (N) of logits (N,Vp), of which V count, for targets (N) i32.
        """
    def crossentropy_softmax_backward(self, logits: Tensor, targets: Tensor, dloss: float, V: int) -> None:
        """
        Replace logits (N,Vp) by dloss times the gradient of the losses for targets (N) i32.
        """
    def empty(self, shape: collections.abc.Sequence[int], dtype: str = "f32") -> Tensor:
        """
        Allocate a tensor, filled with zeros.
        """
    def encoder_backward(self, dwte: Tensor, dwpe: Tensor, dout: Tensor, inp: Tensor) -> None:
        """
        Add dout (B,T,C) to dwte (Vp,C) by token and to dwpe (maxT,C) by position.
        """
    def encoder_forward(self, out: Tensor, inp: Tensor, wte: Tensor, wpe: Tensor, start: Tensor | None = None) -> None:
        """
        Embed tokens inp (B,T): out (B,T,C) = wte (Vp,C) by token + wpe (maxT,C) by position, from start (B) i32 on.
        """
    def fused_classifier(self, losses: Tensor, logits: Tensor, targets: Tensor, dloss: float, V: int) -> None:
        """
        Compute losses (N) as crossentropy_forward, and replace logits (N,Vp) as crossentropy_softmax_backward.
        """
    def fused_residual_layernorm_forward(
        self,
        residual: Tensor,
        out: Tensor,
        mean: Tensor,
        rstd: Tensor,
        a: Tensor,
        b: Tensor,
        weight: Tensor,
        bias: Tensor,
    ) -> None:
        """
        Compute residual (N,C) = a + b, and the layernorm out (N,C) of it. Keeps mean and rstd (N).
        """
    def gelu_backward(self, dinp: Tensor, inp: Tensor, dout: Tensor) -> None:
        """
        Compute dinp = dout * gelu'(inp), in any shape.
        """
    def gelu_forward(self, out: Tensor, inp: Tensor) -> None:
        """
        Compute out = gelu(inp), the tanh form, in any shape.
        """
    def global_norm_squared(self, out: Tensor, inp: Tensor) -> None:
        """
        Add the sum of the squares of inp, in any shape, to out (1) f32.
        """
    def gradient_norm_squared(self, out: Tensor, gradients: collections.abc.Sequence[Tensor | None]) -> None:
        """
        Add the sum of the squares of all gradients to out (NORM_DIGITS) f32.

        It is the sum of out[k] * 2**(16 * (k - UNIT_DIGIT)). On the CPU it does not depend on threads, nor on how gradients are cut at multiples of 1024 elements; digits of up to 256 ranks add without an error.
        """
    def info(self) -> DeviceInfo:
        """
        Return the device's name, hardware, memory and options.
        """
    def layernorm_backward(
        self,
        dinp: Tensor,
        dweight: Tensor,
        dbias: Tensor,
        dinp_sum: Tensor,
        dout: Tensor,
        inp: Tensor,
        weight: Tensor,
        mean: Tensor,
        rstd: Tensor,
    ) -> None:
        """
        Add the gradients of layernorm to dinp (N,C), dweight (C) and dbias (C), and the column sums of what is then in dinp to dinp_sum (C) or None.
        """
    def layernorm_forward(
        self, out: Tensor, mean: Tensor, rstd: Tensor, inp: Tensor, weight: Tensor, bias: Tensor
    ) -> None:
        """
        Normalize the rows of inp (N,C) to out (N,C); weight and bias (C). Keeps mean and rstd (N).
        """
    def matmul_backward(
        self,
        dinp: Tensor,
        dweight: Tensor,
        dbias: Tensor,
        dout: Tensor,
        inp: Tensor,
        weight: Tensor,
        accumulate: bool = True,
    ) -> None:
        """
        Compute dinp (N,C) = dout (N,OC) weight (OC,C), and add to dweight (OC,C) and dbias (OC), or overwrite them.
        """
    def matmul_forward(self, out: Tensor, inp: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """
        Compute out (N,OC) = inp (N,C) weight (OC,C)^T + bias (OC).
        """
    def matmul_gelu_backward(
        self,
        dinp: Tensor,
        dweight: Tensor,
        dbias: Tensor,
        dout: Tensor,
        inp: Tensor,
        weight: Tensor,
        pre: Tensor,
        accumulate: bool = True,
    ) -> None:
        """
        Compute what matmul_backward does, for inp = gelu(pre): dinp is that of pre.
        """
    def matmul_gelu_forward(
        self, out: Tensor, pre: Tensor, inp: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> None:
        """
        Compute pre (N,OC) as matmul_forward does, and out = gelu(pre).
        """
    def muon_momentum(
        self, out: Tensor, m: Tensor, grad: Tensor, factor: Tensor, momentum: float, nesterov: bool
    ) -> None:
        """
        Update m by the gradient g = grad * factor: m = lerp(g, m, momentum). Compute out = lerp(g, m, momentum), or m unless nesterov.
        """
    def muon_update(self, param: Tensor, master: Tensor, direction: Tensor, factor: Tensor, step: MuonStep) -> None:
        """
        Subtract lr * (scale * direction + weight_decay * param) from param, if factor (1) is finite. master as of adamw.
        """
    def newton_schulz(
        self, out: Tensor, inp: Tensor, gram: Tensor, polynomial: Tensor, norms: Tensor, steps: int
    ) -> None:
        """
        Compute out (R,C) = inp with all singular values near 1, by steps of Newton-Schulz's iteration.

        inp, gram and polynomial (k,k), k = min(R,C), and norms (NORM_DIGITS + 2) f32 are overwritten.
        """
    def residual_forward(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        """
        Compute out = a + b, in any shape.
        """
    def sample(self, tokens: Tensor, logits: Tensor, coins: Tensor, V: int, options: SamplerOptions) -> None:
        """
        Choose tokens (N) i32, or faults for token_of(), from logits (N,Vp) f32 by coins (N) f32 in [0, 1).
        """
    def scale(self, out: Tensor, inp: Tensor, factor: Tensor, scale: float) -> None:
        """
        Compute out = scale * factor * inp, in any shape, for factor (1) f32.
        """
    def set_option(self, name: str, value: str) -> None:
        """
        Set an option of the backend, such as 'attention' to 'flash' on 'cuda': doc/cuda.md lists them.
        """
    def shifted_sum(self, out: Tensor, x: Tensor, y: Tensor, a: float, b: float, c: float) -> None:
        """
        Compute out = a I + b x + c y of square matrices (N,N).
        """
    def sum(self, out: Tensor, inp: Tensor, scale: float = 1.0) -> None:
        """
        Add scale * the sum of inp, f32 in any shape, to out (1) f32.
        """
    def synchronize(self) -> None:
        """
        Wait until all queued ops are done.
        """
    def weights_changed(self, weights: Tensor) -> None:
        """
        Drop packed copies of this memory.

        Call once for memory that holds weights, and again after writing them by any other way than zero, copy, from_host, adamw, adamw_many or muon_update.
        """
    def workspace_bytes(self, B: int, T: int, C: int, NH: int, dtype: str) -> int:
        """
        Return the bytes that the ops of a training step take for themselves, beside the tensors that they are given.
        """
    def zero(self, x: Tensor) -> None:
        """
        Fill a tensor with zeros.
        """
    @property
    def runs_ahead(self) -> bool:
        """
        Ops are only queued, so that the host may be ahead of the device.
        """

class Profile:
    """
    The time of each op that a thread calls, on the device's clock.

    From start() to stop(), both called by one thread, its time is cut into intervals: one for each op, which lasts until the next begins, and one for each mark().
    """
    def __init__(self, backend: Backend) -> None: ...
    def intervals(self) -> list[tuple[str, list[int], float]]:
        """
        Return (name, extents of the op in the order of csrc/core/dims.h, seconds) of each. Waits.
        """
    def mark(self, name: str) -> None:
        """
        End the last interval and begin one of that name, which is no op's.
        """
    def start(self, name: str) -> None:
        """
        Forget the intervals so far and begin one of that name, which is no op's.
        """
    def stop(self) -> None:
        """
        End the last interval.
        """

class Partition:
    """
    How a model's parameters are divided among ranks: csrc/comm/partition.h.
    """

class Comm:
    """
    The ranks that train one model together: csrc/comm/comm.h.

    All ranks issue the same collectives, with tensors of the same shapes and dtypes. Each returns a ticket; the tensors must not be touched before wait().
    """
    def __repr__(self) -> str: ...
    def all_gather(
        self, xs: collections.abc.Sequence[Tensor], owners: collections.abc.Sequence[int] | None = None
    ) -> int:
        """
        Fill each tensor with the pieces of it that the ranks own. owners: as in reduce_scatter().
        """
    def all_reduce(self, xs: collections.abc.Sequence[Tensor]) -> int:
        """
        Replace each tensor by its sum over the ranks.
        """
    def barrier(self) -> None:
        """
        Wait until every rank has called it.
        """
    def broadcast(self, xs: collections.abc.Sequence[Tensor], root: int = 0) -> int:
        """
        Copy each tensor of rank `root` to every rank.
        """
    def check(self) -> None:
        """
        Raise Error if a rank is known to be lost. Never waits; for any thread, whatever others do.
        """
    def give_up(self, why: str) -> None:
        """
        Let go of what is under way, because this rank cannot go on: every later call raises Error.
        """
    def pending(self) -> tuple[float, str]:
        """
        Return for how long a collective has been going on without the host, and which; 0.0 if there is none. Never waits; for any thread, whatever others do.
        """
    def reduce_scatter(
        self, xs: collections.abc.Sequence[Tensor], owners: collections.abc.Sequence[int] | None = None
    ) -> int:
        """
        Replace this rank's piece of each tensor by its sum over the ranks; the rest is then undefined.

        owners: of each tensor the rank that owns all of it, or -1 if each has its piece_of() it, as without owners.
        """
    def sum(self, x: collections.abc.Sequence[float]) -> list[float]:
        """
        Return the sums over all ranks, element by element. Waits for every rank.
        """
    def wait(self, ticket: int | None = None) -> None:
        """
        Let the backend's later work wait for a collective and those before it; by default for all so far.
        """
    @property
    def rank(self) -> int:
        """
        This rank, from 0 on.
        """
    @property
    def size(self) -> int:
        """
        The number of ranks.
        """

class Exchange:
    """
    What a transport moves for a HostComm: csrc/comm/host_comm.h.

    Parts lie in a buffer in the order of ranks, without gaps; counts are their bytes. The buffers are valid until done().
    """
    @property
    def has_heads(self) -> bool:
        """
        Whether to gather every rank's head into heads, and check() them, first.
        """
    @property
    def head(self) -> memoryview:
        """
        What this rank is in.
        """
    @property
    def heads(self) -> memoryview:
        """
        What every rank is in, by rank.
        """
    @property
    def kind(self) -> str:
        """
        'all_to_all': part r of send to rank r, into part r of receive what rank r sends. 'all_gather': this rank's part of receive to all ranks. 'broadcast': all of receive, from rank root. 'barrier': nothing.
        """
    @property
    def receive(self) -> memoryview:
        """
        Where what arrives goes.
        """
    @property
    def receive_counts(self) -> list[int]:
        """
        By rank, the bytes of its part of receive.
        """
    @property
    def root(self) -> int:
        """
        The rank that broadcasts.
        """
    @property
    def send(self) -> memoryview:
        """
        What is sent.
        """
    @property
    def send_counts(self) -> list[int]:
        """
        By rank, the bytes of its part of send.
        """
    @property
    def what(self) -> str:
        """
        The collective, in words.
        """

class Exchanges:
    """
    What a HostComm has to exchange with other ranks, for the thread that moves bytes.
    """
    def check(self) -> None:
        """
        Raise Error if the heads, which have arrived, disagree.
        """
    def done(self) -> None:
        """
        Tell that the exchange is complete.
        """
    def fail(self, message: str) -> None:
        """
        End: what waits, and every later call of the Comm, raises Error.
        """
    def next_exchange(self) -> Exchange:
        """
        Wait for an exchange and return it; None if there will be no more.
        """
    @property
    def awaited(self) -> bool:
        """
        Whether a thread waits for what is exchanged.
        """
    @property
    def bytes_sent(self) -> int:
        """
        The bytes that this rank had for the other ranks so far.
        """
    @property
    def ended(self) -> bool:
        """
        Whether no exchange is wanted any more.
        """
    @property
    def idle(self) -> bool:
        """
        Whether all that was asked for is done.
        """

class HostComm(Comm):
    """
    A Comm of a CPU backend whose bytes are moved by a thread that serves `exchanges`. Until then its collectives wait.
    """
    def __init__(self, backend: Backend, rank: int, size: int) -> None: ...
    @property
    def exchanges(self) -> Exchanges:
        """
        What the transport serves.
        """

class GradientSink:
    """
    A taker of gradients as backward() completes them: csrc/comm/gradient_sink.h.
    """

class Reduction(GradientSink):
    """
    A sink that sums gradients and the loss over the ranks of a Comm: csrc/comm/reduction.h.

    partition: the optimizer's; each rank gets the sums of what it updates (ZeRO-1). None: each gets all. notes: how many numbers travel beside the loss.
    """
    def __init__(self, comm: Comm, partition: Partition | None = None, notes: int = 1) -> None: ...
    def begin(self, notes: collections.abc.Sequence[float]) -> None:
        """
        Call before an update's first forward(), with what this rank tells the others.
        """
    def notes(self) -> list[float]:
        """
        Return the sums over the ranks of what they told in the last update. Waits.
        """
    def own_seconds(self) -> float:
        """
        Return the time from begin() to the end of backward(), without waiting for other ranks. Waits.
        """

class ParameterSpec:
    """
    A row of a model's table of parameters: csrc/model/parameters.h.
    """
    @property
    def decay(self) -> bool:
        """
        Weight decay applies to it.
        """
    @property
    def matrices(self) -> int:
        """
        How many matrices each layer's value is, one below the other, for Muon; 0 if it takes none of it.
        """
    @property
    def name(self) -> str:
        """
        llm.c's name.
        """
    @property
    def padding(self) -> int:
        """
        How many of the last rows are zero and stay so.
        """
    @property
    def per_layer(self) -> bool:
        """
        Each layer has one; all are stacked in one tensor.
        """
    @property
    def shape(self) -> tuple[typing.Any, ...]:
        """
        The extents, with the number of layers first if per_layer.
        """

class MemoryPlan:
    """
    The memory that a training run takes, in bytes by purpose.
    """
    @property
    def activations(self) -> int:
        """
        What forward() keeps for backward(), and what both need for themselves.
        """
    @property
    def gradients(self) -> int:
        """
        The gradients of the weights.
        """
    @property
    def optimizer(self) -> int:
        """
        Moments and master weights.
        """
    @property
    def parameters(self) -> int:
        """
        The weights.
        """
    @property
    def total(self) -> int:
        """
        The sum of all purposes.
        """

class ModelOptions:
    """
    How a model is computed: csrc/model/options.h.
    """
    def __init__(
        self, dtype: str = "f32", grad_dtype: str = "f32", recompute: int = 1, classifier_rows: int = 1024
    ) -> None: ...
    @property
    def classifier_rows(self) -> int:
        """
        Rows of logits that exist at a time.
        """
    @property
    def dtype(self) -> str:
        """
        'f32' or 'bf16': of parameters and activations.
        """
    @property
    def grad_dtype(self) -> str:
        """
        'f32' or 'bf16': of the parameters' gradients.
        """
    @property
    def recompute(self) -> int:
        """
        What backward() computes again: 0 nothing, 1 GELU, 2 GELU and layernorm.
        """

class Model:
    """
    What every family of models offers: csrc/model/model.h.
    """
    def activation(self, name: str) -> numpy.typing.NDArray[typing.Any]:
        """
        Return an activation as an array that may not be written to, bf16 as uint16: on the CPU a view, into which the next forward() writes, on a GPU a copy.
        """
    def activation_names(self) -> list[str]:
        """
        Return the names of what forward() has left for backward(), in the order in which it is computed.
        """
    def all_parameters(self) -> Tensor:
        """
        Return all parameters as one tensor (num_parameters), in the order of the model's file.
        """
    def backward(
        self,
        targets: typing.Annotated[numpy.typing.ArrayLike, numpy.int32],
        scale: float = 1.0,
        sink: GradientSink | None = None,
    ) -> None:
        """
        Add scale times the gradients and the mean loss of the last forward() to gradients and loss().

        targets: (B, T) int32; a negative one is ignored. sink: takes the gradients of an update's last micro-batch, layer by layer as they are complete.
        """
    def evaluate(
        self,
        inputs: typing.Annotated[numpy.typing.ArrayLike, numpy.int32],
        targets: typing.Annotated[numpy.typing.ArrayLike, numpy.int32],
        by_token: bool = False,
    ) -> typing.Any:
        """
        Compute the loss without gradients; inputs and targets (B, T) int32.

        Returns the mean over all targets, or with by_token the losses, (B, T) f32.
        """
    def forward(self, inputs: typing.Annotated[numpy.typing.ArrayLike, numpy.int32]) -> None:
        """
        Compute the activations of inputs (B, T) int32 that backward() needs.
        """
    def gradient(self, name: str) -> Tensor:
        """
        Return a parameter's gradient, in the model's memory, of its shape and of dtype grad_dtype.
        """
    def gradient_view(self, name: str) -> numpy.typing.NDArray[typing.Any]:
        """
        Return a NumPy view of a parameter's gradient in the CPU's memory, bf16 as uint16.
        """
    def init_weights(self, seed: int = 42) -> None:
        """
        Set random weights, as the table of parameters says.
        """
    def logits(
        self, inputs: typing.Annotated[numpy.typing.ArrayLike, numpy.int32]
    ) -> numpy.typing.NDArray[numpy.float32]:
        """
        Compute the logits, (B, T, vocab_size) f32, of inputs (B, T) int32.
        """
    def loss(self) -> float:
        """
        Return the sum of scale * mean loss over the backward() calls since zero_grad(). Waits.
        """
    def parameter(self, name: str) -> Tensor:
        """
        Return a parameter, in the model's memory and dtype. Call weights_changed() after writing to it.
        """
    def parameter_names(self) -> list[str]:
        """
        Return the parameters' names, in the order of the model's file.
        """
    def parameter_view(self, name: str) -> numpy.typing.NDArray[typing.Any]:
        """
        Return a NumPy view of a parameter in the CPU's memory, bf16 as uint16. It may be written to.
        """
    def weights_changed(self) -> None:
        """
        Drop packed copies of the weights. Call after writing to a parameter from outside.
        """
    def zero_grad(self) -> None:
        """
        Begin a new update: gradients and loss() are zero again.
        """
    @property
    def backend(self) -> Backend:
        """
        The backend that the model is on.
        """
    @property
    def max_seq_len(self) -> int:
        """
        The largest number of positions.
        """
    @property
    def num_parameters(self) -> int:
        """
        The number of elements of all parameters.
        """
    @property
    def options(self) -> ModelOptions:
        """
        How the model is computed.
        """
    @property
    def vocab_size(self) -> int:
        """
        V, the number of tokens.
        """

class KVCache:
    """
    The keys and values of the positions seen so far, and generation by means of them.
    """
    def __init__(self, model: Model, B: int, max_len: int) -> None: ...
    def __repr__(self) -> str: ...
    def clear(self, b: int) -> None:
        """
        Empty sequence b.
        """
    def decode(
        self, tokens: typing.Annotated[numpy.typing.ArrayLike, numpy.int32]
    ) -> numpy.typing.NDArray[numpy.float32]:
        """
        Append a token to every sequence, (B) int32, and return the logits after it, (B, vocab_size) f32.
        """
    def length(self, b: int) -> int:
        """
        Return the number of positions that sequence b has.
        """
    def prefill(
        self, b: int, tokens: typing.Annotated[numpy.typing.ArrayLike, numpy.int32]
    ) -> numpy.typing.NDArray[numpy.float32]:
        """
        Append tokens (n) int32 to sequence b and return the logits after the last of them, (vocab_size) f32.
        """
    def queue_tokens(
        self,
        tokens: typing.Annotated[numpy.typing.ArrayLike, numpy.int32] | None,
        coins: typing.Annotated[numpy.typing.ArrayLike, numpy.float32],
        options: SamplerOptions,
    ) -> None:
        """
        Append a token to every sequence and choose the next ones on the device, without waiting.

        tokens: (B) int32, or None to go on from those chosen last. coins: (B) f32 in [0, 1).
        """
    def read_tokens(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        Return the tokens that the oldest queue_tokens() not read yet chose, (B) int32.

        Negative ones are faults, for token_of(). Waits.
        """
    @property
    def B(self) -> int:
        """
        The number of sequences.
        """
    @property
    def backend(self) -> Backend:
        """
        The backend of the model.
        """
    @property
    def bytes(self) -> int:
        """
        The memory of the keys and values, in bytes.
        """
    @property
    def max_len(self) -> int:
        """
        The positions that there is room for in each sequence.
        """

class GPT2Config:
    """
    The shape of a GPT-2 or GPT-3 model.
    """
    def __init__(
        self,
        max_seq_len: int,
        vocab_size: int,
        num_layers: int,
        num_heads: int,
        channels: int,
        padded_vocab_size: int = 0,
    ) -> None: ...
    @property
    def channels(self) -> int:
        """
        C, the width of the residual stream.
        """
    @property
    def max_seq_len(self) -> int:
        """
        The largest number of positions.
        """
    @property
    def num_heads(self) -> int:
        """
        NH, the attention heads of a layer.
        """
    @property
    def num_layers(self) -> int:
        """
        L, the number of layers.
        """
    @property
    def padded_vocab_size(self) -> int:
        """
        Vp, the rows of wte: V rounded up to a multiple of 128 by default.
        """
    @property
    def vocab_size(self) -> int:
        """
        V, the number of tokens.
        """

class GPT2(Model):
    """
    GPT-2 and GPT-3: csrc/model/gpt2.h. llmc.GPT2 is made of it.
    """
    def __init__(self, config: GPT2Config, backend: Backend, options: ModelOptions) -> None: ...
    def load_checkpoint(self, path: os.PathLike[str] | str | bytes) -> None:
        """
        Read the weights from a llm.c model file of the same config, in f32 or bf16.
        """
    def save_checkpoint(self, path: os.PathLike[str] | str | bytes) -> None:
        """
        Write the weights to a llm.c model file, in the model's dtype.
        """
    @property
    def config(self) -> GPT2Config:
        """
        The shape of the model.
        """

class Optimizer:
    """
    An optimizer over a model's parameters: csrc/optim/optimizer.h.
    """
    def apply(self, lr: float) -> None:
        """
        Queue the update with the gradients measured last, and count it.
        """
    def gather(self, name: str, kind: int, layer: int) -> Tensor:
        """
        Return all of one layer's state, flat, valid until the next call; every rank calls it alike.

        kind: which moment, from 0 on; the number of moments means the master.
        """
    def layers(self, name: str) -> int:
        """
        Return how many layers of a parameter are stacked; 1 if it has none.
        """
    def measure(self) -> float:
        """
        Measure the gradients and return their global norm before clipping. Waits.
        """
    def norm(self) -> float:
        """
        Return the global norm of the gradients measured last, before clipping. Waits.
        """
    def scatter(self, name: str, kind: int, layer: int, values: numpy.typing.NDArray[typing.Any] | None) -> None:
        """
        Set all of one layer's state, flat, from rank 0's values; the other ranks pass None. Every rank calls it alike.
        """
    def state(self) -> dict[str, typing.Any]:
        """
        Return (moments, master) by the parameter's name: flat Tensors of as many elements, or among ranks of those that this rank updates.

        moments: a tuple, f32. master holds the 16 bits below a bf16 parameter, i16; None if there are no master weights.
        """
    def step(self, lr: float) -> None:
        """
        Queue an update: measure() and apply(), without waiting.
        """
    @property
    def bytes(self) -> int:
        """
        The memory of moments and master weights, in bytes.
        """
    @property
    def partition(self) -> Partition:
        """
        Which rank updates what, for Reduction; None if this process updates everything.
        """
    @property
    def rng_state(self) -> int:
        """
        The state of the generator that draws the seeds of stochastic rounding.
        """
    @rng_state.setter
    def rng_state(self, arg1: int) -> None: ...
    @property
    def sharded(self) -> bool:
        """
        Whether this rank keeps the state of what it updates only (ZeRO-1).
        """
    @property
    def step_count(self) -> int:
        """
        Updates made so far, which the correction of the moments' bias goes by.
        """
    @step_count.setter
    def step_count(self, arg1: int) -> None: ...

class AdamW(Optimizer):
    """
    AdamW over a model's parameters: csrc/optim/adamw.h. llmc.AdamW is made of it.
    """
    @staticmethod
    def bytes_per_parameter(dtype: str, master_weights: bool) -> int:
        """
        Return the bytes that AdamW keeps of each weight of a model of this dtype.
        """
    def __init__(
        self,
        model: Model,
        beta1: float = 0.8999999761581421,
        beta2: float = 0.949999988079071,
        eps: float = 9.99999993922529e-09,
        weight_decay: float = 0.0,
        grad_clip: float = 1.0,
        decay_all: bool = False,
        master_weights: bool = True,
        seed: int = 13371337,
        comm: Comm | None = None,
    ) -> None: ...

class Muon(Optimizer):
    """
    Muon over a model's matrices, AdamW over the rest: csrc/optim/muon.h. llmc.Muon is made of it.
    """
    def __init__(
        self,
        model: Model,
        momentum: float = 0.949999988079071,
        nesterov: bool = True,
        ns_steps: int = 5,
        lr_ratio: float = 1.0,
        adjust_lr: str = "match_rms_adamw",
        beta1: float = 0.8999999761581421,
        beta2: float = 0.949999988079071,
        eps: float = 9.99999993922529e-09,
        weight_decay: float = 0.0,
        grad_clip: float = 1.0,
        master_weights: bool = True,
        seed: int = 13371337,
        comm: Comm | None = None,
    ) -> None: ...

class ShardInfo:
    """
    What the header of a token file says.
    """
    def __repr__(self) -> str: ...
    @property
    def path(self) -> pathlib.Path:
        """
        The file.
        """
    @property
    def token_bytes(self) -> int:
        """
        Bytes of each token in the file: 2 or 4.
        """
    @property
    def tokens(self) -> int:
        """
        The number of tokens.
        """

class DataLoader:
    """
    Batches of tokens from token files, in llm.c's order: csrc/core/dataloader.h.
    """
    def __init__(
        self,
        files: collections.abc.Sequence[os.PathLike[str] | str | bytes],
        B: int,
        T: int,
        rank: int = 0,
        ranks: int = 1,
        shuffle: bool = False,
        seed: int = 42,
        vocab_size: int = 0,
        rows_per_sample: int = 0,
    ) -> None: ...
    def next_batch(self) -> tuple[numpy.typing.NDArray[numpy.int32], numpy.typing.NDArray[numpy.int32]]:
        """
        Return the next inputs and targets, (B, T) int32 each; targets are the inputs moved on by one token.
        """
    def reset(self) -> None:
        """
        Begin a new epoch, in a new order if the data are shuffled.
        """
    def set_state(self, state: dict[str, typing.Any]) -> None:
        """
        Go to the position that state() returned. Raises ValueError if it does not fit these files.
        """
    def state(self) -> dict[str, typing.Any]:
        """
        Return the position in the data and the state of the generator, for a checkpoint.
        """
    @property
    def B(self) -> int:
        """
        Rows of a batch.
        """
    @property
    def T(self) -> int:
        """
        Tokens of a row.
        """
    @property
    def num_tokens(self) -> int:
        """
        The number of tokens in all files.
        """
    @property
    def shards(self) -> list[ShardInfo]:
        """
        The files, in the order given.
        """

class Mt19937:
    """
    The Mersenne Twister, drawn from as PyTorch's CPU generator does.
    """
    def __init__(self, seed: int) -> None: ...
    def normal(self, n: int, mean: float = 0.0, std: float = 1.0) -> numpy.typing.NDArray[numpy.float32]:
        """
        Draw n normally distributed numbers, (n) f32.
        """
    def permutation(self, n: int) -> list[int]:
        """
        Draw a permutation of 0 .. n-1.
        """
    def randint32(self) -> int:
        """
        Draw an integer of 32 bits.
        """

class XorShift:
    """
    xorshift*, which draws the coins for sampling.
    """
    def __init__(self, seed: int = 1337) -> None: ...
    def randfloat32(self) -> float:
        """
        Draw a number in [0, 1).
        """
    def randint32(self) -> int:
        """
        Draw an integer of 32 bits.
        """
    @property
    def state(self) -> int:
        """
        The generator's 64 bits, never 0.
        """
    @state.setter
    def state(self, arg0: int) -> None: ...

class Tokenizer:
    """
    llm.c's tokenizer file, for decoding.
    """
    def __init__(self, path: os.PathLike[str] | str | bytes) -> None: ...
    def decode(self, token: int) -> bytes:
        """
        Return the token's bytes, which need not be whole UTF-8 characters.
        """
    @property
    def eot_token(self) -> int:
        """
        The end-of-text token.
        """
    @property
    def vocab_size(self) -> int:
        """
        The number of tokens.
        """

class BpeEncoder:
    """
    Encodes one long word: csrc/core/bpe.h.
    """
    def __init__(self, tokens: collections.abc.Sequence[bytes], eot: int) -> None: ...
    def encode(self, word: bytes) -> numpy.typing.NDArray[numpy.uint32]:
        """
        Return the token ids of a word's bytes, (n) uint32.
        """

def caches_in(directory: str, allowed: collections.abc.Sequence[int]) -> list[tuple[int, int]]:
    """
    Return (bytes, how many of the allowed CPUs share it) of the data caches L1, L2, L3.

    Of CPUs that differ, it is the one with the smallest share. Bytes are 0 if nobody tells.
    directory: what Linux has as /sys/devices/system/cpu.
    """

def checkpoint_header(config: GPT2Config, dtype: str) -> bytes:
    """
    Return the 1024 bytes that a llm.c model file begins with.
    """

def commit() -> str:
    """
    Return the commit of the clone that this was built from, with '-dirty' if files had changed; '' if it is not known.
    """

def config_from_descriptor(descriptor: str) -> GPT2Config:
    """
    Return the config that a descriptor of llm.c names: 'd12', 'gpt2:d12' or 'gpt3:c768'; or 'd2': any other depth N has 64 N channels in N heads.
    """

def cpu_peak_flops(dtype: str, threads: int = 0) -> float:
    """
    Measure the FLOP/s of the kernel set in use on registers alone, in about 60 ms.

    dtype: 'f32' or 'bf16'. threads: 0 for as many as a backend would use.
    """

def cuda_built() -> bool:
    """
    Return whether this build has the CUDA backend.
    """

def cuda_status() -> str:
    """
    Return the CUDA libraries and devices found, or why there are none, in words.
    """

def default_threads() -> int:
    """
    Return the CPU threads used by default: OMP_NUM_THREADS, else what the process may use.
    """

def inspect_checkpoint(path: os.PathLike[str] | str | bytes) -> tuple[GPT2Config, str, int]:
    """
    Return (config, dtype, number of parameters) of a llm.c model file, whose header and size are checked.
    """

def inspect_shard(path: os.PathLike[str] | str | bytes) -> ShardInfo:
    """
    Check the header and the size of a token file, and return what it says.
    """

def isa() -> dict[str, typing.Any]:
    """
    Return the kernel sets: 'built' in this build, 'usable' on this CPU, and the one 'used' (LLMC_ISA forces one).
    """

def memory_plan(
    config: GPT2Config,
    options: ModelOptions,
    B: int,
    T: int,
    training: bool = True,
    optimizer_bytes: int = 0,
    micro_gradients: bool = False,
) -> MemoryPlan:
    """
    Return the bytes that a model takes for batches of (B, T), and, if `training`, its gradients (twice, if those of a micro-batch are kept apart) and an optimizer that keeps optimizer_bytes.
    """

def nccl_comm(backend: Backend, rank: int, size: int, id: bytes, timeout: float = 600.0) -> Comm:
    """
    Make a Comm over NCCL. Waits until every rank has called it, `timeout` seconds at most, and sum() no longer than that for the others.
    """

def nccl_id() -> bytes:
    """
    Make the id that rank 0 sends to the other ranks, which all pass it to nccl_comm().
    """

def parameter_table(config: GPT2Config) -> list[ParameterSpec]:
    """
    Return the parameters of a model, in the order of its file.
    """

def piece_of(numel: int, rank: int, size: int) -> tuple[int, int]:
    """
    Return [begin, end) of the elements that a rank owns of a tensor of which each of `size` ranks owns a piece.
    """

def sample(
    logits: typing.Annotated[numpy.typing.ArrayLike, numpy.float32],
    coin: float,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> int:
    """
    Choose a token from logits (V) f32 by a coin in [0, 1): csrc/core/sampler.h.
    """

def set_library_directories(directories: collections.abc.Sequence[str]) -> None:
    """
    Set the directories in which NVIDIA's libraries are looked for, besides the system's places.
    """

def set_tune_file(file: str) -> None:
    """
    Set the file in which CUDA backends made from now on keep the algorithms that tuning chose.
    """

def thread_comms(backends: collections.abc.Sequence[Backend]) -> list[Comm]:
    """
    Make one Comm for each CPU backend, to be used by a thread of its own.
    """

def token_ids(tokens: typing.Annotated[numpy.typing.ArrayLike, numpy.int32]) -> numpy.typing.NDArray[numpy.int32]:
    """
    Return token ids, in anything that NumPy reads, as an array of int32 of the same shape.
    """

def token_of(token_or_fault: int) -> int:
    """
    Return the token, or raise the Error that a fault stands for.
    """

def train_bpe(
    words: collections.abc.Sequence[bytes],
    counts: collections.abc.Sequence[int],
    size: int,
    progress: collections.abc.Callable[[int], None],
) -> list[bytes]:
    """
    Learn at most `size` tokens from words, bytes that occur counts times; progress is called now and then with the number of tokens so far: csrc/core/bpe.h.
    """

NORM_DIGITS: int = 40
UNIT_DIGIT: int = 20
__version__: str = "0.1.0"
compiler: str = "GNU 12.2.0"
