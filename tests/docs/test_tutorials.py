"""The tutorials: each script runs, at small size, and its notebook has its cells, executed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [path for path in sorted(ROOT.glob("doc/*/*.py")) if path.stem == path.parent.name]
pytestmark = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


def notebook(script: Path) -> dict[str, Any]:
    path = script.with_suffix(".ipynb")
    assert path.is_file(), f"it is missing: python dev/make_notebooks.py {script.stem} makes it"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


@pytest.mark.skipif(
    sys.platform == "win32" or not any(shutil.which(os.environ.get("CXX", n)) for n in ("c++", "g++", "clang++")),
    reason="the kernels of tutorials are compiled by g++ or clang++, on Windows in WSL",
)
def test_script_runs(script: Path, tmp_path: Path) -> None:
    """From a folder that is not in the clone."""
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=os.environ | {"LLMC_SMALL": "1", "MPLBACKEND": "agg", "OMP_NUM_THREADS": "2", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert not list(tmp_path.iterdir()), "it left files where it was started"


def test_notebook_has_the_cells_of_the_script(script: Path) -> None:
    jupytext = pytest.importorskip("jupytext")
    cells = [
        (cell["cell_type"], cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"]))
        for cell in notebook(script)["cells"]
    ]
    assert cells == [(cell.cell_type, cell.source) for cell in jupytext.read(script, fmt="py:percent").cells], (
        f"doc/{script.stem}/{script.stem}.py was changed: python dev/make_notebooks.py {script.stem}"
    )


def test_notebook_was_executed_from_its_first_cell_to_its_last(script: Path) -> None:
    code = [cell for cell in notebook(script)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert any("image/png" in output.get("data", {}) for output in outputs), "it has no figure"
