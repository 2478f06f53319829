from __future__ import annotations

import math

import numpy as np
import pytest
from linear_layers import LAYERS, Folding, normal, operators

from graphopt.contract import Context, Sample
from graphopt.testing import apply_pass, assert_equivalent, assert_rewrites, assert_unchanged, parse
from graphopt_passes.fuse.fuse_bias import FuseBias

FOLDING = Folding(FuseBias(), "y = Add(c, k)")
layer, assert_folds, reasons = FOLDING.layer, FOLDING.assert_folds, FOLDING.reasons
WITH_BIAS = [operator for operator in LAYERS if operator != "MatMul"]


def test_adds_to_the_bias_of_gemm_with_its_beta() -> None:
    change = assert_rewrites(
        FuseBias(),
        """
        agraph (float[1,1] x) => (float[1,2] y)
        <float[1,2] w = {3.0, 4.0}, float[2] c = {1.0, 2.0}, float[1,1] k = {10.0}>
        {
            g = Gemm <alpha = 2.0, beta = 0.5> (x, w, c)
            y = Add(k, g)
        }
        """,
        """
        agraph (float[1,1] x) => (float[1,2] y)
        <float[1,2] w = {3.0, 4.0}, float[2] c = {10.5, 11.0},
         float[2] c0 = {1.0, 2.0}, float[1,1] k = {10.0}>
        {
            y = Gemm <alpha = 2.0> (x, w, c)
        }
        """,
    )

    assert change.counts == {"Add folded into Gemm": 1}


@pytest.mark.parametrize("operator", WITH_BIAS)
@pytest.mark.parametrize("follower", ["y = Add(c, k)", "y = Add(k, c)", "y = Sub(c, k)"])
@pytest.mark.parametrize("biased", [True, False])
def test_folds_each_way_of_adding(operator: str, follower: str, biased: bool) -> None:
    model = layer(operator, follower, bias=(", b)", ", b)" if biased else ")"))
    assert_folds(model, operator)


@pytest.mark.parametrize(
    ("operator", "shape"),
    [
        ("Conv", ()),
        ("Conv", (1,)),
        ("Conv", (6, 1, 1)),
        ("Conv", (1, 6, 1, 1)),
        ("Conv", (1, 1, 1, 1)),
        ("ConvTranspose", (6, 1, 1)),
        ("Gemm", ()),
        ("Gemm", (6,)),
        ("Gemm", (1, 6)),
        ("Gemm", (1, 1)),
    ],
)
def test_folds_constants_per_channel(operator: str, shape: tuple[int, ...]) -> None:
    assert_folds(layer(operator, k=normal(3, *shape)), operator)


@pytest.mark.parametrize(
    ("operator", "shape", "result", "reason"),
    [
        ("Conv", (4,), "2,6,4,4", "the constant of shape [4] is not one number per channel"),
        (
            "Conv",
            (2, 6, 1, 1),
            "2,6,4,4",
            "the constant of shape [2, 6, 1, 1] is not one number per channel",
        ),
        (
            "Conv",
            (6, 4, 4),
            "2,6,4,4",
            "the constant of shape [6, 4, 4] is not one number per channel",
        ),
        (
            "Conv",
            (1, 1, 6, 1, 1),
            "1,2,6,4,4",
            "the constant has more dimensions than the result is known to have",
        ),
        (
            "Gemm",
            (1, 1, 1),
            "1,3,6",
            "the constant has more dimensions than the result is known to have",
        ),
        ("Gemm", (3, 6), "3,6", "the constant of shape [3, 6] is not one number per channel"),
        ("Gemm", (3, 1), "3,6", "the constant of shape [3, 1] is not one number per channel"),
    ],
)
def test_leaves_constants_that_differ_elsewhere_or_raise_the_rank(
    operator: str, shape: tuple[int, ...], result: str, reason: str
) -> None:
    model = layer(operator, k=normal(3, *shape), result=(LAYERS[operator][3], result))
    assert reasons(model) == [reason]


def test_leaves_a_constant_that_makes_the_batch_or_the_channels_more() -> None:
    text = """
    agraph (float[1,4] x, float[4,1] w, float[1] k) => (float[N,M] y)
    { g = Gemm(x, w) y = Add(g, k) }
    """
    rows = parse(text, w=normal(1, 4, 1), k=normal(2, 3, 1))
    columns = parse(text, w=normal(1, 4, 1), k=normal(2, 3))

    assert reasons(rows) == ["the constant of shape [3, 1] is not one number per channel"]
    assert reasons(columns) == ["the constant of shape [3] meets 1 channels"]


def test_folds_several_in_a_row() -> None:
    change = assert_folds(
        layer(follower="d = Add(c, k)\n e = Sub(d, k)\n f = Add(k, e)\n y = Relu(f)"),
        "Conv",
        "Relu",
    )
    assert change.counts == {"Add folded into Conv": 2, "Sub folded into Conv": 1}


def test_folds_in_the_body_of_an_if() -> None:
    model = parse(
        """
        agraph (bool k, float[1,2,4] x, float[2,2,2] w, float[2,1] c) => (float[1,2,3] y)
        {
            y = If(k) <
                then_branch = then () => (float[1,2,3] t) { p = Conv(x, w) t = Add(p, c) },
                else_branch = other () => (float[1,2,3] e) { e = Conv(x, w) }
            >
        }
        """,
        w=normal(1, 2, 2, 2),
        c=normal(2, 2, 1),
    )
    before = model.clone()

    change = apply_pass(FuseBias(), model)

    assert operators(model) == ["If", "Conv", "Conv"]
    assert change.counts == {"Add folded into Conv": 1}
    samples: list[Sample] = [{"k": np.array(k), "x": normal(4, 1, 2, 4)} for k in (True, False)]
    assert_equivalent(before, model, samples=samples)


@pytest.mark.parametrize("kind", ["float16", "double"])
def test_keeps_the_element_type(kind: str) -> None:
    model = layer("Gemm", kind=kind)

    assert_folds(model, "Gemm")

    bias = next(iter(model.graph)).inputs[2]
    assert bias is not None and bias.const_value is not None
    assert bias.const_value.numpy().dtype == {"float16": np.float16, "double": np.float64}[kind]


def test_folds_beside_packed_shared_and_computed_weights() -> None:
    packed = """
    agraph (float[2,4,5] x, int8[6,4,2] w, float s, float[6,1] k) => (float[2,6,4] y)
    { v = DequantizeLinear(w, s) c = Conv(x, v) y = Add(c, k) }
    """
    weight = normal(1, 6, 4, 2) * 50
    model = parse(packed, w=weight.astype(np.int8), s=np.array(0.01, np.float32), k=normal(2, 6, 1))
    assert_folds(model, "DequantizeLinear", "Conv")

    computed = """
    agraph (float[2,4,5] x, float[6,4,2] w, float[6,1] k) => (float[2,6,4] y)
    { v = Neg(w) c = Conv(x, v) y = Add(c, k) }
    """
    assert_folds(parse(computed, k=normal(2, 6, 1)), "Neg", "Conv")

    shared = """
    agraph (float[2,4,5] x, float[6,4,2] w, float[6,1] k) => (float[2,6,4] y, float[2,6,4] z)
    { z = Conv(x, w) c = Conv(x, w) y = Add(c, k) }
    """
    assert_folds(parse(shared, w=weight, k=normal(2, 6, 1)), "Conv", "Conv")


def test_keeps_a_bias_that_others_read() -> None:
    model = layer(
        more=("y)", "y, float[2,6,4,4] z)"), node=("c = Conv", "z = Conv(x, w, b)\n c = Conv")
    )
    assert_folds(model, "Conv", "Conv")


def test_ignores_the_c_of_a_gemm_whose_beta_is_zero() -> None:
    model = layer("Gemm", beta=("beta = 0.3", "beta = 0.0"))
    assert_folds(model, "Gemm")


# ------------------------------------------------------------------ what stays


def test_leaves_matmul() -> None:
    model = parse(
        "agraph (float[3,4] x, float[4,6] w, float[6] k) => (float[3,6] y)"
        "{ m = MatMul(x, w) y = Add(m, k) }",
        w=normal(1, 4, 6),
        k=normal(2, 6),
    )
    assert reasons(model) == []


def test_leaves_a_subtraction_from_the_constant() -> None:
    assert reasons(layer(follower="y = Sub(k, c)")) == ["it subtracts from the constant"]


def test_leaves_the_sum_of_two_layers() -> None:
    assert reasons(layer(follower="d = Conv(x, w)\n y = Add(c, d)")) == []


def test_leaves_a_sum_with_itself() -> None:
    assert reasons(layer(follower="y = Add(c, c)")) == []


def test_leaves_what_others_read_too() -> None:
    model = layer(follower="y = Add(c, k)\n z = Relu(c)", more=("y)", "y, float[2,6,4,4] z)"))
    assert reasons(model) == ["other nodes read the value before it"]


def test_leaves_a_layer_that_is_an_output() -> None:
    model = layer(more=("y)", "y, float[2,6,4,4] c)"))
    assert reasons(model) == ["the value before it is an output of the graph"]


@pytest.mark.parametrize(("name", "what"), [("b", "the bias"), ("k", "the constant")])
def test_leaves_what_a_caller_can_override(name: str, what: str) -> None:
    model = layer()
    model.graph.inputs.append(model.graph.initializers[name])
    assert reasons(model) == [f"{what} is an input that a caller can override"]


def test_leaves_a_packed_bias_and_a_packed_constant() -> None:
    text = """
    agraph (float[2,4,5] x, float[6,4,2] w, int8[6,1] k, float s) => (float[2,6,4] y)
    { d = DequantizeLinear(k, s) c = Conv(x, w) y = Add(c, d) }
    """
    numbers = np.arange(6, dtype=np.int8)
    arrays = {"w": normal(1, 6, 4, 2), "s": np.array(0.1, np.float32)}
    assert reasons(parse(text, k=numbers[:, None], **arrays)) == ["the constant is packed"]

    text = """
    agraph (float[2,4,5] x, float[6,4,2] w, int8[6] b, float s, float[6,1] k) => (float[2,6,4] y)
    { d = DequantizeLinear(b, s) c = Conv(x, w, d) y = Add(c, k) }
    """
    model = parse(text, b=numbers, k=normal(2, 6, 1), **arrays)
    assert reasons(model) == ["the bias is packed"]


@pytest.mark.parametrize("number", [math.inf, math.nan])
def test_leaves_a_constant_that_is_not_finite(number: float) -> None:
    assert reasons(layer(k=np.array(number))) == ["the constant is not finite"]


def test_leaves_a_bias_that_float16_cannot_hold() -> None:
    model = layer("Gemm", "d = Add(c, k)\n y = Add(d, k)", np.array(6e4), kind="float16")
    change = apply_pass(FuseBias(), model)
    assert change.counts == {"Add folded into Gemm": 1}
    assert [s.reason for s in change.skips] == ["the folded bias overflows FLOAT16"]


def test_leaves_integers() -> None:
    model = parse(
        "agraph (int32[3,4] x, int32[4,6] w, int32[6] k) => (int32[3,6] y)"
        "{ g = Gemm(x, w) y = Add(g, k) }",
        w=np.ones((4, 6), np.int32),
        k=np.arange(6, dtype=np.int32),
    )
    assert reasons(model) == ["the constant is of type INT32"]


def test_leaves_a_weight_of_unknown_shape() -> None:
    model = parse(
        "agraph (float[2,4,5] x, float[M,4,2] w, float[6,1] k) => (float[2,6,4] y)"
        "{ c = Conv(x, w) y = Add(c, k) }",
        k=normal(2, 6, 1),
    )
    assert reasons(model) == ["the shape of the weight of Conv is not known"]


def test_leaves_opset_6_where_operators_broadcast_by_attribute() -> None:
    model = parse(
        '<ir_version: 3, opset_import: ["" : 6]>'
        "agraph (float[2,4,5] x, float[6,4,2] w, float[6] k) => (float[2,6,4] y)"
        "{ c = Conv(x, w) y = Add <broadcast = 1, axis = 1> (c, k) }",
        w=normal(1, 6, 4, 2),
        k=normal(2, 6),
    )
    # Not by apply_pass: the checker wants initializers to be inputs in such old models.
    change = FuseBias().apply(model, Context(lambda: model))
    assert not change
    assert [s.reason for s in change.skips] == ["opset 6 is older than 7; raise it first"]


def test_is_idempotent() -> None:
    model = layer()
    apply_pass(FuseBias(), model)
    assert_unchanged(FuseBias(), model)


@pytest.mark.parametrize("seed", range(24))
def test_any_gemm_keeps_its_outputs(seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows, inner, columns = (int(n) for n in generator.integers(1, 5, 3))
    trans_a, trans_b, subtracts, biased = (int(n) for n in generator.integers(0, 2, 4))
    alpha, beta = generator.uniform(-2, 2, 2)
    c_shape = [(), (1,), (columns,), (1, columns), (1, 1)][generator.integers(5)]
    k_shape = [(), (1,), (columns,), (1, columns), (1, 1)][generator.integers(5)]
    arrays = {
        "w": normal(seed, *((columns, inner) if trans_b else (inner, columns))),
        "k": normal(seed + 100, *k_shape),
        "b": normal(seed + 200, *c_shape),
    }
    model = parse(
        f"""
        agraph (float[{f"{inner},{rows}" if trans_a else f"{rows},{inner}"}] x, float[1] w,
                float[1] k, float[1] b) => (float[{rows},{columns}] y)
        {{
            g = Gemm <alpha = {alpha}, beta = {beta}, transA = {trans_a}, transB = {trans_b}>
                (x, w{", b" if biased else ""})
            y = {"Sub" if subtracts else "Add"}(g, k)
        }}
        """,
        **arrays,
    )

    assert_folds(model, "Gemm")
