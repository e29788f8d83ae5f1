"""How an ensemble is chosen and how it decides: arrays in, a choice out.

``settings`` are what is asked for; ``combine`` and ``choice`` make one prediction of many; ``similarity`` and
``select`` are the report's rule; ``greedy``, ``weights`` and ``methods`` are the other ways to choose; ``view`` is what
a method may see.
"""
