"""``lora-ensemble infer``: every row comes back in its place, with what the ensemble decides."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trained_pool import texts_of, write_pool

from lora_ensemble import Ensemble
from lora_ensemble.dicor.cli import main as dicor
from lora_ensemble.main import main


@pytest.fixture(scope="module")
def record(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ensemble of four that reads column "one"."""
    folder = tmp_path_factory.mktemp("infer")
    write_pool(folder / "pool", tiny("bert"), "multiclass")
    file = folder / "dicor.json"
    select = ["select", "--pool", str(folder / "pool"), "--task", "mine", "--method", "omni", "--output", str(file)]
    assert dicor(select) == 0
    return file


def infer(record: Path, source: Path, target: Path, *args: str) -> int:
    return main(["infer", "--ensemble", str(record), "--input", str(source), "--output", str(target), *args])


def test_csv_in_csv_out(record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other columns stay, commas and quotes too; bad rows keep their place, and are told with their line."""
    texts = [*texts_of(6, 1), 'he said "good", twice']
    out = io.StringIO()
    csv.writer(out).writerows([["id", "one"], *([f"x{i}", text] for i, text in enumerate(texts))])
    lines = out.getvalue().splitlines()
    lines[3:3] = ["x9,too,many", "x10"]
    (tmp_path / "in.csv").write_text("\n".join(lines))
    assert infer(record, tmp_path / "in.csv", tmp_path / "out.csv", "--probabilities") == 1
    told = capsys.readouterr().err
    assert f"{tmp_path / 'in.csv'}:4: 3 fields instead of 2; no decision" in told
    assert f"{tmp_path / 'in.csv'}:5: 1 fields instead of 2; no decision" in told
    assert "9 rows, 7 answered" in told
    assert "2 could not be read" in told
    rows = list(csv.reader(io.StringIO((tmp_path / "out.csv").read_text())))
    assert rows[0] == ["id", "one", "prediction", "p_0", "p_1", "p_2", "p_3", "p_4"]
    assert rows[3:5] == [[""] * 8] * 2
    del rows[3:5]
    ensemble = Ensemble.load(record)
    assert [row[:2] for row in rows[1:]] == [[f"x{i}", text] for i, text in enumerate(texts)]
    assert [row[2] for row in rows[1:]] == ensemble.predict(texts).tolist()
    expected = ensemble.predict_proba(texts)
    assert [[float(x) for x in row[3:]] for row in rows[1:]] == [pytest.approx(p.tolist(), abs=1e-5) for p in expected]
    assert not list(tmp_path.glob(".*"))


def test_json_lines_and_another_column(record: Path, tmp_path: Path) -> None:
    texts = texts_of(5, 1)
    lines = [json.dumps({"body": text, "n": i}) for i, text in enumerate(texts)]
    (tmp_path / "in.jsonl").write_text("\n".join([*lines, "oops"]) + "\n")
    args = ("--text", "body", "--column", "stars")
    assert infer(record, tmp_path / "in.jsonl", tmp_path / "out.jsonl", *args) == 1
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    stars = Ensemble.load(record).predict(texts).tolist()
    assert rows[:5] == [{"body": t, "n": i, "stars": s} for i, (t, s) in enumerate(zip(texts, stars, strict=True))]
    assert rows[5]["error"].startswith("line 6: not JSON")


def test_a_pipe_of_lines_is_answered_as_it_comes(record: Path) -> None:
    """The answer to a line is there before the next line is."""
    command = [sys.executable, "-m", "lora_ensemble", "infer", "--ensemble", str(record), "--input", "-"]
    program = subprocess.Popen(
        [*command, "--output", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert program.stdin
    assert program.stdout
    texts = ["good film", "", "a slow story"]
    answers = []
    for text in texts:
        program.stdin.write(text + "\n")
        program.stdin.flush()
        answers.append(program.stdout.readline())
    rest, told = program.communicate()
    assert program.returncode == 0
    assert rest == ""
    one, three = Ensemble.load(record).predict([texts[0], texts[2]])
    assert answers == [f"{one}\n", "\n", f"{three}\n"]
    assert "3 rows, 2 answered" in told


def test_whoever_reads_may_stop(record: Path, tmp_path: Path) -> None:
    """``| head -1`` is no error."""
    (tmp_path / "in.txt").write_text("good\n" * 50_000)
    command = [sys.executable, "-m", "lora_ensemble", "infer", "--ensemble", str(record), "--output", "-"]
    with open(tmp_path / "err", "w") as err:
        program = subprocess.Popen(
            [*command, "--input", str(tmp_path / "in.txt")], stdout=subprocess.PIPE, stderr=err, text=True
        )
        assert program.stdout
        assert program.stdout.readline().strip() in "01234"
        program.stdout.close()
        program.wait(timeout=120)
    assert "Traceback" not in (tmp_path / "err").read_text()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_it_goes_on_and_ends_the_same(
    record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: signal.Signals
) -> None:
    lines = [f'{i},"{text}"' for i, text in enumerate(texts_of(6000, 1, longest=30))]
    (tmp_path / "in.csv").write_text("id,one\n" + "\n".join(lines))
    assert infer(record, tmp_path / "in.csv", tmp_path / "whole.csv") == 0
    target = tmp_path / "out.csv"
    command = [sys.executable, "-m", "lora_ensemble", "infer", "--ensemble", str(record)]
    program = subprocess.Popen([*command, "--input", str(tmp_path / "in.csv"), "--output", str(target)])
    while program.poll() is None and not list(tmp_path.glob(".out.csv.*.json")):
        time.sleep(0.01)
    program.send_signal(how)
    assert program.wait(timeout=60) == (130 if how == signal.SIGINT else -how)
    assert not target.exists()
    (partial,) = tmp_path.glob(".out.csv.*.partial")
    with open(partial, "ab") as f:
        f.write(b"half a li")
    capsys.readouterr()
    assert infer(record, tmp_path / "in.csv", target) == 0
    assert "going on after" in capsys.readouterr().err
    assert target.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"--input": "gone.csv"}, "gone.csv: cannot be read (No such file or directory)"),
        ({"--input": "."}, ".: cannot be read (Is a directory)"),
        ({"--output": "no/such/out.csv"}, "no/such/out.csv: cannot be written"),
        ({"--output": "."}, ".: is a folder"),
        ({"--output": "in.csv"}, "in.csv: is the input"),
        ({"--text": "two"}, "column 'two' is not there; columns found: id, one"),
        ({"--text": ["a", "b"]}, "--text: 2 columns; the ensemble reads 1 (one)"),
        ({"--text": ["a", "b", "c"]}, "--text: 3 columns; expected one, or two"),
        ({"--column": "id"}, "has a column 'id' of its own"),
        ({"--ensemble": "gone.json"}, "gone.json: No such file"),
        ({"--device": "tpu"}, "device is 'tpu'"),
    ],
)
def test_mistakes_are_one_line(
    record: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in.csv").write_text("id,one\n1,good\n")
    given = {"--ensemble": str(record), "--input": "in.csv", "--output": "out.csv", **args}
    flat = [x for key, value in given.items() for x in (key, *([value] if isinstance(value, str) else value))]
    assert main(["infer", *flat]) == 2
    told = capsys.readouterr().err.strip()
    assert message in told
    assert "\n" not in told
    assert sorted(os.listdir()) == ["in.csv"]
