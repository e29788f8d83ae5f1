"""Runs of several banks: ``plan`` says which members train together, ``memory`` and ``probe`` how many fit.

``banks`` trains one after another, ``halves`` cuts a bank that did not fit in two; ``sweep`` goes on by itself,
``halving`` sends members home early, ``progress`` says how far it is, ``ray_sweep`` trains on a Ray cluster.
"""

__all__ = ["probe", "progress"]
