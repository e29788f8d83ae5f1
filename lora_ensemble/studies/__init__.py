"""Programs made of the others: ``distill`` trains a student of an ensemble, ``reproduce`` repeats both reports."""

__all__: list[str] = []
