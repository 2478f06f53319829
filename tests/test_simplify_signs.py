from __future__ import annotations

import pytest
from becomes import assert_becomes

from graphopt.testing import assert_unchanged
from graphopt_passes.simplify.simplify_signs import SimplifySigns

INPUTS = "agraph (float[N, 4] x, float[N, 4] z) => (float[N, 4] y)"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("n = Neg(z) y = Add(x, n)", "y = Sub(x, z)"),
        ("n = Neg(x) y = Add(n, z)", "y = Sub(z, x)"),
        ("n = Neg(z) y = Sub(x, n)", "y = Add(x, z)"),
        ("n = Neg(x) m = Neg(z) y = Mul(n, m)", "y = Mul(x, z)"),
        ("n = Neg(x) m = Neg(z) y = Div(n, m)", "y = Div(x, z)"),
        ("n = Neg(x) y = Abs(n)", "y = Abs(x)"),
        ("n = Neg(x) m = Neg(z) y = Add(n, m)", "n = Neg(x) y = Sub(n, z)"),
    ],
)
@pytest.mark.parametrize("dtype", ["float", "double", "int32"])
def test_neg_goes(before: str, after: str, dtype: str) -> None:
    if dtype == "int32" and "Div" in before:
        return
    inputs = INPUTS.replace("float", dtype)
    assert_becomes(SimplifySigns(), f"{inputs} {{ {before} }}", f"{inputs} {{ {after} }}")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("y = Mul(x, c)", "y = Neg(x)"),
        ("y = Mul(c, x)", "y = Neg(x)"),
        ("y = Div(x, c)", "y = Neg(x)"),
        ("y = Div(d, x)", "y = Reciprocal(x)"),
    ],
)
@pytest.mark.parametrize("dtype", ["float", "double"])
def test_constants_go(before: str, after: str, dtype: str) -> None:
    head = f"agraph ({dtype}[N, 4] x) => ({dtype}[N, 4] y)"
    assert_becomes(
        SimplifySigns(),
        f"{head} <{dtype}[1] c = {{-1.0}}, {dtype} d = {{1.0}}> {{ {before} }}",
        f"{head} {{ {after} }}",
    )


@pytest.mark.parametrize(
    "nodes",
    [
        "y = Sub(zero, x)",
        "n = Sub(x, z) y = Neg(n)",
        "n = Neg(x) y = Sub(n, z)",
        "n = Neg(x) y = Mul(n, z)",
        "n = Mul(x, minus) m = Mul(z, minus) y = Max(n, m)",
        "y = Div(minus, x)",
        "r = Div(one, z) y = Mul(x, r)",
        "n = Mul(x, wide) y = Identity(x)",
    ],
)
def test_what_is_not_the_same_or_no_shorter_stays(nodes: str) -> None:
    assert_unchanged(
        SimplifySigns(),
        f"{INPUTS} <float zero = {{0.0}}, float minus = {{-1.0}}, float one = {{1.0}},"
        f" float[1, 1, 1] wide = {{-1.0}}> {{ {nodes} }}",
    )


def test_a_neg_that_others_read_stays() -> None:
    assert_unchanged(
        SimplifySigns(),
        "agraph (float[N] x, float[N] z) => (float[N] y, float[N] n, float[N] w) { n = Neg(z)"
        " y = Add(x, n) m = Neg(x) w = Mul(m, m) }",
    )


def test_division_by_a_constant_integer_stays() -> None:
    assert_unchanged(
        SimplifySigns(),
        "agraph (int64[N] x) => (int64[N] y) <int64 one = {1}> { y = Div(one, x) }",
    )
