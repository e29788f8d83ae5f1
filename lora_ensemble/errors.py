"""The exception for what a user can put right, the one for a user who has seen enough, and a parser that raises it."""

from __future__ import annotations

import argparse
from typing import NoReturn


class UserError(Exception):
    """A mistake in the user's input, told in one line: where, what was found, what was expected, what to do.

    The command lines print it after ``error:`` and leave with exit code 2; from Python it is an ordinary exception.
    """


class Interrupted(BaseException):
    """A signal told training to end, and it has ended. Like ``KeyboardInterrupt``, it is for nobody but the program.

    ``number``: the signal's; the exit code is 128 more, as a shell has it.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


def one_line(e: BaseException) -> str:
    """What an exception of another library says, for an error of ours."""
    return " ".join(str(e).split())[:300]


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a ``UserError``, where argparse prints its usage and exits."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")
