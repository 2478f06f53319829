"""convert-numbers: operators with a will of their own, loops, integers, coordinates."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from observed import observer
from test_convert_numbers import (
    HALF,
    PASS,
    check,
    error,
    floats_in,
    numbers,
    operators,
    reasons,
)

from graphopt.contract import Context, Sample
from graphopt.errors import ModelError
from graphopt.operators import all_graphs
from graphopt.registry import parse_passes
from graphopt.runtime import Session, formals_of
from graphopt.skeleton import infer_shapes, why_invalid
from graphopt.testing import (
    apply_pass,
    assert_unchanged,
    parse,
)
from graphopt_passes.quantize.convert_numbers import ConvertNumbers
from graphopt_passes.quantize.halves import BFLOAT16, FLOAT16
from graphopt_passes.simplify.fold_constants import FoldConstants

# ------------------------------------------------------------------ integers, loops, coordinates


def test_positions_are_computed_in_float32() -> None:
    model = parse(
        """
        agraph (int64[1,N] ids, float[N,64] x) => (float[N,64] y)
        <float[32,1] rate = {RATES}, int64[1] axis = {1}>
        {
            p = Cast<to = 1>(ids)
            a = MatMul(rate, p)
            t = Transpose<perm = [1, 0]>(a)
            b = Concat<axis = 1>(t, t)
            c = Cos(b)
            d = Mul(x, c)
            y = Relu(d)
        }
        """.replace("RATES", ", ".join(str(10000 ** (-i / 32)) for i in range(32)))
    )
    before = model.clone()

    change = apply_pass(PASS, model)

    assert reasons(change) == ["it computes with integers"] * 5
    ids = np.arange(5000, 5064)[np.newaxis]
    assert error(before, model, [{"ids": ids, "x": numbers(64, 64)}]) < 1e-3


def test_sizes_are_computed_in_float32() -> None:
    model = parse(
        """
        agraph (float[1,1,N,2] x) => (float[1,1,M,2] y)
        <float[4] up = {1.0, 1.0, 2.0, 1.0}, float[0] none = {}>
        {
            s = Shape(x) f = Cast<to = 1>(s) g = Mul(f, up) h = Floor(g) i = Cast<to = 7>(h)
            a = Abs(x) b = Resize<mode = "nearest">(a, none, none, i) y = Relu(b)
        }
        """
    )

    apply_pass(PASS, model)

    given = {"x": np.ones((1, 1, 3001, 2), np.float32)}
    assert Session(model).run(given)["y"].shape == (1, 1, 6002, 2)


def test_resize_keeps_roi_and_scales() -> None:
    model = parse(
        """
        agraph (float[1,2,4,4] x, float[8] roi) => (float[1,2,8,8] y)
        <float[4] scales = {1.0, 1.0, 2.0, 2.0}>
        { a = Abs(x) b = Resize<mode = "linear">(a, roi, scales) y = Relu(b) }
        """,
        roi=np.float32([0, 0, 0, 0, 1, 1, 1, 1]),
    )

    check(model)

    assert {v.dtype for v in model.graph.initializers.values()} == {ir.DataType.FLOAT}
    (resize,) = (n for n in model.graph if n.op_type == "Resize")
    assert [str(v.dtype) for v in resize.inputs if v is not None] == ["FLOAT16", "FLOAT", "FLOAT"]


def test_non_max_suppression_reads_float32() -> None:
    model = parse(
        """
        agraph (float[1,8,4] x) => (int64[n,3] k, float[1,8,4] z)
        <int64 most = {3}, float iou = {0.5}, int64[1] axis = {2}>
        {
            a = Abs(x) b = Sqrt(a)
            s = ReduceMax<keepdims = 1>(b, axis) t = Transpose<perm = [0, 2, 1]>(s)
            k = NonMaxSuppression(b, t, most, iou) z = Relu(b)
        }
        """
    )

    change = check(model)

    assert reasons(change) == ["NonMaxSuppression has no float16 form at opset 21"]
    assert model.graph.initializers["iou"].dtype == ir.DataType.FLOAT


def test_bodies_of_if() -> None:
    model = parse(
        """
        agraph (float[2] x, bool c) => (float[2] y)
        <float[2] w = {1.0, 2.0}>
        {
            a = Mul(x, w)
            b = If(c) <
                then_branch = g1 () => (float[2] t)
                { k = Constant<value = float[2] {3.0, 4.0}>() t = Add(a, k) },
                else_branch = g2 () => (e) {
                    e = If(c) <then_branch = g3 () => (u) { u = Abs(x) },
                               else_branch = g4 () => (v) { v = Relu(a) }>
                }
            >
            y = Neg(b)
        }
        """
    )

    check(model)

    assert floats_in(model) == []
    assert operators(model).count("Cast") == 2


def test_a_body_that_computes_in_float32_gives_out_float16() -> None:
    model = parse(
        """
        agraph (float[2,4] x, bool c) => (float[2,4] y)
        <int64 axis = {1}>
        {
            b = If(c) <
                then_branch = g1 () => (float[2,4] t) { t = CumSum(x, axis) },
                else_branch = g2 () => (float[2,4] e) { a = Neg(x) e = Sqrt(a) }
            >
            y = Neg(b)
        }
        """
    )

    check(model)

    assert [str(o.dtype) for g in all_graphs(model) for o in g.outputs] == [
        "FLOAT",
        "FLOAT16",
        "FLOAT16",
    ]


def test_a_branch_that_no_sample_takes_stays() -> None:
    model = parse(
        """
        agraph (float[2] x, bool c) => (float[2] y)
        {
            a = Abs(x)
            b = If(c) <
                then_branch = g1 () => (float[2] t) { s = Sqrt(a) t = Neg(s) },
                else_branch = g2 () => (float[2] e) { s2 = Exp(a) e = Relu(s2) }
            >
            y = Neg(b)
        }
        """
    )
    samples: list[Sample] = [{"x": np.float32([1, n]), "c": np.array(True)} for n in (1, 2)]

    change = apply_pass(PASS, model, observer=observer(model.clone(), samples))

    assert change.skips and {(s.node, s.reason) for s in change.skips} == {
        ("s2", "no sample takes this branch"),
        ("e", "no sample takes this branch"),
    }
    other = Session(model).run({"x": np.float32([1, 2]), "c": np.array(False)})["y"]
    assert np.allclose(other, -np.exp([1, 2]), rtol=1e-3)


def test_a_loop_counts_in_float32() -> None:
    """In float16, 2048 + 1 is 2048: it would not end."""
    model = parse(
        """
        agraph (float[2] x) => (float y, float[2] z, float[n,2] r)
        <int64 most = {5000}, bool go = {1}, float zero = {0.0}, float one = {1.0},
         float end = {3000.0}>
        {
            a = Abs(x)
            y, z, r = Loop(most, go, zero, a) <body = g (int64 i, bool c, float t, float[2] h)
                => (bool d, float u, float[2] k, float[2] s)
                { u = Add(t, one) d = Less(u, end) q = Sqrt(h) k = Tanh(q) s = Neg(k) }>
        }
        """
    )

    change = apply_pass(PASS, model)

    assert "it adds up from round to round of a Loop" in reasons(change)
    assert Session(model).run({"x": np.float32([0.5, 1])})["y"] == 3000


def test_bodies_of_loop_with_products() -> None:
    model = parse(
        """
        agraph (float[2,64] x, float[64,64] w) => (float[2,64] y, float[3,2,64] s)
        <int64 n = {3}, bool go = {1}>
        {
            y, s = Loop(n, go, x) <body = g (int64 i, bool c, float[2,64] a)
                => (bool d, float[2,64] b, float[2,64] r)
                { d = Identity(c) p = MatMul(a, w) b = Tanh(p) r = Neg(b) }>
        }
        """,
        w=numbers(64, 64, scale=0.1),
    )

    check(model)

    assert floats_in(model) == []


def test_bodies_of_scan() -> None:
    model = parse(
        """
        agraph (float[2,64] x, float[5,2,64] z, float[64,64] w) => (float[2,64] y, float[5,2,64] s)
        {
            y, s = Scan<num_scan_inputs = 1, body = g (float[2,64] a, float[2,64] e)
                => (float[2,64] b, float[2,64] r)
                { p = MatMul(a, w) q = Add(p, e) b = Tanh(q) r = Relu(b) }>(x, z)
        }
        """,
        w=numbers(64, 64, scale=0.1),
    )

    check(model)

    assert floats_in(model) == []


def test_sequences_stay() -> None:
    model = parse(
        """
        agraph (float[2,64] x, float[64,64] w) => (float[N,64] y)
        { a = MatMul(x, w) b = Abs(a) s = SequenceConstruct(a, b)
          c = ConcatFromSequence<axis = 0>(s) y = Relu(c) }
        """,
        w=numbers(64, 64),
    )

    change = check(model)

    assert set(reasons(change)) == {"a sequence or optional stays as it is"}


# ------------------------------------------------------------------ other operators


def test_codes_and_what_is_beside_them_stay() -> None:
    assert_unchanged(
        PASS,
        """
        agraph (float[2,4] x) => (float[2,4] y)
        <float q = {0.05}, uint8 z = {128}>
        {
            a = QuantizeLinear(x, q, z)
            b = DequantizeLinear(a, q, z)
            c = Relu(b)
            d = QuantizeLinear(c, q, z)
            y = DequantizeLinear(d, q, z)
        }
        """,
    )


def test_packed_weights_stay_packed() -> None:
    model = parse(
        """
        agraph (float[N,32] x, int8[32,16] w, float[1,16] s) => (float[N,16] y)
        { a = Cast<to = 1>(w) b = Mul(a, s) y = MatMul(x, b) }
        """,
        w=np.ones((32, 16), np.int8),
        s=np.abs(numbers(1, 16)),
    )

    check(model)

    assert model.graph.initializers["w"].dtype == ir.DataType.INT8
    assert_unchanged(FoldConstants(), model)


def test_operators_of_onnxruntime() -> None:
    model = parse(
        """
        <ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        agraph (float[2,64] x, float[64,64] w, float[64] b) => (float[2,64] y)
        { a = MatMul(x, w) c = com.microsoft.BiasGelu(a, b) d = Tanh(c) y = Relu(d) }
        """,
        w=numbers(64, 64),
        b=numbers(64),
    )

    check(model)

    assert {v.dtype for v in model.graph.initializers.values()} == {HALF}


def test_what_nobody_knows_stays() -> None:
    model = parse(
        """
        <ir_version: 10, opset_import: ["" : 21, "elsewhere" : 1]>
        agraph (float[2,64] x, float[64,64] w) => (float[2,64] y)
        { a = MatMul(x, w) b = elsewhere.Thing(a) c = Tanh(b) y = Relu(c) }
        """,
        w=numbers(64, 64),
    )
    infer_shapes(model)

    change = PASS.apply(model, Context(model.clone))

    assert reasons(change) == ["the type of a value is not known"] * 3
    assert operators(model) == ["Cast", "MatMul", "Cast", "Thing", "Tanh", "Relu"]
    assert formals_of("elsewhere", "Thing") is None


def test_a_transpose_that_would_crash_onnxruntime_stays() -> None:
    """A process that crashes is no test: the pattern is not written."""
    text = """
        agraph (float[5,2,64] x, float[64,64] w) => (float[2,5,64] y)
        { a = Tanh(x) t = Transpose<perm = [PERM]>(a) y = MatMul(t, w) }
    """
    model = parse(text.replace("PERM", "1, 0, 2"), w=numbers(64, 64))

    change = check(model)

    assert reasons(change) == [
        "onnxruntime 1.32 crashes where such a Transpose is float16 before a MatMul"
    ]


def test_blocked_operators_stay() -> None:
    text = """
        agraph (float[2,64] x, float[64,64] w) => (float[2,64] y)
        { a = MatMul(x, w) b = Softmax(a) y = MatMul(b, w) }
    """
    model = parse(text, w=numbers(64, 64))
    (one,) = parse_passes("convert-numbers{block=(Softmax)}")
    assert isinstance(one, ConvertNumbers)

    change = check(model, one)

    assert reasons(change) == ["Softmax is to stay float32"]
    products = parse(text, w=numbers(64, 64))
    check(products, ConvertNumbers(block=("MatMul",)))
    # Computed in float32, and stored in half the bytes.
    assert products.graph.initializers["w"].dtype == HALF


@pytest.mark.parametrize(
    ("text", "option", "provider", "reason"),
    [
        (
            "agraph (float[2] x) => (float[2] y) { y = Neg(x) }",
            "{format=bfloat16}",
            "cpu",
            "onnxruntime's CPU provider has no kernels for bfloat16 and puts no Casts around it, "
            "so that not even a MatMul would load; use float16, or weights-only",
        ),
        ("agraph (float[2] x) => (float[2] y) { y = Neg(x) }", "{format=bfloat16}", "cuda", None),
        (
            "agraph (float[2] x) => (float[2] y) { y = Neg(x) }",
            "{format=bfloat16,weights-only=true}",
            "cpu",
            None,
        ),
        (
            '<ir_version: 10, opset_import: ["" : 21, "l" : 1]>'
            " agraph (float[2] x) => (float[2] y) { y = l.f(x) }"
            ' <domain: "l", opset_import: ["" : 21]> f (a) => (b) { b = Neg(a) }',
            "",
            "cpu",
            "functions are not looked into; run inline-functions first",
        ),
        (
            '<ir_version: 8, opset_import: ["" : 5]>'
            " agraph (float[2] x) => (float[2] y) { y = Neg(x) }",
            "",
            "cpu",
            "opset 5 is older than 6; raise it first",
        ),
    ],
)
def test_refuses(text: str, option: str, provider: str, reason: str | None) -> None:
    model = parse(text)
    (one,) = parse_passes(f"convert-numbers{option}")

    assert one.refuse(model, Context(model.clone, provider=provider)) == reason


def test_bfloat16_does_not_run_on_the_cpu() -> None:
    """What `refuse` says is so."""
    model = parse(
        "agraph (float[N,64] x, float[64,64] w) => (float[N,64] y) { y = MatMul(x, w) }",
        w=numbers(64, 64),
    )
    one = ConvertNumbers("bfloat16")
    infer_shapes(model)

    one.apply(model, Context(model.clone, provider="cuda"))

    assert [n.op_type for n in model.graph] == ["Cast", "MatMul", "Cast"]
    assert model.graph.initializers["w"].dtype == ir.DataType.BFLOAT16
    assert why_invalid(model) is None
    with pytest.raises(ModelError, match="Could not find an implementation for MatMul"):
        Session(model)


def test_bfloat16_only_where_the_opset_has_it() -> None:
    model = parse(
        '<ir_version: 8, opset_import: ["" : 17]>'
        " agraph (float[1,4,8,8] x, float[4,4,3,3] w, float[8,8] v) => (float[1,4,6,8] y)"
        " { c = Conv(x, w) t = Transpose<perm = [0, 1, 3, 2]>(c) s = Abs(t) y = MatMul(s, v) }",
        w=numbers(4, 4, 3, 3),
        v=numbers(6, 8)[:6],
    )
    infer_shapes(model)

    change = ConvertNumbers("bfloat16").apply(model, Context(model.clone, provider="cuda"))

    assert reasons(change) == ["Conv has no bfloat16 form at opset 17"]


@pytest.mark.parametrize("half", [FLOAT16, BFLOAT16], ids=["float16", "bfloat16"])
def test_numbers_are_rounded_to_the_nearest(half: Any) -> None:
    """All patterns come back, and what lies between goes to the nearest, ties to even."""
    patterns = np.arange(1 << 16, dtype=np.uint16).view(half.numpy)
    every = patterns.astype(np.float32)
    same = half.rounded(every)
    assert np.array_equal(same.astype(np.float32), every, equal_nan=True)

    finite = np.unique(every[np.isfinite(every)]).astype(np.float64)
    middle = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    expected = middle.astype(half.numpy)
    assert np.array_equal(half.rounded(middle), expected)
    ends = half.rounded(np.float32([np.inf, -np.inf, np.finfo(np.float32).min]))
    assert ends.tolist() == [np.inf, -np.inf, -half.largest]
