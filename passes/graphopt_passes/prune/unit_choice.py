"""How many units of each group stay, and which blocks, so that the outputs change least.

Errors of independent removals add up in their squares. Under a limit on what the model costs, the
best choice is, but for the last step, the one with the least square + price * cost for some price
(Everett 1963, Generalized Lagrange multiplier method). What a unit costs depends on how many units
there are of the groups that it meets in a layer, so that one group is chosen after the other until
none changes any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt_passes.prune.unit_costs import Costs

_HALVINGS, _SWEEPS = 40, 12


@dataclass(frozen=True, eq=False)
class UnitOptions:
    """What could be done to a group.

    Attributes:
        allowed: int64 [n]: how many of its units may stay, rising; the last is all of them.
        squares: float64 [n]: what each adds to the squared error of the outputs.
    """

    allowed: np.ndarray
    squares: np.ndarray


@dataclass(frozen=True, eq=False)
class BlockOption:
    """A branch that could be left out.

    Attributes:
        nodes: that go with it.
        inner: the numbers of the groups that go with it.
        square: what that adds to the squared error of the outputs.
    """

    nodes: frozenset[ir.Node]
    inner: frozenset[int]
    square: float


@dataclass(frozen=True)
class Chosen:
    """What is done.

    Attributes:
        counts: how many units of each group stay.
        dropped: the numbers of the blocks that go.
    """

    counts: tuple[int, ...]
    dropped: frozenset[int]


@dataclass(frozen=True)
class Choosing:
    """Chooses for one model.

    Attributes:
        costs: of the model.
        options: for each group of the costs.
        blocks: that could go.
    """

    costs: Costs
    options: Sequence[UnitOptions]
    blocks: Sequence[BlockOption]

    @property
    def everything(self) -> Chosen:
        """All units stay, and all blocks."""
        return Chosen(tuple(int(o.allowed[-1]) for o in self.options), frozenset())

    def cost(self, chosen: Chosen) -> float:
        """What the model costs then."""
        return self.costs.of(chosen.counts, self._gone(chosen.dropped))

    def square(self, chosen: Chosen) -> float:
        """What is expected to be added to the squared error of the outputs."""
        counted = set(range(len(self.options))) - self._without(chosen.dropped)
        of_groups = sum(
            float(self.options[n].squares[np.searchsorted(self.options[n].allowed, c)])
            for n, c in enumerate(chosen.counts)
            if n in counted
        )
        return of_groups + sum(self.blocks[b].square for b in chosen.dropped)

    def within(self, limit: float) -> Chosen:
        """The choice of the least error that costs so much at most; the cheapest if none does."""
        low, high = 1e-30, 1e30
        best = self._at(high)
        if self.cost(best) > limit:
            # At such a price nothing else counts, but what costs nothing more may stay.
            return self._filled(best, self.cost(best))
        for _ in range(_HALVINGS):
            price = float(np.sqrt(low * high))
            chosen = self._at(price)
            if self.cost(chosen) <= limit:
                best, high = chosen, price
            else:
                low = price
            if high / low < 1.001:
                break
        return self._filled(best, limit)

    def _at(self, price: float) -> Chosen:
        chosen = self.everything
        for _ in range(_SWEEPS):
            before = chosen
            for number in range(len(self.options)):
                if number not in self._without(chosen.dropped):
                    chosen = self._best_count(chosen, number, price)
            for number in range(len(self.blocks)):
                chosen = self._with_or_without(chosen, number, price)
            if chosen == before:
                break
        return chosen

    def _best_count(self, chosen: Chosen, number: int, price: float) -> Chosen:
        option = self.options[number]
        gone = self._gone(chosen.dropped)
        costs = self.costs.along(number, option.allowed, chosen.counts, gone)
        best = int(np.argmin(option.squares + price * costs))
        counts = list(chosen.counts)
        counts[number] = int(option.allowed[best])
        return Chosen(tuple(counts), chosen.dropped)

    def _with_or_without(self, chosen: Chosen, number: int, price: float) -> Chosen:
        """The better of the two."""
        both = [
            Chosen(chosen.counts, chosen.dropped | {number}),
            Chosen(chosen.counts, chosen.dropped - {number}),
        ]
        return min(both, key=lambda one: self.square(one) + price * self.cost(one))

    def _filled(self, chosen: Chosen, limit: float) -> Chosen:
        """The same, with what a price leaves of the limit: the best that fits, one at a time."""
        while True:
            square, cost = self.square(chosen), self.cost(chosen)
            better = [
                ((square - self.square(one)) / max(more, 1e-9), place, one)
                for place, one in enumerate(self._one_step_more(chosen))
                if (more := self.cost(one) - cost) <= limit - cost and self.square(one) < square
            ]
            if not better:
                return chosen
            _, _, chosen = max(better, key=lambda found: found[:2])

    def _one_step_more(self, chosen: Chosen) -> list[Chosen]:
        found = []
        without = self._without(chosen.dropped)
        for number, option in enumerate(self.options):
            place = int(np.searchsorted(option.allowed, chosen.counts[number]))
            if number not in without and place + 1 < len(option.allowed):
                counts = list(chosen.counts)
                counts[number] = int(option.allowed[place + 1])
                found.append(Chosen(tuple(counts), chosen.dropped))
        return found + [Chosen(chosen.counts, chosen.dropped - {b}) for b in sorted(chosen.dropped)]

    def _gone(self, dropped: frozenset[int]) -> frozenset[ir.Node]:
        return frozenset(node for number in dropped for node in self.blocks[number].nodes)

    def _without(self, dropped: frozenset[int]) -> set[int]:
        return {group for number in dropped for group in self.blocks[number].inner}
