"""The model of kernels' time against times that were measured."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.skeleton import infer_shapes
from graphopt.testing import parse
from graphopt_passes.quantize.latency import (
    best_fold,
    conv_cost,
    depthwise_cost,
    filled,
    product_cost,
    unit_cost,
)
from graphopt_passes.quantize.layers import Layer, layer_of
from graphopt_passes.quantize.units import Unit

MEASURED = [
    # Channels in and out, kernel, stride, height and width; microseconds in float32 and on codes.
    (3, 32, 3, 2, 192, 141, 342),
    (3, 16, 3, 1, 32, 14, 33),
    (1, 64, 3, 1, 64, 67, 211),
    (8, 8, 3, 1, 120, 297, 462),
    (16, 16, 3, 1, 48, 105, 50),
    (24, 144, 1, 1, 56, 194, 93),
    (32, 32, 3, 1, 28, 97, 36),
    (58, 16, 3, 1, 48, 720, 170),
    (64, 64, 3, 1, 28, 342, 92),
    (96, 576, 1, 1, 14, 134, 47),
    (256, 256, 3, 1, 14, 1402, 324),
    (960, 160, 1, 1, 7, 90, 28),
]
DEPTHWISE = [
    # Channels, kernel, height and width; microseconds in float32 and on codes.
    (24, 3, 32, 12, 41),
    (32, 3, 96, 101, 194),
    (58, 3, 40, 242, 137),
    (64, 5, 32, 36, 80),
    (64, 7, 32, 56, 132),
    (116, 3, 32, 38, 148),
    (128, 3, 32, 38, 58),
    (192, 3, 24, 43, 48),
    (232, 3, 32, 76, 250),
]
FOLDED = [
    # Channels in and out, kernel, stride, height and width; columns folded and microseconds.
    (3, 16, 3, 1, 32, 2, 25),
    (3, 32, 3, 2, 192, 2, 148),
    (3, 64, 3, 2, 224, 2, 316),
    (3, 64, 7, 2, 224, 2, 785),
    (8, 8, 3, 1, 128, 2, 190),
    (3, 16, 5, 1, 64, 2, 115),
]
"""On a Xeon with AVX512-VNNI, onnxruntime 1.32, one thread, median of 40 runs."""


@pytest.mark.parametrize("shape", MEASURED, ids=str)
def test_conv(shape: tuple[int, ...]) -> None:
    inputs, outputs, kernel, stride, size, floats_us, codes_us = shape
    places = (size // stride) ** 2

    cost = conv_cost(places, 1, inputs, outputs, kernel * kernel)

    assert cost.floats_ns == pytest.approx(1e3 * floats_us, rel=0.35)
    assert cost.codes_ns == pytest.approx(1e3 * codes_us, rel=0.35)


@pytest.mark.parametrize("shape", DEPTHWISE, ids=str)
def test_depthwise(shape: tuple[int, ...]) -> None:
    channels, kernel, size, floats_us, codes_us = shape

    cost = depthwise_cost(size * size, channels, kernel * kernel)

    assert cost.floats_ns == pytest.approx(1e3 * floats_us, rel=0.35)
    assert cost.codes_ns == pytest.approx(1e3 * codes_us, rel=0.35)


@pytest.mark.parametrize("shape", FOLDED, ids=str)
def test_columns_are_folded_where_that_is_faster(shape: tuple[int, ...]) -> None:
    inputs, outputs, kernel, stride, size, columns, codes_us = shape
    layer = conv(inputs, outputs, kernel, stride, size)
    places = (size // stride) ** 2

    cost = product_cost(layer, inputs * size**2, outputs * places)

    fold = best_fold(layer)
    assert fold is not None
    assert fold.columns == columns
    assert cost.codes_ns == pytest.approx(1e3 * codes_us, rel=0.35)


@pytest.mark.parametrize("shape", [(64, 64, 3, 1, 28), (24, 144, 1, 1, 56), (3, 64, 3, 2, 16)])
def test_columns_are_not_folded_where_it_is_not_worth_its_bytes(shape: tuple[int, ...]) -> None:
    assert best_fold(conv(*shape)) is None


def conv(inputs: int, outputs: int, kernel: int, stride: int, size: int) -> Layer:
    weight = np.ones((outputs, inputs, kernel, kernel), np.float32)
    pads = f"pads = {[kernel // 2] * 4}, strides = [{stride}, {stride}]"
    model = parse(
        f"agraph (float[1, {inputs}, {size}, {size}] x, "
        f"float[{outputs}, {inputs}, {kernel}, {kernel}] w) => (float y) "
        f"{{ c = Conv <{pads}> (x, w) y = Relu(c) }}",
        w=weight,
    )
    infer_shapes(model)
    return layer_of(model.graph[0])


@pytest.mark.parametrize("channels", [24, 58, 116])
def test_whole_lanes_are_faster_on_codes(channels: int) -> None:
    narrow = depthwise_cost(1600, channels, 9)
    whole = depthwise_cost(1600, filled(channels), 9)

    assert whole.codes_ns < narrow.codes_ns
    assert whole.floats_ns <= narrow.floats_ns


SWISH = """
agraph (float[1, C, 56, 56] x, float[1, C, 1, 1] g)
    => (float[1, C, 56, 56] y, float[1, C, 1, 1] p) {
    s = Sigmoid(x) m = Mul(x, s) y = Mul(m, g) p = GlobalAveragePool(y)
}
"""


def test_what_onnxruntime_computes_in_one_go_and_what_it_begins_anew() -> None:
    model = parse(SWISH.replace("C", "144"))
    infer_shapes(model)
    sigmoid, swish, gate, pool = (unit_of(node) for node in model.graph)
    elements = 144 * 56 * 56

    costs = [unit_cost(unit, elements_of) for unit in (sigmoid, swish, gate, pool)]

    assert costs[1].floats_ns == 0
    assert costs[2].floats_ns > 0
    assert costs[1].codes_ns == pytest.approx(0.3 * elements, rel=0.1)
    assert costs[2].codes_ns == pytest.approx(0.39 * elements, rel=0.1)
    assert costs[3].codes_ns < 0.1 * elements


def unit_of(node: ir.Node) -> Unit:
    values = [value for value in node.inputs if value is not None]
    return Unit(node, "arithmetic", tuple(range(len(values))), tuple(values))


def elements_of(value: ir.Value) -> float:
    assert value.shape is not None
    return float(np.prod(value.shape.numpy()))
