"""Pools of members with weights, for what reads new text: random adapters and heads, nothing is trained.

What the members say is computed by plain transformers and PEFT, one text after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pool_factory import LABELS, random_labels

from lora_ensemble.bank.base_model import encoder_fingerprint, load_classifier, load_tokenizer, tokenizer_fingerprint
from lora_ensemble.bank.families import accepts_token_types
from lora_ensemble.bank.lora import Member, expand_members
from lora_ensemble.bank.member_files import weight_files
from lora_ensemble.bank.model import Bank
from lora_ensemble.pool import MemberRecord, member_folder, write_examples, write_member
from lora_ensemble.tasks import Kind, Task

WORDS = ["good", "bad", "film", "the", "a", "story", "slow", "bright", "very", "not", "of", "music", "night"]
ENTRIES = (
    Member(rank=2, targets="qkv", scaling=2.0, seed=1),
    Member(rank=5, targets="all-linear", seed=2),
    Member(rank=3, targets="all-linear", layers="top-half", scaling=0.5, seed=3),
    Member(targets="none", seed=4),
)


def texts_of(n: int, columns: int, *, seed: int = 0, longest: int = 20) -> list[Any]:
    """n texts, or n pairs, of 1 to ``longest`` words."""
    rng = np.random.default_rng(seed)

    def one() -> str:
        return " ".join(rng.choice(WORDS, rng.integers(1, longest)))

    return [one() if columns == 1 else (one(), one()) for _ in range(n)]


def write_pool(
    pool: Path,
    base: Path,
    kind: Kind,
    *,
    columns: int = 1,
    entries: Sequence[Member] = ENTRIES,
    finetune: str = "lora",
    n: int = 24,
    max_length: int | None = None,
    truncation: str | None = None,
) -> list[Any]:
    """Write the entries' members of task "mine" with dev logits on n texts, which are returned."""
    task = Task(name="mine", kind=kind, text=["one", "two"][:columns], label_names=LABELS[kind])
    texts, labels = texts_of(n, columns), random_labels(kind, n)
    members = expand_members(list(entries), finetune=finetune)
    classifier, fresh = load_classifier(str(base), num_labels=task.num_outputs)
    fingerprint = encoder_fingerprint(classifier, fresh) | tokenizer_fingerprint(load_tokenizer(str(base)))
    bank = Bank(classifier, members=members, tasks=[task], fresh=fresh, train_encoder=finetune == "full")
    with torch.no_grad():
        generator = torch.Generator().manual_seed(len(members))
        for i in range(len(members)):
            # On what the member trains, and on nothing else: a block of zeros stays one.
            adapter, heads = bank.member_state(i)
            for t in [*(a for a, _ in adapter.values()), *(b for _, b in adapter.values()), *heads["mine"].values()]:
                t.add_(torch.randn(t.shape, generator=generator) * 0.2)
            bank.load_member(i, adapter, heads)
        if finetune == "full":
            for p in bank.encoder.parameters():
                p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    examples = write_examples(pool, "mine", "dev", [f"d{i}" for i in range(n)], labels)
    for i, member in enumerate(members):
        record = MemberRecord(
            **member.recorded(),
            task="mine",
            kind=kind,
            labels=task.labels,
            finished=True,
            examples={"dev": examples},
            text=task.text,
            base_model=str(base),
            base_fingerprint=fingerprint,
            finetune=finetune,
            settings={"max_length": max_length, **({} if truncation is None else {"truncation": truncation})},
        )
        files = weight_files(bank, i, task, base_model=str(base), revision=None)
        # Written twice: the second time with what PEFT makes of the first.
        record = write_member(pool, record, {**files, "dev.logits.npy": np.zeros((n, task.num_outputs), np.float32)})
        logits = peft_logits(member_folder(pool, "mine", member.name), base, texts, task.num_outputs, max_length or 90)
        write_member(pool, record, {**files, "dev.logits.npy": logits})
    return texts


def peft_logits(folder: Path, base: Path, texts: Sequence[Any], outputs: int, max_length: int = 90) -> np.ndarray:
    """(N, C) float32 logits of one member's folder, each text by itself, by transformers and PEFT alone."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    if (folder / "adapter_config.json").is_file():
        plain = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=outputs, ignore_mismatched_sizes=True
        )
        model: Any = PeftModel.from_pretrained(plain, str(folder))
        types = accepts_token_types(plain.base_model)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        types = accepts_token_types(model.base_model)
    model.eval()
    rows = []
    for text in texts:
        tokens = tokenizer(
            *([text] if isinstance(text, str) else text),
            truncation="longest_first",
            max_length=max_length,
            return_tensors="pt",
            return_token_type_ids=types,
        )
        with torch.no_grad():
            rows.append(model(**tokens).logits[0].numpy())
    return np.stack(rows).astype(np.float32)
