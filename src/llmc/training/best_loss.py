"""The best validation loss of a run, and how long ago it was."""

from __future__ import annotations

import math
from typing import Any


class BestLoss:
    """The lowest validation loss so far.

    Attributes:
        loss: infinite before the first.
        step: when it was; None before the first, and for a checkpoint that does not say.
        worse: how many validations in a row have not been below it since.
    """

    def __init__(self) -> None:
        self.loss, self.worse = math.inf, 0
        self.step: int | None = None
        self._newest = -1  # step of the newest validation

    def update(self, step: int, loss: float) -> bool:
        """Take in a validation, and return whether it is the best one.

        The same step may be validated again, as by a run that was stopped after a validation and goes on: it counts once.
        """
        better = loss < self.loss
        if better:
            self.loss, self.step, self.worse = loss, step, 0
        elif step > self._newest:
            self.worse += 1
        self._newest = step
        return better

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint remembers, by name."""
        return {
            "best_val_loss": str(self.loss),  # JSON has no infinity
            "best_val_step": self.step,
            "worse_validations": self.worse,
            "judged_step": self._newest,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Take over what state() returned; older checkpoints have less."""
        self.loss = float(state.get("best_val_loss", math.inf))
        self.step = state.get("best_val_step")
        self.worse = state.get("worse_validations", 0)
        self._newest = state.get("judged_step", -1)
