"""AdamW and gradient clipping for a matrix of weights with a row per member."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class BankAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) with a learning rate per row of one matrix (M, P): ``rates`` (M,).

    Every row gets what ``torch.optim.AdamW`` would give it alone. A row whose gradient is not finite is frozen for good
    and changes no other row. ``group["lr"]`` is the schedule's factor on all rates, 1 at first.
    """

    def __init__(
        self,
        weights: torch.nn.Parameter,
        rates: Sequence[float],
        *,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__([weights], {"lr": 1.0, "weight_decay": weight_decay, "betas": betas, "eps": eps})
        self._rates = self._own = torch.tensor(rates, dtype=torch.float64).view(-1, 1)

    def _state(self) -> dict[str, Any]:
        (weights,) = self.param_groups[0]["params"]
        state = self.state[weights]
        if not state:
            moments = {name: torch.zeros_like(weights) for name in ("exp_avg", "exp_avg_sq")}
            alive = torch.ones(len(weights), 1, dtype=torch.bool, device=weights.device)
            state.update(step=0, alive=alive, **moments)  # whole or not at all
        return state

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
        if (self._own.device, self._own.dtype) != (weights.device, weights.dtype):
            self._own = self._rates.to(weights)  # once, not in every step: a copy would wait for the device
        rates = torch.where(alive, self._own * group["lr"], 0)
        beta1, beta2 = group["betas"]
        step, change = state["step"] + 1, torch.empty_like(weights)
        shrink, rates = 1 - rates * group["weight_decay"], rates / (1 - beta1**step)

        state["alive"], state["step"] = alive, step
        weights.mul_(shrink)
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        torch.div(state["exp_avg_sq"], 1 - beta2**step, out=change)
        change.sqrt_().add_(group["eps"])
        torch.div(state["exp_avg"], change, out=change).mul_(rates)
        weights.sub_(change)
        return loss


@torch.no_grad()
def clip_rows(gradient: Tensor, limit: float, algorithm: str | None) -> None:
    """Clip each row of (M, P) by itself, as torch's ``clip_grad_norm_`` or ``clip_grad_value_`` clips a model."""
    if algorithm == "value":
        largest = torch.linalg.vector_norm(gradient, math.inf, dim=1, keepdim=True)
        gradient.clamp_(-limit, limit).masked_fill_(~largest.isfinite(), math.nan)  # an infinite one stays one
        return
    norms = gradient.norm(dim=1, keepdim=True)
    gradient.mul_((limit / (norms + 1e-6)).clamp_(max=1.0))
