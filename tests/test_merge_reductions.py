from __future__ import annotations

import pytest
from becomes import assert_becomes

from graphopt.testing import assert_unchanged
from graphopt_passes.simplify.merge_reductions import KINDS, MergeReductions

OPSET_17 = '<ir_version: 8, opset_import: ["" : 17]>\n'


@pytest.mark.parametrize("op_type", KINDS)
def test_reductions_become_one(op_type: str) -> None:
    assert_becomes(
        MergeReductions(),
        "agraph (float[2, 3, 4, 5] x) => (float[2, 5] y, float[2, 1, 1, 5] z) <int64[1] a = {2},"
        " int64[1] b = {1}> {"
        f" r = {op_type}<keepdims=0>(x, a) y = {op_type}<keepdims=0>(r, b)"
        f" s = {op_type}(x, b) z = {op_type}(s, a) }}",
        "agraph (float[2, 3, 4, 5] x) => (float[2, 5] y, float[2, 1, 1, 5] z)"
        f" <int64[2] a = {{1, 2}}> {{ y = {op_type}<keepdims=0>(x, a) z = {op_type}(x, a) }}",
    )


def test_axes_in_attributes() -> None:
    assert_becomes(
        MergeReductions(),
        OPSET_17 + "agraph (float[N, 3, 4] x) => (float[N] y) {"
        " r = ReduceMean<axes=[2]>(x) y = ReduceMean<axes=[1, 2], keepdims=0>(r) }",
        OPSET_17 + "agraph (float[N, 3, 4] x) => (float[N] y) {"
        " y = ReduceMean<axes=[1, 2], keepdims=0>(x) }",
    )


def test_reductions_that_stay() -> None:
    """Of another kind, of axes apart, that keep other dimensions, and a mean of integers."""
    change = assert_unchanged(
        MergeReductions(),
        "agraph (float[2, 3, 4] x, int32[2, 3, 4] i) => (float[2] a2, float[3] b2, float[2, 1] c2,"
        " int32[2] d2) <int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}> {"
        " a1 = ReduceSum<keepdims=0>(x, two) a2 = ReduceMax<keepdims=0>(a1, one)"
        " b1 = ReduceSum<keepdims=0>(x, two) b2 = ReduceSum<keepdims=0>(b1, zero)"
        " c1 = ReduceSum(x, two) c2 = ReduceSum<keepdims=0>(c1, one)"
        " d1 = ReduceMean<keepdims=0>(i, two) d2 = ReduceMean<keepdims=0>(d1, one) }",
    )

    assert len(change.skips) == 2


def test_a_reduction_of_single_elements() -> None:
    assert_becomes(
        MergeReductions(),
        "agraph (float[N, 1, 4] x) => (float[N, 4] y, float[N, 1, 4] z) <int64[1] a = {1}> {"
        " y = ReduceMax<keepdims=0>(x, a) b = ReduceMean(x, a) z = Neg(b) }",
        "agraph (float[N, 1, 4] x) => (float[N, 4] y, float[N, 1, 4] z) <int64[1] a = {1}> {"
        " y = Squeeze(x, a) z = Neg(x) }",
    )


def test_a_sum_of_squares_of_single_elements_stays() -> None:
    assert_unchanged(
        MergeReductions(),
        "agraph (float[N, 1] x) => (float[N, 1] y) <int64[1] a = {1}> {"
        " y = ReduceSumSquare(x, a) }",
    )


def test_a_transpose_before_goes_where_what_is_left_is_in_order() -> None:
    assert_becomes(
        MergeReductions(),
        "agraph (float[N, 5, 6, 3] x) => (float[N, 3] y) <int64[2] a = {-1, -2}> {"
        " t = Transpose<perm=[0, 3, 1, 2]>(x) y = ReduceMean<keepdims=0>(t, a) }",
        "agraph (float[N, 5, 6, 3] x) => (float[N, 3] y) <int64[2] a = {1, 2}> {"
        " y = ReduceMean<keepdims=0>(x, a) }",
    )


def test_a_transpose_that_orders_what_is_left_stays() -> None:
    assert_unchanged(
        MergeReductions(),
        "agraph (float[2, 5, 6, 3] x) => (float[2, 3, 1, 1] y, float[3, 2] z)"
        " <int64[2] a = {2, 3}> {"
        " t = Transpose<perm=[0, 3, 1, 2]>(x) y = ReduceMean(t, a)"
        " u = Transpose<perm=[3, 0, 1, 2]>(x) z = ReduceSum<keepdims=0>(u, a) }",
    )
