"""Tokenizers: text to token ids and back.

All of them are byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) over the same split of text into words, so one table of
byte strings, in which a token's id is its merge rank, says everything. llm.c's tokenizer file holds exactly that table.
"""

from __future__ import annotations

import codecs
import collections
import heapq
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import regex
import tiktoken
from numpy.typing import NDArray

from llmc import _llmc

StrPath = str | os.PathLike[str]

# GPT-2's split: contractions, then words, numbers and punctuation, each with the blank before it, then runs of white space.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
EOT = "<|endoftext|>"

_MAGIC = 20240328


class Tokenizer:
    """A byte-level BPE vocabulary and its end-of-text token.

    tokens: the bytes of each id. Ids below the end-of-text token (which is the last) are merge ranks; every single byte must be
    among them.
    """

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
        self._encoding = tiktoken.Encoding(
            name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={EOT: eot_token}
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of text. '<|endoftext|>' in it is text like any other."""
        return self._encoding.encode_ordinary(text)

    def encode_to_numpy(self, text: str) -> NDArray[np.uint32]:
        """As encode(), without a Python integer per token."""
        return np.asarray(self._encoding.encode_to_numpy(text, disallowed_special=()), dtype=np.uint32)

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        return b"".join(self.tokens[t] for t in tokens)

    def decode(self, tokens: Iterable[int]) -> str:
        """Text; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")

    def stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Pieces of text as tokens come in; a character split over tokens is held back until it is whole."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in tokens:
            if piece := decoder.decode(self.tokens[token]):
                yield piece
        if piece := decoder.decode(b"", final=True):
            yield piece

    def save(self, path: StrPath) -> None:
        """Writes llm.c's tokenizer file, version 2."""
        from llmc.fs import write_atomically

        too_long = [i for i, t in enumerate(self.tokens) if not 1 <= len(t) <= 255]
        if too_long:
            raise ValueError(
                f"token {too_long[0]} has {len(self.tokens[too_long[0]])} bytes; llm.c's tokenizer file holds 1 to 255"
            )
        header = struct.pack("<4I", _MAGIC, 2, self.vocab_size, self.eot_token).ljust(1024, b"\0")
        write_atomically(path, [header, b"".join(bytes([len(t)]) + t for t in self.tokens)])

    # ---- where they come from ----

    @staticmethod
    def load(path: StrPath) -> Tokenizer:
        """From llm.c's tokenizer file, which is enough to encode with. llmc.Error where it is damaged."""
        native = _llmc.Tokenizer(Path(path))
        tokens = [native.decode(i) for i in range(native.vocab_size)]
        return Tokenizer(tokens, native.eot_token, Path(path).stem)

    @staticmethod
    def gpt2() -> Tokenizer:
        """GPT-2's 50,257 tokens, through tiktoken, which downloads them once.

        ConnectionError, saying what else would do, where they are neither cached nor to be had.
        """
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as e:  # requests' errors are OSErrors
            raise ConnectionError(
                "GPT-2's tokenizer is not on this machine and could not be downloaded. Connect once, or set "
                "TIKTOKEN_CACHE_DIR to a folder that has tiktoken's files, or give llm.c's gpt2_tokenizer.bin, or use "
                f"'bytes' or 'bpe:4096' instead ({type(e).__name__}: {e})"
            ) from e
        eot = encoding.eot_token
        tokens = [b""] * encoding.n_vocab
        for i in range(encoding.n_vocab):
            tokens[i] = EOT.encode() if i == eot else encoding.decode_single_token_bytes(i)
        return Tokenizer(tokens, eot, "gpt2")

    @staticmethod
    def byte_level() -> Tokenizer:
        """One token per byte, and end-of-text: 257."""
        return Tokenizer([bytes([b]) for b in range(256)] + [EOT.encode()], 256, "bytes")

    @staticmethod
    def train_bpe(text: str, vocab_size: int) -> Tokenizer:
        """A byte-level BPE of vocab_size tokens (end-of-text among them) for text; fewer where the text has no more pairs.

        The most frequent pair is merged first, of equals the one with the smaller ids. Words are counted once and only those that
        hold a merged pair are visited again, so a few megabytes take seconds.
        """
        if vocab_size < 257:
            raise ValueError(f"vocab_size is {vocab_size}; a byte-level BPE has 256 bytes and end-of-text at the least")
        counts = collections.Counter(regex.findall(GPT2_PATTERN, text))
        words = [list(word.encode("utf-8", errors="surrogatepass")) for word in counts]
        weights = list(counts.values())
        tokens = [bytes([b]) for b in range(256)]
        known = set(tokens)

        pairs: collections.Counter[tuple[int, int]] = collections.Counter()
        holders: dict[tuple[int, int], set[int]] = collections.defaultdict(set)
        for w, word in enumerate(words):
            for pair in zip(word, word[1:]):
                pairs[pair] += weights[w]
                holders[pair].add(w)
        # A heap of guesses: an entry counts only if its count is still true.
        heap = [(-count, pair) for pair, count in pairs.items()]
        heapq.heapify(heap)

        while len(tokens) < vocab_size - 1 and heap:
            negative, pair = heapq.heappop(heap)
            count = pairs[pair]
            if count != -negative:
                if count > 0:
                    heapq.heappush(heap, (-count, pair))
                continue
            if count < 2:
                break
            merged = tokens[pair[0]] + tokens[pair[1]]
            if merged in known or len(merged) > 255:  # the same bytes by another path: one id must not have two names
                del pairs[pair]
                continue
            new = len(tokens)
            tokens.append(merged)
            known.add(merged)
            changed: set[tuple[int, int]] = set()
            for w in holders.pop(pair):
                before, after = words[w], _merge(words[w], pair, new)
                for old in zip(before, before[1:]):
                    pairs[old] -= weights[w]
                    changed.add(old)
                for fresh in zip(after, after[1:]):
                    pairs[fresh] += weights[w]
                    holders[fresh].add(w)
                    changed.add(fresh)
                words[w] = after
            del pairs[pair]
            for p in sorted(changed - {pair}):
                if pairs[p] > 0:
                    heapq.heappush(heap, (-pairs[p], p))
        return Tokenizer([*tokens, EOT.encode()], len(tokens), f"bpe:{len(tokens) + 1}")

    @staticmethod
    def from_spec(spec: str, text: str | None = None) -> Tokenizer:
        """'gpt2', 'bytes', 'bpe:N' (trained on text), or the path of a llm.c tokenizer file.

        ValueError for another spec, FileNotFoundError where it looks like a file that is not there.
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


def _merge(word: list[int], pair: tuple[int, int], new: int) -> list[int]:
    out: list[int] = []
    i = 0
    while i < len(word):
        if i + 1 < len(word) and (word[i], word[i + 1]) == pair:
            out.append(new)
            i += 2
        else:
            out.append(word[i])
            i += 1
    return out
