"""What `llmc check` checks on a device: its kernels as they are chosen, and on a GPU with every value of every option."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from llmc import _llmc
from llmc.models.config import GPT2Config
from llmc.models.gpt2 import GPT2
from llmc.selfcheck.cases import UNIT, Case, Result
from llmc.selfcheck.formulas import Array
from llmc.selfcheck.ops import Cases
from llmc.selfcheck.run import Outcome, failed, get, judged, run_case
from llmc.selfcheck.step import check_step, check_threads, exact_step, limit_of_norms

# No extent is a multiple of 8; heads and channels of sizes that all kernels take; the width of 124M.
ODD = GPT2Config(max_seq_len=19, vocab_size=61, num_layers=2, num_heads=3, channels=33)
EVEN = GPT2Config(max_seq_len=64, vocab_size=300, num_layers=1, num_heads=2, channels=128)
WIDE = GPT2Config(max_seq_len=64, vocab_size=1003, num_layers=1, num_heads=12, channels=768)
BATCHES = {ODD: (3, 19), EVEN: (1, 64), WIDE: (2, 64)}
LARGE = GPT2Config(num_layers=2), 8, 1024

# The ops that an option bears upon, by the beginnings of their names. One that is not here is tried with all that have options.
OPS = {
    "attention": ("attention",),
    "deterministic": ("attention",),
    "tf32": (),  # these are judged by a step and generation: matmuls in TF32 are not those of f32
    "graphs": (),
    "overlap": (),
    "tune": ("matmul",),
    "fused_gelu": ("matmul_gelu",),
    "bias_gradient": ("matmul_backward", "matmul_gelu_backward"),
}
# Sizes that are enough for options which cost tenths of a second for each: cuDNN's plans, and timing. (What is deterministic is
# cuDNN's backward; of these sizes it alone is cuDNN's if attention is auto.)
FEW = {"deterministic": ("1x128x1x128",), "tune": ("64x48x96", "130x257x129"),
       "attention=cudnn": ("1x65x2x64", "2x64x2x64", "1x97x1x96", "1x128x1x128", "1x1024x1x64")}  # fmt: skip
# The relative error of an f32 activation that an option brings with it: operands of 11 bits, and cuBLASLt's less exact tanh, by which
# an H100's gradients are off by 2.6e-6 in the norm, and by some 2e-5 in the worst element.
UNITS = {"tf32=on": 2.0**-11, "fused_gelu=on": 2.0**-18}
TANH = 2.0**-14


@dataclass(frozen=True)
class Kernels:
    """A backend, and which of its kernels are meant.

    Attributes:
        backend: an _llmc.Backend.
        name: the kernel set, or the option that is changed, as "attention=flash".
        option: the option's name and value; None for the backend as it is.
    """

    backend: Any
    name: str
    option: tuple[str, str] | None = None

    def takes(self, case: Case) -> bool:
        """Return whether the case may tell these kernels from those without the option."""
        if self.option is None:
            return True
        name = self.option[0]
        few = FEW.get(self.name, FEW.get(name, (case.size,)))
        of_size = case.size in few and (name == "attention" or not case.real)
        return of_size and case.op.startswith(OPS.get(name, ("attention", "matmul")))

    def slack(self, dtype: str) -> dict[str, float]:
        """Return what the options as they are take off from the precision of an op of this dtype: Result.slack says of what."""
        options, on_gpu = options_of(self.backend), self.backend.info().name != "cpu"
        fused = ("on",) if dtype == "f32" else ("on", "auto")
        # cuBLASLt rounds a product to bf16 before it adds a bias, or what is there, and rounds again.
        rounds_twice = options.get("bias_gradient") == "product" or (on_gpu and not is_emulated(self.backend))
        return {"tanh": TANH * (options.get("fused_gelu") in fused), "sum": UNIT["bf16"] * rounds_twice}

    @contextmanager
    def chosen(self) -> Iterator[None]:
        """Set the option, and set it back afterwards."""
        if self.option is None:
            yield
            return
        name, value = self.option
        before = options_of(self.backend)[name]
        self.backend.set_option(name, value)
        try:
            yield
        finally:
            self.backend.set_option(name, before)


def loosened(case: Case, slack: dict[str, float]) -> Case:
    """Return the case with the limits that such kernels need."""

    def of(result: Result) -> Result:
        units = {**slack, "sum": slack["sum"] * (result.dtype == "bf16")}
        return replace(result, limit=result.limit + sum(units[name] * x for name, x in result.slack.items()))

    return replace(case, operands=[of(o) if isinstance(o, Result) and o.slack else o for o in case.operands])


def options_of(backend: Any) -> dict[str, str]:
    """Return the backend's options and their values, without the remarks in brackets."""
    options: str = backend.info().options
    return dict(pair.split(" ")[:2] for pair in options.split(", ") if " " in pair)


def option_values(backend: Any, name: str) -> list[str]:
    """Return all values that an option takes. They are read from the error message about a wrong value."""
    try:
        backend.set_option(name, "?")
    except ValueError as e:
        _, colon, values = str(e).partition("expected one of: ")
        return values.split(", ") if colon else []
    return []


def with_options(backend: Any) -> tuple[list[Kernels], list[str]]:
    """Return the kernels that each value of each option chooses, and why others cannot be used here."""
    kernels, absent = [], []
    options = options_of(backend)
    if "tune" in options:  # what is timed here has sizes that no model has: the user's file keeps none of it
        backend.set_option("tune_file", "")
    for name, current in options.items():
        for value in option_values(backend, name):
            if value == current:
                continue
            one = Kernels(backend, f"{name}={value}", (name, value))
            try:
                with one.chosen():
                    kernels.append(one)
            except _llmc.Error as e:
                absent.append(f"{one.name}: {e}")
    return kernels, absent


def open_libraries(backend: Any) -> None:
    """Do a matmul, which needs cuBLASLt on a GPU, so that a library which is missing is not taken for a wrong kernel.

    Raises:
        llmc.Error: if a library is missing; the message names the package that brings it.
    """
    rows = 17  # fewer have a kernel of their own
    backend.matmul_forward(backend.empty([rows, 8]), backend.empty([rows, 8]), backend.empty([8, 8]), None)


def is_emulated(backend: Any) -> bool:
    """Return whether the device is dev/cuda_emulation, which is too slow for real sizes."""
    return "emulated" in backend.info().description


@contextmanager
def forced_isa(isa: str | None) -> Iterator[None]:
    """Let CPU backends that are made meanwhile use a kernel set; None for the choice that stands."""
    before = os.environ.get("LLMC_ISA")
    if isa is not None:
        os.environ["LLMC_ISA"] = isa
    try:
        yield
    finally:
        if isa is not None:
            os.environ.pop("LLMC_ISA")
            if before is not None:
                os.environ["LLMC_ISA"] = before


def cpu_backend(isa: str | None, threads: int) -> _llmc.Backend:
    """Return a CPU backend with a kernel set; None for the one that would be chosen."""
    with forced_isa(isa):
        return _llmc.Backend("cpu", threads)


def check(kernels: Sequence[Kernels], dtypes: Sequence[str], seed: int) -> Iterator[list[Outcome]]:
    """Check kernels of one device. It ends early if the device takes no more calls.

    Args:
        kernels: what to check. What is right is computed once for all of them.
        dtypes: "f32", "bf16" or both.
        seed: of the random inputs.

    Yields:
        The outcomes of a group of related ops; then those of training steps.
    """
    for group in _groups(kernels, dtypes, seed):
        outcomes = []
        for outcome in group:
            outcomes.append(outcome)
            if outcome.fatal:
                yield outcomes
                return
        yield outcomes


def _groups(kernels: Sequence[Kernels], dtypes: Sequence[str], seed: int) -> Iterator[Iterator[Outcome]]:
    backend = kernels[0].backend
    emulated, on_gpu = is_emulated(backend), backend.info().name != "cpu"
    for dtype in dtypes:
        for group in Cases(dtype, seed).groups():
            yield _run(kernels, dtype, (case for case in group if not (emulated and case.real)))
    for dtype in dtypes:
        yield _steps(kernels, [c for c in BATCHES if not (emulated and c is WIDE)], dtype, seed, threads=not on_gpu)
    if on_gpu and not emulated and "bf16" in dtypes:
        yield beside_simple(kernels, *LARGE)


def _steps(
    kernels: Sequence[Kernels], configs: Sequence[GPT2Config], dtype: str, seed: int, threads: bool
) -> Iterator[Outcome]:
    for config in configs:
        exact = exact_step(config, dtype, *BATCHES[config], seed)
        for k in kernels:
            if k.option is None or config is EVEN:
                with k.chosen():
                    yield from check_step(k.backend, exact, k.name, UNITS.get(k.name, 0.0))
            if threads and config is ODD:
                yield check_threads(exact, k.name, partial(cpu_backend, k.name))


def _run(kernels: Sequence[Kernels], dtype: str, cases: Iterable[Case]) -> Iterator[Outcome]:
    plain = [(k, k.slack(dtype)) for k in kernels if k.option is None]
    kept = []  # of the cases for options, because to set one takes a while: large cases are not among them
    for case in cases:
        for k, slack in plain:
            yield from run_case(k.backend, loosened(case, slack), k.name)
        if any(k.option and k.takes(case) for k in kernels):
            kept.append(case)
    for k in kernels:
        if k.option and kept:
            with k.chosen():
                slack = k.slack(dtype)
                for case in filter(k.takes, kept):
                    yield from run_case(k.backend, loosened(case, slack), k.name)


def beside_simple(kernels: Sequence[Kernels], config: GPT2Config, B: int, T: int) -> Iterator[Outcome]:
    """Compare the gradients of a step in bf16 with those by attention=simple, at a size that NumPy would need minutes for."""
    simple = [k for k in kernels if k.name == "attention=simple"]
    others = [k for k in kernels if k.option is None or (k.option[0] == "attention" and k not in simple)]
    rng = np.random.default_rng(0)
    inputs, targets = (rng.integers(0, config.vocab_size, (B, T), dtype=np.int32) for _ in range(2))
    size, op = f"{B}x{T}x{config.channels}", "step beside simple"
    limit = 2**0.5 * limit_of_norms(config, UNIT["bf16"])  # both have errors
    right: dict[str, Array] = {}
    for k in [*simple, *(others if simple else [])]:
        try:
            with k.chosen():
                model = GPT2(config, dtype="bf16", backend=k.backend)
                model.zero_grad()
                model.forward(inputs)
                model.backward(targets)
                found = {name: get(tensor).astype(np.float32) for name, tensor in model.gradient_tensors().items()}
                found["loss"] = np.array(model.mean_loss)
        except Exception as e:  # whatever it is, the other kernels are still checked
            yield failed(k.backend, op, k.name, "bf16", size, e)
            continue
        right = right or found
        for name, x in found.items():
            error = float(np.linalg.norm(x - right[name]) / np.linalg.norm(right[name]))
            if k not in simple:
                what = f"gradient of {name}" if x.shape else name
                yield judged(op, k.name, "bf16", size, what, [error], [0.0], limit)
