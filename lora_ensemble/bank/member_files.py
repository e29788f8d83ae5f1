"""Members between a bank and the pool: a member's weights as files, and a bank filled from them. No lightning."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_ensemble import pool
from lora_ensemble.bank.base_model import (
    base_difference,
    encoder_fingerprint,
    load_classifier,
    load_tokenizer,
    tokenizer_fingerprint,
    way_back,
)
from lora_ensemble.bank.lora import Adapter, Member, from_peft, peft_config, peft_tensors
from lora_ensemble.bank.model import Bank
from lora_ensemble.errors import UserError
from lora_ensemble.tasks import Task

_NO_ADAPTER = Adapter(A={}, B={})


def weight_files(bank: Bank, index: int, task: Task, *, base_model: str, revision: str | None) -> dict[str, Any]:
    """A member's weights for one task, as :func:`pool.write_member` takes them: file name to content.

    An adapter in PEFT's format with the whole head, or, where the encoder was trained, a complete transformers folder.
    ``base_model``, ``revision``: what the adapter names as its base.
    """
    adapter, heads = bank.member_state(index)
    if bank.train_encoder:
        classifier: Any = bank.heads[bank.tasks.index(task)]
        state = {**bank.encoder_state(), **heads[task.name]}
        # Its own name for itself would be the path that it was loaded from.
        own = {"architectures": [type(classifier).__name__], "_name_or_path": base_model}
        return {
            pool.FULL_CONFIG: classifier.config.to_dict() | own,
            pool.FULL: {name: tensor.numpy() for name, tensor in state.items()},
        }
    if not adapter.A:
        # PEFT refuses an empty list: an adapter of rank 1 that is all zeros changes nothing.
        adapter = bank.zero_adapter()
    tensors = peft_tensors(adapter, heads[task.name], prefix=bank.prefix)
    config = peft_config(
        bank.members[index],
        list(adapter.A),
        prefix=bank.prefix,
        heads=bank.head_names(),
        base_model=base_model,
        revision=revision,
    )
    return {pool.ADAPTER_CONFIG: config, pool.ADAPTER: {name: tensor.numpy() for name, tensor in tensors.items()}}


def member_of(record: pool.MemberRecord) -> Member:
    """The member that a record is of, as a bank takes it."""
    return Member(
        name=record.name,
        rank=record.rank,
        scaling=record.scaling,
        lr=record.lr or 0.0,
        targets=record.targets,
        seed=record.seed or 0,
    )


@functools.cache  # once, however many members, banks and tasks there are
def say_unknown_base(where: str) -> None:
    """The notice that an earlier version did not record what the base model was."""
    said = "an earlier version did not record which base model it was: whether it is this one cannot be checked"
    print(f"lora-ensemble: notice: {where}: {said}", file=sys.stderr)


def check_base(records: Sequence[pool.MemberRecord], folder: Path, here: Mapping[str, Any]) -> None:
    """``UserError`` for a member of the pool at ``folder`` that was trained over another base model.

    ``here``: the fingerprint of the one that is here.
    """
    for r in records:
        if not r.base_fingerprint:
            say_unknown_base(str(folder))
        # A fully fine-tuned member brings the whole encoder.
        but = ["weights"] if r.finetune == "full" else []
        if difference := base_difference(r.base_fingerprint, here, but=but):
            where = pool.member_folder(folder, r.task, r.name)
            raise UserError(f"{where}: trained over another {r.base_model}: {difference}; {way_back(r.revision)}")


def load_base(
    records: Sequence[pool.MemberRecord],
    folder: Path,
    where: str,
    revision: str | None,
    *,
    outputs: int,
    any_base: bool,
) -> tuple[Any, set[str], Any]:
    """The base model of members of the pool at ``folder``: as ``load_classifier`` gives it, and its tokeniser.

    ``UserError`` where it cannot be loaded, or, unless ``any_base``, is not the one that they were trained over.
    """
    tokenizer = load_tokenizer(where, revision)
    frozen = any(r.finetune != "full" for r in records)
    classifier, fresh = load_classifier(where, num_labels=outputs, revision=revision, frozen=frozen)
    if not any_base:
        check_base(records, folder, encoder_fingerprint(classifier, fresh) | tokenizer_fingerprint(tokenizer))
    return classifier, fresh, tokenizer


def restore_members(bank: Bank, folder: Path, *, base_model: str, fingerprint: Mapping[str, Any] | None = None) -> None:
    """Fill a bank with its members' best weights from the pool at ``folder``.

    ``fingerprint``: the base model's, to be checked. ``UserError`` where a member is missing, has another base model or
    other settings, or comes from different runs or epochs in several tasks.
    """
    for index, member in enumerate(bank.members):
        heads: dict[str, dict[str, Tensor]] = {}
        origins, adapter = {}, _NO_ADAPTER
        for task in bank.tasks:
            where = pool.member_folder(folder, task.name, member.name)
            record = pool.read_record(folder, task.name, member.name)
            if record is None:
                raise UserError(f"{where}: no such member; train it first, or set --pool.dir or --ckpt_path")
            if record.base_model != base_model:
                raise UserError(f"{where}: its base model is {record.base_model}; model.base_model is {base_model}")
            if fingerprint is not None:
                check_base([record], folder, fingerprint)
            given = {
                "finetune": "full" if bank.train_encoder else "lora",
                **{key: getattr(member, key) for key in ("rank", "scaling", "targets")},
                **{key: getattr(task, key) for key in ("kind", "labels")},
            }
            for key, wanted in given.items():
                if getattr(record, key) != wanted:
                    found = getattr(record, key)
                    raise UserError(f"{where}: another member of this name: its {key} was {found!r}, is now {wanted!r}")
            origins[task.name] = (record.run, record.best_epoch)
            adapter, heads[task.name] = _read_weights(bank, folder, record)
        if len(set(origins.values())) > 1:
            raise UserError(f"{folder}: {member.name!r} comes from different runs or epochs: {origins}; train it again")
        if member.rank is None:  # what PEFT made us write there is all zeros
            adapter = _NO_ADAPTER
        try:
            bank.load_member(index, adapter, heads)
        except ValueError as e:
            raise UserError(f"{folder}: member {member.name!r} has other settings than given: {e}") from e


def _read_weights(bank: Bank, folder: Path, record: pool.MemberRecord) -> tuple[Adapter, dict[str, Tensor]]:
    """A member's adapter and head; a fully fine-tuned encoder goes straight into the bank."""
    name = pool.FULL if bank.train_encoder else pool.ADAPTER
    tensors = {key: torch.from_numpy(array) for key, array in pool.read_tensors(folder, record, name).items()}
    if not bank.train_encoder:
        return from_peft(tensors, prefix=bank.prefix)
    encoder = {key: tensor for key, tensor in tensors.items() if key.startswith(bank.prefix + ".")}
    try:
        bank.load_encoder(encoder)
    except RuntimeError as e:
        where = pool.member_folder(folder, record.task, record.name)
        reason = " ".join(str(e).split())
        raise UserError(f"{where}: its weights do not fit model.base_model ({reason[:200]})") from e
    return _NO_ADAPTER, {key: tensor for key, tensor in tensors.items() if key not in encoder}
