"""Which entries of weight matrices stay, and how many of each.

A weight is a matrix of shape [rows, inputs]: a row for each output, and in it channels * taps
inputs with the taps of a channel next to each other.

A pattern says which entries may stay together. How many stay of each weight, so that the total is
as wanted, is a question of its own: see `uniform`, `erk`, `global_largest` and `lamp`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from graphopt.errors import SpecError

Floats = npt.NDArray[np.floating[Any]]
Mask = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]

GROUP_MAXIMUM = 64
"""Input channels in a group of `OfEach`."""

_TEXT = re.compile(r"(?P<first>[0-9]{1,4})(?P<kind>[:x])(?P<second>[0-9]{1,4})")


class Pattern(Protocol):
    """Which entries of a weight may stay together."""

    @property
    def label(self) -> str:
        """As `pattern_of` reads it."""

    def __str__(self) -> str:
        return self.label

    @property
    def fixed_density(self) -> float | None:
        """The share of the entries that stay, where the pattern alone says it; else None."""
        return None

    def largest(self, scores: Floats, keep: int, taps: int) -> Mask:
        """The entries of the largest scores that the pattern allows; of equal ones the first.

        Args:
            scores: of shape [rows, inputs].
            keep: so many entries are to stay, from 0 to all.
            taps: of each input channel.

        Returns:
            Of the same shape, true for what stays.

        Raises:
            ValueError: a score is no number.
        """

    def why_not(self, rows: int, channels: int, taps: int) -> str | None:
        """Why a weight of this shape cannot have the pattern, or None if it can."""


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Any entries: exactly as many stay as are asked for."""

    @property
    def label(self) -> str:
        """See `Pattern`."""
        return "unstructured"

    def largest(self, scores: Floats, keep: int, taps: int) -> Mask:
        """See `Pattern`."""
        _refuse_nan(scores)
        return _first_largest(scores.reshape(-1), keep).reshape(scores.shape)

    def why_not(self, rows: int, channels: int, taps: int) -> str | None:
        """See `Pattern`."""
        return None


@dataclass(frozen=True)
class OfEach(Pattern):
    """Of each so many consecutive input channels, in a row and at a tap, so many stay.

    Attributes:
        kept: stay of a group; `largest` looks at no other number.
        of: input channels in a group, at most GROUP_MAXIMUM.
    """

    kept: int
    of: int

    @property
    def label(self) -> str:
        """See `Pattern`."""
        return f"{self.kept}:{self.of}"

    @property
    def fixed_density(self) -> float:
        """See `Pattern`."""
        return self.kept / self.of

    def largest(self, scores: Floats, keep: int, taps: int) -> Mask:
        """See `Pattern`."""
        _refuse_nan(scores)
        rows, inputs = scores.shape
        groups = scores.reshape(rows, inputs // (self.of * taps), self.of, taps)
        # How many others of its group go before an entry. For groups of a few, faster than sorting.
        rank = np.zeros(groups.shape, np.uint8)
        for first, second in combinations(range(self.of), 2):
            less = groups[:, :, first] < groups[:, :, second]
            rank[:, :, first] += less
            rank[:, :, second] += ~less
        return np.asarray(rank < self.kept).reshape(scores.shape)

    def why_not(self, rows: int, channels: int, taps: int) -> str | None:
        """See `Pattern`."""
        if channels % self.of:
            return f"its {channels} input channels are no multiple of {self.of}"
        return None


@dataclass(frozen=True)
class Blocks(Pattern):
    """All entries of a block stay, or none; a block's score is the sum of its entries' scores.

    So many blocks stay that their entries are as near as can be to what is asked for, rather fewer
    than more. Blocks at the end of rows and columns may be smaller.

    Attributes:
        rows: consecutive rows in a block.
        inputs: consecutive inputs in a block.
    """

    rows: int
    inputs: int

    @property
    def label(self) -> str:
        """See `Pattern`."""
        return f"{self.rows}x{self.inputs}"

    def largest(self, scores: Floats, keep: int, taps: int) -> Mask:
        """See `Pattern`."""
        _refuse_nan(scores)
        if not scores.size:
            return np.zeros(scores.shape, bool)
        tops = np.arange(0, scores.shape[0], self.rows)
        lefts = np.arange(0, scores.shape[1], self.inputs)
        sums = np.add.reduceat(scores, tops, axis=0, dtype=np.float64)
        sums = np.add.reduceat(sums, lefts, axis=1)
        heights = np.diff(tops, append=scores.shape[0])
        widths = np.diff(lefts, append=scores.shape[1])
        areas = np.outer(heights, widths).reshape(-1)
        kept = _first_largest_areas(sums.reshape(-1), areas, keep)
        return np.asarray(
            np.repeat(np.repeat(kept.reshape(sums.shape), heights, axis=0), widths, axis=1)
        )

    def why_not(self, rows: int, channels: int, taps: int) -> str | None:
        """See `Pattern`."""
        if rows < self.rows or channels * taps < self.inputs:
            return f"it has {rows}x{channels * taps} entries, less than a block of {self.label}"
        return None


def pattern_of(text: str) -> Pattern:
    """A pattern by its label: `unstructured`, `2:4` or `4x1`.

    Raises:
        SpecError: there is no such pattern.
    """
    if text == "unstructured":
        return Unstructured()
    found = _TEXT.fullmatch(text)
    if not found:
        raise SpecError(
            f"{text!r} is no pattern; give 'unstructured', '2:4' (2 of each 4 input channels stay) "
            "or '4x1' (4 rows by 1 input stay or go together)"
        )
    first, second = int(found["first"]), int(found["second"])
    if found["kind"] == ":":
        if not 0 < first < second:
            raise SpecError(
                f"pattern {text!r} keeps {first} of each {second} input channels; "
                "keep at least 1 and fewer than all, such as '2:4'"
            )
        if second > GROUP_MAXIMUM:
            raise SpecError(
                f"pattern {text!r} has groups of {second} input channels; "
                f"give at most {GROUP_MAXIMUM}, or 'unstructured'"
            )
        return OfEach(first, second)
    if not first or not second or first == second == 1:
        raise SpecError(
            f"pattern {text!r} has blocks of {first * second} entries; "
            "give at least 2, such as '4x1', or 'unstructured'"
        )
    return Blocks(first, second)


def _first_largest(scores: Floats, keep: int) -> Mask:
    """Of scores of shape [entries], as many as asked for, if there are; of equal ones the first."""
    if keep <= 0:
        return np.zeros(scores.shape, bool)
    if keep >= scores.size:
        return np.ones(scores.shape, bool)
    least = np.partition(scores, scores.size - keep)[scores.size - keep]
    kept = np.asarray(scores > least)
    missing = keep - int(np.count_nonzero(kept))
    kept[np.flatnonzero(scores == least)[:missing]] = True
    return kept


def _first_largest_areas(scores: Floats, areas: Counts, keep: int) -> Mask:
    """The same for scores that stand for several entries each, as near as can be, rather fewer."""
    area = int(areas[0])
    if (areas == area).all():
        # keep / area, rounded: down from a half.
        return _first_largest(scores, -((area - 2 * keep) // (2 * area)))
    order = np.argsort(-scores, kind="stable")
    totals = np.append(0, np.cumsum(areas[order]))
    kept = np.zeros(scores.shape, bool)
    kept[order[: int(np.argmin(np.abs(totals - keep)))]] = True
    return kept


def _refuse_nan(scores: Floats) -> None:
    if scores.size and np.isnan(scores.max()):
        raise ValueError("a score is no number")


# ------------------------------------------------------------------ how many stay of each weight


def uniform(sizes: Sequence[int], keep: int) -> Counts:
    """The same share of each weight.

    Args:
        sizes: entries of each weight.
        keep: so many entries stay in all.

    Returns:
        How many stay of each weight; in all exactly `keep`.

    Raises:
        ValueError: `keep` is less than 0 or more than there are entries.
    """
    # Products of Python's whole numbers do not overflow.
    whole = [int(size) for size in sizes]
    _check_total(keep, sum(whole))
    return np.asarray(_in_proportion(whole, int(keep)), np.int64)


def erk(shapes: Sequence[Sequence[int]], keep: int) -> Counts:
    """Denser where a weight is small: Erdos-Renyi kernels (Evci et al. 2020, arXiv 1911.11134).

    The density is in proportion to the sum of the dimensions over their product, at most 1. As the
    product is how many entries there are, what stays is in proportion to the sum of the dimensions:
    whole numbers, so that no rounding is involved.

    Args:
        shapes: of each weight, such as [outputs, inputs] or [outputs, inputs, height, width].
        keep: see `uniform`.

    Returns:
        See `uniform`.

    Raises:
        ValueError: see `uniform`.
    """
    sizes = [math.prod(map(int, shape)) for shape in shapes]
    _check_total(keep, sum(sizes))
    counts = list(sizes)
    open_ones, left = list(range(len(shapes))), int(keep)
    while open_ones:
        parts = [sum(map(int, shapes[i])) for i in open_ones]
        total = sum(parts)
        full = {
            i for i, part in zip(open_ones, parts, strict=True) if part * left > sizes[i] * total
        }
        if not full:
            for i, count in zip(open_ones, _in_proportion(parts, left), strict=True):
                counts[i] = count
            break
        left -= sum(sizes[i] for i in full)
        open_ones = [i for i in open_ones if i not in full]
    return np.asarray(counts, np.int64)


def global_largest(scores: Sequence[Floats], keep: int) -> Counts:
    """What a threshold for all weights together leaves of each.

    Entries at the threshold itself are shared out in proportion: where all are equal, no weight
    loses more than others.

    Args:
        scores: of each weight, of any shape.
        keep: see `uniform`.

    Returns:
        See `uniform`.

    Raises:
        ValueError: see `uniform`; or a score is no number.
    """
    for array in scores:
        _refuse_nan(array)
    kind = np.result_type(np.float32, *scores)
    return _above_threshold([np.sort(s.astype(kind, copy=False), axis=None) for s in scores], keep)


def lamp(weights: Sequence[Floats], keep: int) -> Counts:
    """What a threshold on layer-adaptive scores leaves (LAMP; Lee et al. 2021, arXiv 2010.07611).

    The score of an entry is its square over the sum of its own and all larger squares of the same
    weight, which is what cutting the smaller ones too would leave. Of equal entries the later in
    order counts as the larger, so that one entry of each weight scores 1 and no weight is lost
    before there are fewer entries left than weights. Scores grow with magnitudes: which entries of
    a weight stay is up to these.

    Args:
        weights: of any shape.
        keep: see `uniform`.

    Returns:
        See `uniform`.

    Raises:
        ValueError: see `uniform`; or an entry is infinite or no number.
    """
    return _above_threshold([_lamp_scores(weight) for weight in weights], keep)


def _lamp_scores(weight: Floats) -> Floats:
    """The scores in increasing order, float32 of shape [entries]: what is rounded stays in order.

    Magnitudes are first divided by the largest, which cancels: squares neither overflow nor vanish.
    """
    sizes = np.abs(weight.reshape(-1).astype(np.float64))
    largest = float(sizes.max(initial=0.0))
    if not math.isfinite(largest):
        raise ValueError("an entry is infinite or no number")
    if not largest:
        return np.zeros(sizes.shape, np.float32)
    sizes /= largest
    sizes.sort()
    squares = np.square(sizes, out=sizes)
    return np.asarray(squares / np.cumsum(squares[::-1])[::-1], np.float32)


def _above_threshold(ordered: Sequence[Floats], keep: int) -> Counts:
    """How many of each array are among the `keep` largest of all.

    Args:
        ordered: each increasing, all of one dtype.
        keep: see `uniform`.
    """
    sizes = [len(array) for array in ordered]
    _check_total(keep, sum(sizes))
    if not keep:
        return np.zeros(len(sizes), np.int64)
    first, end = _at_rank(ordered, sum(sizes) - keep)
    above = np.asarray(sizes, np.int64) - end
    return np.asarray(above + uniform((end - first).tolist(), keep - int(above.sum())))


def _at_rank(ordered: Sequence[Floats], rank: int) -> tuple[Counts, Counts]:
    """Where in each array the number begins and ends that is at a rank of all together.

    Any number of any array has a range of ranks, found by one bisection of each array: the middle
    of what is still open in the array where most is open, again and again.
    """
    low = np.zeros(len(ordered), np.int64)
    high = np.asarray([len(array) for array in ordered], np.int64)
    while True:
        widest = int(np.argmax(high - low))
        number = ordered[widest][(low[widest] + high[widest]) // 2]
        first = np.asarray([np.searchsorted(a, number, "left") for a in ordered], np.int64)
        end = np.asarray([np.searchsorted(a, number, "right") for a in ordered], np.int64)
        if rank < first.sum():
            high = np.minimum(high, first)
        elif rank >= end.sum():
            low = np.maximum(low, end)
        else:
            return first, end


def _in_proportion(parts: Sequence[int], total: int) -> list[int]:
    """Whole numbers in proportion to others that add up to a total, by the largest remainders."""
    whole = sum(parts)
    if not whole:
        return [0] * len(parts)
    counts = [part * total // whole for part in parts]
    order = sorted(range(len(parts)), key=lambda i: -(parts[i] * total % whole))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _check_total(keep: int, entries: int) -> None:
    if not 0 <= keep <= entries:
        raise ValueError(f"{keep} of {entries} entries cannot stay")
