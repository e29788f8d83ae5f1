"""Members from settings: grids, names, and every mistake with its message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_ensemble.bank.families import layer_numbers
from lora_ensemble.bank.lora import Member, expand_members
from lora_ensemble.errors import UserError
from lora_ensemble.pool import MemberRecord


def test_a_list_is_a_grid() -> None:
    """Tolkunov's SST grid has 16 × 5 = 80 members."""
    members = expand_members([Member(rank=list(range(1, 17)), scaling=[1, 2, 3, 4, 5])])
    assert len(members) == 80
    assert len({m.name for m in members}) == 80
    assert [(m.rank, m.scaling) for m in members[:6]] == [(1, 1.0), (1, 2.0), (1, 3.0), (1, 4.0), (1, 5.0), (2, 1.0)]


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        ({"rank": 12, "scaling": 3, "lr": 1e-4}, "r12-c3-qv-lr1e-4-s11711"),
        ({"rank": 1, "scaling": 0.5, "lr": 2.5e-5, "seed": 3}, "r1-c0.5-qv-lr2.5e-5-s3"),
        ({"rank": 4, "lr": 0.01, "targets": "qkv+pooler"}, "r4-c1.0-qkv+pooler-lr1e-2-s11711".replace("1.0", "1")),
        ({"targets": "none", "lr": 1e-3, "rank": 99}, "head-lr1e-3-s11711"),
        ({"scaling": 10, "lr": 1.0}, "r8-c10-qv-lr1e0-s11711"),
        ({"name": "mine"}, "mine"),
        ({"layers": "top-half", "patience": 3}, "r8-c1-qv-top-half-lr1e-4-s11711-p3"),
        ({"layers": [5, 4, 5]}, "r8-c1-qv-l4+5-lr1e-4-s11711"),
        ({"layers": "top-2", "targets": "none", "patience": 1}, "head-lr1e-4-s11711-p1"),
        ({"layers": None}, "r8-c1-qv-lr1e-4-s11711"),
        ({"dropout": 0.0, "init": "normal", "lr_b": None, "weight_decay": None}, "r8-c1-qv-lr1e-4-s11711"),
        ({"dropout": 0.05, "init": "kaiming", "layers": "top-2"}, "r8-c1-qv-top-2-d0.05-kaiming-lr1e-4-s11711"),
        ({"lr_b": 1.6e-3, "weight_decay": 0.01, "patience": 2}, "r8-c1-qv-lr1e-4-b1.6e-3-wd0.01-s11711-p2"),
        ({"weight_decay": 0}, "r8-c1-qv-lr1e-4-wd0-s11711"),
        (
            {"targets": "none", "dropout": 0.1, "init": "kaiming", "lr_b": 1.0, "weight_decay": 0.1},
            "head-lr1e-4-wd0.1-s11711",
        ),
    ],
)
def test_names(entry: dict[str, Any], name: str) -> None:
    assert [m.name for m in expand_members([Member(**entry)])] == [name]


def test_names_tell_neighbouring_rates_apart() -> None:
    names = {m.name for m in expand_members([Member(lr=[1e-4, 1.0000001e-4, 9.999999e-5])])}
    assert len(names) == 3


def test_layers_are_a_grid_too_and_a_list_of_numbers_is_one_value() -> None:
    grid = expand_members([Member(rank=[2, 4], layers=["all", "top-half", [0, 5]])])
    assert [m.layers for m in grid] == ["all", "top-half", [0, 5]] * 2
    assert [m.layers for m in expand_members([Member(layers=[4, 5])])] == [[4, 5]]


@pytest.mark.parametrize(
    ("layers", "depth", "numbers"),
    [
        ("all", 3, [0, 1, 2]),
        ("top-half", 6, [3, 4, 5]),
        ("top-half", 5, [2, 3, 4]),
        ("top-third", 12, [8, 9, 10, 11]),
        ("top-third", 22, list(range(14, 22))),
        ("top-1", 2, [1]),
        ([5, 0], 6, [0, 5]),
    ],
)
def test_layers_by_name(layers: str | list[int], depth: int, numbers: list[int]) -> None:
    assert layer_numbers(layers, depth) == numbers


@pytest.mark.parametrize("layers", ["top-7", "top-0", "top", "half", "", [6], [-1, 2]])
def test_layers_that_an_encoder_has_not(layers: str | list[int]) -> None:
    with pytest.raises(UserError, match=r"expected all, top-half, top-third, top-1 to top-6, or .*has 6 layers"):
        layer_numbers(layers, 6)


def test_full_fine_tuning_has_no_rank() -> None:
    (member,) = expand_members([Member(lr=1e-5)], finetune="full")
    assert (member.name, member.adapted) == ("full-lr1e-5-s11711", False)
    assert (member.recorded()["rank"], member.recorded()["targets"]) == (None, None)


@pytest.mark.parametrize("finetune", ["lora", "full"])
def test_what_a_record_says_comes_back(finetune: str) -> None:
    """And is what earlier versions wrote, into records and checkpoints: nothing is adapted is None."""
    entries = (
        [Member(targets="none", rank=5, lr=1e-3)]
        if finetune == "full"
        else [
            Member(rank=[2, 3]),
            Member(layers=["top-half", [0, 4]], patience=2),
            Member(targets="none", patience=1, bag=[False, True]),
            Member(dropout=[0.0, 0.1], init="kaiming", lr_b=[None, 1e-3], weight_decay=[0.0, 0.1]),
        ]
    )
    later: dict[str, Any] = {"layers": "all", "patience": None, "dropout": 0.0, "init": "normal", "bag": False}
    later |= {"lr_b": None, "weight_decay": None}
    for member in expand_members(entries, finetune=finetune):
        says = member.recorded()
        assert sorted(says) == sorted(["lr", "name", "rank", "scaling", "seed", "targets", *later])
        assert [says[k] is None for k in later] == [getattr(member, k) == default for k, default in later.items()]
        assert [says[k] is None for k in ("rank", "scaling", "targets")] == [not member.adapted] * 3
        record = MemberRecord(task="t", kind="binary", **says)
        assert Member.of_record(record) == member
        assert expand_members([member], finetune=finetune) == [member]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "the list is empty"),
        ([{"rank": 0}], r"members\[0\].rank: 0; expected a rank of at least 1"),
        ([{}, {"rank": [4, -2]}], r"members\[1\].rank: -2"),
        ([{"lr": 0}], "lr: 0"),
        ([{"lr": float("nan")}], "lr: nan"),
        ([{"scaling": -1}], "scaling: -1"),
        ([{"seed": -1}], "seed: -1"),
        ([{"patience": 0}], r"members\[0\].patience: 0; expected a number of dev evaluations"),
        ([{"dropout": 1.0}], r"members\[0\].dropout: 1.0; expected a probability from 0 to below 1"),
        ([{"dropout": float("nan")}], r"dropout: nan"),
        ([{"lr_b": [None, 0.0]}], r"lr_b: 0.0; expected a learning rate above 0, or null for lr"),
        ([{"weight_decay": -0.1}], r"weight_decay: -0.1; expected 0 or more, or null for model.weight_decay"),
        ([{"init": "gaussian"}], r"init: gaussian; expected normal or kaiming"),
        ([{"layers": []}], "empty list"),
        ([{"rank": []}], "empty list"),
        ([{"rank": None}], r"members\[0\].rank: None"),
        ([{"seed": None}], r"members\[0\].seed: None"),
        ([{}, {}], "members 0 and 1 are both named 'r8-c1-qv-lr1e-4-s11711'"),
        ([{"name": "x"}, {"rank": 2, "name": "x"}], "both named 'x'"),
        ([{"name": "x", "rank": [1, 2]}], "name 'x' for a grid of 2"),
        ([{"name": "../x"}], "member name '../x'"),
        ([{"name": "examples"}], "member name 'examples'"),
        ([{"rank": [1, 2], "targets": "none"}], "both named 'head-"),
    ],
)
def test_mistakes(entries: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        expand_members([Member(**e) for e in entries])


def test_full_fine_tuning_of_two_is_refused() -> None:
    with pytest.raises(UserError, match="2 members with finetune: full"):
        expand_members([Member(lr=[1e-5, 2e-5])], finetune="full")


def saved_by_peft(folder: Path, **settings: Any) -> str:
    from peft import LoraConfig

    LoraConfig(**settings).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        ({"task_type": "SEQ_CLS"}, {"rank": 8, "scaling": 1.0, "targets": "qv"}),  # PEFT's defaults
        (
            {"r": 4, "lora_alpha": 16, "target_modules": ["value", "query"], "lora_dropout": 0.1},
            {"rank": 4, "scaling": 4.0, "targets": "query+value", "dropout": 0.1},
        ),
        ({"r": 16, "lora_alpha": 8, "use_rslora": True}, {"rank": 16, "scaling": 2.0}),
        ({"target_modules": "all-linear", "modules_to_save": ["classifier", "score"]}, {"targets": "all-linear"}),
        ({"target_modules": ["key"], "layers_to_transform": [3, 1]}, {"targets": "key", "layers": [1, 3]}),
        ({"target_modules": ["key"], "layers_to_transform": 0}, {"targets": "key", "layers": [0]}),
    ],
)
def test_a_config_of_peft_stands_for_an_entry(tmp_path: Path, given: dict[str, Any], settings: dict[str, Any]) -> None:
    folder = saved_by_peft(tmp_path, **given)
    expected = {"rank": 8, "scaling": 1.0, "targets": "qv", "init": "kaiming", **settings}
    for path in (folder, f"{folder}/adapter_config.json"):
        two = expand_members([Member(peft=path, lr=[1e-3, 2e-3], seed=5, patience=2, weight_decay=0.1)])
        same = {"seed": 5, "patience": 2, "weight_decay": 0.1}
        assert two == expand_members([Member(**expected, **same, lr=[1e-3, 2e-3])])
    assert expand_members([Member(peft=folder, name="mine")])[0].name == "mine"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"use_dora": True}, "use_dora is True, which no member here can have"),
        ({"rank_pattern": {"query": 2}}, "rank_pattern is {'query': 2}"),
        ({"alpha_pattern": {"query": 2}}, "alpha_pattern is"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"modules_to_save": ["embeddings"]}, "modules_to_save is"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"layer_replication": [(0, 2)]}, "layer_replication is"),
        ({"init_lora_weights": "gaussian"}, "init_lora_weights is 'gaussian'"),
        ({"init_lora_weights": False}, "init_lora_weights is False"),
        ({"target_modules": ".*query"}, r"target_modules is '\.\*query'"),
        ({"exclude_modules": ["key"]}, "exclude_modules is"),
        ({"task_type": "CAUSAL_LM"}, "task_type is 'CAUSAL_LM'"),
        ({"layers_to_transform": [1], "layers_pattern": "layer"}, "layers_pattern is"),
    ],
)
def test_what_no_member_can_have_of_peft_is_refused_by_name(
    tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    folder = saved_by_peft(tmp_path, **given)
    with pytest.raises(UserError, match=rf"members\[0\].peft: .*adapter_config.json: {message}"):
        expand_members([Member(peft=folder)])


def test_a_config_of_peft_beside_its_own_settings(tmp_path: Path) -> None:
    folder = saved_by_peft(tmp_path, r=4)
    for entry in ({"rank": 16}, {"rank": [8, 16]}, {"dropout": 0.1}, {"layers": "top-1"}, {"targets": "qkv"}):
        with pytest.raises(UserError, match=rf"members\[0\].{next(iter(entry))}: .* leave one of them out"):
            expand_members([Member(peft=folder, **entry)])
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": "4"}))
    with pytest.raises(UserError, match="r is '4'"):
        expand_members([Member(peft=folder)])
    for content in ("[]", "{", json.dumps({"peft_type": "IA3"})):
        (tmp_path / "adapter_config.json").write_text(content)
        with pytest.raises(UserError, match="not a LoraConfig that PEFT saved"):
            expand_members([Member(peft=folder)])
    with pytest.raises(UserError, match=r"nowhere: not a LoraConfig that PEFT saved"):
        expand_members([Member(peft=str(tmp_path / "nowhere"))])
