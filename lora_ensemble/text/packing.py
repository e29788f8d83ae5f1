"""Texts as tokens, and packed rows of them: one example after another in a row, with no padding between them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lora_ensemble.errors import UserError

Truncation = Literal["head", "tail", "head-tail"]
"""What is kept of a text that is too long: its beginning, its end, or half of the room from each (Sun et al. 2019, "How
to fine-tune BERT for text classification", section 5.3.1)."""
KEPT: dict[Truncation, str] = {"head": "heads", "tail": "tails", "head-tail": "heads and tails"}
MULTIPLE = 8
"""To a multiple of so many tokens a row is filled up: what multiplies matrices prepares itself for each new shape
(oneDNN's bf16 products on a CPU for milliseconds), and likes even ones."""


class Tokens:
    """Texts tokenised once: one list of N strings for each text column; two are cross-encoded as pairs.

    Of examples of more than ``max_length`` tokens ``truncation`` says what is kept. The longer sentence of a pair is
    cut first, until both are equally long, each in that way. ``UserError`` where the tokeniser cannot do it.
    """

    def __init__(
        self, texts: Sequence[Sequence[str]], tokenizer: Any, *, max_length: int, truncation: Truncation = "head"
    ) -> None:
        columns = [list(column) for column in texts]
        settings = {"return_token_type_ids": True, "return_attention_mask": False}
        # verbose=False: the warning about length would come although the cut is made and said.
        tokens = tokenizer(*columns, truncation=False, verbose=False, **settings)
        rows, types = tokens["input_ids"], tokens["token_type_ids"]
        self.cut = [i for i, row in enumerate(rows) if len(row) > max_length]  # examples that were cut
        if self.cut:
            long = [[column[i] for i in self.cut] for column in columns]
            cut = tokenizer(*long, truncation="longest_first", max_length=max_length, **settings)
            if truncation != "head" and not tokenizer.is_fast:
                raise UserError(
                    f"data.truncation: {truncation} needs a fast tokeniser, which this model has not; use head"
                )
            for place, i in enumerate(self.cut):
                if truncation == "head":
                    rows[i], types[i] = cut["input_ids"][place], cut["token_type_ids"][place]
                else:
                    kept = _kept(tokens.sequence_ids(i), cut.sequence_ids(place), truncation)
                    rows[i], types[i] = ([row[i][place] for place in kept] for row in (rows, types))
        self.lengths = np.fromiter((len(row) for row in rows), np.int64, len(rows))  # (N,) tokens of each
        self._start = np.concatenate([[0], np.cumsum(self.lengths)])
        self._tokens = np.fromiter((t for row in rows for t in row), np.int32, int(self._start[-1]))
        self._types = np.fromiter((t for row in types for t in row), np.int8, int(self._start[-1]))

    @cached_property
    def digest(self) -> str:
        """16 hex digits over all tokens, their types, and where examples end."""
        digest = hashlib.sha256()
        for array in (self.lengths, self._tokens, self._types):
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]

    def row(self, examples: np.ndarray) -> dict[str, Any]:
        """Examples by number (B,) as a packed row: ``input_ids`` and ``token_type_ids`` (T,), and :func:`layout`."""
        lengths = self.lengths[examples]
        source = places(self._start[examples], lengths)
        return {
            "input_ids": fill(torch.from_numpy(self._tokens[source].astype(np.int64))),
            "token_type_ids": fill(torch.from_numpy(self._types[source].astype(np.int64))),
            **layout(lengths),
        }


def _kept(whole: Sequence[int | None], cut: Sequence[int | None], truncation: Truncation) -> list[int]:
    """Places of the tokens that an example keeps.

    ``whole``, ``cut``: which text each of its tokens is of, None for one that the tokeniser adds, before and after that
    has cut it: how many each text keeps is its rule. Of an odd number the beginning gets one more.
    """
    lost: set[int] = set()
    for text in {*whole} - {None}:
        own, room = [place for place, of in enumerate(whole) if of == text], cut.count(text)
        first = -(-room // 2) if truncation == "head-tail" else 0
        lost.update(own[first : len(own) - (room - first)])
    return [place for place in range(len(whole)) if place not in lost]


def places(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Each place in pieces that begin at ``starts`` (B,) and are ``lengths`` (B,) long, one after another: (T,)."""
    return np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())


def layout(lengths: np.ndarray) -> dict[str, Any]:
    """Where the examples of a packed row lie, from their lengths (B,).

    Up to seven tokens may fill the row up; they count as one more example, so that nothing of theirs touches another,
    and B' is B or B + 1. ``position_ids`` (T,): 0, 1, ... in every example; ``first`` (B',): where each begins;
    ``place`` (B', L): the token at each place of the padded batch (the row's first where there is none); ``slots``
    (T,): the inverse, each token's place in the flattened padded batch; ``attention_mask`` (B', L). On the host stay
    ``lengths``, a tuple of B', and ``examples``, which is B.
    """
    examples, filling = len(lengths), -int(lengths.sum()) % MULTIPLE
    if filling:
        lengths = np.append(lengths, filling)
    first = np.cumsum(lengths) - lengths
    padded = np.arange(int(lengths.max(initial=1)))
    mask = padded < lengths[:, None]
    tensors = {
        "position_ids": np.arange(int(lengths.sum())) - np.repeat(first, lengths),
        "first": first,
        "place": np.where(mask, first[:, None] + padded, 0),
        "slots": np.flatnonzero(mask),
        "attention_mask": mask.astype(np.int64),
    }
    arrays = {name: torch.from_numpy(t) for name, t in tensors.items()}
    return arrays | {"lengths": tuple(lengths.tolist()), "examples": examples}


def fill(row: Tensor) -> Tensor:
    """Something for each token of a row (T,), with zeros where it is filled up."""
    return torch.nn.functional.pad(row, (0, -len(row) % MULTIPLE))


def unpack(batch: Mapping[str, Any], name: str, padding: int) -> Tensor:
    """``batch[name]`` (T,) as a padded batch (B, L), with ``padding`` where there is no token."""
    mask, place = (batch[key][: batch["examples"]] for key in ("attention_mask", "place"))
    return torch.where(mask.bool(), batch[name][place], padding)


class PadRow(torch.autograd.Function):
    """(M, T, H) to (M, B·L, H): the padded batch; what stands at the padding is undefined, and its gradient is 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        return x.index_select(1, place.flatten())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The masked attention that follows gives the padding no gradient: nothing needs to be summed."""
        return grad.index_select(1, ctx.saved_tensors[0]), None, None


class PackRow(torch.autograd.Function):
    """(M, B·L, H) to (M, T, H): the inverse of :class:`PadRow`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.width = x.shape[1]
        return x.index_select(1, slots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Zeros where there was padding."""
        padded = grad.new_zeros(grad.shape[0], ctx.width, grad.shape[2])
        return padded.index_copy_(1, ctx.saved_tensors[0], grad), None
