"""Several labels of a text, in every form that they are read in, and what is wrong with a cell."""

from __future__ import annotations

import itertools
import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import REPOSITORY
from pool_factory import refused

from lora_ensemble.tasks import Task
from lora_ensemble.text.readers import Split, read_split, read_texts
from lora_ensemble.text.splits import Deal

NAMES = ["rain", "snow", "wind"]
TRUTH = [[1, 1, 0], [0, 0, 0], [0, 0, 1], [1, 0, 1]]
SETS = [["rain", "snow"], [], ["wind"], ["wind", "rain"]]


def task(**fields: Any) -> Task:
    given: dict[str, Any] = {"label": "sky", "label_names": NAMES, "train": "x", "dev": "x", "test": "x", **fields}
    return Task(name="w", kind="multilabel", text=["text"], **given)


def written(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    """The rows in a file of the format that its name says."""
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), folder / name)
    elif name.endswith(".jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = [list(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
        (folder / name).write_text("".join("\t".join(line) + "\n" for line in lines))
    return name


def read(folder: Path, name: str, rows: list[dict[str, Any]], split: str = "train", **fields: Any) -> Split:
    file = written(folder, name, rows)
    return read_split(task(**{split: file}, **fields), split, folder, need_labels=split != "test")


@pytest.mark.parametrize("name", ["a.tsv", "a.jsonl", "a.parquet"])
def test_names_joined_by_a_separator(name: str, tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "sky": ", ".join(names)} for i, names in enumerate(SETS)]
    found = read(tmp_path, name, rows)
    assert found.labels is not None
    assert found.labels.tolist() == TRUTH
    assert found.labels.dtype == np.int64
    assert found.notices == []  # an empty cell is no missing label
    bars = [{"text": f"t{i}", "sky": "|".join(names)} for i, names in enumerate(SETS)]
    other = read(tmp_path, name, bars, label_separator="|").labels
    assert other is not None
    assert other.tolist() == TRUTH


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_lists_and_nothing(name: str, tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "sky": names or None} for i, names in enumerate(SETS)]
    found, lists = (
        read(tmp_path, name, rows).labels,
        read(tmp_path, name, [r | {"sky": r["sky"] or []} for r in rows]).labels,
    )
    assert found is not None
    assert lists is not None
    assert found.tolist() == lists.tolist() == TRUTH


@pytest.mark.parametrize("name", ["a.tsv", "a.jsonl", "a.parquet"])
@pytest.mark.parametrize("words", [("0", "1"), ("false", "True"), (0, 1), (False, True), (0.0, 1.0)])
def test_several_columns(name: str, words: tuple[Any, Any], tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", **{n: words[y] for n, y in zip(NAMES, row, strict=True)}} for i, row in enumerate(TRUTH)]
    found = read(tmp_path, name, rows, label=NAMES, label_names=[])
    assert found.labels is not None
    assert found.labels.tolist() == TRUTH
    assert task(label=NAMES, label_names=[]).labels == NAMES
    renamed = task(label=NAMES, label_names=["Regen", "Schnee", "Wind, stark"])  # no cell names them
    assert (renamed.labels, renamed.num_outputs) == (["Regen", "Schnee", "Wind, stark"], 3)


def test_the_readmes_task() -> None:
    blocks = (REPOSITORY / "README.md").read_text(encoding="utf-8").split("\n\n")
    (block,) = (textwrap.dedent(b) for b in blocks if "name: comments" in b)
    given = yaml.safe_load(block)["data"]["tasks"][0]
    assert Task(**given).labels == ["rude", "spam", "offtopic"]
    assert Task(**{**given, "label": given.pop("label_names"), "label_names": []}).labels == [
        "rude",
        "spam",
        "offtopic",
    ]


def test_numbers_are_names_too(tmp_path: Path) -> None:
    rows = [{"text": "a", "sky": [1, 3]}, {"text": "b", "sky": [2]}]
    found = read(tmp_path, "a.jsonl", rows, label_names=[1, 2, 3]).labels
    assert found is not None
    assert found.tolist() == [[1, 0, 1], [0, 1, 0]]


def test_a_data_set_of_the_hub(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    feature = datasets.Sequence(datasets.ClassLabel(names=["snow", "rain", "wind"]))
    content = {"text": ["a", "b", "c"], "sky": [[1, 0], [], [2]]}
    features = datasets.Features({"text": datasets.Value("string"), "sky": feature})
    datasets.Dataset.from_dict(content, features=features).to_parquet(tmp_path / "train.parquet")
    found = read_split(task(dataset=str(tmp_path), train=None), "train", None, need_labels=True).labels
    assert found is not None
    assert found.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    ("sky", "more", "says"),
    [
        (
            "rain,fog",
            {},
            "a.tsv:2: label out of range: sky is 'rain,fog', and 'fog' is no label; expected names out of",
        ),
        ("rain,,snow", {}, "sky is 'rain,,snow', and '' is no label"),
        ("rain;snow", {}, "and 'rain;snow' is no label; expected names out of rain, snow, wind, joined by ','"),
        (
            "rain",
            {"label_separator": "ai"},
            "label 'rain' holds 'ai', which stands between labels; set another label_s",
        ),
        ("rain", {"label": "cloud"}, "no label column 'cloud'; columns found: text, sky, dry"),
        (
            "1",
            {"label": ["sky", "dry"], "label_names": []},
            "a.tsv:2: label out of range: dry is 'no'; expected 0 or 1",
        ),
        ("1", {"label": ["sky", "wet"], "label_names": []}, "no label column 'wet'; columns found: text, sky, dry"),
        ("", {}, "sky is empty in all rows; expected names out of"),
    ],
)
def test_what_is_wrong_with_a_file(sky: str, more: dict[str, Any], says: str, tmp_path: Path) -> None:
    with refused(says):
        read(tmp_path, "a.tsv", [{"text": "t", "sky": sky, "dry": "no"}], **more)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"label_names": []}, "label_names has 0 entries; multilabel needs them all, or label: a list of columns"),
        ({"label_names": ["a"]}, "label_names has 1 entries; multilabel needs them all"),
        ({"label": ["a"], "label_names": []}, "multilabel needs them all"),
        ({"label": ["a", "b"]}, "label is ['a', 'b']; expected a column for each of ['rain', 'snow', 'wind']"),
        ({"label": ["a", "a"], "label_names": ["x", "y"]}, "label is ['a', 'a']; expected a column for each"),
        ({"label_separator": ""}, "label_separator is ''; expected what stands between names"),
        ({"class_weights": "balanced"}, "class_weights is balanced; of multilabel give a number for each label"),
        ({"class_weights": [1, 2]}, "class_weights is [1, 2]; expected 3 numbers of at least 0: one for each label"),
        ({"score": "f1"}, "a multilabel task has one of accuracy, f1_macro, f1_micro, f1_weighted, auroc, average_pre"),
    ],
)
def test_what_is_wrong_with_a_task(fields: dict[str, Any], says: str) -> None:
    with refused("task 'w': ", says):
        task(**fields)


def test_an_empty_list_is_a_set_of_labels_and_no_class(tmp_path: Path) -> None:
    file = written(tmp_path, "a.jsonl", [{"text": "t", "y": "a"}, {"text": "u", "y": []}])
    of_classes = Task(name="c", kind="multiclass", text=["text"], label="y", label_names=["a", "b"], train=file)
    with refused("a.jsonl:2: label out of range: y is []; expected one of a, b"):
        read_split(of_classes, "train", tmp_path, need_labels=True)
    none = read(tmp_path, "b.jsonl", [{"text": "t", "sky": []}], split="test")
    assert none.labels is None


def test_what_is_for_several_labels_alone() -> None:
    with refused("task 'b': label names several columns, which is for multilabel"):
        Task(name="b", kind="binary", text=["x"], label=["a", "b"])
    with refused("task 'b': label_separator is ';'; expected what stands between names, for multilabel only"):
        Task(name="b", kind="binary", text=["x"], label_separator=";")


def test_a_test_file_may_have_none(tmp_path: Path) -> None:
    """No column, or one that is empty throughout; of several columns all must be there, and be filled."""
    assert read(tmp_path, "a.tsv", [{"text": "t"}], split="test").labels is None
    assert read(tmp_path, "a.tsv", [{"text": "t", "sky": ""}], split="test").labels is None
    half = read(tmp_path, "a.tsv", [{"text": "t", "rain": 1, "snow": 0}], split="test", label=NAMES, label_names=[])
    assert half.labels is None
    assert half.notices == ["a.tsv: no column 'wind'; the labels of this split are not used"]
    rows = [{"text": "t", "rain": 1, "snow": 0, "wind": 1}, {"text": "u", "rain": 1, "snow": "", "wind": 1}]
    gap = read(tmp_path, "a.tsv", rows, split="test", label=NAMES, label_names=[])
    assert gap.labels is None
    assert "1 of 2 rows have no rain or snow or wind (line 3)" in gap.notices[0]


def test_in_training_a_row_that_lacks_a_column_is_skipped(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "rain": i % 2, "snow": 1 if i else "", "wind": 0} for i in range(10)]
    found = read(tmp_path, "a.tsv", rows, label=NAMES, label_names=[])
    assert found.labels is not None
    assert found.labels.shape == (9, 3)
    assert found.notices == ["a.tsv: 1 row skipped: empty snow (line 2)"]


def test_weights_groups_and_texts_are_read_beside_them(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "sky": ",".join(s), "w": i + 1, "g": f"g{i % 2}"} for i, s in enumerate(SETS)]
    found = read(tmp_path, "a.tsv", rows, weight="w", group="g")
    assert found.weights is not None
    assert found.groups is not None
    assert found.weights.tolist() == [1, 2, 3, 4]
    assert found.groups.tolist() == ["g0", "g1", "g0", "g1"]
    assert read_texts(task(), tmp_path / "a.tsv").labels is None


# Deals


def many(n: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return np.arange(n).astype(str), (rng.random((n, 4)) < (0.5, 0.3, 0.1, 0.02)).astype(np.int64)


def test_each_set_of_labels_is_dealt_in_its_share() -> None:
    ids, labels = many(900)
    deal = Deal(ids, labels, "multilabel", [1 / 3] * 3)
    for salt in (1, 2):
        part = deal(salt)
        sets, which = np.unique(labels, axis=0, return_inverse=True)
        counts = np.array([np.bincount(part[which == s], minlength=3) for s in range(len(sets))])
        common = counts.sum(axis=1) >= 3
        assert common.sum() > 8
        assert (~common).sum() > 0
        assert (np.ptp(counts[common], axis=1) <= 1).all()
        rarest = np.bincount(part[labels[:, 3] == 1], minlength=3)
        assert np.ptp(rarest) <= 3  # of 18 or so
    assert (deal(1) != deal(2)).any()


def test_sets_that_are_all_rare_are_dealt_by_their_rarest_label() -> None:
    """Twelve labels, a set for nearly each example: the rarest label is in all parts alike, and deals differ."""
    rng = np.random.default_rng(3)
    labels = (rng.random((300, 12)) < np.linspace(0.5, 0.04, 12)).astype(np.int64)
    assert len(np.unique(labels, axis=0)) > 180
    deal = Deal(np.arange(300).astype(str), labels, "multilabel", [1 / 3] * 3)
    parts = [deal(salt) for salt in range(4)]
    rarest = int(labels.sum(axis=0).argmin())
    assert all(np.ptp(np.bincount(p[labels[:, rarest] == 1], minlength=3)) <= 2 for p in parts)
    assert all(np.mean(a != b) > 0.4 for a, b in itertools.pairwise(parts))


def test_a_deal_is_of_ids_and_keeps_groups_whole() -> None:
    ids, labels = many(200)
    part = Deal(ids, labels, "multilabel", [0.8, 0.2])(0)
    turned = Deal(ids[::-1], labels[::-1], "multilabel", [0.8, 0.2])(0)
    assert (part[::-1] == turned).all()
    assert (part == 1).sum() == 40
    groups = np.array([f"g{i // 4}" for i in range(200)])
    together = Deal(ids, labels, "multilabel", [0.8, 0.2], groups)(0)
    assert all(len(set(together[groups == g])) == 1 for g in set(groups))
    assert 30 <= (together == 1).sum() <= 50
    shares = labels[together == 1].sum(axis=0) / labels.sum(axis=0)
    assert (abs(shares[:3] - 0.2) < 0.06).all()


def test_a_share_of_the_training_file_is_dev(tmp_path: Path) -> None:
    _, labels = many(100)
    rows = [
        {"text": f"t{i}", "sky": ",".join(n for n, y in zip("abcd", row, strict=True) if y)}
        for i, row in enumerate(labels)
    ]
    file = written(tmp_path, "a.tsv", rows)
    apart = task(train=file, dev=0.2, label_names=list("abcd"))
    dev, train = (read_split(apart, s, tmp_path, need_labels=True) for s in ("dev", "train"))
    assert (len(dev), len(train)) == (20, 80)
    assert not set(dev.ids) & set(train.ids)
    assert dev.labels is not None
    assert (dev.labels == labels[dev.ids.astype(int)]).all()
    assert abs(dev.labels[:, 0].sum() - labels[:, 0].sum() / 5) <= 3
