"""What a reproduction's pools say, beside what the report says.

Every figure of ours is read from the pools as dicor reads them; every figure of the report's is in ``papers``.
"""

from __future__ import annotations

import itertools
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
from lora_ensemble.files import writing
from lora_ensemble.pool import MemberRecord, TaskPool, read_record
from lora_ensemble.scores import overall_score
from lora_ensemble.studies.reproduce.papers import PAPERS, SMALL_SIZE, SMALL_TOP_K, TASKS, Paper, PaperName, Scale
from lora_ensemble.tasks import PRESETS

Predict = Callable[[str, str, list[MemberRecord]], None]
"""Adds members' test logits to a part's pool, given its folder, the task and the members."""

Systems = dict[str, dict[str, Estimate]]
"""What is known on dev of a report's systems, by name and task; where one diverged, it has no such task."""

REPORT = "report.md"
_OURS = "our default"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that reads well as text: numbers to the right, words to the left."""
    lines = []
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    right = [bool(rows) and all(map(_is_number, column)) for column in zip(*(rows or [header]), strict=True)]
    for row in (header, *rows):
        cells = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        lines.append("| " + " | ".join(cells) + " |")
    rule = "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True))
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def _is_number(cell: str) -> bool:
    try:
        return cell in ("", "-", "not known", "not reported") or math.isfinite(float(cell.split(" ")[0]))
    except ValueError:
        return False


def _figures(of: Mapping[str, Estimate], *, honest: bool = False) -> list[float]:
    """A system's score of each task, in-sample or honest, and the overall one; NaN where there is none."""
    known = {t: (e.honest.value if e.honest else math.nan) if honest else e.in_sample for t, e in of.items()}
    scores = {t: known.get(t, math.nan) for t in TASKS}
    return [*scores.values(), overall_score({t: (score, PRESETS[t].kind) for t, score in scores.items()})]


def _row(of: Mapping[str, Estimate], *, honest: bool = False) -> list[str]:
    return [_text(value) for value in _figures(of, honest=honest)]


def _dev_table(what: str, systems: Systems, paper: Paper) -> str:
    """The report's figures and ours in turn."""
    header = [what, *(f"{t} ({who})" for t in (*TASKS, "overall") for who in ("report", "ours")), "ours, honest"]
    rows = []
    for name, of in systems.items():
        reported = paper.dev.get(name, (math.nan,) * 4)
        theirs = ["not reported"] * 4 if reported is None else map(_text, reported)
        pairs = zip(theirs, _row(of), strict=True)
        rows.append([name, *itertools.chain.from_iterable(pairs), _row(of, honest=True)[-1]])
    return markdown_table(header, rows)


def _test_section(number: int, paper: Paper, systems: Systems, ours: str, scores: list[str]) -> str:
    """The report's table of test scores, and ours: in words, a task each."""
    name, reported = paper.test
    known = "not known" if "not known" in scores else ""
    rows = [
        [f"report, {name}", *map(_text, reported)],
        [ours, *scores, known],
        ["ours, honest estimate from dev", *_row(systems[name], honest=True)],
    ]
    return (
        f"## Test (its table {number})\n\n{markdown_table(['', *TASKS, 'overall'], rows)}\n\n"
        "Our test predictions are written in the course's format; where the files have no labels, the score is not "
        "known."
    )


def write_results(
    name: PaperName, scale: Scale, output: Path, *, base_model: str, predict: Predict, patience: int | None = None
) -> list[Path]:
    """Print and write the tables, and write the test predictions; returns the files.

    ``predict`` is called for members that have no test logits yet. ``UserError`` where one lacks what the tables need.
    """
    paper = PAPERS[name]
    oddities = "\n".join(f"* {oddity}" for oddity in paper.oddities)
    compared, files = (_oyeniyi if name == "oyeniyi" else _tolkunov)(paper, scale, output, predict)
    sections = [
        f"# {paper.title}: the report and this run",
        _differences(paper, scale, output, base_model, patience),
        *compared,
        f"## What is odd in the report\n\n{oddities}",
    ]
    text = "\n\n".join(sections) + "\n"
    with writing(output / REPORT) as f:
        f.write(text)
    print(text)
    return [output / REPORT, *files]


def _text(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _differences(paper: Paper, scale: Scale, output: Path, base_model: str, patience: int | None) -> str:
    """What differs from the report: backbone, precision, data, epochs."""
    pools = {t: TaskPool(output / [p.pool for p in paper.parts if t in p.tasks][-1], t) for t in TASKS}
    precisions = {str(r.settings["precision"]) for task_pool in pools.values() for r in task_pool.members}
    rows = [["base model", paper.base_model, base_model], ["precision", "not said", ", ".join(sorted(precisions))]]
    rows += [
        [f"{task}: dev examples", f"{paper.sizes[task][1]}", f"{len(task_pool.examples().ids)}"]
        for task, task_pool in pools.items()
    ]
    small = f"\n\n`--scale small`: {paper.small}." if scale == "small" else ""
    if patience:
        small += (
            f"\n\n`--patience {patience}`: not so many epochs, but each model until its score on dev had not risen in "
            f"{patience} evaluations; it is kept as it was at its best."
        )
    return f"## What differs\n\n{markdown_table(['', 'report', 'this run'], rows)}{small}"


def _test_predictions(
    comparison: Comparison, method: MethodName, output: Path, name: str, predict: Predict
) -> tuple[Path, str]:
    """Write an ensemble's record and its leaderboard file for the test split; the file, and the score in words."""
    pool, task = comparison.task_pool.pool, comparison.task_pool.name
    chosen = [read_record(pool, task, member) for member in comparison.estimates.of[method].names]
    if lacking := [r for r in chosen if r is not None and "test" not in r.examples]:
        predict(pool.name, task, lacking)
    ensemble = record.make(comparison, method, folder=output.resolve())
    with writing(output / f"{name}.json") as f:
        f.write(ensemble.to_json())
    examples, decided, score = decide(ensemble, pool, "test")
    file = output / f"{name}-test.csv"
    with writing(file) as f:
        write_predictions(f, ensemble, examples.ids, decided)
    return file, "not known" if score is None else _text(score)


def _oyeniyi(paper: Paper, scale: Scale, output: Path, predict: Predict) -> tuple[list[str], list[Path]]:
    systems: Systems = {name: {} for name in paper.dev}
    files, on_test = [], dict.fromkeys(TASKS, "diverged")
    for name, task in itertools.product(paper.dev, TASKS):
        alone = TaskPool(output / "pool", task)
        alone.members = [r for r in alone.members if r.name == name]
        if not alone.members:
            continue  # it diverged
        comparison = compare(alone, ["best"], Options())
        systems[name][task] = comparison.estimates.of["best"]
        if name == paper.test[0]:
            file, on_test[task] = _test_predictions(comparison, "best", output, f"{task}-{name}", predict)
            files.append(file)
    sections = [
        f"## Dev (its table 2)\n\n{_dev_table('model', systems, paper)}\n\n"
        "Ours is at each model's best epoch by overall score on dev. Honest: the epoch chosen, by each task's own "
        "score, on two thirds of dev and scored on the third, in turn.",
        f"## What it claims, and what we saw\n\n{oyeniyi_claims({n: _figures(of)[-1] for n, of in systems.items()})}",
        _test_section(3, paper, systems, "ours", list(on_test.values())),
    ]
    return sections, files


def oyeniyi_claims(ours: Mapping[str, float]) -> str:
    """The report's claims, held against each model's overall score on dev, as Markdown."""
    said = {name: _text(value) for name, value in ours.items()}
    lora = [name for name in ours if name != "1-baseline"]
    not_above = [name for name in lora if not ours[name] > ours["1-baseline"]]
    best = max(lora, key=lambda name: -math.inf if math.isnan(ours[name]) else ours[name])
    except_for = f" (not {', '.join(not_above)})" if not_above else ""
    claims = {
        "Every LoRA model beats the baseline": f": {len(lora) - len(not_above)} of {len(lora)} do here{except_for}.",
        "Higher rank helps": f": 4 to 48 on key, query, value {said['2-kqv-r4']} → {said['4-kqv-r48']}; with the "
        f"pooler {said['6-pooler-kqv-r4']} → {said['8-pooler-kqv-r48']}; on all but the output layer "
        f"{said['9-all-1-r4']} → {said['10-all-1-r48']}, and to 100 {said['11-all-1-r100']}.",
        "More layers help": f" (rank 4): pooler {said['5-pooler-r4']}; key, query, value {said['2-kqv-r4']}; both "
        f"{said['6-pooler-kqv-r4']}; all but the output layer {said['9-all-1-r4']}.",
        "A lower learning rate hurts": ": models 3 and 7 have a ten-thousandth of the others': "
        f"{said['3-kqv-r32']} and {said['7-pooler-kqv-r32']}.",
        "Model 9 is best": f": here it is {best} ({said[best]}); model 9 has {said['9-all-1-r4']}.",
    }
    return "\n".join(f"* *{claim}*{seen}" for claim, seen in claims.items())


def _tolkunov(paper: Paper, scale: Scale, output: Path, predict: Predict) -> tuple[list[str], list[Path]]:
    systems: Systems = {name: {} for name in (*paper.dev, _OURS)}
    files, on_test, verdicts, trends, explained = [], [], [], [], ""
    for task in TASKS:
        for system, folder in (("Frozen BERT", "frozen"), ("Finetuned BERT", "finetuned")):
            try:
                alone = TaskPool(output / folder, task)
            except UserError:  # it diverged, or its score was never defined
                continue
            systems[system][task] = compare(alone, ["best"], Options()).estimates.of["best"]
        comparison = compare(TaskPool(output / "grid", task), ["best", "omni", "dicor"], dicor_options(task, scale))
        default = DEFAULT_METHOD[PRESETS[task].kind]  # what dicor select takes unless told otherwise
        by_default = compare(TaskPool(output / "grid", task), [default], Options()).estimates.of[default]
        of = comparison.estimates.of
        for system, method in (("LoRA (best)", "best"), ("Omni-LoRA", "omni"), ("DiCor-LoRA", "dicor")):
            systems[system][task] = of[method]
        systems[_OURS][task] = by_default
        verdicts.append(f"* {task}: {verdict('dicor', of['dicor'])}")
        trends.append(_trends(comparison))
        explained = about(comparison.estimates)
        file, score = _test_predictions(comparison, "dicor", output, f"{task}-dicor", predict)
        files.append(file)
        on_test.append(score)
    by_task = markdown_table(["honest", *TASKS, "overall"], [[n, *_row(of, honest=True)] for n, of in systems.items()])
    defaults = ", ".join(f"{t} {DEFAULT_METHOD[PRESETS[t].kind]}" for t in TASKS)
    trend_names = ["", *(f"{what} with {of}" for what in ("score", "similarity") for of in ("rank", "scaling"))]
    figures = "\n".join(
        f"* {task}: [the report of dicor]({task}.html), "
        f"[similarity of members](figures/{task}-similarity.png) (its figure 1), "
        f"[score by rank](figures/{task}-score-by-rank.png) (its figure 3), "
        f"[what the head reads](figures/{task}-embeddings.png) (its figure 4)"
        for task in TASKS
    )
    sections = [
        f"## Dev (its table 1)\n\n{_dev_table('system', systems, paper)}\n\n{by_task}\n\n"
        f"Our default: {defaults}.\n\n{explained}",
        _test_section(2, paper, systems, "ours, DiCor-LoRA", on_test),
        "## What it claims, and what we saw\n\n*DiCor is above Omni and above the best*, by its honest estimate:\n\n"
        + "\n".join(verdicts)
        + "\n\n*More rank is better; diversity grows with rank and scaling* (Spearman's correlation over members):\n\n"
        + markdown_table(trend_names, trends)
        + "\n\nA member's similarity is the mean of its similarities to all others; diversity grows where it falls.",
        f"## Figures\n\n{figures}",
    ]
    return sections, files


def dicor_options(task: str, scale: Scale) -> Options:
    """The report's rules for a task's ensembles; of a small pool, a small ensemble."""
    options = Options(strategy=DEFAULT_STRATEGY[PRESETS[task].kind])
    return replace(options, size=SMALL_SIZE, top_k=SMALL_TOP_K[task]) if scale == "small" else options


def _trends(comparison: Comparison) -> list[str]:
    """Spearman's correlations of score and of similarity with rank and scaling, over the members."""
    from scipy.stats import spearmanr

    task_pool = comparison.task_pool
    members = [r for r in task_pool.members if r.name in comparison.estimates.scores]
    logits, measure = np.stack([task_pool.logits(r.name) for r in members]), DEFAULT_SIMILARITY[task_pool.kind]
    vectors = features(logits, kind=task_pool.kind, similarity=measure, labels=task_pool.examples().labels)
    similarity = (pairwise(vectors, similarity=measure).sum(1) - 1) / (len(members) - 1)
    cells = [f"{task_pool.name}, {len(members)} members"]
    for values in ([comparison.estimates.scores[r.name] for r in members], similarity):
        for setting in ([r.rank for r in members], [r.scaling for r in members]):
            if len(set(setting)) < 2 or np.ptp(values) == 0:
                cells.append("-")  # undefined
                continue
            correlation = spearmanr(values, setting)
            cells.append(f"{correlation.statistic:+.2f} (p {correlation.pvalue:.2g})")
    return cells
