"""The floating-point operations of a run against those that its result depends on.

    python benchmarks/operations.py --task sst --members 8

Counts the multiplications and additions of matrix products, as ``torch.utils.flop_counter`` sees them, in an epoch of
training a bank and one evaluation of dev; what is kept of the frozen layers counts once, in the first epoch. Beside it
stands what arithmetic says is needed: real tokens alone; what all members share, once; the last layer only where the
head reads; gradients down to the lowest adapter; what is frozen, once for each example. Time is not measured here.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from lora_ensemble.bank.optim import BankAdamW
from lora_ensemble.train.batches import EvalBatches, TrainBatches
from lora_ensemble.train.evaluation import member_losses
from lora_ensemble.train.frozen import FrozenStates
from machine import describe, in_fresh_process
from workload import Workload, add_arguments, workload


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Shapes that decide what a layer costs."""

    width: int
    inner: int
    depth: int


def frozen(e: Encoder, lengths: np.ndarray, start: int) -> float:
    """What the layers below ``start`` cost for examples of these lengths."""
    tokens, squares = float(lengths.sum()), float((lengths.astype(float) ** 2).sum())
    whole = tokens * (8 * e.width**2 + 4 * e.width * e.inner) + 4 * squares * e.width
    if start < e.depth:
        return start * whole
    return (e.depth - 1) * whole + _last(e, tokens, len(lengths))


def _last(e: Encoder, tokens: float, examples: int) -> float:
    """The last layer, forward: keys and values of all tokens, everything else for the first one."""
    return tokens * 4 * e.width**2 + examples * (4 * e.width**2 + 4 * e.width * e.inner) + 4 * tokens * e.width


def trained(e: Encoder, lengths: np.ndarray, start: int, members: int, rank: int, *, backward: bool) -> float:
    """Layers from ``start`` on, for members with adapters on query and value there; with the way back or without."""
    tokens, squares, n, h = float(lengths.sum()), float((lengths.astype(float) ** 2).sum()), len(lengths), e.width
    total = 0.0
    for layer in range(start, e.depth):
        lowest, last = layer == start, layer == e.depth - 1
        queries = n if last else tokens
        products = (2 * tokens + queries) * 2 * h**2  # of query, key and value: the lowest layer's are shared
        after = queries * (2 * h**2 + 4 * h * e.inner)
        attention = 4 * h * (tokens if last else squares)
        adapters = (tokens + queries) * 4 * rank * h
        total += products * (1 if lowest else members) + members * (after + attention + adapters)
        if backward:
            inside = 0.0 if lowest else products + adapters  # towards the layer's input
            # Of keys there is no gradient where nothing below or in them is trained.
            total += members * (inside + after + attention * (1.5 if lowest else 2) + adapters)
    pooled = members * n * 2 * h**2
    return total + pooled * (2 if backward else 1)


def counted(work: Workload, members: int, epochs: int) -> dict[str, tuple[float, float]]:
    """What is done to what it costs, counted and needed."""
    torch.set_num_threads(work.threads)
    data = work.data()
    bank = work.module(work.members(members)).bank.train()
    optimizer = BankAdamW(bank.weights, bank.rates)
    name, kind = work.task.name, work.task.kind
    train, dev = data.splits["train"][name], data.splits["dev"][name]
    encoder = Encoder(bank.config.hidden_size, bank.config.intermediate_size, bank.depth)
    start, rank = bank.starts[0], work.rank
    sums: dict[str, list[float]] = {"frozen": [0.0, 0.0], "training": [0.0, 0.0], "dev": [0.0, 0.0]}
    steps = -(-len(train) // work.batch_size)
    batches = TrainBatches(
        splits={name: train}, batch_size=work.batch_size, steps=steps, seed=1, rank=0, world=1, epoch=lambda: 0
    )
    kept = FrozenStates(bank, {}, None, most=2.0**40)

    def run(what: str, split: str, batch: dict, *, backward: bool) -> None:
        part, states = batch[name], None
        if bank.frozen_layers:
            with FlopCounterMode(display=False) as counter:
                states = kept(data.splits[split][name], part["rows"])
            sums["frozen"][0] += counter.get_total_flops()
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
            logits = bank(batch, {name: states} if states is not None else None)[name]
            if backward:
                member_losses(logits, part["labels"], kind).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        lengths = data.splits[split][name].lengths[part["rows"]]
        sums[what][0] += counter.get_total_flops()
        sums[what][1] += trained(encoder, lengths, start, members, rank, backward=backward)

    for _ in range(epochs):
        for batch in batches:
            run("training", "train", batch, backward=True)
        bank.eval()
        for batch in EvalBatches({"dev": {name: dev}}, batch_size=32, rank=0, world=1):
            run("dev", "dev", batch, backward=False)
        bank.train()
    sums["frozen"][1] = frozen(encoder, np.concatenate([train.lengths, dev.lengths]), start) if start else 0.0
    return {what: (a, b) for what, (a, b) in sums.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args(arguments)
    args.device = "cpu"
    print(describe("cpu", args.threads))
    print("\n| task | layers | what | counted, GFLOP | needed | ratio |\n| --- | --- | --- | ---: | ---: | ---: |")
    for task in args.task:
        for layers in ("all", "top-half", "top-third"):
            args.layers = layers
            with tempfile.TemporaryDirectory() as folder:
                work = workload(args, task, Path(folder))
                parts = in_fresh_process(counted, work, args.members, args.epochs)
            parts["in all"] = tuple(sum(column) for column in zip(*parts.values(), strict=True))
            for what, (found, needed) in parts.items():
                if found:
                    row = [task, layers, what, f"{found / 1e9:,.0f}", f"{needed / 1e9:,.0f}", f"{found / needed:.3f}"]
                    print("| " + " | ".join(row) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
