"""Examples that belong together: no split tears a group apart, and intervals count groups, not rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pool_factory import add_member
from scipy.stats import bootstrap, norm, t

from lora_ensemble.dicor.cli import main as dicor
from lora_ensemble.dicor.estimate.honest import Estimates, estimate
from lora_ensemble.dicor.estimate.interval import _of_few, of_differences
from lora_ensemble.dicor.estimate.splits import stratified_folds
from lora_ensemble.dicor.members import Dev
from lora_ensemble.pool import TaskPool, read_examples, write_examples
from lora_ensemble.tasks import Kind


def lucky(groups: int, size: int, members: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Members' logits (M, N, 1), labels and groups (N,): each is right about a whole group, or wrong, by chance."""
    rng = np.random.default_rng(seed)
    labels, group = rng.integers(2, size=groups * size), np.repeat(np.arange(groups), size)
    right = rng.random((members, groups))[:, group] < 0.5
    logits = np.where(right, 1.0, -1.0) * (2.0 * labels - 1) * rng.uniform(0.5, 2, size=right.shape)
    return logits[..., None].astype(np.float32), labels, np.array([f"g{g}" for g in group])


def test_whoever_knows_a_group_knows_nothing_of_others() -> None:
    """All members are right half of the time. Rows torn apart from their group say otherwise of the luckiest."""

    def honest(seed: int, grouped: bool) -> float:
        logits, labels, groups = lucky(30, 8, 40, seed)
        found = estimate(Dev.of(logits, labels, kind="binary", groups=groups if grouped else None), {}).of["best"]
        assert found.honest is not None
        assert found.in_sample > 0.6
        return found.honest.value

    assert np.mean([honest(seed, False) for seed in range(10)]) > 0.6
    assert abs(np.mean([honest(seed, True) for seed in range(10)]) - 0.5) < 0.05


def test_no_group_is_on_both_sides() -> None:
    _, labels, groups = lucky(20, 5, 1, 0)
    ids = np.arange(100).astype(str)
    fold = stratified_folds(ids, labels, "binary", folds=3, repeats=4, groups=groups)
    assert fold.shape == (4, 100)
    assert all(len(set(row[groups == g])) == 1 for row in fold for g in set(groups))
    assert all(25 <= np.bincount(row).min() <= np.bincount(row).max() <= 40 for row in fold)
    assert len({row.tobytes() for row in fold}) == 4


@pytest.mark.parametrize("kind", ["binary", "regression"])
def test_intervals_are_scipys_bootstrap_over_groups(kind: Kind) -> None:
    """Groups of 1 to 9 examples with errors in common: of the difference of two methods, and of one alone."""
    rng = np.random.default_rng(1)
    group = np.repeat(np.arange(60), rng.integers(1, 10, size=60))
    n, common = len(group), rng.normal(size=(2, 60))[:, group]
    if kind == "regression":
        labels = rng.normal(size=n)
        held = {name: (labels + c + 0.5 * rng.normal(size=n))[None] for name, c in zip("ab", common, strict=True)}
        name, score = "pearson", lambda x, rows: np.corrcoef(x[rows], labels[rows])[0, 1]
    else:
        labels = rng.integers(2, size=n)
        held = {
            name: np.where(c + rng.normal(size=n) > -0.5, labels, 1 - labels)[None]
            for name, c in zip("ab", common, strict=True)
        }
        name, score = "accuracy", lambda x, rows: np.mean(x[rows] == labels[rows])
    found = of_differences(held, [("a", "b"), ("a", "")], labels, kind, name, group)
    rows_of = [np.flatnonzero(group == g) for g in range(60)]

    def scipys(statistic: Callable[[np.ndarray], float]) -> tuple[float, float]:
        def of_groups(groups: np.ndarray) -> float:
            return statistic(np.concatenate([rows_of[g] for g in groups.astype(int)]))

        how = {"method": "percentile", "n_resamples": 2000, "rng": rng, "vectorized": False}
        interval = bootstrap((np.arange(60.0),), of_groups, confidence_level=0.9, **how).confidence_interval
        return interval.low, interval.high

    expected = {
        ("a", "b"): scipys(lambda rows: score(held["a"][0], rows) - score(held["b"][0], rows)),
        ("a", ""): scipys(lambda rows: score(held["a"][0], rows)),
    }
    rowwise = of_differences(held, [("a", "b")], labels, kind, name)["a", "b"]
    few = np.sqrt(60 / 59) * t.ppf(0.95, 59) / norm.ppf(0.95)  # sixty groups are no infinity of them
    for pair, interval in expected.items():
        ours = found[pair]
        assert ours is not None
        ends = [ours.value + few * (end - ours.value) for end in interval]
        assert (ours.low, ours.high) == pytest.approx(ends, abs=0.012)
    ours = found["a", "b"]
    assert ours is not None
    assert rowwise is not None
    assert ours.value == pytest.approx(rowwise.value)
    assert ours.high - ours.low > 1.3 * (rowwise.high - rowwise.low)


@pytest.mark.parametrize("groups", [10, 12, 40, 1000])  # with fewer than ten there is no estimate
def test_few_groups_widen_an_interval_as_students_t_does(groups: int) -> None:
    """And by the variance's n - 1; the bootstrap's own ends, drawn with the same seed, are that much nearer."""
    few = np.sqrt(groups / (groups - 1)) * t.ppf(0.95, groups - 1) / norm.ppf(0.95)
    assert _of_few(groups) == pytest.approx(few, rel=1e-3)
    right = (np.random.default_rng(0).random(groups) < 0.7).astype(int)
    truth, alone = np.ones(groups, int), np.arange(groups)  # each its own group: drawn as examples are
    found = of_differences({"a": right[None]}, [("a", "")], truth, "binary", "accuracy", alone)["a", ""]
    assert found is not None
    draws = np.random.default_rng(0).integers(groups, size=(2000, groups))
    ends = np.percentile(right[draws].mean(axis=1), [5, 95])
    assert (found.low, found.high) == pytest.approx(tuple(found.value + few * (ends - found.value)), abs=1e-3)


@pytest.mark.parametrize("groups", [12, 40])
def test_the_interval_holds_the_truth_as_often_as_it_says(groups: int) -> None:
    """400 dev sets whose groups differ: 90 % hold the true score, within the binomial error; of rows alone few do."""
    rng = np.random.default_rng(0)
    group, inside = np.repeat(np.arange(groups), 10), np.zeros(2)
    for _ in range(400):
        right = (rng.random(len(group)) < rng.beta(2, 1, size=groups)[group]).astype(int)
        truth = np.ones(len(group), int)
        for which, own in enumerate((group, None)):
            found = of_differences({"a": right[None]}, [("a", "")], truth, "binary", "f1_micro", own)["a", ""]
            assert found is not None
            inside[which] += found.low <= 2 / 3 <= found.high
    assert abs(inside[0] / 400 - 0.9) < 2.58 * np.sqrt(0.9 * 0.1 / 400)
    assert inside[1] / 400 < 0.75


def test_no_order_matters() -> None:
    logits, labels, groups = lucky(15, 4, 8, 3)
    ids = np.array([f"e{i}" for i in range(60)])

    def of(order: np.ndarray) -> Estimates:
        return estimate(
            Dev.of(logits[:, order], labels[order], kind="binary", ids=ids[order], groups=groups[order]), {}
        )

    one, other = of(np.arange(60)), of(np.random.default_rng(0).permutation(60))
    assert one.of["best"].honest == other.of["best"].honest
    assert one.of["omni"].against_best == other.of["omni"].against_best


def test_too_few_groups() -> None:
    logits, labels, groups = lucky(9, 30, 4, 0)
    assert estimate(Dev.of(logits, labels, kind="binary", groups=groups), {}).repeats == 0
    assert estimate(Dev.of(logits, labels, kind="binary"), {}).repeats > 0


def test_groups_are_in_the_pool_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logits, labels, groups = lucky(20, 6, 3, 5)
    ids = np.array([f"e{i}" for i in range(120)])
    plain = write_examples(tmp_path, "t", "dev", ids, labels)
    dev = write_examples(tmp_path, "t", "dev", ids, labels, groups)
    assert dev != plain
    assert read_examples(tmp_path, "t", "dev", dev).groups.tolist() == groups.tolist()  # type: ignore[union-attr]
    assert read_examples(tmp_path, "t", "dev", plain).groups is None
    for m, one in enumerate(logits):
        add_member(tmp_path, "t", "binary", f"m{m}", {"dev": one}, {"dev": ids}, {"dev": labels}, examples={"dev": dev})
    assert TaskPool(tmp_path, "t").examples().groups is not None
    assert dicor(["compare", "--pool", str(tmp_path), "--task", "t"]) == 0
    assert "(paired bootstrap over the 20 groups, which no split tears apart)" in capsys.readouterr().out
