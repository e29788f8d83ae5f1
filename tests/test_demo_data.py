"""make_data.py: the generated data has the course's layout, is deterministic, and can be learned but not perfectly."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import make_data
import questions
import sentiment
import similarity
from lora_ensemble.errors import UserError
from lora_ensemble.tasks import PRESETS
from lora_ensemble.text.readers import Split, read_split, shared_texts
from make_data import SIZES, main, write_demo_data

SMALL = {"train": 60, "dev": 30, "test": 20}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo data at its usual size."""
    path = tmp_path_factory.mktemp("demo") / "made" / "on the way"
    write_demo_data(path)
    return path


def splits(folder: Path, name: str) -> dict[str, Split]:
    return {s: read_split(PRESETS[name], s, folder, need_labels=s != "test") for s in SIZES}


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_files_and_headers_are_the_courses(folder: Path) -> None:
    headers = {p.name: p.read_text(encoding="utf-8").split("\n")[0] for p in folder.iterdir()}
    assert headers == {
        "ids-sst-train.csv": "\tid\tsentence\tsentiment",
        "ids-sst-dev.csv": "\tid\tsentence\tsentiment",
        "ids-sst-test-student.csv": "0\t\tid\tsentence",
        "quora-train.csv": "\tid\tsentence1\tsentence2\tis_duplicate",
        "quora-dev.csv": "\tid\tsentence1\tsentence2\tis_duplicate",
        "quora-test-student.csv": "\tid\tsentence1\tsentence2",
        "sts-train.csv": "\tid\tsentence1\tsentence2\tsimilarity",
        "sts-dev.csv": "\tid\tsentence1\tsentence2\tsimilarity",
        "sts-test-student.csv": "\tid\tsentence1\tsentence2",
    }
    first = (folder / "ids-sst-test-student.csv").read_text(encoding="utf-8").split("\n")[1].split("\t")
    assert first[:2] == ["1", "0.0"]
    assert '""' in (folder / "ids-sst-train.csv").read_text(encoding="utf-8")  # quoted fields are to be met with


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_read_it_whole(folder: Path, name: str) -> None:
    found = splits(folder, name)
    assert {s: len(x) for s, x in found.items()} == SIZES
    assert [n for x in found.values() for n in x.notices] == []
    assert found["test"].labels is None
    ids = [i for x in found.values() for i in x.ids.tolist()]
    assert len(set(ids)) == len(ids)
    assert all(len(i) == 25 and set(i) <= set("0123456789abcdef") for i in ids)


@pytest.mark.parametrize("name", list(PRESETS))
def test_no_text_is_in_two_splits_or_twice_in_one(folder: Path, name: str) -> None:
    found = splits(folder, name)
    assert shared_texts(found["train"], found["dev"]) == 0
    every = [frozenset(t) for x in found.values() for t in zip(*x.texts, strict=True)]
    assert len(set(every)) == len(every)


def test_labels_are_spread(folder: Path) -> None:
    sst = Counter(splits(folder, "sst")["train"].labels.tolist())  # type: ignore[union-attr]
    assert set(sst) == {0, 1, 2, 3, 4}
    assert min(sst.values()) >= 0.08 * SIZES["train"]
    quora = splits(folder, "quora")["train"].labels
    assert quora is not None
    assert 0.35 < quora.mean() < 0.55
    sts = splits(folder, "sts")["train"].labels
    assert sts is not None
    assert (sts.min(), sts.max()) == (0.0, 5.0)
    assert np.allclose(sts * 5, np.round(sts * 5), atol=1e-9)  # steps of 0.2
    assert sts.std() > 1.2


def test_same_seed_same_bytes_and_another_seed_other_ones(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_demo_data(tmp_path / name, seed=seed, sizes=SMALL)
    a, b, c = (digests(tmp_path / name) for name in "abc")
    assert a == b
    assert len(a) == 9
    assert all(a[name] != c[name] for name in a)


def test_sizes_and_ids_by_hand(tmp_path: Path) -> None:
    write_demo_data(tmp_path, seed=3, sizes=SMALL)
    for name in PRESETS:
        assert {s: len(x) for s, x in splits(tmp_path, name).items()} == SMALL
    assert splits(tmp_path, "sts")["dev"].ids[7] == hashlib.sha256(b"3/sts/dev/7").hexdigest()[:25]


@pytest.mark.parametrize(("module", "share"), [(sentiment, sentiment.NOISE), (questions, questions.NOISE)])
def test_share_of_noise(module: object, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels with and without noise, from generators in the same state."""
    example, count, differ, far = module.example, 4000, 0, 0  # type: ignore[attr-defined]
    for i in range(count):
        clean_rng, noisy_rng = random.Random(i), random.Random(i)
        with monkeypatch.context() as m:
            m.setattr(module, "NOISE", 0.0)
            texts, clean = example(clean_rng)
        same_texts, noisy = example(noisy_rng)
        assert texts == same_texts
        differ += clean != noisy
        far += abs(float(clean) - float(noisy)) > 1
    assert far == 0  # to a neighbouring class only
    assert abs(differ / count - share) < 4 * (share * (1 - share) / count) ** 0.5  # four standard errors


def test_sentiment_of_sentences_read_by_a_person(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of each pattern, of those that the first seeds give; the classes are a person's, not the program's."""
    monkeypatch.setattr(sentiment, "NOISE", 0.0)
    made = {texts[0]: label for i in range(100) for texts, label in [sentiment.example(random.Random(i))]}
    judged = {
        "The film's plot is magnificent.": "4",
        "I found the ending of the film disappointing.": "1",
        "The mattress in our hotel was really, really cramped.": "0",
        "The bathroom in our hotel was barely noisy.": "2",
        "Nobody could call the tour dusty.": "3",
        "Nobody could call this phone's camera sturdy.": "1",
        "The gift shop was breathtaking, but the cloakroom was appalling.": "1",
        "The lunch menu was appalling, but the grilled trout was weak.": "1",
        "The plot was superb, even if the soundtrack was below par.": "3",
        "The mattress was pleasant, yet the swimming pool undid all of that.": "1",
        "The view was appalling, yet the swimming pool won us over in the end.": "3",
        'A friend called this night train "outstanding"; to me it was an insult.': "0",
        "I expected the phone to be horrible, and it turned out lightning fast.": "4",
        "We were there on a Thursday: the film was a triumph, and I have not stopped talking about it.": "4",
    }
    assert {text: made.get(text) for text in judged} == judged


def test_similarity_is_the_agreement_of_the_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """With sentences that show their slots, the grade can be worked out from them."""
    costs = {"subject": 1.2, "action": 1.4, "object": 1.2, "place": 0.8, "number": 0.5, "negation": 1.5}
    slots = {name: [[[f"{name}-1-1"], [f"{name}-1-2"]], [[f"{name}-2-1"]]] for name in costs}
    monkeypatch.setattr(similarity, "NOISE", 0.0)
    monkeypatch.setattr(similarity, "_SLOTS", slots)
    monkeypatch.setattr(similarity, "_SHAPES", [" ".join(f"{{{name}}}" for name in costs)])
    grades = set()
    for i in range(500):
        (one, two), grade = similarity.example(random.Random(i))
        expected = 5.0
        for (name, cost), a, b in zip(costs.items(), one.split(), two.split(), strict=True):
            a, b = a.removeprefix(name).rstrip("s"), b.removeprefix(name).rstrip("s")
            same_group = a.split("-")[-2] == b.split("-")[-2]
            expected -= 0 if a == b else cost / 2 if same_group else cost
        assert abs(float(grade) - max(0.0, expected)) <= 0.1 + 1e-9, (one, two)
        grades.add(grade)
    assert {"0.0", "5.0"} < grades


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "d"), "--seed", "5"]) == 0
    assert "600 train, 300 dev, 200 test" in capsys.readouterr().out
    write_demo_data(tmp_path / "e", seed=5)
    assert digests(tmp_path / "d") == digests(tmp_path / "e")
    (tmp_path / "file").touch()
    assert main([str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/file: cannot be written (")


def test_impossible_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="at least 1 example"):
        write_demo_data(tmp_path, sizes={"train": 5, "dev": 0, "test": 5})
    monkeypatch.setitem(make_data._MAKERS, "sst", lambda rng: ((f"text {rng.randrange(40)}",), "1"))
    with pytest.raises(UserError, match="the templates of sst give only about 40 examples; 110 were asked for"):
        write_demo_data(tmp_path, sizes=SMALL)
