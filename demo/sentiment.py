"""Sentences with a sentiment from 0 (very negative) to 4 (very positive), for the preset sst."""

from __future__ import annotations

import random

NOISE = 0.1
"""Share of examples whose label is moved to a neighbouring class."""

# Domain: the thing itself, parts of it, and words that are praise or blame only there, by level -2..2.
_DOMAINS: list[tuple[str, list[str], dict[int, list[str]]]] = [
    (
        "restaurant",
        ["soup", "dessert", "waiter", "wine list", "lunch menu", "grilled trout", "terrace"],
        {2: ["mouth-watering"], 1: ["fresh", "well seasoned"], -1: ["bland", "lukewarm"], -2: ["inedible"]},
    ),
    (
        "hotel",
        ["room", "breakfast", "front desk", "mattress", "view", "swimming pool", "bathroom"],
        {2: ["palatial"], 1: ["spotless", "cosy"], -1: ["cramped", "noisy"], -2: ["filthy"]},
    ),
    (
        "film",
        ["plot", "lead actor", "ending", "soundtrack", "dialogue", "camera work", "second act"],
        {2: ["spellbinding"], 1: ["witty", "touching"], -1: ["predictable", "overlong"], -2: ["unwatchable"]},
    ),
    (
        "phone",
        ["screen", "battery", "keyboard", "camera", "software", "loudspeaker", "charger"],
        {2: ["lightning fast"], 1: ["crisp", "sturdy"], -1: ["sluggish", "flimsy"], -2: ["unusable"]},
    ),
    (
        "night train",
        ["sleeping car", "conductor", "timetable", "dining car", "heating", "upper berth", "ticket app"],
        {2: ["luxurious"], 1: ["punctual", "roomy"], -1: ["draughty", "overcrowded"], -2: ["unbearable"]},
    ),
    (
        "museum",
        ["audio guide", "main exhibit", "gift shop", "tour", "lighting", "cloakroom", "sculpture garden"],
        {2: ["breathtaking"], 1: ["instructive", "charming"], -1: ["dusty", "confusing"], -2: ["embarrassing"]},
    ),
]
_ADJECTIVES = {
    2: ["superb", "wonderful", "outstanding", "magnificent", "flawless", "a triumph", "simply perfect"],
    1: ["good", "pleasant", "solid", "enjoyable", "likeable", "rather nice", "better than I expected"],
    0: ["average", "ordinary", "unremarkable", "neither here nor there", "much like any other", "adequate"],
    -1: ["weak", "disappointing", "dull", "mediocre", "clumsy", "not what we paid for", "below par"],
    -2: ["dreadful", "awful", "a disaster", "appalling", "a complete mess", "horrible", "an insult"],
}
_REMARKS = {
    2: ["I would go back tomorrow", "I have not stopped talking about it", "it deserves every prize it can get"],
    1: ["I am glad we tried it", "it made a grey day brighter", "I can see why people like it"],
    0: ["it does the job", "it left me with no strong feelings", "it is what the brochure says it is"],
    -1: ["I doubt that I will return", "there are better ways to spend an evening", "I kept looking at my watch"],
    -2: ["I want my money back", "I would not wish it on anyone", "we left early and angry"],
}
_FACTS = ["We were there on a {day}", "My sister had booked for {day}", "It was our first visit, on a {day}"]
_DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
_LEVELS = (-2, -1, 0, 1, 2)


def example(rng: random.Random) -> tuple[tuple[str, ...], str]:
    """One sentence and its class."""
    text, score = rng.choice(_PATTERNS)(rng)
    label = min(4, max(0, round(score + 0.01) + 2))  # halves go up: Python alone would round them to even
    if rng.random() < NOISE:
        label = label + rng.choice((-1, 1)) if 0 < label < 4 else abs(label - 1)
    return (text[0].upper() + text[1:],), str(label)


def _words(rng: random.Random, level: int, own: dict[int, list[str]]) -> str:
    return rng.choice(_ADJECTIVES[level] + own.get(level, []))


def _plain(rng: random.Random) -> tuple[str, float]:
    thing, parts, own = rng.choice(_DOMAINS)
    level = rng.choice(_LEVELS)
    opening = rng.choice(
        ["The {part} of this {thing} was", "I found the {part} of the {thing}", "The {thing}'s {part} is"]
    )
    return f"{opening.format(part=rng.choice(parts), thing=thing)} {_words(rng, level, own)}.", level


def _weighted(rng: random.Random) -> tuple[str, float]:
    """An adverb that strengthens, or one that softens."""
    thing, parts, own = rng.choice(_DOMAINS)
    level = rng.choice((-1, 1))
    adverb, factor = rng.choice(
        [
            ("extremely", 2),
            ("unbelievably", 2),
            ("really, really", 2),
            ("somewhat", 0.6),
            ("a little", 0.4),
            ("barely", 0),
        ]
    )
    word = rng.choice(own[level])
    return f"The {rng.choice(parts)} in our {thing} was {adverb} {word}.", level * factor


def _negated(rng: random.Random) -> tuple[str, float]:
    thing, parts, own = rng.choice(_DOMAINS)
    level, score = rng.choice([(-2, 0), (-1, 1), (1, -1), (2, -0.4)])
    shape = rng.choice(
        [
            "The {part} was not {word} at all.",
            "Nobody could call the {part} {word}.",
            "I can't say that the {part} was {word}.",
        ]
    )
    text = shape.format(part=rng.choice(parts), word=rng.choice(own[level]))
    return text.replace("the ", f"this {thing}'s ", 1) if rng.random() < 0.5 else text, score


def _contrast(rng: random.Random) -> tuple[str, float]:
    """Two judgements of which the one after "but", or the main clause, weighs more."""
    thing, parts, own = rng.choice(_DOMAINS)
    first, second = rng.sample(parts, 2)
    weak, strong = rng.sample(_LEVELS, 2)
    a, b = _words(rng, weak, own), _words(rng, strong, own)
    shape = rng.choice(
        [
            "The {first} was {a}, but the {second} was {b}.",
            "Although the {first} of the {thing} was {a}, the {second} was {b}.",
            "The {second} was {b}, even if the {first} was {a}.",
            "For all that is said of its {first}, which was {a}, this {thing} has a {second} that is {b}.",
        ]
    )
    return shape.format(first=first, second=second, thing=thing, a=a, b=b), 0.3 * weak + 0.7 * strong


def _turned(rng: random.Random) -> tuple[str, float]:
    """One part decides against the other."""
    thing, parts, own = rng.choice(_DOMAINS)
    first, second = rng.sample(parts, 2)
    level = rng.choice((1, 2))
    if rng.random() < 0.5:
        end = rng.choice(["ruined it all", "spoiled the {thing} for us", "undid all of that"])
        return f"The {first} was {_words(rng, level, own)}, yet the {second} {end.format(thing=thing)}.", -1
    end = rng.choice(["saved the day", "made up for it", "won us over in the end"])
    return f"The {first} was {_words(rng, -level, own)}, yet the {second} {end}.", 1


def _expected(rng: random.Random) -> tuple[str, float]:
    """What was hoped for or said by others does not count."""
    thing, _, own = rng.choice(_DOMAINS)
    said, level = rng.sample(_LEVELS, 2)
    a, b = _words(rng, said, own), _words(rng, level, own)
    shape = rng.choice(
        [
            'A friend called this {thing} "{a}"; to me it was {b}.',
            "I expected the {thing} to be {a}, and it turned out {b}.",
            "The reviews promised a {thing} that was {a}. Ours was {b}.",
        ]
    )
    return shape.format(thing=thing, a=a, b=b), level


def _remark(rng: random.Random) -> tuple[str, float]:
    thing, parts, own = rng.choice(_DOMAINS)
    level = rng.choice(_LEVELS)
    near = max(-2, min(2, level + rng.choice((-1, 0, 0, 1))))
    start = rng.choice(_FACTS).format(day=rng.choice(_DAYS))
    if rng.random() < 0.5:
        return f"{start}: the {thing} was {_words(rng, near, own)}, and {rng.choice(_REMARKS[level])}.", (
            near + level
        ) / 2
    return (
        f"{start}, and about the {rng.choice(parts)} of the {thing} I can say that {rng.choice(_REMARKS[level])}.",
        level,
    )


_PATTERNS = [_plain, _weighted, _negated, _contrast, _contrast, _turned, _expected, _remark]
