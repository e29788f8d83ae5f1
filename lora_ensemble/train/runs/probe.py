"""A short trial of banks of one, two and three, on the run's largest batches, that says what a member takes."""

from __future__ import annotations

import gc
import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.utilities import move_data_to_device

from lora_ensemble.bank.model import row_width
from lora_ensemble.bank.optim import BankAdamW
from lora_ensemble.errors import UserError
from lora_ensemble.files import gib
from lora_ensemble.train.batches import TrainBatches
from lora_ensemble.train.data import BankData
from lora_ensemble.train.evaluation import member_losses
from lora_ensemble.train.module import BankModule
from lora_ensemble.train.runs import memory
from lora_ensemble.train.runs.plan import BankSize

TOO_LARGE = (
    "lower --data.batch_size, --data.eval_batch_size or --data.max_length, set --trainer.precision bf16-mixed, or use "
    "a device with more memory"
)
# Steps that are looked at to find the largest; they are in random order, so that later ones are hardly larger.
_EXAMINED = 20_000
# A bank is taken without a trial if a generous estimate needs no more than this share of what is usable.
_CLEARLY = 0.5


def launched_by_us(trainer: pl.Trainer) -> bool:
    """Whether the first process starts the others itself, if there are others."""
    return isinstance(getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment)


def bank_size(
    given: BankSize, module: BankModule, data: BankData, trainer: pl.Trainer, *, follows: bool
) -> tuple[int, str]:
    """How many members train at once, and why, in words.

    ``follows``: whether processes that this one starts follow its plan. ``UserError`` where not even one member fits.
    """
    m, device = len(module.members), trainer.strategy.root_device
    if given is None or m == 1:
        return m, ""
    if given != "auto":
        return given, f"--bank_size {given}"
    if not memory.measurable(device):
        return m, f"memory of {device.type} cannot be measured; set --bank_size if it runs out"
    if trainer.world_size > 1 and not (follows and launched_by_us(trainer)):
        return m, "several processes started from outside do not probe; set --bank_size if memory runs out"
    data.trainer = trainer
    data.setup("fit")
    fit, why = members_that_fit(module, data, trainer)
    if fit == 0:
        raise UserError(f"not even one member fits: {why}; {TOO_LARGE}")
    return fit, why


def members_that_fit(module: BankModule, data: BankData, trainer: pl.Trainer) -> tuple[int, str]:
    """How many of ``module``'s members train together on the trainer's device, and why, in words.

    0 only if one was tried and ran out of memory; where arithmetic alone says that one is too many, it is 1.
    ``module`` has at least two; ``data`` is set up for fit and knows the trainer. No random state or result is changed.
    """
    device, m, bank = trainer.strategy.root_device, len(module.members), module.bank
    models, split = module.folds.models, module.folds.decides
    free, batches = memory.usable_memory(device), data.train_dataloader()
    lengths = [int(split.lengths.max()) for split in batches.splits.values()]
    share = -(-data.batch_size // batches.world)
    number = 8 if str(trainer.precision).startswith("64") else 4
    row = row_width(bank.shapes)
    estimate = memory.cautious_need(
        bank.config,
        width=row,
        tokens=max(share * sum(lengths), data.eval_batch_size * max(lengths) // 4),
        longest=max(lengths),
        number=number,
        dropout=any(member.dropout for member in module.members),
    )
    # On a device of its own the encoder comes on top, once as it is and once for autocast's copies.
    encoder = 2 * sum(p.nbytes for p in bank.encoder.parameters()) if device.type != "cpu" else 0
    usable = f"{gib(free)} usable on {device.type}"
    if encoder + estimate.of(m * models) <= _CLEARLY * free:
        return m, f"{usable}; a member takes less than {gib(estimate.each * models)}"
    # Of a single member the largest moment may be another one than of more: the line goes through the last two.
    widest = sorted(range(m), key=lambda i: -row_width(bank.row_shapes([i * models])))[:3]
    trial = Trial(module, data, trainer)
    peaks = []
    for count in range(1, len(widest) + 1):
        try:
            peaks.append(trial.peaks(widest[:count]))
        except Exception as e:
            if not memory.is_out_of_memory(e):
                raise
            return count - 1, f"{usable}; a probe of {count} did not fit"
    # The probe's rows are padded to its own largest ranks, the bank's to those of all.
    padding = 8 * number * models * (row - row_width(bank.row_shapes([i * models for i in widest])))
    # A member's logits: collected and in order, and every epoch's in half precision.
    logits = sum(len(data.splits[split][t.name]) * t.num_outputs for t in module.tasks)
    extra = padding + logits * (3 * 4 + 2 * max(trainer.max_epochs or 1, 1))
    last = len(widest)
    needs = [memory.Need.through([(last - 1, peaks[-2][p]), (last, peaks[-1][p])]) for p in peaks[0]]
    worst = min((memory.Need(n.shared, n.each + extra) for n in needs), key=lambda n: n.fits(free))
    said = f"a member takes {gib(worst.each)} + {gib(worst.shared)} shared; probe of 1 to {last} members"
    return min(max(worst.fits(free), 1), m), f"{usable}; {said}"


def largest_steps(batches: TrainBatches, epochs: int) -> list[dict[str, np.ndarray]]:
    """The rows of the step with the most tokens, padding counted, and of that with the most real ones.

    ``epochs``: how many the run has. Of more than 20 000 steps, the first ones are looked at.
    """
    places = itertools.islice(itertools.product(range(epochs), range(len(batches))), _EXAMINED)
    steps = [batches.rows(*place) for place in places]
    lengths = [[batches.splits[name].lengths[rows] for name, rows in step.items()] for step in steps]
    padded = int(np.argmax([sum(len(x) * x.max(initial=0) for x in step) for step in lengths]))
    real = int(np.argmax([sum(x.sum() for x in step) for step in lengths]))
    return [steps[i] for i in dict.fromkeys((padded, real))]


def train_step(module: BankModule, optimizer: BankAdamW, batch: dict[str, Any]) -> None:
    """A step of training by itself, without a Trainer; the batch is on the module's device."""
    logits = module.bank(batch)
    losses = [
        member_losses(logits[t.name], batch[t.name]["labels"], t.kind).sum()
        for t in module.tasks
        if len(batch[t.name]["labels"])
    ]
    optimizer.zero_grad()
    torch.stack(losses).sum().backward()
    optimizer.step()


@dataclass
class Trial:
    """Trains a few members for a step on each of the largest batches, evaluates the longest examples, and measures."""

    module: BankModule
    data: BankData
    trainer: pl.Trainer

    def __post_init__(self) -> None:
        batches = self.data.train_dataloader()
        steps = largest_steps(batches, max(self.trainer.max_epochs or 1, 1))
        longest = {
            name: split.batch(np.argsort(split.lengths, kind="stable")[-self.data.eval_batch_size :])
            for name, split in self.data.splits[self.module.folds.decides].items()
        }
        self._batches: dict[str, list[dict[str, Any]]] = {
            "train": [{n: batches.splits[n].batch(rows) for n, rows in step.items()} for step in steps],
            "dev": [{name: batch} for name, batch in longest.items()],
        }

    def peaks(self, members: list[int]) -> dict[str, int]:
        """Peak bytes of training and of evaluation for a bank of these members."""
        device = self.trainer.strategy.root_device
        cuda = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            some: Any = self.module.with_members([self.module.members[i] for i in members])
            some = self.trainer.precision_plugin.convert_module(some)
            # On the CPU the encoder is there already, and the weights are made outside of what is measured.
            there = some.bank.weights.nbytes if device.type == "cpu" else 0
            try:
                return {
                    phase: there + memory.peak_bytes(partial(self._run, some, phase, device), device)
                    for phase in self._batches
                }
            finally:
                some.bank.weights.grad = None
                some.to("cpu")
                gc.collect()
                if cuda:
                    torch.cuda.empty_cache()

    def _run(self, module: BankModule, phase: str, device: torch.device) -> None:
        """To the device and back, so that what lies there is measured too."""
        training, weights, plugin = phase == "train", module.bank.weights, self.trainer.precision_plugin
        module.train(training).to(device)
        with plugin.forward_context(), torch.set_grad_enabled(training):
            optimizer = BankAdamW.of(module.bank, 0.0)
            if training:
                # As in the middle of a run: the moments are there, and the last step's gradient until the backward
                # pass.
                assert optimizer.alive.all()
                weights.grad = torch.zeros_like(weights)
            for batch in self._batches[phase]:
                batch = move_data_to_device(plugin.convert_input(batch), device)
                if training:
                    train_step(module, optimizer, batch)
                else:
                    module.bank(batch)
        weights.grad = None
        module.to("cpu")
