"""Tokenizers: text to token ids and back.

All but JsonTokenizer are byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) and split text into words in the same way. So a
table of byte strings, in which a token's id is its merge rank, says everything. llm.c's tokenizer file holds exactly that table.
"""

from __future__ import annotations

import codecs
import collections
import functools
import itertools
import json
import operator
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import regex
import tiktoken
from numpy.typing import NDArray
from tqdm import tqdm

from llmc import _llmc
from llmc.data.roles import EOT, ROLES_FILE, read_roles, write_roles
from llmc.data.words import GPT2_PATTERN, KNOWN_PATTERNS, cut_all, may_have_long_words, split_long_words
from llmc.system.fs import StrPath, write_atomically
from llmc.system.network import reason

# The text of an id that has no token: a model's vocabulary may be larger than its tokenizer's.
UNKNOWN = "\ufffd".encode()


def _byte_letters() -> list[str]:
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


# The character that stands for each byte in the vocabularies of GPT-2 and Hugging Face: printable characters of Latin-1 stand for
# their own bytes, the characters from 256 on for the other bytes in their order.
BYTE_LETTERS = _byte_letters()
BYTE_OF_LETTER = {letter: b for b, letter in enumerate(BYTE_LETTERS)}

# The names that a file in llm.c's format has beside a model or token files.
TABLE_FILES = ("tokenizer.bin", "gpt2_tokenizer.bin")

_MAGIC = 20240328
_LEARNT_FROM = 16 << 20  # bytes of different words that a BPE is trained on


class Tokenizer:
    """A byte-level BPE vocabulary and its end-of-text token.

    Args:
        tokens: the bytes of each id. Every single byte must be among them. Of two tokens the one with the smaller id is merged first.
        eot_token: the id of the end-of-text token.
        name: what errors call the tokenizer.

    Raises:
        ValueError: if eot_token is not an id, if a byte has no token, or if two ids have the same bytes.

    Attributes:
        tokens: the bytes of each id.
        eot_token: the id of the end-of-text token.
        vocab_size: the number of ids.
        name: as given.
        roles: ids of special tokens by their role ("pad", ...), if the tokenizer came with more than an end-of-text token (roles.py).
        special: ids of all special tokens, which are no part of any text: end-of-text, and those that a file names so.
        file_name: what save()'s file is called in a run directory or beside token files.
        long_word: words of so many characters are encoded by our own encoder. tiktoken fails on a million of white space, and before
            its version 0.13 it takes quadratic time.
    """

    file_name = "tokenizer.bin"
    long_word = 1024

    def __init__(self, tokens: Sequence[bytes], eot_token: int, name: str) -> None:
        if not 0 <= eot_token < len(tokens):
            raise ValueError(f"end-of-text token {eot_token} is outside of the vocabulary of {len(tokens)}")
        ranks = {token: i for i, token in enumerate(tokens) if i != eot_token}
        missing = [b for b in range(256) if bytes([b]) not in ranks]
        if missing or len(ranks) != len(tokens) - 1:
            raise ValueError(
                f"{name} is not a byte-level vocabulary: "
                + (f"byte {missing[0]} has no token" if missing else "two ids have the same bytes")
            )
        self.name = name
        self.tokens = list(tokens)
        self.eot_token = eot_token
        self.vocab_size = len(tokens)
        self.roles: dict[str, int] = {}
        self.special = {eot_token}
        self._encoding = tiktoken.Encoding(
            name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={EOT: eot_token}
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.vocab_size:,} tokens, eot_token={self.eot_token})"

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text. '<|endoftext|>' in it is text like any other.

        Raises:
            TypeError: if it is no text, but a list of texts or bytes.
        """
        _check_text(text)
        if not may_have_long_words(text, self.long_word):
            return self._encoding.encode_ordinary(text)
        ids: list[int] = self.encode_to_numpy(text).tolist()
        return ids

    def encode_to_numpy(self, text: str) -> NDArray[np.uint32]:
        """Return the token ids of a text as an array (n,) of uint32, without making a Python integer per token."""
        _check_text(text)
        if not may_have_long_words(text, self.long_word):
            return self._encode_short_words(text, special=False)
        parts = [
            self._long_words.encode(part.encode()) if is_long else self._encode_short_words(part, special=False)
            for part, is_long in split_long_words(_whole_characters(text), self.long_word)
        ]
        return np.concatenate(parts)

    def encode_documents(self, pieces: Sequence[tuple[str, bool]]) -> NDArray[np.uint32]:
        """Encode pieces of documents, with an end-of-text token before each document.

        Args:
            pieces: pairs of a text and whether a document begins with it.

        Returns:
            The token ids of all pieces in their order, (n,) of uint32.
        """
        # One call encodes many documents, and other threads of Python run meanwhile.
        joined = "".join(EOT + text if first else text for text, first in pieces)
        # '<|endoftext|>' of a document must not become the special token.
        if may_have_long_words(joined, self.long_word) or any(EOT in text for text, _ in pieces):
            eot = np.asarray([self.eot_token], dtype=np.uint32)
            parts = [
                part for text, first in pieces for part in ((eot,) if first else ()) + (self.encode_to_numpy(text),)
            ]
            return np.concatenate(parts)
        return self._encode_short_words(joined, special=True)

    def _encode_short_words(self, text: str, special: bool) -> NDArray[np.uint32]:
        allowed = {EOT} if special else set()
        try:
            tokens = self._encoding.encode_to_numpy(text, allowed_special=allowed, disallowed_special=())
        except UnicodeEncodeError:
            text = _whole_characters(text)
            tokens = self._encoding.encode_to_numpy(text, allowed_special=allowed, disallowed_special=())
        return np.asarray(tokens, dtype=np.uint32)

    @functools.cached_property
    def _long_words(self) -> _llmc.BpeEncoder:
        return _llmc.BpeEncoder(self.tokens, self.eot_token)

    def may_cut(self, before: str, after: str) -> bool:
        """Return whether two pieces of a text, as of words.cut(), have the tokens of both together."""
        return True

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """Return the bytes of tokens in a row; an id outside of the vocabulary is U+FFFD.

        Raises:
            TypeError: as of decode().
        """
        return b"".join(map(self._bytes_of, _row(tokens)))

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of tokens. Bytes that are not UTF-8 and ids outside of the vocabulary become U+FFFD.

        Args:
            tokens: one row of token ids: a list, a generator, an array, a tensor of PyTorch's.

        Raises:
            TypeError: if they are text, several rows, or no whole numbers.
        """
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")

    def stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Decode tokens as they come, to be read.

        Args:
            tokens: token ids.

        Yields:
            Pieces of text. A character that is split over several tokens comes with the last of them. Parts of characters with which the
            text begins or ends are left out; others become U+FFFD.

        Raises:
            TypeError: as of decode().
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")
        for token in _row(tokens):
            if piece := decoder.decode(self._bytes_of(token)):
                decoder.errors = "replace"
                yield piece

    def _bytes_of(self, token: int) -> bytes:
        try:
            i = operator.index(token)
        except TypeError:
            raise TypeError(f"expected one row of token ids, which are integers, got {token!r:.40} in it") from None
        return self.tokens[i] if 0 <= i < self.vocab_size else UNKNOWN

    def save(self, path: StrPath) -> None:
        """Write llm.c's tokenizer file, version 2.

        Raises:
            OSError: if it cannot be written; an existing file stays as it was.
            ValueError: if a token has more than 255 bytes.
        """
        too_long = [i for i, t in enumerate(self.tokens) if not 1 <= len(t) <= 255]
        if too_long:
            raise ValueError(
                f"token {too_long[0]} has {len(self.tokens[too_long[0]])} bytes; llm.c's tokenizer file holds 1 to 255"
            )
        header = struct.pack("<4I", _MAGIC, 2, self.vocab_size, self.eot_token).ljust(1024, b"\0")
        write_atomically(path, [header, b"".join(bytes([len(t)]) + t for t in self.tokens)])
        self._save_roles(path)

    def _save_roles(self, path: StrPath) -> None:
        write_roles(Path(path).parent, {role: self.tokens[i].decode() for role, i in self.roles.items()})

    def save_beside_model(self, folder: StrPath) -> Path:
        """Write the tokenizer into a model's folder, under the name by which llm.c's programs and Tokenizer.beside find it.

        Returns:
            The path: gpt2_tokenizer.bin for a vocabulary of GPT-2's size, tokenizer.bin for another; tokenizer.json if it was read
            from such a file.
        """
        path = Path(folder) / self.file_name
        if path.name == "tokenizer.bin" and self.vocab_size == 50257:
            path = path.with_name("gpt2_tokenizer.bin")
        self.save(path)
        return path

    # ---- making a tokenizer ----

    @staticmethod
    def load(path: StrPath) -> Tokenizer:
        """Load llm.c's tokenizer file, which suffices to encode as well, or Hugging Face's tokenizer.json.

        Raises:
            FileNotFoundError: if there is no such file.
            llmc.Error, ValueError: if it is damaged.
        """
        if Path(path).suffix == ".json":
            return JsonTokenizer(path)
        native = _llmc.Tokenizer(Path(path))
        tokens = [native.decode(i) for i in range(native.vocab_size)]
        tokenizer = Tokenizer(tokens, native.eot_token, Path(path).stem)
        tokenizer.roles = read_roles(Path(path).parent, {EOT: native.eot_token})
        return tokenizer

    @staticmethod
    def beside(folder: StrPath) -> Tokenizer | None:
        """Load the tokenizer file in a run directory or a folder of token files.

        Returns:
            The tokenizer, or None if the folder has none.

        Raises:
            llmc.Error, ValueError: if it is damaged.
        """
        path = tokenizer_file(folder)
        return None if path is None else Tokenizer.load(path)

    @staticmethod
    def gpt2() -> Tokenizer:
        """Return GPT-2's tokenizer, of 50,257 tokens. The package tiktoken downloads it once and keeps it.

        Raises:
            ConnectionError: if it is not on this machine and cannot be downloaded; the message says what would do instead.
        """
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as e:  # requests' errors are OSErrors
            raise ConnectionError(
                "GPT-2's tokenizer is not on this machine and could not be downloaded. Connect once, or set "
                "TIKTOKEN_CACHE_DIR to a folder that has tiktoken's files, or give llm.c's gpt2_tokenizer.bin, or use "
                f"'bytes' or 'bpe:4096' instead ({reason(e)})"
            ) from e
        eot = encoding.eot_token
        tokens = [b""] * encoding.n_vocab
        for i in range(encoding.n_vocab):
            tokens[i] = EOT.encode() if i == eot else encoding.decode_single_token_bytes(i)
        return Tokenizer(tokens, eot, "gpt2")

    @staticmethod
    def byte_level() -> Tokenizer:
        """Return a tokenizer of 257 tokens: one per byte, and end-of-text."""
        return Tokenizer([bytes([b]) for b in range(256)] + [EOT.encode()], 256, "bytes")

    @staticmethod
    def train_bpe(text: str | Iterable[str], vocab_size: int) -> Tokenizer:
        """Train a byte-level BPE on a text.

        The most frequent pair is merged first; of pairs that are equally frequent, the one with the smaller ids. Each different word is
        looked at once, with the number of its occurrences; the first 16 MiB of different words are looked at.

        Args:
            text: what to train on, as one string or several.
            vocab_size: number of tokens, end-of-text among them. There are fewer if the text has no more pairs.

        Raises:
            ValueError: if vocab_size is less than 257.
        """
        if vocab_size < 257:
            raise ValueError(f"vocab_size is {vocab_size}; a byte-level BPE has 256 bytes and end-of-text at the least")
        words, counts = _count_words([text] if isinstance(text, str) else text)
        with tqdm(total=vocab_size, desc="train BPE", unit="token", delay=1, leave=False) as bar:
            tokens = _llmc.train_bpe(words, counts, vocab_size - 1, lambda so_far: bar.update(so_far - bar.n))
        return Tokenizer([*tokens, EOT.encode()], len(tokens), f"bpe:{len(tokens) + 1}")

    @staticmethod
    def from_spec(spec: str, text: str | Iterable[str] | None = None) -> Tokenizer:
        """Make the tokenizer that a setting names.

        Args:
            spec: 'gpt2', 'bytes', 'bpe:N' for one of N tokens trained on text, or the path of llm.c's tokenizer file or a
                tokenizer.json.
            text: what 'bpe:N' is trained on.

        Raises:
            FileNotFoundError: if spec looks like a file and the file does not exist.
            ValueError: if spec is none of these, or 'bpe:N' without a text.
        """
        if spec == "gpt2":
            return Tokenizer.gpt2()
        if spec == "bytes":
            return Tokenizer.byte_level()
        if spec.startswith("bpe:"):
            if not spec[4:].isdigit():
                raise ValueError(f"tokenizer '{spec}': expected bpe:N with a number, as bpe:4096")
            if text is None:
                raise ValueError(f"tokenizer '{spec}' is trained on text, and there is none: the data are token files")
            return Tokenizer.train_bpe(text, int(spec[4:]))
        if os.path.exists(spec):
            return Tokenizer.load(spec)
        if os.path.splitext(spec)[1] or os.sep in spec:
            raise FileNotFoundError(f"tokenizer file '{spec}' does not exist")
        raise ValueError(f"unknown tokenizer '{spec}': expected gpt2, bytes, bpe:N, or a tokenizer file")


class JsonTokenizer(Tokenizer):
    """A tokenizer from Hugging Face's tokenizer.json, if that is byte-level (GPT-2, Llama 3, Qwen, ...). Needs the package tokenizers.

    The end-of-text token is the first of these that it has: <|endoftext|>, <|begin_of_text|> (which llm.c takes for Llama 3),
    <|end_of_text|>, the one that files beside it call eos (roles.py), </s>, <eos>.

    Args:
        path: the file.
        text: its content, if the file itself is not there.

    Raises:
        ImportError: if the package is missing.
        ValueError: if the file is not a tokenizer, not byte-level, or has no end-of-text token.
    """

    file_name = "tokenizer.json"

    def __init__(self, path: StrPath, text: str | None = None) -> None:
        try:
            import tokenizers
        except ImportError as e:
            raise ImportError(f"{path}: reading this needs a package: pip install tokenizers") from e
        self._text = Path(path).read_text(encoding="utf-8") if text is None else text
        try:
            self._encoding: Any = tokenizers.Tokenizer.from_str(self._text)
            parts = json.loads(self._text)
            added_rows = parts.get("added_tokens", [])
            added = {row["id"]: row["content"] for row in added_rows}
        except Exception as e:  # the package raises plain Exceptions
            raise ValueError(f"{path}: not a Hugging Face tokenizer: {e}") from e
        if "ByteLevel" not in json.dumps(parts.get("decoder")):
            raise ValueError(f"{path}: not a byte-level tokenizer, as GPT-2's or Llama 3's; others are not supported")
        self._encoding.encode_special_tokens = True  # '<|endoftext|>' in a text is text like any other
        self._encoding.no_truncation()  # these two may have been saved with it, for sentences of one length
        self._encoding.no_padding()
        vocabulary: dict[str, int] = self._encoding.get_vocab(with_added_tokens=True)
        if len(set(vocabulary.values())) < len(vocabulary):
            raise ValueError(f"{path}: two tokens have the same id")
        self.roles = read_roles(Path(path).parent, {text: i for i, text in added.items()})
        eos = added.get(self.roles.get("eos", -1))
        for name in (EOT, "<|begin_of_text|>", "<|end_of_text|>", eos, "</s>", "<eos>"):
            if name in vocabulary:
                self.eot_token = vocabulary[name]
                break
        else:
            raise ValueError(
                f"{path}: which token ends a text? Of its special tokens ({', '.join(map(repr, added.values())) or 'none'}) none is named "
                f"so, nor called eos_token in {ROLES_FILE} beside it"
            )
        # These are found before the text is split, so they must not be cut.
        found_first = [row for row in added_rows if not row.get("special")]
        self.special = {self.eot_token, *self.roles.values(), *(row["id"] for row in added_rows if row.get("special"))}
        self._uncut = [row["content"] for row in found_first if len(row["content"]) > 1]
        self._splits_as_known = _splits_as_known(parts) and not any(
            row.get("lstrip") or row.get("rstrip") or row.get("single_word") for row in found_first
        )
        self.name = Path(path).stem
        self.vocab_size = max(vocabulary.values()) + 1
        self.tokens = [UNKNOWN] * self.vocab_size
        for token, i in vocabulary.items():
            known = i in added or any(c not in BYTE_OF_LETTER for c in token)
            self.tokens[i] = token.encode() if known else bytes(BYTE_OF_LETTER[c] for c in token)

    def encode(self, text: str) -> list[int]:
        _check_text(text)
        ids: list[int] = self._encoding.encode(_whole_characters(text), add_special_tokens=False).ids
        return ids

    def encode_to_numpy(self, text: str) -> NDArray[np.uint32]:
        return np.asarray(self.encode(text), dtype=np.uint32)

    def encode_documents(self, pieces: Sequence[tuple[str, bool]]) -> NDArray[np.uint32]:
        texts = [_whole_characters(text) for text, _ in pieces]
        encoded = self._encoding.encode_batch_fast(texts, add_special_tokens=False)
        parts: list[int] = []
        for (_, first), one in zip(pieces, encoded):
            parts += [self.eot_token, *one.ids] if first else one.ids
        return np.asarray(parts, dtype=np.uint32)

    def may_cut(self, before: str, after: str) -> bool:
        return self._splits_as_known and not any(t in before[1 - len(t) :] + after[: len(t) - 1] for t in self._uncut)

    def content(self) -> dict[str, Any]:
        """Return what the tokenizer.json holds."""
        content: dict[str, Any] = json.loads(self._text)
        return content

    def save(self, path: StrPath) -> None:
        """Write the tokenizer.json that the tokenizer was read from."""
        write_atomically(path, [self._text.encode()])
        self._save_roles(path)


def tokenizer_file(folder: StrPath) -> Path | None:
    """Return the tokenizer file in a run directory or a folder of token files; None if there is none."""
    paths = (Path(folder) / name for name in (*TABLE_FILES, "tokenizer.json"))
    return next((path for path in paths if path.is_file()), None)


def _splits_as_known(parts: dict[str, Any]) -> bool:
    """Return whether a tokenizer.json splits text in one of the ways for which words.cut() finds boundaries."""
    # NFC joins marks to letters: no boundary is between them.
    if parts.get("normalizer") not in (None, {"type": "NFC"}):
        return False
    splitter = parts.get("pre_tokenizer") or {}
    steps = splitter.get("pretokenizers", [splitter])
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return False
    if len(steps) == 1:
        return bool(last.get("use_regex", True))  # GPT-2's split
    split = steps[0]
    kind = (split.get("type"), split.get("behavior"), bool(split.get("invert")), bool(last.get("use_regex", True)))
    pattern = (split.get("pattern") or {}).get("Regex")
    return len(steps) == 2 and kind == ("Split", "Isolated", False, False) and pattern in KNOWN_PATTERNS


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise TypeError(f"expected a text (str), got {type(text).__name__}; encode several texts one by one")


def _row(tokens: Iterable[int]) -> Iterable[int]:
    if isinstance(tokens, (str, bytes)):
        raise TypeError("expected token ids, got text: decode() takes what encode() returns")
    shape = getattr(tokens, "shape", None)
    if not isinstance(tokens, Iterable) or (shape is not None and len(shape) != 1):
        got = type(tokens).__name__ if shape is None else f"shape {tuple(shape)}"
        raise TypeError(f"expected one row of token ids, got {got}: decode rows one by one, and a single id as [id]")
    return tokens


def _whole_characters(text: str) -> str:
    """Return the text with U+FFFD for half a surrogate pair, which JSON may hold, as tiktoken's encode() does."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _count_words(texts: Iterable[str]) -> tuple[list[bytes], list[int]]:
    """Count the different words of texts, of which the first _LEARNT_FROM bytes are kept."""
    counts: collections.Counter[str] = collections.Counter()
    words: list[bytes] = []
    room = _LEARNT_FROM
    with tqdm(desc="count words", unit="char", unit_scale=True, delay=1, leave=False) as bar:
        for piece in cut_all(texts):
            found = regex.findall(GPT2_PATTERN, piece)
            counts.update(found if room > 0 else filter(counts.__contains__, found))
            for word in itertools.islice(counts, len(words), None):
                words.append(word.encode("utf-8", "surrogatepass")[:room])
                room -= len(words[-1])
            bar.update(len(piece))
    return words, list(counts.values())
