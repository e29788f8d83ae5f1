"""How the members of a bank step: AdamW, clipping and a schedule, for each member by itself.

A fully fine-tuned member is alone in its bank: all that is trained is its.
"""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lora_ensemble.bank.model import Bank
from lora_ensemble.bank.optim import BankAdamW, clip_rows
from lora_ensemble.errors import UserError


def check_precision(precision: Any) -> None:
    """``UserError`` for half precision: it would couple members."""
    if str(precision).startswith("16"):
        raise UserError(
            f"trainer.precision: {precision} scales the loss of all members by one factor, so an overflow of one would "
            "skip a step of all; use bf16-mixed (or 32-true)"
        )


def trained_parameters(bank: Bank) -> list[Tensor]:
    """What has a gradient: all members' weights, and a fully fine-tuned encoder's."""
    return [p for p in bank.parameters() if p.requires_grad]


def make_optimizer(bank: Bank, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW with a rate per member."""
    rates = bank.rates
    if bank.train_encoder:
        # fused: far faster on a CPU than torch's default there
        return torch.optim.AdamW(trained_parameters(bank), lr=rates[0], weight_decay=weight_decay, fused=True)
    return BankAdamW(bank.weights, rates, weight_decay=weight_decay)


def finite_members(bank: Bank, optimizer: Any) -> list[bool]:
    """For each member, whether its training has stayed finite; ``optimizer``: Lightning's wrapper or what it wraps."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if isinstance(optimizer, BankAdamW):
        return optimizer.alive.tolist()
    return [all(bool(p.isfinite().all()) for p in trained_parameters(bank))]


def clip_gradients(bank: Bank, limit: float, algorithm: str | None) -> None:
    """Clip each member's gradient: by its norm, or by ``value``."""
    if not bank.train_encoder:
        if bank.weights.grad is not None:
            clip_rows(bank.weights.grad, limit, algorithm)
        return
    # Not Lightning's way: it clips for no fused optimiser, though only fp16 would need that.
    trained = trained_parameters(bank)
    if algorithm == "value":
        for gradient in (p.grad for p in trained if p.grad is not None):
            clip_rows(gradient.view(1, -1), limit, "value")
    else:
        torch.nn.utils.clip_grad_norm_(trained, limit)


def make_scheduler(optimizer: torch.optim.Optimizer, schedule: str, warmup: float, total: int | None) -> Any:
    """Multiplies all rates: up from zero in ``warmup`` steps (below 1: that part of all), then constant, or to zero.

    ``total``: steps of the whole run, None where it has no end. ``UserError`` where that is needed, or too few.
    """
    if total is None:
        raise UserError("model.schedule, model.warmup: they need an end; set trainer.max_epochs or max_steps")
    steps = warmup * total if warmup < 1 else warmup
    if steps > total:
        raise UserError(f"model.warmup: {warmup:g} steps, but the run has {total}; expected fewer, or a fraction")

    from transformers import get_scheduler

    name = "constant_with_warmup" if schedule == "constant" else schedule
    return get_scheduler(name, optimizer, num_warmup_steps=round(steps), num_training_steps=total)


def planned_steps(trainer: pl.Trainer) -> int | None:
    """Optimiser steps of the whole run; None where it has no end."""
    # Not trainer.estimated_stepping_batches: it sets the loaders up before Lightning restores their state, so a
    # run resumed in mid-epoch would start the epoch again (lightning 2.6).
    batches, limit = len(trainer.datamodule.train_dataloader()), trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    steps = math.ceil(batches / trainer.accumulate_grad_batches)
    ends = [steps * trainer.max_epochs] if trainer.max_epochs not in (None, -1) else []
    ends += [trainer.max_steps] if trainer.max_steps != -1 else []
    return min(ends, default=None)
