"""What is frozen is computed once: which runs share it, which do not, and what happens where it cannot be kept."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_encode import split_of
from test_model import bank_of

from lora_ensemble.bank.lora import Member
from lora_ensemble.bank.model import Bank
from lora_ensemble.train import frozen
from lora_ensemble.train.batches import TokenisedSplit
from lora_ensemble.train.frozen import FrozenStates

BASE = {"weights": "aa", "tokenizer": "bb"}
SPLIT = split_of(50)
ROWS = np.array([7, 3, 40, 0])


@pytest.fixture
def bank(tiny: Callable[[str], Path]) -> Bank:
    return bank_of(tiny("bert"), Member(rank=2, layers=[1]), Member(targets="none"))


def computed(bank: Bank, kept: FrozenStates, split: TokenisedSplit = SPLIT) -> list[int]:
    """How many examples each pass of the encoder had that was needed for an answer."""
    original, passes = bank.frozen_states, []

    def counted(batch: Any) -> Any:
        passes.append(batch["examples"])
        return original(batch)

    bank.frozen_states = counted  # type: ignore[method-assign]
    try:
        kept(split, ROWS)
    finally:
        bank.frozen_states = original  # type: ignore[method-assign]
    return passes


def test_two_runs_share_it(bank: Bank, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Bit for bit; and it is what the encoder gives those examples by themselves, but for rounding."""
    first = FrozenStates(bank, BASE, tmp_path, most=2**30)(SPLIT, ROWS)
    another = bank_of(tiny("bert"), Member(rank=3, layers=[1], seed=9), Member(targets="none", seed=8))
    kept = FrozenStates(another, BASE, tmp_path, most=2**30)
    assert computed(another, kept) == []
    again, wanted = kept(SPLIT, ROWS), another.frozen_states(SPLIT.batch(ROWS))
    assert first is not None
    assert again is not None
    tokens = int(SPLIT.lengths[ROWS].sum())
    for layer, end in ((1, tokens), (2, len(ROWS))):
        assert torch.equal(first[layer], again[layer])
        torch.testing.assert_close(again[layer][:, :end], wanted[layer][:, :end], rtol=0, atol=1e-6)
    assert tokens % 8
    assert not again[1][:, tokens:].any()


def test_only_blocks_that_are_asked_for_are_computed(bank: Bank, tmp_path: Path) -> None:
    kept = FrozenStates(bank, BASE, tmp_path, most=2**30)
    order = np.argsort(SPLIT.lengths, kind="stable").tolist()
    blocks = {order.index(row) // 8 for row in ROWS}
    assert computed(bank, kept) == [2 if block == 6 else 8 for block in sorted(blocks)]
    assert computed(bank, kept) == []


@pytest.mark.parametrize("what", ["tokens", "length", "base", "precision"])
def test_what_decides_it_misses_it(bank: Bank, tmp_path: Path, what: str) -> None:
    assert computed(bank, FrozenStates(bank, BASE, tmp_path, most=2**30))
    split, base = SPLIT, BASE
    if what == "tokens":
        split = split_of(50, seed=1)
    elif what == "length":
        split = split_of(50, max_length=6)
    elif what == "base":
        base = BASE | {"weights": "cc"}
    with torch.autocast("cpu", torch.bfloat16, enabled=what == "precision"):
        assert computed(bank, FrozenStates(bank, base, tmp_path, most=2**30), split)
    assert computed(bank, FrozenStates(bank, BASE, tmp_path, most=2**30)) == []


def test_a_length_that_cuts_nothing_shares_it(bank: Bank, tmp_path: Path) -> None:
    assert computed(bank, FrozenStates(bank, BASE, tmp_path, most=2**30))
    assert computed(bank, FrozenStates(bank, BASE, tmp_path, most=2**30), split_of(50, max_length=40)) == []


@pytest.mark.parametrize("damage", ["states cut off", "states changed", "no checksum", "checksum cut off"])
def test_a_write_that_was_cut_off_is_not_read(bank: Bank, tmp_path: Path, damage: str) -> None:
    right = FrozenStates(bank, BASE, tmp_path, most=2**30)(SPLIT, ROWS)
    for folder in tmp_path.iterdir():
        name, change = damage.split(" ", 1)
        file = folder / {"states": "states", "no": "checksums", "checksum": "checksums"}[name]
        content = bytearray(file.read_bytes())
        if change == "cut off":
            del content[1:]
        else:
            content[:] = bytes(len(content)) if name == "no" else bytes(b ^ 1 for b in content)
        file.write_bytes(content)
    kept = FrozenStates(bank, BASE, tmp_path, most=2**30)
    assert computed(bank, kept)
    again = kept(SPLIT, ROWS)
    assert right is not None
    assert again is not None
    assert all(torch.equal(right[layer], again[layer]) for layer in right)


def test_a_full_disk_is_said_and_costs_nothing_else(
    bank: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(frozen, "_write_at", full)
    kept = FrozenStates(bank, BASE, tmp_path, most=2**30)
    assert kept(SPLIT, ROWS) is None
    assert kept(SPLIT, ROWS[:2]) is None
    assert capsys.readouterr().out == (
        f"{tmp_path}: No space left on device: what is frozen cannot be kept there, and is computed in each step\n"
    )


def test_no_room(
    bank: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """More than was allowed, or than half of what the disk has free: a line, and no file."""
    assert FrozenStates(bank, BASE, tmp_path, most=1000)(SPLIT, ROWS) is None
    size = SPLIT.lengths.sum() * 32 * 4 / 2**20
    said = f"below layer 1: {size:.1f} MiB of 50 examples cannot be kept in {tmp_path} (no room; model.frozen_cache)"
    assert capsys.readouterr().out.startswith(said)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert FrozenStates(bank, BASE, tmp_path, most=2**30)(SPLIT, ROWS) is None
    assert list(tmp_path.iterdir()) == []


def test_the_oldest_make_room(bank: Bank, tmp_path: Path) -> None:
    """The last to be used stay; what is in use goes on."""
    kept = {}
    for seed in (0, 1, 2):
        split = split_of(50, seed=seed)
        kept[seed] = FrozenStates(bank, BASE, tmp_path, most=2**30)
        kept[seed](split, np.arange(50))
        for folder in tmp_path.iterdir():  # a file system's clock may be coarse
            os.utime(folder, ns=(0, folder.stat().st_mtime_ns - 10**10))
    assert len(list(tmp_path.iterdir())) == 6
    most = 4 * int(SPLIT.lengths.sum()) * 32 * 4
    assert computed(bank, FrozenStates(bank, BASE, tmp_path, most=most), split_of(50, seed=3))
    assert len(list(tmp_path.iterdir())) < 8
    assert computed(bank, FrozenStates(bank, BASE, tmp_path, most=2**30), split_of(50, seed=2)) == []
    assert computed(bank, FrozenStates(bank, BASE, tmp_path, most=2**30), split_of(50, seed=0))


def test_what_is_in_use_makes_no_room(bank: Bank, tmp_path: Path) -> None:
    """Two splits of one run of which only one has room: the first stays, the second is computed in each step."""
    most = 1.5 * int(SPLIT.lengths.sum()) * 32 * 4
    kept = FrozenStates(bank, BASE, tmp_path, most)
    assert kept(SPLIT, ROWS) is not None
    assert kept(split_of(50, seed=1), ROWS) is None
    assert computed(bank, kept) == []
    assert computed(bank, FrozenStates(bank, BASE, tmp_path, most)) == []
