"""A restored ensemble says what its members say when PEFT runs them one by one, and decides what they decide."""

from __future__ import annotations

import doctest
import json
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILY_NAMES
from pool_factory import make_pool
from scipy.special import expit, log_softmax, softmax
from trained_pool import ENTRIES, peft_logits, texts_of, write_pool

from lora_ensemble import Ensemble
from lora_ensemble.bank.lora import Member
from lora_ensemble.dicor.cli import main as dicor
from lora_ensemble.ensemble import restored
from lora_ensemble.errors import UserError
from lora_ensemble.tasks import Kind

C = {"multiclass": 5, "binary": 1, "regression": 1}


def select(pool: Path, *args: str, to: Path | None = None) -> Path:
    """The record of an ensemble, beside its pool or in the folder ``to``."""
    file = (to or pool.parent) / "dicor.json"
    assert dicor(["select", "--pool", str(pool), "--task", "mine", "--output", str(file), *args]) == 0
    return file


def one_by_one(pool: Path, base: Path, names: list[str], texts: list[Any], kind: Kind) -> np.ndarray:
    """(M, N, C) of the members, by PEFT."""
    return np.stack([peft_logits(pool / "mine" / name, base, texts, C[kind]) for name in names])


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_members_say_what_peft_says(
    tiny: Callable[[str], Path], trained: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    """Ranks, targets and scalings differ, one is a head alone; longest and shortest texts in one call."""
    base, pool = tiny(family), trained(family, "multiclass")
    ensemble = Ensemble.load(select(pool, "--method", "omni", to=tmp_path))
    assert sorted(ensemble.members) == sorted(p.name for p in (pool / "mine").iterdir() if p.name[0] in "rh")
    texts = [*texts_of(15, 1, seed=5), "", " good \n", "very " * 200]
    expected = one_by_one(pool, base, ensemble.members, [t.strip() for t in texts], "multiclass")
    found = ensemble.logits(texts)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    assert np.ptp(expected, axis=0).max() > 0.1  # the members do differ


STRATEGIES = ["mean", "mean-probability", "majority", "weighted"]
KINDS: list[Kind] = ["multiclass", "binary", "regression"]


@pytest.mark.parametrize(
    ("kind", "strategy"), [(k, s) for k in KINDS for s in STRATEGIES if (k, s) != ("regression", "majority")]
)
def test_every_strategy(
    tiny: Callable[[str], Path], trained: Callable[..., Path], tmp_path: Path, kind: Kind, strategy: str
) -> None:
    """Against arithmetic on what PEFT says, on pairs; and against dicor apply on dev."""
    base, pool, dev = tiny("bert"), trained("bert", kind, columns=2), texts_of(24, 2)
    size = [] if strategy == "weighted" else ["--size", "4"]
    method = "weighted" if strategy == "weighted" else "dicor"
    how = [] if strategy == "weighted" else ["--strategy", strategy]
    file = select(pool, "--method", method, *size, *how, to=tmp_path)
    ensemble = Ensemble.load(file)
    chosen = json.loads(file.read_text())
    texts = texts_of(30, 2, seed=9)
    logits = one_by_one(pool, base, ensemble.members, texts, kind).astype(np.float64)
    weights = np.array([m["weight"] for m in chosen["members"]])

    found = ensemble.predict(texts)
    if kind == "regression":
        together = np.tensordot(weights if strategy == "weighted" else np.full(len(logits), 1 / len(logits)), logits, 1)
        np.testing.assert_allclose(found, together[:, 0], rtol=0, atol=2e-5)
        with pytest.raises(UserError, match="not probabilities"):
            ensemble.predict_proba(texts)
    else:
        if kind == "binary":
            each = np.concatenate([expit(-logits), expit(logits)], axis=2)
            mean = np.concatenate([expit(-logits.mean(0)), expit(logits.mean(0))], axis=1)
        else:
            each, mean = softmax(logits, axis=2), softmax(logits.mean(0), axis=1)
        votes = np.stack([(each.argmax(2) == c).mean(0) for c in range(each.shape[2])], axis=1)
        expected = {
            "mean": mean,
            "mean-probability": each.mean(0),
            "majority": votes,
            "weighted": np.tensordot(weights, each, 1),
        }[strategy]
        np.testing.assert_allclose(ensemble.predict_proba(texts), expected, rtol=0, atol=2e-5)
        labels = ["0", "1", "2", "3", "4"][: expected.shape[1]]
        if strategy == "majority":  # of tied classes, that of the highest rank (Tolkunov, section 4.3)
            ranks = [m["rank"] or -1 for m in chosen["members"]]
            decided = each.argmax(2)
            for n in range(len(texts)):
                count = Counter(decided[:, n].tolist())
                tied = [c for c in count if count[c] == max(count.values())]
                winner = max((ranks[m], int(decided[m, n])) for m in range(len(ranks)) if decided[m, n] in tied)[1]
                assert found[n] == labels[winner]
        else:
            assert found.tolist() == [labels[i] for i in expected.argmax(1)]
            sure = np.sort(expected, axis=1)
            assert (sure[:, -1] - sure[:, -2]).min() > 1e-4  # no decision hangs on rounding

    out = tmp_path / "predictions.csv"
    assert dicor(["apply", "--ensemble", str(file), "--split", "dev", "--output", str(out)]) == 0
    applied = [line.split(",")[1].strip() for line in out.read_text().splitlines()[1:]]
    again = ensemble.predict(dev)
    if kind == "regression":
        np.testing.assert_allclose(again, [float(a) for a in applied], rtol=0, atol=2e-5)
    else:
        assert [float(a) for a in again] == [float(a) for a in applied]


def test_scale_offsets_and_temperatures(
    tiny: Callable[[str], Path], trained: Callable[..., Path], tmp_path: Path
) -> None:
    """Vector scaling of a weighted mean of probabilities at temperatures, by scipy."""
    base, pool = tiny("bert"), trained("bert", "multiclass", n=60)
    file = select(pool, "--method", "weighted-offset", "--temperature", to=tmp_path)
    raw = json.loads(file.read_text())
    raw["scale"], raw["offsets"] = 1.7, [0.3, -0.1, 0.0, -0.4, 0.2]
    file.write_text(json.dumps(raw))
    ensemble = Ensemble.load(file)
    texts = texts_of(20, 1, seed=3)
    logits = one_by_one(pool, base, ensemble.members, texts, "multiclass").astype(np.float64)
    degrees = np.array([m["temperature"] for m in raw["members"]])
    mean = np.tensordot([m["weight"] for m in raw["members"]], softmax(logits / degrees[:, None, None], axis=2), 1)
    expected = np.exp(log_softmax(1.7 * np.log(mean) + raw["offsets"], axis=1))
    np.testing.assert_allclose(ensemble.predict_proba(texts), expected, rtol=0, atol=2e-5)


def test_members_of_other_encoders_and_lengths(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Two LoRA members of one encoder, one of another, one fully fine-tuned, one that reads less of a text."""
    pool, texts = tmp_path / "pool", texts_of(12, 1, seed=2, longest=40)
    groups: list[tuple[str, Any]] = [
        ("bert", {"entries": ENTRIES[:2]}),
        ("electra", {"entries": ENTRIES[2:3]}),
        ("bert", {"entries": (Member(lr=1e-5),), "finetune": "full"}),
        ("bert", {"entries": (Member(name="short"),), "max_length": 10}),
        ("bert", {"entries": (Member(name="tail", seed=2),), "max_length": 10, "truncation": "tail"}),
        ("bert", {"entries": (Member(name="both", seed=3),), "max_length": 10, "truncation": "head-tail"}),
    ]
    for family, how in groups:
        write_pool(pool, tiny(family), "binary", **how)
    ensemble = Ensemble.load(select(pool, "--method", "omni"))
    found = dict(zip(ensemble.members, ensemble.logits(texts), strict=True))
    assert len(found) == 7
    for name, logits in found.items():
        base = tiny("electra" if name.startswith("r3") else "bert")
        # Ten tokens are eight words, each a token, and two that the tokeniser adds.
        words = [text.split() for text in texts]
        shorter = {"tail": [w[-8:] for w in words], "both": [w if len(w) < 9 else w[:4] + w[-4:] for w in words]}
        cut = [" ".join(w) for w in shorter.get(name, words)]
        expected = peft_logits(pool / "mine" / name, base, cut, 1, max_length=10 if name == "short" else 90)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)


def test_a_way_to_cut_texts_that_this_version_does_not_know(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    write_pool(tmp_path / "pool", tiny("bert"), "binary", entries=ENTRIES[:2], truncation="middle")
    with pytest.raises(UserError, match="trained with truncation 'middle'; expected one of head, tail, head-tail"):
        Ensemble.load(select(tmp_path / "pool", "--method", "omni"))


def test_threads_get_their_own_answers(trained: Callable[..., Path], tmp_path: Path) -> None:
    """Eight threads at once, four questions each."""
    ensemble = Ensemble.load(select(trained("deberta-v2", "multiclass"), "--method", "omni", to=tmp_path))
    questions = {i: texts_of(1 + i % 5, 1, seed=i) for i in range(32)}
    alone = {i: ensemble.logits(texts) for i, texts in questions.items()}
    found: dict[int, np.ndarray] = {}

    def ask(first: int) -> None:
        for i in range(first, 32, 8):
            found[i] = ensemble.logits(questions[i])

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(np.array_equal(found[i], alone[i]) for i in range(32))


def test_bf16_is_near(trained: Callable[..., Path], tmp_path: Path) -> None:
    file = select(trained("bert", "multiclass"), "--method", "omni", to=tmp_path)
    texts = texts_of(20, 1, seed=4)
    exact, near = Ensemble.load(file).logits(texts), Ensemble.load(file, precision="bf16").logits(texts)
    assert 1e-5 < np.abs(exact - near).max() < 0.05 * np.abs(exact).max()  # bf16 keeps 8 bits


def test_the_examples_in_the_docstrings(
    trained: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    select(trained("bert", "multiclass"), "--method", "omni", to=tmp_path)
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(restored)
    assert result.attempted > 5
    assert result.failed == 0


def test_few_texts(trained: Callable[..., Path], tmp_path: Path) -> None:
    ensemble = Ensemble.load(select(trained("bert", "multiclass"), "--method", "omni", to=tmp_path))
    for texts in ([], ["good"]):
        assert ensemble.logits(texts).shape == (4, len(texts), 5)
        assert ensemble.predict(texts).shape == (len(texts),)
        assert ensemble.predict_proba(texts).shape == (len(texts), 5)


def test_what_is_no_text(trained: Callable[..., Path], tmp_path: Path) -> None:
    ensemble = Ensemble.load(select(trained("bert", "multiclass", columns=2), "--method", "omni", to=tmp_path))
    assert ensemble.text == ["one", "two"]
    for texts, message in [
        ("good", "one text; expected a list"),
        ([("a", "b"), ("a",)], r"texts\[1\] has 1 texts; expected a pair of texts \(one, two\)"),
        ([("a", None)], r"texts\[0\] is \('a', None\); expected a pair"),
        ([3.0], r"texts\[0\] is 3.0; expected a pair"),
        (["a"], r"texts\[0\] has 1 texts; expected a pair"),
    ]:
        with pytest.raises(UserError, match=message):
            ensemble.predict(texts)  # type: ignore[arg-type]


def test_what_cannot_be_restored(trained: Callable[..., Path], tmp_path: Path) -> None:
    pool = shutil.copytree(trained("bert", "multiclass"), tmp_path / "pool")
    file = select(pool, "--method", "omni")
    with pytest.raises(UserError, match="device is 'tpu'"):
        Ensemble.load(file, device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device is 'cuda'"):
            Ensemble.load(file, device="cuda")
    with pytest.raises(UserError, match="precision is '16'"):
        Ensemble.load(file, precision="16")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"gone: the ensemble's pool is not there; .*--pool"):
        Ensemble.load(file, pool=tmp_path / "gone")
    # Predictions made elsewhere
    make_pool(tmp_path / "elsewhere" / "pool", "mine", "multiclass")
    with pytest.raises(UserError, match=r"6 of 6 members have no weights, .*\(m00, m01, m02, ...\)"):
        Ensemble.load(select(tmp_path / "elsewhere" / "pool", "--method", "omni"))
    # A base model that is gone
    record = pool / "mine" / "r2-c2-qkv-lr1e-4-s1" / "member.json"
    assert record.is_file()
    for path in pool.glob("mine/*/member.json"):
        raw = json.loads(path.read_text())
        path.write_text(json.dumps({**raw, "base_model": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match=r"gone.* cannot be loaded"):
        Ensemble.load(file, pool=pool)


def test_texts_of_other_columns_do_not_mix(trained: Callable[..., Path], tmp_path: Path) -> None:
    pool = shutil.copytree(trained("bert", "multiclass"), tmp_path / "pool")
    path = pool / "mine" / "r2-c2-qkv-lr1e-4-s1" / "member.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "text": ["a", "b"]}))
    with pytest.raises(UserError, match="must read the same"):
        Ensemble.load(select(pool, "--method", "omni"))


def test_equal_texts_are_computed_once(trained: Callable[..., Path], tmp_path: Path) -> None:
    """Blanks around them make no difference; and progress counts all of them."""
    ensemble = Ensemble.load(select(trained("bert", "multiclass"), "--method", "omni", to=tmp_path))
    asked: list[int] = []
    original = ensemble._pass

    def counted(bank: Any, row: dict[str, Any]) -> np.ndarray:
        asked.append(row["examples"])
        return original(bank, row)

    ensemble._pass = counted  # type: ignore[method-assign]
    texts, done = ["good", "not bad", " good", "good", "bad", "not bad "], []
    logits = ensemble.logits(texts, progress=done.append)
    assert (sum(asked), sum(done)) == (3, 6)
    for i, same in ((2, 0), (3, 0), (5, 1)):
        assert np.array_equal(logits[:, i], logits[:, same])
    np.testing.assert_allclose(logits[:, 4], ensemble.logits(["bad"])[:, 0], rtol=0, atol=1e-5)
