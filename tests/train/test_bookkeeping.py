"""What a run does besides training grows with its members, not with their square: counted, not timed."""

from __future__ import annotations

import importlib.metadata
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_cli import Program

from lora_ensemble import pool
from lora_ensemble.pool import contract, swap


def counts(program: Program, members: int, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often ``fit`` with so many heads does what costs something."""
    found: Counter[str] = Counter()

    def counted(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kw: Any) -> Any:
            found[name] += 1
            return original(*args, **kw)

        patch.setattr(owner, name, call)

    with monkeypatch.context() as patch:
        counted(pool.MemberRecord, "__init__")
        counted(importlib.metadata, "distribution")
        counted(pool, "examples_fingerprint")
        counted(contract, "examples_fingerprint")
        counted(swap, "_mend")
        counted(os, "fsync")
        heads = f"[{{targets: none, lr: 1e-2, seed: {list(range(members))}}}]"
        assert program("fit", members=heads) == 0
    assert len(pool.TaskPool(program.pool, "sst").members) == members
    return found


def test_bookkeeping_grows_linearly(
    tmp_path: Path, tiny: Callable[[str], Path], demo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, many, more = (counts(Program(tmp_path / str(m), tiny("bert"), demo_root), m, monkeypatch) for m in (4, 8, 16))
    for name in few:
        # With one evaluation more or less that improves, a member is written once more: less than twice as often.
        assert more[name] - few[name] <= 2 * 12 * (many[name] / 8 + 1), (name, few, many, more)
    assert more["fingerprint"] == few["fingerprint"] <= 6
    assert more["distribution"] <= few["distribution"]  # looked up once
    assert more["_mend"] <= few["_mend"] + 1  # it lists the folder: once an evaluation, not once a member
