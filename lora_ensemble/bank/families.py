"""What differs between encoder families: names of layers and of dropouts, and whether examples can share a row.

Everything else is the same for every model that ``AutoModelForSequenceClassification`` knows and whose encoder is made
of ``nn.Linear`` layers.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lora_ensemble.bank.lora import NO_TARGETS, linear_layers
from lora_ensemble.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PostNorm:
    """Where the parts of a layer are whose norms follow its attention and its feed-forward, as in BERT."""

    layers: str = "encoder.layer"
    query: str = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    attention_dropout: str = "attention.self.dropout"
    output: str = "attention.output.dense"
    output_dropout: str | None = "attention.output.dropout"
    attention_norm: str = "attention.output.LayerNorm"
    up: str = "intermediate.dense"
    activation: str = "intermediate.intermediate_act_fn"
    down: str = "output.dense"
    down_dropout: str = "output.dropout"
    norm: str = "output.LayerNorm"


@dataclass(frozen=True, kw_only=True)
class Family:
    """Suffixes of the linear layers that the papers name, and the configuration's names of the dropouts."""

    query: str | None = None
    key: str | None = None
    value: str | None = None
    fused: str | None = None
    """The one layer that computes query, key and value together, where a family fuses them."""
    output: str
    """The feed-forward's second layer, the course's ``out_dense``."""
    not_output: str | None = None
    """A layer that ends in ``output`` but is not it."""
    pooler: str | None = None
    """The pooler's linear layer, where the pooler belongs to the encoder."""
    block: PostNorm | None = PostNorm()
    """Its layers, where they are BERT's but for their names."""
    packs: bool = True
    """Whether examples can share a row, with attention kept apart; otherwise batches are padded."""
    positions_after_padding: bool = False
    """Whether positions count from the padding token's id + 1."""
    head_dropout: str = "classifier_dropout"
    encoder_dropouts: tuple[str, ...] = ("hidden_dropout_prob", "attention_probs_dropout_prob")


_BERT = Family(
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="output.dense",
    not_output="attention.output.dense",
    pooler="pooler.dense",
)
_WITHOUT_POOLER = replace(_BERT, pooler=None)
_ROBERTA = replace(_WITHOUT_POOLER, positions_after_padding=True)
FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "electra": _WITHOUT_POOLER,
    "deberta-v2": replace(
        _WITHOUT_POOLER,
        query="attention.self.query_proj",
        key="attention.self.key_proj",
        value="attention.self.value_proj",
        block=None,
        packs=False,  # relative positions
        head_dropout="cls_dropout",
    ),
    "distilbert": Family(
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        output="ffn.lin2",
        block=PostNorm(
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
        ),
        head_dropout="seq_classif_dropout",
        encoder_dropouts=("dropout", "attention_dropout"),
    ),
    "modernbert": Family(
        fused="attn.Wqkv",
        output="mlp.Wo",
        block=None,
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


def target_paths(encoder: nn.Module, model_type: str, targets: str | None) -> list[str]:
    """Paths in the encoder of the linear layers that ``targets`` names, in the encoder's order.

    ``UserError`` where the family cannot do it, or nothing matches; the message says what can be had.
    """
    family, layers = family_of(model_type), linear_layers(encoder)
    if targets is None or targets == NO_TARGETS:
        return []
    wanted: set[str] = set()
    for word in targets.split("+"):
        found = _paths_of(word, family, list(layers), f"targets {targets!r} on {model_type}")
        if not found:
            # The last two parts of a path name a layer well enough in every family.
            known = sorted({".".join(p.split(".")[-2:]) for p in layers})
            presets = "qv, qkv, pooler, all-linear, all-but-output, none"
            raise UserError(
                f"targets {targets!r}: no linear layer of this {model_type} encoder ends in {word!r}; "
                f"expected {presets}, or suffixes joined by '+' of: {', '.join(known)}"
            )
        wanted.update(found)
    return [path for path in layers if path in wanted]


def _paths_of(word: str, family: Family, paths: list[str], where: str) -> list[str]:
    def ending(*suffixes: str | None) -> list[str]:
        return [p for p in paths if any(s and (p == s or p.endswith("." + s)) for s in suffixes)]

    if word == "all-linear":
        return paths
    if word == "all-but-output":
        outputs = set(ending(family.output)) - set(ending(family.not_output))
        return [p for p in paths if p not in outputs]
    if word == "qv":
        if family.fused:
            raise UserError(f"{where}: query, key and value are one layer ({family.fused}) here; use qkv")
        return ending(family.query, family.value)
    if word == "qkv":
        return ending(family.query, family.key, family.value, family.fused)
    if word == "pooler":
        if not ending(family.pooler):
            raise UserError(
                f"{where}: this encoder has no pooler of its own (only BERT's has one; other families keep theirs in "
                "the head, which every member trains anyway); leave pooler out"
            )
        return ending(family.pooler)
    if word == NO_TARGETS:
        raise UserError(f"{where}: none stands alone; it cannot be joined with other targets")
    return ending(word) if word else []


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


def freeze(module: nn.Module) -> None:
    """No gradient for any parameter."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
