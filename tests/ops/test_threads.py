"""How many threads a backend uses, to which CPUs they are bound, and that they work in many callers and in forked children.

The calling thread is never bound.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has sched_getaffinity")
forks = pytest.mark.skipif(
    not hasattr(os, "fork") or sys.platform == "darwin", reason="a fork may compute on Linux alone"
)

CPUS = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []

# Runs an op on all threads, then prints their number and the CPUs on which each may run. Workers start while the caller computes already,
# and are bound after that; beside them there is one thread that OpenMP counts as theirs, and that sleeps.
REPORT = """
import json, os, sys, time
cpus, threads, places = json.loads(sys.argv[1])
if cpus:
    os.sched_setaffinity(0, cpus)
from llmc import _llmc
backend = _llmc.Backend("cpu", threads)
info = backend.info()
backend.zero(backend.empty([1 << 24]))
end = time.monotonic() + 60
while True:
    ids = [thread for thread in map(int, os.listdir("/proc/self/task")) if thread != os.getpid()]
    others = [sorted(os.sched_getaffinity(thread)) for thread in ids]
    if info.threads == 1 or (len(others) >= info.threads and len(set(map(tuple, others))) >= places) or time.monotonic() > end:
        break
    time.sleep(0.01)
print(json.dumps({"threads": info.threads, "pinning": info.pinning, "caller": sorted(os.sched_getaffinity(0)), "others": others}))
"""


def report(cpus=(), threads=0, places=1, **environment):
    """Run REPORT in a process that may use these CPUs and has these environment variables; return what it prints.

    It waits until there are all threads, and they run on this many different sets of CPUs, but for a minute at most.
    """
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    env = clean | {"OPENBLAS_NUM_THREADS": "1"} | environment  # so that NumPy starts no threads
    command = [sys.executable, "-c", REPORT, json.dumps([list(cpus), threads, places])]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@linux
def test_threads_are_left_to_the_system():
    seen = report(CPUS[:2], threads=3)
    assert seen["threads"] == 3 and seen["pinning"] == "left to the system"
    assert seen["caller"] == CPUS[:2]
    assert len(seen["others"]) == 3 and all(cpus == CPUS[:2] for cpus in seen["others"])


@linux
def test_the_default_is_what_the_process_may_use():
    assert report(CPUS[:1])["threads"] == 1
    assert report()["threads"] <= len(CPUS)
    assert report(OMP_NUM_THREADS="3")["threads"] == 3


@linux
@pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs")
def test_a_user_may_bind_them_by_openmp():
    seen = report(CPUS[:2], threads=2, places=2, OMP_PROC_BIND="true")
    assert seen["pinning"] == "by OMP_PROC_BIND=true"
    assert [CPUS[1]] in seen["others"]  # OpenMP itself has bound the caller to the first


# For the scripts below. A child that hangs is ended by its alarm, which is a failure.
TRAIN = """
import json, os, signal, sys, threading, warnings
import numpy as np
import llmc
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 says that forks and threads may not go together

def train(threads=2):
    tokens = np.random.default_rng(0).integers(0, 300, (4, 33), dtype=np.int32)
    model = llmc.GPT2(llmc.GPT2Config(max_seq_len=32, vocab_size=300, num_layers=2, num_heads=4, channels=64), threads=threads)
    optimizer = llmc.AdamW(model)
    for _ in range(2):
        model.zero_grad()
        model.forward(tokens[:, :-1])
        model.backward(tokens[:, 1:])
        optimizer.step(1e-2)
    return model.all_parameters().to_host().tobytes()

def child(run):
    pid = os.fork()
    if pid == 0:
        signal.alarm(120)
        try:
            os._exit(run())
        finally:
            os._exit(100)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def in_thread(run):
    results = []
    thread = threading.Thread(target=lambda: results.append(run()))
    thread.start()
    thread.join()
    return results[0]

def same():
    return 0 if train() == expected else 1

expected = train(threads=1)
"""


def passes(script):
    """Run a script after TRAIN, and check that it ends well."""
    env = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", TRAIN + script], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_many_callers_at_once():
    passes("""
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(5) as pool:
    assert all(result == expected for _ in range(4) for result in pool.map(train, (2, 3, 5, 2, 1)))
""")


@forks
def test_a_forked_child_computes():
    """After the parent has; so does a child of the child, one that a thread makes, and one made while other threads compute."""
    passes("""
assert same() == 0 and child(same) == 0
assert child(lambda: child(same)) == 0 and child(lambda: same() or child(same)) == 0
assert in_thread(lambda: child(same)) == 0 and child(lambda: in_thread(same)) == 0

large = llmc.GPT2(llmc.GPT2Config(max_seq_len=64, vocab_size=300, num_layers=4, num_heads=4, channels=128), threads=2)
ended = threading.Event()
def work():
    while not ended.is_set():
        large.forward(np.zeros((8, 64), np.int32))
def use():
    try:
        large.forward(np.zeros((8, 64), np.int32))
    except llmc.Error as error:
        return 50 if "was forked while another thread computed" in str(error) and same() == 0 else 1
    return same()  # the other thread was between two calls
threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()
seen = set()
while 50 not in seen and seen <= {0}:
    seen.add(child(use))
ended.set()
assert seen <= {0, 50}, seen
for thread in threads:
    thread.join()
assert same() == 0
""")


@forks
@pytest.mark.parametrize("first", ["numpy", "torch"])
def test_a_forked_child_computes_beside_other_libraries(first):
    """NumPy's and PyTorch's threads, which the parent has used before and after llmc's; multiprocessing's pool and PyTorch's loader."""
    if first == "torch":
        pytest.importorskip("torch")
    passes(
        f"import importlib, multiprocessing\nlibrary = importlib.import_module({first!r})"
        + """
ones = library.ones((400, 400), dtype=library.float32)
def other():
    return 0 if float((ones @ ones)[0, 0]) == 400 else 1
assert other() == 0 and child(same) == 0
assert same() == 0 and other() == 0 and child(same) == 0
assert child(lambda: same() or child(same)) == 0
if library is np:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert set(pool.map(train, [2, 3, 1, 2])) == {expected}
else:
    class Rows(library.utils.data.Dataset):
        def __len__(self):
            return 4
        def __getitem__(self, i):
            return same()
    loader = library.utils.data.DataLoader(Rows(), num_workers=2, multiprocessing_context="fork")
    assert [int(row) for row in loader] == [0] * 4
"""
    )


@forks
@pytest.mark.cuda
@pytest.mark.usefixtures("cuda")
def test_a_forked_child_is_told_that_cuda_does_not_work_in_it():
    passes("""
backend = llmc._llmc.Backend("cuda")
tensor = backend.empty([8])
def refused():
    for use in (lambda: backend.zero(tensor), lambda: llmc._llmc.Backend("cuda")):
        try:
            use()
        except RuntimeError as error:
            if "forked" not in str(error):
                return 1
        else:
            return 2
    return same()
assert child(refused) == 0
backend.zero(tensor)
""")
