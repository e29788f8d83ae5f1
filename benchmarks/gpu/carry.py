"""What a machine without a network may lack, as a folder that can be carried there: ``gpu.sh --carry DIR``."""

from __future__ import annotations

import shutil
from pathlib import Path


def carry(folder: Path) -> str:
    """all-MiniLM-L6-v2: weights in bf16 (half the size; what loads them makes float32 of them), settings, tokeniser.

    Below ``packages`` filelock, which is plain Python: torch brings one there, but perhaps one that is too old.
    """
    import filelock
    import torch
    from transformers import AutoModel
    from transformers.utils import logging

    from lora_ensemble.bank.base_model import load_tokenizer, location

    logging.disable_progress_bar()
    name = "all-MiniLM-L6-v2"
    AutoModel.from_pretrained(location(name), dtype=torch.bfloat16).save_pretrained(folder)
    load_tokenizer(name).save_pretrained(folder)
    package = Path(filelock.__file__).parent
    shutil.copytree(package, folder / "packages" / package.name, dirs_exist_ok=True)
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    return f"{folder}: {name} in bf16, {size / 1e6:.0f} MB"
