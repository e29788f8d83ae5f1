"""What member.json says of a bank's members, and whether a record that is there says the same."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from typing import Any

import lightning.pytorch as pl

from lora_ensemble import __version__, pool
from lora_ensemble.bank.base_model import base_difference, hub_id
from lora_ensemble.train.data import BankData
from lora_ensemble.train.module import BankModule

# None of these changes what a member is: a run may be resumed for longer.
_MAY_DIFFER_ON_RESUME = ("max_epochs", "max_steps")


def described(
    trainer: pl.Trainer, data: BankData, module: BankModule, *, run: str
) -> dict[str, list[pool.MemberRecord]]:
    """Task to what member.json will say of each member of a bank, but for its results. ``run``: the run's name."""
    train, dev = data.splits["train"], data.splits["dev"]
    clipping, overfit = trainer.gradient_clip_algorithm, trainer.overfit_batches
    settings = {
        **module.training_settings,
        "tasks": [t.name for t in module.tasks],
        "train_fingerprints": {t.name: train[t.name].fingerprint for t in module.tasks},
        "batch_size": data.batch_size,
        "max_length": data.max_length,
        "steps_per_epoch": data.steps_per_epoch,
        "data_seed": data.seed,
        "max_epochs": trainer.max_epochs,
        "max_steps": trainer.max_steps,
        "precision": str(trainer.precision),
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": trainer.gradient_clip_val,
        "gradient_clip_algorithm": None if clipping is None else str(clipping.value),
        "limit_train_batches": trainer.limit_train_batches,
        **({"overfit_batches": overfit} if overfit else {}),
        **data.taught,
    }
    found = {}
    for task in module.tasks:
        common: dict[str, Any] = {
            "task": task.name,
            "kind": task.kind,
            "labels": task.labels,
            "examples": {"dev": pool.examples_fingerprint(dev[task.name].ids, dev[task.name].labels)},
            "text": task.text,
            "train_fingerprint": train[task.name].fingerprint,
            "base_model": hub_id(module.base_model),
            "revision": module.revision,
            "base_fingerprint": module.base_fingerprint(data),
            "finetune": module.finetune,
            "settings": settings,
            "run": run,
            "versions": _versions(),
        }
        found[task.name] = [pool.MemberRecord(**member.recorded(), **common) for member in module.members]
    return found


@cache
def _versions() -> dict[str, str]:
    others = {name: version(name) for name in ("torch", "transformers", "lightning")}
    return {**others, "lora-ensemble": __version__}


def difference(found: pool.MemberRecord, wanted: pool.MemberRecord, *, resumed: bool, any_base: bool) -> str:
    """The first setting in which two records differ, in words; empty where they agree.

    ``resumed``: only how long it trains may differ. ``any_base``: the base model may, too.
    """
    for key in ("base_model", "finetune", "rank", "scaling", "targets", "lr", "seed", "labels", "train_fingerprint"):
        a, b = getattr(found, key), getattr(wanted, key)
        if a != b:
            return f"{key} was {a!r}, is now {b!r}"
    if found.examples.get("dev") != wanted.examples.get("dev"):
        return "the dev examples were others"
    for key in {**found.settings, **wanted.settings}:
        a, b = found.settings.get(key), wanted.settings.get(key)
        if a != b and not (resumed and key in _MAY_DIFFER_ON_RESUME):
            return f"{key} was {a!r}, is now {b!r}"
    base = "" if any_base else base_difference(found.base_fingerprint, wanted.base_fingerprint, found.revision)
    return f"base_fingerprint: {base}" if base else ""
