from __future__ import annotations

import itertools

import numpy as np
import pytest
from becomes import assert_becomes

from graphopt.contract import Effect
from graphopt.testing import (
    apply_pass,
    assert_equivalent,
    assert_unchanged,
    parse,
)
from graphopt_passes.simplify.merge_slices import MergeSlices, _within
from graphopt_passes.simplify.no_change import WHOLE

BOUNDS = [*itertools.product((0, 1, 3, 9, -2, -9), (0, 2, 5, WHOLE, -1, -3, -9), (1, 2))]


@pytest.mark.parametrize("size", range(8))
def test_one_slice_takes_what_two_take(size: int) -> None:
    """Where the size is not known, for every size there may be."""
    array = np.arange(size)
    for first, second in itertools.product(BOUNDS, BOUNDS):
        wanted = array[slice(*first)][slice(*second)]
        for known in (size, None):
            merged = _within(first, second, known)
            assert merged is not None or known is None
            if merged is not None:
                assert np.array_equal(array[slice(*merged)], wanted), (first, second, known, merged)


def test_slices_of_different_axes() -> None:
    assert_becomes(
        MergeSlices(),
        "agraph (float[N, M, 6] x) => (float[P, Q, R] y) <int64[1] s = {1}, int64[1] e = {-1},"
        " int64[2] s2 = {2, 0}, int64[2] e2 = {4, 9}, int64[2] a2 = {-1, 0}, int64[2] t = {1, 2},"
        " int64[1] a = {1}> { b = Slice(x, s, e, a) y = Slice(b, s2, e2, a2, t) }",
        "agraph (float[N, M, 6] x) => (float[P, Q, R] y) <int64[3] s = {0, 1, 2},"
        " int64[3] e = {9, -1, 4}, int64[3] a = {0, 1, 2}, int64[3] t = {2, 1, 1}> {"
        " y = Slice(x, s, e, a, t) }",
    )


def test_slices_of_one_axis_of_any_size() -> None:
    assert_becomes(
        MergeSlices(),
        "agraph (float[N] x) => (float[M] y) <int64[1] s = {1}, int64[1] e = {7}, int64[1] f = {3}>"
        " { a = Slice(x, s, e) y = Slice(a, s, f) }",
        "agraph (float[N] x) => (float[M] y) <int64[1] s = {2}, int64[1] e = {4}, int64[1] a = {0}>"
        " { y = Slice(x, s, e, a) }",
    )


@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        ("int64[1] s = {-3}, int64[1] e = {9}", "int64[1] f = {1}, int64[1] g = {2}"),
        ("int64[1] s = {0}, int64[1] e = {5}", "int64[1] f = {0}, int64[1] g = {-1}"),
        ("int64[1] s = {0}, int64[1] e = {-1}", "int64[1] f = {0}, int64[1] g = {3}"),
    ],
)
def test_what_depends_on_an_unknown_size_stays(inner: str, outer: str) -> None:
    change = assert_unchanged(
        MergeSlices(),
        f"agraph (float[N] x) => (float[M] y) <{inner}, {outer}>"
        " { a = Slice(x, s, e) y = Slice(a, f, g) }",
    )

    assert len(change.skips) == 1


def test_what_runs_backwards_or_is_read_elsewhere_stays() -> None:
    assert_unchanged(
        MergeSlices(),
        "agraph (float[6] x) => (float[5] y, float[3] b, float[2] z) <int64[1] s = {-1},"
        " int64[1] e = {-6}, int64[1] zero = {0}, int64[1] t = {-1}, int64[1] f = {3},"
        " int64[1] g = {2}> { a = Slice(x, s, e, zero, t) y = Slice(a, zero, f)"
        " b = Slice(x, zero, f) z = Slice(b, zero, g) }",
    )


def test_computed_bounds_stay() -> None:
    assert_unchanged(
        MergeSlices(),
        "agraph (float[6] x, int64[1] e) => (float[M] y) <int64[1] s = {0}, int64[1] f = {3}>"
        " { a = Slice(x, s, e) y = Slice(a, s, f) }",
    )


# ------------------------------------------------------------------ Gather


def test_gather_of_gather() -> None:
    assert_becomes(
        MergeSlices(),
        "agraph (float[2, 6] x) => (float[2] y) <int64[3] i = {4, 1, -2}, int64 j = {-1}> {"
        " a = Gather<axis=1>(x, i) y = Gather<axis=-1>(a, j) }",
        "agraph (float[2, 6] x) => (float[2] y) <int64 i = {-2}> { y = Gather<axis=1>(x, i) }",
    )


@pytest.mark.parametrize(
    ("indices", "taken"), [("int64[2] i = {0, -1}", "1, 5"), ("int64[1] i = {2}", "5")]
)
def test_gather_of_slice(indices: str, taken: str) -> None:
    count = len(taken.split(","))
    assert_becomes(
        MergeSlices(),
        f"agraph (float[7] x) => (float[{count}] y) <int64[1] s = {{1}}, int64[1] e = {{-1}},"
        f" int64[1] a = {{0}}, int64[1] t = {{2}}, {indices}> {{ b = Slice(x, s, e, a, t)"
        " y = Gather(b, i) }",
        f"agraph (float[7] x) => (float[{count}] y) <int64[{count}] i = {{{taken}}}> {{"
        " y = Gather<axis=0>(x, i) }",
    )


def test_slice_of_gather() -> None:
    assert_becomes(
        MergeSlices(),
        "agraph (float[5, 2] x) => (float[2, 2] y) <int64[3] i = {4, 1, 2}, int64[1] s = {1},"
        " int64[1] e = {9}> { a = Gather(x, i) y = Slice(a, s, e) }",
        "agraph (float[5, 2] x) => (float[2, 2] y) <int64[2] i = {1, 2}> {"
        " y = Gather<axis=0>(x, i) }",
    )


def test_gathers_that_stay() -> None:
    """Along other axes, by indices of two dimensions, and of an unknown size."""
    assert_unchanged(
        MergeSlices(),
        "agraph (float[3, 3] x, float[N] u) => (float[3] y, float[2, 2] z, float v)"
        " <int64[1] i = {0}, int64[2, 2] j = {0, 1, 2, 1}, int64[2] k = {1, 0}, int64 o = {0},"
        " int64[1] s = {1}, int64[1] e = {9}> {"
        " a = Gather<axis=1>(x, k) y = Gather<axis=0>(a, o)"
        " b = Gather(u, j) z = Gather(b, k)"
        " c = Slice(u, s, e) v = Gather(c, o) }",
    )


# ------------------------------------------------------------------ Concat


def test_slice_and_gather_of_a_concat_take_from_an_operand() -> None:
    assert_becomes(
        MergeSlices(),
        "agraph (float[2, 3] p, float[2, 4] q) => (float[2, 2] y, float[2] z, float[2, 4] w)"
        " <int64[1] s = {4}, int64[1] e = {6}, int64[1] a = {1}, int64 i = {-1}, int64[1] three ="
        " {3}, int64[1] all = {99}> { r = Exp(q) c = Concat<axis=1>(p, r) y = Slice(c, s, e, a)"
        " z = Gather<axis=1>(c, i) t = Slice(c, three, all, a) w = Neg(t) }",
        "agraph (float[2, 3] p, float[2, 4] q) => (float[2, 2] y, float[2] z, float[2, 4] w)"
        " <int64[1] s = {1}, int64[1] e = {3}, int64[1] a = {1}, int64 i = {3}> { r = Exp(q)"
        " y = Slice(r, s, e, a) z = Gather<axis=1>(r, i) w = Neg(r) }",
    )


def test_parts_of_two_operands_or_unknown_sizes_stay() -> None:
    assert_unchanged(
        MergeSlices(),
        "agraph (float[3] p, float[4] q, float[N] u) => (float[2] y, float[1] z) <int64[1] s = {2},"
        " int64[1] e = {4}, int64[1] o = {0}, int64[1] one = {1}> { c = Concat<axis=0>(p, q)"
        " y = Slice(c, s, e) d = Concat<axis=0>(u, q) z = Slice(d, o, one) }",
    )


# ------------------------------------------------------------------ Split


def test_split_of_split() -> None:
    assert_becomes(
        MergeSlices(),
        "agraph (float[2, 9] x) => (float[2, 3] p, float[2, 2] q, float[2, 1] r, float[2, 3] s)"
        " <int64[2] k = {2, 1}, int64[3] t = {3, 3, 3}> { p, a, s = Split<axis=1>(x, t)"
        " q, r = Split<axis=-1>(a, k) }",
        "agraph (float[2, 9] x) => (float[2, 3] p, float[2, 2] q, float[2, 1] r, float[2, 3] s)"
        " <int64[4] t = {3, 2, 1, 3}> { p, q, r, s = Split<axis=1>(x, t) }",
    )


def test_slices_that_cover_all_become_a_split() -> None:
    assert_becomes(
        MergeSlices(),
        "agraph (float[N, 5] x) => (float[N, 2] y, float[N, 3] z) <int64[1] o = {0},"
        " int64[1] two = {2}, int64[1] end = {9223372036854775807}, int64[1] a = {1}> {"
        " b = Relu(x) p = Slice(b, two, end, a) z = Neg(p) y = Slice(b, o, two, a) }",
        "agraph (float[N, 5] x) => (float[N, 2] y, float[N, 3] z) <int64[2] t = {2, 3}> {"
        " b = Relu(x) y, p = Split<axis=1>(b, t) z = Neg(p) }",
    )


def test_a_gap_an_overlap_and_a_shape_stay() -> None:
    assert_unchanged(
        MergeSlices(),
        "agraph (float[6] x, float[A, B, C, D] s) => (float[2] a, float[2] b, float[4] c,"
        " float[3] d, int64[2] e, int64[2] f) <int64[1] o = {0}, int64[1] two = {2},"
        " int64[1] three = {3}, int64[1] four = {4}, int64[1] end = {6}> {"
        " a = Slice(x, o, two) b = Slice(x, four, end) r = Neg(x) c = Slice(r, o, four)"
        " d = Slice(r, three, end) t = Shape(s) e = Slice(t, o, two) f = Slice(t, two, end) }",
    )


def test_a_split_of_which_one_output_is_read_is_a_slice() -> None:
    assert_becomes(
        MergeSlices(),
        "agraph (float[6] x) => (float[2] y) <int64[3] t = {1, 2, 3}> {"
        " a, y, b = Split<axis=0>(x, t) }",
        "agraph (float[6] x) => (float[2] y) <int64[1] s = {1}, int64[1] e = {3}, int64[1] a = {0}>"
        " { y = Slice(x, s, e, a) }",
    )


def test_inside_a_loop_body() -> None:
    model = parse(
        "agraph (float[4] x, int64 n, bool go) => (float[4] y) { y = Loop (n, go, x) <body = b"
        " (int64 i, bool c, float[4] v) => (bool k, float[4] w) <int64[1] o = {0},"
        " int64[1] two = {2}, int64[1] four = {4}> { k = Identity(c) p = Slice(v, o, two)"
        " q = Slice(v, two, four) w = Concat<axis=0>(q, p) }> }"
    )
    before = model.clone()

    change = apply_pass(MergeSlices(), model)

    # What comes into a body is only said to have a size.
    assert not change
    assert_equivalent(before, model, Effect.EXACT)
