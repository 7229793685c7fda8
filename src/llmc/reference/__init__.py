"""GPT-2 in PyTorch, an independent implementation to check llmc's own. It needs torch (pip install torch); llmc itself does not."""

from llmc.reference.model import GPT, KVPairs

__all__ = ["GPT", "KVPairs"]
