"""Codes that change a layer's outputs least, against brute force and plain rounding."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from graphopt_passes.quantize.codebooks import (
    Rounded,
    damped,
    descend,
    feedback,
    fit,
    nearest,
    refit_levels,
    refit_scales,
    spread_blocks,
    squared_error,
)
from graphopt_passes.quantize.kmeans import optimal_levels


def correlated_gram(inputs: int, seed: int = 0) -> np.ndarray:
    """Second moments of inputs that move together, [inputs, inputs]."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(4 * inputs, max(inputs // 3, 1))) @ rng.normal(
        size=(max(inputs // 3, 1), inputs)
    )
    rows = mixed + 0.3 * rng.normal(size=mixed.shape)
    return (rows.T @ rows / len(rows)).astype(np.float32)


def weight_of(rows: int, inputs: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).laplace(size=(rows, inputs)).astype(np.float32)


def start(weight: np.ndarray, count: int, blocks: int = 1) -> Rounded:
    parts = weight.reshape(len(weight), blocks, -1)
    scales = np.sqrt(np.mean(np.square(parts), axis=2)).astype(np.float32)
    scaled = weight / spread_blocks(scales, weight.shape[1])
    levels = optimal_levels(scaled, None, count).astype(np.float32)
    return Rounded(nearest(scaled, levels), levels, scales)


def decibels(weight: np.ndarray, rounded: Rounded, gram: np.ndarray) -> float:
    power = squared_error(np.zeros_like(weight), weight, gram)
    return 10 * float(np.log10(power / squared_error(weight, rounded.numbers(), gram)))


def test_each_step_is_closer_by_decibels() -> None:
    weight, gram = weight_of(32, 96), correlated_gram(96)
    near = start(weight, 16)
    fed = Rounded(
        feedback(weight, near.levels, near.scales, damped(gram)), near.levels, near.scales
    )
    descended = descend(weight, fed, damped(gram))
    fitted = fit(weight, near, gram)

    steps = [decibels(weight, r, gram) for r in (near, fed, descended, fitted)]

    assert steps[1] > steps[0] + 5
    assert steps[2] > steps[1] + 1
    assert steps[3] > steps[2] + 0.2


@pytest.mark.parametrize("seed", range(5))
def test_no_sweep_is_farther_off(seed: int) -> None:
    weight, gram = weight_of(8, 24, seed), damped(correlated_gram(24, seed))
    now = start(weight, 6)
    errors = [squared_error(weight, now.numbers(), gram)]
    for _ in range(4):
        now = descend(weight, now, gram, sweeps=1)
        errors.append(squared_error(weight, now.numbers(), gram))

    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


def test_where_no_single_code_can_improve_nothing_moves() -> None:
    weight, gram = weight_of(3, 7, 1), damped(correlated_gram(7, 1))
    done = descend(weight, start(weight, 3), gram, sweeps=50)

    for row, column, code in product(range(3), range(7), range(3)):
        codes = done.codes.copy()
        codes[row, column] = code
        other = Rounded(codes, done.levels, done.scales)
        best = squared_error(weight, done.numbers(), gram)
        assert squared_error(weight, other.numbers(), gram) >= best * (1 - 1e-4)


def test_a_small_problem_is_nearly_the_best_of_all() -> None:
    """Of all 3^6 codes of a row."""
    weight, gram = weight_of(20, 6, 2), correlated_gram(6, 2)
    levels = np.array([-1, 0, 1], np.float32)
    scales = np.ones((20, 1), np.float32)
    every = levels[np.array(list(product(range(3), repeat=6)))]
    found = fit(
        weight, Rounded(np.zeros((20, 6), np.uint8), levels, scales), gram, False, False
    ).numbers()
    best = mine = 0.0
    for row, numbers in zip(weight, found, strict=True):
        changes = every - row
        best += float(np.einsum("nk,kl,nl->n", changes, gram, changes).min())
        mine += squared_error(row[None], numbers[None], gram)

    assert mine <= 1.2 * best
    near = levels[nearest(weight, levels)]
    assert squared_error(weight, near, gram) > 2 * best


def test_levels_are_the_least_squares_of_their_codes() -> None:
    weight, gram = weight_of(12, 20, 3), damped(correlated_gram(20, 3))
    before = start(weight, 5)

    after = refit_levels(weight, before, gram)

    basis = np.stack(
        [(before.codes == code) * before.scales for code in range(5)], axis=-1
    )  # [N, K, levels]
    matrix = np.einsum("nka,kl,nlb->ab", basis, gram, basis)
    wanted = np.linalg.solve(matrix, np.einsum("nka,kl,nl->a", basis, gram, weight))
    np.testing.assert_allclose(after.levels, np.sort(wanted), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("blocks", [1, 4])
def test_no_scale_could_be_better(blocks: int) -> None:
    weight, gram = weight_of(6, 16, 4), damped(correlated_gram(16, 4))
    now = start(weight, 4, blocks)
    for _ in range(200):
        now = refit_scales(weight, now, gram)
    best = squared_error(weight, now.numbers(), gram)

    for row, block, factor in product(range(6), range(blocks), (0.9, 1.1)):
        scales = now.scales.copy()
        if scales[row, block] < 0.05:
            continue  # It would be negative, and is kept from that.
        scales[row, block] *= factor
        assert squared_error(weight, Rounded(now.codes, now.levels, scales).numbers(), gram) > best


def test_rows_with_a_gram_of_their_own_are_rounded_each_alone() -> None:
    weight = weight_of(5, 9, 5)
    grams = np.stack([correlated_gram(9, seed) for seed in range(5)])
    before = start(weight, 4)

    together = fit(weight, before, grams, learns_levels=False)

    for row in range(5):
        alone = Rounded(before.codes[row : row + 1], before.levels, before.scales[row : row + 1])
        one = fit(weight[row : row + 1], alone, grams[row : row + 1], learns_levels=False)
        np.testing.assert_array_equal(one.codes[0], together.codes[row])


def test_pruned_weights_stay_zero() -> None:
    weight, gram = weight_of(16, 32, 6), correlated_gram(32, 6)
    weight[np.abs(weight) < 0.7] = 0
    scaled = start(weight, 8)
    levels = optimal_levels(weight / scaled.scales, None, 8, zero=True).astype(np.float32)

    found = fit(weight, Rounded(scaled.codes, levels, scaled.scales), gram, keeps_zeros=True)

    assert (found.numbers()[weight == 0] == 0).all()
    assert (found.levels == 0).sum() == 1


def test_without_a_gram_codes_are_the_nearest() -> None:
    weight = weight_of(4, 50, 7)
    found = fit(weight, start(weight, 8), None)

    spread = spread_blocks(found.scales, 50)
    apart = np.abs(weight[..., None] - found.levels * spread[..., None])
    np.testing.assert_allclose(np.abs(weight - found.numbers()), apart.min(-1), atol=1e-3)
    assert squared_error(weight, found.numbers(), None) <= squared_error(
        weight, start(weight, 8).numbers(), None
    ) * (1 + 1e-6)


def test_an_input_that_is_always_zero_may_have_any_code() -> None:
    gram = np.zeros((8, 8), np.float32)
    weight = weight_of(3, 8, 8)
    assert np.isfinite(fit(weight, start(weight, 4), gram).numbers()).all()


def test_stored_scales_are_those_that_codes_are_made_for() -> None:
    weight, gram = weight_of(8, 32, 9), correlated_gram(32, 9)
    before = start(weight, 8)
    half = Rounded(before.codes, before.levels, before.scales.astype(np.float16))

    found = fit(weight, half, gram)

    assert found.scales.dtype == np.float16
    assert decibels(weight, found, gram) > decibels(weight, fit(weight, before, gram), gram) - 0.1
