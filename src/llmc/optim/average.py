"""An average of a model's weights over the updates, with which it is evaluated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from llmc.models.config import ModelConfig
from llmc.models.model import Model
from llmc.values import MEMORY_DTYPES


class WeightAverage:
    """The exponential moving average of a model's weights, in f32, on its device.

    After update n (counted from 1) it is d * average + (1 - d) * weights, with d = min(decay, (1 + n) / (10 + n)), so that the random
    weights of the beginning are soon forgotten (as in TensorFlow's ExponentialMovingAverage). It begins as the weights are. Those of a
    bf16 model are averaged as the model computes with them, without the bits that the optimizer keeps below them.

    Args:
        model: whose weights are averaged.
        decay: d in the long run, from 0 to below 1: the average goes back over about 1 / (1 - decay) updates.
    """

    def __init__(self, model: Model, decay: float) -> None:
        self._model, self._decay = model, decay
        self._backend = model.backend
        self.tensor = self._backend.empty([model.num_parameters])
        self._weights = self._backend.empty([model.num_parameters], model.dtype)  # while the average is in their place
        self._one = self._backend.empty([1])
        self._one.from_host(np.ones(1, np.float32))
        self._in_place = False
        self._backend.copy(self.tensor, model.all_parameters())

    @staticmethod
    def planned_bytes(config: ModelConfig, dtype: str) -> int:
        """Return about how many bytes `bytes` will be for a model of that shape and dtype."""
        return config.num_parameters * (4 + MEMORY_DTYPES[dtype].itemsize)

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return self._model.num_parameters * (4 + MEMORY_DTYPES[self._model.dtype].itemsize)

    def update(self, updates: int) -> None:
        """Take in the weights as they are after so many updates."""
        decay = min(self._decay, (1 + updates) / (10 + updates))
        # Muon's momentum is the average that is meant here: average = lerp(weights, average, decay).
        self._backend.muon_momentum(self._weights, self.tensor, self._model.all_parameters(), self._one, decay, False)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the average in the place of the model's weights within the block. Inside of such a block it does nothing."""
        if self._in_place:
            yield
            return
        weights = self._model.all_parameters()
        self._backend.copy(self._weights, weights)
        self._backend.copy(weights, self.tensor)
        self._model.weights_changed()
        self._in_place = True
        try:
            yield
        finally:
            self._backend.copy(weights, self._weights)
            self._model.weights_changed()
            self._in_place = False
