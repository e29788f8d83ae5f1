"""``lora-ensemble boost``: members one after another, each on examples that weigh by the errors of those before it.

SAMME (Zhu, Zou, Rosset and Hastie 2009, "Multi-class AdaBoost", algorithm 2), by the errors that a member makes out of
fold: what a fine-tuned model says of examples that it was trained on is nearly always right.

Axes: N training examples, C classes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from lora_ensemble import pool
from lora_ensemble.errors import UserError
from lora_ensemble.scores import decisions
from lora_ensemble.tasks import OOF, Task
from lora_ensemble.train import cli
from lora_ensemble.train.data import BankData
from lora_ensemble.train.module import BankModule
from lora_ensemble.train.notices import say
from lora_ensemble.train.runs.sweep import Sweep

MOST = 10
"""Rounds: each takes as long as training without boosting."""


def next_weights(weights: np.ndarray, wrong: np.ndarray, classes: int) -> np.ndarray | None:
    """Weights (N,) of examples in the next round, of mean 1, from those of this one and what it got wrong (N,) bool.

    None where boosting ends: this round was right about all, or no better than chance.
    """
    error = float(weights[wrong].sum() / weights.sum())
    if error == 0 or error >= 1 - 1 / classes:
        return None
    alpha = math.log((1 - error) / error) + math.log(classes - 1)
    new = weights * np.exp(alpha * wrong)
    return np.asarray(new / new.mean())


class BoostCLI(cli.CLI):
    """The command line of training with the command ``boost`` alone."""

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """``boost``."""
        return {"boost": {"model", "datamodule"}}

    def boost(self, model: BankModule, datamodule: BankData, rounds: int = 3) -> None:
        """Train each member in several rounds, each time on examples that weigh by what it got wrong out of fold.

        Its rounds are members of their own, among which dicor chooses (--on oof). The same command goes on where it was
        stopped.

        Args:
            rounds: How many. The first is the member as ``sweep`` trains it.
        """
        (task,), first, world = datamodule.tasks[:1], self.run_dir, self.trainer.world_size
        for wrong, why in (
            (not 2 <= rounds <= MOST, f"--rounds: {rounds}; expected 2 to {MOST}"),
            (len(datamodule.tasks) > 1, f"data.tasks: {len(datamodule.tasks)} tasks; boosting is about one"),
            (
                task.kind not in ("multiclass", "binary"),
                f"data.tasks: {task.name} is {task.kind}; boosting is for classes",
            ),
            (not datamodule.folds.count, "data.folds: 0; boosting looks at out-of-fold errors: set it, e.g. to 5"),
            (world > 1, f"trainer.devices: {world} processes; boosting is for one"),
        ):
            if wrong:
                raise UserError(why)
        members = {str(m.name): m for m in model.members}
        weights: dict[str, np.ndarray] = {}  # of the members that go on
        model.release()
        for number in range(1, rounds + 1):
            ending = "" if number == 1 else f"-round{number}"
            self.run_dir = first.with_name(first.name + ending)
            last = self.run_dir / "checkpoint" / "last.ckpt"
            self.trainer = self._trainer(last.parent, last.is_file(), whole=False)
            datamodule.boosted = {task.name: {name + ending: weights[name] for name in weights}}
            say(f"round {number} of {rounds}")
            module = model.with_members([dataclasses.replace(m, name=n + ending) for n, m in members.items()])
            self._run(Sweep, module, datamodule).sweep()
            weights = {
                name: new
                for name in members
                if (new := self._next_of(task, name + ending, weights.get(name))) is not None
            }
            for name in members.keys() - weights.keys() if number < rounds else ():
                say(f"{name} ends with round {number}: not finished, always right, or no better than chance")
            members = {name: members[name] for name in weights}
            if not members:
                return

    def _next_of(self, task: Task, name: str, weights: np.ndarray | None) -> np.ndarray | None:
        """What a member of the pool has examples weigh in the next round; None where it goes on with none."""
        folder = self.config.boost.pool.dir
        record = pool.read_record(folder, task.name, name)
        if record is None or not record.finished:
            return None
        labels = pool.read_examples(folder, task.name, OOF, record.examples[OOF]).labels
        decided = decisions(pool.read_array(folder, record, pool.logits_file(OOF)), task.kind)
        return next_weights(np.ones(len(decided)) if weights is None else weights, decided != labels, len(task.labels))


class _Trainer(cli.CommandTrainer):
    """The Trainer's own flags"""  # a heading of --help

    boost = BoostCLI.boost


def run(args: Sequence[str]) -> int:
    """As ``train.cli.run``."""
    return cli.run(args, BoostCLI, _Trainer)
