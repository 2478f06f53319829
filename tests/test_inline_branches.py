from __future__ import annotations

import pytest

from graphopt.testing import assert_rewrites, assert_unchanged, parse
from graphopt_passes.simplify.inline_branches import InlineBranches

IF = """
<ir_version: 8, opset_import: ["" : 17]>
agraph (float[2] x, bool free) => (float[2] y)
<bool yes = {1}, bool no = {0}>
{
    a = Relu(x)
    {before}
    b = If({condition}) <
        then_branch = then () => (float[2] t) <float[2] w = {1.0, 2.0}> {
            k = Mul(a, w)  t = Neg(k)
        },
        else_branch = other () => (float[2] e) { k = Abs(a)  e = Exp(k) }
    >
    y = Sigmoid(b)
}
"""


def model(condition: str, before: str = "") -> str:
    return IF.replace("{condition}", condition).replace("{before}", before)


@pytest.mark.parametrize(
    ("condition", "branch", "weight"),
    [
        ("yes", "k = Mul(a, w)  b = Neg(k)", ", float[2] w = {1.0, 2.0}"),
        ("no", "k = Abs(a)  b = Exp(k)", ""),
    ],
)
def test_the_branch_that_is_always_taken_is_put_in_place(
    condition: str, branch: str, weight: str
) -> None:
    after = f"""
        <ir_version: 8, opset_import: ["" : 17]>
        agraph (float[2] x, bool free) => (float[2] y)
        <bool yes = {{1}}, bool no = {{0}}{weight}>
        {{ a = Relu(x)  {branch}  y = Sigmoid(b) }}
        """

    change = assert_rewrites(InlineBranches(), parse(model(condition)), parse(after))

    assert change.counts == {"branch of If inlined": 1}


def test_an_if_that_depends_on_an_input_stays() -> None:
    assert_unchanged(InlineBranches(), parse(model("free")))


def test_names_of_two_branches_do_not_meet() -> None:
    first = """
    c = If(no) <
        then_branch = then1 () => (float[2] t1) { k = Neg(x)  t1 = Abs(k) },
        else_branch = other1 () => (float[2] e1) { k = Tanh(x)  e1 = Abs(k) }
    >
    """
    before = model("yes", first).replace("y = Sigmoid(b)", "y = Add(b, c)")
    after = """
        <ir_version: 8, opset_import: ["" : 17]>
        agraph (float[2] x, bool free) => (float[2] y)
        <bool yes = {1}, bool no = {0}, float[2] w = {1.0, 2.0}>
        {
            a = Relu(x)
            k1 = Tanh(x)  c = Abs(k1)
            k = Mul(a, w)  b = Neg(k)
            y = Add(b, c)
        }
        """

    assert_rewrites(InlineBranches(), parse(before), parse(after))


def test_a_branch_that_returns_a_constant() -> None:
    before = """
        <ir_version: 8, opset_import: ["" : 17]>
        agraph (float[2] x) => (float[2] y, float[2] z)
        <bool yes = {1}>
        {
            y, z = If(yes) <
                then_branch = then () => (float[2] t, float[2] w) <float[2] w = {1.0, 2.0}> {
                    t = Identity(x)
                },
                else_branch = other () => (float[2] e, float[2] f) { e = Exp(x)  f = Neg(x) }
            >
        }
        """
    after = """
        <ir_version: 8, opset_import: ["" : 17]>
        agraph (float[2] x) => (float[2] y, float[2] z)
        <bool yes = {1}, float[2] w = {1.0, 2.0}>
        { y = Identity(x)  z = Identity(w) }
        """

    assert_rewrites(InlineBranches(), parse(before), parse(after))


def test_an_if_in_the_branch_that_is_taken_is_looked_at_too() -> None:
    before = """
        <ir_version: 8, opset_import: ["" : 17]>
        agraph (float[2] x) => (float[2] y)
        <bool yes = {1}>
        {
            y = If(yes) <
                then_branch = then () => (float[2] t) {
                    t = If(yes) <
                        then_branch = inner () => (float[2] i) { i = Neg(x) },
                        else_branch = outer () => (float[2] o) { o = Abs(x) }
                    >
                },
                else_branch = other () => (float[2] e) { e = Exp(x) }
            >
        }
        """
    after = """
        <ir_version: 8, opset_import: ["" : 17]>
        agraph (float[2] x) => (float[2] y) <bool yes = {1}> { y = Neg(x) }
        """

    assert_rewrites(InlineBranches(), parse(before), parse(after))


SQUEEZE = """
<ir_version: 8, opset_import: ["" : 17]>
agraph (float[N, 4, 1] x, float[1, 4, 1] k) => (float[a, b] y)
<int64[1] last = {2}, int64[1] first = {0}, int64 two = {2}, int64 one = {1}>
{
    s = Shape(x)
    m = Gather(s, two)
    c = Equal(m, one)
    z = If(c) <
        then_branch = then () => (float[p, q] t) { t = Squeeze(x, last) },
        else_branch = other () => (float[p, q, r] e) { e = Identity(x) }
    >
    READER
}
"""


def test_a_branch_with_whose_rank_the_model_cannot_run_is_never_taken() -> None:
    model = SQUEEZE.replace("READER", "u = Unsqueeze(z, last)  h = Relu(u)  y = Conv(h, k)")
    after = """
        <ir_version: 8, opset_import: ["" : 17]>
        agraph (float[N, 4, 1] x, float[1, 4, 1] k) => (float[a, b] y)
        <int64[1] last = {2}, int64[1] first = {0}, int64 two = {2}, int64 one = {1}>
        {
            s = Shape(x)  m = Gather(s, two)  c = Equal(m, one)
            z = Squeeze(x, last)  u = Unsqueeze(z, last)  h = Relu(u)  y = Conv(h, k)
        }
        """

    assert_rewrites(InlineBranches(), parse(model), parse(after))


@pytest.mark.parametrize(
    "reader",
    [
        "y = Softmax(z)",
        "h = MatMul(z, z)  y = Relu(h)",
        "u = Unsqueeze(z, first)  y = ReduceSum<keepdims = 0>(u)",
    ],
)
def test_where_either_rank_will_do_the_if_stays(reader: str) -> None:
    assert_unchanged(InlineBranches(), parse(SQUEEZE.replace("READER", reader)))


def test_a_range_gets_a_constant_as_a_scalar() -> None:
    before = """
        <ir_version: 8, opset_import: ["" : 17]>
        agraph (int64 x) => (int64[n] y)
        <bool yes = {1}, int64[1] one = {1}>
        {
            b = If(yes) <
                then_branch = then () => (int64[1] t) { t = Identity(one) },
                else_branch = other () => (int64 e) { e = Neg(x) }
            >
            y = Range(x, x, b)
        }
        """
    after = """
        <ir_version: 8, opset_import: ["" : 17]>
        agraph (int64 x) => (int64[n] y)
        <bool yes = {1}, int64[1] one = {1}, int64 scalar = {1}>
        { t = Identity(one)  y = Range(x, x, scalar) }
        """

    assert_rewrites(InlineBranches(), parse(before), parse(after))


def test_an_output_that_is_a_scalar_stays_one() -> None:
    before = """
        <ir_version: 8, opset_import: ["" : 17]>
        agraph (float[n] x) => (float y)
        <bool yes = {1}, int64[1] first = {0}>
        {
            y = If(yes) <
                then_branch = then () => (t) { t = ReduceSum<keepdims = 0>(x, first) },
                else_branch = other () => (float e) { e = Constant<value = float {1.0}>() }
            >
        }
        """
    after = """
        <ir_version: 8, opset_import: ["" : 17]>
        agraph (float[n] x) => (float y)
        <bool yes = {1}, int64[1] first = {0}>
        { y = ReduceSum<keepdims = 0>(x, first) }
        """

    assert_rewrites(InlineBranches(), parse(before), parse(after))
