"""Data of the hub in the course's format. The hub itself is not there: small data sets of the same columns stand in."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from lora_ensemble.errors import UserError
from lora_ensemble.main import main
from lora_ensemble.tasks import PRESETS
from lora_ensemble.text.download import SOURCES, download
from lora_ensemble.text.readers import read_split

datasets = pytest.importorskip("datasets")

ROWS: dict[tuple[str, str | None], dict[str, list[Any]]] = {
    ("SetFit/sst5", None): {"text": ['a "fine" film', "so\tso\nreally"], "label": [4, 2], "label_text": ["++", "o"]},
    ("nyu-mll/glue", "qqp"): {"question1": ["Why?", "How?"], "question2": ["Why not?", "How?"], "label": [0, 1]},
    ("nyu-mll/glue", "stsb"): {
        "sentence1": ["A man.", "A cat."],
        "sentence2": ["A boy.", "A cat."],
        "label": [2.5, 5.0],
    },
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """GLUE's test labels are -1, and QQP's have names."""

    def load(name: str, config: str | None, *, split: str) -> Any:
        columns = {k: list(v) for k, v in ROWS[name, config].items()}
        if split == "test" and name == "nyu-mll/glue":
            columns["label"] = [-1] * 2
        data = datasets.Dataset.from_dict(columns)
        names = datasets.ClassLabel(names=["not_duplicate", "duplicate"])
        return data.cast_column("label", names) if config == "qqp" else data

    monkeypatch.setattr(datasets, "load_dataset", load)


@pytest.mark.usefixtures("hub")
def test_what_is_written_is_what_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    download(tmp_path, list(SOURCES))
    assert capsys.readouterr().out.count("2 examples, fingerprint ") == 9
    for name, (dataset, config, texts) in SOURCES.items():
        columns = ROWS[dataset, config]
        for split in ("train", "dev", "test"):
            found = read_split(PRESETS[name], split, tmp_path, need_labels=False)
            assert found.notices == []
            assert list(found.ids) == [f"{split}-0", f"{split}-1"]
            for text, column in zip(found.texts, texts, strict=True):
                assert list(text) == [" ".join(t.split()) for t in columns[column]]
            if split == "test" and name != "sst":
                assert found.labels is None
            else:
                assert found.labels is not None
                assert found.labels.tolist() == columns["label"]
    noted = json.loads((tmp_path / "downloaded.json").read_text())
    assert sorted(noted) == sorted(SOURCES)
    assert noted["quora"]["config"] == "qqp"
    content = (tmp_path / "quora-dev.csv").read_bytes()
    assert noted["quora"]["files"]["quora-dev.csv"] == hashlib.sha256(content).hexdigest()[:16]


@pytest.mark.usefixtures("hub")
def test_a_second_time_changes_nothing_and_other_files_are_not_overwritten(tmp_path: Path) -> None:
    download(tmp_path, ["sst"])
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    download(tmp_path, ["sst"])
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    (tmp_path / "ids-sst-dev.csv").write_text("mine")
    with pytest.raises(UserError, match=r"ids-sst-dev\.csv: is there with other content"):
        download(tmp_path, ["sst"])
    assert (tmp_path / "ids-sst-dev.csv").read_text() == "mine"


def test_no_network_and_a_changed_data_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests run offline, so the real loader is what fails here."""
    assert main(["data", "download", "--root", str(tmp_path), "--tasks", "sst"]) == 2
    err = capsys.readouterr().err
    assert "data set SetFit/sst5 [train]: cannot be loaded (" in err
    assert len(err.strip().splitlines()) == 1
    other = datasets.Dataset.from_dict({"sentence": ["a"], "label": [1]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: other)
    with pytest.raises(UserError, match="no column 'text'; found sentence"):
        download(tmp_path, ["sst"])
    assert list(tmp_path.iterdir()) == []
