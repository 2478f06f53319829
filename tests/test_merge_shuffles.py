from __future__ import annotations

import itertools

import numpy as np
import pytest
from becomes import assert_becomes

from graphopt.contract import Effect
from graphopt.testing import apply_pass, assert_equivalent, assert_unchanged, parse
from graphopt_passes.simplify.merge_shuffles import MergeShuffles


def test_the_shuffling_of_channels_is_a_gather() -> None:
    assert_becomes(
        MergeShuffles(),
        "agraph (float[N, 6, 4, 4] x) => (float[N, 6, 4, 4] y) <int64[5] s = {-1, 2, 3, 4, 4},"
        " int64[4] t = {-1, 6, 4, 4}> { a = Exp(x) b = Reshape(a, s)"
        " c = Transpose<perm=[0, 2, 1, 3, 4]>(b) d = Reshape(c, t) y = Neg(d) }",
        "agraph (float[N, 6, 4, 4] x) => (float[N, 6, 4, 4] y) <int32[6] i = {0, 3, 1, 4, 2, 5}> {"
        " a = Exp(x) b = Gather<axis=1>(a, i) y = Neg(b) }",
    )


def test_what_takes_parts_of_it_takes_them_of_what_was_there() -> None:
    """As the YOLO and NanoDet families write it: batch and channels in one axis, then two parts."""
    assert_becomes(
        MergeShuffles(),
        "agraph (float[1, 6, 4, 5] x) => (float[1, 3, 4, 5] y, float[1, 3, 4, 5] z) <int64[3] s ="
        " {3, 2, 20}, int64[5] t = {2, -1, 3, 4, 5}, int64 i = {0}, int64 j = {-1}> {"
        " a = Reshape(x, s) b = Transpose<perm=[1, 0, 2]>(a) c = Reshape(b, t)"
        " y = Gather(c, i) z = Gather(c, j) }",
        "agraph (float[1, 6, 4, 5] x) => (float[1, 3, 4, 5] y, float[1, 3, 4, 5] z)"
        " <int64[1] zero = {0}, int64[1] one = {1}, int64[1] e = {5}, int64[1] f = {6},"
        " int64[1] two = {2}> { y = Slice(x, zero, e, one, two) z = Slice(x, one, f, one, two) }",
    )


def test_split_and_slice_of_a_shuffle() -> None:
    nodes = (
        " b = Reshape(x, s) c = Transpose<perm=[0, 2, 1, 3]>(b) d = Reshape(c, t)"
        " y, z, w = Split<axis=1>(d, h) }"
    )
    assert_becomes(
        MergeShuffles(),
        "agraph (float[N, 6, 16] x) => (float[N, 2, 16] y, float[N, 3, 16] z) <int64[4] s ="
        " {0, 2, 3, 16}, int64[3] t = {0, -1, 16}, int64[3] h = {2, 3, 1}> {" + nodes,
        "agraph (float[N, 6, 16] x) => (float[N, 2, 16] y, float[N, 3, 16] z) <int64[1] s = {0},"
        " int64[1] e = {4}, int64[1] a = {1}, int64[1] t = {3}, int32[3] i = {1, 4, 2}> {"
        " y = Slice(x, s, e, a, t) z = Gather<axis=1>(x, i) }",
    )


@pytest.mark.parametrize("perm", list(itertools.permutations(range(4))))
def test_every_permutation_gives_the_same(perm: tuple[int, ...]) -> None:
    """Also those that do not act on one axis, and stay."""
    sizes = (2, 3, 2, 16)
    moved = [sizes[p] for p in perm]
    for shape in ([12, 16], [2, 6, 16], [moved[0], moved[1] * moved[2], moved[3]], [6, 2, 16]):
        model = parse(
            f"agraph (float[2, 6, 16] x, int64[4] s, int64[{len(shape)}] t) => (float[...] y) {{"
            f" a = Reshape(x, s) b = Transpose<perm={list(perm)}>(a) y = Reshape(b, t) }}".replace(
                "[...]", str(shape)
            ),
            s=np.int64(sizes),
            t=np.int64(shape),
        )
        before = model.clone()
        apply_pass(MergeShuffles(), model)
        assert_equivalent(before, model, Effect.EXACT)


def test_a_reader_of_another_kind_gets_what_is_shuffled() -> None:
    assert_becomes(
        MergeShuffles(),
        "agraph (float[1, 4, 16] x) => (float[1, 2, 16] y, float[1, 4, 16] z) <int64[4] s ="
        " {1, 2, 2, 16}, int64[3] t = {1, 4, 16}, int64[1] o = {0}, int64[1] two = {2},"
        " int64[1] one = {1}> { a = Reshape(x, s) b = Transpose<perm=[0, 2, 1, 3]>(a)"
        " c = Reshape(b, t) y = Slice(c, o, two, one) z = Neg(c) }",
        "agraph (float[1, 4, 16] x) => (float[1, 2, 16] y, float[1, 4, 16] z) <int32[4] i ="
        " {0, 2, 1, 3}, int64[1] o = {0}, int64[1] two = {2}, int64[1] one = {1}> {"
        " c = Gather<axis=1>(x, i) y = Slice(c, o, two, one) z = Neg(c) }",
    )


def test_shuffles_that_stay() -> None:
    """Small blocks, a real transposition, a value inside that others read, and unknown sizes."""
    assert_unchanged(
        MergeShuffles(),
        "agraph (float[2, 6, 2] x, float[2, 6, 16] w, float[N, M, 16] u) => (float[2, 6, 2] a3,"
        " float[2, 16, 6] b3, float[2, 6, 16] c3, float[2, 2, 3, 16] c1, float[P, Q, 16] d3)"
        " <int64[4] s = {2, 2, 3, 2}, int64[3] t = {2, 6, 2}, int64[4] v = {2, 2, 3, 16},"
        " int64[3] r = {2, 16, 6}, int64[3] q = {2, 6, 16}, int64[4] k = {0, 2, -1, 16},"
        " int64[3] l = {0, -1, 16}> {"
        " a1 = Reshape(x, s) a2 = Transpose<perm=[0, 2, 1, 3]>(a1) a3 = Reshape(a2, t)"
        " b1 = Reshape(w, v) b2 = Transpose<perm=[0, 3, 1, 2]>(b1) b3 = Reshape(b2, r)"
        " c1 = Reshape(w, v) c2 = Transpose<perm=[0, 2, 1, 3]>(c1) c3 = Reshape(c2, q)"
        " d1 = Reshape(u, k) d2 = Transpose<perm=[0, 2, 1, 3]>(d1) d3 = Reshape(d2, l) }",
    )


def test_a_shuffled_shape_is_another_matter() -> None:
    assert_unchanged(
        MergeShuffles(),
        "agraph (int64[4] x, float[2, 3, 4, 5] w) => (float[A, B, C, D] y) <int64[2] s = {2, 2},"
        " int64[1] t = {4}> { a = Reshape(x, s) b = Transpose(a) c = Reshape(b, t)"
        " y = Reshape(w, c) }",
    )
