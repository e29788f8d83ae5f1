"""Convex weights against SLSQP, their constraint against brute force, temperatures and offsets against scipy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pool_factory import random_labels, random_logits
from scipy.optimize import minimize, minimize_scalar, nnls
from scipy.special import log_softmax, logsumexp
from scipy.stats import linregress, pearsonr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from lora_ensemble.dicor.choose.probabilities import class_probabilities, losses, soft_votes
from lora_ensemble.dicor.choose.weights import convex_weights, project, scale_and_offsets, temperatures
from lora_ensemble.dicor.members import Members

KINDS = ("multiclass", "binary", "regression")


def members_of(logits, labels, kind):
    names = [f"m{i}" for i in range(len(logits))]
    ranks, scores = [None] * len(logits), np.zeros(len(logits))
    return Members(logits=logits, labels=labels, kind=kind, names=names, ranks=ranks, scores=scores)


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


def test_weights_are_drawn_to_equal_ones_by_a_shrink_of_1():
    labels = random_labels("multiclass", 80)
    logits = random_logits("multiclass", labels, 6, seed=1, noise=2)
    found = convex_weights(members_of(logits, labels, "multiclass"))
    np.testing.assert_allclose(found, by_scipy(logits, labels, "multiclass", 1.0), atol=1e-4)
    assert np.abs(found - by_scipy(logits, labels, "multiclass", 10.0)).max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shrink", [0.1, 10.0])
@pytest.mark.parametrize(("k", "n"), [(2, 30), (6, 300), (12, 80)])
def test_weights_are_those_that_scipy_finds(kind, shrink, k, n):
    labels = random_labels(kind, n)
    logits = random_logits(kind, labels, k, seed=1, noise=2)
    found = convex_weights(members_of(logits, labels, kind), shrink=shrink)
    np.testing.assert_allclose(found, by_scipy(logits, labels, kind, shrink), atol=2e-4)
    assert found.sum() == pytest.approx(1, abs=1e-12)
    assert found.max() - found.min() > 0.01  # not the equal ones that it starts from


def test_weights_of_values_make_r_high_whatever_their_scale():
    """A member that says the same in other units, or from another level on, is as good; r is what brute force finds."""
    labels = random_labels("regression", 200)
    values = random_logits("regression", labels, 3, seed=1, noise=2)[..., 0].astype(float)
    values = values * np.array([[1.0], [0.3], [2.0]]) + np.array([[0.0], [5.0], [-1.0]])
    found = convex_weights(members_of(values[..., None], labels, "regression"), shrink=0.0)
    steps = np.linspace(0, 1, 51)
    grid = [(a, b, 1 - a - b) for a in steps for b in steps if a + b <= 1 + 1e-9]
    r = [pearsonr(np.array(w) @ values, labels).statistic for w in grid]
    assert np.max(r) - 1e-9 <= pearsonr(found @ values, labels).statistic <= np.max(r) + 1e-3
    assert np.ptp(r) > 0.05
    moved = convex_weights(members_of((7 * values + 3)[..., None], labels, "regression"))
    same = convex_weights(members_of(values[..., None], labels, "regression"))
    np.testing.assert_allclose(moved, same, atol=1e-6)


def test_values_that_go_against_the_labels_are_weighed_equally():
    labels = random_labels("regression", 50)
    for values in (-np.stack([labels, labels + 1.0]), np.stack([labels, -labels])):  # and a mean that is constant
        found = convex_weights(members_of(values[..., None], labels, "regression"))
        np.testing.assert_array_equal(found, [0.5, 0.5])


def test_shrinking_draws_to_equal_weights():
    labels = random_labels("binary", 200)
    logits = random_logits("binary", labels, 5, seed=1, noise=2)
    members = members_of(logits, labels, "binary")
    spread = [np.ptp(convex_weights(members, shrink=s)) for s in (0.0, 1.0, 10.0, 1e6)]
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
    for m in range(3):
        given_ = class_probabilities(soft_votes(logits[m], kind), kind)
        expected = log_loss(labels, given_, labels=np.unique(labels))
        assert losses(logits, labels, kind)[m].mean() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", ["multiclass", "binary"])
def test_temperatures_are_those_that_scipy_finds(kind):
    labels = random_labels(kind, 200)
    logits = 4 * random_logits(kind, labels, 3, noise=1.0)
    found = temperatures(members_of(logits, labels, kind))
    for m in range(3):
        best = minimize_scalar(
            lambda t, m=m: losses(logits[m] / np.exp(t), labels, kind).mean(), bounds=(-3, 3), method="bounded"
        )
        assert found[m] == pytest.approx(np.exp(best.x), rel=1e-3)
    assert 2 < found.max() < 15  # these logits are far too sure


def test_scale_and_offsets_are_those_of_logistic_regression():
    """Two classes: logit' = a logit + b, without the pull."""
    labels = random_labels("binary", 300)
    logits = 8 * random_logits("binary", labels, 1, seed=1, noise=2)[0].astype(float) - 4
    scale, offsets = scale_and_offsets(soft_votes(logits, "binary"), labels, "binary", pull=1e-9)
    expected = LogisticRegression(C=1e12, tol=1e-12, max_iter=1000).fit(logits, labels)
    assert scale == pytest.approx(expected.coef_[0, 0], rel=1e-4)
    assert offsets[1] - offsets[0] == pytest.approx(expected.intercept_[0], rel=1e-4)
    assert abs(expected.coef_[0, 0] - 1) > 0.5  # too sure,
    assert expected.intercept_[0] > 0.5  # and too often of class 0


@pytest.mark.parametrize("kind", ["multiclass", "binary"])
@pytest.mark.parametrize("pull", [0.1, 1.0, 30.0])
def test_scale_and_offsets_are_those_that_scipy_finds(kind, pull):
    labels = random_labels(kind, 120)
    labels[labels == 4] = 3  # a class that never occurs
    logits = 2 * random_logits(kind, labels, 1, seed=1, noise=2)[0].astype(float)
    logits[:, 0] += 1
    z = log_softmax(logits if kind == "multiclass" else np.hstack([0 * logits, logits]), axis=1)

    def objective(t):
        u = t[0] * z + t[1:]
        fit = np.sum(logsumexp(u, axis=1) - u[np.arange(120), labels])
        return fit + pull / 2 * ((t[0] - 1) ** 2 + np.sum(t[1:] ** 2))

    expected = minimize(objective, np.r_[1.0, np.zeros(z.shape[1])], method="BFGS", options={"gtol": 1e-7}).x
    scale, offsets = scale_and_offsets(soft_votes(logits, kind), labels, kind, pull=pull)
    np.testing.assert_allclose([scale, *offsets], expected, atol=1e-5)
    assert np.abs(offsets).max() > 0.05


@pytest.mark.parametrize("pull", [1e-3, 1.0, 10.0])
def test_scale_and_offsets_of_one_class_by_hand(pull):
    """N examples of probability 1/2, all of class 1: q = sigmoid(d), d = b1 - b0 = 2 b1, where N (1 - q) = pull b1."""
    given = {} if pull == 10 else {"pull": pull}  # the default
    scale, offsets = scale_and_offsets(np.zeros((7, 1)), np.ones(7, int), "binary", **given)
    assert scale == pytest.approx(1)  # log p is the same for both classes: nothing is said of the scale
    assert offsets[0] == pytest.approx(-offsets[1])
    assert 7 / (1 + np.exp(2 * offsets[1])) == pytest.approx(pull * offsets[1], rel=1e-6)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), n=st.sampled_from([1, 3, 50]), size=st.sampled_from([0.01, 1.0, 300.0, 1e30]))
def test_the_gradient_is_zero_at_scale_and_offsets(seed, n, size):
    """Also for probabilities of 0 and 1, and for members that are always wrong. They count as 1e-15 at least."""
    labels = random_labels("multiclass", n, seed=seed)
    logits = size * random_logits("multiclass", labels, 1, seed=seed, noise=1)[0].astype(float) * (-1) ** seed
    voice = soft_votes(logits, "multiclass")
    scale, offsets = scale_and_offsets(voice, labels, "multiclass", pull=1.0)
    z = np.log(np.maximum(voice, 1e-15))
    off = np.exp(log_softmax(scale * z + offsets, axis=1)) - np.eye(5)[labels]
    assert abs(np.sum(off * z) + scale - 1) < 1e-5 * (1 + n)
    np.testing.assert_allclose(off.sum(axis=0) + offsets, 0, atol=1e-6 * (1 + n))
