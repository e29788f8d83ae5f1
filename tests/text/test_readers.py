"""readers.py and tables.py: every format, the course's untidy files, and each kind of bad input."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_ensemble.errors import UserError
from lora_ensemble.tasks import PRESETS, Task
from lora_ensemble.text.readers import Split, fingerprint, read_split, read_texts, shared_texts

COURSE = Path(os.environ.get("LORA_ENSEMBLE_DATA", REPOSITORY.parent / "shared" / "data"))
needs_course_data = pytest.mark.skipif(
    not COURSE.is_dir(), reason=f"the course's data is not at {COURSE}; set LORA_ENSEMBLE_DATA"
)

ONE = Task(name="one", kind="binary", text=["text"], id="id", train="t.csv", test="t.csv")
PAIR = dataclasses.replace(ONE, text=["a", "b"])
FIVE = dataclasses.replace(ONE, kind="multiclass", label_names=["0", "1", "2", "3", "4"])
VALUE = dataclasses.replace(ONE, kind="regression", label_range=[0.0, 5.0])


def read(
    folder: Path, content: str | bytes, task: Task = ONE, *, name: str = "t.csv", need_labels: bool = True
) -> Split:
    """What is read from a file of this content."""
    raw = content if isinstance(content, bytes) else content.encode()
    (folder / name).write_bytes(raw)
    task = dataclasses.replace(task, train=name, test=name)
    return read_split(task, "train" if need_labels else "test", folder, need_labels=need_labels)


def error(folder: Path, content: str | bytes, task: Task = ONE, **more: object) -> str:
    """The message of the error that reading this content gives; one line."""
    with pytest.raises(UserError) as e:
        read(folder, content, task, **more)  # type: ignore[arg-type]
    assert "\n" not in str(e.value)
    return str(e.value)


# The course's data. Row counts and shared examples are those of its README.


@needs_course_data
@pytest.mark.parametrize(
    ("name", "counts", "shared", "skipped"),
    [("sst", (8544, 1101, 2210), 2, 0), ("sts", (6040, 863, 1725), 13, 0), ("quora", (13214, 3000, 4000), 0, 2)],
)
def test_course_data_is_read_to_the_last_row(
    name: str, counts: tuple[int, int, int], shared: int, skipped: int
) -> None:
    task = PRESETS[name]
    train, dev = (read_split(task, s, COURSE, need_labels=True) for s in ("train", "dev"))
    test = read_split(task, "test", COURSE, need_labels=False)
    assert (len(train), len(dev), len(test)) == (counts[0] - skipped, *counts[1:])
    assert len(train.notices) == skipped
    assert dev.notices == test.notices == []
    assert test.labels is None
    assert shared_texts(train, dev) == shared
    for split in (train, dev, test):
        assert all(len(i) == 25 and set(i) <= set("0123456789abcdef") for i in split.ids.tolist())
        assert all(len(column) == len(split) and all(column) for column in split.texts)


@needs_course_data
@pytest.mark.parametrize("name", list(PRESETS))
@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_course_data_is_what_the_csv_module_reads(name: str, split: str) -> None:
    task = PRESETS[name]
    with open(COURSE / str(getattr(task, split)), encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f, delimiter="\t"))
    rows = [r for r in rows if all(r[c].strip() for c in task.text) and r.get(task.label) != ""]
    ours = read_split(task, split, COURSE, need_labels=split != "test")
    assert ours.ids.tolist() == [r["id"] for r in rows]
    assert ours.texts == [[r[c].strip() for r in rows] for c in task.text]
    if split != "test":
        assert ours.labels is not None
        assert ours.labels.tolist() == [float(r[task.label]) for r in rows]


@needs_course_data
def test_course_data_says_what_it_skips_and_why() -> None:
    assert read_split(PRESETS["quora"], "train", COURSE, need_labels=True).notices == [
        "quora-train.csv: 1 row skipped: empty is_duplicate (line 6325)",
        "quora-train.csv: 1 row skipped: empty sentence2 and is_duplicate (line 8648)",
    ]


# Formats: the same three examples however they are written.

ROWS = [("x1", "Good, or not?", 1), ("x2", 'He said "no"', 0), ("x3", "Überall; Straße", 1)]


def _csv_bytes(delimiter: str = ",", end: str = "\n", front: bytes = b"") -> bytes:
    def cell(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    lines = [delimiter.join(["id", "text", "label"])]
    lines += [delimiter.join([i, cell(text), str(label)]) for i, text, label in ROWS]
    return front + (end.join(lines) + end).encode()


def _json_bytes(end: str = "\n") -> bytes:
    return "".join(json.dumps({"id": i, "text": t, "label": n}) + end for i, t, n in ROWS).encode()


def _parquet_bytes(**columns: list) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


_COLUMNS = {"id": [r[0] for r in ROWS], "text": [r[1] for r in ROWS], "label": [r[2] for r in ROWS]}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", _csv_bytes()),
        ("t.CSV", _csv_bytes("\t")),
        ("t.tsv", _csv_bytes("\t")),
        ("t.csv", _csv_bytes(";")),
        ("t.txt", _csv_bytes("\t")),
        ("t.csv", _csv_bytes(end="\r\n")),
        ("t.tsv", _csv_bytes("\t", end="\r\n")),
        ("t.csv", _csv_bytes(end="\r")),
        ("t.csv", _csv_bytes().replace(b"\n", b"\r", 1)),
        ("t.csv", _csv_bytes().replace(b"\n", b"\r\n", 2).replace(b"x2", b"\rx2")),
        ("t.jsonl", _json_bytes("\r")),
        ("t.csv", _csv_bytes(front=b"\xef\xbb\xbf")),
        ("t.csv", _csv_bytes().rstrip(b"\n")),
        ("t.csv", _csv_bytes() + b"\n,,\n\n"),
        ("t.jsonl", _json_bytes()),
        ("t.json", b"\xef\xbb\xbf" + _json_bytes("\r\n\n")),
        ("t.ndjson", _json_bytes()),
        ("t.data", _json_bytes()),
        ("t.parquet", _parquet_bytes(**_COLUMNS)),
        ("t.bin", _parquet_bytes(**_COLUMNS)),
        ("t.csv.gz", gzip.compress(_csv_bytes(), mtime=0)),
        ("t.TSV.GZ", gzip.compress(_csv_bytes("\t"), mtime=0)),
        ("t.csv", gzip.compress(_csv_bytes(), mtime=0)),
        ("t.jsonl.gz", gzip.compress(_json_bytes()[:9], mtime=0) + gzip.compress(_json_bytes()[9:], mtime=0)),
        ("t.parquet.gz", gzip.compress(_parquet_bytes(**_COLUMNS), mtime=0)),
    ],
    ids=str,
)
def test_every_format_gives_the_same_examples(tmp_path: Path, name: str, content: bytes) -> None:
    split = read(tmp_path, content, name=name)
    assert split.ids.tolist() == ["x1", "x2", "x3"]
    assert split.texts == [["Good, or not?", 'He said "no"', "Überall; Straße"]]
    assert split.labels is not None
    assert split.labels.dtype == np.int64
    assert split.labels.tolist() == [1, 0, 1]
    assert split.notices == []
    assert split.ids.dtype.kind == "U"


def test_case_and_inner_space_stay_and_outer_space_goes(tmp_path: Path) -> None:
    assert read(tmp_path, "id\ttext\tlabel\n 1 \t It 's  GREAT . \t1\n").texts == [["It 's  GREAT ."]]


def test_a_line_separator_inside_a_text_ends_no_row(tmp_path: Path) -> None:
    odd = "a\u2028b\x85c\x0bd\x0ce"
    assert read(tmp_path, f"id\ttext\tlabel\n1\t{odd}\t1\n").texts == [[odd]]
    assert read(tmp_path, f'{{"id": 1, "text": "{odd[:3]}", "label": 1}}\n', name="t.jsonl").texts == [["a\u2028b"]]


def test_one_column_file_keeps_its_commas(tmp_path: Path) -> None:
    task = dataclasses.replace(ONE, id=None)
    for name in ("t.csv", "t.tsv"):
        split = read(tmp_path, 'text\nwell, well, well\n"quoted, once"\n', task, name=name, need_labels=False)
        assert split.texts == [["well, well, well", "quoted, once"]]
        assert split.ids.tolist() == ["0", "1"]
    task = dataclasses.replace(task, text=["text, as found"])
    assert read(tmp_path, "text, as found\na, b, c\n", task, name="t.tsv", need_labels=False).texts == [["a, b, c"]]


def test_ids_are_row_numbers_without_an_id_column_and_count_what_is_skipped(tmp_path: Path) -> None:
    split = read(tmp_path, "text,label\na,1\n,1\n\nc,0\nd,0\ne,0\n", dataclasses.replace(ONE, id=None))
    assert split.ids.tolist() == ["0", "2", "3", "4"]
    assert split.notices == ["t.csv: 1 row skipped: empty text (line 3)"]


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


@settings(deadline=None, max_examples=200)
@given(rows=st.lists(st.tuples(texts, texts), min_size=1, max_size=6))
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_what_the_csv_module_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], quoting: int
) -> None:
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    with open(path, "w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f, quoting=quoting)  # type: ignore[arg-type]
        writer.writerow(["id", "a", "b"])
        writer.writerows((i, *pair) for i, pair in enumerate(rows))
    split = read_split(PAIR, "test", path.parent, need_labels=False)
    assert split.ids.tolist() == [str(i) for i in range(len(rows))]
    assert split.texts == [[r[0].strip() for r in rows], [r[1].strip() for r in rows]]


# Headers and quotes that do not fit.


@pytest.mark.parametrize("first", [0, 1])  # R counts from 1
def test_header_without_a_name_for_an_index_that_counts(tmp_path: Path, first: int) -> None:
    rows = f"id\ttext\tlabel\n{first}\tx1\tgood\t1\n\n{first + 1}\tx2\tbad\t0\n"
    assert read(tmp_path, rows).ids.tolist() == ["x1", "x2"]
    more = rows + "".join(f"{first + i}\tx{i + 1}\tbad\t0\n" for i in range(2, 9)) + "0\tx\tlost\t1\n"
    assert read(tmp_path, more).notices == [
        f"t.csv: 1 row skipped: starts with '0' instead of the row's number {first + 9} (line 12)"
    ]
    assert "t.csv:2: 4 fields instead of 3" in error(tmp_path, rows.replace(f"\n{first}", "\n7", 1))


@pytest.mark.parametrize("need_labels", [True, False])
@pytest.mark.parametrize(
    ("d", "name", "rest"),
    [(",", "a comma", ["warm{d} kind{d}1"]), (",", "a comma", ["fine{d}1"] * 40), ("\t", "a tab", ["fine{d}1"] * 40)],
)
def test_a_delimiter_in_a_text_without_quotes_is_no_index(
    tmp_path: Path, need_labels: bool, d: str, name: str, rest: list[str]
) -> None:
    """In every row, or in the first alone."""
    task = dataclasses.replace(ONE, id=None)
    content = "\n".join(["text{d}label", "cold{d} rude{d}0", *rest]).replace("{d}", d)
    message = error(tmp_path, content, task, need_labels=need_labels)
    assert message == (
        f"{tmp_path}/t.csv:2: 3 fields instead of 2: header {f'text{d}label'!r}, row {f'cold{d} rude{d}0'!r}; put a "
        f"text that holds {name} in double quotes: " + repr(f'"one{d} two"')
    )


def test_second_index_column_as_in_the_courses_test_file(tmp_path: Path) -> None:
    split = read(tmp_path, "0\t\tid\ttext\n1\t0.0\tx1\tgood\n2\t1.0\tx2\tbad\n", need_labels=False)
    assert split.ids.tolist() == ["x1", "x2"]
    assert split.texts == [["good", "bad"]]


@pytest.mark.parametrize("d", ["\t", ","])
def test_quotes_within_a_line(tmp_path: Path, d: str) -> None:
    lines = [
        ('"He said ""no"""', 'He said "no"'),
        (f'"left{d}right"', f"left{d}right"),
        ("5' 6\" tall", "5' 6\" tall"),
        ('"Stop" he said', '"Stop" he said'),  # the csv module would drop these quotes
        ('closed"', 'closed"'),
        ('"never closed', '"never closed'),
        ("next", "next"),
        ('""', ""),
    ]
    content = f"id{d}a{d}b\n" + "".join(f"{i}{d}{a}{d}x\n" for i, (a, _) in enumerate(lines))
    split = read(tmp_path, content, PAIR, need_labels=False)
    assert split.texts[0] == [b for _, b in lines]
    assert split.texts[1] == ["x"] * len(lines)
    assert split.notices[0] == "t.csv: 2 rows with an unbalanced quote, taken as text (lines 5, 7)"


@pytest.mark.parametrize("closing", ['5 feet 6"', 'an "odd" one', "nothing", '"', '"well"'])
def test_stray_quote_swallows_no_rows_of_a_tab_separated_file(tmp_path: Path, closing: str) -> None:
    content = f'id\ttext\tlabel\n1\t"stray\t0\n2\tnext\t1\n3\tmore\t1\n4\t{closing}\t0\n'
    split = read(tmp_path, content)
    assert split.ids.tolist() == ["1", "2", "3", "4"]
    assert split.texts[0][:3] == ['"stray', "next", "more"]
    assert split.labels is not None
    assert split.labels.tolist() == [0, 1, 1, 0]
    assert "unbalanced quote, taken as text (line" in split.notices[0]


def test_stray_quote_in_a_comma_separated_file(tmp_path: Path) -> None:
    split = read(tmp_path, 'id,text,label\n1,"stray,0\n2,next,1\n3,"well",1\n')
    assert split.texts == [['"stray', "next", "well"]]


def test_quoting_is_not_believed_where_it_gives_the_wrong_number_of_fields(tmp_path: Path) -> None:
    over_two_lines = read(tmp_path, 'id,a,b\n1,x,"stray\n2,6",y\n', PAIR, need_labels=False)
    assert over_two_lines.texts == [["x", '6"'], ['"stray', "y"]]
    in_one_line = read(tmp_path, 'id,a,b\n0,x,y\n1,"a,b"\n', PAIR, need_labels=False)
    assert in_one_line.texts == [["x", '"a'], ["y", 'b"']]


def test_good_quotes_beside_a_stray_one_are_believed(tmp_path: Path) -> None:
    split = read(tmp_path, 'id\ta\tb\r\n1\t"stray\t"She said ""yes"""\r\n', PAIR, need_labels=False)
    assert split.texts == [['"stray'], ['She said "yes"']]


@pytest.mark.parametrize("d", ["\t", ","])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_field_over_several_lines(tmp_path: Path, d: str, end: str) -> None:
    rows = [f'1{d}"first,{end}{end}second"{d}1', f"2{d}plain{d}0", f'3{d}"a{end}""b"""{d}1']
    split = read(tmp_path, end.join([f"id{d}text{d}label", *rows, ""]))
    assert split.texts == [[f"first,{end}{end}second", "plain", f'a{end}"b"']]
    assert split.ids.tolist() == ["1", "2", "3"]
    assert split.notices == ["t.csv: 2 rows with a quoted field over several lines (lines 2, 6)"]


@pytest.mark.parametrize("d", ["\t", ","])
def test_last_field_over_several_lines(tmp_path: Path, d: str) -> None:
    split = read(tmp_path, f'label{d}id{d}text\n1{d}x{d}"one\ntwo"\n0{d}y{d}three\n')
    assert split.texts == [["one\ntwo", "three"]]


def test_error_after_a_field_over_several_lines_has_the_right_line(tmp_path: Path) -> None:
    assert "t.csv:4: label out of range" in error(tmp_path, 'id,text,label\n1,"a\nb",1\n2,c,7\n')


def test_row_with_a_missing_field(tmp_path: Path) -> None:
    good = "".join(f"{i}\td\t0\n" for i in range(4, 11))
    content = f"id\ttext\tlabel\n1\ta\t1\n2\tb\n3\tc\td\te\n{good}"
    split = read(tmp_path, content)
    assert split.ids.tolist() == ["1", *map(str, range(4, 11))]
    assert split.notices == [
        "t.csv: 1 row skipped: 2 fields instead of 3 (line 3)",
        "t.csv: 1 row skipped: 4 fields instead of 3 (line 4)",
    ]
    assert "t.csv:3: 2 fields instead of 3; mend it" in error(tmp_path, content, need_labels=False)


# Files without a header.


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", b'x1,1,"Well, well"\nx2,0,"a\nb"\n'),
        ("t.tsv", b'\xef\xbb\xbfx1\t1\tWell, well\r\nx2\t0\t"a\r\nb"'),
        ("t.csv.gz", gzip.compress(b'\nx1;1;Well, well\nx2;0;"a\nb"\n', mtime=0)),
    ],
)
def test_columns_of_a_file_without_a_header(tmp_path: Path, name: str, content: bytes) -> None:
    split = read(tmp_path, content, dataclasses.replace(ONE, columns=["id", "label", "text"]), name=name)
    assert split.ids.tolist() == ["x1", "x2"]
    assert split.texts[0][0] == "Well, well"
    assert split.texts[0][1].split() == ["a", "b"]
    assert split.labels is not None
    assert split.labels.tolist() == [1, 0]


def test_columns_where_there_is_a_header_or_none_could_be(tmp_path: Path) -> None:
    task = dataclasses.replace(ONE, columns=["id", "text", "label"])
    assert "t.csv: has a header line of its own; do not give" in error(tmp_path, "id,text,label\n1,a,1\n", task)
    assert "columns: is for CSV and TSV files without" in error(tmp_path, _json_bytes(), task, name="t.jsonl")
    assert "columns: is for CSV and TSV files" in error(tmp_path, _parquet_bytes(**_COLUMNS), task, name="t.parquet")
    message = error(tmp_path, "0,good, or not,1\n1,b,1\n", task)
    assert "t.csv:1: 4 fields instead of 3: header 'id, text, label', row '0,good, or not,1'" in message
    with pytest.raises(UserError, match="a data set names its columns"):
        dataclasses.replace(task, dataset="some/thing")


@pytest.mark.parametrize(
    "first", ["2 ||| a film", "__label__2 a film", "(3 (2 It) (4 works))", "a film, of sorts,2", "a film\t2"]
)
def test_a_header_seems_to_be_missing(tmp_path: Path, first: str) -> None:
    message = error(tmp_path, f"{first}\n{first}\n")
    assert "t.csv: no column 'text'; columns found: " in message
    assert message.endswith("a header line seems to be missing: give the names as columns: of the task")
    assert "header line" not in error(tmp_path, "id,sentence,label\n1,a,1\n")


# Labels.


@pytest.mark.parametrize(
    ("task", "written", "expected"),
    [
        (FIVE, ["0", "4.0", " 2 ", "3"], [0, 4, 2, 3]),
        (ONE, ["1.0", "0", "1"], [1, 0, 1]),
        (ONE, ["True", "false"], [1, 0]),
        (dataclasses.replace(ONE, label_names=["no", "yes"]), ["yes", "no"], [1, 0]),
        (dataclasses.replace(ONE, label_names=["2", "1"]), ["1.0", "2.0"], [1, 0]),
        (dataclasses.replace(ONE, label_names=["1.0", "1"]), ["1", "1.0", "1.00"], [1, 0, 0]),
        (VALUE, ["0", "5.0", " 2.5 ", "1e-1"], [0.0, 5.0, 2.5, 0.1]),
        (dataclasses.replace(VALUE, label_range=[]), ["-7", "1e300"], [-7.0, 1e300]),
    ],
    ids=str,
)
def test_labels(tmp_path: Path, task: Task, written: list[str], expected: list[float]) -> None:
    split = read(tmp_path, "id,text,label\n" + "".join(f"{i},t,{x}\n" for i, x in enumerate(written)), task)
    assert split.labels is not None
    assert split.labels.tolist() == expected
    assert split.labels.dtype == (np.float64 if task.kind == "regression" else np.int64)


@pytest.mark.parametrize(
    ("task", "label", "expected"),
    [
        (FIVE, "5", "one of 0, 1, 2, 3, 4"),
        (FIVE, "-1", "one of 0, 1, 2, 3, 4"),
        (FIVE, "0.5", "one of 0, 1, 2, 3, 4"),
        (FIVE, "nan", "one of 0, 1, 2, 3, 4"),
        (dataclasses.replace(ONE, label_names=["no", "yes"]), "maybe", "one of no, yes"),
        (FIVE, "true", "one of 0, 1, 2, 3, 4"),
        (dataclasses.replace(ONE, label_names=["no", "nan"]), "inf", "one of no, nan"),
        (dataclasses.replace(ONE, label_names=["no", "yes"]), "1", "one of no, yes"),
        (ONE, "2", "one of 0, 1"),
        (dataclasses.replace(ONE, label_names=["1", "10"]), "1_0", "one of 1, 10"),
        (VALUE, "5.2", "a number from 0.0 to 5.0"),
        (VALUE, "nan", "a number from 0.0 to 5.0"),
        (VALUE, "high", "a number from 0.0 to 5.0"),
        (dataclasses.replace(VALUE, label_range=[]), "inf", "a finite number"),
    ],
    ids=str,
)
def test_label_out_of_range(tmp_path: Path, task: Task, label: str, expected: str) -> None:
    good = task.labels[0] if task.labels else "1"
    message = error(tmp_path, f"id,text,label\n1,a,{good}\n2,b,{label}\n", task)
    assert message == f"{tmp_path}/t.csv:3: label out of range: label is {label!r}; expected {expected}"


def test_true_and_one_are_different_labels_where_only_one_is_named(tmp_path: Path) -> None:
    task = dataclasses.replace(ONE, label_names=["2", "1"])
    rows = '{"id": 1, "text": "a", "label": 1}\n{"id": 2, "text": "b", "label": true}\n'
    assert "label is True; expected one of 2, 1" in error(tmp_path, rows, task, name="t.jsonl")


def test_booleans_and_nothing_in_json_and_parquet(tmp_path: Path) -> None:
    values = [True, False, None, True, True, False]
    rows = "".join(json.dumps({"id": i, "text": "a", "label": v}) + "\n" for i, v in enumerate(values))
    parquet = _parquet_bytes(id=list(range(6)), text=["a"] * 6, label=values)
    for name, content in (("t.jsonl", rows), ("t.parquet", parquet)):
        split = read(tmp_path, content, name=name)
        assert split.labels is not None
        assert split.labels.tolist() == [1, 0, 1, 1, 0]
        assert split.ids.tolist() == ["0", "1", "3", "4", "5"]
        place = "line 3" if name == "t.jsonl" else "row 2"
        assert split.notices == [f"{name}: 1 row skipped: empty label ({place})"]


def test_nan_and_null_in_parquet_are_empty(tmp_path: Path) -> None:
    ids, values = list("abcdefghij"), [float("nan"), 1.0, *[2.5] * 8]
    content = _parquet_bytes(id=ids, text=["x", None, *"zzzzzzzz"], label=values)
    split = read(tmp_path, content, VALUE, name="t.parquet")
    assert split.ids.tolist() == ids[2:]
    assert split.notices == [
        "t.parquet: 1 row skipped: empty label (row 0)",
        "t.parquet: 1 row skipped: empty text (row 1)",
    ]


# Splits with and without labels.

UNTIDY = "id\ta\tb\tlabel\n1\tx\ty\t1\n2\tx\t\t1\n3\t\t\t\n4\tx\ty\t\n5\tx\ty\t0\n6\tx\t \t1\n"


def test_rows_that_cannot_be_trained_on_are_skipped_counted_and_said(tmp_path: Path) -> None:
    more = [str(i) for i in range(7, 21)]
    split = read(tmp_path, UNTIDY + "".join(f"{i}\tx\ty\t0\n" for i in more), PAIR)
    assert split.ids.tolist() == ["1", "5", *more]
    assert split.notices == [
        "t.csv: 2 rows skipped: empty b (lines 3, 7)",
        "t.csv: 1 row skipped: empty a and b and label (line 4)",
        "t.csv: 1 row skipped: empty label (line 5)",
    ]


def test_prediction_keeps_every_row_and_leaves_partial_labels(tmp_path: Path) -> None:
    split = read(tmp_path, UNTIDY, PAIR, need_labels=False)
    assert split.ids.tolist() == ["1", "2", "3", "4", "5", "6"]
    assert split.labels is None
    assert split.notices == [
        "t.csv: 2 rows kept all the same, so that every id gets a prediction: empty b (lines 3, 7)",
        "t.csv: 1 row kept all the same, so that every id gets a prediction: empty a and b (line 4)",
        "t.csv: 2 of 6 rows have no label (lines 4, 5); the labels of this split are not used",
    ]


def test_prediction_uses_whole_labels_and_does_without_any(tmp_path: Path) -> None:
    whole = read(tmp_path, "id,text,label\n1,a,1\n2,b,0\n", need_labels=False)
    assert whole.labels is not None
    assert whole.labels.tolist() == [1, 0]
    for content in ("id,text,label\n1,a,\n2,b, \n", "id,text\n1,a\n2,b\n"):
        split = read(tmp_path, content, need_labels=False)
        assert (split.labels, split.notices) == (None, [])


def test_texts_without_labels_are_named_after_their_rows(tmp_path: Path) -> None:
    """They need neither ids nor labels, and those that are there are not looked at; an empty text is skipped."""
    (tmp_path / "more.csv").write_text("id,text,label\nx,a,7\nx,,1\n,b,\nx,c,0\nx,d,0\nx,e,0\n")
    split = read_texts(ONE, tmp_path / "more.csv")
    assert split.ids.tolist() == [f"more.csv:{row}" for row in (0, 2, 3, 4, 5)]
    assert (split.texts, split.labels) == ([["a", "b", "c", "d", "e"]], None)
    assert split.notices == ["more.csv: 1 row skipped: empty text (line 3)"]
    (tmp_path / "none.csv").write_text('text\n""\n')
    with pytest.raises(UserError, match=r"none\.csv: no usable texts"):
        read_texts(ONE, tmp_path / "none.csv")


def test_places_are_counted_beyond_three(tmp_path: Path) -> None:
    odd = "id,text,label\n1,a,1\n" + "".join(f"{i},a,\n" for i in range(2, 7))
    split = read(tmp_path, odd + "".join(f"{i},a,0\n" for i in range(7, 26)))
    assert split.notices == ["t.csv: 5 rows skipped: empty label (lines 3, 4, 5, ...)"]
    assert error(tmp_path, odd + "".join(f"{i},a,0\n" for i in range(7, 25))) == (
        f"{tmp_path}/t.csv: only 19 of 24 rows are usable examples; t.csv: 5 rows skipped: empty label (lines 3, 4, 5, "
        "...); mend the others, or take them out (up to 20% are skipped)"
    )


# Bad input.


def test_missing_columns(tmp_path: Path) -> None:
    found = "columns found: id, sentence, label;"
    content = "\tid\tsentence\tlabel\n0\t1\ta\t1\n"
    assert f"{tmp_path}/t.csv: no column 'text'; {found} set text: of task 'one'" in error(tmp_path, content)
    renamed = dataclasses.replace(ONE, text=["sentence"], id="key")
    assert f"no column 'key'; {found} set id: of task 'one'" in error(tmp_path, content, renamed)
    for name, lines in (("t.csv", "id,text\n1,a\n"), ("t.jsonl", '{"id": "1", "text": "a"}\n')):
        message = error(tmp_path, lines, name=name)
        assert "no label column 'label'; columns found: id, text; an unlabelled split is for" in message
    assert "no label column" in error(tmp_path, _parquet_bytes(id=["1"], text=["a"]), name="t.parquet")


@pytest.mark.parametrize(
    ("content", "name", "expected"),
    [
        (
            b"id,text,label\n1,a,1\n2,caf\xe9,0\n",
            "t.csv",
            ":3: byte 0xe9 is not UTF-8 (byte offset 25); save it as UTF-8",
        ),
        (b"\xef\xbb\xbfid,text,label\n1,\xff,1\n", "t.csv", ":2: byte 0xff is not UTF-8 (byte offset 19); save"),
        ("id,text,label\n1,a,1\n".encode("utf-16"), "t.csv", ":1: byte 0xff is not UTF-8 (byte offset 0); save"),
        (b"id,text,label\n1,a\0b,1\n", "t.csv", ":2: a NUL byte (byte offset 17); save it as UTF-8"),
        (b'{"id": 1}\n{"id": 2\n', "t.jsonl", ":2: not JSON ("),
        (b'{"id": 1}\n[1, 2]\n', "t.jsonl", ":2: a JSON list; expected one JSON object per line"),
        (b'{"id": 1}\n' + b"[" * 200_000 + b"\n", "t.jsonl", ":2: not JSON ("),
        (b'{"id": 1, "text": "\\ud800", "label": 1}\n', "t.jsonl", ":1: not JSON ("),
        (b'{"id": 1, "text": ["a"], "label": 1}\n', "t.jsonl", ":1: column 'text' holds a list; expected text"),
        (b'{"id": 1, "text": "a", "label": {}}\n', "t.jsonl", ":1: label out of range: label is {}"),
        (b'{"id": "\\u0000", "text": "a", "label": 1}\n', "t.jsonl", ":1: the id in column 'id' is one with a NUL"),
        (b"", "t.csv", ": empty file; expected a header line"),
        (b"\n \n", "t.csv", ": empty file; expected a header line"),
        (b"", "t.parquet", ": damaged, or not a Parquet file ("),
        (b"PAR1 and nothing else", "t.csv", ": damaged, or not a Parquet file ("),
        (_parquet_bytes(**_COLUMNS)[:-20], "t.parquet", ": damaged, or not a Parquet file ("),
        (gzip.compress(b"id,text,label\n", mtime=0)[:-9], "t.csv.gz", ": damaged gzip file ("),
        (gzip.compress(b"id\r1,\xff", mtime=0), "t.csv.gz", ":2: byte 0xff is not UTF-8 (byte offset 5); save it"),
        (_parquet_bytes(id=["1"], text=[b"\xff"], label=[1]), "t.parquet", ": row 0: column 'text' holds a bytes"),
        (b"id,text,label\n", "t.csv", ": no usable examples: no rows"),
        (b"id,text,label\n1,a,\n", "t.csv", ": no usable examples; t.csv: 1 row skipped: empty label (line 2)"),
        (b"id,text,label\n1,a,1\n ,b,0\n", "t.csv", ":3: the id in column 'id' is empty; each example needs its own"),
        (b"id,text,label\n" + b"i" * 1001 + b",b,0\n", "t.csv", ":2: the id in column 'id' is longer than 1000"),
        (b"id,text,label,text\n1,a,1,b\n", "t.csv", ": column 'text' is there 2 times; name each column once"),
    ],
    ids=lambda v: v[:40] if isinstance(v, str) else "",
)
def test_bad_files(tmp_path: Path, content: bytes, name: str, expected: str) -> None:
    message = error(tmp_path, content, name=name)
    assert message.startswith(f"{tmp_path}/{name}")
    assert expected in message


def test_duplicated_id_names_both_lines(tmp_path: Path) -> None:
    message = error(tmp_path, "id,text,label\n1,a,1\n2,b,0\n1,c,0\n")
    assert message == f"{tmp_path}/t.csv:4: id '1' is already at {tmp_path}/t.csv:2; ids must be unique"


def test_files_that_are_not_there(tmp_path: Path) -> None:
    def message(task: Task, root: Path | None, split: str = "train") -> str:
        with pytest.raises(UserError) as e:
            read_split(task, split, root, need_labels=True)
        return str(e.value)

    assert message(ONE, tmp_path) == (f"{tmp_path}/t.csv: no such file; set --data.root to the folder that holds t.csv")
    assert "no such file, nor its folder; set --data.root" in message(ONE, tmp_path / "nowhere")
    assert message(ONE, None) == "task 'one': --data.root is not set; it is the folder that holds t.csv"
    offer = "set dev: to one, or to a share of the training file, as in dev: 0.2, in the task"
    offer += "; or train with --data.folds 5, without one"
    assert message(ONE, tmp_path, "dev") == f"task 'one': it names no dev file; {offer}"
    (tmp_path / "t.csv").mkdir()
    assert f"{tmp_path}/t.csv: a folder; expected the train file" in message(ONE, tmp_path)
    with pytest.raises(ValueError, match="expected one of train, dev, test"):
        read_split(ONE, "valid", tmp_path, need_labels=True)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read anything: chmod would test nothing there
    (tmp_path / "t.csv").touch()
    with pytest.raises(UserError, match=r"t\.csv: cannot be read \(Permission denied\)"):
        read_split(ONE, "train", tmp_path, need_labels=True)


def test_absolute_path_needs_no_root(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id,text,label\n1,a,1\n")
    task = dataclasses.replace(ONE, train=str(tmp_path / "t.csv"))
    assert len(read_split(task, "train", None, need_labels=True)) == 1


# Fingerprint and shared texts.


def _split(texts: list[list[str]], labels: list[int] | None = None, ids: list[str] | None = None) -> Split:
    n = len(texts[0])
    return Split(np.array(ids or [str(i) for i in range(n)]), texts, None if labels is None else np.array(labels))


def test_fingerprint_changes_with_ids_texts_labels_and_order() -> None:
    splits = [
        _split([["a", "b"]]),
        _split([["a", "b"]], [0, 1]),
        _split([["a", "b"]], [1, 0]),
        _split([["b", "a"]]),
        _split([["a", "b"]], ids=["1", "0"]),
        _split([["a"], ["b"]]),
        _split([["a", "b"], ["", ""]]),
        _split([["ab", ""]]),
    ]
    prints = [fingerprint(s) for s in splits]
    assert len(set(prints)) == len(prints)
    assert all(len(p) == 16 and int(p, 16) >= 0 for p in prints)
    assert fingerprint(_split([["a", "b"]], [0, 1])) == prints[1]


def test_shared_texts_counts_examples_of_the_second_and_compares_whole_pairs() -> None:
    a = _split([["x", "y", "z"], ["1", "2", "3"]])
    b = _split([["x", "x", "y", "2"], ["1", "1", "3", "y"]])
    assert shared_texts(a, b) == 2
    assert shared_texts(b, a) == 1


# The hub, offline: a local folder that `datasets` loads, in a process whose caches are in tmp_path.

HUB = """
import sys
from pathlib import Path
from datasets import ClassLabel, Dataset, Features, Value
from lora_ensemble.errors import UserError
from lora_ensemble.text.readers import read_split
from lora_ensemble.tasks import Task

def show(task, split, need_labels=True):
    try:
        s = read_split(task, split, None, need_labels=need_labels)
        print(s.ids.tolist(), s.texts, None if s.labels is None else s.labels.tolist(), s.notices)
    except UserError as e:
        print("error:", e)

files, typed = sys.argv[1:]
task = Task(name="t", kind="binary", text=["text"], dataset=files)
show(task, "train")
show(task, "dev")
show(task, "test", need_labels=False)
show(Task(name="t", kind="binary", text=["text"], dataset=files, train="train[1:]"), "train")
show(Task(name="t", kind="binary", text=["text"], dataset=files, dev="nope"), "dev")
show(Task(name="t", kind="binary", text=["other"], dataset=files), "train")
show(Task(name="t", kind="binary", text=["text"], dataset="nobody/has-this-one"), "train")
features = Features({"key": Value("string"), "text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
for name, labels in (("train", [1, 0, 1]), ("test", [-1, -1, -1])):
    data = Dataset.from_dict({"key": ["a", "b", "c"], "text": ["x", "y", "z"], "label": labels}, features=features)
    data.to_parquet(f"{typed}/{name}.parquet")
show(Task(name="t", kind="binary", text=["text"], label_names=["pos", "neg"], id="key", dataset=typed), "train")
show(Task(name="t", kind="binary", text=["text"], id="key", dataset=typed), "train")
show(Task(name="t", kind="binary", text=["text"], id="key", dataset=typed), "test", need_labels=False)
"""


@pytest.fixture(scope="module")
def hub_lines(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the script above prints."""
    tmp = tmp_path_factory.mktemp("hub")
    files, typed = tmp / "files", tmp / "typed"
    files.mkdir()
    typed.mkdir()
    (files / "train.csv").write_text("text,label\none,1\ntwo,0\nthree,\nfour,0\nfive,0\nsix,0\n")
    (files / "validation.csv").write_text("text,label\nfour,1\n")
    (files / "test.csv").write_text("text,label\nfive,\n")
    env = os.environ | {"HF_HOME": str(tmp / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HUB, str(files), str(typed)], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "%|" not in done.stderr  # no progress bars where nobody looks
    return [line for line in done.stdout.splitlines() if line.startswith(("[", "error:"))]


def test_hub_split_names_and_values(hub_lines: list[str]) -> None:
    notice = hub_lines[0].partition("[['one', 'two', 'four', 'five', 'six']] [1, 0, 0, 0, 0] ")[2]
    assert hub_lines[0].startswith("['0', '1', '3', '4', '5'] ")
    assert "files [train]: 1 row skipped: empty label (row 2)" in notice
    assert hub_lines[1] == "['0'] [['four']] [1] []"
    assert hub_lines[2] == "['0'] [['five']] None []"
    assert hub_lines[3].startswith("['0', '2', '3', '4'] [['two', 'four', 'five', 'six']] ")


def test_hub_errors_are_one_line(hub_lines: list[str]) -> None:
    assert "[nope]: cannot be loaded (ValueError: Unknown split" in hub_lines[4]
    assert "no column 'other'; columns found: text, label;" in hub_lines[5]
    assert hub_lines[6].startswith("error: data set nobody/has-this-one [train]: cannot be loaded (")
    assert "whether the hub can be reached" in hub_lines[6]


def test_hub_class_labels_by_name_and_by_number(hub_lines: list[str]) -> None:
    assert hub_lines[7] == "['a', 'b', 'c'] [['x', 'y', 'z']] [0, 1, 0] []"
    assert hub_lines[8] == "['a', 'b', 'c'] [['x', 'y', 'z']] [1, 0, 1] []"
    assert hub_lines[9] == "['a', 'b', 'c'] [['x', 'y', 'z']] None []"


def test_hub_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    task = dataclasses.replace(ONE, dataset="some/thing")
    with pytest.raises(UserError, match=r"pip install 'lora-ensemble\[hub\]'"):
        read_split(task, "train", None, need_labels=True)
