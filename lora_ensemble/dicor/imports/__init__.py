"""``dicor import``: what somebody else's models predicted, as members of a pool.

``sources`` reads files as they stand; ``outputs`` finds the columns of outputs and makes logits of them; ``truth``
knows ids and labels; ``importing`` writes the members. What was asked for is a ``Request`` (``dicor/options.py``).
"""
