"""The honest estimate: how good is what a method chooses, on examples that it was not chosen on?

The dev set is cut into K folds; a method chooses on all but one, and what it chose decides on that one. After K turns
every example was decided by an ensemble that had not seen it; this is repeated with R other cuts. Each member's epoch
was chosen on the same labels, so it is chosen again on each choosing part.

An ensemble chosen on (K - 1) / K of dev is a little worse than one chosen on all of it, so the score on what was held
out is too low: by nothing where the choice is the same, and by 1 / (2 (K - 1)) of the optimism for a method that fits p
smooth parameters, where in-sample is better than the truth by p / n and what is fitted to n examples falls short of the
best by p / 2n (as in Akaike's criterion). The estimate adds the middle, 1 / (4 (K - 1)), for three folds an eighth, so
that an eighth is left at most, either way (``benchmarks/honest.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from lora_ensemble.dicor.choose.combine import Choice, said
from lora_ensemble.dicor.choose.combine import probabilities as probabilities_of
from lora_ensemble.dicor.choose.methods import Best, Method, Omni
from lora_ensemble.dicor.choose.probabilities import losses
from lora_ensemble.dicor.estimate.fold_scores import FoldScores, fold_scores, standardised
from lora_ensemble.dicor.estimate.interval import CLOSED, Interval, of_differences, of_score
from lora_ensemble.dicor.estimate.splits import FOLDS, REPEATS, held_out, stratified_folds
from lora_ensemble.dicor.members import Dev, Members, top_members
from lora_ensemble.scores import scored
from lora_ensemble.tasks import SCORES

Held = dict[str, np.ndarray]
"""By method, on what each split holds out: decisions (R, N) or probabilities (R, N, classes), in ``Dev.order``."""
MOST_DECISIONS = 20_000  # repeats are so many that N times R stays below this, 1 to REPEATS
FEWEST = 10  # examples, or groups of them, below which there is no estimate


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What is known of one method."""

    choice: Choice
    names: list[str]  # the chosen members on the whole dev set, in the order of choice
    in_sample: float  # score on the dev set that they were chosen on; NaN where it is undefined
    held_out: np.ndarray | None
    """(R, N) decisions, or probabilities, that the estimate is of, see ``combine.said``; examples in ``Dev.order``"""
    probabilities: np.ndarray | None
    """(R, N, classes) behind ``held_out``, if asked for; with 0 repeats (1, N, classes), on the examples chosen on."""
    honest: Interval | None = None  # of what was chosen, on other examples; None: too few, or it is undefined
    at_part: float | None = None  # the same before the correction, of what is chosen on a part
    against_best: Interval | None = None  # by how much it is better than the best, chosen anew in each split
    against_omni: Interval | None = None  # the same, than all members
    sign: int = 1  # of the score: -1 where lower is better; differences and the optimism are the gain, either way

    @property
    def optimism(self) -> float | None:
        """By how much the in-sample score is better than the honest one."""
        return None if self.honest is None else self.sign * (self.in_sample - self.honest.value)


@dataclass(frozen=True)
class Estimates:
    """All methods on one dev set."""

    of: dict[str, Estimate]  # by name of the method; ``best`` and ``omni`` are always there
    candidates: Members  # the best on the whole dev set, examples in ``Dev.order``: what a ``Choice`` is from
    scores: dict[str, float]  # every member's score on the whole dev set, by name
    notices: list[str]  # what was left out, in words
    folds: int
    repeats: int  # 0 where there are too few examples, or groups of them, for an estimate
    groups: int | None = None  # how many the examples are of, none of which a split tears apart; None: each is alone
    split: str = "dev"  # what the examples are


def estimate(
    dev: Dev,
    methods: Mapping[str, Method],
    *,
    folds: int = FOLDS,
    repeats: int | None = None,
    probabilities: bool = False,
) -> Estimates:
    """Choose with each method on the whole dev set, and say how good that is on other examples.

    ``best`` and ``omni`` (all members, by the mean) are added where they are not there. ``repeats`` None: 1 to
    ``REPEATS``, the more the smaller the dev set. All methods see the same splits, so that differences are paired.
    ``probabilities``: keep each classifier's for what is held out. Raises ``UserError`` where no member has a score,
    and as the methods do.
    """
    omni, n, order = methods.get("omni", Omni()), len(dev.labels), dev.order
    assert isinstance(omni, Omni)
    folds = max(min(folds, dev.evidence // 2), 1)
    if repeats is None:
        repeats = int(np.clip(MOST_DECISIONS // n, 1, REPEATS))
    repeats = repeats if dev.evidence >= FEWEST else 0
    fold = stratified_folds(dev.ids, dev.truth, dev.kind, folds=folds, repeats=repeats, groups=dev.groups)
    fold = np.repeat(fold, dev.width, axis=1)
    probabilities = probabilities and dev.kind != "regression"
    seen = fold_scores(dev, fold, folds, omni=omni.strategy, probabilities=probabilities)
    dev, good = dev.scored(seen.scores[-1])
    seen = replace(seen, scores=seen.scores[:, good], epochs=seen.epochs[:, good])
    methods = {"best": Best(), **{name: method for name, method in methods.items() if name not in ("best", "omni")}}
    limit = max(method.top_k for method in methods.values())
    candidates = dev.top(seen.scores[-1], limit)
    held, likely = dict[str, np.ndarray](), dict[str, np.ndarray]()
    if repeats:
        held, likely = _held_out(dev, methods, seen, fold[:, order], folds, limit, probabilities)
        held["omni"] = seen.omni[:-1, order]
    if seen.omni_probabilities is not None:
        likely["omni"] = seen.omni_probabilities[: repeats or None, order]
    of, sign = dict[str, Estimate](), SCORES[dev.scored_by].sign
    for name in dict.fromkeys(["best", "omni", *methods]):
        if name == "omni":
            choice, names, together = Choice(members=[], strategy=omni.strategy), dev.names, seen.omni[-1][order]
        else:
            choice = methods[name].choose(candidates)
            chosen = candidates.take(choice.members)
            names, together = chosen.names, said(chosen, choice)
            if probabilities and not repeats:
                likely[name] = probabilities_of(chosen.logits, choice, kind=dev.kind)[None]
        of[name] = Estimate(
            choice=choice,
            names=names,
            in_sample=float(scored(together, candidates.labels, dev.kind, dev.scored_by, width=dev.width)),
            held_out=held.get(name),
            probabilities=likely.get(name),
            sign=sign,
        )
    if repeats:
        of = with_intervals(of, candidates.labels, dev, folds)
    scores = dict(zip(dev.names, (sign * seen.scores[-1]).tolist(), strict=True))
    scores.update(zip(candidates.names, (sign * candidates.scores).tolist(), strict=True))
    groups, notices = None if dev.groups is None else dev.evidence, dev.notices
    return Estimates(of, candidates, scores, notices, folds, repeats, groups, dev.split)


def _held_out(
    dev: Dev, methods: Mapping[str, Method], seen: FoldScores, fold: np.ndarray, folds: int, limit: int, likely: bool
) -> tuple[Held, Held]:
    """What each method decides and, where ``likely``, its probabilities (else none); ``fold`` (R, N) in that order."""
    labels = dev.labels[dev.order]
    classes = 2 if dev.kind == "binary" else dev.logits_of(0).shape[-1]
    chances = {name: np.zeros((*fold.shape, classes)) for name in methods if likely}
    of = SCORES[dev.scored_by].of
    shape = (*fold.shape, classes) if of == "probabilities" else fold.shape
    held = {name: np.zeros(shape, np.int64 if of == "decisions" else np.float64) for name in methods}

    @cache
    def opened(m: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Logits (N, C) of a member at an epoch, and their losses (N,); kept, for other splits want them too."""
        by_epoch = dev.epochs_of(m)
        logits = np.asarray(dev.logits_of(m) if by_epoch is None else by_epoch[epoch])[dev.order].astype(np.float32)
        return logits, losses(logits, labels, dev.kind)

    def best(s: int, rows: np.ndarray) -> tuple[Members, list[np.ndarray]]:
        """The best members on ``rows``, each at its best epoch there, and their logits (N, C)."""
        epochs = seen.epochs[s].tolist()
        which = top_members(seen.scores[s], limit, dev.names, lambda m: opened(m, epochs[m])[1][rows].mean())
        logits = [opened(m, epochs[m])[0] for m in which]
        part = np.array([one[rows] for one in logits])
        return dev.members(which, part, seen.scores[s][which], labels[rows]), logits

    for s, row, out in held_out(fold, folds):
        candidates, logits = best(s, np.flatnonzero(fold[row] != s % folds))
        if not len(candidates):  # no member has a score on this part; what is held out stays 0
            continue
        there = replace(candidates, logits=np.stack([one[out] for one in logits]), labels=labels[out])
        for name, method in methods.items():
            choice = method.choose(candidates)
            chosen = there.take(choice.members)
            held[name][row, out] = standardised(said(chosen, choice), dev.scored_by, dev.width)
            if likely:
                chances[name][row, out] = probabilities_of(chosen.logits, choice, kind=dev.kind)
    return held, chances


def with_intervals(of: dict[str, Estimate], labels: np.ndarray, dev: Dev, folds: int) -> dict[str, Estimate]:
    """The same with what is known from the held-out decisions; ``labels`` (N,) are in their order."""
    kind, by, groups = dev.kind, dev.scored_by, dev.together
    held, about = {name: e.held_out for name, e in of.items() if e.held_out is not None}, SCORES[by]
    alone = [] if by in CLOSED and groups is None else [""]  # of the bootstrap, too, where there is no formula
    pairs = [(a, b) for a in of for b in ("best", "omni", *alone) if a != b]
    differences = of_differences(held, pairs, labels, kind, by, groups, dev.width)
    # What choosing on a part costs is added back: see above.
    share, wide = 1 / (4 * max(folds - 1, 1)), max(about.most - about.least, 2.0)
    found = {n: differences[n, ""] if alone else of_score(one, labels, kind) for n, one in held.items()}
    at_part = {name: at and at.turned(about.sign) for name, at in found.items()}
    added = {name: 0.0 if at is None else share * (of[name].in_sample - at.value) for name, at in at_part.items()}

    def against(name: str, other: str) -> Interval | None:
        difference = differences.get((name, other))
        more = about.sign * (added[name] - added[other])
        return None if difference is None else difference.moved(more, -wide, wide)

    return {
        name: replace(
            of[name],
            honest=None if at is None else at.moved(added[name], about.least, about.most),
            at_part=None if at is None else at.value,
            against_best=against(name, "best"),
            against_omni=against(name, "omni"),
        )
        for name, at in at_part.items()
    }
