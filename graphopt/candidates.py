"""The candidates of a search, and which of them is best."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from graphopt.building import Built
from graphopt.gauge import Gauged
from graphopt.scenarios import Objective

FASTER = 0.9
"""Less of a difference between two latencies may be chance."""

AS_FAST = 1.02
"""Where latency is what counts, a model that takes so many times that of the fastest is as good:
two looks at the same model differ by as much."""

AS_GOOD = 1.1
"""A file of so many times the bytes of the smallest is as good."""


@dataclass(frozen=True)
class Candidate:
    """A model that was built, and what was found of it.

    Attributes:
        trunk: the name of the trunk.
        built: the model, made of the base of a trial.
        gauged: what it has lost.
        chosen: what layers got, "treatment option" by their names.
        trunk_passes: what was done to all of the model before.
        latency_ratio: to the original's; None where it was not measured.
    """

    trunk: str
    built: Built
    gauged: Gauged
    chosen: dict[str, str]
    trunk_passes: str
    latency_ratio: float | None = None

    @property
    def passes(self) -> str:
        """All that was done after the recipe basic, in text form."""
        return ",".join(filter(None, (self.trunk_passes, self.built.passes)))


@dataclass(frozen=True)
class Predicted:
    """A point of the front that was not built.

    Attributes:
        trunk: the name of the trunk.
        stored_bytes: expected on disk.
        drop: expected.
    """

    trunk: str
    stored_bytes: int
    drop: float


def best_first(candidates: Sequence[Candidate], objective: Objective) -> list[Candidate]:
    """Candidates in the order of an objective; of those that are as good, the better otherwise."""
    found = sorted(candidates, key=cost_of(objective))
    if not found:
        return []
    if objective == "latency":
        first = sorted(as_fast(found), key=lambda c: c.built.stored_bytes)
    else:
        most_bytes = AS_GOOD * found[0].built.stored_bytes
        first = [fastest_if_certain([c for c in found if c.built.stored_bytes <= most_bytes])]
    return [*first, *(one for one in found if one not in first)]


def cost_of(objective: Objective) -> Callable[[Candidate], tuple[float, float]]:
    """What a candidate costs by an objective: that is made least."""
    if objective == "latency":
        return lambda one: (_latency(one), one.built.stored_bytes)
    return lambda one: (one.built.stored_bytes, one.gauged.drop)


def fastest_if_certain(candidates: Sequence[Candidate]) -> Candidate:
    """The first, unless the clock says for certain that another one is faster."""
    first, fastest = candidates[0], min(candidates, key=_latency)
    return fastest if _latency(fastest) < FASTER * _latency(first) else first


def as_fast(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that are as fast as the fastest, in order."""
    least = min(map(_latency, candidates))
    return [one for one in candidates if _latency(one) <= AS_FAST * least]


def _latency(candidate: Candidate) -> float:
    return math.inf if candidate.latency_ratio is None else candidate.latency_ratio
