"""pad-channels: channels of zeros, by which kernels come to whole lanes and are faster."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from scipy.cluster.hierarchy import DisjointSet

from graphopt.content import read_array
from graphopt.contract import Change, Context, Effect, Pass
from graphopt.operators import is_onnx
from graphopt.rewriting import Names, constant_tensor, small_array
from graphopt_passes.quantize.latency import Cost, filled, pool_ns, product_cost, unit_cost
from graphopt_passes.quantize.layers import Layer, layer_of
from graphopt_passes.quantize.regions import chosen_units
from graphopt_passes.quantize.units import units_of

POOLS = frozenset({"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"})

UNARY = frozenset(
    {"Abs", "Clip", "Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu"}
    | {"Mish", "Neg", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Swish", "Tanh"}
)
"""What they make of zero is finite, so that a weight of zero takes it out."""

BINARY = frozenset({"Add", "Max", "Min", "Mul", "Sub"})


@dataclass(frozen=True)
class PadChannels(Pass):
    """Give values between Conv nodes more channels where a multiple of 16 is faster.

    onnxruntime's depthwise Conv on 8-bit codes takes twice as long for 24 channels as for 32, and
    in float32 a Conv of 58 channels copies its windows, which one of 64 does not. Where only nodes
    that keep channels apart lie between the Conv nodes that make and read a value, those can make
    channels of zeros, by weights and biases of zero, and take them out, by weights of zero.

    It is done where it takes a larger share from the time of all Conv nodes than it adds to the
    bytes of their weights, by the model of kernels that quantize-static chooses by.
    """

    name: ClassVar[str] = "pad-channels"
    effect: ClassVar[Effect] = Effect.ROUNDING
    operators: ClassVar[frozenset[str] | None] = frozenset({"Conv"})

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Lanes of other processors are others."""
        return None if context.provider == "cpu" else "it serves onnxruntime's CPU provider only"

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Pad every set of values of the main graph for which it pays."""
        change = Change()
        layers = {n: layer_of(n) for n in model.graph if is_onnx(n, "Conv") and _is_known(n)}
        total_ns = sum(_cost(layer, {}).floats_ns for layer in layers.values())
        total_bytes = sum(_bytes(layer, {}) for layer in layers.values())
        sets = []
        for values in _free_together(model.graph, layers):
            channels = _channels(values[0])
            if more := filled(channels) - channels:
                sets.append(dict.fromkeys(values, more))
        on_codes = _on_codes(model.graph, {v: more for one in sets for v, more in one.items()})
        added: dict[ir.Value, int] = {}
        for one in sets:
            saved_ns, added_bytes = _effect_of(one, layers, on_codes)
            if saved_ns * total_bytes > added_bytes * total_ns:
                added.update(one)
                change.count(f"value of {_channels(next(iter(one)))} channels padded", len(one))
        names = Names(model)
        for layer in layers.values():
            if any(_more(layer, added)):
                _pad(layer, *_more(layer, added), names, context)
        for value, more in added.items():
            assert value.shape is not None
            batch, _, *places = value.shape.dims
            value.shape = ir.Shape([batch, _channels(value) + more, *places])
        return change


# ------------------------------------------------------------------ where


def _is_known(conv: ir.Node) -> bool:
    """A Conv of float32 whose weights are constant, of all channels or of each, at known places."""
    for place in range(1, len(conv.inputs)):
        tensor = constant_tensor(conv.inputs[place])
        if conv.inputs[place] is not None and tensor is None:
            return False
        if tensor is not None and tensor.dtype != ir.DataType.FLOAT:
            return False
    if not all(_is_sized(value) for value in (conv.inputs[0], conv.outputs[0])):
        return False
    layer = layer_of(conv)
    return layer.group == 1 or layer.is_depthwise


def _is_sized(value: ir.Value | None) -> bool:
    dims = value.shape.dims if value is not None and value.shape is not None else ()
    return len(dims) >= 3 and all(isinstance(d, int) for d in dims[1:])


def _channels(value: ir.Value) -> int:
    assert value.shape is not None
    return int(value.shape[1])  # type: ignore[arg-type]


def _free_together(graph: ir.Graph, layers: dict[ir.Node, Layer]) -> list[list[ir.Value]]:
    """Sets of values that may have more channels, if all of a set have."""
    sets: DisjointSet = DisjointSet(value for node in graph for value in node.outputs)
    frozen: set[ir.Value] = set()
    for node in graph:
        kept = _kept_apart(node, layers)
        for value in kept[1:]:
            sets.merge(kept[0], value)
        frozen.update(v for v in node.outputs if not _is_free(v, kept, node in layers, layers))
    return [list(values) for values in sets.subsets() if frozen.isdisjoint(values)]


def _kept_apart(node: ir.Node, layers: dict[ir.Node, Layer]) -> list[ir.Value]:
    """Inputs and outputs of a node that makes each channel of the same channel; none for others."""
    inputs: list[ir.Value | None] = []
    if is_onnx(node, "Conv"):
        inputs = [node.inputs[0]] if node in layers and layers[node].is_depthwise else []
    elif is_onnx(node, *POOLS, *UNARY):
        inputs = [node.inputs[0]]
    elif is_onnx(node, *BINARY) and len(node.inputs) == 2:
        inputs = [value for value in node.inputs if small_array(value, 1) is None]
    values = [value for value in (*inputs, *node.outputs) if value is not None]
    alike = all(_is_sized(v) for v in values) and len({_rank_and_channels(v) for v in values}) == 1
    made_here = all(value.producer() is not None for value in values)
    return values if inputs and alike and made_here else []


def _is_free(
    value: ir.Value, kept: Sequence[ir.Value], from_layer: bool, layers: dict[ir.Node, Layer]
) -> bool:
    """What makes the value can make more channels of it, and all that read it can take them."""
    if value.is_graph_output() or not _is_sized(value) or not (from_layer or value in kept):
        return False
    return all(
        (use.node in layers and use.idx == 0)
        or (use.node.graph is value.producer().graph and value in _kept_apart(use.node, layers))  # type: ignore[union-attr]
        for use in value.uses()
    )


def _rank_and_channels(value: ir.Value) -> tuple[int, int]:
    assert value.shape is not None
    return len(value.shape), _channels(value)


# ------------------------------------------------------------------ whether


Added = Mapping[ir.Value, int]
"""Channels that values get in addition."""


def _on_codes(graph: ir.Graph, added: Added) -> set[ir.Node]:
    """The nodes that quantize-static would let work on codes if values had so many more channels.

    The others stay float, or the model is not quantized, and then their time in float32 counts.
    """

    def elements_of(value: ir.Value) -> float:
        share = added[value] / _channels(value) if value in added else 0.0
        return _elements(value) * (1 + share)

    units = list(units_of(graph, lambda *_: None).values())
    costs = {}
    for unit in units:
        more = added.get(unit.sources[0], 0), added.get(unit.outputs[0], 0)
        costs[unit] = unit_cost(unit, _elements, *more)
    return {unit.node for unit in chosen_units(units, costs, elements_of)}


def _effect_of(
    added: Added, layers: Mapping[ir.Node, Layer], on_codes: set[ir.Node]
) -> tuple[float, int]:
    """Time saved, in ns, and bytes added, if values had so many more channels."""
    nodes = {value.producer() for value in added} | {u.node for v in added for u in v.uses()}
    touched = [layer for node, layer in layers.items() if node in nodes]
    added_bytes = sum(_bytes(layer, added) - _bytes(layer, {}) for layer in touched)
    pairs = [(_cost(layer, {}), _cost(layer, added)) for layer in touched]
    if all(layer.node in on_codes for layer in touched):
        return sum(before.codes_ns - after.codes_ns for before, after in pairs), added_bytes
    saved_ns = sum(before.floats_ns - after.floats_ns for before, after in pairs)
    for node in nodes:
        if node is not None and is_onnx(node, *POOLS):
            read, made = _elements(node.inputs[0]), _elements(node.outputs[0])
            channels = _channels(node.outputs[0])
            saved_ns += pool_ns(read, made, channels)
            saved_ns -= pool_ns(read, made, channels + added[node.outputs[0]])
    return saved_ns, added_bytes


def _cost(layer: Layer, added: Added) -> Cost:
    """Cost of a layer for one sample."""
    read, made = _elements(layer.source), _elements(layer.node.outputs[0])
    return product_cost(layer, read, made, *_more(layer, added))


def _elements(value: ir.Value | None) -> float:
    """Of one sample; what is not known counts as one."""
    dims = () if value is None or value.shape is None else value.shape.dims[1:]
    return float(math.prod(d for d in dims if isinstance(d, int)))


def _more(layer: Layer, added: Added) -> tuple[int, int]:
    """By how many channels the input and the output of a layer grow."""
    return added.get(layer.source, 0), added.get(layer.node.outputs[0], 0)


def _bytes(layer: Layer, added: Added) -> int:
    more_inputs, more_outputs = _more(layer, added)
    group, outputs, inputs = layer.dimensions
    if layer.is_depthwise:
        return 4 * (group + more_outputs) * inputs
    return 4 * (outputs + more_outputs) * (inputs + more_inputs * layer.taps)


# ------------------------------------------------------------------ writing


def _pad(layer: Layer, more_inputs: int, more_outputs: int, names: Names, context: Context) -> None:
    """Give a layer so many more channels: weights and biases of zero, and groups of depthwise."""
    node = layer.node
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    widths = [(0, more_outputs), (0, 0 if layer.is_depthwise else more_inputs)]
    if layer.is_depthwise:
        node.attributes["group"] = ir.AttrInt64("group", layer.group + more_outputs)
    for place in range(1, len(node.inputs)):
        value, tensor = node.inputs[place], constant_tensor(node.inputs[place])
        if value is None or tensor is None:
            continue
        array = read_array(tensor)
        ends = (widths + [(0, 0)] * array.ndim)[: array.ndim]
        name = names.new(f"{value.name}_padded")
        node.replace_input_with(place, context.initializer(graph, np.pad(array, ends), name))
