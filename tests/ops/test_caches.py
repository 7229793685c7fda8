"""The sizes of the caches: how they are read, LLMC_CACHES, and that no result depends on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import make_backend

from llmc import _llmc

SETS = _llmc.isa()["usable"]


def sysfs(root: Path, cpu: int, *caches: tuple[str, ...]) -> None:
    """Write what Linux tells of a CPU's caches: level, type, size and shared_cpu_list of each."""
    for index, values in enumerate(caches):
        folder = root / f"cpu{cpu}" / "cache" / f"index{index}"
        folder.mkdir(parents=True)
        for name, value in zip(("level", "type", "size", "shared_cpu_list"), values, strict=False):
            (folder / name).write_text(value + "\n")


def test_what_linux_tells(tmp_path):
    sysfs(tmp_path, 2, ("1", "Data", "32K", "2"), ("1", "Instruction", "64K", "2"), ("2", "Unified", "512K", "2,6"),
          ("3", "Unified", "16M", "0-3,8-11"))  # fmt: skip
    assert _llmc.caches_in(str(tmp_path), list(range(16))) == [(32 << 10, 1), (512 << 10, 2), (16 << 20, 8)]
    assert _llmc.caches_in(str(tmp_path), [2, 3, 9]) == [(32 << 10, 1), (512 << 10, 1), (16 << 20, 3)]
    assert _llmc.caches_in(str(tmp_path), [3]) == [(0, 1)] * 3  # it is offline


def test_the_smallest_share_counts(tmp_path):
    """Two threads of a performance core and four efficiency cores that share an L2."""
    for cpu in (0, 1):
        sysfs(
            tmp_path, cpu, ("1", "Data", "48K", "0-1"), ("2", "Unified", "1280K", "0-1"), ("3", "Unified", "12M", "0-5")
        )
    for cpu in (2, 3, 4, 5):
        sysfs(
            tmp_path, cpu, ("1", "Data", "32K", str(cpu)), ("2", "Unified", "2M", "2-5"), ("3", "Unified", "12M", "0-5")
        )
    assert _llmc.caches_in(str(tmp_path), list(range(6))) == [(48 << 10, 2), (2 << 20, 4), (12 << 20, 6)]
    assert _llmc.caches_in(str(tmp_path), [0, 1]) == [(48 << 10, 2), (1280 << 10, 2), (12 << 20, 2)]
    assert _llmc.caches_in(str(tmp_path), [0, 2]) == [(32 << 10, 1), (1280 << 10, 1), (12 << 20, 2)]


def test_what_linux_does_not_tell(tmp_path):
    sysfs(tmp_path, 0, ("1", "Data", "unknown", "0"), ("2", "Unified", "1024K"), ("3",), ("x", "Unified", "1M", "0"))
    assert _llmc.caches_in(str(tmp_path), [0, 1]) == [(0, 1), (1 << 20, 1), (0, 1)]
    assert _llmc.caches_in(str(tmp_path / "absent"), [0]) == [(0, 1)] * 3
    sysfs(tmp_path, 7, ("1", "Data", "0K", "7"), ("2", "Unified", "1K", "7"), ("3", "Unified", "4096M", "7"))
    assert _llmc.caches_in(str(tmp_path), [7]) == [(0, 1)] * 3
    assert _llmc.caches_in(str(tmp_path), []) == [(0, 1)] * 3


def test_sizes_may_be_given(monkeypatch):
    monkeypatch.setenv("LLMC_CACHES", "32K,512k,16M")
    info = _llmc.Backend("cpu").info()
    assert (info.l1_bytes, info.l2_bytes, info.l3_bytes) == (32 << 10, 512 << 10, 16 << 20)
    monkeypatch.setenv("LLMC_CACHES", "")
    assert _llmc.Backend("cpu").info().l1_bytes >= 0


@pytest.mark.parametrize(
    "wanted", ["512K", "32K,512K", "32K,512K,16M,1M", "32K,,16M", "0,512K,16M", "32K,512Q,16M", "-1,1,1"]
)
def test_other_sizes_are_an_error(monkeypatch, wanted):
    monkeypatch.setenv("LLMC_CACHES", wanted)
    with pytest.raises(ValueError, match=f"LLMC_CACHES={wanted}: expected the sizes of L1, L2 and L3"):
        _llmc.Backend("cpu")


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("isa", SETS)
def test_no_bit_depends_on_them(monkeypatch, isa, dtype):
    """With a tiny L2 there are many blocks of rows, which share the packed strips of B; K is more than a stretch of 768 pairs."""
    N, C, OC = 211, 1603, 131
    others = ["f32"] if dtype == "f32" else ["bf16", "f32"]  # dtypes that results may have

    def products(caches: str, threads: int) -> list[np.ndarray]:
        monkeypatch.setenv("LLMC_CACHES", caches)
        backend = make_backend(f"cpu:{isa}", threads)
        rng = np.random.default_rng(0)

        def tensor(*shape, dtype=dtype):
            t = backend.empty(list(shape), dtype)
            x = rng.standard_normal(shape, dtype=np.float32)
            t.from_host(x if dtype == "f32" else (x.view(np.uint32) >> 16).astype(np.uint16))
            return t

        inp, weight, bias, dout, pre, wide = (
            tensor(N, C), tensor(OC, C), tensor(OC), tensor(N, OC), tensor(N, C), tensor(C, OC)
        )  # fmt: skip
        gelu, before, dinp, narrow = tensor(N, OC), tensor(N, OC), tensor(N, C), tensor(N, OC)
        backend.matmul_gelu_forward(gelu, before, inp, weight, bias)
        backend.matmul_gelu_backward(dinp, None, None, dout, None, weight, pre)
        backend.matmul_backward(narrow, None, None, inp, None, wide)
        results = [gelu, before, dinp, narrow]
        for other in others:
            out, dweight, square = tensor(N, OC, dtype=other), tensor(OC, C, dtype=other), tensor(OC, OC, dtype=other)
            backend.matmul_forward(out, inp, weight, bias)
            backend.matmul_backward(None, dweight, None, dout, inp, weight, True)
            backend.matmul_backward(None, square, None, wide, wide, tensor(OC, OC))
            results += [out, dweight, square]
        return [t.to_host().copy() for t in results]

    expected = products("32K,64M,64M", 1)
    for caches, threads in (("16K,64K,64K", 1), ("32K,256K,2M", 2), ("48K,1M,32M", 3), ("1,1,1", 1)):
        for a, b in zip(expected, products(caches, threads), strict=True):
            assert a.tobytes() == b.tobytes()
