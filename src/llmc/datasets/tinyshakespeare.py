"""Tiny Shakespeare: 1.1 MB of plays, llm.c's first data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llmc.data.documents import Piece
from llmc.data.tokenize import token_stream
from llmc.data.tokenizer import Tokenizer
from llmc.datasets.common import TokenFiles, put_tokenizer
from llmc.datasets.download import Remote, fetch
from llmc.formats.shards import write_shard

REMOTE = Remote(
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "tinyshakespeare/input.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    1115394,
)
VAL_TOKENS = 32768


def prepare(
    output: str | Path, *, source: str | Path | None = None, tokenizer: str = "gpt2", workers: int = 0
) -> TokenFiles:
    """Write tiny_shakespeare_train.bin and tiny_shakespeare_val.bin, which are llm.c's byte for byte with GPT-2's tokenizer.

    Every speech is a document and keeps the blank line after it; the first 32,768 tokens are for validation.

    Args:
        output: the folder to write.
        source: input.txt, if you have it already; None takes it, or llm.c's tiny_shakespeare.txt, from the output folder, or else
            downloads it.
        tokenizer: as of Tokenizer.from_spec.
        workers: threads that tokenise; 0 for as many as the process may use.

    Raises:
        ConnectionError: if the text cannot be downloaded.
        ValueError: if the text is too short to be the whole file.
    """
    folder = Path(output)
    own = [folder / name for name in ("tiny_shakespeare.txt", "input.txt")]
    path = Path(source) if source is not None else fetch(REMOTE, at_hand=own)
    text = path.read_text(encoding="utf-8-sig")
    encoder = Tokenizer.from_spec(tokenizer, text)
    *sections, last = text.split("\n\n")
    pieces = [Piece(s + "\n\n", True) for s in sections] + [Piece(last, True)]
    tokens = np.concatenate(list(token_stream(pieces, encoder, workers)))
    if len(tokens) <= VAL_TOKENS:
        raise ValueError(
            f"{path}: {len(tokens)} tokens, but the first {VAL_TOKENS} are for validation: is it the whole file?"
        )
    folder.mkdir(parents=True, exist_ok=True)
    train, val = folder / "tiny_shakespeare_train.bin", folder / "tiny_shakespeare_val.bin"
    put_tokenizer(encoder, folder, [train, val])
    write_shard(val, tokens[:VAL_TOKENS], vocab_size=encoder.vocab_size)
    write_shard(train, tokens[VAL_TOKENS:], vocab_size=encoder.vocab_size)
    return TokenFiles([train], [val], len(tokens) - VAL_TOKENS, VAL_TOKENS)
