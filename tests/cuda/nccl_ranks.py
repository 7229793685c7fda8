"""What test_nccl.py has a rank do, in a process of its own: python nccl_ranks.py PART RANK SIZE ID TIMEOUT [SETTINGS]

The last line that a rank prints is its result, as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
from typing import Any

import numpy as np

import llmc
from llmc import _llmc

CONFIG = llmc.GPT2Config(max_seq_len=16, vocab_size=61, num_layers=2, num_heads=3, channels=33)
RAW = {"f32": np.float32, "bf16": np.uint16, "i32": np.int32, "i16": np.int16}


def digest(*arrays: np.ndarray) -> str:
    h = hashlib.sha256()
    for a in arrays:
        h.update(np.ascontiguousarray(a).tobytes())
    return h.hexdigest()


def raw(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return values of float32 that dtype holds exactly, as a tensor of it has them."""
    return (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bf16" else values.astype(RAW[dtype])


def tensor(backend: _llmc.Backend, host: np.ndarray, dtype: str) -> _llmc.Tensor:
    t = backend.empty([host.size], dtype)
    t.from_host(host)
    return t


def collectives(comm: _llmc.Comm, backend: _llmc.Backend, _: dict[str, Any]) -> list[str]:
    """Check every collective; return digests of sums whose last bits depend on the order of summation."""
    rank, size = comm.rank, comm.size
    # The last is more than the stand-in sends at a time.
    sizes = [1, 1023, 1024 * size, 1024 * size + 1, 2049 * size - 1, 270_001]
    # Small integers: bf16 holds them and their sums exactly.
    values = [np.random.default_rng(n).integers(-32, 33, (size, n)).astype(np.float32) for n in sizes]
    for dtype in ("f32", "bf16"):
        xs = [tensor(backend, raw(v[rank], dtype), dtype) for v in values]
        comm.all_reduce(xs)
        comm.wait()
        for x, v in zip(xs, values):
            np.testing.assert_array_equal(x.to_host(), raw(v.sum(0), dtype))

        xs = [tensor(backend, raw(v[rank], dtype), dtype) for v in values]
        comm.reduce_scatter(xs)
        comm.wait()
        for x, v in zip(xs, values):
            begin, end = _llmc.piece_of(v.shape[1], rank, size)
            np.testing.assert_array_equal(x.to_host()[begin:end], raw(v.sum(0), dtype)[begin:end])

    for dtype in ("f32", "bf16", "i32", "i16"):
        wanted = [raw(v[0], dtype) for v in values]
        pieces = [np.full_like(w, 7) for w in wanted]
        for piece, w in zip(pieces, wanted):
            begin, end = _llmc.piece_of(w.size, rank, size)
            piece[begin:end] = w[begin:end]
        xs = [tensor(backend, piece, dtype) for piece in pieces]
        comm.all_gather(xs)
        comm.wait()
        for x, w in zip(xs, wanted):
            np.testing.assert_array_equal(x.to_host(), w)
        for root in range(size):
            xs = [tensor(backend, raw(v[rank], dtype), dtype) for v in values]
            comm.broadcast(xs, root)
            comm.wait()
            for x, v in zip(xs, values):
                np.testing.assert_array_equal(x.to_host(), raw(v[root], dtype))

    # One rank owns all of a tensor.
    for dtype in ("f32", "bf16"):
        xs, owners = (
            [tensor(backend, raw(v[rank], dtype), dtype) for v in values],
            [i % size for i in range(len(values))],
        )
        comm.reduce_scatter(xs, owners)
        comm.wait()
        for x, v, owner in zip(xs, values, owners):
            np.testing.assert_array_equal(x.to_host(), raw(v.sum(0) if rank == owner else v[rank], dtype))
        comm.all_gather(xs, owners)
        comm.wait()
        for x, v in zip(xs, values):
            np.testing.assert_array_equal(x.to_host(), raw(v.sum(0), dtype))

    # All other tickets are finished with the last, and the first one's event has long been recorded again.
    x, y = (tensor(backend, np.full(4, 0.5, np.float32), "f32") for _ in range(2))
    first = comm.broadcast([x])
    for _ in range(300):
        last = comm.broadcast([y])
    assert last == first + 300
    comm.wait(first)
    backend.residual_forward(x, x, y)
    comm.wait(last)
    np.testing.assert_array_equal(x.to_host(), np.full(4, 1.0))

    assert comm.sum([1.5, float(rank)]) == [1.5 * size, sum(range(size))]
    comm.barrier()
    comm.check()
    rng = np.random.default_rng(rank)
    values = rng.standard_normal(5000).astype(np.float32)
    xs = [tensor(backend, values, "f32") for _ in range(2)]
    comm.all_reduce(xs[:1])
    comm.reduce_scatter(xs[1:])
    comm.all_gather(xs[1:])
    comm.wait()
    one, other = (x.to_host() for x in xs)
    if rank == 0:
        print(f"all_reduce and reduce_scatter differ in {(one != other).sum()} of {one.size} sums")
    return [digest(one), digest(other), repr(comm.sum([0.1 * rank, 1e16, -1e16]))]


def order(comm: _llmc.Comm, backend: _llmc.Backend, _: dict[str, Any]) -> list[float]:
    """Queue ops before and behind collectives of which only some are waited for."""
    n = 5000
    a, b, c = (tensor(backend, np.full(n, 1.0 + comm.rank, np.float32), "f32") for _ in range(3))
    for _ in range(3):
        backend.residual_forward(b, b, a)
    first = comm.all_reduce([b])
    backend.residual_forward(c, c, a)
    second = comm.all_reduce([c])
    backend.residual_forward(a, a, a)
    comm.wait(first)
    backend.residual_forward(a, a, b)
    comm.wait(second)
    backend.residual_forward(a, a, c)
    return [float(x) for x in np.unique(a.to_host())]


def apart(comm: _llmc.Comm, backend: _llmc.Backend, settings: dict[str, Any]) -> float:
    """Rank 0 waits for what the others have queued and do not wait for; they wait for rank 0's word, as for a save."""
    x = tensor(backend, np.full(3000, 1.0, np.float32), "f32")
    comm.all_reduce([x])
    comm.wait()
    if comm.rank == 0:
        result = float(x.to_host()[0])
        open(settings["word"], "w").close()
        return result
    while not os.path.exists(settings["word"]):
        time.sleep(0.01)
    return float(x.to_host()[0])


def killed(comm: _llmc.Comm, backend: _llmc.Backend, settings: dict[str, Any]) -> list[str]:
    """The last rank dies, or is stopped. Rank 0 waits for it in sum(), another for its device, while a thread of its own hears."""
    stopped = settings.get("stopped", False)
    comm.barrier()
    if comm.rank == comm.size - 1:
        os.kill(os.getpid(), signal.SIGSTOP if stopped else signal.SIGKILL)
    assert comm.pending() == (0.0, "")
    if comm.rank == settings.get("watcher", 1):

        def watch() -> None:
            heard = ""
            while not heard:
                try:
                    comm.check()
                    seconds, op = comm.pending()
                    heard = op if seconds > 0.3 and stopped else ""
                except llmc.Error as e:
                    heard = str(e)
                time.sleep(0.01)
            print(json.dumps([heard]), flush=True)
            os._exit(0)

        threading.Thread(target=watch).start()
        comm.all_reduce([x := tensor(backend, np.ones(10, np.float32), "f32")])
        comm.wait()
        if settings.get("frees", False):  # which waits for the device, too
            backend.empty([5])
            llmc.GPT2(llmc.GPT2Config(8, 16, 1, 1, 8), backend=backend)
        return [str(x.to_host()[0])]
    heard = []
    for _ in range(2):
        try:
            comm.sum([1.0])
        except llmc.Error as e:
            heard.append(str(e))
    for call in (lambda: comm.all_reduce([backend.empty([3])]), comm.wait):
        try:
            call()
        except llmc.Error as e:
            heard.append(str(e))
    return heard


def train(comm: _llmc.Comm | None, backend: _llmc.Backend, settings: dict[str, Any]) -> dict[str, Any]:
    """Train as one of the ranks, or alone, on the same batch in every step."""
    rank, size = (comm.rank, comm.size) if comm else (0, 1)
    steps, rows, T = 4, 4, 16
    data = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (rows, T + 1)).astype(np.int32)
    part = data[rank * rows // size : (rank + 1) * rows // size]
    sharded = settings["sharded"]
    model = llmc.GPT2(CONFIG, backend=backend, dtype=settings["dtype"], seed=3)
    optimizer = getattr(llmc, settings["optimizer"])(model, weight_decay=0.1, comm=comm if sharded else None)
    sink = _llmc.Reduction(comm, optimizer.partition, 2) if comm else None
    losses, norms, seconds = [], [], []
    for _ in range(steps):
        model.zero_grad()
        if sink:
            sink.begin([1.0, float(rank)])
        model.forward(part[:, :-1])
        model.backward(part[:, 1:], 1 / size, sink)
        optimizer.step(1e-2)
        losses.append(model.mean_loss)
        norms.append(optimizer.norm)
        if sink:
            assert sink.notes() == [size, size * (size - 1) / 2]
            seconds.append(sink.own_seconds())
    assert all(0.0 < s < 60.0 for s in seconds)
    parameters = [np.array(p) for p in model.parameters.values()]
    return {"losses": losses, "norms": norms, "weights": digest(*parameters)}


def main() -> None:
    part, rank, size, nccl_id, timeout, *settings = sys.argv[1:]
    backend = _llmc.Backend(f"cuda:{rank}")
    comm = _llmc.nccl_comm(backend, int(rank), int(size), bytes.fromhex(nccl_id), float(timeout)) if int(size) else None
    result = globals()[part](comm, backend, json.loads(settings[0]) if settings else {})
    del comm
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
