"""Other scores than accuracy and Pearson r, the whole way: ranking, searches, offsets, estimates, records, commands."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from by_others import probabilities, score_of
from pool_factory import add_member, make_pool, random_labels, random_logits
from scipy.optimize import minimize
from scipy.special import expit, softmax
from scipy.stats import bootstrap
from sklearn.metrics import f1_score, matthews_corrcoef, root_mean_squared_error

from lora_ensemble.dicor.apply import predict
from lora_ensemble.dicor.choose.combine import Choice, decide
from lora_ensemble.dicor.choose.combine import probabilities as probabilities_of
from lora_ensemble.dicor.choose.methods import Dicor, Exhaustive, Greedy, Omni, Weighted
from lora_ensemble.dicor.choose.offsets import for_score
from lora_ensemble.dicor.choose.weights import convex_weights
from lora_ensemble.dicor.cli import main
from lora_ensemble.dicor.compare import compare, overall
from lora_ensemble.dicor.estimate import honest
from lora_ensemble.dicor.estimate.fold_scores import fold_scores
from lora_ensemble.dicor.estimate.honest import estimate
from lora_ensemble.dicor.estimate.interval import of_differences
from lora_ensemble.dicor.estimate.splits import stratified_folds
from lora_ensemble.dicor.members import Dev, Members
from lora_ensemble.dicor.options import Options
from lora_ensemble.dicor.record import read
from lora_ensemble.dicor.report.facts import gather
from lora_ensemble.dicor.table import number
from lora_ensemble.pool import TaskPool
from lora_ensemble.tasks import SCORES
from lora_ensemble.text.splits import canonical

EVERY = [(kind, name) for name, about in SCORES.items() for kind in about.kinds if kind != "multilabel"]


def said_of(logits, kind, name):
    """By scipy: decisions, probabilities, or values."""
    p = probabilities(logits[None], kind)[0]
    return p if SCORES[name].of != "decisions" else p.argmax(-1)


def alike(kind, labels, members, *, seed, noise=2.0):
    """Logits (M, N, C) of members that are about as good as each other."""
    each = [random_logits(kind, labels, 1, seed=seed + m, noise=2 * noise) for m in range(members)]
    return np.concatenate(each)


def worth(logits, labels, kind, name):
    return SCORES[name].sign * score_of(name, said_of(logits, kind, name), labels, kind)


def with_epochs(kind, *, members=5, n=60, epochs=3, seed=0, noise=2.0):
    """Logits of each epoch (M, E, N, C), all about as good, and labels."""
    labels = random_labels(kind, n, seed=seed)
    each = [alike(kind, labels, members, seed=seed + 1 + 100 * e, noise=noise) for e in range(epochs)]
    return np.stack(each, axis=1), labels


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_every_part_of_dev_has_its_best_epoch_and_score(kind, name):
    each, labels = with_epochs(kind)
    dev = Dev.of(each[:, 0], labels, kind=kind, epochs=list(each), score=name)
    fold = stratified_folds(dev.ids, labels, kind, folds=3, repeats=2)
    found = fold_scores(dev, fold, 3, omni="mean")
    parts = [fold[r] != k for r in range(2) for k in range(3)]
    for m in range(5):
        of = [[worth(one[part], labels[part], kind, name) for one in each[m]] for part in parts]
        np.testing.assert_allclose(found.scores[:-1, m], np.max(of, axis=1), atol=1e-9)
        np.testing.assert_array_equal(found.epochs[:, m], np.argmax(of, axis=1))
        assert found.scores[-1, m] == pytest.approx(worth(each[m, 0], labels, kind, name), abs=1e-9)
    assert len(set(found.epochs.ravel())) > 1


@pytest.mark.parametrize(("kind", "name"), [("binary", "mcc"), ("multiclass", "log_loss"), ("regression", "rmse")])
def test_the_single_bests_estimate_read_aloud(kind, name):
    """Two folds, one repeat: in each the best member at its best epoch, by the other half alone."""
    each, labels = with_epochs(kind, seed=3)
    ids, sign = np.array([f"e{i}" for i in range(60)]), SCORES[name].sign
    best = [np.argmax([worth(one, labels, kind, name) for one in m]) for m in each]
    logits = np.stack([m[e] for m, e in zip(each, best, strict=True)])
    one = estimate(Dev.of(logits, labels, kind=kind, ids=ids, epochs=list(each), score=name), {}, folds=2, repeats=1)
    (fold,) = stratified_folds(ids, labels, kind, folds=2, repeats=1)
    held = np.zeros((60, 5) if name == "log_loss" else 60)
    for k in (0, 1):
        choose, rest = fold != k, fold == k
        of = {(m, e): worth(each[m, e][choose], labels[choose], kind, name) for m in range(5) for e in range(3)}
        held[rest] = said_of(each[max(of, key=of.get)], kind, name)[rest]
    found = one.of["best"]
    np.testing.assert_allclose(found.held_out[0], held[canonical(ids)], atol=1e-6)
    assert found.at_part == pytest.approx(score_of(name, held, labels, kind), abs=1e-6)
    in_sample = sign * max(worth(x, labels, kind, name) for x in logits)
    assert found.in_sample == pytest.approx(in_sample, abs=1e-9)
    # Two folds: a quarter of the optimism is added; what is optimistic is the lower RMSE.
    assert found.honest.value == pytest.approx(found.at_part + (in_sample - found.at_part) / 4, abs=1e-6)
    assert found.optimism == pytest.approx(sign * (in_sample - found.honest.value), abs=1e-9)
    assert found.optimism > 0
    gain = sign * (found.honest.value - one.of["omni"].honest.value)  # above 0: better
    assert found.against_omni.value == pytest.approx(gain, abs=1e-9)
    assert found.honest.low < found.honest.value < found.honest.high
    scores = [score_of(name, said_of(x, kind, name), labels, kind) for x in logits]
    assert [one.scores[f"m{i}"] for i in range(5)] == pytest.approx(scores, abs=1e-9)


SOME = [("multiclass", "f1_macro"), ("binary", "auroc"), ("regression", "spearman"), ("regression", "mae")]


@pytest.mark.parametrize("strategy", ["mean", "majority"])
@pytest.mark.parametrize(("kind", "name"), [*SOME, ("multiclass", "log_loss")])
def test_omnis_estimate_is_that_of_choosing_all(kind, name, strategy):
    """Omni is summed up in one pass over all members; as a method that sees them all it must come out the same."""
    if kind == "regression" and strategy == "majority":
        pytest.skip("for classifiers")
    each, labels = with_epochs(kind, members=12)
    dev = Dev.of(each[:, 0], labels, kind=kind, epochs=list(each), score=name)
    methods = {"all": Omni(strategy=strategy), "omni": Omni(strategy=strategy)}
    found = estimate(dev, methods, repeats=2, probabilities=True).of
    one, other = found["omni"], found["all"]
    assert one.in_sample == pytest.approx(other.in_sample, abs=1e-9)
    assert one.at_part == pytest.approx(other.at_part, abs=1e-6)
    np.testing.assert_allclose(one.held_out, other.held_out, atol=1e-4)
    if kind != "regression":
        np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-4)
        np.testing.assert_allclose(one.probabilities.sum(axis=-1), 1)
    assert one.at_part != one.in_sample


@pytest.mark.parametrize(("kind", "name"), SOME)
def test_no_order_changes_the_estimate(kind, name):
    each, labels = with_epochs(kind)
    rng, names, ids = np.random.default_rng(0), [f"m{i}" for i in range(5)], np.array([f"e{i}" for i in range(60)])
    methods = {"weighted": Weighted(offset=True), "greedy": Greedy(criterion="score"), "dicor": Dicor()}
    members, rows = rng.permutation(5), rng.permutation(60)
    made = []
    for which, order in ((range(5), range(60)), (members, rows)):
        some = each[list(which)][:, :, list(order)]
        known = {"names": [names[m] for m in which], "ids": ids[list(order)], "epochs": list(some)}
        made.append(
            estimate(Dev.of(some[:, 0], labels[list(order)], kind=kind, score=name, **known), methods, repeats=2)
        )
    for method, one in made[0].of.items():
        other = made[1].of[method]
        assert other.names == one.names
        np.testing.assert_allclose(other.held_out, one.held_out, atol=1e-6)
        for a, b in ((one.honest, other.honest), (one.against_omni, other.against_omni)):
            if a is not None:
                assert (b.low, b.value, b.high) == pytest.approx((a.low, a.value, a.high), abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("binary", "f1"), ("multiclass", "kappa_quadratic"), ("binary", "auroc"), ("regression", "rmse")],
)
def test_the_intervals_are_scipys_bootstrap(kind, name):
    labels, sign = random_labels(kind, 300, seed=1), SCORES[name].sign
    a, b = (said_of(x, kind, name) for x in random_logits(kind, labels, 2, seed=2, noise=1.5))
    found = of_differences({"a": a[None], "b": b[None]}, [("a", "b"), ("a", "")], labels, kind, name)
    rows = np.arange(300)

    def both(i):
        return sign * (score_of(name, a[i], labels[i], kind) - score_of(name, b[i], labels[i], kind))

    for pair, statistic in (
        (("a", "b"), both),
        (("a", ""), lambda i: sign * score_of(name, a[i], labels[i], kind)),
    ):
        asked = {"confidence_level": 0.9, "n_resamples": 1000, "method": "percentile", "vectorized": False, "rng": 1}
        expected = bootstrap((rows,), statistic, **asked).confidence_interval
        width = expected.high - expected.low
        assert (found[pair].low, found[pair].high) == pytest.approx((expected.low, expected.high), abs=0.1 * width)
        assert found[pair].value == pytest.approx(statistic(rows), abs=1e-9)


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_the_search_by_the_score_finds_the_best_of_all_ensembles(kind, name):
    labels = random_labels(kind, 40, seed=5)
    logits = alike(kind, labels, 5, seed=6)
    p = probabilities(logits, kind)
    found = Exhaustive(top_k=5, criterion="score").fit(logits, labels, kind=kind, score=name)

    def of(which):
        mean = p[list(which)].mean(axis=0)
        said = mean if SCORES[name].of != "decisions" else mean.argmax(-1)
        return SCORES[name].sign * score_of(name, said, labels, kind)

    every = [of(which) for size in range(1, 6) for which in itertools.combinations(range(5), size)]
    assert of(found.members_) == pytest.approx(max(every), abs=1e-9)
    assert len(found.members_) > 1
    assert found.scores_ == pytest.approx([SCORES[name].sign * of([m]) for m in found.members_], abs=1e-9)


@pytest.mark.parametrize(("kind", "name"), [("binary", "mcc"), ("regression", "mae"), ("regression", "r2")])
def test_a_greedy_search_by_the_score_read_aloud(kind, name):
    labels = random_labels(kind, 40, seed=7)
    logits = alike(kind, labels, 6, seed=8)
    p = probabilities(logits, kind)
    order = sorted(range(6), key=lambda m: -worth(logits[m], labels, kind, name))
    taken, values = [], []
    for _ in range(5):
        value = {}
        for m in order:
            mean = np.mean(p[[*taken, m]], axis=0)
            said = mean if kind == "regression" else mean.argmax(-1)
            value[m] = round(SCORES[name].sign * score_of(name, said, labels, kind), 12)
        best = [m for m in order if value[m] == max(value.values())]
        taken.append(next((m for m in best if m in taken), best[0]))
        values.append(max(value.values()))
    taken = taken[: int(np.argmax(values)) + 1]
    found = Greedy(steps=5, criterion="score").fit(logits, labels, kind=kind, score=name)
    assert found.members_ == list(dict.fromkeys(taken))
    assert found.weights_ == pytest.approx([taken.count(m) / len(taken) for m in found.members_])


def test_log_loss_proposes_and_auroc_picks():
    """The way goes by log-loss; of the ensembles on it the one with the best AUROC is kept, which is another."""
    labels = random_labels("binary", 60, seed=6)
    logits = alike("binary", labels, 8, seed=610)
    p = probabilities(logits, "binary")
    taken, losses = [], []
    for _ in range(8):
        mean = [p[[*taken, m]].mean(axis=0) for m in range(8)]
        loss = [score_of("log_loss", one, labels, "binary") for one in mean]
        taken.append(int(np.argmin(loss)))
        losses.append(min(loss))
    areas = [score_of("auroc", p[taken[: i + 1]].mean(axis=0), labels, "binary") for i in range(8)]
    for criterion, kept in (("score", np.argmax(areas)), ("loss", np.argmin(losses))):
        found = Greedy(steps=8, criterion=criterion).fit(logits, labels, kind="binary", score="auroc")
        assert set(found.members_) == set(taken[: kept + 1])
    assert set(taken[: np.argmax(areas) + 1]) != set(taken[: np.argmin(losses) + 1])


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_weights_for_rmse_are_scipys_and_look_at_the_level(shift):
    """Of values that are all too high by ``shift`` no line is drawn: the weighted mean itself is to be near."""
    labels = random_labels("regression", 50)
    values = random_logits("regression", labels, 4, seed=3)[..., 0].astype(float) + shift
    values[0] += 0.8
    members = Members(values[..., None], "regression", [*"abcd"], [None] * 4, np.zeros(4), labels, "rmse")
    left = np.mean((values.mean(axis=0) - labels) ** 2)

    def cost(w):
        return ((w @ values - labels) ** 2).sum() / (2 * left) + 4 * ((w - 0.25) ** 2).sum()

    bounds, one = [(0, None)] * 4, {"type": "eq", "fun": lambda w: w.sum() - 1}
    expected = minimize(cost, np.full(4, 0.25), bounds=bounds, constraints=one, options={"ftol": 1e-14}).x
    np.testing.assert_allclose(convex_weights(members), expected, atol=1e-4)
    assert expected.std() > 0.01
    other = convex_weights(Members(values[..., None], "regression", [*"abcd"], [None] * 4, np.zeros(4), labels))
    assert np.abs(other - expected).max() > 0.01  # as Pearson r has them


# Offsets


def members_of(logits, labels, kind, name):
    names = [f"m{i}" for i in range(len(logits))]
    return Members(logits, kind, names, [None] * len(logits), np.zeros(len(logits)), labels, name)


def test_the_threshold_is_that_of_the_rule_read_aloud():
    """Few are positive, so that F1 wants a lower threshold; by scikit-learn, each move tried by itself."""
    moves, choice = np.arange(-24, 25) / 4, Choice(members=[0], strategy="mean")
    for seed in (0, 2):  # of the second, neither F1 alone, nor smoothed, nor drawn to 0 has the same best move
        rng = np.random.default_rng(seed)
        labels = (rng.random(80) < 0.15).astype(int)
        logits = (3 * labels - 3.5 + 1.5 * rng.normal(size=80))[None, :, None]
        f1 = [f1_score(labels, logits[0, :, 0] + move > 0, zero_division=0) for move in moves]
        near = np.r_[f1[0], f1, f1[-1]]
        rule = near[1:-1] / 2 + near[:-2] / 4 + near[2:] / 4 - 10 / 160 * moves**2
        found = for_score(members_of(logits, labels, "binary", "f1"), choice)
        move = moves[np.argmax(rule)]
        assert move > 0
        assert found.offsets == pytest.approx([-move / 2, move / 2])
        decided = decide(members_of(logits, labels, "binary", "f1"), found)
        np.testing.assert_array_equal(decided, logits[0, :, 0] + move > 0)
    for name in ("accuracy", "auroc", "log_loss"):
        assert for_score(members_of(logits, labels, "binary", name), choice) == choice
    majority = Choice(members=[0], strategy="majority")
    assert for_score(members_of(logits, labels, "binary", "f1"), majority) == majority


def test_on_a_plateau_the_threshold_stays_and_a_lone_peak_is_not_followed():
    wide = np.array([[[-9.0], [-8.0], [8.0], [9.0]] * 5])
    labels = np.array([0, 0, 1, 1] * 5)
    choice = Choice(members=[0], strategy="mean")
    assert for_score(members_of(wide, labels, "binary", "f1"), choice) == choice  # never wrong from -8 to 8
    rng = np.random.default_rng(3)
    moved = []
    for n in (20, 2000):
        labels = rng.integers(2, size=n)
        logits = (labels - 0.5 + 2 * rng.normal(size=n))[None, :, None]  # 0 is right; what is better is chance
        found = for_score(members_of(logits, labels, "binary", "mcc"), choice)
        moved.append(0.0 if found.offsets is None else np.ptp(found.offsets))
    assert max(moved) <= 0.75


@pytest.mark.parametrize("strategy", ["mean", "mean-probability", "weighted"])
@pytest.mark.parametrize("kind", ["multiclass", "binary"])
def test_what_is_decided_is_the_most_probable(kind, strategy):
    labels = random_labels(kind, 50)
    logits, classes = random_logits(kind, labels, 3, seed=1, noise=3), 5 if kind == "multiclass" else 2
    weights = np.array([0.5, 0.3, 0.2]) if strategy == "weighted" else None
    offsets = np.linspace(-0.8, 0.8, classes)
    choice = Choice(members=[0, 1, 2], strategy=strategy, weights=weights, scale=1.3, offsets=offsets)
    likely = logits.mean(axis=0, keepdims=True) if strategy == "mean" else logits
    p = np.average(probabilities(likely, kind), axis=0, weights=weights)
    moved = softmax(1.3 * np.log(p) + offsets, axis=1)
    np.testing.assert_allclose(probabilities_of(logits, choice, kind=kind), moved, atol=1e-6)
    found = decide(members_of(logits, labels, kind, "mcc"), choice)
    np.testing.assert_array_equal(found, moved.argmax(axis=1))
    assert (found != p.argmax(axis=1)).any()


@pytest.mark.parametrize("name", ["f1", "mcc", "balanced_accuracy", "kappa_quadratic"])
def test_offsets_are_chosen_without_what_is_held_out(name):
    """Other labels for the fold that is held out change nothing of what was decided there, thresholds included."""
    each, _ = with_epochs("binary", members=6)
    rng = np.random.default_rng(1)
    labels = (rng.random(60) < 0.3).astype(int)
    each = (each + (2 * labels - 2.2)[:, None]).astype(np.float32)
    ids = np.array([f"e{i}" for i in range(60)])
    (fold,) = stratified_folds(ids, labels, "binary", folds=2, repeats=1)
    ones, zeros = (np.flatnonzero((fold == 0) & (labels == c)) for c in (1, 0))
    turned = labels.copy()
    turned[ones[:6]], turned[zeros[:6]] = 0, 1
    methods = {"weighted": Weighted(offset=True), "exhaustive": Exhaustive(top_k=4), "greedy": Greedy()}
    found, used = [], []

    def kept(members, choice):
        used.append(for_score(members, choice))
        return used[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(honest, "stratified_folds", lambda *a, **k: fold[None])
        patched.setattr("lora_ensemble.dicor.choose.methods.for_score", kept)
        for truth in (labels, turned):
            dev = Dev.of(each[:, 0], truth, kind="binary", ids=ids, epochs=list(each), score=name)
            found.append(estimate(dev, methods, folds=2, repeats=1))
    held = fold[canonical(ids)] == 0
    for method in ("best", "omni", *methods):
        a, b = (one.of[method].held_out[0] for one in found)
        np.testing.assert_array_equal(a[held], b[held])
    assert sum(choice.offsets is not None for choice in used) > len(used) / 2


def test_the_single_best_and_omni_decide_as_they_are():
    labels = (np.random.default_rng(0).random(60) < 0.2).astype(int)
    logits = random_logits("binary", labels, 4, seed=1) - 1.5
    found = estimate(Dev.of(logits, labels, kind="binary", score="f1"), {"weighted": Weighted()}).of
    assert found["best"].choice.offsets is None
    assert found["weighted"].choice.offsets is not None
    assert Omni().fit(logits, labels, kind="binary", score="f1").choice_.offsets is None
    assert found["best"].in_sample == pytest.approx(max(f1_score(labels, one[:, 0] > 0) for one in logits))


# The commands


def run(*args):
    return main([str(a) for a in args])


def selected(pool, tmp_path, task, *args):
    record = tmp_path / f"{task}.json"
    assert run("select", "--pool", pool, "--task", task, "--output", record, *args) == 0
    return record, json.loads(record.read_text())


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """All kinds; of quora one in five is positive, and the second member of sts is off by a constant."""
    folder = tmp_path_factory.mktemp("pools") / "pool"
    make_pool(folder, "sst", "multiclass", noise=2.5)
    labels = (np.random.default_rng(0).random(90) < 0.2).astype(int)
    logits, ids = random_logits("binary", labels, 5, seed=1, noise=2.0) - 1.0, [f"d{i}" for i in range(90)]
    for i, one in enumerate(logits):
        add_member(folder, "quora", "binary", f"m{i}", {"dev": one}, {"dev": ids}, {"dev": labels})
    values = random_labels("regression", 60)
    shifted = random_logits("regression", values, 4, seed=2, noise=0.6)
    shifted[0] += 2.0  # the best r, and a bad RMSE
    for i, one in enumerate(shifted):
        add_member(folder, "sts", "regression", f"m{i}", {"dev": one}, {"dev": ids[:60]}, {"dev": values})
    return folder


def logits_of(pool, task, names):
    opened = TaskPool(pool, task)
    return np.stack([opened.logits(name) for name in names]), opened.examples().labels


def test_mcc_the_whole_way(pool, tmp_path, capsys):
    record, raw = selected(pool, tmp_path, "quora", "--score", "mcc")
    logits, labels = logits_of(pool, "quora", [row["name"] for row in raw["members"]])
    assert raw["score"] == "mcc"
    assert [row["score"] for row in raw["members"]] == pytest.approx(
        [matthews_corrcoef(labels, one[:, 0] > 0) for one in logits]
    )
    every, _ = logits_of(pool, "quora", [f"m{i}" for i in range(5)])
    by_hand = [matthews_corrcoef(labels, one[:, 0] > 0) for one in every]
    assert raw["best"]["name"] == f"m{int(np.argmax(by_hand))}"
    assert raw["best"]["in_sample"] == pytest.approx(max(by_hand))
    # What is decided, by hand from the record.
    p = np.average(expit(logits[..., 0].astype(float)), axis=0, weights=[row["weight"] for row in raw["members"]])
    z = raw["scale"] * np.log(p / (1 - p)) + raw["offsets"][1] - raw["offsets"][0]
    assert raw["estimate"]["in_sample"] == pytest.approx(matthews_corrcoef(labels, z > 0))
    capsys.readouterr()
    assert run("apply", "--ensemble", record, "--split", "dev", "--output", tmp_path / "p.csv") == 0
    assert f"quora dev MCC {matthews_corrcoef(labels, z > 0):.4f}\n" in capsys.readouterr().out
    said = [line.split(" , ")[1].strip() for line in (tmp_path / "p.csv").read_text().splitlines()[1:]]
    assert said == [f"{float(one > 0)}" for one in z]
    assert raw["estimate"]["honest"]["low"] < raw["estimate"]["honest"]["value"] < raw["estimate"]["in_sample"]
    assert run("compare", "--pool", pool, "--task", "quora", "--score", "mcc", "--method", "weighted") == 0
    assert "\nMCC on dev        members in-sample" in capsys.readouterr().out


def test_rmse_the_whole_way(pool, tmp_path, capsys):
    _, by_r = selected(pool, tmp_path, "sts")
    record, raw = selected(pool, tmp_path, "sts", "--score", "rmse")
    names = [f"m{i}" for i in range(4)]
    logits, labels = logits_of(pool, "sts", names)
    by_hand = {name: root_mean_squared_error(labels, one[:, 0]) for name, one in zip(names, logits, strict=True)}
    assert raw["best"]["name"] == min(by_hand, key=by_hand.get) != by_r["best"]["name"] == "m0"
    assert raw["best"]["in_sample"] == pytest.approx(min(by_hand.values()))
    assert [row["score"] for row in raw["members"]] == pytest.approx([by_hand[r["name"]] for r in raw["members"]])
    weights = {row["name"]: row["weight"] for row in raw["members"]}
    mean = sum(w * one[:, 0] for name, one in zip(names, logits, strict=True) if (w := weights.get(name)))
    assert raw["estimate"]["in_sample"] == pytest.approx(root_mean_squared_error(labels, mean))
    assert raw["estimate"]["honest"]["value"] > raw["estimate"]["in_sample"]
    assert raw["estimate"]["optimism"] > 0
    assert raw["estimate"]["to_best"]["value"] > 0  # a gain, though the RMSE is lower
    capsys.readouterr()
    assert run("apply", "--ensemble", record, "--split", "dev", "--output", tmp_path / "p.csv") == 0
    assert f"sts dev RMSE {root_mean_squared_error(labels, mean):.4f}\n" in capsys.readouterr().out
    assert run("compare", "--pool", pool, "--task", "sts", "--score", "rmse") == 0
    out = capsys.readouterr().out
    assert "RMSE: the lower the better; differences and the optimism are what is gained." in out
    assert next(x for x in out.splitlines() if x.startswith("best")).split()[2] == f"{min(by_hand.values()):.4f}"


@pytest.mark.parametrize("name", ["auroc", "average_precision", "log_loss"])
def test_scores_of_probabilities_the_whole_way(pool, tmp_path, name, capsys):
    record, raw = selected(pool, tmp_path, "quora", "--score", name, "--method", "greedy-score")
    logits, labels = logits_of(pool, "quora", [row["name"] for row in raw["members"]])
    p = np.average(probabilities(logits, "binary"), axis=0, weights=[row["weight"] for row in raw["members"]])
    expected = score_of(name, p, labels, "binary")
    assert raw["offsets"] is None
    assert raw["estimate"]["in_sample"] == pytest.approx(expected)
    assert raw["estimate"]["honest"]["low"] < raw["estimate"]["honest"]["value"] < raw["estimate"]["honest"]["high"]
    capsys.readouterr()
    assert run("apply", "--ensemble", record, "--split", "dev", "--output", tmp_path / "p.csv") == 0
    assert f"quora dev {SCORES[name].words} {expected:.4f}\n" in capsys.readouterr().out


def test_a_report_speaks_of_its_score(pool, tmp_path):
    page = tmp_path / "report.html"
    args = ("--score", "f1_macro", "--method", "weighted-offset", "--output", page)
    assert run("report", "--pool", pool, "--task", "sst", *args) == 0
    text = page.read_text(encoding="utf-8")
    assert "expect macro F1 0." in text
    assert "--method weighted-offset --score f1_macro" in text
    assert "accuracy on dev" not in text


def test_the_lower_log_loss_has_the_say_where_votes_tie(tmp_path):
    """Two members without a rank contradict each other; of a tie the better one's class is taken, on any split."""
    labels, ids = random_labels("binary", 40), [f"d{i}" for i in range(40)]
    good = random_logits("binary", labels, 1, noise=1)[0]
    for name, logits in (("m0", -good), ("m1", good)):
        both = {"dev": logits, "test": logits}
        add_member(tmp_path, "own", "binary", name, both, dict.fromkeys(both, ids), dict.fromkeys(both, labels))
    record, raw = selected(
        tmp_path, tmp_path, "own", "--score", "log_loss", "--method", "omni", "--strategy", "majority"
    )
    assert raw["best"]["name"] == "m1"
    by_hand = (good[:, 0] > 0).astype(int)
    assert predict(read(record), tmp_path, "dev")[1].tolist() == by_hand.tolist()


def test_a_report_shows_the_lowest_rmse_first(pool):
    shown = gather(compare(TaskPool(pool, "sts"), ["weighted"], Options(), score="rmse"), "weighted")
    logits, labels = logits_of(pool, "sts", [r.name for r in shown.shown])
    by_hand = [root_mean_squared_error(labels, one[:, 0]) for one in logits]
    assert by_hand == sorted(by_hand)
    assert shown.scores == pytest.approx(by_hand)


def test_the_score_of_the_pool_is_what_its_members_were_trained_by(tmp_path, capsys):
    labels, ids = random_labels("binary", 40), [f"d{i}" for i in range(40)]
    logits = random_logits("binary", labels, 3, noise=2)

    def add(i, **more):
        add_member(
            tmp_path / "pool", "own", "binary", f"m{i}", {"dev": logits[i]}, {"dev": ids}, {"dev": labels}, **more
        )

    for i in (0, 1):
        add(i, settings={"score": "f1"}, train_fingerprint="x")
    add(2)  # imported: it says nothing of how it was trained
    assert TaskPool(tmp_path / "pool", "own").scored_by == "f1"
    assert selected(tmp_path / "pool", tmp_path, "own")[1]["score"] == "f1"
    assert selected(tmp_path / "pool", tmp_path, "own", "--score", "auroc")[1]["score"] == "auroc"
    add(2, train_fingerprint="x")
    capsys.readouterr()
    assert run("compare", "--pool", tmp_path / "pool") == 2
    said = "dicor: error: task own: its members were trained by several scores (accuracy, f1); say which with --score\n"
    assert capsys.readouterr().err == said
    assert run("compare", "--pool", tmp_path / "pool", "--score", "f1") == 0
    add(2, settings={"score": "pearson"})
    capsys.readouterr()
    assert run("compare", "--pool", tmp_path / "pool") == 2
    err = capsys.readouterr().err
    assert "m2/member.json: settings: score is 'pearson'; a binary task has one of accuracy" in err
    assert len(err.splitlines()) == 1


def test_what_is_imported_is_scored_as_the_pools_members_are(tmp_path, capsys):
    labels, ids = random_labels("binary", 40), [f"d{i}" for i in range(40)]
    logits = random_logits("binary", labels, 1, noise=3)[0]
    how = {"settings": {"score": "f1"}, "train_fingerprint": "x"}
    add_member(tmp_path / "pool", "own", "binary", "m0", {"dev": logits}, {"dev": ids}, {"dev": labels}, **how)
    rows = "".join(f"{i},{-z}\n" for i, z in zip(ids, logits[:, 0], strict=True))
    (tmp_path / "other.csv").write_text(f"id,logit\n{rows}")
    assert run("import", tmp_path / "other.csv", "--pool", tmp_path / "pool", "--task", "own") == 0
    expected = f1_score(labels, -logits[:, 0] > 0)
    assert f"other  dev F1 {expected:.4f}, 40 examples" in capsys.readouterr().out
    record = TaskPool(tmp_path / "pool", "own").record("other")
    assert (record.scored_by, record.score) == ("f1", pytest.approx(expected))


def test_what_rounds_to_0_has_no_minus():
    assert [number(x, sign=True) for x in (-1e-17, -0.00004, 0.0, -0.00006)] == [
        "+0.0000",
        "+0.0000",
        "+0.0000",
        "-0.0001",
    ]
    assert number(-1e-9) == "0.0000"


def test_mistakes_are_one_line(pool, tmp_path, capsys):
    for args, says in (
        (("compare", "--score", "f1"), "task sst: score is 'f1'; a multiclass task has one of accuracy,"),
        (
            ("compare", "--task", "sts", "--score", "mcc"),
            "a regression task has one of pearson, spearman, mae, rmse, r2",
        ),
        (("compare", "--score", "F1"), "argument --score: invalid choice: 'F1'"),
    ):
        assert run(*args, "--pool", pool) == 2
        err = capsys.readouterr().err
        assert says in err
        assert len(err.splitlines()) == 1


def test_the_courses_overall_score_is_of_its_own_scores_alone(tmp_path):
    for task, kind in (("sst", "multiclass"), ("quora", "binary"), ("sts", "regression")):
        make_pool(tmp_path, task, kind, members=2, n=12)
    pools = {task: TaskPool(tmp_path, task) for task in ("sst", "quora", "sts")}
    found = {task: compare(pools[task], [], Options()) for task in pools}
    assert overall(found) is not None
    assert overall(found | {"sst": compare(pools["sst"], [], Options(), score="mcc")}) is None


def test_a_record_keeps_offsets_of_any_mean_and_refuses_them_of_a_majority(pool, tmp_path):
    record, raw = selected(pool, tmp_path, "quora", "--score", "f1", "--method", "exhaustive")
    assert (raw["strategy"], read(record).score) == ("mean-probability", "f1")
    assert raw["offsets"] is not None
    before = read(record)
    assert before.to_json() == record.read_text()
    record.write_text(json.dumps({**raw, "strategy": "majority"}))
    assert run("apply", "--ensemble", record, "--pool", pool, "--split", "dev", "--output", tmp_path / "p.csv") == 2
    without = {key: value for key, value in raw.items() if key != "score"}
    record.write_text(json.dumps(without))
    assert read(record).score == "accuracy"


def test_dicors_rule_takes_the_score_for_its_trade_off():
    """Trade-off 0: by the score alone, the lower RMSE first."""
    labels = random_labels("regression", 40)
    logits = random_logits("regression", labels, 4, seed=1)
    logits[0] += 3
    found = Dicor(size=3, trade_off=0.0).fit(logits, labels, kind="regression", score="rmse")
    assert found.members_ == sorted(range(4), key=lambda m: root_mean_squared_error(labels, logits[m, :, 0]))[:3]


@pytest.mark.parametrize(("kind", "name"), [("binary", "f1"), ("regression", "rmse")])
def test_the_estimate_is_honest_where_the_truth_is_known(kind, name):
    """Of weights and a threshold chosen on 150 examples, the truth being 20,000 others."""
    rng = np.random.default_rng(0)

    def drawn(n):
        labels = (rng.random(n) < 0.2).astype(int) if kind == "binary" else rng.normal(size=n)
        known = 3 * labels - 2.2 if kind == "binary" else labels
        noise = 0.9 * rng.normal(size=n) + np.linspace(1, 1.5, 12)[:, None] * rng.normal(size=(12, n))
        return (known + noise)[..., None].astype(np.float32), labels

    others, truth = drawn(20_000)
    bias = []
    for _ in range(25):
        logits, labels = drawn(150)
        one = estimate(Dev.of(logits, labels, kind=kind, score=name), {"w": Weighted(offset=kind == "binary")}).of["w"]
        places = [int(n[1:]) for n in one.names]
        members = members_of(others[places], truth, kind, name)
        choice = dataclasses.replace(one.choice, members=list(range(len(places))))
        true = score_of(name, decide(members, choice), truth, kind)
        bias.append((SCORES[name].sign * (one.in_sample - true), one.honest.value - true))
    in_sample, honestly = np.mean(bias, axis=0)
    assert in_sample > 0.03
    assert abs(honestly) < in_sample / 3
