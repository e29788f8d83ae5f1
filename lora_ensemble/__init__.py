"""Train many small LoRA models over one frozen BERT at once, then pick an accurate, diverse ensemble.

Two stages joined by a folder, the pool: ``lora-ensemble fit`` (torch, lightning) writes members into it,
``dicor`` (numpy, scipy) selects from it. This package imports nothing heavy by itself.
"""

__version__ = "0.1.0"
