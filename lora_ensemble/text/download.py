"""``lora-ensemble data download``: the public data sets behind the presets, in the course's format."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_ensemble.errors import Parser, UserError
from lora_ensemble.files import replacing
from lora_ensemble.tasks import PRESETS, Task
from lora_ensemble.text.readers import HUB_SPLITS
from lora_ensemble.text.tables import Table, read_hub

MANIFEST = "downloaded.json"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a preset's examples come from on the Hugging Face hub."""

    dataset: str
    config: str | None
    text: tuple[str, ...]
    """Its text columns, in the order of the preset's."""
    label: str
    """Its label column; -1 where it is not public."""


SOURCES = {
    "sst": Source(dataset="SetFit/sst5", config=None, text=("text",), label="label"),
    "quora": Source(dataset="nyu-mll/glue", config="qqp", text=("question1", "question2"), label="label"),
    "sts": Source(dataset="nyu-mll/glue", config="stsb", text=("sentence1", "sentence2"), label="label"),
}


def run(args: Sequence[str]) -> int:
    """Run ``data``; returns the exit code. ``UserError`` for what the user can put right."""
    parser = Parser(prog="lora-ensemble data")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    options = commands.add_parser(
        "download",
        help="fetch SST-5, Quora question pairs and STS-B",
        description="Fetch the public SST-5, QQP and STS-B from the Hugging Face hub and write them in the course's "
        "format. SST-5 is split as in the course; QQP and STS-B as in GLUE, whose test labels are not public: other "
        "examples and other numbers than the course's.",
    )
    options.add_argument("--root", type=Path, required=True, metavar="DIR", help="where the files go")
    options.add_argument("--tasks", nargs="+", choices=list(SOURCES), default=list(SOURCES), help="default: all three")
    given = parser.parse_args(args)
    download(given.root, given.tasks)
    return 0


def download(root: Path, tasks: Sequence[str]) -> None:
    """Write each task's files below ``root``, and say their fingerprints.

    A file that is there with the same content stays; one with other content is a ``UserError``, before anything of its
    task is written. The fingerprints (SHA-256, 16 digits) and where the data came from go into ``downloaded.json``.
    """
    root.mkdir(parents=True, exist_ok=True)
    for name in tasks:
        task, source = PRESETS[name], SOURCES[name]
        files: dict[str, bytes] = {}
        for split, of_hub in HUB_SPLITS.items():
            columns = [*source.text, source.label]
            table = read_hub(source.dataset, source.config, of_hub, columns, source.label, [])
            files[getattr(task, split)] = course_format(task, split, table, columns)
        for file, content in files.items():
            if (root / file).is_file() and (root / file).read_bytes() != content:
                raise UserError(f"{root / file}: is there with other content; choose another --root, or remove it")
        fingerprints = {file: hashlib.sha256(content).hexdigest()[:16] for file, content in files.items()}
        for file, content in files.items():
            with replacing(root / file) as beside:
                beside.write_bytes(content)
            count = content.count(b"\n") - 1
            print(f"{root / file}: {count} examples, fingerprint {fingerprints[file]}", flush=True)
        manifest = root / MANIFEST
        noted = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
        noted[name] = {"dataset": source.dataset, "config": source.config, "files": fingerprints}
        with replacing(manifest) as beside:
            beside.write_text(json.dumps(noted, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def course_format(task: Task, split: str, table: Table, columns: Sequence[str]) -> bytes:
    """A table as a file of the course's: tab-separated, a running number, ``id``, texts, label.

    ``columns``: its texts and its label. The label column is left out where no label is public.
    """
    for column in columns:
        if column not in table.columns:
            found = ", ".join(table.found)
            raise UserError(f"{table.where}: no column {column!r}; found {found}; the data set has changed")
    labelled = all(label is not None and float(label) >= 0 for label in table.columns[columns[-1]])
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(["", task.id, *task.text, *([task.label] if labelled else [])])
    for number, (*texts, label) in enumerate(zip(*(table.columns[column] for column in columns), strict=True)):
        cells = [" ".join(str(text).split()) for text in texts]
        writer.writerow([number, f"{split}-{number}", *cells, *([label] if labelled else [])])
    return text.getvalue().encode()
