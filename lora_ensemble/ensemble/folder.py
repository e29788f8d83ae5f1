"""An exported folder is put in place whole; and what is in that of a whole ensemble:

dicor.json        what dicor select wrote, its pool the folder members beside it
config.json       what is in the folder, for programs; never a path of the machine that wrote it
members/<task>/   the pool, of the ensemble's members alone
base/<name>/      encoder and tokeniser of each base model, unless left out
README.md         the model card
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lora_ensemble import __version__, pool
from lora_ensemble.bank.member_files import load_base
from lora_ensemble.dicor import record
from lora_ensemble.dicor.located import CONFIG, FORMAT, RECORD
from lora_ensemble.dicor.table import decides, offsets
from lora_ensemble.ensemble.sources import VERSION, Base, Source, find_bases, known_columns, text_limit, told_apart
from lora_ensemble.errors import UserError
from lora_ensemble.pool import MemberRecord
from lora_ensemble.tasks import Task
from lora_ensemble.text.packing import Truncation

MEMBERS, BASE = "members", "base"
CARD = "README.md"
SIGNED = "lora-ensemble export"
"""Stands in every card: a folder whose card lacks it is never overwritten."""
_HUB = {
    "ensemble": ("lora-ensemble", ["lora", "ensemble", "peft"]),
    "peft": ("peft", ["lora", "lora-ensemble"]),
    "merged": ("transformers", ["lora", "lora-ensemble"]),
}
"""The hub's name for the library that loads it, and its tags."""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What is in an exported folder."""

    form: Literal["ensemble", "peft", "merged"]
    task: Task
    columns: list[str]  # what it reads; empty where that is not known
    bases: list[Base]
    members: list[MemberRecord]
    max_length: int  # tokens after which it cuts a text
    kept: list[Truncation]  # what its members keep of it then
    ensemble: record.Ensemble | None = None  # that of the members, in their order; None: there is one member
    with_base: bool = False
    with_examples: bool = False


@contextlib.contextmanager
def whole_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new folder to fill, which appears as ``target`` only when all went well.

    What a kill leaves beside it (``.<name>.new``, ``.<name>.old``) the next call puts right. ``UserError`` where there
    is something already: with ``overwrite``, where it is not an exported folder.
    """
    target = target.resolve()
    new, old = (target.with_name(f".{target.name}.{word}") for word in ("new", "old"))
    if old.exists() and not target.exists():  # killed between the two renames
        os.rename(old, target)
    if target.exists() and not overwrite:
        raise UserError(f"{target}: is there already; choose another --output, or replace it with --overwrite")
    if target.exists() and not _is_exported(target):
        raise UserError(f"{target}: not a folder that lora-ensemble export wrote, so it is not overwritten; delete it")
    for left in (new, old):
        if left.exists():
            shutil.rmtree(left)
    new.mkdir(parents=True)
    try:
        yield new
        if target.exists():
            os.rename(target, old)
        os.rename(new, target)
    finally:
        shutil.rmtree(new, ignore_errors=True)  # gone, where all went well
    shutil.rmtree(old, ignore_errors=True)


def _is_exported(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    with contextlib.suppress(OSError, ValueError):
        return SIGNED in (folder / CARD).read_text(encoding="utf-8")
    return not any(folder.iterdir())


def write_ensemble(target: Path, source: Source, *, with_base: bool, with_examples: bool, any_base: bool) -> Contents:
    """Fill the empty folder ``target``, but for its card.

    ``with_base``: also with weights and tokenisers of base models; without, a local one is a ``UserError``.
    ``with_examples``: also with ids and labels of dev. Raises ``UserError`` naming what is missing or damaged, and,
    unless ``any_base``, for a base model that is not the one that a member was trained over.
    """
    ensemble = source.ensemble
    bases = find_bases(source.members, source.bases, any_base=any_base)
    local = [base.name for base in bases.values() if not base.on_hub]
    if local and not with_base:
        raise UserError(
            f"--without-base: the base model {local[0]} is a local folder, which nobody else has; leave it out"
        )
    for r in source.members:
        _write_member(target / MEMBERS, source.pool, r, bases[str(r.base_model)], ensemble.chosen_on)
    if with_examples:
        split = ensemble.chosen_on
        examples = pool.read_examples(source.pool, ensemble.task, split, ensemble.examples)
        pool.write_examples(target / MEMBERS, ensemble.task, split, examples.ids, examples.labels, examples.groups)
    entries: dict[str, dict[str, Any]] = {}
    for called, base in bases.items():
        inside = None
        if with_base:
            over = [r for r in source.members if r.base_model == called]
            taken = [entry["folder"] for entry in entries.values()]
            inside = told_apart(f"{BASE}/{base.name.split('/')[-1]}", taken)
            _write_base(target / inside, base, over, source.pool, any_base=any_base)
        entries[base.name] = {"folder": inside, "on_hub": base.on_hub, "revision": base.revision}
    moved = replace(ensemble, pool=MEMBERS)
    (target / RECORD).write_text(moved.to_json(), encoding="utf-8")
    columns = known_columns(ensemble.task, ensemble.kind, source.text)
    pairs = [(r, bases[str(r.base_model)]) for r in source.members]
    limits = [text_limit(r, base.where, base.revision) for r, base in pairs]
    contents = Contents(
        form="ensemble",
        task=ensemble.described(columns),
        columns=columns,
        bases=list(bases.values()),
        members=source.members,
        max_length=min(longest for longest, _ in limits),
        kept=sorted({kept for _, kept in limits}),
        ensemble=ensemble,
        with_base=with_base,
        with_examples=with_examples,
    )
    config = {
        "format": FORMAT,
        "format_version": VERSION,
        "version": __version__,
        "task": ensemble.task,
        "kind": ensemble.kind,
        "labels": ensemble.labels,
        "text": columns,
        "members": [m.name for m in ensemble.members],
        "max_length": contents.max_length,
        "bases": entries,
    }
    (target / CONFIG).write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return contents


def _write_base(target: Path, base: Base, members: list[MemberRecord], folder: Path, *, any_base: bool) -> None:
    """Encoder and tokeniser of ``members`` of the pool at ``folder``."""
    # Two outputs are transformers' own default: the configuration then says nothing of a head.
    classifier, _, tokenizer = load_base(members, folder, base.where, base.revision, outputs=2, any_base=any_base)
    save_pretrained(classifier.base_model, target)
    tokenizer.save_pretrained(target)


def _write_member(target: Path, source: Path, r: MemberRecord, base: Base, split: str) -> None:
    """A member in the pool at ``target``: its weights, the logits it was chosen by, and a record that lists no more."""
    home = pool.member_folder(target, r.task, r.name)
    home.mkdir(parents=True)
    weights = (pool.ADAPTER_CONFIG, pool.ADAPTER, pool.FULL_CONFIG, pool.FULL)
    names = [*(model + name for model in r.models for name in weights), pool.logits_file(split)]
    files = copy_files(source, r, [name for name in names if name in r.files], home, base)
    kept = replace(r, files=files, base_model=base.name, examples={split: r.examples[split]})
    (home / pool.RECORD).write_text(kept.to_json(), encoding="utf-8")


def copy_files(source: Path, r: MemberRecord, names: list[str], target: Path, base: Base) -> dict[str, str]:
    """Copy a member's files from a pool, its base model named as the export does; returns checksums in ``target``."""
    folder, checksums = pool.member_folder(source, r.task, r.name), {}
    for name in names:
        (target / name).parent.mkdir(exist_ok=True)
        try:
            shutil.copyfile(folder / name, target / name)
        except FileNotFoundError as e:
            raise UserError(f"{folder}: half-written member: {name} is missing; copy it again whole") from e
        if pool.checksum(target / name) != r.files[name]:
            raise UserError(
                f"{folder / name}: not what {pool.RECORD} says: damaged, or replaced while it was read; run it again"
            )
        if Path(name).name in (pool.ADAPTER_CONFIG, pool.FULL_CONFIG):
            _name_base(target / name, base, r.revision)
        checksums[name] = pool.checksum(target / name)
    return checksums


def _name_base(path: Path, base: Base, revision: str | None) -> None:
    """Let a member's configuration name its base model as the export does, never by a path."""
    before = json.loads(path.read_text(encoding="utf-8"))
    config = {key: value for key, value in before.items() if key != "_name_or_path"}
    if "base_model_name_or_path" in config:
        # With --any-base it is the hub's newest. The member's own otherwise: of one name several may be in an ensemble.
        config |= {"base_model_name_or_path": base.name, "revision": revision if base.revision else None}
    if config != before:
        path.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def save_pretrained(model: Any, folder: Path) -> None:
    """``model.save_pretrained`` without its progress bar."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if bars:
            logging.enable_progress_bar()


def write_card(folder: Path, name: str, contents: Contents) -> None:
    """Write the card of what is in ``folder``, which will be called ``name``."""
    from huggingface_hub import ModelCard, ModelCardData

    library, tags = _HUB[contents.form]
    ensemble, members = contents.ensemble, contents.members
    results = _results(contents)
    data = ModelCardData(
        library_name=library,
        pipeline_tag="text-classification",
        tags=tags,
        base_model=[base.name for base in contents.bases if base.on_hub] or None,  # the hub takes its own names only
        model_name=name if results else None,
        eval_results=results,
    )
    versions = {", ".join(f"{k} {v}" for k, v in sorted(r.versions.items())) for r in members if r.versions}
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("card.md.jinja")),
        **vars(contents),
        name=name,
        rows=ensemble.rows() if ensemble else [],
        score=contents.task.score_name,
        decides=decides,
        offsets=offsets,
        train=sorted({r.train_fingerprint for r in members if r.train_fingerprint}),
        trained_with=sorted(versions),
        signed=SIGNED,
        version=__version__,
    )
    (folder / CARD).write_text(f"{str(card).rstrip()}\n", encoding="utf-8")


def _results(contents: Contents) -> list[Any] | None:
    """The honest estimate as the hub lists it; in-sample figures flatter, and are for the page alone."""
    from huggingface_hub import EvalResult

    task, estimate = contents.task, contents.ensemble.estimate if contents.ensemble else {}
    if (honest := estimate.get("honest")) is None:
        return None
    interval = f"{estimate['level']:.0%} interval {honest['low']:.4f} to {honest['high']:.4f}"
    return [
        EvalResult(
            task_type="text-classification",
            dataset_type=task.name,
            dataset_name=task.name,
            dataset_split=contents.ensemble.chosen_on if contents.ensemble else "dev",
            metric_type={"pearson": "pearsonr"}.get(task.scored_by, task.scored_by),  # as the hub's metrics are called
            metric_name=f"{task.score_name}, honest estimate ({interval})",
            metric_value=round(honest["value"], 4),
        )
    ]
