from __future__ import annotations

import pytest
from becomes import assert_becomes

from graphopt.testing import assert_unchanged
from graphopt_passes.simplify.absorb_unsqueezes import AbsorbUnsqueezes
from graphopt_passes.simplify.reductions import REDUCTIONS

OPSET_17 = '<ir_version: 8, opset_import: ["" : 17]>\n'


@pytest.mark.parametrize("op_type", REDUCTIONS)
def test_a_reduction_keeps_or_drops_what_is_asked_for(op_type: str) -> None:
    assert_becomes(
        AbsorbUnsqueezes(),
        "agraph (float[N, 3, 4] x) => (float[N, 1, 1] y, float[3] z) <int64[2] a = {-1, 1},"
        " int64[2] b = {1, 2}, int64[2] c = {0, 2}> {"
        f" r = {op_type}<keepdims=0>(x, a) y = Unsqueeze(r, b) s = {op_type}(x, c)"
        " z = Squeeze(s, c) }",
        "agraph (float[N, 3, 4] x) => (float[N, 1, 1] y, float[3] z) <int64[2] a = {2, 1},"
        f" int64[2] c = {{0, 2}}> {{ y = {op_type}(x, a) z = {op_type}<keepdims=0>(x, c) }}",
    )


def test_axes_in_attributes() -> None:
    assert_becomes(
        AbsorbUnsqueezes(),
        OPSET_17 + "agraph (float[N, 3] x) => (float[N, 1] y, float[1, 1] z) <int64[1] b = {-1},"
        " int64[2] all = {0, 1}> {"
        " r = ReduceMax<axes=[1], keepdims=0>(x) y = Unsqueeze(r, b)"
        " s = ReduceMean<keepdims=0>(x) z = Unsqueeze(s, all) }",
        OPSET_17 + "agraph (float[N, 3] x) => (float[N, 1] y, float[1, 1] z) {"
        " y = ReduceMax<axes=[1]>(x) z = ReduceMean<axes=[0, 1]>(x) }",
    )


def test_arg_max_keeps_its_options() -> None:
    assert_becomes(
        AbsorbUnsqueezes(),
        "agraph (float[N, 3] x) => (int64[N, 1] y, int64[3] z) <int64[1] a = {1},"
        " int64[1] b = {0}> { r = ArgMax<axis=-1, keepdims=0, select_last_index=1>(x)"
        " y = Unsqueeze(r, a) s = ArgMin(x) z = Squeeze(s, b) }",
        "agraph (float[N, 3] x) => (int64[N, 1] y, int64[3] z) {"
        " y = ArgMax<axis=1, select_last_index=1>(x) z = ArgMin<axis=0, keepdims=0>(x) }",
    )


def test_other_axes_and_readers_stay() -> None:
    assert_unchanged(
        AbsorbUnsqueezes(),
        "agraph (float[2, 3] x) => (float[1, 2] a2, float[2] b1, float[2, 1] b2,"
        " float[1, 2, 1] c2, float[3] d2) <int64[1] zero = {0}, int64[1] one = {1},"
        " int64[2] both = {0, 2}> {"
        " a1 = ReduceSum<keepdims=0>(x, one) a2 = Unsqueeze(a1, zero)"
        " b1 = ReduceSum<keepdims=0>(x, one) b2 = Unsqueeze(b1, one)"
        " c1 = ReduceMax<keepdims=0>(x, one) c2 = Unsqueeze(c1, both)"
        " d1 = ReduceMax(x, zero) d2 = Squeeze(d1) }",
    )


# ------------------------------------------------------------------ Gather


def test_gather_of_one_place() -> None:
    assert_becomes(
        AbsorbUnsqueezes(),
        "agraph (float[3, N] x) => (float[3, 1] y, float[N] z) <int64 i = {-1}, int64[1] j = {2},"
        " int64[1] one = {1}, int64[1] zero = {0}> { a = Gather<axis=-1>(x, i)"
        " y = Unsqueeze(a, one) b = Gather(x, j) z = Squeeze(b, zero) }",
        "agraph (float[3, N] x) => (float[3, 1] y, float[N] z) <int64[1] i = {-1}, int64 j = {2}>"
        " { y = Gather<axis=1>(x, i) z = Gather<axis=0>(x, j) }",
    )


def test_a_computed_index_and_another_axis_stay() -> None:
    assert_unchanged(
        AbsorbUnsqueezes(),
        "agraph (float[3, 4] x, int64 k) => (float[1, 3] a2, float[3, 1] b2) <int64 i = {1},"
        " int64[1] one = {1}, int64[1] zero = {0}> {"
        " a1 = Gather<axis=1>(x, i) a2 = Unsqueeze(a1, zero)"
        " b1 = Gather<axis=1>(x, k) b2 = Unsqueeze(b1, one) }",
    )


# ------------------------------------------------------------------ Slice and Split


@pytest.mark.parametrize(
    ("start", "end", "place"), [(2, 3, 2), (-2, -1, -2), (-1, 2**63 - 1, -1), (0, 1, 0)]
)
def test_a_slice_of_one_element(start: int, end: int, place: int) -> None:
    assert_becomes(
        AbsorbUnsqueezes(),
        f"agraph (float[2, 5] x) => (float[2] y) <int64[1] s = {{{start}}}, int64[1] e = {{{end}}},"
        " int64[1] a = {1}> { b = Slice(x, s, e, a) y = Squeeze(b, a) }",
        f"agraph (float[2, 5] x) => (float[2] y) <int64 i = {{{place}}}> {{"
        " y = Gather<axis=1>(x, i) }",
    )


def test_a_slice_of_an_unknown_number_of_elements_stays() -> None:
    assert_unchanged(
        AbsorbUnsqueezes(),
        "agraph (float[2, N] x) => (float[2] y, float[2] z) <int64[1] s = {-1}, int64[1] e = {0},"
        " int64[1] a = {1}, int64[1] f = {0}, int64[1] g = {4}> { b = Slice(x, f, g, a)"
        " y = Squeeze(b, a) c = Slice(x, s, e, a) z = Squeeze(c, a) }",
    )


def test_a_split_of_which_every_output_is_squeezed() -> None:
    assert_becomes(
        AbsorbUnsqueezes(),
        "agraph (float[2, 3] x) => (float[2] y, float[2] z) <int64[3] t = {1, 1, 1},"
        " int64[1] a = {1}> { p, q, r = Split<axis=1>(x, t) y = Squeeze(p, a) z = Squeeze(r, a) }",
        "agraph (float[2, 3] x) => (float[2] y, float[2] z) <int64 i = {0}, int64 j = {2}> {"
        " y = Gather<axis=1>(x, i) z = Gather<axis=1>(x, j) }",
    )


def test_a_split_of_which_one_output_is_read_as_it_is_stays() -> None:
    assert_unchanged(
        AbsorbUnsqueezes(),
        "agraph (float[2, 2] x) => (float[2] y, float[2, 1] q) <int64[2] t = {1, 1},"
        " int64[1] a = {1}> { p, q = Split<axis=1>(x, t) y = Squeeze(p, a) }",
    )
