"""Factors against resamples and masks that are all held at once."""

from __future__ import annotations

from itertools import combinations
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt_passes.prune.masks import Blocks, OfEach, Pattern, Unstructured
from graphopt_passes.prune.stability import (
    RESAMPLES,
    Mode,
    checkpoint_factors,
    factors,
    mask_stability,
)

MODES: tuple[Mode, ...] = get_args(Mode)
PATTERNS: tuple[Pattern, ...] = (Unstructured(), OfEach(2, 4), Blocks(2, 3))
ROWS, CHANNELS, TAPS, CHUNKS = 6, 8, 3, 5
INPUTS = CHANNELS * TAPS
KEEP = ROWS * INPUTS // 2


def weight_of(seed: int = 0) -> np.ndarray:
    weight = np.random.default_rng(seed).standard_normal((ROWS, INPUTS)).astype(np.float32)
    weight[1, 3] = weight[4, :] = 0
    return weight


def moments_of(*shape: int, seed: int = 1) -> np.ndarray:
    moments = np.random.default_rng(seed).exponential(size=shape)
    moments[..., 5] = 0
    return np.asarray(moments)


def importances_of(weight: np.ndarray, moments: np.ndarray, seed: int) -> np.ndarray:
    """Of all resamples, straight from the formula: [resamples, rows, inputs]."""
    shares = np.random.default_rng(seed).dirichlet(np.ones(len(moments)), RESAMPLES)
    resampled = np.einsum("bc,c...->b...", shares, moments)
    if moments.ndim == 2:
        resampled = resampled[:, np.newaxis, :]
    return np.asarray(np.abs(weight).astype(np.float64) * np.sqrt(resampled))


def found_factors(
    weight: np.ndarray,
    moments: np.ndarray,
    mode: Mode,
    pattern: Pattern = PATTERNS[0],
    keep: int = KEEP,
    seed: int = 3,
    kappa: float = 1.5,
) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return factors(weight, moments, keep, mode, kappa, generator, pattern, TAPS)


def found_stability(
    weight: np.ndarray,
    moments: np.ndarray,
    scaled: np.ndarray,
    pattern: Pattern = PATTERNS[0],
    keep: int = KEEP,
    seed: int = 3,
) -> float:
    generator = np.random.default_rng(seed)
    return mask_stability(weight, moments, keep, scaled, generator, pattern, TAPS)


# ------------------------------------------------------------------ where nothing differs


@given(st.integers(0, 2**31), st.integers(1, 16), st.booleans(), st.floats(1e-30, 1e30))
@settings(max_examples=25)
def test_equal_chunks_change_nothing_to_the_last_bit(
    seed: int, chunks: int, by_row: bool, scale: float
) -> None:
    weight = weight_of(seed)
    moments = moments_of(*((ROWS, INPUTS) if by_row else (INPUTS,)), seed=seed) * scale
    equal = np.repeat(moments[np.newaxis], chunks, axis=0)

    for mode in MODES:
        for pattern in PATTERNS:
            # So many deviations would show one of a single bit of a float64.
            found = found_factors(weight, equal, mode, pattern, seed=seed, kappa=1e20)
            assert found.dtype == np.float32 and found.shape == weight.shape
            assert (found == 1).all()
    ones = np.ones(weight.shape, np.float32)
    assert found_stability(weight, equal, ones, seed=seed) == 1


@pytest.mark.parametrize("mode", MODES)
def test_a_single_chunk_or_none_changes_nothing(mode: Mode) -> None:
    weight = weight_of()

    assert (found_factors(weight, moments_of(1, INPUTS), mode) == 1).all()
    assert (found_factors(weight, np.zeros((0, INPUTS)), mode) == 1).all()
    assert found_stability(weight, np.zeros((0, INPUTS)), np.ones_like(weight)) == 1


@pytest.mark.parametrize("mode", MODES)
def test_inputs_that_are_always_zero_change_nothing(mode: Mode) -> None:
    assert (found_factors(weight_of(), np.zeros((CHUNKS, INPUTS)), mode) == 1).all()


@pytest.mark.parametrize("mode", MODES)
def test_weights_that_are_zero_have_finite_factors(mode: Mode) -> None:
    zeros = np.zeros((ROWS, INPUTS), np.float32)

    found = found_factors(zeros, moments_of(CHUNKS, INPUTS), mode)

    assert np.isfinite(found).all()
    # The bound is relative to the mean, from which the magnitude cancels.
    assert (found == 1).all() or mode == "keep-uncertain"


def test_equal_checkpoints_change_nothing_to_the_last_bit() -> None:
    weight = weight_of() * np.float32(0.1)

    for count in (2, 3, 7):
        found = checkpoint_factors(np.repeat(weight[np.newaxis], count, axis=0))
        assert found.dtype == np.float32
        assert (found == 1).all()


def test_only_entries_that_differ_between_checkpoints_change() -> None:
    weight = weight_of()
    other = weight.copy()
    other[0, 0] *= np.float32(1.01)

    changed = checkpoint_factors(np.stack([weight, other, weight])) != 1

    assert np.argwhere(changed).tolist() == [[0, 0]]


# ------------------------------------------------------------------ against explicit resamples


@pytest.fixture(params=["shared", "by row"])
def moments(request: pytest.FixtureRequest) -> np.ndarray:
    return (
        moments_of(CHUNKS, INPUTS)
        if request.param == "shared"
        else moments_of(CHUNKS, ROWS, INPUTS)
    )


def test_stability_is_in_proportion_to_the_mean_over_the_deviation(moments: np.ndarray) -> None:
    weight = weight_of()

    found = found_factors(weight, moments, "stability")

    importances = importances_of(weight, moments, seed=3)
    mean, deviation = importances.mean(axis=0), importances.std(axis=0)
    usual = np.median(mean[mean > 0])
    np.testing.assert_allclose(mean * found / usual, mean / (deviation + usual), rtol=1e-6)
    assert found.max() == 1 and found.min() < 0.9


def test_keep_uncertain_is_an_upper_confidence_bound(moments: np.ndarray) -> None:
    weight = weight_of()

    found = found_factors(weight, moments, "keep-uncertain")

    importances = importances_of(weight, moments, seed=3)
    mean, deviation = importances.mean(axis=0), importances.std(axis=0)
    np.testing.assert_allclose(mean * found, mean + 1.5 * deviation, rtol=1e-6)
    assert (found[:, 5] == 1).all()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_selection_is_the_frequency_in_masks(pattern: Pattern, moments: np.ndarray) -> None:
    weight = weight_of()

    found = found_factors(weight, moments, "selection", pattern)

    importances = importances_of(weight, moments, seed=3)
    masks = np.stack([pattern.largest(i, KEEP, TAPS) for i in importances])
    usual = pattern.largest(importances.mean(axis=0), KEEP, TAPS)
    np.testing.assert_array_equal(found, np.float32(1 + masks.mean(axis=0) - usual))
    assert len(np.unique(found)) > 3


@pytest.mark.parametrize("pattern", [*PATTERNS, Blocks(4, 5)], ids=str)
def test_mask_stability_is_the_index_of_pairs_of_masks(
    pattern: Pattern, moments: np.ndarray
) -> None:
    weight = weight_of()
    scaled = np.random.default_rng(5).uniform(0.5, 2, weight.shape).astype(np.float32)

    found = found_stability(weight, moments, scaled, pattern)

    importances = importances_of(weight, moments, seed=3) * scaled
    masks = [pattern.largest(i, KEEP, TAPS) for i in importances]
    both = [np.count_nonzero(a & b) for a, b in combinations(masks, 2)]
    either = [np.count_nonzero(a | b) for a, b in combinations(masks, 2)]
    assert found == pytest.approx(np.mean(both) / np.mean(either), rel=1e-12)
    # Close to the mean of the ratios, which is what the index is called by.
    assert found == pytest.approx(np.mean(np.divide(both, either)), abs=0.03)
    assert 0.3 < found < 1


def test_masks_of_nothing_or_of_all_are_the_same() -> None:
    weight, moments = weight_of(), moments_of(CHUNKS, INPUTS)
    ones = np.ones_like(weight)

    assert found_stability(weight, moments, ones, keep=0) == 1
    assert found_stability(weight, moments, ones, keep=weight.size) == 1


@given(st.integers(0, 2**31), st.integers(2, 5))
@settings(max_examples=25)
def test_checkpoint_factors_are_those_of_the_formula(seed: int, count: int) -> None:
    generator = np.random.default_rng(seed)
    checkpoints = generator.standard_normal((count, 4, 5)).astype(np.float32)
    checkpoints[:, 1] = np.abs(checkpoints[:, 1])
    checkpoints[:, 2] = 0

    found = checkpoint_factors(checkpoints)

    exact = checkpoints.astype(np.float64)
    mean, deviation = exact.mean(axis=0), exact.std(axis=0)
    usual = np.median(np.abs(mean)[mean != 0])
    agreeing = (np.sign(exact) == np.sign(mean)).mean(axis=0)
    np.testing.assert_allclose(found, usual / (deviation + usual) * agreeing, rtol=1e-6)
    assert (found[2] == 1).all()


def test_a_sign_that_checkpoints_do_not_agree_on_counts_for_less() -> None:
    same = np.array([[[1.0, 3.0]], [[3.0, 3.0]], [[2.0, 3.0]], [[2.0, 3.0]]])
    turned = same - np.array([[[1.5, 0.0]]])

    # The deviation is the same, and e is the median of two means: of 2 and 3, then of 0.5 and 3.
    first, second = checkpoint_factors(same)[0, 0], checkpoint_factors(turned)[0, 0]
    deviation = np.sqrt(0.5)
    assert first == pytest.approx(2.5 / (2.5 + deviation))
    assert second == pytest.approx(1.75 / (1.75 + deviation) * 0.75)


# ------------------------------------------------------------------ what it is for


def rare_input() -> tuple[np.ndarray, np.ndarray]:
    """Input 0 occurs in one chunk only; its moment over all is that of the others."""
    moments = np.ones((CHUNKS, INPUTS))
    moments[:, 0] = 0
    moments[2, 0] = CHUNKS
    return np.ones((ROWS, INPUTS), np.float32), moments


def test_an_input_of_one_chunk_is_demoted_by_stability_and_promoted_by_keep_uncertain() -> None:
    weight, moments = rare_input()

    demoted = found_factors(weight, moments, "stability")
    promoted = found_factors(weight, moments, "keep-uncertain")

    assert (demoted[:, 0] < 0.8).all() and (demoted[:, 1:] == 1).all()
    assert (promoted[:, 0] > 1.3).all() and (promoted[:, 1:] == 1).all()


def test_masks_are_less_alike_where_an_input_occurs_in_one_chunk() -> None:
    weight, moments = rare_input()
    ones = np.ones_like(weight)
    keep = weight.size - ROWS // 2

    # Some resamples have it in, by more than is kept of the others, and some have it out.
    assert found_stability(weight, moments, ones, keep=keep) < 1
    assert found_stability(weight[:, 1:], moments[:, 1:], ones[:, 1:], keep=keep - ROWS) == 1


def test_the_same_seed_gives_the_same_factors_and_another_gives_others() -> None:
    weight, moments = weight_of(), moments_of(CHUNKS, INPUTS)

    for mode in MODES:
        first = found_factors(weight, moments, mode)
        np.testing.assert_array_equal(first, found_factors(weight, moments, mode))
        assert (first != found_factors(weight, moments, mode, seed=4)).any()
