"""quantize-static takes over the scales and zero points by which activations were trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from on_codes import FINE, all_units, code_all, difference, normal, quantize, samples_of, work

from graphopt.rewriting import constant_tensor
from graphopt.roundings import CodeMap, map_of
from graphopt.runtime import Reference, Session
from graphopt.testing import parse
from graphopt_passes.quantize.affine import Affine

MAPS = """
<
    float s0 = {0.02}, uint8 z0 = {128}, float s1 = {0.01}, uint8 z1 = {0},
    float s2 = {0.005}, uint8 z2 = {0}, float s3 = {0.004}, uint8 z3 = {7}
>
"""
HEAD = """
<ir_version: 10, opset_import: ["" : 18]>
agraph (float[N, 8, 6, 6] x, float[8, 8, 3, 3] w, float[8, 8, 3, 3] v, float[8] b, float[10, 8] f)
    => (float[?] y)
"""
CONV = "Conv <pads = [1, 1, 1, 1]>"


def rounds(value: str, number: int, to: str) -> str:
    parts = f"s{number}, z{number}"
    return f"q{to} = QuantizeLinear({value}, {parts}) {to} = DequantizeLinear(q{to}, {parts}) "


def trained(nodes: str, rank: int = 2) -> ir.Model:
    shape = ", ".join(["N", "K", "H", "W"][:rank])
    text = HEAD.replace("?", shape) + MAPS + "{" + nodes.replace("CONV", CONV) + "}"
    weights = {"w": normal(1, 8, 8, 3, 3, scale=0.1), "v": normal(3, 8, 8, 3, 3, scale=0.1)}
    return parse(text, b=normal(2, 8), f=normal(4, 10, 8, scale=0.3), **weights)


CHAIN = (
    rounds("x", 0, "d")
    + "c = CONV (d, w, b) r = Relu(c) m = MaxPool <kernel_shape = [2, 2]> (r) "
    + rounds("m", 1, "e")
    + "g = CONV (e, v) h = Relu(g) "
    + rounds("h", 2, "i")
    + "j = GlobalAveragePool(i) k = Flatten(j) "
    + rounds("k", 2, "l")
    + "y = Gemm <transB = 1> (l, f)"
)


def maps(model: ir.Model) -> set[tuple[np.float32, int]]:
    """Those of everything that activations are quantized by."""
    found = [map_of(node) for node in model.graph if node.op_type == "QuantizeLinear"]
    assert all(one is not None and one.dtype == ir.DataType.UINT8 for one in found)
    return {(np.float32(one.scale), one.zero_point) for one in found if one is not None}


def test_layers_have_exactly_the_scales_that_they_were_trained_with(tmp_path: Path) -> None:
    model, samples = trained(CHAIN), samples_of(1, 8, 6, 6, count=8)
    before, expected = model.clone(), maps(trained(CHAIN))

    change = quantize(model, samples)

    assert change.counts["Conv on 8-bit integers"] == 2
    assert change.counts["Gemm on 8-bit integers"] == 1
    assert change.counts["trained rounding on 8-bit integers"] == 4
    assert maps(model) == expected
    found = work(model, tmp_path)
    assert found["QLinearConv"] == 2 and found["QGemm"] == 1
    assert "Conv" not in found and "Gemm" not in found
    assert difference(before, model, samples[0]) < FINE


def test_weights_on_a_grid_and_trained_activations_lose_nothing() -> None:
    """All numbers are integers times powers of two, so that there is no rounding elsewhere.

    As deployed, onnxruntime would round the weights of what was given in its own way.
    """
    text = CHAIN.replace("CONV (d, w, b)", "CONV (d, w)")
    model = trained(text)
    for number, exponent in enumerate((-5, -6, -6, -6)):
        scale = model.graph.initializers[f"s{number}"]
        scale.const_value = ir.tensor(np.float32(2.0**exponent), name=scale.name)
    for name in ("w", "v", "f"):
        weight = model.graph.initializers[name]
        tensor = constant_tensor(weight)
        assert tensor is not None
        array = tensor.numpy()
        codes = np.clip(np.rint(array / 2.0**-9), -127, 127)
        codes.reshape(len(codes), -1)[:, 0] = 127
        weight.const_value = ir.tensor(np.float32(codes * 2.0**-9), name=name)
    before, samples = model.clone(), samples_of(1, 8, 6, 6, count=8)

    quantize(model, samples)

    for sample in samples:
        first, second = (Session(m, Reference.AS_WRITTEN).run(sample)["y"] for m in (before, model))
        np.testing.assert_allclose(second, first, rtol=1e-5, atol=1e-6)


def test_two_readers_may_have_maps_of_their_own() -> None:
    nodes = (
        rounds("x", 0, "d")
        + "c = CONV (d, w, b) r = Relu(c) "
        + rounds("r", 1, "e")
        + rounds("r", 3, "g")
        + "h = CONV (e, v) i = CONV (g, w) y = Add(h, i)"
    )
    model, samples = trained(nodes, rank=4), samples_of(1, 8, 6, 6, count=8)
    before = model.clone()

    code_all(model, samples)

    assert {(np.float32(0.01), 0), (np.float32(0.004), 7)} <= maps(model)
    sources = {
        map_of(maker)
        for node in model.graph
        if node.op_type == "Conv" and (maker := node.inputs[0].producer()) is not None  # type: ignore[union-attr]
    }
    expected = ((0.02, 128), (0.01, 0), (0.004, 7))
    assert sources == {CodeMap(float(np.float32(s)), z, ir.DataType.UINT8) for s, z in expected}
    assert difference(before, model, samples[0]) < FINE


def test_a_concat_of_two_maps_keeps_both() -> None:
    nodes = (
        rounds("x", 0, "d")
        + "c = CONV (d, w, b) r = Relu(c) g = CONV (d, v) h = Relu(g) "
        + rounds("r", 1, "e")
        + rounds("h", 2, "i")
        + "k = Concat <axis = 2> (e, i) "
        + rounds("k", 3, "l")
        + "y = CONV (l, w)"
    )
    model, samples = trained(nodes, rank=4), samples_of(1, 8, 6, 6, count=8)
    before, expected = model.clone(), maps(trained(nodes, rank=4))

    code_all(model, samples)

    assert expected <= maps(model)
    assert difference(before, model, samples[0]) < FINE


def test_codes_of_fewer_bits_are_clipped_as_codes(tmp_path: Path) -> None:
    nodes = (
        rounds("x", 0, "d")
        + "c = CONV (d, w, b) r = Relu(c) t = Clip(r, lowest, highest) "
        + rounds("t", 1, "e")
        + "g = CONV (e, v) h = ReduceMean <keepdims = 0> (g, axes) "
        + "y = Gemm <transB = 1> (h, f)"
    )
    text = MAPS.replace(">", ", float lowest = {0.0}, float highest = {0.15}, int64[2] axes={2,3}>")
    assert "highest" in text
    model = parse(
        HEAD.replace("?", "N, K") + text + "{" + nodes.replace("CONV", CONV) + "}",
        w=normal(1, 8, 8, 3, 3, scale=0.1),
        v=normal(3, 8, 8, 3, 3, scale=0.1),
        b=normal(2, 8),
        f=normal(4, 10, 8, scale=0.3),
    )
    samples = samples_of(1, 8, 6, 6, count=8)
    before = model.clone()

    code_all(model, samples)

    clips = [node for node in model.graph if node.op_type == "Clip"]
    (clip,) = clips
    limits = [constant_tensor(value) for value in clip.inputs[1:]]
    assert [int(one.numpy()) for one in limits if one is not None] == [0, 15]
    assert difference(before, model, samples[0]) < FINE


def test_what_is_no_trained_rounding_stays() -> None:
    """Between products that are on codes already."""
    units, _ = all_units(trained(CHAIN))
    assert next(u.map for u in units if u.map is not None) == Affine(np.float32(0.02), 128)
    model, samples = trained(CHAIN), samples_of(1, 8, 6, 6, count=8)
    quantize(model, samples)

    units, _ = all_units(model)

    assert not [unit for unit in units if unit.map is not None]
