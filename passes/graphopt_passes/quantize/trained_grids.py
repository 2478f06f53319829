"""Weights that were trained on a grid, in few values or in signs: found again in their numbers.

Training that prepares a pass leaves float weights that are exact products of integers, codebook
entries or signs with scales. No note says so; the numbers do. A fusion may since have multiplied
each row by a number of its own (as that of a batch normalization does), and rounded: so scales are
those of rows, and numbers may be off by a few units in their last place.

Nothing here loses anything: what is found gives the numbers back, and where that cannot be, nothing
is found. Weights are float32 or float64 of shape [N, K], N rows of K numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from graphopt_passes.quantize.bases import SIGNS
from graphopt_passes.quantize.codebooks import Floats, Rounded, nearest

TOLERANCE = 2.0**-20
"""Of a number, by what multiplications and their roundings may have moved it."""

FIRST_ROWS = 4
"""Most weights show in so few rows that they lie on no grid."""

SCALED_LEVELS_MAXIMUM = 64
"""Rows with scales of their own are not compared for more values."""


def grid_of(
    rows: Floats, lowest: int, highest: int, signed: bool = True
) -> tuple[np.ndarray, Floats] | None:
    """Integers and a scale for each row, of which the numbers are the products.

    Of several scales, the largest one counts; one of float16 comes before others.

    Args:
        rows: finite, [N, K].
        lowest: integer, negative.
        highest: integer, positive.
        signed: scales may be negative.

    Returns:
        int16 of shape [N, K], and float32 of shape [N, 1], none of them 0; None where rows lie on
        no such grid.
    """
    if len(rows) and len(np.unique(np.abs(rows[0]))) > max(-lowest, highest) + 1:
        return None
    if len(rows) > FIRST_ROWS and grid_of(rows[:FIRST_ROWS], lowest, highest, signed) is None:
        return None
    wide = np.asarray(rows, np.float32)
    places = np.abs(wide).argmax(axis=1)[:, np.newaxis]
    largest = np.take_along_axis(wide, places, axis=1)
    codes, scales = np.zeros(wide.shape, np.int16), np.ones(largest.shape, np.float32)
    left = np.flatnonzero(largest != 0)
    for halves in (True, False):
        for size in range(1, max(-lowest, highest) + 1):
            for sign in (1, -1) if signed else (1,):
                if not left.size:
                    return codes, scales
                found, integers, tried = _on_scales(
                    wide[left], largest[left], sign * size, lowest, highest
                )
                if halves:
                    found &= (tried == _halves(tried))[:, 0]
                codes[left[found]], scales[left[found]] = integers[found], tried[found]
                left = left[~found]
    return (codes, scales) if not left.size else None


def _on_scales(
    rows: Floats, largest: Floats, size: int, lowest: int, highest: int
) -> tuple[np.ndarray, np.ndarray, Floats]:
    """Which rows lie on the grid whose integer of the largest number is of this size.

    Args:
        rows: float32 [N, K].
        largest: numbers of them, [N, 1].
        size: of the integer; of the sign of the number, times that of the size.
        lowest: integer.
        highest: integer.

    Returns:
        bool [N], the integers [N, K], and the scales [N, 1].
    """
    scales = np.asarray(largest / (size * np.sign(largest)), np.float32)
    integers = np.rint(rows / np.where(scales != 0, scales, 1))
    numbers = integers.astype(np.float32) * scales
    close = np.abs(numbers - rows) <= TOLERANCE * np.abs(rows)
    within = (integers >= lowest) & (integers <= highest)
    return np.asarray((close & within).all(axis=1)), integers, scales


def _halves(numbers: Floats) -> Floats:
    with np.errstate(over="ignore"):
        return numbers.astype(np.float16).astype(np.float32)


def rounded_on_grid(
    weight: Floats, blocks: int, levels: Floats, scale_type: Any, signed: bool
) -> Rounded | None:
    """A weight on the grid of a form of integers; None where it does not lie on it.

    Args:
        weight: [N, K].
        blocks: of a row, with a scale each.
        levels: the integers, increasing.
        scale_type: in which scales are stored if they are numbers of it.
        signed: scales may be negative.
    """
    lowest, highest = int(levels[0]), int(levels[-1])
    found = grid_of(weight.reshape(len(weight) * blocks, -1), lowest, highest, signed)
    if found is None:
        return None
    codes, scales = found
    return Rounded(
        (codes - lowest).astype(np.uint8).reshape(weight.shape),
        levels,
        stored_exactly(scales.reshape(len(weight), blocks), scale_type),
    )


def stored_exactly(scales: Floats, scale_type: Any = np.float16) -> Floats:
    """float32 scales in another type, where all of them are numbers of it."""
    with np.errstate(over="ignore"):
        stored = scales.astype(scale_type)
    return stored if (stored.astype(np.float32) == scales).all() else scales


def signs_of(weight: Floats, blocks: int) -> Rounded | None:
    """A weight of two numbers in each block, -a and a; None where it is none.

    Args:
        weight: float32 of shape [N, K].
        blocks: of a row.
    """
    sizes = np.abs(weight).reshape(len(weight), blocks, -1)
    scales = sizes[:, :, 0]
    if not ((sizes == sizes[:, :, :1]).all() and scales.all()):
        return None
    return Rounded((weight > 0).astype(np.uint8), SIGNS, stored_exactly(scales))


# ------------------------------------------------------------------ few values


def codebook_of(weight: Floats, count: int) -> Rounded | None:
    """A weight of so few values, shared by all rows, or by rows with scales of their own.

    Args:
        weight: float32 of shape [N, K].
        count: of values, at most.

    Returns:
        Codes, values, and a scale for each row, which is 1 where the weight itself has so few
        values; None where there are more.
    """
    values = np.unique(weight)
    if len(values) <= count:
        codes = np.searchsorted(values, weight).astype(np.uint8)
        return Rounded(codes, values, np.ones((len(weight), 1), np.float32))
    count = min(count, SCALED_LEVELS_MAXIMUM)
    distinct = _distinct(weight, count)
    return None if distinct is None else _joined(weight, distinct, count)


def _distinct(weight: Floats, count: int) -> list[Floats] | None:
    """The values of each row but 0; None where one row has more than so many."""
    ordered = np.sort(weight, axis=1)
    first = np.ones(weight.shape, np.bool_)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    if first.sum(axis=1).max() > count:
        return None
    first &= ordered != 0
    return [row[mask] for row, mask in zip(ordered, first, strict=True)]


def _joined(weight: Floats, distinct: list[Floats], count: int) -> Rounded | None:
    """The rows in one codebook: that of the row of most values, with what others have beside."""
    scales = np.ones(len(weight))
    order = sorted(range(len(distinct)), key=lambda row: -len(distinct[row]))
    book = distinct[order[0]].astype(np.float64)
    for row in order[1:]:
        values = distinct[row].astype(np.float64)
        if not len(values):
            continue
        scales[row], known = _common_ratio(values, book)
        book = np.concatenate([book, values[~known] / scales[row]])
        if len(book) > count:
            return None
    levels = np.unique(np.append(book, 0.0) if not weight.all() else book).astype(np.float32)
    stored = scales.astype(np.float32)[:, np.newaxis]
    codes = nearest(weight / stored, levels)
    found = Rounded(codes, levels, stored)
    close = np.abs(found.numbers() - weight) <= TOLERANCE * np.abs(weight)
    return found if len(levels) <= count and close.all() else None


def _common_ratio(values: Floats, book: Floats) -> tuple[float, np.ndarray]:
    """The number by which most values are entries of a codebook, and which of them are."""
    every = values[:, np.newaxis] / book
    best, most = 1.0, 0
    for sign in (1, -1):
        ratios = np.sort(sign * every[sign * every > 0])
        if not ratios.size:
            continue
        ends = np.searchsorted(ratios, ratios * (1 + TOLERANCE), side="right")
        alike = ends - np.arange(len(ratios))
        first = int(alike.argmax())
        if alike[first] > most:
            most = int(alike[first])
            best = sign * float(ratios[first : ends[first]].mean())
    known = (np.abs(every - best) <= TOLERANCE * np.abs(best)).any(axis=1)
    return best, known
