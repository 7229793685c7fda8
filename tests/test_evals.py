"""Evaluation: llm.c's eval file, scores against PyTorch item by item, validation loss against PyTorch."""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llmc
from llmc import evals
from llmc.commands import eval as command
from llmc.data import write_shard
from llmc.datasets.evalfile import Example, write_evalfile

V, T = 97, 40
CONFIG = llmc.GPT2Config(max_seq_len=T, vocab_size=V, num_layers=2, num_heads=2, channels=32)


def make_examples(count: int, seed: int = 5) -> list[Example]:
    rng = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(V) for _ in range(rng.randint(low, high))]

    return [Example(tokens(1, 20), [tokens(1, 12) for _ in range(4)], rng.randrange(4)) for _ in range(count)]


@pytest.fixture(scope="module")
def model() -> llmc.GPT2:
    """Random, and peaked enough for its choices not to be near ties."""
    model = llmc.GPT2(CONFIG, seed=9)
    for name in ("wte", "wpe", "qkvw", "fcw"):
        model.parameters[name] = model.parameters[name] * 8
    return model


@pytest.fixture(scope="module")
def reference(model: llmc.GPT2) -> Any:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    torch.set_num_threads(1)  # its tiny products gain nothing from threads, and lose to the waiting
    from llmc.reference import GPT

    gpt = GPT(CONFIG)
    gpt.load_llmc(model.parameters)
    return gpt


@pytest.fixture(scope="module")
def fifty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("eval") / "fifty.bin"
    write_evalfile(path, make_examples(50))
    return path


def torch_choices(gpt: Any, examples: list[Example]) -> list[tuple[list[float], list[float]]]:
    """Sums and means of the completions' losses, one row at a time and without padding."""
    import torch

    out = []
    for example in examples:
        sums, means = [], []
        for completion in example.completions:
            row = torch.tensor([example.context + completion])
            with torch.no_grad():
                logits, _ = gpt(row[:, :-1])
            losses = torch.nn.functional.cross_entropy(logits[0], row[0, 1:], reduction="none")[-len(completion) :]
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
    assert result.choices != result.choices_norm  # else one of the two is not tested
    labels = [example.label for example in examples]
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
    write_evalfile(path, [Example(context, endings, 0), Example(context[:10], [[1], [2]], 1)])
    result = evals.hellaswag(model, path)
    assert result.truncated == 4
    expected = [
        torch_choices(reference, [Example(context[-(T + 1 - len(ending)) :], [ending], 0)])[0][0][0]
        for ending in endings
    ]
    np.testing.assert_allclose(result.losses[0], expected, rtol=2e-5)
    write_evalfile(path, [Example(context, [[1] * (T + 1), [2]], 0)])
    with pytest.raises(ValueError, match=f"{T + 1} tokens"):
        evals.hellaswag(model, path)


def test_errors(model: llmc.GPT2, fifty: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.bin"
    with pytest.raises(FileNotFoundError, match="llmc data hellaswag"):
        evals.hellaswag(model, path)
    path.write_bytes(fifty.read_bytes()[:-2])
    with pytest.raises(llmc.Error, match="example 49"):
        evals.hellaswag(model, path)
    write_evalfile(path, [Example([1], [[V], [2]], 0)])
    with pytest.raises(ValueError, match=f"token {V}.*another tokenizer"):
        evals.mmlu(model, path)
    with pytest.raises(ValueError, match="batch_size is 0"):
        evals.hellaswag(model, fifty, batch_size=0)
    with pytest.raises(ValueError, match="no examples"):
        evals.hellaswag(model, fifty, limit=0)


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


def test_validation_errors(model: llmc.GPT2, shards: list[Path], tmp_path: Path) -> None:
    with pytest.raises((ValueError, llmc.Error)):
        evals.validation_loss(model, shards, batch_size=300, seq_len=T)
    with pytest.raises(ValueError, match="no whole batch"):
        evals.validation_loss(model, shards, max_batches=0, seq_len=5)
    with pytest.raises(FileNotFoundError):
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
