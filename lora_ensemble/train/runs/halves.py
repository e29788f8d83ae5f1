"""A checkpoint of a bank turned into a checkpoint of some of its members. No lightning.

A bank pads every member to its largest rank at each layer, so the same member's row looks different in another bank.
Rows go from one layout to the other by the names of the weights; what is cut off or put in is zeros (they stay zeros in
training, in AdamW's moments too), so nothing is lost and nothing made up.

Axes: M members, P trained numbers per member, N examples of dev, C outputs of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_ensemble.bank.model import Bank, row_width

WEIGHTS = "bank.weights"
"""The one trained tensor's name in a checkpoint of the LightningModule."""

Layout = Mapping[str, torch.Size]


def convert_rows(matrix: Tensor, source: Layout, target: Layout) -> Tensor:
    """Rows (M, P) of one layout in another, (M, P'). Blocks that the target lacks must be zeros."""
    pieces = torch.split(matrix, [math.prod(s) for s in source.values()], dim=1)
    found = {n: p.view(-1, *s) for (n, s), p in zip(source.items(), pieces, strict=True)}
    made = []
    for name, shape in target.items():
        place = matrix.new_zeros(len(matrix), *shape)
        if name in found:
            common = tuple(slice(min(a, b)) for a, b in zip(shape, found[name].shape[1:], strict=True))
            place[(slice(None), *common)] = found[name][(slice(None), *common)]
        made.append(place.flatten(1))
    return torch.cat(made, dim=1)


def split_checkpoint(checkpoint: Mapping[str, Any], bank: Bank, names: Sequence[str]) -> dict[str, Any]:
    """What a bank of the members ``names`` would have saved where a bank with more members saved ``checkpoint``.

    ``bank``: holds the checkpoint's members, and may hold more. The order is the checkpoint's.
    Raises ``KeyError`` for a name that the checkpoint or the bank does not have.
    """
    described = {m["name"]: m for m in checkpoint["bank"]["members"]}
    place = {m.name: i for i, m in enumerate(bank.members)}
    order = list(described)
    rows = sorted(order.index(described[n]["name"]) for n in names)
    source = bank.row_shapes([place[n] for n in order])
    target = bank.row_shapes([place[order[i]] for i in rows])

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != len(order):
            return value
        value = value[rows]
        return convert_rows(value, source, target) if value.ndim == 2 and value.shape[1] == row_width(source) else value

    new = dict(checkpoint)
    new["state_dict"] = {**checkpoint["state_dict"], WEIGHTS: cut(checkpoint["state_dict"][WEIGHTS])}
    new["optimizer_states"] = [
        {**o, "state": {k: {n: cut(v) for n, v in s.items()} for k, s in o["state"].items()}}
        for o in checkpoint["optimizer_states"]
    ]
    new["bank"] = {**checkpoint["bank"], "members": [described[order[i]] for i in rows]}
    # A checkpoint callback's files are of the whole bank.
    kept = {k: s for k, s in checkpoint["callbacks"].items() if "Checkpoint" not in k}
    new["callbacks"] = {k: _writer_rows(s, rows) if k == "PoolWriter" else s for k, s in kept.items()}
    return new


def _writer_rows(state: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """Some members of what PoolWriter keeps: M bests, and per task a list over epochs of (M, N, C) and of M scores."""
    return {
        **state,
        "best": [state["best"][i] for i in rows],
        "best_epoch": [state["best_epoch"][i] for i in rows],
        "epochs": {t: [a[list(rows)] for a in arrays] for t, arrays in state["epochs"].items()},
        "scores": {t: [[s[i] for i in rows] for s in scores] for t, scores in state["scores"].items()},
    }


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device, or the machine, has no memory left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    said = str(error)
    known = ("DefaultCPUAllocator", "not enough memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(words in said for words in known)
