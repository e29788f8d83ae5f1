"""A pool's members, opened one at a time, and all methods side by side on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lora_ensemble.dicor.choose.combine import said
from lora_ensemble.dicor.choose.methods import Method
from lora_ensemble.dicor.choose.settings import MethodName
from lora_ensemble.dicor.estimate.honest import Estimate, Estimates, estimate, with_intervals
from lora_ensemble.dicor.members import Dev, Members
from lora_ensemble.dicor.options import Options, check, method_of
from lora_ensemble.errors import UserError
from lora_ensemble.pool import DISTILLED, TaskPool, logits_file, map_array, member_folder
from lora_ensemble.scores import one_label, overall_score, scored
from lora_ensemble.tasks import PRESETS, SCORES, Kind, Score


class Logits:
    """The logits (N, C) of a member of a pool, opened whenever numpy asks for them, the first time with all checks.

    What is kept open counts as resident memory, which for ten thousand members would be a copy of all logits.
    """

    def __init__(self, task_pool: TaskPool, name: str) -> None:
        self._pool, self._name, self._checked = task_pool, name, False

    def __array__(self, dtype: None = None, copy: None = None) -> np.ndarray:
        if self._checked:
            folder = member_folder(self._pool.pool, self._pool.name, self._name)
            return map_array(folder / logits_file(self._pool.split))
        self._checked = True
        return self._pool.logits(self._name)


def dev_of(task_pool: TaskPool, score: str | None = None) -> Dev:
    """The members of a pool on the examples of its split, and by which score they are judged (None: the pool's).

    ``UserError`` where these have no labels, the kind has no such score, the pool's are several, and as ``TaskPool``.
    """
    if score is None and task_pool.scored_by is None:
        names = sorted({r.scored_by for r in task_pool.members})
        raise UserError(f"its members were trained by several scores ({', '.join(names)}); say which with --score")
    examples, records = task_pool.examples(), task_pool.members
    if examples.labels is None:
        where = task_pool.pool / task_pool.name
        raise UserError(f"{where}: the {task_pool.split} examples have no labels, so there is no score to choose by")
    file = logits_file(task_pool.split)
    dev = Dev.of(
        [Logits(task_pool, r.name) for r in records],
        examples.labels,
        kind=task_pool.kind,
        names=[r.name for r in records],
        ranks=[r.rank for r in records],
        ids=examples.ids,
        groups=examples.groups,
        epochs=[task_pool.epochs(r.name) for r in records],
        fingerprints=[r.files.get(file, r.name) for r in records],
        score=score or task_pool.scored_by,
    )
    notices = [*dev.notices, *one_label(examples.labels, task_pool.labels, f"{task_pool.split} labels")]
    taught = [r.settings[DISTILLED] for r in records if DISTILLED in r.settings]
    if students := sum("chosen_on" not in how for how in taught):
        who, whose = ("1 member was", "its") if students == 1 else (f"{students} members were", "their")
        what = "distilled from an ensemble that was chosen on dev"
        notices.append(f"{who} {what}: {whose} scores flatter a little, honest ones too")
    return replace(dev, notices=notices, split=task_pool.split)


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
        """That of the rows of ``dev``: of several labels binary."""
        return self.dev.kind

    @property
    def score(self) -> Score:
        return SCORES[self.dev.scored_by]


def compare(
    task_pool: TaskPool,
    names: Sequence[MethodName],
    options: Options,
    *,
    score: str | None = None,
    probabilities: bool = False,
) -> Comparison:
    """Choose by these methods, and by ``best`` and ``omni``, on a pool's split, and estimate how good each is.

    ``score``: its name; None: that which the members were trained by. ``probabilities``: see ``estimate``.
    ``UserError``, naming the task, where an option does not fit the pool, and as ``estimate`` does.
    """
    try:
        check(options, task_pool.kind, len(task_pool.members))
        dev = dev_of(task_pool, score)
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


@dataclass(frozen=True)
class Judgement:
    """How good what was chosen is on a labelled split that nothing was chosen on."""

    split: str
    scores: dict[str, float]  # of each method, by name; NaN where it is undefined
    of: Estimate  # of one of them: "honest" is its score with the interval


def judged(comparison: Comparison, method: str, *, test: bool) -> Judgement | None:
    """What was chosen, on the test split where that is asked for, else on dev where it was chosen on other examples.

    ``method``: with intervals. Notices about the labels are added to the comparison's. None where there is nothing to
    judge on. ``UserError`` where test labels or logits are unknown.
    """
    on = comparison.task_pool
    if not test and (on.split == "dev" or not all("dev" in r.examples for r in on.members)):
        return None
    pool = TaskPool(on.pool, on.name, split="test" if test else "dev")
    examples, by, sign = pool.examples(), comparison.dev.scored_by, comparison.score.sign
    if examples.labels is None:
        raise UserError(
            f"{pool.pool / pool.name}: the test examples have no labels, so there is no score; leave out --split test"
        )
    comparison.notices.extend(one_label(examples.labels, pool.labels, f"{pool.split} labels"))
    first = pool.logits(comparison.estimates.of["best"].names[0])
    dev = Dev.of([first], examples.labels, kind=pool.kind, ids=examples.ids, groups=examples.groups, score=by)
    labels, found = dev.labels[dev.order], dict[str, Estimate]()
    for name, chosen_by in comparison.estimates.of.items():
        names, ranks = chosen_by.names, [pool.record(member).rank for member in chosen_by.names]
        on_dev = sign * np.array([comparison.estimates.scores[member] for member in names])
        chosen = Members.of(np.stack([pool.logits(member) for member in names]), pool.kind, names, ranks, on_dev, by)
        one = said(chosen, chosen_by.choice)[dev.order]
        value = float(scored(one, labels, dev.kind, by, width=dev.width))
        found[name] = replace(chosen_by, in_sample=value, held_out=one[None])
    scores = {name: e.in_sample for name, e in found.items()}
    shown = {name: found[name] for name in dict.fromkeys(["best", "omni", method])}
    return Judgement(pool.split, scores, with_intervals(shown, labels, dev, folds=1)[method])


def overall(comparisons: Mapping[str, Comparison]) -> dict[str, tuple[float, float]] | None:
    """Method to the overall score of the three presets (Oyeniyi, section 5.2), in-sample and honest.

    NaN where one is undefined; None where the three are not all there, by the scores that it is made of.
    """
    there = {name: (c.task_pool.kind, c.dev.scored_by) for name, c in comparisons.items()}
    if any(there.get(name) != (task.kind, task.scored_by) for name, task in PRESETS.items()):
        return None
    kinds = {name: task.kind for name, task in PRESETS.items()}
    of = {name: comparisons[name].estimates.of for name in PRESETS}
    scores = {}
    for method in of["sst"]:
        if all(method in estimates for estimates in of.values()):
            each = {name: estimates[method] for name, estimates in of.items()}
            honest = {name: e.honest.value if e.honest else float("nan") for name, e in each.items()}
            in_sample = overall_score({name: (e.in_sample, kinds[name]) for name, e in each.items()})
            scores[method] = in_sample, overall_score({name: (value, kinds[name]) for name, value in honest.items()})
    return scores
