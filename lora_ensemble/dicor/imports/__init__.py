"""``dicor import``: what somebody else's models predicted, as members of a pool.

``sources`` reads files as they stand, ``layout`` finds the columns of outputs, ``outputs`` makes logits of them,
``truth`` brings ids and labels; ``importing`` writes the member; ``command`` has the options.
"""
