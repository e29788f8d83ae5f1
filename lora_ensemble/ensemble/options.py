"""What the commands are asked that let an ensemble answer."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_ensemble.ensemble.restored import Ensemble


ANY_BASE = "take the base model of this name that is here, though it be another than in training"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which ensemble answers, and how."""
    add = parser.add_argument
    add("--ensemble", type=Path, required=True, metavar="FILE", help="what dicor select or export wrote")
    add("--pool", type=Path, metavar="DIR", help="where the members are, if no longer where the record says")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto (default): a GPU where there is one")
    add("--precision", choices=("32", "bf16"), default="32", help="of the matrix products (default: 32)")
    add("--any-base", action="store_true", help=ANY_BASE)


def load_ensemble(args: argparse.Namespace) -> Ensemble:
    """The ensemble of these options; says where its precision is slow. ``UserError`` as ``Ensemble.load``."""
    from lora_ensemble.bank.encode import bf16_advice
    from lora_ensemble.ensemble.restored import Ensemble

    ensemble = Ensemble.load(
        args.ensemble, pool=args.pool, device=args.device, precision=args.precision, any_base=args.any_base
    )
    if note := bf16_advice(args.precision, ensemble.device.type, instead="--precision 32"):
        print(note, file=sys.stderr)
    return ensemble


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the service takes on; more is refused, or waits. With the help of the command's options."""

    texts: int = field(default=64, metadata={"help": "texts of a request"})
    # Far more than an encoder reads, and still nothing to tokenise.
    chars: int = field(default=10_000, metadata={"help": "characters of a text"})
    bytes: int = field(default=1 << 20, metadata={"help": "bytes of a request's body"})
    batch: int = field(default=64, metadata={"help": "texts of several requests in one call; 1: of one request"})
    waiting: int = field(default=1024, metadata={"help": "texts that may wait; beyond, requests must come again"})
