"""Flags of the commands: unknown ones are told with those near them."""

import argparse
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` without abbreviations whose errors name the flags near a misspelt one."""

    def __init__(self, prog: str, **kwargs: Any):
        super().__init__(prog=prog, allow_abbrev=False, **kwargs)
        self.given: list[str] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        super().error(message + "".join(f"; {hint}" for hint in self.hints()))

    def hints(self) -> list[str]:
        """For every flag that this parser does not know, those that look like it."""
        known = [flag for action in self._actions for flag in action.option_strings]
        out = []
        for flag in (text.partition("=")[0] for text in self.given if text.startswith("--")):
            near = get_close_matches(flag, known, n=2)
            if flag not in known and near:
                out.append(f"{flag}: did you mean {' or '.join(near)}?")
        return out


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: give at least 1")
    return value


def not_negative(text: str) -> int:
    """A whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text}: give at least 0")
    return value


def whole_numbers(text: str) -> tuple[int, ...]:
    """`0,3` as numbers."""
    try:
        return tuple(not_negative(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: give whole numbers such as 0,3") from error


class Meter:
    """Progress of a loop on stderr: one line rewritten on a terminal, otherwise every tenth."""

    def __init__(self, name: str):
        self.name, self.told = name, -1

    def __call__(self, done: int, total: int) -> None:
        line, live = f"{self.name} {done}/{total}", sys.stderr.isatty()
        tenth = 10 * done // total
        if live:
            print(f"\r{line}", end="\n" if done == total else "", file=sys.stderr, flush=True)
        elif tenth > self.told:
            print(line, file=sys.stderr, flush=True)
        self.told = tenth


def argv_or(argv: Sequence[str] | None) -> list[str]:
    """The arguments of a `main`: its own, or the program's."""
    return list(sys.argv[1:] if argv is None else argv)
