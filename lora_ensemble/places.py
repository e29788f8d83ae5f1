"""Where the files and folders that settings name are on this machine.

A bank that was sent to another machine keeps the settings of its run to the letter, for a run and its members are known
by them. What they name lies elsewhere there. No torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

_elsewhere: dict[str, str] = {}


def place(name: str) -> str:
    """The path of a file or folder that settings name: where it was sent to, or else the name itself."""
    return _elsewhere.get(name, name)


@contextlib.contextmanager
def sent(places: Mapping[str, str]) -> Iterator[None]:
    """In this process, what is named by a key lies at its value."""
    before = dict(_elsewhere)
    _elsewhere.update(places)
    try:
        yield
    finally:
        _elsewhere.clear()
        _elsewhere.update(before)
