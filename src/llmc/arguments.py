"""The command lines of llmc: argparse's options, among which the arguments without a name may stand anywhere."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from llmc.values import did_you_mean

# -n5: a one-letter option with its number. Letters would be ambiguous: -zz is no -z.
_NUMBER_ATTACHED = re.compile(r"(-[A-Za-z])([-+]?\.?\d\S*)")
_LOOKS_LIKE_AN_OPTION = re.compile(r"--?[A-Za-z]\S*")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that first puts a command line into an order which every Python's argparse reads alike.

    - An option is one of the parser's, letter by letter: no beginnings, and `-zz 1` is not `-z z`. It may be `--name VALUE`,
      `--name=VALUE`, or, of one letter with a number, `-n5`.
    - What follows an option is its value, also if it begins with a dash, unless it is one of the parser's options.
    - An option of several values takes all up to the next option. If arguments without a name are missing in the end, its last ones
      are they.
    - All else is an argument without a name: a text that begins with a dash too, if it has a blank or no letter after the dash. Behind
      `--` everything is.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the arguments, which must all be known: as of ArgumentParser.parse_known_args()."""
        return super().parse_known_args(self._ordered(sys.argv[1:] if args is None else list(args)), namespace)

    def error(self, message: str) -> NoReturn:
        """End the program with one line; argparse's own has all options before it."""
        self.exit(2, f"{self.prog}: error: {message} (--help shows what there is)\n")

    def _ordered(self, argv: Sequence[str]) -> list[str]:
        """Return options with their values, joined by "=", and then "--" and the arguments without a name."""
        options: list[tuple[str, list[str]]] = []
        nameless: list[str] = []
        left = list(argv)
        named = self._option_string_actions
        positionals = [a for a in self._actions if not a.option_strings]
        while left:
            text = left.pop(0)
            name, equals, value = text.partition("=")
            attached = _NUMBER_ATTACHED.fullmatch(text)
            if text == "--":
                nameless += left
                break
            if text not in named and equals and name in named:
                options.append((name, [value]))
            elif text in named:
                options.append((text, list(self._values(named[text], left))))
            elif attached and attached[1] in named:
                options.append((attached[1], [attached[2]]))
            elif _LOOKS_LIKE_AN_OPTION.fullmatch(text):
                self.error(f"unrecognized arguments: {text}{did_you_mean(name, self._option_string_actions)}")
            elif any(a.nargs == argparse.PARSER for a in positionals):  # the rest is that parser's
                return [*_joined(options), text, *left]
            else:
                nameless.append(text)
        needed = sum(a.nargs in (None, argparse.ONE_OR_MORE) for a in positionals)
        for _, values in reversed(options):
            while len(nameless) < needed and len(values) > 1:
                nameless.append(values.pop())
        if nameless and not positionals:
            is_data = "--data" in named and os.path.exists(nameless[0])
            hint = f"; did you mean --data {nameless[0]}?" if is_data else ""
            self.error(f"unrecognized arguments: {' '.join(nameless)}{hint}")
        return [*_joined(options), *(["--"] if nameless else []), *nameless]

    def _values(self, action: argparse.Action, left: list[str]) -> Iterator[str]:
        """Take the values of an option from the arguments that follow it."""
        if action.nargs == 0:
            return
        while left and left[0] != "--" and left[0].partition("=")[0] not in self._option_string_actions:
            if action.nargs is not None and _LOOKS_LIKE_AN_OPTION.fullmatch(left[0]):
                return
            yield left.pop(0)
            if action.nargs != argparse.ONE_OR_MORE:
                return

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Check that an argument is one of its choices: as of ArgumentParser._check_value(), with the nearest one."""
        if action.choices is None or value in action.choices:
            return
        choices = [str(choice) for choice in action.choices]
        near = did_you_mean(str(value), choices)
        raise argparse.ArgumentError(action, f"invalid choice: '{value}', expected one of {', '.join(choices)}{near}")


def _joined(options: Sequence[tuple[str, list[str]]]) -> list[str]:
    return [text for name, values in options for text in ([f"{name}={v}" for v in values] or [name])]


def whole(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """Return the type of an option that takes whole numbers from least to most."""

    def read(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{value}, expected {least} to {most}")
        return value

    read.__name__ = "int"  # in argparse's messages
    return read


def above_zero(text: str) -> float:
    """Return the number that an option's text says: above 0 and finite."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{value}, expected a number above 0")
    return value


above_zero.__name__ = "float"
threads = whole(0, 1024)
