"""In which order the units of a group go, and what that costs.

Removing the columns M of a unit costs tr(W_M [H^-1]_MM^-1 W_M^T), and the other columns make good
for it by W -= W_M [H^-1]_MM^-1 [H^-1]_M. What costs least goes first, one after the other, which
gives the order and the cost of any number of units at once (ZipLM, arXiv 2302.04089). A group that
several weights read costs what all of these lose, each relative to what it gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.validation import OutputError, worst
from graphopt_passes.prune.entries import Floats
from graphopt_passes.prune.sinks import Sink

AT_ONCE = 48
"""Of so many units that are left, one goes at once."""


@dataclass(frozen=True, eq=False)
class Curve:
    """What it costs to remove units of a group.

    Attributes:
        order: int64 [units]: that in which they go.
        costs: float64 [units + 1]: of the squared error of what reads the group, relative to its
            squares, with so many units removed.
        halves: the matrices of its sinks with the first half of the units removed.
    """

    order: np.ndarray
    costs: np.ndarray
    halves: tuple[Floats, ...]

    @property
    def half(self) -> int:
        """How many units are removed in `halves`."""
        return max(len(self.order) // 2, 1)

    def kept(self, count: int) -> np.ndarray:
        """Bool [units]: those that stay where so many do."""
        stays = np.zeros(len(self.order), bool)
        stays[self.order[len(self.order) - count :]] = True
        return stays


def curve_of(sinks: Sequence[Sink]) -> Curve:
    """Remove all units of a group but one, those that cost least first.

    Args:
        sinks: of the group, at least one.
    """
    units = len(sinks[0].columns)
    states = [_State(sink) for sink in sinks]
    left = np.arange(units)
    order: list[int] = []
    costs = [0.0]
    halves: tuple[Floats, ...] = ()
    half = max(units // 2, 1)
    while len(left) > 1:
        each = np.asarray(sum(state.costs(left) for state in states))
        count = max(len(left) // AT_ONCE, 1)
        if len(order) < half:
            count = min(count, half - len(order))
        gone = np.argsort(each, kind="stable")[:count]
        for index in gone:
            order.append(int(left[index]))
            costs.append(costs[-1] + max(float(each[index]), 0.0))
        for state in states:
            state.remove(left[gone])
        left = np.delete(left, gone)
        if len(order) == half:
            halves = tuple(np.array(state.matrix, np.float64) for state in states)
    # The last one always stays.
    return Curve(np.array([*order, *left]), np.array([*costs, costs[-1]]), halves)


class _State:
    """A sink without the units that have gone."""

    def __init__(self, sink: Sink) -> None:
        self._columns = sink.columns
        self._inverse = np.linalg.inv(sink.moments).astype(np.float32)
        self._scale = 1 / sink.energy
        self.matrix = sink.matrix.astype(np.float32)

    def costs(self, units: np.ndarray) -> Floats:
        """What each unit costs to remove next; [units]."""
        columns = self._columns[units]
        blocks = self._inverse[:, columns[:, :, np.newaxis], columns[:, np.newaxis, :]]
        weights = self.matrix[:, :, columns]
        squares = np.einsum("gnum,gnuk->gumk", weights, weights, optimize=True)
        return np.asarray(np.einsum("gumk,gukm->u", np.linalg.inv(blocks), squares)) * self._scale

    def remove(self, units: np.ndarray) -> None:
        """Remove units, and let the others make good for them."""
        columns = self._columns[units].reshape(-1)
        rows = self._inverse[:, columns]
        block = rows[:, :, columns]
        pushed = np.linalg.solve(block, rows)
        self.matrix = self.matrix - self.matrix[:, :, columns] @ pushed
        self.matrix[:, :, columns] = 0
        self._inverse -= rows.transpose(0, 2, 1) @ pushed


def mean_square(outputs: Sequence[OutputError]) -> float:
    """The squared relative L2 error of the outputs, on their mean."""
    squares = [worst([output]) ** 2 for output in outputs]
    finite = [square for square in squares if math.isfinite(square)]
    # What cannot be compared says nothing of how much a unit counts.
    return max(math.fsum(finite) / len(finite), 0.0) if finite else math.inf
