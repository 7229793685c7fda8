"""What Python may do to the extension without harm: threads, wrong arguments, writing through views."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import TINY, randomize

import llmc
from llmc import _llmc
from llmc.data.loader import DataLoader
from llmc.formats.shards import write_shard


def test_threads_share_a_backend() -> None:
    """Ops of several threads take turns, because they share scratch memory that grows."""
    backend = _llmc.Backend("cpu", 1)

    def work(n: int) -> list[np.ndarray]:
        results = []
        for K in range(n, 600, 40):
            inp, weight, out = backend.empty([40, K]), backend.empty([64, K]), backend.empty([40, 64])
            inp.from_host(np.full((40, K), 0.5, np.float32))
            weight.from_host(np.full((64, K), 2.0, np.float32))
            backend.matmul_forward(out, inp, weight)
            results.append(out.to_host() / K)
        return results

    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(work, range(8, 40, 8)):
            for result in results:
                np.testing.assert_array_equal(result, np.ones((40, 64)))


def test_parameters_may_be_written_through_a_view_that_is_dropped(backend: _llmc.Backend) -> None:
    """Kernel sets that keep packed copies of weights must notice it."""
    native = _llmc.GPT2(TINY.native(), backend, _llmc.ModelOptions("bf16", "bf16"))
    native.init_weights(1)
    x = np.array([[1, 2, 3]], np.int32)
    assert np.abs(native.logits(x)).max() > 0
    if backend.info().name == "cpu":
        native.parameter_view("wte")[:] = 0
        np.testing.assert_array_equal(native.logits(x), 0)


def test_a_step_without_backward_has_no_gradient() -> None:
    model = llmc.GPT2(TINY)
    optimizer = llmc.AdamW(model)
    model.forward([[1, 2, 3]])
    model.backward([[2, 3, 4]])
    optimizer.step(0.0)
    assert optimizer.norm > 0
    model.zero_grad()
    optimizer.step(0.0)
    assert optimizer.norm == 0


def test_none_is_no_backend() -> None:
    with pytest.raises(TypeError):
        _llmc.GPT2(TINY.native(), None, _llmc.ModelOptions())  # type: ignore[arg-type]


def test_cache_indices() -> None:
    model = llmc.GPT2(TINY)
    randomize(model)
    cache = model.kv_cache(2, 8)
    for b in (-1, 2, 10**9):
        with pytest.raises(ValueError, match=f"sequence {b} of 2"):
            cache.length(b)
        with pytest.raises(ValueError, match=f"sequence {b} of 2"):
            cache.clear(b)
    with pytest.raises(ValueError, match="B is 0, expected 1 to"):
        model.kv_cache(0, 8)


def test_sizes_that_overflow(tmp_path) -> None:
    backend = _llmc.Backend("cpu", 1)
    with pytest.raises(ValueError, match="at most 1152921504606846976 elements"):
        backend.empty([2**62, 16])
    with pytest.raises(ValueError, match="threads is 2147483647, expected at most 1024"):
        _llmc.Backend("cpu", 2**31 - 1)
    write_shard(tmp_path / "a.bin", np.arange(100), vocab_size=200)
    with pytest.raises(ValueError, match="out of range"):
        DataLoader([tmp_path / "a.bin"], 2**32, 2**32)
    with pytest.raises(ValueError, match="out of range"):
        llmc.GPT2Config(num_layers=4096, channels=1 << 20, num_heads=1).native()


@pytest.mark.parametrize(
    "dtype,array", [("f32", np.int32), ("f32", np.float64), ("i32", np.float32), ("bf16", np.int16)]
)
def test_arrays_are_not_converted_in_passing(dtype: str, array: type) -> None:
    tensor = _llmc.Backend("cpu", 1).empty([4], dtype)
    with pytest.raises(ValueError, match="does not fit a tensor of"):
        tensor.from_host(np.zeros(4, array))
    with pytest.raises(ValueError, match="does not fit a tensor of"):
        tensor.write(0, np.zeros(4, array))
    with pytest.raises(ValueError, match="a contiguous array of"):
        tensor.to_host(np.zeros(5, np.float32))
