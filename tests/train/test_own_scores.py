"""Tasks with a score of their own: which epoch is best, who leaves, what is printed, and several tasks together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, root_mean_squared_error
from test_cli import Program

from lora_ensemble import pool
from lora_ensemble.dicor.cli import main as dicor
from lora_ensemble.errors import UserError
from lora_ensemble.tasks import Task
from lora_ensemble.train.data import BankData, resolve_tasks, weighed
from lora_ensemble.train.evaluation import Evaluation, History, evaluate, summary_header
from lora_ensemble.train.module import BankModule
from lora_ensemble.train.notices import print_summary
from lora_ensemble.train.runs.halving import survivors
from lora_ensemble.train.runs.plan import Plan, PlannedBank
from lora_ensemble.train.runs.progress import SweepProgress, best_of

TEXT: dict[str, Any] = {"text": ["x"]}
CLASSES = Task(name="t", kind="multiclass", label_names=["a", "b", "c"], score="f1_macro", **TEXT)
VALUES = Task(name="v", kind="regression", score="rmse", **TEXT)
PLAIN = Task(name="p", kind="binary", **TEXT)


def evaluated(task: Task, logits: np.ndarray, labels: np.ndarray) -> Evaluation:
    """What ``evaluate`` makes of logits (M, N, C) on one device."""
    strategy = SimpleNamespace(root_device=torch.device("cpu"), reduce=lambda x, reduce_op: x)

    class Examples:
        def __len__(self) -> int:
            return len(labels)

    examples: Any = Examples()
    examples.labels = labels
    parts = [(np.arange(len(labels)), torch.from_numpy(logits))]
    return evaluate(parts, examples, task, members=len(logits), metrics=[], strategy=strategy)


def test_macro_f1_takes_another_epoch_than_accuracy() -> None:
    """Nearly all examples are of class a: epoch 1 says a of all, epoch 2 finds b and c and errs about a more often."""
    labels = np.array([0] * 16 + [1, 1, 2, 2])
    first, second = np.zeros(20, int), np.array([1] * 5 + [0] * 11 + [1, 1, 2, 2])
    logits = [np.eye(3, dtype=np.float32)[decided][None] for decided in (first, second)]
    for score, by, best in (("f1_macro", lambda d: f1_score(labels, d, average="macro"), 2), (None, None, 1)):
        task = Task(name="t", kind="multiclass", label_names=["a", "b", "c"], score=score, **TEXT)
        history = History(["one"], [task])
        for one in logits:
            history.add({"t": evaluated(task, one, labels)}, [True])
        assert history.best_epoch == [best]
        by = by or (lambda d: accuracy_score(labels, d))
        assert history.results("t", 0)["epoch_scores"] == pytest.approx([by(first), by(second)])
    assert history.summary() == [["one", 1, 0.8]]
    assert summary_header([CLASSES], "dev") == ["member", "best epoch", "t dev (macro F1)"]


def test_the_lower_rmse_is_better_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    """Two members, three epochs, by scikit-learn: best epochs, patience, who stays, and what is printed."""
    labels = np.array([0.0, 1.0, 2.0, 4.0])
    off = np.array([[0.5, 0.2], [0.1, 0.4], [0.3, 0.1]])  # epochs by members: what every value is off by
    history = History(["one", "two"], [VALUES])
    for errors in off:
        logits = (labels + errors[:, None])[..., None].astype(np.float32)
        history.add({"v": evaluated(VALUES, logits, labels)}, [True, True])
    rmse = [[root_mean_squared_error(labels, labels + e) for e in errors] for errors in off]
    assert history.best_epoch == [2, 3]
    assert [history.without_gain(i) for i in (0, 1)] == [1, 0]
    assert history.results("v", 0)["score"] == pytest.approx(rmse[1][0])  # the score itself, as it is known
    assert history.results("v", 0)["epoch_scores"] == pytest.approx([row[0] for row in rmse])
    assert history.overall_at(1) == pytest.approx([-0.5, -0.2])
    logits = {"v": history.logits_at(1)["v"]}
    assert survivors(history.overall_at(1), [], logits, keep=0.5, reserve=0) == [1]
    assert best_of(history.summary(), [VALUES]) == (pytest.approx(-0.1), "one")
    trainer: Any = SimpleNamespace(
        max_epochs=4,
        current_epoch=3,
        num_training_batches=10,
        fit_loop=SimpleNamespace(
            epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(current=SimpleNamespace(ready=10)))
        ),
        sanity_checking=False,
    )
    bank = PlannedBank(members=["one", "two"])
    writer: Any = SimpleNamespace(history=history)
    SweepProgress(Plan(banks=[bank]), bank, writer, [VALUES]).on_validation_end(trainer, None)  # type: ignore[arg-type]
    header, row, said = capsys.readouterr().out.splitlines()
    assert header.endswith("dev (RMSE)")
    assert row.split()[-2:] == ["one", "0.1000"]
    assert "; best so far one 0.1000; " in said
    rows: list[list[Any]] = [["a", 1, 0.3], ["b", 1, 0.1], ["c", 1, float("nan")], ["d", 1, 0.2]]
    print_summary(["member", "best epoch", "v dev"], rows, folder=Path("pool"), signs={"v": -1})
    assert [line[0] for line in capsys.readouterr().out.splitlines()[1:5]] == [*"bdac"]


def test_the_curve_of_the_best_is_that_of_the_lowest() -> None:
    logged: dict[str, float] = {}
    said = Evaluation(np.zeros((3, 4, 1), np.float32), [0.3, 0.1, float("nan")], {}, True)
    module: Any = SimpleNamespace(
        on_test_epoch_end=lambda: None,
        trainer=SimpleNamespace(sanity_checking=False, barebones=False, state=SimpleNamespace(fn="fit")),
        tasks=[VALUES],
        members=[SimpleNamespace(name=name) for name in "abc"],
        evaluations={"dev": {"v": said}},
        log=lambda name, value, **_: logged.update({name: value}),
        _log=logged.update,
    )
    BankModule.on_validation_epoch_end(module)
    assert (logged["dev_score/v"], logged["dev_score/v/a"], logged["dev_score/v/b"]) == (0.1, 0.3, 0.1)


def test_several_tasks_by_their_weights() -> None:
    """By hand, (3 F1 - RMSE) / 4: 0.5 then 0.55, though the mean of both was better before."""
    tasks = weighed([CLASSES, VALUES], {"t": 3, "v": 1})
    history = History(["one"], tasks)
    for f1, rmse in ((0.8, 0.4), (0.9, 0.5), (0.85, 0.45)):
        at = {"t": (f1, (1, 2, 3)), "v": (rmse, (1, 2, 1))}
        history.add({n: Evaluation(np.zeros(shape, np.float32), [s], {}, True) for n, (s, shape) in at.items()}, [True])
    assert [history.overall_at(e)[0] for e in (1, 2, 3)] == pytest.approx([0.5, 0.55, 0.525])
    assert history.best_epoch == [2]
    assert [t.overall for t in weighed([CLASSES, VALUES], "mean")] == [1, 1]
    assert weighed([VALUES], None) == [VALUES]  # one task is judged by its own score
    assert weighed(tasks, None) == tasks  # each said it itself
    with pytest.raises(UserError, match="task 'p': overall is -1; expected a weight above 0"):
        Task(name="p", kind="binary", overall=-1, **TEXT)
    presets = resolve_tasks(["sst", "sts"])
    assert weighed(presets, None) == presets
    assert [t.recorded for t in weighed(presets, {"sst": 2, "sts": 1})] == [{"overall": 2}, {"overall": 1}]


@pytest.mark.parametrize(
    ("overall", "says"),
    [
        (None, "data.overall: task t is scored by macro F1; give each of the tasks a weight above 0: {p: 1, t: 1}, or"),
        ({"t": 1}, "data.overall: {'t': 1}; give each of the tasks a weight above 0: {p: 1, t: 1}, or mean"),
        ({"t": 1, "p": -1}, "a weight above 0"),
        ({"t": 1, "p": float("nan")}, "a weight above 0"),
        ({"t": 1, "p": 1, "x": 1}, "a weight above 0"),
    ],
)
def test_weights_that_are_missing_or_do_not_fit(overall: Any, says: str) -> None:
    with pytest.raises(UserError) as e:
        BankData(tasks=(PLAIN, CLASSES), overall=overall)
    assert says in str(e.value)
    assert "\n" not in str(e.value)


def own(**fields: Any) -> str:
    """Sst of the made-up data as a task of one's own, as a setting."""
    task = {
        "name": "own",
        "kind": "multiclass",
        "text": ["sentence"],
        "label": "sentiment",
        "label_names": [*"01234"],
        "id": "id",
        "train": "ids-sst-train.csv",
        "dev": "ids-sst-dev.csv",
    }
    return json.dumps([task | fields])


@pytest.fixture
def program(tmp_path: Path, tiny: Callable[[str], Path], demo_root: Path) -> Program:
    return Program(tmp_path, tiny("bert"), demo_root)


def test_a_run_by_macro_f1_and_dicor_after_it(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    members = "[{rank: 2, lr: 3e-2}, {targets: none, lr: 1e-2}]"
    tasks = own(score="f1_macro")
    epochs = "--trainer.max_epochs=3"
    assert program("fit", epochs, tasks=tasks, members=members) == 0
    assert "own dev (macro F1)" in capsys.readouterr().out
    opened = pool.TaskPool(program.pool, "own")
    assert opened.scored_by == "f1_macro"
    labels = opened.examples().labels
    assert labels is not None
    for record in opened.members:
        assert record.settings["score"] == "f1_macro"
        each = opened.epochs(record.name)
        assert each is not None
        by_hand = [f1_score(labels, one.argmax(1), average="macro") for one in each]
        assert record.epoch_scores == pytest.approx(by_hand, abs=1e-9)
        assert record.best_epoch == int(np.argmax(by_hand)) + 1
        assert record.score == pytest.approx(max(by_hand), abs=1e-9)
    assert dicor(["compare", "--pool", str(program.pool), "--method", "weighted"]) == 0
    assert "\nmacro F1 on dev" in capsys.readouterr().out
    # By accuracy it is another member, which the pool has no room for.
    assert program("fit", epochs, tasks=own(), members=members) == 2
    assert "other settings (score was 'f1_macro', is now None)" in capsys.readouterr().err


@pytest.mark.parametrize(("overall", "weights"), [("{own: 3, sts: 1}", (3, 1)), ("mean", (1, 1))])
def test_a_run_of_two_tasks_by_their_weights(program: Program, overall: str, weights: tuple[int, int]) -> None:
    """The best epoch by hand, from both tasks' scores of each epoch as the pool has them."""
    tasks = own(score="f1_macro")[:-1] + ", sts]"
    members = "[{rank: 2, lr: 3e-2}, {targets: none, lr: 3e-2}]"
    extra = ("--trainer.max_epochs=4", f"--data.overall={overall}", "--data.steps_per_epoch=10")
    assert program("fit", *extra, tasks=tasks, members=members) == 0
    for record in pool.TaskPool(program.pool, "own").members:
        other = pool.TaskPool(program.pool, "sts").record(record.name)
        both = np.array([record.epoch_scores, other.epoch_scores], float)
        assert record.best_epoch == other.best_epoch == int(np.argmax(weights @ both)) + 1
        assert (record.settings["overall"], other.settings["overall"]) == weights
        assert "score" not in other.settings
    assert dicor(["compare", "--pool", str(program.pool), "--method", "weighted"]) == 0


def test_the_last_table_of_a_run_by_rmse_begins_with_the_lowest(
    program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    task = {"name": "own", "kind": "regression", "text": ["sentence1", "sentence2"], "label": "similarity", "id": "id"}
    task |= {"train": "sts-train.csv", "dev": "sts-dev.csv", "score": "rmse"}
    members = "[{rank: 2, lr: 1e-5}, {targets: none, lr: 5e-2}, {rank: 3, lr: 1e-2}]"
    assert program("fit", tasks=json.dumps([task]), members=members) == 0
    header, *rows = capsys.readouterr().out.split("\nmember ")[-1].splitlines()
    assert header.endswith("own dev (RMSE)")
    opened = pool.TaskPool(program.pool, "own")
    labels = opened.examples().labels
    assert labels is not None
    by_hand = {r.name: root_mean_squared_error(labels, opened.logits(r.name)[:, 0]) for r in opened.members}
    assert [row.split()[0] for row in rows[:3]] == sorted(by_hand, key=lambda name: by_hand[name])
    assert [r.name for r in opened.members] != sorted(by_hand, key=lambda name: by_hand[name])
    for record in opened.members:
        assert record.score == pytest.approx(by_hand[record.name], rel=1e-6)
        assert record.score == min(s for s in record.epoch_scores if s is not None)


def test_mistakes_are_one_line(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    for tasks, says in (
        (own(score="rmse"), "task 'own': score is 'rmse'; a multiclass task has one of accuracy,"),
        ("[sts, " + own(score="mcc")[1:], "data.overall: task own is scored by MCC; give each of"),
    ):
        assert program("fit", tasks=tasks) == 2
        err = capsys.readouterr().err
        assert says in err
        assert len(err.splitlines()) == 1
