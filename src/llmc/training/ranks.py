"""What the ranks of a run tell each other beside the loss of each update, and what follows from it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

_STOPS = (2, 15, 1, 21)  # SIGINT, SIGTERM, SIGHUP and Windows' SIGBREAK

_SLOW = 1.5  # times the median of the others
_UPDATES = 10  # in a row, before a rank is called slow
_SILENCE = 100  # updates before the same rank is named again


class Notes:
    """The numbers that ride along with the loss: who was asked to stop, and how long each rank took for the update before.

    Each number is 0 on all ranks but those that have something to say, so that the sums over the ranks are what was said.
    """

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    @property
    def count(self) -> int:
        """How many numbers there are."""
        return len(_STOPS) + self._size

    def written(self, signal: int, seconds: float) -> list[float]:
        """Return this rank's numbers: the signal that asked it to stop, or 0, and its time for the update before."""
        times = [0.0] * self._size
        times[self._rank] = seconds
        return [float(stop == signal) for stop in _STOPS] + times

    def read(self, sums: Sequence[float]) -> tuple[int, list[float]]:
        """Return a signal that asked a rank to stop, or 0, and the seconds of each rank."""
        signal = next((stop for stop, count in zip(_STOPS, sums) if count), 0)
        return signal, list(sums[len(_STOPS) :])


class SlowRanks:
    """Finds ranks for which the others wait: each waits for the slowest, so that the time of an update does not tell which that is.

    Args:
        hosts: the name of each rank's host.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        self._hosts = hosts
        self._in_a_row = [0] * len(hosts)
        self._silent = [0] * len(hosts)

    def update(self, seconds: Sequence[float]) -> list[str]:
        """Take in how long each rank took for an update, without its waiting for others.

        Returns:
            A line for each rank that is to be named now.
        """
        lines = []
        for rank, own in enumerate(seconds):
            others = statistics.median([*seconds[:rank], *seconds[rank + 1 :]])
            self._in_a_row[rank] = self._in_a_row[rank] + 1 if own > _SLOW * others > 0 else 0
            self._silent[rank] = max(0, self._silent[rank] - 1)
            if self._in_a_row[rank] >= _UPDATES and not self._silent[rank]:
                self._silent[rank] = _SILENCE
                lines.append(
                    f"rank {rank} on {self._hosts[rank]} is slow: {1000 * own:.0f} ms where the others take {1000 * others:.0f} ms"
                )
        return lines
