"""Programs made of the others: ``distill`` trains a student of an ensemble, ``boost`` each member on
the errors of the last, ``reproduce`` repeats both reports."""

__all__: list[str] = []
