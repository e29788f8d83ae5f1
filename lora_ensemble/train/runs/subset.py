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

WEIGHTS = "bank.weights"  # the one trained tensor's name in a checkpoint of the LightningModule

Layout = Mapping[str, torch.Size]


def convert_rows(matrix: Tensor, source: Layout, target: Layout) -> Tensor:
    """Rows (M, P) of one layout in another, (M, P'). Blocks that the target lacks must be zeros."""
    pieces = dict(zip(source, torch.split(matrix, [math.prod(s) for s in source.values()], dim=1), strict=True))
    blocks = []
    for name, shape in target.items():
        block = matrix.new_zeros(len(matrix), *shape)
        if name in source:
            common = (slice(None), *(slice(min(sizes)) for sizes in zip(shape, source[name], strict=True)))
            block[common] = pieces[name].view(-1, *source[name])[common]
        blocks.append(block.flatten(1))
    return torch.cat(blocks, dim=1)


def subset_of_checkpoint(checkpoint: Mapping[str, Any], bank: Bank, names: Sequence[str]) -> dict[str, Any]:
    """What a bank of the members ``names`` would have saved where a bank with more members saved ``checkpoint``.

    ``bank``: holds the checkpoint's members, and may hold more. The order is the checkpoint's.
    """
    described = checkpoint["bank"]["members"]
    models = len(checkpoint["state_dict"][WEIGHTS]) // len(described)  # of a member: rows, side by side
    members = [i for i, member in enumerate(described) if member["name"] in names]
    rows = [i * models + model for i in members for model in range(models)]
    place = {member.name: i for i, member in enumerate(bank.members)}
    places = [place[member["name"]] for member in described]
    source, target = bank.row_shapes(places), bank.row_shapes([places[i] for i in members])

    def subset(value: Any) -> Any:
        if isinstance(value, list) and len(value) == len(places) * models:
            return [value[i] for i in rows]
        if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != len(places) * models:
            return value
        value = value[rows]
        return convert_rows(value, source, target) if value.ndim == 2 and value.shape[1] == row_width(source) else value

    new = dict(checkpoint)
    new["state_dict"] = {**checkpoint["state_dict"], WEIGHTS: subset(checkpoint["state_dict"][WEIGHTS])}
    new["optimizer_states"] = [
        {**o, "state": {k: {n: subset(v) for n, v in s.items()} for k, s in o["state"].items()}}
        for o in checkpoint["optimizer_states"]
    ]
    new["bank"] = {**checkpoint["bank"], "members": [described[i] for i in members]}
    # A checkpoint callback's files are of the whole bank.
    new["callbacks"] = {k: s for k, s in checkpoint["callbacks"].items() if "Checkpoint" not in k}
    if state := new["callbacks"].get("PoolWriter"):  # M bests; per task a list over epochs of (M, N, C), of M scores
        new["callbacks"]["PoolWriter"] = {
            **state,
            "best": [state["best"][i] for i in members],
            "best_epoch": [state["best_epoch"][i] for i in members],
            "epochs": {task: [logits[members] for logits in epochs] for task, epochs in state["epochs"].items()},
            "scores": {task: [[s[i] for i in members] for s in scores] for task, scores in state["scores"].items()},
        }
    return new
