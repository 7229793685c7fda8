"""Outliers among losses and gradient norms."""

from __future__ import annotations

import math
from collections import deque

WINDOW = 128


class OutlierDetector:
    """z-scores against the last 128 values.

    As llm.c's, but a value is judged against the window before it (in llm.c it is part of its own window, so no z-score can pass
    11.3), and a value that is not finite is not taken in (there one NaN blinds the detector for ever).
    """

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=WINDOW)

    def update(self, value: float) -> float:
        """The z-score of value; NaN until the window is full, and for a value that is not finite."""
        if not math.isfinite(value):
            return math.nan
        z = math.nan
        if len(self._values) == WINDOW:
            mean = math.fsum(self._values) / WINDOW
            variance = math.fsum((v - mean) ** 2 for v in self._values) / WINDOW
            z = (value - mean) / math.sqrt(variance) if variance > 0 else 0.0
        self._values.append(value)
        return z

    def state(self) -> list[float]:
        return list(self._values)

    def set_state(self, values: list[float]) -> None:
        self._values = deque((float(v) for v in values), maxlen=WINDOW)
