"""What nodes cost on onnxruntime's CPU provider, in float32 and on 8-bit codes.

A model of single-thread time in nanoseconds, fitted to kernels of onnxruntime 1.32 on a processor
with AVX512-VNNI. It decides which of two forms is worth it, so what counts is where the one
overtakes the other: integers lose where a Conv has few input channels (its windows are copied tap
by tap before they are multiplied) and where a value would change form too often.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from graphopt.operators import is_onnx
from graphopt_passes.quantize.layers import Layer
from graphopt_passes.quantize.units import Unit

QUANTIZE_NS, DEQUANTIZE_NS = 0.85, 0.75
"""Per element; with the change of layout that comes along between Conv nodes."""

LANES = 16
"""Channels that a kernel works on at a time."""


@dataclass(frozen=True)
class Cost:
    """Time of a node, nanoseconds.

    Attributes:
        floats_ns: in float32.
        codes_ns: on codes.
    """

    floats_ns: float
    codes_ns: float


def padded(channels: int) -> int:
    """The channels, filled up to whole lanes."""
    return -(-channels // LANES) * LANES


def product_cost(layer: Layer, outputs: float) -> Cost:
    """Cost of a Conv, Gemm or MatMul.

    Args:
        layer: the node.
        outputs: elements of its output, for one sample.
    """
    group, channels, inputs = layer.dimensions
    places = outputs / (group * channels)
    patches = layer.patches()
    if patches is None:
        return _matrix_cost(places, inputs, channels)
    taps = math.prod(patches.kernel)
    if group > 1 and channels == 1 and inputs == taps:
        return _depthwise_cost(places * group * taps, group)
    products = places * group * padded(channels) * inputs
    copied = 0.0 if taps == 1 else places * group * taps * (2.5 if inputs // taps >= 8 else 4.0)
    return Cost(
        floats_ns=5e3 + products / 60,
        codes_ns=4e3 * group + products / 450 + copied + 0.25 * outputs,
    )


def _depthwise_cost(products: float, channels: int) -> Cost:
    whole = products * padded(channels) / channels
    return Cost(floats_ns=8e3 + whole / 16, codes_ns=10e3 + whole / 13)


def _matrix_cost(rows: float, inputs: int, outputs: int) -> Cost:
    """A matrix times few rows is bound by memory, times many by arithmetic."""
    products = rows * inputs * outputs
    share = min(1.0, rows / 16)
    return Cost(
        floats_ns=1e3 + products / (7 + 73 * share),
        codes_ns=3e3 + products / (26 + 242 * share) + 0.3 * rows * inputs,
    )


_ELEMENT_NS: dict[str, tuple[float, float]] = {
    "Add": (0.3, 0.3),
    "AveragePool": (2.0, 12.0),
    "Clip": (0.1, 0.2),
    "LeakyRelu": (0.1, 0.6),
    "MaxPool": (3.0, 3.0),
    "Mul": (0.3, 0.5),
    "Relu": (0.1, 0.2),
    "Resize": (1.0, 2.5),
    "Sigmoid": (1.0, 0.5),
}
"""By operator, per element of the output, in float32 and on codes."""

_MOVED_NS = 0.3, 0.15


def other_cost(unit: Unit, elements: float) -> Cost:
    """Cost of arithmetic or movement that makes so many elements.

    Reshape and the like cost nothing; a Relu that a product takes in costs nothing either.
    """
    if is_onnx(unit.node, "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"):
        return Cost(0.0, 0.0)
    floats_ns, codes_ns = _ELEMENT_NS.get(unit.node.op_type, _MOVED_NS)
    return Cost(1e3 + floats_ns * elements, 2e3 + codes_ns * elements)
