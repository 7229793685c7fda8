"""dev/gpu_check.sh: both parts with stages that hang and stages that fail, of which each loses itself alone."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "dev" / "ci" / "gpu_check.py"
STAGES = {
    "a": "check smoke tests throughput ops profile generation".split(),
    "b": "parity steps memcheck racecheck more_tests options sizes peers by_op".split(),
}

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="groups of processes of POSIX")


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Load the script, without its build and without looking for a device."""
    pytest.importorskip("ml_dtypes")
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)  # dataclasses look it up
    spec.loader.exec_module(module)
    for stage in ("build", "status"):
        monkeypatch.setattr(module.Check, stage, lambda self: "left out")
    monkeypatch.setattr(module.Check, "chosen", lambda self, tool, which: ["a test"])
    return module


@pytest.mark.parametrize("part,hangs", [("a", "check"), ("b", "peers")])
def test_a_stage_that_hangs_or_fails_loses_itself_alone(gpu_check, monkeypatch, tmp_path, capsys, part, hangs):
    """One stage hangs, and all others fail at once: so none of them takes long, and each is seen to have been begun."""
    sabotage = ",".join(f"{'hang' if s == hangs else 'fail'}:{s}" for s in STAGES[part])
    monkeypatch.setenv("LLMC_GPU_CHECK_SABOTAGE", sabotage)
    args = argparse.Namespace(dry_run=True, out=tmp_path / "out", build_dir=tmp_path / "build")
    assert gpu_check.Check(args).all([part]) == 1
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert rows[0]["what"] == "begin" and rows[0]["part"] == part
    stages = {row["stage"]: row for row in rows[1:]}
    assert list(stages)[:2] == ["build", "status"] and set(stages) == {"build", "status", *STAGES[part]}
    if part == "a":
        assert list(stages)[2] == "check"
    for name in STAGES[part]:
        if name in ("memcheck", "racecheck"):
            assert stages[name]["status"] == "not run" and "needs a GPU" in stages[name]["detail"]
        else:
            assert stages[name]["status"] == "FAILED"
            assert ("stopped after 1 s" if name == hangs else "sabotage") in stages[name]["detail"]
    table = (tmp_path / "out" / f"table_{part}.txt").read_text()
    assert table.startswith("REHEARSAL") and table.strip() in capsys.readouterr().out
    assert (tmp_path / "out" / f"log_{part}.txt").read_text().count("==== ") >= len(STAGES[part]) - 2


def test_the_kernels_that_are_wrong_are_named(gpu_check, monkeypatch, tmp_path):
    """The stage `check` reports the line of error of `llmc check`, and keeps its table."""
    code = (
        "import sys; print('matmul_forward  sm_90  bf16  WRONG')\n"
        "sys.exit('llmc check: error: wrong: matmul_forward (sm_90, bf16). The first: out is off by 1')"
    )
    args = argparse.Namespace(dry_run=True, out=tmp_path / "out", build_dir=tmp_path / "build")
    check = gpu_check.Check(args)
    run = check.run
    monkeypatch.setattr(check, "run", lambda name, command, limit: run(name, [sys.executable, "-c", code], limit))
    check.part = "a"
    assert not check.stage("check", check.kernels)
    (result,) = check.stages
    assert "wrong: matmul_forward (sm_90, bf16)" in result.detail and "bf16  WRONG" in result.report
