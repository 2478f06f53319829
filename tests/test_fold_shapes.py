from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.contract import Context, Effect
from graphopt.skeleton import infer_shapes
from graphopt.testing import assert_equivalent, assert_rewrites, assert_unchanged, parse
from graphopt_passes.simplify.fold_shapes import FoldShapes

OPSET_17 = '<ir_version: 8, opset_import: ["" : 17]>'
ZERO_ONE_TWO = "int64 zero = {0}, int64[1] first = {0}, int64[1] second = {1}, int64[1] third = {2}"


def text(
    nodes: str, constants: str = ZERO_ONE_TWO, x: str = "float[N, M, 6] x", y: str = "float y"
) -> str:
    y = "float[] y" if y == "float y" else y
    return f"{OPSET_17} agraph ({x}) => (y) <{constants}> {{ {nodes} }}"


def folded(nodes: str, constants: str = ZERO_ONE_TWO, x: str = "float[N, M, 6] x") -> ir.Model:
    """The model after the pass; it gives the same on inputs of several sizes, with none and one."""
    before, after = parse(text(nodes, constants, x)), parse(text(nodes, constants, x))
    infer_shapes(after)
    FoldShapes().apply(after, Context(lambda: after))
    for n, m in ((2, 3), (1, 1), (5, 4)):
        sample = np.random.default_rng(n).standard_normal((n, m, 6)).astype(np.float32)
        assert_equivalent(before, after, Effect.EXACT, [{"x": sample}])
    return after


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def constant(model: ir.Model, node: ir.Node, index: int) -> list[int]:
    value = node.inputs[index]
    assert value is not None and value.const_value is not None
    return [int(number) for number in value.const_value.numpy().reshape(-1)]


def test_a_reshape_by_the_sizes_of_its_input_gets_a_constant_shape() -> None:
    after = folded(
        """
        s = Shape(x)
        n0 = Gather(s, zero)  n = Unsqueeze(n0, first)
        m = Slice(s, second, third)
        shape = Concat<axis = 0>(n, m, two, three)
        y = Reshape(x, shape)
        """,
        ZERO_ONE_TWO + ", int64[1] two = {2}, int64[1] three = {3}",
    )

    assert operators(after) == ["Reshape"]
    assert constant(after, after.graph[0], 1) == [0, 0, 2, 3]


def test_one_size_that_is_not_in_the_input_becomes_minus_one() -> None:
    after = folded(
        """
        s = Shape(x)
        n = Gather(s, first)  m = Gather(s, second)  nm = Mul(n, m)
        shape = Concat<axis = 0>(nm, six)
        y = Reshape(x, shape)
        """,
        ZERO_ONE_TWO + ", int64[1] six = {6}",
    )

    assert operators(after) == ["Reshape"]
    assert constant(after, after.graph[0], 1) == [-1, 6]


def test_minus_one_is_not_written_beside_a_size_that_may_be_zero() -> None:
    nodes = """
        s = Shape(x)
        n = Gather(s, first)  m = Gather(s, second)  mm = Mul(m, six)
        shape = Concat<axis = 0>(n, mm)
        y = Reshape(x, shape)
        """
    after = folded(nodes, ZERO_ONE_TWO + ", int64[1] six = {6}")
    empty = np.zeros((0, 3, 6), np.float32)

    before = parse(text(nodes, ZERO_ONE_TWO + ", int64[1] six = {6}"))

    assert "Concat" in operators(after)
    assert_equivalent(before, after, Effect.EXACT, [{"x": empty}])


def test_a_minus_one_that_stood_there_stays() -> None:
    after = folded(
        """
        n = Shape<start = 0, end = 1>(x)
        shape = Concat<axis = 0>(n, rest)
        y = Reshape(x, shape)
        """,
        "int64[1] rest = {-1}",
    )

    assert constant(after, after.graph[0], 1) == [0, -1]


def test_a_shape_in_which_zero_stands_for_zero_may_copy_sizes_too() -> None:
    after = folded(
        """
        n = Shape<start = 0, end = 1>(x)
        shape = Concat<axis = 0>(n, rest)
        y = Reshape<allowzero = 1>(x, shape)
        """,
        "int64[1] rest = {-1}",
    )

    assert operators(after) == ["Reshape"] and not after.graph[0].attributes


def test_a_known_size_of_a_shape_is_a_constant() -> None:
    after = folded(
        """
        s = Shape(x)
        c = Gather(s, third)  d = Cast<to = 1>(c)
        y = Mul(x, d)
        """
    )

    assert operators(after) == ["Cast", "Mul"]


def test_a_size_that_is_computed_twice_is_computed_once() -> None:
    after = folded(
        """
        r = Relu(x)
        a = Shape(x)  b = Shape(r)
        n = Gather(a, zero)  m = Gather(b, zero)
        nf = Cast<to = 1>(n)  mf = Cast<to = 1>(m)
        p = Mul(r, nf)  y = Add(p, mf)
        """
    )

    assert operators(after).count("Gather") == 1
    assert operators(after).count("Shape") == 1


def test_vectors_of_sizes_become_shapes_with_start_and_end() -> None:
    after = folded(
        """
        s = Shape(x)
        n0 = Gather(s, zero)  n = Unsqueeze(n0, first)
        m = Gather(s, second)
        shape = Concat<axis = 0>(n, m, one)
        z = ConstantOfShape(shape)
        y = Add(x, z)
        """,
        ZERO_ONE_TWO + ", int64[1] one = {1}",
    )

    assert operators(after) == ["Shape", "Concat", "ConstantOfShape", "Add"]
    assert after.graph[0].attributes.get_int("end") == 2


def test_what_torch_writes_for_expand_goes() -> None:
    after = folded(
        """
        s = Shape(x)
        ones = ConstantOfShape<value = int64[1] {1}>(three)
        minus = Mul(ones, negative)
        same = Equal(wanted, minus)
        shape = Where(same, ones, s)
        e = Expand(x, shape)  y = Relu(e)
        """,
        "int64[1] three = {3}, int64 negative = {-1}, int64[3] wanted = {7, 7, 7}",
    )

    assert operators(after) == ["Relu"]


def test_a_slice_to_the_end_of_a_dimension_does_not_compute_it() -> None:
    after = folded(
        """
        m = Shape<start = 1, end = 2>(x)
        y = Slice(x, first, m, second)
        """,
        "int64[1] first = {1}, int64[1] second = {1}",
    )

    assert operators(after) == ["Slice"]


def test_a_slice_of_the_whole_goes() -> None:
    after = folded(
        "m = Shape<start = 1, end = 2>(x)  t = Slice(x, first, m, second)  y = Relu(t)",
        "int64[1] first = {0}, int64[1] second = {1}",
    )

    assert operators(after) == ["Relu"]


def test_comparisons_that_hold_for_every_size_are_decided() -> None:
    after = folded(
        """
        s = Shape(x)  n = Gather(s, zero)  more = Add(n, one)
        larger = Greater(more, n)
        p = Relu(x)  q = Neg(x)
        y = Where(larger, p, q)
        """,
        "int64 zero = {0}, int64 one = {1}",
    )

    assert "Greater" not in operators(after)


@pytest.mark.parametrize(
    "nodes",
    [
        "s = Shape(x)  n = Gather(s, zero)  c = Equal(n, two)  p = Neg(x)  y = Where(c, x, p)",
        "s = Shape(x)  n = Gather(s, zero)  c = Greater(n, zero)  p = Neg(x)  y = Where(c, x, p)",
    ],
)
def test_comparisons_that_depend_on_the_size_stay(nodes: str) -> None:
    after = folded(nodes, "int64 zero = {0}, int64 two = {2}")

    assert "Where" in operators(after) and "Gather" in operators(after)


def test_inputs_of_one_name_need_not_have_one_size() -> None:
    model = parse(
        f"""{OPSET_17} agraph (float[N, 2] a, float[N, 2] b) => (int64[k] y, int64[k] z) {{
            s = Shape<start = 0, end = 1>(a)  y = Neg(s)
            t = Shape<start = 0, end = 1>(b)  z = Neg(t)
        }}"""
    )

    assert_unchanged(FoldShapes(), model)


def test_a_reshape_by_values_that_are_no_sizes_stays() -> None:
    assert_unchanged(
        FoldShapes(),
        parse(
            f"{OPSET_17} agraph (float[N, 4] x, int64[2] s) => (float[a, b] y) "
            "{ y = Reshape(x, s) }"
        ),
    )


def test_before_opset_15_shapes_have_no_ends() -> None:
    assert_unchanged(
        FoldShapes(),
        parse(
            """
            <ir_version: 7, opset_import: ["" : 13]>
            agraph (float[N, 4] x) => (float[a] y) <int64[1] first = {0}> {
                s = Shape(x)  n = Gather(s, first)  y = ConstantOfShape(n)
            }
            """
        ),
    )


def test_in_a_branch_what_was_computed_outside_is_taken() -> None:
    before = f"""{OPSET_17} agraph (float[N, 4] x, bool c) => (int64 y) <int64 zero = {{0}}> {{
        s = Shape(x)  n = Gather(s, zero)  m = Neg(n)
        y = If(c) <
            then_branch = then () => (int64 a) {{
                t = Shape(x)  k = Gather(t, zero)  a = Add(k, m)
            }},
            else_branch = other () => (int64 b) {{ b = Identity(m) }}
        >
    }}"""
    after = before.replace("t = Shape(x)  k = Gather(t, zero)  a = Add(k, m)", "a = Add(n, m)")

    assert_rewrites(FoldShapes(), parse(before), parse(after))


def test_outputs_keep_their_names_and_nodes() -> None:
    assert_unchanged(
        FoldShapes(),
        parse(f"{OPSET_17} agraph (float[2, 3] x) => (int64[2] y) {{ y = Shape(x) }}"),
    )
