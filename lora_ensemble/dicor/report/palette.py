"""The colours of the drawings and the page, by what they are for, in a light and a dark dress.

Series are told apart by colour-blind readers (blue, orange, green, purple, ochre, grey, of different lightness), and
never by colour alone: marks and dashes differ too. Text on paper has a contrast of at least 4.5 (WCAG 2.2, 1.4.3), what
is drawn in a series' colour one of at least 3 (1.4.11).
"""

from __future__ import annotations

SERIES = 6
"""Colours of series: s0 to s5."""
LEVELS = 12
"""Steps of the heat map's scale: h0, the least, to h11."""

# Role: light, dark.
_ROLES: dict[str, tuple[str, str]] = {
    "paper": ("#ffffff", "#14171c"),
    "card": ("#f6f5f2", "#1c2027"),
    "ink": ("#1d2127", "#e8e6e1"),
    "soft": ("#565d66", "#a9b0ba"),
    "line": ("#d9d6cf", "#353b45"),
    "grid": ("#e9e7e2", "#262b33"),
    "accent": ("#a8321a", "#ff9d7e"),
    "wash": ("#fbeee9", "#33211c"),
    "unknown": ("#c9c6bf", "#4a515c"),
    "s0": ("#0b5fa5", "#7fb9f2"),
    "s1": ("#b5520a", "#f3a863"),
    "s2": ("#0c7559", "#62d0b0"),
    "s3": ("#85398c", "#dba3e4"),
    "s4": ("#77650a", "#d9c85f"),
    "s5": ("#4c5560", "#b9c0c9"),
}
# The heat map's scale, between these: from near the paper to the deepest, so that "alike" is what stands out.
_RAMPS = (
    ("#f4f1e6", "#cfe0c9", "#8cc1bb", "#4690ad", "#275f94", "#172f63"),
    ("#20262f", "#27415c", "#2b6a87", "#4a9c9b", "#9dcb9f", "#f1efc0"),
)


def _between(ramp: tuple[str, ...], at: float) -> str:
    """The colour at ``at``, 0 to 1, between those of the ramp."""
    place = at * (len(ramp) - 1)
    i = min(int(place), len(ramp) - 2)
    a, b = ([int(c[j : j + 2], 16) for j in (1, 3, 5)] for c in ramp[i : i + 2])
    return "#" + "".join(f"{round(x + (y - x) * (place - i)):02x}" for x, y in zip(a, b, strict=True))


def roles() -> dict[str, tuple[str, str]]:
    """Role to its light and its dark colour."""
    scale = {f"h{i}": tuple(_between(ramp, i / (LEVELS - 1)) for ramp in _RAMPS) for i in range(LEVELS)}
    return _ROLES | {name: (light, dark) for name, (light, dark) in scale.items()}


def css() -> str:
    """Custom properties of both dresses, and the classes of a drawing's parts: s- strokes, f- fills, o- is hollow."""
    light, dark = ("".join(f"--{role}:{pair[i]};" for role, pair in roles().items()) for i in (0, 1))
    classes = "".join(
        f".s-{r}{{stroke:var(--{r});fill:none}}.f-{r}{{fill:var(--{r})}}.o-{r}{{stroke:var(--{r});fill:var(--paper)}}"
        for r in roles()
    )
    return (
        f":root{{color-scheme:light dark;{light}}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
        f"{classes}\n"
        "svg text{font-family:var(--sans)}\n"
        ":root{--sans:system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif}\n"
    )
