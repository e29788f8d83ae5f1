"""How good an ensemble is that was chosen on the same dev set: honestly, and with its uncertainty.

``splits`` of examples, keyed on their ids; ``fold_scores`` of all members in one pass; ``interval`` by the bootstrap;
``honest`` puts them together. Axes in all of it: M members, N examples of dev, C outputs of a head, E epochs, R repeats
of K folds, S = R * K splits, B bootstrap draws, k candidates.
"""
