"""The best levels: every assignment tried where there are few values, laws where there are many."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from graphopt_passes.quantize.kmeans import level_curve, nearest_levels, optimal_levels

seeds = st.integers(0, 2**32 - 1)
numbers = st.floats(-1e6, 1e6, allow_subnormal=False)
weighted = st.lists(
    st.tuples(st.one_of(numbers, st.integers(-4, 4).map(float)), st.floats(0, 10)),
    min_size=1,
    max_size=6,
)


def error(values: np.ndarray, weights: np.ndarray | None, levels: np.ndarray) -> float:
    """What the levels cost, with no code of what is tested."""
    exact = values.astype(np.float64).ravel()
    weights = np.ones(exact.size) if weights is None else weights.astype(np.float64).ravel()
    above = np.clip(np.searchsorted(levels, exact), 1, max(len(levels) - 1, 1))
    around = np.stack([levels[above - 1], levels[np.minimum(above, len(levels) - 1)]])
    return float(weights @ np.square(around - exact).min(axis=0))


def decibels(values: np.ndarray, weights: np.ndarray | None, levels: np.ndarray) -> float:
    power = error(values, weights, np.zeros(1))
    return float(10 * np.log10(power / error(values, weights, levels)))


def least_error(values: np.ndarray, weights: np.ndarray, count: int, zero: bool) -> float:
    """Every assignment of values to levels; the first of them is 0 where one is fixed."""
    best = np.inf
    for labels in itertools.product(range(count), repeat=len(values)):
        of = np.array(labels)
        total = 0.0
        for level in range(count):
            mine, counts = values[of == level], weights[of == level]
            if counts.sum() > 0.0:
                mean = 0.0 if zero and level == 0 else np.average(mine, weights=counts)
                total += counts @ np.square(mine - mean)
        best = min(best, total)
    return float(best)


def least_error_of_runs(values: np.ndarray, weights: np.ndarray, count: int, zero: bool) -> float:
    """The least error by the plain recursion over all starts, in rationals: nothing is rounded."""
    pairs = sorted(zip(values.tolist(), weights.tolist(), strict=True))
    if zero:
        pairs = sorted([(value, weight) for value, weight in pairs if value] + [(0.0, 0.0)])
    size = len(pairs)
    place = [Fraction(value) for value, _ in pairs]
    share = [Fraction(weight) for _, weight in pairs]
    cost = [[Fraction(0)] * (size + 1) for _ in range(size)]
    for start in range(size):
        f = s = q = Fraction(0)
        pinned = False
        for at in range(start, size):
            f, s, q = f + share[at], s + share[at] * place[at], q + share[at] * place[at] ** 2
            pinned |= zero and place[at] == 0
            cost[start][at + 1] = q if pinned or not f else q - s * s / f
    least = cost[0][:]
    for _ in range(count - 1):
        least = [
            min([least[end], *(least[start] + cost[start][end] for start in range(end))])
            for end in range(size + 1)
        ]
    return float(least[size])


def lloyd(
    values: np.ndarray, weights: np.ndarray, start: np.ndarray, zero: bool, sweeps: int = 60
) -> np.ndarray:
    levels = start
    for _ in range(sweeps):
        of = np.searchsorted((levels[1:] + levels[:-1]) / 2, values)
        counts = np.bincount(of, weights, len(levels))
        sums = np.bincount(of, weights * values, len(levels))
        moved = np.divide(sums, counts, out=levels.copy(), where=counts > 0.0)
        if zero:
            moved[levels == 0.0] = 0.0
        levels = np.sort(moved)
    return levels


def heavy_tailed(seed: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    draw = [
        generator.standard_normal,
        generator.laplace,
        lambda size: generator.standard_t(3, size),
    ]
    return draw[seed % 3](size=size), generator.lognormal(0.0, 1.0, size)


# ------------------------------------------------------------------ nothing is better


@settings(deadline=None, max_examples=150)
@given(weighted, st.integers(1, 3), st.booleans(), st.booleans())
@example([(1.0, 0.0), (2.0, 0.0), (5.0, 0.0)], 2, False, False)
@example([(0.0, 1.0), (-1.0, 0.0), (1.0, 1e-30), (2.0, 1.0)], 2, True, False)
def test_no_assignment_does_less_harm(
    pairs: list[tuple[float, float]], count: int, zero: bool, alike: bool
) -> None:
    values, weights = (np.array(column) for column in zip(*pairs, strict=True))
    alike |= not weights.any()
    counted = np.ones(len(values)) if alike else weights

    levels = optimal_levels(values, None if alike else weights, count, zero)

    scale = counted.sum() * np.square(values).max()
    least = least_error(values, counted, count, zero)
    assert error(values, counted, levels) <= least + 1e-12 * scale
    assert 1 <= len(levels) <= count
    assert (np.diff(levels) > 0.0).all()
    assert not zero or 0.0 in levels


@settings(deadline=None, max_examples=25)
@given(seeds, st.integers(8, 40), st.integers(2, 12), st.booleans())
def test_no_partition_of_more_values_does_less_harm(
    seed: int, size: int, count: int, zero: bool
) -> None:
    values, weights = heavy_tailed(seed, size)

    levels = optimal_levels(values, weights, count, zero)

    least = least_error_of_runs(values, weights, count, zero)
    assert error(values, weights, levels) == pytest.approx(least, rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("count", [3, 16, 40])
def test_never_loses_to_lloyd(seed: int, zero: bool, count: int) -> None:
    values, weights = heavy_tailed(seed, 2000)
    generator = np.random.default_rng(seed)

    best = error(values, weights, optimal_levels(values, weights, count, zero))

    for _ in range(20):
        start = generator.choice(values, count, replace=False)
        start[0] = 0.0 if zero else start[0]
        found = error(values, weights, lloyd(values, weights, np.sort(start), zero))
        assert best <= found * (1 + 1e-9)
    linear = np.sort(np.append(np.linspace(values.min(), values.max(), count - 1), 0.0))
    assert best <= error(values, weights, lloyd(values, weights, linear, zero)) * (1 + 1e-9)


@pytest.mark.parametrize("count", [2, 5, 16])
@pytest.mark.parametrize("zero", [False, True])
def test_levels_are_the_means_of_what_is_nearest_to_them(count: int, zero: bool) -> None:
    values, weights = heavy_tailed(4, 3000)

    levels = optimal_levels(values, weights, count, zero)

    codes = nearest_levels(values, levels)
    means = np.bincount(codes, weights * values) / np.bincount(codes, weights)
    free = levels != 0.0
    np.testing.assert_allclose(means[free], levels[free], rtol=1e-12)
    assert free.sum() == count - zero


# ------------------------------------------------------------------ known results


@pytest.mark.parametrize(("count", "expected"), [(2, 4.40), (4, 9.30), (8, 14.62), (16, 20.22)])
def test_a_gaussian_has_the_error_of_lloyd_and_max(count: int, expected: float) -> None:
    values = np.random.default_rng(0).standard_normal(500_000).astype(np.float32)

    assert decibels(values, None, optimal_levels(values, None, count)) == pytest.approx(
        expected, abs=0.1
    )


@pytest.mark.parametrize(("count", "expected"), [(2, 3.01), (4, 7.54), (8, 12.64), (16, 18.13)])
def test_a_laplacian_has_the_error_of_lloyd_and_max(count: int, expected: float) -> None:
    values = np.linspace(-30.0, 30.0, 60_001)
    density = np.exp(-np.abs(values))

    levels = optimal_levels(values, density, count)

    assert decibels(values, density, levels) == pytest.approx(expected, abs=0.02)


def test_two_levels_of_a_uniform_density_are_at_the_quarters() -> None:
    values = (np.arange(1000) + 0.5) / 1000

    np.testing.assert_allclose(optimal_levels(values, None, 2), [0.25, 0.75])
    np.testing.assert_allclose(optimal_levels(values, None, 2, zero=True), [0.0, 2 / 3], atol=1e-3)


# ------------------------------------------------------------------ bins


@pytest.mark.parametrize("weights_too", [False, True])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(
    "draw",
    [
        lambda generator, size: generator.standard_normal(size),
        lambda generator, size: generator.standard_t(2, size),
        lambda generator, size: generator.standard_cauchy(size),
        lambda generator, size: np.append(generator.laplace(size=size - 1), 1e5),
        lambda generator, size: np.arange(float(size)),
    ],
)
def test_bins_cost_next_to_nothing(draw, zero: bool, weights_too: bool) -> None:
    generator = np.random.default_rng(7)
    values = draw(generator, 6000)
    weights = generator.lognormal(0.0, 1.0, 6000) if weights_too else None

    exact = level_curve(values, weights, [4, 16, 64], zero)
    binned = level_curve(values, weights, [4, 16, 64], zero, bins=2048)

    for count, levels in binned.items():
        lost = decibels(values, weights, exact[count]) - decibels(values, weights, levels)
        assert -1e-6 < lost < 0.002


def test_evenly_spaced_values_beyond_the_bins_share_few() -> None:
    values = np.arange(101.0)

    levels = optimal_levels(values, None, 100, bins=100)

    assert len(levels) == 100
    assert error(values, None, levels) == 0.5


@pytest.mark.parametrize("bins", [1, 2, 5])
def test_few_bins_are_few_levels(bins: int) -> None:
    values, weights = heavy_tailed(1, 50)

    assert 1 <= len(optimal_levels(values, weights, 20, bins=bins)) <= bins + 1
    assert 0.0 in optimal_levels(values, weights, 20, zero=True, bins=bins)


def test_a_million_weights() -> None:
    generator = np.random.default_rng(0)
    values = generator.standard_t(4, (1000, 1000)).astype(np.float32)
    values[generator.random(values.shape) < 0.3] = 0.0
    weights = generator.random(values.shape, np.float32)

    for count, levels in level_curve(values, weights, [16, 64], zero=True).items():
        codes = nearest_levels(values, levels)
        assert len(levels) == count
        assert (levels[codes[values == 0.0]] == 0.0).all()
        free = np.flatnonzero(levels)
        mine = np.bincount(codes.ravel(), (weights * values.astype(np.float64)).ravel())
        means = mine / np.bincount(codes.ravel(), weights.ravel())
        # Not equal, as runs are cut between bins only.
        np.testing.assert_allclose(means[free], levels[free], rtol=1e-2)
        start = np.sort(
            np.append(np.quantile(values[values != 0], np.linspace(0, 1, count - 1)), 0)
        )
        rival = lloyd(values.ravel(), weights.ravel(), start, zero=True, sweeps=8)
        assert error(values, weights, levels) < error(values, weights, rival) * (1 + 1e-4)


# ------------------------------------------------------------------ laws


@settings(deadline=None, max_examples=30)
@given(seeds, st.booleans(), st.sampled_from([70, 16384]))
def test_a_curve_is_what_single_runs_are(seed: int, zero: bool, bins: int) -> None:
    values, weights = heavy_tailed(seed, 150)
    counts = [40, 1, 2, 7, 40, 16, 150, 151, 500]

    curve = level_curve(values, weights, counts, zero, bins)

    assert list(curve) == sorted(set(counts))
    for count, levels in curve.items():
        single = optimal_levels(values, weights, count, zero, bins)
        np.testing.assert_array_equal(levels, single, strict=True)


@settings(deadline=None, max_examples=30)
@given(seeds, st.booleans())
def test_more_levels_are_never_worse(seed: int, zero: bool) -> None:
    values, weights = heavy_tailed(seed, 100)

    errors = [
        error(values, weights, levels)
        for levels in level_curve(values, weights, range(1, 102), zero).values()
    ]

    assert (np.diff(errors) <= 1e-14 * errors[0]).all()
    assert errors[-1] == 0.0


@settings(deadline=None, max_examples=30)
@given(seeds, st.booleans(), st.integers(-300, 300), st.integers(-300, 300))
def test_units_and_order_and_shape_change_nothing(
    seed: int, zero: bool, unit: int, weight_unit: int
) -> None:
    values, weights = heavy_tailed(seed, 120)
    order = np.random.default_rng(seed).permutation(120)

    expected = optimal_levels(values, weights, 9, zero)
    levels = optimal_levels(
        np.ldexp(values[order], unit).reshape(4, 5, 6).transpose(2, 0, 1),
        np.ldexp(weights[order], weight_unit).reshape(4, 5, 6).transpose(2, 0, 1),
        9,
        zero,
    )

    np.testing.assert_allclose(levels, np.ldexp(expected, unit), rtol=1e-12)


@settings(deadline=None, max_examples=30)
@given(seeds)
def test_levels_move_with_the_values(seed: int) -> None:
    values, weights = heavy_tailed(seed, 120)

    expected = optimal_levels(values, weights, 9)

    np.testing.assert_allclose(
        optimal_levels(values + 1000.0, weights, 9), expected + 1000.0, rtol=1e-12
    )


@settings(deadline=None, max_examples=30)
@given(seeds, st.booleans())
def test_a_weight_is_how_often_a_value_is_there(seed: int, zero: bool) -> None:
    values, _ = heavy_tailed(seed, 60)
    times = np.random.default_rng(seed).integers(0, 5, 60)

    np.testing.assert_allclose(
        optimal_levels(values, times.astype(np.float64), 7, zero),
        optimal_levels(values.repeat(times), None, 7, zero),
        rtol=1e-9,
    )


@settings(deadline=None, max_examples=30)
@given(seeds)
def test_a_fixed_zero_costs_no_more_than_one_kept_for_zeros(seed: int) -> None:
    values, weights = heavy_tailed(seed, 200)
    kept = np.sort(np.append(optimal_levels(values, weights, 7), 0.0))

    fixed = error(values, weights, optimal_levels(values, weights, 8, zero=True))

    assert fixed <= error(values, weights, kept) * (1 + 1e-12)


def test_zeros_do_not_count_where_zero_is_fixed() -> None:
    values, weights = heavy_tailed(2, 300)
    pruned = np.append(values, np.zeros(5000))

    np.testing.assert_array_equal(
        optimal_levels(pruned, np.append(weights, np.full(5000, 1e9)), 5, zero=True),
        optimal_levels(values, weights, 5, zero=True),
    )


# ------------------------------------------------------------------ edges


def test_few_distinct_values_are_their_own_levels() -> None:
    values = np.array([[3.0, -1.0, 3.0], [0.5, -0.0, 0.0]], np.float32)

    levels = optimal_levels(values, None, 4)

    assert levels.dtype == np.float64
    assert levels.tolist() == [-1.0, 0.0, 0.5, 3.0]
    assert not np.signbit(levels[1])
    np.testing.assert_array_equal(levels[nearest_levels(values, levels)], values)
    assert optimal_levels(values, None, 9, zero=True).tolist() == [-1.0, 0.0, 0.5, 3.0]
    assert optimal_levels(values[:1], None, 3, zero=True).tolist() == [-1.0, 0.0, 3.0]


def test_spare_levels_go_to_values_without_weight() -> None:
    values, weights = np.array([1.0, 2.0, 5.0, 9.0]), np.array([1.0, 0.0, 1.0, 0.0])

    assert optimal_levels(values, weights, 4).tolist() == values.tolist()
    assert error(values, weights, optimal_levels(values, weights, 2)) < 1e-12
    assert len(optimal_levels(values, weights, 3)) == 3


def test_equal_values_are_one_level() -> None:
    assert optimal_levels(np.full(7, 0.3), None, 5).tolist() == [0.3]
    assert optimal_levels(np.full(7, 0.3), None, 1).tolist() == [0.3]
    assert optimal_levels(np.full(7, 0.3), None, 1, zero=True).tolist() == [0.0]
    assert optimal_levels(np.full(7, 0.3), None, 2, zero=True).tolist() == [0.0, 0.3]


def test_nothing_has_no_levels() -> None:
    for nothing in (np.zeros(0), np.zeros((3, 0), np.float32)):
        assert optimal_levels(nothing, nothing, 3).tolist() == []
        assert optimal_levels(nothing, None, 3, zero=True).tolist() == [0.0]
        assert nearest_levels(nothing, np.zeros(0)).shape == nothing.shape
    assert level_curve(np.ones(3), None, []) == {}


def test_one_level_is_the_mean() -> None:
    values, weights = heavy_tailed(0, 500)

    assert optimal_levels(values, weights, 1) == pytest.approx(np.average(values, weights=weights))
    assert optimal_levels(values, None, 1) == pytest.approx(values.mean())
    assert optimal_levels(values, weights, 1, zero=True).tolist() == [0.0]


def test_weights_that_are_all_zero_count_alike() -> None:
    values, _ = heavy_tailed(0, 500)
    values = np.rint(4 * values)
    light = np.where(values == 0.0, 1.0, 0.0)

    for weights, zero in ((np.zeros(500), False), (np.zeros(500), True), (light, True)):
        np.testing.assert_array_equal(
            optimal_levels(values, weights, 6, zero), optimal_levels(values, None, 6, zero)
        )


def test_the_largest_and_the_smallest_floats_have_levels() -> None:
    largest, smallest = np.finfo(np.float64).max, np.finfo(np.float64).smallest_subnormal
    signs = np.array([-1.0, -0.75, 0.5, 1.0])

    np.testing.assert_allclose(
        optimal_levels(signs * largest, np.full(4, largest), 2),
        np.array([-0.875, 0.75]) * largest,
    )
    assert optimal_levels(np.array([1, 2, 8, 9, 9]) * smallest, None, 2).tolist() == [
        2 * smallest,
        9 * smallest,
    ]
    light = np.array([smallest, smallest, 3 * smallest])
    assert optimal_levels(np.array([1.0, 2.0, 9.0]), light, 2).tolist() == [1.5, 9.0]


def test_a_level_does_not_lose_a_value_far_from_zero() -> None:
    values = 1e6 + np.array([0.0, 0.001, 0.01, 0.011])

    np.testing.assert_allclose(
        optimal_levels(values, None, 2) - 1e6, [0.0005, 0.0105], rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="values must be finite"):
        optimal_levels(np.array([1.0, bad, 0.0]), None, 2)
    with pytest.raises(ValueError, match="values must be finite"):
        optimal_levels(np.array([1.0, bad, 0.0], np.float32), np.ones(3), 2)
    with pytest.raises(ValueError, match="weights must be finite"):
        optimal_levels(np.arange(3.0), np.array([1.0, bad, 1.0]), 2)


def test_arguments_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="not negative"):
        optimal_levels(np.arange(3.0), np.array([1.0, -1.0, 1.0]), 2)
    with pytest.raises(ValueError, match="shape"):
        optimal_levels(np.arange(3.0), np.ones((3, 1)), 2)
    with pytest.raises(ValueError, match="at least one"):
        level_curve(np.arange(3.0), None, [4, 0])
    with pytest.raises(ValueError, match="at least one"):
        optimal_levels(np.arange(3.0), None, 2, bins=0)


# ------------------------------------------------------------------ nearest


@settings(deadline=None)
@given(seeds, st.integers(1, 256), st.sampled_from([np.float16, np.float32, np.float64]))
def test_codes_are_the_nearest(seed: int, count: int, kind: type[np.floating]) -> None:
    generator = np.random.default_rng(seed)
    values = generator.standard_t(4, (30, 11)).astype(kind)
    levels = np.sort(generator.standard_t(4, count))

    codes = nearest_levels(values.T, levels)

    assert codes.dtype == np.uint8
    distances = np.abs(values.T.astype(np.float64)[..., None] - levels)
    assert codes.shape == (11, 30)
    chosen = np.take_along_axis(distances, codes[..., None].astype(np.intp), -1)[..., 0]
    np.testing.assert_array_equal(chosen, distances.min(axis=-1))


def test_of_two_levels_as_near_it_is_the_lower() -> None:
    values = np.array([0.4, 0.5, 0.6, 1.5, -9.0, 9.0], np.float64)

    assert nearest_levels(values, np.array([0.0, 1.0, 2.0])).tolist() == [0, 0, 1, 1, 0, 2]


def test_values_that_are_levels_have_their_own() -> None:
    for start in (1.0, -3e307, 0.0, -3 * 5e-324):
        levels = [start]
        for _ in range(255):
            levels.append(np.nextafter(levels[-1], np.inf))
        levels.append(1.7e308)
        levels = np.array(levels[-256:])

        assert nearest_levels(levels, levels).tolist() == list(range(256))


def test_many_values_are_coded_in_chunks() -> None:
    values = np.random.default_rng(0).standard_normal((3, 100_000))
    levels = np.array([-1.0, 0.0, 1.0])

    expected = np.abs(values[..., None] - levels).argmin(axis=-1)

    np.testing.assert_array_equal(nearest_levels(values, levels), expected)


def test_levels_that_have_no_codes_are_refused() -> None:
    with pytest.raises(ValueError, match="257 levels"):
        nearest_levels(np.zeros(1), np.arange(257.0))
    with pytest.raises(ValueError, match="0 levels"):
        nearest_levels(np.zeros(1), np.zeros(0))
    with pytest.raises(ValueError, match="sorted"):
        nearest_levels(np.zeros(1), np.array([1.0, 0.0]))
