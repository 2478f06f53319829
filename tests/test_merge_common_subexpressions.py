from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from optimized import kernels

from graphopt.contract import Context, Effect
from graphopt.testing import (
    apply_pass,
    assert_equivalent,
    assert_rewrites,
    assert_unchanged,
    parse,
)
from graphopt_passes.share.lost_fusions import WEIGHT_ONLY
from graphopt_passes.share.merge_common_subexpressions import MergeCommonSubexpressions


def test_equal_chains_merge_as_a_whole() -> None:
    change = assert_rewrites(
        MergeCommonSubexpressions(),
        """
        agraph (float[4] x) => (float[4] y)
        {
            a = LeakyRelu<alpha=0.1>(x) b = Exp(a) c = Neg(b)
            d = LeakyRelu<alpha=0.1>(x) e = Exp(d) f = Neg(e)
            y = Sub(c, f)
        }
        """,
        """
        agraph (float[4] x) => (float[4] y)
        { a = LeakyRelu<alpha=0.1>(x) b = Exp(a) c = Neg(b) y = Sub(c, c) }
        """,
    )

    assert change.counts == {"LeakyRelu merged": 1, "Exp merged": 1, "Neg merged": 1}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("LeakyRelu<alpha=0.1>(x)", "LeakyRelu<alpha=0.2>(x)"),
        ("LeakyRelu<alpha=0.0>(x)", "LeakyRelu<alpha=-0.0>(x)"),
        ("Exp(x)", "Neg(x)"),
        ("Sub(x, z)", "Sub(z, x)"),
        ("Max(x, z)", "Max(z, x)"),
        ("Min(x, z)", "Min(z, x)"),
        ("Sum(x, z, x)", "Sum(z, x, x)"),
        ("Clip(x, k)", "Clip(x, , k)"),
        ("RandomNormalLike(x)", "RandomNormalLike(x)"),
        ("RandomNormalLike<seed=1.0>(x)", "RandomNormalLike<seed=1.0>(x)"),
        ("RandomUniform<shape=[4]>()", "RandomUniform<shape=[4]>()"),
        ("Bernoulli(p)", "Bernoulli(p)"),
        ("Dropout(x, half, yes)", "Dropout(x, half, yes)"),
    ],
)
def test_keeps_what_may_differ(first: str, second: str) -> None:
    assert_unchanged(
        MergeCommonSubexpressions(),
        f"agraph (float[4] x, float[4] z, float k) => (float[4] y)"
        f" <float half = {{0.5}}, bool yes = {{1}}>"
        f" {{ p = Sigmoid(x) a = {first} b = {second} c = Sub(a, b) y = Sub(c, p) }}",
    )


def test_two_draws_are_told() -> None:
    change = assert_unchanged(
        MergeCommonSubexpressions(),
        "agraph (float[4] x) => (float[4] y)"
        " { a = RandomNormalLike(x) b = RandomNormalLike(x) y = Sub(a, b) }",
    )

    assert [s.reason for s in change.skips] == ["it draws at random, and two draws differ"]


@pytest.mark.parametrize("operator", ["Add", "Mul", "Sum", "Mean"])
def test_order_of_operands_where_it_changes_no_bit(operator: str) -> None:
    text = "agraph (float[N] x, float[M] z) => (float[K] y) { %s }"
    model = parse(text % f"a = {operator}(x, z) b = {operator}(z, x) y = Sub(a, b)")
    before = model.clone()

    assert apply_pass(MergeCommonSubexpressions(), model).counts == {f"{operator} merged": 1}

    special = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, 3e38], np.float32)
    samples = [
        {"x": np.repeat(special, 7), "z": np.tile(special, 7)},
        {"x": special, "z": special[:1]},
    ]
    assert_equivalent(before, model, Effect.EXACT, samples)


def test_order_of_logical_operands() -> None:
    assert_rewrites(
        MergeCommonSubexpressions(),
        "agraph (bool[4] x, bool[4] z) => (bool[4] y) { a = And(x, z) b = And(z, x)"
        " c = Equal(a, z) d = Equal(z, b) e = Xor(c, x) f = Xor(x, d) y = Or(e, f) }",
        "agraph (bool[4] x, bool[4] z) => (bool[4] y)"
        " { a = And(x, z) c = Equal(a, z) e = Xor(c, x) y = Or(e, e) }",
    )


def test_maximum_depends_on_the_order_of_zeros() -> None:
    """Why Max is not among the commutative operators."""
    one, other = (
        parse(f"agraph (float[N] x, float[N] z) => (float[N] y) {{ y = Max({order}) }}")
        for order in ("x, z", "z, x")
    )
    zeros = np.zeros(9, np.float32)

    with pytest.raises(AssertionError, match="not bit-identical"):
        assert_equivalent(one, other, Effect.EXACT, [{"x": zeros, "z": -zeros}])


def test_several_outputs_and_those_left_out() -> None:
    assert_rewrites(
        MergeCommonSubexpressions(),
        "agraph (float[4] x) => (float[2] y, int64[2] i) <int64[1] k = {2}>"
        " { a, b = TopK(x, k) c, d = TopK(x, k) y = Sub(a, c) i = Sub(b, d) }",
        "agraph (float[4] x) => (float[2] y, int64[2] i) <int64[1] k = {2}>"
        " { a, b = TopK(x, k) y = Sub(a, a) i = Sub(b, b) }",
    )


def test_output_that_the_first_leaves_out_keeps_the_second() -> None:
    model = parse(
        "agraph (float[1, 1, 4] x) => (float[1, 1, 3] y) {"
        " a, b = MaxPool<kernel_shape=[2]>(x) c, d = MaxPool<kernel_shape=[2]>(x)"
        " e = Cast<to=1>(d) f = Sub(a, c) y = Sub(f, e) }"
    )
    model.graph[0].outputs[1].name = ""

    change = apply_pass(MergeCommonSubexpressions(), model)

    assert not change
    assert [s.reason for s in change.skips] == [
        "the node that computes the same leaves out an output that is read here"
    ]


def test_number_of_outputs_counts() -> None:
    assert_unchanged(
        MergeCommonSubexpressions(),
        "agraph (float[6] x) => (float[3] y, float[2] z)"
        " { a, b = Split<axis=0, num_outputs=2>(x) y = Sub(a, b)"
        "   c, d, e = Split<axis=0, num_outputs=3>(x) z = Sub(c, e) }",
    )


def test_one_becomes_the_output_and_two_outputs_stay() -> None:
    change = assert_rewrites(
        MergeCommonSubexpressions(),
        "agraph (float[4] x) => (float[4] y, float[4] z, float[4] w)"
        " { a = Exp(x) w = Neg(a) y = Exp(x) z = Exp(x) }",
        "agraph (float[4] x) => (float[4] y, float[4] z, float[4] w)"
        " { y = Exp(x) w = Neg(y) z = Exp(x) }",
    )

    assert [s.node for s in change.skips] == ["z"]


def test_tensors_in_attributes_are_compared_by_content() -> None:
    text = """
        agraph (int64[1] n) => (float[M] y)
        {
            a = ConstantOfShape<value = float[1] {%s}>(n)
            b = ConstantOfShape<value = float[1] {%s}>(n)
            y = Sub(a, b)
        }
    """
    assert_rewrites(
        MergeCommonSubexpressions(),
        text % ("2.0", "2.0"),
        "agraph (int64[1] n) => (float[M] y)"
        " { a = ConstantOfShape<value = float[1] {2.0}>(n) y = Sub(a, a) }",
    )
    assert_unchanged(MergeCommonSubexpressions(), text % ("2.0", "3.0"))
    assert_unchanged(MergeCommonSubexpressions(), text % ("0.0", "-0.0"))


def test_subgraphs_merge_within_and_with_outer_graphs_before_them() -> None:
    assert_rewrites(
        MergeCommonSubexpressions(),
        """
        agraph (bool c, float[2] x) => (float[2] y)
        {
            a = Exp(x)
            b = If(c) <
                then_branch = then () => (float[2] t) {
                    d = Exp(x) e = Neg(d) f = Neg(a) t = Sub(e, f)
                },
                else_branch = other () => (float[2] u) { g = Neg(x) u = Exp(x) }
            >
            h = Neg(x)
            i = Add(a, h)
            y = Add(i, b)
        }
        """,
        """
        agraph (bool c, float[2] x) => (float[2] y)
        {
            a = Exp(x)
            b = If(c) <
                then_branch = then () => (float[2] t) { e = Neg(a) t = Sub(e, e) },
                else_branch = other () => (float[2] u) { g = Neg(x) u = Exp(x) }
            >
            h = Neg(x)
            i = Add(a, h)
            y = Add(i, b)
        }
        """,
    )


def test_branches_do_not_see_each_other() -> None:
    assert_unchanged(
        MergeCommonSubexpressions(),
        """
        agraph (bool c, float[2] x) => (float[2] y)
        {
            y = If(c) <
                then_branch = then () => (float[2] t) { d = Exp(x) t = Neg(d) },
                else_branch = other () => (float[2] u) { e = Exp(x) u = Abs(e) }
            >
        }
        """,
    )


def test_nodes_with_subgraphs_stay() -> None:
    change = assert_unchanged(
        MergeCommonSubexpressions(),
        """
        agraph (bool c, float[2] x) => (float[2] y)
        {
            a = If(c) <then_branch = t1 () => (float[2] t) { t = Neg(x) },
                       else_branch = e1 () => (float[2] e) { e = Abs(x) }>
            b = If(c) <then_branch = t2 () => (float[2] u) { u = Exp(x) },
                       else_branch = e2 () => (float[2] f) { f = Abs(x) }>
            y = Sub(a, b)
        }
        """,
    )

    assert [s.reason for s in change.skips] == ["it has a subgraph, and those are not compared"]


def test_domains_of_onnxruntime_merge_and_unknown_ones_stay() -> None:
    header = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1, "custom" : 1]>\n'
    known, unknown, sampling = (
        parse(
            header + f"agraph (float[2] x) => (float[2] y)"
            f" {{ a = {operator}(x) b = {operator}(x) y = Sub(a, b) }}"
        )
        for operator in ("com.microsoft.QuickGelu", "custom.Counter", "com.microsoft.Sampling")
    )

    def applied(model: ir.Model) -> int:
        return MergeCommonSubexpressions().apply(model, Context(lambda: model)).counts.total()

    assert [applied(known), applied(unknown), applied(sampling)] == [1, 0, 0]


def test_dead_duplicates_and_absent_inputs() -> None:
    assert_rewrites(
        MergeCommonSubexpressions(),
        "agraph (float[2] x, float k) => (float[2] y)"
        " { a = Clip(x, k, ) b = Clip(x, k) c = Clip(x, k) y = Sub(a, b) }",
        "agraph (float[2] x, float k) => (float[2] y) { a = Clip(x, k, ) y = Sub(a, a) }",
    )


@pytest.mark.parametrize("seed", range(10))
def test_random_graphs_keep_every_result(seed: int) -> None:
    generator = np.random.default_rng(seed)
    values = ["x", "z"]
    lines = []
    for index in range(40):
        left, right = (str(v) for v in generator.choice(values, 2))
        operator = generator.choice(["Add", "Mul", "Sub", "Max", "Neg", "Relu", "Abs", "Sum"])
        operands = left if operator in ("Neg", "Relu", "Abs") else f"{left}, {right}"
        lines.append(f"v{index} = {operator}({operands})")
        values = [*values[-4:], f"v{index}", "x"]
    outputs = [f"v{i}" for i in (12, 25, 38, 39)]
    model = parse(
        f"agraph (float[5] x, float[5] z) => ({', '.join(f'float[5] {o}' for o in outputs)})"
        f" {{ {' '.join(lines)} }}"
    )
    before = model.clone()
    samples = [{n: generator.choice([0.0, -0.0, 1.0, -2.0], 5).astype(np.float32) for n in "xz"}]

    apply_pass(MergeCommonSubexpressions(), model)

    assert_equivalent(before, model, Effect.EXACT, samples)
    assert not apply_pass(MergeCommonSubexpressions(), model)


def test_ten_thousand_equal_chains() -> None:
    value = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT))
    nodes = [ir.node("Exp", [value])]
    for _ in range(10_000):
        nodes.append(ir.node("Neg", [value]))
        nodes.append(ir.node("Abs", nodes[-1].outputs))
    graph = ir.Graph([value], nodes[0].outputs, nodes=nodes, opset_imports={"": 21})
    model = ir.Model(graph, ir_version=10)

    change = MergeCommonSubexpressions().apply(model, Context(lambda: model))

    assert change.counts == {"Neg merged": 9_999, "Abs merged": 9_999}


CODES = np.random.default_rng(0).integers(-99, 99, (64, 64)).astype(np.int8)
SCALES = np.linspace(0.01, 0.02, 64, dtype=np.float32)


@pytest.mark.parametrize("made", ["Constant", "Gather", "Reshape"])
def test_weights_that_become_matmulnbits_are_made_for_each(made: str, tmp_path: Path) -> None:
    """Each has a DequantizeLinear of its own, and data that nothing else reads."""
    make = {
        "Constant": "{0} = Constant()",
        "Gather": "{0} = Gather(table, codes)",
        "Reshape": "{0} = Reshape(flat, shape)",
    }[made]
    model = parse(
        f"""
        agraph (float[2, 3, 64] x, float[2, 3, 64] z, float[64] s, float[64] s2, int8[4096] flat,
                int8[200] table, int32[64, 64] codes, int64[2] shape)
            => (float[2, 3, 64] y, float[2, 3, 64] y2)
        {{
            {make.format("w")}  a = DequantizeLinear<axis=1>(w, s)   y = MatMul(x, a)
            {make.format("v")}  b = DequantizeLinear<axis=1>(v, s2)  y2 = MatMul(z, b)
        }}
        """,
        s=SCALES,
        s2=SCALES.copy(),
        table=np.arange(-100, 100, dtype=np.int8),
        codes=CODES.astype(np.int32) + 100,
        flat=CODES.reshape(-1),
        shape=np.int64([64, 64]),
    )
    for node in model.graph:
        if node.op_type == "Constant":
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(CODES))
    before = kernels(model, tmp_path)

    change = assert_unchanged(MergeCommonSubexpressions(), model)

    assert [skip.reason for skip in change.skips] == [WEIGHT_ONLY]
    assert kernels(model, tmp_path) == before


def test_a_weight_that_is_shared_anyway_has_nothing_to_lose(tmp_path: Path) -> None:
    """Two DequantizeLinear of one initializer are not fused; one of two readers is split again."""
    model = parse(
        """
        agraph (float[2, 3, 64] x, float[2, 3, 64] z, int8[64, 64] w, float[64] s)
            => (float[2, 3, 64] y, float[2, 3, 64] y2)
        {
            a = DequantizeLinear<axis=1>(w, s)  y = MatMul(x, a)
            b = DequantizeLinear<axis=1>(w, s)  y2 = MatMul(z, b)
        }
        """,
        w=CODES,
        s=SCALES,
    )
    before = kernels(model, tmp_path)

    assert apply_pass(MergeCommonSubexpressions(), model).counts == {"DequantizeLinear merged": 1}
    assert before == {"DequantizeLinear": 2, "MatMul": 2}
    assert kernels(model, tmp_path) == before
