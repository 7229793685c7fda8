"""How many threads a backend uses, and to which CPUs they are bound: OMP_NUM_THREADS, affinity, OMP_PROC_BIND.

The calling thread is never bound.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has sched_getaffinity")

CPUS = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []

# Runs an op on all threads, then prints their number and the CPUs on which each may run.
REPORT = """
import json, os, sys
cpus = json.loads(sys.argv[1])
if cpus:
    os.sched_setaffinity(0, cpus)
from llmc import _llmc
backend = _llmc.Backend("cpu", int(sys.argv[2]))
backend.zero(backend.empty([1 << 24]))
others = []
for thread in map(int, os.listdir("/proc/self/task")):
    if thread != os.getpid():
        others.append(sorted(os.sched_getaffinity(thread)))
info = backend.info()
print(json.dumps({"threads": info.threads, "pinning": info.pinning, "caller": sorted(os.sched_getaffinity(0)), "workers": others}))
"""


def report(cpus=(), threads=0, **environment):
    """Run REPORT in a process that may use these CPUs and has these environment variables; return what it prints."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    env = clean | {"OPENBLAS_NUM_THREADS": "1"} | environment  # so that NumPy starts no threads
    command = [sys.executable, "-c", REPORT, json.dumps(list(cpus)), str(threads)]
    return json.loads(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs")
def test_as_many_threads_as_cpus_are_spread_over_them():
    seen = report(CPUS[:2], threads=2)
    assert seen["threads"] == 2 and seen["pinning"] == "each worker on a CPU of its own"
    assert seen["caller"] == CPUS[:2]  # so threads that the caller starts later may run on both
    assert len(seen["workers"]) == 1 and len(seen["workers"][0]) == 1


def test_more_threads_than_cpus_are_left_to_the_system():
    seen = report(CPUS[:1], threads=3)
    assert seen["threads"] == 3 and seen["pinning"] == "left to the system"
    assert seen["workers"] == [CPUS[:1]] * 2


def test_the_default_is_what_the_process_may_use():
    assert report(CPUS[:1])["threads"] == 1
    assert report()["threads"] <= len(CPUS)
    assert report(OMP_NUM_THREADS="3")["threads"] == 3


@pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs")
def test_a_user_who_binds_is_left_alone():
    seen = report(CPUS[:2], threads=2, OMP_PROC_BIND="false")
    assert seen["pinning"] == "by OMP_PROC_BIND=false"
    assert seen["workers"] == [CPUS[:2]]
