"""An exported folder: the names in it, its ``config.json``, where base models lie, and how it is put in place whole.

dicor.json        what dicor select wrote, its pool the folder members beside it
config.json       what is in the folder, for programs; never a path of the machine that wrote it
members/<task>/   the pool, of the ensemble's members alone
base/<name>/      encoder and tokeniser of each base model, unless left out
README.md         the model card
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_ensemble.bank.base_model import hub_id
from lora_ensemble.dicor.located import CONFIG, Located, leads_out
from lora_ensemble.errors import UserError
from lora_ensemble.pool import RECORD as MEMBER
from lora_ensemble.pool import MemberRecord, member_folder

VERSION = 1
MEMBERS, BASE, CARD = "members", "base", "README.md"
SIGNED = "lora-ensemble export"
"""Stands in every card: a folder whose card lacks it is never overwritten."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base model: what files call it, and where it is here."""

    name: str
    """A hub id, or the name of a folder; never a path."""
    where: str
    """What ``load_classifier`` gets."""
    on_hub: bool
    revision: str | None = None


def read_bases(found: Located, records: Sequence[MemberRecord]) -> dict[str, Base]:
    """The base models that an exported folder speaks of, by the name its members have for them; else none.

    ``records``: its members'. ``UserError`` where its ``config.json`` is of a later version or names what is not in the
    folder, or where a member in it has a base model that is not named there.
    """
    config, path = found.config, found.home / CONFIG
    if config is None:
        return {}
    if config.get("format_version") != VERSION:
        raise UserError(
            f"{path}: format_version is {config.get('format_version')!r}; this version of lora-ensemble reads {VERSION}"
        )
    bases = {}
    try:
        for name, entry in config["bases"].items():
            inside = entry["folder"]
            if leads_out(name):
                raise UserError(f"{path}: a base model is called {name!r}; expected a name of the hub or of a folder")
            if inside is not None and not (found.home / inside).is_dir():
                raise UserError(
                    f"{found.home / inside}: missing, though {CONFIG} says that {name} lies there; copy it again"
                )
            # transformers would load an adapter and the base model that it names, or weights out of a pickle.
            for odd in ("adapter_config.json", "pytorch_model*") if inside is not None else ():
                if there := next((found.home / inside).glob(odd), None):
                    raise UserError(f"{there}: no file that an export writes; delete it, or get the folder elsewhere")
            where = name if inside is None else str((found.home / inside).resolve())
            bases[name] = Base(name=name, where=where, on_hub=entry["on_hub"], revision=entry["revision"])
    except (KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: damaged ({type(e).__name__}: {e}); export again") from e
    # A folder of the reader's, or another model of the hub, is nothing that an export writes there.
    other = next((r for r in records if found.inside and r.base_model not in {None, *bases}), None)
    if other is not None:
        where = member_folder(found.pool, other.task, other.name) / MEMBER
        raise UserError(f"{where}: base_model is {other.base_model!r}, which {CONFIG} does not name; export it again")
    return bases


def find_bases(records: Sequence[MemberRecord], known: Mapping[str, Base], *, any_base: bool) -> dict[str, Base]:
    """The members' base models by what the pool calls them. ``known``: those of an exported folder. ``any_base``: the
    hub's newest, not those that the members were trained over.

    Local folders are called by their own names, told apart where two have the same. ``UserError`` for a member that
    does not say what its base model is.
    """
    found: dict[str, Base] = {}
    for r in records:
        if r.base_model is None:
            raise UserError(f"member {r.name}: it does not say what its base model is, so it cannot be exported")
        if r.base_model in found:
            continue
        if r.base_model in known:
            found[r.base_model] = known[r.base_model]
            continue
        local = Path(r.base_model).expanduser()
        if not local.is_dir():
            name = hub_id(r.base_model)
            found[r.base_model] = Base(name=name, where=name, on_hub=True, revision=None if any_base else r.revision)
            continue
        taken = {base.name for base in found.values()}
        names = (local.resolve().name + end for end in ("", *(f"-{i}" for i in range(2, len(records) + 2))))
        name = next(n for n in names if n not in taken)
        found[r.base_model] = Base(name=name, where=str(local), on_hub=False)
    return found


@contextlib.contextmanager
def whole_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new folder to fill, which appears as ``target`` only when all went well.

    A kill leaves the old one, or the new one, or nothing under that name; what is beside it then (``.<name>.new``,
    ``.<name>.old``) the next call puts right. ``UserError`` where there is something already: with ``overwrite``, where
    it is not an exported folder.
    """
    target = target.resolve()
    new, old = (target.parent / f".{target.name}.{word}" for word in ("new", "old"))
    if old.exists() and not target.exists():  # killed between the two renames
        os.rename(old, target)
    if target.exists() and not overwrite:
        raise UserError(f"{target}: is there already; choose another --output, or replace it with --overwrite")
    if target.exists() and not _is_ours(target):
        raise UserError(f"{target}: not a folder that lora-ensemble export wrote, so it is not overwritten; delete it")
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in (new, old):
        if left.exists():
            shutil.rmtree(left)
    new.mkdir()
    try:
        yield new
        if target.exists():
            os.rename(target, old)
        os.rename(new, target)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _is_ours(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    with contextlib.suppress(OSError, ValueError):
        return SIGNED in (folder / CARD).read_text(encoding="utf-8")
    return not any(folder.iterdir())
