"""Losses and schedules of the LightningModule against torch and transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pool_factory import LABELS, random_labels, random_logits

from lora_ensemble.bank.lora import Member
from lora_ensemble.errors import UserError
from lora_ensemble.scores import decisions
from lora_ensemble.tasks import PRESETS, Kind, Task
from lora_ensemble.train.evaluation import Evaluation, History, check_metrics, member_losses, metric
from lora_ensemble.train.module import BankModule
from lora_ensemble.train.notices import print_summary
from lora_ensemble.train.restart import planned_steps


def test_losses_are_torchs_for_each_member() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 5, generator=g)
    labels = torch.tensor([0, 4, 2, 2, 1, 3])
    one = torch.tensor([0, 1, 1, 0, 1, 0])
    values = torch.tensor([0.0, 5.0, 2.5, 3.2, 1.0, 4.0], dtype=torch.float64)
    for m in range(3):
        torch.testing.assert_close(
            member_losses(logits, labels, "multiclass")[m].mean(), torch.nn.CrossEntropyLoss()(logits[m], labels)
        )
        torch.testing.assert_close(
            member_losses(logits[..., :1], one, "binary")[m].mean(),
            torch.nn.BCEWithLogitsLoss()(logits[m, :, 0], one.float()),
        )
        torch.testing.assert_close(
            member_losses(logits[..., :1], values, "regression")[m].mean(),
            torch.nn.MSELoss()(logits[m, :, 0], values.float()),
        )


def test_losses_are_never_below_float32() -> None:
    logits = torch.randn(2, 3, 5)
    labels = torch.tensor([0, 1, 2])
    assert member_losses(logits.bfloat16(), labels, "multiclass").dtype == torch.float32
    assert member_losses(logits.double(), labels, "multiclass").dtype == torch.float64


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        # Worked out by hand for 8 steps: up in 2 steps from zero, then flat, straight down, or half a cosine.
        ("constant", 2, [0, 0.5, 1, 1, 1, 1, 1, 1]),
        ("linear", 0.25, [0, 0.5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("cosine", 0, [1, 0.961940, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.038060]),
    ],
)
def test_schedules(
    tiny: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    schedule: str,
    warmup: float,
    expected: list[float],
) -> None:
    module = BankModule(
        [PRESETS["sst"]],
        base_model=str(tiny("bert")),
        members=(Member(lr=[1e-3, 1e-5]),),
        schedule=schedule,  # type: ignore[arg-type]
        warmup=warmup,
    )
    monkeypatch.setattr("lora_ensemble.train.module.planned_steps", lambda trainer: 8)
    monkeypatch.setattr(module, "_trainer", object(), raising=False)
    made = module.configure_optimizers()
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    factors = []
    for _ in range(8):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert factors == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["multiclass", "binary", "regression"])
def test_metrics_are_scikit_learns(kind: Kind) -> None:
    """On random logits; averages over classes are macro, where there is one."""
    from scipy import special, stats
    from sklearn import metrics

    labels = random_labels(kind, 40)
    (logits,) = random_logits(kind, labels, 1, noise=2)
    decided = decisions(logits, kind)
    if kind == "regression":
        expected = {
            "SpearmanCorrCoef": stats.spearmanr(decided, labels).statistic,
            "KendallRankCorrCoef": stats.kendalltau(decided, labels).statistic,
            "MeanAbsoluteError": metrics.mean_absolute_error(labels, decided),
            "R2Score": metrics.r2_score(labels, decided),
        }
    else:
        chances = special.softmax(logits, axis=1) if kind == "multiclass" else special.expit(logits[:, 0])
        average = {"average": "macro"} if kind == "multiclass" else {}
        expected = {
            "F1Score": metrics.f1_score(labels, decided, **average),
            "Precision": metrics.precision_score(labels, decided, zero_division=0, **average),
            "MatthewsCorrCoef": metrics.matthews_corrcoef(labels, decided),
            "CohenKappa": metrics.cohen_kappa_score(labels, decided),
            "AUROC": metrics.roc_auc_score(labels, chances, multi_class="ovr"),
        }
    task = Task(name="t", kind=kind, text=["a"], label_names=LABELS[kind])
    assert check_metrics([*expected, *expected], task) == list(expected)
    given = {name: metric(name, task, logits, labels) for name in expected}
    assert given == pytest.approx(expected, abs=1e-6)
    assert len({round(v, 3) for v in expected.values()}) > 2


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("multiclass", "F1", "expected one like F1Score"),
        ("multiclass", "ConfusionMatrix", "no class of torchmetrics that gives one number"),  # it gives a table
        ("binary", "FBetaScore", "F1Score"),  # it needs beta
        ("regression", "AUROC", "for task 't' \\(regression\\); expected one like"),
    ],
)
def test_a_metric_that_does_not_fit_is_told(kind: Kind, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_metrics([name], Task(name="t", kind=kind, text=["a"], label_names=LABELS[kind]))


def said(scores: list[float], logits: float = 0.0) -> Evaluation:
    """What members with these scores, and the same logits, said of four examples of a task."""
    return Evaluation(np.full((len(scores), 4, 1), logits, np.float32), scores, {}, True)


def test_history_keeps_the_first_of_the_best() -> None:
    """Three members on two tasks, overall by hand: the mean of an accuracy a and of (r + 1) / 2."""
    tasks = [PRESETS["quora"], PRESETS["sts"]]
    history = History(["one", "two", "three"], tasks)
    alive = [True] * 3
    # Overall: (0.5 + 0.5) / 2 = 0.5, (0.5 + 0.75) / 2 = 0.625, and none.
    first = {"quora": said([0.5, 0.5, 0.5], 1e9), "sts": said([0.0, 0.5, float("nan")])}
    assert history.add(first, alive) == ([0, 1], [])
    # 0.5 again, 0.5, and 0.5 for the first time.
    assert history.add({"quora": said([0.0, 0.0, 0.5]), "sts": said([1.0, 1.0, 0.0])}, alive) == ([2], [])
    # Better all, but one has diverged in training, and one says infinity; it is told once.
    last = {"quora": said([1.0, 1.0, 1.0]), "sts": said([1.0, 1.0, 1.0])}
    last["sts"].logits[1, 2] = np.inf
    assert history.add(last, [False, True, True]) == ([2], [0, 1])
    assert history.add(last, [False, True, True]) == ([], [])
    assert history.best_epoch == [1, 1, 3]
    assert history.overall_at(1)[:2] == [0.5, 0.625]
    assert history.logits_at(1)["quora"].max() == 65504  # float16 has no more
    again = History(["one", "two", "three"], tasks)
    again.load_state_dict(history.state_dict())
    assert (len(again), again.best_epoch, again.overall_at(4)) == (4, [1, 1, 3], history.overall_at(4))
    for h in (history, again):
        results = h.results("sts", 2)
        assert (results["score"], results["best_epoch"], results["epoch_scores"]) == (1.0, 3, [None, 0.0, 1.0, 1.0])
    assert history.summary()[0] == ["one", "diverged", 0.5, 0.0]


@pytest.mark.parametrize(
    ("limit", "accumulate", "epochs", "steps", "expected"),
    [
        (1.0, 1, 3, -1, 24),
        (1.0, 3, 2, -1, 6),  # 8 batches make 3 steps
        (5, 1, 2, -1, 10),
        (0.5, 2, 2, -1, 4),
        (1.0, 1, 3, 10, 10),
        (1.0, 1, -1, 10, 10),
        (1.0, 1, -1, -1, None),
    ],
)
def test_planned_steps(limit: Any, accumulate: int, epochs: int, steps: int, expected: int | None) -> None:
    trainer: Any = SimpleNamespace(
        datamodule=SimpleNamespace(train_dataloader=lambda: range(8)),
        limit_train_batches=limit,
        accumulate_grad_batches=accumulate,
        max_epochs=epochs,
        max_steps=steps,
    )
    assert planned_steps(trainer) == expected


def test_the_table_is_sorted_by_the_tasks_scores_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """Of equal scores the first stays first, whatever a further metric says; NaN comes last."""
    rows = [["a", 1, float("nan"), 0.9], ["b", 1, 0.5, 0.1], ["c", 1, 0.5, 0.7], ["d", 2, 0.6, 0.0]]
    print_summary(["member", "best epoch", "t dev", "t dev (F1Score)"], rows, folder=Path("pool"), signs={"t": 1})
    assert [line[0] for line in capsys.readouterr().out.splitlines()[1:5]] == ["d", "b", "c", "a"]
