"""Dropout whose random numbers do not cost more than the matrix products around it.

On a CPU torch draws a Bernoulli variable for each number, one after another, which takes longer than the bf16 product
beside it (``benchmarks/pieces.py``). Here one 64-bit draw of the same generator decides four numbers, so that a
probability is one of 65,536; the scale is that of the probability used, so that the expected value stays exact.

Axes: M members, T tokens of a packed row, R largest rank at a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_STEPS = 1 << 16


def keep_mask(x: Tensor, p: float) -> Tensor:
    """As ``x``: 0 with probability ``p``, rounded to 1/65536, and 1 / (1 - p) otherwise."""
    return _draw(torch.empty(x.shape, dtype=x.dtype, device=x.device), p)


def _draw(mask: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """Fill a mask; ``generator``: of its device, None for torch's own."""
    if mask.device.type != "cpu":
        return mask.bernoulli_(1 - p, generator=generator).div_(1 - p)
    dropped = min(round(p * _STEPS), _STEPS - 1)
    n = math.prod(mask.shape)
    draws = torch.empty((n + 3) // 4, dtype=torch.int64, device=mask.device)
    draws.random_(-(1 << 63), None, generator=generator)
    # Written as numbers at once: a bool mask would be turned into them by a slower pass.
    torch.ge(draws.view(torch.int16)[:n].view(mask.shape), dropped - _STEPS // 2, out=mask)
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


@dataclass(frozen=True)
class MemberDropout:
    """LoRA's dropout, of what enters the adapters at a layer: each member's masks from a generator of its own."""

    p: Sequence[float]  # of each member that runs; 0: it has none there
    generators: Sequence[torch.Generator | None]

    def of(self, members: slice) -> MemberDropout:
        """That of some of them."""
        return MemberDropout(self.p[members], self.generators[members])

    def __call__(self, x: Tensor, rows: list[int]) -> Tensor:
        """x: (M or 1, T, in). Returns what is left of it for some members, by their ``rows``: (len(rows), T, in)."""
        masks = x.new_empty(len(rows), *x.shape[1:])
        for mask, row in zip(masks, rows, strict=True):
            _draw(mask, self.p[row], self.generators[row])
        return masks * (x if len(x) in (1, len(rows)) else x[rows])


def lowered(x: Tensor, layers: Sequence[tuple[Tensor, MemberDropout | None]]) -> list[Tensor]:
    """A x of every member, (M, T, R), at each of some layers that read the same x (M or 1, T, in).

    ``layers``: the layer's A (M, R, in), and the dropout before it.
    """
    every = iter(_products(x, [a for a, dropout in layers if dropout is None or not all(dropout.p)]))
    lows = []
    for a, dropout in layers:
        rows = [] if dropout is None else [row for row, p in enumerate(dropout.p) if p]
        low = next(every) if len(rows) < len(a) else a.new_empty(len(a), x.shape[1], a.shape[1])
        if dropout is not None and rows:
            own = torch.bmm(dropout(x, rows), a[rows].transpose(1, 2))
            low = low.index_copy(0, torch.tensor(rows, device=x.device), own)
        lows.append(low)
    return lows


def _products(x: Tensor, every: list[Tensor]) -> Sequence[Tensor]:
    """x times each of some A, in one product."""
    if not every:
        return []
    a = torch.cat(every, 1) if len(every) > 1 else every[0]
    m, rank, _ = a.shape
    if len(x) == m:
        low = torch.bmm(x, a.transpose(1, 2))
    else:  # one row for all members: one product with all their A
        low = F.linear(x[0], a.flatten(0, 1)).view(-1, m, rank).transpose(0, 1)
    return low.split([a.shape[1] for a in every], -1)
