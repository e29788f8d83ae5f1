"""All methods side by side on one task of a pool, and on several tasks.

Axes: M members, N examples of a split, C outputs of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lora_ensemble.dicor.choose.choice import decide
from lora_ensemble.dicor.choose.methods import Method, Omni
from lora_ensemble.dicor.choose.settings import MethodName
from lora_ensemble.dicor.estimate.honest import Estimate, Estimates, estimate
from lora_ensemble.dicor.from_pool import dev_of
from lora_ensemble.dicor.members import Dev
from lora_ensemble.dicor.options import Options, check, method_of
from lora_ensemble.errors import UserError
from lora_ensemble.pool import TaskPool
from lora_ensemble.scores import one_label, overall_score, score_decisions
from lora_ensemble.tasks import PRESETS, Kind


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a pool's members make, chosen by several methods."""

    task_pool: TaskPool
    methods: dict[str, Method]
    """Every parameter decided."""
    estimates: Estimates
    dev: Dev
    """What was compared on."""
    notices: list[str]
    """For the user."""

    @property
    def kind(self) -> Kind:
        return self.task_pool.kind


def compare(
    task_pool: TaskPool, names: Sequence[MethodName], options: Options, *, probabilities: bool = False
) -> Comparison:
    """Choose by these methods, and by ``best`` and ``omni``, from a pool's dev logits, and estimate how good each is.

    ``probabilities``: keep those of what is held out, see ``estimate``.
    Raises ``UserError``, naming the task, where an option does not fit the pool, and as ``estimate`` does.
    """
    try:
        check(options, task_pool.kind, len(task_pool.members))
        dev = dev_of(task_pool)
        methods: dict[str, Method] = {}
        notices = list(dev.notices)
        always: list[MethodName] = ["best", "omni"]
        for name in dict.fromkeys([*always, *names]):
            methods[name], more = method_of(name, dev.kind, len(dev), options)
            notices += more
        omni = methods["omni"]
        assert isinstance(omni, Omni)
        found = estimate(dev, methods, omni=omni, probabilities=probabilities)
    except UserError as e:
        raise e if str(e).startswith(str(task_pool.pool)) else UserError(f"task {task_pool.name}: {e}") from e
    notices += [n for n in found.notices if n not in notices]
    return Comparison(task_pool=task_pool, methods=methods, estimates=found, dev=dev, notices=notices)


def test_scores(comparison: Comparison) -> dict[str, float]:
    """Method to the score, on the labelled test split, of what it chose on dev. NaN where r is undefined.

    What is to be known of the test labels is added to the notices of the comparison.
    Raises ``UserError`` where the test labels are unknown or a member has no test logits.
    """
    dev_pool = comparison.task_pool
    pool = TaskPool(dev_pool.pool, dev_pool.name, split="test")
    labels = pool.examples().labels
    if labels is None:
        raise UserError(
            f"{pool.pool / pool.name}: the test examples have no labels, so there is no score; leave out --split test"
        )
    comparison.notices.extend(one_label(labels, pool.labels, "test labels"))
    ranks = {r.name: r.rank for r in pool.members}
    scores = comparison.estimates.scores

    def of(one: Estimate) -> float:
        decided = decide(
            np.stack([pool.logits(name) for name in one.names]),
            one.choice,
            kind=pool.kind,
            ranks=[ranks[name] for name in one.names],
            scores=np.array([scores[name] for name in one.names]),
            names=one.names,
        )
        return score_decisions(decided, labels, pool.kind)

    return {name: of(one) for name, one in comparison.estimates.of.items()}


def overall(comparisons: Mapping[str, Comparison]) -> dict[str, tuple[float, float]] | None:
    """Method to the overall score of the three presets (Oyeniyi, section 5.2), in-sample and honest.

    NaN where one is undefined; None where the three are not all there.
    """
    if not all(name in comparisons and comparisons[name].kind == task.kind for name, task in PRESETS.items()):
        return None
    three = {name: (comparisons[name].estimates.of, task.kind) for name, task in PRESETS.items()}

    def honest(one: Estimate) -> float:
        return float("nan") if one.honest is None else one.honest.value

    return {
        method: (
            overall_score({task: (of[method].in_sample, kind) for task, (of, kind) in three.items()}),
            overall_score({task: (honest(of[method]), kind) for task, (of, kind) in three.items()}),
        )
        for method in three["sst"][0]
        if all(method in of for of, _ in three.values())
    }
