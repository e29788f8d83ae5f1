"""The model card of what is exported: what it is, how good it honestly is, what it is made of and not meant for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lora_ensemble import __version__
from lora_ensemble.dicor import record
from lora_ensemble.dicor.table import decides, offsets
from lora_ensemble.ensemble.folder import MEMBERS, SIGNED, Base
from lora_ensemble.pool import MemberRecord
from lora_ensemble.tasks import Kind, Task

_SCORE: dict[Kind, str] = {"multiclass": "accuracy", "binary": "accuracy", "regression": "Pearson r"}


def ensemble_card(
    name: str,
    chosen: record.Ensemble,
    records: Sequence[MemberRecord],
    *,
    text: Sequence[str],
    max_length: int,
    bases: Mapping[str, Base],
    with_base: bool,
    with_examples: bool,
) -> str:
    """The card of a whole ensemble; ``name``: of its folder."""
    sample = _sample(text, loading=f'ensemble = Ensemble.load("{name}")  # this folder, or its dicor.json')
    inside = "in `base/`" if with_base else "not in this folder: " + "; ".join(_named(b) for b in bases.values())
    parts = [
        _front("lora-ensemble", ["lora", "ensemble", "peft"], bases.values()),
        f"# {name}",
        f"{_task(chosen.task, chosen.kind, chosen.labels, text)} {_size(chosen.size)} over "
        f"{' and '.join(_named(b) for b in bases.values())}; it decides by {decides(chosen.strategy, chosen.kind)}.",
        _offsets(chosen),
        f"## Use\n\nWith the package `lora_ensemble` ({__version__} wrote this) and, of what it depends on, torch, "
        "transformers, safetensors and numpy; `pip install --no-deps .` in its clone leaves out the rest.\n\n"
        f"```python\nfrom lora_ensemble import Ensemble\n\n{sample}\n```\n\n"
        "From the hub, load what `huggingface_hub.snapshot_download` gives. "
        f"The base model is {inside}. Each folder in `{MEMBERS}/{chosen.task}/` that has an `adapter_config.json` is "
        "one that `peft` loads by itself.",
        _estimates(chosen),
        "## Members\n\n" + _members(chosen, records),
        _data(chosen.examples, records, inside=with_examples),
        _limits(chosen.kind, max_length),
        _signature(),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def single_card(
    name: str,
    task: Task,
    base: Base,
    records: Sequence[MemberRecord],
    *,
    text: Sequence[str],
    merged_format: bool,
    max_length: int,
    examples: str | None,
    about: Sequence[str],
) -> str:
    """The card of one model; ``about``: paragraphs on where it comes from and how good it is.

    ``text``: the columns that it reads, if known. ``records``: the members that it was made from. ``examples``:
    fingerprint of dev. ``merged_format``: a plain transformers model, not a PEFT folder.
    """
    library = "transformers" if merged_format else "peft"
    use = _pipeline(name, task, text) if merged_format else _peft(name, task, text, base)
    parts = [
        _front(library, ["lora", "lora-ensemble"], [base]),
        f"# {name}",
        f"{_task(task.name, task.kind, task.labels, text)} One model over {_named(base)}, "
        + ("its LoRA merged into the weights." if merged_format else "as a LoRA adapter with its head."),
        f"## Use\n\n```python\n{use}\n```",
        "## How good it is\n\n" + "\n\n".join(about),
        _data(examples, records, inside=False),
        _limits(task.kind, max_length),
        _signature(),
    ]
    return "\n\n".join(parts) + "\n"


def about_member(r: MemberRecord) -> list[str]:
    """How good a member is, as far as its record says."""
    score = "unknown" if r.score is None else f"{r.score:.4f}"
    return [
        f"Member `{r.name}`: {_SCORE[r.kind]} {score} on dev, at epoch {r.best_epoch or 'unknown'} of "
        f"{r.epochs_done or 'unknown'}. In-sample: the epoch was chosen on that very dev set, and the member "
        "perhaps for its score there, so this flatters. No honest estimate was made of it."
    ]


def _front(library: str, tags: Sequence[str], bases: Any) -> str:
    lines = ["---", f"library_name: {library}", "pipeline_tag: text-classification", "tags:"]
    lines += [f"- {tag}" for tag in tags]
    on_hub = [base.name for base in bases if base.on_hub]
    if on_hub:  # the hub takes its own names only
        lines += ["base_model:", *(f"- {name}" for name in on_hub)]
    return "\n".join([*lines, "# license: yours to choose, as far as the base model and the data let you", "---"])


def _task(name: str, kind: Kind, labels: Sequence[str], text: Sequence[str]) -> str:
    reads = f"{' and '.join(f'`{t}`' for t in text)}, " if text else ""
    what = "a pair of texts" if len(text) == 2 else "a text" if text else "text"
    if kind == "regression":
        return f"Task `{name}`: from {what} ({reads}as trained), a value."
    named = ", ".join(f"`{label}`" for label in labels)
    return f"Task `{name}`: from {what} ({reads}as trained), one of {named}."


def _size(members: int) -> str:
    return "One model" if members == 1 else f"{members} members in one pass"


def _named(base: Base) -> str:
    at = f" at {base.revision}" if base.revision else ""
    return f"`{base.name}`{at}" if base.on_hub else f"`{base.name}` (a local folder of whoever trained this)"


def _sample(text: Sequence[str], *, loading: str) -> str:
    texts = '[("A man plays a guitar.", "Somebody makes music.")]' if len(text) == 2 else '["A quiet, moving film."]'
    return f"{loading}\nprint(ensemble.predict({texts}))"


def _pipeline(name: str, task: Task, columns: Sequence[str]) -> str:
    text = '{"text": "One text.", "text_pair": "Another."}' if len(columns) == 2 else '"A quiet, moving film."'
    lines = [
        "from transformers import pipeline\n",
        f'model = pipeline("text-classification", "{name}")',
        f"print(model({text}, truncation=True))" + ("  # the score is the value" if task.kind == "regression" else ""),
    ]
    return "\n".join(lines)


def _peft(name: str, task: Task, columns: Sequence[str], base: Base) -> str:
    where = base.name if base.on_hub else f"FOLDER/{base.name}"
    texts = '"One text.", "Another."' if len(columns) == 2 else '"A quiet, moving film."'
    meaning = {
        "multiclass": f"# {task.labels}",
        "binary": f"# above 0: {task.labels[1]!r}" if task.labels else "",
        "regression": "# the value",
    }[task.kind]
    return f"""\
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

# A head that the base has for other classes is left aside: the adapter brings its own.
base = AutoModelForSequenceClassification.from_pretrained(
    "{where}", num_labels={task.num_outputs}, ignore_mismatched_sizes=True
)
model = PeftModel.from_pretrained(base, "{name}").eval()
tokenizer = AutoTokenizer.from_pretrained("{name}")
print(model(**tokenizer({texts}, truncation=True, return_tensors="pt")).logits)  {meaning}"""


def _offsets(chosen: record.Ensemble) -> str:
    return "" if chosen.offsets is None else offsets(chosen.scale, chosen.offsets, chosen.labels)


def _estimates(chosen: record.Ensemble, *, title: bool = True) -> str:
    """The record's figures: the ensemble, the single best member and Omni."""
    name = _SCORE[chosen.kind]
    sides = [
        (f"this ensemble ({chosen.method}, {chosen.size} members)", chosen.estimate),
        (f"single best member ({chosen.best['name']})", chosen.best),
        (f"Omni (all {chosen.omni['members']} members)", chosen.omni),
    ]
    if not title:
        sides[0] = (sides[0][0].replace("this", "the", 1), sides[0][1])
    rows = [
        f"| {name} on dev | in-sample | honest | {chosen.estimate['level']:.0%} interval |",
        "| --- | --- | --- | --- |",
    ]
    for what, figures in sides:
        honest = figures["honest"]
        cells = ("-", "-") if honest is None else (_number(honest["value"]), _span(honest))
        rows.append(f"| {what} | {_number(figures['in_sample'])} | {cells[0]} | {cells[1]} |")
    gains = [
        f"Against {what}: {d['value']:+.4f} ({_span(d, sign=True)}), "
        f"{'beyond' if d['beyond_noise'] else 'within'} noise."
        for what, key in (("the single best", "to_best"), ("Omni", "to_omni"))
        if (d := chosen.estimate.get(key)) is not None
    ]
    if chosen.repeats:
        how = (
            f"Honest: members and their epochs were chosen without one of {chosen.folds} parts of dev and scored on "
            f"it, {chosen.repeats} times over. In-sample: scored on the very dev set that was chosen on: it flatters."
        )
    else:
        how = "There were too few examples for an honest estimate. In-sample figures flatter: they are of the very dev "
        how += "set that was chosen on."
    gains += [f"Notice: {notice}." for notice in chosen.notices]
    head = ["## How good it is"] if title else []
    return "\n\n".join([*head, "\n".join(rows), " ".join([*gains, how])])


def _members(chosen: record.Ensemble, records: Sequence[MemberRecord]) -> str:
    rows = [f"| member | rank r | scaling c | targets | lr | {_SCORE[chosen.kind]} on dev, in-sample | weight |"]
    rows.append("| " + " | ".join(["---"] * 7) + " |")
    for m, r in zip(chosen.members, records, strict=True):
        known = ["-" if v is None else f"{v:g}" if isinstance(v, float) else str(v) for v in (m.rank, m.scaling)]
        lr = "-" if r.lr is None else f"{r.lr:g}"
        what = "full fine-tuning" if r.finetune == "full" else m.targets or "head only"
        rows.append(f"| {m.name} | {known[0]} | {known[1]} | {what} | {lr} | {m.score:.4f} | {m.weight:.4f} |")
    return "\n".join(rows)


def _data(examples: str | None, records: Sequence[MemberRecord], *, inside: bool) -> str:
    train = sorted({r.train_fingerprint for r in records if r.train_fingerprint})
    versions = {json.dumps(r.versions, sort_keys=True) for r in records if r.versions}
    lines = [
        f"- dev examples: fingerprint `{examples or 'unknown'}` (ids and labels)",
        f"- training examples: fingerprint {', '.join(f'`{t}`' for t in train) or 'unknown'} (ids, texts and labels)",
    ]
    for one in sorted(versions):
        lines.append("- trained with " + ", ".join(f"{k} {v}" for k, v in json.loads(one).items()))
    said = "Ids and labels of dev are in this folder, texts are not." if inside else "No example is in this folder."
    return f"## Data\n\n{said} What it was made from:\n\n" + "\n".join(lines)


def _limits(kind: Kind, max_length: int) -> str:
    does = "give a value to" if kind == "regression" else "sort"
    lines = [
        f"- Texts are cut after {max_length} tokens.",
        "- The estimates hold for examples like those of dev. On texts of another origin, time or language they say "
        "nothing.",
        "- What is unbalanced or wrong in the training data, or in the base model's, is in here too. No group of "
        "people or texts was looked at by itself.",
    ]
    if kind != "regression":
        lines.append("- Its probabilities are not frequencies unless that was checked on your own data.")
    return (
        f"## Limits and intended use\n\nIt is meant to {does} texts like those that it was trained on, where a mistake "
        "can be noticed and put right. It is not meant to decide about people alone, nor to write text.\n\n"
        + "\n".join(lines)
    )


def _signature() -> str:
    return f"Written by `{SIGNED}` {__version__}."


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


def _span(d: Mapping[str, float], *, sign: bool = False) -> str:
    low, high = (f"{d[key]:+.4f}" if sign else f"{d[key]:.4f}" for key in ("low", "high"))
    return f"{low} to {high}"
