"""M members on padded batches, for encoders that cannot put several examples in one row: DeBERTa.

The encoder keeps its own forward and sees M·B examples; what it shares between rows, the relative positions, is given
a member axis.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_ensemble.bank.dropout import MemberDropout, lowered
from lora_ensemble.bank.encode import Adapters, States
from lora_ensemble.bank.families import accepts_token_types
from lora_ensemble.bank.lora import linear_layers
from lora_ensemble.text.packing import unpack


class BankLinear(nn.Module):
    """A frozen ``nn.Linear`` with the adapters of M members on it, which are handed over before the encoder runs."""

    A: Tensor | None = None  # (M, R, in); zeros where a member has a lower rank, or no adapter here
    B: Tensor | None = None  # (M, out, R), its scaling in it
    dropout: MemberDropout | None = None  # of what enters A

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        """x: (M·B, ..., in), members outermost, or positions (1, S, M, in). Returns the same with ``out``."""
        if x.dim() == 4:
            return self(x[0].transpose(0, 1).contiguous()).transpose(0, 1)[None]
        y = self.base(x)
        if self.A is None or self.B is None:
            return y
        m = self.A.shape[0]
        (h,) = lowered(x.reshape(m, -1, x.shape[-1]), [(self.A, self.dropout)])  # (M, B·L, R)
        return torch.baddbmm(y.reshape(m, -1, y.shape[-1]), h, self.B.transpose(1, 2)).view(*x.shape[:-1], -1)


class PaddedEncoder:
    """Runs the encoder on padded batches, for up to ``members`` members; called as :class:`encode.PackedEncoder` is.

    ``adapted``: paths of the linear layers that have adapters; the encoder is changed in place.
    """

    def __init__(self, encoder: nn.Module, adapted: Sequence[str], *, members: int) -> None:
        self.encoder: Any = encoder
        self._token_types = accepts_token_types(encoder)
        layers = linear_layers(encoder)
        self._adapters = {path: BankLinear(layers[path]) for path in adapted}
        for path, layer in self._adapters.items():
            encoder.set_submodule(path, layer)
        self._positions: list[_PositionDropout] = []
        attention: Any
        for attention in encoder.modules() if members > 1 else ():
            if type(attention).__name__ == "DisentangledSelfAttention" and attention.relative_attention:
                self._positions.append(_PositionDropout(attention.pos_dropout))
                attention.pos_dropout = self._positions[-1]
                attention.transpose_for_scores = partial(_by_head, attention.transpose_for_scores)

    @torch.no_grad()
    def frozen_states(self, batch: Mapping[str, Any], layers: Collection[int]) -> dict[int, Tensor]:
        """What the untouched encoder, without dropout, gives the heads to read: (1, B, H), one past the last layer."""
        (end,) = layers
        return {end: self(batch, {}, starts=[0], states={}, dropout=False)}

    def __call__(
        self, batch: Mapping[str, Any], adapters: Adapters, *, starts: Sequence[int], states: States, dropout: bool
    ) -> Tensor:
        """What the head reads of each example: the first token's vector, (M, B, H). All members start at 0."""
        members = len(starts)
        for path, layer in self._adapters.items():
            layer.A, layer.B, layer.dropout = adapters.get(path, (None, None, None))
        for positions in self._positions:
            positions.members = members
        inputs = {
            "input_ids": unpack(batch, "input_ids", self.encoder.config.pad_token_id),
            "attention_mask": batch["attention_mask"][: batch["examples"]],
        }
        if self._token_types:
            inputs["token_type_ids"] = unpack(batch, "token_type_ids", 0)
        self.encoder.train(dropout)
        out = self.encoder(**{name: x.repeat(members, 1) for name, x in inputs.items()}).last_hidden_state
        return out[:, 0].view(members, batch["examples"], -1)


class _PositionDropout(nn.Module):
    """DeBERTa's dropout on relative positions, a mask of its own for every member."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.members = base, 1

    def forward(self, x: Tensor) -> Tensor:
        """x: (S, H) shared positions. Returns (S, M, H)."""
        return self.base(x.unsqueeze(1).expand(-1, self.members, -1))


class _Positions:
    """Projected positions (M, heads, S, d) that answer the ``repeat`` with which DeBERTa spreads them over the rows."""

    def __init__(self, per_member: Tensor) -> None:
        self.per_member = per_member

    def repeat(self, rows: int, *ones: int) -> Tensor:
        """Each member's positions for each of its own rows: (M·B·heads, S, d)."""
        m, heads, s, d = self.per_member.shape
        return self.per_member.unsqueeze(1).expand(m, rows // m, heads, s, d).reshape(-1, s, d)


def _by_head(original: Any, x: Tensor, heads: int) -> Tensor | _Positions:
    """DeBERTa's ``transpose_for_scores`` of tokens (M·B, L, H), or of positions (1, S, M, H)."""
    return original(x, heads) if x.dim() == 3 else _Positions(x[0].unflatten(-1, (heads, -1)).permute(1, 2, 0, 3))
