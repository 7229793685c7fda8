"""The documents name files, modules and functions that exist, and link to places that exist: no rename or move leaves them stale."""

from __future__ import annotations

import importlib.util
import pkgutil
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def _load(script: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[script.stem] = module  # needed by dataclasses, which look up their module
    spec.loader.exec_module(module)
    return module


check_links = _load(ROOT / "dev" / "check_links.py")
DOCUMENTS = [d for d in check_links.documents() if d.suffix == ".md"]

# A path of a file or folder that begins with one of the repository's folders, inside of code: `python dev/make_stubs.py --check`.
PATH = re.compile(r"(?<![\w./<>{}*-])(?:src|csrc|tests|dev|doc)/[\w./<>{}*,-]*")
MADE = {"dev/data/fineweb10B"}  # by what documents say
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


@pytest.mark.parametrize(
    "document",
    [d for d in DOCUMENTS if d.name != "from_llm_c.md"],  # whose paths in code are llm.c's: ours are links
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_paths_exist(document: Path) -> None:
    missing = [
        path for path in paths(document.read_text(encoding="utf-8")) if not (ROOT / path).exists() and path not in MADE
    ]
    assert not missing, f"{document.relative_to(ROOT)} names files that are not there: {missing}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
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


# ---- links ----


def test_links_lead_somewhere() -> None:
    wrong = [
        f"{link}: {what}"
        for d in check_links.documents()
        for link in check_links.links(d)
        if (what := check_links.problem(link))
    ]
    assert not wrong, "`python dev/check_links.py --fix` mends links to lines that have moved:\n" + "\n".join(wrong)


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small repository to check, in place of this one."""
    monkeypatch.setattr(check_links, "ROOT", tmp_path)
    (tmp_path / "doc").mkdir()
    (tmp_path / "src").mkdir()
    (tmp_path / "doc" / "other.md").write_text(
        "# A `title`, twice\n\n# A title twice\n\n```\n# no heading\n```\n", encoding="utf-8"
    )
    (tmp_path / "src" / "a.py").write_text("import os\n\n\ndef run():\n    return run_all(run)\n", encoding="utf-8")
    check_links.lines_of.cache_clear()
    check_links.anchors.cache_clear()
    return tmp_path


def problems(clone: Path, text: str, name: str = "doc/x.md") -> list[str | None]:
    path = clone / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    assert path in check_links.documents()
    return [check_links.problem(link) for link in check_links.links(path)]


def test_links_to_files_and_headings(clone: Path) -> None:
    good = (
        "[a](other.md), ![b](../src), [`c`](#here), [d](other.md#a-title-twice-1), [e](https://x.y/z.md#q)\n## Here\n"
    )
    assert problems(clone, good + "```\n[a](none.md)\n```\n and `[a](none.md)`") == [None] * 4
    for bad in ("none.md", "../../x", "other.md#no-heading", "other.md#L1", "#there", "../src#L1", "../src/a.py#run"):
        (found,) = problems(clone, f"[a]({bad})")
        assert found, bad


def test_links_to_lines_show_their_code(clone: Path) -> None:
    good = "[`run`](../src/a.py#L4) [`run()`](../src/a.py#L4-L5) [`run_all(run)`](../src/a.py#L5) [`import\nos`](../src/a.py#L1)"
    assert problems(clone, good) == [None] * 4
    for bad in (
        "[`run`](../src/a.py#L1)",
        "[`ru`](../src/a.py#L4)",
        "[run](../src/a.py#L4)",
        "[`run`](../src/a.py#L6)",
    ):
        (found,) = problems(clone, bad)
        assert found, bad


def test_links_in_scripts_are_those_of_text_cells(clone: Path) -> None:
    script = (
        "# %% [markdown]\n# # Title\n# See [other\n# text](../none.md)\n# %%\nprint('[a](none.md)')  # [b](none.md)\n"
    )
    assert len(problems(clone, script, "doc/t/t.py")) == 1
    (link,) = check_links.links(clone / "doc/t/t.py")
    assert (link.line, link.target) == (3, "../none.md")


def test_links_to_lines_follow_their_code(clone: Path) -> None:
    text = "[`run`](../src/a.py#L4-L5), [`run_all`](../src/a.py#L5), [`gone`](../src/a.py#L1), [`import os`](../src/a.py#L1)"
    assert problems(clone, text)[2] is not None
    (clone / "src" / "a.py").write_text(
        "import os\nimport run\n\n\n\n\ndef run():\n    return run_all(run)\n", encoding="utf-8"
    )
    check_links.lines_of.cache_clear()
    assert check_links.fix(clone / "doc/x.md") == []
    moved = text.replace("L4-L5", "L7-L8").replace("py#L5", "py#L8")
    assert (clone / "doc/x.md").read_text(encoding="utf-8") == moved
    assert [p is None for p in problems(clone, moved)] == [True, True, False, True]
    problems(clone, "[`os`](../src/a.py#L3) [`return`](../src/a.py#L2)")
    (clone / "src" / "a.py").write_text("\n    os.x()\n\n\n    os.y()\n    return os\n", encoding="utf-8")
    check_links.lines_of.cache_clear()
    (guess,) = check_links.fix(clone / "doc/x.md")
    assert "a.py#L2" in guess and "nearest" in guess
