"""Attention inside packed rows against attention written out by hand, forwards and backwards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_ensemble.bank.attention import attend
from lora_ensemble.text.packing import fill, layout, unpack

LENGTHS = np.array([3, 7, 1, 4])  # 15 tokens, filled up to 16


def by_hand(q: Tensor, k: Tensor, v: Tensor, heads: int, window: int | None) -> Tensor:
    """Token by token and head by head: (M, T, H) for the real tokens."""
    out = torch.zeros(len(q), 15, q.shape[2], dtype=q.dtype)
    d, starts = q.shape[2] // heads, np.cumsum(LENGTHS) - LENGTHS
    for m in range(len(q)):
        for start, length in zip(starts, LENGTHS, strict=True):
            for h in range(heads):
                cut = slice(h * d, (h + 1) * d)
                for i in range(length):
                    seen = [start + j for j in range(length) if window is None or abs(i - j) <= window]
                    scores = torch.stack([q[m, start + i, cut] @ k[m, t, cut] / d**0.5 for t in seen])
                    p = scores.exp() / scores.exp().sum()
                    out[m, start + i, cut] = sum(w * v[m, t, cut] for w, t in zip(p, seen, strict=True))
    return out


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("first_only", [False, True])
def test_both_ways_equal_attention_by_hand(window: int | None, first_only: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 16, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    batch: dict[str, Any] = layout(LENGTHS)
    expected = by_hand(q, k, v, 2, window)
    rows = q[:, batch["first"]] if first_only else q
    if first_only:
        expected = expected[:, batch["first"][:4]]
    with torch.enable_grad():
        in_rows = attend(rows, k, v, batch, heads=2, window=window)
    with torch.no_grad():
        padded = attend(rows, k, v, batch, heads=2, window=window)
    n = expected.shape[1]
    for out in (in_rows, padded):
        torch.testing.assert_close(out[:, :n], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize("window", [None, 1])
def test_gradients_are_those_of_finite_differences(dropout: float, first_only: bool, window: int | None) -> None:
    batch: dict[str, Any] = layout(LENGTHS)
    tokens = len(batch["lengths"]) if first_only else 16
    q = torch.randn(2, tokens, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 16, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def same_masks(*inputs: Tensor) -> Tensor:
        torch.manual_seed(3)
        return attend(*inputs, batch, heads=2, dropout=dropout, window=window)

    assert torch.autograd.gradcheck(same_masks, (q, k, v))


def test_gradients_through_the_padded_way() -> None:
    """What a GPU uses, on a CPU: the gradients of the two ways are the same."""
    from lora_ensemble.bank.attention import attend_padded

    batch: dict[str, Any] = layout(LENGTHS)
    inputs = [torch.randn(2, 16, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weight = torch.randn(2, 16, 4, dtype=torch.float64)
    found = [
        torch.autograd.grad((way * weight).sum(), inputs)
        for way in (attend(*inputs, batch, heads=2), attend_padded(*inputs, batch, 2, 0.0, None))
    ]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_shared_keys_serve_all_members() -> None:
    batch: dict[str, Any] = layout(LENGTHS)
    q = torch.randn(3, 16, 4, dtype=torch.float64)
    k, v = torch.randn(1, 16, 4, dtype=torch.float64), torch.randn(3, 16, 4, dtype=torch.float64)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            shared = attend(q, k, v, batch, heads=2)
            assert torch.equal(shared, attend(q, k.repeat(3, 1, 1), v, batch, heads=2))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=9))
def test_a_row_is_its_padded_batch(lengths: list[int]) -> None:
    batch: dict[str, Any] = layout(np.array(lengths))
    tokens = torch.arange(1, sum(lengths) + 1)
    batch["input_ids"] = fill(tokens)
    assert len(batch["input_ids"]) % 8 == 0
    assert len(batch["input_ids"]) - sum(lengths) < 8
    assert len(batch["position_ids"]) == len(batch["input_ids"]) == sum(batch["lengths"])
    padded = unpack(batch, "input_ids", 0)
    expected, start = torch.zeros(len(lengths), max(*batch["lengths"], 1), dtype=torch.long), 0
    for i, n in enumerate(lengths):
        expected[i, :n] = tokens[start : start + n]
        start += n
    assert torch.equal(padded, expected)
