"""Convex weights against scipy's SLSQP, their constraint against brute force, temperatures against scipy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pool_factory import random_labels, random_logits
from scipy.optimize import minimize, minimize_scalar, nnls
from scipy.special import log_softmax
from scipy.stats import linregress, pearsonr
from sklearn.metrics import log_loss

from lora_ensemble.dicor.combine import voices
from lora_ensemble.dicor.view import losses, true_probabilities
from lora_ensemble.dicor.weights import convex_weights, project, temperatures

KINDS = ("multiclass", "binary", "regression")


def by_scipy(logits, labels, kind, shrink):
    """The same objective, written down with other means, and given to SLSQP, or to NNLS for a regression."""
    k = len(logits)
    if kind == "regression":
        values = logits[..., 0].astype(float)
        line = linregress(values.mean(0), labels)
        scale = np.mean((line.intercept + line.slope * values.mean(0) - labels) ** 2)
        x = line.slope * (values - values.mean(1, keepdims=True))
        rows = np.vstack([x.T / np.sqrt(2 * scale), np.sqrt(shrink * k) * np.eye(k)])
        u = nnls(rows, np.r_[(labels - labels.mean()) / np.sqrt(2 * scale), np.full(k, np.sqrt(shrink / k))])[0]
        return u / u.sum()
    else:
        if kind == "binary":
            p = 1 / (1 + np.exp(-logits[..., 0].astype(float) * (2 * labels - 1)))
        else:
            p = np.exp(log_softmax(logits.astype(float), axis=-1))[:, np.arange(len(labels)), labels]

        def fit(w):
            return -np.sum(np.log(w @ p))

    found = minimize(
        lambda w: (fit(w) + shrink * k * np.sum((w - 1 / k) ** 2)) / len(labels),
        np.full(k, 1 / k),
        method="SLSQP",
        bounds=[(0, 1)] * k,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    assert found.success
    return found.x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shrink", [0.1, 10.0])
@pytest.mark.parametrize(("k", "n"), [(2, 30), (6, 300), (12, 80)])
def test_weights_are_those_that_scipy_finds(kind, shrink, k, n):
    labels = random_labels(kind, n)
    logits = random_logits(kind, labels, k, seed=1, noise=2)
    true = None if kind == "regression" else true_probabilities(logits, labels, kind)
    found = convex_weights(voices(logits, kind), labels, kind, true_probabilities=true, shrink=shrink)
    np.testing.assert_allclose(found, by_scipy(logits, labels, kind, shrink), atol=2e-4)
    assert found.sum() == pytest.approx(1, abs=1e-12)
    assert found.max() - found.min() > 0.01  # not the equal ones that it starts from


def test_weights_of_values_make_r_high_whatever_their_scale():
    """A member that says the same in other units, or from another level on, is as good; r is what brute force finds."""
    labels = random_labels("regression", 200)
    values = random_logits("regression", labels, 3, seed=1, noise=2)[..., 0].astype(float)
    values = values * np.array([[1.0], [0.3], [2.0]]) + np.array([[0.0], [5.0], [-1.0]])
    found = convex_weights(values[..., None], labels, "regression", true_probabilities=None, shrink=0.0)
    steps = np.linspace(0, 1, 51)
    grid = [(a, b, 1 - a - b) for a in steps for b in steps if a + b <= 1 + 1e-9]
    r = [pearsonr(np.array(w) @ values, labels).statistic for w in grid]
    assert np.max(r) - 1e-9 <= pearsonr(found @ values, labels).statistic <= np.max(r) + 1e-3
    assert np.ptp(r) > 0.05
    moved = convex_weights((7 * values + 3)[..., None], labels, "regression", true_probabilities=None)
    same = convex_weights(values[..., None], labels, "regression", true_probabilities=None)
    np.testing.assert_allclose(moved, same, atol=1e-6)


def test_values_that_go_against_the_labels_are_weighed_equally():
    labels = random_labels("regression", 50)
    for values in (-np.stack([labels, labels + 1.0]), np.stack([labels, -labels])):  # and a mean that is constant
        found = convex_weights(values[..., None], labels, "regression", true_probabilities=None)
        np.testing.assert_array_equal(found, [0.5, 0.5])


def test_shrinking_draws_to_equal_weights():
    labels = random_labels("binary", 200)
    logits = random_logits("binary", labels, 5, seed=1, noise=2)
    true = true_probabilities(logits, labels, "binary")
    spread = [
        np.ptp(convex_weights(voices(logits, "binary"), labels, "binary", true_probabilities=true, shrink=s))
        for s in (0.0, 1.0, 10.0, 1e6)
    ]
    assert spread == sorted(spread, reverse=True)
    assert spread[0] > 0.3
    assert spread[-1] < 1e-3


@settings(deadline=None, max_examples=100)
@given(v=st.lists(st.floats(-3, 3), min_size=2, max_size=3))
def test_projection_is_the_nearest_point_of_the_simplex(v):
    found = project(np.array(v))
    assert found.sum() == pytest.approx(1)
    assert found.min() >= 0
    steps = np.linspace(0, 1, 41)
    grid = (
        [(a, 1 - a) for a in steps] if len(v) == 2 else [(a, b, 1 - a - b) for a in steps for b in steps if a + b <= 1]
    )
    assert np.linalg.norm(found - v) <= min(np.linalg.norm(np.array(grid) - v, axis=1)) + 1e-9


@pytest.mark.parametrize("kind", ["multiclass", "binary"])
def test_losses_are_scikit_learns(kind):
    labels = random_labels(kind, 60)
    logits = random_logits(kind, labels, 3)
    p = voices(logits, kind)
    for m in range(3):
        given_ = p[m] if kind == "multiclass" else np.hstack([0.5 - p[m], 0.5 + p[m]])
        expected = log_loss(labels, given_, labels=np.unique(labels))
        assert losses(logits, labels, kind)[m].mean() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", ["multiclass", "binary"])
def test_temperatures_are_those_that_scipy_finds(kind):
    labels = random_labels(kind, 200)
    logits = 4 * random_logits(kind, labels, 3, noise=1.0)
    found = temperatures(logits, labels, kind)
    for m in range(3):
        best = minimize_scalar(
            lambda t, m=m: losses(logits[m] / np.exp(t), labels, kind).mean(), bounds=(-3, 3), method="bounded"
        )
        assert found[m] == pytest.approx(np.exp(best.x), rel=1e-3)
    assert 2 < found.max() < 15  # these logits are far too sure
