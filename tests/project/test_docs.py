"""The documents name files that exist. So no rename or move leaves a stale path behind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "doc").glob("*.md"))]

# A path of a file or folder that begins with one of the repository's folders, inside of code: `python dev/make_stubs.py --check`.
PATH = re.compile(r"(?<![\w./<>{}*-])(?:src|csrc|tests|dev|doc)/[\w./<>{}*,-]*")
PLACEHOLDER = re.compile(r"[<>{}*]|\.\.\.")


def paths(text: str) -> list[str]:
    """Return the paths in backticks and code blocks, without those that have a placeholder or a pattern in them."""
    code = re.findall(r"^```[\s\S]*?^```|`[^`]+`", text, re.MULTILINE)
    found = [path.rstrip(".,") for part in code for path in PATH.findall(part)]
    return [path for path in found if not PLACEHOLDER.search(path)]


def test_paths_are_found_in_code_only() -> None:
    text = "dev/a.py `csrc/b.cpp` `dev/c.py --d x` `build/dev/e.py` `tests/<name>.py` `src/*.py` `cpu/{f,g}.h`\n```\npytest tests/h.py\n```"
    assert paths(text) == ["csrc/b.cpp", "dev/c.py", "tests/h.py"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_exist(document: Path) -> None:
    missing = [path for path in paths(document.read_text(encoding="utf-8")) if not (ROOT / path).exists()]
    assert not missing, f"{document.name} names files that are not there: {missing}"
