"""The peers of ``selection.py``: other libraries' ways to make an ensemble of given predictions.

Each is fitted to members' logits (M, N, C) and labels (N,), and decides from logits (M, N', C) of the same members.

* AutoGluon's ``EnsembleSelection``, as installed (``pip install autogluon.core``; without it, it is left out).
* auto-sklearn's ``EnsembleSelection``, **as a plain loop written here**: auto-sklearn 0.15 wants scikit-learn below
  0.25, which no longer builds on Python 3.11. Its ``_fast`` step by step, without the library's own costs.
* scikit-learn's ``VotingClassifier``, ``VotingRegressor``, ``StackingClassifier`` and ``StackingRegressor`` themselves:
  a member is an estimator that picks its columns out of X, which holds all members' outputs side by side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.ensemble import StackingClassifier, StackingRegressor, VotingClassifier, VotingRegressor
from sklearn.linear_model import LogisticRegression

from lora_ensemble.tasks import Kind

Decide = Callable[[np.ndarray], np.ndarray]
Peer = Callable[[np.ndarray, np.ndarray, Kind], Decide]
"""Logits (M, N, C), labels (N,) and kind to a function from logits (M, N', C) to decisions (N',)."""


def outputs(logits: np.ndarray, kind: Kind) -> np.ndarray:
    """What the libraries take for a member: probabilities (M, N, classes), or the values (M, N)."""
    logits = logits.astype(np.float64)
    if kind == "regression":
        return np.asarray(logits[..., 0])
    if kind == "binary":
        positive = 0.5 + np.tanh(logits[..., 0] / 2) / 2
        return np.stack([1 - positive, positive], axis=-1)
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def _decided(mean: np.ndarray, kind: Kind) -> np.ndarray:
    """Decisions (N,) of a mean of ``outputs``."""
    return mean if kind == "regression" else np.argmax(mean, axis=-1)


class _First:
    """A random state that draws the first: the tie rule of ours, where AutoGluon draws one of those that are left."""

    def choice(self, of: Any) -> Any:
        return of[0]


def _in_numpy(kind: Kind, by: str) -> Any:
    """AutoGluon's metric with the formula in numpy: scikit-learn's and scipy's checks are 95 % of its time."""
    from autogluon.core.metrics import make_scorer, root_mean_squared_error

    if kind == "regression":
        if by == "loss":
            return root_mean_squared_error
        return make_scorer("pearsonr", lambda y, values: np.corrcoef(y, values)[0, 1])
    if by == "score":
        return make_scorer("accuracy", lambda y, decided: np.mean(y == decided), needs_class=True)

    def log_loss(y: np.ndarray, p: np.ndarray) -> float:
        true = np.where(y == 1, p, 1 - p) if kind == "binary" else p[np.arange(len(y)), y]
        return float(-np.log(np.clip(true, np.finfo(np.float64).eps, None)).mean())

    return make_scorer("log_loss", log_loss, optimum=0, greater_is_better=False, needs_proba=True)


def autogluon(logits: np.ndarray, labels: np.ndarray, kind: Kind, *, by: str, first: bool, own_metric: bool) -> Any:
    """AutoGluon's fitted ``EnsembleSelection``; ``by`` "loss" (log-loss, RMSE) or "score" (accuracy, Pearson r).

    ``first``: of equals the first is taken, as by ours, and not one at random. ``own_metric``: with AutoGluon's own
    functions, not ``_in_numpy``. 25 steps are what AutoGluon's weighted ensembles take, and ours.
    """
    from autogluon.core import metrics
    from autogluon.core.models.greedy_ensemble.ensemble_selection import EnsembleSelection

    classes = {"loss": metrics.log_loss, "score": metrics.accuracy}
    values = {"loss": metrics.root_mean_squared_error, "score": metrics.pearsonr}
    metric = (values if kind == "regression" else classes)[by] if own_metric else _in_numpy(kind, by)
    state = _First() if first else None
    found = EnsembleSelection(ensemble_size=25, problem_type=kind, metric=metric, random_state=state)
    each = outputs(logits, kind)
    # A binary task's predictions are the probabilities of class 1 there.
    return found.fit(list(each[..., 1] if kind == "binary" else each), labels)


def autogluon_by(by: str, own_metric: bool) -> Peer:
    """AutoGluon's greedy ensemble selection."""

    def fit(logits: np.ndarray, labels: np.ndarray, kind: Kind) -> Decide:
        weights = autogluon(logits, labels, kind, by=by, first=False, own_metric=own_metric).weights_
        return lambda other: _decided(np.tensordot(weights, outputs(other, kind), axes=1), kind)

    return fit


def autosklearn_loop(logits: np.ndarray, labels: np.ndarray, kind: Kind, steps: int = 50, seed: int = 0) -> Decide:
    """auto-sklearn 0.15's ``EnsembleSelection._fast`` as a plain loop, with its defaults.

    50 steps with replacement, of equals one drawn at random, and all steps kept; by accuracy, or R². (``bagging``, its
    other way, raises "might not work" there.)
    """
    each = outputs(logits, kind)
    rng, total, order = np.random.RandomState(seed), np.zeros(each[0].shape), []
    centred = np.square(labels - labels.mean()).sum()
    for s in range(steps):
        loss = np.empty(len(each))
        for j, prediction in enumerate(each):
            mean = (total + prediction) * (1.0 / (s + 1))
            if kind == "regression":
                loss[j] = np.square(labels - mean).sum() / centred
            else:
                loss[j] = 1 - np.mean(np.argmax(mean, axis=-1) == labels)
        best = int(rng.choice(np.flatnonzero(loss == loss.min())))
        total = total + each[best]
        order.append(best)
    weights = np.array([Counter(order)[m] / steps for m in range(len(each))])
    return lambda other: _decided(np.tensordot(weights, outputs(other, kind), axes=1), kind)


class MemberClassifier(ClassifierMixin, BaseEstimator):
    """A member for scikit-learn: its probabilities are columns of X."""

    def __init__(self, start: int = 0, stop: int = 0) -> None:
        self.start, self.stop = start, stop

    def fit(self, x: np.ndarray, y: np.ndarray) -> Self:
        """Nothing is learnt."""
        self.classes_ = np.arange(self.stop - self.start)
        return self

    def predict_proba(self, x: np.ndarray) -> np.ndarray:
        """(N, classes)."""
        return x[:, self.start : self.stop]

    def predict(self, x: np.ndarray) -> np.ndarray:
        """(N,)."""
        return np.argmax(self.predict_proba(x), axis=1)


class MemberRegressor(RegressorMixin, BaseEstimator):
    """A member for scikit-learn: its values are a column of X."""

    def __init__(self, column: int = 0) -> None:
        self.column = column

    def fit(self, x: np.ndarray, y: np.ndarray) -> Self:
        """Nothing is learnt."""
        self.fitted_ = True
        return self

    def predict(self, x: np.ndarray) -> np.ndarray:
        """(N,)."""
        return x[:, self.column]


def _side_by_side(logits: np.ndarray, kind: Kind) -> np.ndarray:
    """X: all members' outputs (N, M * classes), or (N, M)."""
    each = outputs(logits, kind)
    return np.ascontiguousarray(np.moveaxis(each, 0, 1).reshape(each.shape[1], -1))


def scikit_learn(make: Callable[[Kind, list[tuple[str, Any]]], Any]) -> Peer:
    """A scikit-learn ensemble of prefit members."""

    def fit(logits: np.ndarray, labels: np.ndarray, kind: Kind) -> Decide:
        x = _side_by_side(logits, kind)
        width = x.shape[1] // len(logits)
        members: list[tuple[str, Any]] = []
        for m in range(len(logits)):
            one = MemberRegressor(m) if kind == "regression" else MemberClassifier(m * width, (m + 1) * width)
            members.append((f"m{m}", one.fit(x, labels)))
        fitted = make(kind, members).fit(x, labels)
        return lambda other: np.asarray(fitted.predict(_side_by_side(other, kind)))

    return fit


def _voting(kind: Kind, members: list[tuple[str, Any]], voting: str) -> Any:
    return VotingRegressor(members) if kind == "regression" else VotingClassifier(members, voting=voting)


def _stacking(kind: Kind, members: list[tuple[str, Any]]) -> Any:
    """The final estimators are scikit-learn's own defaults: logistic regression, and ridge with its alpha
    cross-validated."""
    if kind == "regression":
        return StackingRegressor(members, cv="prefit")
    return StackingClassifier(members, final_estimator=LogisticRegression(max_iter=1000), cv="prefit")


def peers(kind: Kind, *, own_metric: bool) -> dict[str, Peer]:
    """All that fit the kind, by name; ``own_metric``: see ``autogluon``."""
    found: dict[str, Peer] = {}
    try:
        import autogluon.core  # noqa: F401
    except ImportError:
        print("AutoGluon is not installed (pip install autogluon.core): left out")
    else:
        found |= {f"AutoGluon, by {by}": autogluon_by(by, own_metric) for by in ("loss", "score")}
    found["auto-sklearn's loop"] = autosklearn_loop
    if kind == "regression":
        found["sklearn voting"] = scikit_learn(lambda k, m: _voting(k, m, "soft"))
    else:
        found["sklearn soft voting"] = scikit_learn(lambda k, m: _voting(k, m, "soft"))
        found["sklearn hard voting"] = scikit_learn(lambda k, m: _voting(k, m, "hard"))
    found["sklearn stacking"] = scikit_learn(_stacking)
    return found
