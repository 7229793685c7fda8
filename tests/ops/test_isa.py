"""The kernel sets of the CPU: each trains, to the same bits on any number of threads; LLMC_ISA; GELU's last bits; the peak.

Every op is checked on every set in test_ops.py; dev/ci/check_kernels.cpp does it without Python.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import make_backend

from llmc import _llmc
from llmc.commands import info

SETS = _llmc.isa()["usable"]

# All sizes are odd, and so large that a matmul is split into several tasks and strips.
TRAIN = """
import json, sys
import numpy as np
import llmc
from llmc.optim.adamw import AdamW

config = llmc.GPT2Config(max_seq_len=75, vocab_size=211, num_layers=2, num_heads=3, channels=99)
tokens = np.random.default_rng(0).integers(0, 211, (2, 5, 75), dtype=np.int32)
result = {"isa": llmc._llmc.Backend("cpu").info().isa}
for dtype in ("f32", "bf16"):
    for threads in (1, 2, 3, 5):
        model = llmc.GPT2(config, dtype=dtype, threads=threads)
        optimizer, losses = AdamW(model), []
        for _ in range(3):
            model.zero_grad()
            model.forward(tokens[0])
            model.backward(tokens[1])
            optimizer.step(1e-2)
            losses += [model.mean_loss, optimizer.norm]
        losses += model.generate([1, 2, 3], 5, temperature=0)
        result[f"{dtype} {threads}"] = losses
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def trained():
    """What TRAIN prints, by kernel set; each runs in a process of its own, in which LLMC_ISA chooses the set."""
    processes = {
        isa: subprocess.Popen(
            [sys.executable, "-c", TRAIN], env=os.environ | {"LLMC_ISA": isa}, stdout=subprocess.PIPE, text=True
        )
        for isa in SETS
    }
    output = {isa: p.communicate()[0] for isa, p in processes.items()}
    assert [p.returncode for p in processes.values()] == [0] * len(SETS)
    return {isa: json.loads(text) for isa, text in output.items()}


@pytest.mark.parametrize("isa", SETS)
def test_the_forced_set_trains_alike_on_any_number_of_threads(trained, isa):
    result = trained[isa]
    assert result["isa"] == isa
    for dtype in ("f32", "bf16"):
        one = result[f"{dtype} 1"]
        assert all(result[f"{dtype} {threads}"] == one for threads in (2, 3, 5))
        assert one[4] < one[0]


@pytest.mark.parametrize("isa", SETS)
def test_a_set_says_whether_it_has_bf16_arithmetic(monkeypatch, capsys, isa):
    monkeypatch.setenv("LLMC_ISA", isa)
    has = isa in ("avx512_bf16", "amx", "neon_bf16")
    assert _llmc.Backend("cpu").info().bf16_arithmetic == has
    info.run(argparse.Namespace())
    assert ("widened to f32" in capsys.readouterr().out) == (not has)


@pytest.mark.parametrize("isa", SETS)
def test_sets_agree(trained, isa):
    """Sets differ only in the order of sums. In bf16 such a difference may be rounded up to 2^-8, and grows from there."""
    f32 = np.array(trained["baseline"]["f32 1"])
    np.testing.assert_allclose(trained[isa]["f32 1"], f32, rtol=2e-4)
    np.testing.assert_allclose(trained[isa]["bf16 1"][:6], f32[:6], rtol=3e-2)


@pytest.mark.parametrize(
    "name,why",
    [
        ("sse9", "unknown instruction set"),
        ("neon_bf16", "not supported"),
        ("avx2", "not supported"),
        ("accelerate", "not supported"),
    ],
)
def test_a_set_that_cannot_run_is_an_error(monkeypatch, name, why):
    if name in SETS:
        pytest.skip(f"{name} runs here")
    monkeypatch.setenv("LLMC_ISA", name)
    with pytest.raises(ValueError, match=f"LLMC_ISA={name}: {why}.*usable here: baseline"):
        _llmc.Backend("cpu")


def test_an_empty_choice_is_none(monkeypatch):
    monkeypatch.delenv("LLMC_ISA", raising=False)
    best = _llmc.Backend("cpu").info().isa
    monkeypatch.setenv("LLMC_ISA", "")
    assert _llmc.Backend("cpu").info().isa == best


@pytest.mark.parametrize("isa", SETS)
def test_gelu_in_f32_is_right_to_two_units_in_the_last_place(isa):
    """Compared with float64. Without fused multiply-add (SSE2) the rounding of 2u adds up to 3 * 2u units."""
    x = np.concatenate([np.linspace(-9.5, 10, 400_001), np.geomspace(1e-30, 1, 9999), -np.geomspace(1e-30, 1, 9999)])
    x = x.astype(np.float32)
    backend = make_backend(f"cpu:{isa}")
    inp, out = backend.empty([x.size]), backend.empty([x.size])
    inp.from_host(x)
    backend.gelu_forward(out, inp)
    x64 = x.astype(np.float64)
    u2 = 2 * np.sqrt(2 / np.pi) * (x64 + 0.044715 * x64**3)
    exact = x64 / (1 + np.exp(-u2))
    units = np.abs(out.to_host() - exact) / np.spacing(np.abs(exact).astype(np.float32))
    allowed = 2 + 3 * np.maximum(0, -u2) * (isa == "baseline")
    assert (units <= allowed).all(), f"{units.max():.2f} at x = {x[units.argmax()]}"


@pytest.mark.parametrize("isa", SETS)
def test_peak_flops(monkeypatch, isa):
    """The machine may be busy during the 60 ms of the measurement, so only the order of magnitude is checked."""
    monkeypatch.setenv("LLMC_ISA", isa)
    for dtype in ("f32", "bf16"):
        assert 1e7 < _llmc.cpu_peak_flops(dtype, 1) < 1e13
    with pytest.raises(ValueError, match="dtype is i32"):
        _llmc.cpu_peak_flops("i32", 1)


def test_the_cpu_has_a_name() -> None:
    name = _llmc.Backend("cpu").info().description
    assert name and name == name.strip() and name.isprintable()
