"""Generation from a cache of keys and values."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from llmc import _llmc
from llmc.values import check_number, check_seed, check_whole


class _Sequence:
    """One sequence of a batch: its tokens, its coin, its place in the cache. The newest token is not in the cache yet."""

    def __init__(self, cache: _llmc.KVCache, index: int, prompt: NDArray[np.int32], seed: int) -> None:
        self.cache, self.index = cache, index
        self.tokens = prompt.tolist()
        self.coin = _llmc.XorShift(seed)
        self.new: list[int] = []
        self.done = False

    def encode(self, context: list[int]) -> None:
        self.cache.clear(self.index)
        if context:
            self.cache.prefill(self.index, np.asarray(context, dtype=np.int32))

    def begin(self) -> None:
        room = self.cache.max_len
        self.encode(self.tokens[:-1] if len(self.tokens) <= room else self.tokens[-max(1, room // 2) : -1])

    def make_room(self) -> None:
        """Empty the cache if it is full, and encode the last half of what it held again, at positions from 0 on."""
        if self.cache.length(self.index) >= self.cache.max_len:
            self.encode(self.tokens[-max(1, self.cache.max_len // 2) : -1])

    def toss(self) -> float:
        return -1.0 if self.done else self.coin.randfloat32()

    def append(self, token: int, stops: Collection[int]) -> None:
        self.done = token in stops
        if not self.done:
            self.tokens.append(token)
            self.new.append(token)


def generate(
    model: _llmc.Model,
    prompts: Sequence[NDArray[np.int32]],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    stop_token: int | Sequence[int] | None,
) -> Iterator[list[list[int]]]:
    """Generate for all prompts in one batch, which reads the weights once a step; a finished sequence idles along.

    Args:
        model: the extension's model.
        prompts: each (n,), not empty.
        max_new_tokens, ...: as of GPT2.generate.

    Returns:
        An iterator that yields, after each step, the new tokens of every prompt so far.

    Raises:
        TypeError, ValueError: at once, if an option is out of its range.
    """
    check_whole("max_new_tokens", max_new_tokens, 0)
    check_number("temperature", temperature)
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}, expected 0 (the most likely token) or more")
    check_whole("top_k", top_k, 0)
    check_number("top_p", top_p)
    if not 0 < np.float32(top_p) <= 1:  # as the sampler has it
        raise ValueError(f"top_p is {top_p}, expected above 0, to 1 (no limit)")
    check_seed(seed, 64, lowest=1)
    if stop_token is None:
        stops: set[int] = set()
    elif isinstance(stop_token, (int, np.integer)):
        stops = {int(stop_token)}
    else:
        several = stop_token if isinstance(stop_token, Iterable) else [stop_token]
        stops = {check_whole("stop_token", t, 0) for t in several}
    options = _llmc.SamplerOptions(temperature, top_k, top_p)
    return _steps(model, prompts, max_new_tokens, options, seed, stops)


def _steps(
    model: _llmc.Model,
    prompts: Sequence[NDArray[np.int32]],
    max_new_tokens: int,
    options: _llmc.SamplerOptions,
    seed: int,
    stops: Collection[int],
) -> Iterator[list[list[int]]]:
    if max_new_tokens == 0 or not prompts:
        return
    length = min(model.max_seq_len, max(len(p) for p in prompts) + max_new_tokens)
    cache = _llmc.KVCache(model, len(prompts), length)
    batch = [_Sequence(cache, i, p, (seed + i) % 2**64 or 1) for i, p in enumerate(prompts)]
    for s in batch:
        s.begin()

    def queue(newest: Sequence[int] | None) -> None:
        tokens = None if newest is None else np.asarray(newest, dtype=np.int32)
        cache.queue_tokens(tokens, np.asarray([s.toss() for s in batch], dtype=np.float32), options)

    # On a device that runs ahead, the next step is queued before the tokens of this one are read, so the device
    # does not wait for the host. A sequence that turns out to have ended was then computed once in vain.
    queued = 0
    for step in range(max_new_tokens):
        if queued == step:
            for s in batch:
                s.make_room()
            queue([s.tokens[-1] for s in batch])
            queued += 1
        room = all(cache.length(s.index) < cache.max_len for s in batch)
        if cache.backend.runs_ahead and queued < max_new_tokens and room:
            queue(None)
            queued += 1
        tokens = cache.read_tokens()
        for s in batch:
            if not s.done:
                s.append(_llmc.token_of(int(tokens[s.index])), stops)
        yield [s.new for s in batch]
        if all(s.done for s in batch):
            return
