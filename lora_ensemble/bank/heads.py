"""A classification model's head without its encoder: how it is drawn, and how it is run for M members at once."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from transformers.modeling_outputs import BaseModelOutputWithPooling


class _Encoded(nn.Module):
    """Stands where the encoder was in a classification model, and answers with hidden states already computed."""

    hidden: Tensor | None = None
    pooled: Tensor | None = None

    def forward(self, *_: Any, **__: Any) -> Any:
        return BaseModelOutputWithPooling(last_hidden_state=self.hidden, pooler_output=self.pooled)


def head_of(classifier: Any, outputs: int) -> Any:
    """The classification model around its encoder, for C outputs, on the CPU, weights undefined and frozen."""
    config = copy.deepcopy(classifier.config)
    config.num_labels = outputs
    with torch.device("meta"):  # the encoder inside it is thrown away
        head = type(classifier)(config)
    setattr(head, head.base_model_prefix, _Encoded())
    return head.to_empty(device="cpu").requires_grad_(False)


def drawn_head(head: Any, seed: int, pretrained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The head's weights by name: pretrained ones that fit, all else drawn from a seed as its family does."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():  # the global random state is left alone
        torch.manual_seed(seed)
        for parameter in head.parameters():
            # transformers skips what it has initialised before; NaN shows what it would leave out.
            parameter.fill_(float("nan"))
            if hasattr(parameter, "_is_hf_initialized"):
                del parameter._is_hf_initialized
        for module in reversed(list(head.modules())):  # children first, the model itself last, as transformers does
            if not isinstance(module, _Encoded):
                head._init_weights(module)
    weights = dict(head.named_parameters())
    if any(torch.isnan(p).any() for p in weights.values()):
        raise RuntimeError(f"{type(head).__name__} does not initialise its whole head")
    return {n: pretrained[n] if n in pretrained and pretrained[n].shape == p.shape else p for n, p in weights.items()}


def head_logits(head: Any, weights: dict[str, Tensor], read: Tensor, pooled: Tensor | None) -> Tensor:
    """Logits (M, B, C) of M heads. ``weights``: by name, (M, *shape); ``read``, ``pooled``: (M, B, H)."""
    encoded = getattr(head, head.base_model_prefix)
    mask = read.new_ones(read.shape[1], 1)

    def logits(weights: dict[str, Tensor], read: Tensor, pooled: Tensor | None) -> Tensor:
        # One token an example: the one that the head reads.
        encoded.hidden, encoded.pooled = read[:, None], pooled
        return functional_call(head, weights, (), {"inputs_embeds": encoded.hidden, "attention_mask": mask}).logits

    try:
        # "different": each member draws its own dropout masks.
        members = vmap(logits, in_dims=(0, 0, None if pooled is None else 0), randomness="different")
        return members(weights, read, pooled)
    finally:
        encoded.hidden = encoded.pooled = None  # keep no activations alive
