"""Sweeps: every run of the grid, a failed one beside the others, continued where they were stopped."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from runs import tiny_settings

from llmc.sweep import Sweep


def write(folder: Path, **tables: str) -> Path:
    settings = tiny_settings(folder, max_steps=3, val_every=3)
    for name in ("output_dir", "progress"):
        del settings[name]
    body = "\n".join(f"{k} = {json.dumps(list(v) if isinstance(v, tuple) else v)}" for k, v in settings.items())
    path = folder / "sweep.toml"
    rest = "\n".join(f"[{name}]\n{text}" for name, text in tables.items())
    path.write_text(f'output_dir = "{(folder / "sweep").as_posix()}"\njobs = 2\n[settings]\n{body}\n{rest}\n')
    return path


def test_grid_with_a_failure_and_restart(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        grid="learning_rate = [1e-3, 1e-2]\nval_data = ['missing.bin', "
        + repr(str(tmp_path / "data" / "val.bin"))
        + "]",
    )
    said: list[str] = []
    sweep = Sweep.load(path)
    assert len(sweep.runs) == 4 and not sweep.execute(said.append)
    status = {run.name: run.status for run in sweep.runs}
    assert sorted(s.split(":")[0] for s in status.values()) == ["done", "done", "failed", "failed"]
    rows = list(csv.DictReader((tmp_path / "sweep" / "summary.csv").read_text().splitlines()))
    assert [row["learning_rate"] for row in rows] == ["0.001", "0.001", "0.01", "0.01"]
    assert all(bool(row["val_loss"]) == (row["status"] == "done") for row in rows)
    assert (tmp_path / "sweep" / "summary.png").is_file()
    failed = next(run for run in sweep.runs if run.status.startswith("failed"))
    assert "missing.bin" in (tmp_path / "sweep" / failed.name / "output.txt").read_text()

    said.clear()
    again = Sweep.load(path)
    again.execute(said.append)
    assert sum("done before" in line for line in said) == 2


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"grid": "learning_rte = [1]"}, "unknown setting 'learning_rte'"),
        ({"grid": "learning_rate = 1"}, "expected a list of values"),
        ({"gird": "learning_rate = [1]"}, "unknown key 'gird'"),
        ({"grid": "schedule = ['cosine', 'sine']"}, "schedule is 'sine'"),
        ({"grid": "seed = [1, 1]"}, "two runs are the same"),
    ],
)
def test_refused(tmp_path: Path, tables: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sweep.load(write(tmp_path, **tables))
