"""Scores of several labels against scikit-learn: labels that are absent, always there, or never decided for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn import metrics

from lora_ensemble.scores import as_binary, by_example, decisions, one_label, said_of, score, scored
from lora_ensemble.tasks import DEFAULT_SCORE, SCORES, ScoreName, Task, check_score

NAMES = [name for name, about in SCORES.items() if "multilabel" in about.kinds]


def f1(average: str) -> Callable[..., float]:
    # zero_division NaN: a label that no example has and nobody decided for does not count.
    rest: Any = np.nan if average != "micro" else 0.0

    def of(y: np.ndarray, d: np.ndarray, weights: np.ndarray | None = None) -> float:
        value = metrics.f1_score(y, d, average=average, zero_division=rest, sample_weight=weights)
        return float(np.nan_to_num(value))  # 0 where all labels are such

    return of


def of_labels(one: Callable[..., float], y: np.ndarray, p: np.ndarray, weights: np.ndarray | None) -> float:
    """The mean of scikit-learn's value of each label that has an area: for auroc with examples of both sides."""
    w = np.ones(len(y)) if weights is None else weights
    both = [(w * y[:, i]).sum() > 0 and ((w * (1 - y[:, i])).sum() > 0 or one is AP) for i in range(y.shape[1])]
    found = [one(y[:, i], p[:, i], sample_weight=weights) for i in np.flatnonzero(both)]
    return float(np.mean(found)) if found else np.nan


AP = metrics.average_precision_score


def by_sklearn(name: ScoreName, logits: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> float:
    d, p = (logits > 0).astype(int), expit(logits.astype(float))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "accuracy":
            return 1 - metrics.hamming_loss(y, d, sample_weight=weights)
        if name == "log_loss":
            each = None if weights is None else np.repeat(weights, y.shape[1])
            return metrics.log_loss(y.ravel(), p.ravel(), labels=[0, 1], sample_weight=each)
        if name.startswith("f1"):
            return f1(name.removeprefix("f1_"))(y, d, weights)
        return of_labels(metrics.roc_auc_score if name == "auroc" else AP, y, p, weights)


def made_up(n: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels (N, L): some labels are never there, some always; some are never decided for."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, width)) < rng.choice([0, 0.2, 0.7, 1], size=width)).astype(np.int64)
    logits = rng.integers(-3, 3, size=(n, width)) / 2 + rng.choice([-3, 0, 0, 1], size=width)
    return logits, labels


def test_which_scores_there_are() -> None:
    assert NAMES == ["accuracy", "f1_macro", "f1_micro", "f1_weighted", "auroc", "average_precision", "log_loss"]
    assert check_score(None, "multilabel") == DEFAULT_SCORE["multilabel"] == "f1_micro"
    assert Task(name="t", kind="multilabel", text=["x"], label_names=["a", "b"]).score_name == "micro F1"


@settings(deadline=None, max_examples=300)
@given(name=st.sampled_from(NAMES), n=st.integers(1, 30), width=st.integers(2, 5), seed=st.integers(0, 10**6))
def test_it_is_scikit_learns(name: ScoreName, n: int, width: int, seed: int) -> None:
    logits, labels = made_up(n, width, seed)
    expected = by_sklearn(name, logits, labels)
    assert score(logits, labels, "multilabel", name) == pytest.approx(expected, abs=1e-9, nan_ok=True)


@settings(deadline=None, max_examples=100)
@given(name=st.sampled_from(NAMES), seed=st.integers(0, 10**6))
def test_weights_count_examples(name: ScoreName, seed: int) -> None:
    """How often each example was drawn, all its labels together; several members at once."""
    labels = made_up(15, 3, seed)[1]
    logits = np.stack([made_up(15, 3, seed + i)[0] for i in range(4)])
    weights = np.random.default_rng(seed).integers(0, 3, size=(5, 15))
    weights[:, 0] += 1
    rows, kind, width = as_binary(logits, "multilabel")
    assert (rows.shape, kind, width) == ((4, 45, 1), "binary", 3)
    each = np.repeat(weights, 3, axis=1)
    found = scored(said_of(rows, kind, name), labels.ravel(), kind, name, each, width=width)
    assert found.shape == (4, 5)
    for m, w in np.ndindex(4, 5):
        expected = by_sklearn(name, logits[m], labels, weights[w])
        assert found[m, w] == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_by_hand() -> None:
    """Three texts, labels a, b and c; c is never there and never decided for, so that macro F1 is of a and b."""
    labels = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0]])
    logits = np.array([[2.0, 1.0, -1.0], [1.0, -1.0, -1.0], [-2.0, 3.0, -1.0]])
    of = {name: score(logits, labels, "multilabel", name) for name in NAMES}
    assert of["accuracy"] == pytest.approx(7 / 9)
    assert of["f1_micro"] == pytest.approx(2 * 3 / (4 + 4))
    assert of["f1_macro"] == of["f1_weighted"] == pytest.approx((1 + 0.5) / 2)
    assert of["auroc"] == pytest.approx(
        (1 + 0.5) / 2
    )  # of b: 3 above 1 above -1, of which the first and last are there
    nothing = np.zeros((3, 2), int)
    assert score(nothing - 1.0, nothing, "multilabel", "f1_micro") == 0
    assert score(nothing - 1.0, nothing, "multilabel", "f1_macro") == 0
    assert np.isnan(score(nothing - 1.0, nothing, "multilabel", "auroc"))


def test_decisions_and_the_way_back() -> None:
    logits = np.array([[[0.5, -0.5], [0.0, 2.0], [1e-9, -1e-9]]])
    assert decisions(logits, "multilabel").tolist() == [[[1, 0], [0, 1], [1, 0]]]
    rows, kind, width = as_binary(logits, "multilabel")
    assert by_example(decisions(rows, kind), width).tolist() == [[[1, 0], [0, 1], [1, 0]]]


def test_labels_without_both_sides_are_told() -> None:
    labels = np.array([[1, 0, 1, 0], [0, 0, 1, 0], [1, 0, 1, 1]])
    (notice,) = one_label(labels, ["a", "b", "c", "d"], "dev labels")
    assert notice == "of the dev labels none or all of 3 examples have b, c"
    assert one_label(labels[:, [0, 3]], ["a", "d"]) == []
