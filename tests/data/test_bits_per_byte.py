"""Bits per byte: how many bytes tokens stand for, and what losses come to in them, whatever the tokenizer."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc import Tokenizer, cli
from llmc.data.bits_per_byte import bits_per_byte, byte_lengths, bytes_per_token, count_bytes
from llmc.data.tokenizer import BYTE_LETTERS

TEXTS = ["naïve café, 北京 🙂\r\n\n the end", "<|endoftext|> in a text is text", "", "abab " * 40]


def from_json(path: Path) -> Tokenizer:
    """Return a tokenizer.json with a special token that has no role, and an added one that is text."""
    pytest.importorskip("tokenizers")
    merges = ["a b", "Ġ t", "ab ab"]
    tokens = [*BYTE_LETTERS, *(m.replace(" ", "") for m in merges)]
    n = len(tokens)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [("<|endoftext|>", True), ("<|user|>", True), ("the end", False)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    parts = {
        "version": "1.0",
        "added_tokens": [{"id": n + i, "content": t, **flags, "special": s} for i, (t, s) in enumerate(added)],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": merges},
    }
    path.write_text(json.dumps(parts))
    return Tokenizer.load(path)


@pytest.mark.parametrize("kind", ["bytes", "bpe:300", "llm.c", "json"])
def test_tokens_of_a_text_have_its_bytes(kind: str, tmp_path: Path) -> None:
    """Special tokens have none, nor have ids beyond the tokenizer's, as those that pad a model's vocabulary."""
    if kind == "json":
        tokenizer = from_json(tmp_path / "tokenizer.json")
    elif kind == "llm.c":
        Tokenizer.train_bpe(TEXTS[0], 300).save(tmp_path / "tokenizer.bin")
        tokenizer = Tokenizer.load(tmp_path / "tokenizer.bin")
    else:
        tokenizer = Tokenizer.from_spec(kind, "\n".join(TEXTS))
    lengths = byte_lengths(tokenizer)
    assert lengths.shape == (tokenizer.vocab_size,) and lengths[tokenizer.eot_token] == 0
    tokens = tokenizer.encode_documents([(text, True) for text in TEXTS])
    assert np.count_nonzero(tokens == tokenizer.eot_token) == len(TEXTS)
    expected = sum(len(text.encode()) for text in TEXTS)
    assert count_bytes(tokens, lengths) == expected
    odd = [tokenizer.vocab_size, 60000, *([tokenizer.vocab_size - 2] if kind == "json" else [])]  # <|user|>
    assert count_bytes(np.append(tokens, odd), lengths) == expected
    rows = tokens[: len(tokens) // 2 * 2].reshape(2, -1)
    assert bytes_per_token([(rows, rows), (rows, rows)], tokenizer) == count_bytes(rows, lengths) / rows.size
    assert bytes_per_token([(rows, np.full((2, 3), tokenizer.eot_token))], tokenizer) is None


def test_bits_per_byte_of_what_knows_nothing() -> None:
    """A byte of 256 that are equally likely has 8 bits, and so it has in tokens of several bytes."""
    assert bits_per_byte(math.log(256), 1.0) == pytest.approx(8.0, rel=1e-15)
    assert bits_per_byte(3 * math.log(256), 3.0) == pytest.approx(8.0, rel=1e-15)
    assert math.isnan(bits_per_byte(math.nan, 1.0))


def test_a_run_knows_the_bytes_of_what_it_validates_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In its history and metrics.jsonl, and to llmc eval; the batches are those of the validation, not all."""
    text = "".join(f"line {i} of the text, naïve\n" for i in range(300))
    (tmp_path / "my.txt").write_text(text, encoding="utf-8")
    common = {"layers": 1, "heads": 1, "channels": 16, "seq_len": 16, "batch_size": 2, "max_steps": 1, "threads": 1}
    result = llmc.train(
        data=str(tmp_path / "my.txt"), tokenizer="bpe:280", output_dir=str(tmp_path / "run"), val_steps=3,
        total_batch_size=32, sample_every=0, device="cpu", progress="lines", plot=False, **common,
    )  # fmt: skip
    loss, bits = result.history["val_loss"], result.history["val_bits_per_byte"]
    tokens = llmc.DataLoader(tmp_path / "run" / "data" / "val.bin", 1, 3 * 2 * 16).next_batch()[1][0]
    assert result.tokenizer is not None
    size = len(result.tokenizer.decode_bytes(tokens[tokens != result.tokenizer.eot_token]))
    assert bits == pytest.approx([x * len(tokens) / (math.log(2) * size) for x in loss], rel=1e-12)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["bits_per_byte"] for row in rows if row["kind"] == "validation"] == bits
    assert f"val loss {loss[-1]:f} | bits per byte {bits[-1]:f}\n" in capsys.readouterr().out
    assert f"val_bits_per_byte={bits[-1]:.4f}" in repr(result)
    assert cli.main(["eval", str(tmp_path / "run"), "-b", "2", "-m", "3", "--json", "-"]) == 0
    measured = json.loads(capsys.readouterr().out)["validation"]
    assert (measured["tokens"], measured["bytes"]) == (len(tokens), size)
    assert measured["bits_per_byte"] == pytest.approx(bits[-1], rel=1e-6)
