"""How command lines are read: by the parsers alone, so the same table holds on every Python."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from llmc.arguments import Parser
from llmc.cli import COMMANDS, main, parser_of
from llmc.commands.train import parse

# A command, a command line, and what it means. The arguments without a name stand before, among and behind the options.
SAME: list[tuple[str, dict[str, Any], list[str]]] = [
    (
        "generate",
        {"run": "RUN", "prompt": "Hello there", "max_tokens": 5},
        ["RUN|Hello there|-n 5", "RUN|-n 5|Hello there", "-n 5|RUN|Hello there", "-n5|RUN|--|Hello there", "RUN|-n=5|Hello there"],
    ),
    ("generate", {"run": "RUN", "prompt": "", "stats": True}, ["RUN|--stats", "--stats|RUN"]),
    ("eval", {"checkpoint": "RUN", "data": ["a", "b"]}, ["RUN|-j a|b", "-j a|b|--|RUN", "-j a|b|RUN", "-j a|-j b|RUN"]),
    ("eval", {"checkpoint": "RUN", "data": ["a"], "limit": 3}, ["-j a|RUN|--limit 3", "--limit 3|-j a|--|RUN", "-j a|--limit 3|RUN"]),
    ("plot", {"runs": ["A", "B"], "x": "tokens"}, ["A|B|--x tokens", "A|--x tokens|B", "--x tokens|A|B", "A|--x=tokens|--|B"]),
    ("watch", {"run": "RUN", "once": True}, ["RUN|--once", "--once|RUN", "--once|--|RUN"]),
    ("sweep", {"file": "s.toml", "dry_run": True}, ["s.toml|--dry-run", "--dry-run|s.toml"]),
    ("export", {"checkpoint": "RUN", "output": "hf", "dtype": "bf16"}, ["RUN|--dtype bf16|hf", "--dtype bf16|RUN|hf"]),
    ("import", {"source": "gpt2", "output": "o.bin", "dtype": "bf16"}, ["gpt2|--dtype bf16|o.bin", "--dtype=bf16|gpt2|o.bin"]),
    (
        "data",
        {"name": "text", "files": ["a", "b"], "output": "d"},
        ["text|a|b|-o d", "text|a|-o d|b", "text|-o d|a|b", "text|a|-o d|--|b"],
    ),
    (
        "data",
        {"name": "text", "files": ["a"], "val_files": ["v"], "debug": True},
        ["text|a|--val-files v|--debug", "text|--val-files v|a|--debug", "--debug|text|--val-files v|--|a"],
    ),
]  # fmt: skip


def meant(command: str, argv: list[str]) -> dict[str, Any]:
    return vars(parser_of(command, f"llmc {command}").parse_args(argv))


def words(line: str) -> list[str]:
    """Return the arguments of a line in which "|" stands between arguments, and a blank behind an option."""
    return [w for part in line.split("|") for w in (part.split(" ", 1) if part.startswith("-") else [part])]


@pytest.mark.parametrize(("command", "meaning", "line"), [(c, m, line) for c, m, lines in SAME for line in lines])
def test_arguments_without_a_name_stand_anywhere(command: str, meaning: dict[str, Any], line: str) -> None:
    found = meant(command, words(line))
    assert {name: found[name] for name in meaning} == meaning


@pytest.mark.parametrize(
    "prompt", ["- a list", "-5 degrees", "--help me", "-", "-5", "-n is a letter", "—dash", "", "a=b"]
)
def test_a_prompt_may_begin_with_a_dash(prompt: str) -> None:
    for argv in (["RUN", prompt, "-n", "5"], ["-n", "5", "RUN", prompt], ["RUN", "-n", "5", "--", prompt]):
        found = meant("generate", argv)
        assert (found["run"], found["prompt"], found["max_tokens"]) == ("RUN", prompt, 5)


@pytest.mark.parametrize("prompt", ["--help", "-n", "--stats", "-x", "--no-such-thing", "-- x"])
def test_behind_two_dashes_everything_is_text(prompt: str) -> None:
    for argv in (["RUN", "-n", "5", "--", prompt], ["-n", "5", "--", "RUN", prompt]):
        found = meant("generate", argv)
        assert (found["run"], found["prompt"], found["max_tokens"]) == ("RUN", prompt, 5)


def test_a_value_may_begin_with_a_dash() -> None:
    assert meant("generate", ["RUN", "--temperature", "-inf", "--tokenizer", "-odd"])["tokenizer"] == "-odd"
    assert parse(["-e", "d12", "--prompt", "- a list", "-x", "-1", "-m", "-1"]).prompt == "- a list"
    assert parse(["-e", "d12", "--prompt=--help", "-i", "- a.txt", "-5"]).data == ("- a.txt", "-5")


@pytest.mark.parametrize(
    ("command", "argv", "message"),
    [
        ("train", ["-zz", "1"], "llmc train: error: unrecognized arguments: -zz; did you mean -z?"),
        ("train", ["-z1", "-od"], "unrecognized arguments: -od"),
        ("train", ["-pnx", "2"], "unrecognized arguments: -pnx; did you mean -pn?"),
        ("train", ["--learning-rat", "1"], "unrecognized arguments: --learning-rat; did you mean --learning-rate?"),
        ("train", ["--leraning-rate=1"], "unrecognized arguments: --leraning-rate=1; did you mean --learning-rate?"),
        *(("train", [n, "3"], f"{n}; did you mean --batch-size?") for n in ("--batchsize", "--batch_size", "-batch-size", "--Batch-Size")),
        ("train", ["--lr", "1"], "--lr; did you mean --learning-rate"),
        ("train", ["--steps", "1"], "--steps; did you mean --batch-warmup-steps or --m"),
        ("train", ["-Z", "1"], "unrecognized arguments: -Z (--help"),
        ("train", ["--schedule", "cos"], "'cos', expected one of cosine, linear, constant, wsd; did you mean cosine?"),
        ("train", ["."], "unrecognized arguments: .; did you mean --data .?"),
        ("train", ["stray", "--resume"], "llmc train: error: unrecognized arguments: stray"),
        ("generate", ["RUN", "Once", "upon"], "llmc generate: error: unrecognized arguments: upon"),
        ("generate", ["RUN", "--temp", "1"], "unrecognized arguments: --temp"),
        ("generate", ["RUN", "-n", "--stats"], "argument -n/--max-tokens: expected one argument"),
        ("generate", ["RUN", "-n", ""], "invalid int value: ''"),
        ("generate", ["RUN", "--stats=1"], "ignored explicit argument '1'"),
        ("generate", [], "the following arguments are required: RUN"),
        ("eval", ["-j", "a"], "the following arguments are required: CHECKPOINT"),
        ("eval", ["RUN", "-j"], "expected at least one argument"),
        ("data", ["text", "a", "--colunm", "x"], "llmc data text: error: unrecognized arguments: --colunm; did you mean --column?"),
        ("data", ["tinystories", "-tks", "x"], "llmc data tinystories: error: unrecognized arguments: -tks; did you mean -tk?"),
        ("data", ["-o", "d", "text", "a"], "llmc data: error: unrecognized arguments: -o"),
        ("data", ["txet"], "invalid choice: 'txet', expected one of tinyshakespeare, "),
        ("data", ["tinystory"], "; did you mean tinystories?"),
        ("data", [], "the following arguments are required: NAME"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(
    capsys: pytest.CaptureFixture[str], command: str, argv: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        meant(command, argv)
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "meant"), [("trian", "train"), ("Train", "train"), ("generat", "generate"), ("fly", "")]
)
def test_a_command_that_there_is_not(capsys: pytest.CaptureFixture[str], name: str, meant: str) -> None:
    with pytest.raises(SystemExit):
        main([name])
    said = capsys.readouterr().err
    assert f"invalid choice: '{name}', expected one of train, " in said
    assert (f"did you mean {meant}?" in said) == bool(meant) == ("did you mean" in said)


def options_of(parser: argparse.ArgumentParser) -> list[tuple[argparse.ArgumentParser, str]]:
    found = [(parser, o) for a in parser._actions for o in a.option_strings]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [pair for sub in action.choices.values() for pair in options_of(sub)]
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_an_option_is_read_letter_by_letter(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No beginning of a long option is it, nor a short option with letters attached."""
    for parser, option in options_of(parser_of(command, command)):
        known = parser._option_string_actions
        for other in (option[:-1], option + "zz") if option.startswith("--") else (option + "zz",):
            if len(other) > 2 and other not in known:
                with pytest.raises(SystemExit):
                    parser.parse_args([other])
                assert f"unrecognized arguments: {other}" in capsys.readouterr().err


def test_help_of_a_command_and_of_its_parts(capsys: pytest.CaptureFixture[str]) -> None:
    for command, argv, usage in (
        ("generate", ["RUN", "--help"], "usage: llmc generate"),
        ("data", ["--help"], "usage: llmc data"),
        ("data", ["text", "a", "--help"], "usage: llmc data text"),
        *((name, ["-h"], f"usage: llmc {name}") for name in COMMANDS),
    ):
        with pytest.raises(SystemExit) as ended:
            meant(command, argv)
        assert ended.value.code == 0 and usage in capsys.readouterr().out
    assert isinstance(parser_of("info", "llmc info"), Parser)


@pytest.mark.parametrize(
    ("command", "argv", "message"),
    [
        ("check", ["--threads", "-1"], "argument --threads: -1, expected 0 to 1024"),
        ("generate", ["RUN", "--threads", "1025"], "argument --threads: 1025, expected 0 to 1024"),
        ("generate", ["RUN", "-n", "-1"], "argument -n/--max-tokens: -1, expected 0 to 2147483647"),
        ("generate", ["RUN", "--samples", "0"], "argument --samples: 0, expected 1 to"),
        ("eval", ["RUN", "-b", "0"], "argument -b/--batch-size: 0, expected 1 to"),
        ("eval", ["RUN", "-t", str(2**70)], f"argument -t/--seq-len: {2**70}, expected 1 to"),
        ("eval", ["RUN", "--limit", "0"], "argument --limit: 0, expected 1 to"),
        ("plot", ["RUN", "--smooth", "0"], "argument --smooth: 0, expected 1 to"),
        ("watch", ["RUN", "--interval", "nan"], "argument --interval: nan, expected a number above 0"),
        ("export", ["RUN", "F", "--max-shard-size", "-inf"], "-inf, expected a number above 0"),
        ("data", ["text", "F", "--workers", "-1"], "argument --workers: -1, expected 0 to 1024"),
        ("data", ["text", "F", "-s", "0"], "argument -s/--shard-size: 0, expected 2 to"),
        ("data", ["fineweb", "-n", "0"], "argument -n/--shards: 0, expected 1 to"),
    ],
)
def test_numbers_have_bounds(capsys: pytest.CaptureFixture[str], command: str, argv: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as ended:
        meant(command, argv)
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag", ["--layers", "--batch-size", "--threads", "--max-steps", "--classifier-rows", "-d", "-g"]
)
def test_settings_are_numbers_that_the_kernels_can_count(flag: str) -> None:
    with pytest.raises(ValueError, match=f"is {2**70}, expected .* to 2147483647"):
        parse([flag, str(2**70)])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_takes_or_refuses_strange_values_in_words(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """No option's type raises anything but what argparse puts into words."""
    for parser, option in options_of(parser_of(command, command)):
        action = parser._option_string_actions[option]
        for value in ("-1", "0", "nan", "inf", str(2**70), "", "1e400"):
            if action.type is not None and action.nargs != "?":
                try:
                    parser.parse_args([f"{option}={value}", *(["x"] * 9)])
                except SystemExit as ended:
                    assert ended.code == 2 and "error: " in capsys.readouterr().err
