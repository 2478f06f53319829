"""Which values of one model are those of another, by what they hold.

Passes rename values, fuse nodes and take channels out, and a name may come to stand for something
else: where a BatchNormalization is folded into the Conv before it, what the Conv makes keeps its
name. What is still the same is known by its content: on a few samples, a value of the same shape
that goes up and down with it. The order in which they are computed is the same in both, too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

POSITIONS_MAXIMUM = 512
"""Of a value on one sample, so many numbers are compared."""

NUMBERS_MINIMUM = 8
"""A value of fewer says too little."""

CORRELATION_MINIMUM = 0.5
"""Values that go up and down together less are not the same."""

ALIKE = 1e-4
"""Correlations that differ by less say the same."""

Look = tuple[tuple[int, ...], np.ndarray]
"""Of a value, its shape on the first sample, and some of its numbers on all, float32 [n]."""


@dataclass(frozen=True)
class Likeness:
    """Two values that are likely the same.

    Attributes:
        name: in one model.
        twin: in the other.
        place: of the twin in the order of the other.
        correlation: of their numbers.
    """

    name: str
    twin: str
    place: int
    correlation: float


def likenesses(
    ours: Mapping[str, Look], theirs: Mapping[str, Look], nearest: bool = False
) -> list[Likeness]:
    """For each of ours the most alike of theirs, if any is.

    Args:
        ours: the values of one model.
        theirs: those of the other, in order.
        nearest: of some that are alike to the same degree, as a value and a multiple of it are,
            take the one with the nearest numbers; otherwise the last, as what moves or copies a
            value comes after it.
    """
    groups: dict[object, list[tuple[int, str]]] = defaultdict(list)
    for place, (name, (shape, look)) in enumerate(theirs.items()):
        groups[shape, look.size].append((place, name))
    rows = {
        key: _centered(np.stack([theirs[name][1] for _, name in group]))
        for key, group in groups.items()
    }
    found = []
    for name, (shape, look) in ours.items():
        group = groups.get((shape, look.size))
        if not group:
            continue
        alike = rows[shape, look.size] @ _centered(look[np.newaxis])[0]
        best = len(alike) - 1 - int(np.argmax(alike[::-1]))
        if alike[best] < CORRELATION_MINIMUM:
            continue
        if nearest:
            equals = np.flatnonzero(alike >= alike[best] - ALIKE)
            best = min(equals[::-1], key=lambda at: _distance(look, theirs[group[at][1]][1]))
        place, twin = group[best]
        found.append(Likeness(name, twin, place, float(alike[best])))
    return found


def in_order(pairs: Sequence[Likeness]) -> list[tuple[str, str]]:
    """The pairs of the largest sum of correlations whose places ascend."""
    totals: list[float] = []
    before: list[int] = []
    for i, pair in enumerate(pairs):
        earlier = [(totals[j], j) for j in range(i) if pairs[j].place <= pair.place]
        best, last = max(earlier, default=(0.0, -1))
        totals.append(best + pair.correlation)
        before.append(last)
    at = int(np.argmax(totals)) if totals else -1
    chain = []
    while at >= 0:
        chain.append((pairs[at].name, pairs[at].twin))
        at = before[at]
    return chain[::-1]


def _distance(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.linalg.norm(first - second))


def _centered(rows: np.ndarray) -> np.ndarray:
    # A row that is not all finite, or too large to be added up, becomes zeros: like nothing.
    with np.errstate(invalid="ignore", over="ignore"):
        rows = np.nan_to_num(rows - rows.mean(1, keepdims=True), posinf=0, neginf=0)
        return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))
