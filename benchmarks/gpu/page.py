"""The records of all parts as a page of Markdown tables."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from gpu.parts import Part
from gpu.record import Record

TARGET_RATIO, TARGET_SHARE, TARGET_MEMBERS = 25, 0.4, 64
_AS_EXPECTED = {True: "as expected", False: "**NOT as expected**"}

_INTRODUCTION = """# On a GPU

Written by `bash benchmarks/gpu.sh`; [what each part does](../README.md#a-gpu-in-one-script). A part stays as it was
measured until its code changes.
"""


def page(parts: Sequence[Part], records: Mapping[str, Record]) -> str:
    """Everything that is there, and what is not."""
    out = [_INTRODUCTION]
    for part in parts:
        record = records[part.name]
        out += [f"## {part.title}", ""]
        if not record.about:
            out += ["Not measured.", ""]
            continue
        out += [_measured_on(record.about), ""]
        rows = {row.name: record.rows[row.name] for row in part.rows if row.name in record.rows}
        out += _TABLES[part.name]({name: row for name, row in rows.items() if "error" not in row})
        out += [f"{name}: **failed**, {row['error']}\n" for name, row in rows.items() if "error" in row]
        missing = [row.name for row in part.rows if row.name not in record.rows]
        out += [f"Not run, for want of time: {', '.join(missing)}.\n"] if missing else []
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out))


def as_expected(records: Mapping[str, Record]) -> bool:
    """Whether no row failed and none is other than expected."""
    rows = [row for record in records.values() for row in record.rows.values()]
    return not any("error" in row for row in rows) and all(f["agrees"] for r in rows for f in r.get("checks", []))


def _measured_on(about: Mapping[str, Any]) -> str:
    note = ""
    if about["tiny"]:
        note = " **Tiny sizes, to try the script: no figure here means anything.**"
    elif about["device"] == "cpu":
        note = " **A CPU: no figure here says anything about a GPU.**"
    return f"{about['machine']}.{note}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table and an empty line; nothing where there are no rows."""
    if not rows:
        return []
    return [f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows]] + [""]


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _time(seconds: float) -> str:
    return f"{seconds / 60:,.1f} min" if seconds >= 60 else f"{seconds:.1f} s"


def _checks(rows: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [check for row in rows.values() for check in row["checks"]]


def _exact(rows: Mapping[str, Any]) -> list[str]:
    cells = [
        [
            c["check"],
            c["precision"],
            f"{c['difference']:.1e}",
            f"{c['allowed']:.1e} ({c['why']})",
            f"{c['wrong']:.0f} {c['wrong_is']}" if "wrong_is" in c else f"{c['wrong']:.1e}",
            _AS_EXPECTED[c["agrees"]],
        ]
        for c in _checks(rows)
    ]
    header = ["check", "precision", "largest absolute difference", "allowed", "a wrong model gives", ""]
    return table(header, cells)


def _speed(rows: Mapping[str, Any]) -> list[str]:
    peak = rows.get("matrix peak", {}).get("flops")
    peer = rows.get("PEFT + Trainer")
    cells, target = [], ""
    for name, r in sorted(rows.items(), key=lambda item: item[1].get("members", 0)):
        if name == "matrix peak":
            continue
        if "refused" in r:
            cells.append([name, r["refused"], "", "", "", ""])
            continue
        each = r["seconds"] / r["steps"] / r["members"]
        ratio = peer["seconds"] / peer["steps"] / each if peer and "refused" not in peer else None
        share = r["useful_flops"] / r["steps"] / each / peak if peak else None
        cells.append(
            [
                name,
                f"{1000 * each:.3f}",
                f"{1000 * each * r['members']:.2f}",
                "" if ratio is None else f"{ratio:.2f}",
                "" if share is None else f"{share:.1%}",
                _mib(r["peak_bytes"]),
            ]
        )
        if r["members"] == TARGET_MEMBERS and ratio is not None and share is not None:
            target = _against_target(ratio, share)
    header = ["side", "ms / member-step", "ms / step", "× PEFT + Trainer", "share of matrix peak", "peak memory"]
    # PEFT, the yardstick, before the bank of one.
    cells.sort(key=lambda row: row[0].startswith("bank"))
    said = [f"Matrix peak in bf16: {peak / 1e12:,.2f} TFLOP/s."] if peak else []
    return [*table(header, cells), " ".join([*said, target]).strip(), ""]


def _against_target(ratio: float, share: float) -> str:
    words = {True: "reached", False: "**fallen short of**"}
    return (
        f"With {TARGET_MEMBERS} members, {TARGET_RATIO} times PEFT + Trainer is {words[ratio >= TARGET_RATIO]} "
        f"({ratio:.1f}), {TARGET_SHARE:.0%} of the peak {words[share >= TARGET_SHARE]} ({share:.1%})."
    )


def _memory(rows: Mapping[str, Any]) -> list[str]:
    cells = []
    for name, row in rows.items():
        (c,) = row["checks"]
        m = c["members"]
        if name == "foretold":
            what = f"a trial of two and three foretells what {m} members take"
            found = (
                f"foretold {_mib(c['foretold'])} ({_mib(c['each'])} each + {_mib(c['shared'])}), taken "
                f"{_mib(c['taken'])}, usable {_mib(c['usable'])}"
            )
        elif name == "planned":
            what = f"with {_mib(c['free'])} free, {m} members are planned as banks that fit"
            found = f"banks of {_listed(c['banks'])}; split for want of memory: {len(c['splits'])}"
        else:
            how = "torch gets no byte more" if c["real"] else "the error is injected"
            what = f"memory runs out in mid-run ({how}): {m} members go on in smaller banks"
            found = (
                f"banks of {_listed(c['banks'])}, logits differ from an undisturbed run's by {c['difference']:.1e}, "
                f"allowed {c['allowed']:.1e} ({c['why']})"
            )
        cells.append([what, found, _AS_EXPECTED[c["agrees"]]])
    return table(["what", "found", ""], cells)


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))


def _grid(rows: Mapping[str, Any]) -> list[str]:
    cells = [
        [
            f"{r['members']} members over {r['encoder']}, {r['train']:,} + {r['dev']:,} examples ({r['examples']})",
            f"{r['steps']:,}",
            f"{1000 * r['step_s']:.2f}",
            f"{r['validation_s']:.2f}",
            f"{r['first_loss']:.3f} → {r['last_loss']:.3f}",
            f"{r['best_dev']:.4f}",
            _mib(r["peak_bytes"]),
            f"{_time(r['projected_s'])} for {r['epochs']} epochs",
        ]
        for r in rows.values()
    ]
    header = [
        "bank",
        "steps timed",
        "ms / step",
        "s / validation",
        "mean loss",
        "best dev score so far",
        "peak memory",
        "projected",
    ]
    return table(header, cells)


def _profile(rows: Mapping[str, Any]) -> list[str]:
    out = []
    for name, r in rows.items():
        if "refused" in r:
            out += [f"{name}: {r['refused']}.", ""]
            continue
        out += [f"A step of a {name} of BERT-base's shape in bf16, {1000 * r['wall_s']:.2f} ms by the clock:", ""]
        out += table(["what", "share of the time"], [[n, f"{share:.1%}"] for n, share in r["shares"].items()])
        out += table(["longest", "share of the time"], [[f"`{n}`", f"{share:.1%}"] for n, share in r["kernels"]])
    return out


_TABLES = {"exact": _exact, "speed": _speed, "memory": _memory, "grid": _grid, "profile": _profile}
