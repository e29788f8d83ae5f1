"""The sections of the page, one function for each.

Axes: S members that are shown, k members of an ensemble.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from lora_ensemble.dicor.estimate.interval import LEVEL, Interval
from lora_ensemble.dicor.options import LISTENS, Options
from lora_ensemble.dicor.report import words
from lora_ensemble.dicor.report.drawing import Drawing
from lora_ensemble.dicor.report.facts import MOST_SHOWN, NAMES, Facts
from lora_ensemble.dicor.report.html import Cell, commands, definitions, figure, paragraph, table
from lora_ensemble.dicor.table import about, gain, number, verdict


def shown(name: str, plots: dict[str, Drawing], absent: dict[str, str], *notes: str) -> str:
    """A plot, or why it is not there."""
    return figure(plots[name], *notes) if name in plots else paragraph(absent[name], look="absent")


def between(interval: Interval, *, sign: bool = False) -> str:
    """The ends of an interval."""
    return f"{number(interval.low, sign=sign)} to {number(interval.high, sign=sign)}"


def methods(facts: Facts, plots: dict[str, Drawing]) -> str:
    """All methods: the plot, and the table of ``dicor compare``."""
    found, rows = facts.comparison.estimates, list[list[Cell]]()
    for name, one in found.of.items():
        row: list[Cell] = [NAMES.get(name, name), str(len(one.names)), number(one.in_sample)]
        row.append((number(one.honest.value), between(one.honest)) if one.honest else "-")
        row.append(number(one.optimism, sign=True))
        row += ["-" if d is None else (gain(d), between(d, sign=True)) for d in (one.against_best, one.against_omni)]
        rows.append(row + ([number(facts.test[name])] if facts.test else []))
    header = ["method", "members", "in-sample", f"honest, {LEVEL:.0%} interval", "optimism", "to the single best"]
    header += ["to Omni", *(["test"] if facts.test else [])]
    marked = {list(found.of).index(facts.method)}
    return (
        figure(plots["methods"], numbers=False)
        + table(header, rows, caption=f"{facts.score_name} on dev", marked=marked)
        + paragraph(verdict(facts.method, facts.one))
        + "".join(paragraph(line, look="note") for line in about(found).splitlines())
    )


def ensemble(facts: Facts) -> str:
    """The chosen members' settings, in the order of choice."""
    task_pool, choice = facts.comparison.task_pool, facts.one.choice
    place = {r.name: i for i, r in enumerate(facts.shown)}
    names, rows = facts.one.names, []
    for i, name in enumerate(names[:MOST_SHOWN]):
        r = task_pool.record(name)
        before = [place[other] for other in names[:i] if other in place] if name in place else []
        settings = (r.rank, r.scaling, r.targets, r.lr, r.seed)
        rows.append([
            name,
            *("-" if v is None else f"{v:g}" if isinstance(v, float) else str(v) for v in settings),
            number(facts.comparison.estimates.scores[name]),
            number(1 / len(names) if choice.weights is None else float(choice.weights[i])),
            "-" if choice.temperatures is None else f"{choice.temperatures[i]:.3f}",
            number(float(facts.similarities[place[name], before].mean())) if before else "-",
        ])  # fmt: skip
    header = ["member", "rank r", "scaling c", "targets", "lr", "seed", facts.score_name, "weight", "temperature"]
    header += [f"mean {facts.similarity} similarity to those above"]
    more = f" The first {MOST_SHOWN} of {len(names)} are shown." if len(names) > MOST_SHOWN else ""
    moved = ""
    if choice.offsets is not None:
        moved = paragraph(words.offsets(choice.scale, choice.offsets.tolist(), task_pool.labels))
    return (
        table(header, rows, caption=f"Members of {facts.method}, in the order of choice")
        + moved
        + paragraph(words.MEMBERS_TABLE + more, look="note")
    )


def members(facts: Facts, plots: dict[str, Drawing], absent: dict[str, str]) -> str:
    """Similarity, diversity, and score by rank."""
    every, some = len(facts.comparison.estimates.scores), ""
    if every > len(facts.shown):
        some = f"Of {every} members the {len(facts.shown)} best by score are shown, in the lines by rank all of them."
    heat = shown("similarity", plots, absent, words.HEAT_MAP, *([some] if some else []))
    diverse = shown("diversity", plots, absent, words.DIVERSITY) if "diversity" in plots else ""
    lines = shown("score-by-rank", plots, absent, words.BY_RANK)
    return f'{heat}<div class="figures">\n{diverse}{lines}</div>\n'


def calibration(facts: Facts, plots: dict[str, Drawing], absent: dict[str, str]) -> str:
    """Reliability diagram and figures of a classifier."""
    if not facts.calibrations:
        return paragraph(absent["calibration"], look="absent")
    found = facts.comparison.estimates
    rows = [
        [NAMES.get(m, m), f"{c.ece:.4f}", f"{c.brier:.4f}", f"{c.log_loss:.4f}"] for m, c in facts.calibrations.items()
    ]
    held = (
        f"Held out: each example's probabilities are those of what was chosen without it, {found.repeats} of them."
        if found.repeats
        else "In-sample: there are too few examples to hold any out, so this flatters what was chosen."
    )
    votes = [NAMES.get(m, m) for m in facts.calibrations if found.of[m].choice.strategy == "majority"]
    if votes:
        held += f" What votes has shares of the votes for probabilities: {', '.join(votes)}."
    return (
        paragraph(held)
        + '<div class="figures">\n'
        + figure(plots["calibration"], words.RELIABILITY[facts.comparison.kind])
        + "<div>\n"
        + table(
            ["method", "ECE", "Brier score", "log-loss"],
            rows,
            caption=f"Calibration on dev, {'held out' if found.repeats else 'in-sample'}",
            marked={list(facts.calibrations).index(facts.method)},
        )
        + definitions(words.CALIBRATION[facts.comparison.kind], look="terms")
        + "</div>\n</div>\n"
    )


def theory(facts: Facts) -> str:
    """The report's two formulas beside what is observed."""
    regression = facts.comparison.kind == "regression"
    what = "variance of the error" if regression else "majority's error"
    first = "σ²" if regression else "p"
    header = ["ensemble", "members N", first, "ρ", f"{what}, by the report", "if independent", "observed"]
    rows = [
        [NAMES.get(m, m), str(t.size), *(number(v) for v in (t.level, t.rho, t.expected, t.independent, t.observed))]
        for m, t in facts.theories.items()
    ]
    marked = {list(facts.theories).index(facts.method)} if facts.method in facts.theories else set()
    return table(header, rows, caption="Measured on all of dev, in-sample", marked=marked) + definitions(
        words.VARIANCE if regression else words.MAJORITY, look="terms"
    )


def use(facts: Facts, options: Options) -> str:
    """The commands that make this choice, and apply it."""
    pool, task = shlex.quote(str(facts.comparison.task_pool.pool)), shlex.quote(facts.task)
    record = shlex.quote(f"{facts.task}.json")
    heard: Sequence[str] = next((LISTENS[name] for name in LISTENS if name == facts.method), ())
    said = "".join(
        f" --{name.replace('_', '-')}" + ("" if value is True else f" {value}")
        for name in heard
        if (value := getattr(options, name)) not in (None, False)
    )
    lines = [
        f"dicor select --pool {pool} --task {task} --method {facts.method}{said} --output {record}",
        f"dicor apply --ensemble {record} --split test --output predictions.csv",
    ]
    return paragraph("Write the record of this choice, then its predictions on the test split:") + commands(
        lines, name="Commands"
    )
