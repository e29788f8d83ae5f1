"""Who leaves a bank before its end: members out of patience, which are finished, and members that cannot catch up.

Early exit is successive halving, with a reserve for diversity.

Axes: M members, N examples of dev, C outputs of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import lightning.pytorch as pl
import numpy as np

from lora_ensemble.errors import UserError
from lora_ensemble.train.pool_writer import PoolWriter


@dataclass(frozen=True, kw_only=True)
class EarlyExit:
    """When members leave, and how many stay."""

    rungs: list[int]
    """Numbers of dev evaluations; at the end of the epoch in which so many are done, members leave."""
    keep: float = 0.5
    """Share of the members that stays for its score."""
    reserve: float = 0.1
    """Share that stays besides for being unlike those: an ensemble needs members that differ."""

    def check(self) -> None:
        """``UserError`` for values out of range."""
        if not self.rungs or any(rung < 1 for rung in self.rungs):
            raise UserError(f"--early_exit.rungs: {self.rungs}; expected numbers of dev evaluations, e.g. [2,5]")
        if not 0 < self.keep < 1:
            raise UserError(f"--early_exit.keep: {self.keep}; expected a share between 0 and 1")
        if not 0 <= self.reserve < 1:
            raise UserError(f"--early_exit.reserve: {self.reserve}; expected a share from 0 to below 1")


def survivors(
    scores: Sequence[float], others: Sequence[float], logits: Mapping[str, np.ndarray], *, keep: float, reserve: float
) -> list[int]:
    """Which of M members of a bank stay: indices, ascending, at least one.

    A member stays if its score (M,) is among the best ``keep`` of the bank's and of ``others``, which have been through
    the same rung before (asynchronous successive halving: Li et al. 2020, section 3.2). Of the better half of the rest,
    ``reserve`` times M more stay, each the one whose dev logits (task to (M, N, C)) correlate least with those of the
    members that stay so far. NaN is the worst score; of equal scores the first in the bank is better.
    """
    everyone = np.nan_to_num(np.array([*scores, *others], float), nan=-np.inf)
    own, least = everyone[: len(scores)], np.sort(everyone)[::-1][max(math.ceil(keep * len(everyone)), 1) - 1]
    order = np.argsort(-own, kind="stable").tolist()
    # Ties with the last place stay; where all tie, nobody leaves.
    stay = [i for i in order if own[i] >= least and np.isfinite(own[i])] or order[:1]
    rest = [i for i in order if i not in stay and np.isfinite(own[i])]
    rest = rest[: math.ceil(len(rest) / 2)]
    alike = _correlation(logits)
    for _ in range(min(round(reserve * len(own)), len(rest))):
        chosen = min(rest, key=lambda i: (round(float(np.mean(alike[i, stay])), 12), order.index(i)))
        rest.remove(chosen)
        stay.append(chosen)
    return sorted(stay)


def _correlation(logits: Mapping[str, np.ndarray]) -> np.ndarray:
    """Pearson's r between members' logits, the mean over tasks: (M, M). Constant logits are like all others."""
    matrices = []
    for x in logits.values():
        x = np.asarray(x, np.float64)
        if x.shape[-1] > 1:
            x = x - x.mean(-1, keepdims=True)  # a shift of all classes of an example says nothing
        with np.errstate(invalid="ignore", divide="ignore"):
            matrices.append(np.nan_to_num(np.atleast_2d(np.corrcoef(x.reshape(len(x), -1))), nan=1.0))
    return np.mean(matrices, axis=0)


class Gate(pl.Callback):
    """Stops a bank where members have to leave it, at the end of an epoch, after its checkpoint was written.

    ``rule``: of early exit, if there is one. ``patience``: of each of M members. ``rung``: the last one that the bank
    has been through. ``others``: from a rung to other members' scores there.
    """

    def __init__(
        self,
        rule: EarlyExit | None,
        patience: Sequence[int | None],
        writer: PoolWriter,
        *,
        rung: int,
        others: Callable[[int], list[float]],
    ) -> None:
        self._rule, self._patience, self._writer, self._others, self.rung = rule, patience, writer, others, rung
        self.stayed: list[int] | None = None  # indices of the members that stay, once the bank was stopped
        self.epochs = 0  # that were trained until then

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A kill may have come after the checkpoint and before the members left."""
        if not trainer.fit_loop.restarted_mid_epoch:
            self._decide(trainer, trainer.current_epoch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The end of an epoch is where a bank can be cut."""
        self._decide(trainer, trainer.current_epoch + 1)

    def _decide(self, trainer: pl.Trainer, epochs: int) -> None:
        history, everyone = self._writer.history, range(len(self._patience))
        if epochs == trainer.max_epochs or trainer.global_step == trainer.max_steps:
            return
        ended = [i for i, most in enumerate(self._patience) if most and history.without_gain(i) >= most]
        if len(ended) == len(everyone):
            trainer.should_stop = True
            return
        stay = [i for i in self._survivors() if i not in ended]
        if len(stay) < len(everyone):
            self.stayed, self.epochs = stay, epochs
            self._writer.ended, self._writer.paused = ended, True
            trainer.should_stop = True

    def _survivors(self) -> Sequence[int]:
        """Members that early exit lets stay."""
        history, rule = self._writer.history, self._rule
        rung = max((r for r in rule.rungs if r <= len(history)), default=0) if rule else 0
        if rule is None or rung <= self.rung:
            return range(len(self._patience))
        self.rung = rung
        scores, logits = history.overall_at(rung), history.logits_at(rung)
        return survivors(scores, self._others(rung), logits, keep=rule.keep, reserve=rule.reserve)
