"""Runs of several banks: ``plan`` says which members train together, ``memory`` and ``probe`` how many fit.

``banks`` trains one after another, ``subset`` cuts the checkpoint of a bank that did not fit; ``sweep`` goes on by
itself, ``halving`` sends members home early, ``progress`` says how far it is, ``ray_sweep`` trains on a Ray cluster.
"""

__all__ = ["probe", "progress"]
