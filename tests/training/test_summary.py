"""The last words of a run: their numbers against those counted by hand, what is left out, and the commands as typed."""

from __future__ import annotations

import io
import lzma
import math
import re
import shlex
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runs import VOCAB, tiny_run, tiny_settings

import llmc
from llmc.cli import main
from llmc.data.frequencies import FrequencyLosses
from llmc.formats.metrics import read_rows
from llmc.formats.shards import read_shard
from llmc.system.fs import shell_word
from llmc.training.best_loss import BestLoss
from llmc.training.summary import Comparison, duration, stopped_early


def last_words(printed: str) -> list[str]:
    """Return the lines from "trained" on."""
    lines = printed.splitlines()
    return lines[next(i for i, line in enumerate(lines) if line.startswith("trained")) :]


def test_losses_of_counting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tiny_run(tmp_path, progress="lines", max_steps=40, learning_rate=0.03, save_best=True)
    lines = last_words(capsys.readouterr().out)
    assert re.fullmatch(r"trained 40 steps \(1,280 tokens\) in \d+\.\d s", lines[0])
    train, val = (read_shard(tmp_path / "data" / f"{name}.bin").tolist() for name in ("train", "val"))
    counts, measured = Counter(train), val[1 : 1 + 2 * 2 * 16]  # val_steps batches of B * T tokens
    unigram = -sum(math.log((counts[t] + 0.5) / (len(train) + VOCAB / 2)) for t in measured) / len(measured)
    directory = lines.index(f"{tmp_path / 'run'} has the checkpoint model_00000040.bin, best.bin, metrics.jsonl")
    by_name = {name: float(value) for name, value in (re.split(r"  +", line)[:2] for line in lines[1:directory])}
    losses = result.history["val_loss"]
    assert by_name["validation loss"] == pytest.approx(losses[-1], abs=1e-4)
    assert by_name["knowing only how frequent tokens are"] == pytest.approx(unigram, abs=1e-4)
    assert by_name["and which token follows which"] < unigram - 1
    assert "(of 64 tokens)" in lines[1] and "(counted in 4,000 tokens)" in lines[directory - 1]
    best = losses.index(min(losses))
    assert (f"(at step {4 * best}, kept as best.bin)" in lines[2]) == (best < len(losses) - 1)
    messages = [row["text"] for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "message"]
    assert messages[-1].splitlines() == lines


def test_a_lower_loss_before_is_named_also_by_a_run_that_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0] * 2 + [1.0] * 2 + [2.0] * 100)  # of two batches at a time: step 4 has the lowest
    monkeypatch.setattr(llmc.GPT2, "evaluate", lambda *args: next(losses))
    options = {"progress": "lines", "checkpoint_every": 6}
    tiny_run(tmp_path, **options)
    assert last_words(capsys.readouterr().out)[2].endswith("1.0000  (at step 4; --save-best keeps it)")
    for name in ("DONE_00000008", "model_00000008.bin"):
        (tmp_path / "run" / name).unlink()
    tiny_run(tmp_path, resume=True, **options)
    lines = last_words(capsys.readouterr().out)
    assert lines[0].startswith("trained 2 steps (64 tokens)") and "2.0000  (of 64 tokens)" in lines[1]
    assert "lowest validation loss" in lines[2] and "1.0000  (at step 4; --save-best keeps it)" in lines[2]


def test_the_best_model_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model of the lowest loss is in best.bin, or in the checkpoint of its step, and generates."""
    write_tokens = {"tokenizer": "bytes", "vocab_size": 257, "progress": "lines"}
    for options, name in (({"save_best": True}, "best.bin"), ({"checkpoint_every": 4}, "model_00000004.bin")):
        losses = iter([3.0] * 2 + [1.0] * 2 + [2.0] * 100)
        monkeypatch.setattr(llmc.GPT2, "evaluate", lambda *args, losses=losses: next(losses))
        output = tmp_path / name
        tiny_run(tmp_path, **write_tokens, **options, output_dir=str(output))
        lines = last_words(capsys.readouterr().out)
        assert f"(at step 4, kept as {name})" in lines[3]
        assert f"  llmc generate {shell_word(output / name)} The" in lines


def test_losses_in_bits_per_byte_and_what_xz_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "".join(f"{i} bottles of {'beer' if i % 3 else 'wine'} on the wall.\n" for i in range(800))
    (tmp_path / "my.txt").write_text(text, encoding="utf-8")
    options = {"data": (str(tmp_path / "my.txt"),), "val_data": (), "tokenizer": "bpe:300", "vocab_size": None}
    result = tiny_run(tmp_path, **options, progress="lines", val_steps=-1, sample_every=8, model=None)
    lines = last_words(capsys.readouterr().out)
    assert lines[1].split() == ["bits/byte", "nats/token"]
    rows = {line[:36].strip(): [float(x) for x in line[36:].split()[:2]] for line in lines[2:6]}
    names = ("validation loss", "knowing only how frequent tokens are", "and which token follows which")
    assert list(rows) == [*names, "xz -9e after the training text"]
    assert rows["validation loss"] == pytest.approx(
        [result.history["val_bits_per_byte"][-1], result.history["val_loss"][-1]], abs=1e-4
    )
    factors = [nats / bits for bits, nats in rows.values()]
    assert factors == pytest.approx([factors[0]] * 4, rel=1e-3)
    train, val = text.encode()[: -len(text) // 10], text.encode()[-len(text) // 10 :]
    sizes = [len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) for data in (train + val, train)]
    assert (
        rows[names[2]][0]
        > rows["xz -9e after the training text"][0]
        == pytest.approx(8 * (sizes[0] - sizes[1]) / len(val), rel=0.2)
    )
    before, now = (line.split(": ", 1)[1] for line in lines[7:9])
    assert lines[6] == "samples after the same prompt" and before != now


@pytest.mark.parametrize(
    ("samples", "lines"),
    [
        (("a\n\n  b\tc", "x" * 101), ["  before: a b c", f"  now:    {'x' * 100} ..."]),
        ((" \n", "word " * 40), ["  before: (blank)", f"  now:    {('word ' * 20).strip()} ..."]),
    ],
)
def test_samples_in_a_line_each(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    samples: tuple[str, str],
    lines: list[str],
) -> None:
    texts = iter(samples)
    monkeypatch.setattr("llmc.training.trainer.Trainer.sample", lambda *args, **options: next(texts))
    options = {"tokenizer": "bytes", "vocab_size": 257, "sample_every": 8, "val_every": 0, "output_dir": None}
    tiny_run(tmp_path, **options, progress="lines")
    assert last_words(capsys.readouterr().out)[1:4] == ["samples after the same prompt", *lines]


def test_only_what_is_true_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_run(tmp_path, progress="lines", output_dir=None, val_every=0)
    assert last_words(capsys.readouterr().out)[1:] == [
        "nothing was kept, because the run has no directory (--output-dir; in Python output_dir)"
    ]
    run = tmp_path / "run"
    tiny_run(tmp_path, progress="lines", overfit=True)  # trains on what it validates, and has no tokenizer
    assert last_words(capsys.readouterr().out)[2:] == [
        f"{run} has the checkpoint model_00000008.bin, metrics.jsonl",
        "next:",
        f"  llmc train --resume {shell_word(run)} --max-steps 16",
        f"  llmc plot {shell_word(run)}",
    ]
    tiny_run(tmp_path, progress="lines", output_dir=str(tmp_path / "other"), checkpoint_every=-1)
    lines = last_words(capsys.readouterr().out)
    assert len(lines) == 7 and "other has metrics.jsonl" in lines[4] and "llmc plot" in lines[6]


def test_the_next_commands_as_typed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my text.txt").write_text("A cat sat. " * 300, encoding="utf-8")
    options = {
        "data": ("my text.txt",),
        "val_data": (),
        "vocab_size": None,
        "tokenizer": "bytes",
        "output_dir": "my run",
    }
    llmc.train(**tiny_settings(tmp_path, **options, progress="lines", prompt="A cat"))
    lines = last_words(capsys.readouterr().out)
    commands = [shlex.split(line) for line in lines[lines.index("next:") + 1 :]]
    assert [command[1] for command in commands] == ["generate", "generate", "train", "plot"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"The\n")))
    for command in commands:
        assert main(command[1:]) == 0
    out = capsys.readouterr().out
    assert out.startswith("A cat") and Path("runs.png").exists()
    assert "llmc train --resume 'my run' --max-steps 32" in out.replace('"', "'")


def test_a_run_that_patience_ended_goes_on_with_more_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmc.GPT2, "evaluate", lambda *args: 3.0)
    result = tiny_run(tmp_path, progress="lines", max_steps=40, patience=2)
    lines = last_words(capsys.readouterr().out)
    assert result.step == 8 and lines[0].startswith("trained 8 steps") and lines[-2].endswith("--patience 4")


def test_frequencies_that_were_counted_in_a_part_of_the_data_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    part = Comparison(FrequencyLosses(3.0, 2.0, counted=1000, total=4000), None)
    monkeypatch.setattr("llmc.training.trainer.compare", lambda run: part)
    tiny_run(tmp_path, progress="brief")
    assert "counted in 1,000 of 4,000 tokens" in last_words(capsys.readouterr().out)[3]


def test_a_best_loss_of_an_older_checkpoint_has_no_step() -> None:
    best, run = BestLoss(), SimpleNamespace(total_steps=9, run_dir=Path("run"), config=SimpleNamespace(save_best=True))
    best.set_state({"best_val_loss": "2.0"})
    assert not best.update(4, 2.5) and not best.update(4, 2.5)
    assert stopped_early(run, 4, best) == (
        "stopped early at step 4 of 9: the last validation was not below the loss of 2.0000"
    )


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (9.5, "9.5 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (125, "2 min 5 s"), (12_000, "3 h 20 min")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [31, 31, 63]),  # at the start, on the way, and at the end, of which one token is the first
        ({"sample_tokens": 20}, [19, 19, 19]),
        ({"model": "d12", "sample_tokens": 40}, [39, 39]),
    ],
)
def test_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any], expected: list[int]
) -> None:
    sizes = {
        "seq_len": 64,
        "max_seq_len": 80,
        "max_steps": 4,
        "sample_every": 2,
        "val_every": 0,
        "checkpoint_every": -1,
    }
    llmc.train(**{**tiny_settings(tmp_path, progress="lines"), **sizes, "output_dir": None, **options})
    samples = re.findall(r"^generating:\n---\n(.*?)\n---$", capsys.readouterr().out, re.M | re.S)
    assert [len(sample.split()) for sample in samples] == expected


def test_a_sample_stays_on_positions_that_are_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        llmc.GPT2, "generate", lambda model, prompt, count, **_: asked.append((len(prompt), count)) or [0]
    )
    options = {"sample_every": 8, "tokenizer": "bytes", "vocab_size": 257, "sample_tokens": 100}
    for prompt in ("", "12345", "1" * 16):
        tiny_run(tmp_path, **options, prompt=prompt, output_dir=None, progress="none")
    assert asked == [(1, 15), (1, 15), (5, 15), (5, 11), (16, 15), (16, 15)]
    assert capsys.readouterr().out.count("sample_tokens is 16, not 100") == 3
