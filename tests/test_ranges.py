"""Ranges of activations: onnxruntime's own calculators and brute force as oracles."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from graphopt_passes.quantize.ranges import (
    Histogram,
    affine_parameters,
    entropy,
    least_squares,
    min_max,
    percentile,
    quantization_error,
)

seeds = st.integers(0, 2**32 - 1)
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)

SHAPES = ("normal", "heavy", "relu", "gelu", "skewed", "positive", "negative")


def values_of(shape: str, count: int = 20000, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    normal = generator.standard_normal(count)
    values = {
        "normal": normal,
        "heavy": generator.standard_t(3, count),
        "relu": np.maximum(normal, 0.0),
        "gelu": normal * (normal > -1.0) + 0.17 * np.tanh(normal) * (normal <= -1.0),
        "skewed": generator.gamma(2.0, size=count) - 1.0,
        "positive": 2.0 + generator.gamma(2.0, size=count),
        "negative": -generator.gamma(2.0, size=count),
    }[shape]
    return values.astype(np.float32)


def histogram_of(values: np.ndarray, bins: int = 2048) -> Histogram:
    counts, edges = np.histogram(values.astype(np.float64), bins)
    return Histogram(counts, edges, float(values.min()), float(values.max()))


def onnxruntime_range(
    values: np.ndarray,
    method: str,
    percent: float = 99.9,
    symmetric: bool = False,
    bins: int = 1024,
    levels: int = 128,
) -> tuple[Histogram, tuple[float, float]]:
    """The histogram that onnxruntime collects, and the range that it chooses."""
    from onnxruntime.quantization.calibrate import HistogramCollector

    collector: Any = HistogramCollector(method, symmetric, bins, levels, percent, "same")
    with contextlib.redirect_stdout(io.StringIO()):
        collector.collect({"x": values})
        low, high, *_ = collector.compute_collection_result()["x"]
    counts, edges, *_ = collector.get_histogram_dict()["x"]
    histogram = Histogram(
        counts, edges.astype(np.float64), float(values.min()), float(values.max())
    )
    return histogram, (float(low), float(high))


def quantized(
    values: np.ndarray, scale: np.floating[Any], zero_point: int, dtype: str
) -> np.ndarray:
    """What QuantizeLinear and DequantizeLinear make of values."""
    codes = np.iinfo(dtype)
    return (
        np.clip(np.rint(values / scale) + zero_point, codes.min, codes.max) - zero_point
    ) * scale


# ------------------------------------------------------------------ integers for a range


@settings(deadline=None)
@given(floats, floats, st.sampled_from(["int8", "uint8", "int16", "uint16"]))
def test_the_same_numbers_as_onnxruntime(a: float, b: float, dtype: str) -> None:
    from onnxruntime.quantization.quant_utils import compute_scale_zp

    low, high = np.float32(min(a, b)), np.float32(max(a, b))
    codes = np.iinfo(dtype)
    bounds = np.array(codes.min, dtype), np.array(codes.max, dtype)

    expected = compute_scale_zp(low, high, *bounds)

    scale, zero_point = affine_parameters(float(low), float(high), dtype)
    assert (zero_point, scale) == (int(expected[0]), np.float32(expected[1]))


@settings(deadline=None)
@given(floats, floats, st.sampled_from(["int8", "int16"]))
def test_the_same_symmetric_numbers_as_onnxruntime(a: float, b: float, dtype: str) -> None:
    from onnxruntime.quantization.quant_utils import compute_scale_zp

    low, high = np.float32(min(a, b)), np.float32(max(a, b))
    largest = np.iinfo(dtype).max

    expected = compute_scale_zp(
        low, high, np.array(-largest, dtype), np.array(largest, dtype), symmetric=True
    )

    scale, zero_point = affine_parameters(float(low), float(high), dtype, symmetric=True)
    assert (zero_point, scale) == (0, np.float32(expected[1]))


@settings(deadline=None)
@given(st.floats(-1e300, 1e300), st.floats(-1e300, 1e300), st.booleans())
def test_every_range_gets_usable_numbers(low: float, high: float, symmetric: bool) -> None:
    scale, zero_point = affine_parameters(low, high, "int8", symmetric)

    assert isinstance(scale, np.float32) and isinstance(zero_point, int)
    assert np.finfo(np.float32).tiny <= scale < np.inf
    assert -128 <= zero_point <= 127


@settings(deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_a_range_is_held_but_for_half_a_step(low: float, high: float) -> None:
    low, high = min(low, high, 0.0), max(low, high, 0.0)
    assume(high - low > 1e-30)

    scale, zero_point = affine_parameters(low, high, "uint8")

    ends = quantized(np.array([low, 0.0, high]), np.float64(scale), zero_point, "uint8")
    assert ends[1] == 0.0
    assert abs(ends[0] - low) <= 0.501 * scale
    assert abs(ends[2] - high) <= 0.501 * scale


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_a_range_of_nothing(dtype: str) -> None:
    assert affine_parameters(0.0, 0.0, dtype) == (1.0, 0)
    assert affine_parameters(-1e-40, 1e-40, dtype) == (1.0, 0)


def test_ranges_that_no_integers_hold() -> None:
    with pytest.raises(ValueError, match="no integers hold"):
        affine_parameters(0.0, np.inf, "uint8")
    with pytest.raises(ValueError, match="signed"):
        affine_parameters(-1.0, 1.0, "uint8", symmetric=True)


# ------------------------------------------------------------------ what a range costs


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_that_of_evenly_spread_values(shape: str, dtype: str) -> None:
    histogram = histogram_of(values_of(shape), 50)
    inside = (np.arange(4000) + 0.5) / 4000
    spread = histogram.edges[:-1, None] + np.diff(histogram.edges)[:, None] * inside
    weights = histogram.counts / histogram.counts.sum()

    for shrink in (1.0, 0.5, 0.1):
        low, high = (shrink * bound for bound in min_max(histogram))
        scale, zero_point = affine_parameters(low, high, dtype)
        found = quantization_error(histogram.counts, histogram.edges, scale, zero_point, dtype)
        error = (spread - quantized(spread, np.float64(scale), zero_point, dtype)) ** 2
        np.testing.assert_allclose(found, weights @ error.mean(axis=1), rtol=1e-3)


def test_errors_of_many_candidates_at_once() -> None:
    histogram = histogram_of(values_of("heavy"), 300)
    scales, zero_points = np.array([[0.1, 0.01, 1.0], [0.03, 2.0, 0.2]]), np.array([[128], [7]])
    both = np.broadcast_arrays(scales, zero_points)

    found = quantization_error(histogram.counts, histogram.edges, *both, "uint8")

    each = [
        float(quantization_error(histogram.counts, histogram.edges, s, z, "uint8"))
        for s, z in zip(both[0].flat, both[1].flat, strict=True)
    ]
    np.testing.assert_allclose(found, np.reshape(each, (2, 3)))


def test_bins_without_width_hold_one_value() -> None:
    counts, edges = np.array([3, 0, 1]), np.array([0.25, 0.25, 9.0, 9.0])

    error = quantization_error(counts, edges, 1.0, 0, "uint8")

    assert error == pytest.approx(3 * 0.0625 / 4)
    assert quantization_error(counts, edges, 1.0, 250, "uint8") == pytest.approx(
        (3 * 0.0625 + 16.0) / 4
    )
    assert quantization_error(0 * counts, edges, 1.0, 0, "uint8") == 0.0


# ------------------------------------------------------------------ ranges


def test_min_max_holds_zero() -> None:
    assert min_max(histogram_of(values_of("positive")))[0] == 0.0
    assert min_max(histogram_of(values_of("negative")))[1] == 0.0
    values = values_of("normal")
    assert min_max(histogram_of(values)) == (values.min(), values.max())


@pytest.mark.parametrize("percent", [99.0, 99.9, 99.99])
@pytest.mark.parametrize("shape", SHAPES)
def test_percentiles_are_onnxruntimes_but_for_a_bin(shape: str, percent: float) -> None:
    # No percentage of so many values is a whole number of them, where rounding errors decide.
    histogram, expected = onnxruntime_range(values_of(shape, 20011), "percentile", percent)

    found = percentile(histogram, percent)

    width = histogram.edges[1] - histogram.edges[0]
    expected = min(expected[0], 0.0), max(expected[1], 0.0)
    np.testing.assert_allclose(found, expected, atol=1.001 * width)


@pytest.mark.parametrize("percent", [99.0, 99.9])
@pytest.mark.parametrize("shape", ["normal", "heavy", "relu"])
def test_symmetric_percentiles_too(shape: str, percent: float) -> None:
    values = values_of(shape, 20011)
    absolute, expected = onnxruntime_range(values, "percentile", percent, symmetric=True)

    found = percentile(histogram_of(values), percent, symmetric=True)

    width = absolute.edges[1] - absolute.edges[0]
    assert found[0] == -found[1]
    assert found[1] == pytest.approx(expected[1], abs=3.0 * width)


@settings(deadline=None)
@given(seeds, st.sampled_from(SHAPES), st.booleans())
def test_percentiles_grow_to_all_values(seed: int, shape: str, symmetric: bool) -> None:
    values = values_of(shape, 500, seed)
    histogram = histogram_of(values, 64)

    ranges = [percentile(histogram, p, symmetric) for p in (0.0, 50.0, 90.0, 99.0, 100.0)]

    lows, highs = np.array(ranges).T
    assert (np.diff(lows) <= 0.0).all() and (np.diff(highs) >= 0.0).all()
    if symmetric:
        assert ranges[-1][1] == pytest.approx(np.abs(values).max())
    else:
        assert ranges[-1] == min_max(histogram)
    width = histogram.edges[1] - histogram.edges[0]
    low, high = ranges[2]
    assert ((values >= low - width) & (values <= high + width)).mean() >= 0.9


def test_what_is_no_percentage() -> None:
    with pytest.raises(ValueError, match="101"):
        percentile(histogram_of(values_of("normal")), 101.0)


def candidates(
    histogram: Histogram, steps: int, symmetric: bool = False
) -> list[tuple[float, float]]:
    low, high = min_max(histogram)
    parts = np.arange(steps, 0, -1) / steps
    if symmetric:
        bound = max(-low, high)
        return [(-bound * part, bound * part) for part in parts]
    return [(a, b) for a in np.unique(low * parts) for b in np.unique(high * parts)]


def cost(histogram: Histogram, bounds: tuple[float, float], dtype: str, symmetric: bool) -> float:
    scale, zero_point = affine_parameters(*bounds, dtype, symmetric)
    edges = np.clip(histogram.edges, histogram.minimum, histogram.maximum)
    return float(quantization_error(histogram.counts, edges, scale, zero_point, dtype))


@pytest.mark.parametrize(
    ("dtype", "symmetric"), [("uint8", False), ("int8", False), ("int8", True)]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_least_squares_costs_next_to_nothing_more_than_the_best(
    shape: str, dtype: str, symmetric: bool
) -> None:
    histogram = histogram_of(values_of(shape), 300)
    steps = 24

    found = least_squares(histogram, dtype, symmetric, steps)

    costs = [cost(histogram, c, dtype, symmetric) for c in candidates(histogram, steps, symmetric)]
    assert cost(histogram, found, dtype, symmetric) <= 1.01 * min(costs)


@pytest.mark.parametrize("shape", ["relu", "positive", "negative"])
def test_least_squares_on_one_side_is_the_best(shape: str) -> None:
    histogram = histogram_of(values_of(shape))

    found = least_squares(histogram)

    costs = [cost(histogram, c, "uint8", False) for c in candidates(histogram, 128)]
    assert cost(histogram, found, "uint8", False) == pytest.approx(min(costs), rel=1e-9)
    assert 0.0 in found


@settings(deadline=None)
@given(seeds, st.sampled_from(SHAPES), st.integers(2, 64), st.booleans())
def test_least_squares_never_costs_more_than_min_max(
    seed: int, shape: str, bins: int, symmetric: bool
) -> None:
    histogram = histogram_of(values_of(shape, 200, seed), bins)

    low, high = least_squares(histogram, "int8", symmetric)

    widest = min_max(histogram)
    assert cost(histogram, (low, high), "int8", symmetric) <= cost(
        histogram, widest, "int8", symmetric
    ) * (1 + 1e-9)
    assert low <= 0.0 <= high
    if symmetric:
        assert low == -high
    else:
        assert widest[0] <= low and high <= widest[1]


@settings(deadline=None)
@given(seeds, st.sampled_from(SHAPES))
def test_signed_and_unsigned_codes_have_the_same_range(seed: int, shape: str) -> None:
    histogram = histogram_of(values_of(shape, 300, seed), 128)

    assert least_squares(histogram, "int8") == least_squares(histogram, "uint8")


def test_least_squares_clips_an_outlier() -> None:
    values = values_of("normal")
    counts, edges = np.histogram(values, 2048, range=(-40.0, 40.0))
    counts = 1000 * counts
    counts[-1] = 1
    histogram = Histogram(counts, edges, float(values.min()), 40.0)

    low, high = least_squares(histogram)

    assert -5.0 < low < -3.0 and 3.0 < high < 6.0
    best, widest = (
        cost(histogram, bounds, "uint8", False) for bounds in ((low, high), min_max(histogram))
    )
    assert best < 0.1 * widest


# ------------------------------------------------------------------ entropy


def two_sided_divergence(counts: np.ndarray, start: int, end: int, levels: int) -> float:
    """As `HistogramCollector.get_entropy_threshold` computes it, but in float64."""
    inside = counts[start:end]
    reference = inside.astype(np.float64)
    reference[0] += counts[:start].sum()
    reference[-1] += counts[end:].sum()
    step = len(inside) // levels
    even = step * levels
    sums = inside[:even].reshape(levels, step).sum(axis=1)
    sums[-1] += inside[even:].sum()
    filled = (reference[:even] > 0).reshape(levels, step).sum(axis=1)
    spread = np.zeros(len(inside))
    spread[:even] = np.repeat(np.where(filled > 0, sums // np.maximum(filled, 1), 0), step)
    p, q = (
        np.where(x > 0, x - 1e-4 * (x == 0).sum() / (x > 0).sum(), 1e-4)
        for x in (reference, spread)
    )
    p, q = p / p.sum(), q / q.sum()
    return float(np.sum(p * np.log(p / q)))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", ["normal", "heavy", "gelu", "skewed"])
def test_entropy_on_both_sides_is_onnxruntimes(shape: str, seed: int) -> None:
    values = values_of(shape, 5000, seed)
    histogram, expected = onnxruntime_range(values, "entropy", bins=512, levels=64)

    found = entropy(histogram, 64)

    divergences: dict[tuple[float, float], float] = {}
    for reach in range(32, 257):
        start, end = 256 - reach, min(256 + reach + 1, 512)
        low = max(float(histogram.edges[start]), histogram.minimum)
        high = min(float(histogram.edges[end]), histogram.maximum)
        divergence = two_sided_divergence(histogram.counts, start, end, 64)
        divergences[low, high] = min(divergence, divergences.get((low, high), np.inf))
    least = min(divergences.values())
    assert divergences[found] == pytest.approx(least, abs=1e-8)
    assert divergences[expected] == pytest.approx(least, abs=1e-5), "onnxruntime's are float32"
    if seed == 0:
        assert found == expected


def test_a_histogram_that_is_not_symmetric_is_extended() -> None:
    values = np.append(values_of("gelu"), np.float32(-2.0))
    counts, edges = np.histogram(values, 1536, range=(-2.0, 4.0))
    symmetric, _ = np.histogram(values, 2048, range=(-4.0, 4.0))
    low, high = float(values.min()), float(values.max())

    found = entropy(Histogram(counts, edges, low, high))

    assert found == entropy(Histogram(symmetric, np.linspace(-4.0, 4.0, 2049), low, high))


def one_sided_divergence(counts: np.ndarray, size: int, levels: int) -> float:
    """By the letter: bin b is in level floor(b * levels / size), means are over filled bins."""
    level = np.arange(size) * levels // size
    inside = counts[:size]
    filled = inside > 0
    sums = np.bincount(level, inside, levels)
    numbers = np.bincount(level, filled, levels)
    spread = np.where(filled, (sums / np.maximum(numbers, 1))[level], 0.0)
    reference = inside.astype(np.float64)
    reference[-1] += counts[size:].sum()
    p, q = reference / reference.sum(), spread / spread.sum()
    if ((p > 0) & (q == 0)).any():
        return float("inf")
    return float(np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0])))


@pytest.mark.parametrize("count", [300, 30000])
@pytest.mark.parametrize("levels", [16, 128])
def test_entropy_on_one_side_is_the_least_divergence(levels: int, count: int) -> None:
    values = np.abs(values_of("heavy", count))
    counts, edges = np.histogram(values, 400, range=(0.0, float(values.max())))
    histogram = Histogram(counts, edges, float(values.min()), float(values.max()))

    low, high = entropy(histogram, levels)

    even = counts.copy()
    even[0] = even[1]
    sizes = range(levels, 401)
    divergences = [one_sided_divergence(even, size, levels) for size in sizes]
    assert low == 0.0
    size = int(np.argmin(np.abs(edges - high)))
    assert one_sided_divergence(even, size, levels) == pytest.approx(min(divergences), rel=1e-9)
    assert size < 400


def test_zeros_of_a_relu_change_no_entropy() -> None:
    values = values_of("relu")
    positive = values[values > 0.0]
    edges = np.linspace(0.0, float(values.max()), 2049)
    ranges = [
        entropy(Histogram(np.histogram(v, edges)[0], edges, 0.0, float(values.max())))
        for v in (values, positive)
    ]

    assert ranges[0] == ranges[1]


@settings(deadline=None)
@given(seeds)
def test_negative_values_are_the_mirror_of_positive_ones(seed: int) -> None:
    histogram = histogram_of(values_of("positive", 1000, seed), 512)
    mirror = Histogram(
        histogram.counts[::-1], -histogram.edges[::-1], -histogram.maximum, -histogram.minimum
    )

    low, high = entropy(mirror)

    assert (-high, -low) == entropy(histogram)
    low, high = percentile(mirror, 99.0)
    assert (-high, -low) == percentile(histogram, 99.0)


# ------------------------------------------------------------------ all of them


WAYS = {
    "min_max": min_max,
    "percentile": lambda h: percentile(h, 99.0),
    "symmetric percentile": lambda h: percentile(h, 99.0, symmetric=True),
    "least_squares": least_squares,
    "entropy": entropy,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES)
def test_ranges_scale_with_the_values(shape: str, way: str) -> None:
    histogram = histogram_of(values_of(shape, 3000), 512)
    larger = Histogram(
        histogram.counts, histogram.edges * 64.0, histogram.minimum * 64.0, histogram.maximum * 64.0
    )

    low, high = WAYS[way](histogram)

    np.testing.assert_allclose(WAYS[way](larger), (64.0 * low, 64.0 * high), rtol=1e-12)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "symmetric percentile"])
@pytest.mark.parametrize("value", [3.0, -3.0, 0.0])
def test_a_tensor_of_one_value(value: float, way: str) -> None:
    counts, edges = np.histogram(np.full(10, value), 2048)

    assert WAYS[way](Histogram(counts, edges, value, value)) == (min(value, 0.0), max(value, 0.0))


@pytest.mark.parametrize("way", [way for way in WAYS if way != "symmetric percentile"])
def test_a_tensor_that_was_never_seen(way: str) -> None:
    histogram = Histogram(np.zeros(8, np.int64), np.linspace(-1.0, 1.0, 9), -0.5, 0.5)

    assert WAYS[way](histogram) == (-0.5, 0.5)


@pytest.mark.parametrize("way", WAYS)
def test_edges_beyond_the_extremes(way: str) -> None:
    """As they are when a histogram has grown; the largest value may begin a bin of its own."""
    values = values_of("skewed", 3000)
    values[0] = 6.0
    edges = np.linspace(-4.0, 8.0, 769)
    counts, _ = np.histogram(np.minimum(values, 6.0), edges)
    histogram = Histogram(counts, edges, float(values.min()), 6.0)

    low, high = WAYS[way](histogram)

    assert low == -high or histogram.minimum <= low
    assert 0.0 < high <= 6.0


@pytest.mark.parametrize(
    ("counts", "edges", "minimum", "maximum", "reason"),
    [
        (3, 3, 0.0, 1.0, "edges"),
        (3, 4, 1.0, 0.0, "no values"),
        (3, 4, 0.0, np.inf, "no values"),
        (3, 4, np.nan, 1.0, "no values"),
    ],
)
def test_what_is_no_histogram(
    counts: int, edges: int, minimum: float, maximum: float, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        Histogram(np.ones(counts), np.arange(float(edges)), minimum, maximum)
