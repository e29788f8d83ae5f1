"""What is exported answers as the pool's members do: under PEFT, plain transformers, and without the pool."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILY_NAMES, REPOSITORY
from pool_factory import make_pool
from scipy.special import expit, softmax
from test_ensemble import select
from trained_pool import ENTRIES, peft_logits, texts_of, write_pool

from lora_ensemble import Ensemble
from lora_ensemble.bank.lora import Member
from lora_ensemble.ensemble import export
from lora_ensemble.ensemble.folder import SIGNED, whole_folder
from lora_ensemble.errors import UserError
from lora_ensemble.main import main
from lora_ensemble.tasks import Kind

FIRST = "r2-c2-qkv-lr1e-4-s1"
KINDS: list[Kind] = ["multiclass", "binary", "regression"]
C = {"multiclass": 5, "binary": 1, "regression": 1}


def ran(*args: object) -> None:
    assert export.run([str(a) for a in args]) == 0


def answers(at: Path, texts: list[Any]) -> np.ndarray:
    """(N, C) logits of a transformers folder with its own tokeniser, by plain transformers."""
    return peft_logits(at, at, texts, C["multiclass"])


# An ensemble's folder


def test_the_folder_is_complete(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Two base models, a fully fine-tuned member, a short one; moved, with pool, record and base models gone."""
    texts = texts_of(12, 2, seed=2, longest=40)
    home, pool = tmp_path / "home", tmp_path / "home" / "pool"
    home.mkdir()
    for family in ("bert", "electra"):
        shutil.copytree(tiny(family), home / "bases" / family)
    groups: list[tuple[str, Any]] = [
        ("bert", {"entries": ENTRIES[:2]}),
        ("electra", {"entries": ENTRIES[2:]}),
        ("bert", {"entries": (Member(lr=1e-5),), "finetune": "full"}),
        ("bert", {"entries": (Member(name="short"),), "max_length": 10}),
    ]
    for family, how in groups:
        write_pool(pool, home / "bases" / family, "binary", columns=2, **how)
    file = select(pool, "--method", "omni")
    names = Ensemble.load(file).members
    assert len(names) == 6
    expected = np.stack(
        [
            peft_logits(
                pool / "mine" / name,
                tiny("electra" if name.startswith(("r3", "head")) else "bert"),
                texts,
                1,
                max_length=10 if name == "short" else 90,
            )
            for name in names
        ]
    )
    ran("--ensemble", file, "--output", tmp_path / "out")
    (tmp_path / "far").mkdir()
    shutil.move(tmp_path / "out", tmp_path / "far" / "moved")
    shutil.rmtree(home)
    moved = tmp_path / "far" / "moved"
    for given in (moved, moved / "dicor.json"):
        ensemble = Ensemble.load(given)
        assert (ensemble.members, ensemble.text) == (names, ["one", "two"])
        np.testing.assert_allclose(ensemble.logits(texts), expected, rtol=0, atol=2e-5)
    ran("--ensemble", moved, "--output", tmp_path / "again")  # and it can leave again
    np.testing.assert_allclose(Ensemble.load(tmp_path / "again").logits(texts), expected, rtol=0, atol=2e-5)

    config = json.loads((moved / "config.json").read_text())
    assert config["format"] == "lora-ensemble"
    assert (config["task"], config["kind"], config["labels"]) == ("mine", "binary", ["0", "1"])
    assert (config["text"], config["members"], config["max_length"]) == (["one", "two"], names, 10)
    assert config["bases"] == {
        n: {"folder": f"base/{n}", "on_hub": False, "revision": None} for n in ("bert", "electra")
    }
    for name in ("bert", "electra"):  # the encoder alone
        assert "id2label" not in json.loads((moved / "base" / name / "config.json").read_text())
    # Nothing of the machine that wrote it, nothing of the examples, and no half of a member.
    for path in [p for p in moved.rglob("*") if p.is_file()]:
        assert str(tmp_path).encode() not in path.read_bytes(), path
        assert path.suffix in (".json", ".md", ".safetensors", ".npy"), path
    for path in moved.glob("members/mine/*/member.json"):
        listed = json.loads(path.read_text())
        assert {*listed["files"], "member.json"} == {p.name for p in path.parent.iterdir()}
        assert list(listed["examples"]) == ["dev"]


def test_only_dev_comes_along(trained: Callable[..., Path], tmp_path: Path) -> None:
    """With examples if asked for; other splits and the epochs stay."""
    from lora_ensemble.dicor.cli import main as dicor
    from lora_ensemble.pool import read_record, read_tensors, write_examples, write_member

    pool = shutil.copytree(trained("bert", "multiclass", members=2), tmp_path / "pool")
    file = select(pool, "--method", "omni")
    record = read_record(pool, "mine", FIRST)
    assert record is not None
    record.examples["test"] = write_examples(pool, "mine", "test", ["t0", "t1"], None)
    arrays = {"test.logits.npy": np.zeros((2, 5), np.float32), "dev.epochs.npy": np.zeros((1, 24, 5), np.float16)}
    write_member(pool, record, arrays, keep=record)
    assert read_tensors(pool, record, "adapter_model.safetensors")
    ran("--ensemble", file, "--output", tmp_path / "out", "--with-examples")
    files = {p.name for p in (tmp_path / "out" / "members" / "mine" / FIRST).iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "dev.logits.npy", "member.json"}
    assert [p.name[:4] for p in (tmp_path / "out/members/mine/examples").iterdir()] == ["dev-"]
    out = tmp_path / "predictions.csv"
    given = ["apply", "--ensemble", str(tmp_path / "out/dicor.json"), "--split", "dev", "--output", str(out)]
    assert dicor(given) == 0
    assert len(out.read_text().splitlines()) == 25
    assert "Ids and labels of dev are in this folder" in (tmp_path / "out" / "README.md").read_text()


def test_without_base(
    tiny: Callable[[str], Path], trained: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub's model is named with its revision; a local one would be nobody else's."""
    pool = shutil.copytree(trained("bert", "multiclass", members=2), tmp_path / "pool")
    file = select(pool, "--method", "omni")
    given = ["--ensemble", file, "--output", tmp_path / "out", "--without-base"]
    with pytest.raises(UserError, match=r"--without-base: the base model .* is a local folder"):
        ran(*given)
    for path in pool.glob("mine/*/member.json"):
        raw = json.loads(path.read_text())
        path.write_text(json.dumps({**raw, "base_model": "someone/encoder", "revision": "abc123"}))
    # What the hub would give.
    from lora_ensemble.bank import base_model

    hub = {"someone/encoder": str(tiny("bert"))}
    monkeypatch.setattr(base_model, "location", lambda name: hub.get(name, name))
    ran(*given)
    assert not (tmp_path / "out" / "base").exists()
    bases = json.loads((tmp_path / "out" / "config.json").read_text())["bases"]
    assert bases == {"someone/encoder": {"folder": None, "on_hub": True, "revision": "abc123"}}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model:\n- someone/encoder\n" in card
    assert "not in this folder: `someone/encoder` at abc123" in card
    assert Ensemble.load(tmp_path / "out").logits(["good"]).shape == (2, 1, 5)
    member = ("--pool", pool, "--task", "mine", "--member", FIRST, "--output")
    for name, more, revision in (("pinned", (), "abc123"), ("newest", ("--any-base",), None)):
        ran(*member, tmp_path / name, *more)
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == ("someone/encoder", revision)


def test_what_is_missing_is_named(trained: Callable[..., Path], tmp_path: Path) -> None:
    pool, out = shutil.copytree(trained("bert", "multiclass", members=2), tmp_path / "pool"), tmp_path / "out"
    file = select(pool, "--method", "omni")
    ran("--ensemble", file, "--output", out)
    (base,) = (out / "base").iterdir()
    kept = tmp_path / "kept"
    for path, message in (
        (
            out / "members/mine" / FIRST / "adapter_model.safetensors",
            rf"{FIRST}: .*adapter_model.safetensors is missing",
        ),
        (out / "members/mine" / FIRST, rf"{FIRST}: no such member"),
        (base, "base/.*: missing, though config.json"),
        (out / "dicor.json", "dicor.json: No such file"),
    ):
        shutil.move(path, kept)
        with pytest.raises(UserError, match=message):
            Ensemble.load(out)
        shutil.move(kept, path)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "format_version": 2}))
    with pytest.raises(UserError, match="format_version is 2"):
        Ensemble.load(out)
    # A damaged member does not leave.
    weights = pool / "mine" / FIRST / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"oops")
    with pytest.raises(UserError, match=r"adapter_model.safetensors: not what member.json says"):
        ran("--ensemble", file, "--output", tmp_path / "other")
    assert not (tmp_path / "other").exists()
    # Nor does one that is predictions alone.
    make_pool(tmp_path / "elsewhere" / "pool", "mine", "multiclass")
    alone = select(tmp_path / "elsewhere" / "pool", "--method", "omni")
    with pytest.raises(UserError, match=r"6 of 6 members have no weights.*m00"):
        ran("--ensemble", alone, "--output", tmp_path / "other")


def test_a_foreign_config_beside_the_record_is_not_read(trained: Callable[..., Path], tmp_path: Path) -> None:
    file = select(trained("bert", "multiclass", members=2), "--method", "omni", to=tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert Ensemble.load(file).logits(["good"]).shape == (2, 1, 5)


def test_a_folder_that_an_earlier_version_wrote_is_read(tmp_path: Path) -> None:
    """Version 1 of the format, as it was before the package had rooms: loaded, applied, and exported again."""
    from lora_ensemble.dicor.cli import main as dicor

    before = Path(__file__).with_name("exported_before")
    texts = [("good film", "bad film"), ("bad", "good bad film film")]
    ran("--ensemble", before, "--output", tmp_path / "again")
    for folder in (before, tmp_path / "again"):
        ensemble = Ensemble.load(folder)
        assert (ensemble.members, ensemble.text) == (["head-lr1e-4-s4", "r1-c2-qv-lr1e-4-s1"], ["one", "two"])
        for name, logits in zip(ensemble.members, ensemble.logits(texts), strict=True):
            member, base = folder / "members" / "mine" / name, folder / "base" / "tiny-bert"
            np.testing.assert_allclose(logits, peft_logits(member, base, texts, 1, max_length=10), rtol=0, atol=1e-6)
    given = ["--split", "dev", "--output", str(tmp_path / "p.csv")]
    assert dicor(["apply", "--ensemble", str(before / "dicor.json"), *given]) == 0
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 7


# A folder that somebody else made


def put(path: Path, *keys: str) -> Callable[[Path], None]:
    """A change of a JSON file: the last of the keys is the new value."""

    def change(folder: Path) -> None:
        raw = json.loads((folder / path).read_text())
        at = raw
        for key in keys[:-2]:
            at = at[int(key) if isinstance(at, list) else key]
        at[keys[-2]] = keys[-1]
        (folder / path).write_text(json.dumps(raw))

    return change


def link(name: str) -> Callable[[Path], None]:
    """What is there is moved out of the folder, and a link to it left in its place."""

    def change(folder: Path) -> None:
        shutil.move(folder / name, folder.parent / "outside")
        (folder / name).symlink_to(folder.parent / "outside")

    return change


def other_base(folder: Path) -> None:
    """A base model of the machine that reads, called by its path."""
    shutil.move(folder / "base" / "bert", folder.parent / "outside")
    put(Path("members/mine", FIRST, "member.json"), "base_model", str(folder.parent / "outside"))(folder)


def other_name(folder: Path) -> None:
    """The same, by the name that the configuration has for it."""
    raw = json.loads((folder / "config.json").read_text())
    raw["bases"] |= {"../outside": {"folder": None, "on_hub": True, "revision": None}}
    (folder / "config.json").write_text(json.dumps(raw))


def shards(folder: Path) -> None:
    shutil.move(folder / "base/bert/model.safetensors", folder.parent / "outside")
    index = {"metadata": {}, "weight_map": {"embeddings.word_embeddings.weight": "../../../outside"}}
    (folder / "base/bert/model.safetensors.index.json").write_text(json.dumps(index))


def adapter(folder: Path) -> None:
    """transformers takes the base model that an adapter beside the weights names, not the weights."""
    config = {"peft_type": "LORA", "base_model_name_or_path": "some/model", "r": 1, "target_modules": ["query"]}
    (folder / "base/bert/adapter_config.json").write_text(json.dumps(config))


def pickled(folder: Path) -> None:
    (folder / "base/bert/model.safetensors").unlink()
    torch.save({}, folder / "base/bert/pytorch_model.bin")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


MEMBER = f"members/mine/{FIRST}"
HOSTILE: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "base model above": (put(Path("config.json"), "bases", "bert", "folder", "../out"), ("config.json", "'../out'")),
    "base model far away": (put(Path("config.json"), "bases", "bert", "folder", "/etc"), ("config.json", "'/etc'")),
    "base model at home": (put(Path("config.json"), "bases", "bert", "folder", "~/m"), ("config.json", "'~/m'")),
    "base model a link": (link("base/bert"), ("base/bert", "outside")),
    "its weights a link": (link("base/bert/model.safetensors"), ("model.safetensors", "outside")),
    "its weights in shards": (shards, ("model.safetensors.index.json", "'../../../outside'")),
    "its vocabulary": (
        put(Path("base/bert/tokenizer_config.json"), "vocab_file", "/etc/passwd"), ("tokenizer_config", "'/etc/passwd'")
    ),
    "a member's base model": (other_base, (f"{MEMBER}/member.json", "outside")),
    "a member's base model, which nobody names": (
        put(Path(MEMBER, "member.json"), "base_model", "some/folder"), (f"{MEMBER}/member.json", "'some/folder'")
    ),
    "a base model's name": (other_name, ("config.json", "outside")),
    "pool above": (put(Path("dicor.json"), "pool", "../pool"), ("dicor.json", "'../pool'")),
    "pool far away": (put(Path("dicor.json"), "pool", "/tmp"), ("dicor.json", "'/tmp'")),
    "pool of another system": (put(Path("dicor.json"), "pool", "C:\\pool"), ("dicor.json", "pool'")),
    "task": (put(Path("dicor.json"), "task", "../members/mine"), ("dicor.json", "'../members/mine'")),
    "member": (put(Path("dicor.json"), "members", "0", "name", "../mine"), ("dicor.json", "'../mine'")),
    "a member's files": (
        put(Path(MEMBER, "member.json"), "files", "../x", "sha256:0"), ("member.json", "files holds a path")
    ),
    "a member's examples": (
        put(Path(MEMBER, "member.json"), "examples", "test", "a/../../x"), ("member.json", "holds a path")
    ),
    "weights a link": (link(f"{MEMBER}/adapter_model.safetensors"), ("adapter_model.safetensors", "outside")),
    "logits a link": (link(f"{MEMBER}/dev.logits.npy"), ("dev.logits.npy", "outside")),
    "member a link": (link(MEMBER), (FIRST, "outside")),
    "members a link": (link("members"), ("members", "outside")),
    "record a link": (link("dicor.json"), ("dicor.json", "outside")),
    "its base model an adapter of another": (adapter, ("base/bert", "adapter_config.json")),
    "its weights a pickle": (pickled, ("base/bert", "pytorch_model.bin")),
    "no config": (no_config, ("config.json",)),
}  # fmt: skip


@pytest.fixture(scope="module")
def exported(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("exported")
    shutil.copytree(tiny("bert"), home / "bert")
    write_pool(home / "pool", home / "bert", "multiclass", entries=ENTRIES[:1])
    ran("--ensemble", select(home / "pool", "--method", "omni"), "--output", home / "out", "--with-examples")
    return home / "out"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_folder_that_names_files_outside_is_refused(exported: Path, tmp_path: Path, name: str) -> None:
    """By whatever reads it, in one line that says which file names what."""
    folder = tmp_path / "out"
    shutil.copytree(exported, folder)
    change, says = HOSTILE[name]
    change(folder)
    for given in (folder, folder / "dicor.json")[: 1 if change is no_config else 2]:
        for read in (Ensemble.load, lambda at: ran("--ensemble", at, "--output", tmp_path / "again")):
            with pytest.raises(UserError) as e:
                read(given)
            assert all(words in str(e.value) for words in says), str(e.value)
    assert not (tmp_path / "again").exists()


def test_dicor_apply_reads_nothing_outside_either(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lora_ensemble.dicor.cli import main as dicor

    shutil.copytree(exported, tmp_path / "out")
    apply = ["apply", "--split", "dev", "--output", str(tmp_path / "p.csv"), "--ensemble", str(tmp_path / "out")]
    assert dicor(apply) == 0
    link(f"{MEMBER}/dev.logits.npy")(tmp_path / "out")
    assert dicor(apply) == 2
    assert "dev.logits.npy: a link to" in capsys.readouterr().err


def test_links_that_stay_inside_and_the_hubs_cache_are_read(exported: Path, tmp_path: Path) -> None:
    """snapshot_download gives a folder of links into the folder blobs beside it."""
    expected = Ensemble.load(exported).logits(["good"])
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for i, path in enumerate(p for p in exported.rglob("*") if p.is_file()):
        shutil.copy(path, blobs / str(i))
        at = snapshot / path.relative_to(exported)
        at.parent.mkdir(parents=True, exist_ok=True)
        at.symlink_to(os.path.relpath(blobs / str(i), at.parent))
    for given in (snapshot, snapshot / "dicor.json"):
        np.testing.assert_array_equal(Ensemble.load(given).logits(["good"]), expected)
    folder = tmp_path / "out"
    shutil.copytree(exported, folder)
    shutil.move(folder / "base" / "bert", folder / "encoder")
    (folder / "base" / "bert").symlink_to(Path("..", "encoder"))
    (tmp_path / "linked").symlink_to(folder)
    np.testing.assert_array_equal(Ensemble.load(tmp_path / "linked").logits(["good"]), expected)


@pytest.mark.parametrize(("member", "task"), [("../mine/" + FIRST, "mine"), (FIRST, "../pool/mine"), (".x", "mine")])
def test_a_member_that_is_no_name_of_a_folder(exported: Path, tmp_path: Path, member: str, task: str) -> None:
    with pytest.raises(UserError, match="name"):
        ran("--pool", exported.parent / "pool", "--task", task, f"--member={member}", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# The card


def test_the_card_says_what_the_record_says(trained: Callable[..., Path], tmp_path: Path) -> None:
    import yaml

    file = select(trained("bert", "multiclass", n=60), "--method", "weighted-offset", to=tmp_path)
    raw = json.loads(file.read_text())
    raw["estimate"]["in_sample"] = 0.875  # another than the honest one
    file.write_text(json.dumps(raw))
    ran("--ensemble", file, "--output", tmp_path / "tickets")
    card = (tmp_path / "tickets" / "README.md").read_text()
    front, page = card.split("---\n")[1:]
    honest = raw["estimate"]["honest"]
    interval = f"90% interval {honest['low']:.4f} to {honest['high']:.4f}"
    metric = {"type": "accuracy", "value": round(honest["value"], 4), "name": f"accuracy, honest estimate ({interval})"}
    result = {
        "task": {"type": "text-classification"},
        "dataset": {"name": "mine", "type": "mine", "split": "dev"},
        "metrics": [metric],
    }
    assert yaml.safe_load(front) == {
        "library_name": "lora-ensemble",
        "pipeline_tag": "text-classification",
        "tags": ["lora", "ensemble", "peft"],
        "model-index": [{"name": "tickets", "results": [result]}],
    }
    for side in ("estimate", "best", "omni"):
        f = raw[side]
        figures = (
            f"{f['in_sample']:.4f} | {f['honest']['value']:.4f} | {f['honest']['low']:.4f} to {f['honest']['high']:.4f}"
        )
        assert figures in page
    assert "| accuracy on dev | in-sample | honest | 90% interval |" in page
    for key in ("to_best", "to_omni"):
        noise = "beyond" if raw["estimate"][key]["beyond_noise"] else "within"
        assert f"{raw['estimate'][key]['value']:+.4f}" in page
        assert f"{noise} noise" in page
    assert f"`{raw['examples']}`" in page
    assert f"multiplied by {raw['scale']:.3f}" in page
    for m in raw["members"]:
        assert f"| {m['name']} |" in page
        assert f"| {m['score']:.4f} | {m['weight']:.4f} |" in page
    assert "cut after 90 tokens" in page


def test_the_card_admits_too_few_examples(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    write_pool(tmp_path / "pool", tiny("bert"), "regression", entries=ENTRIES[:2], n=4)
    file = select(tmp_path / "pool", "--method", "omni")
    assert json.loads(file.read_text())["repeats"] == 0
    file.write_text(json.dumps({**json.loads(file.read_text()), "notices": ["all 4 dev labels are the same"]}))
    ran("--ensemble", file, "--output", tmp_path / "out")
    page = (tmp_path / "out" / "README.md").read_text()
    assert "too few examples for an honest estimate" in page
    assert "Notice: all 4 dev labels are the same." in page


# One member


def test_offsets_for_a_score_decide_the_same_everywhere(
    tiny: Callable[[str], Path], trained: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A threshold for F1 on the mean of probabilities: apply, infer, the folder; by hand from what PEFT says."""
    base, pool, dev = tiny("bert"), trained("bert", "binary"), texts_of(24, 1)
    file = select(pool, "--score", "f1", "--method", "exhaustive", to=tmp_path)
    raw = json.loads(file.read_text())
    logits = [peft_logits(pool / "mine" / m["name"], base, dev, 1)[:, 0] for m in raw["members"]]
    p = expit(np.array(logits, np.float64)).mean(axis=0)
    z = np.log(p / (1 - p))
    threshold = float(np.median(z))  # whatever 24 examples want, half of them are to be above
    raw["offsets"] = [threshold / 2, -threshold / 2]
    file.write_text(json.dumps(raw))
    by_hand = [str(int(one)) for one in z > threshold]
    assert by_hand != [str(int(one)) for one in p > 0.5]
    assert Ensemble.load(file).predict(dev).tolist() == by_hand
    out, answered = tmp_path / "out", tmp_path / "answered.csv"
    ran("--ensemble", file, "--output", out)
    whole = Ensemble.load(out)
    assert whole.predict(dev).tolist() == by_hand
    assert [str(int(one)) for one in whole.predict_proba(dev)[:, 1] > 0.5] == by_hand
    assert "F1 on dev" in (card := (out / "README.md").read_text())
    assert f"offset by class: 0 {threshold / 2:+.3f}, 1 {-threshold / 2:+.3f}" in card
    (tmp_path / "dev.csv").write_text("one\n" + "".join(f"{text}\n" for text in dev))
    paths = ["--input", str(tmp_path / "dev.csv"), "--output", str(answered), "--text", "one"]
    assert main(["infer", "--ensemble", str(out), *paths]) == 0
    assert [line.split(",")[1] for line in answered.read_text().splitlines()[1:]] == by_hand
    # One member alone has no place for them, and says so.
    other, name = tmp_path / "pool", raw["members"][0]["name"]
    shutil.copytree(pool, other)
    member = other / "mine" / name / "member.json"
    member.write_text(json.dumps({**json.loads(member.read_text()), "settings": {"score": "f1"}}))
    capsys.readouterr()
    ran("--pool", other, "--task", "mine", "--member", name, "--format", "merged", "--output", tmp_path / "one")
    assert f"notice: {name} decides for its largest probability: offsets for F1 are an en" in capsys.readouterr().err
    assert "F1 unknown" in (tmp_path / "one" / "README.md").read_text()


@pytest.mark.parametrize(
    ("family", "name"),
    [*((f, "r3-c0.5-all-linear-top-half-lr1e-4-s3") for f in FAMILY_NAMES), ("bert", "head-lr1e-4-s4")],
)
def test_a_member_in_both_formats(
    tiny: Callable[[str], Path], trained: Callable[..., Path], tmp_path: Path, family: str, name: str
) -> None:
    """The pool's own folder under PEFT, the exported one under PEFT, and the merged one under plain transformers."""
    pool, texts = trained(family, "multiclass"), texts_of(8, 1, seed=3)
    expected = peft_logits(pool / "mine" / name, tiny(family), texts, 5)
    member = ("--pool", pool, "--task", "mine", "--member", name)
    ran(*member, "--format", "peft", "--output", tmp_path / "peft")
    ran(*member, "--format", "merged", "--output", tmp_path / "merged")
    np.testing.assert_allclose(peft_logits(tmp_path / "peft", tiny(family), texts, 5), expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(answers(tmp_path / "merged", texts), expected, rtol=0, atol=2e-5)
    assert np.ptp(expected) > 0.1
    for path in [*(tmp_path / "peft").iterdir(), *(tmp_path / "merged").iterdir()]:
        assert str(tiny(family).parent).encode() not in path.read_bytes(), path
    named = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == tiny(family).name


@pytest.mark.parametrize(("family", "kind"), [*(("bert", kind) for kind in KINDS), ("modernbert", "multiclass")])
def test_the_lines_to_load_it_run_for_a_base_with_a_head_for_other_classes(
    tiny: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: Kind,
    family: str,
) -> None:
    """As a user runs them: those of all cards, and those of the page about the pool."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = tmp_path / "bases" / "three"
    AutoModelForSequenceClassification.from_pretrained(tiny(family), num_labels=3).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny(family)).save_pretrained(base)
    pool = tmp_path / "pool"
    write_pool(pool, base, kind, entries=ENTRIES[:1])
    expected = peft_logits(pool / "mine" / FIRST, base, ["A quiet, moving film."], C[kind])
    member = ("--pool", pool, "--task", "mine", "--member", FIRST)
    ran(*member, "--output", tmp_path / "one")
    ran(*member, "--format", "merged", "--output", tmp_path / "merged")
    ran("--ensemble", select(pool, "--method", "omni"), "--output", tmp_path / "all")
    monkeypatch.chdir(tmp_path)
    pages = {name: (tmp_path / name / "README.md").read_text() for name in ("one", "merged", "all")}
    pages["page"] = (REPOSITORY / "checkpoints" / "README.md").read_text()
    for name, page in pages.items():
        (code,) = [c.split("```")[0] for c in page.split("```python\n")[1:] if "pool import" not in c]
        # What is the user's to fill in.
        for theirs, ours in (
            ("FOLDER/", f"{base.parent}/"),
            ("checkpoints/pool/sst/r4-c1-qv-lr5e-4-s11711", str(pool / "mine" / FIRST)),
            ("sentence-transformers/all-MiniLM-L6-v2", str(base)),
            ("num_labels=5", f"num_labels={C[kind]}"),
        ):
            code = code.replace(theirs, ours)
        capsys.readouterr()
        shown: dict[str, Any] = {}
        exec(code, shown)
        if name in ("one", "page"):
            tokens = shown["tokenizer"]("A quiet, moving film.", return_tensors="pt")
            found = shown["model"](**tokens).logits.detach().numpy()
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
        assert name == "page" or capsys.readouterr().out


@pytest.mark.parametrize("truncation", ["head", "tail", "head-tail"])
def test_what_is_kept_of_a_long_text_goes_with_it(
    tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], truncation: str
) -> None:
    """A member's tokeniser keeps heads or tails; half of both it cannot, which is said. An ensemble keeps all."""
    from transformers import AutoTokenizer

    pool, texts = tmp_path / "pool", texts_of(10, 1, seed=3, longest=30)
    write_pool(pool, tiny("bert"), "multiclass", entries=ENTRIES[:2], max_length=12, truncation=truncation)
    words = [text.split() for text in texts]
    kept = {"head": [w[:10] for w in words], "tail": [w[-10:] for w in words]}
    kept["head-tail"] = [w if len(w) <= 10 else w[:5] + w[-5:] for w in words]
    assert kept["head"] != kept["tail"] != kept["head-tail"]

    def expected(how: str) -> np.ndarray:
        return peft_logits(pool / "mine" / FIRST, tiny("bert"), [" ".join(w) for w in kept[how]], 5)

    ran("--ensemble", select(pool, "--method", "omni"), "--output", tmp_path / "all")
    ensemble = Ensemble.load(tmp_path / "all")
    found = ensemble.logits(texts)[ensemble.members.index(FIRST)]
    np.testing.assert_allclose(found, expected(truncation), rtol=0, atol=2e-5)
    said = "" if truncation == "head" else f"; what was kept of them in training: {truncation}"
    assert f"- Texts are cut after 12 tokens{said}.\n" in (tmp_path / "all" / "README.md").read_text()
    member = ("--pool", pool, "--task", "mine", "--member", FIRST)
    for form in ("peft", "merged"):
        capsys.readouterr()
        ran(*member, "--format", form, "--output", tmp_path / form)
        assert ("heads and tails of long texts, which no" in capsys.readouterr().err) == (truncation == "head-tail")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / form)
        ours = [tokenizer(text, truncation=True)["input_ids"][1:-1] for text in texts]
        there = tokenizer([" ".join(w) for w in kept["head" if truncation == "head-tail" else truncation]])
        assert ours == [ids[1:-1] for ids in there["input_ids"]]
        here = "; what the tokeniser here keeps: head" if truncation == "head-tail" else ""
        assert f"- Texts are cut after 12 tokens{said}{here}.\n" in (tmp_path / form / "README.md").read_text()


@pytest.mark.parametrize(
    ("family", "kind"), [*((f, "binary") for f in FAMILY_NAMES), ("bert", "multiclass"), ("bert", "regression")]
)
def test_a_pipeline_gives_the_labels(tiny: Callable[[str], Path], tmp_path: Path, kind: Kind, family: str) -> None:
    from transformers import pipeline

    write_pool(tmp_path / "pool", tiny(family), kind, columns=2, entries=ENTRIES[:1], max_length=12)
    texts = texts_of(10, 2, seed=3)
    logits = peft_logits(tmp_path / "pool" / "mine" / FIRST, tiny(family), texts, C[kind], max_length=12)
    member = ("--pool", tmp_path / "pool", "--task", "mine", "--member", FIRST)
    ran(*member, "--format", "merged", "--output", tmp_path / "out")
    pipe = pipeline("text-classification", str(tmp_path / "out"))
    found = pipe([{"text": one, "text_pair": two} for one, two in texts], truncation=True)
    if kind == "regression":
        assert [f["label"] for f in found] == ["mine"] * 10
        np.testing.assert_allclose([f["score"] for f in found], logits[:, 0], rtol=0, atol=2e-5)
        return
    p = softmax(logits, axis=1) if kind == "multiclass" else np.hstack([expit(-logits), expit(logits)])
    assert [f["label"] for f in found] == [str(i) for i in p.argmax(axis=1)]
    np.testing.assert_allclose([f["score"] for f in found], p.max(axis=1), rtol=0, atol=2e-5)


def test_a_fully_fine_tuned_member(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    write_pool(tmp_path / "pool", tiny("bert"), "multiclass", entries=(Member(lr=1e-5),), finetune="full")
    (name,) = (p.name for p in (tmp_path / "pool/mine").glob("full-*"))
    member = ("--pool", tmp_path / "pool", "--task", "mine", "--member", name, "--output", tmp_path / "out")
    with pytest.raises(UserError, match=f"{name}: fully fine-tuned, so it has no adapter; use --format merged"):
        ran(*member)
    ran(*member, "--format", "merged")
    texts = texts_of(8, 1, seed=3)
    expected = peft_logits(tmp_path / "pool" / "mine" / name, tiny("bert"), texts, 5)
    np.testing.assert_allclose(answers(tmp_path / "out", texts), expected, rtol=0, atol=2e-5)


# Folders


def test_an_existing_folder_stays(trained: Callable[..., Path], tmp_path: Path) -> None:
    given = ("--pool", trained("bert", "multiclass", members=2), "--task", "mine", "--member", FIRST, "--output")
    out = tmp_path / "out"
    ran(*given, out)
    with pytest.raises(UserError, match=r"out: is there already; .* --overwrite"):
        ran(*given, out)
    (out / "stale").write_text("")
    ran(*given, out, "--overwrite")
    assert not (out / "stale").exists()
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "README.md").write_text("mine")
    with pytest.raises(UserError, match="precious: not a folder that lora-ensemble export wrote"):
        ran(*given, precious, "--overwrite")
    assert (precious / "README.md").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "precious"]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_leaves_no_half_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int) -> None:
    """Killed while it is filled, after the first rename, and after the second: one or the other is there, whole."""
    out = tmp_path / "out"

    def write(version: str) -> None:
        with whole_folder(out, overwrite=True) as new:
            (new / "README.md").write_text(f"{SIGNED} {version}")
            if renames == 0 and version == "new":
                os._exit(9)

    write("old")
    real, done = os.rename, []

    def killed(a: Path, b: Path) -> None:
        real(a, b)
        done.append(a)
        if len(done) == renames:
            os._exit(9)

    if (child := os.fork()) == 0:
        os.rename = killed  # type: ignore[assignment]
        write("new")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    if out.exists():
        assert (out / "README.md").read_text() == f"{SIGNED} {'new' if renames == 2 else 'old'}"
    else:
        assert renames == 1
        with pytest.raises(UserError, match="is there already"), whole_folder(out, overwrite=False):
            pass
        assert (out / "README.md").read_text() == f"{SIGNED} old"  # put back
    write("third")
    assert (out / "README.md").read_text() == f"{SIGNED} third"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# Bad input


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--output o", "expected either --ensemble FILE, or --member NAME"),
        ("--output o --ensemble d.json --member m", "expected either --ensemble FILE, or --member NAME"),
        ("--output o --member m", "--member m: also needs --pool DIR and --task T"),
        ("--ensemble d.json", "required: --output"),
        ("--output o --ensemble gone.json", "gone.json: No such file"),
        ("--output o --ensemble d.json --format peft", "--format: is for --member"),
        ("--output o --ensemble d.json --merge --rank 4", "--merge is gone: "),
        ("--output o --member m --pool gone --task t", "no such member; members of this task: none"),
        ("--output o --ensemble d.json --private", "--private: is for --push"),
        ("--output o --ensemble d.json --push a/b/c", "--push 'a/b/c': not the name of a repository"),
        ("--output o --ensemble d.json --push me/mine", "HF_HUB_OFFLINE is set"),
    ],
)
def test_bad_input(
    given: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", *given.split()]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert message in said
    assert list(tmp_path.iterdir()) == []


# The hub


class Hub:
    """Stands where ``HfApi`` does: keeps what it is given, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.calls = error, list[Any]()

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> str:
        self.calls.append((repo_id, private, exist_ok))
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        if self.error is not None:
            raise self.error
        self.calls.append((repo_id, sorted(p.name for p in folder_path.iterdir())))


def test_push(
    trained: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    pool = str(trained("bert", "multiclass", members=2))
    given = ["export", "--pool", pool, "--task", "mine", "--member", FIRST, "--push", "me/mine"]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert main([*given, "--output", str(tmp_path / "a")]) == 2
    assert "not logged in to the Hugging Face hub; run `hf auth login`" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()

    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a-token")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    assert main([*given, "--output", str(tmp_path / "a"), "--private"]) == 0
    assert "pushed to https://hub/me/mine" in capsys.readouterr().out
    assert hub.calls[0] == ("me/mine", True, True)
    assert hub.calls[1] == ("me/mine", sorted(p.name for p in (tmp_path / "a").iterdir()))

    for error in (OSError("no route\nto it"), HTTPError("403 Forbidden")):
        hub.error = error
        assert main([*given, "--output", str(tmp_path / "b"), "--overwrite"]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert f"{str(error).splitlines()[0]}; {tmp_path / 'b'} is written" in said
        assert (tmp_path / "b" / "adapter_model.safetensors").is_file()
