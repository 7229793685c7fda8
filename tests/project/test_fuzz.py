"""A short run of dev/stress/fuzz.py: damaged files end in one clear error, soon, and in little memory.

The kinds of file are the rows of fuzz.TARGETS. `python dev/stress/fuzz.py` does 10,000 mutations of each.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "dev" / "stress" / "fuzz.py"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("llmc_fuzz", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["llmc_fuzz"] = module  # needed by dataclasses, which look up their module
    spec.loader.exec_module(module)
    return module


fuzz = _load()


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_damaged_files(name: str) -> None:
    outcomes, wrong = fuzz.fuzz(name, count=300, seed=1)
    assert not wrong
    assert sum(outcomes.values()) == 300
    assert outcomes["Error"] + outcomes["CheckpointDamaged"] > 15  # readers do see the damage


@pytest.fixture
def broken_reader(tmp_path: Path) -> Iterator[Path]:
    """Write a copy of the script whose reader of tokenizer files fails in every way that the script must notice."""
    script = tmp_path / "fuzz.py"
    addition = '''
def _break(folder):
    """The whole files are read well; then everything goes wrong once, whatever process it is in."""
    import ctypes
    calls = Path(__file__).with_name("calls")
    _break.calls = getattr(_break, "calls", 0) + 1
    if _break.calls <= 12:
        return
    number = len(calls.read_text()) if calls.exists() else 0
    calls.write_text("x" * (number + 1))
    if number == 3:
        ctypes.string_at(0)
    elif number == 5:
        time.sleep(99)
    elif number == 7:
        bytearray(2 << 30)
    elif number == 9:
        raise KeyError("x")

SECONDS = 1.0
TARGETS["tokenizer"] = Target(write_tokenizer, _break)

'''
    script.write_text(SCRIPT.read_text().replace('if __name__ == "__main__"', addition + 'if __name__ == "__main__"'))
    yield script


@pytest.mark.skipif(sys.platform != "linux", reason="the memory limit is Linux's")
def test_the_fuzzer_sees_what_goes_wrong(broken_reader: Path) -> None:
    import subprocess

    done = subprocess.run(
        [sys.executable, str(broken_reader), "tokenizer", "--count", "12"], capture_output=True, text=True
    )
    assert done.returncode == 1
    for word in ("CRASH (exit code -11)", "HANG", "UNEXPECTED-MemoryError", "UNEXPECTED-KeyError"):
        assert word in done.stdout
