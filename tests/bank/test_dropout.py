"""Dropout's masks: how many, how large, and their gradients."""

from __future__ import annotations

import pytest
import torch

from lora_ensemble.bank.dropout import MemberDropout, add_dropped, dropped, keep_mask, lowered


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masks_drop_as_many_as_they_should(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    n = 400_003  # no multiple of four
    mask = keep_mask(torch.empty(n, dtype=dtype), p)
    values = mask.unique().tolist()
    assert values[0] == 0
    assert len(values) == 2
    assert values[1] == pytest.approx(1 / (1 - p), rel=2e-4)  # p is one of 65,536 steps
    deviation = (p * (1 - p) / n) ** 0.5
    assert abs(float((mask == 0).double().mean()) - p) < 5 * deviation + 1e-5
    # The four numbers of one draw are independent, as are neighbouring draws.
    zero = (mask[: n // 4 * 4] == 0).double().view(-1, 4)
    correlation = torch.corrcoef(torch.cat([zero[:-1].T, zero[1:].T])) - torch.eye(8, dtype=torch.float64)
    assert float(correlation.abs().max()) < 5 / (n / 4) ** 0.5


def test_the_same_seed_gives_the_same_masks() -> None:
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(keep_mask(torch.empty(50, 7), 0.5))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_gradients_are_those_of_finite_differences() -> None:
    residual, x = (torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    shared = torch.randn(1, 5, 3, dtype=torch.float64, requires_grad=True)

    def seeded(*inputs: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return add_dropped(*inputs, 0.4) if len(inputs) == 2 else dropped(*inputs, 0.4)

    assert torch.autograd.gradcheck(seeded, (residual, x))
    assert torch.autograd.gradcheck(seeded, (shared, x))
    assert torch.autograd.gradcheck(seeded, (x,))


def test_no_dropout_is_no_change() -> None:
    x = torch.randn(1, 4, 3)
    assert dropped(x, 0.0) is x
    assert torch.equal(add_dropped(x, x, 0.0), x + x)


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@pytest.mark.parametrize("shared", [True, False])
def test_a_members_masks_are_the_same_whoever_is_beside_it(shared: bool) -> None:
    """And those who have no dropout get A x, in one product with the others or alone."""
    x = torch.randn(1 if shared else 4, 6, 5, dtype=torch.float64)
    a, other = (torch.randn(4, 3, 5, dtype=torch.float64) for _ in range(2))
    p = [0.3, 0.5, 0.0, 0.7]
    drop = MemberDropout(p, generators(4))
    some, none = lowered(x, [(a, drop), (other, None)])
    rows = x.expand(4, -1, -1)
    torch.testing.assert_close(none, rows @ other.transpose(1, 2))
    torch.testing.assert_close(some[2], rows[2] @ a[2].T)
    (alone,) = lowered(rows[3:], [(a[3:], MemberDropout([0.7], generators(4)[3:]))])
    torch.testing.assert_close(some[3], alone[0])
    (pair,) = lowered(x if shared else x[1:3], [(a[1:3], MemberDropout(p, generators(4)).of(slice(1, 3)))])
    torch.testing.assert_close(pair, some[1:3])
    for row in (0, 1, 3):  # by hand, from masks that are 0 or 1 / (1 - p)
        (mask,) = MemberDropout(p, generators(4))(torch.ones(1, 6, 5, dtype=torch.float64), [row])
        assert sorted(mask.unique().tolist()) == pytest.approx([0, 1 / (1 - p[row])], rel=2e-4)
        torch.testing.assert_close(some[row], (rows[row] * mask) @ a[row].T)
