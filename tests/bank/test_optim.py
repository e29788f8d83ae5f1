"""BankAdamW and clip_rows against torch's own, row by row."""

from __future__ import annotations

import pytest
import torch

from lora_ensemble.bank.optim import BankAdamW, clip_rows


def gradients(steps: int, m: int = 3, p: int = 17) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(m, p, generator=g, dtype=torch.float64) for _ in range(steps)]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_each_row_is_torchs_adamw(decay: float) -> None:
    rates = [1e-3, 1e-6, 0.5]
    start = torch.randn(3, 17, dtype=torch.float64)
    ours = torch.nn.Parameter(start.clone())
    bank = BankAdamW(ours, rates, weight_decay=decay)
    theirs = [torch.nn.Parameter(row.clone()) for row in start]
    peers = [torch.optim.AdamW([p], lr=r, weight_decay=decay) for p, r in zip(theirs, rates, strict=True)]
    for g in gradients(50):
        ours.grad = g.clone()
        bank.step()
        for parameter, peer, row in zip(theirs, peers, g, strict=True):
            parameter.grad = row.clone()
            peer.step()
    torch.testing.assert_close(ours.detach(), torch.stack([p.detach() for p in theirs]), rtol=1e-12, atol=1e-13)
    assert float((ours.detach() - start).abs().min()) > 0


def test_rates_of_columns_and_decays_of_rows_are_torchs_groups() -> None:
    """With a schedule, whose factor multiplies both rates."""
    rates, others, decays = [1e-3, 1e-2, 1e-2], [1e-2, 1e-2, 0.3], [0.1, 0.0, 0.5]
    apart = torch.arange(17) % 3 == 0
    start = torch.randn(3, 17, dtype=torch.float64)
    ours = torch.nn.Parameter(start.clone())
    bank = BankAdamW(ours, rates, weight_decay=decays, apart=(others, apart))
    peers, theirs = [], []
    for row, lr, other, decay in zip(start, rates, others, decays, strict=True):
        parts = [torch.nn.Parameter(row[where].clone()) for where in (~apart, apart)]
        groups = [{"params": [part], "lr": of} for part, of in zip(parts, (lr, other), strict=True)]
        peers.append(torch.optim.AdamW(groups, weight_decay=decay))
        theirs.append(parts)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (bank, *peers)]
    for g in gradients(50):
        ours.grad = g.clone()
        bank.step()
        for parts, peer, row in zip(theirs, peers, g, strict=True):
            for part, where in zip(parts, (~apart, apart), strict=True):
                part.grad = row[where].clone()
            peer.step()
        for schedule in schedules:
            schedule.step()
    for where, place in ((~apart, 0), (apart, 1)):
        expected = torch.stack([parts[place].detach() for parts in theirs])
        torch.testing.assert_close(ours.detach()[:, where], expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_decay_of_each_row_that_is_one_for_all_gives_the_same_bits(dtype: torch.dtype) -> None:
    ends = []
    for decay in (0.1, [0.1] * 3):
        weights = torch.nn.Parameter(torch.ones(3, 17, dtype=dtype))
        bank = BankAdamW(weights, [0.1, 0.2, 0.3], weight_decay=decay)
        for g in gradients(5):
            weights.grad = g.to(dtype)
            bank.step()
        ends.append(weights.detach())
    assert torch.equal(*ends)


def test_schedule_scales_every_rate() -> None:
    ours = torch.nn.Parameter(torch.ones(2, 1, dtype=torch.float64))
    bank = BankAdamW(ours, [0.1, 0.2])
    scheduler = torch.optim.lr_scheduler.LambdaLR(bank, lambda step: [1.0, 0.5][step])
    for _ in range(2):
        ours.grad = torch.ones(2, 1, dtype=torch.float64)
        bank.step()
        if scheduler.last_epoch == 0:
            scheduler.step()
    # A constant gradient makes every AdamW step the size of its rate: 0.1 · (1 + 0.5) and 0.2 · (1 + 0.5).
    torch.testing.assert_close(ours[:, 0].detach(), torch.tensor([0.85, 0.7], dtype=torch.float64), rtol=0, atol=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_frozen_for_good(bad: float) -> None:
    def run(poison: bool) -> tuple[torch.Tensor, list[bool]]:
        weights = torch.nn.Parameter(torch.ones(3, 17, dtype=torch.float64))
        bank = BankAdamW(weights, [0.1, 0.1, 0.1], weight_decay=0.1)
        for step, g in enumerate(gradients(6)):
            if poison and step == 3:
                before = weights[1].detach().clone()
                g[1, 5] = bad
            weights.grad = g
            bank.step()
        if poison:
            assert torch.equal(weights[1].detach(), before)
        return weights.detach(), bank.alive.tolist()

    (healthy, all_alive), (sick, alive) = run(False), run(True)
    assert all_alive == [True, True, True]
    assert alive == [True, False, True]
    assert torch.equal(healthy[[0, 2]], sick[[0, 2]])


def test_state_survives_saving(tmp_path: object) -> None:
    """With weights_only=True, and a dead row stays dead."""
    from pathlib import Path

    assert isinstance(tmp_path, Path)
    weights = torch.nn.Parameter(torch.ones(3, 17, dtype=torch.float64))
    bank = BankAdamW(weights, [0.1] * 3)
    g = gradients(1)[0]
    g[2] = float("nan")
    weights.grad = g
    bank.step()
    torch.save(bank.state_dict(), tmp_path / "o.pt")
    other = torch.nn.Parameter(weights.detach().clone())
    again = BankAdamW(other, [0.1] * 3)
    again.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))
    assert again.alive.tolist() == [True, True, False]
    weights.grad, other.grad = gradients(2)[1], gradients(2)[1]
    bank.step()
    again.step()
    assert torch.equal(weights, other)


@pytest.mark.parametrize("function", ["where", "empty_like", "zeros_like"])
def test_a_step_that_runs_out_of_memory_can_be_done_again(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    """Whichever allocation fails, nothing has changed: the next try gives what an undisturbed run has."""

    def refuse(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    ends = []
    for failing in (False, True):
        weights = torch.nn.Parameter(torch.ones(3, 17, dtype=torch.float64))
        bank = BankAdamW(weights, [0.1] * 3, weight_decay=0.1)
        for step, g in enumerate(gradients(3)):
            weights.grad = g.clone()
            if failing and step == (0 if function == "zeros_like" else 2):
                with monkeypatch.context() as patch:
                    patch.setattr(torch, function, refuse)
                    with pytest.raises(torch.OutOfMemoryError):
                        bank.step()
            bank.step()
        ends.append((weights.detach(), bank.state_dict()["state"][0]))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1]["step"] == ends[1][1]["step"] == 3
    assert all(torch.equal(ends[0][1][n], ends[1][1][n]) for n in ("exp_avg", "exp_avg_sq", "alive"))


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_is_torchs_for_each_row(algorithm: str) -> None:
    g = gradients(1)[0] * torch.tensor([[0.01], [1.0], [1e5]], dtype=torch.float64)
    expected = []
    for row in g.clone():
        parameter = torch.nn.Parameter(torch.zeros_like(row))
        parameter.grad = row.clone()
        if algorithm == "norm":
            torch.nn.utils.clip_grad_norm_([parameter], 0.5)
        else:
            torch.nn.utils.clip_grad_value_([parameter], 0.5)
        expected.append(parameter.grad)
    clip_rows(g, 0.5, algorithm)
    torch.testing.assert_close(g, torch.stack(expected), rtol=1e-12, atol=0)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_clipping_makes_no_infinite_gradient_finite(algorithm: str, bad: float) -> None:
    """The member is frozen, as without clipping, and the others are clipped as ever."""
    weights = torch.nn.Parameter(torch.zeros(3, 17, dtype=torch.float64))
    weights.grad, expected = gradients(1)[0], gradients(1)[0]
    weights.grad[1, 5] = bad
    clip_rows(weights.grad, 0.5, algorithm)
    clip_rows(expected, 0.5, algorithm)
    assert torch.equal(weights.grad[[0, 2]], expected[[0, 2]])
    bank = BankAdamW(weights, [1e-3] * 3)
    bank.step()
    assert bank.alive.tolist() == [True, False, True]
    assert weights[1].abs().sum() == 0
