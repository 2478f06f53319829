"""Which entries stay and what they become: brute force and numpy's solvers are the oracles."""

from __future__ import annotations

from itertools import combinations
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt_passes.prune.entries import (
    DAMPING,
    EXACT_PRODUCTS_MAXIMUM,
    Criterion,
    Selection,
    _alternating,
    _one_by_one,
    damped,
    mask_of,
    pruned,
    refitted,
    squared_error,
    worth_of,
)
from graphopt_passes.prune.masks import Blocks, OfEach, Pattern, Unstructured

CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
PATTERNS: tuple[Pattern, ...] = (Unstructured(), OfEach(2, 4), Blocks(2, 3))
seeds = st.integers(0, 10**6)


def weight_of(rows: int, inputs: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, inputs)).astype(np.float32)


def moments_of(groups: int, inputs: int, seed: int = 1, rows: int = 400) -> np.ndarray:
    """Of inputs of different size that have much in common; float64 of shape [G, K, K]."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((groups, inputs, inputs)) + 2 * np.eye(inputs)
    read = rng.standard_normal((groups, rows, inputs)) @ mix * rng.uniform(0.2, 2, inputs)
    return damped(np.matmul(read.transpose(0, 2, 1), read) / rows, rows)


def solved(weight: np.ndarray, moments: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Row by row, by a root of the moments and numpy's least squares."""
    found = np.zeros(weight.shape)
    per_group = len(weight) // len(moments)
    for row, stays in enumerate(mask):
        root = np.linalg.cholesky(moments[row // per_group]).T
        if stays.any():
            best = np.linalg.lstsq(root[:, stays], root @ weight[row].astype(float), rcond=None)
            found[row, stays] = best[0]
    return found


# ------------------------------------------------------------------ what entries become


@settings(deadline=None, max_examples=60)
@given(seeds, st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.floats(0, 1))
def test_what_stays_is_least_squares(
    seed: int, groups: int, rows: int, inputs: int, share: float
) -> None:
    weight, moments = weight_of(groups * rows, inputs, seed), moments_of(groups, inputs, seed)
    mask = np.random.default_rng(seed + 1).random(weight.shape) < share

    found = refitted(weight, moments, mask)

    assert found.shape == weight.shape and found.dtype == weight.dtype
    assert not found[~mask].any()
    wanted = solved(weight, moments, mask)
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-3)
    assert squared_error(weight, found, moments) <= 1.001 * (
        squared_error(weight, wanted, moments) + 1e-6
    )


def test_all_entries_stay_as_they_are_and_none_is_nothing() -> None:
    weight, moments = weight_of(5, 7), moments_of(1, 7)
    np.testing.assert_array_equal(refitted(weight, moments, np.ones((5, 7), bool)), weight)
    assert not refitted(weight, moments, np.zeros((5, 7), bool)).any()


def test_float64_stays_float64() -> None:
    weight = weight_of(5, 7).astype(np.float64)
    assert pruned(weight, moments_of(1, 7), 12, Selection()).dtype == np.float64


def test_the_squared_error_is_that_of_the_outputs() -> None:
    read = np.random.default_rng(0).standard_normal((2, 50, 5))
    moments = np.matmul(read.transpose(0, 2, 1), read) / 50
    weight, other = weight_of(6, 5, 1), weight_of(6, 5, 2)
    outputs = [
        np.matmul(read, array.reshape(2, 3, 5).transpose(0, 2, 1)) for array in (weight, other)
    ]
    wanted = np.square(outputs[0] - outputs[1]).sum() / 50
    assert squared_error(weight, other, moments) == pytest.approx(wanted, rel=1e-5)
    assert squared_error(weight, weight, moments) == 0


# ------------------------------------------------------------------ which stay


def greedy(weight: np.ndarray, moments: np.ndarray, keep: int) -> np.ndarray:
    """Remove one entry after the other, solving for the rest of its row anew each time."""
    mask = np.ones(weight.shape, bool)
    per_group = len(weight) // len(moments)

    def error(row: int, stays: np.ndarray) -> float:
        own = moments[row // per_group][np.newaxis]
        one = weight[row : row + 1].astype(float)
        return squared_error(one, solved(one, own, stays[np.newaxis]), own)

    while mask.sum() > keep:
        costs = {}
        for row, entry in zip(*np.nonzero(mask), strict=True):
            fewer = mask[row].copy()
            fewer[entry] = False
            costs[row, entry] = error(row, fewer) - error(row, mask[row])
        mask[min(costs, key=lambda place: costs[place])] = False
    return mask


@pytest.mark.parametrize("seed", range(6))
def test_within_a_row_the_cheapest_goes_first(seed: int) -> None:
    """Of one row the order of removal is the greedy one, at every count."""
    weight, moments = weight_of(1, 7, seed), moments_of(1, 7, seed)
    for keep in range(8):
        found = _one_by_one(weight, moments, keep, Selection())
        np.testing.assert_array_equal(found, greedy(weight, moments, keep))


@pytest.mark.parametrize("groups", [1, 2])
def test_among_rows_it_is_near_the_greedy_choice_and_the_best(groups: int) -> None:
    """Whole rows are put in order first; the best of all masks is the oracle."""
    ratios = []
    for seed in range(8):
        weight, moments = weight_of(2, 5, seed), moments_of(groups, 5, seed)
        errors = {
            name: squared_error(weight, solved(weight, moments, mask), moments)
            for name, mask in (
                ("found", _one_by_one(weight, moments, 5, Selection())),
                ("greedy", greedy(weight, moments, 5)),
            )
        }
        best = np.inf
        for chosen in combinations(range(10), 5):
            mask = np.isin(np.arange(10), chosen).reshape(2, 5)
            best = min(best, squared_error(weight, solved(weight, moments, mask), moments))
        assert errors["found"] >= best * (1 - 1e-6)
        assert errors["found"] <= 1.5 * errors["greedy"]
        ratios.append(errors["found"] / best)
    assert np.median(ratios) < 1.1 and max(ratios) < 2


def one_shot(weight: np.ndarray, moments: np.ndarray, keep: int, criterion: Criterion) -> float:
    """The error of entries that are chosen by what each is worth, refitted."""
    mask = Selection(criterion).largest(worth_of(weight, moments, criterion), keep)
    return squared_error(weight, refitted(weight, moments, mask), moments)


@settings(deadline=None, max_examples=25)
@given(seeds, st.sampled_from([0.3, 0.5, 0.7]))
def test_alternating_is_better_than_magnitude(seed: int, share: float) -> None:
    weight, moments = weight_of(12, 24, seed), moments_of(1, 24, seed)
    keep = round(share * weight.size)
    mask = _alternating(weight, moments[0], keep, Selection())

    assert mask.sum() == keep
    found = squared_error(weight, refitted(weight, moments, mask), moments)
    assert found <= one_shot(weight, moments, keep, "magnitude")


def test_what_looks_further_loses_less() -> None:
    """On the mean over problems: magnitude, Wanda, by curvature, and one or all at once."""
    errors = np.zeros(5)
    for seed in range(10):
        weight, moments = weight_of(12, 24, seed), moments_of(1, 24, seed)
        masks = (
            _alternating(weight, moments[0], 144, Selection()),
            _one_by_one(weight, moments, 144, Selection()),
        )
        found = [one_shot(weight, moments, 144, criterion) for criterion in CRITERIA]
        found += [squared_error(weight, refitted(weight, moments, m), moments) for m in masks]
        errors += np.array(found) / found[0]
    magnitude, activations, curvature, alternating, one_by_one = errors / 10
    assert max(activations, curvature) < 0.8 * magnitude
    assert max(alternating, one_by_one) < 0.8 * min(activations, curvature)
    assert abs(alternating / one_by_one - 1) < 0.2


@pytest.mark.parametrize("criterion", CRITERIA)
def test_what_each_is_worth(criterion: Criterion) -> None:
    weight, moments = weight_of(6, 4), moments_of(2, 4)
    found = worth_of(weight, moments, criterion)
    for row, entry in np.ndindex(6, 4):
        own = moments[row // 3]
        worth = {
            "magnitude": 1.0,
            "activations": own[entry, entry] ** 0.5,
            "second-order": np.linalg.inv(own)[entry, entry] ** -0.5,
        }[criterion]
        assert found[row, entry] == pytest.approx(abs(weight[row, entry]) * worth, rel=1e-5)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_so_many_stay_in_their_pattern(criterion: Criterion, pattern: Pattern, groups: int) -> None:
    weight, moments = weight_of(8, 12), moments_of(groups, 12)
    for keep in (0, 48, 96):
        found = pruned(weight, moments, keep, Selection(criterion, pattern, taps=3))
        mask = found != 0
        if isinstance(pattern, OfEach):
            groups_of_four = mask.reshape(8, 1, 4, 3)
            np.testing.assert_array_equal(groups_of_four.sum(2), 2)
            continue
        assert mask.sum() == keep
        if isinstance(pattern, Blocks):
            blocks = mask.reshape(4, 2, 4, 3).sum((1, 3))
            assert set(blocks.ravel()) <= {0, 6}
        if keep == 96:
            np.testing.assert_array_equal(found, weight)


@pytest.mark.parametrize("size", [(8, 12), (40, 220)], ids=["one by one", "alternating"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_factors_of_one_change_no_bit(criterion: Criterion, size: tuple[int, int]) -> None:
    assert (size[0] * size[1] ** 3 <= EXACT_PRODUCTS_MAXIMUM) == (size == (8, 12))
    for dtype in (np.float32, np.float64):
        weight, moments = weight_of(*size).astype(dtype), moments_of(1, size[1])
        ones = np.ones(size, np.float32)
        for keep in (weight.size // 3, weight.size // 2):
            found = [
                pruned(weight, moments, keep, Selection(criterion, factors=factors))
                for factors in (None, ones)
            ]
            np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_what_is_sure_to_go_goes(criterion: Criterion) -> None:
    """A factor of 0 removes, a large one keeps."""
    weight, moments = weight_of(6, 10), moments_of(1, 10)
    factors = np.ones((6, 10), np.float32)
    factors[:, 2], factors[:, 5] = 0, 1e4
    mask = mask_of(weight, moments, 30, Selection(criterion, factors=factors))
    assert not mask[:, 2].any() and mask[:, 5].all()


@pytest.mark.parametrize("criterion", CRITERIA)
def test_zeros_go_first(criterion: Criterion) -> None:
    weight = weight_of(6, 10)
    zeros = np.random.default_rng(3).random((6, 10)) < 0.4
    weight[zeros] = 0
    for select in (mask_of, lambda w, m, k, s: _alternating(w, m[0], k, s)):
        mask = select(weight, moments_of(1, 10), int((~zeros).sum()), Selection(criterion))
        np.testing.assert_array_equal(mask, ~zeros)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_degenerate_weights_and_inputs_give_numbers(criterion: Criterion) -> None:
    dead = moments_of(1, 10)
    dead[:, 3] = dead[:, :, 3] = 0
    singular = np.ones((1, 10, 10))
    for raw in (np.zeros((1, 10, 10)), dead, singular, 1e12 * singular, 1e-12 * singular):
        moments = damped(raw, 100)
        for weight in (weight_of(6, 10), np.zeros((6, 10), np.float32), weight_of(6, 10) * 1e-6):
            for pattern in PATTERNS[:1] + PATTERNS[2:]:
                found = pruned(weight, moments, 30, Selection(criterion, pattern))
                assert np.isfinite(found).all()
                assert np.count_nonzero(found) <= 30


def test_inputs_that_are_never_seen_lose_their_weights_first() -> None:
    raw = moments_of(1, 10)
    raw[:, :4] = raw[:, :, :4] = 0
    mask = mask_of(weight_of(6, 10), damped(raw, 10**6), 24, Selection())
    assert not mask[:, :4].any()


# ------------------------------------------------------------------ damping


@pytest.mark.parametrize("groups", [1, 3])
def test_fewer_rows_are_damped_more(groups: int) -> None:
    raw = np.stack([(g + 1.0) * np.diag(np.arange(1.0, 6)) for g in range(groups)])
    for rows, share in ((10**6, DAMPING), (50, 0.1), (5, 1.0), (0, 5.0)):
        added = damped(raw, rows) - raw
        wanted = share * 3 * np.arange(1, groups + 1)
        np.testing.assert_allclose(added, wanted[:, None, None] * np.eye(5)[None])


def test_a_group_that_is_never_other_than_zero_is_positive_definite() -> None:
    raw = np.zeros((2, 4, 4))
    raw[1] = np.eye(4)
    found = damped(raw, 10**6)
    np.testing.assert_array_equal(found[0], np.eye(4))
    np.testing.assert_allclose(found[1], (1 + DAMPING) * np.eye(4))


def test_means_beside_which_the_variance_is_rounding_count() -> None:
    means = np.full((1, 4), 100.0)
    noise = 1e-4 * np.array([[[-1.0, 2, 0, 1], [2, 1, 3, 0], [0, 3, -2, 1], [1, 0, 1, 1]]])
    assert (np.linalg.eigvalsh(damped(noise, 1000, means)) > 0).all()
    # And do not where it is more.
    moments = moments_of(1, 4)
    np.testing.assert_array_equal(damped(moments, 1000, means / 100), damped(moments, 1000))
