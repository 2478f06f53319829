"""What quantize-static writes: the kernels that onnxruntime makes of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from on_codes import (
    CONV,
    ENDS,
    FINE,
    all_units,
    code_all,
    context_of,
    difference,
    normal,
    samples_of,
    sandwich,
    scale_of,
    steps_from_written,
    work,
)
from optimized import kernels

from graphopt.runtime import Reference, Session
from graphopt.skeleton import infer_shapes
from graphopt.testing import assert_unchanged, parse
from graphopt_passes.quantize.choice import Choice
from graphopt_passes.simplify.merge_reshapes import MergeReshapes

# ------------------------------------------------------------------ kernels: products


@pytest.mark.parametrize(
    ("nodes", "x", "weight", "y"),
    [
        ("y = Conv <pads = [1, 1, 1, 1]> (x, w, b)", "2, 8, 6, 6", "8, 8, 3, 3", "2, 8, 6, 6"),
        ("y = Conv (x, w)", "2, 8, 6, 6", "8, 8, 1, 1", "2, 8, 6, 6"),
        ("c = Conv (x, w, b) y = Relu(c)", "2, 8, 6, 6", "8, 8, 3, 3", "2, 8, 4, 4"),
        ("c = Conv (x, w, b) y = Clip(c, zero, six)", "2, 8, 6, 6", "8, 8, 3, 3", "2, 8, 4, 4"),
        ("y = Conv <group = 8> (x, w, b)", "2, 8, 6, 6", "8, 1, 3, 3", "2, 8, 4, 4"),
        ("y = Conv <group = 4> (x, w, b)", "2, 8, 6, 6", "8, 2, 3, 3", "2, 8, 4, 4"),
        ("y = Conv <group = 4> (x, w, b)", "2, 4, 6, 6", "8, 1, 3, 3", "2, 8, 4, 4"),
        ("y = Conv <strides = [2]> (x, w, b)", "2, 8, 9", "8, 8, 3", "2, 8, 4"),
        ("y = Conv (x, w, b)", "1, 4, 4, 4, 4", "8, 4, 3, 3, 3", "1, 8, 2, 2, 2"),
        ("y = Conv <dilations = [2, 2]> (x, w)", "2, 8, 7, 7", "8, 8, 3, 3", "2, 8, 3, 3"),
        (
            'y = Conv <auto_pad = "SAME_LOWER", strides = [2, 2]> (x, w)',
            "2, 8, 7, 7",
            "8, 8, 3, 3",
            "2, 8, 4, 4",
        ),
    ],
)
def test_convolutions_run_on_integers(
    nodes: str, x: str, weight: str, y: str, tmp_path: Path
) -> None:
    text = f"""
    agraph (float[{x}] x, float[{weight}] w, float[8] b) => (float[{y}] y)
    <float zero = {{0.0}}, float six = {{6.0}}> {{ {nodes} }}
    """
    model = parse(text, w=normal(1, *sizes(weight)), b=normal(2, 8))
    before, samples = model.clone(), samples_of(*sizes(x))

    assert code_all(model, samples) == ["Conv"]

    assert work(model, tmp_path) == {**ENDS, "QLinearConv": 1}
    assert difference(before, model, samples[0]) < FINE
    assert steps_from_written(model, samples[0]) < 1.5


def sizes(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


@pytest.mark.parametrize("bias", ["", ", b", ", row"])
@pytest.mark.parametrize(("attribute", "weight"), [("", (8, 6)), ("<transB = 1>", (6, 8))])
def test_gemm_runs_on_integers_and_makes_floats(
    bias: str, attribute: str, weight: tuple[int, int], tmp_path: Path
) -> None:
    text = f"""
    agraph (float[5, 8] x, float[{weight[0]}, {weight[1]}] w, float[6] b, float[1, 6] row)
        => (float[5, 6] y)
    {{ y = Gemm {attribute} (x, w{bias}) }}
    """
    model = parse(text, w=normal(1, *weight), b=normal(2, 6), row=normal(2, 1, 6))
    before, samples = model.clone(), samples_of(5, 8)

    code_all(model, samples)

    assert work(model, tmp_path) == {"QuantizeLinear": 1, "QGemm": 1}
    assert difference(before, model, samples[0]) < FINE
    assert steps_from_written(model, samples[0]) < 1e-4


@pytest.mark.parametrize("x", ["5, 8", "2, 5, 8", "2, 3, 5, 8", "8"])
def test_matmul_runs_on_integers_and_makes_floats(x: str, tmp_path: Path) -> None:
    y = ", ".join([*x.split(", ")[:-1], "6"])
    model = parse(
        f"agraph (float[{x}] x, float[8, 6] w) => (float[{y}] y) {{ y = MatMul(x, w) }}",
        w=normal(1, 8, 6),
    )
    before, samples = model.clone(), samples_of(*sizes(x))

    code_all(model, samples)

    assert work(model, tmp_path) == {"QuantizeLinear": 1, "MatMulIntegerToFloat": 1}
    assert difference(before, model, samples[0]) < FINE
    assert steps_from_written(model, samples[0]) < 1e-4


@pytest.mark.parametrize(
    ("between", "wanted"),
    [
        ("h = Identity(m)", {"QLinearMatMul": 1}),
        ("h = Relu(m)", {"QLinearMatMul": 1}),
        ("h = Add(m, b)", {"QLinearMatMul": 1, "QLinearAdd": 1}),
        ("h = Add(b, m)", {"QLinearMatMul": 1, "QLinearAdd": 1}),
        ("a = Add(m, b) h = Relu(a)", {"QLinearMatMul": 1, "QLinearAdd": 1}),
    ],
)
def test_codes_go_from_one_product_to_the_next(
    between: str, wanted: dict[str, int], tmp_path: Path
) -> None:
    model = parse(
        f"""
        agraph (float[5, 8] x, float[8, 6] w, float[6] b, float[6, 7] v) => (float[5, 7] y)
        {{ m = MatMul(x, w) {between} y = MatMul(h, v) }}
        """,
        w=normal(1, 8, 6),
        b=normal(2, 6),
        v=normal(3, 6, 7),
    )
    before, samples = model.clone(), samples_of(5, 8)

    code_all(model, samples)

    assert work(model, tmp_path) == {"QuantizeLinear": 1, "MatMulIntegerToFloat": 1, **wanted}
    assert difference(before, model, samples[0]) < FINE


# ------------------------------------------------------------------ kernels: what lies between

BETWEEN = [
    ("d = CONV (x, v, b) e = Add(c, d)", "QLinearConv QLinearAdd"),
    ("d = CONV (c, v, b) a = Add(c, d) e = Relu(a)", "QLinearConv QLinearAdd"),
    ("d = CONV (x, v, b) e = Mul(c, d)", "QLinearConv QLinearMul"),
    ("s = Sigmoid(c) e = Mul(c, s)", "QLinearSigmoid QLinearMul"),
    (
        "g = GlobalAveragePool(c) s = Sigmoid(g) e = Mul(c, s)",
        "QLinearGlobalAveragePool QLinearSigmoid QLinearMul",
    ),
    ("e = Add(c, c)", "QLinearAdd"),
    ("e = Mul(c, k)", "QLinearMul"),
    ("e = Add(k, c)", "QLinearAdd"),
    ("e = LeakyRelu <alpha = 0.2> (c)", "QLinearLeakyRelu"),
    ("e = AveragePool <kernel_shape = [2, 2]> (c)", "QLinearAveragePool"),
    (
        "e = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1> (c)",
        "QLinearAveragePool",
    ),
    ("e = GlobalAveragePool(c)", "QLinearGlobalAveragePool"),
    ("e = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (c)", "NhwcMaxPool"),
    ("e = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (c)", "NhwcMaxPool"),
    ('e = Resize <mode = "nearest"> (c, , larger)', "Resize"),
    (
        'e = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric", '
        'nearest_mode = "floor"> (c, , larger)',
        "Resize",
    ),
    ("e = Transpose <perm = [0, 1, 3, 2]> (c)", ""),
    ("t = Transpose <perm = [0, 1, 3, 2]> (c) e = Relu(t)", "Clip"),
    ("t = Transpose <perm = [0, 1, 3, 2]> (c) e = Clip(t, less, one)", "Clip"),
    ("t = Transpose <perm = [0, 1, 3, 2]> (c) e = Clip(t, , one)", "Clip"),
    ("e = Clip(c, less, one)", ""),
    ("r = Relu(c) e = Relu(r)", "Clip"),
    ("e = Reshape(c, flat)", "Reshape"),
    (
        "r = Reshape(c, five) t = Transpose <perm = [0, 2, 1, 3, 4]> (r) e = Reshape(t, four)",
        "Reshape Reshape",
    ),
    ("e = Slice(c, at0, to5, at2)", "Slice"),
    ("e = Slice(c, at0, to9, at2, by2)", "Gather"),
    ("e = Slice(c, to5, to_9, at2, by_2)", "Gather"),
    ("e = Slice(c, from0, to55, both)", "Slice"),
    ("d, f = Split <axis = 1> (c, halves) e = Concat <axis = 1> (f, d)", "Split Concat"),
    ("e = Pad(c, pads)", "Pad"),
    ("e = Pad(c, pads, one)", "Pad"),
    ("p = Pad(c, pads, lowest) e = MaxPool <kernel_shape = [3, 3]> (p)", "NhwcMaxPool"),
    ('e = Pad <mode = "reflect"> (c, pads)', "Pad"),
    ("e = Gather <axis = 1> (c, turned)", "Gather"),
    ("u = Unsqueeze(c, at1) e = Squeeze(u, at1)", "Unsqueeze Squeeze"),
    ("e = Tile(c, twice)", "Tile"),
    ("e = Expand(c, four)", ""),
    ("e = Identity(c)", ""),
    (
        "d = SpaceToDepth <blocksize = 2> (c) e = DepthToSpace <blocksize = 2> (d)",
        "SpaceToDepth DepthToSpace",
    ),
]
"""What stands between two Conv, and the kernels that it becomes."""


@pytest.mark.parametrize(("between", "wanted"), BETWEEN, ids=[b[:60] for b, _ in BETWEEN])
def test_what_lies_between_products_runs_on_codes(
    between: str, wanted: str, tmp_path: Path
) -> None:
    model = sandwich(between)
    before, samples = model.clone(), samples_of(1, 8, 6, 6, count=2)

    code_all(model, samples)

    assert work(model, tmp_path) == ENDS + Counter(["QLinearConv"] * 2 + wanted.split())
    assert difference(before, model, samples[0]) < FINE
    assert steps_from_written(model, samples[0]) < 2.5


@pytest.mark.slow
@pytest.mark.parametrize("opset", [13, 17, 23])
@pytest.mark.parametrize(("between", "wanted"), BETWEEN, ids=[b[:60] for b, _ in BETWEEN])
def test_the_same_in_other_opsets(opset: int, between: str, wanted: str, tmp_path: Path) -> None:
    model = sandwich(between, opset)
    code_all(model, samples_of(1, 8, 6, 6, count=2))

    assert work(model, tmp_path) == ENDS + Counter(["QLinearConv"] * 2 + wanted.split())


@pytest.mark.parametrize(
    ("product", "kernels_"),
    [
        ("a = MatMul(x, w) h = Relu(a)", {"QLinearMatMul": 1}),
        ("a = Gemm(x, w, b) h = Relu(a)", {"QGemm": 1}),
        ("a = Gemm(x, w, b) h = Clip(a, zero, six)", {"QGemm": 1}),
        ("a = Gemm(x, w, b) h = Tanh(a)", {"QGemm": 1, "Tanh": 1}),
        ("a = MatMul(x, w) h = Sigmoid(a)", {"MatMulIntegerToFloat": 1, "Sigmoid": 1}),
    ],
)
def test_a_product_before_floats(product: str, kernels_: dict[str, int], tmp_path: Path) -> None:
    """onnxruntime looks past a Relu for a QuantizeLinear, and finds the product float without."""
    model = parse(
        f"""
        agraph (float[4, 64] x, float[64, 64] w, float[64] b, float[64, 64] v)
            => (float[4, 64] y)
        <float zero = {{0.0}}, float six = {{6.0}}>
        {{ {product} y = MatMul(h, v) }}
        """,
        w=normal(1, 64, 64, scale=0.1),
        b=normal(2, 64),
        v=normal(3, 64, 64),
    )
    before, samples = model.clone(), samples_of(4, 64)
    units, _ = all_units(model)
    first = [unit for unit in units if unit.kind == "product"][:1]

    Choice(model, context_of(model, samples), units).write(model, first)

    makes_codes = "Relu" in product or "Clip" in product
    changes = {"QuantizeLinear": 1, **({"DequantizeLinear": 1} if makes_codes else {})}
    assert work(model, tmp_path) == {**changes, **kernels_, "MatMul": 1}
    assert difference(before, model, samples[0]) < FINE


@pytest.mark.parametrize(("last", "pools"), [("y = Tanh(p)", 0), ("y = Conv(p, u)", 1)])
def test_a_mean_that_is_a_score_is_one_of_floats(last: str, pools: int, tmp_path: Path) -> None:
    model = parse(
        f"""
        agraph (float[1, 8, 6, 6] x, float[8, 8, 3, 3] w, float[8, 8, 1, 1] u)
            => (float[1, 8, 1, 1] y)
        {{ a = Conv (x, w) p = GlobalAveragePool(a) {last} }}
        """,
        w=normal(1, 8, 8, 3, 3, scale=0.1),
        u=normal(2, 8, 8, 1, 1),
    )
    before, samples = model.clone(), samples_of(1, 8, 6, 6)

    code_all(model, samples)

    assert work(model, tmp_path)["QLinearGlobalAveragePool"] == pools
    assert difference(before, model, samples[0]) < FINE


@pytest.mark.parametrize("batch", ["1", "N"])
def test_adds_of_a_residual_network_change_no_layout(batch: str, tmp_path: Path) -> None:
    """What comes from floats and what Conv makes on codes meet in the same layout."""
    model = parse(
        f"""
        <ir_version: 10, opset_import: ["" : 17]>
        agraph (float[{batch}, 8, 6, 6] x, float[8, 8, 3, 3] w, float[8, 8, 3, 3] v)
            => (float[{batch}, 8, 6, 6] y)
        {{
            a = Conv <pads = [1, 1, 1, 1]> (x, w)
            b = Add(x, a)
            c = Conv <pads = [1, 1, 1, 1]> (b, v)
            d = Add(b, c)
            e = Conv <pads = [1, 1, 1, 1]> (d, w)
            y = Add(d, e)
        }}
        """,
        w=normal(1, 8, 8, 3, 3, scale=0.1),
        v=normal(2, 8, 8, 3, 3, scale=0.1),
    )
    before, samples = model.clone(), samples_of(1, 8, 6, 6)

    code_all(model, samples)

    assert kernels(model, tmp_path)["Transpose"] == 2
    assert difference(before, model, samples[0]) < FINE
    # basic would leave it so.
    infer_shapes(model)
    assert_unchanged(MergeReshapes(), model)


@pytest.mark.parametrize(
    ("between", "wanted"),
    [
        # All inputs take the map of the output.
        (f"d = {CONV} (x, v, b)", {"NhwcMaxPool": 1, "Concat": 1}),
        ("d = Add(c, c)", {"QLinearAdd": 1, "NhwcMaxPool": 1, "Concat": 1}),
        # What another map has, and others read too, keeps it.
        (
            "s = Sigmoid(c) d = Mul(s, s)",
            {"QLinearSigmoid": 1, "QLinearMul": 1, "MaxPool": 1, "QLinearConcat": 1},
        ),
    ],
)
def test_concat_of_one_scale_and_of_several(
    between: str, wanted: dict[str, int], tmp_path: Path
) -> None:
    more = "t = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (d)"
    model = parse(
        f"""
        agraph (float[1, 8, 6, 6] x, float[8, 8, 3, 3] w, float[8, 8, 3, 3] v, float[8] b)
            => (float[1, 24, 6, 6] y)
        {{ c = {CONV} (x, w, b) {between} {more} y = Concat <axis = 1> (c, d, t) }}
        """,
        w=normal(1, 8, 8, 3, 3),
        v=normal(3, 8, 8, 3, 3),
        b=normal(2, 8),
    )
    before, samples = model.clone(), samples_of(1, 8, 6, 6)

    convolutions = 1 + between.count("Conv")
    code_all(model, samples)

    assert work(model, tmp_path) == ENDS + Counter({"QLinearConv": convolutions}) + Counter(wanted)
    assert difference(before, model, samples[0]) < FINE


@pytest.mark.parametrize("move", ["e = Relu(d)", "r = Relu(d) e = Transpose <perm=[0,1,3,2]> (r)"])
@pytest.mark.parametrize("limit", ["Relu(d)", "Clip(d, low, high)"])
def test_a_saturated_output_that_shares_its_map_stays_within_its_limits(
    move: str, limit: str
) -> None:
    """Where another input of a Concat is negative, codes below the zero point mean something."""
    model = parse(
        f"""
        agraph (float[1, 8, 6, 6] x, float[8, 8, 3, 3] w, float[8, 8, 3, 3] v)
            => (float[1, 16, 6, 6] y) <float low = {{-0.5}}, float high = {{1.0}}>
        {{
            c = {CONV} (x, w) d = {CONV} (x, v)
            {move.replace("Relu(d)", limit)} y = Concat <axis = 1> (c, e)
        }}
        """,
        w=normal(1, 8, 8, 3, 3),
        v=normal(3, 8, 8, 3, 3),
    )
    before, samples = model.clone(), samples_of(1, 8, 6, 6)
    low = 0.0 if limit == "Relu(d)" else -0.5

    code_all(model, samples)

    for reference in Reference:
        y = Session(model, reference).run(samples[0])["y"]
        assert y[:, 8:].min() >= low - scale_of(model.graph.outputs[0])
    assert difference(before, model, samples[0]) < FINE


def test_linear_interpolation_stays_in_float(tmp_path: Path) -> None:
    model = sandwich('e = Resize <mode = "linear"> (c, , larger)')
    code_all(model, samples_of(1, 8, 6, 6))

    assert work(model, tmp_path) == ENDS + ENDS + Counter({"QLinearConv": 2, "Resize": 1})
