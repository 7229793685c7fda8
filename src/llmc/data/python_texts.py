"""Texts that every Python carries: its language reference, and the docstrings of its library."""

from __future__ import annotations

import ast
import contextlib
import inspect
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Tests, tables, the text that language_reference() has, and code that was made of code.
_LEFT_OUT = {"encodings", "idlelib", "lib2to3", "pydoc_data", "test", "tests", "turtledemo"}
# Comments and strings, of which each may hold what looks like the other.
_TOKEN = re.compile(r"""\#[^\n]*|[rRuU]?(?P<quotes>\"{3}|'{3}|["'])(?P<text>(?:[^\\]|\\.)*?)(?P=quotes)""", re.DOTALL)


def language_reference() -> list[str]:
    """Return the topics of Python's language reference. Releases differ a little in it."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def library_docstrings() -> list[str]:
    """Return the docstrings of Python's library: a document for each module, with those of its classes and functions.

    They are read from the modules' source, and nothing is imported: half a second for 1.7 million characters. A docstring that occurs
    again is left out. Releases differ in them.

    Returns:
        The documents by the modules' names; none if the library is not there as source.
    """
    library = Path(sysconfig.get_path("stdlib"))
    documents, seen = [], set()
    for name in sorted(sys.stdlib_module_names - _LEFT_OUT):
        for path in (library / f"{name}.py", *sorted((library / name).rglob("*.py"))):
            if not path.is_file() or not _LEFT_OUT.isdisjoint(path.relative_to(library).parts):
                continue
            docstrings = []
            for text in _docstrings(path.read_text(encoding="utf-8", errors="replace")):
                if text and text not in seen:
                    seen.add(text)
                    docstrings.append(text)
            if docstrings:
                documents.append("\n\n".join(docstrings) + "\n")
    return documents


def _docstrings(source: str) -> Iterator[str]:
    """Yield the docstrings of a module's source: strings on lines of their own, at its begin or after a colon.

    So it is ten times as fast as a parser, and differs from it in one of a hundred: a docstring behind its colon is not found.
    """
    end, may_come = 0, True
    for token in _TOKEN.finditer(source):
        between = source[end : token.start()].strip()
        end = token.end()
        if between:
            may_come = between.endswith(":")
        if token["quotes"] is None:  # a comment
            continue
        begins_line = not source[source.rfind("\n", 0, token.start()) + 1 : token.start()].strip()
        if may_come and begins_line:
            raw = token[0][0] in "rR" or "\\" not in token["text"]
            # What the parser would refuse was no string: its quotes belong to two others.
            with contextlib.suppress(SyntaxError):
                yield inspect.cleandoc(token["text"] if raw else ast.literal_eval(token[0]))
        may_come = False
