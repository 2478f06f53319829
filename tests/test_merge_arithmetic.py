from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from becomes import assert_becomes

from graphopt.contract import Effect
from graphopt.testing import apply_pass, assert_equivalent, assert_unchanged, parse
from graphopt_passes.simplify.merge_arithmetic import MergeArithmetic

SUMS = ("Add({}, {c})", "Add({c}, {})", "Sub({}, {c})", "Sub({c}, {})")
PRODUCTS = ("Mul({}, {c})", "Mul({c}, {})", "Div({}, {c})", "Div({c}, {})")

TYPES = {"float": np.float32, "double": np.float64, "float16": np.float16}


def chain_of(first: str, second: str, c: float, d: float, dtype: str = "float") -> ir.Model:
    """Two nodes with a constant each, the second of several numbers."""
    return parse(
        f"agraph ({dtype}[N, 3] x, {dtype} c, {dtype}[3] d) => ({dtype}[N, 3] y) {{"
        f" a = {first.format('x', c='c')} y = {second.format('a', c='d')} }}",
        c=np.array(c, TYPES[dtype]),
        d=np.array([d, d, d / 2], TYPES[dtype]),
    )


@pytest.mark.parametrize("dtype", ["float", "double", "float16"])
@pytest.mark.parametrize(
    ("first", "second"), [*itertools.product(SUMS, SUMS), *itertools.product(PRODUCTS, PRODUCTS)]
)
def test_two_become_one(first: str, second: str, dtype: str) -> None:
    """For one sign of the second constant at least, and then with the same result."""
    merged = 0
    for d in (1.5, -1.5):
        model = chain_of(first, second, 3.0, d, dtype)
        before = model.clone()
        merged += bool(apply_pass(MergeArithmetic(), model))
        assert_equivalent(before, model, Effect.ROUNDING)
    assert merged == (2 if first in PRODUCTS else 1)


def test_constants_that_broadcast() -> None:
    assert_becomes(
        MergeArithmetic(),
        "agraph (float[N, 2] x) => (float[N, 2] y) <float[1, 1] c = {0.5}, float[2] d = {4.0, 8.0}>"
        " { a = Mul(x, c) y = Div(a, d) }",
        "agraph (float[N, 2] x) => (float[N, 2] y) <float[1, 2] c = {0.125, 0.0625}> {"
        " y = Mul(x, c) }",
    )


@pytest.mark.parametrize(
    ("first", "second", "c", "d"),
    [
        ("Add({}, {c})", "Add({}, {c})", 12582912.0, -12582912.0),
        ("Add({}, {c})", "Sub({}, {c})", 1.0, 1.0),
        ("Sub({c}, {})", "Sub({c}, {})", 1.0, 1.0),
        ("Mul({}, {c})", "Mul({}, {c})", 1e30, 1e-30),
        ("Mul({}, {c})", "Mul({}, {c})", 1e-10, 1.0),
        ("Mul({}, {c})", "Mul({}, {c})", 0.0, 2.0),
        ("Mul({}, {c})", "Div({}, {c})", 2.0, 0.0),
        ("Add({}, {c})", "Add({}, {c})", -3e38, -3e38),
        ("Add({}, {c})", "Mul({}, {c})", 2.0, 2.0),
    ],
)
def test_what_rounds_on_purpose_or_overflows_stays(
    first: str, second: str, c: float, d: float
) -> None:
    assert_unchanged(MergeArithmetic(), chain_of(first, second, c, d))


def test_a_constant_that_would_grow_stays() -> None:
    model = parse(
        "agraph (float[20, 20] x, float[20, 1] c, float[1, 20] d) => (float[20, 20] y) {"
        " a = Mul(x, c) y = Mul(a, d) }",
        c=np.full((20, 1), 2, np.float32),
        d=np.full((1, 20), 3, np.float32),
    )

    change = assert_unchanged(MergeArithmetic(), model)

    assert "more bytes" in change.skips[0].reason


def test_integers_and_other_readers_stay() -> None:
    assert_unchanged(
        MergeArithmetic(),
        "agraph (float[N] x, int64[N] i) => (float[N] y, int64[N] j, float[N] a) <float c = {2.0},"
        " int64 k = {2}> { a = Mul(x, c) y = Mul(a, c) b = Mul(i, k) j = Div(b, k) }",
    )


def test_a_product_with_a_reciprocal() -> None:
    assert_becomes(
        MergeArithmetic(),
        "agraph (float[N, 4] x, float[N, 1] z, float[3, 4] u, float[3, 4] v) => (float[N, 4] y,"
        " float[3, 4] w) <float one = {1.0}> { a = Div(one, z) y = Mul(x, a)"
        " b = Reciprocal(u) w = Mul(b, v) }",
        "agraph (float[N, 4] x, float[N, 1] z, float[3, 4] u, float[3, 4] v) => (float[N, 4] y,"
        " float[3, 4] w) { y = Div(x, z) w = Div(v, u) }",
    )


def test_a_small_reciprocal_of_a_large_product_stays() -> None:
    assert_unchanged(
        MergeArithmetic(),
        "agraph (float[3, 4] x, float[3, 1] z) => (float[3, 4] y, float[3, 4] w)"
        " <float two = {2.0}> { a = Reciprocal(z) y = Mul(x, a) b = Div(two, z) w = Mul(x, b) }",
    )
