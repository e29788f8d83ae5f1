"""All methods side by side on one task of a pool, and on several tasks.

Axes: M members, N examples of a split, C outputs of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lora_ensemble.dicor.choose.combine import decide
from lora_ensemble.dicor.choose.methods import Method
from lora_ensemble.dicor.choose.settings import MethodName
from lora_ensemble.dicor.estimate.honest import Estimate, Estimates, estimate
from lora_ensemble.dicor.from_pool import dev_of
from lora_ensemble.dicor.members import Dev, Members
from lora_ensemble.dicor.options import Options, check, method_of
from lora_ensemble.errors import UserError
from lora_ensemble.pool import TaskPool
from lora_ensemble.scores import one_label, overall_score, score_decisions
from lora_ensemble.tasks import PRESETS, Kind


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a pool's members make, chosen by several methods."""

    task_pool: TaskPool
    methods: dict[str, Method]  # every parameter decided
    estimates: Estimates
    dev: Dev  # what was compared on
    notices: list[str]  # for the user

    @property
    def kind(self) -> Kind:
        return self.task_pool.kind


def compare(
    task_pool: TaskPool, names: Sequence[MethodName], options: Options, *, probabilities: bool = False
) -> Comparison:
    """Choose by these methods, and by ``best`` and ``omni``, from a pool's dev logits, and estimate how good each is.

    ``probabilities``: see ``estimate``. ``UserError``, naming the task, where an option does not fit the pool, and as
    ``estimate`` does.
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
        estimates = estimate(dev, methods, probabilities=probabilities)
    except UserError as e:
        raise e if str(e).startswith(str(task_pool.pool)) else UserError(f"task {task_pool.name}: {e}") from e
    notices += [n for n in estimates.notices if n not in notices]
    return Comparison(task_pool=task_pool, methods=methods, estimates=estimates, dev=dev, notices=notices)


def test_scores(comparison: Comparison) -> dict[str, float]:
    """Method to the score, on the labelled test split, of what it chose on dev. NaN where r is undefined.

    Notices about the test labels are added to the comparison's. ``UserError`` where these, or test logits, are unknown.
    """
    pool = TaskPool(comparison.task_pool.pool, comparison.task_pool.name, split="test")
    labels = pool.examples().labels
    if labels is None:
        raise UserError(
            f"{pool.pool / pool.name}: the test examples have no labels, so there is no score; leave out --split test"
        )
    comparison.notices.extend(one_label(labels, pool.labels, "test labels"))
    scores = {}
    for method, chosen_by in comparison.estimates.of.items():
        names, ranks = chosen_by.names, [pool.record(name).rank for name in chosen_by.names]
        on_dev = np.array([comparison.estimates.scores[name] for name in names])
        chosen = Members(np.stack([pool.logits(name) for name in names]), pool.kind, names, ranks, on_dev)
        scores[method] = score_decisions(decide(chosen, chosen_by.choice), labels, pool.kind)
    return scores


def overall(comparisons: Mapping[str, Comparison]) -> dict[str, tuple[float, float]] | None:
    """Method to the overall score of the three presets (Oyeniyi, section 5.2), in-sample and honest.

    NaN where one is undefined; None where the three are not all there.
    """
    if not all(name in comparisons and comparisons[name].kind == task.kind for name, task in PRESETS.items()):
        return None
    of = {name: comparisons[name].estimates.of for name in PRESETS}

    def mean(method: str, value: Callable[[Estimate], float]) -> float:
        return overall_score({name: (value(of[name][method]), task.kind) for name, task in PRESETS.items()})

    def honest(estimate: Estimate) -> float:
        return float("nan") if estimate.honest is None else estimate.honest.value

    methods = [method for method in of["sst"] if all(method in estimates for estimates in of.values())]
    return {method: (mean(method, lambda estimate: estimate.in_sample), mean(method, honest)) for method in methods}
