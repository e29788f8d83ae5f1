"""Anyone's predictions become members of the pool: read, aligned with the examples by id, checked, scored and written.

All files are read and checked before the first member is written. Axes: N examples of a split, C outputs of the task.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lora_ensemble import __version__
from lora_ensemble.dicor.choose.probabilities import soft_votes
from lora_ensemble.dicor.imports import truth
from lora_ensemble.dicor.imports.outputs import Form, Outputs, to_logits
from lora_ensemble.dicor.imports.sources import Source, by_column, read_sources
from lora_ensemble.errors import UserError
from lora_ensemble.pool import (
    MemberRecord,
    check_name,
    checksum,
    logits_file,
    member_folder,
    read_array,
    read_examples,
    read_records,
    write_examples,
    write_member,
)
from lora_ensemble.scores import one_label, score
from lora_ensemble.tasks import PRESETS, Kind

IMPORTED = "imported"
"""The key of a record's settings that says where each split's logits came from."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to import, and as what; what is not given is found out or is an error that asks for it."""

    pool: Path
    task: str
    files: Sequence[Path]
    labels: Path | None = None
    """Ids and true labels; not needed where the pool has the split's examples."""
    kind: Kind | None = None
    split: str = "dev"
    names: Sequence[str] = ()
    """Names of the members, in the order of files and models; empty: those of the models, or of the files."""
    form: Form = "auto"
    columns: Sequence[str] = ()
    """The outputs, in the order of the labels; empty: found by their names."""
    member_columns: Sequence[str] = ()
    """Columns of tables that are a model each, instead of a file; they name the members."""
    id_column: str | None = None
    label_column: str | None = None
    model_column: str | None = None
    label_names: Sequence[str] = ()
    by_row: bool = False
    """Rows of tables without ids are in the order of the labels file (those of arrays always are)."""
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class Imported:
    """One member after the import."""

    name: str
    written: bool
    """False where the pool had the very same logits already."""
    score: float | None
    """The task's score on the split; None where labels are unknown, NaN where r is undefined."""
    examples: int
    kind: Kind
    form: Form
    file: str


@dataclass(frozen=True, eq=False)
class _Ready:
    """A member that only needs to be written; ``old`` is what is there now."""

    name: str
    source: Source
    outputs: Outputs
    logits: np.ndarray
    old: MemberRecord | None


def import_predictions(request: Request) -> tuple[list[Imported], list[str]]:
    """Make members of files of predictions, and say what was done and what is worth knowing.

    Importing the same again changes nothing. ``UserError`` where files, labels, pool and request do not fit together.
    """
    if request.columns and request.member_columns:
        raise UserError("--columns are one model's, --member-columns a model each; give one of them")
    sources = [
        source
        for path in request.files
        for source in read_sources(path, id_column=request.id_column, model_column=request.model_column)
    ]
    if request.member_columns:
        sources = [one for source in sources for one in by_column(source, request.member_columns)]
    names = _names(sources, request)
    records = read_records(request.pool, request.task)
    there = {record.name: record for record in records}
    unknown = [name for name in names if name not in there]
    if request.split != "dev" and unknown:
        folder = member_folder(request.pool, request.task, unknown[0])
        raise UserError(
            f"{folder}: no such member; import its dev predictions first (--split dev): members are chosen by them"
        )
    replaced = set(names) if request.overwrite and request.split == "dev" else set()
    found = truth.find(
        request.pool,
        request.task,
        request.split,
        [record for record in records if record.name not in replaced],
        request.labels,
        kind=request.kind,
        label_names=request.label_names,
        id_column=request.id_column,
        label_column=request.label_column,
        by_row=request.by_row,
    )
    preset = PRESETS[request.task].label if request.task in PRESETS else "label"
    notices = [*found.notices, *one_label(found.examples.labels, found.labels, f"{request.split} labels")]
    notices += [notice for source in sources for notice in source.notices]
    ready = []
    for name, source in zip(names, sources, strict=True):
        outputs = to_logits(
            source,
            found.kind,
            found.labels,
            request.form,
            request.columns or ([source.name] if request.member_columns else []),
            label_column=request.label_column or preset,
        )
        rows = truth.rows_of_examples(source, found, request.split, by_row=request.by_row, notices=notices)
        logits = outputs.logits[rows]
        ready.append(_Ready(name, source, outputs, logits, there.get(name)))
        notices += outputs.notices
    # Everything that can be refused is, before anything is written.
    same = [_is_there(one, found, request) for one in ready]
    print_ = write_examples(request.pool, request.task, request.split, found.examples.ids, found.examples.labels)
    done = []
    for one, unchanged in zip(ready, same, strict=True):
        value = _score(one.logits, found)
        if not unchanged:
            _write(one, found, request, print_, value, notices)
        if value is not None and math.isnan(value):
            notices.append(f"{one.name}: its predictions are constant, so that it has no score; it cannot be selected")
        if value is not None and _is_truth(one.logits, found, value):
            notices.append(
                f"{one.name}: never wrong and always certain on {len(one.logits)} {request.split} examples: are these "
                "the true labels, or did it learn from these examples? say which columns to take with --columns"
            )
        done.append(
            Imported(
                name=one.name,
                written=not unchanged,
                score=value,
                examples=len(one.logits),
                kind=found.kind,
                form=one.outputs.form,
                file=one.source.path.name,
            )
        )
    return done, list(dict.fromkeys(notices))


def _names(sources: Sequence[Source], request: Request) -> list[str]:
    """A name for each source; ``UserError`` where two have the same, or where as many names were not given."""
    if request.names and len(request.names) != len(sources):
        found = ", ".join(f"{s.path.name}{f' ({s.name})' if s.name else ''}" for s in sources[:8])
        raise UserError(f"--name: {len(request.names)} names for {len(sources)} models ({found}); give one for each")
    names = list(request.names) or [_name_of(source, request.split) for source in sources]
    seen: dict[str, Source] = {}
    for name, source in zip(names, sources, strict=True):
        try:
            check_name(name)
        except UserError as e:
            raise UserError(f"{source.where}: {e}; name it with --name") from e
        if name in seen:
            raise UserError(
                f"{source.where} and {seen[name].where} would both be member {name!r}; name them with --name"
            )
        seen[name] = source
    return names


def _name_of(source: Source, split: str) -> str:
    """What the file calls the model, or the file's name without its ending and the split's: xgb for xgb-dev.csv."""
    name = source.name or re.sub(rf"(?<=.)[-_.]{split}$", "", Path(source.path.name.removesuffix(".gz")).stem)
    return re.sub(r"[^\w.+-]+", "-", name).lstrip("._-")


def _score(logits: np.ndarray, found: truth.Truth) -> float | None:
    return None if found.examples.labels is None else score(logits, found.examples.labels, found.kind)


def _is_truth(logits: np.ndarray, found: truth.Truth, value: float) -> bool:
    """Whether logits (N, C) say the true labels and nothing else: one answer for each class, values on a line."""
    labels = found.examples.labels
    if value < 1 - 1e-9 or labels is None:
        return False
    if found.kind == "regression":
        return len(labels) > 2
    answers = np.unique(soft_votes(logits, found.kind).round(2), axis=0)
    return len(answers) <= len(np.unique(labels)) < len(labels)


def _is_there(one: _Ready, found: truth.Truth, request: Request) -> bool:
    """Whether the pool has these very logits; ``UserError`` where it has others that may not be replaced."""
    old, split = one.old, request.split
    if old is None:
        return False
    folder = member_folder(request.pool, request.task, one.name)
    if split in old.examples and logits_file(split) in old.files:
        # Both sides are compared as the numbers that they are, whatever file they came from.
        there = read_array(request.pool, old, logits_file(split))
        examples = read_examples(request.pool, request.task, split, old.examples[split])
        same_task = (old.kind, old.labels) == (found.kind, found.labels)
        if same_task and np.array_equal(there, one.logits) and _same_examples(examples, found):
            return True
    elif split != "dev":
        return False
    source = old.settings.get(IMPORTED, {}).get(split)
    if source is None:
        raise UserError(
            f"{folder}: this member was trained, and has its own {split} predictions; give another name with --name"
        )
    if not request.overwrite:
        raise UserError(
            f"{folder}: already there with other {split} predictions (from {source['file']}); replace them with "
            "--overwrite, or give another name with --name"
        )
    return False


def _same_examples(examples: truth.Examples, found: truth.Truth) -> bool:
    a, b = examples.labels, found.examples.labels
    labels = a is b if a is None or b is None else np.array_equal(a, b)
    return labels and np.array_equal(examples.ids, found.examples.ids)


def _write(
    one: _Ready, found: truth.Truth, request: Request, print_: str, value: float | None, notices: list[str]
) -> None:
    origin = {
        "file": one.source.path.name,
        "sha256": checksum(one.source.path).removeprefix("sha256:"),
        "model": one.source.name or None,
        "from": one.outputs.form,
    }
    files = {logits_file(request.split): one.logits}
    if request.split != "dev":
        old = one.old
        assert old is not None  # _is_there saw to it
        settings = {**old.settings, IMPORTED: {**old.settings.get(IMPORTED, {}), request.split: origin}}
        record = replace(old, settings=settings, examples={**old.examples, request.split: print_})
        write_member(request.pool, record, files, keep=old)
        return
    if one.old is not None and (others := sorted(set(one.old.examples) - {"dev"})):
        # The old model's predictions of another split are not the new model's.
        notices.append(f"{one.name}: its {', '.join(others)} predictions went with the old ones; import them again")
    record = MemberRecord(
        name=one.name,
        task=request.task,
        kind=found.kind,
        labels=list(found.labels),
        finished=True,
        score=None if value is None or math.isnan(value) else value,
        examples={"dev": print_},
        settings={IMPORTED: {"dev": origin}},
        versions={"lora-ensemble": __version__},
    )
    write_member(request.pool, record, files)
