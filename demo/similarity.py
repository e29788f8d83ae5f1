"""Pairs of sentences and how similar they are, from 0.0 to 5.0, for the preset sts."""

from __future__ import annotations

import random

NOISE = 0.35
"""Standard deviation of what is added to the grade before it is rounded."""
STEP = 0.2
"""The grades are multiples of this."""

# Each slot: groups of related things; each thing: ways to say it. Two sentences may agree in a slot, have related
# things in it, or have nothing to do with each other there.
_SLOTS: dict[str, list[list[list[str]]]] = {
    "subject": [
        [["a man", "a guy"], ["a woman", "a lady"], ["an old man", "an elderly man"]],
        [["a boy", "a young boy"], ["a girl", "a little girl"], ["a toddler", "a small child"]],
        [["a nurse", "a hospital nurse"], ["a doctor", "a physician"]],
        [["a dog", "a hound"], ["a puppy", "a young dog"], ["a cat", "a kitten"]],
    ],
    "action": [
        [["carrying", "holding"], ["dragging", "pulling"], ["pushing", "shoving"]],
        [["painting", "colouring"], ["drawing", "sketching"]],
        [["cleaning", "washing"], ["wiping", "rubbing"]],
        [["watching", "looking at"], ["guarding", "keeping watch over"]],
        [["hiding", "concealing"], ["losing", "mislaying"]],
    ],
    "object": [
        [["bicycle", "bike"], ["scooter", "kick scooter"], ["car", "automobile"]],
        [["box", "crate"], ["suitcase", "travel bag"], ["basket", "hamper"]],
        [["ball", "rubber ball"], ["toy", "plaything"]],
        [["chair", "stool"], ["table", "desk"]],
    ],
    "place": [
        [["in the garden", "in the backyard"], ["in the park", "on the lawn of a park"]],
        [["on the beach", "at the seaside"], ["by the river", "on the bank of a river"]],
        [["in the kitchen", "inside a kitchen"], ["in the hall", "in a corridor"]],
        [["on the street", "on the road"], ["at the bus stop", "at a bus station"]],
    ],
    "number": [[[w]] for w in ("one", "two", "three", "four", "five")],
    "negation": [[[""]], [["not "]]],
}
# What a slot costs when it differs; a related thing costs half. Together they are more than 5: 0 can be reached.
_COST = {"subject": 1.2, "action": 1.4, "object": 1.2, "place": 0.8, "number": 0.5, "negation": 1.5}
_SHAPES = [
    "{subject} is {negation}{action} {number} {object} {place}.",
    "{place}, {subject} is {negation}{action} {number} {object}.",
    "there is {subject} {place} that is {negation}{action} {number} {object}.",
    "{number} {object} {verb} what {subject} is {negation}{action} {place}.",
]

Choice = tuple[int, int]
"""Group and thing in a slot."""


def example(rng: random.Random) -> tuple[tuple[str, ...], str]:
    """Two sentences and their grade."""
    first = {name: _pick(rng, name) for name in _SLOTS}
    if rng.random() < 0.85:
        first["negation"] = (0, 0)  # few sentences say what does not happen
    second = dict(first)
    grade = 5.0
    for name in rng.sample(list(_SLOTS), rng.choice((0, 1, 1, 2, 2, 3, 3, 4, 5, 6))):
        second[name], share = _changed(rng, name, first[name])
        grade -= _COST[name] * share
    steps = round((grade + rng.gauss(0, NOISE)) / STEP)
    grade = min(5.0, max(0.0, steps * STEP))
    return (_say(rng, first), _say(rng, second)), f"{grade:.1f}"


def _pick(rng: random.Random, name: str) -> Choice:
    group = rng.randrange(len(_SLOTS[name]))
    return group, rng.randrange(len(_SLOTS[name][group]))


def _changed(rng: random.Random, name: str, old: Choice) -> tuple[Choice, float]:
    """Another thing for a slot, and the share of the slot's cost."""
    new = rng.choice([(g, t) for g, group in enumerate(_SLOTS[name]) for t in range(len(group)) if (g, t) != old])
    return new, 0.5 if new[0] == old[0] else 1.0


def _say(rng: random.Random, choices: dict[str, Choice]) -> str:
    words = {name: rng.choice(_SLOTS[name][group][thing]) for name, (group, thing) in choices.items()}
    many = words["number"] != "one"
    # "one" is often said by the article alone, so that not every pair repeats its number word.
    if not many and rng.random() < 0.5:
        words["number"] = "an" if words["object"][0] in "aeiou" else "a"
    if many:
        words["object"] = words["object"] + ("es" if words["object"].endswith("x") else "s")
    text = rng.choice(_SHAPES).format(**words, verb="are" if many else "is")
    return text[0].upper() + text[1:]
