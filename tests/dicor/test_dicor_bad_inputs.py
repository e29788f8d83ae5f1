"""Each mistake of a user: exit code 2 and one line that says where, what, and what to do; never a traceback."""

import json
import shutil

import numpy as np
import pytest
from pool_factory import add_member, make_pool, random_labels, random_logits

from lora_ensemble.dicor.cli import main
from lora_ensemble.pool import MemberRecord, checksum


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A pool of sst and sts with a selection of each beside it, to be copied and then spoilt."""
    folder = tmp_path_factory.mktemp("sound")
    make_pool(folder / "pool", "sst", "multiclass")
    make_pool(folder / "pool", "sts", "regression")
    for task in ("sst", "sts"):
        args = ["--task", task, "--output", str(folder / f"{task}.json"), "--size", "3", "--method", "dicor"]
        assert main(["select", "--pool", str(folder / "pool"), *args]) == 0
    return folder


@pytest.fixture
def home(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def fails(capsys, home):
    """Run dicor; it must fail with one line holding all these words, and write nothing. Returns the line."""

    def run(*args, says):
        before = sorted(home.rglob("*"))
        capsys.readouterr()
        assert main([str(a) for a in args]) == 2
        out, err = capsys.readouterr()
        assert err.splitlines()[-1].startswith("dicor: error: ")
        assert all(line.startswith("dicor: notice: ") for line in err.splitlines()[:-1])
        for words in says:
            assert words in err.splitlines()[-1]
        assert "saved" not in out
        assert sorted(home.rglob("*")) == before
        return err.splitlines()[-1]

    return run


def select(home, *args, task="sst"):
    method = [] if "--method" in args else ["--method", "dicor"]
    return ["select", "--pool", home / "pool", "--task", task, "--output", home / "new.json", *method, *args]


def apply(home, *args, task="sst"):
    return ["apply", "--ensemble", home / f"{task}.json", "--output", home / "p.csv", *args]


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def replace_logits(home, task, name, logits, split="dev"):
    """New logits and the checksum that goes with them: not tampered with, but wrong."""
    folder = home / "pool" / task / name
    np.save(folder / f"{split}.logits.npy", logits.astype(np.float32))
    files = json.loads((folder / "member.json").read_text())["files"]
    edit(folder / "member.json", files={**files, f"{split}.logits.npy": checksum(folder / f"{split}.logits.npy")})


@pytest.mark.parametrize("command", ["select", "compare"])
def test_missing_pool_folder(command, home, fails):
    args = ["--task", "sst", "--output", home / "new.json"] if command == "select" else []
    fails(command, "--pool", home / "nowhere", *args, says=["nowhere: no such folder"])


def test_compare_of_a_folder_without_tasks(home, fails):
    (home / "empty").mkdir()
    fails("compare", "--pool", home / "empty", says=["empty: no task in this folder"])


def test_unknown_task(home, fails):
    fails(*select(home, task="nope"), says=["no task 'nope' in this pool; tasks found: sst, sts"])
    fails("compare", "--pool", home / "pool", "--task", "nope", says=["no task 'nope'"])


def another_member(home, ids=None, **record):
    labels = random_labels("multiclass", 60)
    logits = random_logits("multiclass", labels, 1)[0]
    ids = ids or [f"dev{i}" for i in range(60)]
    add_member(home / "pool", "sst", "multiclass", "m99", {"dev": logits}, {"dev": ids}, {"dev": labels}, **record)


def test_misaligned_ids(home, fails):
    ids = [f"dev{i}" for i in range(60)]
    another_member(home, ids=[*ids[:3], ids[4], ids[3], *ids[5:]])
    fails(
        *select(home), says=["sst/m00 and", "sst/m99 do not belong together", "first in row 3: 'dev3' against 'dev4'"]
    )


def test_mixed_label_orders(home, fails):
    another_member(home, labels=list("43210"))
    fails(*select(home), says=["sst/m00 and", "sst/m99 do not belong together: labels is ['0', '1'"])


def test_nan_logits(home, fails):
    logits = np.zeros((60, 5))
    logits[7, 2] = np.nan
    replace_logits(home, "sst", "m04", logits)
    fails(*select(home), says=["m04/dev.logits.npy: logits are NaN or infinite, first in row 7"])


def test_half_written_member(home, fails):
    (home / "pool" / "sst" / "m02" / "member.json").unlink()
    fails(*select(home), says=["sst/m02: half-written member"])


def test_tampered_file(home, fails):
    path = home / "pool" / "sst" / "m02" / "dev.logits.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    fails(*select(home), says=["m02/dev.logits.npy: tampered with"])


def test_wrong_shape(home, fails):
    replace_logits(home, "sst", "m02", np.zeros((60, 4)))
    fails(*select(home), says=["m02/dev.logits.npy: shape (60, 4); expected (60, 5)"])


def test_dev_examples_without_labels(home, fails):
    logits, ids = np.ones((3, 1)), ["a", "b", "c"]
    add_member(home / "pool", "mine", "binary", "m", {"dev": logits}, {"dev": ids}, {"dev": None})
    fails(*select(home, task="mine"), says=["mine: the dev examples have no labels"])


def test_size_larger_than_the_pool(home, fails):
    fails(*select(home, "--size", 7), says=["task sst: --size 7: the pool has 6 finished members"])
    fails("compare", "--pool", home / "pool", "--size", 7, says=["--size 7"])


@pytest.mark.parametrize("size", [0, -3])
def test_size_below_one(size, home, fails):
    fails(*select(home, f"--size={size}"), says=[f"--size {size}: an ensemble needs at least one member"])


def test_top_k_below_the_size(home, fails):
    fails(*select(home, "--size", 4, "--top-k", 3), says=["--top-k 3 is below --size 4"])
    fails(*select(home, "--top-k", 0), says=["--top-k 0 is below 1"])


def test_constant_predictions_have_no_score_on_a_regression(home, fails):
    for name in [f"m0{i}" for i in range(6)]:
        replace_logits(home, "sts", name, np.full((60, 1), 2.5) + int(name[1:]))
    fails(*select(home, task="sts"), says=["task sts: member m00: its dev predictions are constant (all 2.5)"])


def test_majority_on_a_regression(home, fails):
    fails(
        *select(home, "--strategy", "majority", task="sts"),
        says=["task sts: --strategy majority", "use --strategy mean"],
    )
    fails("compare", "--pool", home / "pool", "--strategy", "majority", says=["task sts: --strategy majority"])


@pytest.mark.parametrize(
    ("where", "says"), [("nowhere/x", "No such file"), ("pool", "is a folder"), ("sst.json/x", "Not a directory")]
)
@pytest.mark.parametrize("command", [select, apply])
def test_unwritable_output(command, where, says, home, fails):
    fails(*command(home), "--output", home / where, says=[str(home / where), says])


def test_an_unwritable_output_is_told_before_the_work(home, fails, monkeypatch):
    def work(*_args, **_kwargs):
        pytest.fail("the pool was opened first")

    monkeypatch.setattr("lora_ensemble.pool.TaskPool", work)
    fails(*select(home), "--output", home / "nowhere" / "x", says=["cannot be written"])
    monkeypatch.setattr("lora_ensemble.dicor.located.read", work)
    fails(*apply(home), "--output", home / "nowhere" / "x", says=["cannot be written"])


def test_a_full_disk(home, fails):
    fails(*select(home), "--output", "/dev/full", says=["No space left on device"])


def test_unwritable_plots(home, fails):
    fails("compare", "--pool", home / "pool", "--plots", home / "sst.json", says=["sst.json: plots cannot be written"])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        ("{", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        ("[]", "it has no schema"),
        ("{}", "it has no schema"),
        ('{"schema": 99}', "schema 99; this version reads schema 2; select again"),
        ('{"schema": 1}', "schema 1; this version reads schema 2; select again"),
        ('{"schema": 2}', "lacks 'kind'"),
        ('{"schema": 2, "members": []}', "lacks 'kind'"),
        ('{"schema": 2, "members": 3}', "not a whole record"),
    ],
)
def test_a_record_that_is_none(content, says, home, fails):
    path = home / "sst.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    fails(*apply(home), says=["sst.json: ", says])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"strategy": "best"}, "strategy is 'best'; expected one of mean, mean-probability, majority, weighted"),
        ({"kind": "other"}, "kind is 'other'"),
        ({"pool": None}, "pool is None; expected text"),
        ({"labels": "01234"}, "labels is '01234'"),
        ({"labels": []}, "multiclass needs them all"),
        ({"size": 2}, "size is 2; expected the number of members, 3"),
        ({"scale": None}, "scale is None; expected a number"),
        ({"strategy": "weighted", "offsets": [0.1, 0.2]}, "offsets is [0.1, 0.2]; expected 5 numbers"),
        ({"strategy": "weighted", "offsets": [0, 0, 0, 0, None]}, "expected 5 numbers, one for each class"),
        (
            {"strategy": "majority", "offsets": [0, 0, 0, 0, 0]},
            "offsets are for a classifier's mean, not for a regression or a majority",
        ),
        ({"extra": 2}, "extra"),
    ],
)
def test_a_record_edited_by_hand(changes, says, home, fails):
    edit(home / "sst.json", **changes)
    fails(*apply(home), says=["sst.json: not a whole record", says])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": "../m00"}, "member name"),
        ({"score": None}, "score is None"),
        ({"rank": "4"}, "rank is '4'"),
        ({"weight": 0}, "weight is 0; expected a number above 0"),
        ({"temperature": -1}, "temperature is -1; expected a number above 0, or null"),
    ],
)
def test_a_members_entry_edited_by_hand(changes, says, home, fails):
    members = json.loads((home / "sst.json").read_text())["members"]
    edit(home / "sst.json", members=[{**members[0], **changes}, *members[1:]])
    fails(*apply(home), says=["not a whole record", says])
    edit(home / "sst.json", members=[members[0], members[0], members[2]])
    fails(*apply(home), says=["not a whole record", "a member is there twice"])


def chosen(home, task="sst", i=1):
    return json.loads((home / f"{task}.json").read_text())["members"][i]["name"]


def test_retrained_member(home, fails):
    name = chosen(home)
    replace_logits(home, "sst", name, random_logits("multiclass", random_labels("multiclass", 60), 1, seed=77)[0])
    fails(*apply(home), says=[f"sst/{name}: not the member that was chosen", "dev logits", "run dicor select again"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kind": "regression"}, "its kind are others"),
        ({"labels": list("43210")}, "its labels are others"),
        ({"examples": {"dev": "0" * 16}}, "its dev examples are others"),
    ],
)
def test_a_chosen_member_that_is_now_of_other_data(changes, says, home, fails):
    edit(home / "pool" / "sst" / chosen(home) / "member.json", **changes)
    fails(*apply(home), says=[f"sst/{chosen(home)}: not the member that was chosen", says])


def test_wrong_shape_of_test_logits(home, fails):
    replace_logits(home, "sst", chosen(home), np.zeros((30, 4)), split="test")
    fails(*apply(home), says=["test.logits.npy: shape (30, 4); expected (30, 5)"])


def test_labels_that_differ(home, fails):
    labels = random_labels("multiclass", 60)
    labels[9] = (labels[9] + 1) % 5
    logits = random_logits("multiclass", labels, 1)[0]
    ids = [f"dev{i}" for i in range(60)]
    add_member(home / "pool", "sst", "multiclass", "m99", {"dev": logits}, {"dev": ids}, {"dev": labels})
    fails(*select(home), says=["do not belong together: dev labels differ, first in row 9 ('dev9'): "])


def test_retrained_member_that_was_not_chosen_is_nobodys_business(home):
    names = {m["name"] for m in json.loads((home / "sst.json").read_text())["members"]}
    other = min({f"m{i:02d}" for i in range(6)} - names)
    replace_logits(home, "sst", other, np.full((60, 5), np.nan))
    assert main([str(a) for a in apply(home)]) == 0


def test_chosen_member_that_is_gone(home, fails):
    shutil.rmtree(home / "pool" / "sst" / chosen(home))
    fails(*apply(home), says=[f"sst/{chosen(home)}: no such member"])


def test_pool_that_is_gone(home, fails):
    shutil.move(home / "pool", home / "moved")
    fails(*apply(home), says=[f"{home / 'pool'}: the ensemble's pool is not there", "say where it is with --pool"])


def test_a_record_that_went_away_from_its_pool(home, fails, tmp_path_factory):
    """Where it lies now, its pool's path leads elsewhere: to nothing, or to a pool without the task."""
    away = tmp_path_factory.mktemp("away")
    shutil.copy(home / "sst.json", away / "sst.json")
    moved = ["apply", "--ensemble", away / "sst.json", "--output", home / "p.csv"]
    fails(*moved, says=[f"{away / 'pool'}: the ensemble's pool is not there", "--pool"])
    make_pool(away / "pool", "other", "multiclass", members=2)
    fails(*moved, says=[f"{away / 'pool'}: no task 'sst' in this pool; say where the ensemble's is with --pool"])
    assert main([str(a) for a in moved] + ["--pool", str(home / "pool")]) == 0


@pytest.mark.parametrize(
    "changes", [{"task": "../pool/sst"}, {"task": ".."}, {"task": ""}, {"examples": "../../x"}, {"task": "a" * 300}]
)
def test_names_in_a_record_that_are_no_names_of_folders(home, fails, changes):
    edit(home / "sst.json", **changes)
    fails(*apply(home), says=["sst.json: not a whole record of dicor select", f"{next(iter(changes.values()))[:20]}"])


@pytest.mark.parametrize("task", ["../pool/sst", "..", "", "sst/", ".hidden", "a" * 300])
def test_a_task_that_is_no_name_of_a_folder(home, fails, task):
    says = [f"task {task!r}: a task's name is a folder's name"]
    for command in (("select", "--output", home / "n.json"), ("compare",), ("report", "--output", home / "n.html")):
        if (command, task) != (("compare",), ""):  # none is all of them
            fails(*command, "--pool", home / "pool", "--task", task, says=says)
    (home / "m.csv").write_text("id,p\na,0.5\n")
    fails("import", home / "m.csv", "--pool", home / "pool", "--task", task, "--task-kind", "binary", says=says)


def test_missing_test_logits(home, fails):
    folder = home / "pool" / "sst" / chosen(home)
    record = MemberRecord.read(folder / "member.json")
    (folder / "test.logits.npy").unlink()
    edit(
        folder / "member.json",
        files={k: v for k, v in record.files.items() if k != "test.logits.npy"},
        examples={"dev": record.examples["dev"]},
    )
    fails(
        *apply(home),
        says=[f"sst/{chosen(home)}: no logits for the test split (1 of 3 members", "lora-ensemble predict"],
    )
    assert main([str(a) for a in apply(home, "--split", "dev")]) == 0


def test_tampered_test_logits(home, fails):
    path = home / "pool" / "sst" / chosen(home) / "test.logits.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    fails(*apply(home), says=["test.logits.npy: tampered with"])


def test_test_logits_of_other_examples(home, fails):
    folder = home / "pool" / "sst" / chosen(home)
    record = MemberRecord.read(folder / "member.json")
    edit(folder / "member.json", examples={**record.examples, "test": "0" * 16})
    fails(*apply(home), says=["have predicted other test examples"])


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["choose"], "invalid choice: 'choose'"),
        (["select"], "the following arguments are required: --pool, --task, --output"),
        (["compare", "--pool", "p", "--size", "many"], "argument --size: invalid number value: 'many'"),
        (["compare", "--pool", "p", "--similarity", "angle"], "argument --similarity: invalid choice: 'angle'"),
        (["compare", "--pool", "p", "--nonsense"], "--nonsense"),
        (["compare", "--pool", "p", "--method", "guess"], "argument --method: invalid choice: 'guess'"),
        (["compare", "--pool", "p", "--trade-off", "much"], "argument --trade-off: invalid float value"),
        (
            ["apply", "--ensemble", "x", "--output", "y", "--split", "train"],
            "argument --split: invalid choice: 'train'",
        ),
    ],
)
def test_mistakes_on_the_command_line(args, says, fails):
    fails(*args, says=[says])


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", '{"schema": 1}', '{"schema": 7}'])
def test_a_member_record_that_is_none(content, home, fails):
    (home / "pool" / "sst" / "m02" / "member.json").write_text(content)
    fails(*select(home), says=["m02/member.json: "])


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--method", "greedy", "--similarity", "kappa"], "--similarity has no meaning for --method greedy; it is for"),
        (["--method", "best", "--size", 2], "--size has no meaning for --method best"),
        (
            ["--method", "dicor", "--trade-off", 0.5],
            "--trade-off has no meaning for --method dicor; it is for dicor-auto",
        ),
        (["--method", "dicor", "--trade-off", 0], "--trade-off has no meaning for --method dicor"),
        (["--method", "dicor-auto", "--trade-off", 1.5], "task sst: trade_off 1.5: expected 0"),
        (["--method", "dicor", "--temperature"], "--temperature: only a classifier's probabilities have one"),
        (["--method", "exhaustive", "--top-k", 20], None),
    ],
)
def test_options_that_make_no_sense_together(args, says, home, fails):
    if says is None:  # 20 of 6 members are 6
        assert main([str(a) for a in select(home, *args)]) == 0
    else:
        fails(*select(home, *args), says=[says])


@pytest.mark.parametrize("similarity", ["kappa", "double-fault"])
def test_similarities_of_classes_on_a_regression(similarity, home, fails):
    fails(
        *select(home, "--similarity", similarity, task="sts"),
        says=[f"task sts: similarity {similarity}: a regression has values", "use pearson, cosine or error"],
    )


def test_test_scores_without_test_labels(home, fails):
    fails(
        "compare", "--pool", home / "pool", "--task", "sst", "--method", "best", "--split", "test",
        says=["sst: the test examples have no labels", "leave out --split test"],
    )  # fmt: skip


def test_epochs_of_another_shape(home, fails):
    folder = home / "pool" / "sst" / "m02"
    np.save(folder / "dev.epochs.npy", np.zeros((3, 59, 5), np.float16))
    files = json.loads((folder / "member.json").read_text())["files"]
    edit(folder / "member.json", files={**files, "dev.epochs.npy": checksum(folder / "dev.epochs.npy")})
    fails(*select(home), says=["m02/dev.epochs.npy: shape (3, 59, 5); expected (E, 60, 5)"])
