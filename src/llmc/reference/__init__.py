"""GPT-2 in PyTorch, an independent implementation to check llmc's own. It needs torch (pip install torch); llmc itself does not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmc.reference.model import GPT, KVPairs

__all__ = ["GPT", "KVPairs"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: Python imports this file before it runs `python -m llmc.reference`, which reports that torch is missing.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from llmc.reference import model

    return getattr(model, name)
