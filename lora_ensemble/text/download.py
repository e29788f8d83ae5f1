"""``lora-ensemble data download``: the public data sets behind the presets, in the course's format."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

from lora_ensemble.errors import Parser, UserError
from lora_ensemble.files import replacing
from lora_ensemble.tasks import PRESETS, Task
from lora_ensemble.text.readers import HUB_SPLITS
from lora_ensemble.text.tables import Table, read_hub

MANIFEST = "downloaded.json"


# Of each preset: a data set of the hub, its configuration, and its text columns; a label that is not public is -1.
SOURCES: dict[str, tuple[str, str | None, list[str]]] = {
    "sst": ("SetFit/sst5", None, ["text"]),
    "quora": ("nyu-mll/glue", "qqp", ["question1", "question2"]),
    "sts": ("nyu-mll/glue", "stsb", ["sentence1", "sentence2"]),
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
    """Write each task's files below ``root``, and what they are (SHA-256, 16 digits) into ``downloaded.json``.

    ``UserError`` where a file is there with other content, before anything of its task is written.
    """
    root.mkdir(parents=True, exist_ok=True)
    for name in tasks:
        task, (dataset, config, texts) = PRESETS[name], SOURCES[name]
        files: dict[str, bytes] = {}
        for split, of_hub in HUB_SPLITS.items():
            table = read_hub(dataset, config, of_hub, [*texts, "label"], "label", [])
            files[getattr(task, split)] = course_format(task, split, table, [*texts, "label"])
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
        noted[name] = {"dataset": dataset, "config": config, "files": fingerprints}
        with replacing(manifest) as beside:
            beside.write_text(json.dumps(noted, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def course_format(task: Task, split: str, table: Table, columns: Sequence[str]) -> bytes:
    """A table as a file of the course's: a running number, ``id``, texts and, where it is public, the label.

    ``columns``: its texts and its label.
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
