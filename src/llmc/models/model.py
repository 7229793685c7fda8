"""Model: what can be done with a model of any family, on a device."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmc import _llmc
from llmc.formats.model_file import write_model_file
from llmc.formats.stream import pieces
from llmc.models.config import ModelConfig
from llmc.models.generate import Session, generate, row_of_tokens
from llmc.system.fs import SYSTEM, Fs
from llmc.values import VALUE_DTYPES, canonical_dtype, check_seed, check_whole


def default_grad_dtype(device: str, dtype: str) -> str:
    """Return "f32" for a GPU, where it costs no speed that could be measured; dtype for a CPU, whose memory is slow."""
    return "f32" if device.startswith("cuda") else dtype


# Rows of logits that exist at a time. 16,384 make matmuls that a large GPU computes at its full speed; more do not help.
CPU_CLASSIFIER_ROWS, GPU_CLASSIFIER_ROWS = 1024, (16384, 4096, 1024)


def default_classifier_rows(backend: _llmc.Backend, config: ModelConfig, dtype: str) -> int:
    """Return the number for a model of which nothing more is known: on a GPU the most whose logits take a sixteenth of the free memory."""
    info = backend.info()
    if info.name == "cpu":
        return CPU_CLASSIFIER_ROWS
    fitting = info.free_bytes // 16 // (config.padded_vocab_size * VALUE_DTYPES[dtype].itemsize)
    return next((rows for rows in GPU_CLASSIFIER_ROWS if rows <= fitting), GPU_CLASSIFIER_ROWS[-1])


class Tensors(Mapping[str, NDArray[Any]]):
    """Parameters or gradients by llm.c's names, in file order.

    On the CPU an item is a view without a copy: writing into it writes into the model. While a view is alive the model must assume
    that it is written to, which costs a little speed in bf16. Elsewhere an item is a copy; assign to write:
    ``model.parameters["wte"] = array``. bf16 items have dtype ml_dtypes.bfloat16.
    """

    def __init__(self, model: Model, gradients: bool) -> None:
        self._model = model
        self._gradients = gradients
        self._names: list[str] = model._native.parameter_names()

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._names:
            raise KeyError(name)
        native = self._model._native
        dtype = VALUE_DTYPES[self._model.grad_dtype if self._gradients else self._model.dtype]
        if self._model.device == "cpu":
            view = native.gradient_view if self._gradients else native.parameter_view
            return view(name).view(dtype)
        return self._tensor(name).to_host().view(dtype)

    def __setitem__(self, name: str, value: ArrayLike) -> None:
        tensor = self._tensor(name)
        dtype = VALUE_DTYPES[tensor.dtype]
        array = np.ascontiguousarray(np.asarray(value).astype(dtype))
        if array.shape != tuple(tensor.shape):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, got {array.shape}")
        tensor.from_host(array.view(np.uint16) if tensor.dtype == "bf16" else array)
        self._model.weights_changed()

    def _tensor(self, name: str) -> _llmc.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._model._native.gradient(name) if self._gradients else self._model._native.parameter(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        kind, dtype = ("gradients", self._model.grad_dtype) if self._gradients else ("parameters", self._model.dtype)
        return f"Tensors({len(self)} {kind}, {dtype} on {self._model.device}: {', '.join(self)})"


class Activations(Mapping[str, NDArray[Any]]):
    """What the last forward() has left for backward(), by the names of csrc/model/gpt2.h, in the order in which it is computed.

    On the CPU an item is a view without a copy, into which the next forward(), evaluate() or logits() writes; elsewhere it is a
    copy. It may not be written to. It stays readable after the model is gone. What all layers have is stacked: "qkv" is
    (L, B, T, 3C). What backward() computes again is not there: "fch_gelu" is with recompute 0 alone, "ln1" and "ln2" with 0 and 1.
    bf16 items have dtype ml_dtypes.bfloat16.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._names: list[str] = model._native.activation_names()

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._names:
            raise KeyError(name)
        array: NDArray[Any] = self._model._native.activation(name)
        return array.view(VALUE_DTYPES["bf16"]) if array.dtype == np.uint16 else array

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"Activations({len(self)}, {self._model.dtype} on {self._model.device}: {', '.join(self)})"


class Model:
    """A model of any family on a device: the base of GPT2, which explains the options.

    Args:
        config: the model's shape.
        native: the extension's type of the family, made from the config, a backend and the options.
    """

    family: ClassVar[str]  # its name, for people
    _native: _llmc.Model

    def __init__(
        self,
        config: ModelConfig,
        native: Callable[[Any, _llmc.Backend, _llmc.ModelOptions], _llmc.Model],
        *,
        device: str,
        dtype: str,
        grad_dtype: str | None,
        recompute: int,
        classifier_rows: int | None,
        threads: int,
        seed: int | None,
        backend: _llmc.Backend | None,
    ) -> None:
        if not isinstance(config, ModelConfig):
            name = type(self).__name__
            raise TypeError(
                f"config is {config!r:.40}, expected a {name}Config; {name}.from_descriptor('d12') takes a name"
            )
        dtype = canonical_dtype(dtype)
        if seed is not None:
            check_seed(seed, 32)
        check_whole("threads", threads, 0, 1024)
        if backend is None:
            backend = _llmc.Backend(device, threads)
        elif (device, threads) != ("cpu", 0):
            raise ValueError(f"device '{device}' and threads {threads} are given beside a backend, which has its own")
        self.config = config
        grad_dtype = canonical_dtype(grad_dtype) if grad_dtype else default_grad_dtype(backend.info().name, dtype)
        if classifier_rows is None:
            classifier_rows = default_classifier_rows(backend, config, dtype)
        options = _llmc.ModelOptions(dtype, grad_dtype, recompute, classifier_rows)
        self._native = native(config.native(), backend, options)
        if seed is not None:
            self._native.init_weights(seed)

    def save(self, path: str | os.PathLike[str], *, fs: Fs = SYSTEM) -> None:
        """Write a llm.c file: version 3 for f32, 5 for bf16. The file appears whole or not at all.

        Args:
            path: the file.
            fs: the file system, for tests.

        Raises:
            OSError: if the file cannot be written. What was there before is untouched.
        """
        write_model_file(path, self.config.native(), self.dtype, pieces(self.all_parameters()), fs=fs)

    # ---- facts ----

    def __repr__(self) -> str:
        c = self.config
        return (
            f"{type(self).__name__}(layers={c.num_layers}, heads={c.num_heads}, channels={c.channels}, "
            f"max_seq_len={c.max_seq_len}, vocab_size={c.vocab_size}, {self.num_parameters:,} parameters, "
            f"{self.dtype}, {self.device})"
        )

    @property
    def backend(self) -> _llmc.Backend:
        """The device that the model lives on, with its ops and options."""
        return self._native.backend

    @property
    def device(self) -> str:
        """The device's name: "cpu", "cuda:0", ..."""
        return self.backend.info().name

    @property
    def dtype(self) -> str:
        """ "f32" or "bf16": of parameters and activations."""
        return self._native.options.dtype

    @property
    def grad_dtype(self) -> str:
        """ "f32" or "bf16": of the parameters' gradients."""
        return self._native.options.grad_dtype

    @property
    def recompute(self) -> int:
        """What backward computes again instead of keeping: 0 nothing, 1 GELU, 2 GELU and layernorm."""
        return self._native.options.recompute

    @property
    def classifier_rows(self) -> int:
        """Rows of logits that exist at a time."""
        return self._native.options.classifier_rows

    @property
    def num_parameters(self) -> int:
        """The number of elements of all parameters, padding included."""
        return self._native.num_parameters

    @property
    def parameters(self) -> Tensors:
        """The weights by llm.c's names, as NumPy arrays."""
        return Tensors(self, gradients=False)

    @property
    def gradients(self) -> Tensors:
        """Their gradients likewise; zeros if no backward() came after zero_grad()."""
        return Tensors(self, gradients=True)

    @property
    def activations(self) -> Activations:
        """What the last forward() has left for backward(), as NumPy arrays by name.

        Raises:
            llmc.Error: if there was no forward(), or evaluate() or logits() came after it, which keep the activations of no layer.
        """
        return Activations(self)

    def parameter_tensors(self) -> dict[str, _llmc.Tensor]:
        """Return the parameters by llm.c's names, in file order, as tensors in the device's memory.

        Whoever writes to one calls weights_changed() afterwards.
        """
        return {name: self._native.parameter(name) for name in self._native.parameter_names()}

    def gradient_tensors(self) -> dict[str, _llmc.Tensor]:
        """Return the parameters' gradients likewise; zeros if no backward() came after zero_grad()."""
        return {name: self._native.gradient(name) for name in self._native.parameter_names()}

    def all_parameters(self) -> _llmc.Tensor:
        """Return all parameters as one tensor (num_parameters): they lie in the order of llm.c's file, without gaps."""
        return self._native.all_parameters()

    def weights_changed(self) -> None:
        """Drop packed copies of the weights. Call after writing to a tensor of parameters; assignments to `parameters` do."""
        self._native.weights_changed()

    # ---- training ----

    def forward(self, inputs: ArrayLike) -> None:
        """Compute the activations that backward() needs.

        Args:
            inputs: (B, T) token ids, integers: an array, lists, or a tensor of PyTorch's on the CPU, as for all methods here.

        Raises:
            TypeError: if inputs are text.
            ValueError: if a token is outside of the vocabulary, or T is above max_seq_len.
        """
        self._native.forward(inputs)

    def backward(self, targets: ArrayLike, scale: float = 1.0, sink: _llmc.GradientSink | None = None) -> None:
        """Compute loss and gradients of the last forward(). Both add up over calls until zero_grad().

        Args:
            targets: (B, T), the token that follows each input; a negative one is ignored.
            scale: a factor of loss and gradients, 1/k for each of k micro-batches.
            sink: belongs to an update's last micro-batch. It takes each layer's gradients as soon as they are complete, while those
                of the layers below are computed, and then the loss. _llmc.AllReduce(comm) sums them over the ranks; scale is
                then 1/(k * comm.size).

        Raises:
            ValueError: if there was no forward(), targets have another shape than its inputs or a token outside of the
                vocabulary, or the sink is of another backend.
        """
        self._native.backward(targets, scale, sink)

    def zero_grad(self) -> None:
        """Begin a new update: gradients are zero again, and there is no mean_loss."""
        self._native.zero_grad()

    @property
    def mean_loss(self) -> float:
        """The sum of scale * mean loss over the backward() calls since zero_grad(). Waits for the device.

        Raises:
            llmc.Error: if there was no backward(): forward() has no targets, and so no loss.
        """
        return self._native.loss()

    # ---- evaluation ----

    def evaluate(self, inputs: ArrayLike, targets: ArrayLike) -> float:
        """Return the mean cross-entropy, in nats per token, without gradients and in the memory of one layer.

        Args:
            inputs, targets: (B, T) token ids; a negative target counts as a loss of 0.
        """
        return float(self._native.evaluate(inputs, targets))

    def token_losses(self, inputs: ArrayLike, targets: ArrayLike) -> NDArray[np.float32]:
        """Return the cross-entropy of each token, (B, T) f32; 0 for a negative target."""
        losses: NDArray[np.float32] = self._native.evaluate(inputs, targets, by_token=True)
        return losses

    def logits(self, inputs: ArrayLike) -> NDArray[np.float32]:
        """Return the logits, (B, T, vocab_size) f32. For a long batch this is large: B * T * V * 4 bytes."""
        return self._native.logits(inputs)

    # ---- generation ----

    def kv_cache(self, sequences: int, max_len: int) -> _llmc.KVCache:
        """Return an empty cache for generation step by step, for `sequences` of max_len positions; generate() makes its own."""
        return _llmc.KVCache(self._native, sequences, max_len)

    @overload
    def generate(
        self,
        prompts: Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 1337,
        stop_token: int | Sequence[int] | None = None,
    ) -> list[int]: ...

    @overload
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 1337,
        stop_token: int | Sequence[int] | None = None,
    ) -> list[list[int]]: ...

    @overload
    def generate(
        self,
        prompts: NDArray[Any],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 1337,
        stop_token: int | Sequence[int] | None = None,
    ) -> list[Any]: ...

    def generate(
        self,
        prompts: Sequence[int] | Sequence[Sequence[int]] | NDArray[Any],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 1337,
        stop_token: int | Sequence[int] | None = None,
    ) -> list[int] | list[list[int]]:
        """Continue one prompt, or several in one batch.

        Keys and values are cached. When max_seq_len positions are full, the last max_seq_len // 2 tokens are encoded again at
        positions from 0 on, and generation goes on from there: positions are learned, so older context cannot be kept.

        Args:
            prompts: token ids of one prompt, or a list of such; an array (n,), or (B, n) for B prompts.
            max_new_tokens: how many tokens to generate for each.
            temperature: 0 takes the most likely token.
            top_k: how many of the most likely tokens to choose from; 0 for no limit.
            top_p: nucleus sampling; 1 for no limit.
            seed: of llm.c's xorshift*, 1 to 2^64 - 1. Prompt i of a batch draws from seed + i, so its text does not depend on its
                neighbours.
            stop_token: ends a sequence, and is not returned; of several the first that comes.

        Returns:
            The new tokens, of each prompt if there are several.

        Raises:
            TypeError: if a prompt is text.
            ValueError: if a prompt is empty, a token is not in the vocabulary, or an option is out of its range.
        """
        if isinstance(prompts, (list, tuple)):  # whose rows may differ in length
            several = len(prompts) > 0 and _is_row(prompts[0])
        else:
            prompts = _llmc.token_ids(prompts)
            several = prompts.ndim > 1
        batch = [_prompt(p) for p in (prompts if several else [prompts])]
        new: list[list[int]] = [[] for _ in batch]
        for step in generate(self._native, batch, max_new_tokens, temperature, top_k, top_p, seed, stop_token):
            new = step
        return new if several else new[0]

    def stream(
        self,
        prompt: Sequence[int] | NDArray[Any],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 1337,
        stop_token: int | Sequence[int] | None = None,
    ) -> Iterator[int]:
        """Return an iterator over what generate() returns for one prompt, which yields each token when it is found.

        Raises:
            TypeError, ValueError: as of generate(), and at once, if an argument is wrong.
        """
        steps = generate(self._native, [_prompt(prompt)], max_new_tokens, temperature, top_k, top_p, seed, stop_token)
        return (new[-1] for count, (new,) in enumerate(steps) if len(new) > count)

    def session(
        self,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 1337,
        stop_token: int | Sequence[int] | None = None,
    ) -> Session:
        """Return an empty text that grows turn by turn, with a cache that is kept between turns; arguments and errors as of generate()."""
        return Session(self._native, temperature, top_k, top_p, seed, stop_token)


def _is_row(item: Any) -> bool:
    return isinstance(item, (list, tuple)) or getattr(item, "ndim", 0) > 0


def _prompt(tokens: ArrayLike) -> NDArray[np.int32]:
    ids = row_of_tokens(tokens)
    if ids.size == 0:
        raise ValueError("the prompt is empty: start from the end-of-text token, [tokenizer.eot_token]")
    return ids
