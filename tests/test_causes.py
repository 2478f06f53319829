"""What is said of a wrong value is what numpy says of it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.causes import changed_constants, finite_maximum, why_clipped, why_not_finite
from graphopt.testing import parse


def test_the_largest_numbers_are_those_of_the_types() -> None:
    assert finite_maximum(ir.DataType.FLOAT16) == 65504
    assert finite_maximum(ir.DataType.FLOAT8E4M3FN) == 448
    assert finite_maximum(ir.DataType.INT8) is None
    assert finite_maximum(None) is None


def test_an_overflow_is_told_with_the_range_of_the_original() -> None:
    right = np.asarray([1.0, -91000.0], np.float32)
    wrong = np.asarray([1.0, -np.inf], np.float16)

    text = why_not_finite(right, wrong, ir.DataType.FLOAT16)

    assert text is not None
    assert "infinity appears in 1 of 2 elements" in text
    assert "91,000, over 65,504, the largest of float16" in text
    assert why_not_finite(right, right, ir.DataType.FLOAT) is None


def test_nan_is_told_apart_from_infinity() -> None:
    right = np.asarray([1.0, np.nan], np.float32)

    text = why_not_finite(right, np.asarray([np.nan, np.nan], np.float32), ir.DataType.FLOAT)

    assert text is not None and text.startswith("NaN appears in 1 of 2 elements")
    assert why_not_finite(right, right, ir.DataType.FLOAT) is None


def quantize(scale: str, zero: str, rest: str = "", dims: str = "") -> ir.Node:
    model = parse(
        f"""
        agraph (float[2, 2] x) => (uint8[2, 2] k)
        <float{dims} s = {scale}, uint8{dims} z = {zero}>
        {{ k = QuantizeLinear {rest} (x, s, z) }}
        """
    )
    return next(iter(model.graph))


def test_the_share_that_is_clipped_is_counted() -> None:
    seen = np.asarray([[-1.0, 0.5], [1.0, 40.0]], np.float32)

    text = why_clipped(quantize("{0.1}", "{10}"), seen)

    assert text is not None
    assert "range [-1, 24.5]" in text and "from -1 to 40" in text and "25.0% of them" in text
    assert why_clipped(quantize("{0.2}", "{10}"), seen) is None


def test_channels_have_ranges_of_their_own() -> None:
    node = quantize("{0.1, 1.0}", "{0, 0}", "<axis = 0>", "[2]")

    assert why_clipped(node, np.asarray([[25, 0], [250, 0]], np.float32)) is None
    text = why_clipped(node, np.asarray([[250, 0], [25, 0]], np.float32))
    assert text is not None and "25.0% of them" in text


@pytest.mark.parametrize(("scale", "few"), [("{100.0}", True), ("{0.5}", False)])
def test_a_range_of_which_little_is_used_is_told(scale: str, few: bool) -> None:
    seen = np.asarray([[0.0, 10.0], [20.0, 30.0]], np.float32)

    text = why_clipped(quantize(scale, "{0}"), seen)

    assert (text is not None and "use 1.3 of its codes" in text) is few


def test_constants_that_changed_are_named_those_computed_by_nodes_too() -> None:
    before = parse(
        """
        agraph (float[2] x) => (float[2] y) <float[2] w = {3.0, 4.0}, float[2] v = {1.0, 1.0}>
        { y = Gemm (x, w, v) }
        """
    )
    after = parse(
        """
        agraph (float[2] x) => (float[2] y) <float[2] half = {3.0, 2.0}>
        { w = Add (half, half)  y = Gemm (x, w) }
        """
    )
    old, new = next(iter(before.graph)), list(after.graph)[-1]

    texts = list(changed_constants(before, after, old, new))

    assert texts == [
        "the constant 'w' (input 1) differs from the original's by relative L2 0.6",
        "input 2 (v) is gone",
    ]
    assert list(changed_constants(before, before, old, old)) == []
    assert list(changed_constants(before, after, old, next(iter(after.graph)))) == []
