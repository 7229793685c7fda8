"""How much memory can be allocated now."""

from __future__ import annotations

import re
from pathlib import Path

import psutil

from llmc import _llmc


def available_memory(backend: _llmc.Backend) -> int:
    """Return how many bytes can be allocated on the backend's device now."""
    info = backend.info()
    return available_host_memory() if info.name == "cpu" else info.free_bytes


def available_host_memory() -> int:
    """Return how many bytes of main memory can be allocated now.

    Limits of the container (control groups) count. File cache that the system can drop counts as free.
    """
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
