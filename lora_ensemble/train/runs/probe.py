"""A short trial of a bank of one and of two, on the run's largest batches, that says what a member takes."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from lora_ensemble.bank.model import row_width
from lora_ensemble.bank.optim import BankAdamW
from lora_ensemble.train.batches import TrainBatches
from lora_ensemble.train.data import BankData
from lora_ensemble.train.evaluation import member_losses
from lora_ensemble.train.module import BankModule
from lora_ensemble.train.runs.halves import is_out_of_memory
from lora_ensemble.train.runs.memory import Need, cautious_need, peak_bytes, usable_memory
from lora_ensemble.train.runs.plan import gib

# Steps that are looked at to find the largest; they are in random order, so that later ones are hardly larger.
_EXAMINED = 20_000
# A bank is taken without a trial if a generous estimate needs no more than this share of what is usable.
_CLEARLY = 0.5


def members_that_fit(module: BankModule, data: BankData, trainer: pl.Trainer) -> tuple[int, str]:
    """How many of ``module``'s members train together on the trainer's device, and why, in words.

    0 only if one was tried and ran out of memory; where arithmetic alone says that one is too many, it is 1.

    ``module`` has at least two members; ``data`` is set up for fit and knows the trainer. No random state is changed,
    nor any result.
    """
    device, m = trainer.strategy.root_device, len(module.members)
    free, batches = usable_memory(device), data.train_dataloader()
    longest = {name: int(split.lengths.max()) for name, split in batches.splits.items()}
    share = -(-data.batch_size // batches.world)
    number = 8 if str(trainer.precision).startswith("64") else 4
    row = row_width(module.bank.shapes)
    estimate = cautious_need(
        module.bank.config,
        width=row,
        tokens=max(share * sum(longest.values()), data.eval_batch_size * max(longest.values()) // 4),
        longest=max(longest.values()),
        number=number,
    )
    # On a device of its own the encoder comes on top, once as it is and once for autocast's copies.
    encoder = 2 * sum(p.nbytes for p in module.bank.encoder.parameters()) if device.type != "cpu" else 0
    if encoder + estimate.of(m) <= _CLEARLY * free:
        return m, f"{gib(free)} usable on {device.type}; a member takes less than {gib(estimate.each)}"
    order = sorted(range(m), key=lambda i: -row_width(module.bank.row_shapes([i])))
    trial = _Trial(module, data, trainer, batches)
    points: dict[str, list[tuple[int, int]]] = {"train": [], "dev": []}
    for count in (1, 2):
        try:
            found = trial.run(order[:count])
        except Exception as e:
            if not is_out_of_memory(e):
                raise
            return count - 1, f"{gib(free)} usable on {device.type}; a probe of {count} did not fit"
        for name, size in found.items():
            points[name].append((count, size))
    # The probe's rows are padded to its own largest ranks, the bank's to those of all.
    padding = 8 * number * (row - row_width(module.bank.row_shapes(order[:2])))
    logits = _logits_bytes(module, data, trainer)
    needs = [Need.through(p) for p in points.values()]
    needs = [Need(n.shared, n.each + padding + logits) for n in needs]
    worst = min(needs, key=lambda n: n.fits(free))
    said = f"a member takes {gib(worst.each)} + {gib(worst.shared)} shared; probe of 1 and 2 members"
    return min(max(worst.fits(free), 1), m), f"{gib(free)} usable on {device.type}; {said}"


def largest_steps(batches: TrainBatches, epochs: int) -> list[dict[str, np.ndarray]]:
    """The rows of the step with the most tokens, padding counted, and of that with the most real ones.

    ``epochs``: how many the run has. Of more than 20 000 steps, the first ones are looked at.
    """
    best: list[tuple[int, dict[str, np.ndarray]]] = [(-1, {}), (-1, {})]
    places = ((e, s) for e in range(epochs) for s in range(len(batches)))
    for (epoch, step), _ in zip(places, range(_EXAMINED), strict=False):
        rows = batches.rows(epoch, step)
        lengths = [batches.splits[name].lengths[r] for name, r in rows.items()]
        padded = sum(len(x) * int(x.max(initial=0)) for x in lengths)
        for i, size in enumerate((padded, sum(int(x.sum()) for x in lengths))):
            if size > best[i][0]:
                best[i] = (size, rows)
    same = all(np.array_equal(best[0][1][name], best[1][1][name]) for name in best[0][1])
    return [rows for _, rows in best[: 1 if same else 2]]


def _logits_bytes(module: BankModule, data: BankData, trainer: pl.Trainer) -> int:
    """Bytes of a member's dev logits: collected and in order, and every epoch's in half precision."""
    numbers = sum(len(data.splits["dev"][t.name]) * t.num_outputs for t in module.tasks)
    return numbers * (3 * 4 + 2 * max(trainer.max_epochs or 1, 1))


def train_step(module: BankModule, optimizer: BankAdamW, batch: dict[str, Any]) -> None:
    """A step of training by itself, without a Trainer; the batch is on the module's device."""
    logits = module.bank(batch)
    losses: list[Tensor] = [
        member_losses(logits[t.name], batch[t.name]["labels"], t.kind).sum()
        for t in module.tasks
        if len(batch[t.name]["labels"])
    ]
    optimizer.zero_grad()
    torch.stack(losses).sum().backward()
    optimizer.step()


class _Trial:
    """Trains a few members for a step on each of the largest batches, evaluates the longest examples, and measures."""

    def __init__(self, module: BankModule, data: BankData, trainer: pl.Trainer, batches: TrainBatches) -> None:
        self.module, self.trainer, self.device = module, trainer, trainer.strategy.root_device
        steps = largest_steps(batches, max(trainer.max_epochs or 1, 1))
        self.batches = [{n: batches.splits[n].batch(rows) for n, rows in step.items()} for step in steps]
        self.longest = [
            {name: split.batch(np.argsort(split.lengths, kind="stable")[-data.eval_batch_size :])}
            for name, split in data.splits["dev"].items()
        ]

    def run(self, members: list[int]) -> dict[str, int]:
        """Peak bytes of training and of evaluation for a bank of these members."""
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            module = self.trainer.precision_plugin.convert_module(
                self.module.with_members([self.module.members[i] for i in members])
            )
            assert isinstance(module, BankModule)
            try:
                # On the CPU the encoder is there already, and the weights are made outside of what is measured.
                there = module.bank.weights.nbytes if self.device.type == "cpu" else 0
                return {
                    "train": there + peak_bytes(lambda: self._train(module), self.device),
                    "dev": there + peak_bytes(lambda: self._evaluate(module), self.device),
                }
            finally:
                module.bank.weights.grad = None
                module.to("cpu")
                gc.collect()
                if cuda:
                    torch.cuda.empty_cache()

    @contextlib.contextmanager
    def _on_device(self, module: BankModule) -> Iterator[Callable[[Any], Any]]:
        """The module on the device, in the run's precision; gives what brings a batch there."""
        module.to(self.device)
        plugin = self.trainer.precision_plugin
        with plugin.forward_context():
            yield lambda batch: move_data_to_device(plugin.convert_input(batch), self.device)
        module.bank.weights.grad = None
        module.to("cpu")

    def _train(self, module: BankModule) -> None:
        with self._on_device(module) as brought:
            optimizer = BankAdamW(module.bank.weights, [m.lr for m in module.members])
            # As in the middle of a run: the moments are there, and the last step's gradient until the backward pass.
            assert optimizer.alive.all()
            module.bank.weights.grad = torch.zeros_like(module.bank.weights)
            for batch in [brought(b) for b in self.batches]:
                train_step(module, optimizer, batch)

    def _evaluate(self, module: BankModule) -> None:
        module.eval()
        with torch.no_grad(), self._on_device(module) as brought:
            for batch in self.longest:
                module.bank(brought(batch))
