"""Idea 2 of the design: a member in a bank is the member trained alone, and a bank of one is what PEFT trains."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILY_NAMES, packed, tiny_config
from torch.nn import functional as F

from lora_ensemble.bank.base_model import load_classifier
from lora_ensemble.bank.dropout import MemberDropout
from lora_ensemble.bank.families import accepts_token_types, family_of, target_paths
from lora_ensemble.bank.lora import Member, derived_seed, expand_members
from lora_ensemble.bank.member_files import head_names, peft_config, peft_tensors, weight_files
from lora_ensemble.bank.model import Bank
from lora_ensemble.bank.optim import BankAdamW, clip_rows
from lora_ensemble.errors import UserError
from lora_ensemble.tasks import PRESETS, Task

SST = PRESETS["sst"]


def bank_of(base: Path, *entries: Member, tasks: list[Task] | None = None, dropout: float = 0.0, **kw: Any) -> Bank:
    tasks = tasks or [SST]
    classifier, fresh = load_classifier(
        str(base), num_labels=tasks[0].num_outputs, head_dropout=dropout, encoder_dropout=dropout
    )
    return Bank(classifier, members=expand_members(list(entries)), tasks=tasks, fresh=fresh, **kw)


def batches(steps: int, *, tasks: tuple[str, ...] = ("sst",), seed: int = 0, b: int = 4) -> list[dict[str, Any]]:
    """Random padded batches with token types and labels."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(steps):
        step = {}
        for task in tasks:
            length = int(torch.randint(5, 12, (1,), generator=g))
            real = torch.randint(3, length + 1, (b,), generator=g)
            mask = (torch.arange(length) < real[:, None]).long()
            ids = torch.randint(5, 60, (b, length), generator=g) * mask
            ids[:, 0] = 2
            types = (torch.arange(length) >= real[:, None] // 2).long() * mask
            labels = torch.randint(0, PRESETS[task].num_outputs if task == "sst" else 2, (b,), generator=g)
            step[task] = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types, "labels": labels}
        made.append(step)
    return made


def row(batch: dict[str, Any]) -> dict[str, Any]:
    """Every task's batch packed."""
    return {task: packed(part) for task, part in batch.items()}


def sst_losses(bank: Bank, batch: dict[str, Any]) -> torch.Tensor:
    """Each member's own mean cross-entropy (M,), computed here and not by the package."""
    logits = bank(row(batch))["sst"]
    return torch.stack([F.cross_entropy(one, batch["sst"]["labels"]) for one in logits])


def train(bank: Bank, data: list[dict[str, Any]], *, clip: float | None = None, decay: float = 0.0) -> torch.Tensor:
    """Train by the sum of the members' losses; returns them (steps, M)."""
    optimizer = BankAdamW.of(bank, decay)
    history = []
    for step, batch in enumerate(data):
        bank.seed_dropout(0, str(step))
        losses = sst_losses(bank, batch)
        optimizer.zero_grad()
        losses.sum().backward()
        assert bank.weights.grad is not None
        if clip:
            clip_rows(bank.weights.grad, clip, "norm")
        optimizer.step()
        history.append(losses.detach())
    return torch.stack(history)


def flat_state(bank: Bank, index: int) -> dict[str, torch.Tensor]:
    """A member's tensors at full precision by name (member_state rounds to float32)."""
    views = bank._views(bank.weights.detach())
    rank = bank.ranks[index]
    state = {}
    for path in bank.paths[index]:
        state[f"{path}.A"] = views[f"{path}.A"][index, :rank]
        state[f"{path}.B"] = views[f"{path}.B"][index, :, :rank]
    state.update({n: v[index] for n, v in views.items() if "/" in n})
    return state


THREE = (
    Member(rank=3, targets="qkv", lr=3e-3, scaling=2.0, seed=1),
    Member(rank=8, targets="all-linear", lr=1e-3, seed=2),
    Member(targets="none", lr=1e-2, seed=3),
)


LAYERED = (
    Member(rank=4, targets="qkv", layers="top-half", lr=2e-3, lr_b=1e-2, weight_decay=0.2, init="kaiming", seed=4),
    *THREE,
)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_together_equals_alone(tiny: Callable[[str], Path], family: str) -> None:
    """Ranks, targets, layers, scalings and rates differ; clipping on; 20 steps; float64; equal to 1e-10."""
    data = batches(20)
    together = bank_of(tiny(family), *LAYERED).double()
    assert together.starts == [0 if family == "deberta-v2" else 1, 0, 0, 2]
    start = together.weights.detach().clone()
    history = train(together, data, clip=0.5, decay=0.01)
    assert not torch.allclose(start, together.weights)
    for index, entry in enumerate(LAYERED):
        alone = bank_of(tiny(family), entry).double()
        losses = train(alone, data, clip=0.5, decay=0.01)
        torch.testing.assert_close(history[:, index], losses[:, 0], rtol=0, atol=1e-12)
        a, b = flat_state(together, index), flat_state(alone, 0)
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


DROPPED = (
    Member(rank=3, targets="qkv", lr=3e-2, dropout=0.3, seed=1),
    Member(rank=4, targets="qkv", lr=3e-2, dropout=0.1, layers="top-half", seed=2),
    Member(rank=5, targets="all-linear", lr=1e-3, dropout=0.5, seed=3),
    Member(rank=2, targets="all-linear", lr=1e-3, seed=4),
    Member(targets="none", lr=1e-2, seed=5),
)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_member_with_dropout_has_its_own_masks_in_any_bank(tiny: Callable[[str], Path], family: str) -> None:
    """LoRA's alone: each trained alone is to 1e-10 what it is beside four others; and dropout does something."""
    data = batches(6)
    together = bank_of(tiny(family), *DROPPED).double()
    history = train(together, data)
    for index, entry in enumerate(DROPPED):
        alone = bank_of(tiny(family), entry).double()
        torch.testing.assert_close(history[:, index], train(alone, data)[:, 0], rtol=0, atol=1e-12)
        a, b = flat_state(together, index), flat_state(alone, 0)
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
        still = train(bank_of(tiny(family), dataclasses.replace(entry, dropout=0.0)).double(), data)[:, 0]
        assert torch.allclose(still, history[:, index], rtol=0, atol=1e-9) == (entry.dropout == 0)


def test_masks_of_members_come_from_their_seeds_and_the_step(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal seeds draw the same, others not; what seeds all other dropout says nothing here."""
    drawn: list[torch.Tensor] = []
    draw = MemberDropout.__call__

    def noted(self: MemberDropout, x: torch.Tensor, rows: list[int]) -> torch.Tensor:
        drawn.append(draw(self, torch.ones_like(x), rows))
        return drawn[-1] * x

    monkeypatch.setattr(MemberDropout, "__call__", noted)
    entries = [Member(rank=2, dropout=0.5, seed=seed, name=name) for seed, name in ((1, "a"), (2, "b"), (1, "c"))]
    bank, part = bank_of(tiny("bert"), *entries), row(batches(1)[0])

    def masks(seed: int, step: str) -> torch.Tensor:
        drawn.clear()
        bank.seed_dropout(seed, step)
        bank(part)
        assert len(drawn) == 4  # query and value of two layers
        assert not torch.equal(drawn[0], drawn[1])
        return torch.stack([mask[:, :4] for mask in drawn])

    first = masks(0, "1")
    assert torch.equal(first[:, 0], first[:, 2])
    assert not torch.equal(first[:, 0], first[:, 1])
    assert torch.equal(first, masks(5, "1"))
    assert not torch.equal(first, masks(0, "2"))


def test_dropout_is_peft_s(tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT is given the masks that were drawn, one for each layer and none other: logits and gradients agree."""
    from peft import LoraConfig, get_peft_model

    drawn: list[torch.Tensor] = []
    draw = MemberDropout.__call__

    def noted(self: MemberDropout, x: torch.Tensor, rows: list[int]) -> torch.Tensor:
        drawn.append(draw(self, torch.ones_like(x), rows)[0])
        return drawn[-1] * x

    monkeypatch.setattr(MemberDropout, "__call__", noted)
    member = Member(rank=4, scaling=3.0, targets="query+value", layers=[0], dropout=0.4)
    bank = bank_of(tiny("bert"), member).double()
    bank.weights.data += 0.1 * torch.randn_like(bank.weights)
    (batch,) = batches(1)
    part = {n: t[:, :8] for n, t in batch["sst"].items() if n != "labels"}  # 4 examples of 8 tokens: nothing is filled
    part["attention_mask"], part["token_type_ids"] = torch.ones(4, 8).long(), torch.zeros(4, 8).long()
    part["input_ids"] = torch.nn.functional.pad(part["input_ids"], (0, 8 - part["input_ids"].shape[1]), value=9)
    ours = bank({"sst": packed(part)})["sst"][0]
    ours.square().sum().backward()

    adapter, heads = bank.member_state(0)
    classifier, _ = load_classifier(str(tiny("bert")), num_labels=5, head_dropout=0.0, encoder_dropout=0.0)
    config = LoraConfig(
        task_type="SEQ_CLS", r=4, lora_alpha=12, target_modules=["query", "value"], layers_to_transform=[0],
        lora_dropout=0.4,
    )  # fmt: skip
    model = get_peft_model(classifier, config).double()
    masks = iter(drawn)
    for name, module in model.named_modules():
        if name.endswith("lora_dropout.default"):
            mask = next(masks).view(4, 8, -1)
            monkeypatch.setattr(module, "forward", lambda x, mask=mask: x * mask)
    assert next(masks, None) is None
    given = peft_tensors(adapter, heads["sst"], prefix=bank.prefix)
    own = {
        n.replace(".default", "").replace(".modules_to_save", ""): p
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    assert own.keys() == given.keys()
    for name, parameter in own.items():
        parameter.data.copy_(given[name])
    theirs = model.train()(**part).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)  # member_state rounds to float32
    theirs.square().sum().backward()
    gradient = bank._views(bank.weights.grad)
    for path in adapter:
        for side in "AB":
            peer = own[f"base_model.model.bert.{path}.lora_{side}.weight"].grad
            torch.testing.assert_close(gradient[f"{path}.{side}"][0], peer, rtol=1e-5, atol=1e-5)
    bank.eval()
    count = len(drawn)
    bank({"sst": packed(part)})
    assert len(drawn) == count


def test_members_differ_and_loss_gradients_do_not_cross(tiny: Callable[[str], Path]) -> None:
    bank = bank_of(tiny("bert"), *THREE).double()
    bank.weights.data += torch.randn_like(bank.weights) * 0.1 * (bank.weights != 0)
    losses = sst_losses(bank, batches(1)[0])
    assert len({round(x, 6) for x in losses.tolist()}) == 3
    for b in range(3):
        (gradient,) = torch.autograd.grad(losses[b], bank.weights, retain_graph=True)
        for a in range(3):
            assert bool((gradient[a] == 0).all()) == (a != b)


def test_clipping_does_not_couple_members(tiny: Callable[[str], Path]) -> None:
    """A neighbour with a gradient a million times larger changes nothing."""
    gradient = torch.randn(2, 100, dtype=torch.float64)
    alone = gradient[:1].clone()
    gradient[1] *= 1e6
    clip_rows(gradient, 0.1, "norm")
    clip_rows(alone, 0.1, "norm")
    assert torch.equal(gradient[:1], alone)
    torch.testing.assert_close(gradient.norm(dim=1), torch.full((2,), 0.1, dtype=torch.float64))


def test_zero_blocks_stay_zero(tiny: Callable[[str], Path]) -> None:
    bank = bank_of(tiny("bert"), *THREE, dropout=0.2)
    blank = bank.weights == 0
    blank &= torch.cat(
        [
            torch.full((3, v[0].numel()), True) if "/" not in n else torch.full((3, v[0].numel()), False)
            for n, v in bank._views(bank.weights).items()
        ],
        dim=1,
    )
    for index, member in enumerate(bank.members):  # B starts at zero and learns: those blocks do not count
        views = bank._views(blank.clone())
        for path in bank.paths[index]:
            views[f"{path}.B"][index, :, : member.rank] = False
            views[f"{path}.A"][index, : member.rank] = False
        blank = torch.cat([v.reshape(3, -1) for v in views.values()], dim=1)
    assert blank[0].sum() > 1000
    assert blank[2].sum() > 1000
    train(bank, batches(20), decay=0.1)
    assert bool((bank.weights[blank] == 0).all())


def test_a_member_driven_to_nan_changes_no_other_by_one_bit(tiny: Callable[[str], Path]) -> None:
    data = batches(12)

    def run(poisoned: bool) -> Bank:
        bank = bank_of(tiny("bert"), *THREE)
        optimizer = BankAdamW(bank.weights, bank.rates)
        for step, batch in enumerate(data):
            if poisoned and step == 4:
                bank.weights.data[1] *= 1e30  # overflows in its forward pass
            optimizer.zero_grad()
            sst_losses(bank, batch).sum().backward()
            assert bank.weights.grad is not None
            clip_rows(bank.weights.grad, 1.0, "norm")
            optimizer.step()
        assert optimizer.alive.tolist() == [True, not poisoned, True]
        return bank

    healthy, sick = run(False), run(True)
    for index in (0, 2):
        assert torch.equal(healthy.weights[index], sick.weights[index])
    assert not torch.equal(healthy.weights[1], sick.weights[1])
    assert bool(sick.weights.isfinite().all())


def test_dropout_masks_of_members_are_independent(tiny: Callable[[str], Path]) -> None:
    """Two members with the same weights agree without dropout and differ with it, in the encoder and in the head."""
    twins = [Member(seed=5, name=name, targets="qkv") for name in ("one", "two")]
    batch = batches(1)[0]
    for family in FAMILY_NAMES:
        still = bank_of(tiny(family), *twins)(row(batch))["sst"]
        assert torch.allclose(still[0], still[1], atol=1e-6)
        for dropped in ("encoder", "head"):
            classifier, fresh = load_classifier(
                str(tiny(family)),
                num_labels=5,
                head_dropout=0.5 if dropped == "head" else 0.0,
                encoder_dropout=0.5 if dropped == "encoder" else 0.0,
            )
            bank = Bank(classifier, members=expand_members(twins), tasks=[SST], fresh=fresh)
            noisy = bank(row(batch))["sst"]
            assert not torch.allclose(noisy[0], noisy[1], atol=1e-3), (family, dropped)


@pytest.mark.parametrize(
    ("layers", "plus"), [("all", {}), ([1], {"lr_b": 1.6e-2, "weight_decay": 0.1, "init": "kaiming"})]
)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_bank_of_one_trains_like_peft(
    tiny: Callable[[str], Path], family: str, layers: str | list[int], plus: dict[str, Any]
) -> None:
    """The real PEFT, the same start, torch's AdamW: the same losses for 20 steps (float64, dropout off, to 1e-10).

    Also with LoRA+ and decay, which are groups of parameters to torch.
    """
    from peft import LoraConfig, get_peft_model

    targets = "qkv" if family == "modernbert" else "qv"
    bank = bank_of(tiny(family), Member(rank=4, scaling=3.0, lr=2e-3, targets=targets, layers=layers, **plus))
    adapter, heads = bank.member_state(0)
    classifier, _ = load_classifier(str(tiny(family)), num_labels=5, head_dropout=0.0, encoder_dropout=0.0)
    of_layers = family_of(family)
    suffixes = [of_layers.fused] if of_layers.fused else [of_layers.query, of_layers.value]
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=4,
        lora_alpha=12,
        target_modules=[str(suffix) for suffix in suffixes],
        layers_to_transform=None if layers == "all" else layers,
        modules_to_save=head_names(bank.heads[0]),
        lora_dropout=0.0,
    )
    model = get_peft_model(classifier, config).double()
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    given = peft_tensors(adapter, heads["sst"], prefix=bank.prefix)
    names = {n: n.replace(".default", "").replace(".modules_to_save", "") for n in own}
    assert sorted(names.values()) == sorted(given)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(given[names[name]])
    data = batches(20)
    ours = train(bank.double(), data)[:, 0]
    groups = [
        {"params": [p for n, p in own.items() if "lora_B" not in n]},
        {"params": [p for n, p in own.items() if "lora_B" in n], "lr": plus.get("lr_b", 2e-3)},
    ]
    optimizer = torch.optim.AdamW(groups, lr=2e-3, weight_decay=plus.get("weight_decay", 0.0))
    theirs = []
    model.train()
    for batch in data:
        inputs = {k: v for k, v in batch["sst"].items() if k != "labels"}
        if not accepts_token_types(bank.encoder):
            del inputs["token_type_ids"]
        loss = F.cross_entropy(model(**inputs).logits, batch["sst"]["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        theirs.append(loss.detach())
    torch.testing.assert_close(ours, torch.stack(theirs), rtol=0, atol=1e-10)
    moved = bank.member_state(0)[0]
    assert all(float(b.abs().max()) > 1e-3 for _, b in moved.values())


def test_a_member_is_the_same_whoever_is_beside_it_at_the_start(tiny: Callable[[str], Path]) -> None:
    tasks = [SST, PRESETS["sts"]]
    together, alone = bank_of(tiny("bert"), *THREE, tasks=tasks), bank_of(tiny("bert"), THREE[1])
    (a, heads), (b, head) = together.member_state(1), alone.member_state(0)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[p][0], b[p][0]) for p in b)
    assert all(torch.equal(heads["sst"][n], head["sst"][n]) for n in head["sst"])
    assert heads["sts"]["classifier.weight"].shape == (1, 32)


def test_adapter_starts_normal_with_the_given_deviation_and_b_at_zero(tiny: Callable[[str], Path]) -> None:
    bank = bank_of(tiny("bert"), Member(rank=64, targets="all-linear"), init_std=0.05)
    adapter, heads = bank.member_state(0)
    drawn = torch.cat([t.flatten() for t, _ in adapter.values()])
    assert abs(float(drawn.std()) - 0.05) < 0.001  # 28,000 draws: standard error 0.0002
    assert abs(float(drawn.mean())) < 0.001
    assert all(bool((t == 0).all()) for _, t in adapter.values())
    assert bool((heads["sst"]["classifier.bias"] == 0).all())
    assert 0.015 < float(heads["sst"]["classifier.weight"].std()) < 0.025  # BERT's initializer_range is 0.02


def test_kaiming_is_pefts_own_draw_from_the_members_seed(tiny: Callable[[str], Path]) -> None:
    from peft import LoraConfig, get_peft_model

    bank = bank_of(tiny("bert"), Member(rank=6, targets="all-linear", init="kaiming", seed=7), Member(seed=1))
    adapter, _ = bank.member_state(0)
    classifier, _ = load_classifier(str(tiny("bert")), num_labels=5)
    model: Any = get_peft_model(classifier, LoraConfig(task_type="SEQ_CLS", r=6, target_modules="all-linear"))
    torch.manual_seed(derived_seed(7, "adapter"))
    for path, (a, b) in adapter.items():
        layer: Any = model.base_model.model.bert.get_submodule(path)
        layer.reset_lora_parameters("default", True)
        assert torch.equal(a, layer.lora_A["default"].weight), path
        assert torch.equal(b, layer.lora_B["default"].weight)


def test_a_config_of_a_member_of_the_pool_names_the_same_layers(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Its target_modules are whole paths, with the encoder's name before them."""
    bank = bank_of(tiny("bert"), Member(rank=4, scaling=2.0, targets="qkv+pooler", layers=[1], dropout=0.1))
    files = weight_files(bank, 0, SST, base_model="b", revision=None)
    (tmp_path / "adapter_config.json").write_text(json.dumps(files["adapter_config.json"]))
    again = bank_of(tiny("bert"), Member(peft=str(tmp_path), name="again"))
    assert again.paths == bank.paths
    assert [path.split(".")[-1] for path in again.paths[0]] == ["query", "key", "value", "dense"]
    assert (again.members[0].scaling, again.members[0].dropout) == (2.0, 0.1)


def test_pretrained_head_weights_are_kept(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """What a checkpoint brings of the head is kept; what it lacks is drawn from the member's seed."""
    classifier, _ = load_classifier(str(tiny("distilbert")), num_labels=5)
    classifier.save_pretrained(tmp_path)
    for file in tiny("distilbert").glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    heads = bank_of(tmp_path, Member()).member_state(0)[1]["sst"]
    assert torch.equal(heads["pre_classifier.weight"], classifier.pre_classifier.weight)
    three = Task(name="t", kind="multiclass", text=["x"], label_names=["a", "b", "c"])
    other = bank_of(tmp_path, Member(), tasks=[three]).member_state(0)[1]["t"]
    assert torch.equal(other["pre_classifier.weight"], classifier.pre_classifier.weight)
    assert other["classifier.weight"].shape == (3, 32)


def test_member_state_round_trip_and_mismatches(tiny: Callable[[str], Path]) -> None:
    bank = bank_of(tiny("bert"), *THREE)
    bank.weights.data.normal_()
    other = bank_of(tiny("bert"), *THREE)
    for index in range(3):
        other.load_member(index, *bank.member_state(index))
        again = other.member_state(index)
        assert all(torch.equal(again[0][p][0], bank.member_state(index)[0][p][0]) for p in again[0])
    out, wanted = other(row(batches(1)[0]))["sst"], bank(row(batches(1)[0]))["sst"]
    assert not torch.equal(out, wanted)  # the padding of `bank` was noise; a loaded member has zeros there
    adapter, heads = bank.member_state(0)
    with pytest.raises(ValueError, match="member 1 lacks"):
        other.load_member(1, adapter, heads)
    with pytest.raises(ValueError, match="lacks"):
        other.load_member(0, adapter, {"sst": {}})
    with pytest.raises(ValueError, match="shape"):
        other.load_member(0, adapter, {"sst": {**heads["sst"], "classifier.bias": torch.zeros(4)}})
    with pytest.raises(ValueError, match="no place for sst/extra"):
        other.load_member(0, adapter, {"sst": {**heads["sst"], "extra": torch.zeros(4)}})


def linear_names(base: Path, targets: str) -> set[str]:
    classifier, _ = load_classifier(str(base), num_labels=2)
    paths = target_paths(classifier.base_model, classifier.config.model_type, targets)
    return {p for p in paths if ".1." not in p}  # the first layer, and what is no layer


@pytest.mark.parametrize(
    ("family", "targets", "expected"),
    [
        ("bert", "qv", "attention.self.query attention.self.value"),
        ("bert", "qkv", "attention.self.query attention.self.key attention.self.value"),
        ("bert", "pooler", "/pooler.dense"),
        ("bert", "qkv+pooler", "attention.self.query attention.self.key attention.self.value /pooler.dense"),
        (
            "bert",
            "all-but-output",
            "attention.self.query attention.self.key attention.self.value attention.output.dense intermediate.dense "
            "/pooler.dense",
        ),
        (
            "bert",
            "all-linear",
            "attention.self.query attention.self.key attention.self.value attention.output.dense intermediate.dense "
            "output.dense /pooler.dense",
        ),
        ("bert", "attention.output.dense+key", "attention.self.key attention.output.dense"),
        ("roberta", "qv", "attention.self.query attention.self.value"),
        (
            "electra",
            "all-but-output",
            "/embeddings_project attention.self.query attention.self.key attention.self.value attention.output.dense "
            "intermediate.dense",
        ),
        ("deberta-v2", "qv", "attention.self.query_proj attention.self.value_proj"),
        ("distilbert", "qkv", "attention.q_lin attention.k_lin attention.v_lin"),
        ("distilbert", "all-but-output", "attention.q_lin attention.k_lin attention.v_lin attention.out_lin ffn.lin1"),
        ("modernbert", "qkv", "attn.Wqkv"),
        ("modernbert", "all-but-output", "attn.Wqkv attn.Wo mlp.Wi"),
    ],
)
def test_targets(tiny: Callable[[str], Path], family: str, targets: str, expected: str) -> None:
    layer = {"distilbert": "transformer.layer.0.", "modernbert": "layers.0."}.get(family, "encoder.layer.0.")
    wanted = {w[1:] if w[0] == "/" else layer + w for w in expected.split()}
    assert linear_names(tiny(family), targets) == wanted


@pytest.mark.parametrize(
    ("family", "targets", "message"),
    [
        ("modernbert", "qv", "use qkv"),
        ("roberta", "pooler", "no pooler of its own"),
        ("bert", "qvx", "no linear layer of this bert encoder ends in 'qvx'; expected qv, qkv"),
        ("bert", "qv+none", "none stands alone"),
        ("bert", "", "no linear layer"),
        ("bert", "layer", "no linear layer"),
    ],
)
def test_targets_that_cannot_be_had(tiny: Callable[[str], Path], family: str, targets: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        linear_names(tiny(family), targets)


def test_unsupported_family(tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config(n_embd=8, n_layer=1, n_head=1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="type 'gpt2' is not supported; supported: bert"):
        load_classifier(str(tmp_path), num_labels=2)


def test_frozen_weights_are_untouched(tiny: Callable[[str], Path]) -> None:
    bank = bank_of(tiny("bert"), *THREE, dropout=0.1)
    before = copy.deepcopy(bank.encoder.state_dict())
    train(bank, batches(3))
    assert all(torch.equal(v, bank.encoder.state_dict()[k]) for k, v in before.items())
    assert [n for n, p in bank.named_parameters() if p.requires_grad] == ["weights"]


def test_peft_config_of_a_member() -> None:
    from transformers import BertForSequenceClassification

    bert = BertForSequenceClassification(tiny_config("bert", 9))
    (member,) = expand_members([Member(rank=4, scaling=2.5)])
    config = peft_config(bert, ["a.query"], member, base_model="b", revision=None)
    assert config["r"] == 4
    assert config["lora_alpha"] == 10.0
    assert config["target_modules"] == ["bert.a.query"]
    assert config["modules_to_save"] == ["classifier"]
    assert "layers_to_transform" not in config
    assert config["lora_dropout"] == 0
    assert "init_lora_weights" not in config
    (member,) = expand_members([Member(rank=4, dropout=0.1, init="kaiming")])
    config = peft_config(bert, ["a.query"], member, base_model="b", revision=None, layers=[1])
    assert config["layers_to_transform"] == [1]
    assert (config["lora_dropout"], config["init_lora_weights"]) == (0.1, True)


@pytest.mark.parametrize(
    ("family", "targets", "dropout"),
    [
        ("bert", "intermediate.dense", "attention.self.dropout"),
        ("bert", "intermediate.dense", "attention.output.dropout"),
        ("modernbert", "mlp.Wo", "attn.out_drop"),
        ("modernbert", "mlp.Wo", "mlp.drop"),
    ],
)
def test_members_that_share_a_row_so_far_draw_their_own_masks(
    tiny: Callable[[str], Path], family: str, targets: str, dropout: str
) -> None:
    """Equal members, of which nothing differs in the layer where they start but the masks of one dropout."""
    entries = [Member(rank=2, targets=targets, layers=[1], name=name) for name in ("a", "b")]
    bank = bank_of(tiny(family), *entries)
    assert bank.starts == [1, 1]
    part = row(batches(1)[0])
    same = bank(part)["sst"]
    assert torch.equal(same[0], same[1])
    bank.encoder.set_submodule(f"{family_of(family).layers}.1.{dropout}", torch.nn.Dropout(0.5))
    other = bank(part)["sst"]
    assert not torch.allclose(other[0], other[1], atol=1e-4)
