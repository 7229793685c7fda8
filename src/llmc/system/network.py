"""What went wrong with a connection, in a few words."""

from __future__ import annotations


def reason(error: Exception) -> str:
    """Describe an error by its innermost cause, without the names of the layers that passed it on."""
    inner = getattr(error.args[0], "reason", None) if error.args else None
    return str(inner).rpartition("): ")[2] if inner is not None else f"{type(error).__name__}: {error}"
