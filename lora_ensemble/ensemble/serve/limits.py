"""What the service takes on, and the defaults and help of the command's options."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Limits:
    """More than this is refused, or waits."""

    texts: int = field(default=64, metadata={"help": "texts of a request"})
    # Far more than an encoder reads, and still nothing to tokenise.
    chars: int = field(default=10_000, metadata={"help": "characters of a text"})
    bytes: int = field(default=1 << 20, metadata={"help": "bytes of a request's body"})
    batch: int = field(
        default=64, metadata={"help": "texts of several requests that are answered in one call; 1: of one request"}
    )
    waiting: int = field(default=1024, metadata={"help": "texts that may wait; beyond, requests must come again"})
