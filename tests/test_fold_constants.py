from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.contract import Context
from graphopt.testing import apply_pass, assert_equivalent, assert_rewrites, assert_unchanged, parse
from graphopt_passes.simplify.drop_unused import DropUnused
from graphopt_passes.simplify.fold_constants import FoldConstants


def test_folds_a_chain_into_one_initializer() -> None:
    change = assert_rewrites(
        FoldConstants(),
        """
        agraph (float[2] x) => (float[2] y)
        <float[2] a = {1.0, 2.0}, float[2] b = {3.0, 4.0}>
        { s = Add(a, b)  t = Sqrt(s)  y = Mul(x, t) }
        """,
        parse(
            """
            agraph (float[2] x, float[2] t) => (float[2] y)
            <float[2] a = {1.0, 2.0}, float[2] b = {3.0, 4.0}>
            { y = Mul(x, t) }
            """,
            t=np.sqrt(np.float32([4, 6])),
        ),
    )

    assert change.counts == {"node folded": 2}


def test_folds_the_shape_of_a_value_whose_dimensions_are_known() -> None:
    model = parse(
        """
        agraph (float[2, 3] x) => (int64[2] s, float[6] y)
        { e = Exp(x)  s0 = Shape(e)  n = Size(e)  m = Unsqueeze(n, zero)  y = Reshape(e, m)
          s = Add(s0, s0) }
        """.replace("(float[2, 3] x)", "(float[2, 3] x, int64[1] zero)"),
        zero=np.int64([0]),
    )
    before = model.clone()

    change = apply_pass(FoldConstants(), model)

    assert change.counts["Shape of a known shape folded"] == 1
    assert change.counts["Size of a known shape folded"] == 1
    # The sum is an output, which a node must make; everything before it is a constant now.
    assert [n.op_type for n in model.graph] == ["Exp", "Reshape", "Add"]
    assert_equivalent(before, model)


def test_keeps_the_shape_of_a_value_with_an_unknown_dimension() -> None:
    assert_unchanged(
        FoldConstants(),
        "agraph (float[N, 3] x) => (int64[2] s) { e = Exp(x)  s = Shape(e) }",
    )


def test_does_not_believe_a_shape_that_the_file_states_of_a_value() -> None:
    """Exporters leave the shape of one traced example there."""
    model = parse("agraph (float[N, 3] x) => (int64[2] s) { e = Exp(x)  t = Shape(e)  s = Neg(t) }")
    model.graph[0].outputs[0].shape = ir.Shape([1, 3])

    change = apply_pass(FoldConstants(), model)

    assert not change


@pytest.mark.parametrize("claimed", ["y", "e"], ids=["of it", "of what it follows from"])
def test_does_not_believe_a_shape_that_the_file_states_of_an_output(claimed: str) -> None:
    assert_unchanged(
        FoldConstants(),
        f"""
        agraph (float[N, 4] x) => (float[1, 4] {claimed}, int64[2] s)
        {{ y = Relu(x)  e = Neg(y)  s0 = Shape(e)  s = Add(s0, s0) }}
        """,
    )


def test_does_not_believe_a_shape_that_the_file_states_in_a_body() -> None:
    """What a loop carries may grow from round to round."""
    assert_unchanged(
        FoldConstants(),
        """
        agraph (float[1] x) => (float[N] y, int64[R, 1] sizes)
        <int64 rounds = {3}, bool go = {1}>
        {
            y, sizes = Loop (rounds, go, x) <body = b
                (int64 i, bool c, float[1] v) => (bool d, float[1] w, int64[1] s)
                { d = Identity(c)  w = Concat <axis = 0> (v, v)  z = Shape(v)  s = Neg(z) }
            >
        }
        """,
    )


def test_does_not_write_out_what_nodes_make_of_nothing() -> None:
    change = assert_unchanged(
        FoldConstants(),
        """
        agraph (float[64, 64] x) => (float[64, 64] y)
        <int64[2] shape = {64, 64}>
        { mask = ConstantOfShape(shape)  half = Trilu(mask)  y = Add(x, half) }
        """,
    )

    assert {s.reason for s in change.skips} == {"writing its result out would make the file larger"}


def test_folds_through_a_large_value_to_a_small_one() -> None:
    model = parse(
        """
        agraph (float[4] x) => (float[4] y)
        <int64[2] shape = {64, 64}, int64[1] start = {0}, int64[1] end = {1}, int64[1] four = {4}>
        {
            mask = ConstantOfShape(shape)
            row = Slice(mask, start, end)
            flat = Slice(row, start, four, end)
            y = Add(x, flat)
        }
        """
    )
    before = model.clone()

    change = apply_pass(FoldConstants(), model)

    assert [n.op_type for n in model.graph] == ["Add"]
    assert change.counts == {"node folded": 3}
    assert_equivalent(before, model)


def test_a_large_value_that_is_needed_stays_and_the_rest_is_folded() -> None:
    model = parse(
        """
        agraph (float[64, 64] x) => (float[64, 64] y, float[64, 64] z)
        <int64[2] shape = {64, 64}>
        {
            mask = ConstantOfShape(shape)
            total = ReduceSum <keepdims: int = 0> (mask)
            one = Cos(total)
            y = Add(x, mask)
            z = Mul(x, one)
        }
        """
    )
    before = model.clone()

    apply_pass(FoldConstants(), model)

    assert [n.op_type for n in model.graph] == ["ConstantOfShape", "Add", "Mul"]
    assert_equivalent(before, model)


def test_packed_weights_stay_packed() -> None:
    change = assert_unchanged(
        FoldConstants(),
        """
        agraph (float[2] x) => (float[2] y)
        <int8[2] q = {1, 2}, float scale = {0.5}, int8 zero = {0}>
        { w = DequantizeLinear(q, scale, zero)  t = Sqrt(w)  y = Mul(x, t) }
        """,
    )

    assert [s.reason for s in change.skips] == ["it widens packed weights, which must stay packed"]


def test_quantizing_a_constant_is_folded_because_it_shrinks() -> None:
    model = parse(
        """
        agraph (float[64] x, float[64] w) => (float[64] y)
        <float scale = {0.5}, int8 zero = {0}>
        { q = QuantizeLinear(w, scale, zero)  d = DequantizeLinear(q, scale, zero)  y = Mul(x, d) }
        """,
        w=np.linspace(-1, 1, 64, dtype=np.float32),
    )
    before = model.clone()

    apply_pass(FoldConstants(), model)

    assert [n.op_type for n in model.graph] == ["DequantizeLinear", "Mul"]
    assert model.graph[0].inputs[0].dtype == ir.DataType.INT8  # type: ignore[union-attr]
    assert_equivalent(before, model)


def test_random_nodes_overridable_inputs_and_outputs_stay() -> None:
    assert_unchanged(
        FoldConstants(),
        """
        agraph (float[2] x) => (float[2] y, float[2] z)
        <float[2] a = {1.0, 2.0}>
        { r = RandomNormalLike(a)  y = Add(x, r)  z = Neg(a) }
        """,
    )
    model = parse("agraph (float[2] x, float[2] a) => (float[2] y) { b = Neg(a)  y = Add(x, b) }")
    value = model.graph.inputs[1]
    value.const_value = ir.tensor(np.float32([1, 2]), name="a")
    model.graph.register_initializer(value)

    assert not apply_pass(FoldConstants(), model)


def test_folds_in_subgraphs_and_reads_outer_constants() -> None:
    model = parse(
        """
        agraph (bool c, float[2] x) => (float[2] y)
        <float[2] a = {1.0, 2.0}>
        {
            y = If(c) <
                then_branch = then () => (float[2] t) { b = Sqrt(a)  t = Add(x, b) },
                else_branch = other () => (float[2] e) { e = Abs(x) }
            >
        }
        """
    )
    before = model.clone()

    change = apply_pass(FoldConstants(), model)

    assert change.counts == {"node folded": 1}
    assert_equivalent(before, model)


def test_large_tensors_are_left_alone() -> None:
    model = parse(
        "agraph (float[64] x, float[64] w) => (float[64] y) { n = Neg(w)  y = Add(x, n) }",
        w=np.ones(64, np.float32),
    )

    change = apply_pass(FoldConstants(max_bytes=255), model)

    assert not change
    assert [s.reason for s in change.skips] == ["it would need 256 bytes at once, over max-bytes"]


def computed_size(exponent: int) -> ir.Model:
    return parse(
        f"""
        agraph (float[1] x) => (float[1] y) <float two = {{2.0}}, float[1] e = {{{exponent}.0}}>
        {{
            p = Pow(two, e)  n = Cast <to = 7> (p)  c = ConstantOfShape(n)
            m = ReduceMax(c)  y = Add(x, m)
        }}
        """
    )


def test_a_value_whose_size_is_computed_is_folded_once_that_is_known() -> None:
    model = computed_size(3)
    before = model.clone()

    change = apply_pass(FoldConstants(), model)
    assert change.counts == {"node folded": 2}
    assert [s.reason for s in change.skips] == ["how large its result would be is not known yet"]

    assert apply_pass(FoldConstants(), model)
    assert [n.op_type for n in model.graph] == ["Add"]
    assert_equivalent(before, model)


def test_a_value_whose_size_is_computed_is_never_too_large() -> None:
    model = computed_size(60)

    for _ in range(3):
        apply_pass(FoldConstants(), model)

    assert [n.op_type for n in model.graph] == ["ConstantOfShape", "ReduceMax", "Add"]


def test_half_precision_folds() -> None:
    model = parse(
        """
        agraph (float16[2] x, float16[2] a, float16[2] b) => (float16[2] y)
        { s = Mul(a, b)  y = Add(x, s) }
        """,
        a=np.float16([1, 2]),
        b=np.float16([3, 4]),
    )
    before = model.clone()

    assert apply_pass(FoldConstants(), model)
    assert_equivalent(before, model)


def test_what_onnxruntime_cannot_compute_stays() -> None:
    model = parse(
        """
        agraph (float[2] x) => (float[2] y)
        <float[2] a = {1.0, 2.0}, float[3] b = {1.0, 2.0, 3.0}>
        { s = Neg(a)  t = Neg(s)  y = Add(x, t) }
        """
    )
    before = model.clone()

    apply_pass(FoldConstants(), model)
    apply_pass(DropUnused(), model)

    assert_equivalent(before, model)


def test_a_constant_that_cannot_be_read_is_no_constant() -> None:
    """onnxruntime takes any single attribute for the value."""
    model = parse("agraph (float[2] x) => (float[2] y) { c = Constant <value_float = 2.0> ()"
                  " d = Neg(c)  y = Mul(x, d) }")  # fmt: skip
    constant = model.graph[0]
    constant.attributes["vavue"] = ir.AttrFloat32("vavue", 2.0)
    del constant.attributes["value_float"]

    assert not FoldConstants().apply(model, Context(lambda: model))


def test_strings_fold() -> None:
    model = parse(
        """
        agraph (int64[1] i) => (string[1] y)
        <string[2] a = {"one", "two"}, string[1] b = {"three"}>
        { c = Concat <axis: int = 0> (a, b)  y = Gather(c, i) }
        """
    )
    before = model.clone()

    assert apply_pass(FoldConstants(), model)
    assert [n.op_type for n in model.graph] == ["Gather"]
    assert_equivalent(before, model)
