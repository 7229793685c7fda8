"""Evaluation: llm.c's eval file, scores against PyTorch item by item, validation loss against PyTorch."""

from __future__ import annotations

import argparse
import json
import math
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import tiny_run

import llmc
from llmc import evals
from llmc.commands import eval as command
from llmc.formats.eval_file import read_eval_file
from llmc.formats.shards import write_shard
from llmc.training.sources import validation_files

V, T = 97, 40
CONFIG = llmc.GPT2Config(max_seq_len=T, vocab_size=V, num_layers=2, num_heads=2, channels=32)


def eval_bytes(examples: list[tuple[int, list[int], list[list[int]]]]) -> bytes:
    """Return an eval file in llm.c's format of examples (label, context, endings)."""
    stream: list[int] = []
    longest = 0
    for i, (label, context, endings) in enumerate(examples):
        body = [i, label, len(endings), len(context), *context]
        for ending in endings:
            body += [len(ending), *ending]
        size = 2 * (len(body) + 2)
        longest = max(longest, size)
        stream += [65535, size, *body]
    header = struct.pack("<4i", 20240522, 1, len(examples), longest).ljust(1024, b"\0")
    return header + struct.pack(f"<{len(stream)}H", *stream)


def make_examples(count: int, seed: int = 5) -> list[tuple[int, list[int], list[list[int]]]]:
    rng = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(V) for _ in range(rng.randint(low, high))]

    return [(rng.randrange(4), tokens(1, 20), [tokens(1, 12) for _ in range(4)]) for _ in range(count)]


@pytest.fixture(scope="module")
def model() -> llmc.GPT2:
    """Make a random model whose probabilities are peaked, so that no choice is near a tie."""
    model = llmc.GPT2(CONFIG, seed=9)
    for name in ("wte", "wpe", "qkvw", "fcw"):
        model.parameters[name] = model.parameters[name] * 8
    return model


@pytest.fixture(scope="module")
def reference(model: llmc.GPT2) -> Any:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    torch.set_num_threads(1)  # PyTorch's matmuls are so small here that threads cost more than they save
    from llmc.reference import GPT

    gpt = GPT(CONFIG)
    gpt.load_llmc(model.parameters)
    return gpt


@pytest.fixture(scope="module")
def fifty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("eval") / "fifty.bin"
    path.write_bytes(eval_bytes(make_examples(50)))
    return path


def torch_choices(
    gpt: Any, examples: list[tuple[int, list[int], list[list[int]]]]
) -> list[tuple[list[float], list[float]]]:
    """Return PyTorch's choices by the sums and by the means of the endings' losses, one row at a time, without padding."""
    import torch

    out = []
    for _, context, endings in examples:
        sums, means = [], []
        for ending in endings:
            row = torch.tensor([context + ending])
            with torch.no_grad():
                logits, _ = gpt(row[:, :-1])
            losses = torch.nn.functional.cross_entropy(logits[0], row[0, 1:], reduction="none")[-len(ending) :]
            sums.append(losses.sum().item())
            means.append(losses.mean().item())
        out.append((sums, means))
    return out


def test_hellaswag_equals_torch_item_by_item(model: llmc.GPT2, reference: Any, fifty: Path) -> None:
    examples = make_examples(50)
    expected = torch_choices(reference, examples)
    result = evals.hellaswag(model, fifty, batch_size=7)
    np.testing.assert_allclose(result.losses, [sums for sums, _ in expected], rtol=2e-5)
    assert result.choices == [int(np.argmin(sums)) for sums, _ in expected]
    assert result.choices_norm == [int(np.argmin(means)) for _, means in expected]
    assert result.choices != result.choices_norm  # the two kinds of choice differ, or only one of them would be tested
    labels = [label for label, _, _ in examples]
    assert result.labels == labels and result.total == 50 and result.truncated == 0
    assert result.correct == sum(c == l for c, l in zip(result.choices, labels))
    assert result.correct_norm == sum(c == l for c, l in zip(result.choices_norm, labels))
    assert result.acc == result.correct / 50 and result.acc_norm == result.correct_norm / 50


@pytest.mark.parametrize("batch_size", [1, 4, 300])
def test_batches_do_not_matter(model: llmc.GPT2, fifty: Path, batch_size: int) -> None:
    result, other = (evals.mmlu(model, fifty, batch_size=b, limit=9) for b in (batch_size, 5))
    np.testing.assert_allclose(result.losses, other.losses, rtol=1e-5)
    assert result.choices_norm == other.choices_norm and result.total == 9


def test_long_contexts_are_cut_on_the_left(model: llmc.GPT2, reference: Any, tmp_path: Path) -> None:
    rng = random.Random(2)
    context = [rng.randrange(V) for _ in range(100)]
    endings = [[rng.randrange(V) for _ in range(n)] for n in (1, 5, 30, T)]
    path = tmp_path / "long.bin"
    path.write_bytes(eval_bytes([(0, context, endings), (1, context[:10], [[1], [2]])]))
    result = evals.hellaswag(model, path)
    assert result.truncated == 4
    expected = [
        torch_choices(reference, [(0, context[-(T + 1 - len(ending)) :], [ending])])[0][0][0] for ending in endings
    ]
    np.testing.assert_allclose(result.losses[0], expected, rtol=2e-5)
    path.write_bytes(eval_bytes([(0, context, [[1] * (T + 1), [2]])]))
    with pytest.raises(ValueError, match=f"{T + 1} tokens"):
        evals.hellaswag(model, path)


def test_errors(model: llmc.GPT2, fifty: Path, tmp_path: Path) -> None:
    good = fifty.read_bytes()
    path = tmp_path / "bad.bin"
    with pytest.raises(FileNotFoundError, match="llmc data hellaswag"):
        read_eval_file(path)
    begin = struct.pack("<4i", 20240522, 1, 1, 0).ljust(1024, b"\0")
    for data, message in (
        (b"", "too few"),
        (good[:1000], "too few"),
        (b"\0" * 2000, "magic 0"),
        (struct.pack("<2i", 20240522, 2) + good[8:], "version 2"),
        (struct.pack("<3i", 20240522, 1, 2**31 - 1) + good[12:], "announces 2147483647"),
        (struct.pack("<3i", 20240522, 1, -1) + good[12:], "announces -1"),
        (struct.pack("<3i", 20240522, 1, 51) + good[12:], "example 50: the file ends"),
        (good[:-2], "example 49"),
        (good + b"\0", "1 bytes follow"),
        (good + b"\0\0", "2 bytes follow"),
        (begin + struct.pack("<9H", 65534, 18, 0, 0, 1, 1, 5, 1, 5), "begins with 65534"),
        (begin + struct.pack("<9H", 65535, 18, 0, 1, 1, 1, 5, 1, 5), "label is 1 of 1"),
        (begin + struct.pack("<9H", 65535, 18, 0, 0, 1, 0, 5, 1, 5), "context is empty"),
        (begin + struct.pack("<9H", 65535, 18, 0, 0, 1, 1, 5, 2, 5), "ending 0 is"),
        (begin + struct.pack("<10H", 65535, 20, 0, 0, 1, 1, 5, 1, 5, 5), "2 bytes are left over"),
    ):
        path.write_bytes(data)
        with pytest.raises(llmc.Error, match=message):
            read_eval_file(path)
    path.write_bytes(eval_bytes([(0, [1], [[V], [2]])]))
    with pytest.raises(ValueError, match=f"token {V}"):
        evals.hellaswag(model, path)
    with pytest.raises(ValueError, match="batch_size is 0"):
        evals.hellaswag(model, fifty, batch_size=0)
    with pytest.raises(ValueError, match="no examples"):
        evals.hellaswag(model, fifty, limit=0)


def test_mutated_eval_files(tmp_path: Path) -> None:
    """Whatever a file holds, reading it returns examples or raises llmc.Error."""
    good = eval_bytes(make_examples(5))
    rng = random.Random(11)
    path = tmp_path / "mutated.bin"
    refused = 0
    for i in range(500):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(1024 if i % 2 else 0, len(data))] = rng.randrange(256)
        path.write_bytes(data if i % 3 else data[: rng.randrange(len(data))])
        try:
            read_eval_file(path)
        except llmc.Error as e:
            assert "mutated.bin" in str(e)
            refused += 1
    assert 100 < refused < 500


# ---- validation loss ----


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(4)
    paths = [tmp_path / f"val_{i}.bin" for i in range(2)]
    for path, count in zip(paths, (211, 97)):
        write_shard(path, rng.integers(0, V, count))
    return paths


@pytest.mark.parametrize("B, length", [(1, 16), (3, 7), (2, T)])
def test_validation_loss_equals_torch(
    model: llmc.GPT2, reference: Any, shards: list[Path], B: int, length: int
) -> None:
    import torch

    losses = []
    for path in shards:
        tokens = np.fromfile(path, "<u2", offset=1024).astype(np.int64)
        for i in range((len(tokens) - 1) // (B * length)):
            piece = torch.from_numpy(tokens[i * B * length : (i + 1) * B * length + 1])
            with torch.no_grad():
                losses.append(reference(piece[:-1].view(B, length), piece[1:].view(B, length))[1].item())
    result = evals.validation_loss(model, shards, batch_size=B, seq_len=length)
    assert result.tokens == len(losses) * B * length
    assert result.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert result.perplexity == math.exp(result.loss)
    first = evals.validation_loss(model, str(shards[0]), batch_size=B, seq_len=length, max_batches=1)
    assert first.loss == pytest.approx(losses[0], rel=1e-5)


def test_validation_loss_of_a_folder_of_both_kinds(model: llmc.GPT2, shards: list[Path], tmp_path: Path) -> None:
    write_shard(tmp_path / "train_0.bin", np.zeros(100, int))
    alone = evals.validation_loss(model, shards, seq_len=7)
    assert alone == evals.validation_loss(model, tmp_path, seq_len=7)
    assert alone == evals.validation_loss(model, tmp_path / "*.bin", seq_len=7)


def test_validation_errors(model: llmc.GPT2, shards: list[Path], tmp_path: Path) -> None:
    with pytest.raises(llmc.Error, match="too few"):
        evals.validation_loss(model, shards, batch_size=300, seq_len=T)
    for count in (0, -2):
        with pytest.raises(ValueError, match=f"max_batches is {count}, expected 1 or more, or -1 for all"):
            evals.validation_loss(model, shards, max_batches=count, seq_len=5)
    with pytest.raises(FileNotFoundError, match="no files match"):
        evals.validation_loss(model, tmp_path / "*.absent")
    write_shard(shards[0], np.full(300, V))
    with pytest.raises((ValueError, llmc.Error), match="vocabulary"):
        evals.validation_loss(model, shards, seq_len=5)


def test_command(
    model: llmc.GPT2, fifty: Path, shards: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model.save(tmp_path / "m.bin")

    def call(*arguments: str) -> int:
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        return command.run(parser.parse_args([str(tmp_path / "m.bin"), *arguments]))

    hellaswag = ["--hellaswag", str(fifty), "--limit", "10"]
    assert call("-j", *map(str, shards), "-t", "16", *hellaswag, "--json", str(tmp_path / "r.json")) == 0
    results = json.loads((tmp_path / "r.json").read_text())
    printed = capsys.readouterr().out
    expected = evals.hellaswag(model, fifty, limit=10)
    assert results["hellaswag"] == expected.summary()
    assert results["validation"]["loss"] == evals.validation_loss(model, shards, seq_len=16).loss
    assert f"acc_norm {expected.acc_norm:.4f}, 10 examples" in printed and "perplexity" in printed
    assert call("--mmlu", str(fifty), "--dtype", "bf16", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "bf16"
    with pytest.raises(ValueError, match="nothing to evaluate"):
        call()


def test_a_run_is_evaluated_on_its_own_validation_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of its tokens, on rows as long as those that it was trained on; the file is named."""
    monkeypatch.chdir(tmp_path)
    tiny_run(Path("."), max_seq_len=32, max_steps=1, save_best=True)

    def call(*arguments: str) -> str:
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        assert command.run(parser.parse_args(list(arguments))) == 0
        return capsys.readouterr().out

    trained = llmc.GPT2.from_checkpoint("run/model_00000001.bin")
    loss = evals.validation_loss(trained, "data/val.bin", seq_len=16)
    own = f"validation: loss {loss.loss:.6f}, perplexity {loss.perplexity:.4f}, 384 tokens of {Path('data/val.bin')}\n"
    for checkpoint in ("run", "run/model_00000001.bin", "run/best.bin"):
        assert call(checkpoint) == own
    tiny_run(Path("averaged"), max_seq_len=32, max_steps=1, ema_decay=0.5)
    averaged = call("averaged/run")
    assert averaged == call("averaged/run/average_00000001.bin") != call("averaged/run/model_00000001.bin")
    assert call("run", "--data", "data/val.bin") == own
    assert "384 tokens" in call("run", "-t", "32", "-b", "3")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert f"384 tokens of {tmp_path / 'data' / 'val.bin'}" in call("../run")
    (tmp_path / "data" / "val.bin").unlink()
    with pytest.raises(FileNotFoundError, match="give --data with the place where the data of "):
        call("../run")


def test_a_run_on_text_is_evaluated_on_its_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "my.txt"
    text.write_text("one two three. " * 300)
    tiny_run(tmp_path, data=(str(text),), val_data=(), tokenizer="bytes", vocab_size=None, max_steps=1)
    text.unlink()
    val = tmp_path / "run" / "data" / "val.bin"
    assert validation_files(tmp_path / "run") == [val]
    val.unlink()
    text.write_text("one two three. " * 300)
    with pytest.raises(FileNotFoundError, match=r"val\.bin is not there, and the data of .* are text: give --data"):
        validation_files(tmp_path / "run")
    tiny_run(tmp_path / "b", val_data=(), val_every=0, max_steps=1)
    with pytest.raises(ValueError, match="has no validation data: give --data"):
        validation_files(tmp_path / "b" / "run")
