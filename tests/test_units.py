"""Which nodes can work on codes, and why the others cannot."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from on_codes import Sample, all_units, code_all, context_of, difference, normal

from graphopt.runtime import Session
from graphopt.testing import parse
from graphopt_passes.quantize.choice import Choice

CONV = "Conv <pads = [1, 1, 1, 1]>"


def units_of(text: str, **arrays: np.ndarray) -> tuple[list[str], list[str]]:
    """The operators of the units of a model, and why products are none."""
    units, reasons = all_units(parse(text, **arrays))
    return [unit.node.op_type for unit in units], reasons


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ("y = MatMul(x, r)", "its weight is computed at run time"),
        ("t = Tanh(w) y = MatMul(x, t)", "its weight is computed at run time"),
        ("t = DequantizeLinear(q, s) y = MatMul(x, t)", "its weight is computed at run time"),
        ("m = MatMul(v, w) y = Add(m, x0)", "its input is constant"),
        ("y = Gemm <alpha = 2.0> (x, w)", "it has transA, alpha or beta"),
        ("y = Gemm <beta = 0.5> (x, w, b)", "it has transA, alpha or beta"),
        ("t = Transpose(x) y = Gemm <transA = 1> (t, w)", "it has transA, alpha or beta"),
        ("y = Gemm(x, w, x0)", "its bias is computed at run time"),
        ("y = Gemm(x, w, one)", "its bias is not one number for each output"),
        ("y = Gemm(x, w, full)", "its bias is not one number for each output"),
    ],
)
def test_products_of_other_forms(nodes: str, reason: str) -> None:
    text = f"""
    agraph (float[5, 3] x, float[3, 4] r, float[5, 4] x0, float[3, 4] w, float[5, 3] v,
            float[5, 4] full, int8[3, 4] q, float s) => (float[5, 4] y)
    <float[4] b = {{1.0, 2.0, 3.0, 4.0}}, float[1] one = {{1.0}}> {{ {nodes} }}
    """
    arrays = {"w": normal(1, 3, 4), "v": normal(2, 5, 3), "full": normal(3, 5, 4)}
    codes = {"q": np.int8(9 * normal(4, 3, 4)), "s": np.float32(0.1)}
    operators, reasons = units_of(text, **arrays, **codes)

    assert reasons == [reason]
    assert not {"MatMul", "Gemm"} & set(operators)


def test_a_weight_of_three_dimensions() -> None:
    text = "agraph (float[2, 5, 3] x, float[2, 3, 4] w) => (float[2, 5, 4] y) {y = MatMul(x, w)}"

    assert units_of(text, w=normal(0, 2, 3, 4)) == ([], ["its weight is not a matrix"])


def test_an_overridable_weight_may_be_another_one() -> None:
    text = """
    agraph (float[5, 3] x, float[3, 4] w) => (float[5, 4] y)
    <float[3, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}> { y = MatMul(x, w) }
    """

    assert units_of(text) == ([], ["its weight is computed at run time"])


def test_layers_without_an_integer_kernel_say_so() -> None:
    text = """
    agraph (float[1, 4, 5, 5] x, float[4, 4, 2, 2] w) => (float[1, 4, 6, 6] y)
    { y = ConvTranspose(x, w) }
    """

    assert units_of(text, w=normal(1, 4, 4, 2, 2)) == (
        [],
        ["onnxruntime's CPU provider has no integer kernel for ConvTranspose"],
    )


@pytest.mark.parametrize(
    "node",
    [
        "y = Tanh(x)",
        "y = Sub(x, x)",
        'y = Resize <mode = "linear"> (x, , scales)',
        "y = Clip(x, one, two)",
        "y = Clip(x, , limit)",
        "y = Pad(x, pads, limit)",
        "y = Add(x, large)",
        "y = Add(one, two)",
        "y = Concat <axis = 1> (x, large)",
        "y, i = MaxPool <kernel_shape = [2, 2]> (x)",
        "y = Transpose(k)",
        "y = Relu(k)",
        "k1 = Cast <to = 7> (x) y = Reshape(k1, pads)",
    ],
)
def test_nodes_that_stay(node: str) -> None:
    text = f"""
    agraph (float[1, 4, 200, 200] x, int32[3, 4] k, float limit, float[1, 4, 200, 200] large)
        => (float[] y)
    <float[4] scales = {{1.0, 1.0, 2.0, 2.0}}, float one = {{1.0}}, float two = {{2.0}},
     int64[8] pads = {{0, 0, 1, 1, 0, 0, 1, 1}}>
    {{ {node} }}
    """
    model = parse(text, large=np.ones((1, 4, 200, 200), np.float32))
    model.graph.outputs[0].type = None
    model.graph.outputs[0].shape = None

    assert all_units(model) == ([], [])


def test_nodes_of_other_domains_are_not_taken_by_name() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
    agraph (float[5, 3] x, float[3, 4] w) => (float[5, 4] y) { y = com.microsoft.MatMul(x, w) }
    """
    units, reasons = all_units(parse(text, w=normal(1, 3, 4)))

    assert (units, reasons) == ([], [])


@pytest.mark.parametrize(
    ("nodes", "limits"),
    [
        ("m = MatMul(x, w) y = Relu(m)", (0.0, np.inf)),
        ("m = MatMul(x, w) y = Clip(m, less, one)", (-1.0, 1.0)),
        ("m = MatMul(x, w) y = Clip(m, , one)", (-np.inf, 1.0)),
        ("m = MatMul(x, w) y = Clip(m, less)", (-1.0, np.inf)),
        ("m = MatMul(x, w) y = Clip(m)", (-np.inf, np.inf)),
        ("s = Sigmoid(x) m = Add(s, s) y = Relu(m)", (0.0, np.inf)),
    ],
)
def test_what_saturates_is_taken_in(nodes: str, limits: tuple[float, float]) -> None:
    text = f"""
    agraph (float[4, 4] x, float[4, 4] w) => (float[4, 4] y)
    <float less = {{-1.0}}, float one = {{1.0}}> {{ {nodes} }}
    """
    units, _ = all_units(parse(text, w=normal(1, 4, 4)))

    assert units[-1].saturated is not None
    assert units[-1].limits == limits
    assert [o.name for o in units[-1].outputs] == ["y"]


@pytest.mark.parametrize(
    "nodes",
    [
        # The output itself is wanted, or 0 is no code, or the limit is not known.
        "m = MatMul(x, w) y = Relu(m) z = Tanh(m)",
        "m = MatMul(x, w) z = Identity(m) y = Relu(m)",
        "m = MatMul(x, w) y = Clip(m, one, two) z = Tanh(y)",
        "m = MatMul(x, w) y = Clip(m, limit) z = Tanh(y)",
        "m = MatMul(x, w) r = Relu(x) y = Clip(x, , one) z = Add(m, y)",
    ],
)
def test_what_does_not_saturate_the_output_alone_stays(nodes: str) -> None:
    text = f"""
    agraph (float[4, 4] x, float limit, float[4, 4] w) => (float[4, 4] y, float[4, 4] z)
    <float one = {{1.0}}, float two = {{2.0}}> {{ {nodes} }}
    """
    units, _ = all_units(parse(text, w=normal(1, 4, 4)))

    assert units[0].node.op_type == "MatMul"
    assert units[0].saturated is None


# ------------------------------------------------------------------ bodies

BRANCHES = """
agraph (float[1, 8, 6, 6] x, bool k, float[8, 8, 3, 3] w, float[8, 8, 3, 3] v)
    => (float[1, 8, 6, 6] y, float[1, 8, 6, 6] z) <int64[1] at = {{0}}>
{{
    {nodes}
    y = If(k) <
        then_branch = then () => (float[1, 8, 6, 6] p) {{ p = Tanh(t) }},
        else_branch = otherwise () => (float[1, 8, 6, 6] q) {{ q = Sigmoid(t) }}
    >
}}
"""
CASES = [
    f"t = {CONV} (x, w) z = Identity(x)",
    f"c = {CONV} (x, w) u = Unsqueeze(c, at) t = Squeeze(u, at) z = Identity(x)",
    f"c = {CONV} (x, w) r = Relu(c) t = Transpose <perm = [0, 1, 3, 2]> (r) z = {CONV} (c, v)",
    f"c = {CONV} (x, w) d = {CONV} (x, v) s = Add(c, d) u = Unsqueeze(s, at) t = Squeeze(u, at) "
    f"z = {CONV} (s, v)",
    f"s = Sigmoid(x) t = Transpose <perm = [0, 1, 3, 2]> (s) z = {CONV} (s, v)",
    f"s = Sigmoid(x) a = Add(s, s) t = Concat <axis = 1> (a) z = {CONV} (a, v)",
    f"t = Transpose <perm = [0, 1, 3, 2]> (x) z = {CONV} (t, v)",
]


@pytest.mark.parametrize("nodes", CASES)
def test_nothing_on_codes_comes_to_a_body_through_movement(nodes: str) -> None:
    """There onnxruntime 1.32 aborts the process, whichever of the units work on codes."""
    model = parse(
        BRANCHES.format(nodes=nodes), w=normal(1, 8, 8, 3, 3), v=normal(2, 8, 8, 3, 3, scale=0.1)
    )
    units, reasons = all_units(model)
    assert set(reasons) <= {"a body of If, Loop or Scan reads what it makes"}
    # Before onnxruntime gets to see it.
    assert not {o.name for unit in units for o in unit.outputs} & set("tu")

    samples: list[Sample] = [
        {"x": normal(n, 1, 8, 6, 6), "k": np.array(n % 2 == 0)} for n in range(2)
    ]
    choice = Choice(model, context_of(model, samples), units)
    few = [unit for unit in units if unit.kind != "product"]
    for left_out in itertools.product([False, True], repeat=len(few)):
        stays = {unit for unit, out in zip(few, left_out, strict=True) if out}
        written = model.clone()
        choice.write(written, [unit for unit in units if unit not in stays])
        for sample in samples:
            assert np.isfinite(Session(written).run(sample)["y"]).all()


LOOP = """
agraph (float[1, 8, 6, 6] x, float[8, 8, 3, 3] w, float[8, 8, 3, 3] v) => (float[1, 8, 6, 6] y)
<int64 m = {{3}}, bool t = {{1}}>
{{
    c = Conv <pads = [1, 1, 1, 1]> (x, w)
    y = Loop(m, t, {start}) <
        body = one (int64 i, bool ci, float[1, 8, 6, 6] s) => (bool co, float[1, 8, 6, 6] so)
        {{ co = Identity(ci) so = {body} }}
    >
}}
"""


def loop(start: str, body: str) -> ir.Model:
    return parse(
        LOOP.format(start=start, body=body),
        w=normal(1, 8, 8, 3, 3, scale=0.1),
        v=normal(2, 8, 8, 3, 3, scale=0.1),
    )


def test_a_layer_that_a_loop_reads_inside_stays() -> None:
    units, reasons = all_units(loop("x", "Add(s, c)"))

    assert (units, reasons) == ([], ["a body of If, Loop or Scan reads what it makes"])


def test_a_layer_that_starts_a_loop_works_on_codes_and_those_inside_stay() -> None:
    model = loop("c", f"{CONV} (s, v)")
    before, samples = model.clone(), [{"x": normal(n, 1, 8, 6, 6)} for n in range(2)]

    assert code_all(model, samples) == ["Conv"]
    assert difference(before, model, samples[0]) < 0.03
