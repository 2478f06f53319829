from __future__ import annotations

import numpy as np
from becomes import assert_becomes

from graphopt.testing import assert_unchanged, parse
from graphopt_passes.simplify.merge_concats import MergeConcats


def test_concats_become_one() -> None:
    assert_becomes(
        MergeConcats(),
        "agraph (float[2, 3] x, float[2, 4] z) => (float[2, 17] y) { a = Concat<axis=1>(x, z)"
        " b = Concat<axis=-1>(a, x) y = Concat<axis=1>(z, b, x) }",
        "agraph (float[2, 3] x, float[2, 4] z) => (float[2, 17] y) {"
        " y = Concat<axis=1>(z, x, z, x, x) }",
    )


def test_other_axes_and_readers_keep_their_concat() -> None:
    assert_unchanged(
        MergeConcats(),
        "agraph (float[2, 3] x) => (float[4, 6] y, float[4, 3] b, float[6, 3] z) {"
        " a = Concat<axis=1>(x, x) y = Concat<axis=0>(a, a) b = Concat<axis=0>(x, x)"
        " z = Concat<axis=0>(b, x) }",
    )


def test_empty_constants_go() -> None:
    model = parse(
        "agraph (float[2, N] x, float[2, 0] none, float[2, 0] given) => (float[2, M] y)"
        " { a = Neg(x) y = Concat<axis=1>(none, a, given, a, none) }",
        none=np.zeros((2, 0), np.float32),
    )

    assert_becomes(
        MergeConcats(),
        model,
        "agraph (float[2, N] x, float[2, 0] given) => (float[2, M] y) { a = Neg(x)"
        " y = Concat<axis=1>(a, given, a) }",
    )


def test_what_was_split_and_put_together_is_what_was_there() -> None:
    assert_becomes(
        MergeConcats(),
        "agraph (float[2, 5] x) => (float[2, 5] y, float[2, 8] z) <int64[3] t = {1, 2, 2},"
        " int64[1] o = {0}, int64[1] three = {3}, int64[1] end = {9}, int64[1] a = {1}> {"
        " r = Exp(x) b, c, d = Split<axis=1>(r, t) e = Concat<axis=1>(b, c, d) y = Neg(e)"
        " f = Slice(r, o, three, a) g = Slice(r, three, end, a) h = Slice(r, o, three, a)"
        " z = Concat<axis=1>(h, f, g) }",
        "agraph (float[2, 5] x) => (float[2, 5] y, float[2, 8] z) <int64[1] o = {0},"
        " int64[1] three = {3}, int64[1] a = {1}> { r = Exp(x) y = Neg(r)"
        " h = Slice(r, o, three, a) z = Concat<axis=1>(h, r) }",
    )


def test_neighbouring_parts_are_one_part() -> None:
    assert_becomes(
        MergeConcats(),
        "agraph (float[6] x) => (float[4] y) <int64[3] t = {1, 3, 2}> {"
        " a, b, c = Split<axis=0>(x, t) y = Concat<axis=0>(a, b) }",
        "agraph (float[6] x) => (float[4] y) <int64[1] s = {0}, int64[1] e = {4}, int64[1] a = {0}>"
        " { y = Slice(x, s, e, a) }",
    )


def test_the_input_of_a_graph_is_not_its_output() -> None:
    assert_becomes(
        MergeConcats(),
        "agraph (float[4] x) => (float[4] y) <int64[2] t = {2, 2}> { a, b = Split<axis=0>(x, t)"
        " y = Concat<axis=0>(a, b) }",
        "agraph (float[4] x) => (float[4] y) { y = Identity(x) }",
    )


def test_parts_in_another_order_or_of_another_axis_stay() -> None:
    assert_unchanged(
        MergeConcats(),
        "agraph (float[4, 4] x) => (float[4, 4] y, float[2, 8] z) <int64[2] t = {2, 2}> {"
        " a, b = Split<axis=0>(x, t) y = Concat<axis=0>(b, a) c, d = Split<axis=0>(x, t)"
        " z = Concat<axis=1>(c, d) }",
    )
