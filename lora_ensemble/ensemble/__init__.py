"""What a chosen ensemble is used for: it answers new text, and leaves for other tools. Neither lightning nor wandb.

``sources`` finds a record, its members and their base models; ``restored`` is ``lora_ensemble.Ensemble``; ``infer`` and
``serve/`` let it answer (``options`` is what both are asked); ``export`` fills a ``folder`` and its model card with all
of it or with a ``single`` member. Nothing heavy is imported here, so that a command's help is quick.
"""

__all__ = ["restored"]
