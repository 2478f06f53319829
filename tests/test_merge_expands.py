from __future__ import annotations

import pytest
from becomes import assert_becomes

from graphopt.testing import assert_unchanged
from graphopt_passes.simplify.merge_expands import MergeExpands


@pytest.mark.parametrize("op_type", ["Add", "Div", "Mul", "Sub"])
def test_an_operand_of_the_size_makes_expand_needless(op_type: str) -> None:
    assert_becomes(
        MergeExpands(),
        "agraph (float[3, 1] x, float[2, 3, 4] z) => (float[2, 3, 4] y) <int64[3] s = {2, 3, 4}> {"
        f" a = Expand(x, s) y = {op_type}(a, z) }}",
        f"agraph (float[3, 1] x, float[2, 3, 4] z) => (float[2, 3, 4] y) {{ y = {op_type}(x, z) }}",
    )


def test_the_shape_of_the_other_operand() -> None:
    assert_becomes(
        MergeExpands(),
        "agraph (bool[1] c, int64[N, M] x, int64 z) => (int64[N, M] y) { s = Shape(x)"
        " a = Expand(c, s) b = Expand(z, s) y = Where(a, x, b) }",
        "agraph (bool[1] c, int64[N, M] x, int64 z) => (int64[N, M] y) { y = Where(c, x, z) }",
    )


def test_what_is_not_enlarged_may_be_unknown() -> None:
    assert_becomes(
        MergeExpands(),
        "agraph (float[N, 3] x, float[N, 3] z) => (float[2, N, 3] y, float[2, 1, 1] w)"
        " <int64[3] s = {2, 1, 1}, float[2, 1, 1] c = {1.0, 2.0}> { a = Expand(x, s)"
        " y = Add(c, a) w = Neg(c) }",
        "agraph (float[N, 3] x, float[N, 3] z) => (float[2, N, 3] y, float[2, 1, 1] w)"
        " <float[2, 1, 1] c = {1.0, 2.0}> { y = Add(c, x) w = Neg(c) }",
    )


def test_two_expanded_operands_keep_one_expand() -> None:
    assert_becomes(
        MergeExpands(),
        "agraph (float[1] x, float[1] z) => (float[4] y) <int64[1] s = {4}> { a = Expand(x, s)"
        " b = Expand(z, s) y = Add(a, b) }",
        "agraph (float[1] x, float[1] z) => (float[4] y) <int64[1] s = {4}> {"
        " b = Expand(z, s) y = Add(x, b) }",
    )


def test_expands_that_enlarge_the_result_stay() -> None:
    """By a size that the others do not have, by an unknown one, for Pow, and squared."""
    assert_unchanged(
        MergeExpands(),
        "agraph (float[1] x, float[4] z, float[N] u, int64[1] t) => (float[4] a, float[M] b,"
        " float[4] c, float[4] d, float[2, 4] e) <int64[1] s = {4}, int64[2] r = {2, 4}> {"
        " a1 = Expand(x, s) a = Add(a1, x) b1 = Expand(x, t) b = Add(b1, u)"
        " c1 = Expand(x, s) c = Pow(z, c1) d1 = Expand(x, s) d = Mul(d1, d1)"
        " e1 = Expand(z, r) e = Add(e1, z) }",
    )


def test_where_of_floating_point_stays() -> None:
    """For onnxruntime, the sign of a zero depends on what is broadcast."""
    assert_unchanged(
        MergeExpands(),
        "agraph (bool[1] c, float[4] x, float z) => (float[4] y) { s = Shape(x)"
        " a = Expand(c, s) b = Expand(z, s) y = Where(a, x, b) }",
    )


def test_an_unknown_size_may_be_one() -> None:
    assert_unchanged(
        MergeExpands(),
        "agraph (float[N] x, float[N] z) => (float[4] y) <int64[1] s = {4}> { a = Expand(x, s)"
        " y = Add(a, z) }",
    )


def test_expand_of_expand_and_tile_of_tile() -> None:
    assert_becomes(
        MergeExpands(),
        "agraph (float[N, 1] x) => (float[2, N, 5] y, float[M, 6] z) <int64[3] s = {2, 1, 1},"
        " int64[2] t = {1, 5}, int64[2] r = {1, 2}, int64[2] q = {2, 3}> { a = Expand(x, t)"
        " y = Expand(a, s) b = Tile(x, r) z = Tile(b, q) }",
        "agraph (float[N, 1] x) => (float[2, N, 5] y, float[M, 6] z) <int64[3] s = {2, 1, 5},"
        " int64[2] r = {2, 6}> { y = Expand(x, s) z = Tile(x, r) }",
    )


def test_computed_shapes_stay() -> None:
    assert_unchanged(
        MergeExpands(),
        "agraph (float[1] x, int64[1] s) => (float[M] y) <int64[1] t = {1}> { a = Expand(x, s)"
        " y = Expand(a, t) }",
    )
