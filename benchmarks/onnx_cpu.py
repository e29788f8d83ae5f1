"""Would ONNX Runtime answer faster than our one pass? An ensemble of LoRA members on the CPU, float32, one thread.

    python benchmarks/onnx_cpu.py                          # needs onnx, onnxruntime and onnxscript beside [test]
    python benchmarks/onnx_cpu.py --members 11 --texts 128 --repeats 7

Four sides, in turns, on the same made-up examples of SST's lengths: one member, merged, by plain transformers and by
ONNX Runtime, both on padded batches of examples of like length; the bank of all members, packed, as ``Ensemble`` asks
it; and the bank's own graph in ONNX Runtime, as far as it can be exported: for the one row of lengths that it was
traced with. An ensemble in ONNX Runtime is M sessions, so M times the second side. The file is not called onnx.py,
which would hide the package of that name.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_ensemble.bank.base_model import load_classifier, load_tokenizer
from lora_ensemble.bank.lora import Member, expand_members
from lora_ensemble.bank.model import Bank
from lora_ensemble.ensemble.restored import TOKENS
from lora_ensemble.ensemble.single import merge
from lora_ensemble.tasks import Task
from lora_ensemble.text.packing import fill, layout
from machine import describe
from workload import SHAPES, random_model, sst_lengths

NEEDED = ("onnx", "onnxruntime", "onnxscript")
BATCH = 32
_TASK = Task(name="made-up", kind="multiclass", text=["sentence"], label_names=list("01234"))


class _OneRow(torch.nn.Module):
    """A bank that answers one packed row of known lengths: all but the tokens is constant."""

    def __init__(self, bank: Bank, row: dict[str, Any]) -> None:
        super().__init__()
        self.bank, self.row = bank, row

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.bank({_TASK.name: {**self.row, "input_ids": input_ids}})[_TASK.name]


def bank_of(base_model: str, members: int) -> Bank:
    """Members of rank 8 on query and value that do differ."""
    classifier, fresh = load_classifier(base_model, num_labels=_TASK.num_outputs)
    entries = [Member(rank=8, scaling=1.0, targets="qv", seed=i) for i in range(members)]
    bank = Bank(classifier, members=expand_members(entries), tasks=[_TASK], fresh=fresh)
    torch.manual_seed(1)
    with torch.no_grad():
        for i in range(members):
            adapter, heads = bank.member_state(i)
            for _, b in adapter.values():
                b.normal_(std=0.02)
            bank.load_member(i, adapter, heads)
    return bank.eval().requires_grad_(False)


def merged_member(bank: Bank, base_model: str) -> Any:
    """The bank's first member as a plain transformers model."""
    adapter, heads = bank.member_state(0)
    classifier, _ = load_classifier(base_model, num_labels=_TASK.num_outputs)
    return merge(classifier, adapter, heads[_TASK.name], scaling=1.0).requires_grad_(False)


def padded(texts: Sequence[np.ndarray]) -> list[dict[str, torch.Tensor]]:
    """Batches of texts of like length, the longest first."""
    batches = []
    for start in range(0, len(texts), BATCH):
        rows = [torch.from_numpy(t) for t in texts[start : start + BATCH]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
        batches.append({"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)})
    return batches


def packed(texts: Sequence[np.ndarray], budget: int) -> list[dict[str, Any]]:
    """The same texts as packed rows of about ``budget`` tokens."""
    lengths = np.array([len(t) for t in texts])
    number = np.cumsum(lengths) // budget
    rows = []
    for places in np.split(np.arange(len(texts)), np.flatnonzero(np.diff(number)) + 1):
        ids = fill(torch.from_numpy(np.concatenate([texts[i] for i in places])))
        rows.append({"input_ids": ids, "token_type_ids": torch.zeros_like(ids), **layout(lengths[places])})
    return rows


def session_of(model: Any, example: tuple[torch.Tensor, ...], names: list[str], file: Path, **how: Any) -> Any:
    """An ONNX Runtime session of one thread."""
    import onnxruntime

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(model, example, str(file), input_names=names, output_names=["logits"], dynamo=True, **how)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


class _Logits(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor) -> Any:
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, return_dict=False
        )[0]


def in_turns(sides: dict[str, Callable[[], np.ndarray]], repeats: int) -> dict[str, list[float]]:
    """Seconds of the processor for each side, so that other work on the machine counts less.

    The order moves on by one in each round, and the first round is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for repeat in range(repeats + 1):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            start = time.process_time()
            sides[name]()
            if repeat:
                seconds[name].append(time.process_time() - start)
    return seconds


def ratio(a: Sequence[float], b: Sequence[float], times: float = 1.0) -> str:
    """The rounds' ratios of a to b: median (minimum – maximum)."""
    each = [times * x / y for x, y in zip(a, b, strict=True)]
    return f"{statistics.median(each):.2f} ({min(each):.2f} – {max(each):.2f})"


def check(what: str, found: np.ndarray, wanted: np.ndarray) -> None:
    """The sides answer the same, and say something."""
    difference = float(np.abs(found - wanted).max())
    print(f"{what}: logits differ by {difference:.1e} at most, of a spread of {np.ptp(wanted):.2f}", flush=True)
    if not difference < 1e-3 * np.ptp(wanted):
        raise SystemExit(f"{what}: not the same model")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", default="all-MiniLM-L6-v2", help=f"or random weights: {', '.join(SHAPES)}")
    parser.add_argument("--members", type=int, default=11)
    parser.add_argument("--texts", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args(arguments)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"skipped: {', '.join(missing)} not installed; pip install {' '.join(NEEDED)}")
        return 0
    torch.set_num_threads(1)
    print(f"{describe('cpu', 1)}; load {', '.join(f'{x:.1f}' for x in os.getloadavg())}", flush=True)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False), torch.no_grad():
        base = random_model(args.base_model, Path(folder) / "base") if args.base_model in SHAPES else args.base_model
        bank, vocabulary = bank_of(base, args.members), len(load_tokenizer(base))
        model = merged_member(bank, base)
        rng = np.random.default_rng(0)
        lengths = np.sort(sst_lengths(args.texts))[::-1]
        texts = [rng.integers(min(1000, vocabulary - 1), vocabulary, size=n) for n in lengths]
        batches, rows = padded(texts), packed(texts, TOKENS // args.members)
        dynamic = {0: torch.export.Dim("B", min=1, max=512), 1: torch.export.Dim("L", min=2, max=512)}
        names = list(batches[0])
        one = session_of(
            _Logits(model),
            tuple(batches[0].values()),
            names,
            Path(folder) / "one.onnx",
            dynamic_shapes=[dynamic] * 3,
        )
        feeds = [{name: tensor.numpy() for name, tensor in batch.items()} for batch in batches]
        sides: dict[str, Callable[[], np.ndarray]] = {
            "torch, one member": lambda: np.concatenate([model(**batch).logits.numpy() for batch in batches]),
            "ONNX Runtime, one member": lambda: np.concatenate([one.run(None, feed)[0] for feed in feeds]),
            "bank, all members": lambda: np.concatenate(
                [bank({_TASK.name: r})[_TASK.name].numpy() for r in rows], axis=1
            ),
        }
        answers = {name: side() for name, side in sides.items()}
        check("ONNX Runtime and torch", answers["ONNX Runtime, one member"], answers["torch, one member"])
        check("bank and torch", answers["bank, all members"][0], answers["torch, one member"])
        traced: dict[str, Callable[[], np.ndarray]] = {}
        try:
            # Of its own: it cannot be traced once it has answered and keeps the addresses of its weights.
            row = _OneRow(bank_of(base, args.members), rows[0])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                graph = torch.export.export(row, (rows[0]["input_ids"],), strict=True)
            whole = session_of(graph, (), ["input_ids"], Path(folder) / "bank.onnx")
            feed = {"input_ids": rows[0]["input_ids"].numpy()}
            traced = {
                "bank, one row": lambda: bank({_TASK.name: rows[0]})[_TASK.name].numpy(),
                "ONNX Runtime, the bank's graph of that row": lambda: whole.run(None, feed)[0],
            }
            check("the bank's graph and the bank", *(side() for side in reversed(traced.values())))
        except Exception as e:  # the exporter raises whatever it meets
            print(
                f"the bank cannot be exported: {type(e).__name__}: {str(e).strip().splitlines()[0][:200]}", flush=True
            )
        seconds = in_turns({**sides, **traced}, args.repeats)
        print(f"load {', '.join(f'{x:.1f}' for x in os.getloadavg())} after it")
    print("\n| side | processor ms / text, median (min – max) |\n| --- | --- |")
    for name, values in seconds.items():
        n = rows[0]["examples"] if name in traced else args.texts
        ms = [1e3 * v / n for v in values]
        print(f"| {name} | {statistics.median(ms):.2f} ({min(ms):.2f} – {max(ms):.2f}) |")
    plain, runtime, ours = (seconds[name] for name in sides)
    print(f"\none member, torch / ONNX Runtime: {ratio(plain, runtime)}")
    print(f"{args.members} members, {args.members} × ONNX Runtime / bank: {ratio(runtime, ours, args.members)}")
    if traced:
        ours, runtime = (seconds[name] for name in traced)
        print(f"the bank's graph of one row, bank / ONNX Runtime: {ratio(ours, runtime)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
