"""The three ways to train members that ``bank.py`` compares: PEFT in the HF Trainer, PEFT in a loop, and a bank.

Each runs in a process of its own and returns a :class:`Run`. Axes: M members, B examples in a batch.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import transformers
from lightning.pytorch.loggers.logger import DummyLogger
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler
from transformers import AutoConfig, AutoModelForSequenceClassification, DataCollatorWithPadding, TrainingArguments

from lora_ensemble.bank.base_model import load_tokenizer, location
from lora_ensemble.bank.families import layer_number, set_dropout, target_paths
from lora_ensemble.bank.lora import Member, single
from lora_ensemble.bank.member_files import head_names, peft_tensors
from lora_ensemble.bank.model import Bank
from lora_ensemble.bank.optim import BankAdamW
from lora_ensemble.text.readers import read_split
from lora_ensemble.train.data import BankData
from lora_ensemble.train.evaluation import member_losses
from machine import PeakMemory, synchronize
from workload import Workload

_PROBLEMS = {
    "multiclass": "single_label_classification",
    "binary": "multi_label_classification",  # binary cross-entropy; with one label it is the same loss
    "regression": "regression",
}
OUR_PRECISION = {"32": "32-true", "bf16": "bf16-mixed"}


@dataclass
class Run:
    """What a side did."""

    seconds: float
    """From the end of the last warm-up step to the end of the last step, loading included."""
    peak_bytes: int
    losses: list[list[float]] = field(default_factory=list)
    """A list per member, a loss per step; only where asked for."""


class Stopwatch:
    """Looks at the clock after the last warm-up step and after the last; the device is waited for there only."""

    def __init__(self, work: Workload) -> None:
        self._work, self._steps, self._start, self.seconds = work, 0, 0.0, 0.0
        if work.warmup_steps < 1:
            raise ValueError("at least one warm-up step is needed: the clock starts at its end")

    def step_done(self) -> None:
        """Call it after every step."""
        self._steps += 1
        if self._steps == self._work.warmup_steps:
            synchronize(self._work.device)
            self._start = time.perf_counter()
        elif self._steps == self._work.all_steps:
            synchronize(self._work.device)
            self.seconds = time.perf_counter() - self._start


# PEFT


def peer_examples(work: Workload, data: BankData) -> list[dict[str, Any]]:
    """The examples of all steps in the bank's order, tokenised as PEFT's user would do it."""
    split = read_split(work.task, "train", Path(work.root), need_labels=True)
    assert split.labels is not None
    tokenizer = load_tokenizer(work.base_model)
    rows = [int(row) for step in work.order(data) for row in step]
    tokens = tokenizer(*([column[r] for r in rows] for column in split.texts), truncation=True)
    labels = [[float(split.labels[r])] if work.task.kind == "binary" else split.labels[r].item() for r in rows]
    return [{**{key: tokens[key][i] for key in tokens}, "labels": labels[i]} for i in range(len(rows))]


def peer_model(work: Workload, member: Member, start: str | None) -> Any:
    """A member as PEFT makes it; ``start``: a file of weights under PEFT's keys to start from."""
    config = AutoConfig.from_pretrained(location(work.base_model))
    set_dropout(config, head=work.head_dropout, encoder=work.encoder_dropout)
    config.num_labels, config.problem_type = work.task.num_outputs, _PROBLEMS[work.task.kind]
    model = AutoModelForSequenceClassification.from_pretrained(
        location(work.base_model), config=config, dtype=torch.float32, attn_implementation=work.peer_attention
    )
    prefix = model.base_model_prefix
    paths = target_paths(model.base_model, config.model_type, str(member.targets), member.own_layers)
    lowest = min(layer_number(path, config.model_type) or 0 for path in paths)
    for path, module in model.base_model.named_modules():  # no dropout in the frozen part, as in the bank
        number = layer_number(path, config.model_type)
        below = path.startswith("embeddings") or (number is not None and number < lowest)
        if lowest and below and isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    lora = LoraConfig(
        task_type="SEQ_CLS",
        r=single(member.rank),
        lora_alpha=single(member.scaling) * single(member.rank),
        lora_dropout=0.0,
        target_modules=[f"{prefix}.{path}" for path in paths],
        modules_to_save=head_names(model),
    )
    model = get_peft_model(model, lora)
    if start is not None:
        _load(model, load_file(start))
    return model


def _load(model: Any, tensors: dict[str, Tensor]) -> None:
    """Load and look that all of it arrived: PEFT only warns about keys that it does not know."""
    set_peft_model_state_dict(model, tensors)
    now = get_peft_model_state_dict(model)
    if set(now) != set(tensors) or not all(torch.equal(now[key].cpu(), tensor) for key, tensor in tensors.items()):
        raise RuntimeError("PEFT did not take the member's weights as they are")


class _Trainer(transformers.Trainer):
    """The HF Trainer, with the examples in the order given, and the losses kept where asked for."""

    kept: list[Tensor] | None = None

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own, noted down."""
        loss = super().compute_loss(*args, **kwargs)
        if self.kept is not None:
            self.kept.append(loss.detach())
        return loss


class _TrainerClock(transformers.TrainerCallback):
    def __init__(self, stopwatch: Stopwatch) -> None:
        self._stopwatch = stopwatch

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._stopwatch.step_done()


def run_peft_trainer(work: Workload, member: Member, keep_losses: bool = False, start: str | None = None) -> Run:
    """One member by PEFT and the HF Trainer with the Trainer's own settings, but for what must be the same."""
    with _measured(work) as (data, stopwatch, peak), tempfile.TemporaryDirectory() as folder:
        model = peer_model(work, member, start)
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=work.batch_size,
            max_steps=work.all_steps,
            learning_rate=single(member.lr),
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=0.0,
            bf16=work.precision == "bf16",
            use_cpu=work.device == "cpu",
            report_to="none",
            save_strategy="no",
        )
        trainer = _Trainer(
            model,
            arguments,
            train_dataset=peer_examples(work, data),
            data_collator=DataCollatorWithPadding(load_tokenizer(work.base_model)),
            callbacks=[_TrainerClock(stopwatch)],
        )
        trainer.kept = [] if keep_losses else None
        trainer.train()
        return Run(stopwatch.seconds, peak.bytes(), _as_lists(trainer.kept))


def run_peft_loop(work: Workload, member: Member, keep_losses: bool = False, start: str | None = None) -> Run:
    """One member by PEFT and the shortest loop that trains it."""
    with _measured(work) as (data, stopwatch, peak):
        model = peer_model(work, member, start).to(work.device).train()
        collate = DataCollatorWithPadding(load_tokenizer(work.base_model))
        examples: Any = peer_examples(work, data)
        loader = DataLoader(examples, batch_size=work.batch_size, collate_fn=collate)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=single(member.lr), weight_decay=0.0, fused=True)
        kept: list[Tensor] | None = [] if keep_losses else None
        for batch in loader:
            with torch.autocast(work.device, torch.bfloat16, enabled=work.precision == "bf16"):
                loss = model(**batch.to(work.device)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if kept is not None:
                kept.append(loss.detach())
            stopwatch.step_done()
        return Run(stopwatch.seconds, peak.bytes(), _as_lists(kept))


def _as_lists(kept: list[Tensor] | None) -> list[list[float]]:
    return [] if kept is None else [[float(loss) for loss in kept]]


# Ours


class BankClock(pl.Callback):
    """Tells a stopwatch about the Lightning Trainer's steps."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self._stopwatch = stopwatch

    def on_train_batch_end(self, *args: Any) -> None:
        """Stop or start."""
        self._stopwatch.step_done()


class KeepLosses(DummyLogger):
    """A logger that keeps each member's loss of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.curves: dict[str, list[float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keep them."""
        for name, value in metrics.items():
            if name.startswith("train_loss/"):
                self.curves.setdefault(name, []).append(value)


def trainer_settings(work: Workload, folder: str) -> dict[str, Any]:
    """The Trainer as the command line sets it up, for the steps of a workload and without validation."""
    return {
        "max_steps": work.all_steps,
        "accelerator": "gpu" if work.device == "cuda" else "cpu",
        "devices": 1,
        "precision": OUR_PRECISION[work.precision],
        "default_root_dir": folder,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "enable_model_summary": False,
        "log_every_n_steps": 20,
    }


def run_bank(work: Workload, members: list[Member], keep_losses: bool = False, starts: list[str] | None = None) -> Run:
    """The members as one bank, by the Lightning Trainer.

    ``starts``: a file for each member; it then starts from random weights, B included, and the file says which.
    """
    with _measured(work) as (data, stopwatch, peak), tempfile.TemporaryDirectory() as folder:
        module = work.module(members)
        for i, path in enumerate(starts or []):
            start_anywhere(module.bank, i, work.task.name)
            save_peft(module.bank, i, work.task.name, path)
        keep = KeepLosses() if keep_losses else None
        trainer = pl.Trainer(
            **{**trainer_settings(work, folder), **({"log_every_n_steps": 1} if keep else {})},
            logger=keep or False,
            enable_checkpointing=False,
            callbacks=[BankClock(stopwatch)],
        )
        trainer.fit(module, datamodule=data)
        return Run(stopwatch.seconds, peak.bytes(), list(keep.curves.values()) if keep else [])


def start_anywhere(bank: Bank, index: int, task: str, std: float = 0.5) -> None:
    """Give the member a large B, zero until then, and a large head, so that its adapter decides the loss from the
    first step. ``std``: of both."""
    adapter, heads = bank.member_state(index)
    generator = torch.Generator().manual_seed(index)
    for tensor in [*(b for _, b in adapter.values()), *heads[task].values()]:
        tensor.normal_(0, std, generator=generator)
    bank.load_member(index, adapter, heads)


def save_peft(bank: Bank, index: int, task: str, path: str) -> None:
    """Write a member's weights under PEFT's keys."""
    adapter, heads = bank.member_state(index)
    tensors = peft_tensors(adapter, heads[task], prefix=bank.prefix)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def bare_steps(work: Workload, members: int) -> Iterator[None]:
    """Train a bank in the shortest loop, without Lightning; yields after every step."""
    torch.set_num_threads(work.threads)
    data = work.data()
    module = work.module(work.members(members)).to(work.device).train()
    optimizer = BankAdamW(module.bank.weights, module.bank.rates)
    for batch in data.train_dataloader():
        moved = module.transfer_batch_to_device(batch, torch.device(work.device), 0)
        with torch.autocast(work.device, torch.bfloat16, enabled=work.precision == "bf16"):
            part = moved[work.task.name]
            logits = module.bank(moved)[work.task.name]
            loss = member_losses(logits, part["labels"], work.task.kind).sum() / part["size"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield


@contextlib.contextmanager
def _measured(work: Workload) -> Iterator[tuple[BankData, Stopwatch, PeakMemory]]:
    """The data, a stopwatch, and the memory from before the model is loaded."""
    torch.set_num_threads(work.threads)
    torch.manual_seed(0)
    yield work.data(), Stopwatch(work), PeakMemory(work.device)


PEERS: dict[str, Callable[..., Run]] = {"PEFT + Trainer": run_peft_trainer, "PEFT in a loop": run_peft_loop}
