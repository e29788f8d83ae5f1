"""The comparison with PEFT runs anywhere, and its check of sameness can fail. What it measures is not judged here."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))


SMALL = "--task random --device cpu --threads 1 --base_model random:tiny --steps 2 --warmup_steps 1 --repeats 1"
COMMAND = [*SMALL.split(), "--members", "1", "2", "--check_steps", "2"]


def here(function: Callable[..., Any], *arguments: Any, seconds: float | None = None) -> Any:
    """In place of ``in_fresh_process``: a process for each side is what takes long."""
    return function(*arguments)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    """What a small run printed, and what it wrote down."""
    import bank
    import sameness

    file = tmp_path_factory.mktemp("benchmark") / "bank.json"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), contextlib.redirect_stdout(printed):
        warnings.simplefilter("ignore")  # the peers'
        patch.setattr(bank, "in_fresh_process", here)
        patch.setattr(sameness, "in_fresh_process", here)
        assert bank.main([*COMMAND, f"--json={file}"]) == 0
    return printed.getvalue(), json.loads(file.read_text())


@pytest.mark.slow
def test_the_program_itself(tmp_path: Path) -> None:
    """With a process for each side."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "benchmarks/bank.py", *COMMAND, f"--markdown={tmp_path / 'bank.md'}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| bank | 2 |" in (tmp_path / "bank.md").read_text()


def test_every_side_has_a_row(comparison: tuple[str, dict]) -> None:
    printed, _ = comparison
    rows = [line.split(" | ")[:2] for line in printed.splitlines() if line.startswith("| ")][2:]
    assert rows == [["| PEFT + Trainer", "1"], ["| PEFT in a loop", "1"], ["| bank", "1"], ["| bank", "2"]]


def test_sameness_was_checked(comparison: tuple[str, dict]) -> None:
    printed, record = comparison
    (found,) = record["comparisons"][0]["sameness"]
    assert found["agrees"]
    assert found["members"] == 3
    # Not two runs of one program: they round differently. And the same check sees a wrong scaling.
    assert 0 < found["difference"] < 1e-3 < found["control"]
    assert "tolerance 0.001" in printed
    assert "the same model" in printed


def test_the_record_holds_what_was_measured(comparison: tuple[str, dict]) -> None:
    _, record = comparison
    (found,) = record["comparisons"]
    assert found["sides"][0]["ratios"] == [1.0]
    assert all(len(side["seconds"]) == 1 and side["seconds"][0] > 0 for side in found["sides"])
    assert found["real_tokens"] > 2 * 8 * 4  # SST's shortest sentence has four tokens
    assert str(REPOSITORY.parent) not in record["command"]


@pytest.mark.parametrize(
    ("precision", "difference", "usual", "control", "agrees"),
    [
        ("32", 1e-6, math.nan, 0.1, True),
        ("32", 2e-3, math.nan, 0.1, False),  # other models
        ("32", 1e-6, math.nan, 1e-5, False),  # a check that could not tell
        ("32", math.nan, math.nan, 0.1, False),
        ("bf16", 2e-3, 1.5e-3, math.nan, True),
        ("bf16", 4e-3, 1.5e-3, math.nan, False),  # rounds more than twice as much as PEFT
        ("bf16", math.nan, 1.5e-3, math.nan, False),
    ],
)
def test_when_the_sides_are_the_same(
    precision: str, difference: float, usual: float, control: float, agrees: bool
) -> None:
    from sameness import Sameness

    assert Sameness(precision, difference, "", usual, control, 1, 1).agrees is agrees


def test_useful_flops_by_hand(tmp_path: Path) -> None:
    """The tiny model, two examples of 5 and 7 tokens, LoRA of rank 3 on query and value."""

    import workload

    parser = argparse.ArgumentParser()
    workload.add_arguments(parser)
    args = parser.parse_args(["--task", "random", "--base_model", "random:tiny", "--rank", "3", "--device", "cpu"])
    work = workload.workload(args, "random", tmp_path)
    attention, rest = workload.useful_flops(work, np.array([5, 7]))
    assert attention == 2 * 12 * 32 * (25 + 49)
    layer = 4 * 32 * 32 + 2 * 32 * 64
    assert rest == 2 * 12 * (4 * layer + 2 * 6 * 3 * 64) + 4 * 32 * 32 * 2


def test_the_pieces_are_timed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import pieces
    import workload

    # Three batches of two: 10 + 4, 2 + 6 and 5 + 5 tokens, of which 10 of 42 are padding; the last is the median.
    monkeypatch.setattr(pieces, "_BATCHES", 3)
    monkeypatch.setattr(workload, "sst_lengths", lambda count: np.array([10, 4, 2, 6, 5, 5]))
    assert pieces.main(["--members", "2", "--batch_size", "2", "--repeats", "1", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    assert "padding in batches of 2: 24% of their tokens" in printed
    assert "2 members, 16 tokens (examples of 5, 5)" in printed  # filled up to a multiple of eight
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ")][2:]
    assert [row[0].split(";")[0] for row in rows] == [
        "| dropout, float32",
        "| dropout, bf16",
        "| attention, float32, dropout 0",
        "| attention, float32, dropout 0.1",
    ]
    assert all(float(number.rstrip(" |")) > 0 for row in rows for number in row[1:])


def test_the_command_names_no_place_of_this_machine() -> None:
    from bank import command_line

    given = ["--task", "sst", "random", "--root=/home/me/data", "--json", "x.json", "--base_model", "/home/me/bert"]
    assert command_line(given) == "python benchmarks/bank.py --task sst random --base_model MODEL --root DIR"
    assert command_line(["--task", "random", "--steps", "2"]) == "python benchmarks/bank.py --task random --steps 2"


def test_bookkeeping_is_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    import trainer_overhead

    tiny = ["--task", "random", "--base_model", "random:tiny", "--threads", "1"]
    trainer_overhead.main([*tiny, "--targets", "none", "--members", "2", "--steps", "4", "--dev", "8"])
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| random")]
    task, targets, members, _, rest, share, _ = [cell.strip() for cell in row.strip("|").split("|")]
    assert (task, targets, members) == ("random", "none", "2")
    assert float(rest) > 0
    assert 0 < float(share.rstrip("%")) < 100_000
