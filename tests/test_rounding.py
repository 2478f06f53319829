"""Rounding weights against Gram matrices: brute force where it is small, laws where it is not."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt_passes.quantize.rounding import (
    SHRINKS,
    asymmetric_target,
    dequantize,
    descend,
    enumerate_exactly,
    output_error,
    relative_output_error,
    round_nearest,
    round_to_gram,
    scales_of,
    search_scales,
)

seeds = st.integers(0, 2**32 - 1)


def weights_and_gram(
    seed: int, rows: int, width: int, own: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Heavy-tailed weights, and the Gram of inputs that are correlated and not centred."""
    generator = np.random.default_rng(seed)
    weight = generator.standard_t(4, (rows, width))
    shape = (rows,) if own else ()
    inputs = generator.standard_normal((*shape, 3 * width, width)) + 0.5
    inputs = inputs @ generator.standard_normal((*shape, width, width))
    return weight, np.swapaxes(inputs, -1, -2) @ inputs / inputs.shape[-2]


def error(codes: np.ndarray, weight: np.ndarray, scale: np.ndarray, gram: np.ndarray) -> np.ndarray:
    return output_error(weight, dequantize(codes, scale), gram)


# ------------------------------------------------------------------ scales and nearest codes


def test_codes_are_the_nearest_and_clipped() -> None:
    weight = np.array([[0.5, 1.5, -2.5, 200.0, -200.0, 0.0]])

    assert round_nearest(weight, np.ones(1)).tolist() == [[0, 2, -2, 127, -127, 0]]
    assert round_nearest(weight, np.ones(1), -8, 7).tolist() == [[0, 2, -2, 7, -8, 0]]
    assert round_nearest(weight.astype(np.float32), np.ones(1)).dtype == np.int8


@settings(deadline=None)
@given(seeds, st.sampled_from([7, 127]))
def test_unshrunk_scales_clip_nothing_and_use_the_largest_code(seed: int, high: int) -> None:
    weight, _ = weights_and_gram(seed, 5, 7)

    scale = scales_of(weight, high)
    codes = round_nearest(weight, scale, -high, high)

    assert (np.abs(codes).max(axis=1) == high).all()
    assert (np.abs(dequantize(codes, scale) - weight) <= 0.5001 * scale[:, None]).all()
    assert (scale == scale.astype(np.float32)).all()


def test_shrunk_scales() -> None:
    weight = np.array([[127.0, -3.0], [1.0, -254.0]], np.float32)

    assert scales_of(weight).tolist() == [1.0, 2.0]
    assert scales_of(weight, shrink=0.5).tolist() == [0.5, 1.0]
    assert scales_of(weight, floor=1.5).tolist() == [1.5, 2.0]
    assert scales_of(weight, floor=np.array([0.25, 4.0])).tolist() == [1.0, 4.0]


def test_rows_without_weights_get_the_largest_of_the_other_scales() -> None:
    weight = np.array([[0.0, 0.0], [127.0, 1.0], [1e-40, 0.0], [254.0, 0.0]])

    assert scales_of(weight).tolist() == [2.0, 1.0, 2.0, 2.0]
    assert scales_of(np.zeros((2, 3))).tolist() == [1.0, 1.0]
    assert scales_of(np.zeros((2, 0))).tolist() == [1.0, 1.0]


def test_weights_that_are_not_finite_have_no_scale() -> None:
    with pytest.raises(ValueError, match="finite"):
        scales_of(np.array([[1.0, np.nan]]))


@pytest.mark.parametrize("own", [False, True])
def test_searched_scales_are_the_best_of_those_tried(own: bool) -> None:
    weight, gram = weights_and_gram(1, 6, 9, own)

    found = search_scales(weight, gram, 7)

    tried = np.array([scales_of(weight, 7, shrink) for shrink in SHRINKS])
    errors = [error(round_nearest(weight, s, -7, 7), weight, s, gram) for s in tried]
    assert (found == tried[np.argmin(errors, axis=0), np.arange(len(weight))]).all()
    assert len(set(np.argmin(errors, axis=0).tolist())) > 2, "not all rows want the same"


def test_what_makes_no_difference_is_not_shrunk() -> None:
    weight, gram = weights_and_gram(2, 3, 5)

    assert (search_scales(weight, 0.0 * gram) == scales_of(weight)).all()


# ------------------------------------------------------------------ what a rounding costs


def test_output_error_is_the_mean_square_over_inputs() -> None:
    generator = np.random.default_rng(3)
    weight, quantized = generator.standard_normal((2, 4, 6))
    inputs = generator.standard_normal((50, 6))
    gram = inputs.T @ inputs / 50

    expected = np.mean((inputs @ (quantized - weight).T) ** 2, axis=0)
    power = np.mean((inputs @ weight.T) ** 2, axis=0)

    np.testing.assert_allclose(output_error(weight, quantized, gram), expected)
    grams = np.broadcast_to(gram, (4, 6, 6))
    np.testing.assert_allclose(output_error(weight, quantized, grams), expected)
    np.testing.assert_allclose(relative_output_error(weight, quantized, gram), expected / power)


def test_relative_error_of_no_output() -> None:
    weight, quantized = np.zeros((2, 3)), np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])

    assert relative_output_error(weight, quantized, np.eye(3)).tolist() == [0.0, np.inf]


# ------------------------------------------------------------------ coordinate descent


def cyclic(
    weight: np.ndarray, scale: np.ndarray, gram: np.ndarray, codes: np.ndarray, sweeps: int
) -> np.ndarray:
    """QuantEase by the letter: everything is computed afresh for every column."""
    codes = codes.astype(np.float64)
    for _, j in itertools.product(range(sweeps), range(len(gram))):
        slope = (codes - weight / scale[:, None]) @ gram[:, j]
        codes[:, j] = np.clip(np.rint(codes[:, j] - slope / gram[j, j]), -127, 127)
    return codes.astype(np.int8)


@pytest.mark.parametrize("width", [1, 5, 128, 129, 300])
def test_blocks_change_nothing_about_descent(width: int) -> None:
    weight, gram = weights_and_gram(4, 6, width)
    scale = scales_of(weight, shrink=0.7)
    nearest = round_nearest(weight, scale)

    for sweeps in (1, 3):
        found = descend(weight, scale, gram, nearest, sweeps, damping=0.0)
        assert (found == cyclic(weight, scale, gram, nearest, sweeps)).all()


@settings(deadline=None)
@given(seeds, st.booleans(), st.floats(0.3, 1.0), st.sampled_from([7, 127]))
def test_descent_never_loses_and_ends_where_no_code_alone_gains(
    seed: int, own: bool, shrink: float, high: int
) -> None:
    weight, gram = weights_and_gram(seed, 4, 6, own)
    scale = scales_of(weight, high, shrink)
    codes = round_nearest(weight, scale, -high, high)

    last = error(codes, weight, scale, gram)
    for _ in range(2000):
        before, codes = codes, descend(weight, scale, gram, codes, 1, 0.0, -high, high)
        now = error(codes, weight, scale, gram)
        assert (now <= last * (1 + 1e-9)).all()
        last = now
        if (codes == before).all():
            break

    assert (np.abs(codes) <= high).all()
    for column, step in itertools.product(range(6), (-3, -2, -1, 1, 2, 3)):
        other = codes.copy()
        other[:, column] = np.clip(codes[:, column] + step, -high, high)
        assert (error(other, weight, scale, gram) >= last * (1 - 1e-4)).all()


@settings(deadline=None)
@given(seeds)
def test_rows_do_not_depend_on_each_other(seed: int) -> None:
    weight, grams = weights_and_gram(seed, 4, 7, own=True)
    scale = scales_of(weight)
    nearest = round_nearest(weight, scale)

    found = descend(weight, scale, grams, nearest)

    for row in range(4):
        one = slice(row, row + 1)
        alone = descend(weight[one], scale[one], grams[row], nearest[one])
        assert (found[one] == alone).all()


def test_descent_beats_nearest_codes_by_far() -> None:
    weight, gram = weights_and_gram(5, 16, 64)
    scale = scales_of(weight)
    nearest = round_nearest(weight, scale)

    found = descend(weight, scale, gram, nearest, damping=0.0)

    ratio = error(found, weight, scale, gram) / error(nearest, weight, scale, gram)
    assert ratio.mean() < 0.6
    assert ratio.max() < 0.9


def test_a_diagonal_gram_leaves_the_nearest() -> None:
    weight, _ = weights_and_gram(6, 5, 8)
    scale = scales_of(weight)
    nearest = round_nearest(weight, scale)

    assert (descend(weight, scale, np.diag(np.arange(8.0)), nearest) == nearest).all()
    far = np.zeros_like(nearest)
    assert (descend(weight, scale, np.eye(8), far) == nearest).all()


@pytest.mark.parametrize("own", [False, True])
def test_inputs_that_are_always_zero(own: bool) -> None:
    weight, gram = weights_and_gram(7, 3, 6, own)
    gram[..., [1, 4], :] = 0.0
    gram[..., :, [1, 4]] = 0.0
    scale = scales_of(weight)
    nearest = round_nearest(weight, scale)
    other = nearest.copy()
    other[:, [1, 4]] = 0

    for damping in (0.0, 0.01):
        assert (descend(weight, scale, gram, nearest, 20, damping) == nearest)[:, [1, 4]].all()
    assert (descend(weight, scale, gram, other, 20, 0.0)[:, [1, 4]] == 0).all()
    assert (descend(weight, scale, gram, other, 20, 0.01) == nearest)[:, [1, 4]].all()
    assert (descend(weight, scale, 0.0 * gram, other) == other).all()


def test_damping_draws_to_the_nearest() -> None:
    weight, gram = weights_and_gram(8, 8, 32)
    scale = scales_of(weight)
    nearest = round_nearest(weight, scale)

    moved = [
        int((descend(weight, scale, gram, nearest, 50, damping) != nearest).sum())
        for damping in (0.0, 1.0, 1e6)
    ]

    assert moved[0] > moved[1] > moved[2] == 0


def test_descent_in_float32() -> None:
    weight, gram = weights_and_gram(9, 8, 150)
    scale = scales_of(weight)
    nearest = round_nearest(weight, scale)

    single = descend(weight.astype(np.float32), scale, gram.astype(np.float32), nearest)
    double = descend(weight, scale, gram, nearest)

    ratio = error(single, weight, scale, gram) / error(double, weight, scale, gram)
    assert single.dtype == np.int8
    assert abs(ratio.mean() - 1.0) < 0.02


def test_arguments_stay_as_they_are() -> None:
    arrays = (*weights_and_gram(10, 3, 5), np.full(3, 0.1), np.ones((3, 5), np.int8))
    before = [array.copy() for array in arrays]
    weight, gram, scale, codes = arrays

    descend(weight, scale, gram, codes)
    asymmetric_target(weight, 0.5 * gram, gram)

    assert all((a == b).all() for a, b in zip(arrays, before, strict=True))


def test_nothing_to_round() -> None:
    empty = np.zeros((0, 4))

    assert descend(empty, np.zeros(0), np.eye(4), empty.astype(np.int8)).shape == (0, 4)
    assert enumerate_exactly(empty, np.zeros(0), np.eye(4)).shape == (0, 4)


# ------------------------------------------------------------------ all patterns


@pytest.mark.parametrize("shrink", [1.0, 0.4])
def test_enumeration_finds_the_best_of_all_roundings(shrink: float) -> None:
    weight, grams = weights_and_gram(11, 7, 5, own=True)
    scale = scales_of(weight, 7, shrink)

    found = enumerate_exactly(weight, scale, grams, 0.0, -7, 7)

    exact = weight / scale[:, None]
    both = np.clip(np.stack((np.floor(exact), np.ceil(exact))), -7, 7)
    candidates = [
        error(both[list(pattern), :, np.arange(5)].T, weight, scale, grams)
        for pattern in itertools.product((0, 1), repeat=5)
    ]
    np.testing.assert_allclose(error(found, weight, scale, grams), np.min(candidates, axis=0))


def test_enumeration_in_chunks_with_one_gram() -> None:
    weight, gram = weights_and_gram(12, 600, 9)
    scale = scales_of(weight)

    found = enumerate_exactly(weight, scale, gram)

    each = enumerate_exactly(weight, scale, np.broadcast_to(gram, (600, 9, 9)))
    assert (found == each).all()
    nearest = error(round_nearest(weight, scale), weight, scale, gram)
    assert np.median(error(found, weight, scale, gram) / nearest) < 0.5


def test_enumeration_leaves_the_nearest_where_it_makes_no_difference() -> None:
    weight, grams = weights_and_gram(13, 20, 4, own=True)
    grams[:, 2, :] = grams[:, :, 2] = 0.0
    scale = scales_of(weight)
    nearest = round_nearest(weight, scale)

    assert (enumerate_exactly(weight, scale, grams, 0.0) == nearest)[:, 2].all()
    assert (enumerate_exactly(weight, scale, 0.0 * grams) == nearest).all()


def test_rows_too_long_to_enumerate() -> None:
    with pytest.raises(ValueError, match="descend"):
        enumerate_exactly(np.zeros((1, 13)), np.ones(1), np.eye(13))


@settings(deadline=None)
@given(seeds, st.sampled_from([9, 14]), st.booleans())
def test_round_to_gram_is_never_worse_than_any_of_its_parts(
    seed: int, width: int, own: bool
) -> None:
    weight, gram = weights_and_gram(seed, 3, width, own)
    scale = scales_of(weight)

    found = error(round_to_gram(weight, scale, gram, damping=0.0), weight, scale, gram)

    parts = [round_nearest(weight, scale)]
    if own and width == 9:
        parts.append(enumerate_exactly(weight, scale, gram, 0.0))
    for codes in parts:
        assert (found <= error(codes, weight, scale, gram) * (1 + 1e-9)).all()


# ------------------------------------------------------------------ inputs that are quantized too


def grams_of(inputs: np.ndarray, quantized: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """E[x xq^T] and E[xq xq^T]."""
    count = len(inputs)
    return inputs.T @ quantized / count, quantized.T @ quantized / count


def two_inputs(seed: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    inputs = generator.standard_normal((60, width)) @ generator.standard_normal((width, width))
    return inputs, np.rint(2.0 * inputs) / 2.0


def test_target_is_the_least_squares_solution() -> None:
    inputs, quantized = two_inputs(14, 6)
    weight = np.random.default_rng(15).standard_normal((4, 6))

    found = asymmetric_target(weight, *grams_of(inputs, quantized), damping=0.0)

    expected = np.linalg.lstsq(quantized, inputs @ weight.T, rcond=None)[0].T
    np.testing.assert_allclose(found, expected)


def test_share_goes_part_of_the_way() -> None:
    cross, gram = grams_of(*two_inputs(16, 5))
    weight = np.random.default_rng(17).standard_normal((3, 5))

    whole = asymmetric_target(weight, cross, gram)

    np.testing.assert_array_equal(asymmetric_target(weight, cross, gram, share=0.0), weight)
    half = asymmetric_target(weight, cross, gram, share=0.5)
    np.testing.assert_allclose(half, (weight + whole) / 2.0)


@settings(deadline=None)
@given(seeds, st.floats(0.0, 1.0))
def test_inputs_that_stay_the_same_need_no_other_weight(seed: int, damping: float) -> None:
    weight, gram = weights_and_gram(seed, 3, 5)

    np.testing.assert_array_equal(asymmetric_target(weight, gram, gram, 1.0, damping), weight)


def test_every_row_its_own_inputs() -> None:
    grams = [grams_of(*two_inputs(seed, 4)) for seed in range(3)]
    cross, gram = (np.stack(parts) for parts in zip(*grams, strict=True))
    weight = np.random.default_rng(18).standard_normal((3, 4))

    found = asymmetric_target(weight, cross, gram)

    for row in range(3):
        alone = asymmetric_target(weight[row : row + 1], cross[row], gram[row])
        np.testing.assert_allclose(found[row : row + 1], alone)


def test_inputs_that_quantization_made_zero_keep_their_weights() -> None:
    inputs, quantized = two_inputs(19, 5)
    quantized[:, 2] = 0.0
    weight = np.random.default_rng(20).standard_normal((3, 5))

    found = asymmetric_target(weight, *grams_of(inputs, quantized), damping=0.0)

    np.testing.assert_array_equal(found[:, 2], weight[:, 2])
    others = [0, 1, 3, 4]
    expected = np.linalg.lstsq(quantized[:, others], inputs @ weight.T, rcond=None)[0].T
    np.testing.assert_allclose(found[:, others], expected)


def test_a_singular_gram_needs_damping() -> None:
    cross, gram = np.ones((2, 2)), np.array([[1.0, 2.0], [2.0, 4.0]])
    weight = np.ones((1, 2))

    with pytest.raises(np.linalg.LinAlgError):
        asymmetric_target(weight, cross, gram, damping=0.0)
    assert np.isfinite(asymmetric_target(weight, cross, gram)).all()
