"""GPT-2 in PyTorch, as an independent check of llmc's own. Needs torch (pip install torch), which llmc itself does not."""

from llmc.reference.model import GPT, KVPairs

__all__ = ["GPT", "KVPairs"]
