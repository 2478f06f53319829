"""Weights that were trained on grids, in few values or in signs are told from all others."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt.statistics import Gram
from graphopt.testing import parse
from graphopt_passes.quantize.affine import Affine
from graphopt_passes.quantize.layers import layer_of
from graphopt_passes.quantize.trained_grids import codebook_of, grid_of, rounded_on_grid, signs_of
from graphopt_passes.quantize.weights import integer_layer


def rows_on_grid(seed: int, bits: int, shape: tuple[int, int] = (40, 64)) -> np.ndarray:
    """Integers times scales of float16, some of them negative."""
    generator = np.random.default_rng(seed)
    half = 1 << (bits - 1)
    integers = generator.integers(-half, half, shape).astype(np.float32)
    sizes, signs = generator.uniform(0.01, 0.1, 40), generator.choice([-1, 1], 40)
    scales = (sizes * signs)[:, np.newaxis].astype(np.float16)
    return np.asarray(integers * scales.astype(np.float32))


def folded(rows: np.ndarray, seed: int = 9) -> np.ndarray:
    """What a batch normalization makes of rows: products, rounded once more."""
    factors = np.random.default_rng(seed).normal(0, 2, (len(rows), 1)).astype(np.float32)
    return np.asarray(rows * factors)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_integers_and_scales_give_the_numbers_back_bit_for_bit(bits: int) -> None:
    rows = rows_on_grid(bits, bits)
    half = 1 << (bits - 1)

    found = rounded_on_grid(rows, 1, np.arange(-half, half, dtype=np.float32), np.float16, True)

    assert found is not None
    assert found.scales.dtype == np.float16
    np.testing.assert_array_equal(found.numbers(), rows)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_that_were_multiplied_are_found_to_rounding(bits: int) -> None:
    rows = folded(rows_on_grid(bits, bits))
    half = 1 << (bits - 1)

    found = grid_of(rows, -half, half - 1)

    assert found is not None
    np.testing.assert_allclose(found[0] * found[1], rows, rtol=2.0**-20, atol=0)


def test_blocks_have_scales_of_their_own() -> None:
    rows = np.concatenate([rows_on_grid(0, 4), 3.7 * rows_on_grid(1, 4)], axis=1)
    levels = np.arange(-8, 8, dtype=np.float32)

    assert rounded_on_grid(rows, 1, levels, np.float16, True) is None
    found = rounded_on_grid(rows, 2, levels, np.float16, True)
    assert found is not None and found.scales.shape == (40, 2)
    np.testing.assert_allclose(found.numbers(), rows, rtol=2.0**-20)


def test_other_weights_lie_on_no_grid() -> None:
    rows = np.random.default_rng(0).normal(0, 0.1, (40, 64)).astype(np.float32)
    one_off = rows_on_grid(0, 4)
    one_off[17, 3] *= np.float32(1.0001)

    assert grid_of(rows, -127, 127) is None
    assert grid_of(one_off, -8, 7) is None
    assert grid_of(rows_on_grid(0, 4), -4, 3) is None


def test_integer_kernels_get_positive_scales() -> None:
    rows = rows_on_grid(0, 4)

    found = grid_of(rows, -127, 127, signed=False)

    assert found is not None and (found[1] > 0).all()
    np.testing.assert_array_equal(found[0].astype(np.float32) * found[1], rows)


def test_rows_of_zeros_lie_on_every_grid() -> None:
    rows = rows_on_grid(0, 4)
    rows[[0, 5]] = 0.0

    found = grid_of(rows, -8, 7)

    assert found is not None and (found[1] != 0).all()
    np.testing.assert_array_equal(found[0] * found[1], rows)


def test_signs_have_one_magnitude_in_each_row() -> None:
    generator = np.random.default_rng(0)
    rows = folded(generator.choice([-1.0, 1.0], (20, 30)).astype(np.float32))
    other = rows.copy()
    other[3, 4] *= np.float32(1.1)

    found = signs_of(rows, 1)

    assert found is not None
    np.testing.assert_array_equal(found.numbers(), rows)
    assert signs_of(other, 1) is None


def test_few_values_are_a_codebook() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(0, 1, 16).astype(np.float32)
    weight = values[generator.integers(0, 16, (30, 50))]

    found = codebook_of(weight, 16)

    assert found is not None and (found.scales == 1).all()
    np.testing.assert_array_equal(found.numbers(), weight)
    assert codebook_of(weight, 15) is None


@pytest.mark.parametrize("inputs", [24, 200])
@pytest.mark.parametrize("zeros", [False, True])
def test_a_codebook_is_found_behind_rows_of_many_scales(inputs: int, zeros: bool) -> None:
    """Also where no row has all values: rows of what others have not add to it."""
    generator = np.random.default_rng(inputs)
    values = generator.normal(0, 1, 16).astype(np.float32)
    values[0] = 0.0 if zeros else values[0]
    weight = folded(values[generator.integers(0, 16, (30, inputs))])

    found = codebook_of(weight, 16)

    assert found is not None and len(found.levels) <= 16
    np.testing.assert_allclose(found.numbers(), weight, rtol=2.0**-20, atol=0)


def test_rows_of_unlike_values_are_no_codebook() -> None:
    generator = np.random.default_rng(0)
    weight = np.stack([generator.choice(generator.normal(0, 1, 16), 50) for _ in range(30)])

    assert codebook_of(weight.astype(np.float32), 16) is None


def test_integer_layers_have_the_trained_numbers() -> None:
    """Of integers that reach no further than 7, another rounding would make others of 127."""
    weight = rows_on_grid(0, 4).T.copy()
    model = parse(
        "agraph (float[5, 64] x, float[64, 40] w) => (float[5, 40] y) { y = Gemm(x, w) }", w=weight
    )
    layer = layer_of(model.graph[0])
    array = np.random.default_rng(0).normal(0, 1, (200, 64)).astype(np.float32)
    rows, gram = layer.ask("rows").start(), Gram()
    rows.add(array)
    gram.add(array)

    integers = integer_layer(layer, Affine(np.float32(0.03), 128), rows, gram)  # type: ignore[arg-type]

    assert np.abs(integers.codes).max() <= 8
    np.testing.assert_array_equal(integers.codes.astype(np.float32) * integers.scales, weight)
