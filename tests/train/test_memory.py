"""What memory is free, what a bank takes, and how members are put into banks, against measurements and brute force."""

from __future__ import annotations

import itertools
import math
import os
import resource
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from lora_ensemble.bank.lora import Member
from lora_ensemble.bank.model import row_width
from lora_ensemble.train.data import BankData
from lora_ensemble.train.module import BankModule
from lora_ensemble.train.runs import memory, probe
from lora_ensemble.train.runs.memory import Need, cautious_need, free_host_memory, is_out_of_memory, peak_bytes
from lora_ensemble.train.runs.plan import Finished, Plan, PlannedBank, arrange, read_plan, write_plan

CPU = torch.device("cpu")


def machine(folder: Path, group: str, files: dict[str, str]) -> dict[str, Path]:
    """A /proc and a /sys/fs/cgroup with 8 GiB available."""
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/meminfo").write_text("MemTotal: 99999999 kB\nMemAvailable: 8388608 kB\n")
    (folder / "proc/self/cgroup").write_text(group)
    (folder / "proc/self/status").write_text("VmPeak: 5 kB\nVmSize: 4 kB\n")
    for name, content in files.items():
        (folder / "cgroups" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "cgroups" / name).write_text(content)
    return {"proc": folder / "proc", "cgroups": folder / "cgroups"}


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    [
        ("0::/\n", {}, 8 * 2**30),
        # Version 2: a limit of 3000 with 1000 in use, of which 200 can be given back; none above it.
        (
            "0::/a/b\n",
            {
                "a/b/memory.max": "3000\n",
                "a/b/memory.current": "1000\n",
                "a/b/memory.stat": "anon 5\ninactive_file 200\n",
                "a/memory.max": "max\n",
            },
            2200,
        ),
        # The group above is tighter.
        (
            "0::/a/b\n",
            {
                "a/b/memory.max": "3000\n",
                "a/b/memory.current": "1000\n",
                "a/b/memory.stat": "inactive_file 0\n",
                "a/memory.max": "2500\n",
                "a/memory.current": "2400\n",
                "a/memory.stat": "inactive_file 0\n",
            },
            100,
        ),
        # In a container: the path is the host's, the limit lies at our root.
        (
            "0::/docker/123\n",
            {"memory.max": "700\n", "memory.current": "100\n", "memory.stat": "inactive_file 0\n"},
            600,
        ),
        # Version 1.
        (
            "9:name=systemd:/\n4:cpu,memory:/job\n0::/\n",
            {
                "memory/job/memory.limit_in_bytes": "5000\n",
                "memory/job/memory.usage_in_bytes": "1500\n",
                "memory/job/memory.stat": "cache 9\ntotal_inactive_file 50\n",
            },
            3550,
        ),
        ("0::/a\n", {"a/memory.max": "10\n", "a/memory.current": "50\n", "a/memory.stat": "inactive_file 0\n"}, 0),
    ],
)
def test_free_memory_is_the_tightest_limits(tmp_path: Path, group: str, files: dict[str, str], expected: int) -> None:
    assert free_host_memory(**machine(tmp_path, group, files)) == expected


def test_the_process_own_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (10_000, 10_000))
    assert free_host_memory(**machine(tmp_path, "0::/\n", {})) == 10_000 - 4 * 1024


def test_without_unix_the_hosts_memory_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows: the module can be imported, and says that the host cannot be measured; a GPU still can."""
    assert memory.measurable(CPU)
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.delattr(os, "sysconf")
    measurable = runpy.run_path(memory.__file__, run_name="imported_anew")["measurable"]
    assert not measurable(CPU)
    assert measurable(torch.device("cuda"))


def test_this_machine_has_memory() -> None:
    assert 2**26 < free_host_memory() < 2**46


def test_peak_is_what_was_held_at_once() -> None:
    def work() -> None:
        a = torch.ones(1_000_000)  # 4 MB
        b = torch.ones(500_000)  # 2 MB more
        del a
        c = torch.ones(750_000)  # 3 MB beside b's 2
        del b, c

    for _ in range(2):  # a second measurement sees the same
        assert peak_bytes(work, CPU) == pytest.approx(6e6, rel=1e-3)


def test_a_need_is_a_line() -> None:
    need = Need.through([(1, 130), (2, 160)])
    assert (need.shared, need.each, need.of(10)) == (100, 30, 400)
    assert [need.fits(n) for n in (99, 129, 130, 159, 400)] == [0, 0, 1, 1, 10]


class Setting:
    """A module of some members, its data and a Trainer, on the CPU."""

    def __init__(self, base: Path, root: Path, *entries: Member, tasks: tuple[str, ...] = ("sst", "sts")) -> None:
        self.data = BankData(str(base), str(root), tasks)
        self.data.setup("fit")
        self.module = BankModule(self.data.tasks, str(base), entries)
        self.trainer = pl.Trainer(
            logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu", max_epochs=2
        )
        self.data.trainer = self.trainer

    def trial(self) -> probe.Trial:
        return probe.Trial(self.module, self.data, self.trainer)


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "modernbert"])  # packed, padded, and of other layers
def test_a_larger_bank_takes_what_two_and_three_foretell(
    tiny: Callable[[str], Path], demo_root: Path, family: str
) -> None:
    """At most a fiftieth less and a tenth more, in both phases; the estimate without a probe is above it."""
    trial = Setting(tiny(family), demo_root, Member(rank=4, targets="all-linear", seed=list(range(7))))
    measured = trial.trial()
    few = [measured.peaks(list(range(m))) for m in (2, 3, 7)]
    for phase in ("train", "dev"):
        need = Need.through([(2, few[0][phase]), (3, few[1][phase])])
        assert 0.98 < need.of(7) / few[2][phase] < 1.1
    batches = trial.data.train_dataloader()
    longest = [int(split.lengths.max()) for split in batches.splits.values()]
    estimate = cautious_need(
        trial.module.bank.config,
        width=row_width(trial.module.bank.shapes),
        tokens=8 * sum(longest),
        longest=max(longest),
    )
    assert 1.2 * max(few[2].values()) < estimate.of(7) < 20 * max(few[2].values())


def test_the_largest_steps_by_brute_force(tiny: Callable[[str], Path], demo_root: Path) -> None:
    trial = Setting(tiny("bert"), demo_root, Member())
    batches = trial.data.train_dataloader()
    padded, real = [], []
    for epoch in range(2):
        for step in range(len(batches)):
            lengths = [batches.splits[n].lengths[batches._rows(n, epoch, step)] for n in ("sst", "sts")]
            padded.append(sum(len(x) * max(x) for x in lengths))
            real.append(sum(sum(x) for x in lengths))
    found = probe.largest_steps(batches, 2)
    lengths = [[batches.splits[n].lengths[rows] for n, rows in step.items()] for step in found]
    assert sum(len(x) * max(x) for x in lengths[0]) == max(padded)
    assert sum(sum(x) for x in lengths[-1]) == max(real)
    assert min(padded) < max(padded)


def test_a_probe_decides_where_the_estimate_is_too_large(
    tiny: Callable[[str], Path], demo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory for four and a half members takes four, for less than one takes one; no random state moves."""
    trial = Setting(tiny("bert"), demo_root, Member(rank=4, seed=list(range(9))))
    measured = trial.trial()
    four, five = (measured.peaks(list(range(m)))["train"] for m in (4, 5))
    assert four < five
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    states = torch.random.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    for free, expected in ((four * 0.5 + five * 0.5, 4), (four / 9, 1), (five * 100, 9)):
        monkeypatch.setattr(memory, "usable_memory", lambda _, free=free: int(free))
        fit, why = probe.members_that_fit(trial.module, trial.data, trial.trainer)
        assert fit == expected
        assert ("probe of 1 to 3 members" in why) == (expected < 9)
    assert torch.equal(states[0], torch.random.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002


def test_a_probe_that_does_not_fit(
    tiny: Callable[[str], Path], demo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = Setting(tiny("bert"), demo_root, Member(rank=4, seed=[1, 2, 3]))
    monkeypatch.setattr(memory, "usable_memory", lambda _: 1)
    original = BankModule.with_members
    for most in (1, 0):

        def refuse(self: BankModule, members: Sequence[Any], most: int = most) -> BankModule:
            if len(members) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return original(self, members)

        monkeypatch.setattr(BankModule, "with_members", refuse)
        assert probe.members_that_fit(trial.module, trial.data, trial.trainer)[0] == most


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
            True,
        ),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("expected scalar type Float"), False),
        (ValueError("not enough memory"), False),
    ],
)
def test_what_out_of_memory_looks_like(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_torch_says_it_in_words_that_are_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert is_out_of_memory(caught.value)


# The plan


@pytest.mark.parametrize(
    ("count", "size", "lengths"), [(5, 2, [2, 2, 1]), (10, 4, [4, 3, 3]), (3, 9, [3]), (3, 1, [1] * 3)]
)
def test_banks_are_few_and_even(count: int, size: int, lengths: list[int]) -> None:
    cut = arrange([range(count)], size, width=lambda rows: 1)
    assert [len(rows) for rows in cut] == lengths
    assert sorted(itertools.chain(*cut)) == list(range(count))


def test_the_order_that_pads_least(tiny: Callable[[str], Path], demo_root: Path) -> None:
    """A row is as long as the largest rank at each layer of its bank asks: the sorted order, by hand."""
    needs = [1, 9, 2, 8]
    orders = [[0, 1, 2, 3], [0, 2, 3, 1]]
    assert arrange(orders, 2, width=lambda rows: max(needs[i] for i in rows)) == [[0, 2], [1, 3]]  # 2·2 + 2·9 = 22
    assert arrange(orders[:1], 2, width=lambda rows: max(needs[i] for i in rows)) == [[0, 1], [2, 3]]  # 34
    assert arrange(orders, 2, width=lambda rows: 5) == [[0, 1], [2, 3]]  # the user's order where nothing is gained


def test_the_shapes_are_those_of_the_smaller_bank(tiny: Callable[[str], Path], demo_root: Path) -> None:
    """Names and shapes as a bank of these members alone has them, and their number by hand."""
    entries = [
        Member(rank=4, targets="all-linear"),
        Member(rank=2),
        Member(targets="none"),
        Member(rank=3, targets="qkv"),
    ]
    module = Setting(tiny("bert"), demo_root, *entries).module
    for rows in ([0], [1, 2], [2], [1, 3], [0, 1, 2, 3]):
        alone = module.with_members([module.members[i] for i in rows])
        assert list(module.bank.row_shapes(rows).items()) == list(alone.bank.shapes.items())
        assert alone.bank.weights.shape[1] == row_width(module.bank.row_shapes(rows))
    heads = (5 * 32 + 5) + (1 * 32 + 1)
    assert row_width(module.bank.row_shapes([2])) == heads
    # Two layers; query, key and value; A and B of the larger rank.
    assert row_width(module.bank.row_shapes([1, 3])) == 2 * 3 * 2 * 3 * 32 + heads


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    end = Finished(max_epochs=3, max_steps=-1, header=["member", "best epoch", "s"], rows=[["a", 2, None]])
    plan = Plan(banks=[PlannedBank(members=["a"], finished=end), PlannedBank(members=["b", "c"])], why="2 fit")
    assert read_plan(tmp_path, ["a", "b", "c"]) is None
    write_plan(tmp_path, plan)
    assert read_plan(tmp_path, ["c", "b", "a"]) == plan
    assert [p.name for p in tmp_path.iterdir()] == ["banks.json"]
    assert plan.describe() == "3 members in 2 banks of 2 to 1 (2 fit)"
    halved = plan.replaced(plan.banks[1], [PlannedBank(members=["b"]), PlannedBank(members=["c"])], "why")
    assert [b.members for b in halved.banks] == [["a"], ["b"], ["c"]]
    assert halved.splits == ["why"]
    assert len({b.key for b in halved.banks}) == 3
    assert math.isfinite(halved.banks[0].finished.max_steps if halved.banks[0].finished else math.nan)
