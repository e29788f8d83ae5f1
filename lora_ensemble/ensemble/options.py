"""What the commands have in common that let an ensemble answer."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lora_ensemble.errors import ANY_BASE

if TYPE_CHECKING:
    from lora_ensemble.ensemble.restored import Ensemble


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
