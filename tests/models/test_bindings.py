"""What Python may do to the extension without harm: threads, wrong arguments, writing through views."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import TINY, randomize

import llmc
from llmc import _llmc
from llmc.data.loader import DataLoader
from llmc.evals import ChoiceResult
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


def test_token_ids_are_never_made_of_something_else() -> None:
    """By any method that takes them: pybind11 alone would make a token of 1.5, and say nothing of use about a text."""
    model = llmc.GPT2(TINY)
    cache = model.kv_cache(1, 8)
    takers = {
        model.forward: 2,
        model.backward: 2,
        model.logits: 2,
        lambda ids: model.evaluate([[1, 2]], ids): 2,
        lambda ids: model.evaluate(ids, [[1, 2]]): 2,
        lambda ids: model.token_losses(ids, ids): 2,
        lambda ids: model.generate(ids, 1): 1,
        lambda ids: model.stream(ids, 1): 1,
        lambda ids: cache.prefill(0, ids): 1,
        cache.decode: 1,
        lambda ids: cache.queue_tokens(ids, [0.5], _llmc.SamplerOptions()): 1,
    }
    for take, dimensions in takers.items():
        for wrong, error, message in [
            ("hi", TypeError, r"got text: a tokenizer's encode\(text\)"),
            (["hi"], TypeError, r"got text: a tokenizer's encode\(text\)"),
            ([1.0], ValueError, "must be integers, got float64"),
            ([True], ValueError, "must be integers, got bool"),
            ([None], ValueError, "must be integers, got object"),
            ([2**31], ValueError, "token id 2147483648 does not fit 32 bits"),
            ([-(2**31) - 1, 5], ValueError, "token id -2147483649 does not fit 32 bits"),
            ([1, [2, 3]], ValueError, "rows of one length"),
        ]:
            with pytest.raises(error, match=message):
                take([wrong] if dimensions == 2 else wrong)
    with pytest.raises(ValueError, match=r"inputs have shape \(3,\), expected \(B, T\): one row of ids is \[ids\]"):
        model.forward([1, 2, 3])


@pytest.mark.parametrize(
    "ids", [range(3), np.arange(3, dtype=np.uint8), np.arange(6)[::2], np.arange(3, dtype=">i8"), []]
)
def test_token_ids_of_any_integers(ids: object) -> None:
    found = _llmc.token_ids(ids)
    assert found.dtype == np.int32 and found.flags.c_contiguous and found.tolist() == list(ids)  # type: ignore[call-overload]


def test_tensors_of_pytorch_are_token_ids() -> None:
    torch = pytest.importorskip("torch")
    model, ids = llmc.GPT2(TINY), torch.tensor([[1, 2, 3]])
    assert model.evaluate(ids, ids) == model.evaluate(ids.numpy(), ids.tolist())
    assert model.generate(ids, 3) == model.generate(list(ids), 3) == model.generate(ids.tolist(), 3)
    assert model.generate(ids[0], 3) == model.generate(ids, 3)[0]
    assert llmc.Tokenizer.byte_level().decode(ids[0] + 64) == "ABC"


def test_a_repr_is_a_short_line(tmp_path) -> None:
    model = llmc.GPT2(TINY)
    write_shard(tmp_path / "a.bin", np.arange(100), vocab_size=200)
    loader = DataLoader(tmp_path / "a.bin", 2, 8, shuffle=True)
    optimizer = llmc.AdamW(model, weight_decay=0.1)
    shown = [
        (model, f"GPT2(layers=2, heads=3, channels=33, max_seq_len=19, vocab_size=61, {TINY.num_parameters:,} parameters, f32, cpu)"),
        (loader, "DataLoader(1 file, 100 tokens, batch_size=2, seq_len=8, shuffled)"),
        (optimizer, "AdamW(betas=(0.9, 0.95), eps=1e-08, weight_decay=0.1, grad_clip=1.0; 0 updates made)"),
        (llmc.Tokenizer.byte_level(), "Tokenizer('bytes', 257 tokens, eot_token=256)"),
        (model.kv_cache(2, 8), "KVCache(2 sequences of 8 positions, "),
        (model.parameters, "Tensors(16 parameters, f32 on cpu: wte, wpe, ln1w, "),
        (model.gradients, "Tensors(16 gradients, f32 on cpu: wte, "),
        (model.backend, "Backend(cpu, "),
        (model.backend.info(), "DeviceInfo(cpu, "),
        (loader.shards[0], f"ShardInfo({str(tmp_path / 'a.bin')!r}, 100 tokens)"),
        (_llmc.SamplerOptions(0.5, 3), "SamplerOptions(temperature=0.5, top_k=3, top_p=1)"),
        (_llmc.thread_comms([_llmc.Backend("cpu", 1) for _ in range(2)])[1], "Comm(rank 1 of 2)"),
        (ChoiceResult([1], [[0.5, 0.25]], [[1, 1]], 0), "ChoiceResult(acc 1.0000, acc_norm 1.0000, 1 example, 0 rows truncated)"),
    ]  # fmt: skip
    for x, begin in shown:
        text = repr(x)
        assert text.startswith(begin) and text.endswith(")") and "\n" not in text, text


def test_what_is_no_model_and_no_token_file(tmp_path) -> None:
    model = llmc.GPT2(TINY)
    with pytest.raises(TypeError, match="model is a Tensors, expected the model itself"):
        llmc.AdamW(model.parameters)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected a GPT2Config; GPT2.from_descriptor\('d12'\)"):
        llmc.GPT2("d12")  # type: ignore[arg-type]
    for wrong in ("64", 64.0, None, True):
        with pytest.raises(TypeError, match=f"channels is {wrong!r}, expected a whole number"):
            llmc.GPT2Config(channels=wrong)  # type: ignore[arg-type]
    for ids in ([1, 2, 3], np.arange(3), 5):
        with pytest.raises(TypeError, match=r"expected paths of files, got \w+; llmc.formats.shards.write_shard\(\)"):
            DataLoader(ids, 1, 1)  # type: ignore[arg-type]
    for wrong, error in (("text", TypeError), (b"text", TypeError), ([1.5], ValueError), ([None], ValueError)):
        with pytest.raises(error, match="token ids must be integers, got (text|float64|object)"):
            write_shard(tmp_path / "b.bin", wrong)
    with pytest.raises(TypeError, match="seq_len is 8.5, expected a whole number"):
        DataLoader(tmp_path / "a.bin", 1, 8.5)  # type: ignore[arg-type]


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
        _llmc.DataLoader([tmp_path / "a.bin"], 2**32, 2**32)
    with pytest.raises(ValueError, match="batch_size is 4294967296, expected 1 to"):
        DataLoader([tmp_path / "a.bin"], 2**32, 1)
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
