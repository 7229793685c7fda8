"""Documents to a stream of tokens, on all cores, in order.

The workers are threads: the encoders release the interpreter while they work, so nothing depends on how an operating system starts
processes, and nothing is copied between them. Batches go out and come back in order, a few at a time, so the result does not depend
on the number of workers and the memory not on the length of the input.
"""

from __future__ import annotations

import collections
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from llmc import _llmc
from llmc.data.documents import Piece
from llmc.data.tokenizer import Tokenizer

_BATCH = 1 << 18  # characters: some hundredths of a second of work


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
    """The tokens of all documents in order, end-of-text before each, in arrays of some length.

    workers: threads; 0 for as many as the process may use.
    """
    if workers < 0:
        raise ValueError(f"workers is {workers}, expected 0 (all cores) or more")
    workers = workers or _llmc.default_threads()
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
