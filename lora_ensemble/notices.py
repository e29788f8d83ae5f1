"""What a run says on its standard output, once however many processes it has."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_only


@rank_zero_only
def say(text: str) -> None:
    """Print from the first process alone, at once: the output may be a file that somebody follows."""
    print(text, flush=True)
