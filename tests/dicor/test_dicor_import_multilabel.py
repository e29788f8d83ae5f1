"""``dicor import`` of several labels: outputs and labels in every form, and one line for what cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.special import logit
from sklearn.metrics import f1_score

from lora_ensemble.dicor.cli import main
from lora_ensemble.pool import TaskPool, read_record

NAMES = ["rain", "snow", "wind"]
IDS = ["a", "b", "c", "d"]
TRUTH = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 1], [1, 1, 0]])
P = np.array([[0.9, 0.2, 0.6], [0.3, 0.1, 0.05], [0.2, 0.7, 0.4], [0.8, 0.6, 0.45]])
Importer = Callable[..., tuple[int, str, str]]


def table(path: Path, header: list[str], columns: list[object]) -> Path:
    rows = zip(IDS, *columns, strict=True)
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in [("id", *header), *rows]))
    return path


@pytest.fixture
def importing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Importer:
    """Import files into a new pool of task sky; returns the exit code and what was said."""
    table(tmp_path / "columns.tsv", NAMES, list(TRUTH.T))
    named = [", ".join(n for n, y in zip(NAMES, row, strict=True) if y) for row in TRUTH]
    table(tmp_path / "named.tsv", ["sky"], [named])
    (tmp_path / "lists.jsonl").write_text(
        "".join(
            json.dumps({"id": i, "label": t.split(", ") if t else []}) + "\n" for i, t in zip(IDS, named, strict=True)
        )
    )
    np.savez(tmp_path / "arrays.npz", ids=np.array(IDS), labels=TRUTH)

    def run(
        *args: object, labels: str = "columns.tsv", how: tuple[str, ...] = ("--label", *NAMES)
    ) -> tuple[int, str, str]:
        where = ["--pool", tmp_path / "pool", "--task", "sky", "--task-kind", "multilabel"]
        code = main([str(a) for a in ["import", *args, *where, "--labels", tmp_path / labels, *how]])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def logits(tmp_path: Path, name: str) -> np.ndarray:
    return np.array(TaskPool(tmp_path / "pool", "sky").logits(name))


@pytest.mark.parametrize(
    ("labels", "how"),
    [
        ("columns.tsv", ("--label", *NAMES)),
        ("named.tsv", ("--label", "sky", "--label-names", *NAMES)),
        ("lists.jsonl", ("--label-names", *NAMES)),
        ("arrays.npz", ("--label-names", *NAMES)),
    ],
)
def test_labels_in_every_form(labels: str, how: tuple[str, ...], importing: Importer, tmp_path: Path) -> None:
    file = table(tmp_path / "forest.tsv", [f"p_{n}" for n in NAMES], list(P.T))
    code, out, err = importing(file, labels=labels, how=how)
    assert code == 0, err
    assert f"dev micro F1 {f1_score(TRUTH, P > 0.5, average='micro'):.4f}, 4 examples (probabilities from forest" in out
    opened = TaskPool(tmp_path / "pool", "sky")
    assert (opened.kind, opened.labels, opened.scored_by) == ("multilabel", NAMES, "f1_micro")
    truth = opened.examples().labels
    assert truth is not None
    assert (truth == TRUTH).all()
    np.testing.assert_allclose(logits(tmp_path, "forest"), logit(P), atol=1e-5)
    again = importing(file, labels=labels, how=how)
    assert "was there already, unchanged" in again[1]


def test_outputs_in_every_form(importing: Importer, tmp_path: Path) -> None:
    """Columns called after labels or numbers, in another order, lists, arrays; rows go by their ids."""
    turned = table(tmp_path / "turned.tsv", ["logit wind", "logit rain", "logit snow"], list(logit(P)[:, [2, 0, 1]].T))
    lists = tmp_path / "lists2.jsonl"
    rows = [{"id": i, "probs": list(p)} for i, p in zip(IDS[::-1], P[::-1], strict=True)]
    lists.write_text("".join(json.dumps(row) + "\n" for row in rows))
    np.save(tmp_path / "array.npy", logit(P))
    plain = table(tmp_path / "plain.tsv", NAMES, list(P.T))
    for file, more in ((turned, ()), (lists, ()), (tmp_path / "array.npy", ()), (plain, ("--from", "probabilities"))):
        code, _, err = importing(file, *more)
        assert code == 0, err
        np.testing.assert_allclose(logits(tmp_path, file.stem), logit(P), atol=1e-5)
    assert (
        main(["select", "--pool", str(tmp_path / "pool"), "--task", "sky", "--output", str(tmp_path / "d.json")]) == 0
    )


def test_decisions_are_columns_of_0_and_1(importing: Importer, tmp_path: Path) -> None:
    file = table(tmp_path / "votes.tsv", NAMES, list(TRUTH.T))
    code, _, err = importing(file)
    assert code == 2
    assert "votes.tsv: it holds 0 and 1 only; give probabilities or logits if you can" in err
    assert "say --from decisions" in err
    assert importing(file, "--from", "decisions")[0] == 0
    assert (logits(tmp_path, "votes") == 2 * TRUTH - 1).all()
    record = read_record(tmp_path / "pool", "sky", "votes")
    assert record is not None
    assert record.settings["imported"]["dev"]["from"] == "decisions"
    file = table(tmp_path / "half.tsv", NAMES, list((TRUTH + np.array([0, 0.5, 0])).T))
    assert (
        "half.tsv:2: found [1.0, 0.5, 1.0]; expected 0 or 1 for each label" in importing(file, "--from", "decisions")[2]
    )


def test_what_cannot_be(importing: Importer, tmp_path: Path) -> None:
    good = table(tmp_path / "good.tsv", NAMES, list(P.T))

    def fails(
        *args: object, says: str, labels: str = "columns.tsv", how: tuple[str, ...] = ("--label", *NAMES)
    ) -> None:
        code, _, err = importing(*args, labels=labels, how=how)
        assert code == 2
        assert err.count("\n") == 1
        assert says in err
        assert not (tmp_path / "pool" / "sky").exists()

    fails(good, says="all values are between 0 and 1, as probabilities are and logits may be; say --from")
    table(tmp_path / "more.tsv", NAMES, list(1.5 * P.T))
    fails(
        tmp_path / "more.tsv", "--from", "probabilities", says="more.tsv:2: column 'rain' is 1.35; expected a probabil"
    )
    two = table(tmp_path / "two.tsv", ["p_rain", "p_snow"], list(P.T[:2]))
    fails(two, says="two.tsv: columns p_rain, p_snow may be outputs; expected one for each label (rain, snow, wind)")
    fails(
        two, "--columns", "p_rain", "p_snow", says="2 columns of outputs (p_rain, p_snow); expected 3, one for each lab"
    )
    named = ("--label", "sky")
    fails(good, labels="named.tsv", how=named, says="named.tsv: which labels are there, in which order? name all with")
    few = (*named, "--label-names", "rain", "snow")
    fails(good, labels="named.tsv", how=few, says="named.tsv:2: sky is 'rain, wind', and 'wind' is no label; expected")
    bars = (*named, "--label-names", *NAMES, "--label-separator", "|")
    fails(
        good, labels="named.tsv", how=bars, says="and 'rain, wind' is no label; expected names out of rain, snow, wind"
    )
    fails(good, how=("--label", "rain", "fog"), says="columns.tsv: no labels: no column 'fog'")
    fails(
        good,
        how=("--label", "rain", "snow", "--label-names", *NAMES),
        says="label is ['rain', 'snow']; expected a colu",
    )
    table(tmp_path / "odd.tsv", NAMES, list(2 * TRUTH.T))
    fails(good, labels="odd.tsv", says="odd.tsv:2: rain is '2'; expected 0 or 1")
    table(tmp_path / "gap.tsv", NAMES, [["", 1, 0, 1], *TRUTH.T[1:]])
    fails(good, labels="gap.tsv", says="gap.tsv:2: no label (1 of 4 rows have none)")


def test_other_labels_than_the_pools_are_refused(importing: Importer, tmp_path: Path) -> None:
    file = table(tmp_path / "one.tsv", [f"p_{n}" for n in NAMES], list(P.T))
    assert importing(file)[0] == 0
    table(tmp_path / "columns.tsv", NAMES, [1 - TRUTH.T[0], *TRUTH.T[1:]])
    code, _, err = importing(file, "--name", "two")
    assert code == 2
    assert "the label of 'a' is [0 0 1], but [1 0 1] in" in err
