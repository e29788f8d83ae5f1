"""What the service takes on, and the defaults of the command."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """More than this is refused, or waits."""

    texts: int = 64
    """Texts of a request."""
    chars: int = 10_000
    """Characters of a text: far more than an encoder reads, and still nothing to tokenise."""
    bytes: int = 1 << 20
    """Bytes of a request's body."""
    batch: int = 64
    """Texts of several requests that are answered in one call; 1: none are put together."""
    waiting: int = 1024
    """Texts that may wait; beyond, requests are told to come again."""
