"""What differs between encoder families: names of layers and of dropouts, and whether examples can share a row."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_ensemble.bank.lora import ALL_LAYERS, NO_TARGETS, linear_layers
from lora_ensemble.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where the parts of an encoder's layers are, and the configuration's names of the dropouts; by default BERT's."""

    layers: str = "encoder.layer"
    query: str = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    fused: str | None = None  # query, key and value together, where a family fuses them
    attention_dropout: str = "attention.self.dropout"
    output: str = "attention.output.dense"
    output_dropout: str | None = "attention.output.dropout"
    attention_norm: str = "attention.output.LayerNorm"
    up: str = "intermediate.dense"
    activation: str = "intermediate.intermediate_act_fn"
    down: str = "output.dense"  # the feed-forward's second layer, the course's ``out_dense``
    down_dropout: str = "output.dropout"
    norm: str = "output.LayerNorm"
    pooler: str | None = None  # the pooler's linear layer, where the pooler belongs to the encoder
    post_norm: bool = True  # whether norms follow attention and feed-forward; else, as in ModernBERT, they precede
    packs: bool = True  # whether examples can share a row; otherwise batches are padded
    positions_after_padding: bool = False  # whether positions count from the padding token's id + 1
    head_dropout: str = "classifier_dropout"
    encoder_dropouts: tuple[str, ...] = ("hidden_dropout_prob", "attention_probs_dropout_prob")


_ROBERTA = Family(positions_after_padding=True)
FAMILIES: dict[str, Family] = {
    "bert": Family(pooler="pooler.dense"),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "electra": Family(),
    "deberta-v2": Family(
        query="attention.self.query_proj",
        key="attention.self.key_proj",
        value="attention.self.value_proj",
        packs=False,  # relative positions
        head_dropout="cls_dropout",
    ),
    "distilbert": Family(
        layers="transformer.layer",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        attention_dropout="attention.dropout",
        output="attention.out_lin",
        output_dropout=None,
        attention_norm="sa_layer_norm",
        up="ffn.lin1",
        activation="ffn.activation",
        down="ffn.lin2",
        down_dropout="ffn.dropout",
        norm="output_layer_norm",
        head_dropout="seq_classif_dropout",
        encoder_dropouts=("dropout", "attention_dropout"),
    ),
    "modernbert": Family(
        layers="layers",
        fused="attn.Wqkv",
        output="attn.Wo",
        down="mlp.Wo",
        post_norm=False,
        encoder_dropouts=("embedding_dropout", "attention_dropout", "mlp_dropout"),
    ),
}
"""By ``config.model_type``."""


def family_of(model_type: str) -> Family:
    """The family of an encoder; ``UserError`` for one that was never shown to work."""
    if model_type not in FAMILIES:
        raise UserError(
            f"model.base_model: an encoder of type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def depth_of(encoder: Any, model_type: str) -> int:
    """How many layers an encoder has."""
    return len(encoder.get_submodule(family_of(model_type).layers))


def layer_numbers(layers: str | list[int], depth: int) -> list[int]:
    """Numbers, from 0, of the layers that a member's ``layers`` names in an encoder of ``depth`` layers.

    A half or a third that is no whole number of layers is rounded up. ``UserError`` for what the encoder lacks.
    """
    if isinstance(layers, str):
        count = {ALL_LAYERS: depth, "top-half": -(-depth // 2), "top-third": -(-depth // 3)}.get(layers)
        if count is None and (top := re.fullmatch(r"top-([0-9]+)", layers)):
            count = int(top[1])
        numbers = range(depth - count, depth) if count else []
    else:
        numbers = sorted(set(layers))
    if not numbers or numbers[0] < 0 or numbers[-1] >= depth:
        raise UserError(
            f"layers {layers!r}: expected all, top-half, top-third, top-1 to top-{depth}, or a list of numbers from 0 "
            f"to {depth - 1}: this encoder has {depth} layers"
        )
    return list(numbers)


def layer_number(path: str, model_type: str) -> int | None:
    """The layer, counted from 0, that a path in the encoder lies in; None below and above the layers."""
    within = path.removeprefix(family_of(model_type).layers + ".")
    return None if within == path else int(within.split(".")[0])


def target_paths(encoder: nn.Module, model_type: str, targets: str, layers: str | list[int] = ALL_LAYERS) -> list[str]:
    """Paths in the encoder of the linear layers that ``targets`` names, in the encoder's order.

    ``layers``: those that they are in, as PEFT's ``layers_to_transform``; a pooler that is named is adapted besides.
    ``UserError`` where the family cannot do it, or nothing matches; the message says what can be had.
    """
    family, paths = family_of(model_type), list(linear_layers(encoder))
    if targets == NO_TARGETS:
        return []
    wanted: set[str] = set()
    words, prefix = targets.split("+"), f"{encoder.base_model_prefix}."
    for word in words:
        named = _paths_of(word.removeprefix(prefix), family, paths, f"targets {targets!r} on {model_type}")
        if not named:
            # The last two parts of a path name a layer well enough in every family.
            suffixes = sorted({".".join(path.split(".")[-2:]) for path in paths})
            raise UserError(
                f"targets {targets!r}: no linear layer of this {model_type} encoder ends in {word!r}; expected qv, "
                "qkv, pooler, all-linear, all-but-output, none, or suffixes joined by '+' of: " + ", ".join(suffixes)
            )
        wanted.update(named)
    if layers != ALL_LAYERS:
        numbers = layer_numbers(layers, depth_of(encoder, model_type))
        # Whole paths, with the encoder's name before them as in PEFT's files, are meant as they are there, too.
        outside = {word.removeprefix(prefix) for word in words if word.startswith(prefix)}
        outside |= set() if "pooler" not in words else {family.pooler or ""}
        wanted = {path for path in wanted if layer_number(path, model_type) in numbers or path in outside}
        if not wanted:
            raise UserError(f"targets {targets!r}: none is in layers {layers!r} of this {model_type} encoder")
    return [path for path in paths if path in wanted]


def _paths_of(word: str, family: Family, paths: list[str], where: str) -> list[str]:
    def ending(*suffixes: str | None) -> list[str]:
        return [p for p in paths if any(s and (p == s or p.endswith("." + s)) for s in suffixes)]

    match word:
        case "all-linear":
            return paths
        case "all-but-output":
            # The name of a layer of BERT's attention ends the same.
            outputs = set(ending(family.down)) - set(ending(family.output))
            return [p for p in paths if p not in outputs]
        case "qv" if family.fused:
            raise UserError(f"{where}: query, key and value are one layer ({family.fused}) here; use qkv")
        case "qv":
            return ending(family.query, family.value)
        case "qkv":
            return ending(family.fused) if family.fused else ending(family.query, family.key, family.value)
        case "pooler" if not ending(family.pooler):
            raise UserError(
                f"{where}: this encoder has no pooler of its own (only BERT's has one; other families keep theirs in "
                "the head, which every member trains anyway); leave pooler out"
            )
        case "pooler":
            return ending(family.pooler)
        case "none":
            raise UserError(f"{where}: none stands alone; it cannot be joined with other targets")
    return ending(word)


def set_dropout(config: Any, *, head: float | None, encoder: float | None) -> None:
    """Set the dropout probabilities of a configuration; None leaves the model's own."""
    family = family_of(config.model_type)
    if head is not None:
        setattr(config, family.head_dropout, head)
    if encoder is not None:
        for name in family.encoder_dropouts:
            setattr(config, name, encoder)


def accepts_token_types(encoder: nn.Module) -> bool:
    """Whether the encoder tells the two sentences of a pair apart by token types."""
    takes = "token_type_ids" in inspect.signature(encoder.forward).parameters
    # RoBERTa's one type, DeBERTa-v3's none: the tokeniser's ids would be out of range.
    return takes and getattr(encoder.config, "type_vocab_size", 0) > 1
