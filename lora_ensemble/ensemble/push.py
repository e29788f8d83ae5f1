"""An exported folder on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_ensemble.errors import UserError


def check(repo: str) -> Any:
    """The hub's client, to be asked for before the work: ``UserError`` for a wrong name, offline or not logged in."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as e:
        raise UserError(f"--push {repo!r}: not the name of a repository ({e}); expected USER/NAME") from e
    if constants.is_offline_mode():
        raise UserError(f"--push {repo}: HF_HUB_OFFLINE is set, so nothing can be sent; unset it, or push later")
    if get_token() is None:
        raise UserError(f"--push {repo}: not logged in to the Hugging Face hub; run `hf auth login`, or set HF_TOKEN")
    return HfApi()


def push(api: Any, folder: Path, repo: str, *, private: bool) -> str:
    """Send a whole folder to ``repo``, made if need be; returns its address.

    ``UserError`` where the hub refuses or cannot be reached; the folder stays.
    """
    from huggingface_hub.errors import HTTPError

    try:
        # None keeps a repository that is there as visible as it is.
        address = api.create_repo(repo, private=True if private else None, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="lora-ensemble export")
    except (OSError, HTTPError) as e:
        reason = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise UserError(
            f"--push {repo}: {reason[:300]}; {folder} is written: send it later with `hf upload {repo} {folder}`"
        ) from e
    return str(address)
