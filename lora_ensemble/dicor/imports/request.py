"""What ``dicor import`` is asked for. Nothing heavy is imported: ``dicor --help`` needs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from lora_ensemble.dicor.options import option
from lora_ensemble.tasks import PRESETS, Kind

Form = Literal["auto", "logits", "probabilities", "decisions"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """Make members of predictions that any model made. A file is a table with a header (CSV, TSV, JSON lines, Parquet)
    or an array (.npy, .npz); its rows are matched with the examples by id. A table needs a column of ids (id) and one
    column for each class, named after its label (p_0, p_1, ...), or one column: of the positive class, or of values. A
    table with a column "model" and an .npz of several arrays are several members. Pickles are never loaded."""

    files: Sequence[Path]
    pool: Path = option("the pool to add to; made where it is not there", required=True, type=Path, metavar="DIR")
    task: str = option("the task in the pool: one that is there, or a new one", required=True)
    task_kind: Kind | None = option("needed for a new task", choices=get_args(Kind))
    labels: Path | None = option(
        "ids and true labels of the split (test: ids suffice); not needed where the pool has them",
        type=Path,
        metavar="FILE",
    )
    split: str = option("default: dev; test adds to a member that is there", "dev", choices=("dev", "test"))
    name: Sequence[str] = option("a name for each model (default: the models', or the files' names)", (), nargs="+")
    from_: Form = option(
        "what the numbers are; auto (the default) asks where it could be mistaken; decisions: class labels only",
        "auto",
        choices=get_args(Form),
    )
    columns: Sequence[str] = option("of the outputs, in the order of the labels", (), nargs="+", metavar="COLUMN")
    member_columns: Sequence[str] = option("each is a member: a table in wide format", (), nargs="+", metavar="COLUMN")
    label_names: Sequence[str] = option("in the order of the outputs; positive last", (), nargs="+", metavar="LABEL")
    id: str | None = option("of the ids (default: id, ids, or a nameless first column)", metavar="COLUMN")
    label: str | None = option(
        "of the true labels in the labels file (default: label, or the preset's)", metavar="COLUMN"
    )
    model_column: str | None = option("of the models' names, in a table of several (default: model)", metavar="COLUMN")
    by_row: bool = option("tables without ids: their rows are in the order of the labels", False)
    overwrite: bool = option("replace other predictions that were imported under the same name", False)

    @property
    def label_column(self) -> str:
        """Where the true labels are, in the labels file or beside the predictions."""
        return self.label or (PRESETS[self.task].label if self.task in PRESETS else "label")
