"""``dicor report``: what is known of an ensemble and its pool, as numbers, plots and one HTML page (extra [report]).

``facts`` and ``theory`` compute everything once; ``charts`` and ``heat_map`` describe each plot once, by Altair, and
``plot`` turns it into SVG, PNG and a specification for scripts; ``page`` puts it all into ``page.html.j2``.
Axes in all of it: M members, N examples of dev, C outputs of a head, S members that are shown, G groups of them, R
repeats, k members of an ensemble.
"""
