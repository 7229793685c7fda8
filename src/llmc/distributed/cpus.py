"""Which CPUs each rank of a host computes on: whole cores, and never those of another rank."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path


def usable_cpus() -> list[int] | None:
    """Return the CPUs that this thread may use, or None where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return None


def bind(cpus: Sequence[int]) -> None:
    """Let this thread, and the threads that it starts from now on, use these CPUs only."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)


def core_of(cpu: int) -> int:
    """Return the lowest number among the CPUs that are one core with this one."""
    try:
        text = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
        return int(text.replace("-", ",").split(",")[0])
    except (OSError, ValueError):
        return cpu


def share_of(cpus: Sequence[int], index: int, count: int, core: Callable[[int], int] = core_of) -> list[int]:
    """Return the CPUs of one of several ranks that have the same ones to use.

    Args:
        cpus: those that they may use.
        index, count: which of how many ranks.
        core: the core of a CPU, as a number.

    Returns:
        Neighbouring whole cores if there is one for each rank, else single CPUs; if there are fewer CPUs than ranks, one that
        others have too.
    """
    cores: dict[int, list[int]] = {}
    for cpu in sorted(cpus):
        cores.setdefault(core(cpu), []).append(cpu)
    units = list(cores.values()) if len(cores) >= count else [[cpu] for them in cores.values() for cpu in them]
    if len(units) < count:
        return units[index % len(units)]
    mine = units[index * len(units) // count : (index + 1) * len(units) // count]
    return [cpu for unit in mine for cpu in unit]
