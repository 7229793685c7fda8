"""Tokenizers: GPT-2's, bytes, trained BPE; llm.c's file; streams."""

from __future__ import annotations

import pydoc_data.topics
import struct

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

import llmc
from llmc import Tokenizer, _llmc

TEXT = "\n\n".join(list(pydoc_data.topics.topics.values())[:12])
ODD = "naïve café — “quotes”, 北京 🙂👩‍👩‍👧 \u202e\x00\x7f\n\n \t  end  it's I'LL they've  12345 ½ Ⅷ\r\n<|endoftext|>"


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    try:
        return Tokenizer.gpt2()
    except ConnectionError:
        pytest.skip("GPT-2's vocabulary is neither cached (TIKTOKEN_CACHE_DIR) nor to be downloaded")


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train_bpe(TEXT, 700)


def test_an_id_without_a_token_is_the_replacement_character(trained):
    """A model's vocabulary may be larger than its tokenizer's."""
    for tokenizer in (Tokenizer.byte_level(), trained):
        for unknown in (tokenizer.vocab_size, 50256, -1):
            ids = [97, unknown, 98]
            assert tokenizer.decode(ids) == "".join(tokenizer.stream(ids)) == "a\ufffdb"
            assert tokenizer.decode_bytes(ids) == "a\ufffdb".encode()


# ---- GPT-2 ----


def test_gpt2(gpt2):
    assert (gpt2.vocab_size, gpt2.eot_token, gpt2.name) == (50257, 50256, "gpt2")
    assert gpt2.encode("Hello, world!") == [15496, 11, 995, 0]
    reference = tiktoken.get_encoding("gpt2")
    for text in (TEXT, ODD, "", " ", "\n"):
        assert gpt2.encode(text) == reference.encode_ordinary(text)
        assert gpt2.encode_to_numpy(text).tolist() == gpt2.encode(text)
        assert gpt2.decode(gpt2.encode(text)) == text
    # The end-of-text token in a text is text; as a token it reads as itself.
    assert 50256 not in gpt2.encode(ODD) and gpt2.decode([50256]) == "<|endoftext|>"


def test_gpt2_from_llm_c_file_alone(gpt2, tmp_path):
    """The file has the bytes of each id, which is enough to encode as tiktoken does."""
    path = tmp_path / "gpt2_tokenizer.bin"
    gpt2.save(path)
    assert path.stat().st_size == 372_108  # as the one that llm.c's train_gpt2.py writes
    loaded = Tokenizer.load(path)
    assert (loaded.vocab_size, loaded.eot_token, loaded.tokens) == (gpt2.vocab_size, gpt2.eot_token, gpt2.tokens)
    reference = tiktoken.get_encoding("gpt2")
    for text in (TEXT, ODD):
        assert loaded.encode(text) == reference.encode_ordinary(text)


def test_version_1_is_gpt2s(gpt2, tmp_path):
    """Version 1 has no end-of-text token in its header: it is 50256, and the vocabulary is GPT-2's."""
    path = tmp_path / "v1.bin"
    gpt2.save(path)
    raw = path.read_bytes()
    path.write_bytes(struct.pack("<4I", 20240328, 1, 50257, 0) + raw[16:])
    assert Tokenizer.load(path).eot_token == 50256


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=st.text())
def test_any_text_comes_back(gpt2, text):
    assert gpt2.decode(gpt2.encode(text)) == text
    assert gpt2.encode(text) == tiktoken.get_encoding("gpt2").encode_ordinary(text)


# ---- bytes ----


def test_bytes():
    tokenizer = Tokenizer.byte_level()
    assert (tokenizer.vocab_size, tokenizer.eot_token) == (257, 256)
    assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]
    for text in (TEXT, ODD):
        assert tokenizer.encode(text) == list(text.encode())
        assert tokenizer.decode(tokenizer.encode(text)) == text


# ---- trained ----


def test_training_finds_the_frequent(trained):
    assert (trained.vocab_size, trained.eot_token, trained.name) == (700, 699, "bpe:700")
    assert trained.tokens[:256] == [bytes([b]) for b in range(256)]
    assert trained.encode(TEXT) == trained._encoding.encode_ordinary(TEXT)
    assert b" the" in trained.tokens and len(trained.encode(TEXT)) < 0.6 * len(TEXT.encode())
    for text in (TEXT, ODD, ""):
        assert trained.decode(trained.encode(text)) == text


def naive_bpe(words, merges):
    """Train as a textbook does: count all pairs, merge the most frequent (among equals that of smaller ids), repeat."""
    words, tokens = [list(w) for w in words], [bytes([b]) for b in range(256)]
    for _ in range(merges):
        counts = {}
        for word in words:
            for pair in zip(word, word[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        pair = min(counts, key=lambda p: (-counts[p], p))
        for word in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == pair:
                    word[i : i + 2] = [len(tokens)]
                i += 1
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
    return tokens


def test_training_is_the_textbooks():
    text = " low low low low lower newest newest newest widest widest aaaa aaaaa abab"
    words = [w.encode() for w in text.replace(" ", "\n ").split("\n") if w]
    assert Tokenizer.train_bpe(text, 257 + 12).tokens[:-1] == naive_bpe(words, 12)


def test_training_is_repeatable(trained):
    assert Tokenizer.train_bpe(TEXT, 700).tokens == trained.tokens


def test_training_on_little_text():
    """Training ends early if no pair occurs twice; an empty text gives the 256 bytes and end-of-text."""
    assert Tokenizer.train_bpe("abab abab", 1000).vocab_size < 270
    assert Tokenizer.train_bpe("", 1000).vocab_size == 257
    assert Tokenizer.train_bpe("x", 257).decode([120, 256]) == "x<|endoftext|>"
    with pytest.raises(ValueError, match="vocab_size is 256"):
        Tokenizer.train_bpe("abc", 256)


# ---- files ----


def test_save_and_load(trained, tmp_path):
    path = tmp_path / "bpe.bin"
    trained.save(path)
    raw = path.read_bytes()
    assert struct.unpack("<4I", raw[:16]) == (20240328, 2, 700, 699) and not any(raw[16:1024])
    assert len(raw) == 1024 + sum(1 + len(t) for t in trained.tokens)
    loaded = Tokenizer.load(path)
    assert (loaded.tokens, loaded.eot_token, loaded.name) == (trained.tokens, 699, "bpe")
    assert loaded.encode(ODD) == trained.encode(ODD)
    native = _llmc.Tokenizer(path)
    assert [native.decode(i) for i in range(700)] == trained.tokens
    for token in (-1, 700):
        with pytest.raises(ValueError, match=f"token {token} .* 700"):
            native.decode(token)


def header(*fields):
    return struct.pack(f"<{len(fields)}I", *fields).ljust(1024, b"\0")


DAMAGED = {
    "magic 5": header(5, 2, 2, 0) + b"\1a\1b",
    "version 3 .* 1 or 2": header(20240328, 3, 2, 0) + b"\1a\1b",
    " 50257 .* 2": header(20240328, 1, 2) + b"\1a\1b",
    "4 bytes .* 3 tokens": header(20240328, 2, 3, 0) + b"\1a\1b",
    " -1 tokens": header(20240328, 2, 0xFFFFFFFF, 0) + b"\1a\1b",
    " 0 tokens": header(20240328, 2, 0, 0) + b"\1a\1b",
    "end-of-text token 2 .* 2": header(20240328, 2, 2, 2) + b"\1a\1b",
    "1 tokens of 2": header(20240328, 2, 2, 0) + b"\1a\5b",
    "token 1 ": header(20240328, 2, 2, 0) + b"\1a\0b",
    "follow .* 2 tokens": header(20240328, 2, 2, 0) + b"\1a\1b\1c",
    "20 bytes": header(20240328, 2, 2, 0)[:20],
}


@pytest.mark.parametrize("message", DAMAGED)
def test_damaged_files(tmp_path, message):
    path = tmp_path / "damaged.bin"
    path.write_bytes(DAMAGED[message])
    with pytest.raises(llmc.Error, match=f"damaged.bin: .*{message}"):
        Tokenizer.load(path)


def test_files_that_are_no_byte_level_vocabulary(tmp_path):
    """The file is well formed, but a byte has no token, or two tokens have the same bytes."""
    tokens = [bytes([b]) for b in range(256)]
    for odd, message in [
        (tokens[:65] + tokens[66:], "byte 65"),
        ([*tokens, b"a"], "same"),
    ]:
        path = tmp_path / "odd.bin"
        path.write_bytes(
            header(20240328, 2, len(odd) + 1, len(odd)) + b"".join(bytes([len(t)]) + t for t in [*odd, b"<eot>"])
        )
        with pytest.raises(ValueError, match=f"odd.*{message}"):
            Tokenizer.load(path)


def test_tokens_too_long_for_the_file(tmp_path):
    tokens = [bytes([b]) for b in range(256)] + [b"a" * 256, b"<|endoftext|>"]
    with pytest.raises(ValueError, match="token 256 .* 256 .* 255"):
        Tokenizer(tokens, 257, "long").save(tmp_path / "long.bin")
    assert not list(tmp_path.iterdir())


# ---- streams ----


@pytest.mark.parametrize("make", [Tokenizer.byte_level, lambda: Tokenizer.train_bpe(TEXT, 400)])
def test_streams_hold_back_half_characters(make):
    """A character of several tokens is returned when its last token is; all pieces together are the text."""
    tokenizer = make()
    for text in (ODD, "🙂", "é"):
        pieces = list(tokenizer.stream(tokenizer.encode(text)))
        assert "".join(pieces) == text and "\ufffd" not in pieces and all(pieces)
    tokens = iter(Tokenizer.byte_level().encode("a🙂b"))
    stream, seen = Tokenizer.byte_level().stream(tokens), []
    for _ in range(3):
        seen.append(next(stream))
    assert seen == ["a", "🙂", "b"]


def test_streams_of_broken_characters():
    """Bytes that are not UTF-8 become U+FFFD; those of an unfinished character do so at the end of the stream."""
    tokenizer = Tokenizer.byte_level()
    smile = tokenizer.encode("🙂")
    assert list(tokenizer.stream(smile[:3])) == ["\ufffd"]
    assert "".join(tokenizer.stream([97, *smile[:2], 98])) == tokenizer.decode([97, *smile[:2], 98]) == "a\ufffdb"


# ---- specs ----


def test_specs(trained, tmp_path, monkeypatch):
    assert Tokenizer.from_spec("bytes").vocab_size == 257
    assert Tokenizer.from_spec("bpe:300", TEXT).vocab_size == 300
    trained.save(tmp_path / "t.bin")
    assert Tokenizer.from_spec(str(tmp_path / "t.bin")).tokens == trained.tokens
    with pytest.raises(ValueError, match="'gpt5'.*gpt2, bytes, bpe:N"):
        Tokenizer.from_spec("gpt5")
    with pytest.raises(FileNotFoundError, match="none.bin"):
        Tokenizer.from_spec("none.bin")
    with pytest.raises(ValueError, match="bpe:N"):
        Tokenizer.from_spec("bpe:many", TEXT)
    with pytest.raises(ValueError, match="trained on text"):
        Tokenizer.from_spec("bpe:300")
    with pytest.raises(ValueError, match="end-of-text token 300 .* 257"):
        Tokenizer(Tokenizer.byte_level().tokens, 300, "odd")


def test_gpt2_without_a_connection(monkeypatch):
    """The one error names what can be used instead."""

    def refuse(name):
        raise OSError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    with pytest.raises(ConnectionError, match="TIKTOKEN_CACHE_DIR.*'bytes' or 'bpe:4096'.*no route to host"):
        Tokenizer.gpt2()
