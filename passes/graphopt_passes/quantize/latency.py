"""What nodes cost on onnxruntime's CPU provider, in float32 and on 8-bit codes.

A model of single-thread time in nanoseconds, fitted to 190 shapes of kernels of onnxruntime 1.32 on
a processor with AVX512-VNNI. It decides which of two forms is worth it, so what counts is where the
one overtakes the other. Integers lose in a Conv of few input channels, whose windows are copied
tap by tap before they are multiplied, unless its columns can be folded; where a number of channels
is no multiple of 4, or of 16 in a depthwise Conv; and where a value would change form too often.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import onnx_ir as ir

from graphopt.operators import is_onnx
from graphopt_passes.quantize.folding import Fold, folds_of, image_of
from graphopt_passes.quantize.layers import Layer, layer_of
from graphopt_passes.quantize.units import Unit

QUANTIZE_NS, DEQUANTIZE_NS = 0.65, 0.6
"""Per element; with the change of layout that comes along between Conv nodes."""

LANES = 16
"""Channels that a kernel works on at a time."""

FOLDED_BYTE_NS = 8.0
"""What a byte more of a folded weight has to save."""

CACHED_BYTES = 1 << 20
"""Of a core's own cache, what input and output of a node can count on."""


@dataclass(frozen=True)
class Cost:
    """Time of a node, nanoseconds.

    Attributes:
        floats_ns: in float32.
        codes_ns: on codes.
    """

    floats_ns: float
    codes_ns: float


def filled(count: int, to: int = LANES) -> int:
    """A number of channels, filled up to whole lanes."""
    return -(-count // to) * to


def product_cost(
    layer: Layer, read: float, made: float, more_inputs: int = 0, more_outputs: int = 0
) -> Cost:
    """Cost of a Conv, Gemm or MatMul.

    Args:
        layer: the node.
        read: elements of its input, for one sample.
        made: elements of its output, for one sample.
        more_inputs: channels that would come in in addition (Conv only).
        more_outputs: channels that would go out in addition (Conv only).
    """
    group, channels, inputs = layer.dimensions
    places = made / (group * channels)
    if layer.patches() is None:
        return _matrix_cost(places, inputs, channels)
    if layer.is_depthwise:
        cost = depthwise_cost(places, group + more_outputs, layer.taps)
    else:
        arriving, leaving = inputs // layer.taps + more_inputs, channels + more_outputs
        cost = conv_cost(places, group, arriving, leaving, layer.taps)
        _, codes_ns = _folded(layer, places, arriving, leaving, cost.codes_ns)
        cost = Cost(cost.floats_ns, codes_ns)
    return Cost(
        cost.floats_ns + _uncached_ns(4 * (read + made)), cost.codes_ns + _uncached_ns(read + made)
    )


def _uncached_ns(size_bytes: float) -> float:
    """What input and output cost in addition where they do not stay in a core's own cache."""
    return 0.025 * max(0.0, size_bytes - CACHED_BYTES)


def conv_cost(places: float, group: int, inputs: int, outputs: int, taps: int) -> Cost:
    """Cost of a Conv.

    Args:
        places: where the window is put.
        group: groups of channels.
        inputs: channels of a group that come in.
        outputs: channels of a group that go out.
        taps: of the window.
    """
    return Cost(
        floats_ns=4e3 + group * _float_conv_ns(places, group, inputs, outputs, taps),
        codes_ns=4e3 * group + group * _code_conv_ns(places, inputs, outputs, taps),
    )


def _float_conv_ns(places: float, group: int, inputs: int, outputs: int, taps: int) -> float:
    """Blocks of channels where the numbers of channels allow it; copied windows elsewhere."""
    whole = LANES if group > 1 else 4
    if inputs % whole and (group > 1 or inputs > LANES):
        copied = 0.45 * inputs * taps if taps > 1 else 0.0
        return places * (copied + inputs * taps * outputs / 70)
    seen = filled(inputs) if inputs >= LANES else inputs
    rate = {1: 52, 2: 75}.get(-(-outputs // LANES), 85)
    rate = rate // 2 if inputs < LANES and taps == 1 else rate
    products = places * seen * taps * filled(outputs)
    written = 0.1 * places * outputs if inputs < LANES else 0.0
    return products / rate + written + 0.14 * inputs * taps * outputs


def _code_conv_ns(places: float, inputs: int, outputs: int, taps: int) -> float:
    copied = taps * (1.0 + 0.03 * inputs) if taps > 1 else 0.0
    ragged = (18.0 if inputs % 4 else 0.0) + (12.0 if outputs < LANES else 0.0)
    finished = outputs * (0.14 + (0.5 if outputs % 4 else 0.0))
    products = filled(inputs * taps, 4) * filled(outputs)
    return places * (1.5 + copied + ragged + finished + products / 400)


def best_fold(layer: Layer) -> Fold | None:
    """How columns are folded where that makes the layer faster on codes; None where it does not."""
    made = image_of(layer.node.outputs[0])
    if made is None or layer.patches() is None:
        return None
    group, outputs, inputs = layer.dimensions
    places, arriving = float(made.rows * made.columns), inputs // layer.taps
    plain = conv_cost(places, group, arriving, outputs, layer.taps)
    return _folded(layer, places, arriving, outputs, plain.codes_ns)[0]


def _folded(
    layer: Layer, places: float, inputs: int, outputs: int, plain_ns: float
) -> tuple[Fold | None, float]:
    """How columns are folded, and the time of a Conv on codes then.

    Args:
        layer: the node.
        places: where the window is put, before they are folded.
        inputs: channels that come in.
        outputs: channels that go out.
        plain_ns: the time if they are not.
    """
    best: tuple[Fold | None, float] = None, plain_ns
    least = plain_ns
    for fold in folds_of(layer):
        wide_inputs, wide_outputs = inputs * fold.read, outputs * fold.columns
        codes_ns = 4e3 + _code_conv_ns(places / fold.columns, wide_inputs, wide_outputs, fold.taps)
        more_bytes = wide_inputs * wide_outputs * fold.taps - inputs * outputs * layer.taps
        if codes_ns + FOLDED_BYTE_NS * more_bytes < least:
            best, least = (fold, codes_ns), codes_ns + FOLDED_BYTE_NS * more_bytes
    return best


def depthwise_cost(places: float, channels: int, taps: int) -> Cost:
    """Cost of a Conv of each channel alone.

    Args:
        places: where the window is put.
        channels: of the input and the output.
        taps: of the window.
    """
    floats_ns = filled(channels) * (0.14 + 0.0165 * taps)
    if channels % 4:
        floats_ns = channels * 0.32 * taps
    codes_ns = channels * (0.12 + 0.037 * taps)
    if channels % LANES:
        codes_ns = channels * (0.2 + 0.095 * taps) + taps * (1 if channels % LANES == 8 else 3)
    return Cost(4e3 + places * floats_ns, 5e3 + places * codes_ns)


def _matrix_cost(rows: float, inputs: int, outputs: int) -> Cost:
    """A matrix times few rows is bound by memory, times many by arithmetic."""
    products = rows * inputs * outputs
    share = min(1.0, rows / 16)
    return Cost(
        floats_ns=1e3 + products / (7 + 73 * share),
        codes_ns=3e3 + products / (26 + 242 * share) + 0.3 * rows * inputs,
    )


def pool_ns(read: float, made: float, channels: int) -> float:
    """Cost of a pool in float32; one that works in blocks of channels changes no layout.

    Args:
        read: elements of its input, for one sample.
        made: elements of its output, for one sample.
        channels: of both.
    """
    if channels % LANES == 0:
        return 0.5 * made
    return 2.0 * made + 0.3 * (read + made)


_ELEMENT_NS: dict[str, tuple[float, float]] = {
    "Add": (0.15, 0.25),
    "AveragePool": (0.4, 7.0),
    "Clip": (0.05, 0.1),
    "Concat": (0.5, 0.25),
    "LeakyRelu": (0.1, 0.3),
    "MaxPool": (0.3, 0.45),
    "Mul": (0.25, 0.3),
    "Relu": (0.05, 0.1),
    "Resize": (0.25, 0.9),
    "Sigmoid": (0.35, 0.37),
    "Transpose": (0.6, 0.15),
}
"""By operator, per element of the output, in float32 and on codes."""

_POOLED_NS = 0.02, 0.06
"""Per element that GlobalAveragePool reads."""

_MOVED_NS = 0.3, 0.15

_SPREAD_NS = 13.0
"""Of a Mul on codes, in addition, each time that it begins anew with a number for each channel."""


def unit_cost(
    unit: Unit,
    elements_of: Callable[[ir.Value], float],
    more_inputs: int = 0,
    more_outputs: int = 0,
) -> Cost:
    """Cost of a node that can work on codes.

    Args:
        unit: the node.
        elements_of: how many elements a value has, for one sample.
        more_inputs: channels that would come into a Conv in addition.
        more_outputs: channels that would go out of it in addition.
    """
    if unit.kind != "product":
        return _other_cost(unit, elements_of)
    read, made = elements_of(unit.sources[0]), sum(map(elements_of, unit.outputs))
    return product_cost(layer_of(unit.node), read, made, more_inputs, more_outputs)


def _other_cost(unit: Unit, elements_of: Callable[[ir.Value], float]) -> Cost:
    """Cost of arithmetic or movement.

    Reshape and the like cost nothing; a Relu that a product takes in costs nothing either.
    """
    if is_onnx(unit.node, "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"):
        return Cost(0.0, 0.0)
    read, made = (sum(map(elements_of, values)) for values in (unit.sources, unit.outputs))
    if unit.map is not None:
        return Cost((QUANTIZE_NS + DEQUANTIZE_NS) * made, 0.0)
    if is_onnx(unit.node, "GlobalAveragePool"):
        floats_ns, codes_ns = _POOLED_NS
        return Cost(1e3 + floats_ns * read, 2e3 + codes_ns * read)
    floats_ns, codes_ns = _ELEMENT_NS.get(unit.node.op_type, _MOVED_NS)
    cost = Cost(1e3 + floats_ns * made, 2e3 + codes_ns * made)
    if not is_onnx(unit.node, "Mul"):
        return cost
    if _is_swish(unit.node):
        # onnxruntime computes x * Sigmoid(x) in one go.
        return replace(cost, floats_ns=0.0)
    least = min(map(elements_of, unit.sources))
    return replace(
        cost, codes_ns=cost.codes_ns + (_SPREAD_NS * made / least if least < made else 0)
    )


def _is_swish(mul: ir.Node) -> bool:
    """It multiplies a value with the Sigmoid of it."""
    return any(
        value is not None
        and (maker := value.producer()) is not None
        and is_onnx(maker, "Sigmoid")
        and maker.inputs[0] in mul.inputs
        for value in mul.inputs
    )
