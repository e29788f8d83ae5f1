"""A bank: M members over one frozen encoder. Plain torch and transformers; neither lightning nor wandb.

``lora`` says what a member is; ``base_model`` finds an encoder, ``families`` knows how
encoders differ; ``encode``, ``attention`` and ``dropout`` run its layers on packed rows for all members, ``padded``
those that need padding, ``heads`` what stands on it; ``model`` is the bank, ``optim`` its optimiser; ``member_files``
takes members to files in PEFT's format and back.

Axes in all of it: M members (or 1 where they share), B examples in a batch, T tokens of a packed row, L tokens of the
longest example, H hidden width, R largest rank at a layer, C outputs of a head, P trained numbers per member (zeros
included), S relative positions, h heads of width d.
"""

__all__ = ["base_model", "encode", "families", "lora", "member_files", "model", "optim"]
