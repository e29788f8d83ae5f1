"""Which members train together: a list of members as banks that fit, and the file that a restarted run reads.

Axes: M members of a bank, P trained numbers per member (zeros included).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lora_ensemble.bank.model import row_width
from lora_ensemble.errors import UserError
from lora_ensemble.files import replacing
from lora_ensemble.train.module import BankModule

FILE = "banks.json"
BankSize = int | Literal["auto"] | None  # members that train at once: a number, as many as fit, or all


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What a bank that was trained to its end leaves for the last table, and how far that end was."""

    max_epochs: int | None
    max_steps: int
    early: bool = False  # whether its members were out of patience: no later end lets them go on
    header: list[str]
    rows: list[list[Any]]  # a row per member: name, best epoch, dev score of each task (None where undefined)


@dataclass(frozen=True, kw_only=True)
class PlannedBank:
    """Members that train together, by name and in the user's order."""

    members: list[str]
    finished: Finished | None = None
    rung: int = 0  # dev evaluations after which the last members left it; 0: none did

    @property
    def key(self) -> str:
        """Names the bank's folder. Made of its members, so that no other bank ever finds its checkpoint there."""
        return f"bank-{hashlib.sha256(json.dumps(self.members).encode()).hexdigest()[:8]}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The banks of a run, in the order in which they train."""

    banks: list[PlannedBank] = field(default_factory=list)
    why: str = ""  # what decided the size, in words
    splits: list[str] = field(default_factory=list)  # what was split since, and when
    kept: list[str] = field(default_factory=list)
    """Members that the pool already had: a sweep does not train them again."""
    left: dict[str, int] = field(default_factory=dict)
    """Members that left their bank early, with the number of epochs that they were trained for."""

    @property
    def members(self) -> list[str]:
        """Names of all members, planned or not."""
        return [*(name for bank in self.banks for name in bank.members), *self.kept, *self.left]

    def describe(self) -> str:
        """``186 members in 3 banks of 62 (why)``."""
        sizes = [len(b.members) for b in self.banks]
        size = f"{max(sizes)}" if min(sizes) == max(sizes) else f"{max(sizes)} to {min(sizes)}"
        banks = "1 bank" if len(sizes) == 1 else f"{len(sizes)} banks of {size}"
        return f"{sum(sizes)} member{'s' * (sum(sizes) > 1)} in {banks}" + (f" ({self.why})" if self.why else "")

    def replaced(self, old: PlannedBank, new: Sequence[PlannedBank], note: str = "") -> Plan:
        """This plan with other banks in the place of one."""
        at = self.banks.index(old)
        banks = [*self.banks[:at], *new, *self.banks[at + 1 :]]
        return replace(self, banks=banks, splits=[*self.splits, *([note] if note else [])])


def arrange(orders: Sequence[Sequence[int]], size: int, *, width: Callable[[Sequence[int]], int]) -> list[list[int]]:
    """Members in as few banks of at most ``size`` as there can be, about equally long.

    ``orders``: permutations of the members' numbers, to be cut into pieces. ``width``: P of a bank of these members; a
    bank pads each of its members to it. The order with the fewest numbers in all, Σ M·P, is taken, the first of equals;
    inside a bank, members stand in ascending order.
    """
    banks = math.ceil(len(orders[0]) / size)
    cuts = [[sorted(piece.tolist()) for piece in np.array_split(np.array(order), banks)] for order in orders]
    return min(cuts, key=lambda cut: sum(len(rows) * width(rows) for rows in cut))


def banks_of(module: BankModule, names: Sequence[str], size: int) -> list[PlannedBank]:
    """Some of the module's members in banks of at most ``size``, put together so that little is padded."""
    bank, members, models = module.bank, module.members, module.folds.models
    rows = [i * models for i, m in enumerate(members) if m.name in names]
    by_targets = sorted(rows, key=lambda i: (len(bank.paths[i]), bank.paths[i], bank.ranks[i]))
    by_rank = sorted(rows, key=lambda i: (bank.ranks[i], len(bank.paths[i]), bank.paths[i]))
    orders = [rows, by_targets, by_rank, by_targets[::-1], by_rank[::-1]]
    cut = arrange(orders, size, width=lambda some: row_width(bank.row_shapes(some)))
    return [PlannedBank(members=[members[i // models].name for i in some]) for some in cut]


def evaluation_banks(module: BankModule, size: BankSize, run_dir: Path) -> list[list[str]]:
    """The module's members in banks to be evaluated, which takes less memory than training.

    auto: no more at a time than the run at ``run_dir`` trained at once; all of them where there is none.
    """
    names = [m.name for m in module.members]
    if size == "auto":
        plan = read_plan(run_dir, names)
        size = max(len(b.members) for b in plan.banks) if plan else None
    return [bank.members for bank in banks_of(module, names, size or len(names))]


def write_plan(folder: Path, plan: Plan) -> None:
    """Replace the plan's file whole."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / FILE) as new:
        new.write_text(json.dumps(asdict(plan), indent=1), encoding="utf-8")


def read_plan(folder: Path, members: Sequence[str]) -> Plan | None:
    """The plan of a run that was begun, None where there is none.

    ``members``: names of the run's members. ``UserError`` where the file is damaged or is for others.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        banks = [
            PlannedBank(**{**bank, "finished": bank["finished"] and Finished(**bank["finished"])})
            for bank in content["banks"]
        ]
        plan = Plan(**{**content, "banks": banks})
        names = sorted(plan.members)
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"{file}: damaged ({type(e).__name__}: {e}); expected the plan that fit wrote; remove it, and start the "
            "run again without --ckpt_path"
        ) from e
    if names != sorted(members):
        other = sorted(set(names) ^ set(members))
        raise UserError(f"{file}: the plan is for other members ({', '.join(other[:3])}); start without --ckpt_path")
    return plan
