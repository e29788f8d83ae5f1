"""Several labels in dicor: what is chosen is what is chosen of the N L rows; examples stay whole; records and files."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pool_factory import LABELS, add_member, make_pool, random_labels, random_logits, refused
from scipy.special import expit, logit
from scipy.stats import zscore
from sklearn import metrics

from lora_ensemble.dicor import record
from lora_ensemble.dicor.choose.combine import Choice, of_labels
from lora_ensemble.dicor.choose.methods import Dicor, Exhaustive, Greedy, Method, Weighted
from lora_ensemble.dicor.choose.offsets import for_score
from lora_ensemble.dicor.choose.similarity import features, pairwise
from lora_ensemble.dicor.cli import main as dicor
from lora_ensemble.dicor.compare import compare, judged
from lora_ensemble.dicor.estimate.fold_scores import fold_scores, standardised
from lora_ensemble.dicor.estimate.honest import estimate
from lora_ensemble.dicor.estimate.interval import of_differences
from lora_ensemble.dicor.estimate.splits import stratified_folds
from lora_ensemble.dicor.members import Dev, Members
from lora_ensemble.dicor.options import Options
from lora_ensemble.pool import TaskPool, write_examples

NAMES = LABELS["multilabel"]


def made(n: int = 80, members: int = 9, seed: int = 0, noise: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits (M, N, 3) and labels (N, 3)."""
    labels = random_labels("multilabel", n, seed=seed)
    return random_logits("multilabel", labels, members, seed=seed + 1, noise=noise), labels


METHODS: list[Callable[[], Method]] = [
    lambda: Dicor(size=4, similarity="cosine", strategy="majority"),
    lambda: Dicor(size=4, similarity="pearson"),
    lambda: Dicor(similarity="error", strategy="mean-probability", trade_off=0.5),
    lambda: Dicor(size=3, similarity="kappa", strategy="weighted", temperature=True),
    lambda: Dicor(size=3, similarity="double-fault"),
    lambda: Greedy(steps=12),
    lambda: Greedy(steps=12, criterion="score"),
    lambda: Greedy(steps=12, sorted_start=True),
    lambda: Weighted(),
    lambda: Weighted(offset=True, temperature=True),
    lambda: Exhaustive(top_k=5),
]


@pytest.mark.parametrize(("score", "flat"), [("f1_micro", "f1"), ("accuracy", "accuracy"), ("log_loss", "log_loss")])
@pytest.mark.parametrize("method", range(len(METHODS)))
def test_the_choice_is_that_of_a_binary_pool_of_all_rows(method: int, score: str, flat: str) -> None:
    """Of scores that are means over all rows; what differs is only the order in which rows are summed up."""
    logits, labels = made(seed=method)
    ours = METHODS[method]().fit(logits, labels, kind="multilabel", score=score)
    theirs = METHODS[method]().fit(logits.reshape(9, -1, 1), labels.reshape(-1), kind="binary", score=flat)
    assert ours.names_ == theirs.names_
    np.testing.assert_allclose(ours.weights_, theirs.weights_, atol=1e-6)
    np.testing.assert_allclose(ours.scores_, theirs.scores_, atol=1e-12)
    if theirs.choice_.offsets is not None:
        assert ours.choice_.offsets is not None
        assert ours.choice_.offsets.shape == (3, 2)
        np.testing.assert_allclose(ours.choice_.offsets, np.tile(theirs.choice_.offsets, (3, 1)), atol=1e-6)
    decided, likely = ours.predict(logits), ours.predict_proba(logits)
    assert decided.shape == likely.shape == labels.shape
    assert (decided == theirs.predict(logits.reshape(9, -1, 1)).reshape(80, 3)).all()
    np.testing.assert_allclose(likely, theirs.predict_proba(logits.reshape(9, -1, 1))[:, 1].reshape(80, 3), atol=1e-6)


@pytest.mark.parametrize("similarity", ["cosine", "pearson", "error", "kappa", "double-fault"])
def test_similarities_are_those_of_all_rows(similarity: Any) -> None:
    logits, labels = made(members=4)
    chosen = Dicor(size=4, similarity=similarity).fit(logits, labels, kind="multilabel")
    flat, truth = logits.reshape(4, -1, 1), labels.reshape(-1)
    matrix = pairwise(features(flat, kind="binary", similarity=similarity, labels=truth), similarity=similarity)
    wrong = (flat[..., 0] > 0) != truth
    by_hand = {
        "cosine": lambda a, b: np.mean((flat[a, :, 0] > 0) == (flat[b, :, 0] > 0)),
        "pearson": lambda a, b: np.corrcoef(flat[a, :, 0], flat[b, :, 0])[0, 1],
        "error": lambda a, b: np.corrcoef(wrong[a], wrong[b])[0, 1],
        "kappa": lambda a, b: metrics.cohen_kappa_score(flat[a, :, 0] > 0, flat[b, :, 0] > 0),
        "double-fault": lambda a, b: np.mean(wrong[a] & wrong[b]),
    }[similarity]
    for i, a in enumerate(chosen.members_):
        for j, b in enumerate(chosen.members_[:i]):
            assert chosen.choice_.similarities[i][j] == pytest.approx(matrix[a, b], abs=1e-6)
            assert chosen.choice_.similarities[i][j] == pytest.approx(by_hand(a, b), abs=1e-6)


@pytest.mark.parametrize("score", ["f1_macro", "f1_weighted"])
def test_each_label_has_the_threshold_that_it_would_have_alone(score: Any) -> None:
    logits, labels = made(n=150, seed=5)
    logits[..., 0] -= 2  # members seldom say that it rains
    ours = Weighted().fit(logits, labels, kind="multilabel", score=score)
    assert ours.choice_.offsets is not None
    moves = ours.choice_.moves
    assert moves is not None
    plain = Choice(members=list(range(len(ours.names_))), strategy="weighted", weights=ours.weights_)
    for label in range(3):
        own = [logits[m, :, label, None] for m in ours.members_]
        alone = Members(np.stack(own), "binary", ours.names_, [None] * len(own), ours.scores_, labels[:, label], "f1")
        found = for_score(alone, plain).moves
        assert moves[label] == pytest.approx(0.0 if found is None else found[1] - found[0])
    assert len(set(moves)) > 1
    p = np.tensordot(ours.weights_, expit(logits[ours.members_].astype(float)), axes=1)
    assert (ours.predict(logits) == (logit(p) + moves > 0)).all()
    without = metrics.f1_score(labels, p > 0.5, average=score.removeprefix("f1_"))
    assert metrics.f1_score(labels, ours.predict(logits), average=score.removeprefix("f1_")) > without + 0.02


def test_a_majority_is_of_each_label_and_ties_go_to_the_highest_rank() -> None:
    logits, labels = made(members=4, seed=2)
    ranks = [2, 8, 4, 4]
    ours = Dicor(size=4, strategy="majority").fit(logits, labels, kind="multilabel", ranks=ranks)
    votes = (logits > 0).astype(int)
    yes = votes.sum(axis=0)
    assert (yes == 2).sum() > 5
    assert (ours.predict(logits) == np.where(yes == 2, votes[1], yes > 2)).all()
    np.testing.assert_allclose(ours.predict_proba(logits), yes / 4)


@pytest.mark.parametrize("score", ["f1_micro", "f1_macro", "f1_weighted", "auroc", "accuracy", "log_loss"])
def test_every_part_of_dev_has_its_best_epoch_and_score(score: Any) -> None:
    """Epochs (E, N, L) as they lie in the pool; what is left out of a part is whole examples."""
    labels = random_labels("multilabel", 90, seed=4)
    alone = [random_logits("multilabel", labels, 1, seed=seed, noise=4.0)[0] for seed in range(12)]
    each = [np.stack(alone[3 * m : 3 * m + 3]) for m in range(4)]
    dev = Dev.of([e[0] for e in each], labels, kind="multilabel", epochs=each, score=score)
    assert (dev.truth == labels).all()
    fold = np.repeat(stratified_folds(dev.ids, labels, "multilabel", folds=3, repeats=2), 3, axis=1)
    found, sign = fold_scores(dev, fold, 3, omni="mean"), -1 if score == "log_loss" else 1
    for s, (r, k) in enumerate(np.ndindex(2, 3)):
        part = fold[r, ::3] != k
        for m in range(4):
            of = [sign * sklearns(score, labels[part], one[part].astype(float)) for one in each[m]]
            assert found.scores[s, m] == pytest.approx(max(of), abs=1e-7)
            assert found.epochs[s, m] == int(np.argmax(of))
    assert len(set(found.epochs.ravel())) > 1


class Seen(Method):
    """Chooses the first, and keeps what it chose from."""

    top_k = 3
    has_offsets = False

    def __init__(self) -> None:
        self.parts: list[Members] = []

    def _choose(self, members: Members) -> Choice:
        self.parts.append(members)
        return Choice(members=[0], strategy="mean")


@pytest.mark.parametrize("groups", [None, 20])
def test_no_split_tears_an_example_or_a_group_apart(groups: int | None) -> None:
    _, labels = made(n=60)
    # The logit says which example and label it is of.
    number = np.arange(60)[:, None] + 0.25 * np.arange(3)
    logits = np.stack([number, number + 1000]).astype(np.float32)
    of = None if groups is None else np.array([f"g{i % groups}" for i in range(60)])
    dev, seen = Dev.of(logits, labels, kind="multilabel", groups=of), Seen()
    assert (len(dev.labels), len(dev.ids), dev.evidence) == (180, 60, groups or 60)
    found = estimate(dev, {"seen": seen})
    assert found.repeats == 10
    assert len(seen.parts) == 31
    for part in seen.parts:
        rows = part.logits[0, :, 0] % 1000
        examples = rows.reshape(-1, 3)
        assert (examples - examples[:, :1] == [0, 0.25, 0.5]).all()
        assert (part.labels.reshape(-1, 3) == labels[examples[:, 0].astype(int)]).all()
        assert len(examples) in (60, *range(30, 50))
        if of is not None and len(examples) < 60:
            inside = set(of[examples[:, 0].astype(int)])
            assert all(((of == g).sum() == 3) and np.isin(np.flatnonzero(of == g), examples).all() for g in inside)


def test_bags_are_of_whole_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = made(n=50, members=6)
    taken: list[np.ndarray] = []
    take = Members.take

    def spy(self: Members, which: Any, rows: np.ndarray | None = None) -> Members:
        taken.extend([] if rows is None else [rows])
        return take(self, which, rows)

    monkeypatch.setattr(Members, "take", spy)
    bagged = Greedy(bags=5, example_share=0.8, criterion="score", sorted_start=True)
    bagged.fit(logits, labels, kind="multilabel", score="f1_macro")
    assert len(taken) == 5
    assert all((rows.reshape(40, 3) % 3 == [0, 1, 2]).all() for rows in taken)
    assert all((np.ptp(rows.reshape(40, 3) // 3, axis=1) == 0).all() for rows in taken)


@pytest.mark.parametrize("score", ["accuracy", "f1_micro", "f1_macro", "log_loss", "auroc", "average_precision"])
def test_intervals_count_examples_not_labels(score: Any) -> None:
    """Four labels that are one, decided alike: no more is known of it than of one label, and sure of no more."""
    rng = np.random.default_rng(0)
    one = rng.integers(2, size=90)
    values = one * 2.0 - 1 + 1.5 * rng.normal(size=(2, 90))
    by_decisions = score in ("accuracy", "f1_micro", "f1_macro")

    def held(width: int) -> dict[str, np.ndarray]:
        rows = np.repeat(values, width, axis=1)
        p = np.stack([expit(-rows), expit(rows)], axis=-1)
        return {name: x[None] for name, x in zip("ab", (rows > 0).astype(int) if by_decisions else p, strict=True)}

    binary = {"f1_micro": "f1", "f1_macro": "f1"}.get(score, score)
    pairs, who = [("a", "b"), ("a", "")], np.arange(90)
    alone: Any = of_differences(held(1), pairs, one, "binary", binary, who)
    four: Any = of_differences(held(4), pairs, np.repeat(one, 4), "binary", score, np.repeat(who, 4), 4)
    torn: Any = of_differences(held(4), pairs[:1], np.repeat(one, 4), "binary", binary)
    for pair in pairs:
        assert vars(four[pair]) == pytest.approx(vars(alone[pair]), rel=1e-9, abs=1e-12)
    assert four["a", "b"].high - four["a", "b"].low > 1.5 * (torn["a", "b"].high - torn["a", "b"].low)


def test_an_estimate_has_the_interval_of_examples() -> None:
    """Through the whole estimate, of four labels that are one: twice as wide as if each row were evidence."""
    logits, labels = made(n=100, seed=3, noise=3.0)
    copies = np.repeat(logits[..., 2:], 4, axis=2), np.repeat(labels[:, 2:], 4, axis=1)
    four = estimate(Dev.of(*copies, kind="multilabel", score="accuracy"), {}).of["best"].honest
    rows = Dev.of(copies[0].reshape(9, -1, 1), copies[1].reshape(-1), kind="binary")
    torn = estimate(rows, {}).of["best"].honest
    assert four is not None
    assert torn is not None
    assert four.high - four.low == pytest.approx(2 * (torn.high - torn.low), rel=0.2)


@pytest.mark.parametrize("score", ["f1_micro", "f1_macro", "auroc", "average_precision", "log_loss", "accuracy"])
def test_in_sample_and_test_scores_are_scikit_learns(score: Any, tmp_path: Path) -> None:
    pool, truth = tmp_path / "pool", random_labels("multilabel", 40, seed=1)
    logits_of = {"dev": made(n=80, members=5)[0], "test": random_logits("multilabel", truth, 5, seed=3, noise=2.0)}
    ids = {"dev": [f"d{i}" for i in range(80)], "test": [f"t{i}" for i in range(40)]}
    for m in range(5):
        own = {split: array[m] for split, array in logits_of.items()}
        add_member(pool, "sky", "multilabel", f"m{m}", own, ids, {"dev": made(n=80)[1], "test": truth})
    out = tmp_path / "dicor.json"
    args = ["--pool", str(pool), "--task", "sky"]
    assert dicor(["select", *args, "--score", score, "--method", "greedy", "--output", str(out)]) == 0
    chosen = record.read(out)
    task_pool = TaskPool(pool, "sky")
    labels = task_pool.examples().labels
    assert labels is not None
    logits = np.stack([task_pool.logits(m.name) for m in chosen.members])
    weights = np.array([row["weight"] for row in chosen.rows()])
    p = np.tensordot(weights, expit(logits.astype(float)), axes=1)
    moved = logit(p) if chosen.offsets is None else logit(p) + chosen.offsets
    expected = sklearns(score, labels, moved)
    assert chosen.estimate["in_sample"] == pytest.approx(expected, abs=1e-6)
    assert chosen.scored(logits, labels) == pytest.approx(expected, abs=1e-6)
    np.testing.assert_allclose(chosen.probabilities(logits), expit(moved), atol=1e-6)
    assert (chosen.decide(logits) == (moved > 0)).all()
    tested = np.stack([TaskPool(pool, "sky", split="test").logits(m.name) for m in chosen.members])
    p = np.tensordot(weights, expit(tested.astype(float)), axes=1)
    moved = logit(p) if chosen.offsets is None else logit(p) + chosen.offsets
    judgement = judged(compare(task_pool, ["greedy"], Options(), score=score), "greedy", test=True)
    assert judgement is not None
    on_test = judgement.scores
    assert on_test["greedy"] == pytest.approx(sklearns(score, truth, moved), abs=1e-6)


def sklearns(score: str, labels: np.ndarray, logits: np.ndarray) -> float:
    if score.startswith("f1"):
        return float(metrics.f1_score(labels, logits > 0, average=score.removeprefix("f1_")))
    if score == "accuracy":
        return 1 - float(metrics.hamming_loss(labels, logits > 0))
    if score == "log_loss":
        return float(metrics.log_loss(labels.ravel(), expit(logits.ravel())))
    of = metrics.roc_auc_score if score == "auroc" else metrics.average_precision_score
    return float(of(labels, logits, average="macro"))


def test_select_apply_compare_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool, out = make_pool(tmp_path / "pool", "sky", "multilabel", n=60), tmp_path / "dicor.json"
    args = ["--pool", str(pool), "--task", "sky"]
    assert dicor(["select", *args, "--output", str(out)]) == 0
    said = capsys.readouterr().out
    assert "micro F1" in said
    assert "the log-odds are offset by label: rain " in said
    assert "paired bootstrap over examples" in said
    raw = json.loads(out.read_text())
    assert (raw["kind"], raw["labels"], raw["score"], len(raw["offsets"])) == ("multilabel", NAMES, "f1_micro", 3)
    assert json.loads(record.read(out).to_json()) == raw
    assert dicor(["apply", "--ensemble", str(out), "--split", "dev", "--output", str(tmp_path / "p.csv")]) == 0
    assert f"sky dev micro F1 {raw['estimate']['in_sample']:.4f}" in capsys.readouterr().out
    rows = list(csv.reader((tmp_path / "p.csv").read_text().splitlines()))
    task_pool = TaskPool(pool, "sky")
    truth, chosen = task_pool.examples().labels, record.read(out)
    assert truth is not None
    assert rows[0] == ["id", *NAMES]
    decided = np.array([[int(x) for x in row[1:]] for row in rows[1:]])
    assert [row[0] for row in rows[1:]] == task_pool.examples().ids.tolist()
    assert (decided == chosen.decide(np.stack([task_pool.logits(m.name) for m in chosen.members]))).all()
    assert metrics.f1_score(truth, decided, average="micro") == pytest.approx(raw["estimate"]["in_sample"])
    assert dicor(["compare", "--pool", str(pool)]) == 0
    assert dicor(["report", *args, "--output", str(tmp_path / "r.html"), "--plots", str(tmp_path / "plots")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert "any of 3 labels" in page
    assert "the log-odds are offset by label" in page
    assert "60 of dev" in page


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"labels": ["rain"]}, "labels is ['rain']; expected texts; multilabel needs them all"),
        ({"offsets": [0.1, 0.2]}, "offsets is [0.1, 0.2]; expected 3 numbers, one for each class"),
        ({"score": "mcc"}, "score is 'mcc'; a multilabel task has one of accuracy"),
    ],
)
def test_a_record_that_cannot_be(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    pool, out = make_pool(tmp_path / "pool", "sky", "multilabel", n=30), tmp_path / "dicor.json"
    assert dicor(["select", "--pool", str(pool), "--task", "sky", "--output", str(out)]) == 0
    out.write_text(json.dumps(json.loads(out.read_text()) | change))
    with refused(out, says):
        record.read(out)


def test_labels_in_the_pool_are_checked(tmp_path: Path) -> None:
    with refused("sky dev examples: the labels are [0, 2] in row 1; expected 0 or 1 for each"):
        write_examples(tmp_path, "sky", "dev", ["a", "b"], [[0, 1], [0, 2]])
    with refused("sky dev examples: 2 ids, but labels of shape (1, 2)"):
        write_examples(tmp_path, "sky", "dev", ["a", "b"], [[0, 1]])
    floats = write_examples(tmp_path, "sky", "dev", ["a", "b"], np.array([[0.0, 1.0], [1.0, 1.0]]))
    assert floats == write_examples(tmp_path, "sky", "dev", ["a", "b"], np.array([[0, 1], [1, 1]]))
    assert floats != write_examples(tmp_path, "sky", "dev", ["a", "b"], np.array([[0, 1], [1, 0]]))
    ids, logits = {"dev": ["a", "b"]}, {"dev": np.zeros((2, 3))}
    add_member(tmp_path, "sky", "multilabel", "m", logits, ids, {"dev": np.array([[0, 1], [1, 1]])})
    with refused("sky: dev labels of shape (2, 2); multilabel has 0 or 1 for each"):
        TaskPool(tmp_path, "sky").examples()
    add_member(tmp_path, "wet", "binary", "m", {"dev": np.zeros((2, 1))}, ids, {"dev": np.array([[0, 1], [1, 1]])})
    with refused("wet: dev labels of shape (2, 2); binary has one"):
        TaskPool(tmp_path, "wet").examples()


def test_what_is_given_from_python_is_checked() -> None:
    logits, labels = made(n=20, members=2)
    with refused("labels of shape (20,); expected (N,), or (N, 3) for multilabel"):
        Dev.of(logits, labels[:, 0], kind="multilabel")
    with refused("labels hold 2; expected classes 0 to 1"):
        Dev.of(logits, labels + 1, kind="multilabel")
    with refused("member m0: logits of shape (20, 1); expected (N, C): 20 examples, C of at least 2"):
        Dev.of(logits[..., :1], labels, kind="multilabel")
    with refused("expected (N,), or (N, 1) for multilabel"):
        Dev.of(logits[..., :1], labels, kind="binary")
    same = np.tile(labels[:1], (20, 1))
    dev = Dev.of(logits, same, kind="multilabel", score="auroc")
    with refused("the dev labels are all the same, so AUROC is undefined"):
        dev.scored(np.array([np.nan, np.nan]))


def test_offsets_of_labels() -> None:
    choice = Choice(members=[0], strategy="weighted", offsets=of_labels(np.array([0.3, -1.1])))
    assert choice.moves == [0.3, -1.1]
    assert Choice(members=[0], strategy="weighted", offsets=np.array([-0.2, 0.2])).moves == [-0.2, 0.2]


def test_what_is_held_out_is_standardised_by_label() -> None:
    """Each label's log-odds by themselves: where one part's are moved, for one label, nothing else may change."""
    p = expit(made(n=30, members=1)[0][0].astype(float))
    rows = np.stack([1 - p.ravel(), p.ravel()], axis=-1)
    found = standardised(rows, "auroc", 3)
    assert found.shape == (90, 2)
    np.testing.assert_allclose(found[:, 1].reshape(30, 3), zscore(logit(p), axis=0), atol=1e-9)
    np.testing.assert_allclose(found[:, 0], -found[:, 1], atol=1e-9)
    assert standardised(rows, "log_loss", 3) is rows
