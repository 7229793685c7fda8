"""HostComm: collectives whose bytes a transport moves. Here it is threads with queues; what comes out is ThreadComm's, bit for bit."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import pytest
from conftest import TINY, randomize

import llmc
from llmc import _llmc


class Wire:
    """The transport of ranks that are threads of this process."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.boxes: dict[tuple[int, int], Queue[bytes | None]] = {
            (a, b): Queue() for a in range(size) for b in range(size)
        }

    def receive(self, sender: int, rank: int) -> bytes:
        data = self.boxes[sender, rank].get(timeout=30)
        if data is None:
            raise ConnectionError(f"rank {sender} has left")
        return data

    def gather(self, rank: int, own: memoryview, into: memoryview, counts: list[int]) -> None:
        for other in range(self.size):
            self.boxes[rank, other].put(bytes(own))
        at = 0
        for other, count in enumerate(counts):
            into[at : at + count] = self.receive(other, rank)
            at += count

    def move(self, rank: int, x: _llmc.Exchange) -> None:
        if x.kind == "all_to_all":
            at = 0
            for other, count in enumerate(x.send_counts):
                self.boxes[rank, other].put(bytes(x.send[at : at + count]))
                at += count
            assert at == len(x.send)
            at = 0
            for other, count in enumerate(x.receive_counts):
                x.receive[at : at + count] = self.receive(other, rank)
                at += count
            assert at == len(x.receive)
        elif x.kind == "all_gather":
            begin = sum(x.receive_counts[:rank])
            own = x.receive[begin : begin + x.receive_counts[rank]]
            self.gather(rank, own, x.receive, x.receive_counts)
        elif x.kind == "broadcast":
            if rank == x.root:
                for other in range(self.size):
                    self.boxes[rank, other].put(bytes(x.receive))
            x.receive[:] = self.receive(x.root, rank)
        else:
            assert x.kind == "barrier" and len(x.receive) == 0

    def serve(self, rank: int, exchanges: _llmc.Exchanges) -> None:
        while (x := exchanges.next_exchange()) is not None:
            try:
                if x.has_heads:
                    self.gather(rank, x.head, x.heads, [len(x.head)] * self.size)
                    exchanges.check()
                self.move(rank, x)
                exchanges.done()
            except Exception as e:
                exchanges.fail(str(e))
        for other in range(self.size):
            self.boxes[rank, other].put(None)


class SlowWire(Wire):
    """One on which weights are still on their way whenever somebody looks at them without waiting."""

    def move(self, rank: int, x: _llmc.Exchange) -> None:
        if x.what.startswith("all_gather"):
            time.sleep(0.02)
        super().move(rank, x)


Body = Callable[[_llmc.Comm, _llmc.Backend], Any]
Call = Callable[[_llmc.Comm, _llmc.Tensor, _llmc.Tensor], Any]


def in_ranks(comms: list[_llmc.Comm], backends: list[_llmc.Backend], body: Body) -> list[Any]:
    def run(rank: int) -> Any:
        comm, comms[rank] = comms[rank], None  # type: ignore[call-overload]
        return body(comm, backends[rank])

    with ThreadPoolExecutor(len(comms)) as pool:
        return [f.result(timeout=60) for f in [pool.submit(run, r) for r in range(len(comms))]]


def by_threads(size: int, body: Body, backends: list[_llmc.Backend] | None = None) -> list[Any]:
    backends = backends or [_llmc.Backend("cpu", 1) for _ in range(size)]
    return in_ranks(_llmc.thread_comms(backends), backends, body)


def by_wire(size: int, body: Body, backends: list[_llmc.Backend] | None = None, wires: type[Wire] = Wire) -> list[Any]:
    backends = backends or [_llmc.Backend("cpu", 1) for _ in range(size)]
    wire, comms = wires(size), [_llmc.HostComm(backend, rank, size) for rank, backend in enumerate(backends)]
    transports = [threading.Thread(target=wire.serve, args=(r, c.exchanges)) for r, c in enumerate(comms)]
    for transport in transports:
        transport.start()
    try:
        return in_ranks(list(comms), backends, body)
    finally:
        del comms
        gc.collect()
        for transport in transports:
            transport.join(timeout=30)
            assert not transport.is_alive()


def tensors(backend: _llmc.Backend, rank: int, numels: list[int], dtypes: list[str]) -> list[_llmc.Tensor]:
    rng = np.random.default_rng(rank)
    found = []
    for numel in numels:
        for dtype in dtypes:
            values = rng.standard_normal(numel, dtype=np.float32)
            t = backend.empty([numel], dtype)
            if dtype == "f32":
                t.from_host(values)
            elif dtype == "bf16":
                t.from_host((values.view(np.uint32) >> 16).astype(np.uint16))
            else:
                t.from_host((values * 1e3).astype({"i32": np.int32, "i16": np.int16}[dtype]))
            found.append(t)
    return found


def many_collectives(comm: _llmc.Comm, backend: _llmc.Backend) -> list[np.ndarray]:
    """Return what a rank gets of tensors of no, one and many blocks and all dtypes, some so long that they need several exchanges."""
    size = comm.size
    long = 1_200_003 if size == 2 else 20_001
    rank, out = comm.rank, []
    floats = tensors(backend, rank, [0, 1, 1023, 5000, long], ["f32", "bf16"])
    comm.wait(comm.all_reduce(floats))
    out += [t.to_host() for t in floats]

    floats = tensors(backend, rank, [5, 1024 * size, long], ["bf16", "f32"])
    any_dtype = tensors(backend, rank, [3, 4097, long], ["bf16", "i32", "i16", "f32"])
    first, second = comm.reduce_scatter(floats), comm.all_gather(any_dtype)  # both under way
    sent = tensors(backend, rank, [7, long], ["i16", "f32"])
    third = comm.broadcast(sent, size - 1)
    assert first < second < third
    comm.wait(first)
    for t in floats:
        begin, end = _llmc.piece_of(t.numel, rank, size)
        out.append(t.to_host()[begin:end])
    comm.wait()
    out += [t.to_host() for t in [*any_dtype, *sent]]

    # A rank owns all of some tensors.
    floats = tensors(backend, rank, [5, 5000, long], ["f32"])
    any_dtype = tensors(backend, rank, [5, 4097], ["bf16", "i16"])
    owners = [size - 1, -1, 0]
    comm.reduce_scatter(floats, owners)
    comm.wait(comm.all_gather(any_dtype, [0, size - 1, -1, size // 2]))
    out += [t.to_host() for t in any_dtype]
    for t, owner in zip(floats, owners):
        begin, end = _llmc.piece_of(t.numel, rank, size) if owner < 0 else (0, t.numel * (rank == owner))
        out.append(t.to_host()[begin:end])

    comm.all_reduce([])
    out += [np.array(comm.sum([0.1 * rank, 1e300, -0.0])), np.array(comm.sum([]))]
    comm.barrier()
    return out


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_same_bits_as_among_threads(size: int) -> None:
    expected, found = by_threads(size, many_collectives), by_wire(size, many_collectives)
    for rank in range(size):
        assert len(expected[rank]) == len(found[rank]) > 20
        for a, b in zip(expected[rank], found[rank]):
            assert a.dtype == b.dtype and a.tobytes() == b.tobytes()


def test_bytes_sent() -> None:
    """Reduce-scatter and all-gather send (N-1)/N of the bytes each, but for the little that padding and uneven pieces add."""

    def body(comm: _llmc.HostComm, backend: _llmc.Backend) -> int:
        x = backend.empty([4 * 1024 * 100])
        comm.reduce_scatter([x])
        comm.all_gather([x])
        comm.wait()
        return comm.exchanges.bytes_sent

    assert by_wire(4, body) == [2 * 3 * 1024 * 100 * 4] * 4


def test_training_gives_the_same_bits() -> None:
    """Gradients leave while backward goes on, and weights arrive while the optimizer is dropped: several collectives at once."""
    data = np.random.default_rng(1).integers(0, TINY.vocab_size, (3, 2, 2, 17), dtype=np.int32)

    def train(run: Callable[..., list[Any]]) -> list[Any]:
        models = [llmc.GPT2(TINY, seed=3, threads=1) for _ in range(2)]

        def body(comm: _llmc.Comm, backend: _llmc.Backend) -> list[bytes]:
            model = models[comm.rank]
            randomize(model)
            optimizer = llmc.AdamW(model, comm=comm)
            sink = _llmc.Reduction(comm, optimizer.partition)
            for tokens in data[:, comm.rank]:
                model.zero_grad()
                model.forward(tokens[:, :-1])
                model.backward(tokens[:, 1:], 0.5, sink)
                optimizer.step(1e-2)
            del optimizer
            return [np.array(p).tobytes() for p in model.parameters.values()]

        return run(2, body, [m.backend for m in models])

    expected, found = train(by_threads), train(by_wire)
    assert expected == found and found[0] == found[1]


def test_whoever_looks_at_weights_or_sets_them_waits_for_those_that_arrive(tmp_path: Path) -> None:
    models = [llmc.GPT2(TINY, seed=3, threads=1) for _ in range(2)]
    other = llmc.GPT2(TINY, seed=7)
    other.save(tmp_path / "other.bin")
    header = 1024

    def body(comm: _llmc.Comm, backend: _llmc.Backend) -> None:
        model = models[comm.rank]
        native, own_file = model._native, tmp_path / f"{comm.rank}.bin"
        optimizer = llmc.AdamW(model, comm=comm)
        sink = _llmc.Reduction(comm, optimizer.partition)
        tokens = np.arange(34, dtype=np.int32).reshape(2, 17) + comm.rank
        model.forward(tokens[:, :-1])
        model.backward(tokens[:, 1:], 0.5, sink)

        def weights() -> bytes:
            return model.all_parameters().to_host().tobytes()

        optimizer.step(1e-2)
        native.save_checkpoint(own_file)
        assert own_file.read_bytes()[header:] == weights()
        optimizer.step(1e-2)
        native.load_checkpoint(tmp_path / "other.bin")
        assert weights() == (tmp_path / "other.bin").read_bytes()[header:]
        optimizer.step(1e-2)
        native.init_weights(7)
        assert weights() == (tmp_path / "other.bin").read_bytes()[header:]
        for held in (model.all_parameters(), model.parameter_tensors()["wte"]):  # since before the update
            optimizer.step(1e-2)
            first = held.to_host().tobytes()
            weights()
            assert held.to_host().tobytes() == first

    by_wire(2, body, [m.backend for m in models], SlowWire)


def test_ranks_that_disagree_all_hear_of_it() -> None:
    def both(first: Call, second: Call, match: str) -> None:
        def body(comm: _llmc.Comm, backend: _llmc.Backend) -> None:
            x, y = backend.empty([4]), backend.empty([4], "bf16")
            with pytest.raises(_llmc.Error, match=match):
                (second if comm.rank == 1 else first)(comm, x, y)
                comm.wait()
            with pytest.raises(_llmc.Error, match=match):  # for good
                comm.barrier()

        by_wire(3, body)

    both(
        lambda comm, x, y: comm.all_reduce([x]),
        lambda comm, x, y: comm.all_reduce([x[0]]),
        r"rank 0 is in all_reduce #1, 1 tensors, 4 elements; rank 1 is in all_reduce #1, 1 tensors, 1 elements",
    )
    both(
        lambda comm, x, y: comm.all_gather([x]),
        lambda comm, x, y: comm.all_gather([y]),
        "ranks 0 and 1 bring different tensors to all_gather #1, 1 tensors, 4 elements",
    )
    both(
        lambda comm, x, y: comm.all_gather([x], [0]),
        lambda comm, x, y: comm.all_gather([x], [1]),
        "ranks 0 and 1 bring different tensors to all_gather #1, 1 tensors, 4 elements",
    )
    both(
        lambda comm, x, y: comm.barrier(),
        lambda comm, x, y: comm.sum([1.0]),
        "rank 0 is in barrier #1; rank 1 is in sum #1, 1 n",
    )
    both(
        lambda comm, x, y: comm.broadcast([x], 2),
        lambda comm, x, y: comm.broadcast([x], 1),
        "rank 1 is .*, from rank 1",
    )


def test_a_transport_that_fails_ends_what_waits_and_every_later_call() -> None:
    backend = _llmc.Backend("cpu", 1)
    comm = _llmc.HostComm(backend, 0, 2)
    x = backend.empty([5])
    ticket = comm.all_reduce([x])
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(comm.wait, ticket)
        assert comm.exchanges.next_exchange().what == "all_reduce #1, 1 tensors, 5 elements"
        comm.exchanges.fail("the cable is cut")
        comm.exchanges.fail("and more")  # the first reason stays
        with pytest.raises(_llmc.Error, match="^the cable is cut$"):
            waits.result(timeout=30)
    assert comm.exchanges.ended
    comm.exchanges.done()  # comes too late, and touches nothing
    assert comm.exchanges.next_exchange() is None
    for call in [
        lambda: comm.wait(ticket),
        comm.wait,
        comm.barrier,
        lambda: comm.all_gather([x]),
        lambda: comm.sum([]),
    ]:
        with pytest.raises(_llmc.Error, match="^the cable is cut$"):
            call()


def test_a_rank_that_gives_up_lets_go_of_its_tensors() -> None:
    comm, x = _llmc.HostComm(backend := _llmc.Backend("cpu", 1), 0, 2), backend.empty([5])
    comm.broadcast([x], 1)
    comm.exchanges.next_exchange().receive[:20] = np.ones(5, np.float32).tobytes()
    comm.give_up("no memory")
    comm.exchanges.done()
    assert not x.to_host().any()
    for call in (comm.wait, comm.barrier, lambda: comm.all_reduce([x])):
        with pytest.raises(_llmc.Error, match="^no memory$"):
            call()


def test_a_failure_is_told_when_the_transport_has_let_go_of_the_tensors() -> None:
    """Else it might write to memory that the caller, who has given up, has released."""
    backend, n = _llmc.Backend("cpu", 1), 1 << 20
    with ThreadPoolExecutor(1) as pool:
        for trial in range(20):
            comm, x = _llmc.HostComm(backend, 0, 2), backend.empty([n])
            comm.broadcast([x], 1)
            comm.exchanges.next_exchange().receive[:] = np.ones(n, np.float32).tobytes()
            done = pool.submit(comm.exchanges.done)
            time.sleep(5e-5 * trial)  # before, during or after the copy
            comm.exchanges.fail("the cable is cut")
            with pytest.raises(_llmc.Error, match="cable"):
                comm.barrier()
            begin, end = x.read(0, 1), x.read(n - 1, 1)
            assert begin == end and end in (0, 1)
            done.result(timeout=30)
            assert x.read(n - 1, 1) == end


def test_weights_that_never_arrive_are_never_taken_for_whole(tmp_path: Path) -> None:
    """Whoever hears of it and goes on nevertheless hears it again."""
    model = llmc.GPT2(TINY, threads=1)
    comm = _llmc.HostComm(model.backend, 0, 2)
    optimizer = llmc.AdamW(model, comm=comm)

    def serve() -> None:
        """The norm arrives, and no weights do."""
        while (x := comm.exchanges.next_exchange()) is not None:
            if x.what.startswith("all_gather"):
                comm.exchanges.fail("the cable is cut")
            comm.exchanges.done()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(serve)
        with contextlib.suppress(_llmc.Error):  # so early that it is told already?
            optimizer.step(1e-2)
        for look in (
            lambda: model.forward([[1, 2]]),
            lambda: model.forward([[1, 2]]),
            lambda: model._native.save_checkpoint(tmp_path / "model.bin"),
            model.all_parameters,
            lambda: model.parameters["wte"],
        ):
            with pytest.raises(_llmc.Error, match="cable"):
                look()
        assert not (tmp_path / "model.bin").exists()


def test_a_comm_that_is_dropped_ends_its_transport() -> None:
    """Whether it waits for work, or moves bytes for tensors that are gone when it has done so."""
    backend = _llmc.Backend("cpu", 1)
    comm = _llmc.HostComm(backend, 0, 2)
    exchanges = comm.exchanges
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(exchanges.next_exchange)
        del comm
        assert waits.result(timeout=30) is None

    comm = _llmc.HostComm(backend, 0, 2)
    exchanges = comm.exchanges
    xs = [backend.empty([5000]) for _ in range(3)]
    for x in xs:
        comm.all_gather([x])
    exchange = exchanges.next_exchange()
    assert not exchanges.ended and not exchanges.awaited and not exchanges.idle
    del comm, x, xs
    gc.collect()
    assert exchanges.ended
    exchange.receive[:] = b"x" * len(exchange.receive)
    exchanges.done()
    assert exchanges.next_exchange() is None


def test_arguments() -> None:
    backend = _llmc.Backend("cpu", 1)
    comm = _llmc.HostComm(backend, 1, 2)
    assert (comm.rank, comm.size) == (1, 2)
    with pytest.raises(ValueError, match="Reduction: 0 notes"):
        _llmc.Reduction(comm, notes=0)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        _llmc.HostComm(backend, 2, 2)
    with pytest.raises(ValueError, match="rank 0 of 0"):
        _llmc.HostComm(backend, 0, 0)
    with pytest.raises(ValueError, match="reduce_scatter: i32 .3. is not of floats"):
        comm.reduce_scatter([backend.empty([3], "i32")])
    with pytest.raises(ValueError, match="root is 2 of 2 ranks"):
        comm.broadcast([backend.empty([3])], 2)
    with pytest.raises(ValueError, match="reduce_scatter: the owner of f32 .3. is -2 of 2 ranks"):
        comm.reduce_scatter([backend.empty([3])], [-2])
    with pytest.raises(ValueError, match="belongs to another backend"):
        comm.all_gather([_llmc.Backend("cpu", 1).empty([3])])
    with pytest.raises(ValueError, match="no collective has the ticket 1"):
        comm.wait(1)
    with pytest.raises(ValueError, match="no exchange that could be done"):
        comm.exchanges.done()
    comm.all_gather([x := backend.empty([3])])
    comm.exchanges.next_exchange()
    with pytest.raises(ValueError, match="not done yet"):
        comm.exchanges.next_exchange()
    del comm, x
