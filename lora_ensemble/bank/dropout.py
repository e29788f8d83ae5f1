"""Dropout whose random numbers do not cost more than the matrix products around it.

On a CPU torch draws a Bernoulli variable for each number, one after another, which takes longer than the bf16 product
beside it (``benchmarks/pieces.py``). Here one 64-bit draw of the same generator decides four numbers, so that a
probability is one of 65,536; the scale is that of the probability used, so that the expected value stays exact.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_STEPS = 1 << 16


def keep_mask(x: Tensor, p: float) -> Tensor:
    """As ``x``: 0 with probability ``p``, rounded to 1/65536, and 1 / (1 - p) otherwise."""
    dropped = round(p * _STEPS)
    n = math.prod(x.shape)
    draws = torch.empty((n + 3) // 4, dtype=torch.int64, device=x.device).random_(-(1 << 63), None)
    mask = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # Written as numbers at once: a bool mask would be turned into them by a slower pass.
    torch.ge(draws.view(torch.int16)[:n].view(x.shape), dropped - _STEPS // 2, out=mask)
    return mask.mul_(_STEPS / (_STEPS - dropped))


class _AddDropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, residual: Tensor | None) -> Tensor:
        mask = keep_mask(x, p)
        ctx.save_for_backward(mask)
        ctx.shared = residual is not None and residual.shape != x.shape
        # The sum in the residual's precision, without the copies that torch makes of mixed operands.
        return x * mask if residual is None else (x * mask).to(residual.dtype).add_(residual)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        residual = (grad.sum(0, keepdim=True) if ctx.shared else grad) if ctx.needs_input_grad[2] else None
        return (grad.to(mask.dtype) * mask) if ctx.needs_input_grad[0] else None, None, residual


def dropped(x: Tensor, p: float) -> Tensor:
    """Dropout with probability ``p``."""
    if p == 0:
        return x
    return _AddDropped.apply(x, p, None) if x.device.type == "cpu" else F.dropout(x, p)


def add_dropped(residual: Tensor, x: Tensor, p: float) -> Tensor:
    """``residual + dropout(x)`` in the residual's precision. residual: (1 or M, T, H); x: (M, T, H)."""
    if p == 0 or x.device.type != "cpu":
        return residual + dropped(x, p)
    return _AddDropped.apply(x, p, residual)
