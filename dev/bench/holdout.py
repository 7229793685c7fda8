"""Measures how much of what is held out of a text is in the rest of it already, at its end or all over it (doc/data.md).

    python dev/bench/holdout.py tinyshakespeare.txt

The texts are Python's language reference, the docstrings of its library, and the files named. Columns: the text and how it was held out,
the bytes held out, how much of them are paragraphs that are in the rest word by word, and the bits that xz needs for each byte after the
rest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from common import print_table

from llmc.data.holdout import HOLDOUTS, hold_out
from llmc.data.python_texts import language_reference, library_docstrings
from llmc.data.xz import xz_bits_per_byte


def paragraphs(documents: Sequence[str]) -> list[str]:
    """Return the paragraphs of documents, each in one line."""
    return [" ".join(paragraph.split()) for document in documents for paragraph in document.split("\n\n")]


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", nargs="*", type=Path)
    arguments = parser.parse_args()
    texts = {"language reference": language_reference(), "docstrings": library_docstrings()}
    texts.update({path.name: [path.read_text(encoding="utf-8")] for path in arguments.texts})
    rows = []
    for name, documents in texts.items():
        for holdout in HOLDOUTS:
            train, val = hold_out(documents, holdout)
            known, held = set(paragraphs(train)), paragraphs(val)
            repeated = sum(len(text) for text in held if text in known) / sum(map(len, held))
            before, text = ("\n\n".join(part).encode() for part in (train, val))
            bits = xz_bits_per_byte(text, before, seconds=600)
            rows.append(
                [name, holdout, f"{len(text):,}", f"{repeated:.1%}", "too long" if bits is None else f"{bits:.3f}"]
            )
    print_table(["text", "held out", "bytes", "repeated", "xz"], rows)


if __name__ == "__main__":
    main()
