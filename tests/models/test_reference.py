"""`python -m llmc.reference`, and the debug state that it writes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc.formats.debug_state import DebugState, read_debug_state, write_debug_state
from llmc.formats.shards import write_shard

torch = pytest.importorskip("torch", reason="torch is not installed")
torch.set_num_threads(1)  # PyTorch's matmuls are so small here that threads cost more than they save

from llmc.reference import GPT  # noqa: E402
from llmc.reference import __main__ as program  # noqa: E402

V = 61
CONFIG = llmc.GPT2Config(max_seq_len=20, vocab_size=V, num_layers=2, num_heads=3, channels=33)
BASE = ["--batch_size", "2", "--sequence_length", "16", "--total_batch_size", "32", "--device", "cpu"]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder with a model and tokens the current one."""
    monkeypatch.chdir(tmp_path)
    llmc.GPT2(CONFIG, seed=3).save("tiny.bin")
    write_shard("tokens.bin", np.random.default_rng(1).integers(0, 9, 500))
    return tmp_path


def losses(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"train loss (\S+)", text)]


def call(*arguments: str) -> int:
    return program.main(["--model", "tiny.bin", "--input_bin", "tokens.bin", *BASE, *arguments])


def test_files(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--output_dir", "out", "--tensors_dir", "tensors") == 0
    assert (data / "tensors/gpt2_tiny.bin").read_bytes() == (data / "tiny.bin").read_bytes()
    narrow = llmc.GPT2.from_checkpoint("tensors/gpt2_tiny_bf16.bin")
    assert narrow.dtype == "bf16"
    wide = llmc.GPT2.from_checkpoint("tiny.bin")
    np.testing.assert_array_equal(
        narrow.parameters["qkvw"].astype(np.float32),
        torch.from_numpy(wide.parameters["qkvw"].copy()).bfloat16().float().numpy(),
    )
    printed = capsys.readouterr().out
    trained = losses(printed)
    state = read_debug_state("tensors/gpt2_tiny_debug_state.bin", CONFIG)
    assert len(trained) == 10 and trained[-1] < trained[0] - 0.01
    np.testing.assert_allclose(state.losses, trained, atol=1e-6)  # the defaults are the recipe
    tokens = np.fromfile("tokens.bin", "<u2", 33, offset=1024).astype(np.int32)
    np.testing.assert_array_equal(state.inputs, tokens[:-1].reshape(2, 16))
    np.testing.assert_array_equal(state.targets, tokens[1:].reshape(2, 16))
    gpt = GPT(CONFIG)
    gpt.load_llmc(wide.parameters)
    logits, loss = gpt(torch.from_numpy(state.inputs).long(), torch.from_numpy(state.targets).long())
    loss.backward()
    np.testing.assert_array_equal(state.logits, logits.detach().numpy())
    assert state.loss == pytest.approx(loss.item())
    for name, gradient in gpt.gradients().items():
        np.testing.assert_array_equal(state.gradients[name], gradient)
    assert (data / "out/main.log").read_text().splitlines()[0] == f"s:0 trl:{trained[0]:f}"


def test_same_data_and_losses_as_llmc(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """llmc's loop and PyTorch's have equal losses with shuffled data, two micro-batches a step, warm-up, decay and clipping."""
    options = ["--overfit_single_batch", "0", "--shuffle", "1", "--total_batch_size", "64", "--num_iterations", "12"]
    options += [
        "--warmup_iters",
        "3",
        "--learning_rate_decay_frac",
        "0.1",
        "--weight_decay",
        "0.1",
        "--learning_rate",
        "1e-3",
    ]
    assert (
        call(
            *options,
            "--write_tensors",
            "0",
            "--input_val_bin",
            "tokens.bin",
            "--val_loss_every",
            "12",
            "--val_max_steps",
            "3",
        )
        == 0
    )
    printed = capsys.readouterr().out
    model = llmc.GPT2.from_checkpoint("tiny.bin")
    optimizer = llmc.AdamW(model, weight_decay=0.1)
    loader = llmc.DataLoader("tokens.bin", 2, 16, shuffle=True)
    lr = llmc.lr_schedule("cosine", 1e-3, 3, 12, 0.1)
    expected_losses = []
    for step in range(12):
        model.zero_grad()
        for _ in range(2):
            inputs, targets = loader.next_batch()
            model.forward(inputs)
            model.backward(targets, 0.5)
        expected_losses.append(model.mean_loss)
        optimizer.step(lr(step))
    np.testing.assert_allclose(losses(printed), expected_losses, rtol=3e-5)
    val = llmc.DataLoader("tokens.bin", 2, 16)
    expected = np.mean([model.evaluate(*val.next_batch()) for _ in range(3)])
    assert float(re.findall(r"val loss (\S+)", printed)[-1]) == pytest.approx(expected, rel=3e-5)


@pytest.mark.parametrize(
    "options", [["--flash", "1"], ["--dtype", "bfloat16"], ["--inference_only", "1"], ["--sample_every", "2"]]
)
def test_options(data: Path, capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    assert call("--num_iterations", "4", "--write_tensors", "0") == 0
    plain = losses(capsys.readouterr().out)
    assert call("--num_iterations", "4", "--write_tensors", "0", *options) == 0
    printed = capsys.readouterr().out
    if options[0] == "--inference_only":
        assert losses(printed) == [plain[0]] * 4
    elif options[0] == "--sample_every":
        samples = re.findall(r"-{15}\n(.*?)\n-{15}", printed)
        assert len(samples) == 3 and all(len(s.split()) == 33 for s in samples)
    else:
        np.testing.assert_allclose(losses(printed), plain, rtol=1e-2 if "--dtype" in options else 1e-5)


def test_two_processes(data: Path) -> None:
    """Two processes joined by gloo have the losses of one with the whole batch, with ZeRO-1 too."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "llmc.reference",
    ]
    command += ["--model", "tiny.bin", "--input_bin", "tokens.bin", "--batch_size", "1", "--sequence_length", "16"]
    command += [
        "--total_batch_size",
        "32",
        "--device",
        "cpu",
        "--num_iterations",
        "3",
        "--write_tensors",
        "0",
        "--zero_stage",
        "1",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    model = llmc.GPT2.from_checkpoint("tiny.bin")
    optimizer = llmc.AdamW(model)
    inputs, targets = llmc.DataLoader("tokens.bin", 2, 16).next_batch()
    expected_losses = []
    for _ in range(3):
        model.zero_grad()
        model.forward(inputs)
        model.backward(targets)
        expected_losses.append(model.mean_loss)
        optimizer.step(1e-4)
    np.testing.assert_allclose(losses(done.stdout), expected_losses, rtol=1e-5)


def test_errors(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--total_batch_size", "33"], "multiple of B * T * processes = 32"),
        (["--sequence_length", "21", "--total_batch_size", "42"], "context 20"),
        (["--model", "absent.bin"], "absent.bin"),
        (["--model", "d13x"], "d13x"),
        (["--input_bin", "absent*.bin"], "absent*.bin"),
        (["--dtype", "float16"], "float16"),
    ):
        assert call(*options) in (1, 2)
        error = capsys.readouterr().err
        assert message in error and len(error.strip().splitlines()) == 1


def random_state(rng: np.random.Generator, num_losses: int = 10) -> DebugState:
    inputs, targets = rng.integers(0, V, (2, 2, 16)).astype(np.int32)
    gradients = {name: rng.normal(size=shape).astype(np.float32) for name, shape in CONFIG.parameter_shapes.items()}
    return DebugState(
        inputs,
        targets,
        rng.normal(size=(2, 16, V)).astype(np.float32),
        1.5,
        gradients,
        [float(i) for i in range(num_losses)],
    )


@pytest.mark.parametrize("num_losses", [0, 10])
def test_debug_state_round_trip(tmp_path: Path, num_losses: int) -> None:
    state = random_state(np.random.default_rng(0), num_losses)
    write_debug_state(tmp_path / "s.bin", state)
    again = read_debug_state(tmp_path / "s.bin", CONFIG)
    assert again.loss == state.loss and again.losses == state.losses
    for name in ("inputs", "targets", "logits"):
        np.testing.assert_array_equal(getattr(again, name), getattr(state, name))
    assert list(again.gradients) == list(llmc.GPT2(CONFIG).parameters)
    for name, gradient in state.gradients.items():
        np.testing.assert_array_equal(again.gradients[name], gradient)


def test_debug_state_damaged(tmp_path: Path) -> None:
    path = tmp_path / "s.bin"
    write_debug_state(path, random_state(np.random.default_rng(0)))
    good = path.read_bytes()

    def header(i: int, value: int) -> bytes:
        return good[: 4 * i] + value.to_bytes(4, "little", signed=True) + good[4 * i + 4 :]

    for data, message in (
        (good[:500], "too few"),
        (header(0, 1), "magic 1"),
        (header(1, 1), "version 1"),
        (header(2, -1), "-1 rows"),
        (header(3, 21), "21 tokens"),
        (header(3, 2**31 - 1), "2147483647 tokens"),
        (header(2, 2**31 - 1), "expected"),
        (header(4, 2**30), "1073741824 losses"),
        (good[:-1], "expected"),
        (good + b"\0", "expected"),
    ):
        path.write_bytes(data)
        with pytest.raises(llmc.Error, match=message):
            read_debug_state(path, CONFIG)
    with pytest.raises(FileNotFoundError, match=r"llmc\.reference"):
        read_debug_state(tmp_path / "absent.bin", CONFIG)
