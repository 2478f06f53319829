from __future__ import annotations

from becomes import assert_becomes

from graphopt.testing import assert_unchanged
from graphopt_passes.simplify.merge_pads import MergePads


def test_pads_become_one() -> None:
    assert_becomes(
        MergePads(),
        "agraph (float[N, 3] x) => (float[M, P] y) <int64[4] p = {1, 0, 0, 2}, int64[4] q ="
        ' {0, 1, 3, 1}, float z = {0.0}> { a = Pad(x, p) y = Pad<mode="constant">(a, q, z) }',
        "agraph (float[N, 3] x) => (float[M, P] y) <int64[4] p = {1, 1, 3, 3}, float z = {0.0}>"
        " { y = Pad(x, p, z) }",
    )


def test_axes_are_looked_at() -> None:
    assert_becomes(
        MergePads(),
        "agraph (float[N, 3] x) => (float[N, P] y) <int64[2] p = {1, 2}, int64[1] a = {-1},"
        " float v = {2.0}, int64[2] q = {3, 0}, int64[1] b = {0}> {"
        " c = Pad(x, p, v, a) y = Pad(c, q, v, b) }",
        "agraph (float[N, 3] x) => (float[N, P] y) <int64[4] p = {3, 1, 0, 2}, float v = {2.0}> {"
        " y = Pad(x, p, v) }",
    )


def test_other_values_modes_and_croppings_stay() -> None:
    change = assert_unchanged(
        MergePads(),
        "agraph (float[4] x, float v) => (float[8] a2, float[8] b2, float[4] c2, float[8] d2)"
        " <int64[2] p = {1, 1}, int64[2] m = {-1, -1}, float one = {1.0}, float zero = {-0.0}> {"
        ' a1 = Pad(x, p, one) a2 = Pad(a1, p, zero) b1 = Pad<mode="edge">(x, p) b2 = Pad(b1, p)'
        " c1 = Pad(x, p) c2 = Pad(c1, m) d1 = Pad(x, p, v) d2 = Pad(d1, p, v) }",
    )

    assert len(change.skips) == 4
