"""A pool that was written before the package had rooms: all three kinds, with epochs, test logits and weights."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from lora_ensemble.dicor.cli import main as dicor
from lora_ensemble.pool import ADAPTER, TaskPool, epochs_file, read_array, read_tensors, task_names

HERE = Path(__file__).parent
NUMBER = r"[+-]?\d+\.\d+"


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    shutil.unpack_archive(HERE / "pool_of_0.1.0.zip", tmp_path / "pool")
    return tmp_path / "pool"


def test_it_is_read(pool: Path) -> None:
    assert task_names(pool) == ["mood", "price", "same"]
    for task, kind, outputs in (("mood", "multiclass", 3), ("price", "regression", 1), ("same", "binary", 1)):
        for split, n in (("dev", 16), ("test", 4)):
            opened = TaskPool(pool, task, split=split)
            assert opened.kind == kind
            assert [r.name for r in opened.members] == ["head-lr1e-3-s1", "r2-c1-qv-lr1e-4-s1", "r4-c0.5-qv-lr1e-4-s1"]
            assert len(opened.examples().ids) == n
            assert (opened.examples().labels is None) == (split == "test")
            assert {opened.logits(r.name).shape for r in opened.members} == {(n, outputs)}
        head, lora, _ = opened.members
        assert (head.rank, head.scaling, head.targets) == (None, None, None)
        assert (lora.rank, lora.scaling, lora.targets, lora.lr, lora.seed) == (2, 1.0, "qv", 1e-4, 1)
        epochs = read_array(pool, lora, epochs_file("dev"))
        assert (epochs.shape, epochs.dtype) == ((2, 16, outputs), np.float16)
    weights = read_tensors(pool, lora, ADAPTER)
    assert weights["base_model.model.classifier.weight"].tolist() == [[0.0, 1.0]]


def test_all_ways_to_choose_from_it_come_out_as_then(
    pool: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Word for word; numbers to 0.02, since another processor rounds differently."""
    monkeypatch.chdir(pool.parent)
    assert dicor(["compare", "--pool", "pool"]) == 0
    texts = capsys.readouterr().out, (HERE / "compare_of_0.1.0.txt").read_text(encoding="utf-8")
    now, then = (re.sub(r" +$", "", text, flags=re.MULTILINE) for text in texts)
    assert re.sub(NUMBER, "#", now) == re.sub(NUMBER, "#", then)
    numbers = [np.array(re.findall(NUMBER, text), float) for text in (now, then)]
    np.testing.assert_allclose(*numbers, rtol=0, atol=0.02)
    assert len(numbers[0]) > 100
