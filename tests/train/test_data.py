"""Tokenising once, and the order of batches: the same for every member, device count and resumed run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_ensemble.bank.base_model import load_tokenizer
from lora_ensemble.errors import UserError
from lora_ensemble.tasks import PRESETS, Task
from lora_ensemble.text.packing import Tokens, unpack
from lora_ensemble.text.readers import Split
from lora_ensemble.train.batches import EvalBatches, TokenisedSplit, TrainBatches
from lora_ensemble.train.data import BankData, resolve_tasks


def split_of(n: int, tokenizer: Any, *, pairs: bool = False, max_length: int = 90) -> TokenisedSplit:
    words = ["the train was late", "good", "the hotel and the film were not bad at all"]
    one = [words[i % 3] for i in range(n)]
    texts = [one, [words[(i + 1) % 3] for i in range(n)]] if pairs else [one]
    ids = np.array([f"x{i}" for i in range(n)])
    return TokenisedSplit(Split(ids, texts, np.arange(n) % 2, []), tokenizer, max_length=max_length)


@pytest.fixture
def tokenizer(tiny: Callable[[str], Path]) -> Any:
    return load_tokenizer(str(tiny("bert")))


def test_a_batch_is_what_the_tokeniser_pads_without_the_padding(tokenizer: Any) -> None:
    split = split_of(7, tokenizer, pairs=True)
    rows = np.array([5, 0, 2])
    words = ["the train was late", "good", "the hotel and the film were not bad at all"]
    expected = tokenizer(
        [words[i % 3] for i in rows], [words[(i + 1) % 3] for i in rows], padding=True, return_token_type_ids=True
    )
    batch = split.batch(rows)
    mask = np.array(expected["attention_mask"], bool)
    for key in ("input_ids", "token_type_ids"):
        assert (
            batch[key].tolist() == np.array(expected[key])[mask].tolist() + [0] * 6
        )  # 17 + 8 + 17 tokens, filled up to 48
        assert unpack(batch, key, 0).tolist() == expected[key]
    assert batch["attention_mask"][:3].tolist() == expected["attention_mask"]
    assert batch["lengths"] == (17, 8, 17, 6)
    assert batch["examples"] == 3
    assert batch["position_ids"].tolist() == [i for n in (17, 8, 17, 6) for i in range(n)]
    assert batch["input_ids"][batch["first"]].tolist() == [tokenizer.cls_token_id] * 3 + [0]
    assert batch["token_type_ids"].max() == 1
    assert batch["labels"].tolist() == [1, 0, 0]
    assert batch["rows"].tolist() == [5, 0, 2]


def test_truncation_is_counted_and_said(tokenizer: Any) -> None:
    split = split_of(6, tokenizer, pairs=True, max_length=8)
    assert split.lengths.max() == 8
    # Pairs of 4 + 1, 1 + 10 and 10 + 4 words, each with 3 special tokens: 8, 14 and 17 tokens.
    assert split.notices == ["4 of 6 examples cut to 8 tokens, their heads kept (first ids: x1, x2, x4)"]
    assert split_of(6, tokenizer, pairs=True, max_length=17).notices == []
    one = split.batch(np.array([2]))["input_ids"][:8].tolist()
    assert (
        one
        == tokenizer(
            "the hotel and the film were not bad at all", "the train was late", truncation="longest_first", max_length=8
        )["input_ids"]
    )


@pytest.mark.parametrize(
    ("truncation", "most", "one", "two"),
    [
        ("head", 8, "the hotel and the film were", None),
        ("tail", 8, "film were not bad at all", None),
        ("head-tail", 8, "the hotel and bad at all", None),
        ("head-tail", 7, "the hotel and at all", None),  # of five, the beginning gets three
        ("head-tail", 4, "the all", None),
        ("head-tail", 12, "the hotel and the film were not bad at all", None),
        # Pairs: three special tokens, and what is left is shared as the tokeniser shares it.
        ("tail", 11, "not bad at all", "the train was late"),
        ("head-tail", 11, "the hotel at all", "the train was late"),
        ("tail", 9, "bad at all", "train was late"),
        ("head-tail", 9, "the hotel all", "the train late"),
        ("head-tail", 15, "the hotel and the not bad at all", "the train was late"),
    ],
)
def test_what_is_kept_of_long_texts(tokenizer: Any, truncation: Any, most: int, one: str, two: str | None) -> None:
    """By hand: each word is a token."""
    texts = ["the hotel and the film were not bad at all"], ["the train was late"]
    columns, expected = (texts[:1], [one]) if two is None else (texts, [one, two])
    tokens = Tokens(columns, tokenizer, max_length=most, truncation=truncation)
    found, wanted = tokens.row(np.array([0])), tokenizer(*expected, return_token_type_ids=True)
    n = len(wanted["input_ids"])
    assert tokens.lengths.tolist() == [n]
    assert tokens.cut == ([0] if n < (12 if two is None else 17) else [])
    assert found["input_ids"][:n].tolist() == wanted["input_ids"]
    heads = Tokens(columns, tokenizer, max_length=most)  # what is kept of frozen layers is kept by this
    assert (tokens.digest == heads.digest) == (truncation == "head" or not tokens.cut)
    assert found["token_type_ids"][:n].tolist() == wanted["token_type_ids"]


def test_who_cuts_otherwise_shares_no_tokens(demo_root: Path, tiny: Callable[[str], Path]) -> None:
    """Nor does a student's data, which has labels of its own."""
    same: dict[str, Any] = {"base_model": str(tiny("bert")), "root": str(demo_root), "tasks": ("sst",), "max_length": 6}
    head, tail, again = BankData(**same), BankData(**same, truncation="tail"), BankData(**same, truncation="tail")
    tail.tokenised = again.tokenised = head.tokenised
    for data in (head, tail, again):
        data.setup("fit")
    heads, tails = (data.splits["train"]["sst"] for data in (head, tail))
    assert again.splits["train"]["sst"] is tails
    assert heads.tokens.digest != tails.tokens.digest
    tail.teach("sst", np.eye(5)[tails.source.labels], Split(np.array([], str), [[]], None), {})
    assert tail.splits["train"]["sst"].tokens.digest == tails.tokens.digest


def test_tails_are_what_the_tokeniser_keeps_from_the_left(tiny: Callable[[str], Path]) -> None:
    from transformers import AutoTokenizer

    rng = np.random.default_rng(0)
    words = np.array(["the", "train", "was", "late", "hotel", "film", "good"])
    one, two = ([" ".join(rng.choice(words, rng.integers(0, 30))) for _ in range(40)] for _ in range(2))
    theirs = AutoTokenizer.from_pretrained(tiny("bert"), truncation_side="left")
    for columns in ([one], [one, two]):
        ours = Tokens(columns, load_tokenizer(str(tiny("bert"))), max_length=12, truncation="tail")
        assert 10 < len(ours.cut) < 40
        expected = theirs(*columns, truncation="longest_first", max_length=12)["input_ids"]
        assert [ours.row(np.array([i]))["input_ids"][:n].tolist() for i, n in enumerate(ours.lengths)] == expected


def test_a_slow_tokeniser_can_only_keep_heads(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    Tokens([["the train was late"]], tokenizer, max_length=5)
    with pytest.raises(UserError, match=r"data.truncation: tail needs a fast tokeniser"):
        Tokens([["the train was late"]], tokenizer, max_length=5, truncation="tail")


def batches(
    splits: dict[str, TokenisedSplit], *, epoch: int = 0, rank: int = 0, world: int = 1, **kw: Any
) -> TrainBatches:
    settings = {"batch_size": 4, "steps": "longest", "seed": 1} | kw
    return TrainBatches(splits=splits, rank=rank, world=world, epoch=lambda: epoch, **settings)


def rows_of(loader: TrainBatches, task: str) -> list[list[int]]:
    return [batch[task]["rows"].tolist() for batch in loader]


def test_an_epoch_sees_every_example_once(tokenizer: Any) -> None:
    splits = {"a": split_of(10, tokenizer)}
    first, again = rows_of(batches(splits), "a"), rows_of(batches(splits), "a")
    assert [len(r) for r in first] == [4, 4, 2]
    assert sorted(sum(first, [])) == list(range(10))
    assert first == again
    assert rows_of(batches(splits, epoch=1), "a") != first
    assert rows_of(batches(splits, seed=2), "a") != first


def test_a_task_that_ends_goes_on_shuffled_anew(tokenizer: Any) -> None:
    splits = {"a": split_of(20, tokenizer), "b": split_of(6, tokenizer)}
    loader = batches(splits)
    assert len(loader) == 5
    b = rows_of(loader, "b")
    assert [len(r) for r in b] == [4, 2, 4, 2, 4]
    assert sorted(b[0] + b[1]) == list(range(6)) == sorted(b[2] + b[3])
    assert b[0] + b[1] != b[2] + b[3]
    assert len(batches(splits, steps="shortest")) == 2
    # A task's order does not depend on its company.
    assert rows_of(loader, "a") == rows_of(batches({"a": splits["a"]}), "a")


def test_a_fixed_number_of_steps_goes_on_where_the_last_epoch_stopped(tokenizer: Any) -> None:
    splits = {"a": split_of(10, tokenizer)}
    flow = sum((rows_of(batches(splits, epoch=e, steps=2), "a") for e in range(3)), [])
    assert [len(r) for r in flow] == [4, 4, 2, 4, 4, 2]
    assert sorted(sum(flow[:3], [])) == sorted(sum(flow[3:], [])) == list(range(10))


def test_devices_share_each_batch(tokenizer: Any) -> None:
    splits = {"a": split_of(9, tokenizer)}
    whole = rows_of(batches(splits), "a")
    parts = [rows_of(batches(splits, rank=r, world=2), "a") for r in (0, 1)]
    for step, rows in enumerate(whole):
        assert sorted(parts[0][step] + parts[1][step]) == sorted(rows)
    assert [len(p[-1]) for p in parts] == [1, 0]  # one example left for two devices
    sizes = [batch["a"]["size"] for batch in batches(splits, rank=1, world=2)]
    assert sizes == [4, 4, 1]


@pytest.mark.parametrize("served", [0, 1, 3, 4])
def test_resuming_in_mid_epoch(tokenizer: Any, served: int) -> None:
    splits = {"a": split_of(20, tokenizer)}
    whole = rows_of(batches(splits), "a")
    first = batches(splits)
    stream = iter(first)
    for _ in range(served):
        next(stream)
    second = batches(splits)
    second.load_state_dict(first.state_dict())
    assert rows_of(second, "a") == whole[served:]
    # The next epoch starts at its beginning, also where this one was left before its end.
    for loader in (first, second):
        loader.epoch = lambda: 1
        assert rows_of(loader, "a") == rows_of(batches(splits, epoch=1), "a") != whole


def test_evaluation_sees_every_row_once_over_all_devices(tokenizer: Any) -> None:
    splits = {"a": split_of(11, tokenizer), "b": split_of(1, tokenizer)}
    seen: dict[str, list[int]] = {"a": [], "b": []}
    for rank in range(3):
        loader = EvalBatches({"dev": splits}, batch_size=2, rank=rank, world=3)
        given = list(loader)
        assert len(given) == len(loader) == math.ceil(4 / 2) + 1
        for batch in given:
            for task, part in batch.items():
                seen[task] += part["rows"].tolist()
                assert part["examples"] == len(part["rows"]) <= 2
    assert sorted(seen["a"]) == list(range(11))
    assert seen["b"] == [0]


def test_tokenised_once(demo_root: Path, tiny: Callable[[str], Path]) -> None:
    data = BankData(base_model=str(tiny("bert")), root=str(demo_root), tasks=["sst"])
    data.setup("fit")
    before = data.splits["train"]["sst"]
    data.setup("fit")
    data.setup("validate")
    assert data.splits["train"]["sst"] is before
    assert set(data.splits) == {"train", "dev"}


@pytest.mark.parametrize(
    ("kind", "labels", "says"),
    [
        ("multiclass", ["b", "b", "b"], "all 3 labels are the same (b)"),
        ("binary", ["0", "0.0", "0"], "all 3 labels are the same (0)"),
        ("regression", ["1.5", "1.50", "1.5"], "all 3 labels are the same (1.5)"),
        ("multiclass", ["b", "a", "b"], None),
    ],
)
def test_labels_that_are_all_the_same_are_told(
    tiny: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: Any,
    labels: list[str],
    says: str | None,
) -> None:
    for split, found in (("dev", labels), ("train", ["a", "b"] if kind == "multiclass" else ["0", "1"])):
        rows = [f"{split} {i},{label}\n" for i, label in enumerate(found)]
        (tmp_path / f"{split}.csv").write_text("text,label\n" + "".join(rows))
    names = ["a", "b"] if kind == "multiclass" else []
    task = Task(name="t", kind=kind, text=["text"], label_names=names, train="train.csv", dev="dev.csv")
    BankData(base_model=str(tiny("bert")), root=str(tmp_path), tasks=(task,)).setup("fit")
    train, dev = capsys.readouterr().out.split("t dev:")
    assert "all" not in train
    assert (f"{says}, so a score on them says nothing of how good a member is" in dev) == (says is not None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": []}, "data.tasks: the list is empty"),
        ({"tasks": ["sst2"]}, "'sst2' is no preset; presets: sst, quora, sts"),
        ({"tasks": ["sst", "sst"]}, "used twice"),
        ({"batch_size": 0}, "data.batch_size: 0"),
        ({"eval_batch_size": -1}, "data.eval_batch_size: -1"),
        ({"max_length": 2}, "data.max_length: 2"),
        ({"steps_per_epoch": 0}, "data.steps_per_epoch: 0"),
    ],
)
def test_mistakes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BankData(**settings)


def test_longer_than_the_encoder_takes(demo_root: Path, tiny: Callable[[str], Path]) -> None:
    data = BankData(base_model=str(tiny("bert")), root=str(demo_root), tasks=["sst"], max_length=500)
    with pytest.raises(UserError, match="takes at most 90 tokens"):
        data.setup("fit")


def test_a_task_of_ones_own() -> None:
    own = Task(name="own", kind="binary", text=["t"])
    assert resolve_tasks(["sts", own]) == [PRESETS["sts"], own]
