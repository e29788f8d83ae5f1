"""What an export or an answer is made from: a record, its members as they lie on the disk, and their base models."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_ensemble import pool
from lora_ensemble.bank.base_model import hub_id, load_tokenizer, longest_input
from lora_ensemble.dicor import record
from lora_ensemble.dicor.located import CONFIG, Located, chosen_records, leads_out, locate
from lora_ensemble.errors import UserError
from lora_ensemble.pool import MemberRecord
from lora_ensemble.tasks import PRESETS, Kind
from lora_ensemble.text.packing import KEPT, Truncation

VERSION = 1
"""Of an exported folder's ``config.json``."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base model: what files call it, and where it is here."""

    name: str  # a hub id, or the name of a folder; never a path
    where: str  # what ``load_classifier`` gets
    on_hub: bool
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class Source:
    """An ensemble and its members, out of a pool or an exported folder."""

    ensemble: record.Ensemble
    pool: Path
    members: list[MemberRecord]  # in the order of the ensemble's
    bases: dict[str, Base]  # those of an exported folder, by the name that its members have for them; of a pool, none
    text: list[str]  # the columns that all members read; none where they do not say


def read_source(path: Path, pool: Path | None) -> Source:
    """What the record at ``path``, a file or an exported folder, names; ``pool``: where the members are, if elsewhere.

    ``UserError`` where something is missing, where members have no weights or read other columns than others, and for
    an exported folder that is damaged or names anything outside.
    """
    located = locate(path, pool)
    members = chosen_records(located.ensemble, located.pool)
    check_readers(members, located.pool)
    bases, text = _exported_bases(located, members), _text_columns(members, located.pool)
    return Source(ensemble=located.ensemble, pool=located.pool, members=members, bases=bases, text=text)


def check_readers(members: Sequence[MemberRecord], folder: Path) -> None:
    """``UserError`` where members of the pool at ``folder`` can read no text, for want of weights or a base model."""
    where = folder / members[0].task
    without = [r.name for r in members if not r.models]
    if without:
        raise UserError(
            f"{where}: {len(without)} of {len(members)} members have no weights, only predictions "
            f"({', '.join(without[:3])}{', ...' * (len(without) > 3)}), and cannot read new text; select from a pool "
            "without them"
        )
    for r in members:
        if r.base_model is None:
            raise UserError(f"{where / r.name}: it does not say what its base model is; select from a pool without it")


def _text_columns(members: Sequence[MemberRecord], folder: Path) -> list[str]:
    known = {tuple(r.text): r.name for r in members if r.text}
    if len({len(columns) for columns in known}) > 1:
        (some, one), (others, two) = list(known.items())[:2]
        raise UserError(
            f"{folder / members[0].task}: {one} reads {', '.join(some)} and {two} reads {', '.join(others)}; "
            "members of an ensemble must read the same"
        )
    return list(next(iter(known), ()))


def known_columns(task: str, kind: Kind, columns: list[str]) -> list[str]:
    """The text columns that members name, or else the preset's of that name; none where neither is known."""
    preset = PRESETS.get(task)
    return columns or (list(preset.text) if preset is not None and preset.kind == kind else [])


def _exported_bases(located: Located, members: Sequence[MemberRecord]) -> dict[str, Base]:
    """What ``Source.bases`` holds; ``UserError`` for a folder that no export of this version writes."""
    config, path = located.config, located.home / CONFIG
    if config is None:
        return {}
    if config.get("format_version") != VERSION:
        raise UserError(
            f"{path}: format_version is {config.get('format_version')!r}; this version of lora-ensemble reads {VERSION}"
        )
    bases = {}
    try:
        for name, entry in config["bases"].items():
            if leads_out(name):
                raise UserError(f"{path}: a base model is called {name!r}; expected a name of the hub or of a folder")
            where = name
            if entry["folder"] is not None:
                folder = located.home / entry["folder"]
                where = str(folder.resolve())
                if not folder.is_dir():
                    raise UserError(f"{folder}: missing, though {CONFIG} says that {name} lies there; copy it again")
                # transformers would load an adapter and the base model that it names, or weights out of a pickle.
                if odd := [*folder.glob("adapter_config.json"), *folder.glob("pytorch_model*")]:
                    raise UserError(f"{odd[0]}: no file that an export writes; delete it, or get the folder elsewhere")
            bases[name] = Base(name=name, where=where, on_hub=entry["on_hub"], revision=entry["revision"])
    except (KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: damaged ({type(e).__name__}: {e}); export again") from e
    # A folder of the reader's, or another model of the hub, is nothing that an export writes there.
    for r in members if located.inside else ():
        if r.base_model not in bases:
            file = pool.member_folder(located.pool, r.task, r.name) / pool.RECORD
            raise UserError(f"{file}: base_model is {r.base_model!r}, which {CONFIG} does not name; export it again")
    return bases


def find_bases(members: Sequence[MemberRecord], known: Mapping[str, Base], *, any_base: bool) -> dict[str, Base]:
    """The members' base models by what the pool calls them. ``known``: those of an exported folder.

    ``any_base``: the hub's newest, not those that the members were trained over. Local folders are called by their own
    names, told apart where two have the same.
    """
    bases: dict[str, Base] = {}
    for r in members:
        called = str(r.base_model)
        local = Path(called).expanduser()
        if called in bases:
            continue
        if called in known:
            bases[called] = known[called]
        elif local.is_dir():
            name = told_apart(local.resolve().name, [base.name for base in bases.values()])
            bases[called] = Base(name=name, where=str(local), on_hub=False)
        else:
            name, revision = hub_id(called), None if any_base else r.revision
            bases[called] = Base(name=name, where=name, on_hub=True, revision=revision)
    return bases


def told_apart(name: str, taken: Collection[str]) -> str:
    """``name``, or with the first number behind it that makes it another than those ``taken``."""
    return next(n for n in itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2))) if n not in taken)


def text_limit(member: MemberRecord, base_model: str, revision: str | None) -> tuple[int, Truncation]:
    """Tokens after which a member over this base model, as ``load_base`` takes it, cuts a text, and what it keeps.

    ``UserError`` for a way to cut that this version does not know.
    """
    kept, longest = member.settings.get("truncation", "head"), member.settings.get("max_length")
    if kept not in KEPT:
        raise UserError(f"member {member.name}: trained with truncation {kept!r}; expected one of {', '.join(KEPT)}")
    return int(longest or longest_input(base_model, load_tokenizer(base_model, revision), revision)), kept
