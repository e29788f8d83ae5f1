"""How good an ensemble of each size is, in-sample and honest, by the same folds as the comparison.

Axes: N examples of dev.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lora_ensemble.dicor.choose.greedy import Greedy
from lora_ensemble.dicor.choose.methods import Dicor, Exhaustive, Method, Omni, Weighted
from lora_ensemble.dicor.choose.settings import DEFAULT_TOP_K, MOST_AUTO
from lora_ensemble.dicor.compare import Comparison
from lora_ensemble.dicor.estimate.honest import Estimate, estimate

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 20, 25, 30)
"""As many as a curve needs; sizes between the later ones hardly differ."""
FEW_SIZES = (1, 2, 5, 10, 15, 25)
"""For a method of many bags, each of which is a search of its own."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One method at growing sizes."""

    method: str
    of_n: str
    """What n is for this method, in words."""
    used: int | None
    """The n of the comparison, where it is one number and within the curve."""
    sizes: list[int]
    estimates: list[Estimate]


def sized(method: Method, n: int) -> Method | None:
    """The method with n members, or what its own kind of n is; None for the single best, which has no size."""
    if isinstance(method, Dicor):
        return replace(method, size=n, top_k=max(method.top_k, n))
    if isinstance(method, Weighted):
        return replace(method, top_k=n)
    if isinstance(method, Greedy):
        return replace(method, steps=n)
    if isinstance(method, Exhaustive):
        return replace(method, size=n)
    if isinstance(method, Omni):
        return Dicor(size=n, top_k=n, trade_off=0.0, strategy=method.strategy)
    return None


def _range(method: Method, members: int) -> tuple[str, int, int | None]:
    """What n is, the largest that is looked at, and that of the method itself, for a pool of M ``members``."""
    if isinstance(method, Dicor):
        own = None if method.size == "auto" else min(method.size, method.top_k, members)
        return "n members", min(method.top_k, members, max(own or 0, MOST_AUTO)), own
    if isinstance(method, Weighted):
        own = min(method.top_k, members)
        return "of the n best", own, own
    if isinstance(method, Greedy):
        return "n steps", method.steps, method.steps
    if isinstance(method, Exhaustive):
        own = min(method.top_k, method.size or method.top_k, members)
        return "n members at most", own, own
    return "the n best", min(DEFAULT_TOP_K, members), members if members <= DEFAULT_TOP_K else None


def curves(comparison: Comparison, names: Sequence[str]) -> list[Curve]:
    """A curve for each of these methods that has a size; none for a pool of one member.

    At ``used`` the estimate is that of the comparison. Raises as ``estimate``.
    """
    members = len(comparison.estimates.of["omni"].names)
    found, asked = list[tuple[str, str, int | None, list[int]]](), dict[str, Method]()
    for name in dict.fromkeys(names):
        method = comparison.methods[name]
        of_n, most, used = _range(method, members)
        some = FEW_SIZES if isinstance(method, Greedy) and method.bags > 1 else SIZES
        sizes = sorted({n for n in (*some, used, most) if n is not None and n <= most})
        at = {f"{name} {n}": one for n in sizes if (one := sized(method, n)) is not None}
        if at and most > 1:
            asked |= at
            found.append((name, of_n, used, sizes))
    if not asked:
        return []
    omni = comparison.methods["omni"]
    assert isinstance(omni, Omni)
    estimates = estimate(comparison.dev, asked, omni=omni).of
    return [
        Curve(method=name, of_n=of_n, used=used, sizes=sizes, estimates=[estimates[f"{name} {n}"] for n in sizes])
        for name, of_n, used, sizes in found
    ]
