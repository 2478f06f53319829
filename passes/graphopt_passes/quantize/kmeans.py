"""The best few levels for many numbers: weighted k-means in one dimension, solved, not searched.

The levels c that minimise sum_i f_i (w_i - nearest c)^2 cut the sorted numbers into runs, and are
their means. With F, S and Q the sums of f, f w and f w^2 over a run, it costs Q - S^2 / F. As Q
adds up to the same whatever the runs are, what counts is the gain S^2 / F. With F and S running
sums, m runs of the first j numbers gain at most

    G_m(j) = max_i  G_(m-1)(i) + (S_j - S_i)^2 / (F_j - F_i)

and the best i, where the last run begins, does not fall as j grows, nor as m does: all j of one m
take O(n log n). (Wu 1991, Optimal quantization by matrix searching; Grønlund et al. 2017,
https://arxiv.org/abs/1701.07204.) The table of the best i, one row for each m, has the best levels
of every count.

A level that is fixed at 0 is the mean of a run that holds a 0 of infinite weight, and gains
nothing; for the rest, that is a run like others. Numbers near 0 may be in it, which is where
`nearest_levels` would send them anyway: to keep that level for exact zeros only could but add to
the error.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Floats = npt.NDArray[np.floating[Any]]
Codes = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.intp]

BINS = 16384
"""With so many, 256 levels are within 0.001 dB of the best (measured, Gaussian to Cauchy)."""

CODES = 256
"""Of uint8."""

_FLOOR = 2.0**-50
"""The least share of all weight that a value has: a running sum still changes by it."""

_ROUNDS = 16
_CHUNK = 1 << 16


# ------------------------------------------------------------------ the best levels


def optimal_levels(
    values: Floats, weights: Floats | None, count: int, zero: bool = False, bins: int = BINS
) -> Array:
    """At most `count` levels such that each value replaced by the nearest does least harm.

    Args:
        values: finite, of any shape.
        weights: what a squared error counts, of the same shape and not negative. Where it is None
            or all are 0, all count alike.
        count: at least 1.
        zero: whether one of the levels is exactly 0, so that what was pruned stays so. Values that
            are 0 and their weights then change nothing.
        bins: where there are more distinct values, neighbours share a bin and with it a level;
            there may be one or two bins more. Else the levels are exact.

    Returns:
        Sorted, distinct, in the unit of the values. All distinct values where there are no more
        than `count`. No value counts less than 2^-50 of all, so that what weighs 0 gets levels
        that are to spare. Rounding may add to the mean squared error 2^-40 of the mean square of
        the values (of their distance from their mean, where no level is fixed).

    Raises:
        ValueError: values or weights are not finite, a weight is negative, shapes differ, or
            `count` or `bins` is less than 1.
    """
    return level_curve(values, weights, [count], zero, bins)[count]


def level_curve(
    values: Floats,
    weights: Floats | None,
    counts: Iterable[int],
    zero: bool = False,
    bins: int = BINS,
) -> dict[int, Array]:
    """What `optimal_levels` returns for each of some counts, at the price of the largest.

    Args:
        values: finite, of any shape.
        weights: of the same shape, or None.
        counts: each at least 1.
        zero: whether one of the levels is exactly 0.
        bins: as of `optimal_levels`.

    Returns:
        Levels by count, in ascending order of counts.

    Raises:
        ValueError: as `optimal_levels` does.
    """
    wanted = sorted(set(counts))
    if min([bins, *wanted]) < 1:
        raise ValueError("at least one level and one bin are needed")
    if weights is not None and weights.shape != values.shape:
        raise ValueError(f"weights of shape {weights.shape} for values of shape {values.shape}")
    if zero:
        others = values != 0.0
        values, weights = values[others], None if weights is None else weights[others]
    places, weight = _distinct(values, weights)
    if zero:
        zero_at = np.searchsorted(places, 0.0)
        places, weight = np.insert(places, zero_at, 0.0), np.insert(weight, zero_at, 0.0)
    lossy = [count for count in wanted if count < len(places)]
    curve = _lossy_curve(places, weight, lossy, zero, bins) if lossy else {}
    return curve | {count: places.copy() for count in wanted if count >= len(places)}


def nearest_levels(values: Floats, levels: Floats) -> Codes:
    """For each value the index of the nearest level; of two as near, the lower.

    Args:
        values: not NaN, of any shape.
        levels: sorted, at most 256, at least one if there are values.

    Returns:
        Of the shape of the values.

    Raises:
        ValueError: levels are not sorted, too many, or none for values that there are.
    """
    exact = levels.astype(np.float64)
    if len(exact) > CODES or (values.size and not len(exact)):
        raise ValueError(f"{len(exact)} levels for {values.size} values; 1 to {CODES} are needed")
    if not (exact[1:] >= exact[:-1]).all():
        raise ValueError("levels must be sorted")
    # Of levels that are neighbours as floats, the middle may be rounded up to the upper one.
    middles = np.minimum(exact[1:] / 2 + exact[:-1] / 2, np.nextafter(exact[1:], -np.inf))
    flat = values.reshape(-1)
    codes = np.empty(flat.shape, np.uint8)
    for start in range(0, len(flat), _CHUNK):
        part = slice(start, start + _CHUNK)
        codes[part] = np.searchsorted(middles, flat[part])
    return codes.reshape(values.shape)


# ------------------------------------------------------------------ numbers to bins


def _distinct(values: Floats, weights: Floats | None) -> tuple[Array, Array]:
    """The distinct values, sorted, and the weight of each, in a unit in which sums are finite."""
    order = None if weights is None else np.argsort(values, axis=None)
    ranked = np.sort(values, axis=None) if order is None else values.reshape(-1)[order]
    # NaN is sorted to the end.
    if not np.isfinite(ranked[:1]).all() or not np.isfinite(ranked[-1:]).all():
        raise ValueError("values must be finite")
    starts = np.flatnonzero(np.append(True, ranked[1:] != ranked[:-1])[: len(ranked)])
    if weights is None or order is None:
        weight = np.diff(starts, append=len(ranked)).astype(np.float64)
    else:
        weight = _sums(_finite_weights(weights)[order], starts)
    # Adding 0 makes 0 of -0.
    return ranked[starts].astype(np.float64) + 0.0, weight


def _finite_weights(weights: Floats) -> Array:
    """Flat, with 1 for the largest; all 1 if all are 0."""
    flat = weights.reshape(-1)
    least, most = flat.min(initial=0.0), flat.max(initial=0.0)
    if not (least >= 0.0 and most < np.inf):
        raise ValueError("weights must be finite and not negative")
    return np.divide(flat, most, dtype=np.float64) if most else np.ones(len(flat))


def _bin_starts(places: Array, share: Array, bins: int) -> Indices:
    """Where to cut sorted places so that all of the levels, few or many, have as many bins each.

    Many levels are best as dense as the cube root of the numbers' own density (Panter and Dite
    1951). A gap g between neighbours of weight f, whose density there is f / g, then has its part
    of the bins in proportion to (f / g)^(1/3) g, and no gap has any use for more than one.
    """
    if len(places) <= bins:
        return np.arange(len(places))
    needs = np.cbrt((share[1:] + share[:-1]) * np.square(np.diff(places)))
    for _ in range(_ROUNDS):
        np.minimum(needs, needs.sum() / bins, out=needs)
    # From the middle of a bin, as a row of gaps of one bin each is then safe from rounding.
    numbers = np.floor(np.cumsum(needs) * (bins / needs.sum()) + 0.5)
    return np.append(0, np.flatnonzero(np.diff(numbers, prepend=0.0)) + 1)


def _sums(numbers: Array, starts: Indices) -> Array:
    """Of each part of the numbers, from one start to the next."""
    sums: Array = np.add.reduceat(numbers, starts) if len(starts) else np.zeros(0)
    return sums


# ------------------------------------------------------------------ bins to levels


@dataclass(frozen=True)
class _Sums:
    """What is needed of the bins to know what any run of them gains.

    Attributes:
        share: F, running from 0, of shape [bins + 1].
        moment: S, likewise.
        pinned: the bin whose run gains nothing, if there is one.
    """

    share: Array
    moment: Array
    pinned: int | None


def _lossy_curve(
    places: Array, weight: Array, counts: list[int], zero: bool, bins: int
) -> dict[int, Array]:
    """Levels for each of some counts that are less than the number of places."""
    # By a power of two, which rounds nothing; then no square is too large.
    exponent = np.frexp(np.abs(places).max())[1]
    places, share = np.ldexp(places, -exponent), np.maximum(weight / weight.sum(), _FLOOR)
    starts = _bin_starts(places, share, bins)
    zero_at = int(np.searchsorted(places, 0.0))
    if zero:
        starts = np.union1d(starts, np.arange(zero_at, min(zero_at + 2, len(places))))
    centre = 0.0 if zero else float(share @ places)
    bin_share, bin_moment = _sums(share, starts), _sums(share * (places - centre), starts)
    pinned = int(np.searchsorted(starts, zero_at)) if zero else None
    sums = _Sums(_running(bin_share), _running(bin_moment), pinned)
    table = _run_starts(sums, min(max(counts), len(starts)))
    curve = {}
    for count in counts:
        runs = _runs(table, min(count, len(starts)))
        levels = _sums(bin_moment, runs) / _sums(bin_share, runs) + centre
        if pinned is not None:
            levels[np.searchsorted(runs, pinned, side="right") - 1] = 0.0
        curve[count] = np.unique(np.ldexp(levels, exponent))
    return curve


def _running(numbers: Array) -> Array:
    return np.append(0.0, np.cumsum(numbers))


def _runs(table: npt.NDArray[np.int32], count: int) -> Indices:
    """Where the runs start, at most so many, that gain most in all."""
    starts = []
    end = table.shape[1] - 1
    while end:
        count -= 1
        end = int(table[count, end])
        starts.append(end)
    return np.array(starts[::-1], np.intp)


def _run_starts(sums: _Sums, count: int) -> npt.NDArray[np.int32]:
    """In row m, for each j, where the last run starts of the best m + 1 or fewer of j bins.

    Args:
        sums: of n bins.
        count: the number of rows.

    Returns:
        Of shape [count, n + 1].
    """
    ends = len(sums.share)
    table = np.empty((count, ends), np.int32)
    gains = np.full(ends, -np.inf)
    gains[0] = 0.0
    starts = np.zeros(ends, np.intp)
    for row in table:
        gains, starts = _one_run_more(sums, gains, starts)
        row[:] = starts
    return table


def _one_run_more(sums: _Sums, gains: Array, starts: Indices) -> tuple[Array, Indices]:
    """From G_(m-1), and where its last runs start, to those of m.

    As neither j nor m can grow without the best start staying or growing, it is sought between
    those of the ends on both sides that are known, for every second end, fourth, and so on, and not
    before that of one run less. Rounding may make a little less than the best look best, and then
    others lose by it no more than that.
    """
    bins = len(gains) - 1
    step = 1 << bins.bit_length()
    best_gains, best_starts = np.zeros(bins + 1), np.full(step + 1, bins)
    best_starts[0] = 0
    while step > 1:
        half = step // 2
        ends = np.arange(half, bins + 1, step)
        low = np.maximum(best_starts[ends - half], starts[ends])
        high = np.maximum(np.minimum(best_starts[ends + half], ends - 1), low)
        best_gains[ends], best_starts[ends] = _best_starts(sums, gains, ends, low, high)
        step = half
    return best_gains, best_starts[: bins + 1]


def _best_starts(
    sums: _Sums, gains: Array, ends: Indices, low: Indices, high: Indices
) -> tuple[Array, Indices]:
    """For each end the largest gain, and the first start from low to high that has it."""
    widths = high - low + 1
    firsts = np.cumsum(widths) - widths
    starts = np.arange(firsts[-1] + widths[-1]) + (low - firsts).repeat(widths)
    tried = sums.moment[ends].repeat(widths)
    tried -= sums.moment[starts]
    tried *= tried
    share = sums.share[ends].repeat(widths)
    share -= sums.share[starts]
    tried /= share
    if sums.pinned is not None:
        tried[(starts <= sums.pinned) & (ends > sums.pinned).repeat(widths)] = 0.0
    tried += gains[starts]
    largest = np.maximum.reduceat(tried, firsts)
    hits = np.flatnonzero(tried == largest.repeat(widths))
    return largest, starts[hits[np.searchsorted(hits, firsts)]]
