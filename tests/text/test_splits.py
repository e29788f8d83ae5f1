"""Parts of a set of examples: in the shares that were asked for, by ids, labels and groups alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedGroupKFold

from lora_ensemble.errors import UserError
from lora_ensemble.tasks import Kind, Task
from lora_ensemble.text.readers import fingerprint, read_split
from lora_ensemble.text.splits import Deal


def ids_of(n: int) -> np.ndarray:
    return np.array([f"id{i}" for i in range(n)])


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.sampled_from([0.1, 0.2, 0.25, 0.37, 0.5]))
def test_every_class_is_dealt_in_its_share(labels: list[int], share: float) -> None:
    """To one example, of a class as of all."""
    part = Deal(ids_of(len(labels)), np.array(labels), "multiclass", [1 - share, share])(0)
    assert abs((part == 1).sum() - share * len(labels)) <= 1
    for label in set(labels):
        of_class = part[np.array(labels) == label]
        assert abs((of_class == 1).sum() - share * len(of_class)) <= 1


@pytest.mark.parametrize("kind", ["multiclass", "regression"])
@pytest.mark.parametrize("grouped", [False, True])
def test_no_order_matters(kind: Kind, grouped: bool) -> None:
    rng = np.random.default_rng(0)
    ids, groups = ids_of(90), np.array([f"g{i}" for i in rng.integers(20, size=90)]) if grouped else None
    labels = rng.normal(size=90) if kind == "regression" else rng.integers(3, size=90)
    first = Deal(ids, labels, kind, [0.8, 0.2], groups)(0)
    other = rng.permutation(90)
    again = Deal(ids[other], labels[other], kind, [0.8, 0.2], None if groups is None else groups[other])(0)
    assert np.array_equal(again, first[other])
    assert not np.array_equal(Deal(ids, labels, kind, [0.8, 0.2], groups)(1), first)
    if kind == "regression":
        assert abs(labels[first == 1].mean() - labels.mean()) < 0.35


def unevenness(part: np.ndarray, labels: np.ndarray, folds: int) -> float:
    """The largest distance of a class's share in a fold from what it should be."""
    return max(abs(np.mean(part[labels == c] == f) - 1 / folds) for c in np.unique(labels) for f in range(folds))


def test_groups_stay_together_and_are_dealt_as_evenly_as_scikit_learn_does() -> None:
    """Groups of 1 to 12 that lean to one class; a hundred sets, on the whole no less even than StratifiedGroupKFold."""
    ours, theirs = [], []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        groups = np.repeat(np.arange(60), rng.integers(1, 13, size=60))
        labels = np.where(rng.random(len(groups)) < 0.7, (groups % 3), rng.integers(3, size=len(groups)))
        part = Deal(ids_of(len(groups)), labels, "multiclass", [1 / 3] * 3, groups.astype(str))(1)
        assert all(len(set(part[groups == g])) == 1 for g in range(60))
        ours.append(unevenness(part, labels, 3))
        other = np.empty(len(groups), int)
        for fold, (_, out) in enumerate(StratifiedGroupKFold(3).split(labels, labels, groups)):
            other[out] = fold
        theirs.append(unevenness(other, labels, 3))
    assert np.mean(ours) <= np.mean(theirs)
    assert np.mean(ours) < 0.05


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Fifty rows of ten writers, one of them without a label."""
    rng = np.random.default_rng(0)
    rows = [
        {"id": f"i{i}", "text": f"text {i}", "label": "ab"[i % 5 == 0], "writer": f"w{rng.integers(10)}", "w": 1 + i}
        for i in range(50)
    ]
    rows[7]["label"] = ""
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def task(**more: Any) -> Task:
    same = {"name": "t", "kind": "binary", "text": ["text"], "label_names": ["a", "b"], "train": "all.jsonl"}
    return Task(**{**same, "id": "id", "dev": 0.2, **more})


def test_a_share_of_the_training_file(root: Path) -> None:
    train, dev = (read_split(task(weight="w"), split, root, need_labels=True) for split in ("train", "dev"))
    assert len(train) + len(dev) == 49
    assert len(dev) == 10
    assert not set(train.ids) & set(dev.ids)
    assert dev.labels is not None
    assert dev.labels.sum() == 2  # of ten
    assert dev.texts[0] == [f"text {i[1:]}" for i in dev.ids]
    assert train.weights is not None
    assert train.weights.tolist() == [1 + int(i[1:]) for i in train.ids]
    assert dev.weights is None
    assert "all.jsonl: 1 row skipped: empty label (line 8)" in train.notices
    assert dev.notices == ["0.2 of the training file, kept apart"]
    lines = (root / "all.jsonl").read_text().splitlines()
    (root / "all.jsonl").write_text("\n".join(lines[::-1]) + "\n")
    assert set(read_split(task(), "dev", root, need_labels=True).ids) == set(dev.ids)
    assert read_split(task(), "dev", root, need_labels=False).labels is not None  # for `predict` it is the same
    assert len(read_split(task(), "train", root, need_labels=False)) == len(train)


def test_groups_are_not_torn_apart(root: Path) -> None:
    train, dev = (read_split(task(group="writer"), split, root, need_labels=True) for split in ("train", "dev"))
    assert train.groups is not None
    assert dev.groups is not None
    assert not set(train.groups) & set(dev.groups)
    assert 5 <= len(dev) <= 15
    assert len(train) + len(dev) == 49
    whole = read_split(task(), "dev", root, need_labels=True)
    assert whole.groups is None
    own = read_split(task(group="writer", dev="all.jsonl"), "dev", root, need_labels=True)
    assert fingerprint(own) != fingerprint(read_split(task(dev="all.jsonl"), "dev", root, need_labels=True))


def test_a_test_file_needs_no_groups(root: Path) -> None:
    (root / "test.jsonl").write_text('{"id": "a", "text": "x"}\n')
    assert read_split(task(group="writer", test="test.jsonl"), "test", root, need_labels=False).groups is None


def test_what_cannot_be_split(root: Path) -> None:
    for share in (0.0, 1.0, -0.5):
        with pytest.raises(UserError, match="expected a file, or a share between 0 and 1 of the training file"):
            task(dev=share)
    with pytest.raises(UserError, match=r"dev is 0\.001 of 49 examples, which leaves none in dev"):
        read_split(task(dev=0.001), "dev", root, need_labels=True)
    with pytest.raises(UserError, match=r"set dev: to one, or to a share of the training file, as in dev: 0\.2"):
        read_split(task(dev=None), "dev", root, need_labels=True)
    lines = (root / "all.jsonl").read_text().replace('"writer": "w0"', '"writer": ""')
    (root / "all.jsonl").write_text(lines)
    with pytest.raises(UserError, match=r"all.jsonl:\d+: writer is empty; expected the name of a group"):
        read_split(task(group="writer"), "dev", root, need_labels=True)
    with pytest.raises(UserError, match=r"no column 'author'; .*set group: of task 't'"):
        read_split(task(group="author"), "train", root, need_labels=True)
