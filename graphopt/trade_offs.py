"""Models that a search has tried: what each of them costs, and which are worth a look."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """A model that was tried.

    Attributes:
        name: by which a user knows it, for example its passes.
        size_ratio: bytes over those of the original.
        latency_ratio: latency over that of the original; None where it was not timed.
        drop: what it loses, of the metric or as an error; less is better.
        chosen: it is the one that the search ends with.
        expected: it was not built; this is what the search would expect of it.
    """

    name: str
    size_ratio: float
    latency_ratio: float | None
    drop: float
    chosen: bool = False
    expected: bool = False


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in one coordinate without losing in the other.

    Args:
        points: two costs each.

    Returns:
        The Pareto front, each point once, by the first cost.
    """
    kept: list[tuple[float, float]] = []
    for point in sorted(set(points)):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept


@dataclass(frozen=True)
class Sensitivity:
    """What each layer loses under each option, all else left as it was.

    Attributes:
        layers: names.
        options: what was tried of each, in text form.
        drops: a row for each layer, with a number for each option; None where it was not tried.
        measure: what the numbers are, for example "relative L2 error of the outputs".
    """

    layers: Sequence[str]
    options: Sequence[str]
    drops: Sequence[Sequence[float | None]]
    measure: str
