"""Which files a path, a folder or a glob means (the rules are in llmc.data.files), and what is said of the others."""

from __future__ import annotations

import argparse
import errno
import os
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from disks import small_disk

import llmc
from llmc import cli
from llmc.commands import data as data_command
from llmc.commands import eval as eval_command
from llmc.commands import train as train_command
from llmc.data.files import find_data, find_documents, find_shards
from llmc.data.tokenizer import Tokenizer
from llmc.datasets import text, tokens
from llmc.datasets.archive import unpacked
from llmc.formats.shards import read_shard, write_shard
from llmc.system.fs import Fs


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


# ---- globs mean what folders mean ----


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder as `llmc data` does, and put things beside."""
    folder = tmp_path / "sh"
    folder.mkdir()
    for name in ("a_train_000000", "a_train_000001", "a_val_000000"):
        write_shard(folder / f"{name}.bin", np.arange(50))
    Tokenizer.byte_level().save(folder / "tokenizer.bin")
    (folder / "notes.txt").write_text("text beside tokens")
    (folder / "model.bin").write_bytes(bytes(range(256)) * 8)
    (folder / ".hidden.bin").write_bytes((folder / "a_val_000000.bin").read_bytes())
    return folder


@pytest.mark.parametrize("pattern", ["sh", "sh/*", "sh/*.bin", "s*", "sh/a_*.bin"])
def test_a_glob_means_what_a_folder_means(folder: Path, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    found = find_data([pattern], "the data")
    assert (names(found.files), names(found.val)) == (
        ["a_train_000000.bin", "a_train_000001.bin"],
        ["a_val_000000.bin"],
    )
    assert found.tokens and names(find_data([pattern], "", validation=True).files) == ["a_val_000000.bin"]
    assert names(find_shards(pattern)) == names(found.files) == names(llmc.DataLoader(pattern, 2, 3).files)
    assert found.describe().startswith(f"2 token files of {pattern}, and 1 for validation")
    assert ("1 .bin of no tokens" in found.describe()) == (pattern != "sh/a_*.bin")
    assert ("1 .txt" in found.describe()) == (pattern in ("sh", "sh/*", "s*"))


def test_a_glob_of_one_kind_is_taken_as_it_is(folder: Path) -> None:
    assert names(find_data([str(folder / "*val*.bin")], "").files) == ["a_val_000000.bin"]
    assert len(find_data([str(folder / "*train*.bin")], "", validation=True).files) == 2


def test_a_path_is_meant_literally(folder: Path) -> None:
    for name in ("a_val_000000.bin", ".hidden.bin"):
        found = find_data([str(folder / name)], "")
        assert names(found.files) == [name] and found.tokens and not found.searched
    (folder / "a[1]*.txt" if os.name != "nt" else folder / "a[1].txt").write_text("a")
    assert len(find_data([str(folder / ("a[1]*.txt" if os.name != "nt" else "a[1].txt"))], "").files) == 1
    (folder / "shard").write_bytes((folder / "a_val_000000.bin").read_bytes())
    assert find_data([str(folder / "shard")], "").tokens


@pytest.mark.parametrize("pattern", ["tokenizer.bin", "to*.bin"])
def test_another_file_of_llm_c_is_named(folder: Path, pattern: str) -> None:
    for find in (find_shards, lambda p: find_data([p], "the data"), lambda p: llmc.DataLoader(p, 1, 4)):
        with pytest.raises(ValueError, match=r"tokenizer\.bin: a tokenizer, not a token file"):
            find(str(folder / pattern))


def test_text_is_refused_as_tokens(folder: Path) -> None:
    (folder / "text").mkdir()
    (folder / "text" / "b.txt").write_text("a text, long enough to be told from a token file that is damaged" * 2)
    for pattern in ("text", "text/b.txt", "text/*"):
        with pytest.raises(ValueError, match=r"b\.txt: text, not a token file"):
            find_shards(str(folder / pattern))


def test_one_order(tmp_path: Path) -> None:
    """Folders, globs of tokens and of documents are in the same order: llm.c's, by the whole path as a string."""
    for name in ("a/x", "a-b/x", "a.c/x"):
        (tmp_path / name).parent.mkdir()
        write_shard(tmp_path / f"{name}.bin", np.arange(9))
        (tmp_path / f"{name}.txt").write_text("x")
    expected = ["a-b", "a.c", "a"]
    assert [p.parent.name for p in find_shards(tmp_path / "a*" / "*.bin")] == expected
    assert [p.parent.name for p in find_documents([tmp_path / "a*" / "*.txt"]).files] == expected
    assert [p.parent.name for p in find_documents([tmp_path]).files] == expected


# ---- folders of documents ----


def test_what_is_read_of_a_folder_and_what_is_passed_over(tmp_path: Path) -> None:
    top = tmp_path / ".notes"  # hidden, but named
    for name in ("b.txt", "sub/a.MD", "c.jsonl", "._b.txt", ".DS_Store", ".git/description.txt", "sub/.x/y.txt", "p.pdf",
                 "package.json", "t.csv", "Makefile", "tokenizer.bin", "runs/1/config.toml", "runs/1/metrics.jsonl"):  # fmt: skip
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text('{"text": "x"}')
    found = find_data([str(top)], "the data")
    assert names(found.files) == ["b.txt", "c.jsonl", "a.MD"] and not found.tokens
    assert found.passed_over == {
        "hidden": 4, ".pdf": 1, ".json": 1, ".csv": 1, "without a suffix": 1, ".bin of no tokens": 1, "run directory": 1
    }  # fmt: skip
    assert "3 files of" in found.describe() and "4 hidden" in found.describe()
    assert find_documents(top).files == found.files
    assert names(find_documents(top / "*").files) == names(found.files)
    assert names(find_documents([top / "._b.txt", top / "package.json"]).files) == ["._b.txt", "package.json"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv", ".json"])
def test_a_folder_of_records_alone_is_read(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a{suffix}").touch()
    assert names(find_data([str(tmp_path)], "the data").files) == [f"a{suffix}"]


def test_unknown_suffixes(tmp_path: Path) -> None:
    for name in ("a.log", "b.log"):
        (tmp_path / name).write_text("x")
    assert names(find_documents(tmp_path / "*.log").files) == ["a.log", "b.log"]
    with pytest.raises(FileNotFoundError, match=r"has no text \(\.txt, .*passed over: 2 \.log"):
        find_documents(tmp_path)


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    top = tmp_path / "top"
    (top / "sub").mkdir(parents=True)
    (tmp_path / "real").mkdir()
    (top / "a.txt").write_text("x")
    (tmp_path / "real" / "b.txt").write_text("x")
    try:
        for link, target in (("link", "../real"), ("sub/again", "../../real"), ("sub/up", ".."), ("out", "../..")):
            (top / link).symlink_to(target, target_is_directory=True)
        (top / "broken.txt").symlink_to("nowhere")
    except OSError as e:
        pytest.skip(f"symbolic links cannot be made here: {e}")
    found = find_documents(top)
    assert names(found.files) == ["a.txt", "b.txt"] and found.passed_over == {"broken link": 1}
    found = find_documents(top / "*")
    assert {"a.txt", "b.txt"} <= set(names(found.files)) and found.passed_over["broken link"] > 0


# ---- options that take several values add up ----


def test_options_given_again_add_up() -> None:
    def parsed(command: object, *argv: str) -> argparse.Namespace:
        parser = argparse.ArgumentParser(add_help=False)
        command.add_arguments(parser)  # type: ignore[attr-defined]
        return parser.parse_args(argv)

    for _ in range(2):  # a default that grew would show
        assert parsed(train_command, *"-i a --data b c -j v --val-data w".split()).data == ["a", "b", "c"]
        assert parsed(train_command, *"-i a -j v --val-data w".split()).val_data == ["v", "w"]
        assert parsed(eval_command, *"x -j a -j b".split()).data == ["a", "b"]
        assert parsed(data_command, *"text x --val-files a --val-files b".split()).val_files == ["a", "b"]
        assert not parsed(data_command, "text", "x").val_files


# ---- token files of other programs ----


def ids(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50257, count)


def test_nanogpts_files_are_recognised_and_converted(tmp_path: Path) -> None:
    """The error names the command, which converts them. A character model's ids are mostly zero bytes, but ids too."""
    for name, row in (("train", ids(3000)), ("val", ids(300, 1)), ("chars", ids(4000) % 65)):
        row.astype("<u2").tofile(tmp_path / f"{name}.bin")
        with pytest.raises(
            ValueError, match=rf"{name}\.bin: seems .* llmc data tokens \S*{name}\.bin .* --dtype uint16"
        ):
            llmc.DataLoader(tmp_path / f"{name}.bin", 1, 4)
    files = [tmp_path / "train.bin", tmp_path / "val.bin"]
    with pytest.raises(ValueError, match="train.bin: ids without a header .* --dtype"):
        tokens.prepare(files, tmp_path / "out")
    done = tokens.prepare(files, tmp_path / "out", dtype="uint16", shard_size=2000)
    assert names(done.train) == ["text_train_000000.bin", "text_train_000001.bin"]
    assert np.concatenate([read_shard(p) for p in done.train]).tolist() == ids(3000).tolist()
    assert [read_shard(p).tolist() for p in done.val] == [ids(300, 1).tolist()]
    assert read_shard(done.val[0]).dtype == np.uint16 and (done.train_tokens, done.val_tokens) == (3000, 300)
    with pytest.raises(ValueError, match="a token file already"):
        tokens.prepare(done.val, tmp_path / "again", dtype="uint16")


@pytest.mark.parametrize("kind", ["<u2", "<u4", "<i4", "<i8", ">i4"])
def test_arrays_of_numpy(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_PART", 70)
    np.save(tmp_path / "x.npy", ids(200).astype(kind))
    for find in (lambda p: find_data([str(p)], ""), find_documents, find_shards):
        with pytest.raises(ValueError, match=r"x\.npy: seems to be a NumPy array.*llmc data tokens"):
            find(tmp_path / "x.npy")
    (done,) = tokens.prepare([tmp_path / "*.npy"], tmp_path / "out").train
    assert read_shard(done).tolist() == ids(200).tolist()


def test_what_is_no_row_of_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_PART", 3)
    (tmp_path / "odd.bin").write_bytes(bytes(7))
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY\x01\x00")
    rows = {
        "two": np.ones((2, 3), int),
        "float": np.ones(3),
        "high": np.array([1, 2, 3, 4, 9]),
        "low": np.array([1, -1]),
    }
    for name, row in rows.items():
        np.save(tmp_path / f"{name}.npy", row)
    for name, message in (
        ("odd.bin", "7 bytes are no row of uint16"), ("cut.npy", "not a NumPy file"), ("two.npy", r"shape \(2, 3\)"),
        ("float.npy", "float64"), ("high.npy", "id 9 at position 4 .* vocabulary of 9"), ("low.npy", "id -1 at position 1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message) as e:
            tokens.prepare([tmp_path / name], tmp_path / "out", dtype="uint16", vocab_size=9)
        assert name in str(e.value) and not list((tmp_path / "out").glob("*"))


def test_the_command_converts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids(500).astype("<u2").tofile(tmp_path / "train.bin")
    parser = argparse.ArgumentParser()
    data_command.add_arguments(parser)
    argv = ["tokens", str(tmp_path / "train.bin"), "-o", str(tmp_path / "out"), "--dtype", "uint16", "--prefix", "web"]
    assert data_command.run(parser.parse_args(argv)) == 0
    assert "500 tokens" in capsys.readouterr().out and (tmp_path / "out" / "web_train_000000.bin").is_file()


def test_other_contents_of_a_bin_are_not_taken_for_ids(tmp_path: Path) -> None:
    (tmp_path / "text.bin").write_bytes(b"plain words " * 20)
    for take in (find_shards, lambda path: tokens.prepare([path], tmp_path / "out", dtype="uint16")):
        with pytest.raises(ValueError, match=r"text\.bin: text, not"):
            take(tmp_path / "text.bin")
    assert names(find_documents(tmp_path / "text.bin").files) == ["text.bin"]  # as text it may be read
    for name, content in (("noise", bytes(range(256)) * 8), ("odd", bytes(9))):
        (tmp_path / f"{name}.bin").write_bytes(content)
        with pytest.raises(llmc.Error, match=f"{name}.bin: "):  # as of any damaged token file
            llmc.DataLoader(tmp_path / f"{name}.bin", 1, 4)


# ---- files that are too short ----


def test_what_llmc_data_writes_can_be_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file has a single token, whatever the shard size, and the tokens are all there, in order."""
    for name in ("fsync", "fsync_directory"):  # many files
        monkeypatch.setattr(Fs, name, lambda self, what: None)
    (tmp_path / "in.txt").write_bytes(bytes(range(32, 71)))
    whole = [256, *bytes(range(32, 71))]  # 40 tokens
    for shard_size in (2, 3, 5, 13, 20, 38, 39, 40):
        for val in (0, 0.03, 0.1, 0.5, 0.53, 0.95):
            done = text.prepare(
                [tmp_path / "in.txt"],
                tmp_path / "out",
                tokenizer="bytes",
                val=val,
                shard_size=shard_size,
                overwrite=True,
            )
            parts = [read_shard(p) for p in (*done.train, *done.val)]
            assert np.concatenate(parts).tolist() == whole
            assert all(2 <= len(p) <= shard_size + 1 for p in parts), (shard_size, val)
            assert done.train_tokens == sum(len(read_shard(p)) for p in done.train) and done.train_tokens > 1
            assert abs(done.val_tokens - int(40 * val)) <= 2


def test_a_single_token_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"text_train_000000\.bin: 1 token is too few"):
        text.prepare([tmp_path / "empty.txt"], tmp_path / "out", tokenizer="bytes", val=0)
    with pytest.raises(ValueError, match="shard size is 1 tokens"):
        text.prepare([tmp_path / "empty.txt"], tmp_path / "out", tokenizer="bytes", shard_size=1)
    assert not list((tmp_path / "out").glob("text*"))


def test_a_file_without_a_whole_sample_is_not_used(tmp_path: Path) -> None:
    """It is like the tail of a longer file. If all are too short, the error says which file, how many tokens, how many are needed."""
    for name, count in (("a", 5), ("b", 50), ("c", 8), ("d", 9)):
        write_shard(tmp_path / f"{name}.bin", np.arange(count))
    loader = llmc.DataLoader(tmp_path / "*.bin", 2, 4)
    assert names(loader.files) == ["b.bin", "d.bin"] and loader.num_tokens == 59
    # It goes on with other batches, over the same files.
    again = llmc.DataLoader(tmp_path / "*.bin", 1, 4, rows_per_sample=2)
    again.set_state(loader.state())
    assert names(llmc.DataLoader(tmp_path / "*.bin", 1, 4).files) == ["a.bin", "b.bin", "c.bin", "d.bin"]
    with pytest.raises(llmc.Error, match=r"a\.bin: 5 tokens are too few .* 100 \+ 1 = 101 are needed"):
        llmc.DataLoader(tmp_path / "*.bin", 1, 100)


# ---- full disks ----


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One line says which file, what was written of it and what all need. Whole files stay, nothing half-written does."""
    (tmp_path / "in.txt").write_bytes(b"abcd efgh " * 99_999)
    np.save(tmp_path / "in.npy", np.zeros(1_000_000, np.uint16))
    for argv in (["text", "in.txt", "-tk", "bytes"], ["tokens", "in.npy"]):
        out = tmp_path / argv[0]
        small_disk(monkeypatch, 1_400_000)
        command = ["data", argv[0], str(tmp_path / argv[1]), *argv[2:], "-s", "300000", "-o", str(out)]
        assert cli.main(command) == 1
        last = capsys.readouterr().err.splitlines()[-1]
        assert re.search(r"text_train_000002\.bin: No space left on device after (19\d|200)\.\d kB", last)
        assert last.endswith("; all files need about 2.0 MB (complete, and kept: 2)")
        assert {p.name for p in out.iterdir()} <= {*names(out.glob("text*")), "tokenizer.bin"}
        assert names(sorted(out.glob("text*"))) == ["text_train_000000.bin", "text_train_000001.bin"]
        monkeypatch.undo()


def test_a_full_disk_is_named_by_whatever_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_disk(monkeypatch, 1000)
    for write in (lambda p: write_shard(p, np.arange(10_000)), Tokenizer.byte_level().save):
        with pytest.raises(OSError, match="No space left on device after [0-9.]+ (bytes|kB) of [0-9.]+ kB") as e:
            write(tmp_path / "x.bin")  # type: ignore[operator]
        assert e.value.filename == str(tmp_path / "x.bin") and not list(tmp_path.iterdir())
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.json").write_bytes(bytes(3_000_000))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "a.json", "a.json")
    monkeypatch.setattr(shutil, "copyfileobj", lambda *_: _full())
    with pytest.raises(OSError, match=r"No space left on device after 0 bytes of 3.0 MB.*a\.json"):
        unpacked(tmp_path / "a.tar", "x", ".json")
    assert not list((tmp_path / "cache" / "x").iterdir())


def _full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
