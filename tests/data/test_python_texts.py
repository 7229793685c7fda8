"""The docstrings of Python's library, read without a parser, against the parser's; and what is left out."""

from __future__ import annotations

import ast
import inspect
import sys
import sysconfig
from pathlib import Path

import pytest

from llmc.data import python_texts
from llmc.data.python_texts import library_docstrings

SOURCE = '''\
#!/usr/bin/python  it's """no""" docstring
"""The module.

  Its second paragraph; a # in it."""
NAME = """
not one"""
class Dog(Animal):  # with "a" comment

    r"""A \\dog."""

    TABLE = {"one":
        1, "two":
        2}

    def bark(self, loud="\\"", text='"""'):
        'Bark\\'s\\n\\x41'
        """nor this"""
        return f("""
            nor that""")

    async def sit(self): return f"""x"""
'''


def docstrings(source: str) -> list[str]:
    """Return the docstrings of a module as Python's parser finds them."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return [text for text in found if text]


def test_what_is_a_docstring() -> None:
    assert list(python_texts._docstrings(SOURCE)) == docstrings(SOURCE)
    assert len(docstrings(SOURCE)) == 3


def test_what_is_no_string_after_all() -> None:
    """Without a parser quotes may be paired wrongly, in a module of some Python to come."""
    assert list(python_texts._docstrings('"""One."""\nif x:\n    \'a\n\\x\'\ndef f():\n    "Two."\n')) == [
        "One.",
        "Two.",
    ]


@pytest.mark.parametrize("module", ["argparse", "codecs", "difflib", "socket", "typing"])
def test_of_modules(module: str) -> None:
    source = Path(inspect.getsourcefile(__import__(module)) or "").read_text(encoding="utf-8")
    assert sorted(python_texts._docstrings(source)) == sorted(docstrings(source))


def test_of_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdlib_module_names", frozenset({"argparse", "email", "json", "os", "test"}))
    documents = library_docstrings()
    assert len(documents) > 20 and sum(map(len, documents)) > 50_000
    assert documents[0].startswith("Command-line parsing library")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert library_docstrings() == []
    for name in ("json/tests/a.py", "test/b.py", "site-packages/c.py", "json/__init__.py", "json/d.py", "os.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f'"""Of {name[-6:]}"""\n\ndef f():\n    """The same."""\n', encoding="utf-8")
    assert library_docstrings() == ["Of t__.py\n\nThe same.\n", "Of n/d.py\n", "Of os.py\n"]
