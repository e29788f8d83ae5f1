"""A command line whose mistakes are one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from lora_ensemble.errors import UserError

ANY_BASE = "take the base model of this name that is here, though it be another than in training"


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a ``UserError``, where argparse prints its usage and exits."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")
