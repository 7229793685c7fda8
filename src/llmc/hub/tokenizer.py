"""Hugging Face's tokenizer files, vocab.json with merges.txt and tokenizer.json, read and written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmc import _llmc
from llmc.data.tokenizer import BYTE_LETTERS, BYTE_OF_LETTER, EOT, JsonTokenizer, Tokenizer
from llmc.hub.json_files import read_object, read_text, write_json
from llmc.system.fs import StrPath, write_atomically


def read_tokenizer(folder: StrPath) -> Tokenizer | None:
    """Read the tokenizer of a Hugging Face folder.

    A tokenizer with GPT-2's split into words and GPT-2's merging becomes a table of llm.c's, read from vocab.json and merges.txt or
    from tokenizer.json. A tokenizer.json with other rules is used as it is (JsonTokenizer).

    Returns:
        The tokenizer; None if the folder has none.

    Raises:
        llmc.Error: if it is damaged, or its ids are not in the order of its merges.
        ValueError: if a tokenizer.json with other rules is none that JsonTokenizer supports.
        ImportError: if it needs the package tokenizers, which is not installed.
    """
    folder = Path(folder)
    json_file, vocab_file, merges_file = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    if json_file.is_file() and not _has_gpt2_rules(read_object(json_file)):
        return Tokenizer.load(json_file)
    if vocab_file.is_file() and merges_file.is_file():
        path = vocab_file
        vocab = read_object(vocab_file)
        lines = read_text(merges_file).splitlines()
        merges: list[Any] = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    elif json_file.is_file():
        path = json_file
        whole = read_object(json_file)
        try:
            vocab = {**whole["model"]["vocab"], **{t["content"]: t["id"] for t in whole.get("added_tokens") or []}}
            merges = [m.split(" ") if isinstance(m, str) else m for m in whole["model"]["merges"]]
        except (KeyError, TypeError, AttributeError) as e:
            raise _llmc.Error(f"{path}: not a byte-level BPE: {type(e).__name__}: {e}") from e
    else:
        return None
    if EOT not in vocab:
        raise _llmc.Error(f"{path}: has no token {EOT}")
    ids = sorted(i for i in vocab.values() if isinstance(i, int))
    if ids != list(range(len(vocab))):
        raise _llmc.Error(f"{path}: its {len(vocab)} tokens do not have the ids 0 to {len(vocab) - 1}")
    tokens = [b""] * len(vocab)
    try:
        for text, i in vocab.items():
            tokens[i] = EOT.encode() if text == EOT else bytes(BYTE_OF_LETTER[letter] for letter in text)
        merged_ids = [vocab[a + b] for a, b in merges]
    except (KeyError, ValueError, TypeError) as e:
        raise _llmc.Error(f"{path}: not a byte-level BPE: {type(e).__name__}: {e}") from e
    if any(a >= b for a, b in zip(merged_ids, merged_ids[1:])):
        raise _llmc.Error(
            f"{path}: its ids are not in the order of its merges, so llm.c's tokenizer file cannot hold it"
        )
    try:
        return Tokenizer(tokens, vocab[EOT], folder.name)
    except ValueError as e:
        raise _llmc.Error(f"{path}: {e}") from e


def _has_gpt2_rules(tokenizer_json: dict[str, Any]) -> bool:
    """Tell whether a tokenizer.json splits and merges a text as GPT-2's tokenizer does with the same vocabulary and merges."""
    model, split = tokenizer_json.get("model"), tokenizer_json.get("pre_tokenizer")
    if not isinstance(model, dict) or not isinstance(split, dict):
        return False
    return (
        model.get("type", "BPE") == "BPE"
        and not any(model.get(key) for key in ("dropout", "byte_fallback", "ignore_merges", "end_of_word_suffix"))
        and tokenizer_json.get("normalizer") is None
        and split.get("type") == "ByteLevel"
        and not split.get("add_prefix_space", True)
        and split.get("use_regex", True)
    )


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
    for stale in ("vocab.json", "merges.txt", "tokenizer.json"):
        (folder / stale).unlink(missing_ok=True)
    is_json = isinstance(tokenizer, JsonTokenizer)
    eot = tokenizer.tokens[tokenizer.eot_token].decode()
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast" if is_json else "GPT2Tokenizer",
        "model_max_length": max_seq_len,
        "add_prefix_space": False,
        **{f"{role}_token": eot for role in ("bos", "eos", "unk")},
    }
    write_json(folder / "tokenizer_config.json", config)
    if is_json:
        tokenizer.save(folder / tokenizer.file_name)
        return
    names = [EOT if i == tokenizer.eot_token else _in_letters(token) for i, token in enumerate(tokenizer.tokens)]
    write_json(folder / "vocab.json", {name: i for i, name in enumerate(names)})
    ranks = {token: i for i, token in enumerate(tokenizer.tokens) if i != tokenizer.eot_token}
    merges = [
        f"{_in_letters(a)} {_in_letters(b)}"
        for token, rank in ranks.items()
        if len(token) > 1
        for a, b in [_merged_pair(token, rank, ranks)]
    ]
    write_atomically(folder / "merges.txt", [("#version: 0.2\n" + "".join(m + "\n" for m in merges)).encode()])


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
