"""The honest estimate: how good is what a method chooses, on examples that it was not chosen on?

Axes: M members, N examples of the dev split, C outputs of a head, R repeats of K folds, k candidates.

The dev set is cut into K folds; a method chooses on all but one, and what it chose decides on that one. After K turns
every example was decided by an ensemble that had not seen it; this is repeated with R other cuts. The choice of each
member's epoch was made on the same labels, so it is made again on each choosing part.

An ensemble chosen on (K - 1) / K of the dev set is, if anything, a little worse than one chosen on all of it, so the
score on what was held out is a little pessimistic: by nothing where the choice is the same, and by 1 / (2 (K - 1)) of
the optimism for a method that fits p smooth parameters, where in-sample is better than the truth by p / n and what is
fitted to n examples falls short of the best by p / 2n (as in Akaike's criterion). The estimate adds the middle of the
two, 1 / (4 (K - 1)): for three folds an eighth of the optimism, so that an eighth is left at most, either way.
``benchmarks/honest.py`` shows both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from lora_ensemble.dicor.choose.choice import Choice, decide
from lora_ensemble.dicor.choose.choice import probabilities as choice_probabilities
from lora_ensemble.dicor.choose.methods import Best, Method, Omni
from lora_ensemble.dicor.choose.view import View, losses
from lora_ensemble.dicor.estimate.fold_scores import FoldScores, fold_scores, standardised
from lora_ensemble.dicor.estimate.interval import Interval, of_differences, of_score
from lora_ensemble.dicor.estimate.splits import FOLDS, REPEATS, canonical, stratified_folds
from lora_ensemble.dicor.members import Dev, defined, leaders, ranked, view_of
from lora_ensemble.scores import score_decisions

MOST_DECISIONS = 20_000
"""Repeats are for small dev sets: so many that N times R stays below this, at most REPEATS and at least one."""
FEWEST = 10
"""Examples below which there is no estimate."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What is known of one method."""

    choice: Choice
    names: list[str]
    """The chosen members on the whole dev set, in the order of choice."""
    in_sample: float
    """Score on the dev set that they were chosen on; NaN where r is undefined."""
    honest: Interval | None
    """Of what was chosen on the whole dev set, on other examples; None where there are too few, or r is undefined."""
    at_part: float | None
    """The score on what was held out, before the correction: of what is chosen on the choosing part."""
    against_best: Interval | None
    """The honest score less that of the single best member, chosen anew in each split as well."""
    against_omni: Interval | None
    """The same, less that of all members."""
    held_out: np.ndarray | None
    """(R, N): the decisions that the estimate is of, examples in the order of ``splits.canonical``."""
    probabilities: np.ndarray | None
    """(R, N, classes), in the same order: those behind ``held_out``, if they were asked for; with 0 repeats (1, N,
    classes), of what was chosen on the very same examples."""

    @property
    def optimism(self) -> float | None:
        """By how much the in-sample score is above the honest one."""
        return None if self.honest is None else self.in_sample - self.honest.value


@dataclass(frozen=True, kw_only=True)
class Estimates:
    """All methods on one dev set."""

    of: dict[str, Estimate]
    """By name of the method; ``best`` and ``omni`` are always there."""
    view: View
    """The best candidates on the whole dev set: indices of a ``Choice`` refer to it."""
    scores: dict[str, float]
    """Every member's score on the whole dev set, by name."""
    notices: list[str]
    """What was left out, in words."""
    folds: int
    repeats: int
    """0 where there are too few examples for an estimate."""


def estimate(
    dev: Dev,
    methods: Mapping[str, Method],
    *,
    omni: Omni | None = None,
    folds: int = FOLDS,
    repeats: int | None = None,
    probabilities: bool = False,
) -> Estimates:
    """Choose with each method on the whole dev set, and say how good that is on other examples.

    ``best`` and ``omni`` (all members, by the mean unless told otherwise) are added. ``repeats`` None: 1 to
    ``REPEATS``, the more the smaller the dev set. Every split sees the same parts for all methods, so that differences
    are paired. ``probabilities``: keep each method's, for what is held out (classifiers only; R N classes numbers a
    method). Raises ``UserError`` where no member has a score, and as the methods do.
    """
    omni = omni or Omni()
    n = len(dev.labels)
    folds = max(min(folds, n // 2), 1)
    if repeats is None:
        repeats = int(np.clip(MOST_DECISIONS // n, 1, REPEATS))
    if n < FEWEST:
        repeats = 0
    fold = stratified_folds(dev.ids, dev.labels, dev.kind, folds=folds, repeats=repeats)
    probabilities = probabilities and dev.kind != "regression"
    found = fold_scores(dev, fold, folds, omni=omni.strategy, probabilities=probabilities)
    dev, good = defined(dev, found.scores[-1])
    found = replace(found, scores=found.scores[:, good], epochs=found.epochs[:, good])
    order = canonical(dev.ids)
    labels = dev.labels[order]

    methods = {"best": Best(), **{name: method for name, method in methods.items() if name not in ("best", "omni")}}
    limit = max(method.candidates(len(dev)) for method in methods.values())
    view, _ = view_of(dev, found.scores[-1], limit=limit, order=order)
    choices = {name: method.choose(view) for name, method in methods.items()}
    in_sample = {name: score_decisions(_decided(view, c, view.logits), labels, dev.kind) for name, c in choices.items()}
    choices["omni"] = Choice(members=[], strategy=omni.strategy)
    in_sample["omni"] = score_decisions(found.omni[-1][order], labels, dev.kind)
    names = {name: [view.names[i] for i in c.members] for name, c in choices.items()} | {"omni": list(dev.names)}

    held: dict[str, np.ndarray | None] = dict.fromkeys(choices)
    likely: dict[str, np.ndarray | None] = dict.fromkeys(choices)
    if repeats:
        decided_there, likely_there = _held_out(dev, methods, found, fold[:, order], folds, limit, order, probabilities)
        held.update(decided_there)
        likely.update(likely_there)
        held["omni"] = found.omni[:-1, order]
    elif probabilities:
        likely.update({name: _likely(view, choices[name], view.logits)[None] for name in methods})
    if found.omni_probabilities is not None:
        likely["omni"] = found.omni_probabilities[: repeats or None, order]

    pairs = [(a, b) for a in held for b in ("best", "omni") if a != b]
    known = {name: decided for name, decided in held.items() if decided is not None}
    differences = of_differences(known, pairs, labels, dev.kind) if known else {}

    raw = {name: of_score(decided, labels, dev.kind) for name, decided in known.items()}
    # What choosing on a part costs, added back: see above.
    share = 1 / (4 * max(folds - 1, 1))
    added = {name: 0.0 if one is None else share * (in_sample[name] - one.value) for name, one in raw.items()}
    limits = (-1.0 if dev.kind == "regression" else 0.0, 1.0)

    def against(name: str, other: str) -> Interval | None:
        difference = differences.get((name, other))
        return None if difference is None else difference.moved(added[name] - added[other], -2.0, 2.0)

    of = {}
    for name in ["best", "omni", *(x for x in methods if x != "best")]:
        one = raw.get(name)
        of[name] = Estimate(
            choice=choices[name],
            names=names[name],
            in_sample=in_sample[name],
            honest=None if one is None else one.moved(added[name], *limits),
            at_part=None if one is None else one.value,
            against_best=against(name, "best"),
            against_omni=against(name, "omni"),
            held_out=held[name],
            probabilities=likely[name],
        )
    each = dict(zip(dev.names, found.scores[-1].tolist(), strict=True)) | dict(
        zip(view.names, view.scores.tolist(), strict=True)
    )
    return Estimates(of=of, view=view, scores=each, notices=dev.notices, folds=folds, repeats=repeats)


def _decided(view: View, choice: Choice, logits: np.ndarray) -> np.ndarray:
    """What a choice from ``view`` decides (N,) on these logits (k, N, C) of the view's members."""
    m = choice.members
    return decide(
        logits[m],
        choice,
        kind=view.kind,
        ranks=[view.ranks[i] for i in m],
        scores=view.scores[m],
        names=[view.names[i] for i in m],
    )


def _held_out(
    dev: Dev,
    methods: Mapping[str, Method],
    found: FoldScores,
    fold: np.ndarray,
    folds: int,
    limit: int,
    order: np.ndarray,
    probabilities: bool,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Decisions (R, N) of each method on the examples that each split holds out; ``fold`` (R, N) in ``order``.

    And its probabilities (R, N, classes) of them, or none.
    """
    labels = dev.labels[order]
    dtype = np.float64 if dev.kind == "regression" else np.int64
    held = {name: np.zeros(fold.shape, dtype) for name in methods}
    classes = 2 if dev.kind == "binary" else np.asarray(dev.of_member(0)).shape[-1]
    likely = {name: np.zeros((*fold.shape, classes)) for name in methods} if probabilities else {}
    opened: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    def open_(m: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Logits (N, C) of a member at an epoch, and their losses (N,); kept, for other splits want them too."""
        if (m, epoch) not in opened:
            kept = dev.epochs_of(m)
            logits = np.asarray(dev.of_member(m) if kept is None else kept[epoch])[order].astype(np.float32)
            opened[m, epoch] = logits, losses(logits, labels, dev.kind)
        return opened[m, epoch]

    for s in range(len(found.scores) - 1):
        out = fold[s // folds] == s % folds
        rows, outside = np.flatnonzero(~out), np.flatnonzero(out)
        within = leaders(found.scores[s], limit)
        if not within:  # no member has an r on this part; what is held out stays 0
            continue
        each = [open_(m, int(found.epochs[s, m])) for m in within]
        loss = np.array([one[rows].mean() for _, one in each])
        scores = found.scores[s][within]
        top = ranked(scores, loss, [dev.names[m] for m in within])[:limit]
        view = View(
            np.stack([each[i][0][rows] for i in top]),
            labels[rows],
            kind=dev.kind,
            names=[dev.names[within[i]] for i in top],
            ranks=[dev.ranks[within[i]] for i in top],
            scores=scores[top],
        )
        logits = np.stack([each[i][0][outside] for i in top])
        for name, method in methods.items():
            choice = method.choose(view)
            held[name][s // folds, outside] = standardised(_decided(view, choice, logits))
            if probabilities:
                likely[name][s // folds, outside] = _likely(view, choice, logits)
    return held, likely


def _likely(view: View, choice: Choice, logits: np.ndarray) -> np.ndarray:
    """The probabilities (N, classes) that a choice from ``view`` gives, as ``_decided``."""
    return choice_probabilities(logits[choice.members], choice, kind=view.kind)
