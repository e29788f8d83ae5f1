"""Train many small LoRA models over one frozen BERT at once, then pick an accurate, diverse ensemble.

Two stages joined by a folder, the pool: ``lora-ensemble fit`` (torch, lightning) writes members into it,
``dicor`` (numpy, scipy) selects from it; ``Ensemble.load`` puts what was selected to work. This package imports nothing
heavy by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_ensemble.ensemble.restored import Ensemble

__all__ = ["Ensemble", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "Ensemble":  # torch, only for who asks
        from lora_ensemble.ensemble.restored import Ensemble

        return Ensemble
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
