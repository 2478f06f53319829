from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.contract import Context, Effect
from graphopt.testing import (
    apply_pass,
    assert_equivalent,
    assert_rewrites,
    assert_unchanged,
    parse,
)
from graphopt_passes.simplify.merge_transposes import MergeTransposes

KINDS = list(itertools.permutations(range(3)))


@pytest.mark.parametrize(("first", "second"), list(itertools.product(KINDS, KINDS)))
def test_two_become_one_or_none(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    model = parse(
        "agraph (float[2, 3, 4] x) => (float[A, B, C] z) {"
        f" a = Exp(x) b = Transpose<perm={list(first)}>(a) c = Transpose<perm={list(second)}>(b)"
        " z = Neg(c) }"
    )
    before = model.clone()

    apply_pass(MergeTransposes(), model)

    merged = tuple(first[axis] for axis in second)
    kinds = [n.op_type for n in model.graph]
    assert kinds == ["Exp", *["Transpose"] * (merged != (0, 1, 2)), "Neg"]
    assert_equivalent(before, model, Effect.EXACT)


def test_absent_permutation_is_the_reverse() -> None:
    assert_rewrites(
        MergeTransposes(),
        "agraph (float[A, B, C] x) => (float[D, E, F] y)"
        " { a = Transpose(x) y = Transpose<perm=[1, 0, 2]>(a) }",
        "agraph (float[A, B, C] x) => (float[D, E, F] y) { y = Transpose<perm=[1, 2, 0]>(x) }",
    )


def test_absent_permutation_of_unknown_rank_stays() -> None:
    model = parse(
        "agraph (float[N, M] x, int64[K] s) => (float[A, B] y)"
        " { a = Reshape(x, s) b = Transpose(a) y = Transpose(b) }"
    )

    assert not MergeTransposes().apply(model, Context(lambda: model))


def test_first_stays_for_other_readers() -> None:
    assert_rewrites(
        MergeTransposes(),
        "agraph (float[N, M] x) => (float[M, N] y, float[N, M] z)"
        " { a = Transpose<perm=[1, 0]>(x) y = Exp(a) b = Transpose<perm=[1, 0]>(a) z = Neg(b) }",
        "agraph (float[N, M] x) => (float[M, N] y, float[N, M] z)"
        " { a = Transpose<perm=[1, 0]>(x) y = Exp(a) z = Neg(x) }",
    )


def test_pair_between_input_and_output_becomes_identity() -> None:
    assert_rewrites(
        MergeTransposes(),
        "agraph (float[N, M] x) => (float[N, M] y)"
        " { a = Transpose<perm=[1, 0]>(x) y = Transpose<perm=[1, 0]>(a) }",
        "agraph (float[N, M] x) => (float[N, M] y) { y = Identity(x) }",
    )


def test_elementwise_operators_move_out_of_a_pair() -> None:
    change = assert_rewrites(
        MergeTransposes(),
        """
        agraph (float[A, 4, 5, 3] x) => (float[A, 4, 5, 3] y) <float lo = {-1.0}, float hi = {1.0}>
        {
            a = Transpose<perm=[0, 3, 1, 2]>(x)
            b = LeakyRelu<alpha=0.1>(a)
            c = Clip(b, lo, hi)
            d = Cast<to=11>(c)
            e = Neg(d)
            f = Cast<to=1>(e)
            g = Tanh(f)
            y = Transpose<perm=[0, 2, 3, 1]>(g)
        }
        """,
        """
        agraph (float[A, 4, 5, 3] x) => (float[A, 4, 5, 3] y) <float lo = {-1.0}, float hi = {1.0}>
        {
            b = LeakyRelu<alpha=0.1>(x)
            c = Clip(b, lo, hi)
            d = Cast<to=11>(c)
            e = Neg(d)
            f = Cast<to=1>(e)
            y = Tanh(f)
        }
        """,
    )

    assert change.counts == {"Transposes cancelled": 1}


def test_shapes_between_are_corrected() -> None:
    model = parse(
        "agraph (float[2, 3, 4] x) => (float[A, B, C] y) {"
        " a = Transpose<perm=[1, 2, 0]>(x) b = Relu(a) y = Transpose<perm=[1, 0, 2]>(b) }"
    )

    apply_pass(MergeTransposes(), model)

    relu, transpose = model.graph
    assert relu.outputs[0].shape == ir.Shape([2, 3, 4])
    assert transpose.attributes["perm"].as_ints() == (2, 1, 0)


def test_operands_transposed_alike_and_scalars() -> None:
    assert_rewrites(
        MergeTransposes(),
        """
        agraph (float[2, 3] x, float[2, 3] z) => (float[2, 3] y) <float[1, 1] half = {0.5}>
        {
            a = Transpose<perm=[1, 0]>(x)
            b = Transpose<perm=[1, 0]>(z)
            c = Mul(a, half)
            d = Relu(b)
            e = Sub(c, d)
            f = Add(e, a)
            y = Transpose<perm=[1, 0]>(f)
        }
        """,
        """
        agraph (float[2, 3] x, float[2, 3] z) => (float[2, 3] y) <float[1, 1] half = {0.5}>
        { c = Mul(x, half) d = Relu(z) e = Sub(c, d) y = Add(e, x) }
        """,
    )


def test_broadcast_operands_of_the_same_rank() -> None:
    assert_rewrites(
        MergeTransposes(),
        "agraph (float[2, 3] x, float[1, 3] z) => (float[2, 3] y) {"
        " a = Transpose<perm=[1, 0]>(x) b = Transpose<perm=[1, 0]>(z) c = Add(a, b)"
        " y = Transpose<perm=[1, 0]>(c) }",
        "agraph (float[2, 3] x, float[1, 3] z) => (float[2, 3] y) { y = Add(x, z) }",
    )


def test_quantization_per_tensor_moves_and_per_axis_stays() -> None:
    text = """
        agraph (float[2, 3] x) => (float[2, 3] y)
        <float%(shape)s s = %(scale)s, int8%(shape)s z = %(zero)s>
        {
            a = Transpose<perm=[1, 0]>(x)
            b = QuantizeLinear<axis=0>(a, s, z)
            c = DequantizeLinear<axis=0>(b, s, z)
            y = Transpose<perm=[1, 0]>(c)
        }
    """
    one = {"shape": "", "scale": "{0.1}", "zero": "{3}"}
    many = {"shape": "[3]", "scale": "{0.1, 0.2, 0.3}", "zero": "{3, 2, 1}"}
    model = parse(text % one)
    before = model.clone()

    assert apply_pass(MergeTransposes(), model)
    assert [n.op_type for n in model.graph] == ["QuantizeLinear", "DequantizeLinear"]
    assert_equivalent(before, model, Effect.EXACT)
    assert_unchanged(MergeTransposes(), text % many)


@pytest.mark.parametrize(
    "between",
    [
        "b = Log(a)",  # the last elements of a tensor are computed in another way
        "b = Softmax<axis=0>(a)",
        "b = Add(a, k)",
        "b = Add(a, x2)",
        "d = Cast<to=11>(a) e = Exp(d) b = Cast<to=1>(e)",
    ],
)
def test_other_operators_stop_it(between: str) -> None:
    assert_unchanged(
        MergeTransposes(),
        "agraph (float[3, 3] x, float[3, 3] x2) => (float[3, 3] y, float[3, 3] z)"
        " <float[3] k = {1.0, 2.0, 3.0}> {"
        f" a = Transpose<perm=[1, 0]>(x) {between} y = Transpose<perm=[1, 0]>(b) z = Exp(x2) }}",
    )


def test_values_between_that_others_read_stop_it() -> None:
    assert_unchanged(
        MergeTransposes(),
        "agraph (float[2, 3] x) => (float[2, 3] y, float[3, 2] z)"
        " { a = Transpose<perm=[1, 0]>(x) z = Relu(a) y = Transpose<perm=[1, 0]>(z) }",
    )


def test_operands_transposed_in_different_ways_are_told() -> None:
    change = assert_unchanged(
        MergeTransposes(),
        "agraph (float[2, 2, 2] x) => (float[2, 2, 2] y) {"
        " a = Transpose<perm=[1, 0, 2]>(x) b = Transpose<perm=[2, 0, 1]>(x) c = Add(a, b)"
        " y = Transpose<perm=[1, 0, 2]>(c) }",
    )

    assert [s.reason for s in change.skips] == [
        "the operands before it are transposed in different ways"
    ]


def test_never_more_nodes_when_the_first_has_other_readers() -> None:
    change = assert_unchanged(
        MergeTransposes(),
        "agraph (float[2, 3, 4] x) => (float[A, B, C] y, float[3, 4, 2] z) {"
        " a = Transpose<perm=[1, 2, 0]>(x) b = Relu(a) y = Transpose<perm=[1, 0, 2]>(b)"
        " z = Exp(a) }",
    )

    assert [s.reason for s in change.skips] == ["the Transposes before it stay, for other readers"]


def test_reaches_into_subgraphs_but_not_across_their_border() -> None:
    text = """
        agraph (bool c, float[2, 3] x) => (float[A, B] y)
        {
            o = Transpose<perm=[1, 0]>(x)
            y = If(c) <
                then_branch = then () => (float[3, 2] t) { %s },
                else_branch = other () => (float[2, 3] e) { e = Transpose<perm=[1, 0]>(o) }
            >
        }
    """
    assert_rewrites(
        MergeTransposes(),
        text % "u = Transpose<perm=[1, 0]>(o) v = Abs(u) t = Transpose<perm=[1, 0]>(v)",
        text % "t = Abs(o)",
    )


def test_empty_tensors_and_special_values() -> None:
    model = parse(
        "agraph (float[N, M] x) => (float[N, M] y) {"
        " a = Transpose<perm=[1, 0]>(x) b = Relu(a) c = Sqrt(b) y = Transpose<perm=[1, 0]>(c) }"
    )
    before = model.clone()
    special = np.array([[0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, -1.0]] * 3, np.float32)

    assert apply_pass(MergeTransposes(), model)

    samples = [{"x": special}, {"x": np.zeros((0, 3), np.float32)}]
    assert_equivalent(before, model, Effect.EXACT, samples)


def test_time_is_near_linear_where_every_region_is_the_end_of_a_longer_one() -> None:
    value = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2, 3]))
    nodes = []
    for index in range(9_000):
        operator = ("Transpose", "Relu", "Abs")[index % 3]
        nodes.append(ir.node(operator, [nodes[-1].outputs[0] if nodes else value]))
        nodes[-1].outputs[0].shape = ir.Shape([2, 3])
    graph = ir.Graph([value], nodes[-1].outputs, nodes=nodes, opset_imports={"": 21})
    model = ir.Model(graph, ir_version=10)

    change = MergeTransposes().apply(model, Context(lambda: model))

    assert change.counts == {"Transposes cancelled": 1_500}
