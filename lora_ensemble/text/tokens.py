"""Texts as tokens in flat arrays, and any of them as one packed row. No lightning.

Axes: N examples, B examples in a batch, T tokens of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lora_ensemble.text import packing


class Tokens:
    """Texts tokenised once.

    ``texts``: one list of N strings for each text column; two are cross-encoded as pairs. ``max_length``: longest
    example in tokens; longer ones are cut, the longer sentence of a pair first.
    """

    def __init__(self, texts: Sequence[Sequence[str]], tokenizer: Any, *, max_length: int) -> None:
        columns = [list(column) for column in texts]
        settings = {"return_token_type_ids": True, "return_attention_mask": False}
        # verbose=False: the warning about length would come although the cut is made and said.
        tokens = tokenizer(*columns, truncation=False, verbose=False, **settings)
        rows: list[list[int]] = tokens["input_ids"]
        types: list[list[int]] = tokens["token_type_ids"]
        self.cut = [i for i, row in enumerate(rows) if len(row) > max_length]
        """Numbers of the examples that were cut."""
        if self.cut:
            long = [[column[i] for i in self.cut] for column in columns]
            cut = tokenizer(*long, truncation="longest_first", max_length=max_length, **settings)
            for place, i in enumerate(self.cut):
                rows[i], types[i] = cut["input_ids"][place], cut["token_type_ids"][place]
        self.lengths = np.fromiter((len(row) for row in rows), np.int64, len(rows))
        """(N,) tokens of each example."""
        self._start = np.concatenate([[0], np.cumsum(self.lengths)])
        self._tokens = np.fromiter((t for row in rows for t in row), np.int32, int(self._start[-1]))
        self._types = np.fromiter((t for row in types for t in row), np.int8, int(self._start[-1]))

    def row(self, examples: np.ndarray) -> dict[str, Any]:
        """The ``examples`` (B,), numbers, as one packed row: ``input_ids`` and ``token_type_ids`` (T,), and
        :func:`packing.layout`."""
        lengths = self.lengths[examples]
        source = np.repeat(self._start[examples] - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
        return {
            "input_ids": packing.fill(torch.from_numpy(self._tokens[source].astype(np.int64))),
            "token_type_ids": packing.fill(torch.from_numpy(self._types[source].astype(np.int64))),
            **packing.layout(lengths),
        }
