"""DiCor: from a pool of members, an ensemble that is accurate and whose members disagree (Tolkunov, section 4.3).

Only numpy and scipy are needed here (the extra [report] for pages and plots, wandb for a report's upload), never torch.
Functions take arrays and settings and return records; ``cli.py`` alone reads options and prints. Axes in all of it: M
members, N examples of a split, C outputs of a head, E epochs, k members in memory.
"""

__all__ = ["apply", "choose", "compare", "estimate", "located", "members", "options", "record", "report", "table"]
