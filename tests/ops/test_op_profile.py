"""_llmc.Profile: the time of each op."""

from __future__ import annotations

import itertools
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import CUDA, make_backend

import llmc
from llmc import _llmc
from llmc.selfcheck.ops import Cases
from llmc.selfcheck.run import run_case

RENAMED = {"adamw": "adamw_many"}  # which it calls, of one tensor
COMPOSED = {"newton_schulz"}  # of other ops, which the profile sees too


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("device", ["cpu", *CUDA])
def test_every_op_begins_by_its_name(device: str, dtype: str) -> None:
    """A profile sees each op once, by its name, although some are computed by the kernels of several."""
    backend = make_backend(device)
    profile = _llmc.Profile(backend)
    seen = set()
    for group in Cases(dtype, 0).groups():
        for case in itertools.islice(group, 12):  # of each op the smallest
            if case.op in seen:
                continue
            seen.add(case.op)
            profile.start("operands")
            (outcome, *_) = run_case(backend, case, "")
            profile.stop()
            assert not outcome.note
            names = [name for name, *_ in profile.intervals()[1:]]
            names = [n for n in names if n not in ("from_host", "to_host")]
            assert (names[:1] if case.op in COMPOSED else names) == [RENAMED.get(case.op, case.op)]
    takes = {name: str(getattr(_llmc.Backend, name).__doc__).split("->")[0] for name in vars(_llmc.Backend)}
    ops = {name for name, parameters in takes.items() if "_llmc.Tensor" in parameters}
    assert dtype == "bf16" or ops - seen <= {"weights_changed", "adamw_many"}, "an op without a case"
    assert len(ops) > 20 and len(ops - seen) < 6


def test_a_step(tiny, tokens) -> None:
    """The intervals of a step follow each other: their sum is the time that went by. Extents are those of dims.h."""
    model = tiny()
    optimizer = llmc.AdamW(model)
    inputs, targets = tokens(2, 7), tokens(2, 7)
    model.zero_grad()
    model.forward(inputs)  # which sets up what is made once
    profile = _llmc.Profile(model.backend)
    for _ in range(2):  # the second time forgets the first
        model.backend.synchronize()
        begin = time.perf_counter()
        profile.start("forward")
        model.forward(inputs)
        profile.mark("backward")
        model.backward(targets)
        profile.mark("optimizer")
        optimizer.step(1e-3)
        model.backend.synchronize()
        profile.stop()
        elapsed = time.perf_counter() - begin
    optimizer.step(1e-3)  # after stop()
    intervals = profile.intervals()
    assert all(seconds >= 0 for *_, seconds in intervals)
    if model.device == "cpu":  # the emulated GPU computes at once, but its clock counts otherwise
        assert 0 < sum(seconds for *_, seconds in intervals) <= elapsed
    names = [name for name, *_ in intervals]
    order = [
        names.index(n)
        for n in ("forward", "encoder_forward", "backward", "encoder_backward", "optimizer", "adamw_many")
    ]
    assert order == sorted(order) and names[0] == "forward"
    assert names.count("attention_forward") == names.count("attention_backward") == 2
    assert names.count("adamw_many") == 1
    c = model.config
    extents = {name: values for name, values, _ in intervals}
    assert extents["forward"] == []
    assert extents["matmul_gelu_forward"] == [14, c.channels, 4 * c.channels]
    assert extents["attention_backward"] == [2, 7, c.channels, c.num_heads]
    assert extents["adamw_many"] == [c.num_parameters]


def test_one_thread_and_one_profile_at_a_time() -> None:
    backend = _llmc.Backend("cpu")
    x = backend.empty([3])
    profile, other = _llmc.Profile(backend), _llmc.Profile(backend)
    profile.start("mine")

    def elsewhere() -> None:
        backend.zero(x)
        for wrong in (profile.intervals, lambda: profile.start("again"), profile.stop):
            with pytest.raises(ValueError, match="this profile"):
                wrong()

    with ThreadPoolExecutor(1) as other_thread:
        other_thread.submit(elsewhere).result()
    for wrong in (profile.intervals, lambda: other.start("other"), other.stop, lambda: other.mark("m")):
        with pytest.raises(ValueError, match="profile"):
            wrong()
    profile.stop()
    assert [name for name, *_ in profile.intervals()] == ["mine"]
    with pytest.raises(ValueError, match="does not run"):
        profile.stop()
    backend.zero(x)
    assert len(profile.intervals()) == 1 and not np.any(x.to_host())
