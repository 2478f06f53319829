from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from linear_layers import Folding, normal, operators

from graphopt.contract import Context, Sample
from graphopt.rewriting import constant_tensor
from graphopt.testing import (
    apply_pass,
    assert_equivalent,
    assert_rewrites,
    assert_unchanged,
    parse,
)
from graphopt_passes.fuse.fuse_batchnorm import FuseBatchnorm

FOLDING = Folding(FuseBatchnorm())
assert_folds, reasons = FOLDING.assert_folds, FOLDING.reasons

CONV = """
agraph (float[2,4,5,5] x, float[6,4,3,3] w, float[6] b,
        float[6] gamma, float[6] beta, float[6] mean, float[6] var) => (float[2,6,3,3] y)
{
    c = Conv(x, w, b)
    y = BatchNormalization <epsilon = 0.01> (c, gamma, beta, mean, var)
}
"""


def parameters(channels: int, dtype: npt.DTypeLike = np.float32) -> dict[str, np.ndarray]:
    gamma, beta, mean, var = normal(9, 4, channels, dtype=dtype)
    return {"gamma": gamma, "beta": beta, "mean": mean, "var": np.abs(var)}


def convolution(text: str = CONV, **other: np.ndarray) -> ir.Model:
    arrays = {"w": normal(1, 6, 4, 3, 3) / 4, "b": normal(2, 6), **parameters(6), **other}
    return parse(text, **arrays)


def test_scales_the_weight_and_makes_the_bias() -> None:
    # scale = 6 / sqrt(4) = 3 and shift = 1 - 2 * 3 = -5.
    change = assert_rewrites(
        FuseBatchnorm(),
        """
        agraph (float[1,1,2] x) => (float[1,1,2] y)
        <float[1,1,1] w = {2.0}, float[1] b = {10.0},
         float[1] gamma = {6.0}, float[1] beta = {1.0}, float[1] mean = {2.0}, float[1] var = {3.5}>
        {
            c = Conv(x, w, b)
            y = BatchNormalization <epsilon = 0.5> (c, gamma, beta, mean, var)
        }
        """,
        """
        agraph (float[1,1,2] x) => (float[1,1,2] y)
        <float[1,1,1] w = {6.0}, float[1] b = {25.0},
         float[1,1,1] w0 = {2.0}, float[1] b0 = {10.0},
         float[1] gamma = {6.0}, float[1] beta = {1.0}, float[1] mean = {2.0}, float[1] var = {3.5}>
        {
            y = Conv(x, w, b)
        }
        """,
    )

    assert change.counts == {"BatchNormalization folded into Conv": 1}


def test_folds_into_conv_and_keeps_the_name_of_the_output() -> None:
    model = convolution()

    assert_folds(model, "Conv")

    assert [output.name for output in model.graph.outputs] == ["y"]


def test_gives_a_bias_to_a_conv_without_one() -> None:
    assert_folds(convolution(CONV.replace("Conv(x, w, b)", "Conv(x, w)")), "Conv")


def test_folds_two_in_a_row_in_the_middle_of_a_graph() -> None:
    text = CONV.replace("y = Batch", "n = Batch").replace(
        "mean, var)\n}",
        "mean, var)\n m = BatchNormalization(n, gamma, beta, mean, var)\n y = Relu(m)\n}",
    )

    change = assert_folds(convolution(text), "Conv", "Relu")

    assert change.counts == {"BatchNormalization folded into Conv": 2}


def test_folds_in_the_body_of_an_if_with_weights_of_the_outer_graph() -> None:
    text = """
    agraph (bool k, float[2,4,5,5] x, float[6,4,3,3] w, float[6] b,
            float[6] gamma, float[6] beta, float[6] mean, float[6] var) => (float[2,6,3,3] y)
    {
        y = If(k) <
            then_branch = then () => (float[2,6,3,3] t) {
                c = Conv(x, w, b)
                t = BatchNormalization(c, gamma, beta, mean, var)
            },
            else_branch = other () => (float[2,6,3,3] e) { d = Conv(x, w2) e = Neg(d) }
        >
    }
    """.replace("float[6] b,", "float[6] b, float[6,4,3,3] w2,")
    model = convolution(text, w2=normal(3, 6, 4, 3, 3))
    before = model.clone()

    change = apply_pass(FuseBatchnorm(), model)

    assert sorted(operators(model)) == ["Conv", "Conv", "If", "Neg"]
    assert change.counts == {"BatchNormalization folded into Conv": 1}
    x = normal(4, 2, 4, 5, 5)
    samples: list[Sample] = [{"k": np.array(k), "x": x} for k in (True, False)]
    assert_equivalent(before, model, samples=samples)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_folds_into_conv_and_conv_transpose_of_any_rank_and_group(rank: int, group: int) -> None:
    for operator, shape in (("Conv", (8, 4 // group)), ("ConvTranspose", (4, 8 // group))):
        model = parse(
            f"""
            agraph (float[{", ".join(["2", "4", *["6"] * rank])}] x, float[8] w,
                    float[8] gamma, float[8] beta, float[8] mean, float[8] var) => (float[] y)
            {{
                c = {operator} <group = {group}, strides = [{", ".join(["2"] * rank)}]> (x, w)
                y = BatchNormalization(c, gamma, beta, mean, var)
            }}
            """,
            w=normal(rank, *shape, *[2] * rank),
            **parameters(8),
        )
        model.graph.outputs[0].shape = None

        assert_folds(model, operator)


@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("c", [None, (), (1,), (5,), (1, 5), (1, 1)])
@pytest.mark.parametrize("beta", [1.0, 0.5, 0.0])
def test_folds_into_gemm(trans_b: int, c: tuple[int, ...] | None, beta: float) -> None:
    model = parse(
        f"""
        agraph (float[3,4] x, float[4,5] w, float[5] c, float[5] gamma, float[5] beta,
                float[5] mean, float[5] var) => (float[3,5] y)
        {{
            g = Gemm <alpha = 0.7, beta = {beta}, transB = {trans_b}>
                (x, w{"" if c is None else ", c"})
            y = BatchNormalization(g, gamma, beta, mean, var)
        }}
        """,
        w=normal(1, *((5, 4) if trans_b else (4, 5))),
        c=normal(2, *(c or ())),
        **parameters(5),
    )

    assert_folds(model, "Gemm")


def test_turns_matmul_into_gemm() -> None:
    change = assert_folds(matmul("N, 4", "N, 5"), "Gemm")

    assert change.counts == {"BatchNormalization folded into MatMul": 1}


def matmul(left: str, result: str, channels: int = 5) -> ir.Model:
    return parse(
        f"""
        agraph (float[{left}] x, float[4,5] w, float[5] gamma, float[5] beta, float[5] mean,
                float[5] var) => (float[{result}] y)
        {{
            m = MatMul(x, w)
            y = BatchNormalization(m, gamma, beta, mean, var)
        }}
        """,
        w=normal(1, 4, 5),
        **parameters(channels),
    )


def test_leaves_a_matmul_whose_channels_are_another_axis() -> None:
    assert reasons(matmul("2, 5, 4", "2, 5, 5")) == [
        "its channels are not known to be those of the MatMul before it"
    ]


def test_leaves_a_matmul_whose_rank_is_not_known() -> None:
    model = parse(
        """
        agraph (float[N,4] z, int64[R] shape, float[4,5] w, float[5] gamma, float[5] beta,
                float[5] mean, float[5] var) => (float[N,5] y)
        {
            x = Reshape(z, shape)
            m = MatMul(x, w)
            y = BatchNormalization(m, gamma, beta, mean, var)
        }
        """,
        w=normal(1, 4, 5),
        **parameters(5),
    )
    assert reasons(model) == ["its channels are not known to be those of the MatMul before it"]


@pytest.mark.parametrize(
    ("kind", "dtype"), [("float16", np.float16), ("double", np.float64), ("float", np.float32)]
)
def test_keeps_the_element_type(kind: str, dtype: type[np.generic]) -> None:
    text = """
    agraph (float[3,4] x, float[4,5] w, float[5] gamma, float[5] beta, float[5] mean,
            float[5] var) => (float[3,5] y)
    {
        m = MatMul(x, w)
        y = BatchNormalization(m, gamma, beta, mean, var)
    }
    """.replace("float", kind)
    model = parse(text, w=normal(1, 4, 5, dtype=dtype), **parameters(5, dtype))

    assert_folds(model, "Gemm")

    assert constants(model) == [np.dtype(dtype)] * 2


def test_keeps_the_type_of_the_weight_where_that_of_the_parameters_differs() -> None:
    text = CONV.replace("float[2,", "float16[2,").replace("float[6,4", "float16[6,4")
    text = text.replace("float[6] b", "float16[6] b")
    model = convolution(
        text, w=normal(1, 6, 4, 3, 3, dtype=np.float16) / 8, b=normal(2, 6, dtype=np.float16)
    )

    assert_folds(model, "Conv")

    assert constants(model) == [np.dtype(np.float16)] * 2


def test_folds_bfloat16_by_the_formula() -> None:
    # onnxruntime's CPU kernels have no bfloat16 to compare with.
    bfloat16 = ml_dtypes.bfloat16
    w, p = normal(1, 6, 4, 3, 3, dtype=bfloat16), parameters(6, bfloat16)
    model = convolution(CONV.replace("float", "bfloat16"), w=w, b=normal(2, 6, dtype=bfloat16), **p)

    assert apply_pass(FuseBatchnorm(), model)

    weight = next(iter(model.graph)).inputs[1]
    assert weight is not None and weight.const_value is not None
    epsilon = float(np.float32(0.01))
    scale = p["gamma"].astype(np.float64) / np.sqrt(p["var"].astype(np.float64) + epsilon)
    wanted = (w.astype(np.float64) * scale[:, None, None, None]).astype(bfloat16)
    assert weight.dtype == ir.DataType.BFLOAT16
    np.testing.assert_array_equal(
        weight.const_value.numpy().astype(np.float32), wanted.astype(np.float32)
    )


def constants(model: ir.Model) -> list[np.dtype]:
    (node,) = model.graph
    tensors = [constant_tensor(value) for value in node.inputs[1:]]
    return [tensor.numpy().dtype for tensor in tensors if tensor is not None]


def tensors(model: ir.Model) -> list[ir.TensorProtocol]:
    found = [constant_tensor(value) for value in model.graph.initializers.values()]
    return [tensor for tensor in found if tensor is not None]


def test_never_writes_into_an_array_of_the_model() -> None:
    model = convolution()
    snapshot = model.clone()
    before = [t.numpy().copy() for t in tensors(snapshot)]

    apply_pass(FuseBatchnorm(), model)

    after = [t.numpy() for t in tensors(snapshot)]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


# ------------------------------------------------------------------ what stays


def test_leaves_what_others_read_too() -> None:
    text = CONV.replace("=> (", "=> (float[2,6,3,3] z, ").replace("\n}", "\n z = Relu(c)\n}")
    assert reasons(convolution(text)) == ["other nodes read the value before it"]


def test_leaves_what_a_subgraph_reads_too() -> None:
    text = (
        CONV.replace("agraph (", "agraph (bool k, ")
        .replace("=> (", "=> (float[2,6,3,3] z, ")
        .replace(
            "\n}",
            "\n z = If(k) < then_branch = then () => (float[2,6,3,3] t) { t = Neg(c) },"
            " else_branch = other () => (float[2,6,3,3] e) { e = Relu(c) } >\n}",
        )
    )
    assert reasons(convolution(text)) == ["other nodes read the value before it"]


def test_leaves_a_conv_outside_of_the_subgraph() -> None:
    text = (
        CONV.replace("agraph (", "agraph (bool k, float[2,6,3,3] u, ")
        .replace(
            "y = Batch",
            "y = If(k) < then_branch = then () => (float[2,6,3,3] t) { t = Batch",
        )
        .replace(
            "mean, var)\n",
            "mean, var) }, else_branch = other () => (float[2,6,3,3] e) { e = Relu(u) } >\n",
        )
    )
    assert reasons(convolution(text)) == ["the value before it is made outside of this subgraph"]


def test_leaves_a_conv_that_is_an_output() -> None:
    text = CONV.replace("=> (", "=> (float[2,6,3,3] c, ")
    assert reasons(convolution(text)) == ["the value before it is an output of the graph"]


def test_leaves_a_shared_weight() -> None:
    text = CONV.replace("=> (", "=> (float[2,6,3,3] z, ").replace("\n}", "\n z = Conv(x, w)\n}")
    assert reasons(convolution(text)) == ["the weight is shared, folding would store it twice"]


def test_leaves_a_weight_that_is_also_an_output() -> None:
    model = convolution()
    model.graph.outputs.append(model.graph.initializers["w"])
    assert reasons(model) == ["the weight is shared, folding would store it twice"]


@pytest.mark.parametrize(
    ("name", "what"),
    [("w", "the weight"), ("b", "the bias"), ("gamma", "its scale"), ("var", "its variance")],
)
def test_leaves_what_a_caller_can_override(name: str, what: str) -> None:
    model = convolution()
    model.graph.inputs.append(model.graph.initializers[name])
    assert reasons(model) == [f"{what} is an input that a caller can override"]


def test_leaves_computed_weights() -> None:
    text = CONV.replace("c = Conv(x, w, b)", "v = Neg(w)\n c = Conv(x, v, b)")
    assert reasons(convolution(text)) == ["the weight is not constant"]


def test_leaves_packed_weights() -> None:
    text = CONV.replace("float[6,4,3,3] w", "int8[6,4,3,3] w, float s").replace(
        "c = Conv(x, w, b)", "v = DequantizeLinear(w, s)\n c = Conv(x, v, b)"
    )
    model = convolution(text, w=normal(1, 6, 4, 3, 3).astype(np.int8), s=np.array(0.1, np.float32))
    assert reasons(model) == ["the weight is packed"]


def test_leaves_training_mode() -> None:
    text = CONV.replace("<epsilon = 0.01>", "<training_mode = 1>").replace(
        "y = Batch", "y, m1, v1 = Batch"
    )
    assert reasons(convolution(text)) == ["it is in training mode"]


def test_leaves_the_extra_outputs_that_meant_training_mode_up_to_opset_13() -> None:
    header = '<ir_version: 7, opset_import: ["" : 9]>'
    text = header + CONV.replace("y = Batch", "y, m1, v1, m2, v2 = Batch")
    assert reasons(convolution(text)) == ["it has more than one output, as in training mode"]


def test_folds_opset_9() -> None:
    model = convolution('<ir_version: 7, opset_import: ["" : 9]>' + CONV)
    assert_folds(model, "Conv")


def test_leaves_opset_6_where_training_was_the_default() -> None:
    model = convolution('<ir_version: 3, opset_import: ["" : 6]>' + CONV)
    # Not by apply_pass: the checker wants initializers to be inputs in such old models.
    change = FuseBatchnorm().apply(model, Context(lambda: model))
    assert [s.reason for s in change.skips] == ["opset 6 is older than 7; raise it first"]


def test_leaves_other_producers() -> None:
    text = CONV.replace("c = Conv(x, w, b)", "r = Conv(x, w, b)\n c = Relu(r)")
    assert reasons(convolution(text)) == [
        "its input is made by Relu, not by one of Conv, ConvTranspose, Gemm, MatMul"
    ]


def test_leaves_an_operator_of_another_domain() -> None:
    model = convolution()
    model.opset_imports["my.own"] = 1
    next(iter(model.graph)).domain = "my.own"
    before = operators(model)
    change = FuseBatchnorm().apply(model, Context(lambda: model))
    assert not change
    assert operators(model) == before


def test_leaves_a_gemm_whose_c_differs_between_rows() -> None:
    model = parse(
        """
        agraph (float[3,4] x, float[4,5] w, float[3,1] c, float[5] gamma, float[5] beta,
                float[5] mean, float[5] var) => (float[3,5] y)
        {
            g = Gemm(x, w, c)
            y = BatchNormalization(g, gamma, beta, mean, var)
        }
        """,
        w=normal(1, 4, 5),
        c=normal(2, 3, 1),
        **parameters(5),
    )
    assert reasons(model) == ["C of shape [3, 1] is not one number per channel"]


def test_leaves_a_gemm_whose_c_is_computed() -> None:
    model = parse(
        """
        agraph (float[3,4] x, float[5] c, float[4,5] w, float[5] gamma, float[5] beta,
                float[5] mean, float[5] var) => (float[3,5] y)
        {
            g = Gemm(x, w, c)
            y = BatchNormalization(g, gamma, beta, mean, var)
        }
        """,
        w=normal(1, 4, 5),
        **parameters(5),
    )
    assert reasons(model) == ["C is not constant"]


@pytest.mark.parametrize(
    ("name", "number", "reason"),
    [
        ("var", -1.0, "its scale is not finite"),
        ("gamma", math.inf, "its scale is not finite"),
        ("mean", math.nan, "its shift is not finite"),
        ("beta", -math.inf, "its shift is not finite"),
    ],
)
def test_leaves_parameters_that_are_not_finite(name: str, number: float, reason: str) -> None:
    array = parameters(6)[name]
    array[2] = number
    assert reasons(convolution(CONV, **{name: array})) == [reason]


def test_folds_a_scale_of_zero() -> None:
    gamma = parameters(6)["gamma"]
    gamma[2] = 0
    assert_folds(convolution(gamma=gamma), "Conv")


@pytest.mark.parametrize(
    ("gamma", "beta", "reason"),
    [
        (3e4, 0.0, "the folded weight overflows FLOAT16"),
        (1e-6, 0.0, "the folded weight is too small for FLOAT16"),
        (4.0, 7e4, "the folded bias overflows FLOAT16"),
    ],
)
def test_leaves_what_float16_cannot_hold(gamma: float, beta: float, reason: str) -> None:
    text = CONV.replace("float[2,", "float16[2,").replace("float[6,4", "float16[6,4")
    text = text.replace("float[6] b,", "float16[6] b,")
    ones = np.ones(6, np.float32)
    model = convolution(
        text,
        w=normal(1, 6, 4, 3, 3, dtype=np.float16),
        b=ones.astype(np.float16),
        gamma=ones * np.float32(gamma),
        beta=ones * np.float32(beta),
        mean=ones,
        var=ones / 100,
    )
    assert reasons(model) == [reason]


def test_folds_channels_that_training_has_let_decay() -> None:
    """Their weights are subnormal then; what they say is in the shift."""
    decayed = parameters(6)
    decayed["gamma"][:3] = np.float32([1e-41, 3e-42, 2e-40])
    assert_folds(convolution(gamma=decayed["gamma"]), "Conv")


def test_is_idempotent() -> None:
    model = convolution()
    apply_pass(FuseBatchnorm(), model)
    assert_unchanged(FuseBatchnorm(), model)


@pytest.mark.parametrize("seed", range(24))
def test_any_layer_keeps_its_outputs(seed: int) -> None:
    generator = np.random.default_rng(seed)
    groups, rows, columns = (int(n) for n in generator.integers(1, 4, 3))
    transposed, biased = generator.integers(0, 2, 2)
    kernel, stride, dilation = (int(n) for n in generator.integers(1, 4, 3))
    inputs, channels = groups * rows, groups * columns
    shape = (inputs, columns) if transposed else (channels, rows)
    arrays = {"w": normal(seed, *shape, kernel, kernel), **parameters(channels)}
    if biased:
        arrays["b"] = normal(seed, channels)
    model = parse(
        f"""
        agraph (float[N,{inputs},9,9] x, {"float[1] b," if biased else ""} float[1] w,
                float[1] gamma, float[1] beta, float[1] mean, float[1] var) => (float[N,A,B,C] y)
        {{
            c = {"ConvTranspose" if transposed else "Conv"}
                <group = {groups}, strides = [{stride}, 1], dilations = [1, {dilation}]>
                (x, w{", b" if biased else ""})
            y = BatchNormalization(c, gamma, beta, mean, var)
        }}
        """,
        **arrays,
    )

    assert_folds(model, "ConvTranspose" if transposed else "Conv")
