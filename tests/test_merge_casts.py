from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from becomes import assert_becomes

from graphopt.contract import Effect
from graphopt.testing import (
    apply_pass,
    assert_equivalent,
    assert_unchanged,
    parse,
)
from graphopt_passes.simplify.merge_casts import DIGITS, INTEGERS, MergeCasts, merges

T = ir.DataType
TYPES = (*INTEGERS, T.BOOL, T.FLOAT16, T.FLOAT, T.DOUBLE)


def numbers(dtype: ir.DataType) -> np.ndarray:
    """Among them those that break careless conversions."""
    if dtype in DIGITS:
        limits = np.finfo(dtype.numpy())
        special = [0.0, -0.0, 1.5, -2.5, 255, 256, -1, 1e-7, limits.max, limits.tiny, limits.eps]
        wild = [*special, np.inf, -np.inf, np.nan, limits.smallest_subnormal, 2049, 65520, 16777217]
        with np.errstate(over="ignore"):
            return np.resize(np.array(wild, np.float64).astype(dtype.numpy()), 37)
    if dtype == T.BOOL:
        return np.resize([True, False, True], 37)
    limits = np.iinfo(dtype.numpy())
    some = [0, 1, 2, 127, 128, 255, 256, 32768, 65536, 16777217, limits.max, limits.max - 1]
    both = [n for m in some for n in (m, -m) if limits.min <= n <= limits.max]
    return np.resize(np.array([*both, limits.min], dtype.numpy()), 37)


@pytest.mark.parametrize("start", TYPES, ids=str)
def test_every_chain_that_is_merged_gives_the_same_bits(start: ir.DataType) -> None:
    """All pairs of Casts after one type in one model, as onnxruntime runs it."""
    pairs = [p for p in itertools.product(TYPES, TYPES) if merges(start, *p)]
    body = "".join(
        f" a{i} = Cast<to={int(a)}>(x) y{i} = Cast<to={int(b)}>(a{i})"
        for i, (a, b) in enumerate(pairs)
    )
    names = {T.FLOAT: "float", T.DOUBLE: "double"}
    outputs = ", ".join(
        f"{names.get(b, b.name.lower())}[37] y{i}" for i, (_, b) in enumerate(pairs)
    )
    model = parse(
        f"agraph ({names.get(start, start.name.lower())}[37] x) => ({outputs}) {{{body} }}"
    )
    before = model.clone()

    apply_pass(MergeCasts(), model)

    # Nothing is left but one Cast for each output; where the graph would return its input, a Cast
    # to the same type.
    assert len(model.graph) == len(pairs) >= 12
    assert_equivalent(before, model, Effect.EXACT, [{"x": numbers(start)}])


@pytest.mark.parametrize(
    ("start", "middle", "end"),
    [
        (T.FLOAT, T.INT64, T.FLOAT),
        (T.FLOAT, T.FLOAT16, T.FLOAT),
        (T.FLOAT, T.DOUBLE, T.INT32),
        (T.FLOAT16, T.BFLOAT16, T.FLOAT16),
        (T.INT64, T.INT32, T.INT64),
        (T.INT64, T.DOUBLE, T.INT64),
        (T.INT32, T.FLOAT, T.INT32),
        (T.INT32, T.UINT32, T.INT64),
        (T.UINT8, T.BOOL, T.UINT8),
        (T.INT16, T.FLOAT16, T.INT16),
        (T.INT8, T.FLOAT, T.UINT8),
    ],
)
def test_what_a_first_cast_loses_stays_lost(
    start: ir.DataType, middle: ir.DataType, end: ir.DataType
) -> None:
    assert not merges(start, middle, end)


def test_there_and_back_is_nothing() -> None:
    assert_becomes(
        MergeCasts(),
        "agraph (float[N] x) => (float[N] y) { a = Neg(x) b = Cast<to=11>(a) c = Cast<to=1>(b)"
        " y = Neg(c) }",
        "agraph (float[N] x) => (float[N] y) { a = Neg(x) y = Neg(a) }",
    )


def test_a_first_cast_that_others_read_stays() -> None:
    assert_becomes(
        MergeCasts(),
        "agraph (int32[N] x) => (float[N] y, int64[N] b) { b = Cast<to=7>(x) y = Cast<to=1>(b) }",
        "agraph (int32[N] x) => (float[N] y, int64[N] b) { b = Cast<to=7>(x) y = Cast<to=1>(x) }",
    )


def test_elements_are_moved_between_the_casts() -> None:
    assert_becomes(
        MergeCasts(),
        "agraph (int32[2, 3] x) => (int32[3] y) <int64 i = {1}, int64[1] s = {3}> {"
        " a = Cast<to=7>(x) b = Transpose(a) c = Gather<axis=1>(b, i) d = Reshape(c, s)"
        " y = Cast<to=6>(d) }",
        "agraph (int32[2, 3] x) => (int32[3] y) <int64 i = {1}, int64[1] s = {3}> {"
        " b = Transpose(x) c = Gather<axis=1>(b, i) y = Reshape(c, s) }",
    )


def test_what_is_moved_and_read_elsewhere_keeps_its_type() -> None:
    assert_unchanged(
        MergeCasts(),
        "agraph (int32[2, 3] x) => (int32[3, 2] y, int64[3, 2] b) {"
        " a = Cast<to=7>(x) b = Transpose(a) y = Cast<to=6>(b) }",
    )


def test_cast_of_indices_is_another_matter() -> None:
    assert_unchanged(
        MergeCasts(),
        "agraph (float[4] d, int32[2] x) => (float16[2] y) {"
        " a = Cast<to=7>(x) b = Gather(d, a) y = Cast<to=10>(b) }",
    )


def test_cast_like_of_a_known_type_is_a_cast() -> None:
    assert_becomes(
        MergeCasts(),
        "agraph (int32[N] x, float[M] t) => (float[N] y) { a = Cast<to=7>(x) y = CastLike(a, t) }",
        "agraph (int32[N] x, float[M] t) => (float[N] y) { y = Cast<to=1>(x) }",
    )


def test_strings_and_narrow_types_stay() -> None:
    assert_unchanged(
        MergeCasts(),
        "agraph (int32[N] x) => (int32[N] y, float[N] z) { a = Cast<to=8>(x) y = Cast<to=6>(a)"
        " b = Cast<to=17>(y) z = Cast<to=1>(b) }",
    )


def test_near_misses_are_told() -> None:
    change = assert_unchanged(
        MergeCasts(),
        "agraph (float[N] x) => (float[N] y) { a = Cast<to=7>(x) y = Cast<to=1>(a) }",
    )

    assert [s.reason for s in change.skips] == [
        "FLOAT to INT64 to FLOAT is not the same as FLOAT to FLOAT"
    ]


def test_inside_a_branch() -> None:
    assert_becomes(
        MergeCasts(),
        "agraph (bool c, int32[2] x) => (float[2] y) {"
        " y = If (c) <then_branch = t () => (float[2] r) { a = Cast<to=7>(x) r = Cast<to=1>(a) },"
        " else_branch = e () => (float[2] q) { q = Cast<to=1>(x) }> }",
        "agraph (bool c, int32[2] x) => (float[2] y) {"
        " y = If (c) <then_branch = t () => (float[2] r) { r = Cast<to=1>(x) },"
        " else_branch = e () => (float[2] q) { q = Cast<to=1>(x) }> }",
    )


def test_a_cast_of_an_outer_graph_stays() -> None:
    assert_unchanged(
        MergeCasts(),
        "agraph (bool c, int32[2] x) => (float[2] y) { a = Cast<to=7>(x)"
        " y = If (c) <then_branch = t () => (float[2] r) { r = Cast<to=1>(a) },"
        " else_branch = e () => (float[2] q) { q = Cast<to=1>(a) }> }",
    )
