"""One model out of the pool, without a bank: as a PEFT folder, or merged into a plain transformers model.

Axes: C outputs of a head, H hidden width, r rank.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_ensemble import pool
from lora_ensemble.bank.base_model import longest_input
from lora_ensemble.bank.families import accepts_token_types
from lora_ensemble.bank.lora import Adapter, linear_layers, peft_config, peft_tensors
from lora_ensemble.bank.member_files import load_base, read_weights
from lora_ensemble.ensemble.folder import Base
from lora_ensemble.errors import UserError
from lora_ensemble.pool import MemberRecord
from lora_ensemble.tasks import PRESETS, Kind, Task


@dataclass(frozen=True, kw_only=True)
class Single:
    """One model for one task: a member, or several merged into one."""

    name: str
    task: Task
    base_model: str
    """What the written files call its base: a hub id, or a folder's name, never a path."""
    revision: str | None
    max_length: int
    """Tokens after which it cuts a text."""
    classifier: Any
    """The base model with an undefined head of C outputs."""
    tokenizer: Any
    scaling: float
    """c of the adapter."""
    adapter: Adapter
    head: dict[str, Tensor]
    """The whole head, by the classifier's names."""
    encoder: dict[str, Tensor]
    """All of the encoder where it was fully fine-tuned, and the adapter is empty; otherwise nothing."""


def base_of(records: Sequence[MemberRecord], folder: Path, task: Task, base: Base, *, any_base: bool) -> dict[str, Any]:
    """What members of a base model, in the pool at ``folder``, share, as arguments of :class:`Single`.

    ``UserError`` where it cannot be loaded, or, unless ``any_base``, is not the one that they were trained over.
    """
    classifier, _, tokenizer = load_base(
        records, folder, base.where, base.revision, outputs=task.num_outputs, any_base=any_base
    )
    return {
        "task": task,
        "base_model": base.name,
        "revision": base.revision,
        "max_length": records[0].settings.get("max_length") or longest_input(base.where, tokenizer, base.revision),
        "classifier": classifier.eval(),
        "tokenizer": tokenizer,
    }


def known_columns(task: str, kind: Kind, columns: list[str]) -> list[str]:
    """The text columns that members name, or else the preset's of that name; none where neither is known."""
    preset = PRESETS.get(task)
    return columns or (list(preset.text) if preset is not None and preset.kind == kind else [])


def member_of(folder: Path, record: MemberRecord, task: Task, base: Base, *, any_base: bool = False) -> Single:
    """A member of the pool at ``folder``. ``UserError`` where its weights or its base model cannot be had."""
    shared = base_of([record], folder, task, base, any_base=any_base)
    adapter, head, encoder = read_weights(folder, record, prefix=shared["classifier"].base_model_prefix)
    scaling = 1.0 if record.scaling is None else record.scaling
    return Single(name=record.name, scaling=scaling, adapter=adapter, head=head, encoder=encoder, **shared)


@torch.no_grad()
def plain_model(single: Single) -> Any:
    """``single.classifier`` with W0 + c · B A in place of each adapted W0, in float32, and with its head.

    The classifier itself is changed, and returned; its logits (B, C) are the member's.
    """
    model = single.classifier
    layers = linear_layers(model.base_model)
    try:
        for path, a in single.adapter.A.items():
            layers[path].weight += single.scaling * (single.adapter.B[path] @ a)
        wanted = {n for n, _ in model.named_parameters() if single.encoder or n not in _encoder_names(model)}
        found = single.encoder | single.head
        if wanted != set(found):
            raise RuntimeError(f"its weights are {sorted(wanted ^ set(found))[:3]} more or fewer")
        model.load_state_dict(found, strict=False)
    except (KeyError, RuntimeError) as e:
        reason = " ".join(str(e).split())
        raise UserError(
            f"member {single.name}: its weights do not fit the base model {single.base_model} ({reason[:200]})"
        ) from e
    return model


def _encoder_names(model: Any) -> set[str]:
    return {f"{model.base_model_prefix}.{name}" for name, _ in model.base_model.named_parameters()}


def last_layer(model: Any) -> tuple[str, nn.Linear]:
    """The head's layer that gives the logits, and its path."""
    encoder = model.base_model_prefix + "."
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.startswith(encoder)]
    return found[-1]


@torch.no_grad()
def with_two_outputs(model: Any) -> Any:
    """A binary model of one logit z as one of two, (0, z): softmax gives what sigmoid(z) gave, and argmax decides the
    same. transformers has no head of one output that means a class."""
    path, one = last_layer(model)
    two = nn.Linear(one.in_features, 2, bias=one.bias is not None)
    for wide, narrow in zip(two.parameters(), one.parameters(), strict=True):
        wide.copy_(torch.cat([torch.zeros_like(narrow), narrow]))
    model.set_submodule(path, two)
    return model


def write_merged(folder: Path, single: Single, model: Any) -> None:
    """A plain transformers folder; ``pipeline("text-classification", folder)`` answers with the task's labels.

    ``model``: ``plain_model(single)``, which is changed. A regression has one output, whose value is the pipeline's
    score.
    """
    task = single.task
    if task.kind == "binary":
        model = with_two_outputs(model)
    names = dict(enumerate(task.labels or [task.name]))
    model.config.id2label = names
    model.config.label2id = {name: i for i, name in names.items()}
    model.num_labels = len(names)
    # What keeps the pipeline from squashing a value into a probability.
    model.config.problem_type = "regression" if task.kind == "regression" else "single_label_classification"
    save(model, folder)
    write_tokenizer(folder, single)


def save(model: Any, folder: Path) -> None:
    """``model.save_pretrained`` without its progress bar."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if bars:
            logging.enable_progress_bar()


def write_peft(folder: Path, single: Single) -> None:
    """A PEFT folder for ``AutoModelForSequenceClassification`` with C outputs.

    ``UserError`` for a member that was fully fine-tuned.
    """
    if single.encoder:
        raise UserError(f"member {single.name}: fully fine-tuned, so it has no adapter; use --format merged")
    model = single.classifier
    prefix, paths = model.base_model_prefix, list(single.adapter.A)
    rank = len(next(iter(single.adapter.A.values())))
    base, revision = single.base_model, single.revision
    config = peft_config(model, paths, rank=rank, scaling=single.scaling, base_model=base, revision=revision)
    (folder / pool.ADAPTER_CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    from safetensors.torch import save

    tensors = peft_tensors(single.adapter, single.head, prefix=prefix)
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    (folder / pool.ADAPTER).write_bytes(save(contiguous, metadata={"format": "pt"}))
    write_tokenizer(folder, single)


def write_tokenizer(folder: Path, single: Single) -> None:
    """The tokeniser, which says how long a text may be and whether the encoder tells the texts of a pair apart."""
    tokenizer = single.tokenizer
    tokenizer.model_max_length = single.max_length
    # Or a pipeline keeps the types of a pair from an encoder that was trained with them, or gives them to one without.
    types = ["token_type_ids"] if accepts_token_types(single.classifier.base_model) else []
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = ["input_ids", *types, "attention_mask"]
    tokenizer.save_pretrained(folder)
