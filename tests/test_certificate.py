"""Bounds hold on data whose mean is known, and are not much wider than they need be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from scipy.special import rel_entr
from scipy.stats import binom, norm

from graphopt.certificate import (
    ITEMS_MAXIMUM,
    betting_upper_bound,
    certified_prefix,
    exact_upper_bound,
    fewest_items,
    p_value,
    paired_standard_error,
    upper_bound,
)

Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]


def _flips(better: float, worse: float) -> Draw:
    chances = [better, 1 - better - worse, worse]
    return lambda generator, shape: generator.choice([-1.0, 0.0, 1.0], shape, p=chances)


def _rare(chance: float, loss: float = 1.0) -> Draw:
    return lambda generator, shape: (generator.random(shape) < chance) * loss


DISTRIBUTIONS: dict[str, tuple[Draw, float, float, float]] = {
    # How values are drawn, their true mean, and their bounds.
    "rare losses of 1": (_rare(0.01), 0.01, 0, 1),
    "rarer losses of 1": (_rare(0.002), 0.002, 0, 1),
    "a coin": (_rare(0.5), 0.5, 0, 1),
    "rare losses of a half": (_rare(0.02, 0.5), 0.01, 0, 1),
    "flips both ways": (_flips(0.05, 0.05), 0, -1, 1),
    "flips, some more for the worse": (_flips(0.01, 0.03), 0.02, -1, 1),
    "flips of points": (lambda g, s: 100 * _flips(0.02, 0.04)(g, s), 2, -100, 100),
    "heavy ties": (lambda g, s: g.integers(0, 3, s) / 4, 0.25, 0, 1),
    "uniform": (lambda g, s: g.random(s), 0.5, 0, 1),
    "beta, most near 0": (lambda g, s: g.beta(0.1, 2, s), 0.1 / 2.1, 0, 1),
    "all but sure": (lambda g, s: 1 - _rare(0.01)(g, s), 0.99, 0, 1),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("count, sets", [(20, 2000), (300, 2000), (5000, 250)])
def test_the_mean_is_above_the_bound_at_most_as_often_as_allowed(
    name: str, count: int, sets: int
) -> None:
    draw, mean, lower, upper = DISTRIBUTIONS[name]
    values = draw(np.random.default_rng(count), (sets, count))

    p_values = np.array([p_value(row, mean, lower, upper) for row in values])

    for delta in (0.01, 0.05, 0.1):
        # p <= delta is what the bound at delta being below the mean is; a test of that is below.
        assert (p_values <= delta).sum() <= binom.ppf(1 - 1e-6, sets, delta)


def test_a_bound_that_does_not_hold_is_found_out() -> None:
    """What the test above would say of the bound by the central limit theorem."""
    values = _rare(0.01)(np.random.default_rng(0), (2000, 300))
    errors = values.std(1, ddof=1) / math.sqrt(300)

    missed = (values.mean(1) + norm.ppf(0.95) * errors < 0.01).sum()

    assert missed > binom.ppf(1 - 1e-6, 2000, 0.05)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("delta", [0.01, 0.2])
def test_p_values_and_bounds_say_the_same(name: str, delta: float) -> None:
    draw, _, lower, upper = DISTRIBUTIONS[name]
    width = upper - lower
    for row in draw(np.random.default_rng(7), (5, 200)):
        bound = betting_upper_bound(row, lower, upper, delta)

        assert row.mean() <= bound <= upper
        assert p_value(row, max(lower, bound - 1e-9 * width), lower, upper) > delta * (1 - 1e-6)
        if bound < upper:
            assert p_value(row, bound + 1e-9 * width, lower, upper) <= delta


def test_p_values_fall_as_the_limit_rises() -> None:
    row = _flips(0.1, 0.2)(np.random.default_rng(1), (1, 400))[0]
    limits = np.linspace(-0.2, 1, 200)

    found = [p_value(row, limit, -1, 1) for limit in limits]

    assert found == sorted(found, reverse=True)
    assert found[0] == 1
    assert found[-1] == 0


# ------------------------------------------------------------------ tightness


def _hoeffding_bentkus(values: np.ndarray, lower: float, upper: float, delta: float) -> float:
    """The bound of Bates et al. 2021 (arXiv 2101.02703), by bisection of its p-value."""
    losses = (values - lower) / (upper - lower)
    count, mean = len(losses), float(losses.mean())

    def chance(limit: float) -> float:
        entropy = rel_entr(mean, limit) + rel_entr(1 - mean, 1 - limit)
        bentkus = math.e * binom.cdf(math.ceil(count * mean - 1e-9), count, limit)
        return min(1.0, math.exp(-count * entropy), float(bentkus))

    low, high = mean, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if chance(middle) <= delta else (middle, high)
    return lower + high * (upper - lower)


@pytest.mark.parametrize(
    "draw, lower, factor",
    [
        (_flips(0.01, 0.01), -1, 0.4),
        (_flips(0.03, 0.04), -1, 0.5),
        (lambda g, s: (g.random(s) < 0.05) * g.random(s) * 0.5, 0, 0.75),
        (lambda g, s: g.beta(2, 5, s), 0, 0.5),
        # Where all is 0 or 1 nothing is to be gained from the variance.
        (_rare(0.01), 0, 1.3),
    ],
)
@pytest.mark.parametrize("count", [300, 2000])
def test_it_is_tighter_than_hoeffding_and_bentkus_where_few_items_change(
    draw: Draw, lower: float, factor: float, count: int
) -> None:
    rows = draw(np.random.default_rng(3), (20, count))
    by_betting = [betting_upper_bound(r, lower, 1, 0.05) - r.mean() for r in rows]
    by_others = [_hoeffding_bentkus(r, lower, 1, 0.05) - r.mean() for r in rows]

    assert np.mean(by_betting) <= factor * np.mean(by_others)


def test_the_width_is_near_that_of_the_normal_distribution() -> None:
    rows = _flips(0.05, 0.05)(np.random.default_rng(3), (10, 5000))
    widths = [betting_upper_bound(r, -1, 1, 0.05) - r.mean() for r in rows]

    assert np.mean(widths) <= 1.6 * norm.ppf(0.95) * math.sqrt(0.1 / 5000)


# ------------------------------------------------------------------ how many items


@pytest.mark.parametrize("limit", [0.3, 0.05, 0.01, 0.002])
@pytest.mark.parametrize("delta", [0.01, 0.05, 0.1])
@pytest.mark.parametrize("lower", [0.0, -1.0])
def test_the_fewest_items_are_just_enough(limit: float, delta: float, lower: float) -> None:
    count = fewest_items(limit, delta, lower, 1)

    assert betting_upper_bound(np.zeros(count), lower, 1, delta) <= limit
    assert betting_upper_bound(np.zeros(count - 1), lower, 1, delta) > limit
    # No test whatever can do with fewer than the first (a loss of 1 of that chance may be missed).
    least = math.log(delta) / math.log1p(-limit)
    assert least <= count <= 1.16 * least + 3


def test_binary_items_take_the_fewest_that_there_can_be() -> None:
    assert fewest_items(0.01, 0.05, 0, 1, binary=True) == 299
    assert exact_upper_bound(np.zeros(299), 0.05) <= 0.01 < exact_upper_bound(np.zeros(298), 0.05)


def test_the_unit_does_not_matter() -> None:
    row = _flips(0.02, 0.03)(np.random.default_rng(2), (1, 500))[0]

    assert fewest_items(1, 0.05, -100, 100) == fewest_items(0.01, 0.05, -1, 1)
    assert betting_upper_bound(100 * row, -100, 100, 0.05) == pytest.approx(
        100 * betting_upper_bound(row, -1, 1, 0.05)
    )


def test_a_limit_above_everything_takes_no_items() -> None:
    assert fewest_items(2, 0.05, 0, 1) == 0
    assert fewest_items(1, 0.05, 0, 1) == 1


@pytest.mark.parametrize("limit", [0, -0.1, 1e-12, 1e-300])
def test_no_number_of_items_proves_that_nothing_is_lost(limit: float) -> None:
    with pytest.raises(ValueError, match=r"never prove|more than"):
        fewest_items(limit, 0.05, 0, 1)
    assert ITEMS_MAXIMUM > 1_000_000


# ------------------------------------------------------------------ values that are 0 or 1


@pytest.mark.parametrize("count, ones", [(1, 0), (1, 1), (20, 0), (20, 3), (300, 1), (50, 50)])
def test_the_exact_bound_solves_the_equation_of_the_binomial_distribution(
    count: int, ones: int
) -> None:
    values = np.array([1] * ones + [0] * (count - ones))
    bound = exact_upper_bound(values, 0.05)

    if ones == count:
        assert bound == 1
    else:
        assert binom.cdf(ones, count, bound) == pytest.approx(0.05)
        assert p_value(values, bound, 0, 1, binary=True) == pytest.approx(0.05)
        assert bound <= betting_upper_bound(values, 0, 1, 0.05)
    assert upper_bound(100.0 * values, 0, 100, 0.05, binary=True) == pytest.approx(100 * bound)


def test_it_is_not_taken_because_values_happen_to_be_0_or_1() -> None:
    zeros = np.zeros(100)

    assert upper_bound(zeros, 0, 1, 0.05) == betting_upper_bound(zeros, 0, 1, 0.05)
    assert upper_bound(zeros, 0, 1, 0.05) > upper_bound(zeros, 0, 1, 0.05, binary=True)


# ------------------------------------------------------------------ several points


def test_a_sequence_ends_at_the_first_that_fails_and_reads_no_further() -> None:
    def points() -> Iterator[np.ndarray]:
        yield np.zeros(400)
        yield np.zeros(400)
        yield np.full(400, 0.02)
        raise AssertionError("it was looked at, although one before it had failed")

    assert certified_prefix(points(), 0.01, 0.05, 0, 1) == 2
    assert certified_prefix([], 0.01, 0.05, 0, 1) == 0


def test_one_bad_point_is_certified_at_most_as_often_as_allowed() -> None:
    """With points that get worse step by step, of the same items, as a search gives them."""
    generator, limit, sets = np.random.default_rng(5), 0.02, 2000
    chances = [0.002, 0.01, 0.02, 0.03, 0.05]
    wrong = 0
    for _ in range(sets):
        items = generator.random(400)
        certified = certified_prefix(((items < c) * 1.0 for c in chances), limit, 0.1, 0, 1)
        wrong += certified > 2

    assert 0 < wrong <= binom.ppf(1 - 1e-6, sets, 0.1)


# ------------------------------------------------------------------ edges


def test_no_items_prove_nothing() -> None:
    none = np.zeros(0)

    assert betting_upper_bound(none, -1, 1, 0.05) == 1
    assert exact_upper_bound(none, 0.05) == 1
    assert p_value(none, 0.5, 0, 1) == p_value(none, 1, 0, 1) == 1


def test_values_that_are_all_as_bad_as_can_be() -> None:
    ones = np.ones(50)

    assert betting_upper_bound(ones, 0, 1, 0.05) == 1
    assert p_value(ones, 1, 0, 1) == 1


@pytest.mark.parametrize("bad", [1.5, -0.1, math.nan, math.inf])
def test_values_outside_their_bounds_are_refused(bad: float) -> None:
    values = np.array([0.0, bad, 0.5])

    with pytest.raises(ValueError, match="leave their bounds"):
        betting_upper_bound(values, 0, 1, 0.05)
    with pytest.raises(ValueError, match="leave their bounds"):
        p_value(values, 0.5, 0, 1)
    with pytest.raises(ValueError, match="other than 0 and 1"):
        exact_upper_bound(values, 0.05)


def test_bounds_deltas_and_limits_out_of_range_are_refused() -> None:
    for lower, upper in [(1, 1), (1, 0), (0, math.inf), (-math.inf, 0), (math.nan, 1)]:
        with pytest.raises(ValueError, match="bounds"):
            betting_upper_bound(np.zeros(3), lower, upper, 0.05)
    for delta in (0, 1, -1, math.nan):
        with pytest.raises(ValueError, match="delta"):
            betting_upper_bound(np.zeros(3), 0, 1, delta)
    with pytest.raises(ValueError, match="limit"):
        p_value(np.zeros(3), 1.5, 0, 1)


def test_values_are_not_changed() -> None:
    values = np.linspace(0, 1, 9)
    values.flags.writeable = False

    betting_upper_bound(values, 0, 1, 0.05)


def test_the_standard_error_is_that_of_the_differences() -> None:
    generator = np.random.default_rng(0)
    first = generator.standard_normal(50)
    second = first + 0.1 * generator.standard_normal(50)

    found = paired_standard_error(first, second)

    assert found == pytest.approx(np.sqrt(np.var(first - second, ddof=1) / 50))
    assert paired_standard_error(np.ones(1), np.ones(1)) == math.inf
