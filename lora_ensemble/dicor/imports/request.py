"""What ``dicor import`` is asked for. Nothing heavy is imported: ``dicor --help`` needs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from lora_ensemble.tasks import PRESETS, Kind

Form = Literal["auto", "logits", "probabilities", "decisions"]
Column = Annotated[str, "COLUMN"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """Make members of predictions that any model made. A file is a table with a header (CSV, TSV, JSON lines, Parquet)
    or an array (.npy, .npz); its rows are matched with the examples by id. A table needs a column of ids (id) and one
    column for each class, named after its label (p_0, p_1, ...), or one column: of the positive class, or of values. A
    table with a column "model" and an .npz of several arrays are several members. Pickles are never loaded."""

    files: Sequence[Annotated[Path, "FILE"]]
    """predictions of one split, of one model or several"""
    pool: Annotated[Path, "DIR"]
    """the pool to add to; made where it is not there"""
    task: str
    """the task in the pool: one that is there, or a new one"""
    task_kind: Kind | None = None
    """needed for a new task"""
    labels: Annotated[Path, "FILE"] | None = None
    """ids and true labels of the split (test: ids suffice); not needed where the pool has them"""
    split: Literal["dev", "test"] = "dev"
    """default: dev; test adds to a member that is there"""
    name: Sequence[str] = ()
    """a name for each model (default: the models', or the files' names)"""
    from_: Form = "auto"
    """what the numbers are; auto (the default) asks where it could be mistaken; decisions: class labels only"""
    columns: Sequence[Column] = ()
    """of the outputs, in the order of the labels"""
    member_columns: Sequence[Column] = ()
    """each is a member: a table in wide format"""
    label_names: Sequence[Annotated[str, "LABEL"]] = ()
    """in the order of the outputs; positive last"""
    id: Column | None = None
    """of the ids (default: id, ids, or a nameless first column)"""
    label: Column | None = None
    """of the true labels in the labels file (default: label, or the preset's)"""
    model_column: Column | None = None
    """of the models' names, in a table of several (default: model)"""
    by_row: bool = False
    """tables without ids: their rows are in the order of the labels"""
    overwrite: bool = False
    """replace other predictions that were imported under the same name"""

    @property
    def label_column(self) -> str:
        """Where the true labels are, in the labels file or beside the predictions."""
        return self.label or (PRESETS[self.task].label if self.task in PRESETS else "label")
