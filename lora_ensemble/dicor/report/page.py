"""The report as one HTML page that opens from disk: nothing is fetched."""

from __future__ import annotations

import base64
import functools
import hashlib
import shlex
from collections import Counter
from collections.abc import Mapping
from importlib.resources import files
from typing import Literal

import jinja2
import vl_convert

from lora_ensemble import __version__
from lora_ensemble.dicor.estimate.interval import LEVEL
from lora_ensemble.dicor.options import LISTENS, Options, words
from lora_ensemble.dicor.report.charts import missing
from lora_ensemble.dicor.report.facts import MOST_SHOWN, Facts, display_name, members_table, settings
from lora_ensemble.dicor.report.heat_map import MOST_GROUPS
from lora_ensemble.dicor.report.plot import VEGA_LITE, Plot
from lora_ensemble.dicor.table import about, decides, ends, gain, noise, number, offsets, verdict

Rows = list[list[str | tuple[str, str]]]  # texts, of which one may have a smaller one below it


def page(facts: Facts, plots: Mapping[str, Plot], options: Options) -> str:
    """The whole text of the file, with these plots; ``options`` are those that the comparison was made with."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"png": _png, "sha256": _sha256}
    comparison, estimates = facts.comparison, facts.comparison.estimates
    place = {r.name: i for i, r in enumerate(facts.shown)}
    k, m = len(facts.estimate.names), len(estimates.of["omni"].names)
    chosen = f"all {m} members" if k == m else f"{k} of {m} members"
    return environment.from_string(_text("page.html.j2")).render(
        facts=facts,
        task=comparison.task_pool,
        estimates=estimates,
        choice=facts.estimate.choice,
        own=display_name(facts.method),
        places=[place.get(name) for name in facts.estimate.names[:MOST_SHOWN]],
        votes=[display_name(m) for m in facts.calibrations if estimates.of[m].choice.strategy == "majority"],
        plots=plots,
        absent=missing(facts),
        specifications={name: plot.specification for name, plot in plots.items()},
        tables={
            "methods": _methods(facts),
            "ensemble": _ensemble(facts),
            "members": (*members_table(facts), "All members"),
            "calibration": _calibration(facts),
            "theory": _theory(facts),
        },
        heading=f"{facts.task}: {facts.method}, {facts.estimate.names[0] if k == 1 else chosen}",
        answer=_answer(facts),
        figures=_figures(facts),
        setting=_setting(facts),
        commands=_commands(facts, options),
        about=about,
        offsets=offsets,
        verdict=verdict,
        most_groups=MOST_GROUPS,
        style=_text("page.css"),
        script=_script(),
        version=__version__,
    )


def _text(file: str) -> str:
    return (files(__package__) / file).read_text(encoding="utf-8")


@functools.cache
def _script() -> str:
    """Vega and what of the page is ours, as one program."""
    return vl_convert.javascript_bundle(_text("page.js"), vl_version=VEGA_LITE)


def _sha256(text: str) -> str:
    """As a content security policy wants it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _png(plot: Plot, dress: Literal["light", "dark"]) -> str:
    return f"data:image/png;base64,{base64.b64encode(plot.png(dress)).decode()}"


def _methods(facts: Facts) -> tuple[list[str], Rows, str]:
    """The table of ``dicor compare``."""
    header = ["method", "members", "in-sample", f"honest, {LEVEL:.0%} interval", "optimism", "to the single best"]
    rows: Rows = [
        [
            display_name(name),
            str(len(e.names)),
            number(e.in_sample),
            (number(e.honest.value), ends(e.honest)) if e.honest else "-",
            number(e.optimism, sign=True),
            *("-" if d is None else (gain(d), ends(d, sign=True)) for d in (e.against_best, e.against_omni)),
            *([number(j.scores[name])] if (j := facts.judgement) else []),
        ]
        for name, e in facts.comparison.estimates.of.items()
    ]
    last = [facts.judgement.split] if facts.judgement else []
    return [*header, "to Omni", *last], rows, f"{facts.score_name} on {facts.split}"


def _ensemble(facts: Facts) -> tuple[list[str], Rows, str]:
    """The chosen members' settings, in the order of choice."""
    place = {r.name: i for i, r in enumerate(facts.shown)}
    choice, names, rows = facts.estimate.choice, facts.estimate.names, Rows()
    for i, name in enumerate(names[:MOST_SHOWN]):
        above = [place[other] for other in names[:i] if other in place] if name in place else []
        rows.append([
            *settings(facts.comparison.task_pool.record(name)),
            number(facts.comparison.estimates.scores[name]),
            number(1 / len(names) if choice.weights is None else float(choice.weights[i])),
            "-" if choice.temperatures is None else f"{choice.temperatures[i]:.3f}",
            number(float(facts.similarities[place[name], above].mean())) if above else "-",
        ])  # fmt: skip
    header = ["member", "rank r", "scaling c", "targets", "lr", "seed", facts.score_name, "weight", "temperature"]
    header.append(f"mean {facts.similarity} similarity to those above")
    return header, rows, f"Members of {facts.method}, in the order of choice"


def _calibration(facts: Facts) -> tuple[list[str], Rows, str]:
    rows: Rows = [
        [display_name(m), f"{c.ece:.4f}", f"{c.brier:.4f}", f"{c.log_loss:.4f}"] for m, c in facts.calibrations.items()
    ]
    held = "held out" if facts.comparison.estimates.repeats else "in-sample"
    return ["method", "ECE", "Brier score", "log-loss"], rows, f"Calibration on {facts.split}, {held}"


def _theory(facts: Facts) -> tuple[list[str], Rows, str]:
    """The report's two formulas beside what is observed."""
    what, first = ("variance of the error", "σ²") if facts.regression else ("majority's error", "p")
    header = ["ensemble", "members N", first, "ρ", f"{what}, by the report", "if independent", "observed"]
    rows: Rows = [
        [display_name(m), str(t.size), *map(number, (t.level, t.rho, t.expected, t.independent, t.observed))]
        for m, t in facts.theories.items()
    ]
    return header, rows, f"Measured on all of {facts.split}, in-sample"


def _answer(facts: Facts) -> str:
    """How good the ensemble honestly is, and whether the gain is beyond noise."""
    e = facts.estimate
    if e.honest is None:
        return (
            f"In-sample its {facts.score_name} is {number(e.in_sample)}. There is no honest estimate, so how much of "
            "that is chance cannot be said."
        )
    said = []
    for other, d in (("the single best member", e.against_best), ("Omni, all members together", e.against_omni)):
        if d is not None:
            better = "better than" if d.low > 0 else "worse than" if d.high < 0 else "not to be told from"
            said.append(f"{better} {other} ({noise(d)})")
    return (
        f"On examples that it was not chosen on, expect {facts.score_name} {e.honest.value:.3f}, between "
        f"{e.honest.low:.3f} and {e.honest.high:.3f} with a chance of {LEVEL:.0%}. It is {' and '.join(said)}."
    )


def _figures(facts: Facts) -> list[tuple[str, str, str]]:
    """What the answer rests on: name, number, and what is to be known of it."""
    e, figures = facts.estimate, list[tuple[str, str, str]]()
    if e.honest:
        figures.append((f"honest {facts.score_name}", number(e.honest.value), f"{LEVEL:.0%}: {ends(e.honest)}"))
    figures.append(
        (f"in-sample {facts.score_name}", number(e.in_sample), f"on the {facts.split} set chosen on, which flatters")
    )
    for other, d in (("the single best", e.against_best), ("Omni", e.against_omni)):
        if d is not None:
            note = f"{LEVEL:.0%}: {ends(d, sign=True)}, {noise(d)}"
            figures.append((f"difference to {other}", number(d.value, sign=True), note))
    return figures


def _setting(facts: Facts) -> list[tuple[str, str]]:
    """What the answer is an answer to."""
    task_pool, estimates = facts.comparison.task_pool, facts.comparison.estimates
    kinds = {"multiclass": f"{len(task_pool.labels)} classes", "binary": "two classes", "regression": "values"}
    kinds["multilabel"] = f"any of {len(task_pool.labels)} labels; what is shown is of all pairs of example and label"
    labels = f": {', '.join(task_pool.labels)}" if task_pool.labels else ""
    reasons = ", ".join(f"{k} {why}" for why, k in sorted(Counter(task_pool.left_out.values()).items()))
    params = facts.comparison.methods[facts.method].get_params().items()
    said = "".join(f", {k.replace('_', ' ')} {v}" for k, v in params if v not in (None, False) and k != "strategy")
    times = "once" if estimates.repeats == 1 else f"{estimates.repeats} times"
    how = f"{estimates.folds} folds; every example was held out {times}, members and epochs chosen without it"
    return [
        ("Task", f"{facts.task}: {task_pool.kind}, {kinds[task_pool.kind]}{labels}"),
        ("Pool", str(task_pool.pool)),
        ("Members", f"{len(estimates.of['omni'].names)}; not finished: {reasons or 'none'}"),
        ("Examples", f"{len(facts.comparison.dev.ids)} of {facts.split}"),
        ("Estimate", how if estimates.repeats else "none: there are too few examples"),
        ("Method", f"{facts.method}{said}; decides by {decides(facts.estimate.choice.strategy, task_pool.kind)}"),
    ]


def _commands(facts: Facts, options: Options) -> str:
    """The commands that make this choice, and apply it."""
    pool, task = shlex.quote(str(facts.comparison.task_pool.pool)), shlex.quote(facts.task)
    record = shlex.quote(f"{facts.task}.json")
    listens = next((names for method, names in LISTENS.items() if method == facts.method), ())
    by = facts.comparison.dev.scored_by
    score = [] if by == facts.comparison.task_pool.scored_by else ["--score", by]
    on = [] if facts.split == "dev" else ["--on", facts.split]
    said = " ".join(["--method", facts.method, *on, *score, *words(options, listens)])
    select = f"dicor select --pool {pool} --task {task} {said} --output {record}"
    return f"{select}\ndicor apply --ensemble {record} --split test --output predictions.csv"
