"""Rows of a stream are the rows of the file, whatever the blocks are that it comes in."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st

from lora_ensemble.errors import UserError
from lora_ensemble.text import delimited
from lora_ensemble.text.streams import Row, Rows
from lora_ensemble.text.tables import format_of, read_table

COURSE = Path(os.environ.get("LORA_ENSEMBLE_DATA", REPOSITORY.parent / "shared" / "data"))
needs_course = pytest.mark.skipif(
    not COURSE.is_dir(), reason=f"the course's data is not at {COURSE}; set LORA_ENSEMBLE_DATA"
)


class Pipe:
    """A stream that gives a few bytes at a time."""

    def __init__(self, content: bytes, step: int) -> None:
        self.content, self.step = content, step

    def read1(self, _: int) -> bytes:
        given, self.content = self.content[: self.step], self.content[self.step :]
        return given


def rows_of(content: str | bytes, kind: Any, columns: list[str], *, step: int = 10**6) -> tuple[Rows, list[Row]]:
    raw = content.encode() if isinstance(content, str) else content
    rows = Rows(Pipe(raw, step), "in.csv", kind, columns)  # type: ignore[arg-type]
    return rows, [row for _, block in rows for row in block]


DIRTY = """\tid\tsentence\tlabel
0\ta1\tplain text\t1
1\ta2\t"quoted, with ""quotes"" in it"\t2

2\ta3\t"a stray quote\t1
3\ta4\tits end" in another row\t0
4\ta5\t"Foo" bar\t1
5\ta6\ttoo\tmany\tfields
6\ta7
7\ta8\t\t1\r
8\ta9\tlast line without an end\t3"""


@pytest.mark.parametrize("step", [1, 7, 100, 10**6])
@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\r"])
@pytest.mark.parametrize("ends", ["\n", "\r", "\r\n", "mixed"])
def test_a_dirty_file_in_small_pieces(tmp_path: Path, step: int, end: str, ends: str) -> None:
    """As read_table reads it whole, whatever ends its lines."""
    kinds = itertools.cycle(["\n", "\r", "\r\n"] if ends == "mixed" else [ends])
    dirty = "".join(line + next(kinds) for line in DIRTY.splitlines()).rstrip("\r\n") + end
    (tmp_path / "in.csv").write_text(dirty, newline="")
    whole = read_table(tmp_path / "in.csv", None)
    assert len(whole.lines or []) == 9
    rows, found = rows_of(dirty, "csv", ["sentence"], step=step)
    assert rows.header == whole.found
    assert [row.line for row in found] == whole.lines
    assert {i: row.error for i, row in enumerate(found) if row.error} == whole.broken
    assert len(whole.broken) == 2
    assert [row.texts for row in found if not row.error] == [
        [text] for i, text in enumerate(whole.columns["sentence"]) if i not in whole.broken
    ]


@needs_course
@pytest.mark.parametrize("name", ["ids-sst-train.csv", "quora-train.csv", "sts-dev.csv", "quora-test-student.csv"])
def test_the_courses_files(name: str) -> None:
    whole = read_table(COURSE / name, None)
    wanted = ["sentence"] if "sst" in name else ["sentence1", "sentence2"]
    with open(COURSE / name, "rb") as f:
        rows = Rows(f, name, "csv", wanted)
        found = [row for _, block in rows for row in block]
    assert [row.line for row in found] == whole.lines
    texts = list(zip(*(whole.columns[c] for c in wanted), strict=True))
    assert all(row.error or tuple(row.texts or ()) == text for row, text in zip(found, texts, strict=True))
    assert sum(row.error is not None for row in found) == len(whole.broken)


@pytest.mark.parametrize("step", [1, 10**6])
@pytest.mark.parametrize("end", ["", "\n", "\r", "\n\n"])
def test_a_header_alone(step: int, end: str) -> None:
    rows, found = rows_of(f"id\ttext{end}", "csv", ["text"], step=step)
    assert found == []
    assert rows.head(["prediction"]) == "id\ttext\tprediction\n"


@pytest.mark.parametrize("step", [1, 10**6])
def test_lines_of_text_and_of_json_however_they_end(step: int) -> None:
    _, found = rows_of("one\rtwo\r\nthree\n\rfive", "text", ["t"], step=step)
    assert [(row.line, row.texts) for row in found] == [
        (1, ["one"]), (2, ["two"]), (3, ["three"]), (4, None), (5, ["five"])
    ]  # fmt: skip
    _, found = rows_of('{"t": "one"}\r{"t": "two"}\r\n\n{"t": "four"}', "jsonl", ["t"], step=step)
    assert [(row.line, row.texts) for row in found] == [(1, ["one"]), (2, ["two"]), (4, ["four"])]


@pytest.mark.parametrize("step", [1, 10**6])
def test_a_file_without_a_header(step: int) -> None:
    content = 'x1,"so, so"\nx2\nx3,fine'
    rows = Rows(Pipe(content.encode(), step), "in.csv", "csv", ["text"], ["id", "text"])  # type: ignore[arg-type]
    found = [row for _, block in rows for row in block]
    assert [row.texts for row in found] == [["so, so"], None, ["fine"]]
    assert rows.head(["prediction"]) == ""
    assert rows.back(found[0], {"prediction": 4}) == 'x1,"so, so",4\n'
    with pytest.raises(UserError, match="has a column 'id' of its own"):
        rows.head(["id"])


CELL = st.text(st.sampled_from("ab ,\"'\n\r\t;é\u2028"), max_size=8)


@given(rows=st.lists(st.tuples(CELL, CELL), min_size=1, max_size=8), step=st.integers(1, 60))
def test_what_csv_wrote_is_read_whatever_the_blocks(rows: list[tuple[str, str]], step: int) -> None:
    out = io.StringIO(newline="")
    writer = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerows([("n", "text", "more"), *((str(i), *row) for i, row in enumerate(rows))])
    _, found = rows_of(out.getvalue(), "csv", ["text", "more"], step=step)
    read = [tuple(row.texts or ()) for row in found]
    assert read == [tuple(row[1:]) for row in csv.reader(io.StringIO(out.getvalue(), newline=""))][1:]


@pytest.mark.parametrize("step", [1, 10**6])
def test_json_lines(step: int) -> None:
    content = (
        b'{"t": "one", "n": 1}\n\nnot json\n[1]\n{"n": 2}\n{"t": 3}\n{"t": "\xff"}\n{"t": "\\ud800"}\n{"t": "end"}'
        b'\n{"t": [1]}'
    )
    rows, found = rows_of(content, "jsonl", ["t"], step=step)
    assert [(row.line, row.texts) for row in found] == [
        (1, ["one"]), (3, None), (4, None), (5, None), (6, ["3"]), (7, None), (8, None), (9, ["end"]), (10, None),
    ]  # fmt: skip
    errors = [row.error or "" for row in found]
    for i, message in {1: "not JSON", 2: "a JSON list", 3: "no key 't'", 8: "'t' holds no text", 5: "0xff"}.items():
        assert message in errors[i]
    assert "not JSON" in errors[6]  # half of a surrogate pair
    assert json.loads(rows.back(found[0], {"prediction": "4"})) == {"t": "one", "n": 1, "prediction": "4"}
    assert json.loads(rows.back(found[1], None))["error"].startswith("line 3: not JSON")
    with pytest.raises(UserError, match=r"in\.csv:1: has a key 'n' of its own; choose another --column"):
        rows.back(found[0], {"n": "4"})


def test_plain_lines() -> None:
    content = "one\r\n\n  \ntwo\tthree\nfour".encode("utf-8-sig")
    _, found = rows_of(content, "text", ["t"])
    assert [row.texts for row in found] == [["one"], None, None, ["two\tthree"], ["four"]]
    assert all(row.error is None for row in found)
    _, pairs = rows_of(content, "text", ["a", "b"])
    assert [row.texts for row in pairs] == [None, None, None, ["two", "three"], None]
    assert [row.line for row in pairs if row.error] == [1, 5]
    _, bad = rows_of(b"a\0b\n\xff", "text", ["t"])
    assert [row.error for row in bad] == ["a NUL byte", "byte 0xff is not UTF-8"]


@pytest.mark.parametrize("step", [1, 10**6])
def test_bytes_that_are_no_text_spoil_their_own_row(step: int) -> None:
    """Named by the first of them, also in a field that goes on over several lines."""
    content = b'\xef\xbb\xbfid,text\n1,good\n2,caf\xe9 \xff\n3,"two\nli\0nes"\n4,too,\xe9many\n5,fine\n'
    rows, found = rows_of(content, "csv", ["text"], step=step)
    assert [row.texts for row in found] == [["good"], None, None, None, ["fine"]]
    wrong = ["byte 0xe9 is not UTF-8", "a NUL byte", "byte 0xe9 is not UTF-8"]
    assert [(row.line, row.error) for row in found[1:4]] == list(zip([3, 4, 6], wrong, strict=True))
    assert rows.back(found[1], {"prediction": ""}) == ",,\n"


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        ("", ["t"], "empty file; expected a header"),
        ("\n \n", ["t"], "empty file; expected a header"),
        ("a,b\n1,2\n", ["t"], "column 't' is not there; columns found: a, b"),
        ("t,t\n1,2\n", ["t"], "column 't' is there twice"),
        ("a,b\n1,2\n", [], "which columns hold the text"),
        (b"a\xff,b\n1,2\n", ["a"], "0xff is not UTF-8"),
    ],
)
def test_headers_that_cannot_be(content: str | bytes, columns: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rows_of(content, "csv", columns)


def test_one_column_with_commas() -> None:
    """The whole line is the text; what is added needs a comma of its own."""
    rows, found = rows_of("text\nso, what, now\n", "csv", [])
    assert found[0].texts == ["so, what, now"]
    assert rows.head(["prediction"]) == "text,prediction\n"
    assert rows.back(found[0], {"prediction": 4}) == '"so, what, now",4\n'
    with pytest.raises(UserError, match="has a column 'text' of its own"):
        rows.head(["text"])


def test_an_open_quote_does_not_swallow_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After so many lines it is text, in a file that is read at once too."""
    monkeypatch.setattr(delimited, "LOOK_AHEAD", 1000)
    lines = ["id,text", '0,"closed too late', *(f"{i},line {i}" for i in range(1, 3000)), 'closed"']
    _, found = rows_of("\n".join(lines), "csv", ["text"], step=4000)
    assert len(found) == 3001
    assert found[0].texts == ['"closed too late']
    (tmp_path / "in.csv").write_text("\n".join(lines))
    assert read_table(tmp_path / "in.csv", None).columns["text"] == [(row.texts or [""])[0] for row in found]
    # The first answer waits for no more than that.
    pipe = Rows(Pipe("\n".join(lines).encode(), 4000), "in.csv", "csv", ["text"])  # type: ignore[arg-type]
    assert next(row.line for _, block in pipe for row in block) == 2
    assert len(pipe.stream.content) > 10_000  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.csv", "csv"), ("a.TSV", "csv"), ("a.jsonl", "jsonl"), ("a.json", "jsonl"), ("a.txt", "text"), ("a", "text")],
)
def test_the_suffix_says_the_format(name: str, kind: str) -> None:
    assert format_of(name) == kind
