"""What differs between encoder families: names of layers, of dropouts, and how DeBERTa sees positions.

Everything else is the same for every model that ``AutoModelForSequenceClassification`` knows and whose encoder is made
of ``nn.Linear`` layers.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lora_ensemble.errors import UserError
from lora_ensemble.lora import NO_TARGETS, BankLinear, linear_layers


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
    eager: bool = True
    """Whether plain ("eager") attention is exact at every precision."""
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
FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "roberta": _WITHOUT_POOLER,
    "xlm-roberta": _WITHOUT_POOLER,
    "camembert": _WITHOUT_POOLER,
    "electra": _WITHOUT_POOLER,
    "deberta-v2": replace(
        _WITHOUT_POOLER,
        query="attention.self.query_proj",
        key="attention.self.key_proj",
        value="attention.self.value_proj",
        head_dropout="cls_dropout",
    ),
    "distilbert": Family(
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        output="ffn.lin2",
        head_dropout="seq_classif_dropout",
        encoder_dropouts=("dropout", "attention_dropout"),
    ),
    "modernbert": Family(
        fused="attn.Wqkv",
        output="mlp.Wo",
        # transformers 5.23 takes its softmax in float32, where a float64 mask's minimum becomes -inf: a padding token
        # whose sliding window holds only padding is then NaN.
        eager=False,
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


class _PositionDropout(nn.Module):
    """DeBERTa's dropout on relative positions, a mask of its own for every member."""

    def __init__(self, base: nn.Module, members: int) -> None:
        super().__init__()
        self.base, self.members = base, members

    def forward(self, x: Tensor) -> Tensor:
        """x: (S, H) shared positions. Returns (S, M·H), which only :class:`_PositionLinear` understands."""
        return self.base(x.unsqueeze(1).expand(-1, self.members, -1)).flatten(1)


class _PositionLinear(nn.Module):
    """A projection that DeBERTa applies to tokens and to relative positions alike.

    Tokens (M·B, L, H) go straight through. Positions come as (1, S, M·H), because all rows share them and only the
    members differ; they leave as (1, S, M·out).
    """

    def __init__(self, base: nn.Module, members: int, width: int) -> None:
        super().__init__()
        self.base, self.members, self.width = base, members, width

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] == self.width:
            return self.base(x)
        s = x.shape[1]
        y = self.base(x.view(s, self.members, self.width).transpose(0, 1).contiguous())  # (M, S, out)
        return y.transpose(0, 1).reshape(1, s, -1)


class _Positions:
    """Projected positions (M, heads, S, d) that answer the ``repeat`` with which DeBERTa spreads them over the rows."""

    def __init__(self, per_member: Tensor) -> None:
        self.per_member = per_member

    def repeat(self, rows: int, *ones: int) -> Tensor:
        """Each member's positions for each of its own rows: (M·B·heads, S, d)."""
        m, heads, s, d = self.per_member.shape
        return self.per_member.unsqueeze(1).expand(m, rows // m, heads, s, d).reshape(-1, s, d)


def prepare_encoder(encoder: nn.Module, model_type: str, members: int) -> None:
    """Make room for the member axis where an encoder shares a computation between rows (DeBERTa's positions).

    Call it after the adapters are injected; the encoder is changed in place.
    """
    if model_type != "deberta-v2" or members == 1:
        return
    attention: Any
    for attention in [m for m in encoder.modules() if type(m).__name__ == "DisentangledSelfAttention"]:
        if not attention.relative_attention:
            continue
        attention.pos_dropout = _PositionDropout(attention.pos_dropout, members)
        for name in ("query_proj", "key_proj", "pos_query_proj", "pos_key_proj"):
            layer = getattr(attention, name, None)
            if layer is not None:
                width = (layer.base if isinstance(layer, BankLinear) else layer).in_features
                setattr(attention, name, _PositionLinear(layer, members, width))
        attention.transpose_for_scores = _transpose_for_scores(attention, members)


def _transpose_for_scores(attention: Any, members: int) -> Any:
    original, out, heads = attention.transpose_for_scores, attention.all_head_size, attention.num_attention_heads

    def transpose(x: Tensor, attention_heads: int) -> Tensor | _Positions:
        if x.shape[-1] == out:
            return original(x, attention_heads)
        s = x.shape[1]
        return _Positions(x.view(s, members, heads, out // heads).permute(1, 2, 0, 3))

    return transpose


def accepts_token_types(encoder: nn.Module) -> bool:
    """Whether the encoder tells the two sentences of a pair apart by token types."""
    takes = "token_type_ids" in inspect.signature(encoder.forward).parameters
    # RoBERTa's one type, DeBERTa-v3's none: the tokeniser's ids would be out of range.
    return takes and getattr(encoder.config, "type_vocab_size", 0) > 1


def replace_layer(root: nn.Module, path: str, layer: nn.Module) -> None:
    """Put ``layer`` at ``path``."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, layer)


def freeze(module: nn.Module) -> None:
    """No gradient for any parameter."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
