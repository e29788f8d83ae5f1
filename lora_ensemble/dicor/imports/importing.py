"""Anyone's predictions become members of the pool: read, aligned with the examples by id, checked, scored and written.

All files are read and checked before the first member is written. Axes: N examples of a split, C outputs of the task.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lora_ensemble import __version__
from lora_ensemble.dicor.choose.probabilities import soft_votes
from lora_ensemble.dicor.imports.outputs import to_logits
from lora_ensemble.dicor.imports.sources import Source, read_models
from lora_ensemble.dicor.imports.truth import Truth, find_truth, rows_of_examples
from lora_ensemble.dicor.options import Form, Request
from lora_ensemble.errors import UserError
from lora_ensemble.pool import (
    MemberRecord,
    check_name,
    checksum,
    logits_file,
    member_folder,
    read_array,
    read_records,
    write_examples,
    write_member,
)
from lora_ensemble.scores import as_binary, one_label, score
from lora_ensemble.tasks import SCORES

IMPORTED = "imported"
"""The key of a record's settings that says where each split's logits came from."""


@dataclass(frozen=True, eq=False)
class Imported:
    """One member of the import."""

    name: str
    source: Source
    logits: np.ndarray  # (N, C) float32 in the order of the pool's examples
    form: Form  # what the file held
    score: float | None  # the task's score on the split; None where labels are unknown, NaN where r is undefined
    old: MemberRecord | None  # what was under the name
    unchanged: bool  # whether that had these very logits


def import_predictions(request: Request) -> tuple[list[Imported], Truth, list[str]]:
    """Make members of files of predictions; returns them, what they are of, and what is worth knowing.

    Importing the same again changes nothing. ``UserError`` where files, labels, pool and request do not fit together.
    """
    pool, task, split = request.pool, request.task, request.split
    if request.columns and request.member_columns:
        raise UserError("--columns are one model's, --member-columns a model each; give one of them")
    sources = _named([source for path in request.files for source in read_models(path, request)], request)
    records = {record.name: record for record in read_records(pool, task)}
    if split == "test" and (unknown := [name for name in sources if name not in records]):
        advice = "import its dev predictions first (--split dev): members are chosen by them"
        raise UserError(f"{member_folder(pool, task, unknown[0])}: no such member; {advice}")
    replaced = sources if request.overwrite and split == "dev" else ()
    truth = find_truth(request, [record for name, record in records.items() if name not in replaced])
    examples = truth.examples
    notices = [*truth.notices, *one_label(examples.labels, truth.task.labels, f"{split} labels")]
    imported = []
    for name, source in sources.items():
        outputs, form = to_logits(source, truth.task, request)
        logits, old = outputs[rows_of_examples(source, truth, request)], records.get(name)
        value = (
            None if examples.labels is None else score(logits, examples.labels, truth.task.kind, truth.task.scored_by)
        )
        unchanged = old is not None and _is_there(old, logits, truth, request)
        imported.append(Imported(name, source, logits, form, value, old, unchanged))
        notices += source.notices
    # Everything that can be refused has been, before anything is written.
    write_examples(pool, task, split, examples.ids, examples.labels, examples.groups)
    for member in imported:
        if not member.unchanged:
            _write(member, truth, request, notices)
        notices += _doubts(member, truth, request)
    return imported, truth, list(dict.fromkeys(notices))


def _named(sources: Sequence[Source], request: Request) -> Mapping[str, Source]:
    """Sources by the names of their members; ``UserError`` where two have one name, or names are too few or many."""
    if request.name and len(request.name) != len(sources):
        models = ", ".join(f"{s.path.name}{f' ({s.name})' if s.name else ''}" for s in sources[:8])
        raise UserError(f"--name: {len(request.name)} names for {len(sources)} models ({models}); give one for each")
    named: dict[str, Source] = {}
    for i, source in enumerate(sources):
        name = request.name[i] if request.name else _name_of(source, request.split)
        try:
            check_name(name)
        except UserError as e:
            raise UserError(f"{source.where}: {e}; name it with --name") from e
        if name in named:
            both = f"{source.where} and {named[name].where}"
            raise UserError(f"{both} would both be member {name!r}; name them with --name")
        named[name] = source
    return named


def _name_of(source: Source, split: str) -> str:
    """What the file calls the model, or the file's name without its ending and the split's: xgb for xgb-dev.csv."""
    name = source.name or re.sub(rf"(?<=.)[-_.]{split}$", "", Path(source.path.name.removesuffix(".gz")).stem)
    return re.sub(r"[^\w.+-]+", "-", name).lstrip("._-")


def _is_there(old: MemberRecord, logits: np.ndarray, truth: Truth, request: Request) -> bool:
    """Whether a member has these very logits; ``UserError`` where it has others that may not be replaced."""
    split, folder = request.split, member_folder(request.pool, request.task, old.name)
    if split in old.examples and logits_file(split) in old.files:
        same = (old.kind, old.labels, old.examples[split]) == (truth.task.kind, truth.task.labels, truth.fingerprint)
        # Compared as the numbers that they are, whatever file they came from.
        if same and np.array_equal(read_array(request.pool, old, logits_file(split)), logits):
            return True
    elif split != "dev" or IMPORTED in old.settings:
        return False
    if split not in old.settings.get(IMPORTED, {}):
        raise UserError(
            f"{folder}: this member was trained, and has its own {split} predictions; give another name with --name"
        )
    if not request.overwrite:
        file = old.settings[IMPORTED][split]["file"]
        raise UserError(
            f"{folder}: already there with other {split} predictions (from {file}); replace them with --overwrite, or "
            "give another name with --name"
        )
    return False


def _write(member: Imported, truth: Truth, request: Request, notices: list[str]) -> None:
    """Write a member with its dev logits, or add those of another split to it."""
    split, source = request.split, member.source
    origin = {
        "file": source.path.name,
        "sha256": checksum(source.path).removeprefix("sha256:"),
        "model": source.name or None,
        "from": member.form,
    }
    kept = None if split == "dev" and member.old and "dev" in member.old.examples else member.old
    if kept is None and member.old is not None and (others := sorted(set(member.old.examples) - {"dev"})):
        # The old model's predictions of another split are not the new model's.
        notices.append(f"{member.name}: its {', '.join(others)} predictions went with the old ones; import them again")
    record = kept or MemberRecord(
        name=member.name,
        task=request.task,
        kind=truth.task.kind,
        labels=truth.task.labels,
        finished=True,
        score=None if member.score is None or math.isnan(member.score) else member.score,
        versions={"lora-ensemble": __version__},
    )
    settings = {
        **truth.task.recorded,
        **record.settings,
        IMPORTED: {**record.settings.get(IMPORTED, {}), split: origin},
    }
    record = replace(record, settings=settings, examples={**record.examples, split: truth.fingerprint})
    write_member(request.pool, record, {logits_file(split): member.logits}, keep=kept)


def _doubts(member: Imported, truth: Truth, request: Request) -> list[str]:
    """Notices about predictions that are constant, or that are the true labels themselves."""
    labels, kind = truth.examples.labels, truth.task.kind
    if member.score is None or labels is None:
        return []
    if math.isnan(member.score):
        return [f"{member.name}: its predictions are constant, so that it has no score; it cannot be selected"]
    if kind == "regression":  # values on a line
        certain = len(labels) > 2
    else:  # one answer for each class
        logits, flat, _ = as_binary(member.logits, kind)
        answers = np.unique(soft_votes(logits, flat).round(2), axis=0)
        certain = len(answers) <= len(np.unique(labels)) < len(labels)
    about = SCORES[truth.task.scored_by]
    if abs(member.score - (about.most if about.sign > 0 else about.least)) > 1e-9 or not certain:
        return []
    return [
        f"{member.name}: never wrong and always certain on {len(labels)} {request.split} examples: are these the true "
        "labels, or did it learn from these examples? say which columns to take with --columns"
    ]
