"""Half-quadratic scales: the step against brute force, and what they are for."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt_passes.quantize.codebooks import nearest
from graphopt_passes.quantize.hqq import POWER, half_quadratic_scales, shrink
from graphopt_passes.quantize.integer_weights import largest_scales, searched_scales

LEVELS = np.arange(-8, 8, dtype=np.float32)


def heavy(seed: int, rows: int = 64, inputs: int = 64) -> np.ndarray:
    """Numbers of Student's t with 3 degrees of freedom: a few are far larger than the rest."""
    rng = np.random.default_rng(seed)
    return (0.02 * rng.standard_t(3, (rows, inputs))).astype(np.float32)


def rounded(rows: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return np.asarray(LEVELS[nearest(rows / scales, LEVELS)] * scales)


def sums(rows: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return np.asarray(np.power(np.abs(rounded(rows, scales) - rows), POWER).sum(axis=1))


def test_shrink_of_absolute_errors_is_soft_thresholding() -> None:
    errors = np.linspace(-2, 2, 401)
    grid = np.linspace(-2, 2, 8001)

    costs = np.abs(grid) + 4.0 / 2 * np.square(grid - errors[:, np.newaxis])

    assert np.abs(shrink(errors, 4.0, 1.0) - grid[costs.argmin(axis=1)]).max() < 1e-3


def test_shrink_leaves_large_errors_and_takes_small_ones_to_zero() -> None:
    errors = np.array([-10.0, -0.05, 0.0, 0.05, 10.0])

    found = shrink(errors, 10.0)

    assert np.all(found[1:4] == 0)
    assert np.abs(found[[0, 4]] - errors[[0, 4]]).max() < 0.06


@pytest.mark.parametrize("seed", range(3))
def test_no_row_gets_worse_and_all_together_better(seed: int) -> None:
    rows = heavy(seed)
    before = largest_scales(rows, LEVELS)

    scales = half_quadratic_scales(rows, LEVELS, before)

    assert scales.shape == (64, 1)
    assert np.all(sums(rows, scales) <= sums(rows, before) * (1 + 1e-4))
    assert sums(rows, scales).sum() < 0.99 * sums(rows, before).sum()


@pytest.mark.parametrize("seed", range(3))
def test_where_tails_are_heavy_it_beats_nearest_without_data(seed: int) -> None:
    """From scales of the least squared error, as quantize-weights starts."""
    rows = heavy(seed)
    before = largest_scales(rows, LEVELS)
    start = searched_scales(rows, LEVELS, before, np.ones_like(rows))

    scales = half_quadratic_scales(rows, LEVELS, start)

    squares = [float(np.square(rounded(rows, s) - rows).sum()) for s in (before, scales)]
    assert squares[1] < 0.95 * squares[0]
    assert sums(rows, scales).sum() < 0.98 * sums(rows, before).sum()


def test_signs_stay_and_nothing_is_divided_by_zero() -> None:
    rows = np.concatenate([heavy(1, rows=2), np.zeros((1, 64), np.float32)])
    before = np.float32([[0.01], [-0.01], [1.0]])

    scales = half_quadratic_scales(rows, LEVELS, before)

    assert np.all(np.sign(scales) == np.sign(before))
    assert np.isfinite(scales).all()
    assert not rounded(rows, scales)[2].any()


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_scales_follow_the_unit_of_the_numbers(factor: float) -> None:
    rows = heavy(3)
    before = largest_scales(rows, LEVELS)
    scales = half_quadratic_scales(rows, LEVELS, before)
    much = np.float32(factor)

    assert np.allclose(
        half_quadratic_scales(rows * much, LEVELS, before * much), scales * much, rtol=1e-3
    )
