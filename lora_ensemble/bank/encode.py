"""An encoder run for M members on packed rows, its frozen weights and modules transformers' own.

How the layers are run is written anew, so that nothing is computed that nobody reads: no padding, the last layer only
where the head looks, what all members share once until the first adapter or dropout parts them. Frozen weights are
cast and fused once, not in every step. DeBERTa keeps its own forward: see ``padded``.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_ensemble.bank.attention import attend
from lora_ensemble.bank.dropout import MemberDropout, add_dropped, dropped, lowered
from lora_ensemble.bank.families import accepts_token_types, family_of

Adapters = Mapping[str, tuple[Tensor, Tensor, MemberDropout | None]]
"""Path of a linear layer in the encoder to A (M, R, in), scaling times B (M, out, R), and the dropout before them."""
States = Mapping[int, Tensor]
"""Number of a layer to what reaches it of a packed row, (1, T, H); see :meth:`PackedEncoder.frozen_states`."""


def product_dtype(x: Tensor) -> torch.dtype:
    """Of matrix products with ``x``: autocast's where it is on, otherwise that of ``x``."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def computes_bf16(device: str) -> bool:
    """Whether a device ("cpu", "cuda", ...) multiplies bf16 matrices itself; False where nobody knows.

    On a CPU that does not, torch does it in software: many times slower than float32 (seen on an AMD EPYC with AVX2
    and no AVX-512).
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device != "cpu":
        return False
    has: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    # ARM's instructions are of use only with the library that torch has on Linux.
    names = ["amx_bf16", "avx512_bf16", "avx10_2", *(["bf16"] if sys.platform == "linux" else [])]
    return any(has.get(name) for name in names)


def bf16_advice(precision: object, device: str, *, instead: str) -> str | None:
    """What to tell a user who asked for bf16 on a device where it is slow; ``instead``: the option that is not."""
    if not str(precision).startswith("bf16") or computes_bf16(device):
        return None
    return f"note: {device} has no bf16 of its own here, so this is many times slower than float32; use {instead}"


class PackedEncoder:
    """Runs a frozen or trained transformers encoder, of a family whose attention can be packed, on packed rows."""

    def __init__(self, encoder: Any) -> None:
        self.encoder, self.config = encoder, encoder.config
        self.family = family_of(encoder.config.model_type)
        self.token_types = accepts_token_types(encoder)
        self._fused: dict[tuple[str, ...], tuple[Any, Tensor, Tensor | None]] = {}
        self._paths: dict[nn.Module, str] = {module: path for path, module in encoder.named_modules()}
        self.layers: Any = encoder.get_submodule(self.family.layers)
        self.weight = next(encoder.parameters())  # any: where they are, and in what precision

    def __call__(
        self, batch: Mapping[str, Any], adapters: Adapters, *, starts: Sequence[int], states: States, dropout: bool
    ) -> Tensor:
        """What the head reads of each example, (M or 1, B, H): the first token's vector, or the mean over tokens.

        ``batch``: a packed row: ``input_ids`` (T,), ``token_type_ids`` (T,) where the encoder takes them, and
        :func:`packing.layout`. ``starts``: the layer at which each of M members starts, ascending: at 0 with the
        embeddings, at others with ``states``, see :meth:`frozen_states`. Matrix products are in :func:`product_dtype`;
        sums and norms keep the precision of the encoder's own weights.
        """
        run = _Run(self, batch, adapters, starts, states, dropout)
        with torch.autocast(self.weight.device.type, enabled=False):
            for number in range(starts[0], len(self.layers)):
                run.layer(number)
            return run.read()

    @torch.no_grad()
    def frozen_states(self, batch: Mapping[str, Any], layers: Collection[int]) -> dict[int, Tensor]:
        """What reaches each of ``layers``, by its number above 0, without adapters and dropout: (1, T, H).

        In the precision of matrix products, which is what the layer's own products are made of. For the number of
        layers, one past the last, it is what the head reads: (1, B, H), in the precision of the encoder's weights.
        """
        run, states = _Run(self, batch, {}, [0], {}, False), {}
        with torch.autocast(self.weight.device.type, enabled=False):
            for number in range(max(layers)):
                run.layer(number)
                if number + 1 in layers:
                    states[number + 1] = run.read() if number + 1 == len(self.layers) else run.parts[0][0].to(run.dtype)
        return states

    def _weights(self, layers: Sequence[nn.Linear], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """The layers' weights one below the other, and their biases, as ``dtype``; kept where they are frozen."""
        weights: list[Tensor] = [layer.weight for layer in layers]
        biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        if len(layers) == 1 and weights[0].dtype == dtype:
            return weights[0], layers[0].bias
        state = [(w.data_ptr(), w._version, w.device, dtype) for w in weights]
        paths = tuple(self._paths[layer] for layer in layers)
        if paths not in self._fused or self._fused[paths][0] != state:
            # Evaluation runs in inference mode, whose tensors no gradient may pass.
            with torch.inference_mode(False):
                fused = torch.cat(weights).to(dtype), torch.cat(biases).to(dtype) if biases else None
            if weights[0].requires_grad:
                return fused
            self._fused[paths] = (state, *fused)
        return self._fused[paths][1:]

    def project(
        self, x: Tensor, layers: Sequence[nn.Linear], adapters: Adapters, dtype: torch.dtype, of: slice | None = None
    ) -> list[Tensor]:
        """What linear layers make of x (M or 1, T, in) in two products, adapters included: (M or 1, T, out) each.

        ``of``: the members that x is for; None: all.
        """
        x = x.to(dtype)
        if x.device.type == "cpu" and layers[0].weight.dtype == dtype and not torch.is_grad_enabled():
            # To answer with: several products are as fast there, and need no fused copy of the weights.
            outputs = [F.linear(x, layer.weight, layer.bias) for layer in layers]
        else:
            outputs = list(F.linear(x, *self._weights(layers, dtype)).split([w.out_features for w in layers], -1))
        paths = [self._paths[layer] for layer in layers]
        adapted = [(i, *adapters[path]) for i, path in enumerate(paths) if path in adapters]
        if of is not None:
            adapted = [(i, a[of], b[of], drop and drop.of(of)) for i, a, b, drop in adapted]
        lows = lowered(x, [(a, drop) for _, a, _, drop in adapted])
        for (i, _, b, _), h in zip(adapted, lows, strict=True):
            outputs[i] = torch.baddbmm(outputs[i], h, b.transpose(1, 2))
        return outputs


Part = tuple[Tensor, slice]
"""What reaches a layer, (M' or 1, T, H), and the M' members that it is for."""


@dataclass
class _Run:
    """One pass over one packed row; see :meth:`PackedEncoder.__call__`."""

    packed: PackedEncoder
    batch: Mapping[str, Any]
    adapters: Adapters
    starts: Sequence[int]
    states: States
    dropout: bool
    members: int = 0  # that have started by now
    parts: list[Part] = field(default_factory=list)
    """What they have come to. Nobody else holds it, so that it is freed as soon as the next layer is done with it."""

    def __post_init__(self) -> None:
        weight = self.packed.weight
        self.exact, self.dtype = weight.dtype, product_dtype(weight)  # of sums and norms; of matrix products
        self._rotary: dict[str, tuple[Tensor, Tensor]] = {}

    def layer(self, number: int) -> None:
        """Run a layer, for the members that have started and those that start there."""
        started, self.members = self.members, bisect_right(self.starts, number)
        if self.members > started:
            joining = self.states[number].to(self.exact) if number else self.embedded()
            self.parts.append((joining, slice(started, self.members)))
        layer, last = self.packed.layers[number], number == len(self.packed.layers) - 1
        x = self.post_norm(layer, last) if self.packed.family.post_norm else self.pre_norm(layer, last)
        self.parts = [(x, slice(0, self.members))]

    def p(self, dropout: Any) -> float:
        """A dropout's probability in this pass."""
        if not self.dropout or dropout is None or isinstance(dropout, nn.Identity):
            return 0.0
        return dropout if isinstance(dropout, float) else float(dropout.p)

    def parted(self, x: Tensor, p: float) -> Tensor:
        """What dropout with probability ``p`` is to act on: each member draws its own, though they share x so far."""
        return x.expand(self.members, -1, -1) if p else x

    def project(self, x: Tensor, *layers: nn.Linear) -> list[Tensor]:
        return self.joined([(x, slice(0, self.members))], *layers)

    def joined(self, parts: Sequence[Part], *layers: nn.Linear) -> list[Tensor]:
        """What linear layers make of the parts, side by side for all members; what they share is computed once."""
        every = slice(0, len(self.starts))
        outputs = [
            self.packed.project(x, layers, self.adapters, self.dtype, None if members == every else members)
            for x, members in parts
        ]
        return outputs[0] if len(parts) == 1 else [_side_by_side(x, parts) for x in zip(*outputs, strict=True)]

    def taken(self) -> Tensor:
        """The parts side by side, for all members; the run no longer holds them."""
        parts, self.parts = self.parts, []
        return _side_by_side([x for x, _ in parts], parts)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: Any, window: int | None = None) -> Tensor:
        heads, p = self.packed.config.num_attention_heads, self.p(dropout)
        return attend(self.parted(q, p), k, v, self.batch, heads=heads, dropout=p, window=window)

    def add(self, x: Tensor, to: Tensor, dropout: Any) -> Tensor:
        p = self.p(dropout)
        return add_dropped(to, self.parted(x, p), p)

    def first(self, x: Tensor) -> Tensor:
        """The first token of each example, (M or 1, B, H)."""
        return x.index_select(1, self.batch["first"])

    def embedded(self) -> Tensor:
        """What reaches the first layer."""
        packed, batch, encoder = self.packed, self.batch, self.packed.encoder
        inputs = {"input_ids": batch["input_ids"][None]}
        if packed.family.post_norm:  # ModernBERT sees positions in its attention
            offset = packed.config.pad_token_id + 1 if packed.family.positions_after_padding else 0
            inputs["position_ids"] = batch["position_ids"][None] + offset
        if packed.token_types:
            inputs["token_type_ids"] = batch["token_type_ids"][None]
        embeddings = encoder.embeddings.eval()  # their dropout is drawn here, for each member
        p = self.p(embeddings.dropout if packed.family.post_norm else embeddings.drop)
        x = dropped(self.parted(embeddings(**inputs), p), p)
        if hasattr(encoder, "embeddings_project"):  # ELECTRA
            (x,) = self.project(x, encoder.embeddings_project)
            x = x.to(self.exact)
        return x

    def post_norm(self, layer: Any, last: bool) -> Tensor:
        """BERT and its kin: attention and feed-forward, each followed by its norm (Vaswani et al. 2017)."""
        get, family = layer.get_submodule, self.packed.family
        query, key, value = get(family.query), get(family.key), get(family.value)
        if last:
            k, v = self.joined(self.parts, key, value)
            self.parts = [(self.first(x), members) for x, members in self.parts]
            (q,) = self.joined(self.parts, query)
        else:
            q, k, v = self.joined(self.parts, query, key, value)
        x = self.taken()
        (a,) = self.project(self.attend(q, k, v, get(family.attention_dropout)), get(family.output))
        x = get(family.attention_norm)(self.add(a, x, family.output_dropout and get(family.output_dropout)))
        (up,) = self.project(x, get(family.up))
        (down,) = self.project(get(family.activation)(up), get(family.down))
        return get(family.norm)(self.add(down, x, get(family.down_dropout)))

    def pre_norm(self, layer: Any, last: bool) -> Tensor:
        """ModernBERT: norms before attention and feed-forward, rotary positions, sliding windows, gated units."""
        from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

        config, attention, mlp = self.packed.config, layer.attn, layer.mlp
        heads, positions = config.num_attention_heads, self.batch["position_ids"][None]
        (fused,) = self.joined([(layer.attn_norm(x), members) for x, members in self.parts], attention.Wqkv)
        x = self.taken()
        q, k, v = fused.view(len(fused), -1, 3, heads, config.hidden_size // heads).unbind(2)
        if layer.attention_type not in self._rotary:
            self._rotary[layer.attention_type] = self.packed.encoder.rotary_emb(x, positions, layer.attention_type)
        q, k = apply_rotary_pos_emb(q, k, *self._rotary[layer.attention_type], unsqueeze_dim=2)
        q, k, v = (t.flatten(2) for t in (q, k, v))
        if last and config.classifier_pooling != "mean":
            q, x = self.first(q), self.first(x)
        window = config.sliding_window if layer.attention_type == "sliding_attention" else None
        (a,) = self.project(self.attend(q, k, v, config.attention_dropout, window), attention.Wo)
        x = self.add(a, x, attention.out_drop)
        (up,) = self.project(layer.mlp_norm(x), mlp.Wi)
        up, gate = up.chunk(2, -1)
        up, p = mlp.act(up) * gate, self.p(mlp.drop)
        (down,) = self.project(dropped(self.parted(up, p), p), mlp.Wo)
        return x + down

    def read(self) -> Tensor:
        """What the head reads of each example, (M or 1, B, H), after the last layer."""
        x = self.taken()
        if not self.packed.family.post_norm:
            x = self.packed.encoder.final_norm(x)
            if self.packed.config.classifier_pooling == "mean":
                mask = self.batch["attention_mask"]
                m, (b, length) = len(x), mask.shape
                padded = x[:, self.batch["place"].flatten()].view(m, b, length, -1)
                x = (padded * mask[..., None]).sum(2) / mask.sum(1, keepdim=True)
        return x[:, : self.batch["examples"]]


def _side_by_side(tensors: Sequence[Tensor], parts: Sequence[Part]) -> Tensor:
    """A tensor for each part, (M' or 1, ...), as one for the members of all parts."""
    if len(parts) == 1:
        return tensors[0]
    sizes = [members.stop - members.start for _, members in parts]
    return torch.cat([x.expand(size, -1, -1) for x, size in zip(tensors, sizes, strict=True)])
