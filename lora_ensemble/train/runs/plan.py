"""Which members train together: a list of members as banks that fit, and the file that a restarted run reads.

Plain functions and JSON. Axes: M members of a bank, P trained numbers per member (zeros included).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_ensemble.errors import UserError

FILE = "banks.json"


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What a bank that was trained to its end leaves for the last table, and how far that end was."""

    max_epochs: int | None
    max_steps: int
    header: list[str]
    rows: list[list[Any]]
    """A row per member: name, best epoch, dev score of each task (None where undefined)."""


@dataclass(frozen=True, kw_only=True)
class PlannedBank:
    """Members that train together, by name and in the user's order."""

    members: list[str]
    finished: Finished | None = None
    rung: int = 0
    """Dev evaluations after which the last members left it; 0: none did."""

    @property
    def key(self) -> str:
        """Names the bank's folder. Made of its members, so that no other bank ever finds its checkpoint there."""
        return f"bank-{hashlib.sha256(json.dumps(self.members).encode()).hexdigest()[:8]}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The banks of a run, in the order in which they train."""

    banks: list[PlannedBank]
    why: str = ""
    """What decided the size, in words."""
    splits: list[str] = field(default_factory=list)
    """What was split since, and when."""
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
        total, n = sum(sizes), len(sizes)
        each = f"{sizes[0]}" if min(sizes) == max(sizes) else f"{max(sizes)} to {min(sizes)}"
        banks = "1 bank" if n == 1 else f"{n} banks of {each}"
        return f"{total} member{'s' * (total > 1)} in {banks}" + (f" ({self.why})" if self.why else "")

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
    short, longer = divmod(len(orders[0]), banks)

    def pieces(order: Sequence[int]) -> list[list[int]]:
        ends = [i * short + min(i, longer) for i in range(banks + 1)]
        return [sorted(order[a:b]) for a, b in itertools.pairwise(ends)]

    return min((pieces(order) for order in orders), key=lambda cut: sum(len(rows) * width(rows) for rows in cut))


def gib(size: float) -> str:
    """A number of bytes as people read it."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def write_plan(folder: Path, plan: Plan) -> None:
    """Replace the plan's file in one move: a kill leaves the old one or the new one."""
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f".{FILE}.{os.getpid()}"
    with new.open("w", encoding="utf-8") as file:
        json.dump(asdict(plan), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, folder / FILE)


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
            PlannedBank(
                members=list(b["members"]),
                finished=b["finished"] and Finished(**b["finished"]),
                rung=int(b.get("rung", 0)),  # an older version wrote none
            )
            for b in content["banks"]
        ]
        plan = Plan(
            banks=banks,
            why=str(content["why"]),
            splits=list(content["splits"]),
            kept=list(content.get("kept", [])),
            left=dict(content.get("left", {})),
        )
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"{file}: damaged ({type(e).__name__}: {e}); expected the plan that fit wrote; remove it, and start the "
            "run again without --ckpt_path"
        ) from e
    if sorted(plan.members) != sorted(members):
        other = sorted(set(plan.members) ^ set(members))
        raise UserError(f"{file}: the plan is for other members ({', '.join(other[:3])}); start without --ckpt_path")
    return plan
