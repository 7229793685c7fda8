"""Writes src/llmc/_llmc.pyi from the built extension: run after changing csrc/bindings. --check only compares.

Needs pybind11-stubgen and ruff (pip install ".[dev]").
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

STUB = Path(__file__).parents[1] / "src" / "llmc" / "_llmc.pyi"

# What pybind11 accepts is wider than what a reader wants to know.
PLAIN = {
    "typing.SupportsInt | typing.SupportsIndex": "int",
    "typing.SupportsFloat | typing.SupportsIndex": "float",
    "numpy.ndarray[typing.Any, numpy.dtype[typing.Any]]": "numpy.typing.NDArray[typing.Any]",
    "Tensor = None": "Tensor | None = None",
    "-> tuple:": "-> tuple[typing.Any, ...]:",
    "-> dict:": "-> dict[str, typing.Any]:",
    "-> list:": "-> list[typing.Any]:",
    ": dict)": ": dict[str, typing.Any])",
    "os.PathLike |": "os.PathLike[str] |",
    "os.PathLike)": "os.PathLike[str])",
    "os.PathLike,": "os.PathLike[str],",
    "typing_extensions.CapsuleType": "typing.Any",
    "import typing_extensions\n": "",
}


def generate() -> str:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pybind11_stubgen", "llmc._llmc", "-o", folder, "--numpy-array-use-type-var"]
        subprocess.run([*command, "--exit-code"], check=True, stdout=subprocess.DEVNULL)
        text = (Path(folder) / "llmc" / "_llmc.pyi").read_text(encoding="utf-8")
        for ugly, plain in PLAIN.items():
            text = text.replace(ugly, plain)
        path = Path(folder) / "_llmc.pyi"
        path.write_text("# Written by dev/make_stubs.py.\n" + text, encoding="utf-8")
        config = ["--config", str(STUB.parents[2] / "pyproject.toml"), str(path)]
        for action in (["check", "--fix-only", "-q"], ["format", "-q"]):
            subprocess.run([sys.executable, "-m", "ruff", *action, *config], check=True)
        return path.read_text(encoding="utf-8")


def main() -> int:
    text = generate()
    if "--check" in sys.argv[1:]:
        if not STUB.is_file() or STUB.read_text(encoding="utf-8") != text:
            print(f"{STUB} is out of date: run python dev/make_stubs.py", file=sys.stderr)
            return 1
        return 0
    STUB.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
