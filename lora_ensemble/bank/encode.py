"""An encoder run for M members on packed rows, its frozen weights and modules transformers' own.

How the layers are run is written anew, so that nothing is computed that nobody reads: no padding, the last layer only
where the head looks, what all members share once until the first adapter or dropout parts them. Frozen weights are
cast and fused once, not in every step. DeBERTa keeps its own forward: see ``padded``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_ensemble.bank.attention import attend
from lora_ensemble.bank.dropout import add_dropped, dropped
from lora_ensemble.bank.families import accepts_token_types, family_of

Adapters = Mapping[str, tuple[Tensor, Tensor]]
"""Path of a linear layer in the encoder to A (M, R, in) and scaling times B (M, out, R)."""


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
        self._token_types = accepts_token_types(encoder)
        self._frozen: dict[tuple[str, ...], tuple[Any, Tensor, Tensor | None]] = {}
        self._paths: dict[nn.Module, str] = {module: path for path, module in encoder.named_modules()}

    def __call__(self, batch: Mapping[str, Any], adapters: Adapters, *, members: int, dropout: bool) -> Tensor:
        """What the head reads of each example, (M or 1, B, H): the first token's vector, or the mean over tokens.

        ``batch``: a packed row: ``input_ids`` (T,), ``token_type_ids`` (T,) where the encoder takes them, and
        :func:`packing.layout`. ``members``: M. Matrix products are in :func:`product_dtype`; sums and norms keep the
        precision of the encoder's own weights.
        """
        inputs = {"input_ids": batch["input_ids"][None]}
        if self.family.post_norm:  # ModernBERT sees positions in its attention
            offset = self.config.pad_token_id + 1 if self.family.positions_after_padding else 0
            inputs["position_ids"] = batch["position_ids"][None] + offset
        if self._token_types:
            inputs["token_type_ids"] = batch["token_type_ids"][None]
        x = self.encoder.embeddings.eval()(**inputs)  # their dropout is drawn later, for each member
        run = _Run(self, batch, adapters, members, dropout, product_dtype(x))
        with torch.autocast(x.device.type, enabled=False):
            read = run.post_norm(x) if self.family.post_norm else run.pre_norm(x)
        return read[:, : batch["examples"]]

    def _weights(self, layers: Sequence[nn.Linear], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """The layers' weights one below the other, and their biases, as ``dtype``; kept where they are frozen."""
        weights: list[Tensor] = [layer.weight for layer in layers]
        biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        if len(layers) == 1 and weights[0].dtype == dtype:
            return weights[0], layers[0].bias
        state = [(w.data_ptr(), w._version, w.device, dtype) for w in weights]
        paths = tuple(self._paths[layer] for layer in layers)
        if paths not in self._frozen or self._frozen[paths][0] != state:
            # Evaluation runs in inference mode, whose tensors no gradient may pass.
            with torch.inference_mode(False):
                fused = torch.cat(weights).to(dtype), torch.cat(biases).to(dtype) if biases else None
            if weights[0].requires_grad:
                return fused
            self._frozen[paths] = (state, *fused)
        return self._frozen[paths][1:]

    def project(self, x: Tensor, layers: Sequence[nn.Linear], adapters: Adapters, dtype: torch.dtype) -> list[Tensor]:
        """What linear layers make of x (M or 1, T, in) in two products, adapters included: (M or 1, T, out) each."""
        x = x.to(dtype)
        if x.device.type == "cpu" and layers[0].weight.dtype == dtype and not torch.is_grad_enabled():
            # To answer with: several products are as fast there, and need no fused copy of the weights.
            outputs = [F.linear(x, layer.weight, layer.bias) for layer in layers]
        else:
            outputs = list(F.linear(x, *self._weights(layers, dtype)).split([w.out_features for w in layers], -1))
        paths = [self._paths[layer] for layer in layers]
        adapted = [(i, *adapters[path]) for i, path in enumerate(paths) if path in adapters]
        if not adapted:
            return outputs
        a = torch.cat([a for _, a, _ in adapted], 1) if len(adapted) > 1 else adapted[0][1]
        m, rank, _ = a.shape
        if len(x) == m:
            low = torch.bmm(x, a.transpose(1, 2))
        else:  # one row for all members: one product with all their A
            low = F.linear(x[0], a.flatten(0, 1)).view(-1, m, rank).transpose(0, 1)
        for (i, _, b), h in zip(adapted, low.split([a.shape[1] for _, a, _ in adapted], -1), strict=True):
            outputs[i] = torch.baddbmm(outputs[i], h, b.transpose(1, 2))
        return outputs


@dataclass
class _Run:
    """One pass over one packed row; see :meth:`PackedEncoder.__call__`."""

    packed: PackedEncoder
    batch: Mapping[str, Any]
    adapters: Adapters
    members: int
    dropout: bool
    dtype: torch.dtype

    def p(self, dropout: Any) -> float:
        """A dropout's probability in this pass."""
        if not self.dropout or dropout is None or isinstance(dropout, nn.Identity):
            return 0.0
        return dropout if isinstance(dropout, float) else float(dropout.p)

    def part(self, x: Tensor, p: float) -> Tensor:
        """Dropout on what the members still share: from here on each has its own, (M, T, H)."""
        return dropped(x.expand(self.members, -1, -1), p) if p else x

    def project(self, x: Tensor, *layers: nn.Linear) -> list[Tensor]:
        return self.packed.project(x, layers, self.adapters, self.dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: Any, window: int | None = None) -> Tensor:
        heads = self.packed.config.num_attention_heads
        return attend(q, k, v, self.batch, heads=heads, dropout=self.p(dropout), window=window)

    def first(self, x: Tensor) -> Tensor:
        """The first token of each example, (M or 1, B, H)."""
        return x.index_select(1, self.batch["first"])

    def post_norm(self, x: Tensor) -> Tensor:
        """BERT and its kin: attention and feed-forward, each followed by its norm (Vaswani et al. 2017)."""
        encoder, family = self.packed.encoder, self.packed.family
        x = self.part(x, self.p(encoder.embeddings.dropout))
        if hasattr(encoder, "embeddings_project"):  # ELECTRA
            (x,) = self.project(x, encoder.embeddings_project)
            x = x.to(encoder.embeddings_project.weight.dtype)
        layers = encoder.get_submodule(family.layers)
        for layer in layers:
            get = layer.get_submodule
            query, key, value = get(family.query), get(family.key), get(family.value)
            if layer is layers[-1]:
                k, v = self.project(x, key, value)
                x = self.first(x)
                (q,) = self.project(x, query)
            else:
                q, k, v = self.project(x, query, key, value)
            (a,) = self.project(self.attend(q, k, v, get(family.attention_dropout)), get(family.output))
            p = self.p(family.output_dropout and get(family.output_dropout))
            x = get(family.attention_norm)(add_dropped(x, a, p))
            (up,) = self.project(x, get(family.up))
            (down,) = self.project(get(family.activation)(up), get(family.down))
            x = get(family.norm)(add_dropped(x, down, self.p(get(family.down_dropout))))
        return x

    def pre_norm(self, x: Tensor) -> Tensor:
        """ModernBERT: norms before attention and feed-forward, rotary positions, sliding windows, gated units."""
        from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

        encoder, config = self.packed.encoder, self.packed.config
        heads, positions = config.num_attention_heads, self.batch["position_ids"][None]
        x = self.part(x, self.p(encoder.embeddings.drop))
        rotary = {kind: encoder.rotary_emb(x, positions, kind) for kind in set(config.layer_types)}
        mean = config.classifier_pooling == "mean"
        for layer in encoder.layers:
            attention, mlp = layer.attn, layer.mlp
            (fused,) = self.project(layer.attn_norm(x), attention.Wqkv)
            q, k, v = fused.view(len(fused), -1, 3, heads, config.hidden_size // heads).unbind(2)
            q, k = apply_rotary_pos_emb(q, k, *rotary[layer.attention_type], unsqueeze_dim=2)
            q, k, v = (t.flatten(2) for t in (q, k, v))
            if layer is encoder.layers[-1] and not mean:
                q, x = self.first(q), self.first(x)
            window = config.sliding_window if layer.attention_type == "sliding_attention" else None
            (a,) = self.project(self.attend(q, k, v, config.attention_dropout, window), attention.Wo)
            x = add_dropped(x, a, self.p(attention.out_drop))
            (up,) = self.project(layer.mlp_norm(x), mlp.Wi)
            up, gate = up.chunk(2, -1)
            (down,) = self.project(dropped(mlp.act(up) * gate, self.p(mlp.drop)), mlp.Wo)
            x = x + down
        x = encoder.final_norm(x)
        return self.mean(x) if mean else x

    def mean(self, x: Tensor) -> Tensor:
        """The mean over each example's tokens: (M or 1, T, H) to (M or 1, B, H)."""
        mask = self.batch["attention_mask"]
        m, (b, length) = len(x), mask.shape
        padded = x[:, self.batch["place"].flatten()].view(m, b, length, -1)
        return (padded * mask[..., None]).sum(2) / mask.sum(1, keepdim=True)
