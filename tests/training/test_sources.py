"""What a run trains on if its data are a folder or a glob (which files these mean: tests/data/test_files.py), and what it says of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from runs import tiny_run, tiny_settings

import llmc
from llmc.datasets import text
from llmc.formats.shards import read_shard, write_shard
from llmc.training import sources

WORDS = "the cat sat on the mat. the dog sat on the log. "


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a data folder as `llmc data text` does."""
    (tmp_path / "my.txt").write_text(WORDS * 40, encoding="utf-8")
    text.prepare([tmp_path / "my.txt"], tmp_path / "data", tokenizer="bytes", shard_size=1000)
    assert names(sorted((tmp_path / "data").iterdir())) == [
        "text_train_000000.bin", "text_train_000001.bin", "text_val_000000.bin", "tokenizer.bin"
    ]  # fmt: skip
    return tmp_path / "data"


def test_no_data_is_the_default() -> None:
    assert llmc.TrainConfig(data=None, val_data=None) == llmc.TrainConfig()  # type: ignore[arg-type]


def test_folder_of_llmc_data(folder: Path) -> None:
    found = sources.prepare(llmc.TrainConfig(data=(str(folder),)), None)
    assert names(found.train) == ["text_train_000000.bin", "text_train_000001.bin"]
    assert names(found.val) == ["text_val_000000.bin"]
    assert found.tokenizer is not None and found.vocab_size == 257


def test_validation_data_of_its_own(folder: Path, tmp_path: Path) -> None:
    """The folder's validation files are not trained on, even if other files are used for validation."""
    write_shard(tmp_path / "other.bin", np.arange(50))
    found = sources.prepare(llmc.TrainConfig(data=(str(folder),), val_data=(str(tmp_path / "other.bin"),)), None)
    assert len(found.train) == 2 and names(found.val) == ["other.bin"]
    found = sources.prepare(llmc.TrainConfig(data=(str(folder),), val_data=(str(folder),)), None)
    assert len(found.train) == 2 and names(found.val) == ["text_val_000000.bin"]


@pytest.mark.parametrize("name", ["val.bin", "tiny_shakespeare_val.bin", "TinyStories_val.bin", "x_val_000000.bin"])
def test_names_of_validation_files(tmp_path: Path, name: str) -> None:
    for one in (name, "train.bin", "evaluation.bin", "valley.bin"):
        write_shard(tmp_path / one, np.arange(50))
    found = sources.prepare(llmc.TrainConfig(data=(str(tmp_path),)), None)
    assert (names(found.train), names(found.val)) == (["evaluation.bin", "train.bin", "valley.bin"], [name])


def test_a_folder_of_validation_files_alone(tmp_path: Path) -> None:
    write_shard(tmp_path / "text_val_000000.bin", np.arange(50))
    with pytest.raises(ValueError, match=r"for validation only, as 'text_val_000000\.bin'"):
        sources.prepare(llmc.TrainConfig(data=(str(tmp_path),)), None)


def test_a_folder_of_texts_may_have_other_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(WORDS * 40, encoding="utf-8")
    (tmp_path / "picture.bin").write_bytes(b"abc")
    llmc.Tokenizer.byte_level().save(tmp_path / "tokenizer.bin")
    found = sources.prepare(llmc.TrainConfig(data=(str(tmp_path),), tokenizer="bytes"), tmp_path / "run")
    assert names(found.train) == ["train.bin"] and found.train[0].parent == tmp_path / "run" / "data"


@pytest.mark.parametrize("pattern", ["", "*.bin"])
def test_a_glob_of_llmc_data(folder: Path, pattern: str) -> None:
    """The tokenizer beside the tokens is used, and the validation files are kept for validation."""
    said: list[str] = []
    data = str(folder / pattern)
    found = sources.prepare(llmc.TrainConfig(data=(data,)), None, said.append)
    assert names(found.train) == ["text_train_000000.bin", "text_train_000001.bin"]
    assert names(found.val) == ["text_val_000000.bin"] and found.vocab_size == 257
    assert said == [f"data: 2 token files of {data}, and 1 for validation"]


def test_named_files_are_trained_on(folder: Path) -> None:
    """A shell that expands a glob names the files: that validation files are among them is said."""
    said: list[str] = []
    files = tuple(map(str, sorted(folder.glob("text_*.bin"))))
    found = sources.prepare(llmc.TrainConfig(data=files), None, said.append)
    assert len(found.train) == 3 and not found.val
    (line,) = said
    assert line.startswith("note: text_val_000000.bin (of 1) for validation are trained on")


def test_a_folder_of_texts_says_what_is_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    (folder / ".git").mkdir(parents=True)
    for name in ("a.txt", "b.jsonl", ".git/c.txt", "._a.txt", "d.pdf"):
        (folder / name).write_text('{"text": "some words"}\n' * 10)
    said: list[str] = []
    config = llmc.TrainConfig(data=(str(folder),), tokenizer="bytes")
    found = sources.prepare(config, tmp_path / "run", said.append)
    assert said == [f"data: 2 files of {folder}; passed over: 2 hidden, 1 .pdf"]
    assert found.tokenized is not None and found.tokenized[1]["documents"] == [11, 0]


def test_both_kinds_at_once_are_refused(folder: Path, tmp_path: Path) -> None:
    text_file, tokens = str(tmp_path / "my.txt"), str(folder)
    for data, val in (((tokens,), (text_file,)), ((text_file,), (tokens,)), ((), (tokens,)), ((tokens, text_file), ())):
        with pytest.raises(ValueError, match="give (text|token files) for both|give one kind"):
            sources.prepare(llmc.TrainConfig(data=data, val_data=val), None)


def test_files_without_a_whole_batch_are_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They may be what was left over for the last file. A run that is resumed finds the same files."""
    tiny_settings(tmp_path)
    write_shard(tmp_path / "data" / "z.bin", np.arange(20), vocab_size=61)
    options = {"data": (str(tmp_path / "data"),), "val_data": (), "progress": "lines", "checkpoint_every": 4}
    tiny_run(tmp_path, **options, max_steps=4)
    out = capsys.readouterr().out
    assert "note: 1 of 2 files to train on have less than one batch" in out
    assert "| val data pattern      | of the train data " in out and "val loss" in out
    assert len(tiny_run(tmp_path, **options, max_steps=8, resume=True, allow_changes=True).history["train_loss"]) > 0


def test_what_is_held_out_of_a_text(tmp_path: Path) -> None:
    """The same text for all tokenizers, and a run keeps its choice."""
    (tmp_path / "my.txt").write_text("".join(f"line {i}\n" for i in range(6000)), encoding="utf-8")
    held = {}
    for tokenizer, holdout in (("bytes", "end"), ("bpe:300", "end"), ("bytes", "spread")):
        folder = tmp_path / f"{tokenizer[:3]}_{holdout}"
        config = llmc.TrainConfig(data=(str(tmp_path / "my.txt"),), tokenizer=tokenizer, holdout=holdout)
        found = sources.prepare(config, folder)
        assert found.tokenizer is not None
        train, val = (found.tokenizer.decode(read_shard(path).tolist()) for path in (found.train[0], found.val[0]))
        assert len(train) + len(val) == pytest.approx(6000 * 10, rel=0.1) and not set(train.split("\n")) & set(
            val.split("\n")[1:-1]
        )
        held[tokenizer, holdout] = val
        source = json.loads((folder / "data" / "source.json").read_text())
        assert source.get("holdout", "end") == holdout
    assert held["bytes", "end"] == held["bpe:300", "end"]
    assert held["bytes", "spread"].count("<|endoftext|>") == 2 < len(held["bytes", "spread"].split("\n")) / 100


def test_a_holdout_that_would_hold_nothing_out_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "my.txt").write_text("line\n" * 6000, encoding="utf-8")
    text = (str(tmp_path / "my.txt"),)
    for data, val_data, why in (((str(folder),), (), "the data are token files"), (text, text, "val_data is given")):
        with pytest.raises(ValueError, match=f"holdout is spread, but {why}: nothing is held out"):
            sources.prepare(llmc.TrainConfig(data=data, val_data=val_data, holdout="spread"), None)


def test_the_default_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The docstrings are trained on; what is held out is the reference's last tenth, with or without them."""
    monkeypatch.setattr(sources, "language_reference", lambda: ["A reference. " * 300])
    said: list[str] = []
    val = []
    for docstrings in (["Return self. " * 900], []):
        monkeypatch.setattr(sources, "library_docstrings", lambda documents=docstrings: documents)
        found = sources.prepare(llmc.TrainConfig(tokenizer="bytes"), None, said.append)
        sizes = [read_shard(found.train[0]).size, read_shard(found.val[0]).size]
        assert sizes[0] > 13 * (1100 if docstrings else 260)
        val.append(read_shard(found.val[0]).tolist())
    assert val[0] == val[1] and len(val[0]) == pytest.approx(391, abs=13)
    assert said == ["note: this Python does not have its library as source: training on its language reference alone"]
