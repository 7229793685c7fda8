"""`llmc generate`: prompts from anywhere, texts that end it, and what is wrong being said before any text."""

from __future__ import annotations

import io
import os
import select
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import llmc
from llmc import cli
from llmc.commands.generate import before_stop, read_prompt
from llmc.data.tokenizer import Tokenizer

TEXT = "one two\n\nthree two four"


@pytest.mark.parametrize(
    ("stops", "left"),
    [
        (["two"], "one "),
        (["\n\n"], "one two"),
        (["two f", "ee"], "one two\n\nthr"),
        (["three t", "thr"], "one two\n\n"),  # of stops that begin together the one that is complete first
        (["e t", "two\n"], "on"),
        (["ne two\n", "tw"], "one "),  # complete before the longer one, which begins earlier
        (["four!", "wo fourx"], TEXT),
        (["r", "four"], "one two\n\nth"),
        ([], TEXT),
    ],
)
def test_text_ends_before_a_stop_wherever_tokens_are_cut(stops: list[str], left: str) -> None:
    for size in (1, 2, 3, 5, 100):
        pieces = [TEXT[i : i + size] for i in range(0, len(TEXT), size)]
        assert "".join(before_stop(pieces, stops)) == left


def test_no_more_is_held_back_than_may_be_a_stop() -> None:
    assert [p for p in before_stop("abxaby!", ["abz", "y?"]) if p] == ["abx", "ab", "y!"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    config = llmc.GPT2Config(num_layers=1, num_heads=2, channels=16, max_seq_len=16, vocab_size=257)
    llmc.GPT2(config).save(folder / "model.bin")
    Tokenizer.byte_level().save(folder / "tokenizer.bin")
    return str(folder / "model.bin")


@pytest.mark.parametrize("raw", [b"two\nlines\n", b"two\r\nlines\r\n", b"\xef\xbb\xbftwo\nlines", b"two\nlines"])
def test_prompt_file(model: str, tmp_path: Path, raw: bytes, monkeypatch, capsys) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(raw)
    assert read_prompt(str(path)) == "two\nlines"
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(raw)))
    for argv in (["--prompt-file", "-"], ["--prompt-file", str(path), "--samples", "1"], ["--", "two\nlines"]):
        assert cli.main(["generate", model, "-n", "4", *argv]) == 0
    first, second, third = capsys.readouterr().out.split("two\nlines")[1:]
    assert first == second == third


def test_text_cannot_steer_a_terminal(model: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(Tokenizer, "stream", lambda self, tokens: iter(["a\x1b[2J", "b\r", "\nc"]))
    for terminal, text in ((False, "a\x1b[2Jb\r\nc"), (True, "a\ufffd[2Jb\nc")):
        monkeypatch.setattr("sys.stdout.isatty", lambda terminal=terminal: terminal)
        assert cli.main(["generate", model, "-n", "1"]) == 0
        assert cli.main(["generate", model, "-n", "1", "--samples", "2"]) == 0
        assert capsys.readouterr().out == f"{text}\n" + 2 * f"{text}\n---\n"


def test_stop_texts(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", model, "ab", "-n", "30", "--temperature", "0", "--past-eot"]
    assert cli.main(argv) == 0
    whole = capsys.readouterr().out.removesuffix("\n")
    stop = whole[8:10]
    expected = "ab" + whole[2 : whole.index(stop, 2)]
    assert cli.main([*argv, "--stop", "no such text", "--stop", stop]) == 0
    assert capsys.readouterr().out == f"{expected}\n"
    assert cli.main([*argv, "--stop", stop, "--samples", "2"]) == 0
    assert capsys.readouterr().out == 2 * f"{expected}\n---\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--temperature", "nan"], "temperature is nan, expected 0"),
        (["--temperature", "-1"], "temperature is -1.0, expected 0"),
        (["--top-p", "2"], "top_p is 2.0, expected above 0"),
        (["--top-p", "0"], "top_p is 0.0, expected above 0"),
        (["--top-p", "1e-320"], "top_p is 1e-320, expected above 0"),
        (["--top-k", "-1"], "top_k is -1"),
        (["--top-k", str(2**70)], "top_k is 1180591620717411303424, expected 0 to"),
        (["--seed", "0"], "seed is 0, expected 1 to 2^64 - 1"),
        (["--seed", str(2**64)], "expected 1 to 2^64 - 1"),
        (["--stop", ""], "--stop: the text is empty"),
        (["--prompt-file", "absent"], "absent: No such file"),
        (["--tokenizer", "absent"], "absent"),
    ],
)
def test_nothing_is_printed_before_an_error(model: str, argv: list[str], message: str, capsys) -> None:
    prompt = [] if "--prompt-file" in argv else ["hello"]
    assert cli.main(["generate", model, *prompt, *argv]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and message in shown.err and len(shown.err.splitlines()) == 1


# ---- turn by turn ----


def test_a_session_is_one_text_whose_cache_is_kept(model: str) -> None:
    """What comes in a turn is what comes after the whole text, also after a turn that was left, a stop token, and a full cache."""
    net = llmc.GPT2.from_checkpoint(model)
    session = net.session(temperature=0.0)
    with pytest.raises(ValueError, match="the text is empty"):
        session.stream([], 3)
    with pytest.raises(ValueError, match="token 257 is outside of the vocabulary of 257"):
        session.stream([1, 257], 3)
    text: list[int] = []
    for prompt, count in (([97, 98], 3), ([99], 2), ([], 2), ([100], 1)):
        text += prompt
        expected = net.generate(text, count, temperature=0.0)
        assert list(session.stream(prompt, count)) == expected
        text += expected
        assert session.tokens == text and session.forgotten == 0
    left = session.stream([101], 9)
    text += [101, next(left), next(left)]
    left.close()
    assert session.tokens == text and len(text) == 15
    assert list(session.stream([], 1)) == net.generate(text, 1, temperature=0.0) and session.forgotten == 0
    text = session.tokens
    assert list(session.stream([102], 6)) == net.generate(text[-7:] + [102], 6, temperature=0.0)  # half of 16 are kept
    assert session.forgotten == 9
    session.clear()
    assert session.tokens == [] and session.forgotten == 0
    new = net.generate([97], 3, temperature=0.0)
    stopped = net.session(temperature=0.0, stop_token=new[2])
    assert list(stopped.stream([97], 9)) == new[: new.index(new[2])]
    text = [97, *new[: new.index(new[2]) + 1]]
    assert stopped.tokens == text  # with the stop token
    assert list(stopped.stream([98], 1)) == net.generate([*text, 98], 1, temperature=0.0, stop_token=new[2])


def interactive(model: str, typed: str, *argv: str) -> list[str]:
    """Return what comes after each line that is typed into a pipe."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(typed.encode()), isatty=lambda: False))
        patch.setattr("sys.stdout", io.StringIO())
        assert cli.main(["generate", model, "-i", "-n", "5", "--temperature", "0", "--past-eot", *argv]) == 0
        *turns, rest = sys.stdout.getvalue().split("---\n")  # type: ignore[attr-defined]
    assert rest == ""
    return turns


def test_interactive_in_a_pipe(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A line is appended to the text, on a line of its own; an empty one appends nothing; /reset begins anew."""
    net, tokenizer = llmc.GPT2.from_checkpoint(model), Tokenizer.byte_level()
    first, second, third, again = interactive(model, "ab\r\n\nc\n/reset\nab")
    session = net.session(temperature=0.0)
    for prompt, shown in (("ab", first), ("", second), ("\nc", third)):
        new = "".join(tokenizer.stream(session.stream(tokenizer.encode(prompt), 5)))
        assert shown == new + "\n"
    assert again == first and interactive(model, "", "ab") == ["ab" + first]
    assert "(the model sees only the last " in capsys.readouterr().err  # 16 positions
    (whole,) = interactive(model, "ab\n", "-n", "30")
    stop = whole[6:8]
    assert interactive(model, "ab\n", "-n", "30", "--stop", stop) == [whole[: whole.index(stop)] + "\n"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--samples", "2"], "--samples 2: --interactive continues one text"),
        (["--prompt-file", "-"], "--prompt-file -: with --interactive"),
    ],
)
def test_what_interactive_refuses(model: str, argv: list[str], message: str, capsys) -> None:
    assert cli.main(["generate", model, "--interactive", *argv]) == 2
    assert message in capsys.readouterr().err


def test_interactive_in_a_terminal(model: str) -> None:
    """Ctrl-C stops a continuation, and at the prompt only says what ends; Ctrl-D ends."""
    pty = pytest.importorskip("pty", reason="pseudo-terminals are of POSIX")
    pid, terminal = pty.fork()
    if pid == 0:
        # A program in a shell's background ignores it, and so would this one.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.execv(sys.executable, [sys.executable, "-m", "llmc", "generate", model, "-i", "-n", "1000000", "--past-eot"])
    shown = b""

    def read_more() -> None:
        nonlocal shown
        assert select.select([terminal], [], [], 60)[0], shown
        shown += os.read(terminal, 10000)

    def wait_for(what: bytes) -> None:
        nonlocal shown
        while what not in shown:
            read_more()
        shown = shown[shown.index(what) + len(what) :]

    wait_for(b"Ctrl-D: end.")
    wait_for(b"> ")
    for _ in range(2):
        os.write(terminal, b"ab\n")
        wait_for(b"ab\r\n")
        while len(shown) < 200:
            read_more()
        os.write(terminal, b"\x03")
        wait_for(b"\r\n(the model sees only the last ")
        wait_for(b"> ")
    # Between showing its prompt and waiting, Python's input() hears of a signal only with the next key.
    for _ in range(60):
        os.write(terminal, b"\x03")
        if select.select([terminal], [], [], 1)[0]:
            break
    wait_for(b"(Ctrl-D: end)")
    wait_for(b"> ")
    os.write(terminal, b"\x04")
    assert os.waitpid(pid, 0)[1] == 0
    os.close(terminal)


def test_two_prompts_and_a_prompt_that_is_no_text(model: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "p").write_bytes(b"a\xff")
    for argv, message in ((["text"], "both given"), ([], "not UTF-8 (invalid start byte at byte 1)")):
        assert cli.main(["generate", model, *argv, "--prompt-file", str(tmp_path / "p")]) == 2
        assert message in capsys.readouterr().err
