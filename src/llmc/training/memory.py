"""What a run needs of memory, before any of it is allocated."""

from __future__ import annotations

from llmc import _llmc
from llmc.models.config import GPT2Config
from llmc.system.memory import available_memory


def check_memory(
    backend: _llmc.Backend,
    config: GPT2Config,
    *,
    dtype: str,
    grad_dtype: str,
    B: int,
    T: int,
    recompute: int | None,
    classifier_rows: int | None,
    master_weights: bool,
) -> tuple[_llmc.MemoryPlan, int, int]:
    """Estimates a training run's memory before any of it is allocated. MemoryError, with what would help, where it does not fit.

    Returns the plan, recompute and classifier_rows. The two, if None, are a CPU's constants, or on a GPU what is fastest in the
    memory that there is: it is best used up, while a computer's is shared.
    """
    on_cpu = backend.info().name == "cpu"
    levels = (recompute,) if recompute is not None else (1,) if on_cpu else (0, 1, 2)
    chunks = (classifier_rows,) if classifier_rows is not None else (1024,) if on_cpu else (16384, 4096, 1024)

    def plan(B: int, recompute: int, rows: int = chunks[-1]) -> _llmc.MemoryPlan:
        options = _llmc.ModelOptions(dtype, grad_dtype, recompute, rows)
        return _llmc.memory_plan(config.native(), options, B, T, True, master_weights)

    def workspace(B: int) -> int:
        return backend.workspace_bytes(B, T, config.channels, config.num_heads, dtype)

    def fits(B: int, recompute: int, rows: int = chunks[-1]) -> bool:
        return plan(B, recompute, rows).total + workspace(B) <= free

    free = available_memory(backend)
    if backend.info().isa == "amx" and dtype == "bf16":  # keeps weights packed, for both directions
        free -= 2 * plan(B, levels[0]).parameters
    for level in levels:
        for rows in chunks:
            if fits(B, level, rows):
                return plan(B, level, rows), level, rows
    recompute = levels[-1]
    needed = plan(B, recompute)
    largest = next((b for b in range(B - 1, 0, -1) if fits(b, recompute)), 0)
    advice = []
    if largest:
        advice.append(f"--batch-size {largest} fits (give --total-batch-size {B * T} to keep the update the same)")
    elif fits(1, 2):
        advice.append("--batch-size 1 --recompute 2 fits")
    if recompute < 2 and fits(B, 2):
        advice.append("--recompute 2 fits")
    if dtype == "f32":
        advice.append("--dtype bf16 needs about half")
    gb = 1e9
    raise MemoryError(
        f"this run needs {(needed.total + workspace(B)) / gb:.2f} GB on {backend.info().name}, {free / gb:.2f} GB are free: "
        f"parameters {needed.parameters / gb:.2f}, gradients {needed.gradients / gb:.2f}, optimizer {needed.optimizer / gb:.2f}, "
        f"activations {needed.activations / gb:.2f}, workspace {workspace(B) / gb:.2f} (B = {B}, T = {T}). "
        + ("; ".join(advice) if advice else "Choose a smaller model.")
    )


def largest_batch(backend: _llmc.Backend, plan: _llmc.MemoryPlan, B: int) -> int:
    """The largest B that fits in what is free now, beside a model whose plan (for B) is allocated already."""
    return B + int(available_memory(backend) / (plan.activations / B))
