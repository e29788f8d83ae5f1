"""bf16 only where the device multiplies it itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import Program
from trained_pool import texts_of, write_pool

from lora_ensemble.bank.encode import bf16_advice, computes_bf16
from lora_ensemble.dicor.cli import main as dicor
from lora_ensemble.main import main

OLD, NEW = {"avx2": True, "avx512_bf16": False, "amx_bf16": False}, {"avx2": True, "avx512_bf16": True}


@pytest.fixture
def program(tmp_path: Path, tiny: Callable[[str], Path], demo_root: Path) -> Program:
    return Program(tmp_path, tiny("bert"), demo_root)


def processor(monkeypatch: pytest.MonkeyPatch, has: dict[str, bool]) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)


@pytest.mark.parametrize(
    ("has", "system", "expected"),
    [
        (OLD, "linux", False),
        (NEW, "linux", True),
        ({"amx_bf16": True}, "win32", True),
        ({"avx10_2": True}, "linux", True),
        ({"avx512_f": True}, "linux", False),  # before Cooper Lake
        ({"neon": True, "bf16": True}, "linux", True),
        ({"neon": True, "bf16": True}, "darwin", False),
        ({}, "linux", False),
    ],
)
def test_processors(monkeypatch: pytest.MonkeyPatch, has: dict[str, bool], system: str, expected: bool) -> None:
    processor(monkeypatch, has)
    monkeypatch.setattr("sys.platform", system)
    assert computes_bf16("cpu") is expected


def test_a_torch_that_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not computes_bf16("cpu")


@pytest.mark.parametrize("own", [True, False])
def test_gpus(monkeypatch: pytest.MonkeyPatch, own: bool) -> None:
    """torch also says yes where it emulates bf16, unless it is asked not to."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or own)
    assert computes_bf16("cuda") is own
    assert not computes_bf16("mps")


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "bf16"])
def test_who_asks_for_it_all_the_same_is_told(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    processor(monkeypatch, OLD)
    assert "use --precision 32" in (bf16_advice(precision, "cpu", instead="--precision 32") or "")
    processor(monkeypatch, NEW)
    assert bf16_advice(precision, "cpu", instead="") is None


@pytest.mark.parametrize("precision", ["32-true", 32, "32", "64-true", None])
def test_nothing_is_said_of_other_precisions(monkeypatch: pytest.MonkeyPatch, precision: Any) -> None:
    processor(monkeypatch, OLD)
    assert bf16_advice(precision, "cpu", instead="") is None


@pytest.mark.parametrize("has", [OLD, NEW])
def test_infer_and_serve_say_it(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tiny: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    has: dict[str, bool],
) -> None:
    processor(monkeypatch, has)
    write_pool(tmp_path / "pool", tiny("bert"), "multiclass")
    record, source = tmp_path / "dicor.json", tmp_path / "in.txt"
    assert dicor(["select", "--pool", str(tmp_path / "pool"), "--task", "mine", "--output", str(record)]) == 0
    source.write_text("\n".join(texts_of(3, 1)))
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: None)
    capsys.readouterr()
    for command in (["infer", "--input", str(source), "--output", "-"], ["serve", "--port", "0"]):
        for precision, told in (("bf16", has is OLD), ("32", False)):
            arguments = ["--ensemble", str(record), "--device", "cpu", "--precision", precision]
            assert main([*command, *arguments]) == 0
            assert ("many times slower" in capsys.readouterr().err) is told


@pytest.mark.parametrize("has", [OLD, NEW])
def test_fit_says_it_and_does_as_it_is_told(
    monkeypatch: pytest.MonkeyPatch, program: Program, capsys: pytest.CaptureFixture[str], has: dict[str, bool]
) -> None:
    processor(monkeypatch, has)
    assert program("fit", "--trainer.precision=bf16-mixed", "--trainer.fast_dev_run=true") == 0
    said = "note: cpu has no bf16 of its own here" in capsys.readouterr().out
    assert said is (has is OLD)


@pytest.mark.parametrize(("has", "expected"), [(OLD, "32-true"), (NEW, "bf16-mixed")])
def test_a_reproduction_takes_the_fast_one(
    monkeypatch: pytest.MonkeyPatch,
    program: Program,
    capsys: pytest.CaptureFixture[str],
    has: dict[str, bool],
    expected: str,
) -> None:
    processor(monkeypatch, has)
    arguments = ["reproduce", "oyeniyi", f"--data.root={program.root}", f"--base_model={program.base}", "--plan"]
    arguments += ["--accelerator=cpu"]
    assert main(arguments) == 0
    assert f", {expected} on " in capsys.readouterr().out
    assert main([*arguments, "--precision=64-true"]) == 0
    assert ", 64-true on " in capsys.readouterr().out
