"""widen-halves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt import testing
from graphopt.contract import Change, Context, Effect, Pass
from graphopt.gate import coarsest
from graphopt.operators import all_graphs
from graphopt.random_samples import random_samples
from graphopt.runtime import Session
from graphopt.scratch import Scratch, is_scratch
from graphopt.skeleton import infer_shapes
from graphopt.testing import (
    apply_pass,
    assert_equivalent,
    assert_rewrites,
    assert_unchanged,
    canonical,
)
from graphopt_passes.quantize.widen_halves import WidenHalves

PASS = WidenHalves()
HALF = ir.DataType.FLOAT16


_CONSTANT = re.compile(r"(float16(?:\[\d*\])?(?: \w+ =)? )\{([^{}]*)\}")


def with_bits(text: str) -> str:
    """The text of a model; ONNX's syntax has constants of float16 as the integers of their bits."""

    def bits(match: re.Match[str]) -> str:
        array = np.array([float(n) for n in match[2].split(",") if n.strip()], np.float16)
        return f"{match[1]}{{{', '.join(map(str, array.view(np.uint16).tolist()))}}}"

    return _CONSTANT.sub(bits, text)


def parse(text: str, **initializers: np.ndarray) -> ir.Model:
    return testing.parse(with_bits(text), **initializers)


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16)


def halves_in(model: ir.Model) -> Iterator[str | None]:
    """What is float16, but for inputs and outputs of the model."""
    outside = {*model.graph.inputs, *model.graph.outputs}
    for graph in all_graphs(model):
        values = [*graph.inputs, *graph.initializers.values()]
        values += [output for node in graph for output in node.outputs]
        yield from (v.name for v in values if v.dtype == HALF and v not in outside)


def check(model: ir.Model) -> Change:
    """The pass leaves nothing in float16, keeps the outputs, and finds nothing a second time."""
    before = model.clone()
    change = apply_pass(PASS, model)
    assert change, change.skips
    assert_equivalent(before, model, PASS.effect)
    infer_shapes(model)
    assert list(halves_in(model)) == []
    if PASS.refuse(model, Context(model.clone)) != "no value is float16":
        assert_unchanged(PASS, model)
    return change


def assert_widens(before: str, after: str) -> Change:
    return assert_rewrites(PASS, parse(before), parse(after))


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for graph in all_graphs(model) for node in graph]


# ------------------------------------------------------------------ the rewrite


def test_computes_in_float32_between_casts() -> None:
    change = assert_widens(
        """
        agraph (float16[2,3] x) => (float16[2,3] y)
        <float16[3] w = {1.0, 2.0, 3.0}>
        { m = Mul(x, w) y = Relu(m) }
        """,
        """
        agraph (float16[2,3] x) => (float16[2,3] y)
        <float[3] w = {1.0, 2.0, 3.0}>
        { x1 = Cast<to = 1>(x) m = Mul(x1, w) y1 = Relu(m) y = Cast<to = 10>(y1) }
        """,
    )

    assert change.counts == {
        "constant widened": 1,
        "value made float32": 3,
        "Cast at an input or output": 2,
    }


def test_casts_between_float32_and_float16_go() -> None:
    change = assert_widens(
        """
        agraph (float[2,3] x) => (float[2,3] y, bool[2,3] z)
        <float16 w = {2.0}>
        {
            h = Cast<to = 10>(x)
            m = Mul(h, w)
            f = Cast<to = 1>(m)
            g = Cast<to = 10>(f)
            z = Cast<to = 9>(g)
            s = Sigmoid(f)
            y = Neg(s)
        }
        """,
        """
        agraph (float[2,3] x) => (float[2,3] y, bool[2,3] z)
        <float w = {2.0}>
        { m = Mul(x, w) z = Cast<to = 9>(m) s = Sigmoid(m) y = Neg(s) }
        """,
    )

    assert change.counts["Cast dropped"] == 3


def test_a_cast_keeps_the_name_of_an_output() -> None:
    """The value of an input cannot be called like an output as well."""
    assert_widens(
        "agraph (float[2] x) => (float[2] y) { h = Cast<to = 10>(x) y = Cast<to = 1>(h) }",
        "agraph (float[2] x) => (float[2] y) { y = Cast<to = 1>(x) }",
    )


def test_casts_to_other_types_stay() -> None:
    assert_widens(
        """
        agraph (int64[2] i, double[2] d) => (int32[2] y)
        { a = Cast<to = 10>(i) b = Cast<to = 10>(d) c = Add(a, b) y = Cast<to = 6>(c) }
        """,
        """
        agraph (int64[2] i, double[2] d) => (int32[2] y)
        { a = Cast<to = 1>(i) b = Cast<to = 1>(d) c = Add(a, b) y = Cast<to = 6>(c) }
        """,
    )


def test_an_output_that_is_also_read_is_cast_for_the_caller_alone() -> None:
    assert_widens(
        "agraph (float16[2] x) => (float16[2] y, float16[2] z) { y = Relu(x) z = Neg(y) }",
        """
        agraph (float16[2] x) => (float16[2] y, float16[2] z)
        {
            x1 = Cast<to = 1>(x)
            y1 = Relu(x1)
            z1 = Neg(y1)
            y = Cast<to = 10>(y1)
            z = Cast<to = 10>(z1)
        }
        """,
    )


def test_what_is_passed_through_stays() -> None:
    model = parse(
        "agraph (float16[2] x, float16[2] w) => (float16[2] y) { y = Add(x, w) }",
        w=np.float16([1.0, 2.0]),
    )
    graph = model.graph
    graph.outputs.extend([graph.inputs[0], graph.initializers["w"]])

    apply_pass(PASS, model)

    assert [o.name for o in graph.outputs] == ["y", "x", "w"]
    assert {o.dtype for o in graph.outputs} == {HALF}
    assert operators(model) == ["Cast", "Cast", "Add", "Cast"]
    assert_unchanged(PASS, model)


def test_a_constant_that_a_caller_can_override_stays_float16() -> None:
    model = parse(
        "agraph (float16[2] x, float16[2] w) => (float16[2] y) { y = Add(x, w) }",
        w=np.float16([1.0, 2.0]),
    )
    model.graph.inputs.append(model.graph.initializers["w"])

    apply_pass(PASS, model)

    assert model.graph.initializers["w"].dtype == HALF
    given = {"x": np.float16([1, 1]), "w": np.float16([5, 6])}
    assert Session(model).run(given)["y"].tolist() == [6, 7]


def test_new_names_are_new() -> None:
    model = parse(
        """
        agraph (float16[2] x) => (float16[2] y)
        { x_float = Neg(x) Cast_y = Relu(x_float) y_float = Neg(Cast_y) y = Relu(y_float) }
        """
    )

    check(model)

    names = [o.name for node in model.graph for o in node.outputs]
    assert len(set(names)) == len(names)


def test_constants_of_every_kind() -> None:
    model = parse(
        """
        agraph (float16[N,3] x) => (float16[N,3] y)
        <float16[0] nothing = {}, float16 one = {1.0}>
        {
            c = Constant<value = float16[3] {0.5, 65504.0, -2.0}>()
            s = Shape(x)
            f = ConstantOfShape<value = float16[1] {3.0}>(s)
            e = EyeLike<dtype = 10>(x)
            k = CastLike(s, one)
            n = ReduceSum(nothing)
            a = Add(x, c)
            b = Add(a, f)
            d = Add(b, e)
            g = Slice(k, start, end)
            h = Add(d, g)
            y = Add(h, n)
        }
        """
    )
    for name, number in (("start", 1), ("end", 2)):
        value = next(v for n in model.graph for v in n.inputs if v is not None and v.name == name)
        value.const_value = ir.tensor(np.int64([number]), name=name)
        value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([1])
        model.graph.register_initializer(value)

    change = check(model)

    assert change.counts["constant widened"] == 4


def test_a_type_that_random_numbers_state() -> None:
    model = parse(
        """
        agraph (int64[2] x) => (float16[2] y)
        { a = RandomNormal<dtype = 10, shape = [2]>() b = RandomUniformLike<dtype = 10>(x)
          y = Add(a, b) }
        """
    )

    apply_pass(PASS, model)

    infer_shapes(model)
    assert list(halves_in(model)) == []
    assert Session(model).run({"x": np.int64([1, 2])})["y"].dtype == np.float16


def test_range() -> None:
    """onnxruntime has no Range of float16, and takes it by a Cast."""
    model = parse(
        """
        agraph (float16 x) => (float16[N] y)
        <float16 zero = {0.0}, float16 half = {0.5}>
        { a = Abs(x) y = Range(zero, a, half) }
        """
    )
    before = model.clone()

    apply_pass(PASS, model)

    given = {"x": np.array(2.25, np.float16)}
    assert np.array_equal(Session(model).run(given)["y"], np.float16([0, 0.5, 1, 1.5, 2]))
    assert interface(model) == interface(before)


def interface(model: ir.Model) -> list[tuple[str | None, str]]:
    return [(v.name, str(v.type)) for v in (*model.graph.inputs, *model.graph.outputs)]


@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan, 65504.0, 6e-8, -0.0])
def test_numbers_of_every_kind(number: float) -> None:
    model = parse(
        "agraph (float16[2] x, float16[2] w) => (float16[2] y) { y = Mul(x, w) }",
        w=np.float16([number, 1.0]),
    )

    check(model)

    (array,) = (v.const_value.numpy() for v in model.graph.initializers.values())  # type: ignore[union-attr]
    assert array.dtype == np.float32
    assert np.array_equal(array, np.float32([np.float16(number), 1.0]), equal_nan=True)


def test_large_constants_go_to_the_scratch_file() -> None:
    model = parse(
        "agraph (float16[N,999] x, float16[999,512] w) => (float16[N,512] y) { y = MatMul(x, w) }",
        w=numbers(999, 512),
    )
    given = model.graph.initializers["w"].const_value
    assert given is not None

    apply_pass(PASS, model, scratch=Scratch())

    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None and is_scratch(tensor)
    assert np.array_equal(tensor.numpy(), given.numpy())
    assert given.dtype == HALF


# ------------------------------------------------------------------ bodies


def test_bodies_of_if() -> None:
    model = parse(
        """
        agraph (float16[2] x, bool c) => (float16[2] y)
        <float16[2] w = {1.0, 2.0}>
        {
            a = Mul(x, w)
            y = If(c) <
                then_branch = g1 () => (float16[2] t)
                { k = Constant<value = float16[2] {3.0, 4.0}>() t = Add(a, k) },
                else_branch = g2 () => (float16[2] e) { b = Cast<to = 1>(x) e = Cast<to = 10>(b) }
            >
        }
        """
    )

    check(model)

    assert [str(o.type) for g in all_graphs(model) for o in g.outputs] == [
        "FLOAT16",
        "FLOAT",
        "FLOAT",
    ]


def test_bodies_that_state_no_types() -> None:
    model = parse(
        """
        agraph (float16[2] x, bool c) => (float16[2] y)
        {
            y = If(c) <
                then_branch = g1 () => (t) { t = Neg(x) },
                else_branch = g2 () => (e) {
                    e = If(c) <then_branch = g3 () => (u) { u = Abs(x) },
                               else_branch = g4 () => (v) { v = Relu(x) }>
                }
            >
        }
        """
    )

    check(model)

    assert operators(model).count("Cast") == 2


def test_bodies_of_loop() -> None:
    model = parse(
        """
        agraph (float16[2] x, float16[2] z) => (float16[2] y, float16[3,2] s)
        <int64 n = {3}, bool go = {1}>
        {
            y, s = Loop(n, go, x) <body = g (int64 i, bool c, float16[2] a)
                => (bool d, float16[2] b, float16[2] r)
                {
                    d = Identity(c)
                    w = Cast<to = 10>(i)
                    p = Mul(a, w)
                    b = Add(p, z)
                    r = Neg(b)
                }>
        }
        """
    )

    change = check(model)

    assert change.counts["Cast at an input or output"] == 4


def test_bodies_of_scan() -> None:
    model = parse(
        """
        agraph (float16[2] x, float16[5,2] z) => (float16[2] y, float16[5,2] s)
        {
            y, s = Scan<num_scan_inputs = 1, body = g (float16[2] a, float16[2] e)
                => (float16[2] b, float16[2] r) { b = Add(a, e) r = Relu(b) }>(x, z)
        }
        """
    )

    check(model)


def test_a_cast_of_a_value_outside_stays_where_a_body_gives_it_out() -> None:
    model = parse(
        """
        agraph (float[2] x, bool c) => (float[2] y)
        {
            h = Cast<to = 10>(x)
            y = If(c) <then_branch = g1 () => (float[2] t) { t = Cast<to = 1>(h) },
                       else_branch = g2 () => (float[2] e) { e = Neg(x) }>
        }
        """
    )

    check(model)

    assert sorted(operators(model)) == ["Cast", "If", "Neg"]


# ------------------------------------------------------------------ packed and quantized


def test_scales_of_codes() -> None:
    text = """
        agraph (float16[N,32] x, int8[32,16] w, float16[16] s) => (float16[N,16] y)
        <float16 q = {0.05}, uint8 z = {128}>
        {
            a = QuantizeLinear(x, q, z)
            b = DequantizeLinear(a, q, z)
            c = DequantizeLinear<axis = 1>(w, s)
            y = MatMul(b, c)
        }
    """
    codes = np.random.default_rng(0).integers(-127, 128, (32, 16)).astype(np.int8)
    model = parse(text, w=codes, s=np.abs(numbers(16)) / np.float16(100))
    # Integers may come out as the next one to them.
    before = model.clone()

    apply_pass(PASS, model)

    infer_shapes(model)
    assert list(halves_in(model)) == []
    sample = random_samples(before, 1)[0]
    first, second = Session(before).run(sample)["y"], Session(model).run(sample)["y"]
    assert np.abs(first - second).max() < 0.01 * np.abs(first).max()
    assert_unchanged(PASS, model)


def test_types_that_are_stated_beside_scales() -> None:
    header = '<ir_version: 10, opset_import: ["" : 23]>'
    body = (
        "{{ c = QuantizeLinear<precision = {0}>(x, s, z)"
        " d = DequantizeLinear<output_dtype = {0}>(c, s, z) {1} }}"
    )
    model = parse(
        f"{header} agraph (float16[4] x) => (float16[4] y)"
        f" <float16 s = {{0.5}}, uint8 z = {{128}}> {body.format(10, 'y = Neg(d)')}"
    )

    apply_pass(PASS, model)

    stated = [a.as_int() for n in model.graph for a in n.attributes.values() if a.name != "to"]
    assert stated == [1, 1]
    infer_shapes(model)
    assert list(halves_in(model)) == []


def test_codes_that_are_widened_by_casts_stay_packed() -> None:
    model = parse(
        """
        agraph (float16[N,32] x, int8[32,16] w, float16[1,16] s) => (float16[N,16] y)
        { a = Cast<to = 10>(w) b = Mul(a, s) y = MatMul(x, b) }
        """,
        w=np.ones((32, 16), np.int8),
        s=np.abs(numbers(1, 16)),
    )

    check(model)

    assert operators(model) == ["Cast", "Cast", "Mul", "MatMul", "Cast"]
    assert model.graph.initializers["w"].dtype == ir.DataType.INT8


# ------------------------------------------------------------------ left alone


def reasons(model: str | ir.Model) -> list[str]:
    return [skip.reason for skip in assert_unchanged(PASS, model).skips]


def test_leaves_what_is_float16_at_the_interface_alone() -> None:
    text = """
        agraph (float16[2] x, float16[2] i) => (float16[2] y, int32[2] j)
        { a = Cast<to = 1>(x) b = Neg(a) y = Cast<to = 10>(b) j = Cast<to = 6>(i) }
    """

    assert reasons(text) == []


def test_leaves_other_domains() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        agraph (float16[2] x, float16[2] b) => (float16[2] y)
        { a = Neg(x) y = com.microsoft.BiasGelu(a, b) }
    """
    model = parse(text)
    before = canonical(model)

    change = PASS.apply(model, Context(model.clone))

    assert not change
    assert [s.reason for s in change.skips] == [
        "com.microsoft.BiasGelu may do something else in float32"
    ]
    assert canonical(model) == before


def test_other_domains_may_be_beside_it() -> None:
    model = parse(
        """
        <ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        agraph (float16[2,4] x, float[4] b) => (float[2,4] y, float16[2,4] z)
        { a = Cast<to = 1>(x) y = com.microsoft.BiasGelu(a, b) z = Neg(x) }
        """
    )

    check(model)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            "s = SequenceConstruct(x, x) y = ConcatFromSequence<axis = 0>(s)",
            "a sequence or optional of float16 is not widened",
        ),
        (
            "o = Optional(x) y = OptionalGetElement(o)",
            "a sequence or optional of float16 is not widened",
        ),
        ("f = Unheard(x) y = Neg(f)", "its type is not known"),
    ],
)
def test_leaves_what_cannot_be_widened(body: str, reason: str) -> None:
    model = parse(f"agraph (float16[2] x) => (float16[N] y) {{ {body} }}")
    infer_shapes(model)
    before = canonical(model)

    change = PASS.apply(model, Context(model.clone))

    assert not change
    assert [s.reason for s in change.skips] == [reason]
    assert canonical(model) == before


def test_leaves_operators_of_which_onnx_knows_nothing() -> None:
    model = parse(
        '<ir_version: 10, opset_import: ["" : 12]>'
        " agraph (float16[2,4] x) => (float16[2,4] y) { y = Gelu(x) }"
    )
    change = PASS.apply(model, Context(model.clone))

    assert [s.reason for s in change.skips] == ["onnx has no schema of Gelu at opset 12"]


def test_leaves_bits_that_are_meant_as_such() -> None:
    model = parse(
        '<ir_version: 11, opset_import: ["" : 26]>'
        " agraph (float16[2] x) => (uint16[2] y) { a = Neg(x) y = BitCast<to = 4>(a) }"
    )
    infer_shapes(model)

    change = PASS.apply(model, Context(model.clone))

    assert [s.reason for s in change.skips] == ["BitCast has no float32 form"]


def test_what_nobody_reads_needs_no_type() -> None:
    """As the mask of a Dropout of old opsets."""
    model = parse(
        '<ir_version: 10, opset_import: ["" : 9]>'
        " agraph (float16[2] x) => (float16[2] y) { a = Neg(x) y, mask = Dropout(a) }"
    )

    assert apply_pass(PASS, model)
    assert_unchanged(PASS, model)


def test_leaves_bfloat16() -> None:
    model = parse(
        """
        agraph (float16[2] x, bfloat16[2] b, bfloat16[2] w) => (float16[2] y, bfloat16[2] z)
        { y = Neg(x) z = Add(b, w) }
        """,
        w=np.ones(2, ml_dtypes.bfloat16),
    )

    apply_pass(PASS, model)

    assert model.graph.initializers["w"].dtype == ir.DataType.BFLOAT16
    assert interface(model)[-1] == ("z", "BFLOAT16")


@pytest.mark.parametrize(
    ("text", "provider", "reason"),
    [
        (
            "agraph (float16[2] x) => (float16[2] y) { y = Neg(x) }",
            "cuda",
            "the provider cuda has kernels for float16",
        ),
        ("agraph (float[2] x) => (float[2] y) { y = Neg(x) }", "cpu", "no value is float16"),
        (
            '<ir_version: 10, opset_import: ["" : 21, "l" : 1]>'
            " agraph (float16[2] x) => (float16[2] y) { y = l.f(x) }"
            ' <domain: "l", opset_import: ["" : 21]> f (a) => (b) { b = Neg(a) }',
            "cpu",
            "functions are not looked into; run inline-functions first",
        ),
        (
            '<ir_version: 8, opset_import: ["" : 5]>'
            " agraph (float16[2] x) => (float16[2] y) { y = Neg(x) }",
            "cpu",
            "opset 5 is older than 6; raise it first",
        ),
    ],
)
def test_refuses(text: str, provider: str, reason: str) -> None:
    model = parse(text)

    assert PASS.refuse(model, Context(model.clone, provider=provider)) == reason


# ------------------------------------------------------------------ the gate


def products_in_half() -> ir.Model:
    """float32 outside, and no float16 is left inside when it is widened.

    onnxruntime drops Casts that meet, so that numbers are rounded only where float16 is moved.
    """
    text = """
        agraph (float[64,64] x, float16[64,64] w) => (float[64,64] y)
        {
            h = Cast<to = 10>(x)
            t = Transpose<perm = [1, 0]>(h)
            a = MatMul(t, w)
            u = Transpose<perm = [1, 0]>(a)
            f = Cast<to = 1>(u)
            i = Identity(f)
            y = Neg(i)
        }
    """
    return parse(text, w=numbers(64, 64))


def test_the_gate_allows_what_float16_rounded_before() -> None:
    run = graphopt.optimize(
        products_in_half(),
        passes="widen-halves,drop-identity",
        random_samples=4,
        benchmark=False,
        strict=True,
    )

    assert [step.verdict for step in run.steps] == ["kept", "kept"]
    (widened,) = run.numerics["as written"]
    # More than float32 would be allowed.
    assert widened.dtype == "float32" and 1e-4 < widened.rel_l2 < 2e-3


@dataclass(frozen=True)
class SpoilOutput(Pass):
    """Widen, and multiply the output with what float32 forbids and float16 does not, or does."""

    name: ClassVar[str] = "spoil-output"
    effect: ClassVar[Effect] = Effect.ROUNDING

    factor: float = 1.001

    def apply(self, model: ir.Model, context: Context) -> Change:
        change = PASS.apply(model, context) if PASS.refuse(model, context) is None else Change()
        node = model.graph[-1]
        scale = ir.Value(
            name=f"scale_{self.factor}",
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape([]),
            const_value=ir.tensor(np.float32(self.factor)),
        )
        model.graph.register_initializer(scale)
        product = ir.node("Mul", [node.inputs[0], scale])
        product.outputs[0].name = f"product_{self.factor}"
        model.graph.insert_before(node, product)
        node.replace_input_with(0, product.outputs[0])
        change.count("spoiled")
        return change


def test_what_is_only_stored_in_float16_stays() -> None:
    """As the scales of packed weights are: wide, they would take twice the bytes for nothing."""
    text = """
        agraph (float16[N,4] x, float16[4,8] w, float16[1,8] s, int8[4,8] q) => (float16[N,8] y)
        {
            k = Constant<value = float16[2] {1.0, 2.0}>() l = Cast<to = 1>(k)
            f = Cast<to = 1>(w) d = Cast<to = 1>(s) c = Cast<to = 1>(q) p = Mul(c, d)
            t = Add(f, p) u = Cast<to = 10>(t) y = MatMul(x, u)
        }
    """
    halves = {"w": np.ones((4, 8), np.float16), "s": np.ones((1, 8), np.float16)}
    model = parse(text, **halves, q=np.ones((4, 8), np.int8))

    apply_pass(WidenHalves(), model)

    assert {name: v.dtype for name, v in model.graph.initializers.items()} == {
        "w": ir.DataType.FLOAT16, "s": ir.DataType.FLOAT16, "q": ir.DataType.INT8
    }  # fmt: skip
    (constant,) = [node for node in model.graph if node.op_type == "Constant"]
    assert constant.attributes["value"].as_tensor().dtype == ir.DataType.FLOAT16


def test_leaves_a_model_with_nothing_but_stored_halves() -> None:
    assert_unchanged(
        WidenHalves(),
        parse(
            "agraph (float[N,4] x, float16[4,8] w) => (float[N,8] y)"
            " { f = Cast<to = 1>(w) y = MatMul(x, f) }",
            w=np.ones((4, 8), np.float16),
        ),
    )


@pytest.mark.parametrize(
    ("factors", "verdicts"),
    [
        ([1.001], ["kept"]),
        ([1.01], ["rolled back"]),
        # float16 is gone, so that a step is held to float32.
        ([1.0005, 1.001], ["kept", "rolled back"]),
    ],
)
def test_the_gate_still_looks(factors: list[float], verdicts: list[str]) -> None:
    run = graphopt.optimize(
        products_in_half(),
        passes=[SpoilOutput(factor) for factor in factors],
        random_samples=4,
        benchmark=False,
    )

    assert [step.verdict for step in run.steps] == verdicts


def test_the_coarser_type_counts() -> None:
    assert coarsest({}, {}) == {}
    assert coarsest({"a": "float16"}, {"a": "bfloat16", "b": "float16"}) == {
        "a": "bfloat16",
        "b": "float16",
    }
    assert coarsest({"a": "bfloat16"}, {"a": "float16"}) == {"a": "bfloat16"}
