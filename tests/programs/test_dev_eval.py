"""dev/eval: run_eval.py and summarize_eval.py. The harness's files are as its release 0.4.12 writes them, and older ones."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import llmc
from llmc.formats.eval_file import Example, write_eval_file

FOLDER = Path(__file__).parents[2] / "dev" / "eval"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("run_eval"), importlib.import_module("summarize_eval")


def write(folder: Path, name: str, results: dict[str, Any], **more: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps({"results": results, **more}))


def values(**metrics: float) -> dict[str, Any]:
    """Return a task's entry, as the harness has it."""
    entry: dict[str, Any] = {"name": "n", "alias": " - n", "sample_len": 12}
    for name, value in metrics.items():
        metric, _, taken = name.partition("__")
        entry |= {f"{metric},{taken.replace('_', '-') or 'none'}": value, f"{metric}_stderr,{taken or 'none'}": "N/A"}
    return entry


def new_results(folder: Path) -> None:
    one = {"arc_challenge": values(acc=0.1, acc_norm=0.3)}
    write(folder, "arc_challenge_25shot_2026-01-01T00-00-00.json", one, **{"n-shot": {"arc_challenge": 25}})
    groups = {"mmlu": ["mmlu_stem"], "mmlu_stem": ["mmlu_physics"]}
    mmlu = {"mmlu": values(acc=0.25), "mmlu_stem": values(acc=0.9), "mmlu_physics": values(acc=0.9)}
    write(folder / "model", "results_2026-01-01T00-00-00.json", mmlu, group_subtasks=groups, **{"n-shot": {"mmlu": 5}})
    gsm8k = {"gsm8k": values(exact_match__strict_match=0.02, exact_match__flexible_extract=0.5)}
    write(folder, "gsm8k_5shot_2026-01-01T00-00-00.json", gsm8k, **{"n-shot": {"gsm8k": 5}})
    write(folder, "wikitext_0shot.json", {"wikitext": values(word_perplexity=30.0)})
    (folder / "samples.json").write_text('[{"results": 1}]')  # of something else


def old_results(folder: Path) -> None:
    """Write what llm.c's run_eval.sh leaves, by the harness of 2023, and a result of `llmc eval`."""
    write(folder, "arc_challenge_25shot.json", {"arc_challenge": {"acc": 0.2, "acc_norm": 0.5, "acc_stderr": 0.1}})
    mmlu = {f"hendrycksTest-{name}": {"acc": acc, "acc_norm": 0.9} for name, acc in (("a", 0.2), ("b", 0.4))}
    write(folder, "mmlu_5shot.json", mmlu)
    write(folder, "truthfulqa_0shot.json", {"truthfulqa_mc": {"mc1": 0.2, "mc2": 0.4}})
    ours = {"checkpoint": "m.bin", "hellaswag": {"acc": 0.27, "acc_norm": 0.3, "total": 9}}
    (folder / "llmc_eval.json").write_text(json.dumps(ours))


def test_table(
    scripts: tuple[ModuleType, ModuleType],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    new_results(Path("new"))
    old_results(Path("old"))
    scripts[1].summarize([Path("new"), Path("old")])
    printed = capsys.readouterr()
    rows = [line.split() for line in printed.out.splitlines() if not line.startswith("---")]
    assert rows == [
        ["task", "shots", "metric", "new", "old"],
        ["arc_challenge", "25", "acc_norm", "30.00", "50.00"],
        ["gsm8k", "5", "exact_match", "2.00", "-"],
        ["mmlu", "5", "acc", "25.00", "30.00"],
        ["truthfulqa_mc", "0", "mc2", "-", "40.00"],
        ["mean", "of", "2,", "lm-evaluation-harness", "27.50", "40.00"],
        ["hellaswag", "0", "acc_norm", "-", "30.00"],
        ["mean", "of", "0,", "llmc", "eval", "-", "-"],
    ]
    assert "no accuracy: wikitext" in printed.err


def test_the_last_result_counts(scripts: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    for i, (name, acc) in enumerate([("results_b.json", 0.1), ("results_a.json", 0.2)]):
        write(tmp_path, name, {"winogrande": values(acc=acc)})
        os.utime(tmp_path / name, (i, i))
    assert list(scripts[1].scores_in(tmp_path).values()) == [0.2]


def test_what_cannot_be_summarized(scripts: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no results in"):
        scripts[1].scores_in(tmp_path)
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x\.json is not a file of results"):
        scripts[1].scores_in(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        scripts[1].scores_in(tmp_path / "absent")


def test_commands(scripts: tuple[ModuleType, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that has results is not run again; without the harness there is `llmc eval` alone."""
    run_eval, _ = scripts
    (tmp_path / "h.bin").touch()
    argv = ["run_eval.py", "m.bin", str(tmp_path), "--hellaswag", str(tmp_path / "h.bin"), "--mmlu", "absent"]
    monkeypatch.setattr(sys, "argv", [*argv, "--limit", "9", "--dtype", "bf16", "--device", "cuda"])
    args = run_eval.parse_arguments()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find_spec(name))
    ((path, command),) = run_eval.commands(args)
    assert path.name == "llmc_eval.json" and command[2:5] == ["llmc", "eval", "m.bin"] and "--mmlu" not in command
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    (tmp_path / "gsm8k_5shot_2026-01-01.json").touch()
    paths = {path.name: command for path, command in run_eval.commands(args)}
    assert list(paths) == ["llmc_eval.json", "arc_challenge_25shot.json", "hellaswag_10shot.json", "mmlu_5shot.json",
                           "truthfulqa_mc2_0shot.json", "winogrande_5shot.json"]  # fmt: skip
    arc = " ".join(paths["arc_challenge_25shot.json"])
    assert "--model_args pretrained=m.bin,dtype=bf16 --tasks arc_challenge --num_fewshot 25 --device cuda" in arc
    assert "--limit 9" in arc
    with pytest.raises(RuntimeError, match=r"x has failed \(3\)"):
        run_eval.run([(tmp_path / "x.json", [sys.executable, "-c", "raise SystemExit(3)"])])


def test_a_model_is_evaluated(tmp_path: Path) -> None:
    """HellaSwag by `llmc eval`, without the harness."""
    llmc.GPT2(llmc.GPT2Config(48, 257, 1, 2, 32)).save(tmp_path / "m.bin")
    tokens = np.arange(16, dtype=np.uint16).reshape(4, 4)
    write_eval_file(tmp_path / "h.bin", [Example(label, tokens[0], list(tokens[1:])) for label in range(3)])
    command = [
        sys.executable,
        FOLDER / "run_eval.py",
        "m.bin",
        "out",
        "--hellaswag",
        "h.bin",
        "--mmlu",
        "absent",
        "--tasks",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "mean of 1, llmc eval" in done.stdout
    assert json.loads((tmp_path / "out" / "llmc_eval.json").read_text())["hellaswag"]["total"] == 3
