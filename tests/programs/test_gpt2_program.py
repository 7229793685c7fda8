"""`python -m llmc.test_gpt2` and the C++ program: okay on a true debug state, not on one with a single wrong gradient.

The C++ programs are tested where LLMC_APPS names the folder that has them; dev/ci/emulation.sh builds them and runs this.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc.formats.debug_state import DebugState, read_debug_state, write_debug_state

torch = pytest.importorskip("torch", reason="torch is not installed")
torch.set_num_threads(1)  # threads would make matmuls this small slower: they would mostly wait for each other

from llmc import test_gpt2  # noqa: E402
from llmc.reference import GPT  # noqa: E402
from llmc.reference.__main__ import debug_state  # noqa: E402

CONFIG = llmc.GPT2Config(max_seq_len=24, vocab_size=61, num_layers=2, num_heads=3, channels=48)
APPS = os.environ.get("LLMC_APPS")
needs_apps = pytest.mark.skipif(
    APPS is None, reason="LLMC_APPS does not name a folder with the C++ programs (dev/ci/emulation.sh does)"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model in f32 and bf16 and a debug state: model.bin, bf16.bin, state.bin."""
    path = tmp_path_factory.mktemp("state")
    model = llmc.GPT2(CONFIG, seed=4)
    model.save(path / "model.bin")
    gpt = GPT(CONFIG)
    gpt.load_llmc(model.parameters)
    tokens = torch.from_numpy(np.random.default_rng(2).integers(0, 20, (3, 25)))
    write_debug_state(path / "state.bin", debug_state(gpt, tokens[:, :-1], tokens[:, 1:]))
    llmc.GPT2.from_checkpoint(path / "model.bin", dtype="bf16").save(path / "bf16.bin")
    return path


Program = Callable[..., tuple[int, str]]


@pytest.fixture(params=["python", pytest.param("c++", marks=needs_apps)])
def program(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Program:
    """Return a function that runs the program: program(model, state, dtype) -> (exit code, output)."""

    def call(model: Path, state: Path, dtype: str = "f32") -> tuple[int, str]:
        if request.param == "python":
            code = test_gpt2.main([str(model), str(state), "--dtype", dtype])
            return code, "".join(capsys.readouterr())
        return run_app("test_gpt2", str(model), str(state), "-p", dtype)

    return call


def run_app(name: str, *arguments: str, cwd: Path | None = None) -> tuple[int, str]:
    """Run a C++ program; return its exit code and output."""
    assert APPS is not None
    command = [str(Path(APPS).resolve() / name), *arguments]
    done = subprocess.run(command, capture_output=True, cwd=cwd, timeout=120, check=False)
    return done.returncode, (done.stdout + done.stderr).decode(errors="replace")


def test_okay(folder: Path, program: Program) -> None:
    code, out = program(folder / "model.bin", folder / "state.bin")
    lines = out.splitlines()
    assert code == 0 and lines[-1] == "overall okay: 1"
    assert lines[0] == "[GPT-2]" and f"num_parameters: {CONFIG.num_parameters}" in lines
    assert lines.index("[State]") and "batch_size: 3" in lines and "seq_len: 24" in lines
    assert sum(line.startswith("TENSOR OK") for line in lines) == 16
    assert len(re.findall(r"^step \d: loss .* OK = 1$", out, re.M)) == 10
    assert "OK (LOGITS)" in out and "NOT" not in out and "\nLOSS OK:" in out


def test_okay_bf16(folder: Path, program: Program) -> None:
    code, out = program(folder / "bf16.bin", folder / "state.bin", "bf16")
    assert code == 0 and out.endswith("overall okay: 1\n")


def changed(folder: Path, tmp_path: Path, **changes: object) -> Path:
    """Write the debug state with some fields changed, and return its path."""
    state = read_debug_state(folder / "state.bin", CONFIG)
    write_debug_state(tmp_path / "changed.bin", DebugState(**{**vars(state), **changes}))  # type: ignore[arg-type]
    return tmp_path / "changed.bin"


@pytest.mark.parametrize("name", ["wte", "qkvb", "lnfw"])
@pytest.mark.parametrize("value", [1e-3, np.nan])
def test_one_wrong_gradient(folder: Path, tmp_path: Path, program: Program, name: str, value: float) -> None:
    """A single element that is wrong by about a thousandth, or NaN, is found."""
    state = read_debug_state(folder / "state.bin", CONFIG)
    gradients = {k: v.copy() for k, v in state.gradients.items()}
    wrong = gradients[name].reshape(-1)
    wrong[len(wrong) // 2] = 1.1 * wrong[len(wrong) // 2] + value
    code, out = program(folder / "model.bin", changed(folder, tmp_path, gradients=gradients))
    assert code == 1 and out.endswith("overall okay: 0\n")
    verdicts = dict(zip(re.findall(r"^d(\w+)$", out, re.M), re.findall(r"^TENSOR (.*), maxdiff", out, re.M)))
    assert verdicts == {k: "NOT OK" if k == name else "OK" for k in CONFIG.parameter_shapes}
    assert f"at {len(wrong) // 2}" in out


def test_wrong_logit_loss_and_step(folder: Path, tmp_path: Path, program: Program) -> None:
    state = read_debug_state(folder / "state.bin", CONFIG)
    logits = state.logits.copy()
    logits[2, 3, 5] += 0.01
    late = [*state.losses[:9], state.losses[9] + 0.02]
    for changes, line in (
        ({"logits": logits}, f"MISMATCH AT INDEX {2 * 24 + 3},5"),
        ({"loss": state.loss + 1e-4}, "LOSS MISMATCH"),
        ({"losses": late}, "OK = 0"),
    ):
        code, out = program(folder / "model.bin", changed(folder, tmp_path, **changes))
        assert code == 1 and line in out and out.endswith("overall okay: 0\n")
    code, out = program(folder / "model.bin", changed(folder, tmp_path, losses=[]))
    assert code == 0 and "compared with nothing" in out


def test_bad_files(folder: Path, tmp_path: Path, program: Program) -> None:
    data = (folder / "state.bin").read_bytes()
    (tmp_path / "short.bin").write_bytes(data[:-4])
    (tmp_path / "magic.bin").write_bytes(b"\0" + data[1:])
    for model, state, message in (
        (folder / "absent.bin", folder / "state.bin", "absent.bin"),
        (folder / "model.bin", tmp_path / "absent.bin", "absent.bin"),
        (folder / "model.bin", tmp_path / "short.bin", "short.bin"),
        (folder / "model.bin", tmp_path / "magic.bin", "magic"),
        (folder / "state.bin", folder / "state.bin", "magic 20240327"),
    ):
        code, out = program(model, state)
        assert code in (1, 2) and message in out and "okay" not in out


def test_as_a_module(folder: Path) -> None:
    command = [sys.executable, "-m", "llmc.test_gpt2", "model.bin", "state.bin"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.endswith("overall okay: 1\n")
