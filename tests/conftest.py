"""Tiny random encoders of every family with a tokeniser, and small data: nothing is fetched, nothing is real."""

from __future__ import annotations

import os

# Before torch: tiny models gain nothing from threads, and threads of several processes stall each other on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "disabled"
os.environ["HF_HUB_OFFLINE"] = "1"

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# A shell's background job ignores these, and so would all that the tests start.
for number in (signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

REPOSITORY = Path(__file__).parent.parent
FAMILY_NAMES = ["bert", "roberta", "distilbert", "electra", "deberta-v2", "modernbert"]
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def tiny_config(family: str, vocabulary: int) -> Any:
    """A configuration with two layers of width 32."""
    import transformers as tf

    sizes: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 96,
        "pad_token_id": 0,
    }
    if family == "bert":
        return tf.BertConfig(**sizes)
    if family == "roberta":
        return tf.RobertaConfig(**sizes, type_vocab_size=1)
    if family == "electra":
        return tf.ElectraConfig(**sizes, embedding_size=16)
    if family == "distilbert":
        return tf.DistilBertConfig(
            vocab_size=vocabulary, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=96
        )
    if family == "deberta-v2":
        relative = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
        # As in microsoft/deberta-v3: shared keys, normalised positions, no token types.
        shared = {"share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False}
        return tf.DebertaV2Config(**sizes, **relative, **shared, type_vocab_size=0, pooler_hidden_size=32)
    return tf.ModernBertConfig(
        **sizes, global_attn_every_n_layers=2, local_attention=8, bos_token_id=2, cls_token_id=2, eos_token_id=3,
        sep_token_id=3,
    )  # fmt: skip


def save_tiny(folder: Path, family: str, words: list[str]) -> Path:
    """A random model of a family without a head of its own, and a tokeniser that knows ``words``."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import AutoModel, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(SPECIALS + sorted(set(words)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", model_max_length=90, **names)
    fast.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        AutoModel.from_config(tiny_config(family, len(vocabulary))).save_pretrained(folder)
    return folder


def packed(padded: dict[str, Any]) -> dict[str, Any]:
    """A padded batch as a packed row: the tokens where the mask is 1, one example after another."""
    from lora_ensemble.text.packing import fill, layout

    mask = padded["attention_mask"].bool()
    names = [n for n in ("input_ids", "token_type_ids") if n in padded]
    rest = {n: t for n, t in padded.items() if n not in (*names, "attention_mask")}
    return {n: fill(padded[n][mask]) for n in names} | layout(mask.sum(1).numpy()) | rest


@pytest.fixture(scope="session")
def demo_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's data, small, in the course's format."""
    from make_data import write_demo_data

    folder = tmp_path_factory.mktemp("demo")
    write_demo_data(folder, sizes={"train": 60, "dev": 30, "test": 20})
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, demo_root: Path) -> Callable[[str], Path]:
    """Family name to the folder of a tiny random model, made once."""
    made: dict[str, Path] = {}
    words = [
        w.lower() for p in demo_root.glob("*.csv") for w in p.read_text().replace(".", " ").replace(",", " ").split()
    ]

    def get(family: str) -> Path:
        if family not in made:
            made[family] = save_tiny(tmp_path_factory.mktemp(family), family, words)
        return made[family]

    return get


@pytest.fixture(scope="session")
def trained(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Family, kind and more of ``trained_pool.write_pool`` to its pool, made once: for reading, or to be copied."""
    from trained_pool import ENTRIES, write_pool

    made: dict[Any, Path] = {}

    def get(family: str, kind: Any, *, columns: int = 1, members: int = len(ENTRIES), n: int = 24) -> Path:
        key = (family, kind, columns, members, n)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("trained") / "pool"
            write_pool(made[key], tiny(family), kind, columns=columns, entries=ENTRIES[:members], n=n)
        return made[key]

    return get
