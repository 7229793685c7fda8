"""Reading logs of llm.c and llmc, and drawing figures of them."""

from __future__ import annotations

import argparse
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from llmc import plot
from llmc.commands import plot as command

LLM_C_LOG = """s:0 tel:11.0300
s:0 trl:11.0100 lr:0.000001 norm:20.50
s:1 trl:10.5000 lr:0.000002 norm:18.25
s:2 eval:0.2500
s:2 tel:10.1000
s:2 trl:10.0000 lr:0.000003 norm:9.00
s:1 trl:10.4000 lr:0.000002 norm:17.00
s:2 trl:9.9000 lr:0.000003 norm:nan
"""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log124M" / "main.log"
    path.parent.mkdir()
    path.write_text(LLM_C_LOG)
    return path


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    rows = [{"kind": "message", "text": "hello"}, {"kind": "validation", "step": 0, "loss": 5.5}]
    for step in range(20):
        norm = "nan" if step == 3 else 1.0
        row = {"kind": "train", "step": step, "loss": 5 - step / 10, "norm": norm, "lr": 1e-3, "tokens_per_second": 1e3}
        rows.append(row)
    rows += [{"kind": "hellaswag", "step": 20, "correct": 30, "total": 100}]
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(r) for r in rows) + '\n{"kind": "tra')
    (folder / "main.log").write_text("s:0 trl:5.0000 lr:0.001000 norm:1.00\ns:20 tel:3.2500\n")
    (folder / "config.toml").write_text("total_batch_size = 512\n")
    return folder


def test_the_last_value_of_llm_c_log_counts(log: Path) -> None:
    run = plot.read_run(log)
    assert run.name == "log124M" and run.unreadable == 0 and run.tokens_per_step is None
    assert run.series["train_loss"] == {0: 11.01, 1: 10.4, 2: 9.9}
    assert run.series["val_loss"] == {0: 11.03, 2: 10.1}
    assert run.series["hellaswag"] == {2: 0.25}
    assert run.series["lr"] == {0: 1e-6, 1: 2e-6, 2: 3e-6}
    steps, norm = run.xy("norm")
    np.testing.assert_array_equal(steps, [0, 1, 2])
    np.testing.assert_array_equal(norm, [20.5, 17.0, np.nan])
    assert (
        run.best("train_loss") == (2, 9.9) and run.best("norm") == (1, 17.0) and run.best("tokens_per_second") is None
    )


def test_run_directory(run_dir: Path) -> None:
    run = plot.read_run(run_dir)
    assert run.unreadable == 1 and run.tokens_per_step == 512
    assert run.series["val_loss"] == {0: 5.5, 20: 3.25}  # one curve from each file
    assert run.best("train_loss") == (19, 3.1) and run.best("hellaswag") == (20, 0.3)


def test_figure_has_what_was_logged(log: Path, run_dir: Path) -> None:
    runs = [plot.read_run(log), plot.read_run(run_dir)]
    fig = plot.figure(runs, baselines=["124M", "1558M"])
    assert [a.get_title() for a in fig.axes] == [
        "loss",
        "HellaSwag accuracy",
        "learning rate",
        "gradient norm",
        "tokens/s",
    ]
    loss = fig.axes[0]
    lines = {line.get_label(): line for line in loss.get_lines()}
    np.testing.assert_array_equal(lines["log124M, training"].get_ydata(), [11.01, 10.4, 9.9])
    np.testing.assert_array_equal(lines["mine, validation"].get_xdata(), [0, 20])
    assert lines["GPT-2 124M, FineWeb validation"].get_ydata()[0] == 3.424958
    assert len([line for line in fig.axes[1].get_lines() if "GPT-" in str(line.get_label())]) == 4
    assert len(plot.figure(runs[:1]).axes) == 4  # llm.c logs no speed


def test_tokens(log: Path, run_dir: Path) -> None:
    run = plot.read_run(run_dir)
    fig = plot.figure([run], x="tokens")
    assert max(fig.axes[0].get_lines()[0].get_xdata()) == 19 * 512
    with pytest.raises(ValueError, match="log124M.*tokens_per_step"):
        plot.figure([plot.read_run(log)], x="tokens")
    fig = plot.figure([plot.read_run(log), run], x="tokens", tokens_per_step=10)
    assert max(fig.axes[0].get_lines()[0].get_xdata()) == 20


@pytest.mark.parametrize("window", [1, 2, 3, 50])
def test_smooth(window: int) -> None:
    values = np.arange(20.0) ** 2
    smoothed = plot.smooth(values, window)
    assert smoothed.shape == values.shape
    middle = values[10 - window // 2 : 10 - window // 2 + window] if window < 20 else values[:20]
    if window < 20:
        assert smoothed[10] == pytest.approx(middle.mean())
    np.testing.assert_allclose(plot.smooth(np.full(9, 3.0), window), 3.0)


@pytest.mark.parametrize("suffix, magic", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_files(run_dir: Path, tmp_path: Path, suffix: str, magic: bytes) -> None:
    out = [tmp_path / f"{i}.{suffix}" for i in range(2 if suffix == "svg" else 1)]
    for path in out:
        plot.plot_runs([run_dir], path)
        assert path.read_bytes().startswith(magic)
        assert path.read_bytes() == out[0].read_bytes()


def test_errors(run_dir: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.log"
    text.write_text("It was the best of times,\nit was the worst of times\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing.log").write_text("")
    for path, error, message in (
        (tmp_path / "absent", FileNotFoundError, "absent"),
        (tmp_path / "empty", FileNotFoundError, "main.log"),
        (text, ValueError, "not a training log"),
        (tmp_path / "nothing.log", ValueError, "nothing to plot"),
    ):
        with pytest.raises(error, match=message):
            plot.plot_runs([path], tmp_path / "x.png")
    for options, message in (({"x": "hours"}, "hours"), ({"baselines": ["7B"]}, "7B")):
        with pytest.raises(ValueError, match=message):
            plot.plot_runs([run_dir], tmp_path / "x.png", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="png"):
        plot.plot_runs([run_dir], tmp_path / "x.docx")
    assert not list(tmp_path.glob("x.*"))


def test_command(log: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    out = str(tmp_path / "both.svg")
    assert (
        command.run(parser.parse_args([str(log), str(run_dir), "-o", out, "--smooth", "3", "--baseline", "124M"])) == 0
    )
    printed = capsys.readouterr().out
    assert (
        "validation loss 10.1000 at step 2" in printed and "HellaSwag 0.3000 at step 20; 1 lines unreadable" in printed
    )
    svg = Path(out).read_text(encoding="utf-8")
    assert "<svg" in svg and str(tmp_path) not in svg


def test_notebook(log: Path, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """dev/vislog.ipynb runs from top to bottom, and the repository has it without outputs."""
    notebook = json.loads((Path(__file__).parents[2] / "dev" / "vislog.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert notebook["nbformat"] == 4 and not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    shown: list[str] = []
    display = types.ModuleType("IPython.display")
    display.__dict__.update(SVG=str, display=shown.append)
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    (tmp_path / "dev").mkdir()
    (tmp_path / "runs").mkdir()
    run_dir.rename(tmp_path / "runs" / "mine")
    log.parent.rename(tmp_path / "runs" / "log124M")
    monkeypatch.chdir(tmp_path / "dev")
    names: dict[str, object] = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
    assert len(names["runs"]) == 2  # type: ignore[arg-type]
    assert len(shown) == 2 and all("<svg" in svg for svg in shown)
