"""The command lines and Python blocks of README.md and the documents, as a reader would type them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# README.zh-CN.md has README.md's commands: tests/project/test_readme.py.
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("doc/*.md")),
    ROOT / "scripts" / "README.md",
    ROOT / "examples" / "README.md",
    ROOT / "dev" / "kernels" / "README.md",
]

_BLOCK = re.compile(r"^```(?P<language>\w*)\n(?P<fenced>[\s\S]*?)^```|(?P<indented>(?:^ {4}.*\n)+)", re.MULTILINE)
_ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")
_PROGRAMS = {"llmc", "llmc-train", "python", "python3", "py", "pydoc", "pip", "pytest", "cmake", "git"}
_PROGRAMS |= {"mpirun", "srun", "sbatch", "torchrun", "powershell", "sphinx-build"}
_SHELLS = {"": "\\", "bash": "\\", "sh": "\\", "powershell": "`", "bat": "^"}  # their mark of a line that goes on


@dataclass(frozen=True)
class Command:
    """A command of a document.

    Attributes:
        text: as typed, without its comment.
        shell: the language of its block: "" for a POSIX shell, "powershell" or "bat".
        shown: whether it stands in a block, to be typed as it is, and not inside of a sentence.
    """

    text: str
    shell: str
    shown: bool

    def words(self) -> list[str]:
        """Return the words and operators (`&&`, `|`) of a command for a POSIX shell, quotes taken away."""
        lexer = shlex.shlex(self.text, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split, lexer.commenters = True, ""
        return list(lexer)


def commands(document: Path) -> list[Command]:
    """Return what a document gives to be typed, in its order: command lines of blocks, and commands inside of sentences."""
    text = document.read_text(encoding="utf-8")
    found: list[tuple[int, Command]] = []
    for block in _BLOCK.finditer(text):
        language = block["language"] or ""
        if language in _SHELLS:
            lines = (block["fenced"] if block["indented"] is None else block["indented"]).replace(
                _SHELLS[language] + "\n", " "
            )
            shell = language if language in ("powershell", "bat") else ""
            for line in lines.splitlines():
                line = re.sub(r"(^|\s+)(#|rem\s).*", "", line).strip()
                if line and (shell or _is_command(line)):
                    found.append((block.start(), Command(" ".join(line.split()), shell, True)))
    prose = _BLOCK.sub(lambda block: " " * len(block[0]), text)
    for code in re.finditer(r"(?<!`)`([^`]+)`", prose):
        line = " ".join(code[1].split())
        if _is_command(line) and " " in line:
            found.append((code.start(), Command(line, "", False)))
    return [command for _, command in sorted(found, key=lambda pair: pair[0])]


def python_blocks(document: Path) -> list[str]:
    """Return the Python blocks of a document, in its order."""
    return [b["fenced"] for b in _BLOCK.finditer(document.read_text(encoding="utf-8")) if b["language"] == "python"]


def _is_command(line: str) -> bool:
    """Return whether a line of code begins with a program, behind variables for its environment."""
    words = [word for word in line.split() if not _ASSIGNMENT.fullmatch(word)]
    return bool(words) and (
        words[0] in _PROGRAMS or re.match(r"(dev|scripts)/\S+\.(sh|py|sbatch)$", words[0]) is not None
    )
