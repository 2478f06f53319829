"""What the layers of a model can have together, by what each was seen to do alone.

Divergences of layers that are changed a little add up, as squared errors of independent roundings
do, so that the best choice within a divergence is a knapsack; a price on divergence gives its lower
convex hull (`graphopt.allocation`). And the drop of the metric is in proportion to the divergence,
as both grow with the square of a small change; by how much, what was built says. A few samples may
say that a bolder choice lost less than a milder one: then both are taken to have lost their mean.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from scipy.optimize import isotonic_regression

from graphopt.allocation import Choice, smallest_within
from graphopt.probing import Probe
from graphopt.treatments import treatment

FIRST_STEP, STEP_MINIMUM, STEP_MAXIMUM = 0.6, 1.5, 16.0
"""From one divergence to the next that is tried, where only one side of the limit was seen."""

NARROW = 0.02
"""So small a share of the bytes is not worth another look."""

DROP_MAXIMUM = 1e9
"""No drop is taken to be more."""

DIVERGENCE_MINIMUM = 1e-9
"""Less of it is none: what costs nothing can be had without end."""


@dataclass
class Growth:
    """What the layers of a trunk can have, and what that is expected to do.

    Attributes:
        trunk_bytes: what the trunk takes on disk.
        probes: of each option of each layer.
        limit: the drop that layers may add.
    """

    trunk_bytes: int
    probes: Sequence[Probe]
    limit: float
    _blamed: dict[tuple[str, str], float] = field(default_factory=dict)
    _seen: list[tuple[Mapping[str, str], float]] = field(default_factory=list)
    _told_per_divergence: float = 0.0

    @property
    def _usable(self) -> dict[str, list[Probe]]:
        found: dict[str, list[Probe]] = {}
        for one in self.probes:
            if one.reason is None and _saved(one) > 0 and math.isfinite(one.divergence):
                found.setdefault(one.layer, []).append(one)
        return found

    @property
    def choices(self) -> list[list[Choice]]:
        """For each layer as it is, then each option that saves something: bytes and divergence."""
        return [
            [Choice(0, 0.0), *(Choice(-_saved(one), self._square(one)) for one in options)]
            for options in self._usable.values()
        ]

    def _square(self, one: Probe) -> float:
        return self._blamed.get((one.layer, _named(one)), one.divergence)

    def smallest(self, divergence: float) -> list[int]:
        """The choice of the fewest bytes that is expected to add so much divergence at most.

        What layers with the same option share is stored once for them all, which is no sum over
        layers. So options are left out, one after the other, as long as that saves bytes.
        """
        left_out = set[str]()
        best = smallest_within(self.choices, divergence)
        while True:
            tried = []
            for kind in sorted(set(self.options(best).values())):
                fewer = left_out | {kind}
                tried.append((smallest_within(self._without(fewer), divergence), fewer))
            least = min(tried, key=lambda one: self.stored_bytes(one[0]), default=None)
            if least is None or self.stored_bytes(least[0]) >= self.stored_bytes(best):
                return best
            best, left_out = least

    def _without(self, kinds: Collection[str]) -> list[list[Choice]]:
        """The choices, of which these options are none."""
        return [
            [
                choices[0],
                *(
                    Choice(0, math.inf) if _named(one) in kinds else choice
                    for one, choice in zip(options, choices[1:], strict=True)
                ),
            ]
            for options, choices in zip(self._usable.values(), self.choices, strict=True)
        ]

    @cached_property
    def _shared_bytes(self) -> dict[str, int]:
        """What layers with an option share in the file, by the option."""
        found: dict[str, list[int]] = {}
        for options in self._usable.values():
            for one in options:
                found.setdefault(_named(one), []).append(_saved(one) - one.saved_bytes)
        return {kind: max(int(np.median(several)), 0) for kind, several in found.items()}

    def divergence(self, at: Sequence[int]) -> float:
        """The sum of what options add, each alone."""
        return math.fsum(of[i].square for of, i in zip(self.choices, at, strict=True))

    def stored_bytes(self, at: Sequence[int]) -> int:
        """What the model is expected to take on disk."""
        saved = sum(of[i].stored_bytes for of, i in zip(self.choices, at, strict=True))
        shared = sum(self._shared_bytes[kind] for kind in set(self.options(at).values()))
        return self.trunk_bytes + saved + shared

    def aims(self, room: float) -> tuple[float, ...]:
        """Divergences to build points at: where the limit is expected, then between what was seen.

        Args:
            room: the drop that layers may add.
        """
        if not self._seen:
            aim = room / self.per_divergence
            return aim, FIRST_STEP * aim
        (low, low_drop), (high, high_drop) = self._bracket
        if low and high:
            return (low**2 * high) ** (1 / 3), (low * high**2) ** (1 / 3)
        if high:
            step = _step(high_drop, room)
            return high / math.sqrt(step), high / step
        step = _step(room, low_drop)
        return low * math.sqrt(step), low * step

    @property
    def _bracket(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """The most divergence that was within the limit, and the least that was not; 0 for none.

        Each with the drop that was seen there.
        """
        seen, none = self._drops, (0.0, 0.0)
        high = min((one for one in seen if one[1] > self.limit), default=none)
        within = [one for one in seen if one[1] <= self.limit and (not high[0] or one < high)]
        return max(within, default=none), high

    @property
    def is_narrow(self) -> bool:
        """Between what was within the limit and what was not there are few bytes."""
        (low, _), (high, _) = self._bracket
        if not low or not high:
            return False
        larger, smaller = (self.stored_bytes(self.smallest(at)) for at in (low, high))
        return larger - smaller <= NARROW * larger

    def options(self, at: Sequence[int]) -> dict[str, str]:
        """What layers get, "treatment option" by their names."""
        return {
            layer: _named(options[index - 1])
            for (layer, options), index in zip(self._usable.items(), at, strict=True)
            if index
        }

    def passes_of(self, chosen: Mapping[str, str]) -> str:
        """The passes, in text form, that give layers what is chosen."""
        texts = []
        for name in dict.fromkeys(one.treatment for one in self.probes):
            of_this = {
                layer: option.removeprefix(f"{name} ")
                for layer, option in chosen.items()
                if option.startswith(f"{name} ")
            }
            if of_this:
                texts.append(treatment(name).passes(of_this))
        return ",".join(texts)

    @property
    def per_divergence(self) -> float:
        """Points of drop for each unit of divergence that is expected of the sum.

        By the probes at first, then by what was built, the nearest to the limit counting most.
        """
        seen = self._drops
        if seen:
            weights = [1 / (abs(drop - self.limit) + 0.1 * abs(self.limit)) for _, drop in seen]
            weighed = list(zip(weights, seen, strict=True))
            drops = math.fsum(weight * max(drop, 0.0) for weight, (_, drop) in weighed)
            divergences = math.fsum(weight * expected for weight, (expected, _) in weighed)
            return max(drops / max(divergences, DIVERGENCE_MINIMUM), DIVERGENCE_MINIMUM)
        measured = [one for one in self.probes if one.loss is not None and one.reason is None]
        losses = math.fsum(max(one.loss or 0.0, 0.0) for one in measured)
        divergences = math.fsum(one.divergence for one in measured)
        return max(losses / max(divergences, DIVERGENCE_MINIMUM), DIVERGENCE_MINIMUM)

    def learn(self, chosen: Mapping[str, str], drop: float) -> None:
        """Take in by how much a point was found to be worse than the trunk.

        Args:
            chosen: what its layers got.
            drop: that was found.
        """
        # What cannot be compared is worse than anything.
        self._seen.append((chosen, drop if drop < DROP_MAXIMUM else DROP_MAXIMUM))

    def reject(self, chosen: Mapping[str, str], drop: float) -> None:
        """Take all points to lose as much for their divergence as other samples tell of one.

        Args:
            chosen: what its layers got.
            drop: that is told of it.
        """
        divergence = max(self.expected(chosen), DIVERGENCE_MINIMUM)
        self._told_per_divergence = max(self._told_per_divergence, drop / divergence)

    def expected(self, chosen: Mapping[str, str]) -> float:
        """The divergence that is expected of what layers get."""
        return math.fsum(
            self._square(one) for one in self.probes if chosen.get(one.layer) == _named(one)
        )

    @property
    def _drops(self) -> list[tuple[float, float]]:
        """The divergence that is expected of each point that was seen, and its drop.

        Drops do not fall as divergence grows (isotonic regression: Barlow et al. 1972).
        """
        expected = np.array([self.expected(chosen) for chosen, _ in self._seen])
        drops = np.array([drop for _, drop in self._seen])
        if not drops.size:
            return []
        order = np.argsort(expected, kind="stable")
        drops[order] = isotonic_regression(drops[order]).x
        drops = np.maximum(drops, self._told_per_divergence * expected)
        return list(zip(expected.tolist(), drops.tolist(), strict=True))

    def drop_of(self, chosen: Mapping[str, str]) -> float:
        """By how much a point that was seen is worse than the trunk, as all of them tell."""
        index = [seen for seen, _ in self._seen].index(chosen)
        return self._drops[index][1]

    def suspects(self, chosen: Mapping[str, str], count: int) -> list[str]:
        """The layers that are expected to diverge most."""
        squares = {
            one.layer: self._square(one)
            for one in self.probes
            if chosen.get(one.layer) == _named(one)
        }
        return sorted(squares, key=lambda layer: -squares[layer])[:count]

    def blame(self, layer: str, option: str, divergence: float) -> None:
        """Expect of an option of a layer, and of all coarser ones, what it was seen to do."""
        own = [one for one in self.probes if one.layer == layer]
        (seen,) = (one for one in own if _named(one) == option)
        growth = divergence / max(self._square(seen), DIVERGENCE_MINIMUM)
        if not growth > 1:
            # NaN, too: of two that cannot be compared nothing is seen.
            return
        for one in own:
            square = max(self._square(one), DIVERGENCE_MINIMUM)
            self._blamed[layer, _named(one)] = growth * square


def _step(drop: float, other: float) -> float:
    """From one divergence to that at which another drop is expected, which is in proportion."""
    ratio = drop / other if other > 0 else math.inf
    return min(max(ratio, STEP_MINIMUM), STEP_MAXIMUM)


def _saved(one: Probe) -> int:
    """Bytes, where other layers are treated too."""
    return one.saved_bytes if one.joint_saved_bytes is None else one.joint_saved_bytes


def _named(one: Probe) -> str:
    return f"{one.treatment} {one.option}"
