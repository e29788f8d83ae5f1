"""The selection: worked out by hand, against brute force, each tie rule, and what must not change it."""

from fractions import Fraction

import numpy as np
import pytest
from by_others import probabilities, worth
from hypothesis import given, settings
from hypothesis import strategies as st
from pool_factory import random_labels, random_logits
from sklearn.metrics.pairwise import cosine_similarity

from lora_ensemble.dicor.choose.methods import Dicor, Omni
from lora_ensemble.dicor.estimate.honest import estimate
from lora_ensemble.dicor.members import Dev
from lora_ensemble.dicor.options import Options, check, method_of
from lora_ensemble.errors import UserError

KINDS = ("multiclass", "binary", "regression")


def binary(*rows):
    """Logits (M, N, 1) of members that decide as the rows say: "0110"."""
    return np.array([[[1.0 if c == "1" else -1.0] for c in row] for row in rows])


def fitted(logits, labels, names, *, kind="binary", similarity="cosine", strategy="mean", **sizes):
    return Dicor(similarity=similarity, strategy=strategy, **sizes).fit(logits, labels, kind=kind, names=names)


def chosen_names(logits, labels, names, **how):
    return fitted(logits, labels, names, **how).names_


ONES = np.ones(8, int)


def test_selection_worked_out_by_hand():
    """a is right 7 times, b 6, c 5 times. b agrees with a on 7 of 8, c on 4 of 8, d on 0 but is no candidate."""
    names, logits = list("dcba"), binary("00000001", "00011111", "11111100", "11111110")
    found = fitted(logits, ONES, names, size=3, top_k=3)
    assert found.names_ == ["a", "c", "b"]
    assert found.members_ == [3, 1, 2]
    assert found.scores_.tolist() == [7 / 8, 5 / 8, 6 / 8]
    assert found.choice_.similarities == [[], [4 / 8], [7 / 8, 3 / 8]]
    # Were d a candidate, it would come second; then b: (7 + 1) / 2 of 8, as c: (4 + 4) / 2; b by its score.
    assert chosen_names(logits, ONES, names, size=3, top_k=4) == ["a", "d", "b"]


def test_the_mean_similarity_counts_not_the_largest_nor_the_least_nor_the_last():
    """Similarity to a and then b: c 0.6 and 0.2, d 0.5 and 0.5, e 0.9 and 0.1. The mean takes c; the largest would
    take d, the least or the last alone e."""
    logits = binary("1111111111", "1100000000", "0011111100", "1011110000", "0111111111")
    found = fitted(logits, np.ones(10, int), list("abcde"), size=3, top_k=5)
    assert found.members_ == [0, 1, 2]
    assert found.choice_.similarities[2] == [0.6, 0.2]


def brute_force(logits, labels, names, kind, similarity, size, top_k):
    """The rules read aloud, with scikit-learn's and scipy's scores, losses and similarities."""
    p = probabilities(logits, kind)
    scores, loss = ([sign * worth(one, labels, kind, by) for one in p] for by, sign in (("score", 1), ("loss", -1)))
    values = logits.astype(float)
    if kind == "multiclass":
        values = values - values.mean(-1, keepdims=True)
    values = values.reshape(len(values), -1)
    if kind != "regression" and similarity == "cosine":
        values = np.eye(p.shape[-1])[p.argmax(-1)].reshape(len(values), -1)
    alike = cosine_similarity(values) if similarity == "cosine" else np.corrcoef(values)
    defined = [m for m in range(len(names)) if not np.isnan(scores[m])]
    left = sorted(defined, key=lambda m: (-round(scores[m], 9), round(loss[m], 9), names[m]))[:top_k]
    place = {m: i for i, m in enumerate(left)}
    chosen = [left.pop(0)]
    while len(chosen) < size:
        left.sort(key=lambda m: (round(np.mean([alike[m, c] for c in chosen]), 9), place[m]))
        chosen.append(left.pop(0))
    return [names[m] for m in chosen]


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    similarity=st.sampled_from(["cosine", "pearson"]),
    seed=st.integers(0, 10**6),
    size=st.integers(1, 6),
    more=st.integers(0, 6),
    n=st.sampled_from([6, 40]),
)
def test_selection_is_what_brute_force_finds(kind, similarity, seed, size, more, n):
    """Few examples (6) make many ties, so the tie rules are compared too."""
    labels = random_labels(kind, n, seed=seed)
    logits = random_logits(kind, labels, 12, seed=seed + 1)
    names = [f"m{i}" for i in np.random.default_rng(seed).permutation(12)]
    sizes = {"size": size, "top_k": size + more}
    found = chosen_names(logits, labels, names, kind=kind, similarity=similarity, **sizes)
    assert found == brute_force(logits, labels, names, kind, similarity, **sizes)


def test_ranking_tie_goes_by_name():
    for names in (["a", "b"], ["b", "a"]):
        assert chosen_names(binary("1100", "0011"), np.ones(4, int), names, size=1, top_k=1) == ["a"]
        assert chosen_names(binary("1100", "0011"), np.ones(4, int), names, size=2, top_k=2) == ["a", "b"]


def test_least_similarity_tie_goes_by_score():
    """Both agree with the best on 4 of 8; z is right 5 times, b 3 times."""
    logits = binary("11111110", "00001110", "00011111")
    assert chosen_names(logits, ONES, ["best", "b", "z"], size=2, top_k=3) == ["best", "z"]


def test_least_similarity_tie_of_equal_scores_goes_by_name():
    logits = binary("11111110", "00011111", "11100011")
    assert chosen_names(logits, ONES, ["best", "y", "x"], size=2, top_k=3) == ["best", "x"]
    assert chosen_names(logits, ONES, ["best", "x", "y"], size=2, top_k=3) == ["best", "x"]


def test_similarities_that_differ_by_rounding_only_tie():
    """0.1 + 0.2 + 0.6 is not 0.6 + 0.2 + 0.1 in floating point; in fractions it is."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        bits = rng.integers(2, size=(8, 10))
        ranking = sorted(range(8), key=lambda m: (-bits[m].sum(), m))
        chosen = [ranking[0]]
        while len(chosen) < 6:
            agree = {m: Fraction(sum(int((bits[m] == bits[c]).sum()) for c in chosen), 10) for m in ranking}
            chosen.append(min((m for m in ranking if m not in chosen), key=lambda m: (agree[m], ranking.index(m))))
        logits = np.where(bits, 1.0, -1.0)[..., None]
        names = [f"m{m}" for m in range(8)]
        assert fitted(logits, np.ones(10, int), names, size=6, top_k=8).members_ == chosen


def test_all_members_alike_are_chosen_by_name():
    """The same decisions and the same losses on other examples: the very same logits would be left out as copies."""
    logits = binary(*["1101"] * 4) * np.array([[1, 2, 9, 3], [2, 3, 9, 1], [3, 1, 9, 2], [3, 2, 9, 1]])[..., None]
    assert chosen_names(logits, np.ones(4, int), list("cabd"), size=3, top_k=4) == ["a", "b", "c"]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    permutation=st.permutations(range(5)),
    similarity=st.sampled_from(["cosine", "pearson"]),
    strategy=st.sampled_from(["mean", "majority"]),
)
def test_renumbering_the_classes_changes_nothing(seed, permutation, similarity, strategy):
    """The class called k becomes permutation[k], in logits and labels: same members, same decisions by name."""
    permutation = np.array(permutation)
    labels = random_labels("multiclass", 12, seed=seed)
    logits = random_logits("multiclass", labels, 8, seed=seed + 1)
    renumbered = np.empty_like(logits)
    renumbered[..., permutation] = logits
    names, ranks = [f"m{i}" for i in range(8)], [None, 1, 1, 2, 3, 3, 3, 4]
    how = {"size": 4, "top_k": 6, "similarity": similarity, "strategy": strategy}
    before = Dicor(**how).fit(logits, labels, kind="multiclass", names=names, ranks=ranks)
    after = Dicor(**how).fit(renumbered, permutation[labels], kind="multiclass", names=names, ranks=ranks)
    assert after.members_ == before.members_
    np.testing.assert_array_equal(after.predict(renumbered), permutation[before.predict(logits)])


def test_a_constant_member_has_no_pearson_score_and_is_left_out_by_name():
    labels = random_labels("regression", 20)
    logits = random_logits("regression", labels, 4)
    logits[2] = 0.1
    found = fitted(logits, labels, list("abcd"), kind="regression", similarity="pearson", size=4, top_k=4)
    assert sorted(found.names_) == ["a", "b", "d"]
    assert found.notices_ == [
        "member c: its dev predictions are constant (all 0.1), so its Pearson r is undefined; left out"
    ]


def test_constant_labels_are_not_the_members_fault():
    logits = random_logits("regression", random_labels("regression", 20), 2)
    with pytest.raises(UserError, match="dev labels are all the same"):
        fitted(logits, np.full(20, 3.0), ["a", "b"], kind="regression", size=1, top_k=1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": 0}, "size 0: an ensemble needs at least one member"),
        ({"top_k": 0}, "top_k 0: there must be at least one candidate"),
        ({"trade_off": 1.5}, "trade_off 1.5: expected 0"),
        ({"strategy": "majority"}, "regression has values, not classes"),
    ],
)
def test_parameters_that_make_no_sense(wrong, message):
    labels = random_labels("regression", 20)
    with pytest.raises(UserError, match=message):
        Dicor(**wrong).fit(random_logits("regression", labels, 4), labels, kind="regression").predict(
            random_logits("regression", labels, 4)
        )


def paper(kind, members, **options):
    return method_of("dicor", kind, members, Options(**options))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("multiclass", Dicor(size=11, top_k=30, similarity="cosine", strategy="majority")),
        ("binary", Dicor(size=4, top_k=30, similarity="cosine", strategy="majority")),
        ("regression", Dicor(size=10, top_k=30, similarity="pearson", strategy="mean")),
    ],
)
def test_defaults_are_tolkunovs(kind, expected):
    assert expected.trade_off == 1
    assert paper(kind, 186) == (expected, [])


def test_a_defaulted_size_gives_way_to_the_pool_and_says_so():
    found, notices = paper("multiclass", 6)
    assert (found.size, found.top_k) == (6, 6)
    assert notices == ["size is 6 instead of the default 11: the pool has 6 finished members"]


def test_a_defaulted_size_gives_way_to_the_candidates_and_says_so():
    found, notices = paper("multiclass", 40, top_k=5)
    assert (found.size, found.top_k) == (5, 5)
    assert notices == ["size is 5 instead of the default 11: --top-k is 5"]


def test_the_default_top_k_is_never_below_the_size():
    found, _ = paper("multiclass", 186, size=50)
    assert (found.size, found.top_k) == (50, 50)
    found, notices = paper("binary", 8, top_k=20)
    assert (found.size, found.top_k, len(notices)) == (4, 8, 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": 0}, "--size 0: an ensemble needs at least one member"),
        ({"size": 5}, "--size 5: the pool has 4 finished members"),
        ({"top_k": 0}, "--top-k 0 is below 1"),
        ({"top_k": 2, "size": 3}, "--top-k 2 is below --size 3"),
        ({"strategy": "majority"}, "regression has values, not classes"),
    ],
)
def test_options_that_make_no_sense(wrong, message):
    with pytest.raises(UserError, match=message):
        check(Options(**wrong), "regression", 4)


def test_the_paper_worked_out_by_hand():
    """Three members right on 2 of 3 examples, each wrong on another: the majority is right on all."""
    logits, labels = binary("110", "101", "011"), np.ones(3, int)
    methods = {"dicor": Dicor(size=2, top_k=3, similarity="cosine", strategy="majority")}
    dev = Dev.of(logits, labels, kind="binary", names=list("abc"), ranks=[1, 2, 3])
    found = estimate(dev, {**methods, "omni": Omni(strategy="majority")})
    # DiCor is a and b, which agree on the first example; of the ties b, of higher rank, decides: 1 0 1.
    assert {name: one.in_sample for name, one in found.of.items()} == {"best": 2 / 3, "omni": 1.0, "dicor": 2 / 3}
    assert {name: one.names for name, one in found.of.items()} == {
        "best": ["a"],
        "omni": list("abc"),
        "dicor": ["a", "b"],
    }
