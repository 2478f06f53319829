from __future__ import annotations

import pytest
from becomes import assert_becomes

from graphopt.testing import assert_unchanged
from graphopt_passes.simplify.simplify_logic import NEGATED, SimplifyLogic


def test_where_of_not() -> None:
    assert_becomes(
        SimplifyLogic(),
        "agraph (bool[N] c, float[N] a, float b) => (float[N] y) { d = Not(c) y = Where(d, a, b) }",
        "agraph (bool[N] c, float[N] a, float b) => (float[N] y) { y = Where(c, b, a) }",
    )


@pytest.mark.parametrize(("condition", "chosen"), [("{1}", "a"), ("{0}", "b")])
def test_where_that_is_decided(condition: str, chosen: str) -> None:
    assert_becomes(
        SimplifyLogic(),
        f"agraph (float[N, 2] x, float[N, 2] z) => (float[N, 2] y) <bool[1] c = {condition},"
        " float[2] d = {1.0, 2.0}> { a = Exp(x) b = Exp(z)"
        f" e = Where(c, {'a, d' if chosen == 'a' else 'd, b'}) y = Neg(e) }}",
        "agraph (float[N, 2] x, float[N, 2] z) => (float[N, 2] y) { a = Exp(x) b = Exp(z)"
        f" y = Neg({chosen}) }}",
    )


def test_where_of_the_same() -> None:
    assert_becomes(
        SimplifyLogic(),
        "agraph (bool[2] c, float[N, 2] x) => (float[N, 2] y) { a = Exp(x) b = Where(c, a, a)"
        " y = Neg(b) }",
        "agraph (bool[2] c, float[N, 2] x) => (float[N, 2] y) { a = Exp(x) y = Neg(a) }",
    )


def test_what_is_not_chosen_may_enlarge_the_result() -> None:
    change = assert_unchanged(
        SimplifyLogic(),
        "agraph (float[2] x, float[N] z, bool[N] k) => (float[M] y, float[M] w, float[2] v)"
        " <bool[1] c = {1}, bool[2] d = {1, 0}> { a = Exp(x) b = Where(c, a, z) y = Neg(b)"
        " e = Where(k, a, a) w = Neg(e) f = Where(d, a, x) v = Neg(f) }",
    )

    assert len(change.skips) == 2


def test_if_of_not() -> None:
    assert_becomes(
        SimplifyLogic(),
        "agraph (bool c, float[2] x) => (float[2] y) { d = Not(c) y = If (d)"
        " <then_branch = t () => (float[2] r) { r = Exp(x) },"
        " else_branch = e () => (float[2] q) { q = Neg(x) }> }",
        "agraph (bool c, float[2] x) => (float[2] y) { y = If (c)"
        " <then_branch = t () => (float[2] q) { q = Neg(x) },"
        " else_branch = e () => (float[2] r) { r = Exp(x) }> }",
    )


@pytest.mark.parametrize("op_type", NEGATED)
@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_not_of_a_comparison_of_integers(op_type: str, dtype: str) -> None:
    assert_becomes(
        SimplifyLogic(),
        f"agraph ({dtype}[N, 1] a, {dtype}[3] b) => (bool[N, 3] y) {{ c = {op_type}(a, b)"
        " y = Not(c) }",
        f"agraph ({dtype}[N, 1] a, {dtype}[3] b) => (bool[N, 3] y) {{"
        f" y = {NEGATED[op_type]}(a, b) }}",
    )


def test_numbers_that_may_be_nan_and_other_readers_stay() -> None:
    change = assert_unchanged(
        SimplifyLogic(),
        "agraph (float[N] a, int64[N] b) => (bool[N] y, bool[N] z, bool[N] e) {"
        " d = Less(a, a) y = Not(d) e = Less(b, b) z = Not(e) }",
    )

    assert len(change.skips) == 1


def test_a_not_that_others_read_stays() -> None:
    assert_unchanged(
        SimplifyLogic(),
        "agraph (bool[N] c, float[N] a, float[N] b) => (float[N] y, bool[N] d) { d = Not(c)"
        " y = Where(d, a, b) }",
    )
