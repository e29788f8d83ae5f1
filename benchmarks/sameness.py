"""Do all sides of ``bank.py`` train the same model? With dropout off and from the same weights, losses must agree."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora_ensemble.lora import MemberConfig
from machine import in_fresh_process
from sides import PEERS, run_bank, run_peft_loop
from workload import Workload

TOLERANCE = {"32": 1e-3, "bf16": 5e-2}
"""Largest relative difference of a loss. bf16 keeps 8 bits, and the sides round in different places."""
_SMALLEST_LOSS = 0.01  # below it, rounding decides what is left of the loss


@dataclass(frozen=True)
class Sameness:
    """The largest relative difference between a peer's losses and the bank's, and where it was."""

    precision: str
    difference: float
    where: str
    control: float
    """The same difference for a peer whose scaling is wrong on purpose: what the check must be able to see."""
    members: int
    steps: int

    @property
    def agrees(self) -> bool:
        """Whether it is within the tolerance. In float32 a wrong model must not be; bf16 may be too coarse for that."""
        tolerance = TOLERANCE[self.precision]
        return self.difference <= tolerance and (self.control > tolerance or self.precision != "32")

    def __str__(self) -> str:
        verdict = "the same model" if self.agrees else "NOT THE SAME MODEL"
        return (
            f"sameness: {self.members} members x {self.steps} steps, dropout off, precision {self.precision}: largest "
            f"relative difference of a loss {self.difference:.1e} ({self.where}); tolerance "
            f"{TOLERANCE[self.precision]:g}, twice the scaling gives {self.control:.1e}: {verdict}"
        )


def check(work: Workload, precision: str, *, steps: int, folder: Path) -> Sameness:
    """Train three members that differ in every setting as a bank, then each from the same start by each peer."""
    still = dataclasses.replace(
        work, head_dropout=0.0, encoder_dropout=0.0, precision=precision, warmup_steps=1, steps=steps - 1
    )
    members = _different_members(work)
    starts = [str(folder / f"start-{i}.safetensors") for i in range(len(members))]
    bank = in_fresh_process(run_bank, still, members, True, starts).losses
    worst, where = -1.0, ""
    for i, member in enumerate(members):
        for side, run in PEERS.items():
            (peer,) = in_fresh_process(run, still, member, True, starts[i]).losses
            difference = _difference(bank[i], peer)
            # Not a plain >: NaN must win.
            if not difference <= worst:
                worst, where = difference, f"{side}, member {i}"
    wrong = dataclasses.replace(members[0], scaling=2 * work.scaling)
    (peer,) = in_fresh_process(run_peft_loop, still, wrong, True, starts[0]).losses
    return Sameness(precision, worst, where, _difference(bank[0], peer), len(members), steps)


def _difference(ours: list[float], theirs: list[float]) -> float:
    """The largest relative difference over the steps; NaN where a loss is NaN."""
    pairs = zip(ours, theirs, strict=True)
    return float(np.max([abs(a - b) / max(abs(b), _SMALLEST_LOSS) for a, b in pairs]))


def _different_members(work: Workload) -> list[MemberConfig]:
    """Higher rates than usual, so that a few steps move the losses."""
    return [
        MemberConfig(rank=work.rank, scaling=work.scaling, lr=10 * work.lr, targets=work.targets, seed=1),
        MemberConfig(
            rank=max(1, work.rank // 2), scaling=2 * work.scaling, lr=5 * work.lr, targets=work.targets, seed=2
        ),
        MemberConfig(rank=work.rank + 1, scaling=3 * work.scaling, lr=20 * work.lr, targets=work.targets, seed=3),
    ]
