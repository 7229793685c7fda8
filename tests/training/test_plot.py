"""Reading logs of llm.c and llmc, and drawing figures of them."""

from __future__ import annotations

import argparse
import json
import sys
import types
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llmc import plot
from llmc.commands import plot as command
from llmc.data.tokenizer import Tokenizer
from llmc.models.config import GPT2Config
from llmc.models.gpt2 import GPT2
from llmc.optim.schedule import BatchSchedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    assert run.name == "log124M" and run.unreadable == 0 and run.batch is None
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
    assert run.unreadable == 1 and run.batch == BatchSchedule(512, 512, 0)
    assert run.series["val_loss"] == {0: 5.5, 20: 3.25}  # one curve from each file
    assert run.best("train_loss") == (19, 3.1) and run.best("hellaswag") == (20, 0.3)


def titles(fig: Figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in fig.axes]


def heading(fig: Figure) -> str:
    return " ".join(text.get_text() for text in fig.texts)


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def drawn(axes: Axes) -> dict[str, Any]:
    """Return the curves of a panel by their names; the last of a name."""
    return {str(line.get_label()): line for line in axes.get_lines()}


def test_figure_has_what_was_logged(log: Path, run_dir: Path) -> None:
    runs = [plot.read_run(log), plot.read_run(run_dir)]
    fig = plot.figure(runs, baselines=["124M", "1558M"], window=1)
    assert titles(fig) == ["loss", "HellaSwag accuracy", "gradient norm", "learning rate", "tokens/s"]
    loss = fig.axes[0]
    np.testing.assert_array_equal(loss.get_lines()[0].get_ydata(), [11.01, 10.4, 9.9])
    np.testing.assert_array_equal(drawn(loss)["val_loss"].get_xdata(), [0, 20])
    assert [3.424958] * 2 in [list(line.get_ydata()) for line in loss.get_lines()]
    assert "GPT-2 124M, FineWeb" in texts(loss) and len(texts(fig.axes[1])) == 4
    assert len(plot.figure(runs[:1]).axes) == 4  # llm.c logs no speed
    runs[1].series = {"train_loss": {0: 5.0, 1: 4.0}, "lr": {0: 1e-3, 1: 1e-3}}
    assert titles(plot.figure(runs[1:])) == ["loss"]  # a constant rate is no picture


def test_one_run_has_a_title_and_no_legend(log: Path, run_dir: Path) -> None:
    runs = [plot.read_run(log), plot.read_run(run_dir)]
    fig = plot.figure(runs[1:])
    assert heading(fig) == "mine: validation loss 3.250 at step 20"
    assert not fig.legends and not any(axes.get_legend() for axes in fig.axes)
    assert texts(fig.axes[0]) == ["training", "validation"]  # from below, where the curves end
    colors = {line.get_color() for line in fig.axes[0].get_lines()}
    assert len(colors) == 2
    assert heading(plot.figure(runs[1:], title="Mine")) == "Mine"
    assert plot.figure(runs, title="Both").legends[0].get_title().get_text() == "Both"
    both = plot.figure(runs)
    assert heading(both) == ""
    assert [text.get_text() for text in both.legends[0].texts] == ["log124M", "mine", "training", "validation"]


def run_of(losses: NDArray[np.float64], name: str = "run") -> plot.Run:
    return plot.Run(name, {"train_loss": dict(enumerate(losses.tolist()))})


def test_one_spike_does_not_set_the_axis() -> None:
    losses = 4.0 + 3.0 * np.exp(-np.arange(400) / 60) + 0.1 * np.sin(np.arange(400) * 2.0)
    low, high = plot.figure([run_of(losses)]).axes[0].get_ylim()
    assert low < losses.min() and losses[2:].max() < high < 8
    losses[200], losses[300:302], losses[350] = 50.0, 0.1, np.nan
    axes = plot.figure([run_of(losses)]).axes[0]
    np.testing.assert_allclose(axes.get_ylim(), (low, high), rtol=0.02)
    outside = [line for line in axes.get_lines() if line.get_label() == "_outside"]
    assert {str(line.get_marker()): list(line.get_xdata()) for line in outside} == {
        "^": [200],
        "v": [300, 301],
        "x": [350],
    }
    assert axes.get_title(loc="right") == "▲ to 50, ▼ to 0.1, \N{MULTIPLICATION SIGN} 1 not finite"
    losses[200:230] = 50.0  # this is no spike
    assert plot.figure([run_of(losses)]).axes[0].get_ylim()[1] > 50


@pytest.mark.parametrize("losses", [[5.0], [5.0, 5.0], [np.nan, np.nan], [0.0, -1.0, 0.0], [0.0, 5.0]])
def test_odd_values_are_drawn(losses: list[float], tmp_path: Path) -> None:
    low, high = plot.figure([run_of(np.array(losses))]).axes[0].get_ylim()
    assert 0 < low < high


def test_many_runs_differ(tmp_path: Path) -> None:
    runs = [run_of(np.array([5.0, 4.0]), f"learning_rate={lr},batch_size=64,layers=12,channels=768") for lr in range(9)]
    fig = plot.figure(runs)
    assert [text.get_text() for text in fig.legends[0].texts] == [f"learning_rate={lr}" for lr in range(9)]
    looks = {(line.get_color(), line.get_linestyle()) for line in fig.axes[0].get_lines()}
    assert len(looks) == 9
    fig = plot.figure([run_of(np.array([5.0, 4.0]), "n" * 80)])
    assert len(heading(fig)) < 80


def test_names_say_which_run(log: Path, tmp_path: Path) -> None:
    """A log of one's own name has that; folders that are called alike are told apart by those that they are in."""
    own = log.with_name("124M.log")
    own.write_text(LLM_C_LOG)
    assert plot.read_run(own).name == "124M"
    paths = []
    for folder in ("a", "b"):
        paths.append(tmp_path / folder / "run")
        paths[-1].mkdir(parents=True)
        (paths[-1] / "main.log").write_text(LLM_C_LOG)
    plot.plot_runs(paths, tmp_path / "x.svg")
    svg = (tmp_path / "x.svg").read_text(encoding="utf-8")
    assert "<!-- a/run -->" in svg and "<!-- b/run -->" in svg


def test_characters_that_no_font_has(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are told of and drawn as "?", not as boxes; a font that has them is found though matplotlib was not told of it."""
    from matplotlib import font_manager

    name = "é 曲線 $x_1$"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = log.parent.rename(tmp_path / name)
        note = plot.plot_runs([folder], tmp_path / "x.png")
        monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
        assert plot._labels([name])[0] == [r"é ?? \$x_1\$"]
        assert "no font here has 曲線" in plot.plot_runs([folder], tmp_path / "x.png")
    assert not note or "no font here has" in note
    assert plot._labels(["a\x07b"]) == (["a?b"], "")


def test_another_font_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib
    from matplotlib import font_manager

    # As if matplotlib's own fonts had no Greek but in one that is not asked for.
    found = plot._characters
    monkeypatch.setattr(plot, "_characters", lambda font, wanted: found(font, wanted) if "Mono" in font else set())
    families, missing = plot._fonts("λ")
    assert missing == "" and families[0] in matplotlib.rcParams["font.family"] and "Mono" in families[-1]
    assert any(font.name == families[-1] for font in font_manager.fontManager.ttflist)


def test_losses_of_another_vocabulary_do_not_compare(log: Path, run_dir: Path) -> None:
    Tokenizer.byte_level().save(run_dir / "tokenizer.bin")
    runs = [plot.read_run(log), plot.read_run(run_dir)]
    assert [run.vocab_size for run in runs] == [None, 257]
    with pytest.raises(ValueError, match=r"^baseline 124M .*50,257 .*'mine' has one of 257: .*do not compare$"):
        plot.figure(runs, baselines=["124M"])
    runs[0].vocab_size = 50304
    assert len(texts(plot.figure(runs[:1], baselines=["124M"]).axes[0])) == 3
    assert titles(plot.figure(runs))[0] == "loss (vocabularies of 257 and 50,304 do not compare)"
    model = GPT2(GPT2Config(num_layers=1, num_heads=1, channels=16, max_seq_len=8, vocab_size=50))
    model.save(run_dir / "model_00000020.bin")  # whose vocabulary counts
    assert plot.read_run(run_dir).vocab_size == 50
    (run_dir / "model_00000030.bin").write_bytes(b"no model")
    assert plot.read_run(run_dir).vocab_size == 50


def test_runs_of_different_vocabularies_compare_in_bits_per_byte(log: Path, run_dir: Path, tmp_path: Path) -> None:
    rows = [{"kind": "validation", "step": step, "loss": 4.0, "bits_per_byte": 3.0 - step / 400} for step in (0, 400)]
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write("\n" + "".join(json.dumps(row) + "\n" for row in rows))
    runs = [plot.read_run(run_dir), plot.read_run(run_dir, "other"), plot.read_run(log)]
    assert runs[0].series["val_bits_per_byte"] == {0: 3.0, 400: 2.0} and "val_bits_per_byte" not in runs[2].series
    runs[0].series = {name: runs[0].series[name] for name in ("train_loss", "val_loss", "val_bits_per_byte")}
    runs[0].series["val_loss"].pop(20)  # which main.log has
    assert heading(plot.figure(runs[:1])) == "mine: validation loss 4.000 (3.000 bits per byte) at step 0 of 400"
    runs[0].vocab_size, runs[1].vocab_size = 1024, 4096
    for fig in (plot.figure(runs[:2]), plot.figure(runs[:1], bits_per_byte=True)):
        assert titles(fig)[0] == "validation, bits per byte" and fig.axes[0].get_yscale() == "log"
        low, high = fig.axes[0].get_ylim()
        assert low < 2.0 and high > 3.0
        assert {label for label in drawn(fig.axes[0]) if label[0] != "_"} == {"val_bits_per_byte"}
    assert [t.get_text() for t in plot.figure(runs[:2]).legends[0].texts] == ["mine", "other"]
    for asked, some in ((None, runs), (False, runs[:2])):  # one of the first knows none
        assert (
            titles(plot.figure(some, bits_per_byte=asked))[0] == "loss (vocabularies of 1,024 and 4,096 do not compare)"
        )
    with pytest.raises(ValueError, match="^run 'log124M' has no bits per byte: it was not validated"):
        plot.figure(runs, bits_per_byte=True)
    runs[0].vocab_size = None
    with pytest.raises(ValueError, match="^baseline 124M is a loss in nats per token"):
        plot.figure(runs[:1], bits_per_byte=True, baselines=["124M"])


def test_tokens(log: Path, run_dir: Path) -> None:
    run = plot.read_run(run_dir)
    fig = plot.figure([run], x="tokens")
    assert max(fig.axes[0].get_lines()[0].get_xdata()) == 19 * 512
    with pytest.raises(ValueError, match="log124M.*tokens_per_step"):
        plot.figure([plot.read_run(log)], x="tokens")
    with open(run_dir / "config.toml", "a") as file:
        file.write("first_batch_size = 128\nbatch_warmup_steps = 6\n")
    fig = plot.figure([plot.read_run(run_dir)], x="tokens")
    assert max(fig.axes[0].get_lines()[0].get_xdata()) == 13 * 512 + 2 * (128 + 256 + 384)
    fig = plot.figure([plot.read_run(log), run], x="tokens", tokens_per_step=10)
    assert max(fig.axes[0].get_lines()[0].get_xdata()) == 20


@pytest.mark.parametrize("window", [1, 2, 3, 50])
def test_smooth(window: int) -> None:
    values = np.arange(20.0) ** 2
    smoothed = plot.smooth(values, window)
    reach = window // 2
    expected = [values[i - min(i, reach) : i + min(i, reach) + 1].mean() for i in range(20)]
    np.testing.assert_allclose(smoothed, expected)
    np.testing.assert_allclose(plot.smooth(np.full(9, 3.0), window), 3.0)
    gap = np.array([1.0, 1.0, np.nan, np.inf, 1.0, 1.0])
    assert window == 1 or window == 2 or np.all(plot.smooth(gap, max(window, 5)) == 1.0)


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
