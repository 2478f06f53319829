from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from optimized import kernels

import graphopt
from graphopt.contract import Change, Context
from graphopt.observe import Observer
from graphopt.operators import all_graphs
from graphopt.recording import Feed
from graphopt.runtime import Reference, Session
from graphopt.samples import read_samples
from graphopt.signature import signature
from graphopt.testing import apply_pass, assert_rewrites, assert_unchanged, parse
from graphopt_passes.quantize.columns import columns_of, error_of_product, outlier_of
from graphopt_passes.quantize.dynamic_costs import (
    dynamic_lstm_ns,
    dynamic_ns,
    float_lstm_ns,
    float_ns,
)
from graphopt_passes.quantize.quantize_dynamic import QuantizeDynamic

ALL = QuantizeDynamic(minimum_gain=0)
"""Layers of any size, as they are small here."""

CODES = np.int8([[127, -3, 0, 2], [5, 127, 0, -127], [-64, 0, 0, 1]])
SCALES = np.float32([0.5, 2.0, 1.0, 0.25])
WEIGHT = CODES * SCALES
"""Of which these are the codes and scales; its third column is 0."""

PRODUCT = """
agraph (float[{x}] x, float[3, 4] w) => (float[{y}] y) <float[4] b = {{1.0, 2.0, 3.0, 4.0}}>
{{ {nodes} }}
"""
FORM = """
agraph (float[{x}] x, float[3, 4] w, int8[3, 4] codes, float[4] scales) => (float[{y}] y)
<float[4] b = {{1.0, 2.0, 3.0, 4.0}}>
{{
    c, s, z = DynamicQuantizeLinear(x)
    i = MatMulInteger(c, codes, z)
    f = Cast <to = 1> (i)
    m = Mul(s, scales)
    {nodes}
}}
"""


def normal(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    return np.float32(scale * np.random.default_rng(seed).standard_normal(shape))


def product(nodes: str = "y = MatMul(x, w)", x: str = "5, 3", y: str = "5, 4") -> ir.Model:
    return parse(PRODUCT.format(nodes=nodes, x=x, y=y), w=WEIGHT)


def form(nodes: str = "y = Mul(f, m)", x: str = "5, 3", y: str = "5, 4") -> ir.Model:
    text = FORM.format(nodes=nodes, x=x, y=y)
    return parse(text, w=WEIGHT, codes=CODES, scales=SCALES)


def reasons(change: Change) -> list[str]:
    return [skip.reason for skip in change.skips]


def left_alone(model: ir.Model | str, tested: QuantizeDynamic = ALL) -> str:
    """The one reason why the pass changes nothing."""
    (reason,) = set(reasons(assert_unchanged(tested, model)))
    return reason


def observed(
    tested: QuantizeDynamic, model: ir.Model, *samples: Mapping[str, np.ndarray]
) -> Change:
    """The pass is applied with samples."""
    inputs = signature(model)
    return apply_pass(tested, model, observer=Observer(Feed(read_samples(samples, inputs), inputs)))


def difference(before: ir.Model, after: ir.Model, sample: Mapping[str, np.ndarray]) -> float:
    """The relative L2 norm of the worst output, as deployed."""
    first, second = Session(before).run(sample), Session(after).run(sample)
    assert [a.shape for a in first.values()] == [a.shape for a in second.values()]
    return max(
        float(np.linalg.norm(first[n] - second[n]) / max(np.linalg.norm(first[n]), 1e-30))
        for n in first
    )


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for graph in all_graphs(model) for node in graph]


# ------------------------------------------------------------------ products


@pytest.mark.parametrize(("x", "y"), [("5, 3", "5, 4"), ("2, 5, 3", "2, 5, 4"), ("3", "4")])
def test_matmul_becomes_a_product_of_codes(x: str, y: str, tmp_path: Path) -> None:
    model = product(x=x, y=y)

    change = assert_rewrites(ALL, model, form(x=x, y=y))

    assert change.counts == {"MatMul on 8-bit integers": 1}
    assert kernels(model, tmp_path) == {"DynamicQuantizeMatMul": 1}


@pytest.mark.parametrize(
    "nodes",
    [
        "y = Gemm(x, w, b)",
        "m = MatMul(x, w) y = Add(m, b)",
        # As PyTorch writes it: onnxruntime fuses the bias only where it comes second.
        "m = MatMul(x, w) y = Add(b, m)",
    ],
)
def test_a_bias_comes_second(nodes: str, tmp_path: Path) -> None:
    model = product(nodes)

    assert_rewrites(ALL, model, form("p = Mul(f, m) y = Add(p, b)"))

    assert kernels(model, tmp_path) == {"DynamicQuantizeMatMul": 1}


def test_transposed_weight_of_gemm(tmp_path: Path) -> None:
    text = """
    agraph (float[5, 3] x, float[4, 3] w) => (float[5, 4] y)
    <float[1, 4] b = {1.0, 2.0, 3.0, 4.0}> { y = Gemm <transB = 1> (x, w, b) }
    """
    model = parse(text, w=WEIGHT.T)
    expected = parse(
        FORM.format(nodes="p = Mul(f, m) y = Add(p, b)", x="5, 3", y="5, 4")
        .replace("float[3, 4] w", "float[4, 3] w")
        .replace("float[4] b", "float[1, 4] b"),
        w=WEIGHT.T,
        codes=CODES,
        scales=SCALES,
    )

    assert_rewrites(ALL, model, expected)

    assert kernels(model, tmp_path) == {"DynamicQuantizeMatMul": 1}


def test_products_of_one_value_share_its_codes(tmp_path: Path) -> None:
    text = """
    agraph (float[2, 5, 32] x, float[32, 32] q, float[32, 16] k, float[32, 16] v, float[16] b)
        => (float[2, 5, 32] a, float[2, 5, 16] c, float[2, 5, 16] y)
    { a = MatMul(x, q) c = MatMul(x, k) m = MatMul(x, v) y = Add(m, b) }
    """
    model = parse(
        text, q=normal(1, 32, 32), k=normal(2, 32, 16), v=normal(3, 32, 16), b=normal(4, 16)
    )
    before = model.clone()

    apply_pass(ALL, model)

    assert operators(model).count("DynamicQuantizeLinear") == 1
    assert kernels(model, tmp_path) == {"DynamicQuantizeLinear": 1, "MatMulIntegerToFloat": 3}
    assert difference(before, model, {"x": normal(0, 2, 5, 32)}) < 0.02


@pytest.mark.parametrize("reference", list(Reference))
def test_outputs_are_those_of_the_formula(reference: Reference) -> None:
    model = parse(
        """
        agraph (float[N, 40] x, float[40, 24] w, float[24] b) => (float[N, 24] y)
        { y = Gemm(x, w, b) }
        """,
        w=normal(1, 40, 24),
        b=normal(2, 24),
    )
    x, weight, bias = normal(0, 7, 40), normal(1, 40, 24), normal(2, 24)
    apply_pass(ALL, model)

    got = Session(model, reference).run({"x": x})["y"]

    scale = np.float32((x.max() - x.min()) / np.float32(255))
    zero_point = np.rint(-x.min() / scale)
    codes = np.clip(np.rint(x / scale) + zero_point, 0, 255) - zero_point
    scales = np.abs(weight).max(0) / np.float32(127)
    wanted = (codes @ np.rint(weight / scales)) * (scale * scales) + bias
    np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=2e-6)
    assert np.linalg.norm(wanted - (x @ weight + bias)) < 0.02 * np.linalg.norm(wanted)


def test_no_rows_give_no_rows() -> None:
    model = product(x="N, 3", y="N, 4")
    apply_pass(ALL, model)

    assert Session(model).run({"x": np.zeros((0, 3), np.float32)})["y"].shape == (0, 4)


def test_inputs_of_one_value_and_of_zeros() -> None:
    model = product()
    before = model.clone()
    apply_pass(ALL, model)

    assert difference(before, model, {"x": np.zeros((5, 3), np.float32)}) == 0
    assert difference(before, model, {"x": np.full((5, 3), -7.0, np.float32)}) < 1e-5


def test_a_weight_in_a_constant_node_is_stored_as_codes_only() -> None:
    numbers = ", ".join(map(str, WEIGHT.reshape(-1).tolist()))
    model = parse(
        f"""
        agraph (float[5, 3] x) => (float[5, 4] y)
        {{ w = Constant <value = float[3, 4] {{{numbers}}}> () y = MatMul(x, w) }}
        """
    )

    apply_pass(ALL, model)

    assert "Constant" not in operators(model)


def test_a_second_application_finds_nothing() -> None:
    model = product("m = MatMul(x, w) y = Add(m, b)")
    apply_pass(ALL, model)

    assert not apply_pass(ALL, model)


# ------------------------------------------------------------------ shared weights


def test_layers_that_share_a_weight_share_its_codes() -> None:
    text = """
    agraph (float[5, 3] x, float[3, 4] w, float[2, 3] u) => (float[5, 4] y, float[2, 4] z)
    { y = MatMul(x, w) z = Gemm(u, w) }
    """
    model = parse(text, w=WEIGHT)

    change = apply_pass(ALL, model)

    assert change.counts == {"MatMul on 8-bit integers": 1, "Gemm on 8-bit integers": 1}
    codes = [v for v in model.graph.initializers.values() if v.dtype == ir.DataType.INT8]
    assert len(codes) == 1


@pytest.mark.parametrize(
    ("outputs", "nodes"),
    [
        ("float[5, 4] y, float[5, 4] z", "y = MatMul(x, w) z = Gather(w, k)"),
        (
            "float[5, 4] y, float[4, 5] z",
            "y = MatMul(x, w) t = Transpose(x) v = Transpose(w) z = MatMul(v, t)",
        ),
        ("float[5, 4] y, float[3, 4] w", "y = MatMul(x, w)"),
    ],
)
def test_a_weight_that_stays_for_others_is_not_stored_twice(outputs: str, nodes: str) -> None:
    text = f"""
    agraph (float[5, 3] x, int64[5] k, float[3, 4] w) => ({outputs})
    {{ {nodes} }}
    """

    change = assert_unchanged(ALL, parse(text, w=WEIGHT))

    assert "its weight is shared with what stays in float" in reasons(change)


# ------------------------------------------------------------------ what is left alone


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ("y = MatMul(x, r)", "its weight is computed at run time"),
        ("y = Gemm <alpha = 2.0> (x, w)", "it has transA or alpha"),
        ("y = Gemm <beta = 0.5> (x, w, b)", "it has beta"),
        ("t = Transpose(x) y = Gemm <transA = 1> (t, w)", "it has transA or alpha"),
        ("m = MatMul(v, w) y = Add(m, x0)", "its input is constant"),
    ],
)
def test_products_of_other_forms(nodes: str, reason: str) -> None:
    text = f"""
    agraph (float[5, 3] x, float[3, 4] r, float[5, 4] x0, float[3, 4] w, float[5, 3] v)
        => (float[5, 4] y) <float[4] b = {{1.0, 2.0, 3.0, 4.0}}> {{ {nodes} }}
    """

    assert left_alone(parse(text, w=WEIGHT, v=normal(0, 5, 3))) == reason


def test_beta_without_bias_means_nothing() -> None:
    assert_rewrites(ALL, product("y = Gemm <beta = 0.5> (x, w)"), form())


@pytest.mark.parametrize("kind", ["float16", "double"])
def test_other_precision(kind: str) -> None:
    text = f"agraph ({kind}[5, 3] x, {kind}[3, 4] w) => ({kind}[5, 4] y) {{ y = MatMul(x, w) }}"
    dtype = {"float16": np.float16, "double": np.float64}[kind]

    name = {"float16": "FLOAT16", "double": "DOUBLE"}[kind]
    reason = left_alone(parse(text, w=WEIGHT.astype(dtype)))

    assert reason == f"it computes in {name}, and the integer kernels in FLOAT only"


def test_an_overridable_weight() -> None:
    text = """
    agraph (float[5, 3] x, float[3, 4] w) => (float[5, 4] y)
    <float[3, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}> { y = MatMul(x, w) }
    """
    model = parse(text)
    weight = next(v for v in model.graph.inputs if v.name == "w")
    assert weight.is_initializer()

    assert left_alone(model) == "its weight is an input that a caller can override"


def test_a_packed_weight() -> None:
    text = """
    agraph (float[5, 3] x, int8[3, 4] q, float s) => (float[5, 4] y)
    { w = DequantizeLinear(q, s) y = MatMul(x, w) }
    """

    assert left_alone(parse(text, q=CODES, s=np.float32(0.5))) == "its weight is packed already"


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_weight_that_is_not_finite(number: float) -> None:
    weight = WEIGHT.copy()
    weight[1, 1] = number

    assert left_alone(
        parse(PRODUCT.format(nodes="y = MatMul(x, w)", x="5, 3", y="5, 4"), w=weight)
    ) == ("its weight is not finite")


def test_a_weight_of_three_dimensions_and_one_of_nothing() -> None:
    batched = "agraph (float[2, 5, 3] x, float[2, 3, 4] w) => (float[2, 5, 4] y) {y = MatMul(x, w)}"
    nothing = "agraph (float[5, 0] x, float[0, 4] w) => (float[5, 4] y) {y = MatMul(x, w)}"

    assert left_alone(parse(batched, w=normal(0, 2, 3, 4))) == "its weight has shape [2, 3, 4]"
    assert left_alone(parse(nothing, w=normal(0, 0, 4))) == "its weight has shape [0, 4]"


def test_sums_that_overflow() -> None:
    text = "agraph (float[1, 70000] x, float[70000, 2] w) => (float[1, 2] y) { y = MatMul(x, w) }"

    assert left_alone(parse(text, w=np.ones((70000, 2), np.float32))) == (
        "70000 products of codes may not add up within 32 bits"
    )


def test_the_longest_sums_do_not_overflow() -> None:
    count = (2**31 - 1) // (255 * 127)
    text = f"""
    agraph (float[1, {count}] x, float[{count}, 2] w) => (float[1, 2] y) {{ y = MatMul(x, w) }}
    """
    model = parse(text, w=np.ones((count, 2), np.float32))
    apply_pass(ALL, model)

    for reference in Reference:
        y = Session(model, reference).run({"x": np.ones((1, count), np.float32)})["y"]
        np.testing.assert_allclose(y, count, rtol=1e-5)


def test_bodies_are_left_alone() -> None:
    text = """
    agraph (float[5, 3] x, bool c, float[3, 4] w) => (float[5, 4] y)
    {
        y = If (c) <
            then_branch = then () => (float[5, 4] a) { a = MatMul(x, w) },
            else_branch = otherwise () => (float[5, 4] b) { b = Gemm(x, w) }
        >
    }
    """

    assert left_alone(parse(text, w=WEIGHT)) == (
        "it is in a body of If, Loop or Scan, where samples do not show"
    )


def test_refusals() -> None:
    model = product()
    context = Context(lambda: model)
    old = parse(
        '<ir_version: 8, opset_import: ["" : 10]>'
        + PRODUCT.format(nodes="y = MatMul(x, w)", x="5, 3", y="5, 4"),
        w=WEIGHT,
    )
    other = model.clone()
    other.opset_imports["com.microsoft"] = 2

    assert ALL.refuse(model, context) is None
    assert ALL.refuse(old, context) == "opset 10 is older than 11; raise it first"
    assert "other than 1" in str(ALL.refuse(other, context))
    assert "CPU" in str(ALL.refuse(model, Context(lambda: model, provider="cuda")))


# ------------------------------------------------------------------ where it is faster


def test_a_small_product_is_faster_in_float() -> None:
    reason = left_alone(product(), QuantizeDynamic())

    assert reason.startswith("it would gain less than 1.1: about 0.4 µs in float")


SQUARE = """
agraph (float[{rows}, 256] x, float[256, 256] w) => (float[{rows}, 256] y) {{ y = MatMul(x, w) }}
"""


def square(rows: str) -> ir.Model:
    return parse(SQUARE.format(rows=rows), w=normal(1, 256, 256))


@pytest.mark.parametrize("rows", ["1", "64", "N"])
def test_a_large_product_is_faster_on_integers(rows: str) -> None:
    assert apply_pass(QuantizeDynamic(), square(rows)).counts == {"MatMul on 8-bit integers": 1}


def test_the_number_of_rows_is_assumed_or_seen() -> None:
    """64 inputs and 1024 outputs pay at 64 rows, and not at 1."""
    text = "agraph (float[N, 64] x, float[64, 1024] w) => (float[N, 1024] y) { y = MatMul(x, w) }"
    model = parse(text, w=normal(1, 64, 1024))

    assert apply_pass(QuantizeDynamic(rows=64), model.clone())
    assert not apply_pass(QuantizeDynamic(rows=1), model.clone())
    assert observed(QuantizeDynamic(rows=1), model.clone(), {"x": normal(2, 64, 64)})
    assert not observed(QuantizeDynamic(rows=64), model.clone(), {"x": normal(2, 1, 64)})


def test_known_dimensions_count_without_samples() -> None:
    text = """
    agraph (float[N, 64, 64] x, float[64, 1024] w) => (float[N, 64, 1024] y) { y = MatMul(x, w) }
    """

    assert apply_pass(QuantizeDynamic(), parse(text, w=normal(1, 64, 1024)))


def test_costs_keep_the_order_that_was_measured() -> None:
    gain = float_ns(1, 64, 64) / dynamic_ns(1, 64, 64)
    assert gain < 0.5
    for rows, size, least in (
        (1, 256, 1.3),
        (1, 1024, 2),
        (16, 256, 1.5),
        (64, 512, 3),
        (256, 512, 2),
    ):
        assert float_ns(rows, size, size) / dynamic_ns(rows, size, size) > least
    for steps in (1, 10, 50):
        assert float_lstm_ns(steps, 1, 64, 64) < dynamic_lstm_ns(steps, 1, 64, 64)
        assert float_lstm_ns(steps, 1, 512, 512) > 3 * dynamic_lstm_ns(steps, 1, 512, 512)


# ------------------------------------------------------------------ error by layer


def test_an_outlier_channel_keeps_a_layer_in_float() -> None:
    model = square("32")
    x = normal(0, 32, 256)
    x[:, 17] *= 100

    change = observed(ALL, model.clone(), {"x": x})

    assert not change
    (reason,) = reasons(change)
    assert reason.startswith("its output would change by ")
    assert "more than 5.0%: input channel 17 reaches " in reason
    assert observed(QuantizeDynamic(layer_error=1.0), model.clone(), {"x": x})
    assert observed(ALL, model.clone(), {"x": normal(0, 32, 256)})


def test_the_error_is_the_one_that_shows() -> None:
    model = square("32")
    x = normal(0, 32, 256)
    x[:, 5] *= 10
    weight = normal(1, 256, 256)
    estimate = error_of_product(x, weight)
    before = model.clone()
    apply_pass(ALL, model)

    assert estimate == pytest.approx(difference(before, model, {"x": x}), rel=1e-3)


@pytest.mark.parametrize("number", [np.inf, np.nan, -1e9])
def test_activations_without_a_range(number: float) -> None:
    x = normal(0, 32, 256)
    x[3, 3] = number

    (reason,) = reasons(observed(ALL, square("32"), {"x": x}))

    assert reason == "its input holds infinities, NaN or masks on the samples"


def test_samples_of_nothing_but_zeros() -> None:
    assert observed(ALL, square("32"), {"x": np.zeros((32, 256), np.float32)})


def test_columns_and_outliers() -> None:
    columns = columns_of(WEIGHT)
    np.testing.assert_array_equal(columns.codes, CODES)
    np.testing.assert_array_equal(columns.scales, SCALES)
    np.testing.assert_array_equal(columns.numbers(), WEIGHT)
    assert np.abs(columns_of(normal(0, 20, 10), 64).codes).max() == 64
    np.testing.assert_array_equal(columns_of(np.full((2, 2), 1e-40, np.float32)).scales, 1)
    assert outlier_of(np.float32([[1, 2, 50], [1, 1, 1]])) == (2, 25.0)
    assert outlier_of(np.float32([[1, 2, 3]])) is None


def test_reduced_range() -> None:
    model = square("8")
    apply_pass(QuantizeDynamic(reduce_range=True), model)

    (codes,) = [v for v in model.graph.initializers.values() if v.dtype == ir.DataType.INT8]
    assert codes.const_value is not None
    assert np.abs(codes.const_value.numpy()).max() == 64


# ------------------------------------------------------------------ LSTM

INPUTS, HIDDEN, STEPS, BATCH = 12, 20, 9, 3


def lstm(
    attributes: str = "",
    extra: str = "",
    outputs: str = "y",
    directions: int = 1,
    header: str = "",
) -> ir.Model:
    """An LSTM with the optional inputs `extra`, which follow the bias."""
    shapes = {
        "y": f"{STEPS}, {directions}, {BATCH}, {HIDDEN}",
        "yh": f"{directions}, {BATCH}, {HIDDEN}",
        "yc": f"{directions}, {BATCH}, {HIDDEN}",
    }
    made = ", ".join(f"float[{shapes[o]}] {o}" for o in outputs.split(", ") if o in shapes)
    states = f"float[{directions}, {BATCH}, {HIDDEN}]"
    text = f"""{header}
    agraph (float[{STEPS}, {BATCH}, {INPUTS}] x, int32[{BATCH}] n, {states} h, {states} c,
        float[1] w, float[1] r, float[1] b, float[1] p) => ({made})
    {{ {outputs} = LSTM <hidden_size = {HIDDEN}{attributes}> (x, w, r, b{extra}) }}
    """
    return parse(
        text,
        w=normal(1, directions, 4 * HIDDEN, INPUTS, scale=0.3),
        r=normal(2, directions, 4 * HIDDEN, HIDDEN, scale=0.2),
        b=normal(3, directions, 8 * HIDDEN, scale=0.1),
        p=normal(4, directions, 3 * HIDDEN, scale=0.1),
    )


def sample(directions: int = 1) -> dict[str, np.ndarray]:
    return {
        "x": normal(5, STEPS, BATCH, INPUTS),
        "n": np.int32([STEPS, 4, 1]),
        "h": normal(6, directions, BATCH, HIDDEN, scale=0.5),
        "c": normal(7, directions, BATCH, HIDDEN, scale=0.5),
    }


@pytest.mark.parametrize(
    ("attributes", "directions"),
    [
        ("", 1),
        (', direction = "reverse"', 1),
        (', direction = "bidirectional"', 2),
        (", clip = 0.5, input_forget = 1", 1),
        (', activations = ["HardSigmoid", "Tanh", "Softsign"], activation_alpha = [0.3]', 1),
    ],
)
@pytest.mark.parametrize("extra", ["", ", n", ", , h, c", ", n, h, c, p", ", , , , p"])
@pytest.mark.parametrize("outputs", ["y", "y, yh, yc", ", yh", ", , yc"])
def test_every_kind_of_lstm(
    attributes: str, directions: int, extra: str, outputs: str, tmp_path: Path
) -> None:
    model = lstm(attributes, extra, outputs, directions)
    before = model.clone()

    change = apply_pass(ALL, model)

    assert change.counts == {"LSTM on 8-bit integers": 1}
    assert model.opset_imports["com.microsoft"] == 1
    assert kernels(model, tmp_path) == {"DynamicQuantizeLSTM": 1}
    assert difference(before, model, sample(directions)) < 0.03


def test_weights_of_lstm_are_stored_by_column() -> None:
    model = lstm(', direction = "bidirectional"', "", "y", 2)
    apply_pass(ALL, model)

    (node,) = model.graph
    shapes = [None if v is None or v.shape is None else v.shape.numpy() for v in node.inputs]
    dtypes = [None if v is None else v.dtype for v in node.inputs]
    assert shapes[1:3] == [(2, INPUTS, 4 * HIDDEN), (2, HIDDEN, 4 * HIDDEN)]
    assert shapes[8:] == [(2, 4 * HIDDEN)] * 4
    assert dtypes[8:] == [ir.DataType.FLOAT, ir.DataType.INT8] * 2
    assert node.inputs[9] is node.inputs[11]


def test_an_lstm_without_hidden_size_is_given_it() -> None:
    model = lstm()
    del model.graph[0].attributes["hidden_size"]
    apply_pass(ALL, model)

    assert model.graph[0].attributes["hidden_size"].as_int() == HIDDEN


@pytest.mark.parametrize(
    ("tested", "reason"),
    [
        (QuantizeDynamic(minimum_gain=0, recurrent=False), "recurrent is off"),
        (QuantizeDynamic(), "it would gain less than 1.1"),
    ],
)
def test_lstms_that_stay(tested: QuantizeDynamic, reason: str) -> None:
    assert left_alone(lstm(), tested).startswith(reason)


def test_batch_first_stays() -> None:
    model = lstm()
    model.graph[0].attributes["layout"] = ir.AttrInt64("layout", 1)
    model.graph.inputs[0].shape = ir.Shape([BATCH, STEPS, INPUTS])

    change = ALL.apply(model, Context(lambda: model))

    assert reasons(change) == ["DynamicQuantizeLSTM has no layout with the batch first"]


def test_gru_and_rnn_stay() -> None:
    text = """
    agraph (float[4, 1, 3] x, float[1, 6, 3] w, float[1, 6, 2] r, float[1, 2, 3] u,
        float[1, 2, 2] s) => (float[4, 1, 1, 2] y, float[4, 1, 1, 2] z)
    { y = GRU <hidden_size = 2> (x, w, r) z = RNN <hidden_size = 2> (x, u, s) }
    """
    model = parse(
        text, w=normal(1, 1, 6, 3), r=normal(2, 1, 6, 2), u=normal(3, 1, 2, 3), s=normal(4, 1, 2, 2)
    )

    assert reasons(assert_unchanged(ALL, model)) == [
        "onnxruntime has no integer kernel for GRU",
        "onnxruntime has no integer kernel for RNN",
    ]


def test_a_computed_weight_of_an_lstm() -> None:
    text = """
    agraph (float[4, 1, 3] x, float[1, 8, 3] w, float[1, 8, 2] r) => (float[4, 1, 1, 2] y)
    { y = LSTM <hidden_size = 2> (x, w, r) }
    """

    assert left_alone(parse(text, w=normal(1, 1, 8, 3))) == "its weight is computed at run time"


def test_the_length_of_a_sequence_is_seen() -> None:
    """128 hidden, 256 inputs: faster at 50 steps, not at one."""
    text = """
    agraph (float[T, 1, 256] x, float[1] w, float[1] r) => (float[T, 1, 1, 128] y)
    { y = LSTM <hidden_size = 128> (x, w, r) }
    """
    model = parse(text, w=normal(1, 1, 512, 256, scale=0.05), r=normal(2, 1, 512, 128, scale=0.05))

    assert not apply_pass(QuantizeDynamic(), model.clone())
    assert observed(QuantizeDynamic(), model.clone(), {"x": normal(3, 50, 1, 256)})
    assert not observed(QuantizeDynamic(), model.clone(), {"x": normal(3, 1, 1, 256)})


def test_an_outlier_keeps_an_lstm_in_float() -> None:
    model, one = lstm(extra=", n, h, c"), sample()
    weight = normal(1, 1, 4 * HIDDEN, INPUTS, scale=0.3)
    one["x"][..., 4] *= 100
    weight[..., 4] /= 100
    model.graph.initializers["w"].const_value = ir.tensor(weight, name="w")

    (reason,) = reasons(observed(ALL, model, one))

    assert "input channel 4 reaches" in reason


# ------------------------------------------------------------------ whole runs


def both() -> ir.Model:
    text = """
    agraph (float[T, 1, 64] x, float[1] w, float[1] r, float[1] k) => (float[T, 1, 1, 64] y)
    {
        m = MatMul(x, k)
        y = LSTM <hidden_size = 64> (m, w, r)
    }
    """
    return parse(
        text,
        k=normal(0, 64, 64, scale=0.1),
        w=normal(1, 1, 256, 64, scale=0.1),
        r=normal(2, 1, 256, 64, scale=0.1),
    )


def run_on(model: ir.Model, standard_ops_only: bool) -> graphopt.Run:
    samples = [{"x": normal(seed, 6, 1, 64)} for seed in range(12)]
    return graphopt.optimize(
        model,
        passes="quantize-dynamic{minimum-gain=0}",
        samples=samples,
        standard_ops_only=standard_ops_only,
        benchmark=False,
    )


def test_a_run_writes_what_onnx_reads_back(tmp_path: Path) -> None:
    run = run_on(both(), standard_ops_only=False)
    (step,) = run.steps
    run.save(tmp_path / "small.onnx")

    assert step.verdict == "kept"
    assert step.changes == {"MatMul on 8-bit integers": 1, "LSTM on 8-bit integers": 1}
    assert not step.skips
    proto = onnx.load(tmp_path / "small.onnx")
    assert {o.domain: o.version for o in proto.opset_import} == {"": 21, "com.microsoft": 1}
    assert run.optimized.stored_bytes < 0.35 * run.original.stored_bytes


def test_standard_operators_only_leave_the_lstm() -> None:
    (step,) = run_on(both(), standard_ops_only=True).steps

    assert step.spec == "quantize-dynamic{minimum-gain=0.0,recurrent=false}"
    assert step.verdict == "kept"
    assert step.changes == {"MatMul on 8-bit integers": 1}


def test_milder_forms_end() -> None:
    one: QuantizeDynamic | None = QuantizeDynamic()
    forms = []
    while one is not None:
        forms.append(str(one))
        milder = one.narrow()
        assert milder is None or isinstance(milder, QuantizeDynamic)
        one = milder

    assert forms == [
        "quantize-dynamic",
        "quantize-dynamic{recurrent=false}",
        "quantize-dynamic{layer-error=0.025,recurrent=false}",
        "quantize-dynamic{layer-error=0.0125,recurrent=false}",
        "quantize-dynamic{layer-error=0.01,recurrent=false}",
    ]
