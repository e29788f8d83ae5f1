"""Every score against scikit-learn and torchmetrics, absent classes, constants and ties included; many at once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from by_others import probabilities, score_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics import classification as c
from torchmetrics import regression as r

from lora_ensemble.errors import UserError
from lora_ensemble.scores import decisions, overall, said_of, score, scored
from lora_ensemble.tasks import DEFAULT_SCORE, PRESETS, SCORES, Kind, ScoreName, Task

EVERY = [(kind, name) for name, about in SCORES.items() for kind in about.kinds if kind != "multilabel"]
CLASSES: dict[Kind, int] = {"multiclass": 4, "binary": 2, "regression": 0}


def made_up(kind: Kind, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, C) with ties and labels (N,), in which a class or two may be absent, or all may be the same."""
    rng = np.random.default_rng(seed)
    if kind == "regression":
        labels = rng.integers(rng.integers(1, 6), size=n).astype(float)
        return (labels[:, None] * rng.integers(2) + rng.integers(rng.integers(1, 6), size=(n, 1)) / 2), labels
    k = CLASSES[kind]
    labels = rng.choice(rng.choice(k, rng.integers(1, k + 1), replace=False), size=n)
    outputs = k if kind == "multiclass" else 1
    return rng.integers(-2, 3, size=(n, outputs)) / rng.integers(1, 4) + rng.choice([-1, 0, 1]) * 1.0, labels


def said_by_others(kind: Kind, name: ScoreName, logits: np.ndarray) -> Any:
    p = probabilities(logits[None], kind)[0]
    if SCORES[name].of == "probabilities":
        return p
    return p if kind == "regression" else p.argmax(-1)  # numpy's argmax, the lowest of equals


def test_the_table_has_every_score_of_a_kind() -> None:
    of = {kind: [name for k, name in EVERY if k == kind] for kind in CLASSES}
    assert of["regression"] == ["pearson", "spearman", "mae", "rmse", "r2"]
    assert [name for name in of["binary"] if name != "f1"] == of["multiclass"]
    assert {name for name, about in SCORES.items() if about.sign < 0} == {"log_loss", "mae", "rmse"}
    for task in PRESETS.values():
        assert task.scored_by == DEFAULT_SCORE[task.kind] == {"regression": "pearson"}.get(task.kind, "accuracy")


@settings(deadline=None, max_examples=250)
@given(which=st.sampled_from(EVERY), n=st.integers(2, 40), seed=st.integers(0, 10**6))
def test_it_is_scikit_learns_and_scipys(which: tuple[Kind, ScoreName], n: int, seed: int) -> None:
    kind, name = which
    logits, labels = made_up(kind, n, seed)
    expected = score_of(name, said_by_others(kind, name, logits), labels, kind)
    assert score(logits, labels, kind, name) == pytest.approx(expected, abs=1e-9, nan_ok=True)


@settings(deadline=None, max_examples=60)
@given(which=st.sampled_from(EVERY), seed=st.integers(0, 10**6))
def test_many_at_once_are_each_alone(which: tuple[Kind, ScoreName], seed: int) -> None:
    """Members and epochs as leading axes, and weights: how often each example counts, by repeating it."""
    kind, name = which
    rng = np.random.default_rng(seed)
    labels = made_up(kind, 20, seed)[1]
    logits = np.stack([made_up(kind, 20, seed + i)[0] for i in range(6)]).reshape(2, 3, 20, -1)
    weights = rng.integers(0, 3, size=(4, 20))
    weights[0, :2] = 1
    said = said_of(logits, kind, name)
    alone, many = scored(said, labels, kind, name), scored(said, labels, kind, name, weights)
    assert alone.shape == (2, 3)
    assert many.shape == (2, 3, 4)
    for i, j in np.ndindex(2, 3):
        other = said_by_others(kind, name, logits[i, j])
        assert alone[i, j] == pytest.approx(score_of(name, other, labels, kind), abs=1e-9, nan_ok=True)
        for w, times in enumerate(weights):
            expected = score_of(name, np.repeat(other, times, axis=0), np.repeat(labels, times), kind)
            assert many[i, j, w] == pytest.approx(expected, abs=1e-9, nan_ok=True)


MANY = {"num_classes": 4}
BY_TORCHMETRICS: dict[tuple[Kind, ScoreName], Callable[[], Any]] = {
    ("multiclass", "accuracy"): lambda: c.MulticlassAccuracy(**MANY, average="micro"),
    ("multiclass", "balanced_accuracy"): lambda: c.MulticlassRecall(**MANY, average="macro"),
    ("multiclass", "f1_macro"): lambda: c.MulticlassF1Score(**MANY, average="macro"),
    ("multiclass", "f1_micro"): lambda: c.MulticlassF1Score(**MANY, average="micro"),
    ("multiclass", "f1_weighted"): lambda: c.MulticlassF1Score(**MANY, average="weighted"),
    ("multiclass", "mcc"): lambda: c.MulticlassMatthewsCorrCoef(**MANY),
    ("multiclass", "kappa_quadratic"): lambda: c.MulticlassCohenKappa(**MANY, weights="quadratic"),
    ("multiclass", "auroc"): lambda: c.MulticlassAUROC(**MANY),
    ("multiclass", "average_precision"): lambda: c.MulticlassAveragePrecision(**MANY),
    ("binary", "accuracy"): c.BinaryAccuracy,
    ("binary", "f1"): c.BinaryF1Score,
    ("binary", "f1_macro"): lambda: c.MulticlassF1Score(num_classes=2, average="macro"),
    ("binary", "mcc"): c.BinaryMatthewsCorrCoef,
    ("binary", "kappa_quadratic"): lambda: c.BinaryCohenKappa(weights="quadratic"),
    ("binary", "auroc"): c.BinaryAUROC,
    ("binary", "average_precision"): c.BinaryAveragePrecision,
    ("regression", "pearson"): r.PearsonCorrCoef,
    ("regression", "spearman"): r.SpearmanCorrCoef,
    ("regression", "mae"): r.MeanAbsoluteError,
    ("regression", "rmse"): lambda: r.MeanSquaredError(squared=False),
    ("regression", "r2"): r.R2Score,
}


def by_torchmetrics(kind: Kind, name: ScoreName, said: np.ndarray, labels: np.ndarray) -> float:
    if kind == "binary" and SCORES[name].of == "probabilities":
        said = said[:, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of absent classes
        return float(BY_TORCHMETRICS[kind, name]()(torch.from_numpy(said), torch.from_numpy(labels)))


@pytest.mark.parametrize(("kind", "name"), BY_TORCHMETRICS)
def test_it_is_torchmetrics(kind: Kind, name: ScoreName) -> None:
    rng = np.random.default_rng(1)
    labels = rng.normal(size=80) if kind == "regression" else rng.integers(CLASSES[kind], size=80)
    logits = rng.normal(size=(80, 4 if kind == "multiclass" else 1))
    logits[:, 0] += labels if kind != "multiclass" else labels == 0
    found = score(logits, labels, kind, name)
    assert found == pytest.approx(by_torchmetrics(kind, name, said_by_others(kind, name, logits), labels), abs=1e-5)
    assert found != score(rng.permuted(logits, axis=0), labels, kind, name)


@pytest.mark.parametrize("name", ["f1_macro", "f1_weighted", "kappa_quadratic", "mcc", "average_precision"])
def test_a_class_that_is_absent_counts_as_little_as_it_does_for_torchmetrics(name: ScoreName) -> None:
    """Class 3 neither occurs nor is decided for; class 2 is decided for and does not occur."""
    logits = np.array([[3.0, 0, 0, -9], [0, 3, 1, -9], [0, 1, 3, -9], [2, 3, 0, -9], [3, 0, 0, -8]])
    labels = np.array([0, 1, 1, 0, 0])
    expected = by_torchmetrics("multiclass", name, said_by_others("multiclass", name, logits), labels)
    assert score(logits, labels, "multiclass", name) == pytest.approx(expected, abs=1e-6)


ONES, ZEROS = np.ones(6, int), np.zeros(6, int)
SURE = np.array([[1.0], [-1.0], [2.0], [-2.0], [1.0], [-1.0]])  # decides 1 0 1 0 1 0


@pytest.mark.parametrize(
    ("name", "labels", "logits", "expected"),
    [
        # Nobody is positive, and somebody is said to be; nobody is either; all are, and all are said to be.
        ("f1", ZEROS, SURE, 0.0),
        ("f1", ZEROS, -np.abs(SURE), 0.0),
        ("f1", ONES, np.abs(SURE), 1.0),
        ("f1_macro", ONES, np.abs(SURE), 1.0),  # class 0 does not count
        ("balanced_accuracy", ONES, SURE, 0.5),  # the recall of class 1 alone
        ("mcc", ONES, SURE, 0.0),
        ("kappa_quadratic", ONES, SURE, 0.0),
        ("kappa_quadratic", ONES, np.abs(SURE), math.nan),
        ("auroc", ONES, SURE, math.nan),
        ("auroc", ZEROS, SURE, math.nan),
        ("average_precision", ZEROS, SURE, math.nan),
        ("average_precision", ONES, SURE, 1.0),
        ("auroc", np.array([1, 0, 1, 0, 1, 0]), 0 * SURE, 0.5),  # all tie
        ("average_precision", np.array([1, 0, 0, 0, 0, 0]), 0 * SURE, 1 / 6),
        ("log_loss", ONES, -1e9 * np.abs(SURE), -math.log(1e-15)),
    ],
)
def test_what_is_missing_by_hand(name: ScoreName, labels: np.ndarray, logits: np.ndarray, expected: float) -> None:
    assert score(logits, labels, "binary", name) == pytest.approx(expected, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("name", ["pearson", "spearman", "r2"])
def test_of_a_constant_it_is_undefined(name: ScoreName) -> None:
    rising, constant = np.arange(5.0), np.full(5, 0.1)
    assert math.isnan(score(rising[:, None], constant, "regression", name))
    ones = np.ones((2, 5))
    assert np.isnan(scored(rising, constant, "regression", name, ones)).all()
    if name != "r2":
        assert np.isnan(scored(constant, rising, "regression", name, ones)).all()
        assert math.isnan(score(constant[:, None], rising, "regression", name))


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_what_is_never_wrong_has_the_best_score_there_is(kind: Kind, name: ScoreName) -> None:
    about, labels = SCORES[name], np.array([0, 1, 2, 3, 1, 0]) % (2 if kind == "binary" else 4)
    logits = 99.0 * np.eye(4)[labels] if kind == "multiclass" else labels[:, None] * (1.0 if not CLASSES[kind] else 99)
    logits = logits - 49 if kind == "binary" else logits
    best = score(logits, labels, kind, name)
    assert best == pytest.approx(about.most if about.sign > 0 else about.least, abs=1e-9)
    assert about.sign * score(logits[::-1], labels, kind, name) < about.sign * best


def test_quadratic_kappa_takes_labels_in_their_order() -> None:
    """Two apart is worse than one apart, though accuracy is the same."""
    labels, near, far = np.array([0, 1, 2, 0, 1, 2]), np.array([0, 1, 1, 0, 1, 2]), np.array([0, 1, 0, 0, 1, 2])
    found = [float(scored(d, labels, "multiclass", "kappa_quadratic")) for d in (near, far)]
    assert found == pytest.approx([score_of("kappa_quadratic", d, labels, "multiclass") for d in (near, far)])
    assert found[0] > found[1]
    assert score_of("accuracy", near, labels, "multiclass") == score_of("accuracy", far, labels, "multiclass")


def test_a_task_names_its_score() -> None:
    task = Task(name="t", kind="binary", text=["x"], score="f1")
    assert (task.scored_by, task.score_name, task.sign, task.recorded) == ("f1", "F1", 1, {"score": "f1"})
    assert PRESETS["sts"].recorded == {}
    with pytest.raises(UserError, match=r"^task 't': score is 'f1'; a multiclass task has one of accuracy, balanced_"):
        Task(name="t", kind="multiclass", text=["x"], label_names=["a", "b"], score="f1")
    with pytest.raises(UserError, match=r"score is 'F1'; a binary task has one of accuracy, .*, f1, .*, log_loss$"):
        Task(name="t", kind="binary", text=["x"], score="F1")


def test_the_overall_score_of_several_tasks_by_hand() -> None:
    """(3 * 0.8 - 1 * 0.4) / 4, of an F1 and an RMSE; one task is its own, the lower the better where that is so."""
    text: Any = {"text": ["x"]}
    f1 = Task(name="a", kind="binary", score="f1", overall=3.0, **text)
    rmse = Task(name="b", kind="regression", score="rmse", overall=1.0, **text)
    assert overall([0.8, 0.4], [f1, rmse]) == pytest.approx(0.5)
    assert overall([0.8], [f1]) == 0.8
    assert overall([0.4], [rmse]) == -0.4
    assert math.isnan(overall([0.8, math.nan], [f1, rmse]))


def test_what_a_score_is_of() -> None:
    z = np.array([[0.3], [-0.2]])
    assert said_of(z, "binary", "f1").tolist() == decisions(z, "binary").tolist() == [1, 0]
    np.testing.assert_allclose(said_of(z, "binary", "auroc"), probabilities(z[None], "binary")[0], rtol=1e-12)
