"""Members from settings: grids, names, and every mistake with its message."""

from __future__ import annotations

from typing import Any

import pytest

from lora_ensemble.bank.lora import Member, expand_members, layer_numbers
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
        else [Member(rank=[2, 3]), Member(layers=["top-half", [0, 4]], patience=2), Member(targets="none", patience=1)]
    )
    for member in expand_members(entries, finetune=finetune):
        says = member.recorded()
        assert sorted(says) == ["layers", "lr", "name", "patience", "rank", "scaling", "seed", "targets"]
        assert (says["layers"] is None) == (member.layers == "all")
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
