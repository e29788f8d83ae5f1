"""Training with lightning: banks in, members in the pool out.

``cli`` is LightningCLI with our commands, ``options`` its parser and checks; ``module`` the LightningModule of a bank,
``evaluation`` how good its members are and which epoch is best; ``data`` the LightningDataModule, ``batches`` its
loaders, ``frozen`` what the layers that nobody trains make of the examples; ``pool_writer`` puts members into the pool
and uses them, ``records`` says what may be written and writes; ``restart`` lets a run end and go on; ``notices`` is
what is printed, and the loggers. ``runs`` trains more members than fit at once.
"""

__all__ = ["batches", "cli", "data", "evaluation", "module", "notices", "options", "runs"]
