"""What a reproduction's pools say, beside what the report says.

Every figure of ours is read from the pools as dicor reads them; every figure of the report's is in ``papers``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from lora_ensemble.dicor import record
from lora_ensemble.dicor.apply import predict as decide
from lora_ensemble.dicor.apply import write_predictions
from lora_ensemble.dicor.choose.settings import DEFAULT_METHOD, DEFAULT_SIMILARITY, DEFAULT_STRATEGY, MethodName
from lora_ensemble.dicor.choose.similarity import features, pairwise
from lora_ensemble.dicor.compare import Comparison, compare
from lora_ensemble.dicor.estimate.honest import Estimate
from lora_ensemble.dicor.options import Options
from lora_ensemble.dicor.table import about, verdict
from lora_ensemble.errors import UserError
from lora_ensemble.pool import MemberRecord, TaskPool, read_record
from lora_ensemble.scores import overall_score
from lora_ensemble.studies.reproduce import papers
from lora_ensemble.studies.reproduce.markdown import table
from lora_ensemble.studies.reproduce.papers import PAPERS, TASKS, PaperName, Scale
from lora_ensemble.tasks import PRESETS

Predict = Callable[[str, tuple[str, ...], list[MemberRecord]], None]
"""Adds members' test logits to a part's pool, given its folder, its tasks and the members."""

REPORT = "report.md"
_TEST = """

Our test predictions are written in the course's format; where the files have no labels, the score is not known."""


def write_results(paper: PaperName, scale: Scale, output: Path, *, base_model: str, predict: Predict) -> list[Path]:
    """Print and write the tables, and write the test predictions; returns the files.

    ``predict`` is called for members that have no test logits yet. ``UserError`` where one lacks what the tables need.
    """
    sections = [f"# {PAPERS[paper].title}: the report and this run", _differences(paper, scale, output, base_model)]
    made = _oyeniyi if paper == "oyeniyi" else _tolkunov
    more, files = made(scale, output, predict)
    sections += more
    oddities = "\n".join(f"* {one}" for one in PAPERS[paper].oddities)
    sections.append(f"## What is odd in the report\n\n{oddities}")
    text = "\n\n".join(sections) + "\n"
    with record.whole(output / REPORT) as f:
        f.write(text)
    print(text)
    return [output / REPORT, *files]


def _fmt(value: float | None, *, sign: bool = False) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:{'+' if sign else ''}.3f}"


def _overall(scores: Mapping[str, float | None]) -> float:
    return overall_score({t: (math.nan if (score := scores[t]) is None else score, PRESETS[t].kind) for t in TASKS})


def _row(scores: Mapping[str, float | None]) -> list[str]:
    return [*(_fmt(scores[t]) for t in TASKS), _fmt(_overall(scores))]


def _differences(paper: PaperName, scale: Scale, output: Path, base_model: str) -> str:
    """What differs from the report: backbone, precision, data, epochs."""
    rows = [["base model", "BERT base" if paper == "oyeniyi" else "BERT", base_model]]
    pools = {t: TaskPool(output / [p.pool for p in PAPERS[paper].parts if t in p.tasks][-1], t) for t in TASKS}
    precisions = {str(r.settings["precision"]) for task_pool in pools.values() for r in task_pool.members}
    rows.append(["precision", "not said", ", ".join(sorted(precisions))])
    for task, task_pool in pools.items():
        dev = len(task_pool.examples().ids)
        rows.append([f"{task}: dev examples", f"{PAPERS[paper].sizes[task][1]}", f"{dev}"])
    text = f"## What differs\n\n{table(['', 'report', 'this run'], rows)}"
    if scale == "small":
        text += f"\n\n`--scale small`: {PAPERS[paper].small}."
    return text


def _honest(one: Estimate) -> float | None:
    return None if one.honest is None else one.honest.value


def _only(task_pool: TaskPool, names: Sequence[str]) -> TaskPool:
    """The pool as if it held these members alone."""
    task_pool.members = [r for r in task_pool.members if r.name in names]
    return task_pool


def _test_predictions(
    comparison: Comparison, method: MethodName, output: Path, name: str, predict: Callable[[list[MemberRecord]], None]
) -> tuple[Path, float | None]:
    """An ensemble's record and its leaderboard file for the test split; the file, and the score where it is known."""
    task = comparison.task_pool.name
    pool = comparison.task_pool.pool
    chosen = comparison.estimates.of[method].names
    lacking = [r for one in chosen if (r := read_record(pool, task, one)) is not None and "test" not in r.examples]
    if lacking:
        predict(lacking)
    ensemble = record.make(comparison, method, folder=output.resolve())
    with record.whole(output / f"{name}.json") as f:
        f.write(ensemble.to_json())
    prediction = decide(ensemble, pool, "test")
    file = output / f"{name}-test.csv"
    with record.whole(file) as f:
        write_predictions(f, ensemble, prediction.examples.ids, prediction.decided)
    return file, prediction.score


# Oyeniyi


def _oyeniyi(scale: Scale, output: Path, predict: Predict) -> tuple[list[str], list[Path]]:
    pool = output / "pool"
    scores: dict[str, dict[str, float | None]] = {}
    honest: dict[str, dict[str, float | None]] = {}
    comparisons: dict[tuple[str, str], Comparison] = {}
    for name in papers.OYENIYI_DEV:
        scores[name], honest[name] = dict.fromkeys(TASKS), dict.fromkeys(TASKS)
        for task in TASKS:
            one = _only(TaskPool(pool, task), [name])
            if not one.members:
                continue  # it diverged
            scores[name][task] = one.members[0].score
            comparison = comparisons[name, task] = compare(one, ["best"], Options())
            honest[name][task] = _honest(comparison.estimates.of["best"])
    header = ["model", *(f"{t} ({who})" for t in (*TASKS, "overall") for who in ("report", "ours")), "ours, honest"]
    rows = []
    for name, said in papers.OYENIYI_DEV.items():
        theirs = ["not reported"] * 4 if said is None else [_fmt(x) for x in said]
        pairs = [cell for both in zip(theirs, _row(scores[name]), strict=True) for cell in both]
        rows.append([name, *pairs, _fmt(_overall(honest[name]))])
    sections = [
        "## Dev (its table 2)\n\n"
        f"{table(header, rows)}\n\n"
        "Ours is at each model's best epoch by overall score on dev. Honest: the epoch chosen, by each task's own "
        "score, on two thirds of dev and scored on the third, in turn.",
        f"## What it claims, and what we saw\n\n{_oyeniyi_claims(scores)}",
    ]
    files, row, name = [], [], papers.OYENIYI_TEST[0]
    for task in TASKS:
        if (name, task) not in comparisons:
            row.append("diverged")
            continue
        file, score = _test_predictions(
            comparisons[name, task], "best", output, f"{task}-{name}", functools.partial(predict, "pool", TASKS)
        )
        files.append(file)
        row.append("not known" if score is None else _fmt(score))
    on_test = [_fmt(x) for x in papers.OYENIYI_TEST[1]]
    honest_row = [*(_fmt(honest[name][t]) for t in TASKS), _fmt(_overall(honest[name]))]
    known = "not known" if "not known" in row else ""
    sections.append(
        "## Test (its table 3)\n\n"
        + table(
            ["", *TASKS, "overall"],
            [
                [f"report, {name}", *on_test],
                ["ours", *row, known],
                ["ours, honest estimate from dev", *honest_row],
            ],
        )
        + _TEST
    )
    return sections, files


def _oyeniyi_claims(scores: Mapping[str, Mapping[str, float | None]]) -> str:
    ours = {name: _overall(one) for name, one in scores.items()}
    lora = [name for name in ours if name != "1-baseline"]
    above = [name for name in lora if ours[name] > ours["1-baseline"]]
    best = max(lora, key=lambda name: -math.inf if math.isnan(ours[name]) else ours[name])

    def pair(low: str, high: str) -> str:
        return f"{_fmt(ours[low])} → {_fmt(ours[high])}"

    return "\n".join(
        [
            f"* *Every LoRA model beats the baseline*: {len(above)} of {len(lora)} do here"
            + ("" if len(above) == len(lora) else f" (not {', '.join(n for n in lora if n not in above)})")
            + ".",
            f"* *Higher rank helps*: 4 to 48 on key, query, value {pair('2-kqv-r4', '4-kqv-r48')}; with the pooler "
            f"{pair('6-pooler-kqv-r4', '8-pooler-kqv-r48')}; on all but the output layer "
            f"{pair('9-all-1-r4', '10-all-1-r48')}, and to 100 {_fmt(ours['11-all-1-r100'])}.",
            f"* *More layers help* (rank 4): pooler {_fmt(ours['5-pooler-r4'])}; key, query, value "
            f"{_fmt(ours['2-kqv-r4'])}; both {_fmt(ours['6-pooler-kqv-r4'])}; all but the output layer "
            f"{_fmt(ours['9-all-1-r4'])}.",
            f"* *A lower learning rate hurts*: models 3 and 7 have a ten-thousandth of the others': "
            f"{_fmt(ours['3-kqv-r32'])} and {_fmt(ours['7-pooler-kqv-r32'])}.",
            f"* *Model 9 is best*: here it is {best} ({_fmt(ours[best])}); model 9 has {_fmt(ours['9-all-1-r4'])}.",
        ]
    )


# Tolkunov


def _tolkunov(scale: Scale, output: Path, predict: Predict) -> tuple[list[str], list[Path]]:
    systems: dict[str, dict[str, float | None]] = {name: dict.fromkeys(TASKS) for name in papers.TOLKUNOV_DEV}
    ours = "our default"
    systems[ours] = dict.fromkeys(TASKS)
    honest: dict[str, dict[str, float | None]] = {name: dict.fromkeys(TASKS) for name in systems}
    verdicts, trends, files, test, explained = [], [], [], {}, ""
    for task in TASKS:
        for system, folder in (("Frozen BERT", "frozen"), ("Finetuned BERT", "finetuned")):
            try:
                alone = TaskPool(output / folder, task)
            except UserError:  # it diverged, or its score was never defined
                continue
            systems[system][task] = alone.members[0].score
            honest[system][task] = _honest(compare(alone, ["best"], Options()).estimates.of["best"])
        comparison, default = _dicor(output / "grid", task, scale)
        found = comparison.estimates
        for system, estimate in (
            ("LoRA (best)", found.of["best"]),
            ("Omni-LoRA", found.of["omni"]),
            ("DiCor-LoRA", found.of["dicor"]),
            (ours, default),
        ):
            systems[system][task], honest[system][task] = estimate.in_sample, _honest(estimate)
        verdicts.append(f"* {task}: {verdict('dicor', found.of['dicor'])}")
        trends.append(_trends(comparison))
        explained = about(found)
        file, test[task] = _test_predictions(
            comparison, "dicor", output, f"{task}-dicor", functools.partial(predict, "grid", (task,))
        )
        files.append(file)
    header = ["system", *(f"{t} ({who})" for t in (*TASKS, "overall") for who in ("report", "ours")), "ours, honest"]
    rows = []
    for system, scores in systems.items():
        said = papers.TOLKUNOV_DEV.get(system)
        theirs = ["-"] * 4 if said is None else [_fmt(x) for x in said]
        pairs = [cell for both in zip(theirs, _row(scores), strict=True) for cell in both]
        rows.append([system, *pairs, _fmt(_overall(honest[system]))])
    per_task = table(["honest", *TASKS, "overall"], [[system, *_row(scores)] for system, scores in honest.items()])
    defaults = ", ".join(f"{t} {DEFAULT_METHOD[PRESETS[t].kind]}" for t in TASKS)
    on_test = [_fmt(x) for x in papers.TOLKUNOV_TEST[1]]
    known = [("not known" if test[t] is None else _fmt(test[t])) for t in TASKS]
    sections = [
        f"## Dev (its table 1)\n\n{table(header, rows)}\n\n{per_task}\n\nOur default: {defaults}.\n\n{explained}",
        "## Test (its table 2)\n\n"
        + table(
            ["", *TASKS, "overall"],
            [
                ["report, DiCor-LoRA", *on_test],
                ["ours, DiCor-LoRA", *known, "not known" if "not known" in known else ""],
                ["ours, honest estimate from dev", *_row(honest["DiCor-LoRA"])],
            ],
        )
        + _TEST,
        "## What it claims, and what we saw\n\n*DiCor is above Omni and above the best*, by its honest estimate:\n\n"
        + "\n".join(verdicts)
        + "\n\n*More rank is better; diversity grows with rank and scaling* (Spearman's correlation over members):\n\n"
        + table(
            ["", "score with rank", "score with scaling", "similarity with rank", "similarity with scaling"], trends
        )
        + "\n\nA member's similarity is the mean of its similarities to all others; diversity grows where it falls.",
        "## Figures\n\n"
        + "\n".join(
            f"* {task}: [the report of dicor]({task}.html), "
            f"[similarity of members](figures/{task}-similarity.png) (its figure 1), "
            f"[score by rank](figures/{task}-score-by-rank.png) (its figure 3), "
            f"[what the head reads](figures/{task}-embeddings.png) (its figure 4)"
            for task in TASKS
        ),
    ]
    return sections, files


def dicor_options(task: str, scale: Scale) -> Options:
    """The report's rules for a task's ensembles; of a small pool, a small ensemble."""
    options = Options(strategy=DEFAULT_STRATEGY[PRESETS[task].kind])
    if scale == "small":
        options = replace(options, size=papers.SMALL_SIZES[task], top_k=papers.SMALL_TOP_K[task])
    return options


def _dicor(pool: Path, task: str, scale: Scale) -> tuple[Comparison, Estimate]:
    """The report's systems on a grid's pool, by its rules, and what dicor select takes unless told otherwise."""
    default = DEFAULT_METHOD[PRESETS[task].kind]
    return (
        compare(TaskPool(pool, task), ["best", "omni", "dicor"], dicor_options(task, scale)),
        compare(TaskPool(pool, task), [default], Options()).estimates.of[default],
    )


def _trends(comparison: Comparison) -> list[str]:
    """Spearman's correlations of score and of similarity with rank and scaling, over the members."""
    from scipy.stats import spearmanr

    task_pool = comparison.task_pool
    members: list[MemberRecord] = [r for r in task_pool.members if r.name in comparison.estimates.scores]
    logits = np.stack([task_pool.logits(r.name) for r in members])
    labels = task_pool.examples().labels
    alike = pairwise(
        features(logits, kind=task_pool.kind, similarity=DEFAULT_SIMILARITY[task_pool.kind], labels=labels),
        similarity=DEFAULT_SIMILARITY[task_pool.kind],
    )
    similarity = (alike.sum(1) - 1) / (len(members) - 1)
    scores = [comparison.estimates.scores[r.name] for r in members]
    cells = []
    for values in (scores, similarity):
        for setting in ([r.rank for r in members], [r.scaling for r in members]):
            if len(set(setting)) < 2 or np.ptp(values) == 0:
                cells.append("-")  # undefined
                continue
            found = spearmanr(values, setting)
            cells.append(f"{found.statistic:+.2f} (p {found.pvalue:.2g})")
    return [f"{task_pool.name}, {len(members)} members", *cells]
