"""What a chosen ensemble is used for: it answers new text, and leaves for other tools. Neither lightning nor wandb.

Its class is ``lora_ensemble.Ensemble``. Nothing heavy is imported here, so that a command's help is quick.
"""

__all__ = ["restored"]
