"""Boosting: rounds of members on examples that weigh by the out-of-fold errors of the rounds before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cli import Program

from lora_ensemble import pool
from lora_ensemble.dicor.cli import main as dicor
from lora_ensemble.studies.boost import next_weights
from lora_ensemble.train.batches import ExampleWeights

OPTIONS = (
    *("--data.folds=2", "--data.batch_size=8", "--rounds=3"),
    *("--model.head_dropout=0", "--model.encoder_dropout=0"),  # whose masks are the bank's
)
MEMBERS = "[{rank: 2, lr: 1e-2, seed: [1, 2]}]"


@pytest.fixture
def program(tmp_path: Path, tiny: Callable[[str], Path], demo_root: Path) -> Program:
    return Program(tmp_path, tiny("bert"), demo_root)


def by_hand(weights: np.ndarray, wrong: np.ndarray, classes: int) -> np.ndarray:
    """SAMME's steps 2 b to 2 e, as the paper has them."""
    err = sum(w for w, e in zip(weights, wrong, strict=True) if e) / sum(weights)
    alpha = np.log((1 - err) / err) + np.log(classes - 1)
    new = np.array([w * np.exp(alpha) if e else w for w, e in zip(weights, wrong, strict=True)])
    return new / new.sum()


def test_weights_are_sammes() -> None:
    wrong = np.array([True, False, False, True, False])
    weights = np.ones(5)
    for classes in (2, 5):
        expected = by_hand(by_hand(weights, wrong, classes), wrong[::-1], classes)
        after = next_weights(weights, wrong, classes)
        assert after is not None
        again = next_weights(after, wrong[::-1], classes)
        assert again is not None
        np.testing.assert_allclose(again / again.sum(), expected)
        assert again.mean() == pytest.approx(1)
    assert next_weights(weights, np.zeros(5, bool), 2) is None
    assert next_weights(weights, wrong, 5) is not None
    assert next_weights(np.array([1.0, 1, 1, 1]), np.array([True, True, False, False]), 2) is None  # chance


def test_each_round_learns_from_the_last(
    program: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, np.ndarray] = {}
    made = ExampleWeights.__init__

    def noted(self: ExampleWeights, *given: Any) -> None:
        made(self, *given)
        seen.update(given[5] or {})

    monkeypatch.setattr(ExampleWeights, "__init__", noted)
    assert program("boost", *OPTIONS, members=MEMBERS) == 0
    opened = pool.TaskPool(program.pool, "sst", split="oof")
    labels = opened.examples().labels
    names = [f"r2-c1-qv-lr1e-2-s{seed}-f2{ending}" for seed in (1, 2) for ending in ("", "-round2", "-round3")]
    assert sorted(r.name for r in opened.members) == sorted(names)
    for first, second, third in (names[:3], names[3:]):
        expected = by_hand(np.ones(60), opened.logits(first).argmax(1) != labels, 5)
        np.testing.assert_allclose(seen[second] / 60, expected)
        np.testing.assert_allclose(seen[third] / 60, by_hand(expected, opened.logits(second).argmax(1) != labels, 5))
        assert "boosted" not in opened.record(first).settings
        assert opened.record(second).settings["boosted"] != opened.record(third).settings["boosted"]
        assert np.abs(opened.logits(first) - opened.logits(second)).max() > 1e-3
    assert dicor(["compare", "--pool", str(program.pool), "--task", "sst", "--on", "oof", "--method", "weighted"]) == 0
    assert "6 members on 60 oof examples" in capsys.readouterr().out


def test_the_same_command_goes_on(program: Program, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Cut in round 2 by hand: what is there is not trained again, and the rest is as if nothing had happened."""
    assert program("boost", *OPTIONS, members=MEMBERS) == 0
    whole = pool.TaskPool(program.pool, "sst", split="oof")
    logits = {r.name: np.array(whole.logits(r.name)) for r in whole.members}
    before = {r.name: r.files for r in whole.members}
    for folder in (program.pool / "sst").glob("*-s2-f2-round2"):
        shutil.rmtree(folder)
    for folder in (program.pool / "sst").glob("*-round3"):
        shutil.rmtree(folder)
    shutil.rmtree(program.folder / "runs")
    capsys.readouterr()
    assert program("boost", *OPTIONS, members=MEMBERS) == 0
    out = capsys.readouterr().out
    assert "2 of 2 members are finished" in out
    assert "1 of 2 members are finished" in out
    again = pool.TaskPool(program.pool, "sst", split="oof")
    for name, said in logits.items():
        np.testing.assert_allclose(again.logits(name), said, atol=1e-6)
        assert (again.record(name).files == before[name]) or "round3" in name or "s2-f2-round2" in name


@pytest.mark.parametrize(
    ("options", "tasks", "message"),
    [
        (["--rounds=1"], "[sst]", "--rounds: 1; expected 2 to 10"),
        (["--rounds=11"], "[sst]", "--rounds: 11; expected 2 to 10"),
        (["--data.folds=0"], "[sst]", "data.folds: 0; boosting looks at out-of-fold errors: set it, e.g. to 5"),
        ([], "[sts]", "data.tasks: sts is regression; boosting is for classes"),
        ([], "[sst, quora]", "data.tasks: 2 tasks; boosting is about one"),
    ],
)
def test_bad_settings(
    program: Program, options: list[str], tasks: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {o.split("=")[0] for o in options}
    rest = [o for o in OPTIONS if o.split("=")[0] not in given]
    assert program("boost", *rest, *options, tasks=tasks, members="[{rank: 2}]") == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1


def test_whoever_is_always_right_has_nothing_to_learn(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    """One class alone: nobody is wrong."""
    root = program.folder / "data"
    root.mkdir()
    for split in ("train", "dev"):
        rows = [{"text": f"word {i}", "label": "a"} for i in range(20)]
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    program.root = root
    own = {"name": "t", "kind": "multiclass", "text": ["text"], "label_names": ["a", "b"]}
    tasks = json.dumps([own | {"train": "train.jsonl", "dev": "dev.jsonl"}])
    assert program("boost", *OPTIONS, "--trainer.max_epochs=4", tasks=tasks, members="[{rank: 2, lr: 3e-2}]") == 0
    assert "r2-c1-qv-lr3e-2-s11711-f2 ends with round 1: not finished, always right, or" in capsys.readouterr().out
