"""The documents name files, modules and functions that exist. So no rename or move leaves a stale name behind."""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "doc").glob("*.md"))]

# A path of a file or folder that begins with one of the repository's folders, inside of code: `python dev/make_stubs.py --check`.
PATH = re.compile(r"(?<![\w./<>{}*-])(?:src|csrc|tests|dev|doc)/[\w./<>{}*,-]*")
PLACEHOLDER = re.compile(r"[<>{}*]|\.\.\.")
NAME = re.compile(r"(?<![\w./-])_?llmc(?:\.\w+)+")  # `llmc.formats.shards`, `_llmc.nccl_id()`


def code(text: str) -> list[str]:
    """Return what is in backticks and code blocks."""
    return re.findall(r"^```[\s\S]*?^```|`[^`]+`", text, re.MULTILINE)


def paths(text: str) -> list[str]:
    """Return the paths in code, without those that have a placeholder or a pattern in them."""
    found = [path.rstrip(".,") for part in code(text) for path in PATH.findall(part)]
    return [path for path in found if not PLACEHOLDER.search(path)]


def test_paths_are_found_in_code_only() -> None:
    text = "dev/a.py `csrc/b.cpp` `dev/c.py --d x` `build/dev/e.py` `tests/<name>.py` `src/*.py` `cpu/{f,g}.h`\n```\npytest tests/h.py\n```"
    assert paths(text) == ["csrc/b.cpp", "dev/c.py", "tests/h.py"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_exist(document: Path) -> None:
    missing = [path for path in paths(document.read_text(encoding="utf-8")) if not (ROOT / path).exists()]
    assert not missing, f"{document.name} names files that are not there: {missing}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_names_exist(document: Path) -> None:
    for part in code(document.read_text(encoding="utf-8")):
        for name in NAME.findall(part):
            module = ROOT / "src" / name.replace(".", "/")  # some modules need packages that may not be installed
            if not (module.is_dir() or module.with_suffix(".py").is_file()):
                pkgutil.resolve_name(f"llmc.{name}" if name.startswith("_") else name)


def test_guide_calls_functions_that_exist() -> None:
    """The C++ of the guide to adding a kernel is compiled by its readers alone, so a function that was renamed is noticed here."""
    guide = (ROOT / "doc" / "adding_a_kernel.md").read_text(encoding="utf-8")
    called = {
        name
        for block in re.findall(r"^```(?:cpp|cuda)\n([\s\S]*?)^```", guide, re.MULTILINE)
        for name in re.findall(r"([A-Za-z_]\w*)(?:<[^<>;()]*>)?[({]", re.sub(r"//.*", "", block))
    }
    tree = "".join(
        p.read_text(encoding="utf-8") for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh", ".cpp", ".cu")
    )
    tree += (ROOT / "dev" / "ci" / "check_kernels.cpp").read_text(encoding="utf-8")
    known = set(re.findall(r"\w+", tree))
    assert {"launch_column_sum", "for_ranges", "op_begins"} <= called
    unknown = {name for name in called - known if not re.search("rmsnorm|silu|RmsNorm|Silu|WeightTerms", name)}
    assert not unknown
