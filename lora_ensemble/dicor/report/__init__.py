"""``dicor report``: what is known of an ensemble and its pool, as numbers, drawings and one HTML page.

``facts`` computes everything once; ``charts`` and ``heat_map`` make drawings of it, ``svg`` writes them, ``page`` puts
the page together. numpy and scipy only. Axes: M members, N examples of dev, C outputs of a head, k members of an
ensemble.
"""
