"""The numbers that a run remembers: its curves, and how fast it goes."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any


class History:
    """The curves of a run, by name, packed: a run of a million steps keeps 40 MB.

    "step", "train_loss", "norm", "lr" and "tokens_per_second" have one value for each update, "val_step" and "val_loss" one for
    each validation, and "val_bits_per_byte" too if the run knows its tokenizer; else it is empty.
    """

    def __init__(self) -> None:
        self._values: dict[str, array[Any]] = {name: array("q") for name in ("step", "val_step")}
        for name in ("train_loss", "norm", "lr", "tokens_per_second", "val_loss", "val_bits_per_byte"):
            self._values[name] = array("d")

    def add(self, **values: float) -> None:
        """Append a value to each of the named curves."""
        for name, value in values.items():
            self._values[name].append(value)

    def lists(self) -> dict[str, list[float]]:
        """Return a copy of the curves."""
        return {name: list(values) for name, values in self._values.items()}


@dataclass
class Throughput:
    """Tokens per second as llm.c has it: an exponential average, corrected for its start, without the first step."""

    average: float = 0.0
    weight: float = 0.0
    total_seconds: float = 0.0
    count: int = 0

    def update(self, tokens_per_second: float, seconds: float) -> float:
        """Take in a step, and return the average. The first step, which warms up, is returned and left out of it."""
        self.count += 1
        if self.count == 1:
            return tokens_per_second
        self.total_seconds += seconds
        self.average = 0.95 * self.average + 0.05 * tokens_per_second
        self.weight = 0.95 * self.weight + 0.05
        return self.average / self.weight

    @property
    def mean_milliseconds(self) -> float | None:
        """Mean time of a step, without the first; None before the second."""
        return 1000 * self.total_seconds / (self.count - 1) if self.count > 1 else None
