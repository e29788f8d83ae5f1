"""Training with lightning: banks in, members in the pool out.

``cli`` is LightningCLI with our commands; ``module`` the LightningModule of a bank, ``data`` its LightningDataModule,
``frozen`` the encoder's output kept; ``pool_writer`` puts members into the pool, ``records`` says what their records
hold, ``pool_user`` uses them; ``restart`` lets a run end and go on; ``curves`` are the loggers, ``notices`` what is
printed. ``runs`` trains more members than fit at once.
"""

__all__ = ["cli", "data", "module", "notices", "runs"]
