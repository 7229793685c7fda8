"""Peak arithmetic rates, for model FLOPs utilisation."""

from __future__ import annotations

from llmc import _llmc


def peak_flops(backend: _llmc.Backend, dtype: str) -> float | None:
    """FLOP/s that the device can reach at most in dtype; None where that is not known. On the CPU it is measured, in 20 ms."""
    return None
