"""What is kept of a part: a file of JSON lines, the first about the run, then one for each row as soon as it is there.

A kill leaves whole lines, and perhaps a piece of one, which is not read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


def code_hashes(files: Sequence[str]) -> dict[str, str]:
    """A hash of each file of the repository. Raises ``FileNotFoundError`` where one has moved: mend the part's list."""
    return {name: hashlib.sha256((REPOSITORY / name).read_bytes()).hexdigest()[:12] for name in files}


@dataclass
class Record:
    """A part's file."""

    path: Path
    about: dict[str, Any] = field(default_factory=dict)
    """``code``: file to hash; ``machine``; ``device``; ``tiny``; ``given``: what was carried to the machine."""
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name. A row that failed holds ``error`` alone."""

    @classmethod
    def read(cls, path: Path) -> Record:
        """What is there; an empty record where there is nothing."""
        record = cls(path)
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        found = [json.loads(line) for line in lines[:-1] if line]  # what follows the last line's end is a piece
        if found:
            record.about = found[0]
            record.rows = {line.pop("row"): line for line in found[1:]}
        return record

    def fits(self, about: Mapping[str, Any]) -> bool:
        """Whether its rows may stand for those of a run that is ``about`` this, whatever the machine."""
        same = all(self.about.get(key) == about[key] for key in ("code", "device", "tiny"))
        return same and set(about["given"]) <= set(self.about["given"])

    def changed(self, code: Mapping[str, str]) -> list[str]:
        """Files whose code is another since."""
        before = self.about.get("code", {})
        return sorted(name for name in {*code, *before} if code.get(name) != before.get(name))

    def missing(self, rows: Sequence[str]) -> list[str]:
        """Those of ``rows`` that are not there, or failed."""
        return [name for name in rows if "error" in self.rows.get(name, {"error": ""})]

    def start(self, about: Mapping[str, Any]) -> None:
        """Write the file anew: about another run, and without rows where these do not count; failed ones never do."""
        kept = self.rows if self.fits(about) and self.about["machine"] == about["machine"] else {}
        if not kept:
            self.about = dict(about)
        self.rows = {name: row for name, row in kept.items() if "error" not in row}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("", encoding="utf-8")
        self._append(self.about)
        for name, row in self.rows.items():
            self._append({"row": name, **row})

    def add(self, name: str, row: Mapping[str, Any]) -> None:
        """Keep a row, at once."""
        self.rows[name] = dict(row)
        self._append({"row": name, **row})

    def _append(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
