"""The base model is pinned: other weights, settings or tokens under its name are refused, unless told otherwise."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import FAMILY_NAMES, REPOSITORY
from pool_factory import refused
from safetensors.numpy import load_file, save_file
from test_cli import Program
from test_ensemble import select
from trained_pool import ENTRIES, write_pool

from lora_ensemble import Ensemble
from lora_ensemble.dicor.cli import main as dicor
from lora_ensemble.main import main

MEMBERS = "[{rank: 2, targets: qkv, lr: 1e-2}, {rank: 3, targets: qkv, lr: 1e-2}]"
FIRST = "r2-c1-qkv-lr1e-2-s11711"
TEXTS = ["A bright and gripping story.", "slow music"]


def other_weights(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    louder = {name: w * 4 if w.ndim == 2 else w for name, w in tensors.items()}
    save_file(louder, base / "model.safetensors", metadata={"format": "pt"})


def other_setting(base: Path, **settings: object) -> None:
    config = json.loads((base / "config.json").read_text())
    assert settings.keys() <= config.keys()
    (base / "config.json").write_text(json.dumps(config | settings))


def other_vocabulary(base: Path) -> None:
    """Each word's number is another word's, past the special tokens."""
    raw = json.loads((base / "tokenizer.json").read_text())
    words = list(raw["model"]["vocab"])
    raw["model"]["vocab"] = dict(zip([*words[:5], *words[:4:-1]], range(len(words)), strict=True))
    (base / "tokenizer.json").write_text(json.dumps(raw))


def other_case(base: Path) -> None:
    """The vocabulary stays, but words with capital letters are no longer in it."""
    raw = json.loads((base / "tokenizer.json").read_text())
    assert raw["normalizer"]
    (base / "tokenizer.json").write_text(json.dumps(raw | {"normalizer": None}))


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights": (other_weights, "weights '"),
    "hidden_act": (lambda base: other_setting(base, hidden_act="relu"), "hidden_act 'gelu' in training, 'relu' here"),
    "layer_norm_eps": (
        lambda base: other_setting(base, layer_norm_eps=0.5),
        "layer_norm_eps 1e-12 in training, 0.5 here",
    ),
    "vocabulary": (other_vocabulary, "tokenizer '"),
    "case": (other_case, "tokenizer '"),
}


class Trained(Program):
    """A trained pool over a base model of its own, and the record of an ensemble of all its members."""

    def __init__(self, folder: Path, base: Path, root: Path, *extra: str, members: str = MEMBERS) -> None:
        super().__init__(folder, shutil.copytree(base, folder / "base"), root)
        self.members, self.extra, self.record = members, extra, folder / "dicor.json"
        other_weights(self.base)  # random ones of the usual size hardly tell texts apart
        assert self("fit") == 0
        chosen = ["--method", "omni", "--output", str(self.record)]
        assert dicor(["select", "--pool", str(self.pool), "--task", "sst", *chosen]) == 0
        (folder / "in.txt").write_text("\n".join(TEXTS) + "\n")

    def __call__(self, command: str, *extra: str, **kw: str) -> int:
        """A command of the Trainer's, or one that takes the ensemble."""
        own = {
            "infer": [
                "--ensemble",
                self.record,
                "--input",
                self.folder / "in.txt",
                "--output",
                self.folder / "out.txt",
            ],
            "export": ["--ensemble", self.record, "--output", self.folder / "exported"],
            "member": ["--pool", self.pool, "--task", "sst", "--member", FIRST, "--output", self.folder / "exported"],
        }
        if command not in own:
            return super().__call__(command, *self.extra, *extra, **{"members": self.members, **kw})
        return main([command.replace("member", "export"), *map(str, own[command]), *extra])

    def records(self) -> list[Path]:
        return sorted(self.pool.glob("*/*/member.json"))


@pytest.fixture(scope="module")
def _trained(tiny: Callable[[str], Path], demo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"), tiny("bert"), demo_root)


@pytest.fixture
def trained(_trained: Trained, tmp_path: Path) -> Iterator[Trained]:
    """Put back as it was trained, after each test."""
    kept = shutil.copytree(_trained.folder, tmp_path / "kept")
    yield _trained
    shutil.rmtree(_trained.folder)
    shutil.copytree(kept, _trained.folder)


@pytest.mark.parametrize("change", CHANGES)
def test_what_another_base_model_is(trained: Trained, capsys: pytest.CaptureFixture[str], change: str) -> None:
    """It changes what the members say; and it is refused by both ways to load them."""
    before = Ensemble.load(trained.record).logits(TEXTS)
    how, said = CHANGES[change]
    how(trained.base)
    way_out = "put back the one of the training, or take this one all the same with --any-base"
    with refused(FIRST, f"trained over another {trained.base}: ", said, way_out):
        Ensemble.load(trained.record)
    assert trained("validate") == 2
    told = capsys.readouterr().err
    assert said in told
    assert FIRST in told
    assert len(told.splitlines()) == 1
    assert np.abs(Ensemble.load(trained.record, any_base=True).logits(TEXTS) - before).max() > 1e-3


GOING_ON = {
    "infer": ("infer",),
    "export": ("export",),
    "export --member": ("member", "--format", "merged"),
    "validate": ("validate",),
    "test": ("test",),
    "predict": ("predict",),
    "fit": ("fit", "--ckpt_path=last", "--trainer.max_epochs=3"),
    "sweep": ("sweep",),
    "longer sweep": ("sweep", "--trainer.max_epochs=3"),
}


@pytest.mark.parametrize("name", GOING_ON)
def test_every_command_refuses(trained: Trained, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """And goes on all the same when told to."""
    command = GOING_ON[name]
    extra = [f"--data.tasks={_labelled_test()}"] if name == "test" else []
    other_weights(trained.base)
    before = [path.read_bytes() for path in trained.records()]
    assert trained(*command, *extra) == 2
    told = capsys.readouterr().err.strip()
    assert "\n" not in told
    assert f"{trained.pool / 'sst' / FIRST}: " in told
    assert "weights '" in told
    assert [path.read_bytes() for path in trained.records()] == before
    flag = "--any-base" if command[0] in ("infer", "export", "member") else "--pool.any_base=true"
    assert trained(*command, *extra, flag) == 0


def _labelled_test() -> str:
    # The preset's, but scored on dev.
    task = {"name": "sst", "kind": "multiclass", "text": ["sentence"], "label": "sentiment"}
    files = {"train": "ids-sst-train.csv", "dev": "ids-sst-dev.csv", "test": "ids-sst-dev.csv"}
    return json.dumps([task | files | {"label_names": list("01234")}])


def test_serve_refuses(trained: Trained, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import uvicorn

    other_weights(trained.base)
    command = ["serve", "--ensemble", str(trained.record), "--port", "0"]
    assert main(command) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "weights '" in printed.err
    monkeypatch.setattr(uvicorn, "Server", lambda config: SimpleNamespace(run=lambda sockets: None))
    assert main([*command, "--any-base"]) == 0
    assert "2 members: http://" in capsys.readouterr().out


def test_a_teacher_is_refused(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    """And what another base model said is not kept for those who did not ask for it."""
    other_weights(trained.base)
    learn = ("distill", f"--ensemble={trained.record}", f"--pool.dir={trained.folder / 'students'}")
    for command in (learn, (*learn, "--pool.any_base=true"), learn):
        assert trained(*command) == (0 if len(command) > len(learn) else 2)
        assert ("weights '" in capsys.readouterr().err) == (command == learn)


def test_a_checkpoint_says_it_too(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the pool has nothing yet: interrupted before the first dev evaluation."""
    last = trained.run_dir() / "checkpoint" / "last.ckpt"
    elsewhere = f"--pool.dir={trained.folder / 'empty'}"
    other_weights(trained.base)
    for command in (("validate",), ("fit", "--trainer.max_epochs=3")):
        assert trained(*command, f"--ckpt_path={last}", elsewhere) == 2
        assert "--ckpt_path: the checkpoint was trained over another " in capsys.readouterr().err
        assert trained(*command, f"--ckpt_path={last}", elsewhere, "--pool.any_base=true") == 0


def test_the_digits(trained: Trained) -> None:
    """From the file of weights itself, which has the encoder alone."""
    digest = hashlib.sha256()
    for name, array in sorted(load_file(trained.base / "model.safetensors").items()):
        digest.update(f"{name} {list(array.shape)}\n".encode() + array.astype("<f4").tobytes())
    for path in trained.records():
        assert json.loads(path.read_text())["base_fingerprint"]["weights"] == digest.hexdigest()[:16]


def test_a_pool_of_an_earlier_version(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    """One notice, however many members, banks and parts; and a sweep trains none of it again."""
    for path in trained.records():
        raw = json.loads(path.read_text())
        del raw["base_fingerprint"]
        raw["settings"]["max_length"] = 40 if raw["rank"] == 2 else None
        path.write_text(json.dumps(raw))
    other_weights(trained.base)
    notice = "an earlier version did not record which base model it was"
    assert trained("infer") == 0
    told = capsys.readouterr().err
    assert told.count(notice) == 1
    assert str(trained.pool) in told
    for path in trained.records():
        path.write_text(
            json.dumps({**(raw := json.loads(path.read_text())), "settings": raw["settings"] | {"max_length": None}})
        )
    trained.pool = trained.pool.rename(trained.folder / "moved")
    assert trained("validate", "--bank_size=1") == 0
    assert capsys.readouterr().err.count(notice) == 1
    assert trained("sweep") == 0
    assert "2 of 2 members are finished" in capsys.readouterr().out
    trained.pool = trained.pool.rename(trained.folder / "pool")
    last = trained.run_dir() / "checkpoint" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    del content["bank"]["base_fingerprint"], content["bank"]["revision"]
    torch.save(content, last)
    assert trained("fit", "--ckpt_path=last", "--trainer.max_epochs=3") == 0
    assert capsys.readouterr().err.count(notice) == 1


def test_a_fully_fine_tuned_member_brings_its_weights(
    tmp_path: Path, tiny: Callable[[str], Path], demo_root: Path
) -> None:
    trained = Trained(tmp_path, tiny("bert"), demo_root, "--model.finetune=full", members="[{lr: 1e-3}]")
    before = Ensemble.load(trained.record).logits(TEXTS)
    other_weights(trained.base)
    assert trained("validate") == 0
    assert trained("export") == 0
    for given in (trained.record, tmp_path / "exported"):
        np.testing.assert_array_equal(Ensemble.load(given).logits(TEXTS), before)
    other_setting(trained.base, hidden_act="relu")
    with refused("full-", "hidden_act"):
        Ensemble.load(trained.record)
    other_setting(trained.base, hidden_act="gelu")
    other_case(trained.base)
    with refused("full-", "tokenizer"):
        Ensemble.load(trained.record)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_family_leaves_and_comes_back_the_same(tmp_path: Path, tiny: Callable[[str], Path], family: str) -> None:
    write_pool(tmp_path / "pool", tiny(family), "binary", entries=ENTRIES[:1])
    file, out = select(tmp_path / "pool", "--method", "omni"), tmp_path / "out"
    assert main(["export", "--ensemble", str(file), "--output", str(out)]) == 0
    np.testing.assert_array_equal(Ensemble.load(out).logits(TEXTS), Ensemble.load(file).logits(TEXTS))
    other_weights(next((out / "base").iterdir()))
    with refused("r2-c2", "weights '"):
        Ensemble.load(out)


def test_an_export_brings_it_along(trained: Trained) -> None:
    out = trained.folder / "exported"
    assert trained("export") == 0
    before = Ensemble.load(trained.record).logits(TEXTS)
    other_weights(trained.base)
    np.testing.assert_array_equal(Ensemble.load(out).logits(TEXTS), before)
    assert main(["export", "--ensemble", str(out), "--output", str(trained.folder / "again")]) == 0
    other_weights(out / "base" / "base")
    with refused(FIRST, "weights '"):
        Ensemble.load(out)


def test_a_frozen_encoder_has_all_its_weights(
    tmp_path: Path, tiny: Callable[[str], Path], demo_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pooler that is drawn anew at each start would be another one at each; so would positions that do not fit."""
    for name, lacking in (("no-pooler", "2 weights of its encoder (bert.pooler.dense.bias"), ("longer", "1 weights")):
        program = Program(tmp_path / name, shutil.copytree(tiny("bert"), tmp_path / name / "base"), demo_root)
        if name == "longer":
            other_setting(program.base, max_position_embeddings=128)
        else:
            tensors = load_file(program.base / "model.safetensors")
            kept = {n: w for n, w in tensors.items() if "pooler" not in n}
            save_file(kept, program.base / "model.safetensors", metadata={"format": "pt"})
        assert program("fit", members=MEMBERS) == 2
        assert f"'{program.base}' lacks {lacking}" in capsys.readouterr().err
        assert program("fit", "--model.finetune=full", "--trainer.max_epochs=1", members="[{lr: 1e-3}]") == 0
        assert program("validate", "--model.finetune=full", "--trainer.max_epochs=1", members="[{lr: 1e-3}]") == 0


def test_the_runs_name_is_what_it_was(trained: Trained) -> None:
    """From the settings of the run without the new one, which an earlier version did not have."""
    raw = yaml.safe_load((trained.run_dir() / "config.yaml").read_text())
    assert raw["model"].pop("revision") is None
    assert "revision" not in raw["data"]
    assert raw["model"].pop("metrics") == []
    assert raw["model"].pop("frozen_cache") == 20
    later = {"layers": "all", "patience": None, "dropout": 0.0, "init": "normal", "bag": False}
    later |= dict.fromkeys(("lr_b", "weight_decay", "peft"))
    assert [{key: m.pop(key) for key in later} for m in raw["model"]["members"]] == [later] * 2
    assert raw["data"].pop("truncation") == "head"
    assert raw["data"].pop("overall") is None
    assert (raw["data"].pop("folds"), raw["data"].pop("refit")) == (0, False)
    from lora_ensemble.train.options import NOT_THE_RUN

    what: dict[str, Any] = {
        "model": raw["model"],
        "data": {k: v for k, v in raw["data"].items() if k not in ("eval_batch_size", "predict_split")},
        "trainer": {k: v for k, v in raw["trainer"].items() if k not in NOT_THE_RUN},
    }
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
    assert trained.run_dir().name == f"sst-{digest[:8]}"


def test_a_folder_has_no_revision(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    assert trained("validate", "--model.revision=abc") == 2
    assert f"model.revision: abc; {trained.base} is a folder here" in capsys.readouterr().err


# A model of the hub

ON_THE_HUB = """
import json, sys
from pathlib import Path

from lora_ensemble import Ensemble
from lora_ensemble.dicor.cli import main as dicor
from lora_ensemble.main import main
from lora_ensemble.train.runs import ray_sweep

home, root = map(Path, sys.argv[1:])
newest = home / "hf/hub/models--someone--encoder/refs/main"
A, B, C = "a" * 40, "b" * 40, "c" * 40
FIRST = "[{rank: 2, targets: qkv, lr: 1e-2, name: one}]"
SECOND = "[{rank: 3, targets: qkv, lr: 1e-2, name: two}]"
THIRD = "[{rank: 4, targets: qkv, lr: 1e-2, name: three}]"


def lora_ensemble(command, *extra, members=FIRST, pool="pool"):
    given = ["--data.root", root, "--data.tasks", "[sst]", "--model.base_model", "someone/encoder", "--model.members",
        members, "--pool.dir", home / pool, "--trainer.default_root_dir", home, "--trainer.accelerator", "cpu",
        "--trainer.max_epochs", 2, "--trainer.enable_progress_bar", "false"]
    return main([command, *map(str, given), *extra])


def record(name, pool="pool"):
    return json.loads((home / pool / "sst" / name / "member.json").read_text())


def ensemble(*members):
    assert dicor(["select", "--pool", str(home / "pool"), "--task", "sst", "--method", "omni", "--output",
        str(home / "dicor.json")]) == 0
    return Ensemble.load(home / "dicor.json")


texts = ["A bright and gripping story.", "slow music"]
newest.write_text(A)
assert lora_ensemble("fit") == 0
assert record("one")["revision"] == A
before = ensemble().logits(texts)

newest.write_text(B)  # a branch that moved
assert lora_ensemble("validate") == 2
assert lora_ensemble("fit", "--ckpt_path=last", "--trainer.max_epochs=3") == 2
assert lora_ensemble("validate", "--model.revision", A) == 0
assert lora_ensemble("fit", "--ckpt_path=last", "--trainer.max_epochs=3", "--model.revision", A) == 0
assert record("one")["epochs_done"] == 3
before = ensemble().logits(texts)  # restored at the recorded revision without being told
newest.write_text(A)
assert (ensemble().logits(texts) == before).all()
newest.write_text(B)
assert lora_ensemble("fit", members=SECOND) == 0
assert record("two")["revision"] == B
for part in ("weights", "tokenizer"):
    assert record("one")["base_fingerprint"][part] != record("two")["base_fingerprint"][part]
both = ensemble()
assert (both.logits(texts)[both.members.index("one")] == before[0]).all()
for member in ("one", "two"):
    export = ["export", "--pool", str(home / "pool"), "--task", "sst", "--member", member, "--format", "peft"]
    assert main([*export, "--output", str(home / member)]) == 0
    assert json.loads((home / member / "adapter_config.json").read_text())["revision"] == record(member)["revision"]

# A commit that changes no weights: both members over one copy of the encoder.
newest.write_text(C)
assert lora_ensemble("fit", members=THIRD) == 0
three = ensemble()
assert sorted(len(part.places) for part in three._parts) == [1, 2]
assert abs(three.logits(texts)[three.members.index("one")] - before[0]).max() < 2e-5
newest.write_text(B)
(home / "pool/sst/three").rename(home / "three-of-sst")

# Banks that are trained elsewhere have the driver's.
sent = []
ray_sweep.train = lambda options, settings, *rest: sent.append(json.loads(settings))
lora_ensemble("sweep", "--ray.address=local", members="[{rank: [4, 5]}]", pool="other")
assert sent[0]["model"]["revision"] == B

# A student has its teacher's.
(home / "pool/sst/two").rename(home / "two-of-sst")
ensemble()
student = ["--data.root", str(root), "--trainer.default_root_dir", str(home), "--trainer.accelerator", "cpu",
    "--trainer.enable_progress_bar", "false", "--ensemble", str(home / "dicor.json"), "--trainer.max_epochs=1"]
assert main(["distill", *student, "--pool.dir", str(home / "students")]) == 0
(student_record,) = (home / "students/sst").glob("*/member.json")
assert json.loads(student_record.read_text())["revision"] == A
other = ["--model.base_model", str(newest.parent.parent / "snapshots" / B), "--pool.dir", str(home / "others")]
assert main(["distill", *student, *other]) == 0
print("all of it")
"""


def test_a_model_of_the_hub(tmp_path: Path, tiny: Callable[[str], Path], demo_root: Path) -> None:
    """Three commits in a cache of the hub's own layout, one with other weights and tokens, and its newest one moves."""
    hub = tmp_path / "hf" / "hub" / "models--someone--encoder"
    _, two, _ = (shutil.copytree(tiny("bert"), hub / "snapshots" / (letter * 40)) for letter in "abc")
    other_weights(two)
    other_vocabulary(two)
    (hub / "refs").mkdir()
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    (tmp_path / "run.py").write_text(ON_THE_HUB)
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path), str(demo_root)]
    environment["PYTHONPATH"] = str(REPOSITORY)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.stdout.endswith("all of it\n"), done.stdout + done.stderr
    assert done.stderr.count(f"go back with --model.revision {'a' * 40}") == 2
