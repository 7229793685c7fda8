"""llm.c's model files: round trips, conversion between dtypes, every error, and files damaged at random."""

from __future__ import annotations

import struct

import ml_dtypes
import numpy as np
import pytest
from conftest import TINY, randomize
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPES

import llmc
from llmc import _llmc
from llmc.formats.shards import write_shard

FILE_DTYPE = {"f32": np.float32, "bf16": ml_dtypes.bfloat16}
VERSION = {"f32": 3, "bf16": 5}
SHAPES = {
    "wte": (128, 33),
    "wpe": (19, 33),
    "ln1w": (2, 33),
    "ln1b": (2, 33),
    "qkvw": (2, 99, 33),
    "qkvb": (2, 99),
    "attprojw": (2, 33, 33),
    "attprojb": (2, 33),
    "ln2w": (2, 33),
    "ln2b": (2, 33),
    "fcw": (2, 132, 33),
    "fcb": (2, 132),
    "fcprojw": (2, 33, 132),
    "fcprojb": (2, 33),
    "lnfw": (33,),
    "lnfb": (33,),
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_file_is_laid_out_as_llm_c_reads_it(tiny, tmp_path, dtype):
    """The file is 256 ints, then the 16 tensors in order; Python and C++ write the same bytes."""
    model = tiny(dtype=dtype)
    model.save(tmp_path / "model.bin")
    raw = (tmp_path / "model.bin").read_bytes()
    header = struct.unpack("<256i", raw[:1024])
    assert header[:8] == (20240326, VERSION[dtype], 19, 61, 2, 3, 33, 128) and not any(header[8:])
    at = 1024
    for name, shape in SHAPES.items():
        stored = np.frombuffer(raw, FILE_DTYPE[dtype], int(np.prod(shape)), at).reshape(shape)
        np.testing.assert_array_equal(stored, model.parameters[name], err_msg=name)
        at += stored.nbytes
    assert at == len(raw)
    options = _llmc.ModelOptions(dtype, dtype)
    native = _llmc.GPT2(model.config.native(), model.backend, options)  # llm.c's programs save without Python
    native.load_checkpoint(tmp_path / "model.bin")
    native.save_checkpoint(tmp_path / "native.bin")
    assert (tmp_path / "native.bin").read_bytes() == raw
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.bin", "native.bin"]  # nothing temporary is left


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("asked", [None, *DTYPES])
def test_round_trip(tiny, tmp_path, device, tokens, dtype, asked):
    """The file's dtype keeps all bits; bf16 becomes f32 exactly; f32 becomes bf16 rounded to the nearest even."""
    model, path = tiny(dtype=dtype), tmp_path / "model.bin"
    model.save(path)
    other = llmc.GPT2.from_checkpoint(path, dtype=asked, device=device)
    assert other.dtype == (asked or dtype) and other.config == TINY
    assert _llmc.inspect_checkpoint(path)[1:] == (dtype, model.num_parameters)
    for name in SHAPES:
        np.testing.assert_array_equal(
            other.parameters[name], np.array(model.parameters[name]).astype(FILE_DTYPE[asked or dtype]), err_msg=name
        )
    if other.dtype == model.dtype:
        x = tokens(2, 19)
        assert other.evaluate(x, x) == model.evaluate(x, x)
        other.save(tmp_path / "again.bin")
        assert (tmp_path / "again.bin").read_bytes() == path.read_bytes()


def test_a_model_file_replaces_another(tiny, tmp_path):
    model, path = tiny(), tmp_path / "model.bin"
    path.write_bytes(b"old")
    model.save(path)
    first = path.read_bytes()
    model.parameters["lnfb"] = np.ones(33)
    model.save(path)
    assert path.read_bytes() != first and llmc.GPT2.from_checkpoint(path).parameters["lnfb"].all()


# ---- errors ----


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Return the bytes of a good file."""
    path = tmp_path_factory.mktemp("model") / "model.bin"
    model = llmc.GPT2(TINY)
    randomize(model)
    model.save(path)
    return path.read_bytes()


def with_header(raw, **fields):
    values = list(struct.unpack("<256i", raw[:1024]))
    for i, value in fields.items():
        values[int(i[1:])] = value
    return struct.pack("<256i", *values) + raw[1024:]


# What is wrong with a file -> what makes it so.
DAMAGE = {
    "magic": lambda raw: with_header(raw, _0=7),
    "version": lambda raw: with_header(raw, _1=1),
    "one byte short": lambda raw: raw[:-1],
    "no weights": lambda raw: raw[:1024],
    "bytes at the end": lambda raw: raw + b"abc",
    "header cut": lambda raw: raw[:1000],
    "empty": lambda raw: b"",
    "longer context": lambda raw: with_header(raw, _2=19 + 1334),
    "channels not divisible": lambda raw: with_header(raw, _6=34),
    "negative layers": lambda raw: with_header(raw, _4=-2),
    "padded vocabulary too small": lambda raw: with_header(raw, _7=60),
    "context out of range": lambda raw: with_header(raw, _2=2**31 - 1),
    "channels too large": lambda raw: with_header(raw, _5=1, _6=1 << 20),
    "the other dtype": lambda raw: with_header(raw, _1=5),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files(raw, tmp_path, damage):
    path = tmp_path / "damaged.bin"
    path.write_bytes(DAMAGE[damage](raw))
    with pytest.raises(llmc.Error, match="damaged.bin: "):
        llmc.GPT2.from_checkpoint(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("magic", "bad magic 7 in model checkpoint, expected 20240326"),
        ("version", "bad version 1 .* expected 3 .* or 5 .* export"),
        ("one byte short", "truncated by 1 bytes: .* but the file has"),
        ("header cut", "too short for a model checkpoint: 1000 bytes"),
        ("channels not divisible", "header does not describe a model: .*channels 34 is not divisible"),
    ],
)
def test_an_error_says_what_was_expected_and_what_came(raw, tmp_path, damage, message):
    """One error of each kind: of what the file is, of its size, of its shape."""
    path = tmp_path / "damaged.bin"
    path.write_bytes(DAMAGE[damage](raw))
    with pytest.raises(llmc.Error, match=message):
        llmc.GPT2.from_checkpoint(path)


def test_other_errors(tiny, tmp_path):
    with pytest.raises(llmc.Error, match="no such model checkpoint"):
        llmc.GPT2.from_checkpoint(tmp_path / "none.bin")
    with pytest.raises(llmc.Error, match="is a directory, expected a model checkpoint"):
        llmc.GPT2.from_checkpoint(tmp_path)
    model, path = tiny(), tmp_path / "model.bin"
    model.save(path)
    shape = llmc.GPT2Config(max_seq_len=19, vocab_size=61, num_layers=2, num_heads=1, channels=33)
    other = _llmc.GPT2(shape.native(), model.backend, _llmc.ModelOptions())
    before = other.all_parameters().to_host()
    with pytest.raises(ValueError, match="holds a model of another shape"):
        other.load_checkpoint(path)
    np.testing.assert_array_equal(other.all_parameters().to_host(), before)
    write_shard(tmp_path / "tokens.bin", range(100))
    with pytest.raises(llmc.Error, match="bad magic 20240520 in model checkpoint"):
        llmc.GPT2.from_checkpoint(tmp_path / "tokens.bin")
    with pytest.raises(OSError):
        model.save(tmp_path / "no such folder" / "model.bin")


# ---- random damage ----

# Damage: bytes are overwritten (half of them in the header), the file is cut short, or bytes are appended.
EDITS = st.lists(
    st.one_of(
        st.tuples(
            st.just("set"), st.one_of(st.integers(0, 31), st.integers(0, 1 << 20)), st.binary(min_size=1, max_size=8)
        ),
        st.tuples(st.just("cut"), st.integers(0, 1 << 20), st.just(b"")),
        st.tuples(st.just("add"), st.just(0), st.binary(max_size=9)),
    ),
    min_size=1,
    max_size=4,
)


def edited(raw, edits):
    data = bytearray(raw)
    for what, at, value in edits:
        if what == "add":
            data += value
        elif data:
            at %= len(data)
            data[at:] = data[at + len(value) :].join([value, b""]) if what == "set" else b""
    return bytes(data)


def survives(path, data, load):
    """Load a file, which succeeds, or raises llmc.Error or, if it is no such file, ValueError; no crash, no endless read."""
    path.write_bytes(data)
    try:
        load(path)
    except (llmc.Error, ValueError) as e:
        assert str(path) in str(e)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(edits=EDITS)
def test_random_damage_to_a_model(raw, tmp_path_factory, edits):
    path = tmp_path_factory.getbasetemp() / "fuzzed_model.bin"
    survives(path, edited(raw, edits), llmc.GPT2.from_checkpoint)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(edits=EDITS)
def test_random_damage_to_a_tokenizer(tmp_path_factory, edits):
    path = tmp_path_factory.getbasetemp() / "fuzzed_tokenizer.bin"
    tokens = [*(bytes([b]) for b in range(256)), b" the", b"end"]
    good = struct.pack("<4I", 20240328, 2, 258, 257).ljust(1024, b"\0") + b"".join(bytes([len(t)]) + t for t in tokens)
    survives(path, edited(good, edits), _llmc.Tokenizer)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(edits=EDITS)
def test_random_damage_to_a_shard(tmp_path_factory, edits):
    path = tmp_path_factory.getbasetemp() / "fuzzed_shard.bin"
    good = struct.pack("<3i", 20240520, 1, 300).ljust(1024, b"\0") + (np.arange(300) % 61).astype("<u2").tobytes()

    def load(path):
        loader = llmc.DataLoader(path, 2, 16, shuffle=True, vocab_size=61)
        for _ in range(12):
            loader.next_batch()

    survives(path, edited(good, edits), load)
