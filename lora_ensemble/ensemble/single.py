"""One member out of the pool, without a bank: as a PEFT folder, or merged into a plain transformers model."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_ensemble import pool
from lora_ensemble.bank.families import accepts_token_types
from lora_ensemble.bank.lora import Adapter, linear_layers
from lora_ensemble.bank.member_files import load_base, read_weights
from lora_ensemble.ensemble.folder import Contents, copy_files, save_pretrained
from lora_ensemble.ensemble.sources import Base, check_readers, find_bases, known_columns, text_limit
from lora_ensemble.errors import UserError, one_line
from lora_ensemble.pool import MemberRecord
from lora_ensemble.tasks import Task


def write_member(target: Path, folder: Path, member: MemberRecord, *, merged: bool, any_base: bool) -> Contents:
    """Fill the empty folder ``target`` with a member of the pool at ``folder``, but for its card.

    ``merged``: a plain transformers folder for ``pipeline("text-classification", target)``; a regression's score is its
    value. Otherwise a PEFT folder for ``AutoModelForSequenceClassification``. ``UserError`` where weights or base model
    cannot be had, unless ``any_base`` for another one than in training, and for PEFT of a fully fine-tuned member.
    """
    check_readers([member], folder)
    if len(member.models) > 1:
        raise UserError(
            f"member {member.name}: the mean of {len(member.models)} models; export an ensemble of it (--ensemble), or "
            "train with --data.refit true, which makes one model of it"
        )
    (base,) = find_bases([member], {}, any_base=any_base).values()
    columns = known_columns(member.task, member.kind, member.text)
    task = Task(
        name=member.task, kind=member.kind, text=columns or ["text"], label_names=member.labels, score=member.scored_by
    )
    classifier, _, tokenizer = load_base(
        [member], folder, base.where, base.revision, outputs=task.num_outputs, any_base=any_base
    )
    if merged:
        save_pretrained(_with_labels(_merged_member(classifier, folder, member, base), task), target)
    elif member.finetune == "full":
        raise UserError(f"member {member.name}: fully fine-tuned, so it has no adapter; use --format merged")
    else:
        copy_files(folder, member, [pool.ADAPTER_CONFIG, pool.ADAPTER], target, base)
    longest, kept = text_limit(member, base.where, base.revision)
    tokenizer.model_max_length = longest
    if kept == "tail":
        tokenizer.truncation_side = tokenizer.init_kwargs["truncation_side"] = "left"
    elif kept == "head-tail":
        said = "heads and tails of long texts, which no tokeniser can be told: this folder's keeps heads alone"
        print(f"lora-ensemble: notice: {member.name} was trained on {said}", file=sys.stderr)
    # Or a pipeline keeps the types of a pair from an encoder that was trained with them, or gives them to one without.
    types = ["token_type_ids"] if accepts_token_types(classifier.base_model) else []
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = ["input_ids", *types, "attention_mask"]
    tokenizer.save_pretrained(target)
    form: Literal["merged", "peft"] = "merged" if merged else "peft"
    return Contents(
        form=form, task=task, columns=columns, bases=[base], members=[member], max_length=longest, kept=[kept]
    )


def _merged_member(classifier: Any, folder: Path, member: MemberRecord, base: Base) -> Any:
    """``classifier``, changed, with the member's weights."""
    adapter, head, encoder = read_weights(folder, member, prefix=classifier.base_model_prefix)
    try:
        return merge(classifier, adapter, head | encoder, scaling=1.0 if member.scaling is None else member.scaling)
    except (KeyError, RuntimeError) as e:
        raise UserError(f"member {member.name}: its weights do not fit base model {base.name} ({one_line(e)})") from e


@torch.no_grad()
def merge(classifier: Any, adapter: Adapter, weights: Mapping[str, Tensor], *, scaling: float) -> Any:
    """``classifier``, changed: W0 + c · B A in place of each adapted W0, and ``weights`` by its own names.

    ``weights``: of the whole head, or of all there is. ``scaling``: c. ``KeyError`` or ``RuntimeError`` where layers or
    weights are others than the classifier's.
    """
    layers, encoder = linear_layers(classifier.base_model), classifier.base_model_prefix + "."
    for path, (a, b) in adapter.items():
        layers[path].weight += scaling * (b @ a)
    whole = any(name.startswith(encoder) for name in weights)
    wanted = {name for name, _ in classifier.named_parameters() if whole or not name.startswith(encoder)}
    if wanted != set(weights):
        raise RuntimeError(f"its weights are {sorted(wanted ^ set(weights))[:3]} more or fewer")
    classifier.load_state_dict(weights, strict=False)
    return classifier.eval()


def _with_labels(model: Any, task: Task) -> Any:
    """``model``, changed, with the task's labels in its configuration, as a pipeline reads them."""
    if task.kind == "binary":
        _give_two_outputs(model)
    names = dict(enumerate(task.labels or [task.name]))
    model.config.id2label = names
    model.config.label2id = {name: i for i, name in names.items()}
    model.num_labels = len(names)
    # What keeps the pipeline from squashing a value into a probability.
    types = {"regression": "regression", "multilabel": "multi_label_classification"}  # of the latter it has sigmoids
    model.config.problem_type = types.get(task.kind, "single_label_classification")
    return model


@torch.no_grad()
def _give_two_outputs(model: Any) -> None:
    """Change a binary model of one logit z into one of two, (0, z), for which softmax says what sigmoid said of z."""
    # transformers has no head of one output that means a class.
    encoder = model.base_model_prefix + "."
    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.startswith(encoder)]
    path, one = linear[-1]
    two = nn.Linear(one.in_features, 2, bias=one.bias is not None)
    for wide, narrow in zip(two.parameters(), one.parameters(), strict=True):
        wide.copy_(torch.cat([torch.zeros_like(narrow), narrow]))
    model.set_submodule(path, two)
