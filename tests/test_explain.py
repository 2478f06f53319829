"""explain names what onnxruntime really runs; each rule on the smallest model that shows it."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
from packed_models import (
    FORMS,
    INTEGERS,
    READERS,
    WEIGHTS_ONLY,
    integer_model,
    packed_integers,
    packed_reader,
)

import graphopt
from graphopt import Explanation
from graphopt.kernels import find_reasons
from graphopt.packing import is_packed
from graphopt.reasons import is_quantization

ort = pytest.importorskip("onnxruntime")

SCALES: dict[str, Any] = {
    "s": np.float32(0.02),
    "t": np.float32(0.03),
    "u0": np.uint8(0),
    "u9": np.uint8(9),
    "i0": np.int8(0),
    "h0": np.uint16(0),
    "bs": np.float32(0.0004),
    "lo": np.float32(0),
    "hi": np.float32(4),
}
"""Scales and zero points that any model may read."""


def weights(*shape: int, dtype: Any = np.int8) -> np.ndarray:
    integers = np.random.default_rng(0).integers(-7, 8, shape)
    return integers.astype(np.int16).astype(dtype)


def model(text: str, **arrays: np.ndarray) -> onnx.ModelProto:
    """A model in ONNX text, with its constants."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> g {text}')
    read = {name for node in proto.graph.node for name in node.input}
    known = {name: array for name, array in SCALES.items() if name in read}
    for name, array in {**known, **arrays}.items():
        proto.graph.initializer.append(tensor(name, np.asarray(array)))
    return proto


def tensor(name: str, array: np.ndarray) -> onnx.TensorProto:
    if array.dtype == ml_dtypes.int4:
        content = array.astype(np.int8).reshape(-1).tolist()
        return onnx.helper.make_tensor(name, onnx.TensorProto.INT4, array.shape, content)
    return onnx.numpy_helper.from_array(array, name)


def q(value: str, name: str, scale: str = "s", zero: str = "u0") -> str:
    """A value quantized and dequantized."""
    return (
        f"{name}_q = QuantizeLinear({value}, {scale}, {zero}) "
        f"{name} = DequantizeLinear({name}_q, {scale}, {zero}) "
    )


def explain(proto: onnx.ModelProto) -> Explanation:
    return graphopt.explain(proto, random_samples=1)


def codes(found: Explanation) -> set[str]:
    return {row.reason.code for row in found.rows if row.reason is not None}


# ------------------------------------------------------------------ rules


@dataclass(frozen=True)
class Case:
    """A model that shows one rule, and the same repaired."""

    code: str
    bad: str
    good: str | None = None
    bad_arrays: dict[str, np.ndarray] = field(default_factory=dict)
    good_arrays: dict[str, np.ndarray] | None = None
    beside: frozenset[str] = frozenset()
    """What else is true of the model."""


def image(body: str, end: str = "d") -> str:
    return (
        f"(float[1, 8, 6, 6] x) => (float[] y) {{ {q('x', 'b')} "
        f"wd = DequantizeLinear(w, s, i0) {body} y = Exp({end}) }}"
    )


def rows(body: str, end: str = "d", zero: str = "u0", weight: str = "(w, s, i0)") -> str:
    return (
        f"(float[4, 64] x) => (float[] y) {{ {q('x', 'b', zero=zero)} "
        f"wd = DequantizeLinear{weight} {body} y = Exp({end}) }}"
    )


def plain(body: str) -> str:
    return f"(float[4, 64] x) => (float[] y) {{ {body} }}"


def both(body: str) -> str:
    return f"(float[6, 6] x, float[6, 6] z) => (float[] y) {{ {body} y = Exp(d) }}"


CONV = "c = Conv <pads = [1, 1, 1, 1]> (b, wd) "
KERNEL = {"w": weights(8, 8, 3, 3)}
MATRIX = {"w": weights(64, 32)}
TALL = {"w": weights(32, 64)}
BLOCKS = {"w": weights(64, 32), "ws": np.full((2, 32), 0.01, np.float32)}
LAYOUT = frozenset({"channels-last"})
FLOATS = np.full(32, 0.5, np.float32)
COLUMNS = {"w": weights(64, 32), "ws": np.full(32, 0.01, np.float32)}

CASES = {
    "1 block, transB": Case(
        "transposed-weight",
        plain(
            "wd = DequantizeLinear <axis = 1, block_size = 32> (w, ws) "
            "y = Gemm <transB = 1> (x, wd)"
        ),
        plain("wd = DequantizeLinear <axis = 0, block_size = 32> (w, ws) y = Gemm (x, wd)"),
        {"w": weights(32, 64), "ws": np.full((32, 2), 0.01, np.float32)},
        BLOCKS,
    ),
    "1 tensor, transB": Case(
        "transposed-weight",
        plain("wd = DequantizeLinear (w, s) y = Gemm <transB = 1> (x, wd)"),
        plain("wd = DequantizeLinear (w, s) y = Gemm (x, wd)"),
        TALL,
        MATRIX,
    ),
    "1 Transpose": Case(
        "transposed-weight",
        plain(
            "wd = DequantizeLinear <axis = 1, block_size = 32> (w, ws) "
            "wt = Transpose <perm = [1, 0]> (wd) y = MatMul (x, wt)"
        ),
        None,
        {"w": weights(32, 64), "ws": np.full((32, 2), 0.01, np.float32)},
    ),
    "2 block of 8": Case(
        "block-size",
        plain("wd = DequantizeLinear <axis = 0, block_size = 8> (w, ws) y = MatMul (x, wd)"),
        plain("wd = DequantizeLinear <axis = 0, block_size = 16> (w, ws) y = MatMul (x, wd)"),
        {"w": weights(64, 32, dtype=ml_dtypes.int4), "ws": np.full((8, 32), 0.01, np.float32)},
        {"w": weights(64, 32, dtype=ml_dtypes.int4), "ws": np.full((4, 32), 0.01, np.float32)},
    ),
    "2 block of 48": Case(
        "block-size",
        "(float[4, 96] x) => (float[] y) { wd = DequantizeLinear <axis = 0, block_size = 48> "
        "(w, ws) y = MatMul (x, wd) }",
        None,
        {"w": weights(96, 32), "ws": np.full((2, 32), 0.01, np.float32)},
    ),
    "3 Conv": Case(
        "no-output-quantize", image(CONV, "c"), image(CONV + q("c", "d")), KERNEL, beside=LAYOUT
    ),
    "3 Conv, Sigmoid": Case(
        "no-output-quantize",
        image(CONV + "e = Sigmoid (c) " + q("e", "d")),
        image(CONV + q("c", "f") + "e = Sigmoid (f) " + q("e", "d")),
        KERNEL,
        beside=LAYOUT,
    ),
    "3 Gemm with a float bias": Case(
        "no-output-quantize",
        rows("c = Gemm (b, wd, bias)", "c"),
        rows("c = Gemm (b, wd, bias) " + q("c", "d")),
        {**MATRIX, "bias": FLOATS},
    ),
    "3 MatMul, Add": Case(
        "no-output-quantize",
        rows("m = MatMul (b, wd) c = Add (m, bias)", "c"),
        rows("bd = DequantizeLinear (bias, bs) m = MatMul (b, wd) c = Add (m, bd)", "c"),
        {**MATRIX, "bias": FLOATS},
        {**MATRIX, "bias": weights(32, dtype=np.int32)},
    ),
    **{
        f"3 {op}": Case(
            "no-output-quantize",
            both(q("x", "a") + q("z", "b") + f"d = {op}"),
            both(q("x", "a") + q("z", "b") + f"c = {op} " + q("c", "d")),
        )
        for op in ("Add (a, b)", "Mul (a, b)", "Sigmoid (a)", "Softmax (a)", "LeakyRelu (a)")
    },
    "5 two readers": Case(
        "shared-weight",
        plain(
            "wd = DequantizeLinear (w, s) e = Exp (x) m = MatMul (x, wd) n = MatMul (e, wd) "
            "y = Mul (m, n)"
        ),
        plain(
            "wd = DequantizeLinear (w, s) we = DequantizeLinear (v, t) e = Exp (x) "
            "m = MatMul (x, wd) n = MatMul (e, we) y = Mul (m, n)"
        ),
        MATRIX,
        {**MATRIX, "v": weights(64, 32)},
    ),
    "5 one scale": Case(
        "shared-scale",
        plain(
            "wd = DequantizeLinear <axis = 1> (w, ws) we = DequantizeLinear <axis = 1> (v, ws) "
            "e = Exp (x) m = MatMul (x, wd) n = MatMul (e, we) y = Mul (m, n)"
        ),
        plain(
            "wd = DequantizeLinear <axis = 1> (w, ws) we = DequantizeLinear <axis = 1> (v, vs) "
            "e = Exp (x) m = MatMul (x, wd) n = MatMul (e, we) y = Mul (m, n)"
        ),
        {**COLUMNS, "v": weights(64, 32)},
        {**COLUMNS, "v": weights(64, 32), "vs": np.full(32, 0.01, np.float32)},
    ),
    "5 equal scales": Case(
        "shared-scale",
        plain(
            "wd = DequantizeLinear (w, s) we = DequantizeLinear (v, vs) e = Exp (x) "
            "m = MatMul (x, wd) n = MatMul (e, we) y = Mul (m, n)"
        ),
        None,
        {**MATRIX, "v": weights(64, 32), "vs": SCALES["s"]},
    ),
    "5 two DequantizeLinear": Case(
        "shared-weight",
        plain(
            "wd = DequantizeLinear (w, s) we = DequantizeLinear (w, t) e = Exp (x) "
            "m = MatMul (x, wd) n = MatMul (e, we) y = Mul (m, n)"
        ),
        None,
        MATRIX,
    ),
    "6 Conv, Relu": Case(
        "clip-zero-point",
        image(CONV + "r = Relu (c) " + q("r", "d", zero="u9")),
        image(CONV + "r = Relu (c) " + q("r", "d")),
        KERNEL,
        beside=LAYOUT,
    ),
    "6 Conv, Clip": Case(
        "clip-zero-point",
        image(CONV + "r = Clip (c, lo, hi) " + q("r", "d")),
        image(CONV + "r = Clip (c, lo, hi) " + q("r", "d")),
        KERNEL,
        {**KERNEL, "hi": np.float32(5.2)},
        beside=LAYOUT,
    ),
    "6 MatMul, Relu": Case(
        "clip-zero-point",
        rows("c = MatMul (b, wd) r = Relu (c) " + q("r", "d", zero="u9")),
        rows("c = MatMul (b, wd) r = Relu (c) " + q("r", "d")),
        MATRIX,
    ),
    "7 read in float": Case(
        "output-read-in-float",
        image(CONV + q("c", "e") + "f = Exp (c) d = Add (e, f)"),
        image(CONV + q("c", "e") + "f = Exp (e) d = Pow (e, f)"),
        KERNEL,
        beside=LAYOUT | {"input-in-float"},
    ),
    "7 output of the model": Case(
        "output-read-in-float",
        image(CONV + q("c", "d")).replace("y)", "y, float[] c)"),
        None,
        KERNEL,
    ),
    "7 quantized in two ways": Case(
        "output-read-in-float",
        image(CONV + q("c", "e") + q("c", "f", "t") + "d = Pow (e, f)"),
        None,
        KERNEL,
    ),
    **{
        f"8 {op}": Case("no-integer-kernel", both(q("x", "a") + f"c = {op} " + q("c", "d")))
        for op in (
            "Sub (a, a)", "Div (a, a)", "Tanh (a)", "HardSwish (a)", "Gelu (a)", "Erf (a)",
            "Exp (a)", "Sqrt (a)", "ReduceMean (a)", "Pow (a, s)", "Elu (a)",
        )
    },
    "8 an island": Case(
        "no-integer-kernel",
        both(q("x", "a") + "e = Tanh (a) f = Neg (e) c = Exp (f) " + q("c", "d")),
    ),
    **{
        f"8 {op.partition(' ')[0]}": Case(
            "no-integer-kernel",
            image(f"c = {op} " + q("c", "d")),
            None,
            {**KERNEL, "g": np.ones(8, np.float32), "l": np.ones(6, np.float32)},
        )
        for op in (
            "LayerNormalization (b, l)",
            "InstanceNormalization (b, g, g)",
            "BatchNormalization (b, g, g, g, g)",
            "ConvTranspose (b, wd)",
        )
    },
    "8 Conv, Sigmoid, Mul": Case(
        "fused-in-float",
        image(CONV + "e = Sigmoid (c) f = Mul (c, e) " + q("f", "d")),
        image(
            CONV + q("c", "f") + "h = Sigmoid (f) " + q("h", "e") + "k = Mul (f, e) " + q("k", "d")
        ),
        KERNEL,
        beside=LAYOUT | {"no-output-quantize"},
    ),
    "9 Conv": Case(
        "activation-type",
        image(CONV + q("c", "d", zero="h0")).replace("s, u0", "s, h0"),
        None,
        KERNEL,
    ),
    "9 MatMul": Case(
        "activation-type",
        rows("c = MatMul (b, wd) " + q("c", "d", zero="h0"), zero="h0"),
        rows("c = MatMul (b, wd) " + q("c", "d")),
        MATRIX,
    ),
    **{
        f"10 {op}": Case(
            "input-in-float",
            both(q("x", "a") + f"c = {op} (a, z) " + q("c", "d")),
            both(q("x", "a") + q("z", "b") + f"c = {op} (a, b) " + q("c", "d")),
        )
        for op in ("Add", "Mul", "MatMul", "Concat <axis = 0>")
    },
    "10 a constant": Case(
        "input-in-float", rows("c = MatMul (b, k) " + q("c", "d")), None,
        {"k": np.ones((64, 8), np.float32), **MATRIX},
    ),
    **{
        f"11 {op}": Case(
            "differing-quantization",
            image(f"c = {op} " + q("c", "d", "t")),
            image(f"c = {op} " + q("c", "d")),
            {**KERNEL, "n": np.array([1, -1]), "r": np.array([1, 1, 2, 2], np.float32)},
        )
        for op in (
            "MaxPool <kernel_shape = [2, 2]> (b)",
            "Reshape (b, n)",
            "Transpose <perm = [0, 2, 3, 1]> (b)",
            'Resize <mode = "nearest"> (b, , r)',
        )
    },
    "11 Split": Case(
        "differing-quantization",
        both(
            q("x", "a") + "b, c = Split <num_outputs = 2> (a) " + q("b", "e") + q("c", "f", "t")
            + "d = Pow (e, f)"
        ),
        both(
            q("x", "a") + "b, c = Split <num_outputs = 2> (a) " + q("b", "e") + q("c", "f")
            + "d = Pow (e, f)"
        ),
    ),
    "11 Q of DQ": Case("requantized", both(q("x", "a", zero="u9") + "r = Relu (a)" + q("r", "d"))),
    "12 MatMul, Add": Case(
        "quantized-bias",
        rows(
            "bd = DequantizeLinear (bias, s, i0) m = MatMul (b, wd) c = Add (m, bd) " + q("c", "d")
        ),
        rows("m = MatMul (b, wd) c = Add (m, bias) " + q("c", "d")),
        {**MATRIX, "bias": weights(32)},
        {**MATRIX, "bias": FLOATS},
    ),
    "12 Conv": Case(
        "quantized-bias",
        image(
            "bd = DequantizeLinear (bias, s, i0) c = Conv <pads = [1, 1, 1, 1]> (b, wd, bd) "
            + q("c", "d")
        ),
        image(
            "bd = DequantizeLinear (bias, bs) c = Conv <pads = [1, 1, 1, 1]> (b, wd, bd) "
            + q("c", "d")
        ),
        {**KERNEL, "bias": weights(8)},
        {**KERNEL, "bias": weights(8, dtype=np.int32)},
        beside=LAYOUT,
    ),
    "a bias of another scale": Case(
        "bias-scale",
        image(
            "bd = DequantizeLinear (bias, s) c = Conv <pads = [1, 1, 1, 1]> (b, wd, bd) "
            + q("c", "d")
        ),
        None,
        {**KERNEL, "bias": weights(8, dtype=np.int32)},
    ),
    "a scale that is a vector": Case(
        "vector-scale",
        both(q("x", "a", "v") + q("z", "b") + "c = Add (a, b) " + q("c", "d")),
        both(q("x", "a") + q("z", "b") + "c = Add (a, b) " + q("c", "d")),
        {"v": np.full(1, 0.02, np.float32)},
        {},
    ),
    "a scale of a weight that is a vector": Case(
        "vector-scale",
        plain("wd = DequantizeLinear (w, v) y = MatMul (x, wd)"),
        plain("wd = DequantizeLinear (w, s) y = MatMul (x, wd)"),
        {**MATRIX, "v": np.full(1, 0.02, np.float32)},
        MATRIX,
    ),
    "13 Conv": Case(
        "weight-only-operator",
        "(float[1, 8, 6, 6] x) => (float[] y) { wd = DequantizeLinear (w, s) y = Conv (x, wd) }",
        None,
        KERNEL,
    ),
    "13 Gather": Case(
        "weight-only-operator",
        "(int64[4] x) => (float[] y) { wd = DequantizeLinear (w, s) i = Abs (x) k = Mod (i, n) "
        "y = Gather (wd, k) }",
        None,
        {**MATRIX, "n": np.array(64)},
    ),
    "13 ConvTranspose before Q": Case(
        "weight-only-operator",
        "(float[1, 8, 6, 6] x) => (float[] y) { wd = DequantizeLinear (w, s) "
        f"c = ConvTranspose (x, wd) {q('c', 'd')} y = Exp (d) }}",
        None,
        KERNEL,
    ),
    "13 Reshape": Case(
        "weight-only-operator",
        plain("wd = DequantizeLinear (w, s) r = Reshape (wd, n) y = MatMul (x, r)"),
        plain("wd = DequantizeLinear (w, s) y = MatMul (x, wd)"),
        {**TALL, "n": np.array([64, 32])},
        MATRIX,
    ),
    "13 LSTM": Case(
        "weight-only-operator",
        "(float[4, 1, 8] x) => (float[] y) { wd = DequantizeLinear (w, s) "
        "rd = DequantizeLinear (r, s) y = LSTM <hidden_size = 8> (x, wd, rd) }",
        None,
        {"w": weights(1, 32, 8), "r": weights(1, 32, 8)},
    ),
    "int16 weight": Case(
        "weight-type",
        plain("wd = DequantizeLinear (w, s) y = MatMul (x, wd)"),
        plain("wd = DequantizeLinear (w, s) y = MatMul (x, wd)"),
        {"w": weights(64, 32, dtype=np.int16)},
        MATRIX,
    ),
    "int4 weight, quantized input": Case(
        "weight-type",
        rows("c = MatMul (b, wd) " + q("c", "d"), weight="(w, s)"),
        rows("c = MatMul (b, wd) " + q("c", "d"), weight="(w, s)"),
        {"w": weights(64, 32, dtype=ml_dtypes.int4)},
        MATRIX,
    ),
    "blocks, quantized input": Case(
        "blocks-and-activations",
        rows("c = MatMul (b, wd) " + q("c", "d"), weight="<axis = 0, block_size = 32> (w, ws)"),
        rows("c = MatMul (b, wd) " + q("c", "d"), weight="<axis = 1> (w, ws)"),
        BLOCKS,
        COLUMNS,
    ),
    "scales along K": Case(
        "weight-axis",
        plain("wd = DequantizeLinear <axis = 0> (w, ws) y = MatMul (x, wd)"),
        plain("wd = DequantizeLinear <axis = 1> (w, ws) y = MatMul (x, wd)"),
        {**MATRIX, "ws": np.full(64, 0.01, np.float32)},
        COLUMNS,
    ),
    "blocks along N": Case(
        "weight-axis",
        plain("wd = DequantizeLinear <axis = 1, block_size = 16> (w, ws) y = MatMul (x, wd)"),
        None,
        {**MATRIX, "ws": np.full((64, 2), 0.01, np.float32)},
    ),
    "no zero point in Gemm": Case(
        "no-weight-zero-point",
        rows("c = Gemm (b, wd) " + q("c", "d"), weight="(w, s)"),
        rows("c = Gemm (b, wd) " + q("c", "d")),
        MATRIX,
    ),
    "alpha": Case(
        "scaled-gemm",
        plain("wd = DequantizeLinear (w, s) y = Gemm <alpha = 0.5> (x, wd)"),
        plain("wd = DequantizeLinear (w, s) y = Gemm (x, wd)"),
        MATRIX,
    ),
    "weight first": Case(
        "weight-first",
        "(float[64, 4] x) => (float[] y) { wd = DequantizeLinear (w, s) y = MatMul (wd, x) }",
        None,
        TALL,
    ),
    "a matrix for each item": Case(
        "weight-rank",
        "(float[2, 4, 64] x) => (float[] y) { wd = DequantizeLinear (w, s) y = MatMul (x, wd) }",
        None,
        {"w": weights(2, 64, 32)},
    ),
    "a weight that is an input": Case(
        "not-constant",
        plain("wd = DequantizeLinear (w, s) y = MatMul (x, wd)").replace(
            "x)", "x, int8[64, 32] w)"
        ),
        plain("wd = DequantizeLinear (w, s) y = MatMul (x, wd)"),
        MATRIX,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_rule_names_what_the_optimized_graph_shows(name: str) -> None:
    case = CASES[name]

    found = explain(model(case.bad, **case.bad_arrays))

    assert codes(found) - case.beside == {case.code}


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.good is not None])
def test_what_a_rule_asks_for_takes_the_reason_away(name: str) -> None:
    case = CASES[name]
    assert case.good is not None
    arrays = case.bad_arrays if case.good_arrays is None else case.good_arrays

    found = explain(model(case.good, **arrays))

    assert codes(found) - case.beside == set()


@pytest.mark.skipif(platform.machine().lower() not in ("amd64", "x86_64"), reason="of x86 alone")
def test_uint8_weights_run_in_integers_and_are_slow() -> None:
    text = image(CONV + q("c", "d")).replace("w, s, i0", "w, s, u9")

    found = explain(model(text, w=weights(8, 8, 3, 3, dtype=np.uint8)))

    assert codes(found) - LAYOUT == {"uint8-weights"}
    assert kernels(found)["c"] == "com.microsoft.QLinearConv"


def test_casts_of_a_float16_model_are_explained() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float16[4, 8] x, float16[8, 8] w) '
        "=> (float16[4, 8] y) { m = MatMul (x, w) y = Tanh (m) }"
    )

    found = explain(proto)

    assert codes(found) == {"no-half-kernel"}
    whys = {row.reason.why for row in found.rows if row.reason is not None}
    assert whys == {f"{op} has no float16 kernel on the CPU provider" for op in ("MatMul", "Tanh")}


def test_a_weight_quantized_in_the_graph_is_no_reason() -> None:
    text = image(CONV + q("c", "d")).replace("wd =", "wq = QuantizeLinear (w, s, i0) wd =")

    found = explain(
        model(text.replace("(w, s, i0) c", "(wq, s, i0) c"), w=np.ones((8, 8, 3, 3), np.float32))
    )

    assert codes(found) == set(LAYOUT)


def test_of_what_is_not_known_no_rule_is_made_up() -> None:
    # onnxruntime turns int8 activations into uint8, but not where one is read twice.
    found = explain(
        model(both(q("x", "a", zero="i0") + "c = Add (a, a) " + q("c", "d", zero="i0")))
    )

    assert codes(found) == {"unknown"}


# ------------------------------------------------------------------ nodes and kernels


def kernels(found: Explanation) -> dict[str, str]:
    """The kernel of each node that has one, by name."""
    return {fate.node: fate.kernel for fate in found.fates if fate.kernel is not None}


def fates(found: Explanation) -> dict[str, str]:
    return {fate.node: fate.how for fate in found.fates}


def test_nodes_of_a_quantized_model_are_found_in_the_integer_kernel() -> None:
    found = explain(model(image(CONV + "r = Relu (c) " + q("r", "d")), **KERNEL))

    fused = ("b", "wd", "c", "r", "d_q")
    assert {kernels(found)[node] for node in fused} == {"com.microsoft.QLinearConv"}
    assert [k.operators for k in found.kernels] == [
        ("QuantizeLinear",), (), ("Conv", "Relu"), (), ("DequantizeLinear",), ("Exp",)
    ]  # fmt: skip


def test_a_float_model_shows_what_was_fused_and_folded() -> None:
    found = explain(
        model(
            "(float[4, 8] x) => (float[] y) { n = Shape (x) m = MatMul (x, w) a = Add (m, b) "
            "r = Relu (a) k = Add (one, one) p = Mul (r, k) y = Reshape (p, n) }",
            w=np.ones((8, 8), np.float32),
            b=np.ones(8, np.float32),
            one=np.ones(8, np.float32),
        )
    )

    assert codes(found) == set()
    assert {kernels(found)[node] for node in ("m", "a", "r")} == {"com.microsoft.FusedGemm"}
    assert fates(found) == {
        "n": "folded", "m": "runs", "a": "fused", "r": "runs", "k": "folded", "p": "runs",
        "y": "runs",
    }  # fmt: skip


def test_borders_of_the_blocked_layout_are_explained() -> None:
    found = explain(
        model(
            "(float[1, 16, 6, 6] x) => (float[] y) { c = Conv <pads = [1, 1, 1, 1]> (x, w) "
            "y = Tanh (c) }",
            w=np.ones((16, 16, 3, 3), np.float32),
        )
    )

    assert codes(found) == {"blocked-layout"}
    assert kernels(found)["c"] == "com.microsoft.nchwc.Conv"
    assert [row.operators for row in found.rows if row.reason is not None] == [(), ()]


def test_a_decomposed_node_is_known_in_its_parts() -> None:
    found = explain(model("(float[4, 8] x) => (float[] y) { y = HardSwish (x) }"))

    assert [(k.operator, k.operators) for k in found.kernels] == [
        ("HardSigmoid", ("HardSwish",)), ("Mul", ("HardSwish",))
    ]  # fmt: skip


def test_nodes_without_a_name_are_timed_too() -> None:
    # In float16, onnxruntime takes Softmax apart, and gives the parts no names.
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float16[4, 8] x) => (float16[4, 8] y) '
        "{ e = Exp (x) y = Softmax (e) }"
    )

    found = explain(proto)

    parts = [k for k in found.kernels if k.operators == ("Softmax",)]
    assert {"ReduceMax", "Sub", "Exp", "Div"} <= {k.operator for k in parts}
    assert all(k.us_per_run is not None for k in found.kernels)


def test_quantization_is_seen_through_the_blocked_layout() -> None:
    found = explain(
        model(
            f"(float[1, 16, 6, 6] x) => (float[] y) {{ {q('x', 'b')} e = Tanh (b) "
            f"c = Conv <pads = [1, 1, 1, 1]> (e, w) f = Relu (c) {q('f', 'd', zero='u9')} "
            "y = Exp (d) }",
            w=np.ones((16, 16, 3, 3), np.float32),
        )
    )

    assert kernels(found)["c"] == "com.microsoft.nchwc.Conv"
    assert codes(found) == {"no-integer-kernel", "input-in-float", "blocked-layout"}


KERNELS = {
    "QLinearConv": "com.microsoft.QLinearConv",
    "QLinearMatMul": "QLinearMatMul",
    "QGemm": "com.microsoft.QGemm",
    "QGemm, transB": "com.microsoft.QGemm",
    "QLinearMatMul, Transpose": "QLinearMatMul",
    "MatMul": "com.microsoft.MatMulNBits",
}
"""By model of packed int8 weights, that which computes with them as integers."""


def told(found: Explanation) -> set[tuple[object, ...]]:
    """The operators, kernels and reasons; not what they take."""
    return {(row.operators, row.kernel, row.count, row.reason) for row in found.rows}


@pytest.mark.parametrize("reader", [*INTEGERS, *WEIGHTS_ONLY])
@pytest.mark.parametrize("levels", [3, 8, 256])
def test_packed_integers_are_explained_as_integers_are(reader: str, levels: int) -> None:
    plain = graphopt.explain(integer_model(reader), random_samples=1)
    found = graphopt.explain(packed_integers(reader, levels), random_samples=1)

    assert told(found) == told(plain)
    assert codes(found) <= LAYOUT | {"weight-only-operator", "transposed-weight", "shared-weight"}
    if reader in KERNELS:
        assert KERNELS[reader] in {row.kernel for row in found.rows}
        assert codes(found) <= LAYOUT
    nodes = [fate for fate in found.fates if fate.operator in ("Gather", "Cast", "Reshape")]
    assert {fate.how for fate in nodes if reader != "Gather" or fate.node != "y"} == {"folded"}


@pytest.mark.parametrize("reader", READERS)
def test_packed_floats_give_no_reason(reader: str) -> None:
    found = graphopt.explain(packed_reader(reader, FORMS["blocks"]), random_samples=1)

    assert codes(found) <= {"blocked-layout"}


def test_codes_that_are_not_widened_at_load_are_constants_all_the_same() -> None:
    """As if onnxruntime had found them too large to fold."""
    graph = packed_integers("QLinearConv", 8)
    steps = [node for node in graph.graph if is_packed(node.outputs[0])]
    reasons = find_reasons(graph, {node: (node.op_type,) for node in graph.graph}, {}, "cpu")

    assert {reasons[node].code for node in steps if not is_quantization(node)} == {
        "widened-in-every-run"
    }
    assert {reason.code for node, reason in reasons.items() if node not in steps} == {"unknown"}


def test_bodies_and_functions_are_looked_into() -> None:
    proto = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 21, "own" : 1]>
        g (float[4] x) => (float[4] y) {
            s = ReduceSum <keepdims = 0> (x)
            z = Constant <value_float = 1e9> ()
            c = Less (s, z)
            i = If (c) <
                then_branch = g1 () => (float[4] t) { t = Exp (x) },
                else_branch = g2 () => (float[4] e) { e = Neg (x) }
            >
            y = own.twice (i)
        }
        <domain: "own", opset_import: ["" : 21]> twice (a) => (b) { b = Add (a, a) }
    """)

    found = explain(proto)

    times_us = {k.operators: k.us_per_run for k in found.kernels}
    assert times_us[("Exp",)] is not None
    assert times_us[("Neg",)] is None
    assert kernels(found)["t"] == "Exp"
    assert kernels(found)["b"] == "Add"


def test_names_of_the_model_are_used_and_it_is_not_modified() -> None:
    proto = model("(float[4] x) => (float[] y) { e = Exp (x) y = Neg (e) }")
    proto.graph.node[0].name = "first"
    before = proto.SerializeToString()

    found = explain(proto)

    assert [k.nodes for k in found.kernels] == [("first",), ("y",)]
    assert proto.SerializeToString() == before


# ------------------------------------------------------------------ rows


def test_rows_are_grouped_and_those_with_a_reason_come_first() -> None:
    found = explain(
        model(
            both(
                "e = Neg (x) f = Neg (z) "
                + q("e", "a") + q("f", "b") + "c = Sub (a, b) " + q("c", "d")
            )
        )
    )  # fmt: skip

    assert [row.reason is None for row in found.rows] == sorted(
        row.reason is None for row in found.rows
    )
    for rows_of in ([r for r in found.rows if r.reason], [r for r in found.rows if not r.reason]):
        times_us = [row.us_per_run for row in rows_of]
        assert times_us == sorted(times_us, reverse=True)
    assert {row.operators: row.count for row in found.rows}[("Neg",)] == 2
    assert sum(row.count for row in found.rows) == len(found.kernels)
    assert sum(row.share for row in found.rows) == pytest.approx(1)
    assert found.us_per_run == pytest.approx(sum(row.us_per_run for row in found.rows))
    assert 0 < found.lost_us < found.us_per_run
    assert (found.runs, found.provider, found.threads) == (20, "cpu", 1)
    assert found.onnxruntime == ort.__version__


def test_the_samples_are_what_is_run() -> None:
    proto = model("(float[n] x) => (float[] y) { y = Exp (x) }")

    found = graphopt.explain(proto, samples=[{"x": np.zeros(3, np.float32)}])

    assert found.notes == ()
    assert "no samples were given: run on 4 random ones" in graphopt.explain(proto).notes
    with pytest.raises(graphopt.SampleError, match="wrong element type"):
        graphopt.explain(proto, samples=[{"x": np.zeros(3)}])
    with pytest.raises(graphopt.SpecError, match="threads is 0"):
        graphopt.explain(proto, threads=0)
