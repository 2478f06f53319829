"""Channels of zeros, by which kernels for codes come to whole lanes and are faster.

onnxruntime's depthwise Conv of 24 channels takes twice as long on codes as one of 32, and a product
of 58 channels longer than one of 64. Where only units on codes make and read a value, and each
computes channel by channel or sums over channels with weights, the value may have more channels:
what makes them has weights and bias of zero, and what reads them has weights of zero. No number of
the model changes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from graphopt.operators import is_onnx
from graphopt.rewriting import constant_tensor, static_shape
from graphopt_passes.quantize.latency import filled, product_cost
from graphopt_passes.quantize.layers import Layer, layer_of
from graphopt_passes.quantize.regions import SameScale
from graphopt_passes.quantize.units import Unit

Padding = Mapping[str, int]
"""Channels that a value gets in addition, by its name; values that get none are left out."""

_BY_CHANNEL = frozenset(
    {"AveragePool", "Clip", "GlobalAveragePool", "LeakyRelu", "MaxPool", "Relu", "Sigmoid"}
)


def padding_of(units: Sequence[Unit], elements_of: Callable[[ir.Value], float]) -> Padding:
    """Which values get more channels: those where the share of time saved is over that of bytes.

    Args:
        units: what works on codes, in order.
        elements_of: how many elements a value has.
    """
    layers = {unit: layer_of(unit.node) for unit in units if is_onnx(unit.node, "Conv")}
    total_ns = sum(_codes_ns(unit, layer, {}, elements_of) for unit, layer in layers.items())
    total_bytes = sum(_bytes(layer, 0, 0) for layer in layers.values())
    found: dict[str, int] = {}
    for values in _free_together(units):
        shape = static_shape(values[0])
        assert shape is not None
        more = filled(shape[1]) - shape[1]
        padding = {value.name or "": more for value in values}
        touched = [u for u in layers if {*u.sources, *u.outputs} & set(values)]
        saved_ns = sum(
            _codes_ns(unit, layers[unit], {}, elements_of)
            - _codes_ns(unit, layers[unit], padding, elements_of)
            for unit in touched
        )
        added_bytes = sum(
            _bytes(layers[u], *added(u, padding)) - _bytes(layers[u], 0, 0) for u in touched
        )
        if more and saved_ns * total_bytes > added_bytes * total_ns:
            found |= padding
    return found


def added(unit: Unit, padding: Padding) -> tuple[int, int]:
    """The channels that a Conv gets in addition: those that come in, and those that go out."""
    source, output = unit.sources[0].name or "", unit.outputs[0].name or ""
    return padding.get(source, 0), padding.get(output, 0)


def _codes_ns(
    unit: Unit, layer: Layer, padding: Padding, elements_of: Callable[[ir.Value], float]
) -> float:
    read, made = elements_of(unit.sources[0]), elements_of(unit.outputs[0])
    return product_cost(layer, read, made, *added(unit, padding)).codes_ns


def _bytes(layer: Layer, more_inputs: int, more_outputs: int) -> int:
    group, outputs, inputs = layer.dimensions
    if layer.is_depthwise:
        return (group + more_outputs) * inputs
    taps = layer.taps
    return group * (outputs + more_outputs) * (inputs + more_inputs * taps)


def _free_together(units: Sequence[Unit]) -> list[list[ir.Value]]:
    """Sets of values that may have more channels, if all of a set have."""
    same, frozen = SameScale(), set[ir.Value]()
    made = {value: unit for unit in units for value in unit.outputs}
    nodes = {unit.node for unit in units}
    for unit in units:
        values = (*unit.sources, *unit.outputs)
        if _is_by_channel(unit):
            same.join(values[0], values[1:])
        elif not is_onnx(unit.node, "Conv") or layer_of(unit.node).group > 1:
            frozen.update(values)
        frozen.update(v for v in values if v not in made or not _is_private(v, nodes))
    fixed = {same.of(value) for value in frozen}
    sets: dict[ir.Value, list[ir.Value]] = defaultdict(list)
    for value in made:
        sets[same.of(value)].append(value)
    return [values for root, values in sets.items() if root not in fixed]


def _is_by_channel(unit: Unit) -> bool:
    """Each channel that the unit makes is made of the same channel of what it reads."""
    node = unit.node
    if is_onnx(node, "Conv"):
        return layer_of(node).is_depthwise
    if is_onnx(node, "Add", "Mul"):
        shapes = {static_shape(value) for value in unit.sources}
        return len(unit.sources) == 2 and len(shapes) == 1
    return is_onnx(node, *_BY_CHANNEL)


def _is_private(value: ir.Value, nodes: set[ir.Node]) -> bool:
    """Only such nodes read the value, and its channels are counted."""
    shape = static_shape(value)
    if value.is_graph_output() or shape is None or len(shape) < 3:
        return False
    return all(use.node in nodes and constant_tensor(value) is None for use in value.uses())
