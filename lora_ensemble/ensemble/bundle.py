"""An ensemble as a folder that is complete in itself; its layout is in ``folder.py``."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_ensemble import __version__, pool
from lora_ensemble.bank.base_model import load_tokenizer, longest_input
from lora_ensemble.bank.member_files import load_base
from lora_ensemble.dicor import record
from lora_ensemble.dicor.located import CONFIG, FORMAT, RECORD
from lora_ensemble.ensemble.folder import BASE, MEMBERS, VERSION, Base
from lora_ensemble.ensemble.single import save
from lora_ensemble.errors import UserError
from lora_ensemble.pool import MemberRecord

_DEV = pool.logits_file("dev")
_TAKEN = (pool.ADAPTER_CONFIG, pool.ADAPTER, pool.FULL_CONFIG, pool.FULL, _DEV)
"""Of a member's files: weights, and the logits that it was chosen by; nothing of other splits or epochs."""


def write_ensemble(
    target: Path,
    chosen: record.Ensemble,
    folder: Path,
    records: Sequence[MemberRecord],
    *,
    text: Sequence[str],
    bases: Mapping[str, Base],
    with_base: bool,
    with_examples: bool,
    any_base: bool = False,
) -> None:
    """Fill the empty folder ``target`` with the ensemble ``chosen`` from the pool at ``folder``.

    ``text``: the columns that it reads, if known. ``bases``: the members' base models (``find_bases``). ``with_base``:
    also their weights and tokenisers; without, a local one is a ``UserError``. ``with_examples``: also ids and labels
    of dev. Raises ``UserError`` naming what is missing or damaged, and, unless ``any_base``, for weights of a base
    model that are not those that a member was trained over.
    """
    local = [base.name for base in bases.values() if not base.on_hub]
    if local and not with_base:
        raise UserError(
            f"--without-base: the base model {local[0]} is a local folder, which nobody else has; leave it out"
        )
    for r in records:
        assert r.base_model is not None  # find_bases has seen to it
        _write_member(target / MEMBERS, folder, r, bases[r.base_model].name)
    if with_examples:
        name = Path(chosen.task, pool.EXAMPLES, f"dev-{chosen.examples}.npz")
        pool.read_examples(folder, chosen.task, "dev", chosen.examples)  # judged before it is copied
        (target / MEMBERS / name).parent.mkdir()
        shutil.copyfile(folder / name, target / MEMBERS / name)
    entries: dict[str, Any] = {}
    for called, base in bases.items():
        inside = f"{BASE}/{_folder_name(base.name, entries)}" if with_base else None
        if inside is not None:
            over = [r for r in records if r.base_model == called]
            # Two outputs are transformers' own default: the configuration then says nothing of a head.
            classifier, _, tokenizer = load_base(over, folder, base.where, base.revision, outputs=2, any_base=any_base)
            save(classifier.base_model, target / inside)
            tokenizer.save_pretrained(target / inside)
        entries[base.name] = {"folder": inside, "on_hub": base.on_hub, "revision": base.revision}
    (target / RECORD).write_text(dataclasses.replace(chosen, pool=MEMBERS).to_json(), encoding="utf-8")
    config = {
        "format": FORMAT,
        "format_version": VERSION,
        "version": __version__,
        "task": chosen.task,
        "kind": chosen.kind,
        "labels": chosen.labels,
        "text": list(text),
        "members": [m.name for m in chosen.members],
        # Of the member that reads least.
        "max_length": min(longest_of(r, bases) for r in records),
        "bases": entries,
    }
    (target / CONFIG).write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def longest_of(record: MemberRecord, bases: Mapping[str, Base]) -> int:
    """Tokens after which a member cuts a text."""
    if record.settings.get("max_length"):
        return int(record.settings["max_length"])
    base = bases[record.base_model or ""]
    return longest_input(base.where, load_tokenizer(base.where, base.revision), base.revision)


def _folder_name(base: str, entries: Mapping[str, Any]) -> str:
    """The last part of a base model's name, told apart from the others' by a number."""
    taken = {entry["folder"] for entry in entries.values()}
    last = base.split("/")[-1]
    return next(n for n in (last, *(f"{last}-{i}" for i in range(2, 99))) if f"{BASE}/{n}" not in taken)


def _write_member(target: Path, folder: Path, r: MemberRecord, base: str) -> None:
    """A member's folder with the files that are taken along; its record lists no others."""
    source, home = pool.member_folder(folder, r.task, r.name), pool.member_folder(target, r.task, r.name)
    home.mkdir(parents=True)
    files = {}
    for name in [name for name in _TAKEN if name in r.files]:
        try:
            shutil.copyfile(source / name, home / name)
        except FileNotFoundError as e:
            raise UserError(f"{source}: half-written member: {name} is missing; copy it again whole") from e
        files[name] = pool.checksum(home / name)
        if files[name] != r.files[name]:
            raise UserError(
                f"{source / name}: not what {pool.RECORD} says: damaged, or replaced while it was read; run it again"
            )
        if name in (pool.ADAPTER_CONFIG, pool.FULL_CONFIG) and _without_path(home / name, base):
            files[name] = pool.checksum(home / name)
    kept = dataclasses.replace(r, files=files, base_model=base, examples={"dev": r.examples["dev"]})
    (home / pool.RECORD).write_text(kept.to_json(), encoding="utf-8")


def _without_path(path: Path, base: str) -> bool:
    """Let a member's configuration name its base model as the export does; whether anything had to be changed."""
    config = json.loads(path.read_text(encoding="utf-8"))
    before = dict(config)
    if "base_model_name_or_path" in config:
        config["base_model_name_or_path"] = base
    config.pop("_name_or_path", None)
    if config == before:
        return False
    path.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return True
