"""Whether Weights & Biases can be reached without asking anybody or waiting long. Standard library only."""

from __future__ import annotations

import netrc
import os
import socket
from pathlib import Path
from urllib.parse import urlparse

_ANSWER_WITHIN_S = 2.0
START_WITHIN_S = 20
"""Seconds after which a run that does not start is an error, and is kept offline instead."""


def project() -> str:
    """The project that runs belong to."""
    return os.environ.get("WANDB_PROJECT", "lora-ensemble")


def reachable() -> bool:
    """Whether a run can go online: offline was not asked for, there is a key, and the server answers."""
    return os.environ.get("WANDB_MODE") != "offline" and _logged_in() and _answers()


def _logged_in() -> bool:
    """Whether there is a key, in the environment or in the netrc file that ``wandb login`` writes; asks nobody."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        path = os.environ.get("NETRC") or Path.home() / ".netrc"
        return netrc.netrc(str(path)).authenticators(_host()[0]) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _host() -> tuple[str, int]:
    url = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    return url.hostname or "", url.port or (80 if url.scheme == "http" else 443)


def _answers() -> bool:
    """Whether the server takes a connection soon (W&B itself would wait 105 s without a network)."""
    try:
        socket.create_connection(_host(), timeout=_ANSWER_WITHIN_S).close()
    except OSError:
        return False
    return True
