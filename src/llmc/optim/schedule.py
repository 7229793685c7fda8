"""Learning rate schedules, as llm.c's: warm-up, then cosine, linear, constant or wsd."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int], float]

SCHEDULES = ("cosine", "linear", "constant", "wsd")


def lr_schedule(name: str, learning_rate: float, warmup_steps: int, total_steps: int, final_lr_frac: float) -> Schedule:
    """The learning rate by step, counted from 0.

    name: 'cosine' (Loshchilov & Hutter 2017), 'linear', 'constant' (ignores warm-up and final_lr_frac, as in llm.c) or 'wsd'
        (warm-up, stable, decay: the last 20 % fall by 1 - sqrt; Hu et al. 2024, Hägele et al. 2024).
    learning_rate: the highest. final_lr_frac: what is left of it at the end. Past total_steps the last value holds.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown learning rate schedule '{name}': expected one of {', '.join(SCHEDULES)}")
    if warmup_steps < 0 or total_steps < 0:
        raise ValueError(f"warmup_steps is {warmup_steps} and total_steps is {total_steps}, expected 0 or more")
    floor = learning_rate * final_lr_frac
    span = learning_rate - floor
    stable = int(0.8 * total_steps)  # wsd: where the decay begins

    def ratio(step: int, begin: int) -> float:
        return 1.0 if total_steps <= begin else min(1.0, (step - begin) / (total_steps - begin))

    def after_warmup(step: int) -> float:
        if name == "cosine":
            return floor + 0.5 * (1.0 + math.cos(math.pi * ratio(step, warmup_steps))) * span
        if name == "linear":
            return learning_rate - ratio(step, warmup_steps) * span
        if step < stable:
            return learning_rate
        return floor + (1.0 - math.sqrt(ratio(step, stable))) * span

    def rate(step: int) -> float:
        if name == "constant":
            return learning_rate
        if step < warmup_steps:
            return learning_rate * (step + 1) / warmup_steps
        return after_warmup(step)

    return rate
