"""The honest estimate: the splits, a slow reading of it with scikit-learn, what must not change it, and that it is."""

import sys

import numpy as np
import pytest
import scipy.special
from conftest import REPOSITORY
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pool_factory import make_pool, random_labels, random_logits
from scipy.stats import bootstrap, pearsonr
from sklearn.metrics import accuracy_score

from lora_ensemble.dicor.choose.methods import Dicor, Greedy, Omni, Weighted
from lora_ensemble.dicor.compare import compare, overall
from lora_ensemble.dicor.estimate import fold_scores
from lora_ensemble.dicor.estimate.honest import estimate
from lora_ensemble.dicor.estimate.interval import Interval, of_differences, of_score
from lora_ensemble.dicor.estimate.splits import stratified_folds
from lora_ensemble.dicor.members import Dev
from lora_ensemble.dicor.options import Options
from lora_ensemble.dicor.table import gain
from lora_ensemble.errors import UserError
from lora_ensemble.pool import TaskPool
from lora_ensemble.scores import decisions
from lora_ensemble.text.splits import canonical

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

KINDS = ("multiclass", "binary", "regression")


def score_of(decided, labels, kind):
    return pearsonr(decided, labels).statistic if kind == "regression" else accuracy_score(labels, decided)


@settings(deadline=None, max_examples=60)
@given(kind=st.sampled_from(KINDS), n=st.integers(6, 80), folds=st.integers(2, 5), data=st.data())
def test_folds_are_even_stratified_and_decided_by_ids(kind, n, folds, data):
    labels, ids = random_labels(kind, n, seed=n), np.array([f"id{i}" for i in range(n)])
    fold = stratified_folds(ids, labels, kind, folds=folds, repeats=3)
    for row in fold:
        sizes = np.bincount(row, minlength=folds)
        assert sizes.max() - sizes.min() <= 1
        groups = [labels == c for c in range(5)]
        if kind == "regression":  # each block of neighbours in the order of labels
            place = np.argsort(np.argsort(labels))
            groups = [place // folds == b for b in range(n // folds)]
        for group in groups:
            inside = np.bincount(row[group], minlength=folds)
            assert inside.max() - inside.min() <= 1
    assert (fold[0] != fold[1]).any()
    order = np.array(data.draw(st.permutations(range(n))))
    again = stratified_folds(ids[order], labels[order], kind, folds=folds, repeats=3)
    np.testing.assert_array_equal(again, fold[:, order])
    np.testing.assert_array_equal(ids[order][canonical(ids[order])], ids[canonical(ids)])


def with_epochs(kind, *, members=5, n=60, epochs=3, seed=0, noise=2.0):
    """Logits at the best epoch (M, N, C), those of each epoch (M, E, N, C), and labels."""
    labels = random_labels(kind, n, seed=seed)
    each = np.stack(
        [random_logits(kind, labels, members, seed=seed + 1 + e, noise=noise) for e in range(epochs)], axis=1
    )
    best = [np.argmax([score_of(decisions(one, kind), labels, kind) for one in m]) for m in each]
    return np.stack([m[e] for m, e in zip(each, best, strict=True)]), each, labels


@pytest.mark.parametrize("kind", KINDS)
def test_the_single_bests_estimate_read_aloud(kind):
    """Two folds, one repeat: in each the best epoch of each member, then the best member, by the other half alone."""
    logits, each, labels = with_epochs(kind)
    ids = np.array([f"e{i}" for i in range(60)])
    dev = Dev.of(logits, labels, kind=kind, ids=ids, epochs=list(each))
    found = estimate(dev, {}, folds=2, repeats=1)
    (fold,) = stratified_folds(ids, labels, kind, folds=2, repeats=1)
    held = np.zeros(60)
    all_epochs = set()
    for k in (0, 1):
        choose, rest = fold != k, fold == k
        of = {
            (m, e): score_of(decisions(each[m, e], kind)[choose], labels[choose], kind)
            for m in range(5)
            for e in range(3)
        }
        best = max(of, key=of.get)
        all_epochs |= {best}
        said = decisions(each[best], kind)
        if kind == "regression":  # r does not look at the scale, which is another in each half
            said = (said - said[rest].mean()) / said[rest].std()
        held[rest] = said[rest]
    one = found.of["best"]
    assert one.at_part == pytest.approx(score_of(held, labels, kind), abs=1e-12)
    np.testing.assert_allclose(one.held_out[0], held[canonical(ids)], atol=1e-6)
    assert one.in_sample == pytest.approx(max(score_of(decisions(x, kind), labels, kind) for x in logits), abs=1e-12)
    # Two folds: a quarter of the optimism is added.
    assert one.honest.value == pytest.approx(one.at_part + (one.in_sample - one.at_part) / 4, abs=1e-12)
    assert one.in_sample > one.at_part
    assert len(all_epochs) == 2  # the halves do not agree, or nothing was shown


@pytest.mark.parametrize("strategy", ["mean", "mean-probability", "majority"])
@pytest.mark.parametrize("kind", KINDS)
def test_omnis_estimate_is_that_of_choosing_all(kind, strategy):
    """Omni is summed up in one pass over all members; as a method that sees them all it must come out the same."""
    if kind == "regression" and strategy == "majority":
        pytest.skip("for classifiers")
    logits, each, labels = with_epochs(kind, members=40, noise=9.0)
    ranks = [None, 1, 2, 2] * 10
    for epochs in (None, list(each)):
        dev = Dev.of(logits, labels, kind=kind, epochs=epochs, ranks=ranks)
        found = estimate(dev, {"all": Omni(strategy=strategy), "omni": Omni(strategy=strategy)}, repeats=2)
        one, other = found.of["omni"], found.of["all"]
        assert one.in_sample == pytest.approx(other.in_sample, abs=1e-12)
        assert one.at_part == pytest.approx(other.at_part, abs=1e-6)
        np.testing.assert_allclose(one.held_out, other.held_out, atol=1e-4)
    assert one.at_part != one.in_sample


def test_a_method_looks_at_its_own_best_members_whatever_the_others_look_at():
    labels = random_labels("binary", 60)
    dev = Dev.of(random_logits("binary", labels, 9, seed=1, noise=2), labels, kind="binary")
    alone = estimate(dev, {"weighted": Weighted(top_k=3)}).of["weighted"]
    found = estimate(dev, {"all": Omni(), "weighted": Weighted(top_k=3)}).of
    assert len(found["all"].names) == 9
    assert found["weighted"].names == alone.names
    np.testing.assert_array_equal(found["weighted"].held_out, alone.held_out)


@settings(deadline=None, max_examples=25)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 10**6), data=st.data())
def test_no_order_changes_the_estimate(kind, seed, data):
    logits, each, labels = with_epochs(kind, n=30, seed=seed)
    assume(kind == "regression" or len(np.unique(labels)) > 1)
    names, ids = [f"m{i}" for i in range(5)], np.array([f"e{i}" for i in range(30)])
    members, rows = data.draw(st.permutations(range(5))), data.draw(st.permutations(range(30)))
    methods = {"dicor": Dicor(), "weighted": Weighted(offset=True), "greedy": Greedy(bags=2, example_share=0.8)}
    before = estimate(Dev.of(logits, labels, kind=kind, names=names, ids=ids, epochs=list(each)), methods, repeats=2)
    shuffled = Dev.of(
        logits[members][:, rows],
        labels[rows],
        kind=kind,
        names=[names[m] for m in members],
        ids=ids[rows],
        epochs=list(each[members][:, :, rows]),
    )
    after = estimate(shuffled, methods, repeats=2)
    for name, one in before.of.items():
        other = after.of[name]
        assert other.names == one.names
        np.testing.assert_allclose(other.held_out, one.held_out, atol=1e-6)
        assert other.honest.value == pytest.approx(one.honest.value, abs=1e-7)
        for a, b in ((one.against_best, other.against_best), (one.against_omni, other.against_omni)):
            assert (a is None) == (b is None)
            if a is not None:
                assert (b.low, b.value, b.high) == pytest.approx((a.low, a.value, a.high), abs=1e-6)


def test_the_held_out_labels_are_not_looked_at():
    """Other labels for the fold that is held out change nothing of what was decided there."""
    logits, each, labels = with_epochs("binary", n=60, members=12)
    ids = np.array([f"e{i}" for i in range(60)])
    (fold,) = stratified_folds(ids, labels, "binary", folds=2, repeats=1)
    methods = {"greedy": Greedy(), "weighted": Weighted(offset=True), "dicor": Dicor(similarity="error", size=3)}
    before = estimate(Dev.of(logits, labels, kind="binary", ids=ids, epochs=list(each)), methods, folds=2, repeats=1)
    # Two examples of each class, so that the folds stay as they are: turn the labels of pairs that are held out.
    ones, zeros = (np.flatnonzero((fold == 0) & (labels == c)) for c in (1, 0))
    from lora_ensemble.dicor.estimate import honest as module

    turned = labels.copy()
    turned[ones[:8]], turned[zeros[:8]] = 0, 1
    patched = pytest.MonkeyPatch()
    patched.setattr(module, "stratified_folds", lambda *a, **k: fold[None])
    after = estimate(Dev.of(logits, turned, kind="binary", ids=ids, epochs=list(each)), methods, folds=2, repeats=1)
    patched.undo()
    held = fold[canonical(ids)] == 0
    for name in ("best", "omni", *methods):
        a, b = before.of[name].held_out[0], after.of[name].held_out[0]
        np.testing.assert_array_equal(a[held], b[held])
    assert any((before.of[m].held_out[0] != after.of[m].held_out[0]).any() for m in methods)  # the other half saw them


def test_wilsons_interval():
    """90 of 100: the roots of (p - 0.9)^2 = z^2 p (1 - p) / 100, with z = 1.6448536."""
    decided = np.array([[1] * 90 + [0] * 10])
    found = of_score(decided, np.ones(100, int), "binary")
    z = 1.6448536269514722
    roots = np.roots([1 + z**2 / 100, -1.8 - z**2 / 100, 0.81])
    assert (found.low, found.high) == pytest.approx(sorted(roots), abs=1e-9)
    assert found.value == 0.9


@pytest.mark.parametrize("heavy", [False, True])
def test_the_interval_of_r_is_scipys_bootstrap(heavy):
    """Also where the errors are not normal, where Fisher's plain z would be too narrow."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=800)
    x = y + (rng.standard_t(3, size=800) if heavy else rng.normal(size=800))
    found = of_score(x[None], y, "regression")
    asked = {"paired": True, "confidence_level": 0.9, "n_resamples": 2000, "vectorized": False, "rng": 1}
    expected = bootstrap((x, y), lambda a, b: pearsonr(a, b).statistic, **asked).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.008)
    plain = pearsonr(x, y).confidence_interval(0.9)
    assert bool((found.high - found.low) > 1.15 * (plain.high - plain.low)) is heavy


def test_the_interval_of_a_difference_is_scipys_paired_bootstrap():
    rng = np.random.default_rng(0)
    labels = np.ones(500, int)
    a, b = (rng.random(500) < 0.8).astype(int), (rng.random(500) < 0.7).astype(int)
    found = of_differences({"a": a[None], "b": b[None]}, [("a", "b")], labels, "binary")["a", "b"]
    asked = {"confidence_level": 0.9, "n_resamples": 4000, "method": "percentile", "rng": 1}
    expected = bootstrap((a - b,), np.mean, **asked).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.005)
    assert found.value == pytest.approx(a.mean() - b.mean(), abs=1e-15)
    y = rng.normal(size=500)
    x, z = y + rng.normal(size=500), y + 1.2 * rng.normal(size=500)
    found = of_differences({"a": x[None], "b": z[None]}, [("a", "b")], y, "regression")["a", "b"]
    statistic = lambda x, z, y: pearsonr(x, y).statistic - pearsonr(z, y).statistic  # noqa: E731
    asked |= {"paired": True, "vectorized": False, "n_resamples": 2000}
    expected = bootstrap((x, z, y), statistic, **asked).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.01)


def test_what_does_not_differ_is_within_noise():
    same = np.array([[0, 1, 1, 0] * 10])
    found = of_differences({"a": same, "b": same}, [("a", "b")], np.ones(40, int), "binary")["a", "b"]
    assert (found.low, found.value, found.high) == (0, 0, 0)
    assert not found.beyond_noise


def test_a_gain_is_beyond_noise_where_its_interval_leaves_out_0():
    assert gain(Interval(0.1, 0.02, 0.18)) == "+0.1000 beyond noise"
    assert gain(Interval(-0.1, -0.18, 0.02)) == "-0.1000 within noise"


def test_too_few_examples_have_no_honest_overall_score(tmp_path):
    for task, kind in (("sst", "multiclass"), ("quora", "binary"), ("sts", "regression")):
        make_pool(tmp_path, task, kind, members=2, n=8)
    scores = overall({task: compare(TaskPool(tmp_path, task), [], Options()) for task in ("sst", "quora", "sts")})
    in_sample, honest = scores["best"]
    assert 0 < in_sample <= 1
    assert np.isnan(honest)


@pytest.mark.parametrize(("kind", "n"), [("binary", 1), ("binary", 9), ("multiclass", 10), ("regression", 10)])
def test_few_examples(kind, n):
    labels = random_labels(kind, n)
    found = estimate(Dev.of(random_logits(kind, labels, 4), labels, kind=kind), {"greedy": Greedy()})
    assert (found.repeats == 0) is (n < 10)
    assert (found.of["greedy"].honest is None) is (n < 10)


def test_one_class_and_one_member():
    labels = np.zeros(30, int)
    found = estimate(Dev.of(random_logits("binary", labels, 1), labels, kind="binary"), {"weighted": Weighted()})
    assert found.of["weighted"].against_best.value == 0
    with pytest.raises(UserError, match="labels are all the same"):
        estimate(Dev.of(random_logits("regression", labels, 2), labels * 1.0, kind="regression"), {})


def test_copies_are_collapsed_before_omni_counts_them():
    labels = random_labels("binary", 40)
    logits = random_logits("binary", labels, 4, noise=2)
    found = estimate(Dev.of(logits, labels, kind="binary"), {})
    copied = estimate(Dev.of(np.concatenate([logits, logits[[0, 0, 0]]]), labels, kind="binary"), {})
    assert copied.of["omni"].honest == found.of["omni"].honest
    assert copied.notices == ["3 members with the very logits of m0 left out: m4, m5, m6"]


@pytest.mark.parametrize("world", ["binary", "regression"])
def test_the_estimate_is_honest_where_the_truth_is_known(world, monkeypatch):
    """A small run of benchmarks/honest.py, which says what is measured; its full run is in benchmarks/README.md."""
    import dataclasses

    import honest

    small = dataclasses.replace(honest.WORLDS[world], n=150, members=12)
    monkeypatch.setattr(honest, "methods", lambda _: {"greedy by score": Greedy(steps=10, criterion="score")})
    found = honest.simulate(small, sets=60, truth=4000, repeats=4)
    for name in ("best", "greedy by score"):
        row = found[name]
        assert row["optimism"] > 4 * row["optimism error"]  # in-sample is too high
        assert abs(row["bias"]) < 3 * row["bias error"]  # the estimate is not
        assert abs(row["pessimism"]) < row["optimism"] / 4 + 3 * row["pessimism error"]
        assert row["optimism"] > row["pessimism"] + 4 * row["pessimism error"]
        assert 0.78 <= row["cover"] <= 0.99  # 0.90, with three standard errors of 60 draws


@pytest.mark.parametrize("kind", ["multiclass", "binary"])
@pytest.mark.parametrize("strategy", ["mean", "mean-probability", "majority"])
def test_the_probabilities_that_are_kept_are_those_behind_what_was_decided(kind, strategy):
    labels = random_labels(kind, 60)
    logits = random_logits(kind, labels, 5, noise=2)
    each = [np.stack([one * 0.3, one]) for one in logits]  # two epochs that decide the same: the first is chosen
    dev = Dev.of(logits, labels, kind=kind, epochs=each)
    methods = {"weighted": Weighted(top_k=3), "weighted-offset": Weighted(offset=True)}
    found = estimate(dev, {**methods, "omni": Omni(strategy=strategy)}, probabilities=True)
    for name, one in found.of.items():
        p = one.probabilities
        assert p.shape == (*one.held_out.shape, 5 if kind == "multiclass" else 2)
        np.testing.assert_allclose(p.sum(axis=-1), 1)
        if name != "omni" or strategy != "majority":  # a tie of votes is broken by rank
            assert (p.argmax(axis=-1) == one.held_out).all()
    order = canonical(dev.ids)
    first = found.of["omni"].probabilities[0]
    softmax, sigmoid = scipy.special.softmax, scipy.special.expit
    said = logits[:, order] * 0.3
    if strategy == "majority":
        decided = said.argmax(axis=-1) if kind == "multiclass" else (said[..., 0] > 0).astype(int)
        expected = np.stack([(decided == c).mean(axis=0) for c in range(p.shape[-1])], axis=-1)
    elif kind == "multiclass":
        both = softmax(said.mean(axis=0), axis=-1), softmax(said, axis=-1).mean(axis=0)
        expected = both[strategy != "mean"]
    else:
        one = (sigmoid(said.mean(axis=0)), sigmoid(said).mean(axis=0))[strategy != "mean"]
        expected = np.hstack([1 - one, one])
    np.testing.assert_allclose(first, expected, rtol=1e-6)
    assert estimate(dev, {}).of["omni"].probabilities is None


def test_with_too_few_examples_the_probabilities_are_those_of_the_whole_dev_set():
    labels = np.array([0, 1, 1, 0, 1])
    logits = random_logits("binary", labels, 3)
    found = estimate(Dev.of(logits, labels, kind="binary", ids=[*"abcde"]), {}, probabilities=True)
    best = int(np.argmax([((one[:, 0] > 0) == labels).mean() for one in logits]))
    assert len({((one[:, 0] > 0) == labels).mean() for one in logits}) > 1
    p = found.of["best"].probabilities
    assert p.shape == (1, 5, 2)
    order = canonical([*"abcde"])
    np.testing.assert_allclose(p[0, :, 1], scipy.special.expit(logits[best][order, 0]), rtol=1e-6)
    assert found.of["omni"].probabilities.shape == (1, 5, 2)


@pytest.mark.parametrize("kind", ["multiclass", "binary"])
@pytest.mark.parametrize("kept", [False, True])
def test_many_examples_are_counted_as_scikit_learn_does(kind, kept, monkeypatch):
    """From ``MANY`` examples on, another way to count is taken; the parts' scores differ from each other."""
    monkeypatch.setattr(fold_scores, "MANY", 50)
    best, each, labels = with_epochs(kind, members=40, n=60)
    dev = Dev.of(best, labels, kind=kind, epochs=list(each) if kept else None)
    fold = stratified_folds(dev.ids, labels, kind, folds=3, repeats=2)
    found = fold_scores.fold_scores(dev, fold, 3, omni="mean")
    parts = [fold[r] != k for r in range(2) for k in range(3)]
    differ = 0
    for m in range(40):
        options = each[m] if kept else best[m][None]
        expected = [max(score_of(decisions(one, kind)[part], labels[part], kind) for one in options) for part in parts]
        differ += len(set(expected)) > 1
        np.testing.assert_allclose(found.scores[:-1, m], expected, atol=1e-12)
        assert found.scores[-1, m] == pytest.approx(score_of(decisions(best[m], kind), labels, kind), abs=1e-12)
    assert differ > 30  # or one column would do for all
