"""Learning rate schedules, compared with llm.c's formulas and values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llmc import lr_schedule
from llmc.optim.schedule import SCHEDULES, BatchSchedule, warmup_problem


def formula(name, lr, W, N, q, step, part=0.2):
    """Return the rate by the formulas of llm.c's schedulers.h."""
    low = lr * q
    if name == "constant":
        return lr
    if step < W:
        return lr * (step + 1) / W
    if name == "wsd":
        begin = int((1 - part) * N)
        if step < begin:
            return lr
        return low + (1 - math.sqrt((step - begin) / (N - begin))) * (lr - low)
    ratio = (step - W) / (N - W)
    return lr - ratio * (lr - low) if name == "linear" else low + 0.5 * (1 + math.cos(math.pi * ratio)) * (lr - low)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    "W,N,q", [(0, 1, 0.0), (0, 10, 1.0), (7, 100, 0.1), (95, 100, 0.0), (100, 100, 0.0), (150, 100, 0.1)]
)
def test_every_step_matches_llm_c(name, W, N, q):
    schedule = lr_schedule(name, 6e-4, W, N, q)
    for step in range(N):
        assert schedule(step) == pytest.approx(formula(name, 6e-4, W, N, q, step), rel=1e-12)


@pytest.mark.parametrize("part", [0.0, 0.35, 0.5, 1.0])
def test_the_part_of_wsd_in_which_the_rate_falls(part):
    schedule = lr_schedule("wsd", 6e-4, 7, 100, 0.1, part)
    for step in range(100):
        assert schedule(step) == pytest.approx(formula("wsd", 6e-4, 7, 100, 0.1, step, part), rel=1e-12)
    assert schedule(100) == pytest.approx(6e-5)
    said = warmup_problem("wsd", 6e-4, 7, 100, 0.1, part)
    assert said == "" if part < 1 else "but wsd decays from step 0 of 100 on" in said


def test_golden():
    cosine = lr_schedule("cosine", 6e-4, 700, 18865, 0.0)
    for step, value in [(0, 8.57142857e-07), (699, 6e-4), (700, 6e-4), (5000, 5.2079576e-4), (10000, 2.88717832e-4)]:
        assert cosine(step) == pytest.approx(value, rel=1e-8)
    assert cosine(18864) == pytest.approx(4.49e-12, rel=1e-3)
    wsd = lr_schedule("wsd", 6e-4, 100, 1000, 0.0)
    for step, value in [(0, 6e-6), (99, 6e-4), (800, 6e-4), (801, 5.57573593e-4), (900, 1.75735931e-4), (999, 1.50e-6)]:
        assert wsd(step) == pytest.approx(value, rel=3e-3 if step == 999 else 1e-8)


@pytest.mark.parametrize("name", SCHEDULES)
def test_past_the_end_the_last_value_holds(name):
    schedule = lr_schedule(name, 1e-3, 5, 50, 0.1)
    end = 1e-3 if name == "constant" else 1e-4
    assert schedule(50) == pytest.approx(end) and schedule(10_000) == pytest.approx(end)


def test_errors():
    with pytest.raises(
        ValueError, match="unknown learning rate schedule 'cos': expected one of cosine, linear, constant, wsd"
    ):
        lr_schedule("cos", 1e-3, 0, 10, 0.0)
    with pytest.raises(ValueError, match="warmup_steps is -1"):
        lr_schedule("cosine", 1e-3, -1, 10, 0.0)
    with pytest.raises(ValueError, match="decay_frac is 1.5, expected 0 to 1"):
        lr_schedule("wsd", 1e-3, 0, 10, 0.0, 1.5)


def test_the_batch_warms_up_evenly():
    assert [BatchSchedule(4, 1, 6).tokens(step) for step in range(9)] == [1, 1, 2, 2, 3, 3, 4, 4, 4]
    assert [BatchSchedule(64, 16, 2).tokens(step) for step in range(4)] == [16, 32, 64, 64]
    assert BatchSchedule(64, 64, 0).tokens(0) == 64


@pytest.mark.parametrize("full, first, steps", [(8, 8, 0), (8, 1, 5), (8, 2, 50), (512, 1, 7), (12, 3, 1), (10, 1, 9)])
def test_tokens_of_a_run_are_the_sum_of_its_updates(full, first, steps):
    batch = BatchSchedule(full, first, steps)
    tokens = [batch.tokens(step) for step in range(60)]
    assert tokens[0] == first and tokens == sorted(tokens) and set(tokens[steps:]) == {full}
    sums = np.concatenate([[0], np.cumsum(tokens)])
    np.testing.assert_array_equal(batch.tokens_before(np.arange(61)), sums)
    for step in range(60):
        assert batch.steps(sums[step]) == step and batch.steps(sums[step + 1] - 1) == step
