"""How the members of a bank step: AdamW, clipping and a schedule, for each member by itself.

What all members train is a matrix of weights with a row for each. A fully fine-tuned member is alone in its bank: all
that is trained is its.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_ensemble.bank.lora import single
from lora_ensemble.bank.model import Bank
from lora_ensemble.errors import UserError


class BankAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) with a learning rate per row of one matrix (M, P): ``rates`` (M,).

    Every row gets what ``torch.optim.AdamW`` would give it alone. A row whose gradient is not finite is frozen for good
    and changes no other row; one of ``idle`` is left as if it had not been asked. ``group["lr"]`` is the schedule's
    factor on all rates, 1 at first. ``weight_decay``: of all, or of each row (M,). ``apart``: rates (M,) of some
    columns, and which those are, (P,) bool.
    """

    def __init__(
        self,
        weights: torch.nn.Parameter,
        rates: Sequence[float],
        *,
        weight_decay: float | Sequence[float] = 0.0,
        apart: tuple[Sequence[float], Tensor] | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__([weights], {"lr": 1.0, "betas": betas, "eps": eps})
        decays = [weight_decay] * len(weights) if isinstance(weight_decay, float) else weight_decay
        self._rates, self._decays, self._apart = _column(rates), _column(decays), apart
        self.idle: list[int] = []  # rows that take no step, the next time
        self._own: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, bank: Bank, weight_decay: float) -> BankAdamW:
        """That of a bank, with its members' rates and decays; ``weight_decay``: of members that have none."""
        b, decays = ([single(getattr(m, key)) for m in bank.members] for key in ("lr_b", "weight_decay"))
        apart = None
        if any(rate is not None for rate in b):
            sizes = torch.tensor([math.prod(shape) for shape in bank.shapes.values()])
            is_b = torch.tensor(["/" not in name and name.endswith(".B") for name in bank.shapes])
            rates = [lr if rate is None else rate for lr, rate in zip(bank.rates, b, strict=True)]
            apart = rates, is_b.repeat_interleave(sizes)
        decays = [weight_decay if decay is None else decay for decay in decays]
        return cls(bank.weights, bank.rates, weight_decay=decays, apart=apart)

    def _state(self) -> dict[str, Any]:
        (weights,) = self.param_groups[0]["params"]
        state = self.state[weights]
        if not state:
            moments = {name: torch.zeros_like(weights) for name in ("exp_avg", "exp_avg_sq")}
            alive = torch.ones(len(weights), 1, dtype=torch.bool, device=weights.device)
            state.update(step=0, alive=alive, **moments)  # whole or not at all
        if "missed" not in state:  # by an earlier version
            state["missed"] = [0] * len(weights)  # of the steps, how many each row was idle in
        return state

    def _own_of(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Rates (M, 1 or P) and decays (M, 1), as the weights are."""
        if self._own is None or (self._own[0].device, self._own[0].dtype) != (weights.device, weights.dtype):
            # Once, not in every step: a copy would wait for the device.
            rates = self._rates.to(weights)
            if self._apart is not None:
                others, where = self._apart
                rates = torch.where(where.to(weights.device), _column(others).to(weights), rates)
            self._own = rates, self._decays.to(weights)
        return self._own

    @property
    def alive(self) -> Tensor:
        """(M,) bool: members whose gradients have all been finite."""
        return self._state()["alive"][:, 0].bool()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for all members. Lightning's closure computes and clips the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        (weights,) = group["params"]
        if weights.grad is None:
            return loss
        state = self._state()
        # All that takes memory comes first: a step that runs out of it has changed nothing, and can be done again.
        # A sum is finite only if every part is. bool: loading a checkpoint casts the state to the weights' type.
        alive = state["alive"].bool() & weights.grad.abs().sum(1, keepdim=True).isfinite()
        gradient = torch.where(alive, weights.grad, 0)
        own, decays = self._own_of(weights)
        rates = torch.where(alive, own * group["lr"], 0)
        beta1, beta2 = group["betas"]
        step, change = state["step"] + 1, torch.empty_like(weights)
        missed = [n + (i in self.idle) for i, n in enumerate(state["missed"])]
        kept = [(t, t[self.idle]) for t in (weights, state["exp_avg"], state["exp_avg_sq"])] if self.idle else []

        def bias(beta: float) -> float | Tensor:
            """1 less beta to the number of steps that a row has taken."""
            return (
                1 - beta**step
                if not any(missed)
                else weights.new_tensor([[1 - beta ** max(step - n, 1)] for n in missed])
            )

        shrink, rates, bias2 = 1 - rates * decays, rates / bias(beta1), bias(beta2)

        state["alive"], state["step"], state["missed"] = alive, step, missed
        weights.mul_(shrink)
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        torch.div(state["exp_avg_sq"], bias2, out=change)
        change.sqrt_().add_(group["eps"])
        torch.div(state["exp_avg"], change, out=change).mul_(rates)
        weights.sub_(change)
        for tensor, rows in kept:
            tensor[self.idle] = rows
        return loss


def leave_out(bank: Bank, optimizer: Any, members: list[int]) -> None:
    """Let these members take no step, the next time; all others do. ``optimizer``: as in :func:`finite_members`."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if isinstance(optimizer, BankAdamW):
        optimizer.idle = members
    elif members:
        optimizer.zero_grad(set_to_none=True)  # a fully fine-tuned member is alone


def _column(numbers: Sequence[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64).view(-1, 1)


@torch.no_grad()
def clip_rows(gradient: Tensor, limit: float, algorithm: str | None) -> None:
    """Clip each row of (M, P) by itself, as torch's ``clip_grad_norm_`` or ``clip_grad_value_`` clips a model."""
    if algorithm == "value":
        largest = torch.linalg.vector_norm(gradient, math.inf, dim=1, keepdim=True)
        gradient.clamp_(-limit, limit).masked_fill_(~largest.isfinite(), math.nan)  # an infinite one stays one
        return
    norms = gradient.norm(dim=1, keepdim=True)
    gradient.mul_((limit / (norms + 1e-6)).clamp_(max=1.0))


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
    """AdamW with a rate per member; ``weight_decay``: of members that have none of their own."""
    if not bank.train_encoder:
        return BankAdamW.of(bank, weight_decay)
    decay = single(bank.members[0].weight_decay)
    decay = weight_decay if decay is None else decay
    # fused: far faster on a CPU than torch's default there
    return torch.optim.AdamW(trained_parameters(bank), lr=bank.rates[0], weight_decay=decay, fused=True)


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
