"""Points from which training can go on as if nothing had happened: after memory ran out, and after a kill."""

from __future__ import annotations

import copy
import io
import math
import os
import time
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lora_ensemble.module import BankModule
from lora_ensemble.optim import BankAdamW

_VALIDATION = "epoch_loop.val_loop.batch_progress"


class RestartPoint(pl.Callback):
    """Notes the loops' counters after each optimiser step, so that they can be paired with the weights later.

    Weights and moments change in the optimiser's step alone, and there only after all that takes memory; dropout is
    seeded by the step. So the weights as they are, with the counters of the last step, are an exact checkpoint, at no
    cost but the counters' (a tenth of a millisecond a step).
    """

    def __init__(self) -> None:
        self._counters: dict[str, Any] | None = None
        self._steps = 0
        self._where: Literal["training", "validation", "elsewhere"] = "training"
        self._since = time.time()
        self.failed = False
        """Set by whoever caught the error."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note where the run starts."""
        self._since = time.time()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Note the counters where no gradient is being accumulated."""
        if not trainer.fit_loop._should_accumulate():
            self._note(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The epoch's validation is behind us as well."""
        self._note(trainer)
        self._where = "training"

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A validation that fails is done again."""
        if not trainer.sanity_checking:
            self._where = "validation"

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """First of the callbacks: from here on the pool's writer counts this validation."""
        if not trainer.sanity_checking:
            self._where = "elsewhere"

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Training goes on after a validation in mid-epoch."""
        self._where = "training"

    def _note(self, trainer: pl.Trainer) -> None:
        self._counters, self._steps = trainer.fit_loop.state_dict(), _steps(trainer)

    def checkpoint(self, trainer: pl.Trainer, folder: Path) -> tuple[dict[str, Any] | None, str]:
        """After an error of ``trainer.fit``: the checkpoint to go on from, None to start anew; and which, in words.

        Where weights and counters cannot be paired (memory ran out between an optimiser step and the end of its batch,
        or while the pool was being written), it is the last one that was written to ``folder``, or that the run started
        from.
        """
        if self._where == "validation":
            counters = copy.deepcopy(trainer.fit_loop.state_dict())
            _before_validation(counters[_VALIDATION])
            return _saved(trainer, folder, counters), "go on from there"
        if self._where == "training" and self._counters is not None and _steps(trainer) == self._steps:
            return _saved(trainer, folder, self._counters), "go on from there"
        last = folder / "last.ckpt"
        if not (last.is_file() and last.stat().st_mtime >= self._since):
            if not trainer.ckpt_path:
                return None, "start anew"
            last = Path(trainer.ckpt_path)
        return _load(last), "go on from the last checkpoint"


class TimedCheckpoint(ModelCheckpoint):
    """Saves in mid-epoch, only where a resumed run goes on exactly.

    Not while gradients are accumulated, which no checkpoint holds; nor where a validation comes next, which Lightning
    leaves out after a restart (lightning 2.6).
    """

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time, and when the process was told to end (SIGTERM), for Lightning ends it next."""
        if trainer.received_sigterm:
            self._last_time_checked = -math.inf
        validation_next = trainer.is_last_batch or (batch_idx + 1) % (trainer.val_check_batch or 1) == 0
        if not (validation_next or trainer.fit_loop._should_accumulate()):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def _steps(trainer: pl.Trainer) -> int:
    """The optimiser's own count; Lightning's comes a moment later."""
    optimizer = trainer.optimizers[0] if trainer.optimizers else None
    if not isinstance(optimizer, BankAdamW):
        return 0
    (weights,) = optimizer.param_groups[0]["params"]
    return int(optimizer.state[weights].get("step", 0))


def _before_validation(progress: dict[str, Any]) -> None:
    """Set a validation's counters to "begun, not one batch done": Lightning then starts it again."""
    done = progress["total"]["completed"]
    progress["total"].update(ready=done + 1, started=done + 1, processed=done)
    progress["current"].update(ready=1, started=1, processed=0, completed=0)


def _saved(trainer: pl.Trainer, folder: Path, counters: dict[str, Any]) -> dict[str, Any]:
    assert isinstance(trainer.lightning_module, BankModule)
    trainer.lightning_module.bank.weights.grad = None
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f".out-of-memory.{os.getpid()}"
    try:
        trainer.save_checkpoint(file, weights_only=False)
        content = _load(file)
    finally:
        file.unlink(missing_ok=True)
    content["loops"] = {**content["loops"], "fit_loop": counters}
    return content


def _load(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return content


def write_checkpoint(folder: Path, content: dict[str, Any]) -> None:
    """``last.ckpt`` in ``folder``, in one move."""
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f".last.{os.getpid()}"
    buffer = io.BytesIO()  # on a full disk torch's own writer raises an error that does not say so
    torch.save(content, buffer)
    new.write_bytes(buffer.getvalue())
    os.replace(new, folder / "last.ckpt")
