"""Packed rows against transformers' own padded forward, in every family and precision; and what is not computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILY_NAMES, packed
from test_model import THREE, bank_of, batches, sst_losses

import lora_ensemble.bank.encode as encode
from lora_ensemble.bank.base_model import load_classifier
from lora_ensemble.bank.families import accepts_token_types
from lora_ensemble.bank.lora import Member, expand_members, single
from lora_ensemble.bank.model import Bank
from lora_ensemble.tasks import PRESETS
from lora_ensemble.text.readers import Split
from lora_ensemble.train.batches import TokenisedSplit
from lora_ensemble.train.frozen import FrozenStates

PACKED = [f for f in FAMILY_NAMES if f != "deberta-v2"]


def learned(bank: Bank) -> Bank:
    """The bank with B and heads that matter."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(bank.weights.shape, generator=generator) * 0.3
    bank.weights.data += noise
    for i, state in enumerate([bank.member_state(i) for i in range(len(bank.members))]):
        bank.load_member(i, *state)  # puts zeros back where a member has nothing
    return bank


def merged(bank: Bank, base: Path, index: int, batch: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A member merged into a plain transformers model by hand, and the padded batch for it."""
    model, _ = load_classifier(str(base), num_labels=5, head_dropout=0.0, encoder_dropout=0.0)
    adapter, heads = bank.member_state(index)
    with torch.no_grad():
        for path, (a, b) in adapter.items():
            scaling = single(bank.members[index].scaling)
            model.base_model.get_submodule(path).weight += scaling * b @ a
        own = dict(model.named_parameters())
        for name, value in heads["sst"].items():
            own[name].copy_(value)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    if not accepts_token_types(bank.encoder):
        del inputs["token_type_ids"]
    return model, inputs


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_logits_of_a_row_are_those_of_merged_transformers_models(tiny: Callable[[str], Path], family: str) -> None:
    """float32 to 2e-5 with and without gradients; bf16 no farther from float32 than transformers' own autocast."""
    bank = learned(bank_of(tiny(family), *THREE))
    batch = batches(1, b=7, seed=2)[0]["sst"]
    together = bank({"sst": packed(batch)})["sst"].detach()
    with torch.inference_mode():
        evaluated = bank.eval()({"sst": packed(batch)})["sst"]
    with torch.autocast("cpu", torch.bfloat16):
        half = bank.train()({"sst": packed(batch)})["sst"].detach()
    assert float(together.std()) > 0.1
    for index in range(len(THREE)):
        model, inputs = merged(bank, tiny(family), index, batch)
        with torch.no_grad():
            wanted = model(**inputs).logits
            with torch.autocast("cpu", torch.bfloat16):
                theirs = model(**inputs).logits
        torch.testing.assert_close(together[index], wanted, rtol=0, atol=2e-5)
        torch.testing.assert_close(evaluated[index], wanted, rtol=0, atol=2e-5)
        error, usual = ((x.float() - wanted).abs().max() for x in (half[index], theirs))
        assert 0 < float(error) < 2 * float(usual) + 0.005 * float(wanted.abs().max()), (index, error, usual)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_an_example_does_not_see_the_others_in_its_row(tiny: Callable[[str], Path], family: str) -> None:
    bank = learned(bank_of(tiny(family), *THREE))
    batch = batches(1, b=5)[0]["sst"]
    other = {k: v.clone() for k, v in batch.items()}
    other["input_ids"][1:] = torch.where(other["attention_mask"][1:].bool(), 7, 0)
    a, b = (bank({"sst": packed(x)})["sst"] for x in (batch, other))
    assert torch.equal(a[:, 0], b[:, 0])
    assert not torch.allclose(a[:, 1:], b[:, 1:], atol=1e-3)


@pytest.mark.parametrize("family", PACKED)
def test_only_what_the_head_reads_and_the_lowest_adapter_needs(
    tiny: Callable[[str], Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last layer's queries are one an example; below the lowest adapter nothing has a gradient, and all share."""
    seen: list[tuple[int, int, bool]] = []
    original = encode.attend

    def spy(q: Any, k: Any, v: Any, *args: Any, **kw: Any) -> Any:
        seen.append((len(q), q.shape[1], q.requires_grad or k.requires_grad or v.requires_grad))
        return original(q, k, v, *args, **kw)

    monkeypatch.setattr(encode, "attend", spy)
    classifier, _ = load_classifier(str(tiny(family)), num_labels=5)
    inside = [p for p, m in classifier.base_model.named_modules() if isinstance(m, torch.nn.Linear) and ".1." in p]
    bank = bank_of(tiny(family), *(Member(rank=2, targets=inside[0], seed=s) for s in (1, 2)))
    part = packed(batches(1, b=3)[0]["sst"])
    sst_losses(bank, batches(1, b=3)[0]).sum().backward()
    tokens, examples = len(part["input_ids"]), len(part["lengths"])
    assert seen == [(1, tokens, False), (2, examples, True)]


def test_mean_pooling_reads_every_token(tiny: Callable[[str], Path]) -> None:
    """ModernBERT's other way of pooling, against transformers'."""
    classifier, fresh = load_classifier(str(tiny("modernbert")), num_labels=5, head_dropout=0.0)
    classifier.config.classifier_pooling = "mean"
    batch = batches(1, b=5)[0]["sst"]
    model = classifier.eval()
    with torch.no_grad():
        wanted = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    head = {n: p.clone() for n, p in classifier.named_parameters() if not n.startswith("model.")}
    bank = Bank(classifier, members=expand_members([Member(targets="none")]), tasks=[PRESETS["sst"]], fresh=fresh)
    adapter, heads = bank.member_state(0)
    bank.load_member(0, adapter, {"sst": {n: head[n] for n in heads["sst"]}})
    torch.testing.assert_close(bank.eval()({"sst": packed(batch)})["sst"][0], wanted, rtol=0, atol=2e-6)


def test_frozen_weights_that_change_are_cast_anew(tiny: Callable[[str], Path]) -> None:
    """The casts are kept, but never kept too long."""
    bank = bank_of(tiny("bert"), Member(targets="qv"))
    batch = {"sst": packed(batches(1)[0]["sst"])}
    with torch.autocast("cpu", torch.bfloat16):
        before = bank(batch)["sst"]
        state = {n: t * 1.5 for n, t in bank.encoder_state().items()}
        bank.load_encoder(state)
        after = bank(batch)["sst"]
    assert not torch.allclose(before, after, atol=1e-2)


def test_fused_weights_of_a_trained_encoder_have_gradients(tiny: Callable[[str], Path]) -> None:
    """After an evaluation too, and in each of two passes before a step."""
    bank = bank_of(tiny("bert"), Member(targets="none"), train_encoder=True)
    batch, query = batches(1)[0], bank.encoder.get_submodule("encoder.layer.0.attention.self.query")
    with torch.no_grad():
        bank({"sst": packed(batch["sst"])})
    sst_losses(bank, batch).sum().backward()
    once = query.weight.grad.clone()
    assert float(once.abs().max()) > 0
    sst_losses(bank, batch).sum().backward()
    torch.testing.assert_close(query.weight.grad, 2 * once)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_evaluation_first_does_not_spoil_training(tiny: Callable[[str], Path], family: str) -> None:
    """What is kept from an evaluation, which runs in inference mode, can be used where gradients are wanted."""
    bank = bank_of(tiny(family), *THREE)
    batch = batches(1)[0]
    for precision in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            with torch.inference_mode():
                bank.eval()({"sst": packed(batch["sst"])})
            sst_losses(bank.train(), batch).sum().backward()
    assert bank.weights.grad is not None


def only(encoder: Any, place: str) -> None:
    """Turn every dropout of an encoder off but one; ``attention_dropout`` is ModernBERT's, which is no module."""
    for name, module in encoder.named_modules():
        # DeBERTa's dropout of positions is wrapped in the bank.
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5 if name.removesuffix(".base") == place else 0.0
        elif hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5 if place == "attention_dropout" else 0.0
    encoder.config.attention_dropout = 0.5 if place == "attention_dropout" else 0.0


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_dropout_that_transformers_has_acts_on_every_member(tiny: Callable[[str], Path], family: str) -> None:
    """One at a time: where transformers' own forward is random, two equal members differ, and nowhere else.

    With gradients and without, for the two ways of attention on a CPU.
    """
    batch = batches(1, b=5)[0]["sst"]
    plain, fresh = load_classifier(str(tiny(family)), num_labels=5, head_dropout=0.0, encoder_dropout=0.5)
    classifier, _ = load_classifier(str(tiny(family)), num_labels=5, head_dropout=0.0, encoder_dropout=0.5)
    twins = [Member(seed=5, name=name, targets="qkv") for name in ("one", "two")]
    bank = Bank(classifier, members=expand_members(twins), tasks=[PRESETS["sst"]], fresh=fresh).double()
    plain = plain.double().train()  # in float64 rounding is far below the least effect, that of DeBERTa's positions
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "token_type_ids")}
    places = [n for n, m in plain.base_model.named_modules() if isinstance(m, torch.nn.Dropout)]
    places += ["attention_dropout"] if family == "modernbert" else []
    acting = 0

    def differ(a: torch.Tensor, b: torch.Tensor) -> bool:
        return not torch.allclose(a, b, rtol=0, atol=1e-12)

    for place in [*places, "none"]:
        only(plain.base_model, place)
        only(bank.encoder, place)
        with torch.no_grad():
            wanted = differ(plain(**inputs).logits, plain(**inputs).logits)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                one, two = bank({"sst": packed(batch)})["sst"]
            assert differ(one, two) == wanted, (place, grad)
        acting += wanted
        assert not (wanted and place == "none")
    assert acting >= 5


# Members that leave the encoder as it is


MIXED = (
    Member(targets="none", lr=1e-2, seed=3),
    Member(rank=3, targets="qkv", lr=3e-3, seed=1),
    Member(rank=2, targets="pooler", lr=1e-2, seed=4),
    Member(rank=4, targets="qkv", layers=[1], lr=1e-2, seed=5),
)


def split_of(n: int, seed: int = 0, max_length: int = 60) -> TokenisedSplit:
    class Words:
        def __call__(self, texts: list[str], max_length: int | None = None, **_: Any) -> dict[str, Any]:
            rows = [[2, *(5 + int(w) for w in t.split()), 3][:max_length] for t in texts]
            return {"input_ids": rows, "token_type_ids": [[0] * len(r) for r in rows]}

    g = np.random.default_rng(seed)
    texts = [" ".join(map(str, g.integers(0, 50, g.integers(1, 12)))) for _ in range(n)]
    split = Split(np.array([f"i{k}" for k in range(n)]), [texts], g.integers(0, 5, n), [])
    return TokenisedSplit(split, Words(), max_length=max_length)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_frozen_members_train_the_same_with_states_kept(
    tiny: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    """Kept against run anew in every step, dropout off: the same losses; and every block of examples computed once."""
    entries = [m for m in MIXED if m.targets != "pooler" or family == "bert"]
    split, steps = split_of(150), [np.arange(k, k + 5) * 7 % 150 for k in range(0, 40, 4)]
    seen = {int(np.argsort(np.argsort(split.lengths, kind="stable"))[row]) // 8 for rows in steps for row in rows}
    history = []
    for frozen_dropout in (False, True):
        bank = bank_of(tiny(family), *entries, frozen_dropout=frozen_dropout).double()
        assert bank.frozen_layers == ([] if frozen_dropout else [2] if family == "deberta-v2" else [1, 2])
        kept, calls = FrozenStates(bank, {}, tmp_path, most=2**30), 0
        original = bank.frozen_states

        def counted(batch: Any, original: Any = original) -> Any:
            nonlocal calls
            calls += 1
            return original(batch)

        optimizer = torch.optim.SGD([bank.weights], lr=0.1)
        losses = []
        for rows in [*steps, *steps]:
            batch = split.batch(rows)
            bank.frozen_states = counted  # type: ignore[method-assign]
            states = kept(split, rows)
            bank.frozen_states = original  # type: ignore[method-assign]
            logits = bank({"sst": batch}, {"sst": states})["sst"]
            loss = torch.stack([torch.nn.functional.cross_entropy(m, batch["labels"]) for m in logits])
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            losses.append(loss.detach())
        assert calls == (0 if frozen_dropout else len(seen))
        history.append(torch.stack(losses))
    torch.testing.assert_close(history[0], history[1], rtol=0, atol=1e-11)
    assert float((history[0][0] - history[0][-1]).abs().min()) > 1e-3


def test_frozen_members_have_no_encoder_dropout_unless_asked(tiny: Callable[[str], Path]) -> None:
    for frozen_dropout in (False, True):
        classifier, fresh = load_classifier(str(tiny("bert")), num_labels=5, head_dropout=0.0, encoder_dropout=0.5)
        bank = Bank(
            classifier,
            members=expand_members(list(MIXED)),
            tasks=[PRESETS["sst"]],
            fresh=fresh,
            frozen_dropout=frozen_dropout,
        )
        batch = {"sst": packed(batches(1)[0]["sst"])}
        a, b = bank(batch)["sst"], bank(batch)["sst"]
        same = [torch.equal(a[i], b[i]) for i in range(4)]
        assert same == ([False] * 4 if frozen_dropout else [True, False, True, False])
