"""Do all sides of ``bank.py`` train the same model? With dropout off and from the same weights, losses must agree."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_ensemble.bank.lora import Member
from machine import in_fresh_process
from sides import PEERS, run_bank, run_peft_loop
from workload import Workload

TOLERANCE = 1e-3
"""Largest relative difference of a loss in float32."""
FARTHER = 2.0
"""bf16 keeps 8 bits and the sides round in different places, so there each is held against float32: the bank's losses
may be at most so many times as far from PEFT's float32 losses, on average, as PEFT's own bf16 losses are."""
_SMALLEST_LOSS = 0.01  # below it, rounding decides what is left of the loss


@dataclass(frozen=True)
class Sameness:
    """How far the bank's losses are from the peers'."""

    precision: str
    difference: float
    """float32: the largest relative difference between a peer's losses and the bank's. bf16: the bank's mean relative
    difference from float32."""
    where: str
    usual: float
    """bf16: the peers' mean relative difference from float32."""
    control: float
    """float32: the largest difference for a peer whose scaling is wrong on purpose, which must be seen."""
    members: int
    steps: int

    @property
    def agrees(self) -> bool:
        """Whether it is within the tolerance, and a wrong model is not."""
        if self.precision == "32":
            return self.difference <= TOLERANCE < self.control
        return self.difference <= FARTHER * self.usual

    def __str__(self) -> str:
        verdict = "the same model" if self.agrees else "NOT THE SAME MODEL"
        start = f"sameness: {self.members} members x {self.steps} steps, dropout off, precision {self.precision}: "
        if self.precision == "32":
            return start + (
                f"largest relative difference of a loss {self.difference:.1e} ({self.where}); tolerance "
                f"{TOLERANCE:g}, twice the scaling gives {self.control:.1e}: {verdict}"
            )
        return start + (
            f"losses differ from float32's by {self.difference:.1e} on average, PEFT's by {self.usual:.1e}; tolerance "
            f"{FARTHER:g} times as much: {verdict}"
        )


def check(work: Workload, precision: str, *, steps: int, folder: Path) -> Sameness:
    """Train three members that differ in every setting as a bank, then each from the same start by each peer."""
    still = dataclasses.replace(
        work, head_dropout=0.0, encoder_dropout=0.0, precision=precision, warmup_steps=1, steps=steps - 1
    )
    exact = dataclasses.replace(still, precision="32")
    members = _different_members(work)
    starts = [str(folder / f"start-{i}.safetensors") for i in range(len(members))]
    bank = in_fresh_process(run_bank, still, members, True, starts).losses
    worst, where, far, usual = -1.0, "", [], []
    for i, member in enumerate(members):
        peers = {side: in_fresh_process(run, still, member, True, starts[i]).losses[0] for side, run in PEERS.items()}
        for side, peer in peers.items():
            difference = max(_differences(bank[i], peer))
            # Not a plain >: NaN must win.
            if not difference <= worst:
                worst, where = difference, f"{side}, member {i}"
        if precision != "32":
            (reference,) = in_fresh_process(run_peft_loop, exact, member, True, starts[i]).losses
            far += _differences(bank[i], reference)
            usual += [d for peer in peers.values() for d in _differences(peer, reference)]
    if precision != "32":
        return Sameness(precision, float(np.mean(far)), "", float(np.mean(usual)), math.nan, len(members), steps)
    wrong = dataclasses.replace(members[0], scaling=2 * work.scaling)
    (peer,) = in_fresh_process(run_peft_loop, still, wrong, True, starts[0]).losses
    return Sameness(precision, worst, where, math.nan, max(_differences(bank[0], peer)), len(members), steps)


def _differences(ours: list[float], theirs: list[float]) -> list[float]:
    """The relative difference at each step; NaN where a loss is NaN."""
    pairs = zip(ours, theirs, strict=True)
    return [abs(a - b) / max(abs(b), _SMALLEST_LOSS) for a, b in pairs]


def _different_members(work: Workload) -> list[Member]:
    """Higher rates than usual, so that a few steps move the losses."""
    same: dict[str, Any] = {"targets": work.targets, "layers": work.layers}
    return [
        Member(rank=work.rank, scaling=work.scaling, lr=10 * work.lr, seed=1, **same),
        Member(rank=max(1, work.rank // 2), scaling=2 * work.scaling, lr=5 * work.lr, seed=2, **same),
        Member(rank=work.rank + 1, scaling=3 * work.scaling, lr=20 * work.lr, seed=3, **same),
    ]
