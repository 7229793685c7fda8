"""How much memory a training run needs, computed before any of it is allocated."""

from __future__ import annotations

from collections.abc import Callable

from llmc import _llmc
from llmc.models.config import ModelConfig
from llmc.models.model import CPU_CLASSIFIER_ROWS, GPU_CLASSIFIER_ROWS, default_grad_dtype
from llmc.system.memory import available_memory
from llmc.training.settings import largest_divisor


def check_memory(
    backend: _llmc.Backend,
    config: ModelConfig,
    *,
    dtype: str,
    grad_dtype: str | None,
    B: int,
    T: int,
    recompute: int | None,
    classifier_rows: int | None,
    optimizer_bytes: Callable[[str], int],
    rows: int | None = None,
    grows: bool = False,
    ranks: int = 1,
    sharing: int = 1,
    begun: bool = False,
) -> tuple[_llmc.MemoryPlan, int, int]:
    """Check that a training run fits in memory, and choose recompute and classifier_rows if they are None.

    On a CPU they are constants then, because its memory is shared with other programs. On a GPU they are the fastest that fit.

    Args:
        backend: the device, with the run's options.
        config: the shape of the model.
        dtype: of parameters and activations: "f32" or "bf16".
        grad_dtype: of gradients; None for what dtype and device choose.
        B, T: rows and tokens per row of a micro-batch.
        recompute: how much backward computes again instead of keeping it: 0, 1, 2, or None to choose.
        classifier_rows: how many of the B*T rows of logits exist at a time, or None to choose.
        optimizer_bytes: returns what the optimizer keeps if the parameters are of a dtype.
        rows: of each rank in an update, which B divides, if the user or the run that goes on says so; None: an update has B rows.
        grows: whether later updates have more rows.
        ranks: how many there are.
        sharing: how many ranks share the memory, of which each takes as much; a GPU is one rank's own.
        begun: whether the run has begun before, so that its model is what it is.

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

    def plan(
        B: int, recompute: int, chunk: int = chunks[-1], rows: int | None = rows, dtype: str = dtype
    ) -> _llmc.MemoryPlan:
        gradients = grad_dtype or default_grad_dtype(backend.info().name, dtype)
        options = _llmc.ModelOptions(dtype, gradients, recompute, chunk)
        micro_gradients = on_cpu and gradients == "f32" and rows is not None and (rows > B or grows)
        return _llmc.memory_plan(config.native(), options, B, T, True, optimizer_bytes(dtype), micro_gradients)

    def needs(B: int, recompute: int, chunk: int = chunks[-1], rows: int | None = rows, dtype: str = dtype) -> int:
        memory = plan(B, recompute, chunk, rows, dtype)
        # AMX's kernels keep two packed copies of bf16 weights, one for forward and one for backward.
        packed = 2 * memory.parameters if backend.info().isa == "amx" and dtype == "bf16" else 0
        return memory.total + packed + backend.workspace_bytes(B, T, config.channels, config.num_heads, dtype)

    def largest(recompute: int, rows: int | None = rows) -> int:
        """Return the largest B, below the one that does not fit, that fits and divides the rows of an update; 0: none."""
        fit = (b for b in range(B - 1, 0, -1) if (rows or b) % b == 0 and needs(b, recompute, rows=rows) <= free)
        return next(fit, 0)

    def smaller_batches(recompute: int) -> list[str]:
        """Return what to type for a smaller B, as it stands."""
        found, more = largest(recompute, rows or B), "" if recompute == levels[-1] else f" --recompute {recompute}"
        total = "" if rows is not None else f" --total-batch-size {B * T * ranks}"
        advice = [f"--batch-size {found}{total}{more} fits" + (" and keeps the update the same" if total else "")]
        if rows is None and (freely := largest(recompute)) > found:
            advice.append(f"--batch-size {freely}{more} fits, with {freely * T * ranks} tokens in an update")
        return advice if found else advice[1:]

    free = _available_to_one(backend, sharing)
    for level in levels:
        for chunk in chunks:
            if needs(B, level, chunk) <= free:
                return plan(B, level, chunk), level, chunk
    recompute = levels[-1]
    needed = plan(B, recompute)
    advice = smaller_batches(recompute)
    if recompute < 2 and needs(B, 2) <= free:
        advice.append("--recompute 2 fits")
    if recompute < 2 and not advice:
        advice = smaller_batches(2)
    if dtype == "f32" and needs(B, recompute, dtype="bf16") <= free:
        advice.append("--dtype bf16 fits")
    gb = 1e9
    each = f" for each of {sharing} ranks" if sharing > 1 and on_cpu else ""
    elsewhere = (
        "continue it on a machine with more memory" if begun else "choose a smaller model or a shorter --seq-len"
    )
    raise MemoryError(
        f"this run needs {needs(B, recompute) / gb:.2f} GB on {backend.info().name}, {free / gb:.2f} GB are free{each}: "
        f"parameters {needed.parameters / gb:.2f}, gradients {needed.gradients / gb:.2f}, optimizer {needed.optimizer / gb:.2f}, "
        f"activations {needed.activations / gb:.2f}, workspace {(needs(B, recompute) - needed.total) / gb:.2f} "
        f"(B = {B}, T = {T}). " + ("; ".join(advice) if advice else f"No batch size fits: make room, or {elsewhere}")
    )


def _available_to_one(backend: _llmc.Backend, sharing: int) -> int:
    return available_memory(backend) // (sharing if backend.info().name == "cpu" else 1)


def largest_batch(
    backend: _llmc.Backend, plan: _llmc.MemoryPlan, B: int, sharing: int = 1, rows: int | None = None
) -> int:
    """Estimate the largest batch size that would fit, while a model is allocated already.

    Args:
        backend: the device.
        plan: the memory of that model.
        B: its batch size.
        sharing: how many ranks share the memory.
        rows: as of check_memory().

    Returns:
        B, and as many more rows as the free memory holds activations for; if rows are given, the next smaller number that divides them.
    """
    most = B + int(_available_to_one(backend, sharing) / (plan.activations / B))
    return most if rows is None else largest_divisor(rows, most)
