"""Token shards and batches: llm.c's order, every token once in an epoch, resuming at any point, every error."""

from __future__ import annotations

import copy
import os
import struct
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

import llmc
from llmc import DataLoader, _llmc
from llmc.data.files import find_shards
from llmc.formats.shards import write_shard


def take(loader, count):
    return [loader.next_batch() for _ in range(count)]


def same(a, b):
    assert len(a) == len(b)
    for (x1, y1), (x2, y2) in zip(a, b):
        np.testing.assert_array_equal(x1, x2)
        np.testing.assert_array_equal(y1, y2)


# ---- files ----


@pytest.mark.parametrize("wide", [False, True])
def test_both_formats(shards, wide):
    (path,) = shards([100], vocab_size=70_000 if wide else 50_257)
    raw = path.read_bytes()
    assert struct.unpack("<3i", raw[:12]) == ((20240801, 7, 100) if wide else (20240520, 1, 100))
    assert not any(raw[12:1024]) and len(raw) == 1024 + 100 * (4 if wide else 2)
    info = _llmc.inspect_shard(path)
    assert (info.tokens, info.token_bytes) == (100, 4 if wide else 2)
    x, y = DataLoader(path, 3, 5).next_batch()
    assert x.dtype == y.dtype == np.int32
    np.testing.assert_array_equal(x, np.arange(15).reshape(3, 5))
    np.testing.assert_array_equal(y, x + 1)


def test_a_token_beyond_16_bits_makes_a_wide_file(shards):
    (path,) = shards([[1, 2, 65_535, 65_536, 2**31 - 1]])
    assert DataLoader(path, 1, 4).next_batch()[1].tolist() == [[2, 65_535, 65_536, 2**31 - 1]]


def test_globs(shards, tmp_path):
    paths = shards([10, 20, 30])
    assert find_shards(tmp_path / "shard_*.bin") == paths
    assert find_shards([paths[2], str(tmp_path / "shard_00[01].bin")]) == [paths[2], *paths[:2]]
    assert DataLoader(str(tmp_path / "*.bin"), 1, 3).num_tokens == 60
    for folder in ("a", "a-b"):  # llm.c sorts whole names: "-" comes before "/"
        (tmp_path / folder).mkdir()
        write_shard(tmp_path / folder / "x.bin", range(10))
    assert find_shards(tmp_path / "a*" / "x.bin") == [tmp_path / "a-b" / "x.bin", tmp_path / "a" / "x.bin"]
    odd = tmp_path / "a[1].bin"  # a file whose name, read as a pattern, does not match itself
    write_shard(odd, range(10))
    assert find_shards(odd) == [odd]
    with pytest.raises(FileNotFoundError, match=r"nothing_\*\.bin"):
        find_shards([tmp_path / "*.bin", tmp_path / "nothing_*.bin"])


# ---- order ----


def shuffled(values, rng):
    """Return the values in the order in which llm.c shuffles them: Fisher-Yates from the end."""
    values = list(values)
    for i in range(len(values) - 1, 0, -1):
        j = rng.randint32() % (i + 1)
        values[i], values[j] = values[j], values[i]
    return values


def llm_c_order(sizes, B, T, ranks, rank, shuffle, seed=42):
    """Yield (shard, first token) of each batch without end, as llm.c's dataloader.h does."""
    rng, order = _llmc.Mt19937(seed), list(range(len(sizes)))
    while True:
        if shuffle:
            order = shuffled(order, rng)
        for shard in order:
            samples = list(range((sizes[shard] - 1) // (B * T * ranks)))
            if shuffle:
                samples = shuffled(samples, rng)
            for sample in samples:
                yield shard, (sample * ranks + rank) * B * T


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("ranks,rank", [(1, 0), (2, 1), (3, 0)])
def test_order_matches_llm_c(shards, shuffle, ranks, rank):
    """Shards, samples and ranks over three epochs. Token i of shard s is 1000 s + i, so a token tells where it comes from."""
    B, T, sizes = 2, 5, [140, 61, 199]
    files = shards([1000 * s + np.arange(n) for s, n in enumerate(sizes)])
    loader = DataLoader(files, B, T, shuffle=shuffle, rank=rank, ranks=ranks)
    epoch = sum((n - 1) // (B * T * ranks) for n in sizes)
    expected = llm_c_order(sizes, B, T, ranks, rank, shuffle)
    for x, y in take(loader, 3 * epoch):
        shard, first = next(expected)
        np.testing.assert_array_equal(x.ravel(), 1000 * shard + first + np.arange(B * T))
        np.testing.assert_array_equal(y, x + 1)


def test_order_golden(shards):
    """The file has as many tokens as llm.c's tiny_shakespeare_train.bin."""
    (path,) = shards([np.arange(305_260) % 50_000])
    loader = DataLoader(path, 4, 64, shuffle=True)
    assert loader.num_batches() == 1192
    assert loader.state()["sample_indices"][:10].tolist() == [408, 791, 914, 1057, 81, 450, 299, 907, 582, 321]
    assert DataLoader(path, 4, 1024, shuffle=True).state()["sample_indices"][:3].tolist() == [29, 58, 10]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_an_epoch_covers_every_token_once(shards, shuffle, ranks):
    """All ranks together read every token in each epoch, except the tail of each shard that fills no global batch."""
    B, T, sizes = 2, 7, [200, 43, 150]
    files = shards([1000 * s + np.arange(n) for s, n in enumerate(sizes)])
    step = B * T * ranks
    wanted = np.concatenate([1000 * s + np.arange((n - 1) // step * step) for s, n in enumerate(sizes)])
    loaders = [DataLoader(files, B, T, shuffle=shuffle, rank=r, ranks=ranks) for r in range(ranks)]
    batches = len(wanted) // step
    orders = []
    for _ in range(3):
        seen = np.concatenate([x.ravel() for loader in loaders for x, _ in take(loader, batches)])
        np.testing.assert_array_equal(np.sort(seen), np.sort(wanted))
        orders.append(seen)
    assert (orders[0] == orders[1]).all() != shuffle


def test_num_batches_counts_as_llm_c_does(shards):
    """The tokens of all files are counted, also those of tails that fill no batch."""
    loader = DataLoader(shards([140, 61]), 2, 5)
    assert (loader.num_tokens, loader.num_batches(), loader.num_batches(ranks=3)) == (201, 20, 6)


def test_reset_begins_an_epoch(shards):
    files = shards([100, 100])
    loader = DataLoader(files, 2, 5)
    first = take(loader, 3)
    loader.reset()
    same(take(loader, 3), first)
    assert loader.state()["epoch"] == 1


def test_iteration(shards):
    loader = DataLoader(shards([100]), 2, 5)
    assert iter(loader) is loader
    np.testing.assert_array_equal(next(loader)[0], np.arange(10).reshape(2, 5))


# ---- resume ----


@pytest.mark.parametrize("shuffle", [False, True])
def test_resume_from_any_point(shards, shuffle):
    """The state goes through plain Python values; the points are also the ends of a shard and of an epoch."""
    files = shards([100, 31, 77])
    loader = DataLoader(files, 2, 5, shuffle=shuffle)
    states, batches = [], []
    for _ in range(45):  # more than two epochs
        states.append(copy.deepcopy(loader.state()))
        batches.append(loader.next_batch())
    for at in range(40):
        other = DataLoader(files, 2, 5, shuffle=shuffle, seed=7)
        take(other, 3)
        other.set_state(states[at])
        same(take(other, 5), batches[at : at + 5])


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("B,ranks", [(1, 1), (2, 1), (3, 1), (6, 1), (2, 2), (1, 3), (4, 2)])
def test_elastic_batch_size(shards, shuffle, B, ranks):
    """A run that began with B=6 continues with another B or number of ranks, and sees the same rows in the same order."""
    T, files = 5, shards([1000 * s + np.arange(n) for s, n in enumerate([211, 100])])
    began = DataLoader(files, 6, T, shuffle=shuffle)
    take(began, 2)
    state = began.state()
    rows = np.concatenate([x for x, _ in take(began, 16)])
    loaders = [DataLoader(files, B, T, shuffle=shuffle, rank=r, ranks=ranks, rows_per_sample=6) for r in range(ranks)]
    for loader in loaders:
        loader.set_state(state)
    got = np.concatenate([x for _ in range(96 // (B * ranks)) for loader in loaders for x, _ in take(loader, 1)])
    np.testing.assert_array_equal(got, rows[: len(got)])


def test_states_that_do_not_fit(shards):
    files = shards([100, 50])
    good = DataLoader(files, 2, 5, shuffle=True).state()
    for change, message in [
        ({"rows_per_sample": 0}, "rows_per_sample is 0"),
        ({"shard_indices": [0]}, "made with 1 shards, now there are 2"),
        ({"shard_indices": [0, 0]}, "not a permutation"),
        ({"shard": 2}, "shard 2 of 2"),
        ({"row": -1}, "row -1"),
        ({"row": 10**6}, "other data"),
        ({"sample_indices": np.arange(3, dtype=np.int32)}, "an order of 3 samples"),
        ({"sample_indices": good["sample_indices"] + 1}, "sample .* of"),
        ({"rng": (0, 0, np.zeros(624, np.uint32))}, "Mersenne"),
        ({"rng": (1, 0, np.zeros(3, np.uint32))}, "Mersenne"),
    ]:
        loader = DataLoader(files, 2, 5, shuffle=True)
        with pytest.raises(ValueError, match=message):
            loader.set_state({**good, **change})
        # A refused state leaves the loader as it was.
        same(take(loader, 3), take(DataLoader(files, 2, 5, shuffle=True), 3))


# ---- large files ----


def keeps_holes(file, size):
    """Make an open file `size` bytes long without writing them; return whether the part not written takes no space on the disk."""
    if sys.platform != "win32":
        file.truncate(size)
        return os.stat(file.fileno()).st_blocks * 512 < 1 << 20
    # NTFS fills a hole with zeros as soon as something is written behind it, except in files that are marked as sparse.
    import ctypes
    import msvcrt

    FSCTL_SET_SPARSE = 0x900C4
    handle, returned = ctypes.c_void_p(msvcrt.get_osfhandle(file.fileno())), ctypes.c_ulong()
    marked = ctypes.windll.kernel32.DeviceIoControl(
        handle, FSCTL_SET_SPARSE, None, 0, None, 0, ctypes.byref(returned), None
    )
    file.truncate(size)
    return bool(marked)


@pytest.mark.parametrize("wide", [False, True])
def test_offsets_beyond_4_gb(tmp_path, wide):
    """The last row is read of the largest file that can be, 4 or 8 GiB. On the disk it is a hole except for its ends."""
    path, tokens, T = tmp_path / "huge.bin", 2**31 - 1, 1024
    size = 1024 + tokens * (4 if wide else 2)
    row = (tokens - 1) // T - 1
    tail = np.arange(tokens - row * T, dtype="<u4" if wide else "<u2") % 50_000
    with open(path, "wb") as file:
        file.write(struct.pack("<3i", *((20240801, 7) if wide else (20240520, 1)), tokens).ljust(1024, b"\0"))
        try:
            if not keeps_holes(file, size):
                pytest.skip("this file system has no holes: it would write 4 GB")
        except OSError as e:
            pytest.skip(f"this disk cannot hold a file of {size} bytes: {e}")
        file.seek(size - tail.nbytes)
        file.write(tail.tobytes())
    loader = DataLoader(path, 1, T)
    loader.set_state({**loader.state(), "row": row})
    x, y = loader.next_batch()
    np.testing.assert_array_equal(x[0], tail[:T])
    np.testing.assert_array_equal(y[0], tail[1 : T + 1])
    np.testing.assert_array_equal(loader.next_batch()[0], np.zeros((1, T)))  # the next epoch begins


# ---- errors ----


def header(magic=20240520, version=1, tokens=100):
    return struct.pack("<3i", magic, version, tokens).ljust(1024, b"\0")


DAMAGED = {
    "magic 5": header(magic=5) + bytes(200),
    "version 2 .* 1": header(version=2) + bytes(200),
    "version 1 .* 7": header(magic=20240801) + bytes(400),
    " 0 tokens": header(tokens=0),
    " -5 tokens": header(tokens=-5),
    "truncated by 1 .* 100": header() + bytes(199),
    "truncated by 200": header(),
    "too long by 1": header() + bytes(201),
    "1023 bytes": header()[:1023],
    " 0 bytes": b"",
}


@pytest.mark.parametrize("message", DAMAGED)
def test_damaged_files(tmp_path, message):
    path = tmp_path / "damaged.bin"
    path.write_bytes(DAMAGED[message])
    with pytest.raises(llmc.Error, match=f"damaged.bin: .*{message}"):
        DataLoader(path, 1, 4)


def test_other_errors(shards, tmp_path):
    (path,) = shards([41])
    with pytest.raises(llmc.Error, match="41 .* 45"):
        DataLoader(path, 2, 11, ranks=2)
    DataLoader(path, 4, 10)  # 41 is enough
    with pytest.raises(llmc.Error, match="token 30 .*30.* 30"):
        take(DataLoader(path, 1, 10, vocab_size=30), 4)
    take(DataLoader(path, 1, 10, vocab_size=41), 8)
    for options, message in [
        ({"rank": 2, "ranks": 2}, "rank is 2 of 2"),
        ({"rank": -1}, "rank is -1 of 1"),
        ({"ranks": 0}, "rank is 0 of 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            DataLoader(path, 1, 4, **options)
    for B, T in [(0, 4), (4, 0), (-1, 4)]:
        with pytest.raises(ValueError, match=f"B is {B} and T is {T}"):
            _llmc.DataLoader([path], B, T)
        with pytest.raises(ValueError, match=r"(batch_size|seq_len) is (0|-1), expected 1 to"):
            DataLoader(path, B, T)
    with pytest.raises(llmc.Error, match="is a directory"):
        _llmc.inspect_shard(tmp_path)
    with pytest.raises(llmc.Error, match="no such token file"):
        _llmc.inspect_shard(tmp_path / "none.bin")


def test_a_file_that_shrinks_is_noticed(shards):
    (path,) = shards([100])
    loader = DataLoader(path, 1, 10)
    loader.next_batch()
    os.truncate(path, 1024 + 40)
    with pytest.raises(llmc.Error, match="cannot read"):
        take(loader, 9)


def test_a_loader_between_batches_holds_no_file(shards):
    """No file stays open between batches, because Windows does not let anybody replace or delete an open file."""
    paths = shards([100, 31])
    loader = DataLoader(paths, 3, 5, rows_per_sample=2)
    for _ in range(10):  # both files are read, and some batches have rows of both
        loader.next_batch()
        assert not {Path(f.path) for f in psutil.Process().open_files()} & {*paths}
    for path in paths:
        path.rename(path.with_suffix(".moved"))
    with pytest.raises(llmc.Error, match="no such token file"):
        loader.next_batch()
    for path in paths:
        path.with_suffix(".moved").rename(path)
    loader.next_batch()


def test_write_shard_refuses(tmp_path):
    for tokens, message in [([], "at least one token"), ([[1, 2]], "one row"), ([-1], "-1..-1"), ([2**32], "32 bits")]:
        with pytest.raises(ValueError, match=message):
            write_shard(tmp_path / "x.bin", tokens)
    assert not list(tmp_path.iterdir())
