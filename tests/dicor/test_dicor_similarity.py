"""Similarities against scikit-learn and scipy, and what must leave them as they are."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pool_factory import random_labels, random_logits
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, cohen_kappa_score
from sklearn.metrics.pairwise import cosine_similarity

from lora_ensemble.dicor.choose.similarity import features, pairwise, similarity_to
from lora_ensemble.errors import UserError
from lora_ensemble.scores import decisions

KINDS = ("multiclass", "binary", "regression")
NAMES = [f"m{i}" for i in range(100)]


def logits_of(kind, members=5, n=40, seed=0):
    return random_logits(kind, random_labels(kind, n, seed=seed), members, seed=seed + 1)


def test_cosine_worked_out_by_hand():
    """Decisions 0 1 2 0, 0 1 0 0 and 2 0 1 1 agree on 3 of 4, 0 of 4 and 0 of 4 examples."""
    logits = np.eye(3)[[[0, 1, 2, 0], [0, 1, 0, 0], [2, 0, 1, 1]]]
    found = pairwise(features(logits, kind="multiclass", similarity="cosine"))
    assert found.tolist() == [[1, 0.75, 0], [0.75, 1, 0], [0, 0, 1]]


def test_pearson_worked_out_by_hand():
    """1 2 3 4 against 2 4 6 8 is 1, against 1 0 0 1 is 0, against 4 3 2 1 is -1."""
    logits = np.array([[1, 2, 3, 4], [2, 4, 6, 8], [1, 0, 0, 1], [4, 3, 2, 1]], float)[..., None]
    found = features(logits, kind="regression", similarity="pearson")
    assert similarity_to(found[0], found) == pytest.approx([1, 1, 0, -1], abs=1e-15)


@pytest.mark.parametrize("kind", ["multiclass", "binary"])
def test_cosine_is_scikit_learns_of_the_one_hot_decisions_and_the_share_that_agrees(kind):
    logits = logits_of(kind)
    decided = decisions(logits, kind)
    found = pairwise(features(logits, kind=kind, similarity="cosine"))
    one_hot = np.eye(5)[decided].reshape(len(decided), -1)
    np.testing.assert_allclose(found, cosine_similarity(one_hot), atol=1e-12)
    assert found[0, 1] == accuracy_score(decided[0], decided[1])
    assert 0 < found.min() < found.max() == 1


def test_cosine_of_a_regression_is_scikit_learns_of_the_values():
    logits = logits_of("regression")
    found = pairwise(features(logits, kind="regression", similarity="cosine"))
    np.testing.assert_allclose(found, cosine_similarity(logits[..., 0].astype(float)), atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_pearson_is_scipys(kind):
    logits = logits_of(kind).astype(float)
    found = pairwise(features(logits, kind=kind, similarity="pearson"))
    if kind == "multiclass":
        logits = logits - logits.mean(-1, keepdims=True)
    for i in range(len(logits)):
        for j in range(len(logits)):
            assert found[i, j] == pytest.approx(pearsonr(logits[i].ravel(), logits[j].ravel()).statistic, abs=1e-12)


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 10**6), permutation=st.permutations(range(5)), similarity=st.sampled_from(["cosine", "pearson"])
)
def test_renumbering_the_classes_changes_no_similarity(seed, permutation, similarity):
    logits = logits_of("multiclass", seed=seed)
    before = pairwise(features(logits, kind="multiclass", similarity=similarity))
    after = pairwise(features(logits[..., permutation], kind="multiclass", similarity=similarity))
    np.testing.assert_allclose(after, before, atol=1e-12)


@pytest.mark.parametrize("similarity", ["cosine", "pearson"])
def test_exchanging_the_two_classes_changes_no_similarity(similarity):
    logits = logits_of("binary")
    before = pairwise(features(logits, kind="binary", similarity=similarity))
    after = pairwise(features(-logits, kind="binary", similarity=similarity))
    np.testing.assert_allclose(after, before, atol=1e-12)


def test_a_shift_of_all_logits_of_an_example_changes_no_pearson():
    logits = logits_of("multiclass").astype(float)
    shift = np.random.default_rng(5).normal(size=(*logits.shape[:2], 1)) * 10
    before = pairwise(features(logits, kind="multiclass", similarity="pearson"))
    after = pairwise(features(logits + shift, kind="multiclass", similarity="pearson"))
    np.testing.assert_allclose(after, before, atol=1e-12)
    # Without the centring it would: that the shift is large enough to matter is part of the test.
    assert abs(pearsonr((logits + shift)[0].ravel(), (logits + shift)[1].ravel()).statistic - before[0, 1]) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_member_counts_as_like_all_others(kind):
    """Its r is undefined (scipy says NaN); 1 keeps it from being chosen for being different."""
    logits = logits_of(kind)
    # Per example for multiclass: a different shift each, and 0.1 is not exact in binary.
    logits[3] = 0.1 * np.arange(1, 41)[:, None] if kind == "multiclass" else 0.1
    found = pairwise(features(logits, kind=kind, similarity="pearson"))
    assert found[3].tolist() == found[:, 3].tolist() == [1] * 5
    assert found[0, 1] == pytest.approx(pairwise(features(logits[:2], kind=kind, similarity="pearson"))[0, 1])
    assert found[0, 1] < 1


def test_a_member_of_zeros_counts_as_like_all_others_on_a_regression():
    logits = logits_of("regression")
    logits[2] = 0
    found = pairwise(features(logits, kind="regression", similarity="cosine"))
    assert found[2].tolist() == found[:, 2].tolist() == [1] * 5
    assert found[0, 1] < 1


@pytest.mark.parametrize("kind", ["multiclass", "binary"])
def test_error_is_numpys_correlation_of_what_is_wrong(kind):
    labels = random_labels(kind, 40)
    logits = random_logits(kind, labels, 5, seed=1, noise=2)
    wrong = decisions(logits, kind) != labels
    found = pairwise(features(logits, kind=kind, similarity="error", labels=labels))
    np.testing.assert_allclose(found, np.corrcoef(wrong), atol=1e-12)
    assert found[0, 1] < 0.9


def test_error_of_a_regression_is_scipys_correlation_of_residuals():
    logits, labels = logits_of("regression"), random_labels("regression", 40)
    found = pairwise(features(logits, kind="regression", similarity="error", labels=labels))
    residuals = logits[..., 0].astype(float) - labels
    assert found[1, 3] == pytest.approx(pearsonr(residuals[1], residuals[3]).statistic, abs=1e-12)


def test_a_member_that_is_never_wrong_has_no_correlation_of_errors():
    logits, labels = logits_of("binary"), random_labels("binary", 40)
    logits[2] = (labels * 2.0 - 1)[:, None]
    found = pairwise(features(logits, kind="binary", similarity="error", labels=labels))
    assert found[2].tolist() == [1] * 5


@pytest.mark.parametrize("kind", ["multiclass", "binary"])
def test_kappa_is_scikit_learns(kind):
    decided = decisions(logits_of(kind), kind)
    found = pairwise(features(logits_of(kind), kind=kind, similarity="kappa"), similarity="kappa")
    for i in range(5):
        for j in range(5):
            assert found[i, j] == pytest.approx(cohen_kappa_score(decided[i], decided[j]), abs=1e-12)


def test_kappa_worked_out_by_hand():
    """0 0 1 1 against 0 1 1 1: they agree on 3 of 4; by chance 1/2 * 1/4 + 1/2 * 3/4 = 1/2; (3/4 - 1/2) / (1 - 1/2)."""
    logits = np.array([[-1, -1, 1, 1], [-1, 1, 1, 1], [-1, -1, -1, -1]], float)[..., None]
    found = pairwise(features(logits, kind="binary", similarity="kappa"), similarity="kappa")
    assert found[0].tolist() == [1, 0.5, 0]
    assert found[2, 2] == 1  # one class everywhere, twice: undefined, so 1


def test_double_fault_worked_out_by_hand():
    """Right, wrong, wrong, wrong against wrong, wrong, right, wrong: both wrong on 2 of 4."""
    logits = np.array([[1, -1, -1, -1], [-1, -1, 1, -1]], float)[..., None]
    labels = np.ones(4, int)
    found = pairwise(features(logits, kind="binary", similarity="double-fault", labels=labels))
    assert found.tolist() == [[0.75, 0.5], [0.5, 0.75]]


@pytest.mark.parametrize("similarity", ["kappa", "double-fault"])
def test_what_has_no_meaning_for_a_regression(similarity):
    with pytest.raises(UserError, match=f"similarity {similarity}: a regression has values"):
        features(logits_of("regression"), kind="regression", similarity=similarity, labels=np.zeros(40))
