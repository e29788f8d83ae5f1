"""How an ensemble is chosen and how it decides: members in, a choice out.

``settings`` are what is asked for; ``probabilities`` and ``combine`` make one prediction of many; ``similarity`` has
the report's rule, ``criteria`` what searches make best, ``weights`` and ``offsets`` are fitted; ``methods`` are the
ways to choose.

Axes in all of it: M members, N examples of a split, C outputs of a head, K classes, k candidates or members of an
ensemble, F numbers that a member is compared by.
"""
