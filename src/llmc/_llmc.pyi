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
    "AdamW",
    "AdamWStep",
    "AllReduce",
    "Backend",
    "Comm",
    "DataLoader",
    "DeviceInfo",
    "Error",
    "GPT2Config",
    "GradientSink",
    "KVCache",
    "MemoryPlan",
    "Model",
    "ModelOptions",
    "Mt19937",
    "ParameterSpec",
    "SamplerOptions",
    "ShardInfo",
    "Tensor",
    "Tokenizer",
    "XorShift",
    "checkpoint_header",
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
    "sample",
    "set_library_directories",
    "thread_comms",
    "token_of",
]

class Error(RuntimeError):
    pass

class DeviceInfo:
    """
    What a backend says of its device.
    """
    @property
    def clock_hz(self) -> float: ...
    @property
    def description(self) -> str: ...
    @property
    def fallbacks(self) -> str: ...
    @property
    def free_bytes(self) -> int: ...
    @property
    def isa(self) -> str: ...
    @property
    def multiprocessors(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def options(self) -> str: ...
    @property
    def pinning(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def total_bytes(self) -> int: ...

class Tensor:
    """
    A contiguous array in a backend's memory. dtype: 'f32', 'bf16', 'i32' or 'i16'.
    """
    def __getitem__(self, i: int) -> Tensor:
        """
        Row i, of one extent less: the same memory.
        """
    def __repr__(self) -> str: ...
    def from_host(self, host: numpy.typing.NDArray[typing.Any]) -> None:
        """
        Copies an array of the same size in; bf16 as uint16.
        """
    def read(self, begin: int, count: int) -> numpy.typing.NDArray[typing.Any]:
        """
        A copy of some elements in row-major order, as a NumPy array. Waits.
        """
    def to_host(self, out: numpy.typing.NDArray[typing.Any] | None = None) -> numpy.typing.NDArray[typing.Any]:
        """
        A copy as a NumPy array, a new one or `out`; bf16 as uint16. Waits for the device.
        """
    def write(self, begin: int, host: numpy.typing.NDArray[typing.Any]) -> None:
        """
        Copies elements in, from `begin` on in row-major order.
        """
    @property
    def dtype(self) -> str: ...
    @property
    def numel(self) -> int: ...
    @property
    def shape(self) -> tuple[typing.Any, ...]: ...

class AdamWStep:
    """
    Everything that the host knows of one AdamW step.
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
    ) -> None: ...

class SamplerOptions:
    """
    How a token is chosen: csrc/core/sampler.h.
    """
    def __init__(self, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> None: ...

class Backend:
    """
    A device and its ops. Formulas, shapes and accumulation rules: csrc/core/backend.h.
    """
    def __init__(self, device: str = "cpu", threads: int = 0) -> None: ...
    def adamw(
        self, param: Tensor, master: Tensor, m: Tensor, v: Tensor, grad: Tensor, factor: Tensor, step: AdamWStep
    ) -> None: ...
    def attention_backward(
        self, dqkv: Tensor, dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, NH: int
    ) -> None: ...
    def attention_decode(
        self, out: Tensor, kcache: Tensor, vcache: Tensor, qkv: Tensor, start: Tensor, NH: int
    ) -> None: ...
    def attention_forward(self, out: Tensor, lse: Tensor, qkv: Tensor, NH: int) -> None: ...
    def clip_factor(self, norm: Tensor, factor: Tensor, norm_squared: Tensor, max_norm: float) -> None: ...
    def copy(self, out: Tensor, inp: Tensor) -> None: ...
    def crossentropy_forward(self, losses: Tensor, logits: Tensor, targets: Tensor, V: int) -> None: ...
    def crossentropy_softmax_backward(self, logits: Tensor, targets: Tensor, dloss: float, V: int) -> None: ...
    def empty(self, shape: collections.abc.Sequence[int], dtype: str = "f32") -> Tensor:
        """
        A new tensor, filled with zeros.
        """
    def encoder_backward(self, dwte: Tensor, dwpe: Tensor, dout: Tensor, inp: Tensor) -> None: ...
    def encoder_forward(
        self, out: Tensor, inp: Tensor, wte: Tensor, wpe: Tensor, start: Tensor | None = None
    ) -> None: ...
    def fused_classifier(self, losses: Tensor, logits: Tensor, targets: Tensor, dloss: float, V: int) -> None: ...
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
    ) -> None: ...
    def gelu_backward(self, dinp: Tensor, inp: Tensor, dout: Tensor) -> None: ...
    def gelu_forward(self, out: Tensor, inp: Tensor) -> None: ...
    def global_norm_squared(self, out: Tensor, inp: Tensor) -> None: ...
    def info(self) -> DeviceInfo: ...
    def layernorm_backward(
        self,
        dinp: Tensor,
        dweight: Tensor,
        dbias: Tensor,
        dout: Tensor,
        inp: Tensor,
        weight: Tensor,
        mean: Tensor,
        rstd: Tensor,
    ) -> None: ...
    def layernorm_forward(
        self, out: Tensor, mean: Tensor, rstd: Tensor, inp: Tensor, weight: Tensor, bias: Tensor
    ) -> None: ...
    def matmul_backward(
        self,
        dinp: Tensor,
        dweight: Tensor,
        dbias: Tensor,
        dout: Tensor,
        inp: Tensor,
        weight: Tensor,
        accumulate: bool = True,
    ) -> None: ...
    def matmul_forward(self, out: Tensor, inp: Tensor, weight: Tensor, bias: Tensor | None = None) -> None: ...
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
    ) -> None: ...
    def matmul_gelu_forward(
        self, out: Tensor, pre: Tensor, inp: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> None: ...
    def residual_forward(self, out: Tensor, a: Tensor, b: Tensor) -> None: ...
    def sample(self, tokens: Tensor, logits: Tensor, coins: Tensor, V: int, options: SamplerOptions) -> None: ...
    def set_option(self, name: str, value: str) -> None:
        """
        A choice that the backend offers, as ('attention', 'flash') of 'cuda': doc/cuda.md.
        """
    def sum(self, out: Tensor, inp: Tensor, scale: float = 1.0) -> None: ...
    def synchronize(self) -> None: ...
    def weights_changed(self, weights: Tensor) -> None:
        """
        Call once for memory that holds weights, and again after writing them by any other way than zero, copy, from_host or adamw: packed copies of this memory are dropped.
        """
    def workspace_bytes(self, B: int, T: int, C: int, NH: int, dtype: str) -> int:
        """
        Bytes that the ops of a training step take for themselves, beside the tensors that they are given.
        """
    def zero(self, x: Tensor) -> None: ...
    @property
    def runs_ahead(self) -> bool:
        """
        Ops are only queued, so that the host may be ahead of them.
        """

class Comm:
    """
    The ranks that train one model together. Meaning of each call: csrc/comm/comm.h.
    """
    def all_gather(self, full: Tensor, shard: Tensor) -> None: ...
    def all_reduce(self, xs: collections.abc.Sequence[Tensor]) -> None: ...
    def barrier(self) -> None: ...
    def broadcast(self, x: Tensor, root: int = 0) -> None: ...
    def reduce_scatter(self, shard: Tensor, full: Tensor) -> None: ...
    def sum(self, x: collections.abc.Sequence[float]) -> list[float]:
        """
        The sums over all ranks.
        """
    def wait(self) -> None: ...
    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...

class GradientSink:
    """
    Takes gradients as backward() completes them: csrc/comm/gradient_sink.h.
    """

class AllReduce(GradientSink):
    """
    Gives every rank of a Comm the sums of all gradients and of the loss.
    """
    def __init__(self, comm: Comm) -> None: ...

class ParameterSpec:
    """
    A row of a model's table of parameters: csrc/model/parameters.h.
    """
    @property
    def decay(self) -> bool: ...
    @property
    def name(self) -> str: ...
    @property
    def padding(self) -> int: ...
    @property
    def per_layer(self) -> bool: ...
    @property
    def shape(self) -> tuple[typing.Any, ...]: ...

class MemoryPlan:
    """
    Bytes by purpose.
    """
    @property
    def activations(self) -> int: ...
    @property
    def gradients(self) -> int: ...
    @property
    def optimizer(self) -> int: ...
    @property
    def parameters(self) -> int: ...
    @property
    def total(self) -> int: ...

class ModelOptions:
    """
    How a model is computed: csrc/model/options.h.
    """
    def __init__(
        self, dtype: str = "f32", grad_dtype: str = "f32", recompute: int = 1, classifier_rows: int = 1024
    ) -> None: ...
    @property
    def classifier_rows(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def grad_dtype(self) -> str: ...
    @property
    def recompute(self) -> int: ...

class Model:
    """
    What every family of models offers: csrc/model/model.h.
    """
    def all_parameters(self) -> Tensor: ...
    def backward(
        self,
        targets: typing.Annotated[numpy.typing.ArrayLike, numpy.int32],
        scale: float = 1.0,
        sink: GradientSink | None = None,
    ) -> None: ...
    def evaluate(
        self,
        inputs: typing.Annotated[numpy.typing.ArrayLike, numpy.int32],
        targets: typing.Annotated[numpy.typing.ArrayLike, numpy.int32],
        by_token: bool = False,
    ) -> typing.Any: ...
    def forward(self, inputs: typing.Annotated[numpy.typing.ArrayLike, numpy.int32]) -> None: ...
    def gradient(self, name: str) -> Tensor: ...
    def gradient_view(self, name: str) -> numpy.typing.NDArray[typing.Any]: ...
    def init_weights(self, seed: int = 42) -> None: ...
    def logits(
        self, inputs: typing.Annotated[numpy.typing.ArrayLike, numpy.int32]
    ) -> numpy.typing.NDArray[numpy.float32]: ...
    def loss(self) -> float: ...
    def parameter(self, name: str) -> Tensor: ...
    def parameter_names(self) -> list[str]: ...
    def parameter_view(self, name: str) -> numpy.typing.NDArray[typing.Any]: ...
    def weights_changed(self) -> None: ...
    def zero_grad(self) -> None: ...
    @property
    def backend(self) -> Backend: ...
    @property
    def max_seq_len(self) -> int: ...
    @property
    def num_parameters(self) -> int: ...
    @property
    def options(self) -> ModelOptions: ...
    @property
    def vocab_size(self) -> int: ...

class KVCache:
    """
    Keys and values of the positions seen so far, and generation by means of them.
    """
    def __init__(self, model: Model, B: int, max_len: int) -> None: ...
    def clear(self, b: int) -> None: ...
    def decode(
        self, tokens: typing.Annotated[numpy.typing.ArrayLike, numpy.int32]
    ) -> numpy.typing.NDArray[numpy.float32]:
        """
        Append a token to every sequence; return the logits (B, vocab_size) after it.
        """
    def length(self, b: int) -> int: ...
    def prefill(
        self, b: int, tokens: typing.Annotated[numpy.typing.ArrayLike, numpy.int32]
    ) -> numpy.typing.NDArray[numpy.float32]:
        """
        Append tokens to sequence b; return the logits (vocab_size) after the last of them.
        """
    def queue_tokens(
        self,
        tokens: typing.Annotated[numpy.typing.ArrayLike, numpy.int32] | None,
        coins: typing.Annotated[numpy.typing.ArrayLike, numpy.float32],
        options: SamplerOptions,
    ) -> None:
        """
        decode(), and choose a token from each sequence's logits, without waiting. tokens None: go on from those chosen last.
        """
    def read_tokens(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        The tokens of the oldest queue_tokens() not read yet; negative: faults, see token_of().
        """
    @property
    def B(self) -> int: ...
    @property
    def backend(self) -> Backend: ...
    @property
    def bytes(self) -> int: ...
    @property
    def max_len(self) -> int: ...

class GPT2Config:
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
    def channels(self) -> int: ...
    @property
    def max_seq_len(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def padded_vocab_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...

class GPT2(Model):
    """
    The schedule of csrc/model/gpt2.cpp. llmc.GPT2 stands over it.
    """
    def __init__(self, config: GPT2Config, backend: Backend, options: ModelOptions) -> None: ...
    def load_checkpoint(self, path: os.PathLike[str] | str | bytes) -> None: ...
    def save_checkpoint(self, path: os.PathLike[str] | str | bytes) -> None: ...
    @property
    def config(self) -> GPT2Config: ...

class AdamW:
    """
    The optimizer of csrc/optim/adamw.h. llmc.AdamW stands over it.
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
    ) -> None: ...
    def apply(self, lr: float) -> None: ...
    def measure(self) -> float:
        """
        The gradients' global norm before clipping. Waits.
        """
    def norm(self) -> float: ...
    def state(self) -> dict[str, typing.Any]:
        """
        name -> (m, v, master) as Tensors; master is None for f32 parameters.
        """
    def step(self, lr: float) -> None: ...
    @property
    def bytes(self) -> int: ...
    @property
    def rng_state(self) -> int: ...
    @rng_state.setter
    def rng_state(self, arg1: int) -> None: ...
    @property
    def step_count(self) -> int: ...
    @step_count.setter
    def step_count(self, arg1: int) -> None: ...

class ShardInfo:
    @property
    def path(self) -> pathlib.Path: ...
    @property
    def token_bytes(self) -> int: ...
    @property
    def tokens(self) -> int: ...

class DataLoader:
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
    def next_batch(self) -> tuple[numpy.typing.NDArray[numpy.int32], numpy.typing.NDArray[numpy.int32]]: ...
    def reset(self) -> None: ...
    def set_state(self, state: dict[str, typing.Any]) -> None: ...
    def state(self) -> dict[str, typing.Any]: ...
    @property
    def B(self) -> int: ...
    @property
    def T(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def shards(self) -> list[ShardInfo]: ...

class Mt19937:
    """
    PyTorch's CPU generator.
    """
    def __init__(self, seed: int) -> None: ...
    def normal(self, n: int, mean: float = 0.0, std: float = 1.0) -> numpy.typing.NDArray[numpy.float32]: ...
    def permutation(self, n: int) -> list[int]: ...
    def randint32(self) -> int: ...

class XorShift:
    """
    xorshift*, the coin of sampling.
    """
    def __init__(self, seed: int = 1337) -> None: ...
    def randfloat32(self) -> float: ...
    def randint32(self) -> int: ...
    @property
    def state(self) -> int: ...
    @state.setter
    def state(self, arg0: int) -> None: ...

class Tokenizer:
    """
    A llm.c tokenizer file, for decoding.
    """
    def __init__(self, path: os.PathLike[str] | str | bytes) -> None: ...
    def decode(self, token: int) -> bytes: ...
    @property
    def eot_token(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...

def checkpoint_header(config: GPT2Config, dtype: str) -> bytes:
    """
    The 1024 bytes that a llm.c model file begins with.
    """

def config_from_descriptor(descriptor: str) -> GPT2Config: ...
def cpu_peak_flops(dtype: str, threads: int = 0) -> float:
    """
    FLOP/s of the kernel set in use on registers alone, measured in about 60 ms.
    """

def cuda_built() -> bool:
    """
    Whether this build has the CUDA backend.
    """

def cuda_status() -> str:
    """
    The CUDA libraries and devices found, or why there are none.
    """

def default_threads() -> int:
    """
    CPU threads used by default: OMP_NUM_THREADS, else what the process may use.
    """

def inspect_checkpoint(path: os.PathLike[str] | str | bytes) -> tuple[GPT2Config, str, int]:
    """
    (config, dtype, number of parameters) of a llm.c model file.
    """

def inspect_shard(path: os.PathLike[str] | str | bytes) -> ShardInfo:
    """
    Opens and checks one token file.
    """

def isa() -> dict[str, typing.Any]:
    """
    The kernel sets in this build, those that run here, and the one used (LLMC_ISA forces one).
    """

def memory_plan(
    config: GPT2Config, options: ModelOptions, B: int, T: int, training: bool = True, master_weights: bool = True
) -> MemoryPlan:
    """
    The memory that a model takes for batches of (B, T), and its optimizer.
    """

def nccl_comm(backend: Backend, rank: int, size: int, id: str) -> Comm:
    """
    A Comm over NCCL; returns when every rank has called it.
    """

def nccl_id() -> bytes:
    """
    Made by rank 0, needed by every rank.
    """

def parameter_table(config: GPT2Config) -> list[ParameterSpec]:
    """
    The parameters of a model, in the order of its file.
    """

def sample(
    logits: typing.Annotated[numpy.typing.ArrayLike, numpy.float32],
    coin: float,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> int: ...
def set_library_directories(directories: collections.abc.Sequence[str]) -> None:
    """
    Where NVIDIA's libraries are looked for, besides the system's places.
    """

def thread_comms(backends: collections.abc.Sequence[Backend]) -> list[Comm]:
    """
    A Comm per CPU backend, for as many threads of this process.
    """

def token_of(token_or_fault: int) -> int:
    """
    The token, or the Error that a fault stands for.
    """

__version__: str = ""
compiler: str = "GNU 12.2.0"
