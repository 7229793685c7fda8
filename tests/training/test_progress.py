"""What a run shows as it goes: llm.c's lines, brief lines, a bar in terminals of several widths and in a notebook; `llmc watch`."""

from __future__ import annotations

import io
import json
import math
import os
import re
import signal
import struct
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runs import tiny_run

from llmc.cli import main
from llmc.system.signals import signal_name
from llmc.training.logs import BarConsole, BriefConsole, LineConsole, Log, StepInfo, bar_format, shows_bar, step_line


def info(**changes: Any) -> StepInfo:
    # fmt: off
    values: dict[str, Any] = {
        "step": 9, "total_steps": 40, "loss": 4.123456, "norm": 1.5, "lr": 3e-4, "loss_z": math.nan, "grad_z": -0.5,
        "seconds": 0.25, "tokens_per_second": 1000.4, "flops_per_second": 1e11, "mfu": 12.34, "dtype": "bf16",
    }
    # fmt: on
    return StepInfo(**{**values, **changes})


def run_of(
    log: Log, steps: int, validations: dict[int, float], seconds: list[float] | None = None, bits: float | None = None
) -> None:
    """Tell a log of a run that is validated at some of its steps.

    seconds: the clock that the log reads, 2 s a step; bits: per byte of the text, for each nat of a loss.
    """
    log.start(0, steps, "a table", "A model of many parameters")
    for done in range(steps + 1):
        if done in validations:
            log.validation(done, validations[done], None if bits is None else bits * validations[done])
        if done < steps:
            if seconds is not None:
                seconds[0] += 2.0
            log.step(info(step=done, total_steps=steps, loss=5 - 0.01 * done))
    log.text("a message")
    log.finish(2000.0)
    log.text("the last word")
    log.close()


# ---- lines ----


def test_step_line_matches_llm_c() -> None:
    expected = "step   10/40 | loss 4.123456 (+nanz)| norm 1.5000 (-0.50z)| lr 3.00e-04 | 250.00 ms | 12.3% bf16 MFU | 1000 tok/s"
    assert step_line(info()) == expected
    assert "--.-% f32 MFU" in step_line(info(mfu=None, dtype="f32"))


def test_lines_have_llm_c_s_last_line() -> None:
    out = io.StringIO()
    run_of(LineConsole(out), 2, {})
    lines = out.getvalue().splitlines()
    assert lines[0] == "a table" and lines[-2:] == ["total average iteration time: 2000.000000 ms", "the last word"]


def test_lines_survive_a_console_without_the_characters() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    LineConsole(out).text("Käse \u6f22")
    out.flush()
    assert raw.getvalue().strip() == b"K?se ?"


def test_a_sample_cannot_steer_the_terminal() -> None:
    out = io.StringIO()
    LineConsole(out).text("---\na\tb\r\n\x1b[2Jc\x07\x9b\n---")
    assert out.getvalue() == "---\na\tb\n\ufffd[2Jc\ufffd\ufffd\n---\n"


LONG = "a/path/" + "of/many/folders/" * 5 + "run"


def test_the_table_keeps_its_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A long path is shortened in the middle; what is small is not 0 MiB."""
    monkeypatch.chdir(tmp_path)
    tiny_run(tmp_path, output_dir=LONG, max_steps=1, progress="lines")
    lines = capsys.readouterr().out.splitlines()
    assert {len(line) for line in lines if line.startswith(("|", "+"))} == {78}
    assert "| output log dir        | a/path/of/many/f...any/folders/of/many/folders/run |" in lines
    memory = next(line for line in lines if line.startswith("memory: "))
    assert re.fullmatch(
        r"memory: parameters \d+ KiB, gradients \d+ KiB, optimizer \d+ KiB, activations \d+ KiB", memory
    )


# ---- brief lines ----


def test_brief_has_a_line_at_each_validation() -> None:
    out, seconds = io.StringIO(), [0.0]
    run_of(BriefConsole(10, out, lambda: seconds[0]), 20, {0: 5.5, 10: 4.95, 20: 4.75}, seconds)
    assert out.getvalue().splitlines() == [
        "A model of many parameters",
        "step  0/20: val loss 5.5000",
        "step 10/20: train loss 4.9100, val loss 4.9500, 1,000 tokens/s, 00:20 left",
        "step 20/20: train loss 4.8100, val loss 4.7500, 1,000 tokens/s, in 00:40",
        "a message",
        "the last word",
    ]


def test_bits_per_byte_beside_a_validation_loss() -> None:
    out = io.StringIO()
    run_of(BriefConsole(10, out, lambda: 0.0), 10, {0: 5.5, 10: 4.5}, bits=0.5)
    lines = out.getvalue().splitlines()
    assert lines[1] == "step  0/10: val loss 5.5000 (2.7500 bits/byte)"
    assert lines[2].startswith("step 10/10: train loss 4.9100, val loss 4.5000 (2.2500 bits/byte), 1,000 tokens/s")
    out = io.StringIO()
    run_of(LineConsole(out), 1, {0: 5.5, 1: 4.5}, bits=0.5)
    assert "val loss 4.500000 | bits per byte 2.250000\n" in out.getvalue()


@pytest.mark.parametrize(
    ("every", "told"), [(8, [8, 16, 24, 32, 40]), (0, range(2, 41, 2)), (-1, range(2, 41, 2)), (50, [40])]
)
def test_brief_without_validation(every: int, told: Sequence[int]) -> None:
    """A line comes after as many steps as there would be between validations; the last step always has one."""
    out = io.StringIO()
    run_of(BriefConsole(every, out), 40, {})
    assert [int(n) for n in re.findall(r"step +(\d+)/40: train loss", out.getvalue())] == list(told)


def test_brief_tells_of_updates_that_were_not_made() -> None:
    out = io.StringIO()
    console = BriefConsole(10, out)
    console.start(0, 40, "", "")
    console.step(info(skipped="loss nan, gradient norm nan"))
    assert out.getvalue() == "step 10/40: update skipped: loss nan, gradient norm nan\n"


# ---- the bar ----


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        (20, ""),
        (40, "loss 4.1235, val 4.5000"),
        (39, "loss 4.1235"),
        (60, "loss 4.1235, val 4.5000, 1,000 tok/s"),
        (79, "loss 4.1235, val 4.5000, 1,000 tok/s, 01:00 left, step 10/40"),
        (119, "loss 4.1235, val 4.5000, 1,000 tok/s, 01:00 left, step 10/40, 100 GFLOP/s (12% of peak), norm 1.50"),
    ],
)
def test_what_matters_fits_first(columns: int, text: str) -> None:
    numbers = [
        *("loss 4.1235", "val 4.5000", "1,000 tok/s", "01:00 left", "step 10/40"),
        *("100 GFLOP/s (12% of peak)", "norm 1.50"),
    ]
    assert bar_format(numbers, columns) == "{percentage:3.0f}%|{bar}| " + text
    assert len(f"100%|{10 * '#'}| {text}") <= max(columns, 20)


@pytest.fixture
def in_terminal() -> Iterator[Callable[..., str]]:
    """A function that lets a BarConsole show a run in a terminal of some columns, and returns what came to the terminal."""
    pty = pytest.importorskip("pty", reason="pseudo-terminals are of POSIX")
    import fcntl
    import termios

    controller, terminal = pty.openpty()

    def show(columns: int, tell: Callable[[BarConsole], None]) -> str:
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        raw = bytearray()

        def read() -> None:
            while not raw.endswith(b"\x04"):
                raw.extend(os.read(controller, 10000))

        reader = threading.Thread(target=read, daemon=True)  # a terminal takes little that nobody reads
        reader.start()
        with open(terminal, "w", encoding="utf-8", closefd=False) as out:
            tell(BarConsole(out))
            out.write("\x04")
        reader.join(10)
        return raw.decode().replace("\r\n", "\n").removesuffix("\x04")

    yield show
    os.close(controller)
    os.close(terminal)


@pytest.mark.parametrize("columns", [0, 80, 120])
def test_bar_in_a_terminal(in_terminal: Callable[..., str], columns: int) -> None:
    """A terminal that does not know its width, 0, is taken for one of 80 columns. The last validation is in the bar's last line."""
    shown = in_terminal(columns, lambda bar: run_of(bar, 20, {0: 5.5, 10: 4.95, 20: 4.75}))
    *above, last, word, _ = shown.split("\n")
    assert word == "the last word" and above[-2].endswith("\rstep 20: val loss 4.7500")
    states = [state.rstrip() for state in re.split("[\r\n]", shown) if "%|" in state]
    assert max(map(len, states)) < (columns or 80)
    bar, numbers = re.fullmatch(r".*\r100%\|(\S+)\| (.*)", last).groups()  # type: ignore[union-attr]
    more = ", 100 GFLOP/s (12% of peak), norm 1.50" if columns == 120 else ""
    assert numbers == f"loss 4.8100, val 4.7500, 1,000 tok/s, in 00:00, step 20/20{more}" and len(bar) >= 10


def test_the_bar_follows_the_terminal_s_width(in_terminal: Callable[..., str]) -> None:
    def tell(bar: BarConsole) -> None:
        import fcntl
        import termios

        bar.start(0, 40, "", "")
        for step, columns in enumerate((200, 40)):
            fcntl.ioctl(bar._out.fileno(), termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
            bar.step(info(step=step))
            bar._bar.refresh()
        bar.close()

    states = in_terminal(80, tell).split("\r")
    assert any(len(state) == 199 and state.endswith("lr 3.00e-04") for state in states)
    assert len(states[-1].strip("\n")) == 39 and states[-1].strip("\n").endswith("| loss 4.1235")


def test_headers_and_messages_break_at_words(in_terminal: Callable[..., str]) -> None:
    """But for messages of several lines, whose layout is their own, and words that are longer than a line."""

    def tell(bar: BarConsole) -> None:
        bar.text("a note about words that do not fit " + LONG)
        bar.text("---\n" + "sample " * 9 + "\n---")

    shown = in_terminal(30, tell)
    assert shown == f"a note about words that do not\n  fit\n  {LONG}\n---\n{'sample ' * 9}\n---\n"


def test_bar_in_a_notebook_without_widgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar is that of a terminal, and nothing warns of what is missing."""
    stream = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})
    monkeypatch.setattr(sys, "stdout", stream())
    assert shows_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_of(BarConsole(), 2, {2: 4.5})
    assert "loss 4.9900, val 4.5000, 1,000 tok/s, in 00:00, step 2/2" in sys.stdout.getvalue()  # type: ignore[attr-defined]


def test_bar_in_a_notebook() -> None:
    for package in ("nbclient", "nbformat", "ipykernel", "ipywidgets"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    import nbclient
    import nbformat

    code = f"import sys; sys.path += {[str(folder) for folder in Path(__file__).parents[:2]]}\n"
    code += "from test_progress import BarConsole, run_of\nrun_of(BarConsole(), 20, {20: 4.75})"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(notebook, timeout=60).execute()
    widgets = notebook.metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"].values()
    texts = [str(widget["state"].get("value")).replace("\u2007", " ") for widget in widgets]
    assert "loss 4.8100, val 4.7500, 1,000 tok/s, in 00:00, step 20/20" in "|".join(texts)


@pytest.mark.parametrize(
    ("variable", "value", "bar"),
    [("TERM", "xterm", True), ("TERM", "dumb", False), ("OMPI_COMM_WORLD_RANK", "0", False)],
)
def test_where_auto_shows_a_bar(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, bar: bool) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("OMPI_COMM_WORLD_RANK", raising=False)
    monkeypatch.setenv(variable, value)
    assert not shows_bar()  # a file
    monkeypatch.setattr(out, "isatty", lambda: True)
    assert shows_bar() == bar


# ---- llmc watch ----


def rows_of_a_run(folder: Path, *last: dict[str, Any], start: bool = True, bits: bool = False) -> str:
    """Write the run directory of a run of 4 steps and a day each, and return its path."""
    when = time.mktime((2026, 11, 20, 12, 0, 0, 0, 0, -1))
    step = {k: v for k, v in vars(info(seconds=86400.0)).items() if k not in ("total_steps", "dtype")}
    rows = [{"kind": "start", "step": 0, "total_steps": 4}] if start else []
    rows += [{"kind": "validation", "step": 0, "loss": 5.5}]
    rows += [{"kind": "train", **step, "step": i, "mfu": None, "loss_z": None, "grad_z": "nan"} for i in range(4)]
    known = {"bits_per_byte": 2.25} if bits else {}
    rows += [{"kind": "validation", "step": 4, "loss": 4.5, **known}, {"kind": "message", "text": "a\nsample"}, *last]
    lines = [json.dumps({"time": when + 86400 * int(row.get("step", 4)), **row}) + "\n" for row in rows]
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "config.toml").write_text("max_steps = -1\nval_every = 2\n")
    return str(folder)


BRIEF = [
    "step 0/4: val loss 5.5000",
    "step 2/4: train loss 4.1235, 1,000 tokens/s, 48:00:00 left",
    "step 4/4: train loss 4.1235, val loss 4.5000, 1,000 tokens/s, in 96:00:00",
    *("a", "sample"),
]


@pytest.mark.parametrize("options", [[], ["--once"]])
def test_watch_says_that_a_run_has_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    """It returns, its lines are whole, and times and speed are those of the run."""
    assert main(["watch", rows_of_a_run(tmp_path / "run", {"kind": "end"}), *options]) == 0
    out, error = capsys.readouterr()
    assert out.splitlines() == [*BRIEF, "the run ended on 2026-11-24 12:00 after step 4 of 4"] and not error


@pytest.mark.parametrize("options", [["--interval", "0.01"], ["--once"]])
def test_watch_returns_from_a_run_that_was_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    assert main(["watch", rows_of_a_run(tmp_path / "run"), *options]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "no process trains here any more: the run broke off on 2026-11-24 12:00 after step 4 of 4"


@pytest.mark.parametrize("start", [True, False])
def test_watch_in_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], start: bool
) -> None:
    """The bar has the run's speed, also of a run from before its rows told how many steps it has."""
    monkeypatch.setattr("llmc.commands.watch.shows_bar", lambda: True)
    assert main(["watch", rows_of_a_run(tmp_path / "run", {"kind": "end"}, start=start)]) == 0
    *_, bar, last, _ = capsys.readouterr().out.split("\n")
    bar = bar.split("\r")[-1].rstrip()
    if start:
        assert re.fullmatch(r"100%\|\S+\| loss 4.1235, val 4.5000, 1,000 tok/s, in 96:00:00, step 4/4", bar)
        assert last.endswith("after step 4 of 4")
    else:
        assert bar.startswith("loss 4.1235, val 4.5000, 1,000 tok/s, ") and last.endswith("after step 4")


def test_watch_shows_bits_per_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = rows_of_a_run(tmp_path / "run", {"kind": "end"}, bits=True)
    assert main(["watch", path]) == 0
    assert "val loss 4.5000 (2.2500 bits/byte), 1,000 tokens/s" in capsys.readouterr().out
    monkeypatch.setattr("llmc.commands.watch.shows_bar", lambda: True)
    monkeypatch.setattr("llmc.training.logs._columns", lambda out: 110)
    assert main(["watch", path]) == 0
    out = capsys.readouterr().out
    assert "step 4: val loss 4.5000 (2.2500 bits/byte)\n" in out
    assert "| loss 4.1235, val 4.5000, 1,000 tok/s, in 96:00:00, 2.250 bits/byte, step 4/4" in out


def test_watch_of_a_run_that_was_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bar keeps its numbers if the run goes on from its last step, and has the new number of steps."""
    monkeypatch.setattr("llmc.commands.watch.shows_bar", lambda: True)
    again = [{"kind": "end"}, {"kind": "start", "step": 4, "total_steps": 8}, {"kind": "end"}]
    assert main(["watch", rows_of_a_run(tmp_path / "run", *again)]) == 0
    assert re.search(
        r"\r 50%\|\S+ +\| loss 4.1235, val 4.5000, 1,000 tok/s, step 4/8, 100 GFLOP/s *\n", capsys.readouterr().out
    )


def test_names_of_signals() -> None:
    assert (signal_name(signal.SIGINT), signal_name(signal.SIGTERM), signal_name(61)) == (
        "Ctrl-C",
        "SIGTERM",
        "signal 61",
    )


@pytest.mark.parametrize("progress", ["auto", "bar", "lines"])
def test_a_program_without_stdout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progress: str) -> None:
    """pythonw has none, nor has a service, or a command whose shell closed it."""
    monkeypatch.setattr(sys, "stdout", None)
    assert tiny_run(tmp_path, progress=progress).step == 8
    assert main(["info"]) == 0


def test_a_program_with_a_stdout_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=written.append, flush=lambda: None))
    assert tiny_run(tmp_path, progress="auto").step == 8
    assert "step 8/8: train loss" in "".join(written)
