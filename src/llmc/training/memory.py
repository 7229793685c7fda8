"""How much memory a training run needs, computed before any of it is allocated."""

from __future__ import annotations

from llmc import _llmc
from llmc.models.config import ModelConfig
from llmc.models.model import CPU_CLASSIFIER_ROWS, GPU_CLASSIFIER_ROWS
from llmc.system.memory import available_memory


def check_memory(
    backend: _llmc.Backend,
    config: ModelConfig,
    *,
    dtype: str,
    grad_dtype: str,
    B: int,
    T: int,
    recompute: int | None,
    classifier_rows: int | None,
    optimizer_bytes: int,
    total_batch_size: int,
    ranks: int = 1,
    sharing: int = 1,
) -> tuple[_llmc.MemoryPlan, int, int]:
    """Check that a training run fits in memory, and choose recompute and classifier_rows if they are None.

    On a CPU they are constants then, because its memory is shared with other programs. On a GPU they are the fastest that fit.

    Args:
        backend: the device, with the run's options.
        config: the shape of the model.
        dtype, grad_dtype: of parameters and activations, and of gradients: "f32" or "bf16".
        B, T: rows and tokens per row of a micro-batch.
        recompute: how much backward computes again instead of keeping it: 0, 1, 2, or None to choose.
        classifier_rows: how many of the B*T rows of logits exist at a time, or None to choose.
        optimizer_bytes: what the optimizer keeps of each parameter.
        total_batch_size: tokens of an update, of all ranks together.
        ranks: how many there are.
        sharing: how many ranks share the memory, of which each takes as much; a GPU is one rank's own.

    Returns:
        The plan (bytes by purpose), recompute and classifier_rows.

    Raises:
        MemoryError: if it does not fit; the message has the numbers and says what would help.
    """
    on_cpu = backend.info().name == "cpu"
    levels = (recompute,) if recompute is not None else (1,) if on_cpu else (0, 1, 2)
    chunks = (CPU_CLASSIFIER_ROWS,) if on_cpu else GPU_CLASSIFIER_ROWS
    if classifier_rows is not None:
        chunks = (classifier_rows,)

    def plan(B: int, recompute: int, rows: int = chunks[-1]) -> _llmc.MemoryPlan:
        options = _llmc.ModelOptions(dtype, grad_dtype, recompute, rows)
        micro_gradients = on_cpu and grad_dtype == "f32" and total_batch_size > B * T * ranks
        return _llmc.memory_plan(config.native(), options, B, T, True, optimizer_bytes, micro_gradients)

    def workspace(B: int) -> int:
        return backend.workspace_bytes(B, T, config.channels, config.num_heads, dtype)

    def fits(B: int, recompute: int, rows: int = chunks[-1]) -> bool:
        return plan(B, recompute, rows).total + workspace(B) <= free

    free = _available_to_one(backend, sharing)
    if backend.info().isa == "amx" and dtype == "bf16":
        # AMX's kernels keep two packed copies of the weights, one for forward and one for backward.
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
        advice.append(
            f"--batch-size {largest} fits (give --total-batch-size {total_batch_size} to keep the update the same)"
        )
    elif fits(1, 2):
        advice.append("--batch-size 1 --recompute 2 fits")
    if recompute < 2 and fits(B, 2):
        advice.append("--recompute 2 fits")
    if dtype == "f32":
        advice.append("--dtype bf16 needs about half")
    gb = 1e9
    each = f" for each of {sharing} ranks" if sharing > 1 and on_cpu else ""
    raise MemoryError(
        f"this run needs {(needed.total + workspace(B)) / gb:.2f} GB on {backend.info().name}, {free / gb:.2f} GB are free{each}: "
        f"parameters {needed.parameters / gb:.2f}, gradients {needed.gradients / gb:.2f}, optimizer {needed.optimizer / gb:.2f}, "
        f"activations {needed.activations / gb:.2f}, workspace {workspace(B) / gb:.2f} (B = {B}, T = {T}). "
        + ("; ".join(advice) if advice else "Choose a smaller model.")
    )


def _available_to_one(backend: _llmc.Backend, sharing: int) -> int:
    return available_memory(backend) // (sharing if backend.info().name == "cpu" else 1)


def largest_batch(backend: _llmc.Backend, plan: _llmc.MemoryPlan, B: int, sharing: int = 1) -> int:
    """Estimate the largest batch size that would fit, while a model is allocated already.

    Args:
        backend: the device.
        plan: the memory of that model.
        B: its batch size.
        sharing: how many ranks share the memory.

    Returns:
        B, and as many more rows as the free memory holds activations for.
    """
    return B + int(_available_to_one(backend, sharing) / (plan.activations / B))
