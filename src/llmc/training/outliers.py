"""Detection of outliers among losses and gradient norms."""

from __future__ import annotations

import math
from collections import deque

WINDOW = 128


class OutlierDetector:
    """Computes the z-score of each value against the 128 values before it.

    llm.c's detector does the same with two differences. There a value is part of its own window, so that no z-score can exceed 11.3.
    And there one NaN in the window makes all later z-scores NaN; here a value that is not finite does not enter the window.
    """

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=WINDOW)

    def update(self, value: float) -> float:
        """Add a value to the window and return its z-score: NaN if the window is not full yet, or if the value is not finite."""
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
        """Return the values in the window, oldest first."""
        return list(self._values)

    def set_state(self, values: list[float]) -> None:
        """Replace the window by values that state() returned."""
        self._values = deque((float(v) for v in values), maxlen=WINDOW)
