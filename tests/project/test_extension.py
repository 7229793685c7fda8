"""The extension exports one name only, and works beside other C++ extensions in a process."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from llmc import _llmc


def exported(path: str) -> set[str]:
    """Return the names that the file at `path` defines for other modules to see, weak and unique ones too."""
    lief = pytest.importorskip("lief", reason="lief, which reads symbol tables, is not installed: pip install lief")
    binary = lief.parse(path)
    if isinstance(binary, lief.ELF.Binary):
        return {str(s.name) for s in binary.dynamic_symbols if s.shndx != 0}
    if isinstance(binary, lief.MachO.Binary):
        return {str(s.name).removeprefix("_") for s in binary.exported_symbols}
    assert isinstance(binary, lief.PE.Binary)
    return {str(f.name) for f in binary.exported_functions}


def test_only_the_entry_point_is_exported() -> None:
    """Any other name could take the place of the same name in a library that the process has loaded, or be replaced by it."""
    assert exported(_llmc.__file__) == {"PyInit__llmc"}


# Each lets C++ print a float to a stream, which breaks first if two copies of libstdc++ are mixed.
PRINTS = {
    "torch": """
import torch
try:
    torch.dropout(torch.ones(2), 1.5, True)
except RuntimeError as error:
    print(error)
""",
    "ml_dtypes": "import ml_dtypes; print(repr(ml_dtypes.bfloat16(1.5)))",
    "llmc": """
import llmc
try:
    llmc.AdamW(llmc.GPT2(llmc.GPT2Config(max_seq_len=4, vocab_size=5, num_layers=1, num_heads=1, channels=4)), eps=-1.5)
except ValueError as error:
    print(error)
""",
}


@pytest.mark.parametrize("order", [tuple(PRINTS), tuple(reversed(PRINTS))], ids="-".join)
def test_imports_beside_others_in_both_orders(order: tuple[str, ...]) -> None:
    for name in order:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(PRINTS[name] for name in order)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr}"
    lines = done.stdout.splitlines()
    assert len(lines) == len(order) and all("1.5" in line for line in lines), done.stdout
