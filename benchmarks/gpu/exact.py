"""Is what a bank computes on this device what it should be? Each check against a yardstick, in float32 and in bf16.

What is allowed was decided before anything was measured. float32: a sum of a thousand products is rounded to about 1e-6
of itself, and a dozen layers add up to about 1e-5; so 1e-4 of the largest number for one pass, and 1e-3 for gradients,
which cancel, and after steps of AdamW, whose first ones divide a gradient by its own size. bf16 keeps 8 bits and both
sides round in different places: two independent errors of one size differ by 1.4 times it, and the largest of a few
hundred numbers is a matter of luck by a third either way; so three times the yardstick's own distance from its float32.
Each check also says how far a wrong model would be, which must be more than is allowed.

Axes: M members, B examples, C outputs.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from transformers import DataCollatorWithPadding

import one_pass
from gpu.setting import Setting
from lora_ensemble.bank.base_model import load_tokenizer
from lora_ensemble.bank.lora import Member, single
from lora_ensemble.bank.member_files import from_peft
from lora_ensemble.bank.optim import BankAdamW
from lora_ensemble.train.evaluation import member_losses
from lora_ensemble.train.module import BankModule
from sides import peer_examples, peer_model, save_peft, start_anywhere
from workload import Workload

PRECISIONS = ("32", "bf16")
_PASS, _LATER, _BF16 = 1e-4, 1e-3, 3.0
_STEPS = 5
_ASKED = 64
"""Examples whose logits are compared."""


def judge(
    check: str, precision: str, *, ours: Tensor, plain: Tensor, exact: Tensor, wrong: list[Tensor], tolerance: float
) -> dict[str, Any]:
    """A row. ``plain``: the yardstick; ``exact``: the yardstick in float32; ``wrong``: what must be told apart from it,
    of which the nearest counts."""
    if precision == "32":
        allowed, why = tolerance * _largest(plain), f"{tolerance:g} of the largest"
    else:
        allowed, why = _BF16 * _largest(plain - exact), f"{_BF16:g} × the yardstick's distance from float32"
    return row(check, precision, _largest(ours - plain), allowed, why, min(_largest(w - plain) for w in wrong))


def row(check: str, precision: str, difference: float, allowed: float, why: str, wrong: float) -> dict[str, Any]:
    """What was found, what is allowed and why, and what a wrong model gives. NaN is never as expected."""
    found = {"difference": difference, "allowed": allowed, "why": why, "wrong": wrong}
    return {"check": check, "precision": precision, **found, "agrees": difference <= allowed < wrong}


def _largest(x: Tensor) -> float:
    return float(x.double().abs().max())


def _work(setting: Setting, precision: str, **changes: Any) -> Workload:
    """A workload with dropout off and a scaling that is not 1."""
    common: dict[str, Any] = {
        "precision": precision,
        "lr": 1e-3,
        "scaling": 2.0,
        "head_dropout": 0.0,
        "encoder_dropout": 0.0,
    }
    enough = _ASKED // 8
    work = setting.workload("random:minilm", steps=enough, **{**common, **changes})
    torch.set_num_threads(work.threads)
    return work


def _rate(setting: Setting) -> float:
    """A few steps move the logits by much more than rounding, and not so far that rounding decides where they end:
    AdamW moves every number by the rate, and a wide layer adds them up."""
    return setting.size(1e-4, 1e-3)


def _start(module: BankModule, setting: Setting, work: Workload) -> None:
    """Weights with which an adapter's share of a layer's output is some tenths, whatever the width."""
    for i in range(len(module.members)):
        start_anywhere(module.bank, i, work.task.name, std=setting.size(0.1, 0.5))


def _autocast(work: Workload) -> torch.autocast:
    return torch.autocast(work.device, torch.bfloat16, enabled=work.precision == "bf16")


def _batches(work: Workload) -> Iterator[dict[str, Any]]:
    """The batches of the steps, on the device."""
    for _, batch in zip(range(_STEPS), work.data().train_dataloader(), strict=False):
        yield move_data_to_device(batch, torch.device(work.device))


def _backward(module: BankModule, work: Workload, batch: Mapping[str, Any]) -> None:
    part = batch[work.task.name]
    with _autocast(work):
        loss = member_losses(module.bank(batch)[work.task.name], part["labels"], work.task.kind).sum() / part["size"]
    loss.backward()


def train(module: BankModule, work: Workload) -> BankAdamW:
    """A few steps; dropout, where it is on, is seeded by the step."""
    optimizer = BankAdamW(module.bank.weights, module.bank.rates)
    for step, batch in enumerate(_batches(work)):
        torch.manual_seed(step)
        optimizer.zero_grad()
        _backward(module, work, batch)
        optimizer.step()
    return optimizer


@torch.no_grad()
def says(module: BankModule, work: Workload) -> Tensor:
    """Logits (M, B, C) of the examples of the first steps, in their order."""
    data = work.data()
    rows = np.concatenate(work.order(data))[:_ASKED]
    batch = {work.task.name: data.splits["train"][work.task.name].batch(rows)}
    module.eval()
    with _autocast(work):
        return module.bank(move_data_to_device(batch, torch.device(work.device)))[work.task.name].float().cpu()


# The checks


def bank_alone(setting: Setting) -> list[dict[str, Any]]:
    """Four different members in one bank against each in a bank of its own, after some steps. Wrong: another member,
    and one that was not trained."""
    found: dict[str, tuple[Tensor, Tensor, list[Tensor]]] = {}
    for precision in PRECISIONS:
        work = _work(setting, precision)
        lr = work.lr
        members = [
            Member(rank=8, lr=lr, targets="qv", seed=1),
            Member(rank=3, scaling=2.0, lr=2 * lr, targets="all-linear", seed=2),
            Member(rank=16, scaling=0.5, lr=lr / 2, targets="qkv+pooler", seed=3),
            Member(lr=10 * lr, targets="none", seed=4),
        ]
        together = work.module(members).to(work.device)
        _start(together, setting, work)
        states = [together.bank.member_state(i) for i in range(len(members))]
        untrained = says(together, work)
        train(together.train(), work)
        alone = []
        for member, state in zip(members, states, strict=True):
            module = work.module([member]).to(work.device)
            module.bank.load_member(0, *state)
            train(module, work)
            alone.append(says(module, work))
        plain = torch.cat(alone)
        found[precision] = says(together, work), plain, [plain.roll(1, 0), untrained]
    check = f"bank of four = its members alone, logits after {_STEPS} steps"
    exact = found["32"][1]
    return [
        judge(check, p, ours=ours, plain=plain, exact=exact, wrong=wrong, tolerance=_LATER)
        for p, (ours, plain, wrong) in found.items()
    ]


def against_peft(setting: Setting) -> list[dict[str, Any]]:
    """A bank of one on packed rows against PEFT on padded batches, from the same weights: one pass, its gradients, and
    some steps. Wrong: PEFT with twice the scaling, and one that was not trained."""
    checks = {
        "packed = padded: logits of a bank of one and of PEFT": _PASS,
        "packed = padded: gradients of the adapters": _LATER,
        f"bank of one = PEFT, logits after {_STEPS} steps": _LATER,
    }
    found: dict[str, tuple[list[Tensor], list[Tensor], list[list[Tensor]]]] = {}
    for precision in PRECISIONS:
        work = _work(setting, precision)
        member = work.members(1)[0]
        start = str(setting.folder / f"start-{precision}.safetensors")
        module = work.module([member]).to(work.device)
        _start(module, setting, work)
        save_peft(module.bank, 0, work.task.name, start)
        double = dataclasses.replace(member, scaling=2 * work.scaling)
        ours, plain = _by_the_bank(module, work), _by_peft(member, work, start)
        wrong = [[w] for w in _by_peft(double, work, start)]
        wrong[-1].append(plain[0])
        found[precision] = ours, plain, wrong
    return [
        judge(check, p, ours=ours[i], plain=plain[i], exact=found["32"][1][i], wrong=wrong[i], tolerance=limit)
        for i, (check, limit) in enumerate(checks.items())
        for p, (ours, plain, wrong) in found.items()
    ]


def _by_the_bank(module: BankModule, work: Workload) -> list[Tensor]:
    """Logits (B, C), the first step's gradients of the adapters, and the logits after all steps."""
    before = says(module, work)[0]
    module.train()
    _backward(module, work, next(_batches(work)))
    assert module.bank.weights.grad is not None
    shapes = module.bank.shapes
    pieces = torch.split(module.bank.weights.grad[0].float().cpu(), [s.numel() for s in shapes.values()])
    parts = {n: piece for n, piece in zip(shapes, pieces, strict=True) if n.endswith((".A", ".B"))}
    train(module, work)
    return [before, torch.cat([parts[name] for name in sorted(parts)]), says(module, work)[0]]


def _by_peft(member: Member, work: Workload, start: str) -> list[Tensor]:
    """The same by PEFT and transformers, padded as its user would do it."""
    collate = DataCollatorWithPadding(load_tokenizer(work.base_model))
    examples = peer_examples(work, work.data())
    model = peer_model(work, member, start).to(work.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=single(member.lr), weight_decay=0.0)

    def logits() -> Tensor:
        model.eval()
        out = []
        for at in range(0, _ASKED, work.batch_size):
            batch = collate(examples[at : at + work.batch_size]).to(work.device)
            with torch.no_grad(), _autocast(work):
                out.append(model(**batch).logits.float().cpu())
        return torch.cat(out)

    found = [logits()]
    for step in range(_STEPS):
        model.train()
        batch = collate(examples[step * work.batch_size : (step + 1) * work.batch_size]).to(work.device)
        optimizer.zero_grad()
        with _autocast(work):
            loss = model(**batch).loss
        loss.backward()
        if step == 0:
            named = {n.replace(".default", ""): p.grad for n, p in model.named_parameters() if ".lora_" in n}
            gradients = {n: g.float().cpu() for n, g in named.items() if g is not None}
            adapter, _ = from_peft(gradients, prefix=model.base_model.model.base_model_prefix)
            parts = {f"{p}.{k}": g for p, ab in adapter.items() for k, g in zip("AB", ab, strict=True)}
            found.append(torch.cat([parts[name].flatten() for name in sorted(parts)]))
        optimizer.step()
    return [*found, logits()]


def isolation(setting: Setting) -> list[dict[str, Any]]:
    """A member that diverges changes no bit of the others, dropout on; and the same bank twice is the same."""
    # So that bits can be compared at all; both must be set before the GPU is used.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)
    rows = []
    for precision in PRECISIONS:
        work = _work(setting, precision, head_dropout=0.3, encoder_dropout=0.1)
        tame = work.members(3)
        wild = [tame[0], dataclasses.replace(tame[1], lr=1e30), tame[2]]
        said = []
        for members in (tame, tame, wild):
            module = work.module(members).to(work.device)
            alive = train(module, work).alive.tolist()
            said.append(says(module, work)[[0, 2]])
        twice = _largest(said[0] - said[1])
        why = "no bit" if twice == 0 else "twice what the same bank differs from itself when run again"
        check, frozen = "a member that becomes NaN changes no other", float(alive.count(False))
        found = row(check, precision, _largest(said[2] - said[0]), 2 * twice, why, frozen)
        rows.append({**found, "agrees": found["agrees"] and alive == [True, False, True], "wrong_is": "member frozen"})
    return rows


def answers(setting: Setting) -> list[dict[str, Any]]:
    """``Ensemble``'s one pass against its members merged into plain models, one after another; the wrong model is
    another member."""
    work = _work(setting, "32")
    folder = setting.folder / "ensemble"
    folder.mkdir(exist_ok=True)
    (sentences,) = work.data().splits["train"][work.task.name].source.texts
    texts = list(sentences[:_ASKED])
    one_pass.make(folder, "sst", 3, 8, "qv", work.base_model)
    found = {}
    for precision in PRECISIONS:
        common = (folder, texts, work.base_model, work.device, precision, work.threads)
        found[precision] = [torch.from_numpy(f(*common).logits) for f in (one_pass.ours, one_pass.in_file_order)]
    return [
        judge(
            "one pass = merged members one by one, logits",
            p,
            ours=ours,
            plain=plain,
            exact=found["32"][1],
            wrong=[plain.roll(1, 0)],
            tolerance=_PASS,
        )
        for p, (ours, plain) in found.items()
    ]
