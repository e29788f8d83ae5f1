"""From a record to its members: where they lie, whether they are still those, and that a folder keeps to itself.

A record that ``dicor select`` wrote may name a pool anywhere. A folder that ``lora-ensemble export`` wrote comes from
anyone: it may name nothing outside itself, or it would have files read that are the reader's.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_ensemble.dicor.record import Ensemble, read
from lora_ensemble.errors import UserError
from lora_ensemble.pool import MemberRecord, logits_file, member_folder, read_record

FORMAT, RECORD, CONFIG = "lora-ensemble", "dicor.json", "config.json"
"""Of an exported folder: what its configuration says it is, and the names of both files."""
_NAMES_FILES = re.compile(r"(file|folder|path|pool|base_model|weight_map)$")
_LARGE = ("tokenizer.json", "vocab.json")  # they hold words, and name no files


@dataclass(frozen=True, kw_only=True)
class Located:
    """A record, and what lies where."""

    ensemble: Ensemble
    home: Path  # the folder that the record is in
    pool: Path
    config: dict[str, Any] | None  # ``config.json`` of an exported folder; None where the record is in no such folder
    inside: bool  # whether the members are those of an exported folder


def locate(path: Path, pool: Path | None = None) -> Located:
    """Read the record at ``path``, a file or an exported folder; ``pool``: where its members are, if elsewhere.

    ``UserError`` where it cannot be read, where a folder is no exported one, or where one names a file outside.
    """
    given = path.is_dir()
    home = path if given else path.parent
    config = _read(home / CONFIG)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        config = None  # somebody else's config.json may lie beside a dicor.json
    if config is not None:
        home = home.resolve()
        _confine(home)
    elif given:
        raise UserError(f"{home}: not a folder that lora-ensemble export wrote: it lacks its {CONFIG}; export it again")
    else:
        home = path.resolve().parent
    ensemble = read(path / RECORD if given else path)
    where = home / ensemble.pool if pool is None else pool
    return Located(ensemble=ensemble, home=home, pool=where, config=config, inside=config is not None and pool is None)


def _confine(home: Path) -> None:
    """``UserError`` where something in an exported folder is a link, or a path in a JSON file, that leads out of it."""
    # The hub's cache holds links alone, to the files of the folder blobs beside its snapshots.
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    for at, folders, files in os.walk(home):
        for path in (Path(at, name) for name in [*folders, *files]):
            target = Path(os.path.realpath(path))
            if not target.is_relative_to(home) and target.parent != blobs:
                raise UserError(f"{path}: a link to {target}, outside this folder; nothing was read: get it elsewhere")
            if path.suffix == ".json" and path.name not in _LARGE:
                for key, text in _texts(_read(path)):
                    if _NAMES_FILES.search(key) and leads_out(text):
                        raise UserError(
                            f"{path}: {key} is {text!r}, outside this folder; nothing was read: get it elsewhere"
                        )


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # whoever needs it says what is wrong with it


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a JSON value with the key that it stands under; in ``weight_map`` the keys are weights."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from _texts(part, key if key == "weight_map" else name)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part, key)


def leads_out(name: str) -> bool:
    """Whether the name of a file or folder may lead out of the folder that it is looked for in, on any system."""
    return name.startswith(("/", "\\", "~")) or name[1:2] == ":" or ".." in re.split(r"[/\\]", name)


def chosen_records(ensemble: Ensemble, pool: Path) -> list[MemberRecord]:
    """The pool's records of the ensemble's members; ``UserError`` unless they are still those that were chosen."""
    for folder, what in ((pool, "the ensemble's pool is not there; say where it is"), (pool / ensemble.task, None)):
        if not folder.is_dir():
            what = what or f"no task {ensemble.task!r} in this pool; say where the ensemble's is"
            raise UserError(f"{os.path.normpath(pool)}: {what} with --pool (distill: --ensemble_pool)")
    records = []
    for chosen in ensemble.members:
        folder = member_folder(pool, ensemble.task, chosen.name)
        record = read_record(pool, ensemble.task, chosen.name)
        if record is None:
            raise UserError(f"{folder}: no such member, though the ensemble needs it; copy it back, or select again")
        split = ensemble.chosen_on
        logits = logits_file(split)
        for what, now, then in (
            (f"{split} logits", record.files.get(logits), chosen.files[logits]),
            (f"{split} examples", record.examples.get(split), ensemble.examples),
            ("kind", record.kind, ensemble.kind),
            ("labels", record.labels, ensemble.labels),
        ):
            if now != then:
                raise UserError(
                    f"{folder}: not the member that was chosen: its {what} are others, it was trained again since; "
                    "run dicor select again"
                )
        records.append(record)
    return records
