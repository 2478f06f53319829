from __future__ import annotations

import math

import numpy as np
import pytest
from linear_layers import LAYERS, Folding, normal, operators

from graphopt.contract import Sample
from graphopt.testing import apply_pass, assert_equivalent, assert_rewrites, assert_unchanged, parse
from graphopt_passes.fuse.fuse_scale import FuseScale

FOLDING = Folding(FuseScale(), "y = Mul(c, k)")
layer, assert_folds, reasons = FOLDING.layer, FOLDING.assert_folds, FOLDING.reasons


def test_scales_weight_and_bias_and_keeps_beta_out_of_the_node() -> None:
    change = assert_rewrites(
        FuseScale(),
        """
        agraph (float[1,1] x) => (float[1,2] y)
        <float[1,2] w = {3.0, 4.0}, float[2] c = {1.0, 2.0}, float[2] k = {0.5, 4.0}>
        {
            g = Gemm <alpha = 2.0, beta = 3.0> (x, w, c)
            y = Div(g, k)
        }
        """,
        """
        agraph (float[1,1] x) => (float[1,2] y)
        <float[1,2] w = {6.0, 1.0}, float[2] c = {6.0, 1.5},
         float[1,2] w0 = {3.0, 4.0}, float[2] c0 = {1.0, 2.0}, float[2] k = {0.5, 4.0}>
        {
            y = Gemm <alpha = 2.0> (x, w, c)
        }
        """,
    )

    assert change.counts == {"Div folded into Gemm": 1}


@pytest.mark.parametrize("operator", LAYERS)
@pytest.mark.parametrize("follower", ["y = Mul(c, k)", "y = Mul(k, c)", "y = Div(c, k)"])
@pytest.mark.parametrize("biased", [True, False])
def test_folds_each_way_of_scaling(operator: str, follower: str, biased: bool) -> None:
    model = layer(operator, follower, bias=(", b)", ", b)" if biased else ")"))
    assert_folds(model, operator)


@pytest.mark.parametrize(
    ("operator", "shape"),
    [
        ("Conv", ()),
        ("Conv", (1, 6, 1, 1)),
        ("ConvTranspose", (1,)),
        ("Gemm", ()),
        ("Gemm", (1, 6)),
        ("MatMul", ()),
        ("MatMul", (1,)),
        ("MatMul", (6,)),
        ("MatMul", (1, 6)),
        ("MatMul", (1, 1, 6)),
    ],
)
def test_folds_constants_per_channel(operator: str, shape: tuple[int, ...]) -> None:
    assert_folds(layer(operator, k=normal(3, *shape)), operator)


@pytest.mark.parametrize(
    ("operator", "shape", "result", "reason"),
    [
        ("Conv", (4,), "2,6,4,4", "the constant of shape [4] is not one number per channel"),
        ("Gemm", (3, 1), "3,6", "the constant of shape [3, 1] is not one number per channel"),
        ("MatMul", (3, 1), "2,3,6", "the constant of shape [3, 1] is not one number per channel"),
        (
            "MatMul",
            (1, 1, 1, 6),
            "1,2,3,6",
            "the constant has more dimensions than the result is known to have",
        ),
        (
            "MatMul",
            (2, 1, 6),
            "2,3,6",
            "the constant of shape [2, 1, 6] is not one number per channel",
        ),
    ],
)
def test_leaves_constants_that_differ_elsewhere_or_raise_the_rank(
    operator: str, shape: tuple[int, ...], result: str, reason: str
) -> None:
    model = layer(operator, k=normal(3, *shape), result=(LAYERS[operator][3], result))
    assert reasons(model) == [reason]


def test_folds_into_a_matmul_of_unknown_rank_what_cannot_raise_the_rank() -> None:
    text = """
    agraph (float[N,4] z, int64[R] shape, float[4,6] w, float[6] k) => (float[N,6] y)
    { x = Reshape(z, shape) m = MatMul(x, w) y = Mul(m, k) }
    """
    model = parse(text, w=normal(1, 4, 6), k=normal(2, 6))
    before = model.clone()

    assert apply_pass(FuseScale(), model)

    assert operators(model) == ["Reshape", "MatMul"]
    sample = {"z": normal(3, 5, 4), "shape": np.array([5, 4])}
    assert_equivalent(before, model, samples=[sample])

    model = parse(text, w=normal(1, 4, 6), k=normal(2, 1, 6))
    assert reasons(model) == ["the constant has more dimensions than the result is known to have"]


def test_folds_several_in_a_row() -> None:
    change = assert_folds(
        layer(follower="d = Mul(c, k)\n e = Div(d, k)\n f = Mul(k, e)\n y = Relu(f)"),
        "Conv",
        "Relu",
    )
    assert change.counts == {"Mul folded into Conv": 2, "Div folded into Conv": 1}


def test_folds_in_the_body_of_an_if() -> None:
    model = parse(
        """
        agraph (bool k, float[3,4] x, float[4,6] w, float[6] c) => (float[3,6] y)
        {
            y = If(k) <
                then_branch = then () => (float[3,6] t) { p = MatMul(x, w) t = Mul(p, c) },
                else_branch = other () => (float[3,6] e) {
                    z = Constant <value_floats = [0.0]> ()
                    e = Expand(z, s)
                }
            >
        }
        """.replace("float[6] c)", "float[6] c, int64[2] s)"),
        w=normal(1, 4, 6),
        c=normal(2, 6),
        s=np.array([3, 6]),
    )
    before = model.clone()

    change = apply_pass(FuseScale(), model)

    assert sorted(operators(model)) == ["Constant", "Expand", "If", "MatMul"]
    assert change.counts == {"Mul folded into MatMul": 1}
    samples: list[Sample] = [{"k": np.array(k), "x": normal(4, 3, 4)} for k in (True, False)]
    assert_equivalent(before, model, samples=samples)


def test_folds_constants_by_node() -> None:
    model = layer("MatMul", "k2 = Constant <value_float = 0.125> ()\n y = Mul(c, k2)")
    assert_folds(model, "MatMul", "Constant")


@pytest.mark.parametrize("kind", ["float16", "double"])
def test_keeps_the_element_type(kind: str) -> None:
    model = layer("Gemm", kind=kind)

    assert_folds(model, "Gemm")

    dtype = {"float16": np.float16, "double": np.float64}[kind]
    for value in next(iter(model.graph)).inputs[1:]:
        assert value is not None and value.const_value is not None
        assert value.const_value.numpy().dtype == dtype


# ------------------------------------------------------------------ what stays


def test_leaves_a_division_of_the_constant() -> None:
    assert reasons(layer(follower="y = Div(k, c)")) == ["it divides the constant"]


def test_leaves_the_product_of_two_layers() -> None:
    assert reasons(layer(follower="d = Conv(x, w)\n y = Mul(c, d)")) == []


def test_leaves_a_matmul_whose_second_operand_is_computed() -> None:
    model = parse(
        "agraph (float[3,4] x, float[4,6] z, float[6] k) => (float[3,6] y)"
        "{ m = MatMul(x, z) y = Mul(m, k) }",
        k=normal(2, 6),
    )
    assert reasons(model) == ["the second operand of MatMul is not constant"]


def test_leaves_a_matmul_with_a_batch_of_weights() -> None:
    model = parse(
        "agraph (float[2,3,4] x, float[2,4,6] w, float[6] k) => (float[2,3,6] y)"
        "{ m = MatMul(x, w) y = Mul(m, k) }",
        w=normal(1, 2, 4, 6),
        k=normal(2, 6),
    )
    assert reasons(model) == ["the weight has 3 dimensions, not 2"]


def test_leaves_what_others_read_too() -> None:
    model = layer(follower="y = Mul(c, k)\n z = Relu(c)", more=("y)", "y, float[2,6,4,4] z)"))
    assert reasons(model) == ["other nodes read the value before it"]


def test_leaves_a_layer_that_is_an_output() -> None:
    model = layer(more=("y)", "y, float[2,6,4,4] c)"))
    assert reasons(model) == ["the value before it is an output of the graph"]


def test_leaves_a_shared_weight() -> None:
    model = layer(
        more=("y)", "y, float[2,6,4,4] z)"), node=("c = Conv", "z = Conv(x, w)\n c = Conv")
    )
    assert reasons(model) == ["the weight is shared, folding would store it twice"]


@pytest.mark.parametrize(
    ("name", "what"), [("w", "the weight"), ("b", "the bias"), ("k", "the constant")]
)
def test_leaves_what_a_caller_can_override(name: str, what: str) -> None:
    model = layer()
    model.graph.inputs.append(model.graph.initializers[name])
    assert reasons(model) == [f"{what} is an input that a caller can override"]


@pytest.mark.parametrize("operator", ["Conv", "MatMul"])
def test_leaves_packed_weights(operator: str) -> None:
    given, node, shape, result = LAYERS[operator]
    model = parse(
        f"""
        agraph ({given}, int8[1] w, float s, float[6] b, float k) => (float[{result}] y)
        {{ v = DequantizeLinear(w, s) {node.replace("w", "v")} y = Mul(c, k) }}
        """,
        w=(normal(1, *shape) * 50).astype(np.int8),
        s=np.array(0.01, np.float32),
        b=normal(2, 6),
        k=np.array(3, np.float32),
    )
    assert reasons(model) == ["the weight is packed"]


@pytest.mark.parametrize("follower", ["y = Mul(c, k)", "y = Div(c, k)"])
@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (math.inf, "the constant is not finite"),
        (math.nan, "the constant is not finite"),
        (0.0, "the constant has a zero"),
    ],
)
def test_leaves_zero_and_what_is_not_finite(follower: str, number: float, reason: str) -> None:
    k = normal(3, 6, 1, 1)
    k[4] = number
    assert reasons(layer(follower=follower, k=k)) == [reason]


def test_leaves_a_divisor_whose_inverse_is_infinite() -> None:
    model = layer("Gemm", "y = Div(c, k)", np.array(5e-324), kind="double")
    assert reasons(model) == ["one over the constant is not finite"]


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (6e4, "the folded weight overflows FLOAT16"),
        (1e-6, "the folded weight is too small for FLOAT16"),
    ],
)
def test_leaves_what_float16_cannot_hold(number: float, reason: str) -> None:
    assert reasons(layer("Gemm", k=np.array(number), kind="float16")) == [reason]


@pytest.mark.parametrize("operator", list(LAYERS))
def test_leaves_what_would_lose_one_channel_among_large_ones(operator: str) -> None:
    """Over the whole layer the loss could not be seen, and a later node may be all about it."""
    numbers = np.ones(6)
    numbers[1] = 1e-6
    k = numbers.reshape(6, *[1] * (2 if operator.startswith("Conv") else 0))
    model = layer(operator, k=k, kind="float16")
    assert reasons(model) == ["the folded weight is too small for FLOAT16"]


def test_leaves_integers() -> None:
    model = parse(
        "agraph (int32[3,4] x, int32[4,6] w, int32[6] k) => (int32[3,6] y)"
        "{ m = MatMul(x, w) y = Div(m, k) }",
        w=np.ones((4, 6), np.int32),
        k=np.arange(1, 7, dtype=np.int32),
    )
    assert reasons(model) == ["the constant is of type INT32"]


def test_is_idempotent() -> None:
    model = layer()
    apply_pass(FuseScale(), model)
    assert_unchanged(FuseScale(), model)


@pytest.mark.parametrize("seed", range(32))
def test_any_layer_keeps_its_outputs(seed: int) -> None:
    generator = np.random.default_rng(seed)
    operator = list(LAYERS)[seed % 4]
    groups, rows, columns = (int(n) for n in generator.integers(1, 4, 3))
    trans_b, divides, biased = (int(n) for n in generator.integers(0, 2, 3))
    alpha, beta = generator.uniform(-2, 2, 2)
    inputs, channels = groups * rows, groups * columns
    given, options, weight, spatial = {
        "Conv": ("N,I,6,6", f"<group = {groups}>", (channels, rows, 3, 2), (1, 1)),
        "ConvTranspose": ("N,I,4,4", f"<group = {groups}>", (inputs, columns, 2, 3), (1, 1)),
        "Gemm": (
            "N,I",
            f"<alpha = {alpha}, beta = {beta}, transB = {trans_b}>",
            (channels, inputs) if trans_b else (inputs, channels),
            (),
        ),
        "MatMul": ("2,N,I", "", (inputs, channels), ()),
    }[operator]
    bias = ", b" if biased and operator != "MatMul" else ""
    k_shape = [(), (channels, *spatial), (1, channels, *spatial)][generator.integers(3)]
    model = parse(
        f"""
        agraph (float[{given.replace("I", str(inputs))}] x, float[1] w, float[1] b, float[1] k)
            => (float[{",".join("ABCD"[: len(given.split(","))])}] y)
        {{
            c = {operator} {options} (x, w{bias})
            y = {"Div" if divides else "Mul"}(c, k)
        }}
        """,
        w=normal(seed, *weight),
        b=normal(seed + 100, channels),
        k=normal(seed + 200, *k_shape),
    )

    assert_folds(model, operator)
