"""``lora-ensemble infer``: every row comes back in its place, with what the ensemble decides."""

from __future__ import annotations

import csv
import gzip
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

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_ensemble import select
from trained_pool import texts_of

from lora_ensemble import Ensemble
from lora_ensemble.main import main


@pytest.fixture(scope="module")
def record(trained: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ensemble of four that reads column "one"."""
    return select(trained("bert", "multiclass"), "--method", "omni", to=tmp_path_factory.mktemp("infer"))


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


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("name", ["in.csv", "in.tsv", "in.csv.gz"])
def test_a_header_alone_comes_back(record: Path, tmp_path: Path, name: str, probabilities: bool) -> None:
    d = "\t" if name == "in.tsv" else ","
    header, args = f"id{d}one\r".encode(), ["--probabilities"] * probabilities
    (tmp_path / name).write_bytes(gzip.compress(header) if name.endswith(".gz") else header)
    assert infer(record, tmp_path / name, tmp_path / "out", *args) == 0
    names = ["id", "one", "prediction", *[f"p_{i}" for i in range(5)] * probabilities]
    assert (tmp_path / "out").read_text() == d.join(names) + "\n"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("content", "code", "out"), [(b"id,one", 0, b"id,one,prediction\n"), (b"\n", 2, b"")])
def test_a_header_alone_through_a_pipe(
    record: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsysbinary: pytest.CaptureFixture[bytes],
    content: bytes,
    code: int,
    out: bytes,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(content))))  # type: ignore[arg-type]
    command = ["infer", "--ensemble", str(record), "--input", "-", "--output", "-", "--format", "csv"]
    assert main(command) == code
    printed = capsysbinary.readouterr()
    assert printed.out == out
    assert (b"stdin: empty file; expected a header line" in printed.err) == (code == 2)


def test_a_packed_file_comes_back_packed_where_its_name_says_so(record: Path, tmp_path: Path) -> None:
    content = "id,one\n" + "".join(f"{i},{text}\n" for i, text in enumerate(texts_of(400, 1)))
    (tmp_path / "in.csv").write_text(content)
    (tmp_path / "in.csv.gz").write_bytes(gzip.compress(content.encode()))
    assert infer(record, tmp_path / "in.csv", tmp_path / "plain.csv") == 0
    for source, target in (("in.csv.gz", "out.csv"), ("in.csv.gz", "out.csv.gz"), ("in.csv", "again.csv.gz")):
        assert infer(record, tmp_path / source, tmp_path / target) == 0
        raw = (tmp_path / target).read_bytes()
        assert (gzip.decompress(raw) if target.endswith(".gz") else raw) == (tmp_path / "plain.csv").read_bytes()


def test_parquet_in_parquet_out(record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Types stay; a row without text keeps its place."""
    texts = texts_of(5000, 1, longest=4)
    whole = pa.table({"n": pa.array(range(5002), pa.int16()), "one": [*texts, None, "good"]})
    pq.write_table(whole, tmp_path / "in.parquet")
    assert infer(record, tmp_path / "in.parquet", tmp_path / "out.parquet", "--probabilities") == 1
    told = capsys.readouterr().err
    assert f"{tmp_path}/in.parquet:5000: 'one' holds no text; no decision" in told
    assert "5002 rows, 5001 answered" in told
    found = pq.read_table(tmp_path / "out.parquet")
    assert found.column_names == ["n", "one", "prediction", *(f"p_{i}" for i in range(5))]
    assert found.select(["n", "one"]) == whole
    decided, some, ensemble = found["prediction"].to_pylist(), slice(0, 5000, 25), Ensemble.load(record)
    assert decided[5000] is None
    assert decided[some] == ensemble.predict(texts[some]).tolist()
    p = [[row[f"p_{i}"] for i in range(5)] for row in found.slice(0, 5000).to_pylist()[some]]
    np.testing.assert_allclose(p, ensemble.predict_proba(texts[some]), atol=1e-5)
    pq.write_table(whole.slice(0, 0), tmp_path / "none.parquet")
    assert infer(record, tmp_path / "none.parquet", tmp_path / "out.parquet") == 0
    assert pq.read_table(tmp_path / "out.parquet").column_names == ["n", "one", "prediction"]
    assert not list(tmp_path.glob(".*"))


def test_a_file_without_a_header(record: Path, tmp_path: Path) -> None:
    texts = texts_of(5, 1)
    (tmp_path / "in.tsv").write_text("".join(f"{i}\t{text}\n" for i, text in enumerate(texts)))
    assert infer(record, tmp_path / "in.tsv", tmp_path / "out.tsv", "--header", "id", "one") == 0
    rows = [line.split("\t") for line in (tmp_path / "out.tsv").read_text().splitlines()]
    assert [row[:2] for row in rows] == [[str(i), text] for i, text in enumerate(texts)]
    assert [row[2] for row in rows] == Ensemble.load(record).predict(texts).tolist()


@pytest.mark.parametrize(
    ("name", "content", "args", "message"),
    [
        ("in.csv", b"", [], "in.csv: empty file; expected a header line"),
        ("in.csv.gz", gzip.compress(b""), [], "in.csv.gz: empty file; expected a header line"),
        ("in.csv.gz", gzip.compress(b"id,one\n1,good\n")[:-9], [], "in.csv.gz: damaged"),
        ("in.csv.gz", b"\x1f\x8b nothing", [], "in.csv.gz: damaged gzip file"),
        (
            "in.csv.gz",
            gzip.compress(b"id,one\n1,good\n") + gzip.compress(np.random.default_rng(0).bytes(300_000))[:200_000],
            [],
            "in.csv.gz: damaged, cannot be read to its end",
        ),
        ("in.csv", "id,one\n1,good\n".encode("utf-16"), [], "in.csv:1: byte 0xff is not UTF-8"),
        ("in.txt", "good\nbad\n".encode("utf-16-le"), [], "in.txt: none of its 3 rows could be read as text"),
        ("in.txt", b"\x28\xb5\x2f\xfd packed otherwise", [], "in.txt: none of its 1 rows could be read as text"),
        ("in.parquet", b"PAR1 and nothing else", [], "in.parquet: damaged, or not a Parquet file"),
        ("in.csv", b"one,n\ngood, or not,1\n", [], "in.csv:2: 3 fields instead of 2: header 'one,n', row 'good, or"),
        ("in.jsonl", b'{"one": 1}\n', ["--header", "one"], "--header: in.jsonl is jsonl"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_cannot_be_read_leaves_no_output(
    record: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes,
    args: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    output = "out.parquet" if name == "in.parquet" else "out.csv"
    assert main(["infer", "--ensemble", str(record), "--input", name, "--output", output, *args]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert sorted(os.listdir()) == [name]


def test_a_table_named_as_another_format_is_refused(
    record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(pa.table({"one": ["good"]}), tmp_path / "in.csv")
    (tmp_path / "in2.csv").write_text("one\ngood\n")
    for source, target in (("in.csv", "out.csv"), ("in2.csv", "out.parquet")):
        assert infer(record, tmp_path / source, tmp_path / target) == 2
        assert f"--output {tmp_path / target}: the output is " in capsys.readouterr().err
        assert not (tmp_path / target).exists()


def test_numbers_are_text_as_in_training(record: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"one": 100}\n{"one": 2.5}\n{"one": true}\n{"one": "good"}\n')
    assert infer(record, tmp_path / "in.jsonl", tmp_path / "out.jsonl") == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["one"] for row in rows] == [100, 2.5, True, "good"]
    expected = Ensemble.load(record).predict(["100", "2.5", "True", "good"]).tolist()
    assert [row["prediction"] for row in rows] == expected


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
    (tmp_path / "in.txt").write_text(("good " * 100 + "\n") * 1100)  # three blocks
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


@pytest.fixture(scope="module")
def answered(record: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A file of several blocks, and what an undisturbed run makes of it."""
    folder = tmp_path_factory.mktemp("answered")
    lines = [f'{i:0500},"{text}"' for i, text in enumerate(texts_of(1500, 1, longest=30))]
    (folder / "in.csv").write_text("id,one\n" + "\n".join(lines))
    assert infer(record, folder / "in.csv", folder / "whole.csv") == 0
    return folder / "in.csv", (folder / "whole.csv").read_bytes()


@pytest.mark.parametrize(("how", "name"), [(signal.SIGKILL, "out.csv"), (signal.SIGINT, "out.csv.gz")])
def test_killed_it_goes_on_and_ends_the_same(
    record: Path,
    answered: tuple[Path, bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    how: signal.Signals,
    name: str,
) -> None:
    source, whole = answered
    target = tmp_path / name
    command = [sys.executable, "-m", "lora_ensemble", "infer", "--ensemble", str(record)]
    program = subprocess.Popen([*command, "--input", str(source), "--output", str(target)])
    while program.poll() is None and not list(tmp_path.glob(".out.csv.*.json")):
        time.sleep(0.01)
    program.send_signal(how)
    assert program.wait(timeout=60) == (130 if how == signal.SIGINT else -how)
    assert not target.exists()
    (partial,) = tmp_path.glob(".out.csv.*.partial")
    with open(partial, "ab") as f:
        f.write(b"half a li")
    capsys.readouterr()
    assert infer(record, source, target) == 0
    assert "going on after" in capsys.readouterr().err
    raw = target.read_bytes()
    assert (gzip.decompress(raw) if name.endswith(".gz") else raw) == whole
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
