"""The report as one HTML page that opens from disk: nothing is fetched, and nothing runs."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from html import escape
from importlib.resources import files

from lora_ensemble import __version__
from lora_ensemble.dicor.estimate.interval import LEVEL, Interval
from lora_ensemble.dicor.options import Options
from lora_ensemble.dicor.report import sections, words
from lora_ensemble.dicor.report.charts import drawings, missing
from lora_ensemble.dicor.report.facts import Facts
from lora_ensemble.dicor.report.html import definitions, paragraph, section
from lora_ensemble.dicor.report.palette import css
from lora_ensemble.dicor.table import number


def page(facts: Facts, options: Options) -> str:
    """The whole text of the file; ``options`` are those that the comparison was made with."""
    plots, absent = drawings(facts), missing(facts)
    parts = [
        ("methods", "All methods", sections.methods(facts, plots)),
        ("ensemble", "The ensemble", sections.ensemble(facts)),
        ("members", "The members", sections.members(facts, plots, absent)),
        ("by-size", "How many members", sections.shown("size", plots, absent, words.BY_SIZE)),
        ("calibrated", "Calibration", sections.calibration(facts, plots, absent)),
        ("theory", "Theory and observation", sections.theory(facts)),
        ("use", "How to use it", sections.use(facts, options)),
    ]
    style = css() + (files(__package__) / "page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    links = "".join(f'<li><a href="#{id_}">{escape(heading)}</a></li>' for id_, heading, _ in parts)
    body = "".join(section(id_, heading, text) for id_, heading, text in parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # Nothing may be fetched or run; the one style is this one.
        f"<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(f'{facts.task}: {facts.method}, a dicor report')}</title>\n"
        f"<style>{style}</style>\n</head>\n<body>\n"
        '<a class="skip" href="#main">Skip to the report</a>\n<div class="page">\n'
        f'{_head(facts)}<nav aria-label="On this page"><ul>{links}</ul></nav>\n'
        f'<main id="main" tabindex="-1">\n{body}</main>\n'
        f"<footer>{paragraph(f'Written by dicor {__version__}. This file needs no network: it fetches nothing.')}"
        "</footer>\n</div>\n</body>\n</html>\n"
    )


def _head(facts: Facts) -> str:
    """The answer first, then what it is the answer to."""
    task_pool, found, one = facts.comparison.task_pool, facts.comparison.estimates, facts.one
    m, size = len(found.of["omni"].names), len(one.names)
    chosen = one.names[0] if size == 1 else f"all {m} members" if size == m else f"{size} of {m} members"
    boxes = "".join(
        f'<div><dt>{escape(a)}</dt><dd class="value">{escape(b)}</dd><dd class="note">{escape(c)}</dd></div>'
        for a, b, c in _figures(facts)
    )
    kinds = {"multiclass": f"{len(task_pool.labels)} classes", "binary": "two classes", "regression": "values"}
    labels = f": {', '.join(task_pool.labels)}" if task_pool.labels else ""
    reasons = ", ".join(f"{k} {why}" for why, k in sorted(Counter(task_pool.left_out.values()).items()))
    params = facts.comparison.methods[facts.method].get_params()
    settings = "".join(
        f", {k.replace('_', ' ')} {v}" for k, v in params.items() if v not in (None, False) and k != "strategy"
    )
    times = "once" if found.repeats == 1 else f"{found.repeats} times"
    how = f"{found.folds} folds; every example was held out {times}, members and epochs chosen without it"
    pairs = [
        ("Task", f"{facts.task}: {task_pool.kind}, {kinds[task_pool.kind]}{labels}"),
        ("Pool", str(task_pool.pool)),
        ("Members", f"{m}; not finished: {reasons or 'none'}"),
        ("Examples", f"{len(facts.comparison.dev.labels)} of dev"),
        ("Estimate", how if found.repeats else "none: there are too few dev examples"),
        ("Method", f"{facts.method}{settings}; decides by {words.decides(one.choice.strategy, task_pool.kind)}"),
    ]
    notices = "".join(f"<li>{escape(text)}</li>" for text in facts.comparison.notices)
    return (
        f"<header>\n{paragraph('dicor report', look='kicker')}"
        f"<h1>{escape(f'{facts.task}: {facts.method}, {chosen}')}</h1>\n{paragraph(_answer(facts), look='lede')}"
        f'<dl class="answers">{boxes}</dl>\n{definitions(pairs, look="facts")}'
        + (f'<ul class="note" aria-label="Notices">{notices}</ul>\n' if notices else "")
        + "</header>\n"
    )


def _figures(facts: Facts) -> list[tuple[str, str, str]]:
    """What the answer rests on: name, number, and what is to be known of it."""
    one = facts.one
    found = [(f"honest {facts.score_name}", number(one.honest.value), _interval(one.honest))] if one.honest else []
    found += [(f"in-sample {facts.score_name}", number(one.in_sample), "on the dev set chosen on, which flatters")]
    for other, d in (("the single best", one.against_best), ("Omni", one.against_omni)):
        if d is not None:
            found.append(
                (f"difference to {other}", number(d.value, sign=True), f"{_interval(d, sign=True)}, {_noise(d)}")
            )
    return found


def _answer(facts: Facts) -> str:
    """How good the ensemble honestly is, and whether the gain is beyond noise."""
    one = facts.one
    if one.honest is None:
        return (
            f"In-sample its {facts.score_name} is {number(one.in_sample)}. There is no honest estimate, so how much of "
            "that is chance cannot be said."
        )
    said = []
    for other, d in (("the single best member", one.against_best), ("Omni, all members together", one.against_omni)):
        if d is not None:
            better = "better than" if d.low > 0 else "worse than" if d.high < 0 else "not to be told from"
            said.append(f"{better} {other} ({_noise(d)})")
    return (
        f"On examples that it was not chosen on, expect {facts.score_name} {one.honest.value:.3f}, between "
        f"{one.honest.low:.3f} and {one.honest.high:.3f} with a chance of {LEVEL:.0%}. It is {' and '.join(said)}."
    )


def _interval(interval: Interval, *, sign: bool = False) -> str:
    return f"{LEVEL:.0%}: {sections.between(interval, sign=sign)}"


def _noise(difference: Interval) -> str:
    return f"{'beyond' if difference.beyond_noise else 'within'} noise"
