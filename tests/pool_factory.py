"""Pools for the tests, written with the package's own writer; members are made of numbers, nothing is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_ensemble.pool import MemberRecord, write_examples, write_member
from lora_ensemble.tasks import Kind

LABELS: dict[Kind, list[str]] = {
    "multiclass": ["0", "1", "2", "3", "4"],
    "binary": ["0", "1"],
    "regression": [],
}


def random_labels(kind: Kind, n: int, *, seed: int = 0) -> np.ndarray:
    """(N,) labels of a kind."""
    rng = np.random.default_rng(seed)
    return rng.uniform(0, 5, n) if kind == "regression" else rng.integers(len(LABELS[kind]), size=n)


def random_logits(kind: Kind, labels: np.ndarray, members: int, *, seed: int = 0, noise: float = 1.0) -> np.ndarray:
    """(M, N, C) float32 logits that know the labels (N,) but for noise, which grows with the member's number."""
    rng = np.random.default_rng(seed)
    if kind == "multiclass":
        known = np.eye(len(LABELS[kind]))[labels]
    else:
        known = (labels * 2.0 - 1 if kind == "binary" else labels)[:, None]
    growing = noise * np.linspace(0.5, 1.5, members)[:, None, None]
    return (known + growing * rng.normal(size=(members, *known.shape))).astype(np.float32)


def add_member(
    pool: Path,
    task: str,
    kind: Kind,
    name: str,
    logits: Mapping[str, np.ndarray],
    ids: Mapping[str, Sequence[str]],
    truth: Mapping[str, np.ndarray | None],
    **record: Any,
) -> MemberRecord:
    """Write a member with logits (N, C) of some splits, and those splits' ids and, where known, true labels."""
    prints = {split: write_examples(pool, task, split, np.asarray(ids[split]), truth.get(split)) for split in logits}
    record = {"finished": True, "labels": LABELS[kind], "examples": prints, **record}
    return write_member(
        pool,
        MemberRecord(name=name, task=task, kind=kind, **record),
        {f"{split}.logits.npy": np.asarray(array, np.float32) for split, array in logits.items()},
    )


def make_pool(
    pool: Path, task: str, kind: Kind, *, members: int = 6, n: int = 60, seed: int = 0, noise: float = 1.0
) -> Path:
    """A pool of members ``m00``, ``m01``, ... with labelled dev and unlabelled test logits; m00 has no rank."""
    dev, test = random_labels(kind, n, seed=seed), random_labels(kind, n // 2, seed=seed + 1)
    logits = {
        "dev": random_logits(kind, dev, members, seed=seed + 2, noise=noise),
        "test": random_logits(kind, test, members, seed=seed + 3, noise=noise),
    }
    ids = {"dev": [f"dev{i}" for i in range(n)], "test": [f"test{i}" for i in range(n // 2)]}
    for m in range(members):
        lora = {"rank": 4 + m % 13, "scaling": float(1 + m % 3), "targets": "qv"} if m else {}
        add_member(
            pool,
            task,
            kind,
            f"m{m:02d}",
            {split: array[m] for split, array in logits.items()},
            ids,
            {"dev": dev, "test": None},
            **lora,
        )
    return pool
