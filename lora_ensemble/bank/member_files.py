"""Members between a bank and the pool: a member's weights as files in PEFT's format, and a bank filled from them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_ensemble import pool
from lora_ensemble.bank import base_model as base
from lora_ensemble.bank.families import layer_numbers
from lora_ensemble.bank.lora import ALL_LAYERS, Adapter, Member, single
from lora_ensemble.bank.model import Bank
from lora_ensemble.errors import UserError, one_line
from lora_ensemble.tasks import Task


def head_names(model: Any) -> list[str]:
    """Children of a classification model that hold its head: PEFT's ``modules_to_save``."""
    names = [name for name, child in model.named_children() if any(True for _ in child.parameters())]
    return [name for name in names if name != model.base_model_prefix]


def peft_config(
    model: Any,
    paths: Iterable[str],
    member: Member,
    *,
    base_model: str,
    revision: str | None,
    layers: list[int] | None = None,
) -> dict[str, Any]:
    """``adapter_config.json`` for an ``AutoModelForSequenceClassification`` whose encoder is adapted at ``paths``.

    ``layers``: numbers of the layers that they are in; None where they are in all.
    """
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "r": single(member.rank),
        "lora_alpha": single(member.scaling) * single(member.rank),
        "lora_dropout": single(member.dropout),
        **({"init_lora_weights": True} if member.init == "kaiming" else {}),  # PEFT has no word for normal
        "bias": "none",
        "inference_mode": True,
        # Whole paths: a suffix may match a layer of the head, or of another block.
        "target_modules": [f"{model.base_model_prefix}.{path}" for path in paths],
        **({} if layers is None else {"layers_to_transform": layers}),  # for people to read: the paths decide
        "modules_to_save": head_names(model),
    }


def peft_tensors(adapter: Adapter, head: dict[str, Tensor], *, prefix: str) -> dict[str, Tensor]:
    """Tensors of ``adapter_model.safetensors`` under PEFT's keys. ``head``: parameter name to tensor."""
    sides = ((path, side, t) for path, ab in adapter.items() for side, t in zip("AB", ab, strict=True))
    tensors = {f"{prefix}.{path}.lora_{side}.weight": t for path, side, t in sides} | head
    return {f"base_model.model.{name}": t for name, t in tensors.items()}


def from_peft(tensors: dict[str, Tensor], *, prefix: str) -> tuple[Adapter, dict[str, Tensor]]:
    """The inverse of :func:`peft_tensors`; an A without its B, or a B without its A, is left with the head."""
    head = {key.removeprefix("base_model.model."): t for key, t in tensors.items()}
    ends = ".lora_A.weight", ".lora_B.weight"
    named = (name.removesuffix(ends[0]) for name in [*head] if name.endswith(ends[0]))
    paths = [name for name in named if name + ends[1] in head]
    adapter = {p.removeprefix(f"{prefix}."): (head.pop(p + ends[0]), head.pop(p + ends[1])) for p in paths}
    return adapter, head


def weight_files(bank: Bank, index: int, task: Task, *, base_model: str, revision: str | None) -> dict[str, Any]:
    """A member's weights for one task, as :func:`pool.write_member` takes them: file name to content.

    An adapter in PEFT's format with the whole head, over ``base_model`` at ``revision``, or, where the encoder was
    trained, a complete transformers folder.
    """
    adapter, heads = bank.member_state(index)
    model: Any = bank.heads[bank.tasks.index(task)]
    if bank.train_encoder:
        # Its own name for itself would be the path that it was loaded from.
        own = {"architectures": [type(model).__name__], "_name_or_path": base_model}
        state = bank.encoder_state() | heads[task.name]
        return {pool.FULL_CONFIG: model.config.to_dict() | own, pool.FULL: {n: t.numpy() for n, t in state.items()}}
    if not adapter:
        # PEFT refuses an empty list: an adapter of rank 1 on the last layer that is all zeros changes nothing.
        path, layer = list(bank.layers.items())[-1]
        adapter = {path: (torch.zeros(1, layer.in_features), torch.zeros(layer.out_features, 1))}
    member, tensors = bank.members[index], peft_tensors(adapter, heads[task.name], prefix=bank.prefix)
    layers = None if member.layers == ALL_LAYERS else layer_numbers(member.own_layers, bank.depth)
    config = peft_config(model, adapter, member, base_model=base_model, revision=revision, layers=layers)
    return {pool.ADAPTER_CONFIG: config, pool.ADAPTER: {name: tensor.numpy() for name, tensor in tensors.items()}}


def answering_files(bank: Bank, rows: Sequence[int], task: Task, **base: Any) -> dict[str, Any]:
    """:func:`weight_files` of the models whose mean a member is, which have these rows: of several, in folders."""
    models = [weight_files(bank, row, task, **base) for row in rows]
    if len(models) == 1:
        return models[0]
    return {pool.in_fold(k, name): content for k, files in enumerate(models) for name, content in files.items()}


def read_weights(
    folder: Path, record: pool.MemberRecord, *, prefix: str, model: str = ""
) -> tuple[Adapter, dict[str, Tensor], dict[str, Tensor]]:
    """A member's adapter, head and, where it was fully fine-tuned, encoder, from the pool at ``folder``.

    ``model``: which of :attr:`MemberRecord.models`.
    """
    full = record.finetune == "full"
    arrays = pool.read_tensors(folder, record, model + (pool.FULL if full else pool.ADAPTER))
    tensors = {key: torch.from_numpy(array).float() for key, array in arrays.items()}
    if not full:
        adapter, head = from_peft(tensors, prefix=prefix)
        return adapter, head, {}
    encoder = {key: tensor for key, tensor in tensors.items() if key.startswith(prefix + ".")}
    return {}, {key: tensor for key, tensor in tensors.items() if key not in encoder}, encoder


@functools.cache  # once, however many members, banks and tasks there are
def say_unknown_base(where: str) -> None:
    """The notice that an earlier version did not record what the base model was."""
    said = "an earlier version did not record which base model it was: whether it is this one cannot be checked"
    print(f"lora-ensemble: notice: {where}: {said}", file=sys.stderr)


def check_base(records: Sequence[pool.MemberRecord], folder: Path, here: Mapping[str, Any]) -> None:
    """``UserError`` for a member of the pool at ``folder`` that was trained over a base model other than ``here``."""
    for r in records:
        if not r.base_fingerprint:
            say_unknown_base(str(folder))
        # A fully fine-tuned member brings the whole encoder.
        but = "weights" if r.finetune == "full" else None
        if difference := base.base_difference(r.base_fingerprint, here, r.revision, but=but):
            where = pool.member_folder(folder, r.task, r.name)
            raise UserError(f"{where}: trained over another {r.base_model}: {difference}")


def load_base(
    records: Sequence[pool.MemberRecord], folder: Path, where: str, revision: str | None, outputs: int, any_base: bool
) -> tuple[Any, set[str], Any]:
    """The base model of members of the pool at ``folder``: as ``load_classifier`` gives it, and its tokeniser.

    ``UserError`` where it cannot be loaded, or, unless ``any_base``, is not the one that they were trained over.
    """
    tokenizer = base.load_tokenizer(where, revision)
    frozen = any(r.finetune != "full" for r in records)
    classifier, fresh = base.load_classifier(where, num_labels=outputs, revision=revision, frozen=frozen)
    if not any_base:
        check_base(records, folder, base.encoder_fingerprint(classifier, fresh) | base.tokenizer_fingerprint(tokenizer))
    return classifier, fresh, tokenizer


def restore_members(bank: Bank, folder: Path, *, base_model: str, fingerprint: Mapping[str, Any] | None = None) -> None:
    """Fill a bank with its members' best weights from the pool at ``folder``.

    A member that is several models is there for each of them; where the pool has one for all of them, each gets it.
    ``fingerprint``: the base model's, to be checked. ``UserError`` where a member is missing, has another base model or
    other settings, or comes from different runs or epochs in several tasks.
    """
    names = [m.name for m in bank.members]
    for index, member in enumerate(bank.members):
        records = [_record_of(bank, index, task, folder, base_model) for task in bank.tasks]
        if fingerprint is not None:
            check_base(records, folder, fingerprint)
        origins = {r.task: (r.run, r.best_epoch) for r in records}
        if len(set(origins.values())) > 1:
            raise UserError(f"{folder}: {member.name!r} comes from different runs or epochs: {origins}; train it again")
        models, rows, place = records[0].models or [""], names.count(member.name), names[:index].count(member.name)
        if len(models) not in (1, rows):
            raise UserError(
                f"{folder}: {member.name!r} is {len(models)} models; give the data.folds it was trained with"
            )
        model, heads = models[place % len(models)], {}
        for record in records:
            adapter, heads[record.task], encoder = read_weights(folder, record, prefix=bank.prefix, model=model)
            try:
                if encoder:
                    bank.load_encoder(encoder)
            except RuntimeError as e:
                where = pool.member_folder(folder, record.task, record.name)
                raise UserError(f"{where}: its weights do not fit model.base_model ({one_line(e)})") from e
        # What PEFT made us write of a member without adapters is all zeros.
        adapter = adapter if member.adapted else {}
        try:
            bank.load_member(index, adapter, heads)
        except ValueError as e:
            raise UserError(f"{folder}: member {member.name!r} has other settings than given: {e}") from e


def _record_of(bank: Bank, index: int, task: Task, folder: Path, base_model: str) -> pool.MemberRecord:
    """The record of a bank's member in a task of the pool; ``UserError`` unless it is of the same settings."""
    member = bank.members[index]
    where = pool.member_folder(folder, task.name, member.name)
    record = pool.read_record(folder, task.name, member.name)
    if record is None:
        raise UserError(f"{where}: no such member; train it first, or set --pool.dir or --ckpt_path")
    if record.base_model != base_model:
        raise UserError(f"{where}: its base model is {record.base_model}; model.base_model is {base_model}")
    given = member.recorded() | {"kind": task.kind, "labels": task.labels}
    given["finetune"] = "full" if bank.train_encoder else "lora"
    for key in ("finetune", "rank", "scaling", "targets", "layers", "kind", "labels"):
        if (there := getattr(record, key)) != given[key]:
            raise UserError(f"{where}: another member of this name: its {key} was {there!r}, is now {given[key]!r}")
    return record
