"""Pools for the tests, written with the package's own writer; members are made of numbers, nothing is trained."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_ensemble.errors import UserError
from lora_ensemble.pool import MemberRecord, TaskPool, write_examples, write_member
from lora_ensemble.tasks import Kind

LABELS: dict[Kind, list[str]] = {
    "multiclass": ["0", "1", "2", "3", "4"],
    "binary": ["0", "1"],
    "multilabel": ["rain", "snow", "wind"],
    "regression": [],
}


def random_labels(kind: Kind, n: int, *, seed: int = 0) -> np.ndarray:
    """(N,) labels of a kind; of several (N, L)."""
    rng = np.random.default_rng(seed)
    if kind == "multilabel":
        return (rng.random((n, 3)) < (0.2, 0.4, 0.6)).astype(np.int64)
    return rng.uniform(0, 5, n) if kind == "regression" else rng.integers(len(LABELS[kind]), size=n)


def random_logits(kind: Kind, labels: np.ndarray, members: int, *, seed: int = 0, noise: float = 1.0) -> np.ndarray:
    """(M, N, C) float32 logits that know the labels (N,) but for noise, which grows with the member's number."""
    rng = np.random.default_rng(seed)
    if kind == "multiclass":
        known = np.eye(len(LABELS[kind]))[labels]
    elif kind == "multilabel":
        known = labels * 2.0 - 1
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


# One binary task by hand, and what is done to it

IDS = ["a", "b", "c", "d"]
TRUTH = np.array([0, 1, 1, 0])
LOGITS = np.array([[-1.5], [2.0], [0.25], [-3.0]], np.float32)  # (N, C)


def two_members(pool: Path) -> Path:
    """One binary task, ``quora``, with two finished members, ``m0`` and ``m1``, who contradict each other."""
    for name, sign in (("m0", 1), ("m1", -1)):
        add_member(pool, "quora", "binary", name, {"dev": sign * LOGITS}, {"dev": IDS}, {"dev": TRUTH})
    return pool


def edit(pool: Path, member: str, /, **changes: object) -> Path:
    """Change keys of a member.json by hand; a key set to ``...`` is removed."""
    path = pool / "quora" / member / "member.json"
    raw = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
    return path


def sha256(path: Path) -> str:
    return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()


def put(pool: Path, name: str, array: np.ndarray, file: str = "dev.logits.npy") -> Path:
    """Another array and the checksum that goes with it: not tampered with, but wrong."""
    path = pool / "quora" / name / file
    np.save(path, array)
    return sign(pool, name, path)


def sign(pool: Path, name: str, path: Path) -> Path:
    files = json.loads((path.parent / "member.json").read_text())["files"]
    edit(pool, name, files={**files, path.name: sha256(path)})
    return path


def refused(*says: object) -> pytest.RaisesExc[UserError]:
    """Exactly one line that holds all of ``says``, in order."""
    return pytest.raises(UserError, match="(?s)^[^\n]*" + "[^\n]*".join(re.escape(str(s)) for s in says) + "[^\n]*$")


def open_and_read(pool: Path) -> None:
    opened = TaskPool(pool, "quora")
    opened.examples()
    for record in opened.members:
        opened.logits(record.name)
