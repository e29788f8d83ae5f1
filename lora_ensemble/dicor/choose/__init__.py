"""How an ensemble is chosen and how it decides: members in, a choice out.

``settings`` are what is asked for; ``probabilities`` and ``combine`` make one prediction of many; ``similarity`` has
the report's rule, ``criteria`` what searches make best, ``weights`` are fitted; ``methods`` are the ways to choose.
"""
