"""What a run says on its standard output, once however many processes it has."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only


@rank_zero_only
def say(text: str) -> None:
    """Print from the first process alone, at once: the output may be a file that somebody follows."""
    print(text, flush=True)


def print_summary(header: list[str], rows: list[list[Any]], *, folder: Path, tasks: list[str]) -> None:
    """The table of ``PoolWriter.summary``, best members first, and what to do next."""
    say(table(header, sorted(rows, key=lambda r: [-s if s == s else math.inf for s in r[2:]])))
    say(f"pool: {folder}\nnext:" + "".join(f"\n  dicor compare --pool {folder} --task {t}" for t in tasks))


def table(header: list[str], rows: list[list[Any]]) -> str:
    """Rows as lines of text in columns; floats with four decimals."""
    text = [header] + [[f"{c:.4f}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max(len(row[i]) for row in text) for i in range(len(header))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in text)
