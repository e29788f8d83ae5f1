"""Scores and decisions against scikit-learn, scipy and torchmetrics; the presets; mistakes in a task."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score
from torchmetrics.functional.regression import pearson_corrcoef

from lora_ensemble.errors import UserError
from lora_ensemble.scores import decisions, overall_score, pearson, score
from lora_ensemble.tasks import PRESETS, Task

RANDOM = np.random.default_rng(0)


def test_accuracy_is_scikit_learns() -> None:
    logits, labels = RANDOM.normal(size=(200, 5)), RANDOM.integers(0, 5, 200)
    assert score(logits, labels, "multiclass") == accuracy_score(labels, logits.argmax(1))
    binary, truth = RANDOM.normal(size=(200, 1)), RANDOM.integers(0, 2, 200)
    assert score(binary, truth, "binary") == accuracy_score(truth, 1 / (1 + np.exp(-binary[:, 0])) > 0.5)


@pytest.mark.parametrize("shift", [0.0, 1e6])
def test_pearson_is_scipys_and_torchmetrics(shift: float) -> None:
    a, b = RANDOM.normal(size=300), RANDOM.normal(size=300)
    a = a + b + shift
    assert pearson(a, b) == pytest.approx(pearsonr(a, b).statistic, abs=1e-9)
    assert score(a[:, None], b, "regression") == pearson(a, b)
    if not shift:
        assert pearson(a, b) == pytest.approx(float(pearson_corrcoef(torch.tensor(a), torch.tensor(b))), abs=1e-9)


def test_pearson_of_a_constant_is_undefined() -> None:
    assert math.isnan(pearson(np.full(5, 0.1), np.arange(5.0)))
    assert math.isnan(pearson(np.arange(5.0), np.full(5, 0.1)))
    assert math.isnan(pearson(np.array([]), np.array([])))
    assert pearson(np.array([1e-200, 2e-200, 3e-200]), np.arange(3.0)) == pytest.approx(1.0)


def test_decisions_at_the_border() -> None:
    assert decisions(np.array([[0.0], [1e-9], [-1e-9]]), "binary").tolist() == [0, 1, 0]
    assert decisions(np.array([[1.0, 1.0, 0.0]]), "multiclass").tolist() == [0]
    assert decisions(np.array([[[2.5]], [[-1.0]]]), "regression").tolist() == [[2.5], [-1.0]]


def test_overall_score_reproduces_the_reports() -> None:
    """Oyeniyi's table of section 5.3, models 2 and 8; Tolkunov's DiCor-LoRA on dev."""
    for sst, quora, sts, overall in (
        (0.272, 0.632, 0.013, 0.470),
        (0.241, 0.632, 0.133, 0.480),
        (0.544, 0.905, 0.885, 0.797),
    ):
        scores: dict[str, Any] = {
            "sst": (sst, "multiclass"),
            "quora": (quora, "binary"),
            "sts": (sts, "regression"),
        }
        assert overall_score(scores) == pytest.approx(overall, abs=6e-4)


def test_the_presets() -> None:
    assert [(t.name, t.kind, t.num_outputs, len(t.text)) for t in PRESETS.values()] == [
        ("sst", "multiclass", 5, 1),
        ("quora", "binary", 1, 2),
        ("sts", "regression", 1, 2),
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "ranking"}, "kind is 'ranking'; expected one of multiclass, binary, multilabel, regression"),
        ({"text": []}, "text names 0 columns"),
        ({"text": ["a", "b", "c"]}, "text names 3 columns"),
        ({"kind": "multiclass"}, "label_names has 0 entries"),
        ({"label_names": ["a"]}, "label_names has 1 entries; binary needs two or none"),
        ({"label_names": ["a", "a"]}, "holds a name twice"),
        ({"kind": "regression", "label_names": ["a", "b"]}, "no meaning for regression"),
        ({"label_range": [0, 1]}, "for regression only"),
        ({"name": "../x"}, "a task's name is a folder's name"),
        ({"name": ""}, "a task's name"),
    ],
)
def test_mistakes(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Task(**({"name": "t", "kind": "binary", "text": ["x"]} | fields))


def test_label_names_may_be_numbers_but_not_booleans() -> None:
    task = Task(name="t", kind="multiclass", text=["x"], label_names=[1, 2.5, "c"])
    assert task.labels == ["1", "2.5", "c"]
    with pytest.raises(UserError, match="label_names holds a name twice"):
        Task(name="t", kind="binary", text=["x"], label_names=[1, "1"])
    with pytest.raises(UserError, match=r"""task 't': label_names holds False, .*write "no" in quotes"""):
        Task(name="t", kind="binary", text=["x"], label_names=[False, True])
