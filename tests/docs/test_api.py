"""The site's reference has every name that `llmc` has and every command, and each of its names is there; its examples run."""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path

import pytest

import llmc
from llmc.cli import COMMANDS

PAGES = sorted((Path(__file__).parents[2] / "doc" / "api").glob("*.md"))
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
NAMES = re.findall(r"^\.\. auto(?:class|exception|function):: (\S+)", TEXT, re.MULTILINE)


def test_every_public_name_is_documented() -> None:
    missing = {f"llmc.{name}" for name in llmc.__all__} - set(NAMES) - {"llmc.__version__"}
    assert not missing
    assert len(NAMES) == len(set(NAMES))


@pytest.mark.parametrize("name", NAMES)
def test_names_exist(name: str) -> None:
    assert callable(pkgutil.resolve_name(name))


def test_every_command_is_documented() -> None:
    assert set(COMMANDS) <= set(re.findall(r"^```{command-help} (.*)$", TEXT, re.MULTILINE))


def test_examples_run() -> None:
    blocks = re.findall(r"^```python\n([\s\S]*?)^```", TEXT, re.MULTILINE)
    assert blocks
    for block in blocks:
        exec(block, {})
