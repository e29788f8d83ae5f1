"""all-MiniLM-L6-v2 as a folder that can be carried to a machine without a network: ``gpu.sh --carry DIR``."""

from __future__ import annotations

from pathlib import Path


def carry(folder: Path) -> str:
    """Write weights in bf16 (half the size; what loads them makes float32 of them), settings and tokeniser."""
    import torch
    from transformers import AutoModel
    from transformers.utils import logging

    from lora_ensemble.bank.base_model import load_tokenizer, location

    logging.disable_progress_bar()
    name = "all-MiniLM-L6-v2"
    AutoModel.from_pretrained(location(name), dtype=torch.bfloat16).save_pretrained(folder)
    load_tokenizer(name).save_pretrained(folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    return f"{folder}: {name} in bf16, {size / 1e6:.0f} MB"
