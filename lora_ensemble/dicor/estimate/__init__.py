"""How good an ensemble is that was chosen on the same dev set: honestly, and with its uncertainty.

``splits`` of examples, keyed on their ids; ``fold_scores`` of all members in one pass; ``interval`` by the bootstrap;
``honest`` puts them together.
"""
