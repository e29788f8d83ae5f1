"""Losses and schedules of the LightningModule against torch and transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_ensemble.bank.lora import MemberConfig
from lora_ensemble.tasks import PRESETS
from lora_ensemble.train.evaluation import member_losses
from lora_ensemble.train.module import BankModule


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
        members=(MemberConfig(lr=[1e-3, 1e-5]),),
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
