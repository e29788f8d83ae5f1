"""The methods: against loops and brute force written here, and as estimators."""

import itertools

import numpy as np
import pytest
from by_others import probabilities, worth
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pool_factory import random_labels, random_logits
from scipy.special import softmax
from sklearn.metrics import accuracy_score

from lora_ensemble.dicor.choose.methods import Best, Dicor, Exhaustive, Greedy, Omni, Weighted
from lora_ensemble.errors import UserError
from lora_ensemble.scores import decisions
from lora_ensemble.text.splits import canonical

KINDS = ("multiclass", "binary", "regression")
ALL = [
    Best(),
    Omni(),
    Dicor(),
    Dicor(size=3, similarity="kappa", strategy="majority", trade_off=0.5),
    Weighted(),
    Weighted(temperature=True),
    Weighted(offset=True),
    Weighted(offset=True, temperature=True),
    Exhaustive(),
    Greedy(),
    Greedy(criterion="score", sorted_start=True),
    Greedy(bags=3, example_share=0.7),
]


def for_kind(method, kind):
    """Whether a method makes sense for a kind."""
    needs_classes = method.get_params().get("temperature") or method.get_params().get("strategy") == "majority"
    return kind != "regression" or not needs_classes


def autogluon_loop(predictions, labels, kind, criterion, steps):
    """AutoGluon's EnsembleSelection._fit (autogluon.core 1.x, greedy_ensemble/ensemble_selection.py) as a plain loop.

    Its rule for ties: members that are already in go first. Among those left AutoGluon draws one; here it is the first.
    ``use_best``: the first of the best ensembles on the way is kept.
    """
    ensemble, trajectory, used = [], [], set()
    for _ in range(steps):
        s = len(ensemble)
        before = sum(predictions[m] for m in ensemble) / s * (s / (s + 1)) if s else 0
        values = [round(worth(before + p / (s + 1), labels, kind, criterion), 10) for p in predictions]
        best = [m for m, v in enumerate(values) if v == max(values)]
        best = [m for m in best if m in used] or best
        ensemble.append(best[0])
        trajectory.append(values[best[0]])
        used.add(best[0])
    return ensemble[: trajectory.index(max(trajectory)) + 1]


def ranked(logits, labels, kind):
    """Members, best first, and scores, by scikit-learn and scipy; ties by the loss, then by place."""
    p = probabilities(logits, kind)
    keys = [(worth(one, labels, kind, "score"), worth(one, labels, kind, "loss")) for one in p]
    return sorted(range(len(p)), key=lambda m: (-round(keys[m][0], 10), -round(keys[m][1], 10), m))


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    criterion=st.sampled_from(["score", "loss"]),
    seed=st.integers(0, 10**6),
    n=st.sampled_from([8, 20, 90]),
)
def test_greedy_is_autogluons(kind, criterion, seed, n):
    """Few examples make many ties."""
    labels = random_labels(kind, n, seed=seed)
    assume(kind == "regression" or len(np.unique(labels)) > 1)
    logits = random_logits(kind, labels, 7, seed=seed + 1, noise=2)
    order = ranked(logits, labels, kind)
    expected = autogluon_loop(probabilities(logits, kind)[order], labels, kind, criterion, 12)
    found = Greedy(steps=12, criterion=criterion).fit(logits, labels, kind=kind)
    weights = np.bincount([order[m] for m in expected], minlength=7) / len(expected)
    assert dict(zip(found.members_, found.weights_, strict=True)) == pytest.approx(
        {m: w for m, w in enumerate(weights) if w}, abs=1e-12
    )


def test_a_sorted_start_takes_the_best_first_members():
    labels = random_labels("multiclass", 80, seed=3)
    logits = random_logits("multiclass", labels, 10, seed=4, noise=3)
    order = ranked(logits, labels, "multiclass")
    p = probabilities(logits, "multiclass")[order]
    values = [worth(p[: i + 1].mean(0), labels, "multiclass", "loss") for i in range(6)]
    start = int(np.argmax(values)) + 1
    assert start > 1
    found = Greedy(steps=6, criterion="loss", sorted_start=True).fit(logits, labels, kind="multiclass")
    assert set(order[:start]) <= set(found.members_)
    plain = Greedy(steps=6, criterion="loss").fit(logits, labels, kind="multiclass")
    assert set(plain.members_) != set(found.members_)


def test_bags_average_what_each_finds():
    labels = random_labels("binary", 120, seed=1)
    logits = random_logits("binary", labels, 10, seed=2, noise=2)
    bag = Greedy(bags=8, model_share=0.3, steps=5).fit(logits, labels, kind="binary")
    one = Greedy(steps=5).fit(logits, labels, kind="binary")
    assert bag.weights_.sum() == pytest.approx(1)
    assert len(bag.members_) > len(one.members_)  # 3 of 10 members at a time, 8 times
    whole = Greedy(bags=4, model_share=1.0, steps=5).fit(logits, labels, kind="binary")
    assert dict(zip(whole.members_, whole.weights_, strict=True)) == pytest.approx(
        dict(zip(one.members_, one.weights_, strict=True))
    )


def test_each_bag_sees_its_own_members_and_examples():
    labels = random_labels("binary", 40, seed=1)
    logits = random_logits("binary", labels, 8, seed=2, noise=2)
    order, rows = ranked(logits, labels, "binary"), canonical(np.arange(40).astype(str))
    p, y = probabilities(logits, "binary")[order][:, rows], labels[rows]
    rng, weights = np.random.default_rng(0), np.zeros(8)
    for _ in range(3):
        models, part = np.sort(rng.choice(8, 4, replace=False)), np.sort(rng.choice(40, 20, replace=False))
        bag = models[autogluon_loop(p[models][:, part], y[part], "binary", "loss", 6)]
        np.add.at(weights, bag, 1 / len(bag) / 3)
    found = Greedy(bags=3, steps=6, example_share=0.5).fit(logits, labels, kind="binary")
    expected = {order[m]: w for m, w in enumerate(weights) if w}
    assert dict(zip(found.members_, found.weights_, strict=True)) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None, max_examples=25)
@given(
    kind=st.sampled_from(KINDS),
    criterion=st.sampled_from(["score", "loss"]),
    seed=st.integers(0, 10**6),
    size=st.integers(1, 5),
)
def test_exhaustive_is_brute_force(kind, criterion, seed, size):
    labels = random_labels(kind, 30, seed=seed)
    assume(kind == "regression" or len(np.unique(labels)) > 1)
    logits = random_logits(kind, labels, 6, seed=seed + 1, noise=2)
    order = ranked(logits, labels, kind)[:5]
    p = probabilities(logits, kind)
    sets = [c for k in range(1, size + 1) for c in itertools.combinations(range(5), k)]
    values = [round(worth(p[[order[i] for i in c]].mean(0), labels, kind, criterion), 10) for c in sets]
    best = sets[values.index(max(values))]  # the first: the fewest members, then the highest ranks
    found = Exhaustive(size=size, top_k=5, criterion=criterion).fit(logits, labels, kind=kind)
    assert sorted(found.members_) == sorted(order[i] for i in best)


def test_size_auto_keeps_the_best_first_so_many():
    labels = random_labels("binary", 150, seed=4)
    logits = random_logits("binary", labels, 12, seed=5, noise=3)
    all_of_them = Dicor(size=12, strategy="mean-probability").fit(logits, labels, kind="binary")
    auto = Dicor(size="auto", strategy="mean-probability").fit(logits, labels, kind="binary")
    p = probabilities(logits, "binary")
    values = [worth(p[all_of_them.members_[: i + 1]].mean(0), labels, "binary", "loss") for i in range(12)]
    assert auto.members_ == all_of_them.members_[: int(np.argmax(values)) + 1]
    assert 1 < len(auto.members_) < 12


def test_the_trade_off_goes_from_score_to_similarity():
    labels = random_labels("multiclass", 150, seed=3)
    logits = random_logits("multiclass", labels, 12, seed=4, noise=2)
    order = ranked(logits, labels, "multiclass")
    found = {
        x: Dicor(size=5, trade_off=x, similarity="error").fit(logits, labels, kind="multiclass")
        for x in (0.0, 0.5, 1.0)
    }
    assert found[0.0].members_ == order[:5]
    assert len({tuple(one.members_) for one in found.values()}) == 3
    similarity = {x: np.mean(sum(one.choice_.similarities, [])) for x, one in found.items()}
    assert similarity[0.0] > similarity[0.5] > similarity[1.0]
    assert found[0.0].scores_.mean() > found[0.5].scores_.mean() > found[1.0].scores_.mean()


@pytest.mark.parametrize("method", ALL, ids=str)
def test_used_as_an_estimator(method):
    assert type(method)(**method.get_params()) == method
    same = type(method)().set_params(**method.get_params())
    assert same == method
    with pytest.raises(UserError, match="has no parameter 'wrong'"):
        same.set_params(wrong=1)
    with pytest.raises(UserError, match="not fitted"):
        same.predict(np.zeros((4, 3, 1)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ALL, ids=str)
def test_predictions_are_those_of_the_weighted_mean(method, kind):
    if not for_kind(method, kind):
        pytest.skip("for classifiers")
    labels, other = random_labels(kind, 90), random_labels(kind, 50, seed=9)
    logits, test = random_logits(kind, labels, 8, noise=2), random_logits(kind, other, 8, seed=7, noise=2)
    fitted = type(method)(**method.get_params()).fit(logits, labels, kind=kind)
    found = fitted.predict(test)
    chosen = test[fitted.members_].astype(float)
    strategy = fitted.choice_.strategy
    if strategy == "majority":
        assert len(found) == 50
        return
    if fitted.choice_.temperatures is not None:
        chosen = chosen / fitted.choice_.temperatures[:, None, None]
    if strategy == "mean":
        expected = decisions(chosen.mean(0), kind)
        mean = probabilities(chosen.mean(0)[None], kind)[0]
    else:
        mean = np.average(probabilities(chosen, kind), axis=0, weights=fitted.weights_)
        if fitted.choice_.offsets is not None:
            mean = softmax(fitted.choice_.scale * np.log(mean) + fitted.choice_.offsets, axis=-1)
        expected = mean if kind == "regression" else mean.argmax(-1)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    if kind == "regression":
        with pytest.raises(UserError, match="predict_proba: a regression"):
            fitted.predict_proba(test)
    else:
        np.testing.assert_allclose(fitted.predict_proba(test), mean, atol=1e-12)


@settings(deadline=None, max_examples=80)
@given(kind=st.sampled_from(KINDS), method=st.sampled_from(ALL), seed=st.integers(0, 10**6), data=st.data())
def test_no_order_changes_what_is_chosen(kind, method, seed, data):
    """Two members tie in everything but the name; ids say which example is which."""
    assume(for_kind(method, kind))
    labels = random_labels(kind, 24, seed=seed)
    logits = random_logits(kind, labels, 6, seed=seed + 1, noise=2)
    logits[4, :12], logits[4, 12:] = logits[2, :12], logits[2, 12:] + 1e-9
    names, ids = [f"m{i}" for i in range(6)], [f"e{i}" for i in range(24)]
    ranks = [None, 1, 1, 2, 3, 3]
    members, rows = data.draw(st.permutations(range(6))), data.draw(st.permutations(range(24)))
    before = type(method)(**method.get_params()).fit(logits, labels, kind=kind, names=names, ranks=ranks, ids=ids)
    after = type(method)(**method.get_params()).fit(
        logits[members][:, rows],
        labels[rows],
        kind=kind,
        names=[names[m] for m in members],
        ranks=[ranks[m] for m in members],
        ids=[ids[n] for n in rows],
    )
    assert after.names_ == before.names_
    np.testing.assert_allclose(after.weights_, before.weights_, atol=1e-9)
    np.testing.assert_array_equal(after.predict(logits[members]), before.predict(logits))


@pytest.mark.parametrize("kind", ["multiclass", "binary"])
def test_offsets_mend_what_weights_cannot(kind):
    """All members lean towards class 0. Accuracy by scikit-learn, on other examples."""
    labels, other = random_labels(kind, 300), random_labels(kind, 2000, seed=9)
    both = [random_logits(kind, y, 6, seed=s, noise=1.5) for s, y in enumerate((labels, other))]
    for logits in both:
        logits[..., 0] += 2 if kind == "multiclass" else -2
    plain, offset = (Weighted(offset=o).fit(both[0], labels, kind=kind) for o in (False, True))
    np.testing.assert_array_equal(offset.weights_, plain.weights_)
    assert offset.choice_.offsets.argmin() == 0
    before, after = (accuracy_score(other, one.predict(both[1])) for one in (plain, offset))
    assert after > before + 0.1
    with_both = Weighted(offset=True, temperature=True).fit(both[0], labels, kind=kind)
    assert accuracy_score(other, with_both.predict(both[1])) > before + 0.1


def test_a_regression_has_no_offsets():
    labels = random_labels("regression", 60)
    logits = random_logits("regression", labels, 5, noise=2)
    plain, offset = (Weighted(offset=o).fit(logits, labels, kind="regression") for o in (False, True))
    assert offset.choice_.offsets is None
    np.testing.assert_array_equal(offset.predict(logits), plain.predict(logits))


def test_a_member_without_weight_is_no_member():
    """The last contradicts the best. The others keep their own temperatures; similarities would be of other members."""
    labels = random_labels("binary", 200)
    logits = random_logits("binary", labels, 6, noise=2)
    logits[5] = 0.1 - logits[0]
    how = {"size": 6, "trade_off": 0.0, "similarity": "error", "temperature": True}
    all_of_them = Dicor(strategy="mean-probability", **how).fit(logits, labels, kind="binary")
    found = Dicor(strategy="weighted", **how).fit(logits, labels, kind="binary")
    assert (len(all_of_them.members_), len(all_of_them.choice_.similarities)) == (6, 6)
    assert 1 < len(found.members_) < 6
    assert found.weights_.min() > 0
    expected = dict(zip(all_of_them.members_, all_of_them.choice_.temperatures, strict=True))
    assert found.choice_.temperatures.tolist() == [expected[m] for m in found.members_]
    assert found.choice_.similarities == []


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), to=st.permutations(range(5)))
def test_other_numbers_for_the_classes_change_no_offset(seed, to):
    """Class c becomes to[c]; of two classes, each the other."""
    to = np.array(to)
    labels = random_labels("multiclass", 40, seed=seed)
    logits = random_logits("multiclass", labels, 4, seed=seed + 1, noise=2)
    before = Weighted(offset=True).fit(logits, labels, kind="multiclass")
    after = Weighted(offset=True).fit(logits[..., np.argsort(to)], to[labels], kind="multiclass")
    np.testing.assert_allclose(after.choice_.offsets[to], before.choice_.offsets, atol=1e-6)
    assert after.choice_.scale == pytest.approx(before.choice_.scale, abs=1e-6)
    labels = random_labels("binary", 40, seed=seed)
    logits = random_logits("binary", labels, 4, seed=seed + 1, noise=2)
    before = Weighted(offset=True).fit(logits, labels, kind="binary")
    after = Weighted(offset=True).fit(-logits, 1 - labels, kind="binary")
    np.testing.assert_allclose(after.choice_.offsets[::-1], before.choice_.offsets, atol=1e-6)
    np.testing.assert_allclose(after.predict_proba(-logits)[:, ::-1], before.predict_proba(logits), atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(kind=st.sampled_from(KINDS), method=st.sampled_from(ALL), seed=st.integers(0, 10**6))
def test_copies_of_members_change_nothing(kind, method, seed):
    assume(for_kind(method, kind))
    labels = random_labels(kind, 30, seed=seed)
    logits = random_logits(kind, labels, 5, seed=seed + 1, noise=2)
    before = type(method)(**method.get_params()).fit(logits, labels, kind=kind)
    after = type(method)(**method.get_params()).fit(np.concatenate([logits, logits[[1, 3]]]), labels, kind=kind)
    assert after.members_ == before.members_
    assert after.weights_.tolist() == before.weights_.tolist()
    assert before.notices_ == []
    assert after.notices_ == [
        "1 member with the very logits of m1 left out: m5",
        "1 member with the very logits of m3 left out: m6",
    ]


AWKWARD = ["constant", "one example", "one member", "one class", "ties", "huge", "never right"]


@settings(deadline=None, max_examples=150)
@given(
    kind=st.sampled_from(KINDS), method=st.sampled_from(ALL), case=st.sampled_from(AWKWARD), seed=st.integers(0, 10**6)
)
def test_awkward_pools_give_a_result_or_a_user_error(kind, method, case, seed):
    assume(for_kind(method, kind))
    n = 1 if case == "one example" else 15
    labels = random_labels(kind, n, seed=seed)
    logits = random_logits(kind, labels, 1 if case == "one member" else 5, seed=seed + 1)
    if case == "constant":
        logits[1] = 0.1
    elif case == "one class":
        labels = np.full(n, labels[0])
    elif case == "ties":
        logits = np.sign(logits - np.median(logits, axis=1, keepdims=True) - 1e-6)
    elif case == "huge":
        logits = logits * np.float32(1e30)
    elif case == "never right":
        logits = -np.abs(logits) if kind == "binary" else -logits
        labels = np.ones_like(labels) if kind == "binary" else labels
    fitted = type(method)(**method.get_params())
    if kind == "regression" and case in ("one example", "one class"):
        with pytest.raises(UserError, match="labels are all the same, so Pearson r is undefined"):
            fitted.fit(logits, labels, kind=kind)
        return
    fitted.fit(logits, labels, kind=kind)
    assert len(fitted.predict(logits)) == n
    assert np.isfinite(fitted.weights_).all()
    assert fitted.weights_.sum() == pytest.approx(1)
    if case == "constant" and kind == "regression":
        assert "member m1: its dev predictions are constant" in fitted.notices_[0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(value):
    labels = random_labels("binary", 10)
    logits = random_logits("binary", labels, 3)
    logits[2, 4] = value
    with pytest.raises(UserError, match="member b: logits are not all finite"):
        Best().fit(logits, labels, kind="binary", names=["x", "y", "b"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"labels": np.array([0, 1, 2])}, "labels hold 2; expected classes 0 to 1"),
        ({"labels": np.array([0.5, 1, 0])}, "labels hold 0.5"),
        ({"names": ["a", "a"]}, "there twice"),
        ({"names": ["a"]}, "1 names for 2 members"),
        ({"ids": ["a", "b", "a"]}, "there twice"),
        ({"logits": np.zeros((2, 3, 2))}, r"member m0: logits of shape \(3, 2\)"),
        ({"logits": np.zeros((0, 3, 1))}, "0 members"),
    ],
)
def test_arrays_that_do_not_fit(change, says):
    given_ = {"logits": np.ones((2, 3, 1)), "labels": np.array([0, 1, 1]), "kind": "binary", **change}
    with pytest.raises(UserError, match=says):
        Best().fit(**given_)
