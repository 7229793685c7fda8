"""Says that a run takes longer than it would, because its CPUs are shared or its machine is throttled."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

from llmc.system.cpu_time import CpuTimes, usable_count

_STEPS, _SECONDS, _LONG = 20, 5.0, 30.0  # a window is of 20 steps and 5 seconds, or of half a minute
_WINDOWS = 2  # in a row, before anything is said
_SHARED = 0.2  # of the CPUs that the run would use
_THROTTLED = 0.5  # of the periods of a control group's limit
_SLOW = 1.5  # times the fastest window
_WORTH_SAYING = 20.0  # seconds left
_AGAIN = 2.0  # times the duration of a step when it was said


class Slowness:
    """Compares, in windows of some steps, the CPU time of others with what the run leaves to them, and the steps with earlier ones.

    Worker threads that wait for each other count as at work while they spin, and what they leave when they sleep is idle, so neither is
    taken for another program's. Others on a CPU that the run does not need are not in its way.

    Args:
        threads: with which the run computes; None if other CPUs' programs are of no interest, as on a GPU.
        cpus: that the process may use.
        read: reads the counts of CPU time.
    """

    def __init__(
        self, threads: int | None, cpus: int | None = None, read: Callable[[], CpuTimes] = CpuTimes.read
    ) -> None:
        self._cpus = usable_count() if cpus is None else cpus
        self._threads, self._read = threads, read
        self._before: CpuTimes | None = None
        self._steps: list[float] = []
        self._seconds = 0.0  # their sum
        self._fastest = math.inf
        self._in_a_row = 0
        self._said = 0.0  # the duration of a step at that time

    def update(self, seconds: float, steps_left: int) -> str:
        """Take in the duration of a step.

        Args:
            seconds: it took.
            steps_left: after it.

        Returns:
            What is to be said now, or an empty string.
        """
        if self._before is None:  # the first step, which warms up
            self._before = self._read()
            return ""
        self._steps.append(seconds)
        self._seconds += seconds
        if self._seconds < _SECONDS or (len(self._steps) < _STEPS and self._seconds < _LONG):
            return ""
        before, now, steps = self._before, self._read(), self._steps
        self._before, self._steps, self._seconds = now, [], 0.0
        median = statistics.median(steps)
        self._fastest = min(self._fastest, median)
        cause = self._cause(before, now, median)
        self._in_a_row = self._in_a_row + 1 if cause else 0
        left = steps_left * (now.wall - before.wall) / len(steps)
        if self._in_a_row < _WINDOWS or left < _WORTH_SAYING or median < _AGAIN * self._said:
            return ""
        self._said = median
        return f"about {_roughly(left)} left: {cause}"

    def _cause(self, before: CpuTimes, now: CpuTimes, median: float) -> str:
        """Return in words what holds the run back, or an empty string."""
        if now.throttled - before.throttled > _THROTTLED * (now.periods - before.periods):
            return "the limit of CPU time of its container or control group holds it back"
        if self._threads is not None and before.everyone is not None and now.everyone is not None:
            others = (now.everyone - before.everyone - (now.own - before.own)) / (now.wall - before.wall)
            if others > max(0, self._cpus - self._threads) + _SHARED * self._threads:
                return f"the CPU is shared, other programs take {others:.1f} of its {self._cpus} cores"
        if median > _SLOW * self._fastest:
            times = median / self._fastest
            return f"a step takes {times:.1f} times as long as before; is the machine hot, saving power or short of memory?"
        return ""


def _roughly(seconds: float) -> str:
    """Return a time in words, in one unit."""
    if seconds < 120:
        return f"{round(seconds)} s"
    return f"{round(seconds / 60)} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
