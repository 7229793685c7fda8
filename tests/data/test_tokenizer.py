"""Tokenizers: GPT-2's, bytes, trained BPE; llm.c's file; streams."""

from __future__ import annotations

import collections
import json
import pydoc_data.topics
import random
import struct

import numpy as np
import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

import llmc
from llmc import Tokenizer, _llmc
from llmc.data import documents, words
from llmc.data import tokenizer as module
from llmc.data.documents import DocumentReader
from llmc.data.tokenize import token_stream
from llmc.data.words import GPT2_PATTERN

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


def naive_bpe(text, vocab_size):
    """Train as a textbook does: count all pairs, merge the most frequent (among equals that of smaller ids), repeat."""
    words = [list(w.encode("utf-8", "surrogatepass")) for w in regex.findall(GPT2_PATTERN, text)]
    tokens, passed_over = [bytes([b]) for b in range(256)], set()
    while len(tokens) < vocab_size - 1:
        counts = collections.Counter(pair for word in words for pair in zip(word, word[1:]))
        pair = min(counts.keys() - passed_over, key=lambda p: (-counts[p], p), default=None)
        if pair is None or counts[pair] < 2:
            break
        merged = tokens[pair[0]] + tokens[pair[1]]
        if merged in tokens or len(merged) > 255:
            passed_over.add(pair)
            continue
        for word in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == pair:
                    word[i : i + 2] = [len(tokens)]
                i += 1
        tokens.append(merged)
    return tokens


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    parts=st.lists(st.tuples(st.sampled_from(["a", "b", "ab", " ", "\n", "é", "'s"]), st.integers(1, 9)), max_size=40)
)
def test_training_is_the_textbooks(parts):
    text = "".join(letters * times for letters, times in parts)
    assert Tokenizer.train_bpe(text, 257 + 30).tokens[:-1] == naive_bpe(text, 257 + 30)


@pytest.mark.parametrize("times", [255, 256, 511, 700])
def test_tokens_learnt_have_up_to_255_bytes(times):
    assert Tokenizer.train_bpe("a" * times, 400).tokens[:-1] == naive_bpe("a" * times, 400)


def test_training_on_a_long_word():
    """Such as DNA, base64, or a script without blanks: the time must not be quadratic in its length."""
    text = "".join(random.Random(0).choices("ACGT", k=100_000))
    trained = Tokenizer.train_bpe(text, 400)
    assert trained.vocab_size == 400 and trained.decode(trained.encode(text)) == text


def test_training_looks_at_the_first_different_words(monkeypatch):
    """Its memory is bounded; words that are known by then are counted to the end."""
    monkeypatch.setattr(module, "_LEARNT_FROM", 12)
    texts = ["abc abc ", "defghi jkl", "m abc"]
    assert module._count_words(texts) == ([b"abc", b" abc", b" ", b"defg"], [1, 2, 1, 1])


def test_training_can_be_interrupted():
    def interrupt(so_far):
        assert 256 < so_far <= 5000
        raise KeyboardInterrupt

    text = "".join(random.Random(0).choices("ACGT", k=300_000)).encode()
    with pytest.raises(KeyboardInterrupt):
        _llmc.train_bpe([text], [1], 5000, interrupt)
    with pytest.raises(ValueError, match="1 words and 2 counts"):
        _llmc.train_bpe([text], [1, 2], 300, interrupt)


def test_training_is_repeatable(trained):
    assert Tokenizer.train_bpe(TEXT, 700).tokens == trained.tokens


def test_training_on_little_text():
    """Training ends early if no pair occurs twice; an empty text gives the 256 bytes and end-of-text."""
    assert Tokenizer.train_bpe("abab abab", 1000).vocab_size < 270
    assert Tokenizer.train_bpe("", 1000).vocab_size == 257
    assert Tokenizer.train_bpe("x", 257).decode([120, 256]) == "x<|endoftext|>"
    with pytest.raises(ValueError, match="vocab_size is 256"):
        Tokenizer.train_bpe("abc", 256)


# ---- any text ----

# What the splits into words tell apart, and what they have rules for.
NASTY = st.lists(
    st.tuples(
        st.sampled_from(
            [
                *"abAé'sl1².,/!世\uff0c🙂 \n\t\r\0\x1c\u0301\u3000\xa0\x85\u1100\u1161",
                "'s",
                "'ll",
                "<|endoftext|>",
                " \n",
            ]
        ),
        st.integers(1, 12),
    ),
    max_size=30,
).map(lambda parts: "".join(letters * times for letters, times in parts))

LONG = {
    "blanks": " " * 1_000_000 + "a",
    "lines": "\n" * 1_000_000 + "a",
    "blanks and lines": " \n\t" * 400_000 + "a ",
    "letters": "a" * 100_000,
    "dna": "".join(random.Random(0).choices("ACGT", k=100_000)),
    "digits": "".join(random.Random(0).choices("0123456789", k=100_000)),
    "marks": "!" * 100_000,
    "emoji": "🙂👩\u200d" * 10_000,
    "chinese": "世界你好" * 10_000,
    "combining": "e" + "\u0301" * 100_000,
    "apostrophes": "'" * 100_000 + "s",
    "nul": "\0" * 100_000,
}


@pytest.fixture(scope="module", params=["bytes", "gpt2", "llm.c"])
def any_tokenizer(request, tmp_path_factory):
    if request.param == "bytes":
        return Tokenizer.byte_level()
    if request.param == "gpt2":
        return request.getfixturevalue("gpt2")
    path = tmp_path_factory.mktemp("llm.c") / "tokenizer.bin"
    request.getfixturevalue("trained").save(path)
    return Tokenizer.load(path)


@pytest.mark.parametrize("name", LONG)
def test_long_words(any_tokenizer, name):
    text = LONG[name]
    ids = any_tokenizer.encode_to_numpy(text)
    assert any_tokenizer.decode(ids.tolist()) == text


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=NASTY, length=st.integers(2, 9))
def test_long_words_are_encoded_as_by_tiktoken(any_tokenizer, text, length):
    expected = any_tokenizer._encoding.encode_ordinary(text)
    any_tokenizer.long_word = length
    try:
        eot = any_tokenizer.eot_token
        assert any_tokenizer.encode(text) == any_tokenizer.encode_to_numpy(text).tolist() == expected
        pieces = [(text, True), (text, True), (text, False)]
        assert any_tokenizer.encode_documents(pieces).tolist() == [eot, *expected, eot, *expected, *expected]
    finally:
        del any_tokenizer.long_word


def test_half_a_surrogate_pair_in_a_long_word(any_tokenizer):
    text = "\ud800" + "a" * 2000
    assert any_tokenizer.decode(any_tokenizer.encode(text)) == "\ufffd" + "a" * 2000
    with pytest.raises(ValueError, match="byte 0 has no token"):
        _llmc.BpeEncoder([b"a", b"b"], 1)


# ---- cutting ----

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def splitters():
    yield "gpt2", BYTE_LEVEL
    for i, pattern in enumerate(words.KNOWN_PATTERNS):
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        yield f"pattern {i}", {"type": "Sequence", "pretokenizers": [split, {**BYTE_LEVEL, "use_regex": False}]}


def json_tokenizer(path, splitter, normalizer=None, **added):
    """Write a tokenizer.json of single bytes and a few merges, and load it."""
    merges = ["e r", "t h", "Ġ t", "Ġ Ġ", "Ċ Ċ", "1 1", "a b", "ab ab"]
    tokens = [*module.BYTE_LETTERS, *(m.replace(" ", "") for m in merges), "<|endoftext|>", "a b"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    parts = {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "added_tokens": [
            {"id": len(tokens) - 2, "content": tokens[-2], **flags, "special": True},
            {"id": len(tokens) - 1, "content": tokens[-1], **flags, "special": False, **added},
        ],
        "normalizer": normalizer,
        "pre_tokenizer": splitter,
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens[:-2])}, "merges": merges},
    }
    path.write_text(json.dumps(parts))
    return Tokenizer.load(path)


@pytest.fixture(scope="module")
def json_tokenizers(tmp_path_factory):
    """One of each split that is known."""
    pytest.importorskip("tokenizers")
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    return {name: json_tokenizer(path, splitter, {"type": "NFC"}) for name, splitter in splitters()}


def test_texts_are_cut_at_boundaries():
    for text, at in [("ab cd", 2), ("a  b", 1), ("世界\uff0c你好", 2), ("a1", 1), ("1a", 1), ("!\na", 2)]:
        assert words.last_boundary(text) == at, text
    for text in ("", "abc", " a", "!?", "!a", "it's", "!\n/", "a\n", "e\u0301"):
        assert words.last_boundary(text) == 0, text


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=NASTY, at=st.integers(1, 100))
def test_pieces_have_the_tokens_of_the_whole(trained, text, at):
    """Wherever the text that has come so far ends."""
    cut = words.last_boundary(text[:at])
    assert trained.encode(text[:cut]) + trained.encode(text[cut:]) == trained.encode(text)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=NASTY, at=st.integers(1, 100))
def test_pieces_have_the_tokens_of_the_whole_with_tokenizer_json(json_tokenizers, text, at):
    cut = words.last_boundary(text[:at])
    for tokenizer in json_tokenizers.values():
        if tokenizer.may_cut(text[:cut], text[cut:]):
            assert tokenizer.encode(text[:cut]) + tokenizer.encode(text[cut:]) == tokenizer.encode(text)


def test_which_tokenizer_json_may_be_cut(json_tokenizers, tmp_path):
    """Not one with another split, nor inside of an added token, which is found before the text is split."""
    for tokenizer in json_tokenizers.values():
        assert tokenizer.may_cut("xyz", " xyz") and not tokenizer.may_cut("xa", " bz")
    path = tmp_path / "tokenizer.json"
    blank_first = {**BYTE_LEVEL, "add_prefix_space": True}
    for other in (
        json_tokenizer(path, blank_first),
        json_tokenizer(path, {**BYTE_LEVEL, "use_regex": False}),
        json_tokenizer(
            path, {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]}
        ),
        json_tokenizer(path, BYTE_LEVEL, {"type": "NFKC"}),
        json_tokenizer(path, BYTE_LEVEL, lstrip=True),
    ):
        assert not other.may_cut("xyz", " xyz")


@pytest.mark.parametrize("name", LONG)
def test_tokenizer_json_on_long_words(json_tokenizers, name):
    """Truncation that was saved with it does not cut the text."""
    text = LONG[name][-20_000:]
    tokenizer = json_tokenizers["pattern 0"]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_documents([("\ud800" + text, True)]).tolist()[1:] == tokenizer.encode("\ufffd" + text)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=NASTY, sizes=st.lists(st.integers(1, 16), min_size=1))
def test_long_words_are_cut_at_the_same_places_however_the_text_comes(text, sizes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "LONGEST_WORD", 16)
        expected = [len(piece) for piece in words.cut_all([text])]
        pieces, rest, at = [], "", 0
        for i in range(len(text)):
            if at >= len(text):
                break
            size = sizes[i % len(sizes)]
            new, rest = words.cut(rest, text[at : at + size])
            pieces, at = pieces + new, at + size
        pieces.append(rest)
    ends = set(np.cumsum([len(p) for p in pieces]).tolist())
    assert "".join(pieces) == text and max(len(p) for p in pieces) <= 2 * 16
    # Those that are no boundary between words were cut because the word was too long.
    boundaries = {m.start() for m in regex.finditer(words._LAST_BOUNDARY.pattern.replace("(?r)", ""), text)} | {
        0,
        len(text),
    }
    assert ends - boundaries == set(np.cumsum(expected).tolist()) - boundaries


def test_a_file_without_a_blank_is_read_in_pieces(monkeypatch, tmp_path, trained):
    """It used to be refused. Its tokens do not depend on the number of workers, and are the whole's if no word is too long."""
    monkeypatch.setattr(words, "LONGEST_WORD", 1000)
    monkeypatch.setattr(documents, "_PIECE", 700)
    for text, cut_words in (("世界\uff0c你好。" * 2000, False), ("ACGT" * 3000, True), ("🙂" * 3000, True)):
        path = tmp_path / "a.txt"
        path.write_bytes(text.encode())
        pieces = list(DocumentReader().pieces(path))
        assert "".join(p.text for p in pieces) == text and max(len(p.text) for p in pieces) <= 1700 and len(pieces) > 2
        tokens = [np.concatenate(list(token_stream(pieces, trained, workers))).tolist() for workers in (1, 3)]
        assert tokens[0] == tokens[1] and trained.decode(tokens[0][1:]) == text
        assert (len(pieces[0].text) == 1000) == cut_words and (cut_words or tokens[0][1:] == trained.encode(text))


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
    """Bytes that are not UTF-8 become U+FFFD, but for those with which the stream begins or ends: they are left out."""
    tokenizer = Tokenizer.byte_level()
    smile = tokenizer.encode("🙂")
    assert list(tokenizer.stream(smile[:3])) == list(tokenizer.stream(smile[3:])) == []
    assert "".join(tokenizer.stream([*smile[2:], *smile[:2], 97, *smile, 300, *smile[:3]])) == "a🙂\ufffd"
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


def test_what_is_no_row_of_ids_and_no_text():
    byte_level = Tokenizer.byte_level()
    for wrong, message in [
        ("text", r"expected token ids, got text: decode\(\) takes what encode\(\) returns"),
        (b"text", "got text"),
        (["text"], "which are integers, got 'text' in it"),
        ([1.0], "got 1.0 in it"),
        ([[1, 2], [3]], r"got \[1, 2\] in it"),
        (np.ones((2, 3), int), r"got shape \(2, 3\): decode rows one by one"),
        (5, r"got int: .*a single id as \[id\]"),
        (None, "got NoneType"),
    ]:
        for decode in (byte_level.decode, byte_level.decode_bytes, lambda ids: list(byte_level.stream(ids))):
            with pytest.raises(TypeError, match=message):
                decode(wrong)
    for wrong in (b"bytes", ["a", "b"], 5, None):
        for encode in (byte_level.encode, byte_level.encode_to_numpy):
            with pytest.raises(TypeError, match=r"expected a text \(str\), got \w+; encode several texts one by one"):
                encode(wrong)
    assert byte_level.decode(iter([72, 105])) == byte_level.decode(np.array([72, 105], np.uint8)) == "Hi"


def test_regex_gets_no_position_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes positions as a C long, which has 32 bits on Windows."""
    asked = []

    class Pattern:
        def search(self, text: str, begin: int, end: int | None) -> None:
            asked.append((begin, end))

    monkeypatch.setattr(words, "_LAST_BOUNDARY", Pattern())
    assert "".join(words.cut_all(["some text", " and more"])) == "some text and more"
    assert asked and all(begin < 2**31 and (end is None or end < 2**31) for begin, end in asked)
