"""The mean and the majority: against scikit-learn, against a slow and plain reading of the rules, and each tie rule."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pool_factory import random_labels, random_logits
from sklearn.ensemble import VotingClassifier
from sklearn.preprocessing import LabelEncoder

from lora_ensemble.dicor.choose.combine import Choice, decide, majority, probabilities, tie_order
from lora_ensemble.dicor.members import Members, ranked
from lora_ensemble.errors import UserError
from lora_ensemble.scores import decisions


def vote(decided, *, ranks, scores=None, names=None, num_classes=5):
    """Majority of decisions given as one list per member."""
    m = len(decided)
    order = tie_order(ranks, np.array(scores or [0.5] * m), names or [f"m{i}" for i in range(m)])
    return majority(np.array(decided), order, num_classes).tolist()


def combine(logits, *, kind, strategy, ranks=None, scores=None, names=None, **how):
    """What members with these logits (M, N, C) decide."""
    m = len(logits)
    who = {"names": names or [f"m{i}" for i in range(m)], "ranks": ranks or [None] * m}
    members = Members(logits=logits, kind=kind, scores=np.array([0.5] * m if scores is None else scores), **who)
    return decide(members, Choice(members=list(range(m)), strategy=strategy, **how))


def test_majority_worked_out_by_hand():
    assert vote([[0, 1, 2], [0, 1, 1], [3, 1, 2]], ranks=[1, 2, 3]) == [0, 1, 2]


def test_majority_tie_goes_to_the_member_of_highest_rank():
    """Two against two; the member of rank 9 has the lower score and the later name."""
    decided = [[0], [0], [1], [1]]
    assert vote(decided, ranks=[1, 8, 2, 9], scores=[0.9, 0.9, 0.1, 0.1]) == [1]
    assert vote(decided, ranks=[1, 9, 2, 8], scores=[0.1, 0.1, 0.9, 0.9]) == [0]


def test_majority_tie_is_not_decided_by_a_member_that_voted_for_neither_tied_class():
    assert vote([[0], [0], [1], [1], [4]], ranks=[1, 2, 3, 1, 99]) == [1]


def test_majority_tie_a_member_without_rank_loses():
    assert vote([[0], [1]], ranks=[None, 1], scores=[0.9, 0.1]) == [1]
    assert vote([[0], [1]], ranks=[None, 0], scores=[0.9, 0.1]) == [1]  # rank 0 is a rank


def test_majority_tie_of_equal_ranks_goes_by_dev_score():
    assert vote([[0], [1]], ranks=[4, 4], scores=[0.1, 0.9], names=["a", "b"]) == [1]
    assert vote([[0], [1]], ranks=[None, None], scores=[0.1, 0.9], names=["a", "b"]) == [1]


def test_majority_tie_of_equal_ranks_and_scores_goes_by_name():
    assert vote([[0], [1]], ranks=[4, 4], names=["b", "a"]) == [1]
    assert vote([[0], [1]], ranks=[4, 4], names=["a", "b"]) == [0]


@pytest.mark.parametrize(
    ("scale", "offset", "expected"), [(1, 0, [1, 0]), (1, -1, [0, 0]), (1, 1.5, [1, 1]), (3, -1, [1, 0])]
)
def test_scale_and_offsets_of_two_classes_by_hand(scale, offset, expected):
    """The means of p are 1/2 (0.9 + 0.5) = 0.7 and 1/2 (0.1 + 0.3) = 0.2, their logits 0.847 and -1.386."""
    p = np.array([[[0.9], [0.1]], [[0.5], [0.3]]])
    found = combine(
        np.log(p / (1 - p)),
        kind="binary",
        strategy="weighted",
        weights=np.array([0.5, 0.5]),
        scale=scale,
        offsets=np.array([0, offset]),
    )
    assert found.tolist() == expected


def test_scale_and_offsets_of_three_classes_by_hand():
    """p = 0.5, 0.25, 0.25: halving class 0 and doubling class 2 gives 0.25, 0.25, 0.5. With p^3 it is 4 to 1 to 2."""
    p = np.array([[[0.75, 0.125, 0.125]], [[0.25, 0.375, 0.375]]])
    choice = Choice(
        members=[0, 1],
        strategy="weighted",
        weights=np.array([0.5, 0.5]),
        offsets=np.log([0.5, 1, 2]),
    )
    np.testing.assert_allclose(probabilities(np.log(p), choice, kind="multiclass"), [[0.25, 0.25, 0.5]])
    cubed = dataclasses.replace(choice, scale=3.0)
    np.testing.assert_allclose(probabilities(np.log(p), cubed, kind="multiclass"), [[4 / 7, 1 / 7, 2 / 7]])
    how = {"kind": "multiclass", "strategy": "weighted", "weights": choice.weights, "offsets": choice.offsets}
    assert combine(np.log(p), **how).tolist() == [2]
    assert combine(np.log(p), scale=3.0, **how).tolist() == [0]


def test_scores_that_differ_by_rounding_only_tie():
    assert ranked(np.array([0.1 + 0.2, 0.3]), ["b", "a"]) == [1, 0]
    assert ranked(np.array([0.3 + 1e-9, 0.3]), ["b", "a"]) == [0, 1]


def plain_majority(decided, ranks, scores, names):
    """The rules read aloud, one example at a time."""
    result = []
    for column in np.array(decided).T.tolist():
        most = max(column.count(c) for c in column)
        voters = [m for m, c in enumerate(column) if column.count(c) == most]
        first = min(voters, key=lambda m: (ranks[m] is None, -(ranks[m] or 0), -scores[m], names[m]))
        result.append(column[first])
    return result


@settings(deadline=None, max_examples=200)
@given(data=st.data(), m=st.integers(1, 7), n=st.integers(1, 8), c=st.integers(2, 5))
def test_majority_is_what_the_rules_say(data, m, n, c):
    row = st.lists(st.integers(0, c - 1), min_size=n, max_size=n)
    decided = data.draw(st.lists(row, min_size=m, max_size=m))
    ranks = data.draw(st.lists(st.sampled_from([None, 0, 1, 4]), min_size=m, max_size=m))
    scores = data.draw(st.lists(st.sampled_from([0.25, 0.5]), min_size=m, max_size=m))
    names = data.draw(st.permutations([f"m{i}" for i in range(m)]))
    found = vote(decided, ranks=ranks, scores=scores, names=names, num_classes=c)
    assert found == plain_majority(decided, ranks, scores, names)


@pytest.mark.parametrize(("num_classes", "members"), [(2, 7), (5, 9)])
def test_majority_without_ties_is_scikit_learns_hard_voting(num_classes, members):
    decided = np.random.default_rng(0).integers(num_classes, size=(members, 500))
    votes = np.sort(np.stack([(decided == c).sum(0) for c in range(num_classes)]), axis=0)
    decided = decided[:, votes[-1] > votes[-2]]
    assert decided.shape[1] > 100

    class Said:
        def __init__(self, what):
            self.what = what

        def predict(self, _):
            return self.what

    peer = VotingClassifier([("unused", None)], voting="hard")
    peer.estimators_ = [Said(row) for row in decided]
    peer.le_ = LabelEncoder().fit(range(num_classes))
    assert vote(decided, ranks=[None] * members, num_classes=num_classes) == peer.predict(decided.T).tolist()


def test_mean_worked_out_by_hand_and_then_decided():
    """Two weak votes for class 0 against a strong one for class 1: the mean and the majority disagree."""
    logits = np.array([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 4.0]]], np.float32)
    assert combine(logits, kind="multiclass", strategy="mean").tolist() == [1]
    assert combine(logits, kind="multiclass", strategy="majority").tolist() == [0]


def test_weights_and_temperatures_stay_with_their_members_whatever_the_scores():
    """sigmoid(2) = 0.88 and sigmoid(-2) = 0.12: 0.9 of the one and 0.1 of the other are 0.80."""
    logits = np.array([[[2.0]], [[-2.0]]])
    how = {"kind": "binary"}
    for scores in ([0.9, 0.1], [0.1, 0.9]):
        weighted = combine(logits, strategy="weighted", scores=scores, weights=np.array([0.9, 0.1]), **how)
        assert weighted.tolist() == [1]
        # sigmoid(2) and sigmoid(-2 / 100) = 0.495
        hot = np.array([1.0, 100.0])
        assert combine(logits, strategy="mean-probability", scores=scores, temperatures=hot, **how).tolist() == [1]


def test_a_logit_that_no_probability_can_show_still_decides():
    """sigmoid(1e-20) is 1/2 in float64."""
    logits = np.array([[[1e-20], [-1e-20]]])
    assert combine(logits, kind="binary", strategy="mean-probability").tolist() == [1, 0]


@pytest.mark.parametrize("kind", ["multiclass", "binary", "regression"])
def test_mean_is_decided_as_the_task_decides(kind):
    logits = random_logits(kind, random_labels(kind, 50), 6)
    found = combine(logits, kind=kind, strategy="mean")
    np.testing.assert_allclose(found, decisions(logits.astype(float).sum(0) / 6, kind), rtol=1e-12)


def test_binary_majority_of_logits():
    logits = np.array([[[3.0], [-1.0]], [[-0.1], [-1.0]], [[-0.1], [1.0]]])
    assert combine(logits, kind="binary", strategy="majority").tolist() == [0, 0]
    assert combine(logits, kind="binary", strategy="mean").tolist() == [1, 0]


@pytest.mark.parametrize(
    ("kind", "strategy"), [("multiclass", "majority"), ("multiclass", "mean"), ("regression", "mean")]
)
def test_the_order_of_members_changes_not_one_bit(kind, strategy):
    rng = np.random.default_rng(1)
    logits = (random_logits(kind, random_labels(kind, 200), 8) * 10.0 ** rng.integers(-6, 6, (8, 1, 1))).astype(
        np.float32
    )
    ranks, scores, names = [None, 4, 4, 8, 8, 8, 1, 2], rng.choice([0.25, 0.5], 8), list("abcdefgh")
    settings_ = {"kind": kind, "strategy": strategy}
    found = combine(logits, ranks=ranks, scores=scores, names=names, **settings_)
    for _ in range(10):
        p = rng.permutation(8)
        again = combine(
            logits[p], ranks=[ranks[i] for i in p], scores=scores[p], names=[names[i] for i in p], **settings_
        )
        np.testing.assert_array_equal(again, found)


def test_majority_of_a_regression_is_an_error():
    with pytest.raises(UserError, match="majority"):
        combine(np.ones((2, 3, 1)), kind="regression", strategy="majority")
