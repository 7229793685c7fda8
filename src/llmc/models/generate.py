"""Generation from a cache of keys and values."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmc import _llmc
from llmc.values import check_number, check_seed, check_whole


def row_of_tokens(tokens: ArrayLike) -> NDArray[np.int32]:
    """Return token ids as an array (n,).

    Raises:
        TypeError: if they are text.
        ValueError: if they are several rows.
    """
    ids = _llmc.token_ids(tokens)
    if ids.ndim != 1:
        raise ValueError(f"a prompt is one row of token ids, got shape {ids.shape}")
    return ids


class _Sequence:
    """One sequence of a batch: its tokens, its coin, its place in the cache. The newest token is not in the cache yet.

    Attributes:
        first: the place of the first token that the cache has.
        new: the tokens that were generated since begin().
        stop: the stop token that ended it, or None.
    """

    def __init__(self, cache: _llmc.KVCache, index: int, seed: int) -> None:
        self.cache, self.index = cache, index
        self.tokens: list[int] = []
        self.coin = _llmc.XorShift(seed)
        self.first = 0
        self.new: list[int] = []
        self.stop: int | None = None

    def begin(self, prompt: NDArray[np.int32]) -> None:
        """Append tokens that are given, and encode what the cache lacks."""
        self.new, self.stop = [], None
        self.tokens += prompt.tolist()
        if len(self.tokens) - self.first <= self.cache.max_len:
            self._encode()
        else:
            self._forget()

    def make_room(self) -> None:
        """Empty the cache if it is full, and encode the last half of what it held again, at positions from 0 on."""
        if self.cache.length(self.index) >= self.cache.max_len:
            self._forget()

    def _forget(self) -> None:
        self.cache.clear(self.index)
        self.first = len(self.tokens) - max(1, self.cache.max_len // 2)
        self._encode()

    def _encode(self) -> None:
        if lacking := self.tokens[self.first + self.cache.length(self.index) : -1]:
            self.cache.prefill(self.index, np.asarray(lacking, dtype=np.int32))

    def toss(self) -> float:
        return -1.0 if self.stop is not None else self.coin.randfloat32()

    def append(self, token: int, stops: Collection[int]) -> None:
        if token in stops:
            self.stop = token
        else:
            self.tokens.append(token)
            self.new.append(token)


class Session:
    """A text that grows turn by turn, by tokens that are given and tokens that the model adds. The cache is kept between turns.

    When all positions of the model are full, the last half of them is encoded again at positions from 0 on.

    Args:
        model: the extension's model.
        temperature, ...: as of GPT2.generate. The random numbers go on from turn to turn.

    Raises:
        TypeError, ValueError: if an option is out of its range.
    """

    def __init__(
        self,
        model: _llmc.Model,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int,
        stop_token: int | Sequence[int] | None,
    ) -> None:
        self._options, self._stops = _checked(temperature, top_k, top_p, seed, stop_token)
        self._vocab_size = model.vocab_size
        self._cache = _llmc.KVCache(model, 1, model.max_seq_len)
        self._sequence = _Sequence(self._cache, 0, seed)

    @property
    def tokens(self) -> list[int]:
        """The whole text so far."""
        return list(self._sequence.tokens)

    @property
    def forgotten(self) -> int:
        """How many tokens at the begin of the text the model does not see any more."""
        return self._sequence.first

    def clear(self) -> None:
        """Begin a new text."""
        self._cache.clear(0)
        self._sequence.tokens, self._sequence.first = [], 0

    def stream(self, prompt: Sequence[int] | NDArray[Any], max_new_tokens: int) -> Iterator[int]:
        """Append tokens to the text, and return an iterator over those that the model adds. It may be left before its end.

        A stop token that ends it becomes part of the text, and is not returned.

        Args:
            prompt: token ids of one row; empty to go on with the text as it is.
            max_new_tokens: how many tokens to add at most.

        Raises:
            TypeError: if the prompt is text.
            ValueError: if it has several rows or a token that is not in the vocabulary, or if the text is empty.
        """
        check_whole("max_new_tokens", max_new_tokens, 0)
        given = row_of_tokens(prompt)
        if outside := [t for t in given.tolist() if not 0 <= t < self._vocab_size]:
            raise ValueError(f"token {outside[0]} is outside of the vocabulary of {self._vocab_size}")
        if given.size == 0 and not self._sequence.tokens:
            raise ValueError("the text is empty: start from the end-of-text token, [tokenizer.eot_token]")
        self._sequence.begin(given)
        return self._turn(max_new_tokens)

    def _turn(self, max_new_tokens: int) -> Iterator[int]:
        sequence = self._sequence
        # Nothing is queued ahead: whoever leaves the iterator would leave it in the cache.
        for count, (new,) in enumerate(
            _steps(self._cache, [sequence], max_new_tokens, self._options, self._stops, False)
        ):
            if len(new) > count:
                yield new[-1]
        if sequence.stop is not None:
            sequence.tokens.append(sequence.stop)


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
    options, stops = _checked(temperature, top_k, top_p, seed, stop_token)
    return _generate(model, prompts, max_new_tokens, options, seed, stops)


def _checked(
    temperature: float, top_k: int, top_p: float, seed: int, stop_token: int | Sequence[int] | None
) -> tuple[_llmc.SamplerOptions, set[int]]:
    """Return the sampler's options and the stop tokens."""
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
    return _llmc.SamplerOptions(temperature, top_k, top_p), stops


def _generate(
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
    batch = [_Sequence(cache, i, (seed + i) % 2**64 or 1) for i in range(len(prompts))]
    for s, prompt in zip(batch, prompts):
        s.begin(prompt)
    yield from _steps(cache, batch, max_new_tokens, options, stops, cache.backend.runs_ahead)


def _steps(
    cache: _llmc.KVCache,
    batch: Sequence[_Sequence],
    max_new_tokens: int,
    options: _llmc.SamplerOptions,
    stops: Collection[int],
    ahead: bool,
) -> Iterator[list[list[int]]]:
    """Yield the new tokens of every sequence after each step. ahead: queue a step before the tokens of the one before are read."""

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
        if ahead and queued < max_new_tokens and room:
            queue(None)
            queued += 1
        tokens = cache.read_tokens()
        for s in batch:
            if s.stop is None:
                s.append(_llmc.token_of(int(tokens[s.index])), stops)
        yield [s.new for s in batch]
        if all(s.stop is not None for s in batch):
            return
