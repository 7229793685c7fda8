"""What changes from update to update: the learning rate, by llm.c's schedules, and the tokens of an update, if they warm up."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Schedule = Callable[[int], float]

SCHEDULES = ("cosine", "linear", "constant", "wsd")


def lr_schedule(
    name: str,
    learning_rate: float,
    warmup_steps: int,
    total_steps: int,
    final_lr_frac: float,
    decay_frac: float = 0.2,
) -> Schedule:
    """Return a function that gives the learning rate of a step, counted from 0. From total_steps on the last value stays.

    Args:
        name: 'cosine' (Loshchilov & Hutter 2017), 'linear', 'wsd' (warm-up, stable, decay: in the last part of the steps the rate
            falls by 1 - sqrt; Hu et al. 2024, Hägele et al. 2024) or 'constant' (ignores warm-up and final_lr_frac, as llm.c does).
        learning_rate: the highest rate.
        warmup_steps: steps in which the rate rises linearly from near 0.
        total_steps: steps of the whole run.
        final_lr_frac: the rate at the end, as a fraction of the highest.
        decay_frac: of wsd: that part of the steps, 0 to 1, in which the rate falls; llm.c has a fifth.

    Raises:
        ValueError: if the name is unknown, a number of steps is negative, or decay_frac is not within 0 and 1.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown learning rate schedule '{name}': expected one of {', '.join(SCHEDULES)}")
    if warmup_steps < 0 or total_steps < 0:
        raise ValueError(f"warmup_steps is {warmup_steps} and total_steps is {total_steps}, expected 0 or more")
    if not 0 <= decay_frac <= 1:
        raise ValueError(f"decay_frac is {decay_frac}, expected 0 to 1")
    floor = learning_rate * final_lr_frac
    span = learning_rate - floor
    begin_of_decay = wsd_decay_begin(total_steps, decay_frac)

    def ratio(step: int, begin: int) -> float:
        """Return how much of the way from step `begin` to the end has passed, from 0 to 1."""
        return 1.0 if total_steps <= begin else min(1.0, (step - begin) / (total_steps - begin))

    def after_warmup(step: int) -> float:
        if name == "cosine":
            return floor + 0.5 * (1.0 + math.cos(math.pi * ratio(step, warmup_steps))) * span
        if name == "linear":
            return learning_rate - ratio(step, warmup_steps) * span
        if step < begin_of_decay:
            return learning_rate
        return floor + (1.0 - math.sqrt(ratio(step, begin_of_decay))) * span

    def rate(step: int) -> float:
        if name == "constant":
            return learning_rate
        if step < warmup_steps:
            return learning_rate * (step + 1) / warmup_steps
        return after_warmup(step)

    return rate


def wsd_decay_begin(total_steps: int, decay_frac: float) -> int:
    """Return the step from which on wsd's rate falls."""
    return int((1.0 - decay_frac) * total_steps)


def warmup_problem(
    name: str,
    learning_rate: float,
    warmup_steps: int,
    total_steps: int,
    final_lr_frac: float,
    decay_frac: float = 0.2,
) -> str:
    """Return in words what keeps a schedule from reaching its highest rate and falling from there; empty: nothing.

    Args:
        name, learning_rate, warmup_steps, total_steps, final_lr_frac, decay_frac: as of lr_schedule().
    """
    if name == "constant" or warmup_steps == 0 or total_steps == 0:
        return ""
    rate = lr_schedule(name, learning_rate, warmup_steps, total_steps, final_lr_frac, decay_frac)
    if warmup_steps >= total_steps:
        return (
            f"warmup_steps is {warmup_steps} of {total_steps} steps in all: the learning rate rises to "
            f"{rate(total_steps - 1):.3g} of {learning_rate:.3g}, and never falls"
        )
    if name == "wsd" and warmup_steps > (begin := wsd_decay_begin(total_steps, decay_frac)):
        return (
            f"warmup_steps is {warmup_steps}, but wsd decays from step {begin} of {total_steps} on: the learning rate "
            f"drops from {rate(warmup_steps - 1):.3g} to {rate(warmup_steps):.3g} at once"
        )
    return ""


@dataclass(frozen=True)
class BatchSchedule:
    """How many tokens each update has: all of `full`, or while the batch warms up (Smith et al. 2018; Brown et al. 2020) fewer.

    Then the first update has `first`, and as many more join at even distances, so that from step warmup_steps on all are there.

    Attributes:
        full: tokens of an update, a multiple of first.
        first: of the first one.
        warmup_steps: updates that have fewer than full; 0: none.
    """

    full: int
    first: int
    warmup_steps: int

    @staticmethod
    def of(settings: Mapping[str, Any]) -> BatchSchedule:
        """Return that of a run's settings, by name. Settings that older runs do not have are not needed."""
        full, first = settings["total_batch_size"], settings.get("first_batch_size", -1)
        steps = settings.get("batch_warmup_steps", 0)
        return BatchSchedule(full, first, steps) if steps > 0 and first > 0 else BatchSchedule(full, full, 0)

    def tokens(self, step: int) -> int:
        """Return the tokens of the update of a step, counted from 0."""
        if step >= self.warmup_steps:
            return self.full
        return self.first * (1 + (self.full // self.first - 1) * step // self.warmup_steps)

    def tokens_before(self, steps: ArrayLike) -> NDArray[np.int64]:
        """Return the tokens of all updates before a step, or before each of an array of steps."""
        steps = np.asarray(steps, np.int64)
        more = self.full // self.first - 1  # times `first`, each of which joins at a step
        joins = -(-np.arange(1, more + 1) * self.warmup_steps // max(1, more))
        there = np.searchsorted(joins, steps)
        missed = np.concatenate([[0], np.cumsum(joins)])
        before: NDArray[np.int64] = self.first * (steps + there * steps - missed[there])
        return before

    def steps(self, tokens: int) -> int:
        """Return how many updates so many tokens suffice for."""
        warm = int(self.tokens_before(self.warmup_steps))
        if tokens >= warm:
            return self.warmup_steps + (tokens - warm) // self.full
        return bisect.bisect_right(range(self.warmup_steps), tokens, key=lambda step: int(self.tokens_before(step))) - 1
