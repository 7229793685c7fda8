"""From documents to tokens, on all cores and in order.

The workers are threads: the encoders release the interpreter while they work, so nothing depends on how an operating system starts
processes, and nothing is copied between processes. Batches are handed to the workers and taken back in order, a few at a time. So the
result does not depend on the number of workers, and the memory does not depend on the length of the input.
"""

from __future__ import annotations

import collections
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmc import _llmc
from llmc.data.documents import Piece, join_pieces
from llmc.data.tokenizer import Tokenizer
from llmc.formats.shards import write_shard

_BATCH = 1 << 18  # characters, which take some hundredths of a second to encode


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def token_stream(
    pieces: Iterable[Piece], tokenizer: Tokenizer, workers: int = 0
) -> Generator[NDArray[np.uint32], None, None]:
    """Encode documents as a stream.

    Args:
        pieces: the documents, whole or in pieces as of DocumentReader.pieces.
        tokenizer: the encoder. Pieces are joined again if it may not be given them one by one (Tokenizer.may_cut).
        workers: number of threads; 0 for as many as the process may use.

    Yields:
        The tokens of all documents in order, end-of-text before each document, in arrays of shape (n,) with n of any size.

    Raises:
        ValueError: if workers is negative.
    """
    if workers < 0:
        raise ValueError(f"workers is {workers}, expected 0 (all cores) or more")
    workers = workers or _llmc.default_threads()
    pieces = join_pieces(pieces, tokenizer.may_cut)
    waiting: collections.deque[Future[NDArray[np.uint32]]] = collections.deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="llmc-tokenize")
    try:
        for batch in _batches(pieces):
            waiting.append(pool.submit(tokenizer.encode_documents, batch))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def tokenize(documents: Sequence[str], tokenizer: Tokenizer) -> NDArray[np.uint32]:
    """Encode documents at once.

    Returns:
        The tokens of all documents, (n,), end-of-text before each document.
    """
    return np.concatenate(list(token_stream((Piece(d, True) for d in documents), tokenizer)))


# ---- the token files of a run on text ----


def write_pair(
    train_tokens: NDArray[np.uint32], val_tokens: NDArray[np.uint32], directory: Path, vocab_size: int
) -> tuple[Path, Path]:
    """Write train.bin and val.bin into a directory, which is made if it is missing.

    Returns:
        The two paths.
    """
    directory.mkdir(parents=True, exist_ok=True)
    train, val = directory / "train.bin", directory / "val.bin"
    write_shard(train, train_tokens, vocab_size=vocab_size)
    write_shard(val, val_tokens, vocab_size=vocab_size)
    return train, val
