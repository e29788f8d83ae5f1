"""Attention inside each example of a packed row, exact: no token sees another example."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_ensemble.bank.dropout import keep_mask
from lora_ensemble.text.packing import PackRow, PadRow


def attend(
    q: Tensor, k: Tensor, v: Tensor, batch: Mapping[str, Any], heads: int, dropout: float = 0, window: int | None = None
) -> Tensor:
    """softmax(q kᵀ / √d) v within each example (Vaswani et al. 2017, section 3.2).

    k, v: (M or 1, T, H). q: (M or 1, T, H), or (M or 1, B, H) for the first token of each example alone.
    ``batch``: a packed row's layout (:func:`packing.layout`). ``window``: tokens farther apart do not see each other.
    Returns as q, for M members.
    """
    m = max(len(q), len(k), len(v))
    q, k, v = (x.expand(m, -1, -1) for x in (q, k, v))
    if q.device.type == "cpu" and torch.is_grad_enabled():
        return _InRows.apply(q, k, v, batch["lengths"], heads, dropout, window)
    return attend_padded(q, k, v, batch, heads, dropout, window)


def attend_padded(
    q: Tensor, k: Tensor, v: Tensor, batch: Mapping[str, Any], heads: int, dropout: float, window: int | None
) -> Tensor:
    """:func:`attend` through torch's fused attention on the padded batch; everything around it stays packed."""
    m, width = len(q), q.shape[-1]
    place, slots = batch["place"], batch["slots"]
    b, length = place.shape
    first_only = q.shape[1] != k.shape[1]
    queries = 1 if first_only else length

    def split(x: Tensor, tokens: int) -> Tensor:  # (M, B·tokens, H) -> (M·B, h, tokens, d)
        return x.reshape(m * b, tokens, heads, -1).transpose(1, 2)

    rows = split(q if first_only else PadRow.apply(q, place, slots), queries)
    keys, values = (split(PadRow.apply(x, place, slots), length) for x in (k, v))
    mask = batch["attention_mask"].bool()[:, None]  # (B, 1 or L, L): what a token may see
    if window is not None:
        # A row of padding sees everything: a row without anything to see would be NaN.
        mask = (mask & _near(queries, length, window, q.device)) | ~mask.transpose(1, 2)[:, :queries]
    mask = mask.expand(m, *mask.shape).flatten(0, 1)[:, None]
    out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, dropout_p=dropout)
    out = out.transpose(1, 2).reshape(m, -1, width)
    return out if first_only else PackRow.apply(out, slots)


def _near(rows: int, length: int, window: int, device: torch.device) -> Tensor:
    """(rows, length) bool: whether two places are at most ``window`` apart."""
    return (torch.arange(rows, device=device)[:, None] - torch.arange(length, device=device)).abs() <= window


class _InRows(torch.autograd.Function):
    """Example by example as plain matrix products: nothing is padded, nothing masked."""

    # On a CPU, at BERT's short lengths, torch's fused attention spends more on its backward pass and, with dropout, on
    # random numbers. Never below float32: bf16 products of this size are no faster there, and its softmax is slower.
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], heads: int, drop: float, window: int | None
    ) -> Tensor:
        out = q.new_empty(q.shape)
        q, k, v = (_by_head(x, heads) for x in (q, k, v))
        ctx.scale, ctx.heads, ctx.dropped = q.shape[-1] ** -0.5, heads, drop > 0
        of_keys = [slice(end - n, end) for n, end in zip(lengths, itertools.accumulate(lengths), strict=True)]
        of_first = [slice(i, i + 1) for i in range(len(lengths))]
        ctx.spans = list(zip(of_first if q.shape[1] != k.shape[1] else of_keys, of_keys, strict=True))
        saved: list[Tensor] = []
        for rows, keys in ctx.spans:
            scores = _scaled(q[:, rows], k[:, keys].transpose(1, 2), ctx.scale)
            if window is not None:
                scores.masked_fill_(~_near(scores.shape[1], scores.shape[2], window, q.device), -torch.inf)
            p = torch.softmax(scores, -1)
            saved.append(p)
            if drop:
                p = p * keep_mask(p, drop)
                saved.append(p)
            _put(out[:, rows], torch.bmm(p, v[:, keys]))
        ctx.save_for_backward(q, k, v, *saved)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v, *saved = ctx.saved_tensors
        shapes = [(len(grad), x.shape[1], grad.shape[2]) for x in (q, k, v)]
        dq, dk, dv = (grad.new_empty(s) if n else None for s, n in zip(shapes, ctx.needs_input_grad, strict=False))
        grad, parts = _by_head(grad, ctx.heads), iter(saved)
        for rows, keys in ctx.spans:
            p = next(parts)
            kept = next(parts) if ctx.dropped else p
            if dv is not None:
                _put(dv[:, keys], torch.bmm(kept.transpose(1, 2), grad[:, rows]))
            if dq is None and dk is None:
                continue
            # The derivative of softmax, p (dp - sum(p dp)), with dp = mask · dkept and kept = mask · p.
            ds = torch.bmm(grad[:, rows], v[:, keys].transpose(1, 2)).mul_(kept)
            ds.addcmul_(p, ds.sum(-1, keepdim=True), value=-1)
            if dq is not None:
                _put(dq[:, rows], _scaled(ds, k[:, keys], ctx.scale))
            if dk is not None:
                _put(dk[:, keys], _scaled(ds.transpose(1, 2), q[:, rows], ctx.scale))
        return dq, dk, dv, None, None, None, None


def _scaled(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``scale`` times the batched product of a and b."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def _by_head(x: Tensor, heads: int) -> Tensor:
    """(M, T, h·d) to (M·h, T, d), at least float32."""
    m, t, width = x.shape
    by_head = x.view(m, t, heads, width // heads).transpose(1, 2)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return by_head.to(dtype, memory_format=torch.contiguous_format).reshape(m * heads, t, width // heads)


def _put(place: Tensor, x: Tensor) -> None:
    """Write x (M·h, t, d) to ``place`` (M, t, h·d)."""
    # Not as the product's `out`: torch multiplies into what is not contiguous one matrix at a time.
    m, t, _ = place.shape
    place.view(m, t, -1, x.shape[-1]).copy_(x.view(m, -1, t, x.shape[-1]).transpose(1, 2))
