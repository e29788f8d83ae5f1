"""What every side of a benchmark trains: the same examples in the same order, the same members, the same base model.

Axes: M members, B examples in a batch, L tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_ensemble.bank.base_model import load_tokenizer, location
from lora_ensemble.bank.families import layer_number, target_paths
from lora_ensemble.bank.lora import ALL_LAYERS, Member, linear_layers
from lora_ensemble.errors import UserError
from lora_ensemble.tasks import PRESETS, Task
from lora_ensemble.text.readers import Split, read_split
from lora_ensemble.train.data import BankData
from lora_ensemble.train.module import BankModule

MADE_UP = "random"
SHAPES = {
    "random:tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "random:minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "random:bert-base": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
}
"""BERT's shapes with random weights; the tokeniser is all-MiniLM-L6-v2's, whose vocabulary is BERT's, or, where that
cannot be had, one of as many made-up words."""

_VOCABULARY = 30_522  # BERT's

# Tokens of SST's training sentences under BERT's tokeniser, [CLS] and [SEP] included: every tenth quantile.
_SST_LENGTHS = [4, 11, 15, 18, 21, 24, 27, 30, 35, 41, 80]
_SEED = 11711


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Settings that all sides share."""

    task: Task
    root: str
    """Folder of the task's files."""
    base_model: str
    batch_size: int
    warmup_steps: int
    steps: int
    """Timed steps."""
    precision: str
    """32 or bf16."""
    rank: int
    scaling: float
    lr: float
    targets: str
    layers: str
    head_dropout: float
    encoder_dropout: float | None
    device: str
    threads: int
    peer_attention: str | None = None
    """PEFT's attention implementation; None for transformers' choice."""

    @property
    def all_steps(self) -> int:
        """Steps of a run."""
        return self.warmup_steps + self.steps

    def members(self, count: int) -> list[Member]:
        """``count`` members that differ in their seeds."""
        common: dict[str, Any] = {"rank": self.rank, "scaling": self.scaling, "lr": self.lr, "targets": self.targets}
        return [Member(**common, layers=self.layers, seed=_SEED + i) for i in range(count)]

    def data(self) -> BankData:
        """The examples, read and tokenised."""
        data = BankData(
            base_model=self.base_model,
            root=self.root,
            tasks=(self.task,),
            batch_size=self.batch_size,
            steps_per_epoch=self.all_steps,
        )
        data.setup("fit")
        return data

    def module(self, members: Sequence[Member]) -> BankModule:
        """The bank as ``lora-ensemble fit`` makes it."""
        return BankModule(
            tasks=[self.task],
            base_model=self.base_model,
            members=tuple(members),
            head_dropout=self.head_dropout,
            encoder_dropout=self.encoder_dropout,
        )

    def order(self, data: BankData) -> list[np.ndarray]:
        """Row numbers (B,) of each step's examples, in the order in which the bank gets them."""
        return [batch[self.task.name]["rows"] for batch in data.train_dataloader()]

    def timed_lengths(self) -> np.ndarray:
        """Tokens of every example of the timed steps; padding is not counted."""
        data = self.data()
        rows = np.concatenate(self.order(data)[self.warmup_steps :])
        return data.splits["train"][self.task.name].lengths[rows]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every benchmark that trains."""
    tasks = [name for name, task in PRESETS.items() if task.train] + [MADE_UP]
    parser.add_argument(
        "--root", type=Path, help="folder of the data files (default: $LORA_ENSEMBLE_DATA, ../shared/data)"
    )
    parser.add_argument(
        "--task",
        nargs="+",
        choices=tasks,
        default=["sst"],
        help=f"{MADE_UP}: made-up sentences as long as SST's, no files needed (default: sst)",
    )
    parser.add_argument(
        "--base_model", default="all-MiniLM-L6-v2", help=f"hub id, folder, or random weights: {', '.join(SHAPES)}"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="examples per step and member (default: 8)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps (default: 20)")
    parser.add_argument("--dev", type=int, default=8, help="dev examples (default: 8; most scripts use none)")
    parser.add_argument("--warmup_steps", type=int, default=3, help="steps before them (default: 3)")
    parser.add_argument("--repeats", type=int, default=5, help="times that every side runs (default: 5)")
    parser.add_argument("--precision", choices=["32", "bf16"], default="32", help="bf16: autocast (default: 32)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--scaling", type=float, default=1.0)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--targets", default="qv", help="as in the members' settings (default: qv)")
    parser.add_argument(
        "--layers",
        default="all",
        help="as in the members' settings (default: all); for others the warm-up is a whole pass over the examples, in "
        "which the bank computes what lies below, and the timed steps are a second one",
    )
    parser.add_argument("--head_dropout", type=float, default=0.3)
    parser.add_argument("--encoder_dropout", type=float, help="default: the model's own")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own")


def workload(args: argparse.Namespace, task: str, folder: Path) -> Workload:
    """The workload of parsed arguments (``args.device`` resolved); its files are written into ``folder``."""
    base_model = random_model(args.base_model, folder / "model") if args.base_model in SHAPES else args.base_model
    twice = args.layers != ALL_LAYERS
    warmup_steps = args.steps if twice else args.warmup_steps
    examples = args.batch_size * (args.steps if twice else warmup_steps + args.steps)
    root = folder / task
    names = {field.name for field in dataclasses.fields(Workload)} - {"task", "root", "base_model", "warmup_steps"}
    return Workload(
        **{name: value for name, value in vars(args).items() if name in names},
        warmup_steps=warmup_steps,
        task=made_up(root, base_model, examples, args.dev)
        if task == MADE_UP
        else _sample(task, data_root(args.root), root, examples, args.dev, args.batch_size),
        root=str(root),
        base_model=base_model,
    )


def data_root(given: Path | None) -> Path:
    """Where the course's files are."""
    return given or Path(os.environ.get("LORA_ENSEMBLE_DATA", "../shared/data"))


def random_model(name: str, folder: Path) -> str:
    """The folder of a random BERT of one of ``SHAPES``, written once, so that every side loads the same files."""
    from transformers import BertConfig, BertModel
    from transformers.utils import logging

    if not folder.exists():
        logging.disable_progress_bar()
        try:
            tokenizer = load_tokenizer("all-MiniLM-L6-v2")
        except UserError:  # neither installed nor fetched
            tokenizer = made_up_tokenizer()
        torch.manual_seed(_SEED)
        shape = SHAPES[name]
        # With BERT's own 0.02 a narrow model says almost the same whatever it reads, and sameness could not be checked.
        config = BertConfig(vocab_size=len(tokenizer), initializer_range=shape["hidden_size"] ** -0.5, **shape)
        BertModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def made_up_tokenizer() -> Any:
    """A tokeniser of BERT's form whose every word is one token, as many as BERT's has, none of them real."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = itertools.product("abcdefghijklmnopqrstuvwxyz", repeat=4)
    words = ["".join(word) for word in itertools.islice(letters, _VOCABULARY - len(specials))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(specials + words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", model_max_length=512, **names)


def _sample(name: str, source: Path, folder: Path, count: int, dev: int, batch_size: int) -> Task:
    """The first ``count`` of a preset's shuffled training examples, and ``dev`` of dev: short runs need not tokenise
    them all.

    Where there are fewer, whole batches of them, so that the peer's loader cuts the same batches in a second pass.
    """
    task = PRESETS[name]
    for split, most in (("train", count), ("dev", dev)):
        full = read_split(task, split, source, need_labels=True)
        whole = max(1, len(full) // batch_size) * batch_size
        rows = np.random.default_rng(_SEED).permutation(len(full))[: min(most, whole)]
        _write(folder / f"{split}.jsonl", task, full, rows)
    return dataclasses.replace(task, train="train.jsonl", dev="dev.jsonl", test=None)


def _write(path: Path, task: Task, split: Split, rows: np.ndarray) -> None:
    assert split.labels is not None
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8") as f:
        for row in rows:
            label = split.labels[row]
            texts = {column: split.texts[i][row] for i, column in enumerate(task.text)}
            named = {task.label: task.labels[label] if task.labels else float(label)}
            f.write(json.dumps({str(task.id): str(split.ids[row]), **texts, **named}) + "\n")


def made_up(folder: Path, base_model: str, count: int, dev: int = 8) -> Task:
    """Sentences of random words with SST's lengths, and random labels."""
    return write_sentences(folder, base_model, sst_lengths(count), dev=dev)


def sst_lengths(count: int) -> np.ndarray:
    """Tokens of ``count`` made-up examples, (count,), distributed as SST's."""
    rng = np.random.default_rng(_SEED)
    return np.interp(rng.random(count), np.linspace(0, 1, len(_SST_LENGTHS)), _SST_LENGTHS).round().astype(int)


def write_sentences(folder: Path, base_model: str, lengths: Sequence[int] | np.ndarray, *, dev: int = 8) -> Task:
    """Made-up five-class examples of the given numbers of tokens, [CLS] and [SEP] included; the first are dev too."""
    rng = np.random.default_rng(_SEED)
    # Whole words of the vocabulary: each is one token.
    words = sorted(w for w in load_tokenizer(base_model).get_vocab() if w.isascii() and w.isalpha() and w.islower())
    task = Task(name=MADE_UP, kind="multiclass", text=["sentence"], label_names=list("01234"), id="id",
                train="train.jsonl", dev="dev.jsonl")  # fmt: skip
    sentences = [" ".join(rng.choice(words, size=max(1, length - 2))) for length in lengths]
    split = Split(np.arange(len(sentences)).astype(str), [sentences], rng.integers(5, size=len(sentences)))
    _write(folder / "train.jsonl", task, split, np.arange(len(sentences)))
    _write(folder / "dev.jsonl", task, split, np.arange(min(dev, len(sentences))))
    return task


def useful_flops(work: Workload, lengths: np.ndarray) -> tuple[float, float]:
    """FLOPs that training one member on examples of these lengths needs, two per multiply-add: attention's and the
    rest.

    Attention's two products, forward and both gradients: 12 H l^2 per layer and example of length l. The rest, per real
    token, forward and the gradient towards the input: 4 x the parameters of the encoder's linear layers (frozen weights
    need no gradient of their own), and for each adapted layer 6 r (in + out), as LoRA's weights are trained. The pooler
    counts once per example, the small head not at all. Layers below the lowest adapted one count for nothing: what they
    make of an example is always the same. The same count for every side: who skips work that nobody reads shows a
    higher share of the peak.
    """
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(location(work.base_model))
    with torch.device("meta"):
        encoder = AutoModel.from_config(config)
    adapted = set(target_paths(encoder, config.model_type, work.targets, work.layers))
    numbers = {path: layer_number(path, config.model_type) for path in linear_layers(encoder)}
    lowest = min(n for path, n in numbers.items() if path in adapted and n is not None)
    rest = 0.0
    for path, layer in linear_layers(encoder).items():
        number = numbers[path]
        if number is not None and number < lowest:
            continue
        flops = 4 * layer.weight.numel()
        if path in adapted:
            flops += 6 * work.rank * (layer.in_features + layer.out_features)
        rest += flops * (len(lengths) if "pooler" in path else float(lengths.sum()))
    squares = float((lengths.astype(np.float64) ** 2).sum())
    return 12 * config.hidden_size * (config.num_hidden_layers - lowest) * squares, rest
