"""Checks the links of all documents that lead to files of this repository, to headings and to lines.

    python dev/check_links.py              # lists the links that lead nowhere
    python dev/check_links.py --fix        # moves links to lines to where these stand now, then lists the rest

A link to a line shows code of that line: [`train_step`](../src/llmc/training/trainer.py#L309) is right as long as line 309 has
train_step in it; of [`launch(kernel, …)`](...) what is before the ellipsis counts. If the line has moved, --fix writes its new
number: that of the one line with this code, or of the one that defines it, or else the nearest, which it names for you to look at.
Markdown files are read, and the text cells of the tutorials' scripts (doc/*/*.py).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("doc", "dev", "examples", "scripts", "tests")

_FENCED = re.compile(r"^ {0,3}(`{3,}|~{3,})[\s\S]*?^ {0,3}\1", re.MULTILINE)
# A link or an image; or code, in which nothing is a link.
_LINK = re.compile(r"\[(?P<text>(?:`[^`]*`|[^\[\]`])*)\]\((?P<target>[^()\s]+)\)|(`+)[^`]*\3")
_HEADING = re.compile(r"^ {0,3}#{1,6} +(.*?) *#*$", re.MULTILINE)
_LINES = re.compile(r"L(\d+)(?:-L(\d+))?")


@dataclass(frozen=True)
class Link:
    """A relative link.

    Attributes:
        document: the file that has it.
        line: its line there, from 1 on.
        text, target: as [text](target) has them.
        begin, end: where the target stands in the file.
    """

    document: Path
    line: int
    text: str
    target: str
    begin: int
    end: int

    @property
    def code(self) -> str | None:
        """The code that the text is, if it is nothing else: up to an ellipsis, without the empty parentheses of a call."""
        match = re.fullmatch(r"`([^`…]+)(?:…[^`]*)?`", self.text.strip())
        return " ".join(match[1].split()).removesuffix("()") if match else None

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT).as_posix()}:{self.line}: {self.target}"


def documents() -> list[Path]:
    """Return the files whose links are checked."""
    found = [
        *ROOT.glob("*.md"),
        *(p for name in FOLDERS for p in (ROOT / name).rglob("*.md")),
        *ROOT.glob("doc/*/*.py"),
    ]
    return sorted(p for p in found if not any(part.startswith(("_", ".")) for part in p.relative_to(ROOT).parts))


def markdown(path: Path) -> str:
    """Return the Markdown of a document, at its places in the file: what is none of it is blank."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = "".join(_of_cells(text.splitlines(keepends=True)))
    return _FENCED.sub(lambda m: _blank(m[0]), text)


def _blank(text: str) -> str:
    return re.sub(r"[^\n]", " ", text)


def _of_cells(lines: list[str]) -> Iterator[str]:
    """Return the lines of a script in jupytext's percent format, with all blank but what its text cells say."""
    is_text = False
    for line in lines:
        if line.startswith("# %%"):
            is_text = "[markdown]" in line
        elif is_text:
            yield re.sub(r"^# ?", lambda m: " " * len(m[0]), line)
            continue
        yield _blank(line)


def links(path: Path) -> Iterator[Link]:
    """Return a document's relative links."""
    text = markdown(path)
    for m in _LINK.finditer(text):
        if m["target"] is not None and not re.match(r"[a-z][a-z0-9+.-]*:", m["target"]):
            yield Link(path, text.count("\n", 0, m.start()) + 1, m["text"], m["target"], *m.span("target"))


@cache
def lines_of(path: Path) -> list[str]:
    """Return the lines of a file."""
    return path.read_text(encoding="utf-8").splitlines()


@cache
def anchors(path: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub and the site make them."""
    found, seen = set(), Counter[str]()
    for heading in _HEADING.findall(markdown(path)):
        text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def has_code(line: str, code: str) -> bool:
    """Return whether a line has this code, and not as a part of longer names."""
    begin, end = (r"(?<!\w)" if re.match(r"\w", code) else ""), (r"(?!\w)" if re.search(r"\w$", code) else "")
    return re.search(begin + re.escape(code).replace(r"\ ", r"\s+") + end, line) is not None


def problem(link: Link) -> str | None:
    """Return what is wrong with a link, or None."""
    name, _, anchor = link.target.partition("#")
    path = (link.document.parent / unquote(name)).resolve() if name else link.document
    if not path.is_relative_to(ROOT):
        return "leads out of the repository"
    if not path.exists():
        return "there is no such file"
    if not anchor:
        return None
    if path.suffix == ".md":
        return None if anchor in anchors(path) else "the document has no such heading"
    match = _LINES.fullmatch(anchor)
    if match is None or not path.is_file():
        return f"expected #L and the number of a line, not #{anchor}"
    first, last = int(match[1]), int(match[2] or match[1])
    if not 1 <= first <= last <= len(lines_of(path)):
        return f"the file has {len(lines_of(path))} lines"
    if link.code is None:
        return "a link to a line shows code of that line: [`code`](file#L1)"
    if not has_code(lines_of(path)[first - 1], link.code):
        return f"line {first} has no `{link.code}`: {lines_of(path)[first - 1].strip()}"
    return None


def new_place(link: Link) -> tuple[str, bool] | None:
    """Return the target of a link whose line has moved, and whether it is the only one that it can be; None if its code is gone."""
    name, _, anchor = link.target.partition("#")
    path, match = link.document.parent / unquote(name), _LINES.fullmatch(anchor)
    if match is None or link.code is None or not path.is_file():
        return None
    first, last = int(match[1]), int(match[2] or match[1])
    there = [n for n, line in enumerate(lines_of(path.resolve()), 1) if has_code(line, link.code)]
    if not there:
        return None
    defining = [n for n in there if _defines(lines_of(path.resolve())[n - 1], link.code, path.suffix)]
    likely = there if len(there) == 1 else defining or there
    new = min(likely, key=lambda n: abs(n - first))
    end = f"-L{new + last - first}" if match[2] else ""
    return f"{name}#L{new}{end}", len(likely) == 1


def _defines(line: str, code: str, suffix: str) -> bool:
    """Return whether a line of Python or C++ looks as if it defined or declared a name."""
    name = re.escape(code.split("::")[-1])
    pattern = rf"(?:def|class)\s+{name}\b|{name}\s*(?::[^=]*)?=[^=]"
    if suffix != ".py":
        types = r"(?!//|return|else|throw|new)(?:[\w:<>*&,]+\s+)+"
        pattern = rf"{types}[*&]?(?:\w+::)*{name}\s*\(|(?:class|struct|enum class|#define)\s+{name}\b[^;]*$"
    return re.match(rf"\s*(?:{pattern})", line) is not None


def fix(path: Path) -> list[str]:
    """Move a document's links to lines to where these are; return what was moved by guess."""
    text, said = path.read_text(encoding="utf-8"), []
    for link in sorted(links(path), key=lambda link: -link.begin):
        if problem(link) is not None and (found := new_place(link)) is not None:
            target, sure = found
            text = text[: link.begin] + target + text[link.end :]
            if not sure:
                said.append(
                    f"{link} is now {target}, the nearest line with `{link.code}`: look whether it is the right one"
                )
    if text != path.read_text(encoding="utf-8"):
        path.write_text(text, encoding="utf-8", newline="\n")
    return said[::-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fix", action="store_true", help="write the new numbers of lines that have moved")
    args = parser.parse_args()
    if args.fix:
        for line in [line for path in documents() for line in fix(path)]:
            print(line)
    wrong = [f"{link}: {what}" for path in documents() for link in links(path) if (what := problem(link)) is not None]
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
