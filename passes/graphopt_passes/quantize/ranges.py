"""Which part of its values a quantized activation can hold, chosen from a histogram.

An integer tensor with scale s and zero point z stands for s * (q - z), so it holds 0 exactly and
values from s * (q_min - z) to s * (q_max - z); others are clipped to these. The wider the range,
the coarser all else. Four ways to choose it, each a function of a `Histogram` that gives (low,
high) with low <= 0 <= high: `min_max`, `percentile`, `least_squares` and `entropy`. None is best
for every tensor, so callers try them and keep what the next layer likes most.

Within a bin values are taken to be spread evenly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Counts = npt.NDArray[np.float64] | npt.NDArray[np.int64]
Range = tuple[float, float]

PERCENTILES = (99.9, 99.99, 99.999)
"""What is worth trying, in percent."""

STEPS = 128
"""Bounds that `least_squares` tries on each side: 1/128 of the extreme value, 2/128, ..."""

LEVELS = 128
"""That `entropy` merges bins into, as in TensorRT and onnxruntime."""

_NARROW = 2.0**-20
_ROUNDING = 2.0**-40
_SMOOTHING = 1e-4


@dataclass(frozen=True)
class Histogram:
    """How often a tensor's values lie where.

    Attributes:
        counts: of shape [B], of values in each bin, none negative; float64 or int64.
        edges: float64 of shape [B + 1], uniform and ascending. They may reach beyond the extremes.
        minimum: the exact smallest value.
        maximum: the exact largest value.

    Raises:
        ValueError: the shapes do not fit, or an extreme is not finite or on the wrong side.
    """

    counts: Counts
    edges: Array
    minimum: float
    maximum: float

    def __post_init__(self) -> None:
        if self.counts.ndim != 1 or self.edges.shape != (len(self.counts) + 1,):
            raise ValueError(f"{self.counts.shape} counts have {self.edges.shape} edges")
        if not -np.inf < self.minimum <= self.maximum < np.inf:
            raise ValueError(f"no values lie from {self.minimum} to {self.maximum}")


# ------------------------------------------------------------------ integers for a range


def affine_parameters(
    low: float, high: float, dtype: npt.DTypeLike, symmetric: bool = False
) -> tuple[np.float32, int]:
    """The scale and zero point with which an integer tensor holds a range.

    The same numbers as `compute_scale_zp` of onnxruntime.quantization gives.

    Args:
        low: of the range; 0 if it is larger.
        high: of the range; 0 if it is smaller.
        dtype: of the codes: int8, uint8, int16 or uint16.
        symmetric: zero point 0 and the code that has no counterpart unused; for signed types.

    Returns:
        The scale, a normal float32, in the unit of the range, and the zero point. A range that is
        nothing but 0, or too narrow for such a scale, gets scale 1 and zero point 0.

    Raises:
        ValueError: a bound is not finite, or the type is unsigned and `symmetric`.
    """
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"no integers hold the range from {low} to {high}")
    scale, zero_point = _affine(np.float64(low), np.float64(high), np.dtype(dtype), symmetric)
    return np.float32(scale), int(zero_point)


def _affine(
    low: Array | np.float64, high: Array | np.float64, dtype: np.dtype[Any], symmetric: bool
) -> tuple[Array, Array]:
    """The same for arrays of bounds; float32 scales and integer zero points, held as float64."""
    codes, usual = np.iinfo(dtype), np.finfo(np.float32)
    if symmetric and codes.min == 0:
        raise ValueError(f"{dtype} has no zero in the middle; take a signed type")
    low = np.clip(low, float(usual.min), 0.0)
    high = np.clip(high, 0.0, float(usual.max))
    if symmetric:
        exact = np.maximum(-low, high) / codes.max
        zero_point = np.zeros_like(exact)
    else:
        exact = (high - low) / (codes.max - codes.min)
        ratio = np.divide(low, exact, out=np.zeros_like(exact), where=exact > 0.0)
        zero_point = np.clip(np.rint(codes.min - ratio), codes.min, codes.max)
    usable = exact >= usual.tiny
    scale = np.where(usable, exact, 1.0).astype(np.float32).astype(np.float64)
    return scale, np.where(usable, zero_point, 0.0)


# ------------------------------------------------------------------ what a range costs


def quantization_error(
    counts: Counts,
    edges: Array,
    scale: npt.ArrayLike,
    zero_point: npt.ArrayLike,
    dtype: npt.DTypeLike,
) -> Array:
    """Mean squared error of values that are quantized and dequantized, exact for even bins.

    In units of the scale, a value u becomes n, the nearest integer within the range, and d = u - n.
    The integral of d^2 from 0 to u is n / 12 + d^3 / 3: a twelfth for each whole step, and what is
    left. Its differences between edges are what the bins cost.

    Args:
        counts: of shape [B].
        edges: of shape [B + 1], ascending; bins without width hold one value.
        scale: any shape S, positive.
        zero_point: of the same shape.
        dtype: of the codes.

    Returns:
        Of shape S, in the unit of the values squared; 0 where there are no values.
    """
    scales = np.asarray(scale, np.float64)[..., None]
    zero_points = np.asarray(zero_point, np.float64)[..., None]
    total = counts.sum()
    if not total:
        return np.zeros(scales.shape[:-1])
    codes = np.iinfo(dtype)
    first, last = codes.min - zero_points, codes.max - zero_points
    widths = np.diff(edges)
    # The difference of two integrals over next to nothing would be rounding errors.
    narrow = widths <= _NARROW * scales.max()
    density = np.divide(counts, widths, out=np.zeros(len(widths)), where=~narrow)
    whole, rest = _nearest(edges / scales, first, last)
    integral = np.diff(whole / 12.0 + rest * rest * rest / 3.0) @ density
    points = (edges[:-1] + widths / 2.0)[narrow]
    _, distance = _nearest(points / scales, first, last)
    squared = scales[..., 0] * integral + distance**2 @ counts[narrow]
    error: Array = scales[..., 0] ** 2 * squared / total
    return error


def _nearest(values: Array, first: Array, last: Array) -> tuple[Array, Array]:
    """The integers from `first` to `last` nearest to values, and what the values are more."""
    whole = np.clip(np.rint(values), first, last)
    return whole, values - whole


# ------------------------------------------------------------------ ranges


def min_max(histogram: Histogram) -> Range:
    """The range of all values that were seen, and 0."""
    return min(float(histogram.minimum), 0.0), max(float(histogram.maximum), 0.0)


def percentile(histogram: Histogram, percent: float, symmetric: bool = False) -> Range:
    """The range that holds so many of the values.

    As in onnxruntime's `PercentileCalibrater`, half of the others lie beyond either end, also where
    all values have one sign. Bounds are interpolated within bins; onnxruntime takes an edge.

    Args:
        histogram: of the values.
        percent: of the values that the range holds, in [0, 100].
        symmetric: the range is from -b to b, and `percent` of magnitudes are at most b.

    Returns:
        The range, 0 in it, within `min_max` unless `symmetric`.

    Raises:
        ValueError: `percent` is none.
    """
    if not 0.0 <= percent <= 100.0:
        raise ValueError(f"{percent} is no percentage")
    edges, below = _cumulative(histogram)
    if not below[-1]:
        return min_max(histogram)
    share = percent / 100.0
    if symmetric:
        magnitudes = np.unique(np.abs(edges))
        within = np.interp(magnitudes, edges, below) - np.interp(-magnitudes, edges, below)
        bound = _quantile(magnitudes, within, share)
        return -bound, bound
    high = _quantile(edges, below, (1.0 + share) / 2.0)
    low = -_quantile(-edges[::-1], below[-1] - below[::-1], (1.0 + share) / 2.0)
    return min(low, 0.0), max(high, 0.0)


def least_squares(
    histogram: Histogram,
    dtype: npt.DTypeLike = np.uint8,
    symmetric: bool = False,
    steps: int = STEPS,
) -> Range:
    """The range with the least mean squared error of quantized values.

    Each side on which there are values is shrunk by itself, in even steps; on the other side the
    range ends at 0. What a pair of bounds costs is first estimated: what clipping costs on each
    side, and a twelfth of the squared scale for all values within. The `steps` most promising ones
    and `min_max` are then weighed exactly, with the scale and zero point that they really get;
    where only one bound varies, that is all of them.

    Args:
        histogram: of the values.
        dtype: of the codes.
        symmetric: the range is from -b to b, for codes without zero point.
        steps: bounds to try on each side.

    Returns:
        The range; never one that costs more than that of `min_max`.
    """
    low, high = min_max(histogram)
    total = histogram.counts.sum()
    if symmetric:
        low, high = min(low, -high), max(high, -low)
    if not total or histogram.minimum == histogram.maximum:
        return low, high
    shrinks = np.arange(steps, 0, -1) / steps
    lows = low * shrinks if low < 0.0 else np.zeros(1)
    highs = high * shrinks if high > 0.0 else np.zeros(1)
    if not symmetric:
        lows = lows[:, None]
    scales, zero_points = _affine(lows, highs, np.dtype(dtype), symmetric)
    edges, below = _cumulative(histogram)
    within = np.interp(highs, edges, below) - np.interp(lows, edges, below)
    clipped = _clipping(histogram.counts, edges, highs)
    clipped = clipped + _clipping(histogram.counts[::-1], -edges[::-1], -lows)
    estimate = clipped + scales**2 / 12.0 * within
    finalists = _smallest(estimate.ravel(), steps)
    exact = quantization_error(
        histogram.counts, edges, scales.ravel()[finalists], zero_points.ravel()[finalists], dtype
    )
    best = finalists[np.argmin(exact)]
    all_lows, all_highs = np.broadcast_arrays(lows, highs)
    return float(all_lows.flat[best]), float(all_highs.flat[best])


def _smallest(estimate: Array, count: int) -> npt.NDArray[np.intp]:
    """Where the smallest lie; always the first, in order, so that wider ranges come before."""
    if len(estimate) <= count:
        return np.arange(len(estimate))
    places = np.argpartition(estimate, count)[:count]
    return np.union1d(places, np.zeros(1, np.intp))


def _clipping(counts: Counts, edges: Array, bounds: Array) -> Array:
    """Sum of (x - bound)^2 over all values x beyond each bound, of the shape of the bounds.

    Exact at edges, where sums of x^0, x^1 and x^2 beyond one follow from those beyond the next.
    """
    widths = np.diff(edges)
    number = _beyond(counts.astype(np.float64))
    distance = _beyond(widths * (number[1:] + counts / 2.0))
    square = _beyond(widths * (2.0 * distance[1:] + widths * (number[1:] + counts / 3.0)))
    return np.interp(bounds, edges, square)


def _beyond(terms: Array) -> Array:
    """Sums of the terms of all bins after each edge, of shape [B + 1]."""
    return np.append(np.cumsum(terms[::-1])[::-1], 0.0)


def _cumulative(histogram: Histogram) -> tuple[Array, Array]:
    """Edges within the exact extremes, and how many values lie below each; both [B + 1]."""
    edges = np.clip(histogram.edges.astype(np.float64), histogram.minimum, histogram.maximum)
    return edges, np.concatenate(([0.0], np.cumsum(histogram.counts, dtype=np.float64)))


def _quantile(edges: Array, below: Array, share: float) -> float:
    """The least value that has `share` of all at or below it, where `share` is not 0."""
    wanted = share * below[-1]
    bin_ = max(int(np.searchsorted(below, wanted - _ROUNDING * below[-1])), 1)
    count = below[bin_] - below[bin_ - 1]
    part = min((wanted - below[bin_ - 1]) / count, 1.0) if count else 0.0
    return float(edges[bin_ - 1] + part * (edges[bin_] - edges[bin_ - 1]))


# ------------------------------------------------------------------ entropy


def entropy(histogram: Histogram, levels: int = LEVELS) -> Range:
    """The range after which least is lost when its bins are merged into a few levels.

    What is lost is the Kullback-Leibler divergence of the values, those outside counted at the
    ends, from values spread evenly over all bins of a level that are not empty.

    Values of one sign are clipped on one side, as in TensorRT (S. Migacz, GTC 2017, S7310), with
    what NVIDIA's pytorch_quantization adds: the first bin counts as many as the second, since it
    costs nothing to quantize zeros. Others are clipped at about the same distance on both sides of
    0, as in `HistogramCollector.get_entropy_threshold` of onnxruntime.quantization.calibrate.

    Args:
        histogram: of the values. That of values of both signs is extended to be symmetric.
        levels: to merge bins into; with no more bins than that, nothing is clipped.

    Returns:
        The range, 0 in it, within `min_max`.
    """
    if not histogram.counts.sum() or histogram.minimum == histogram.maximum:
        return min_max(histogram)
    if histogram.minimum >= 0.0:
        return 0.0, _one_sided_entropy(histogram, levels)
    if histogram.maximum <= 0.0:
        return -_one_sided_entropy(_mirrored(histogram), levels), 0.0
    return _two_sided_entropy(histogram, levels)


def _mirrored(histogram: Histogram) -> Histogram:
    return Histogram(
        histogram.counts[::-1], -histogram.edges[::-1], -histogram.maximum, -histogram.minimum
    )


def _one_sided_entropy(histogram: Histogram, levels: int) -> float:
    """The upper bound, for values of which none is negative."""
    edges, counts = _from_zero(histogram)
    size = len(counts)
    if size <= levels:
        return histogram.maximum
    counts[0] = counts[1]
    ends = np.arange(levels, size + 1)
    # Bin b of the first i is in level floor(b * levels / i).
    bounds = -(-np.arange(levels + 1) * ends[:, None] // levels)
    below, filled, logarithms, _ = _sums(counts)
    merged, bins = np.diff(below[bounds]), np.diff(filled[bounds])
    outside = below[-1] - below[ends]
    reference = merged.copy()
    reference[:, -1] += outside
    final = counts[ends - 1]
    own = logarithms[ends - 1] + _terms(final + outside)[2]
    spread = np.divide(merged, bins, out=np.ones_like(merged), where=bins > 0.0)
    cross = (reference * np.log(spread)).sum(axis=1)
    with np.errstate(divide="ignore"):
        divergence = (own - cross) / below[-1] + np.log(below[ends] / below[-1])
    divergence[(final == 0.0) & (outside > 0.0)] = np.inf
    widest = len(ends) - 1 - int(np.argmin(divergence[::-1]))
    return min(float(edges[ends[widest]]), histogram.maximum)


def _from_zero(histogram: Histogram) -> tuple[Array, Array]:
    """Edges and counts of as many bins, the first of which begins at 0."""
    if histogram.edges[0] == 0.0:
        return histogram.edges, histogram.counts.astype(np.float64)
    known, below = _cumulative(histogram)
    edges = np.linspace(0.0, histogram.maximum, len(known))
    return edges, np.diff(np.interp(edges, known, below))


def _two_sided_entropy(histogram: Histogram, levels: int) -> Range:
    """The range, with the divergence that onnxruntime takes.

    Bins are merged by whole numbers, and those left over are counted in the last level without
    being expanded again; empty bins are smoothed by 1e-4.
    """
    edges, counts = _symmetric(histogram)
    size, middle = len(counts), len(counts) // 2
    reach = np.arange(levels // 2, middle + 1)
    if not len(reach):
        return min_max(histogram)
    starts, ends = middle - reach, np.minimum(middle + reach + 1, size)
    divergence = _divergence(counts, starts, ends, levels)
    best = int(np.argmin(divergence))
    low = max(float(edges[starts[best]]), histogram.minimum)
    high = min(float(edges[ends[best]]), histogram.maximum)
    return min(low, 0.0), max(high, 0.0)


def _symmetric(histogram: Histogram) -> tuple[Array, Array]:
    """Edges and counts of the same bins and of empty ones, so many that the middle is nearest 0."""
    edges, size = histogram.edges.astype(np.float64), len(histogram.counts)
    width = (edges[-1] - edges[0]) / size
    zero = int(np.clip(np.rint(-edges[0] / width), 0, size))
    half = max(zero, size - zero)
    counts = np.zeros(2 * half)
    counts[half - zero : half - zero + size] = histogram.counts
    extended = edges[zero] + width * np.arange(-half, half + 1)
    extended[half - zero : half - zero + size + 1] = edges
    return extended, counts


def _divergence(
    counts: Array, starts: npt.NDArray[np.intp], ends: npt.NDArray[np.intp], levels: int
) -> Array:
    """The divergence for each window of bins from `starts` to `ends`, none narrower than `levels`.

    Sums over bins are differences of running sums, so that a window costs no more than its levels.
    Logarithms of smoothed counts are taken to the first order in the smoothing.
    """
    sums = _sums(counts)
    below, filled = sums[0], sums[1]
    left, right = below[starts], below[-1] - below[ends]
    first, last = counts[starts], counts[ends - 1]
    # The reference: counts, with those outside in the first and the last bin.
    inner = sums[:, ends - 1] - sums[:, starts + 1]
    _, present, own, logs = inner + _terms(first + left) + _terms(last + right)
    absent = (ends - starts) - present
    less = _SMOOTHING * absent / present
    own = own - less * (logs + present) + absent * _SMOOTHING * np.log(_SMOOTHING)
    # Levels of equal width, and bins that are left over as one more.
    steps = (ends - starts) // levels
    bounds = np.hstack((starts[:, None] + steps[:, None] * np.arange(levels + 1), ends[:, None]))
    bins, held, filled_bins = np.diff(bounds), np.diff(below[bounds]), np.diff(filled[bounds])
    merged = held.copy()
    merged[:, -2] += merged[:, -1]
    end = np.where(bins[:, -1] > 0, levels, levels - 1), np.arange(len(starts))
    filled_bins[:, 0] += (first == 0.0) & (left > 0.0)
    filled_bins[end[::-1]] += (last == 0.0) & (right > 0.0)
    held[:, 0] += left
    held[end[::-1]] += right
    reference = held - less[:, None] * filled_bins + _SMOOTHING * (bins - filled_bins)
    spread = np.floor(np.divide(merged, filled_bins, out=0.0 * merged, where=filled_bins > 0.0))
    spread[:, -1] = 0.0
    level, expanded = _smoothed(spread, bins)
    divergence = np.full(len(starts), np.inf)
    np.log(expanded, out=divergence, where=expanded > 0.0)
    divergence += (own - (reference * np.log(level)).sum(axis=1)) / below[-1] - np.log(below[-1])
    return divergence


def _smoothed(spread: Array, bins: npt.NDArray[np.intp]) -> tuple[Array, Array]:
    """Counts per bin of each level without zeros, [windows, levels]; sums over all bins, [windows].

    What the empty bins get is taken from the others, so that sums stay.
    """
    present = np.where(spread > 0.0, bins, 0).sum(axis=1)
    less = _SMOOTHING * (bins.sum(axis=1) - present) / np.maximum(present, 1)
    level = np.where(spread > 0.0, spread - less[:, None], _SMOOTHING)
    expanded: Array = (spread * bins).sum(axis=1)
    return np.maximum(level, _SMOOTHING), expanded


def _sums(counts: Array) -> Array:
    """Of the terms of all bins before each edge, of shape [4, B + 1]."""
    terms = np.cumsum(_terms(counts), axis=1)
    sums: Array = np.concatenate((np.zeros((4, 1)), terms), axis=1)
    return sums


def _terms(counts: Array) -> Array:
    """What is summed over bins: x, whether x > 0, x log x and log x, 0 for 0; of shape [4, ...]."""
    logarithm = np.log(np.where(counts > 0.0, counts, 1.0))
    terms: Array = np.stack((counts, counts > 0.0, counts * logarithm, logarithm))
    return terms
