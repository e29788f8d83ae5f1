"""What a sweep says of how far it is, worked out by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from lora_ensemble.tasks import PRESETS
from lora_ensemble.train.runs.plan import Finished, Plan, PlannedBank
from lora_ensemble.train.runs.progress import SweepProgress, best_of, duration

SST, STS = PRESETS["sst"], PRESETS["sts"]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (89.4, "89 s"),
        (90, "2 min"),
        (59 * 60, "59 min"),
        (59.6 * 60, "1 h 0 min"),
        (11_100, "3 h 5 min"),
        (100_000, "27 h 47 min"),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_the_best_row() -> None:
    assert best_of([["a", 1, 0.3], ["b", 2, 0.5], ["c", 1, 0.4]], [SST]) == (0.5, "b")
    assert best_of([["a", 1, 0.5], ["b", 2, 0.5]], [SST]) == (0.5, "a")  # the first of equals
    assert best_of([["a", "diverged", math.nan], ["b", 1, None]], [SST]) == (-math.inf, "")
    # Two tasks: the mean of 0.4 and (0.2 + 1) / 2, of 0.3 and (0.6 + 1) / 2.
    rows = [["a", 1, 0.4, 0.2], ["b", 1, 0.3, 0.6], ["c", 1, 0.9, math.nan]]
    value, name = best_of(rows, [SST, STS])
    assert (value, name) == (pytest.approx(0.55), "b")


def stand_in(epoch: int, batch: int, *, most: int | None, sanity: bool = False) -> Any:
    """A Trainer that has ``batch`` of 10 batches of an epoch behind it."""
    current = SimpleNamespace(current=SimpleNamespace(ready=batch))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=current))
    return SimpleNamespace(
        max_epochs=most, current_epoch=epoch, num_training_batches=10, fit_loop=loop, sanity_checking=sanity
    )


def finished(*names: str) -> Finished:
    rows: list[list[Any]] = [[name, 1, 0.25 + i / 8] for i, name in enumerate(names)]
    return Finished(max_epochs=4, max_steps=-1, header=[], rows=rows)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr("lora_ensemble.train.runs.progress.time.monotonic", lambda: now[0])
    return now


def test_the_table_and_the_time_left(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """A bank of two, resumed after one of four epochs, has done half an epoch more in 100 seconds.

    That is 100 seconds for a member's epoch. Left are 2 × 2.5 epochs here and 3 × 4 in the bank that waits: 1,700 s.
    """
    bank = PlannedBank(members=["c", "d"])
    banks = [PlannedBank(members=["a", "b"], finished=finished("a", "b")), bank, PlannedBank(members=["e", "f", "g"])]
    plan = Plan(banks=banks, kept=["h"], left={"i": 1})
    writer: Any = SimpleNamespace(history=SimpleNamespace(summary=lambda: [["c", 1, 0.5], ["d", 1, 0.25]]))
    progress = SweepProgress(plan, bank, writer, [SST])
    clock[0] += 50  # loading counts for nothing
    progress.on_train_start(stand_in(1, 0, most=4), None)  # type: ignore[arg-type]
    clock[0] += 100
    progress.on_validation_end(stand_in(1, 5, most=4, sanity=True), None)  # type: ignore[arg-type]
    assert capsys.readouterr().out == ""
    progress.on_validation_end(stand_in(1, 5, most=4), None)  # type: ignore[arg-type]
    *table, said = capsys.readouterr().out.splitlines()
    assert [line.split() for line in table if line[:1].isdigit()] == [
        ["1", "2", "done", "b", "0.3750"],
        ["2", "2", "1.5/4", "c", "0.5000"],
        ["3", "3", "waits"],
    ]
    assert said == "3 of 9 members finished; best so far c 0.5000; 2 min in this bank, about 28 min left"
    progress.on_validation_end(stand_in(1, 5, most=None), None)  # type: ignore[arg-type]
    assert capsys.readouterr().out.endswith("2 min in this bank\n")  # without an end nothing is known of the rest


def test_of_many_banks_those_around_the_one_that_trains_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    banks = [PlannedBank(members=[f"m{i}"]) for i in range(20)]
    writer: Any = SimpleNamespace(history=SimpleNamespace(summary=lambda: [["m9", 1, math.nan]]))
    SweepProgress(Plan(banks=banks), banks[9], writer, [SST]).on_validation_end(stand_in(0, 5, most=1), None)  # type: ignore[arg-type]
    *table, said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table if line[:1].isdigit()] == [str(n) for n in range(7, 15)]
    assert said.startswith("0 of 20 members finished; ")  # no score yet, no best
