"""A chosen ensemble in one pass against its members merged and run one after another, as plain transformers models.

    python benchmarks/one_pass.py --task sst --members 11 --repeats 5

Sides: ``Ensemble`` (one encoder, texts sorted by length and packed); merged models, texts in the order of the file,
padded, 32 at a time; the same sorted by length; with ``--ours``, the first alone. Every measurement is a process of its
own that has imported the libraries; in each repeat the order of the sides moves on by one. Tokenising is part of all of
them, once per text.

The first answer: from nothing loaded to the decision about one text. Memory: growth of the resident size (CUDA: what
torch allocated) from before anything is loaded. Exit code 1 where the sides do not give the same logits.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_ensemble.bank.base_model import load_classifier, load_tokenizer
from lora_ensemble.bank.lora import Member, expand_members, single
from lora_ensemble.bank.member_files import weight_files
from lora_ensemble.bank.model import Bank
from lora_ensemble.dicor.cli import main as dicor
from lora_ensemble.pool import MemberRecord, write_examples, write_member
from lora_ensemble.tasks import PRESETS
from lora_ensemble.text.readers import read_split
from machine import PeakMemory, choose_device, describe, in_fresh_process, synchronize
from workload import SHAPES, random_model

_TOLERANCE = {"32": 1e-3, "bf16": 0.2}  # logits are of size 1; bf16 has 8 bits


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one process measured."""

    first_s: float
    """From nothing loaded to the first answer."""
    seconds: float
    """All texts, everything loaded."""
    memory: int
    """Bytes."""
    logits: np.ndarray
    """(M, N, C)"""


def make(
    folder: Path, task_name: str, members: int, rank: int, targets: str, base_model: str, layers: str = "all"
) -> None:
    """A pool of members with random weights and their ensemble, and each merged into a model of its own."""
    task = PRESETS[task_name]
    classifier, fresh = load_classifier(base_model, num_labels=task.num_outputs)
    seeds = list(range(members))
    entries = expand_members([Member(rank=rank, targets=targets, layers=layers, seed=seeds)])
    bank = Bank(classifier, members=entries, tasks=[task], fresh=fresh)
    rng = np.random.default_rng(0)
    n = 50
    labels = rng.uniform(0, 5, n) if task.kind == "regression" else rng.integers(2, size=n)
    fingerprint = write_examples(folder / "pool", task.name, "dev", [f"d{i}" for i in range(n)], labels)
    for i, member in enumerate(entries):
        adapter, heads = bank.member_state(i)
        for _, b in adapter.values():
            b.copy_(torch.from_numpy(rng.normal(0, 0.02, b.shape)))
        bank.load_member(i, adapter, heads)
        files = weight_files(bank, i, task, base_model=base_model, revision=None)
        files["dev.logits.npy"] = rng.normal(size=(n, task.num_outputs)).astype(np.float32)
        record = MemberRecord(
            **member.recorded(), task=task.name, kind=task.kind, labels=task.labels, finished=True, text=task.text,
            examples={"dev": fingerprint}, base_model=base_model, finetune="lora",
        )  # fmt: skip
        write_member(folder / "pool", record, files)
        merged, _ = load_classifier(base_model, num_labels=task.num_outputs)
        with torch.no_grad():
            for path, (a, b) in adapter.items():
                merged.base_model.get_submodule(path).weight += single(member.scaling) * b @ a
            merged.load_state_dict(heads[task.name], strict=False)
        merged.save_pretrained(folder / "merged" / member.name)
    select = ["select", "--pool", str(folder / "pool"), "--task", task.name, "--method", "omni"]
    if dicor([*select, "--output", str(folder / "dicor.json")]):
        raise SystemExit("dicor select failed")


def ours(folder: Path, texts: list[Any], base_model: str, device: str, precision: str, threads: int) -> Run:
    """One pass."""
    from lora_ensemble import Ensemble

    torch.set_num_threads(threads)
    memory, start = PeakMemory(device), time.perf_counter()
    ensemble = Ensemble.load(folder / "dicor.json", device=device, precision=precision)  # type: ignore[arg-type]
    ensemble.predict(texts[:1])
    first = time.perf_counter() - start
    ensemble.predict(texts[:64])
    start = time.perf_counter()
    logits = ensemble.logits(texts)
    seconds = time.perf_counter() - start
    order = np.argsort(ensemble.members)
    return Run(first_s=first, seconds=seconds, memory=memory.bytes(), logits=logits[order])


def in_file_order(folder: Path, texts: list[Any], base_model: str, device: str, precision: str, threads: int) -> Run:
    """Merged models one after another, batches of 32 in the order of the file."""
    return _merged(folder, texts, base_model, device, precision, threads, by_length=False)


def by_length(folder: Path, texts: list[Any], base_model: str, device: str, precision: str, threads: int) -> Run:
    """The same, sorted by length."""
    return _merged(folder, texts, base_model, device, precision, threads, by_length=True)


def _merged(
    folder: Path, texts: list[Any], base_model: str, device: str, precision: str, threads: int, *, by_length: bool
) -> Run:
    from transformers import AutoModelForSequenceClassification

    torch.set_num_threads(threads)
    memory, start = PeakMemory(device), time.perf_counter()
    tokenizer = load_tokenizer(base_model)
    models = [
        AutoModelForSequenceClassification.from_pretrained(path).eval().to(device)
        for path in sorted((folder / "merged").iterdir())
    ]

    def logits(texts: list[Any]) -> np.ndarray:
        pairs = not isinstance(texts[0], str)
        columns = list(zip(*texts, strict=True)) if pairs else [texts]
        encoded = tokenizer(*(list(c) for c in columns), truncation="longest_first", max_length=512)
        order = range(len(texts))
        if by_length:
            order = sorted(order, key=lambda i: len(encoded["input_ids"][i]))  # type: ignore[assignment]
        out = np.empty((len(models), len(texts), models[0].config.num_labels), np.float32)
        for m, model in enumerate(models):
            for at in range(0, len(texts), 32):
                rows = list(order[at : at + 32])
                batch = tokenizer.pad({k: [v[i] for i in rows] for k, v in encoded.items()}, return_tensors="pt")
                out[m, rows] = model(**batch.to(device)).logits.float().cpu().numpy()
        return out

    with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        logits(texts[:1])
        first = time.perf_counter() - start
        logits(texts[:64])
        synchronize(device)
        start = time.perf_counter()
        found = logits(texts)
    return Run(first_s=first, seconds=time.perf_counter() - start, memory=memory.bytes(), logits=found)


def main() -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = os.environ.get("LORA_ENSEMBLE_DATA", Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--data_root", type=Path, default=root, help="the course's files")
    parser.add_argument("--task", choices=list(PRESETS), default="sst")
    parser.add_argument("--texts", type=int, default=500, help="of dev, the first (default: 500)")
    parser.add_argument("--members", type=int, default=11)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", default="qv")
    parser.add_argument("--layers", default="all", help="as in the members' settings (default: all)")
    parser.add_argument(
        "--base_model", default="all-MiniLM-L6-v2", help=f"hub id, folder, or random weights: {', '.join(SHAPES)}"
    )
    parser.add_argument("--precision", choices=("32", "bf16"), default="32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ours", action="store_true", help="the one pass alone")
    given = parser.parse_args()
    device = choose_device(given.device)
    split = read_split(PRESETS[given.task], "dev", given.data_root, need_labels=True)
    texts = [t[0] if len(t) == 1 else t for t in zip(*split.texts, strict=True)][: given.texts]
    sides = [ours] if given.ours else [ours, in_file_order, by_length]
    names = {ours: "one pass", in_file_order: "merged, file order", by_length: "merged, by length"}
    runs: dict[Any, list[Run]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        base = given.base_model
        if base in SHAPES:
            base = random_model(base, Path(folder) / "model")
        make(Path(folder), given.task, given.members, given.rank, given.targets, base, given.layers)
        for repeat in range(given.repeats):
            for i in range(len(sides)):
                side = sides[(repeat + i) % len(sides)]
                arguments = (Path(folder), texts, base, device, given.precision, given.threads)
                runs[side].append(in_fresh_process(side, *arguments))
    print(f"{describe(device, given.threads)}; load {os.getloadavg()[0]:.1f}")
    print(
        f"{given.members} members, rank {given.rank} {given.targets}, layers {given.layers}, {given.base_model}, "
        f"{given.precision}; {len(texts)} texts of {given.task} dev; medians of {given.repeats}, ratios pair by pair\n"
    )
    print("| side | texts / s | × file order | first answer, s | memory, MiB | share of file order's |")
    print("|---|---:|---:|---:|---:|---:|")
    peer = runs.get(in_file_order)
    for side, found in runs.items():
        row = [names[side], f"{len(texts) / statistics.median(r.seconds for r in found):.1f}"]
        faster = [p.seconds / r.seconds for p, r in zip(peer, found, strict=True)] if peer else []
        row.append(f"{statistics.median(faster):.2f}" if peer else "")
        row.append(f"{statistics.median(r.first_s for r in found):.2f}")
        row.append(f"{statistics.median(r.memory for r in found) / 2**20:.0f}")
        share = [r.memory / p.memory for p, r in zip(peer, found, strict=True)] if peer else []
        row.append(f"{statistics.median(share):.3f}" if peer else "")
        print("| " + " | ".join(row) + " |")
    worst = max(float(np.abs(r.logits - runs[ours][0].logits).max()) for found in runs.values() for r in found)
    print(f"\nlogits differ by at most {worst:.1e}")
    return int(worst > _TOLERANCE[given.precision])


if __name__ == "__main__":
    sys.exit(main())
