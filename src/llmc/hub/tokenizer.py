"""Hugging Face's tokenizer files, vocab.json with merges.txt and tokenizer.json, read and written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc import _llmc
from llmc.data.roles import EOT, ROLES_FILE, read_roles
from llmc.data.tokenizer import BYTE_LETTERS, BYTE_OF_LETTER, JsonTokenizer, Tokenizer
from llmc.formats.json_files import read_object, read_text, write_json
from llmc.system.fs import StrPath, write_atomically

# Files of tokenizers that are not byte-level BPE, by which users may know why a model came without its own.
_OTHER_KINDS = {
    "vocab.txt": "WordPiece",
    "spiece.model": "SentencePiece",
    "sentencepiece.bpe.model": "SentencePiece",
    "tokenizer.model": "SentencePiece",
    "vocab.json": "merges.txt is missing",
}


def read_tokenizer(folder: StrPath) -> Tokenizer | None:
    """Read the tokenizer of a Hugging Face folder: tokenizer.json, or vocab.json with merges.txt.

    A tokenizer that splits and merges as GPT-2's does, and has <|endoftext|> and no other special token, becomes a table of llm.c's.
    Any other is kept as it is (JsonTokenizer).

    Returns:
        The tokenizer; None if the folder has none.

    Raises:
        llmc.Error: if it is damaged.
        ValueError: if it is of a kind that llmc does not have.
        ImportError: if it needs the package tokenizers, which is not installed.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if path.is_file():
        whole = read_object(path)
        if not _has_gpt2_rules(whole):
            return JsonTokenizer(path)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        path = folder / "vocab.json"
        whole = _as_tokenizer_json(folder)
    else:
        for name, kind in _OTHER_KINDS.items():
            if (folder / name).is_file():
                raise ValueError(f"{folder / name}: not a byte-level BPE ({kind}); others are not supported")
        return None
    return _table(whole, path) or JsonTokenizer(path, json.dumps(whole, ensure_ascii=False))


def _as_tokenizer_json(folder: Path) -> dict[str, Any]:
    """Write vocab.json, merges.txt and what was added to them as the content of tokenizer.json."""
    vocab = read_object(folder / "vocab.json")
    lines = read_text(folder / "merges.txt").splitlines()
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    later = read_object(folder / "added_tokens.json", missing_ok=True)
    special = vocab.keys() - set(BYTE_LETTERS) - {"".join(pair) for pair in merges}
    added = {token: vocab[token] for token in special} | later
    if not all(isinstance(i, int) for i in [*vocab.values(), *added.values()]):
        raise _llmc.Error(f"{folder / 'vocab.json'}: damaged: an id is not a number")
    known = read_object(folder / "tokenizer_config.json", missing_ok=True).get("added_tokens_decoder", {})
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [
            {**plain, **known.get(str(i), {}), "id": i, "content": token}
            for i, token in sorted((i, token) for token, i in added.items())
        ],
        "pre_tokenizer": split,
        "decoder": split,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }


def _table(tokenizer_json: dict[str, Any], path: Path) -> Tokenizer | None:
    """Return a tokenizer with GPT-2's rules as a table, or None if it has other special tokens or ids than a table can have."""
    try:
        model, added = tokenizer_json["model"], tokenizer_json.get("added_tokens") or []
        vocab = {**model["vocab"], **{t["content"]: t["id"] for t in added}}
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        ids = sorted(vocab.values())
        merged = {a + b: vocab[a + b] for a, b in merges}
        for letter in BYTE_LETTERS:
            vocab[letter]
    except (KeyError, ValueError, TypeError, AttributeError) as e:
        raise _llmc.Error(f"{path}: not a byte-level BPE: {type(e).__name__}: {e}") from e
    order = list(merged.values())
    if (
        vocab.keys() - set(BYTE_LETTERS) - merged.keys() != {EOT}
        or ids != list(range(len(vocab)))
        or order != sorted(order)
    ):
        return None
    try:
        tokens = {i: EOT.encode() if t == EOT else bytes(BYTE_OF_LETTER[c] for c in t) for t, i in vocab.items()}
        table = Tokenizer([tokens[i] for i in ids], vocab[EOT], path.parent.name)
    except (KeyError, ValueError) as e:
        raise _llmc.Error(f"{path}: not a byte-level BPE: {type(e).__name__}: {e}") from e
    table.roles = read_roles(path.parent, {EOT: table.eot_token})
    return table


# What a BPE of Hugging Face's may do besides merging.
_OTHER_RULES = ("dropout", "byte_fallback", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")


def _has_gpt2_rules(tokenizer_json: dict[str, Any]) -> bool:
    """Tell whether a tokenizer.json splits and merges a text as GPT-2's tokenizer does with the same vocabulary and merges."""
    model, split = tokenizer_json.get("model"), tokenizer_json.get("pre_tokenizer")
    if not isinstance(model, dict) or not isinstance(split, dict):
        return False
    return (
        model.get("type", "BPE") == "BPE"
        and not any(model.get(key) for key in _OTHER_RULES)
        and tokenizer_json.get("normalizer") is None
        and split.get("type") == "ByteLevel"
        and not split.get("add_prefix_space", True)
        and split.get("use_regex", True)
    )


# What a tokenizer may consist of in a folder.
FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json", ROLES_FILE)


def role_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the ids of a tokenizer's special tokens by their role, for transformers: bos and eos are among them."""
    usual = ("bos", "eos", "unk") if tokenizer.tokens[tokenizer.eot_token] == EOT.encode() else ("bos", "eos")
    return {**dict.fromkeys(usual, tokenizer.eot_token), **tokenizer.roles}


def write_tokenizer(tokenizer: Tokenizer, folder: StrPath, max_seq_len: int) -> None:
    """Write a tokenizer as transformers reads it.

    That is tokenizer_config.json, with vocab.json and merges.txt, or with the tokenizer.json that the tokenizer was read from.

    Args:
        tokenizer: the tokenizer.
        folder: an existing folder. Files of another tokenizer in it are removed.
        max_seq_len: the model's longest context.

    Raises:
        ValueError: if a token is not a merge of two earlier ones.
    """
    folder = Path(folder)
    for stale in FILES:
        (folder / stale).unlink(missing_ok=True)
    is_json = isinstance(tokenizer, JsonTokenizer)
    roles = role_ids(tokenizer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast" if is_json else "GPT2Tokenizer",
        "model_max_length": max_seq_len,
        "add_prefix_space": False,
        **{f"{role}_token": tokenizer.tokens[i].decode() for role, i in roles.items()},
    }
    write_json(folder / "tokenizer_config.json", config)
    if is_json:
        tokenizer.save(folder / tokenizer.file_name)
        return
    vocabulary = gpt2_vocabulary(tokenizer)
    write_json(folder / "vocab.json", vocabulary.ids)
    merges = "".join(f"{a} {b}\n" for a, b in vocabulary.merges)
    write_atomically(folder / "merges.txt", [f"#version: 0.2\n{merges}".encode()])


@dataclass(frozen=True)
class GPT2Vocabulary:
    """A vocabulary to which GPT-2's rules apply: how a text is split into words, and bytes are merged.

    Attributes:
        ids: the id of each token, whose bytes are written in BYTE_LETTERS.
        merges: the pairs that are merged, the first ones first.
        special: ids of tokens that no text contains.
        added: ids of tokens that are found in a text before it is split.
    """

    ids: dict[str, int]
    merges: list[tuple[str, str]]
    special: frozenset[int]
    added: frozenset[int] = frozenset()


def gpt2_vocabulary(tokenizer: Tokenizer) -> GPT2Vocabulary:
    """Return the vocabulary of a tokenizer for programs that know GPT-2's rules.

    Raises:
        ValueError: if the tokenizer is a tokenizer.json with other rules, or a token is not a merge of two earlier ones.
    """
    if isinstance(tokenizer, JsonTokenizer):
        return _gpt2_vocabulary_of_json(tokenizer)
    names = [EOT if i == tokenizer.eot_token else _in_letters(token) for i, token in enumerate(tokenizer.tokens)]
    ranks = {token: i for i, token in enumerate(tokenizer.tokens) if i != tokenizer.eot_token}
    pairs = [_merged_pair(token, rank, ranks) for token, rank in ranks.items() if len(token) > 1]
    merges = [(_in_letters(a), _in_letters(b)) for a, b in pairs]
    return GPT2Vocabulary({name: i for i, name in enumerate(names)}, merges, frozenset([tokenizer.eot_token]))


def _gpt2_vocabulary_of_json(tokenizer: JsonTokenizer) -> GPT2Vocabulary:
    whole = tokenizer.content()
    model, rows = whole["model"], whole.get("added_tokens") or []
    added = [row for row in rows if not row.get("special")]
    if (
        not _has_gpt2_rules(whole)
        or not model["vocab"].keys() >= set(BYTE_LETTERS)
        or any(row.get(flag) for row in added for flag in ("lstrip", "rstrip", "single_word"))
    ):
        raise ValueError(f"tokenizer {tokenizer.name} splits or merges a text in another way than GPT-2's")
    pairs = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
    return GPT2Vocabulary(
        {**model["vocab"], **{row["content"]: row["id"] for row in rows}},
        [(a, b) for a, b in pairs],
        frozenset(row["id"] for row in rows if row.get("special")),
        frozenset(row["id"] for row in added),
    )


def _in_letters(token: bytes) -> str:
    return "".join(BYTE_LETTERS[b] for b in token)


def _merged_pair(token: bytes, rank: int, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """Find the two tokens that this one was merged of: what the merges of lower rank make of its bytes."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        best, at = min((ranks.get(a + b, rank), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
        if best >= rank:
            raise ValueError(f"token {rank} ({token!r}) is not a merge of two earlier ones")
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]
