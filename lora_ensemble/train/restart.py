"""How training ends, and the checkpoint from which it goes on as if it had not: after a cut, a signal or a kill."""

from __future__ import annotations

import copy
import io
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint, Timer
from lightning.pytorch.loops.utilities import _parse_loop_limits
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from lora_ensemble.bank.base_model import base_difference, hub_id
from lora_ensemble.bank.lora import LATER
from lora_ensemble.bank.member_files import say_unknown_base
from lora_ensemble.errors import Interrupted, UserError
from lora_ensemble.files import replacing

SAVE_EVERY_S = 600.0  # an epoch may take hours


def whole_epoch(trainer: pl.Trainer) -> bool:
    """Whether the last batch that was trained was its epoch's last."""
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def evaluation_is_due(trainer: pl.Trainer) -> bool:
    """Whether dev is to be evaluated after this batch by the Trainer's flags, and not only because training ends."""
    stop, trainer.should_stop = trainer.should_stop, False
    fetcher: Any = trainer.fit_loop._data_fetcher
    try:
        return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)
    finally:
        trainer.should_stop = stop


def planned_end(trainer: pl.Trainer) -> bool:
    """Whether training reached the end that it was to reach: its epochs, its steps, or what a callback decided.

    ``trainer.max_time`` is a plan only where nothing else would end the run.
    """
    most_steps, most_epochs = trainer.max_steps, trainer.max_epochs
    if most_steps != -1 and trainer.global_step >= most_steps:
        return True
    done = trainer.fit_loop.epoch_progress.current.processed
    if most_epochs not in (None, -1) and done >= most_epochs and whole_epoch(trainer):
        return True
    return not out_of_time(trainer) or (most_steps == -1 and most_epochs in (None, -1))


def planned_steps(trainer: pl.Trainer) -> int | None:
    """Optimiser steps of the whole run; None where it has no end."""
    # Not trainer.estimated_stepping_batches: it sets the loaders up before Lightning restores their state, so a
    # run resumed in mid-epoch would start the epoch again (lightning 2.6).
    batches, limit = len(trainer.datamodule.train_dataloader()), trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    steps = math.ceil(batches / trainer.accumulate_grad_batches)
    ends = [steps * trainer.max_epochs] if trainer.max_epochs not in (None, -1) else []
    ends += [trainer.max_steps] if trainer.max_steps != -1 else []
    return min(ends, default=None)


def out_of_time(trainer: pl.Trainer) -> bool:
    """Whether ``trainer.max_time`` is over."""
    left = [c.time_remaining() for c in trainer.callbacks if isinstance(c, Timer)]
    return any(seconds is not None and seconds <= 0 for seconds in left)


class BankTrainer(pl.Trainer):
    """The Trainer, which evaluates dev once more where training ended after the last evaluation.

    And goes on after an epoch with the next one, with ``max_steps`` as without: Lightning (2.6) would train a batch too
    many, or evaluate again.
    """

    evaluates_the_rest: Callable[[pl.Trainer], bool] | None = None  # asked whether that is to be done
    evaluates_now = False  # whether it is being done

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fit_loop._iteration_based_training = lambda: False  # type: ignore[method-assign]
        # What Lightning would decide only later: a plan and a record compare it before.
        limits = (self.min_steps, self.max_steps, self.min_epochs, self.max_epochs, self)
        _, self.fit_loop.max_epochs = _parse_loop_limits(*limits)

    def _run_stage(self) -> Any:
        results = super()._run_stage()
        if self.state.fn == TrainerFn.FITTING and self.evaluates_the_rest and self.evaluates_the_rest(self):
            loop = self.fit_loop.epoch_loop.val_loop
            loop.restarting = False
            self.validating = self.evaluates_now = True
            loop.run()
            self.training, self.evaluates_now = True, False
        return results


class RunCheckpoint(Checkpoint):
    """``last.ckpt``: at the end of each epoch, every ten minutes, where training is cut short, and when told to end.

    In mid-epoch never while gradients are accumulated, which no checkpoint holds; and where a dev evaluation comes
    next, as one about to begin, which Lightning (2.6) would leave out after a restart. Told to end (SIGINT, SIGTERM),
    training goes on to the end of the step, on all devices; told twice, it ends at once.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / "last.ckpt"
        self.saved = ""  # how far training was when this run last saved, in words; empty if it never did
        self._told = 0
        self._saved_at = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen to signals; when it ends, the Trainer puts back what was there before."""
        self._saved_at = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._tell)

    def _tell(self, number: int, _: Any) -> None:
        if self._told:
            raise Interrupted(number)
        self._told = number
        if rank_zero_only.rank == 0:  # written past Python's buffers, which may be in use just now
            os.write(2, b"\nending after this step, which may take a moment; Ctrl-C again ends at once, and loses it\n")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save in mid-epoch where it is time, or where training ends here."""
        if trainer.fit_loop._should_accumulate() or whole_epoch(trainer):
            return
        ends = trainer.should_stop or (trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps)
        late = time.monotonic() - self._saved_at >= SAVE_EVERY_S
        # All devices at the same step, whichever of them was told, or whose clock is ahead.
        if trainer.strategy.reduce_boolean_decision(ends or late or bool(self._told), all=False):
            self._save(trainer)
            self._end_if_told(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save. An epoch that was cut short has its checkpoint already."""
        if whole_epoch(trainer):
            self._save(trainer)
        self._end_if_told(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Told in the last evaluation: the next bank is not begun."""
        if self._told:
            raise Interrupted(self._told)

    def _end_if_told(self, trainer: pl.Trainer) -> None:
        if trainer.strategy.reduce_boolean_decision(bool(self._told), all=False):
            raise Interrupted(self._told or signal.SIGTERM)

    def _save(self, trainer: pl.Trainer) -> None:
        loop = trainer.fit_loop
        validation = loop.epoch_loop.val_loop.batch_progress
        before = copy.deepcopy(validation.state_dict())
        if not whole_epoch(trainer) and evaluation_is_due(trainer):
            validation.load_state_dict(_begun(before))
        try:
            trainer.save_checkpoint(self.file, weights_only=False)
        finally:
            validation.load_state_dict(before)
        self._saved_at, self.saved = time.monotonic(), position(trainer)


def position(trainer: pl.Trainer) -> str:
    """``step 12, in epoch 2``."""
    progress = trainer.fit_loop.epoch_progress.current
    inside = progress.processed < progress.started
    return f"step {trainer.global_step}, {'in' if inside else 'the end of'} epoch {progress.processed + inside}"


def _begun(validation: dict[str, Any]) -> dict[str, Any]:
    """A validation's counters as "begun, not one batch done": Lightning then starts it again."""
    progress, done = copy.deepcopy(validation), validation["total"]["completed"]
    progress["total"].update(ready=done + 1, started=done + 1, processed=done)
    progress["current"].update(ready=1, started=1, processed=0, completed=0)
    return progress


def what_is_missing(trainer: pl.Trainer, *, evaluated: bool, up_to_date: bool, finished: bool, goes_on: str) -> str:
    """After training, in a line: what is not in the pool or not finished, and how to go on; empty where all is.

    ``evaluated``: whether dev was, ever; ``up_to_date``: after the last step; ``goes_on``: to be added to the command.
    """
    saved = any(isinstance(c, RunCheckpoint) for c in trainer.callbacks)
    again = f"the same command{goes_on} and " if saved else "nothing was saved to go on from; once more "
    if trainer.global_step == 0:
        why = "max_time" if out_of_time(trainer) else "max_epochs, max_steps or limit_train_batches"
        return f"no step was trained (trainer.{why}), so no member was written"
    if not up_to_date:
        what = "what was trained since the last dev evaluation is not" if evaluated else "nothing of this run is"
        return (
            f"{what} in the pool: dev was not evaluated as a whole; {again}without {limit_on_dev(trainer)} evaluates it"
        )
    if not finished:
        why = "by trainer.max_time " if out_of_time(trainer) else ""
        end = f"{trainer.max_steps} steps" if trainer.max_steps != -1 else f"{trainer.max_epochs} epochs"
        return (
            f"stopped {why}at {position(trainer)} of {end}: members are in the pool, but not finished, "
            f"so dicor leaves them out; {again}more time goes on"
        )
    return ""


def limit_on_dev(trainer: pl.Trainer) -> str:
    """The flag for which dev was not evaluated as a whole."""
    return "trainer.overfit_batches" if trainer.overfit_batches else "trainer.limit_val_batches"


def signature(module: Any) -> dict[str, Any]:
    """What a checkpoint says of its bank, a ``BankModule``'s, to be compared."""
    return {
        "base_model": hub_id(module.base_model),
        "finetune": module.finetune,
        "tasks": [t.name for t in module.tasks],
        "members": [m.recorded() for m in module.members],
        **({"folds": [module.folds.count, module.folds.refit]} if module.folds.count else {}),
        "revision": module.revision,
        "base_fingerprint": module.base_fingerprint(module.trainer.datamodule),
    }


def check_checkpoint(saved: Mapping[str, Any], expected: Mapping[str, Any], *, any_base: bool) -> None:
    """``UserError`` where a checkpoint, by what it says of its bank, is another one's, or over another base model."""
    saved = {**saved, "members": [{**dict.fromkeys(LATER), **m} for m in saved.get("members", [])]}
    for key in ("base_model", "finetune", "tasks", "members", "folds"):
        if saved.get(key) != expected.get(key):
            raise UserError(
                f"--ckpt_path: the checkpoint is another bank's ({key} differs); give the settings it was made with"
            )
    then = saved.get("base_fingerprint", {})
    if not then:
        say_unknown_base("--ckpt_path")
    if any_base:
        return
    if difference := base_difference(then, expected["base_fingerprint"], saved.get("revision")):
        raise UserError(f"--ckpt_path: the checkpoint was trained over another {expected['base_model']}: {difference}")


def write_checkpoint(folder: Path, content: dict[str, Any]) -> None:
    """``last.ckpt`` in ``folder``, in one move."""
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()  # on a full disk torch's own writer raises an error that does not say so
    torch.save(content, buffer)
    with replacing(folder / "last.ckpt") as beside:
        beside.write_bytes(buffer.getvalue())
