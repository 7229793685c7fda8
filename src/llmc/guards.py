"""What keeps a run from harming itself: outliers, NaN, and asking for more memory than there is."""

from __future__ import annotations

import math
import re
from collections import deque
from pathlib import Path

import psutil

from llmc import _llmc
from llmc.config import GPT2Config

WINDOW = 128


class OutlierDetector:
    """z-scores against the last 128 values.

    As llm.c's, but a value is judged against the window before it (in llm.c it is part of its own window, so no z-score can pass
    11.3), and a value that is not finite is not taken in (there one NaN blinds the detector for ever).
    """

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=WINDOW)

    def update(self, value: float) -> float:
        """The z-score of value; NaN until the window is full, and for a value that is not finite."""
        if not math.isfinite(value):
            return math.nan
        z = math.nan
        if len(self._values) == WINDOW:
            mean = math.fsum(self._values) / WINDOW
            variance = math.fsum((v - mean) ** 2 for v in self._values) / WINDOW
            z = (value - mean) / math.sqrt(variance) if variance > 0 else 0.0
        self._values.append(value)
        return z

    def state(self) -> list[float]:
        return list(self._values)

    def set_state(self, values: list[float]) -> None:
        self._values = deque((float(v) for v in values), maxlen=WINDOW)


def available_memory(backend: _llmc.Backend) -> int:
    """Bytes that can be allocated on the device now."""
    info = backend.info()
    return available_host_memory() if info.name == "cpu" else info.free_bytes


def available_host_memory() -> int:
    """Bytes that can be allocated now, within the limits of the container. File cache that can be dropped counts as free."""
    free: int = psutil.virtual_memory().available
    for folder, limit_name, used_name in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            limit, used, stat = (Path(folder, n).read_text() for n in (limit_name, used_name, "memory.stat"))
            if limit.strip() != "max":
                cache = re.search(r"^(?:total_)?inactive_file (\d+)", stat, re.MULTILINE)
                free = min(free, max(0, int(limit) - int(used) + (int(cache[1]) if cache else 0)))
        except (OSError, ValueError):
            pass
    return free


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
        return _llmc.memory_plan(config.native(), dtype, grad_dtype, B, T, recompute, rows, True, master_weights)

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
