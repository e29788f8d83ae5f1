"""Pairs of questions that ask the same (1.0) or only look alike (0.0), for the preset quora."""

from __future__ import annotations

import random
from dataclasses import dataclass

NOISE = 0.04
"""Share of examples whose label is turned around."""

_CITIES = ["Lisbon", "Nairobi", "Toronto", "Hanoi", "Lima", "Oslo", "Prague", "Seoul", "Tunis", "Perth"]
_YEARS = ["1954", "1969", "1978", "1986", "1994", "2003", "2011", "2019"]
_SKILLS = ["Spanish", "chess", "the violin", "watercolour painting", "Python", "sailing", "calligraphy", "statistics"]
_FOODS = ["rice", "chicken", "spinach", "beef", "yoghurt", "fish", "tofu", "cheese"]


@dataclass(frozen=True)
class _Family:
    """Ways to ask one question, and other questions about the same things."""

    same: list[str]
    other: list[str]
    slots: dict[str, list[str]]


_FAMILIES = [
    _Family(
        [
            "How do I get from {a} to {b}?",
            "What is the best way to travel from {a} to {b}?",
            "I am in {a}. Which route would take me to {b}?",
            "How can someone who lives in {a} reach {b}?",
        ],
        ["How far is it from {a} to {b}?", "How do I get from {b} to {a}?", "Should I move from {a} to {b}?"],
        {"a": _CITIES, "b": _CITIES},
    ),
    _Family(
        [
            "How can I learn {a} in {b}?",
            "Is there a way to become good at {a} within {b}?",
            "What should a beginner do to master {a} in only {b}?",
            "I have {b}: how do I teach myself {a}?",
        ],
        [
            "How can I teach {a} to children in {b}?",
            "Why can nobody learn {a} in {b}?",
            "Did you give up {a} after {b}?",
        ],
        {"a": _SKILLS, "b": ["two weeks", "a month", "three months", "half a year", "a year"]},
    ),
    _Family(
        [
            "Who won the {a} in {b}?",
            "Which team took the title at the {a} of {b}?",
            "Who were the champions of the {b} {a}?",
            "In {b}, who came first in the {a}?",
        ],
        ["Who lost the final of the {a} in {b}?", "Where was the {a} held in {b}?", "Who won the {a} after {b}?"],
        {
            "a": ["football world cup", "chess olympiad", "rowing regatta", "relay race", "debating contest"],
            "b": _YEARS,
        },
    ),
    _Family(
        [
            "Is it safe to eat {a} that is {b}?",
            "Can I still eat {a} when it is {b}?",
            "Will {a} make me ill if it is {b}?",
            "Do people get sick from {a} that is {b}?",
        ],
        [
            "Why does {a} taste better when it is {b}?",
            "How do I keep {a} from being {b}?",
            "Is {a} healthier when it is {b}?",
        ],
        {"a": _FOODS, "b": ["raw", "frozen twice", "a week old", "reheated", "undercooked"]},
    ),
    _Family(
        [
            "Does {a} cause {b}?",
            "Can {b} be a result of {a}?",
            "Is {a} one of the reasons for {b}?",
            "Could {a} lead to {b}?",
        ],
        ["Does {b} cause {a}?", "Can {a} prevent {b}?", "Is {a} worse than {b}?", "Could {b} lead to {a}?"],
        {k: ["stress", "bad sleep", "headaches", "back pain", "loneliness", "weight gain", "acne"] for k in "ab"},
    ),
    _Family(
        [
            "What is the difference between {a} and {b}?",
            "How does {b} differ from {a}?",
            "In what way are {a} and {b} not the same?",
            "How do I tell {a} from {b}?",
        ],
        ["What do {a} and {b} have in common?", "Which came first, {a} or {b}?", "Can I use {a} instead of {b}?"],
        {k: ["a violin", "a viola", "a fiddle", "a cello", "a lute", "a banjo", "a mandolin"] for k in "ab"},
    ),
    _Family(
        [
            "How do I convert {a} to {b}?",
            "Is there a program that turns {a} into {b}?",
            "How can {b} be made out of {a}?",
            "What is the easiest way of changing {a} into {b}?",
        ],
        ["How do I convert {b} to {a}?", "Are {a} smaller than {b}?", "Why can't I open {a} and {b}?"],
        {k: ["PDF files", "web pages", "Word documents", "spreadsheets", "e-books", "scanned images"] for k in "ab"},
    ),
    _Family(
        [
            "Which {a} should I buy for less than {b}?",
            "What is the best {a} under {b}?",
            "I have {b} to spend on a {a}; what do you recommend?",
            "Can you name a good {a} that costs no more than {b}?",
        ],
        ["Where can I sell a {a} for {b}?", "Is any {a} worth more than {b}?", "Why does my {a} cost {b} to repair?"],
        {
            "a": ["laptop", "bicycle", "camera", "guitar", "coffee machine", "tent"],
            "b": ["$100", "$250", "$500", "$900"],
        },
    ),
    _Family(
        [
            "What was it like to live in {a} in {b}?",
            "How did people live in {a} around {b}?",
            "What did everyday life in {a} look like in {b}?",
            "Can anyone describe life in {a} back in {b}?",
        ],
        ["What was built in {a} in {b}?", "Why did people leave {a} in {b}?", "What was the weather in {a} in {b}?"],
        {"a": _CITIES, "b": _YEARS},
    ),
    _Family(
        [
            "How do I tell my {a} that I {b}?",
            "What is the kindest way to let my {a} know that I {b}?",
            "I {b}. How should I break it to my {a}?",
            "How can I explain to my {a} that I {b}?",
        ],
        ["How do I find out whether my {a} knows that I {b}?", "Why is my {a} glad that I {b}?"],
        {
            "a": ["boss", "mother", "landlord", "best friend", "teacher", "neighbour"],
            "b": [
                "am moving out",
                "lost the keys",
                "need more money",
                "failed the exam",
                "want to quit",
                "broke the window",
            ],
        },
    ),
]


def example(rng: random.Random) -> tuple[tuple[str, ...], str]:
    """Two questions and whether they ask the same."""
    family = rng.choice(_FAMILIES)
    slots = _fill(rng, family)
    one, two = rng.sample(family.same, 2)
    same = rng.random() < 0.45
    if same:
        first, second = one.format(**slots), two.format(**slots)
    else:
        first, second = one.format(**slots), _near_miss(rng, family, two, slots)
        if rng.random() < 0.5:
            first, second = second, first
    if rng.random() < NOISE:
        same = not same
    return (first, second), "1.0" if same else "0.0"


def _fill(rng: random.Random, family: _Family) -> dict[str, str]:
    a = rng.choice(family.slots["a"])
    return {"a": a, "b": rng.choice([b for b in family.slots["b"] if b != a])}


def _near_miss(rng: random.Random, family: _Family, asked: str, slots: dict[str, str]) -> str:
    """A question that is not the same: another thing, another question about it, or (rarely) something else."""
    kind = rng.random()
    if kind < 0.1:
        other = rng.choice([f for f in _FAMILIES if f is not family])
        return rng.choice(other.same).format(**_fill(rng, other))
    if kind < 0.5:
        return rng.choice(family.other).format(**slots)
    name = rng.choice("ab")
    value = rng.choice([v for v in family.slots[name] if v not in slots.values()])
    return asked.format(**{**slots, name: value})
