"""Out-of-fold predictions of other people's models, and groups of examples, in ``dicor import``."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest, norm, t
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier

from lora_ensemble.dicor.cli import main
from lora_ensemble.pool import TaskPool, read_records

MODELS = {"line": LogisticRegression(), "near": KNeighborsClassifier(7)}


def table(path, header, rows):
    with open(path, "w", encoding="utf-8", newline="") as f:
        csv.writer(f).writerows([header, *rows])
    return path


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Predictions of two models of scikit-learn's: out of fold of 90 examples of 15 writers, and on 40 of dev."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(130, 3)), rng.integers(2, size=130)
    x[:, 0] += 1.5 * y
    train, dev, writers = slice(0, 90), slice(90, 130), np.arange(90) % 15
    table(tmp_path / "train.csv", ["id", "label", "writer"], [(f"t{i}", y[i], f"w{writers[i]}") for i in range(90)])
    table(tmp_path / "dev.csv", ["id", "label"], [(f"d{i}", y[90 + i]) for i in range(40)])
    for name, model in MODELS.items():
        out = cross_val_predict(model, x[train], y[train], groups=writers, cv=GroupKFold(5), method="predict_proba")
        table(tmp_path / f"{name}-oof.csv", ["id", "p"], [(f"t{i}", p) for i, p in enumerate(out[:, 1])])
        said = model.fit(x[train], y[train]).predict_proba(x[dev])[:, 1]
        table(tmp_path / f"{name}-dev.csv", ["id", "p"], [(f"d{i}", p) for i, p in enumerate(said)])
    return tmp_path


def importing(home, split, *more):
    files = [home / f"{name}-{split}.csv" for name in MODELS]
    labels = home / {"oof": "train.csv", "dev": "dev.csv"}[split]
    given = ["import", *files, "--pool", home / "pool", "--task", "t", "--task-kind", "binary", "--labels", labels]
    return main([str(word) for word in [*given, "--split", split, *more]])


@pytest.mark.parametrize("order", [("oof", "dev"), ("dev", "oof")])
def test_chosen_out_of_fold_and_judged_on_dev(home, order, capsys):
    for split in order:
        assert importing(home, split, *(["--group", "writer"] if split == "oof" else [])) == 0
    opened = TaskPool(home / "pool", "t", split="oof")
    assert [r.name for r in opened.members] == ["line", "near"]
    examples = opened.examples()
    assert examples.groups is not None
    assert dict(zip(examples.ids.tolist(), examples.groups.tolist(), strict=True))["t16"] == "w1"
    assert all(set(r.examples) == {"oof", "dev"} for r in read_records(home / "pool", "t"))
    capsys.readouterr()
    select = ["select", "--pool", home / "pool", "--task", "t", "--on", "oof", "--method", "best"]
    assert main([str(word) for word in [*select, "--output", home / "e.json"]]) == 0
    out = capsys.readouterr().out
    assert "2 members on 90 oof examples" in out
    assert "the 15 groups, which no split tears apart" in out
    (name,) = (line.split()[0] for line in out.splitlines() if line.startswith(("line ", "near ")))
    said = np.loadtxt(home / f"{name}-dev.csv", delimiter=",", skiprows=1, usecols=1)
    truth = np.loadtxt(home / "dev.csv", delimiter=",", skiprows=1, usecols=1)
    (row,) = (line for line in out.splitlines() if line.startswith("best  "))
    assert row.split()[-1] == f"{np.mean((said > 0.5) == truth):.4f}"
    assert importing(home, "oof", "--group", "writer") == 0
    assert "was there already, unchanged" in capsys.readouterr().out


def test_dev_judges_by_groups_too(home, capsys):
    """Brute force over eight groups of five examples: the score's interval on dev where whole groups are drawn."""
    rows = [line.split(",") for line in (home / "dev.csv").read_text().splitlines()[1:]]
    team = np.arange(40) // 5
    table(home / "dev.csv", ["id", "label", "team"], [(*row, f"g{g}") for row, g in zip(rows, team, strict=True)])
    assert importing(home, "oof") == 0
    assert importing(home, "dev", "--group", "team") == 0
    capsys.readouterr()
    select = ["select", "--pool", home / "pool", "--task", "t", "--on", "oof", "--method", "best"]
    assert main([str(word) for word in [*select, "--output", home / "e.json"]]) == 0
    (line,) = (row for row in capsys.readouterr().out.splitlines() if row.startswith("best on dev, on which"))
    value, low, high = (float(word) for word in re.findall(r"0\.\d{4}", line)[:3])
    (name,) = (member["name"] for member in json.loads((home / "e.json").read_text())["members"])
    said = np.loadtxt(home / f"{name}-dev.csv", delimiter=",", skiprows=1, usecols=1)
    right = ((said > 0.5) == np.array([int(label) for _, label in rows])).reshape(8, 5).mean(1)
    assert value == pytest.approx(right.mean(), abs=1e-4)
    drawn = right[np.random.default_rng(7).integers(8, size=(20_000, 8))].mean(1)
    wide = np.sqrt(8 / 7) * t.ppf(0.95, 7) / norm.ppf(0.95)  # of few groups
    expected = right.mean() + wide * (np.percentile(drawn, [5, 95]) - right.mean())
    np.testing.assert_allclose([low, high], expected, atol=0.03)
    alone = binomtest(round(40 * value), 40).proportion_ci(0.9, method="wilson")
    assert abs(low - alone.low) > 0.01 or abs(high - alone.high) > 0.01


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        (None, ["--group", "author"], "train.csv: no column 'author'"),
        (("w3", ""), ["--group", "writer"], "train.csv:5: no group; give it the name of one"),
    ],
)
def test_groups_that_are_none(home, change, more, message, capsys):
    if change:
        text = (home / "train.csv").read_text()
        (home / "train.csv").write_text(text.replace(*change))
    assert importing(home, "oof", *more) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1


def test_out_of_fold_predictions_need_labels(home, capsys):
    (home / "train.csv").write_text("id\n" + "\n".join(f"t{i}" for i in range(90)) + "\n")
    assert importing(home, "oof") == 2
    assert "no labels: no column 'label'" in capsys.readouterr().err
