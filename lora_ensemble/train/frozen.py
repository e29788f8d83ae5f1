"""The frozen encoder's output, computed once for members that train only a head or the pooler."""

from __future__ import annotations

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from lora_ensemble.bank.model import Bank
from lora_ensemble.train.data import TokenisedSplit

_BLOCK = 64


class FrozenReads:
    """What the untouched encoder gives the heads to read of each example, kept in memory (N·H numbers a split).

    It is computed when first asked for, in blocks of examples of similar length that do not depend on who asks: a
    resumed run gets the same bits.
    """

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        self._kept: dict[TokenisedSplit, Tensor] = {}
        self._blocks: dict[TokenisedSplit, tuple[np.ndarray, np.ndarray]] = {}

    def __call__(self, split: TokenisedSplit, rows: np.ndarray) -> Tensor:
        """The examples ``rows`` (B,) of a split: (1, B, H)."""
        device = self.bank.weights.device
        if split not in self._kept or self._kept[split].device != device:
            blocks = np.empty(len(split), np.int64)
            blocks[np.argsort(split.lengths, kind="stable")] = np.arange(len(split)) // _BLOCK
            self._blocks[split] = (blocks, np.zeros(len(split), bool))
            self._kept.pop(split, None)
        blocks, known = self._blocks[split]
        # Evaluation runs in inference mode, whose tensors no gradient may pass.
        with torch.inference_mode(False):
            for block in np.unique(blocks[rows[~known[rows]]]):
                examples = np.flatnonzero(blocks == block)
                read = self.bank.read_frozen(move_data_to_device(split.batch(examples), device))[0]
                if split not in self._kept:
                    self._kept[split] = read.new_zeros(len(split), read.shape[1])
                self._kept[split][torch.from_numpy(examples).to(device)] = read
                known[examples] = True
            index = torch.from_numpy(rows).to(device, non_blocking=True)
            return self._kept[split][index][None]
