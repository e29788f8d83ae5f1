"""Early exit: who stays, worked out by hand, and when a bank is stopped."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pool_factory import add_member

from lora_ensemble.errors import UserError
from lora_ensemble.tasks import PRESETS
from lora_ensemble.train.runs.halving import EarlyExit, Gate, survivors
from lora_ensemble.train.runs.plan import Plan, PlannedBank
from lora_ensemble.train.runs.sweep import Sweep

NAN = float("nan")


def test_survivors_worked_out_by_hand() -> None:
    """Four members: the best two stay. Of the others' better half, nobody or the first."""
    alike = {"sst": np.array([[1.0, 2, 3, 4], [1, 2, 3, 5], [1, 2, 4, 3], [4, 1, 3, 2]])[..., None]}
    assert survivors([0.5, 0.4, 0.3, 0.2], [], alike, keep=0.5, reserve=0) == [0, 1]
    assert survivors([0.2, 0.3, 0.4, 0.5], [], alike, keep=0.5, reserve=0) == [2, 3]
    assert survivors([0.5, 0.4, 0.3, 0.2], [], alike, keep=0.5, reserve=0.25) == [0, 1, 2]
    # Elsewhere three were better than all but one of these: the best half of all eight is those three and member 0.
    assert survivors([0.8, 0.4, 0.3, 0.2], [0.9, 0.7, 0.6, 0.1], alike, keep=0.5, reserve=0) == [0]
    assert survivors([0.5, 0.4, 0.3, 0.2], [0.9] * 4, alike, keep=0.5, reserve=0) == [0]  # at least one
    assert survivors([0.5, float("nan"), 0.5, 0.5], [], alike, keep=0.5, reserve=0) == [0, 2, 3]  # ties stay
    assert survivors([float("nan")] * 4, [], alike, keep=0.5, reserve=0.5) == [0]


def test_the_reserve_is_unlike_those_that_stay() -> None:
    """Of the better half of the rest (members 1 and 2), member 2 is the opposite of the best one."""
    logits = {"sts": np.array([[1.0, 2, 3], [1, 2, 3.1], [3, 2, 1], [1, 3, 2], [2, 1, 3]])[..., None]}
    scores = [0.9, 0.5, 0.4, 0.3, 0.2]
    assert survivors(scores, [], logits, keep=0.2, reserve=0.2) == [0, 2]
    assert survivors(scores, [], logits, keep=0.2, reserve=0.4) == [0, 1, 2]


def values(*members: list[float]) -> np.ndarray:
    """(M, N, 1)"""
    return np.array(members)[..., None]


def test_shares_that_do_not_come_out_even() -> None:
    five = {"sts": values([1, 2, 3], [1, 2, 3], [3, 2, 1], [1, 2, 3], [1, 2, 3])}
    scores = [0.5, 0.4, 0.3, 0.2, 0.1]
    assert survivors(scores, [], five, keep=0.5, reserve=0) == [0, 1, 2]  # 2.5: three
    # 0.3 of five is 1.5, so two, but the better half of the three others is two.
    assert survivors(scores, [], five, keep=0.4, reserve=0.3) == [0, 1, 2, 3]
    assert survivors(scores, [], five, keep=0.2, reserve=0.25) == [0, 2]  # 1.25: one
    four = {"sts": five["sts"][:4]}
    assert survivors(scores[:4], [], four, keep=0.25, reserve=0.25) == [0, 2]  # the better half of three is two


def test_a_score_that_is_undefined_elsewhere_is_the_worst() -> None:
    assert survivors([0.4, 0.3], [NAN, NAN], {"sts": values([1, 2], [1, 2])}, keep=0.5, reserve=0) == [0, 1]


def test_a_shift_of_all_classes_makes_no_member_different() -> None:
    """Member 1 gives the probabilities of member 0, member 2 others: it is the one to keep, though its r is high."""
    base = np.array([[1.0, 0], [0, 1], [1, 0]])
    logits = np.stack([base, base + np.array([[9.0], [-9], [5]]), base * [[1], [1], [0.2]], base])
    assert survivors([0.9, 0.5, 0.4, 0.3], [], {"sst": logits}, keep=0.25, reserve=0.25) == [0, 2]


def test_a_member_that_always_says_the_same_is_not_kept_for_being_different() -> None:
    logits = values([1, 2, 3], [7, 7, 7], [1, 3, 2], [1, 2, 3])
    assert survivors([0.9, 0.5, 0.4, 0.3], [], {"sts": logits}, keep=0.25, reserve=0.25) == [0, 2]


def test_of_several_tasks_the_mean_similarity_counts() -> None:
    """To member 0, member 1 has r -1/2 and 1, member 2 has 1/2 and -1: 1/4 and -1/4."""
    logits = {
        "a": values([1, 2, 3], [3, 1, 2], [2, 1, 3], [1, 2, 3]),
        "b": values([1, 2, 3], [1, 2, 3], [3, 2, 1], [1, 2, 3]),
    }
    assert survivors([0.9, 0.5, 0.4, 0.3], [], logits, keep=0.25, reserve=0.25) == [0, 2]


@pytest.mark.parametrize("wrong", [{"rungs": [2, 0]}, {"keep": 0.0}, {"keep": 1.0}, {"reserve": 1.0}])
def test_borders_of_the_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"--early_exit.{next(iter(wrong))}"):
        EarlyExit(**({"rungs": [1]} | wrong)).check()
    EarlyExit(rungs=[1], reserve=0.0).check()


class Writer:
    """Stands in for the pool's writer and its history: two members, of which the second is worse at rung 2 alone."""

    paused = False

    def __init__(self) -> None:
        self.evaluations, self.asked, self.history = 0, list[int](), self

    def __len__(self) -> int:
        return self.evaluations

    def overall_at(self, rung: int) -> list[float]:
        self.asked.append(rung)
        return [0.5, 0.5 if rung == 1 else 0.4]

    def logits_at(self, rung: int) -> dict[str, np.ndarray]:
        return {"sts": values([1, 2, 3], [1, 2, 3])}


def test_when_a_bank_is_stopped() -> None:
    """Two evaluations an epoch, rungs 1, 2 and 5: at the end of each epoch the last rung that is behind it counts."""
    writer: Any = Writer()
    others: dict[int, list[float]] = {2: [0.5]}
    gate = Gate(EarlyExit(rungs=[1, 2, 5], reserve=0), [None] * 2, writer, rung=0, others=others.__getitem__)

    def ended(epochs: int, evaluations: int, most: int = 4) -> Any:
        trainer: Any = SimpleNamespace(
            current_epoch=epochs - 1, max_epochs=most, global_step=9, max_steps=-1, should_stop=False
        )
        writer.evaluations = evaluations
        gate.on_train_epoch_end(trainer, None)  # type: ignore[arg-type]
        return trainer

    assert not ended(1, 0).should_stop
    assert not ended(4, 2).should_stop  # it ends anyway
    assert writer.asked == []
    assert ended(1, 2).should_stop
    assert (writer.asked, gate.stayed, gate.rung, gate.epochs, writer.paused) == ([2], [0], 2, 1, True)


def test_a_rung_is_looked_at_once() -> None:
    writer: Any = Writer()
    gate = Gate(EarlyExit(rungs=[1], reserve=0), [None] * 2, writer, rung=0, others=lambda rung: [])
    trainer: Any = SimpleNamespace(current_epoch=0, max_epochs=4, global_step=9, max_steps=-1, should_stop=False)
    writer.evaluations = 1
    gate.on_train_epoch_end(trainer, None)  # type: ignore[arg-type]
    gate.on_train_epoch_end(trainer, None)  # type: ignore[arg-type]
    assert (writer.asked, gate.stayed, trainer.should_stop) == ([1], None, False)


def test_members_are_compared_at_the_same_rung(tmp_path: Path) -> None:
    """With all others of the whole plan that got so far, by the score that they had then."""
    scores: dict[str, list[float | None]] = {"here": [0.9], "on": [0.3, 0.6, 0.7], "early": [0.4], "nan": [0.1, None]}
    for name, each in scores.items():
        ids, truth = {"dev": ["a", "b"]}, {"dev": np.array([0.5, 1.5])}
        logits = {"dev": np.ones((2, 1))}
        add_member(tmp_path, "sts", "regression", name, logits, ids, truth, epoch_scores=each, finished=False)
    bank, other = PlannedBank(members=["here"]), PlannedBank(members=["on", "early", "nan", "not-there-yet"])
    sweep: Any = Sweep.__new__(Sweep)
    sweep._pool, sweep.module = tmp_path, SimpleNamespace(tasks=[PRESETS["sts"]])
    sweep.plan, sweep._all_banks = Plan(banks=[bank, other]), None
    assert sweep._scores_at(sweep._others(bank), 2) == [0.6]
    assert sweep._scores_at(sweep._others(bank), 1) == [0.3, 0.4, 0.1]
    sweep.plan, sweep._all_banks = Plan(banks=[bank]), sweep.plan  # a bank that is a job has a plan of its own
    assert sweep._scores_at(sweep._others(bank), 1) == [0.3, 0.4, 0.1]
