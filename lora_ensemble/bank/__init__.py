"""A bank: M members over one frozen encoder. Plain torch and transformers; neither lightning nor wandb.

``lora`` says what a member is and speaks PEFT's format; ``base_model`` finds an encoder, ``families`` knows how
encoders differ; ``encode``, ``attention`` and ``dropout`` run its layers on packed rows for all members, ``padded``
those that need padding, ``heads`` what stands on it; ``model`` is the bank, ``optim`` its optimiser; ``member_files``
takes members to files and back.

Axes: M members, B examples, T tokens of a packed row, L tokens of one, H hidden width, R largest rank, C outputs of a
head.
"""

__all__ = ["base_model", "encode", "families", "lora", "member_files", "model", "optim"]
