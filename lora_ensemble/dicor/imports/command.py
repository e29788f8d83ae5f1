"""``dicor import``: its options, and what it prints. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from lora_ensemble.errors import Parser

FORMS = ("auto", "logits", "probabilities", "decisions")
KINDS = ("multiclass", "binary", "regression")

DESCRIPTION = """\
Make members of predictions that any model made. A file is a table with a header (CSV, TSV, JSON lines, Parquet) or an
array (.npy, .npz); its rows are matched with the examples by id. A table needs a column of ids (id) and one column for
each class, named after its label (p_0, p_1, ...), or one column: of the positive class, or of values. A table with a
column "model" and an .npz of several arrays are several members. Pickles are never loaded."""


def add_parser(commands: _SubParsersAction[Parser]) -> None:
    """Add the command to those of ``dicor``."""
    parser = commands.add_parser("import", help="predictions of any model become members", description=DESCRIPTION)
    add = parser.add_argument
    add("files", nargs="+", type=Path, metavar="FILE", help="predictions of one split, of one model or several")
    add("--pool", type=Path, required=True, metavar="DIR", help="the pool to add to; made where it is not there")
    add("--task", required=True, help="the task in the pool: one that is there, or a new one")
    add("--task-kind", choices=KINDS, help="needed for a new task")
    add(
        "--labels",
        type=Path,
        metavar="FILE",
        help="ids and true labels of the split (test: ids suffice); not needed where the pool has them",
    )
    add("--split", choices=("dev", "test"), default="dev", help="default: dev; test adds to a member that is there")
    add("--name", nargs="+", default=[], help="a name for each model (default: the models', or the files' names)")
    add(
        "--from",
        dest="form",
        choices=FORMS,
        default="auto",
        help="what the numbers are; auto (the default) asks where it could be mistaken; decisions: class labels only",
    )
    add("--columns", nargs="+", default=[], metavar="COLUMN", help="of the outputs, in the order of the labels")
    add("--member-columns", nargs="+", default=[], metavar="COLUMN", help="each is a member: a table in wide format")
    add("--label-names", nargs="+", default=[], metavar="LABEL", help="in the order of the outputs; positive last")
    add("--id", metavar="COLUMN", help="of the ids (default: id, ids, or a nameless first column)")
    add("--label", metavar="COLUMN", help="of the true labels in the labels file (default: label, or the preset's)")
    add("--model-column", metavar="COLUMN", help="of the models' names, in a table of several (default: model)")
    add("--by-row", action="store_true", help="tables without ids: their rows are in the order of the labels")
    add("--overwrite", action="store_true", help="replace other predictions that were imported under the same name")


def run(options: argparse.Namespace) -> None:
    """Import, print a line for each member, and what is worth knowing to stderr."""
    from lora_ensemble.dicor.imports.importing import Request, import_predictions

    done, notices = import_predictions(
        Request(
            pool=options.pool,
            task=options.task,
            files=options.files,
            labels=options.labels,
            kind=options.task_kind,
            split=options.split,
            names=options.name,
            form=options.form,
            columns=options.columns,
            member_columns=options.member_columns,
            id_column=options.id,
            label_column=options.label,
            model_column=options.model_column,
            label_names=options.label_names,
            by_row=options.by_row,
            overwrite=options.overwrite,
        )
    )
    for notice in notices:
        print(f"dicor: notice: {notice}", file=sys.stderr)
    width = max(len(one.name) for one in done)
    for one in done:
        name = "Pearson r" if one.kind == "regression" else "accuracy"
        number = "undefined" if one.score != one.score else f"{one.score or 0:.4f}"
        score = "no labels" if one.score is None else f"{name} {number}"
        state = f"{one.form} from {one.file}" if one.written else "was there already, unchanged"
        print(f"{one.name:<{width}}  {options.split} {score}, {one.examples} examples ({state})")
