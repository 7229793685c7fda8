"""llm.c's learning rate schedules: warm-up, then cosine, linear or wsd; or a constant rate."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int], float]

SCHEDULES = ("cosine", "linear", "constant", "wsd")


def lr_schedule(name: str, learning_rate: float, warmup_steps: int, total_steps: int, final_lr_frac: float) -> Schedule:
    """Return a function that gives the learning rate of a step, counted from 0. From total_steps on the last value stays.

    Args:
        name: 'cosine' (Loshchilov & Hutter 2017), 'linear', 'wsd' (warm-up, stable, decay: during the last 20 % of the steps the rate
            falls by 1 - sqrt; Hu et al. 2024, Hägele et al. 2024) or 'constant' (ignores warm-up and final_lr_frac, as llm.c does).
        learning_rate: the highest rate.
        warmup_steps: steps in which the rate rises linearly from near 0.
        total_steps: steps of the whole run.
        final_lr_frac: the rate at the end, as a fraction of the highest.

    Raises:
        ValueError: if the name is unknown, or a number of steps is negative.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown learning rate schedule '{name}': expected one of {', '.join(SCHEDULES)}")
    if warmup_steps < 0 or total_steps < 0:
        raise ValueError(f"warmup_steps is {warmup_steps} and total_steps is {total_steps}, expected 0 or more")
    floor = learning_rate * final_lr_frac
    span = learning_rate - floor
    decay_begin = int(0.8 * total_steps)  # of wsd

    def ratio(step: int, begin: int) -> float:
        """Return how much of the way from step `begin` to the end has passed, from 0 to 1."""
        return 1.0 if total_steps <= begin else min(1.0, (step - begin) / (total_steps - begin))

    def after_warmup(step: int) -> float:
        if name == "cosine":
            return floor + 0.5 * (1.0 + math.cos(math.pi * ratio(step, warmup_steps))) * span
        if name == "linear":
            return learning_rate - ratio(step, warmup_steps) * span
        if step < decay_begin:
            return learning_rate
        return floor + (1.0 - math.sqrt(ratio(step, decay_begin))) * span

    def rate(step: int) -> float:
        if name == "constant":
            return learning_rate
        if step < warmup_steps:
            return learning_rate * (step + 1) / warmup_steps
        return after_warmup(step)

    return rate


def warmup_problem(name: str, learning_rate: float, warmup_steps: int, total_steps: int, final_lr_frac: float) -> str:
    """Return in words what keeps a schedule from reaching its highest rate and falling from there; empty: nothing.

    Args:
        name, learning_rate, warmup_steps, total_steps, final_lr_frac: as of lr_schedule().
    """
    if name == "constant" or warmup_steps == 0 or total_steps == 0:
        return ""
    rate = lr_schedule(name, learning_rate, warmup_steps, total_steps, final_lr_frac)
    if warmup_steps >= total_steps:
        return (
            f"warmup_steps is {warmup_steps} of {total_steps} steps in all: the learning rate rises to "
            f"{rate(total_steps - 1):.3g} of {learning_rate:.3g}, and never falls"
        )
    if name == "wsd" and warmup_steps > int(0.8 * total_steps):
        return (
            f"warmup_steps is {warmup_steps}, but wsd decays from step {int(0.8 * total_steps)} of {total_steps} on: the learning rate "
            f"drops from {rate(warmup_steps - 1):.3g} to {rate(warmup_steps):.3g} at once"
        )
    return ""
