"""The map between numbers and codes, against QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from functools import cache

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.runtime import Session
from graphopt.testing import parse
from graphopt_passes.quantize.affine import Affine, affine_of

sizes = st.floats(0.0, 2.0**100, width=32)


@cache
def session() -> Session:
    text = """
    agraph (float[N] x, float s, uint8 z) => (uint8[N] codes, float[N] numbers)
    { codes = QuantizeLinear(x, s, z) numbers = DequantizeLinear(codes, s, z) }
    """
    return Session(parse(text))


def numbers_around(affine: Affine, seed: int) -> np.ndarray:
    """Numbers within the range and beyond it, and the multiples of the scale."""
    low, high = affine.range
    inner = np.random.default_rng(seed).uniform(1.2 * low - 1e-3, 1.2 * high + 1e-3, 200)
    steps = np.arange(-300, 301) * np.float64(affine.scale)
    return np.float32(np.concatenate([inner, steps, [0.0, -0.0]]))


@settings(max_examples=100, deadline=None)
@given(sizes, sizes, st.integers(0, 2**32 - 1))
def test_codes_and_numbers_are_those_of_onnxruntime(low: float, high: float, seed: int) -> None:
    affine = affine_of(-low, high)
    x = numbers_around(affine, seed)

    theirs = session().run(
        {"x": x, "s": np.array(affine.scale), "z": np.array(affine.zero_point, np.uint8)}
    )

    np.testing.assert_array_equal(affine.codes(x), theirs["codes"])
    np.testing.assert_array_equal(affine.rounded(x), theirs["numbers"])


@settings(max_examples=100, deadline=None)
@given(sizes, sizes)
def test_a_range_holds_its_ends_and_zero(low: float, high: float) -> None:
    affine = affine_of(-low, high)
    first, last = affine.range
    if affine.scale == 1 and affine.zero_point == 0 and high < 200:
        # A range that is nothing but 0, or too narrow for a float32.
        return

    assert affine.rounded(np.zeros(1, np.float32)) == 0
    step = float(affine.scale)
    assert first <= -low + 0.51 * step and last >= high - 0.51 * step


def test_numbers_beyond_the_range_get_its_ends() -> None:
    affine = affine_of(-1.0, 2.0)
    x = np.float32([-np.inf, -5, 5, np.inf])

    assert affine.codes(x).tolist() == [0, 0, 255, 255]
    assert affine.codes(x).dtype == np.uint8
    np.testing.assert_allclose(affine.rounded(x)[[0, -1]], affine.range)


def test_a_range_of_nothing_has_a_scale() -> None:
    affine = affine_of(0.0, 0.0)

    assert (float(affine.scale), affine.zero_point) == (1.0, 0)
