"""How much CPU time this process gets, how much others take of the same CPUs, and whether a control group holds it back."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil


@dataclass(frozen=True)
class CpuTimes:
    """Counts that grow; the difference of two readings says what happened in between.

    Attributes:
        wall: seconds.
        own: seconds of CPU time of this process, of all its threads.
        everyone: the same of all programs, and of what other guests of a virtual machine's host took, on the CPUs that this process
            may use; None if the system does not say.
        periods, throttled: periods of the control group's limit of CPU time, and those in which it was reached.
    """

    wall: float
    own: float
    everyone: float | None
    periods: int = 0
    throttled: int = 0

    @classmethod
    def read(cls) -> CpuTimes:
        """Return the counts as they are now."""
        return cls(time.perf_counter(), time.process_time(), _everyone(), *_group())


def usable_count() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _everyone() -> float | None:
    try:
        cpus = psutil.cpu_times(percpu=True)
    except (OSError, psutil.Error):
        return None
    if hasattr(os, "sched_getaffinity") and len(usable := os.sched_getaffinity(0)) < len(cpus):
        if max(usable) >= len(cpus):
            return None  # a CPU is off, so that the places in the list are not the CPUs' numbers
        cpus = [cpus[i] for i in usable]
    # What else there is, as Windows' interrupts and the guests of a Linux host, is counted in these already.
    return sum(
        getattr(cpu, kind, 0.0) for cpu in cpus for kind in ("user", "nice", "system", "irq", "softirq", "steal")
    )


def _group(root: Path = Path("/")) -> tuple[int, int]:
    """Return the periods of this process's control group, and the throttled ones; zeros if there are no limits. root: for tests."""
    for file in _statistics_of_groups(root):
        try:
            found = dict(re.findall(r"^(nr_periods|nr_throttled) (\d+)$", file.read_text(), re.MULTILINE))
        except OSError:
            continue
        if int(found.get("nr_periods", 0)):
            return int(found["nr_periods"]), int(found.get("nr_throttled", 0))
    return 0, 0


def _statistics_of_groups(root: Path) -> Iterator[Path]:
    """Yield where the statistics of this process's control groups may be, from the innermost out: cgroup v2's, then v1's."""
    try:
        lines = (root / "proc" / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            place, path = root / "sys" / "fs" / "cgroup" / ("cpu" if controllers else ""), PurePosixPath(group)
            for part in (path, *path.parents):
                yield place / part.relative_to("/") / "cpu.stat"
