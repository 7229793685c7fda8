"""Comm: the collectives among threads, and training by several ranks, which must give what one process gives."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from conftest import TINY, randomize

import llmc
from llmc import _llmc


def as_floats(raw: np.ndarray) -> np.ndarray:
    return raw if raw.dtype == np.float32 else (raw.astype(np.uint32) << 16).view(np.float32)


def tensor(backend: _llmc.Backend, values: np.ndarray, dtype: str) -> _llmc.Tensor:
    t = backend.empty(list(values.shape), "f32")
    t.from_host(values.astype(np.float32))
    if dtype == "f32":
        return t
    out = backend.empty(list(values.shape), dtype)
    backend.copy(out, t)
    return out


def in_ranks(
    size: int, body: Callable[[_llmc.Comm, _llmc.Backend], Any], backends: list[_llmc.Backend] | None = None
) -> list[Any]:
    """Run body in a thread for each rank and return the results by rank; raise the error of the first rank that has one."""
    backends = backends or [_llmc.Backend("cpu", 1) for _ in range(size)]
    ranks = _llmc.thread_comms(backends)

    def run(rank: int) -> Any:
        comm, ranks[rank] = ranks[rank], None
        try:
            return body(comm, backends[rank])
        except BaseException as e:
            traceback.clear_frames(e.__traceback__)  # they hold the Comm, for whose end the others wait
            comm = None  # type: ignore[assignment]
            raise

    with ThreadPoolExecutor(size) as pool:
        return [future.result(timeout=60) for future in [pool.submit(run, rank) for rank in range(size)]]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_collectives(size: int, dtype: str) -> None:
    # Small integers: bf16 holds them and their sums exactly.
    values = np.random.default_rng(0).integers(-64, 64, (size, 5 * size)).astype(np.float32)
    total = values.sum(0)

    def body(comm: _llmc.Comm, backend: _llmc.Backend) -> None:
        rank = comm.rank
        assert comm.size == size
        x, one = tensor(backend, values[rank], dtype), tensor(backend, values[rank, :1], dtype)
        comm.all_reduce([x, one])
        comm.wait()
        np.testing.assert_array_equal(as_floats(x.to_host()), total)
        np.testing.assert_array_equal(as_floats(one.to_host()), total[:1])

        # Two tensors: one of several blocks for each rank, and one that is the last rank's alone.
        long = tensor(backend, np.resize(values[rank], 5000), dtype)
        comm.reduce_scatter([long, one := tensor(backend, values[rank, :1], dtype)])
        comm.wait()
        expected = [np.resize(total, 5000), total[:1]]
        for x, sums in zip([long, one], expected):
            begin, end = _llmc.piece_of(x.numel, rank, size)
            np.testing.assert_array_equal(as_floats(x.to_host())[begin:end], sums[begin:end])

        ticket = comm.all_gather([long, one])
        comm.wait(ticket)
        for x, sums in zip([long, one], expected):
            np.testing.assert_array_equal(as_floats(x.to_host()), sums)

        # One rank owns all of a tensor.
        owned, one = (tensor(backend, np.resize(values[rank], n), dtype) for n in (2500, 1))
        comm.reduce_scatter([owned, one], [size - 1, 0])
        comm.wait()
        for x, owner in ((owned, size - 1), (one, 0)):
            sums = np.resize(total, x.numel)
            np.testing.assert_array_equal(
                as_floats(x.to_host()), sums if rank == owner else np.resize(values[rank], x.numel)
            )
        comm.all_gather([owned, one], [size - 1, 0])
        comm.wait()
        for x in (owned, one):
            np.testing.assert_array_equal(as_floats(x.to_host()), np.resize(total, x.numel))

        comm.broadcast([x := tensor(backend, values[rank], dtype)], size - 1)
        comm.wait()
        np.testing.assert_array_equal(as_floats(x.to_host()), values[-1])

        assert comm.sum([1.5, float(rank)]) == [1.5 * size, sum(range(size))]
        comm.barrier()

    in_ranks(size, body)


def test_ranks_that_disagree_all_hear_of_it_and_go_on() -> None:
    def body(comm: _llmc.Comm, backend: _llmc.Backend) -> None:
        rank = comm.rank
        with pytest.raises(ValueError, match="all_reduce: ranks 0 and 1 bring different arguments"):
            comm.all_reduce([backend.empty([3 + rank])])
        with pytest.raises(ValueError, match="sum: ranks 0 and 1 bring different arguments"):
            comm.sum([0.0] * (1 + rank))
        with pytest.raises(ValueError, match="rank 0 is in barrier, rank 1 in sum"):
            comm.sum([1.0]) if rank else comm.barrier()
        with pytest.raises(ValueError, match="all_reduce: i32 .3. is not of floats"):
            comm.all_reduce([backend.empty([3], "f32" if rank else "i32")])
        with pytest.raises(ValueError, match="root is 2 of 2"):
            comm.broadcast([backend.empty([3])], 2)
        with pytest.raises(ValueError, match="all_gather: the owner of f32 .3. is 2 of 2 ranks"):
            comm.all_gather([backend.empty([3])], [2])
        with pytest.raises(ValueError, match="all_gather: ranks 0 and 1 bring different arguments"):
            comm.all_gather([backend.empty([3])], [rank])
        with pytest.raises(ValueError, match="2 owners of 1 tensors"):
            comm.reduce_scatter([backend.empty([3])], [0, 1])
        comm.barrier()

    in_ranks(2, body)


def test_a_lost_rank_is_an_error_not_a_wait() -> None:
    def body(comm: _llmc.Comm, backend: _llmc.Backend) -> None:
        if comm.rank == 0:
            comm.all_reduce([backend.empty([8])])
            return
        comm.all_reduce([backend.empty([8])])
        for _ in range(3):
            with pytest.raises(_llmc.Error, match="a rank has left"):
                comm.barrier()
            with pytest.raises(_llmc.Error, match="a rank has left"):
                comm.all_reduce([backend.empty([8])])

    in_ranks(2, body)


def test_arguments() -> None:
    comm = _llmc.thread_comms([backend := _llmc.Backend("cpu", 1)])[0]
    other = _llmc.Backend("cpu", 1)
    with pytest.raises(ValueError, match="belongs to another backend than the Comm"):
        comm.all_reduce([other.empty([3])])
    with pytest.raises(ValueError, match="no backend"):
        _llmc.thread_comms([])
    with pytest.raises(ValueError, match="the backend of rank 0 is None"):
        _llmc.thread_comms([None])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="ranks 0 and 1 have the same backend"):
        _llmc.thread_comms([backend, backend])
    model = llmc.GPT2(TINY, threads=1)
    model.forward([[1, 2, 3]])
    with pytest.raises(ValueError, match="gradient sink is of another backend"):
        model.backward([[2, 3, 4]], 1.0, _llmc.Reduction(comm))
    divided, model = (llmc.GPT2(TINY, backend=backend) for _ in range(2))
    optimizer = llmc.AdamW(divided, comm=comm)
    model.forward([[1, 2, 3]])
    with pytest.raises(ValueError, match="no gradient of the model whose parameters are divided among the ranks"):
        model.backward([[2, 3, 4]], 1.0, _llmc.Reduction(comm, optimizer.partition))


def one_run(
    model: llmc.GPT2,
    data: np.ndarray,
    comm: _llmc.Comm | None,
    sharded: bool,
    kind: type[llmc.AdamW | llmc.Muon] = llmc.AdamW,
) -> tuple[list[tuple[float, float]], dict[str, np.ndarray], list[np.ndarray]]:
    """Train on data (steps, micro-batches, B, T + 1), of which each rank takes every size-th micro-batch.

    Return (loss, norm) by step, the weights, and the whole optimizer state.
    """
    rank, size = (comm.rank, comm.size) if comm else (0, 1)
    randomize(model)
    optimizer = kind(model, weight_decay=0.1, comm=comm if sharded else None)
    sink = _llmc.Reduction(comm, optimizer.partition, size) if comm else None
    log = []
    for step in data:
        model.zero_grad()
        if sink:
            sink.begin([float(r == rank) for r in range(size)])
        own = step[rank::size]
        for i, rows in enumerate(own):
            model.forward(rows[:, :-1])
            model.backward(rows[:, 1:], 1.0 / len(step), sink if i == len(own) - 1 else None)
        norm = optimizer.measure()
        assert sink is None or sink.notes() == [1.0] * size
        log.append((model.mean_loss, norm))
        optimizer.apply(1e-2)
    state = [
        optimizer.gather(name, number, layer).to_host()
        for name, kept in optimizer.state().items()
        for number in range(len(kept.moments) + (kept.master is not None))
        for layer in range(optimizer.layers(name))
    ]
    return log, {name: np.array(p) for name, p in model.parameters.items()}, state


def assert_same_bits(a: Any, b: Any) -> None:
    (log, weights, state), (log2, weights2, state2) = a, b
    assert log == log2
    for name in weights:
        np.testing.assert_array_equal(weights[name], weights2[name], err_msg=name)
    for x, y in zip(state, state2):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("kind", [llmc.AdamW, llmc.Muon])
@pytest.mark.parametrize("size,recompute", [(1, 1), (2, 0), (3, 2), (4, 1)])
def test_ranks_with_one_micro_batch_each_are_one_process_with_as_many(
    size: int, recompute: int, kind: type[llmc.AdamW | llmc.Muon], sharded: bool
) -> None:
    """Losses, norms, weights and optimizer state have the same bits.

    A gradient that was sent before it was complete, or twice, or not at all, or an update of what is another rank's, would show.
    """
    data = np.random.default_rng(1).integers(0, TINY.vocab_size, (4, size, 2, 17)).astype(np.int32)
    models = [llmc.GPT2(TINY, seed=3, threads=1 + (i == size), recompute=recompute) for i in range(size + 1)]
    alone = one_run(models[-1], data, None, False, kind)
    backends = [model.backend for model in models[:size]]
    for rank in in_ranks(size, lambda comm, _: one_run(models[comm.rank], data, comm, sharded, kind), backends):
        assert_same_bits(rank, alone)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("kind", [llmc.AdamW, llmc.Muon])
@pytest.mark.parametrize("dtype,micro_batches", [("f32", 4), ("bf16", 2)])
def test_ranks_train_as_one_process_does(
    dtype: str, micro_batches: int, kind: type[llmc.AdamW | llmc.Muon], sharded: bool
) -> None:
    """With several micro-batches per rank, or in bf16, up to rounding; and the same bits on all ranks."""
    data = np.random.default_rng(1).integers(0, TINY.vocab_size, (3, micro_batches, 2, 17)).astype(np.int32)
    models = [llmc.GPT2(TINY, seed=3, threads=1, dtype=dtype) for _ in range(3)]
    alone = one_run(models[-1], data, None, False, kind)
    backends = [model.backend for model in models[:2]]
    first, second = in_ranks(2, lambda comm, _: one_run(models[comm.rank], data, comm, sharded, kind), backends)
    assert_same_bits(first, second)
    tolerance = 1e-5 if dtype == "f32" else 2e-2
    np.testing.assert_allclose(np.array(first[0]), np.array(alone[0]), rtol=tolerance)


def test_state_can_be_scattered_to_other_ranks() -> None:
    """What 3 ranks gather is what 1 rank scatters, elements of several blocks and of none alike."""
    shape = llmc.GPT2Config(19, 61, 2, 3, 48)  # fcw: 9 blocks a layer
    values = np.random.default_rng(2).standard_normal(4 * 48 * 48).astype(np.float32)

    def body(comm: _llmc.Comm, backend: _llmc.Backend) -> None:
        optimizer = llmc.AdamW(llmc.GPT2(shape, backend=backend), comm=comm)
        assert optimizer.sharded and optimizer.layers("fcw") == 2
        optimizer.scatter("fcw", 1, 1, values if comm.rank == 0 else None)
        optimizer.scatter("fcb", 0, 0, values[:192] if comm.rank == 0 else None)
        np.testing.assert_array_equal(optimizer.gather("fcw", 1, 1).to_host(), values)
        np.testing.assert_array_equal(optimizer.gather("fcb", 0, 0).to_host(), values[:192])
        assert not optimizer.gather("fcw", 1, 0).to_host().any()
        begin, end = _llmc.piece_of(values.size, comm.rank, comm.size)
        own = optimizer.state()["fcw"].moments[1].to_host()
        np.testing.assert_array_equal(own[end - begin :], values[begin:end])
        with pytest.raises(ValueError, match="has no state of kind 2"):
            optimizer.gather("fcw", 2, 0)
        with pytest.raises(ValueError, match="layer 2 of 2 of fcw"):
            optimizer.gather("fcw", 0, 2)

    in_ranks(3, body)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_matrix_of_muon_has_one_owner(size: int) -> None:
    """Ranks have about as much, and those of a layer are different ones as far as that goes; the rest is in pieces."""
    shape = llmc.GPT2Config(19, 61, 4, 2, 32)

    def body(comm: _llmc.Comm, backend: _llmc.Backend) -> dict[str, int]:
        optimizer = llmc.Muon(llmc.GPT2(shape, backend=backend), comm=comm)
        values = np.random.default_rng(3).standard_normal(4 * 32 * 32).astype(np.float32)
        for layer in range(4):
            optimizer.scatter("fcw", 0, layer, values + layer if comm.rank == 0 else None)
        for layer in range(4):
            np.testing.assert_array_equal(optimizer.gather("fcw", 0, layer).to_host(), values + layer)
        with pytest.raises(ValueError, match="fcw has no state of kind 1"):
            optimizer.gather("fcw", 1, 0)
        return {name: kept.moments[0].numel for name, kept in optimizer.state().items()}

    kept = in_ranks(size, body)
    table = {spec.name: spec for spec in _llmc.parameter_table(shape.native())}
    matrices = {name: math.prod(spec.shape) for name, spec in table.items() if spec.matrices}
    assert list(matrices) == ["qkvw", "attprojw", "fcw", "fcprojw"]
    for name, numel in matrices.items():
        assert sum(own[name] for own in kept) == numel
        assert all(own[name] % (numel // 4) == 0 for own in kept), name
    shares = [sum(own[name] for name in matrices) for own in kept]
    assert max(shares) - min(shares) <= 4 * 32 * 32
    assert [own["wte"] for own in kept] == [
        _llmc.piece_of(128 * 32, rank, size)[1] - _llmc.piece_of(128 * 32, rank, size)[0] for rank in range(size)
    ]


def test_ranks_that_own_nothing_gather_what_the_last_one_owns() -> None:
    shape = llmc.GPT2Config(19, 61, 1, 3, 24)  # wte: 3 blocks

    def body(comm: _llmc.Comm, backend: _llmc.Backend) -> None:
        optimizer = llmc.AdamW(llmc.GPT2(shape, backend=backend, dtype="bf16"), comm=comm)
        low = np.arange(128 * 24, dtype=np.int16)
        optimizer.scatter("wte", 2, 0, low if comm.rank == 0 else None)
        np.testing.assert_array_equal(optimizer.gather("wte", 2, 0).to_host(), low)

    in_ranks(4, body)


def test_a_backward_that_fails_half_way_asks_for_zero_grad() -> None:
    """What it left in the gradients is not added to: a retry begins anew, and gives what it would have given at once."""
    inputs = np.arange(8, dtype=np.int32).reshape(1, 8)

    def body(comm: _llmc.Comm, backend: _llmc.Backend) -> None:
        # Ranks whose shapes differ send other gradients, so that the first of them to be reduced is refused.
        shape = TINY if comm.rank == 0 else llmc.GPT2Config(19, 61, 2, 3, 36)
        model = llmc.GPT2(shape, backend=backend)
        optimizer = llmc.AdamW(model)

        def compute(sink: _llmc.Reduction | None) -> None:
            model.forward(inputs)
            model.backward(inputs, 1.0, sink)

        model.zero_grad()
        compute(None)
        expected = {name: np.array(g) for name, g in model.gradients.items()}
        model.zero_grad()
        with pytest.raises(ValueError, match="different arguments"):
            compute(_llmc.Reduction(comm))
        with pytest.raises(ValueError, match="zero_grad"):
            compute(None)
        with pytest.raises(ValueError, match="zero_grad"):
            optimizer.measure()
        model.zero_grad()
        compute(None)
        assert all(np.array_equal(g, expected[name]) for name, g in model.gradients.items())

    in_ranks(2, body)
