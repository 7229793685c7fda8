"""README.zh-CN.md is README.md in Chinese: commands, links and figures are the same in both. CI runs the README's test command."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE_BLOCK = re.compile(r"^```[\s\S]*?^```|^(?: {4}.*\n)+", re.MULTILINE)


def code_lines(text: str) -> list[str]:
    """Return the lines of code blocks, without comments and omissions ("…"), which are translated."""
    lines = [line for block in CODE_BLOCK.findall(text) for line in block.splitlines()]
    lines = [re.sub(r"(^|\s+)# .*", "", line).strip() for line in lines if not line.startswith("…")]
    return [line for line in lines if line]


def inline_code(text: str) -> list[str]:
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", CODE_BLOCK.sub("", text))]


def links(text: str) -> list[str]:
    """Return the links, except those from one language to the other."""
    return [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("README")]


def table_figures(text: str) -> list[str]:
    return [n for line in text.splitlines() if line.startswith("|") for n in re.findall(r"\d+(?:[.,]\d+)*", line)]


@pytest.mark.parametrize("part", [code_lines, inline_code, links, table_figures])
def test_both_languages_say_the_same(part: object) -> None:
    assert callable(part)
    english, chinese = (Counter(part((ROOT / n).read_text(encoding="utf-8"))) for n in ("README.md", "README.zh-CN.md"))
    assert english
    assert english == chinese, (
        f"README.zh-CN.md lacks {list(english - chinese)} and has besides {list(chinese - english)}"
    )


def test_each_leads_to_the_other() -> None:
    for one, other in (("README.md", "README.zh-CN.md"), ("README.zh-CN.md", "README.md")):
        assert f"]({other})" in (ROOT / one).read_text(encoding="utf-8")
        assert (ROOT / other).is_file()


def test_links_lead_to_files() -> None:
    for name in links((ROOT / "README.md").read_text(encoding="utf-8")):
        assert name.startswith("http") or (ROOT / name).exists(), name


def test_ci_runs_the_test_command() -> None:
    (command,) = [line for line in code_lines((ROOT / "README.md").read_text(encoding="utf-8")) if "pytest" in line]
    steps = [line.strip() for line in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()]
    first = steps.index(command.split(" && ")[0])
    assert steps[first : first + 2] == command.split(" && ")
