"""Writes units of a graph in their form on codes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt.operators import is_onnx
from graphopt.rewriting import (
    Names,
    add_initializer,
    input_of,
    is_read,
    remove_node,
    replace_value,
    small_array,
    small_integers,
    static_shape,
)
from graphopt.roundings import CodeMap, rounding_at
from graphopt.skeleton import INFERRED
from graphopt_passes.quantize.affine import Affine, affine_of
from graphopt_passes.quantize.folding import Fold, image_of
from graphopt_passes.quantize.latency import best_fold
from graphopt_passes.quantize.layers import Layer, layer_of
from graphopt_passes.quantize.parameters import Parameters
from graphopt_passes.quantize.units import CONSTANT_MAXIMUM, Unit, can_make_floats
from graphopt_passes.quantize.weights import IntegerLayer

TensorMaker = Callable[[np.ndarray, str], ir.TensorProtocol]


def write_codes(
    model: ir.Model,
    units: Sequence[Unit],
    parameters: Parameters,
    integers: Mapping[str, IntegerLayer],
    tensor: TensorMaker,
) -> None:
    """Rewrite units of the main graph in their form on codes.

    Args:
        model: rewritten in place.
        units: of it, in order.
        parameters: maps of all their values.
        integers: weights and biases of the products, by the name of the product's output.
        tensor: makes a tensor of an array.
    """
    coding = Coding(
        model.graph, Names(model), parameters, tensor, _float_outputs(units), _joining(units)
    )
    for unit in units:
        if unit.kind == "product":
            coding.product(unit, layer_of(unit.node), integers[unit.node.outputs[0].name or ""])
        elif unit.map is not None:
            coding.trained(unit)
        elif parameters.passes_codes(unit):
            coding.movement(unit)
        else:
            coding.arithmetic(unit)
    _drop_unread(model.graph)


def write_rounding(model: ir.Model, name: str, parameters: Parameters, tensor: TensorMaker) -> None:
    """Round one value of the main graph to codes and back; all else stays float.

    Args:
        model: rewritten in place.
        name: of the value.
        parameters: its map, among others.
        tensor: makes a tensor of an array.
    """
    made = (output for node in model.graph for output in node.outputs)
    value = next(v for v in (*model.graph.inputs, *made) if v.name == name)
    Coding(model.graph, Names(model), parameters, tensor).rounding(value)


def _float_outputs(units: Sequence[Unit]) -> frozenset[ir.Node]:
    """Products whose outputs nothing reads as codes; onnxruntime fuses them as they are."""
    read = {s for unit in units for s in unit.sources}
    return frozenset(
        unit.node for unit in units if can_make_floats(unit) and unit.outputs[0] not in read
    )


def _joining(units: Sequence[Unit]) -> frozenset[ir.Value]:
    """Images that come from floats and meet, in an Add or Mul, what a Conv makes on codes."""
    made = {value for unit in units for value in unit.outputs}
    return frozenset(
        value
        for unit in units
        if unit.kind == "arithmetic" and not made.isdisjoint(unit.sources)
        for value in unit.sources
        if value not in made and image_of(value) is not None
    )


@dataclass
class Coding:
    """Rewrites the nodes of a graph one after the other, in order.

    Attributes:
        graph: being rewritten.
        names: of its model.
        parameters: the maps of the values.
        tensor: makes a tensor of an array.
        float_outputs: products whose output stays float.
        joining: values whose codes get the channels last before anything reads them.
    """

    graph: ir.Graph
    names: Names
    parameters: Parameters
    tensor: TensorMaker
    float_outputs: frozenset[ir.Node] = frozenset()
    joining: frozenset[ir.Value] = frozenset()
    _coded: dict[ir.Value, tuple[ir.Value, ir.Value]] = field(default_factory=dict)
    _maps: dict[Affine, tuple[ir.Value, ir.Value]] = field(default_factory=dict)

    # -------------------------------------------------------------- values

    def _map(self, affine: Affine) -> tuple[ir.Value, ir.Value]:
        """Initializers of scale and zero point; one pair for all values with this map."""
        if affine not in self._maps:
            number = len(self._maps)
            self._maps[affine] = (
                self._constant(np.asarray(affine.scale, np.float32), f"scale_{number}"),
                self._constant(np.asarray(affine.zero_point, np.uint8), f"zero_point_{number}"),
            )
        return self._maps[affine]

    def _constant(self, array: np.ndarray, hint: str) -> ir.Value:
        name = self.names.new(hint)
        return add_initializer(self.graph, self.tensor(array, name), name)

    def _node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        likes: Sequence[ir.Value],
        name: str,
        dtype: ir.DataType,
        attributes: Iterable[ir.Attr] = (),
    ) -> ir.Node:
        """A node whose outputs have the shapes of other values.

        It is called as its first output. Names are short, since in a small model they take more
        bytes than the weights that they stand beside; so does what can be inferred.
        """
        outputs = [
            ir.Value(name=self.names.new(name), type=ir.TensorType(dtype), shape=like.shape)
            for like in likes
        ]
        for output in outputs:
            output.meta[INFERRED] = True
        made_by = outputs[0].name
        return ir.Node("", op_type, inputs, attributes, outputs=outputs, name=made_by)

    def _insert(self, node: ir.Node, after: ir.Value) -> None:
        """Put a node where a value has just been made."""
        producer = after.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], node)
        else:
            self.graph.insert_after(producer, node)

    def _numbers(self, codes: ir.Value, value: ir.Value, like: ir.Value | None = None) -> ir.Value:
        """What the codes of a value stand for; of the shape of another value, if one is given."""
        inputs = [codes, *self._map(self.parameters.of(value))]
        node = self._node("DequantizeLinear", inputs, [like or value], "numbers", ir.DataType.FLOAT)
        self._insert(node, codes)
        return node.outputs[0]

    def _keep(self, value: ir.Value, codes: ir.Value) -> ir.Value:
        """Remember the codes and numbers of a value; the latter."""
        numbers = self._numbers(codes, value)
        self._coded[value] = codes, numbers
        return numbers

    def _source(self, value: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Codes and numbers of what a unit reads; quantized where no unit has made it."""
        if value not in self._coded and self._is_rounded(value):
            maker = value.producer()
            assert maker is not None and maker.inputs[0] is not None
            self._coded[value] = maker.inputs[0], value
        if value not in self._coded:
            inputs = [value, *self._map(self.parameters.of(value))]
            node = self._node("QuantizeLinear", inputs, [value], "codes", ir.DataType.UINT8)
            self._insert(node, value)
            codes = node.outputs[0]
            self._keep(value, self._channels_last(codes, value) if value in self.joining else codes)
        return self._coded[value]

    def _is_rounded(self, value: ir.Value) -> bool:
        """A rounding by the map of the value made it, so that its codes are there."""
        maker = value.producer()
        quantize = maker.inputs[0].producer() if maker is not None and maker.inputs[0] else None
        rounding = None if quantize is None else rounding_at(quantize)
        if rounding is None or rounding.output is not value:
            return False
        affine = self.parameters.of(value)
        return rounding.map == CodeMap(float(affine.scale), affine.zero_point, ir.DataType.UINT8)

    def _channels_last(self, codes: ir.Value, image: ir.Value) -> ir.Value:
        """The codes of an image once more, by way of the layout that onnxruntime's Conv has for it.

        onnxruntime lays out the channels of codes last around each Conv, and moves the Transpose
        that it needs on through an Add only if both sides have one. Otherwise each Add of a
        residual network has two. Flatten and Reshape keep the pair from cancelling.
        """
        sizes = image_of(image)
        assert sizes is not None
        return self._with_channels_last(codes, sizes.channels, sizes.channels_last(), keep=True)

    def _with_channels_last(
        self, codes: ir.Value, channels: int, shape: Sequence[int], keep: bool = False
    ) -> ir.Value:
        """The codes of an image in another shape, as far as the bytes go that have channels last.

        Args:
            codes: of shape [batch, channels, rows, columns].
            channels: of it.
            shape: with the channels last.
            keep: the shape is the one of before, and yet onnxruntime is to see a Reshape.
        """
        to = self._constant(np.array(shape, np.int64), "shape")
        steps: list[tuple[str, Sequence[ir.Value], ir.Attr | None]] = [
            ("Transpose", (), ir.AttrInt64s("perm", [0, 2, 3, 1])),
            ("Reshape", (to,), None),
            ("Transpose", (), ir.AttrInt64s("perm", [0, 3, 1, 2])),
        ]
        if keep:
            steps.insert(1, ("Flatten", (), ir.AttrInt64("axis", 3)))
        elif channels == 1:
            # Wherever a single channel lies, the bytes are the same.
            del steps[0]
        for op_type, inputs, attribute in steps:
            attributes = [] if attribute is None else [attribute]
            made = self._node(
                op_type, [codes, *inputs], [ir.Value()], "laid_out", ir.DataType.UINT8, attributes
            )
            self._insert(made, codes)
            codes = made.outputs[0]
        return codes

    # -------------------------------------------------------------- units

    def movement(self, unit: Unit) -> None:
        """Let a node work on codes instead of numbers."""
        node, inputs = unit.node, list(unit.node.inputs)
        for place, value in zip(unit.places, unit.sources, strict=True):
            inputs[place] = self._source(value)[0]
        zero = self._map(self.parameters.of(unit.outputs[0]))[1]
        op_type, attributes = node.op_type, list(node.attributes.values())
        if is_onnx(node, "Relu"):
            op_type, inputs = "Clip", [inputs[0], zero]
        elif is_onnx(node, "Clip", "Pad"):
            inputs = self._with_codes(unit, inputs, zero)
        elif (picked := _picked(node)) is not None:
            axis, indices = picked
            op_type, inputs = "Gather", [inputs[0], self._constant(indices, "indices")]
            attributes = [ir.AttrInt64("axis", axis)]
        moved = self._node(op_type, inputs, node.outputs, "codes", ir.DataType.UINT8, attributes)
        self.graph.insert_after(node, moved)
        for value, codes in zip(node.outputs, moved.outputs, strict=True):
            replace_value(value, self._keep(value, codes))
        remove_node(node)

    def trained(self, unit: Unit) -> None:
        """Take the codes of what a rounding reads for its own, if they have its map.

        Otherwise it stays, and gives what it reads codes of its own map.
        """
        value, quantize, dequantize = unit.outputs[0], unit.node, unit.saturated
        assert dequantize is not None
        if not self.parameters.passes_codes(unit):
            return
        codes, numbers = self._source(unit.sources[0])
        self._coded[value] = codes, numbers
        replace_value(value, numbers)
        remove_node(dequantize)
        remove_node(quantize)

    def _with_codes(
        self, unit: Unit, inputs: list[ir.Value | None], zero: ir.Value
    ) -> list[ir.Value | None]:
        """The inputs, with constants that are numbers (limits, what pads) as codes."""
        affine = self.parameters.of(unit.outputs[0])
        places = (1, 2) if is_onnx(unit.node, "Clip") else (2,)
        for place in places:
            array = small_array(input_of(unit.node, place), 1)
            if array is not None:
                code = affine.codes(np.asarray(array, np.float32).reshape(()))
                inputs[place] = self._constant(code, "limit")
        if is_onnx(unit.node, "Pad"):
            inputs += [None] * (3 - len(inputs))
            inputs[2] = inputs[2] if inputs[2] is not None else zero
        return inputs

    def arithmetic(self, unit: Unit) -> None:
        """Let a node read numbers that come from codes, and quantize what it makes."""
        for place, value in zip(unit.places, unit.sources, strict=True):
            unit.node.replace_input_with(place, self._source(value)[1])
        for place, constant in enumerate(unit.node.inputs):
            if place not in unit.places and constant is not None:
                unit.node.replace_input_with(place, self._coded_constant(constant))
        self._quantize_output(unit)

    def _coded_constant(self, value: ir.Value) -> ir.Value:
        array = small_array(value, CONSTANT_MAXIMUM)
        assert array is not None
        affine = affine_of(float(array.min()), float(array.max()))
        codes = self._constant(affine.codes(array), f"{value.name}_codes")
        inputs = [codes, *self._map(affine)]
        node = self._node("DequantizeLinear", inputs, [value], "numbers", ir.DataType.FLOAT)
        self.graph.insert_before(self.graph[0], node)
        return node.outputs[0]

    def product(self, unit: Unit, layer: Layer, integers: IntegerLayer) -> None:
        """Put integers in the place of weight and bias."""
        node, hint = unit.node, layer.weight.name or unit.node.name
        fold = best_fold(layer)
        codes, source = self._source(unit.sources[0])
        if fold is not None:
            integers = integers.folded(fold)
            node.attributes.pop("auto_pad", None)
            node.attributes.update((a.name, a) for a in fold.attributes())
            folded = self._with_channels_last(codes, fold.source.channels, fold.shape_read)
            source = self._numbers(folded, unit.sources[0], ir.Value())
        weight = self._parameter(integers.codes, integers.scales, layer.axis, f"{hint}")
        inputs = [source, weight]
        if not is_onnx(node, "MatMul") and (integers.bias.any() or layer.bias() is not None):
            hint = f"{hint}_bias"
            inputs.append(self._parameter(integers.bias, integers.bias_scales, 0, hint))
        node.resize_inputs(len(inputs))
        for index, value in enumerate(inputs):
            node.replace_input_with(index, value)
        if node not in self.float_outputs:
            self._quantize_output(unit, fold)

    def _parameter(self, codes: np.ndarray, scales: np.ndarray, axis: int, hint: str) -> ir.Value:
        inputs = [
            self._constant(codes, f"{hint}_codes"),
            self._constant(scales, "scales"),
            self._constant(np.zeros(scales.shape, codes.dtype), "zero_points"),
        ]
        node = self._node(
            "DequantizeLinear",
            inputs,
            [ir.Value(name=hint, shape=ir.Shape(codes.shape))],
            "numbers",
            ir.DataType.FLOAT,
            [ir.AttrInt64("axis", axis)],
        )
        self.graph.insert_before(self.graph[0], node)
        return node.outputs[0]

    def rounding(self, value: ir.Value) -> None:
        """Let all that read a value read it as it comes back from codes."""
        inputs = [None, *self._map(self.parameters.of(value))]
        node = self._node("QuantizeLinear", inputs, [value], "codes", ir.DataType.UINT8)
        self._insert(node, value)
        replace_value(value, self._keep(value, node.outputs[0]))
        node.replace_input_with(0, value)
        if not value.name:
            # Its name went to the graph's output.
            value.name = self.names.new("exact")

    def _quantize_output(self, unit: Unit, fold: Fold | None = None) -> None:
        """Let all that read the output of a unit read it as it comes back from codes."""
        made, value = unit.node.outputs[0], unit.outputs[0]
        inputs = [None, *self._map(self.parameters.of(value))]
        like = value if fold is None else ir.Value()
        node = self._node("QuantizeLinear", inputs, [like], "codes", ir.DataType.UINT8)
        self.graph.insert_after(unit.node, node)
        codes = node.outputs[0]
        if fold is not None:
            codes = self._with_channels_last(codes, fold.channels_made, fold.shape_made)
        codes = self._within_limits(unit, codes)
        replace_value(value, self._keep(value, codes))
        node.replace_input_with(0, made)
        if unit.saturated is not None:
            unit.saturated.replace_input_with(0, None)
            remove_node(unit.saturated)
        if fold is not None:
            made.shape = None
        if not made.name:
            # Its name went to the graph's output.
            made.name = self.names.new("exact")

    def _within_limits(self, unit: Unit, codes: ir.Value) -> ir.Value:
        """The codes; clipped where, shared with other values, they reach beyond the unit's limits.

        A code more at either end is rounding.
        """
        affine = self.parameters.of(unit.outputs[0])
        limits = affine.codes(np.asarray(unit.limits))
        if limits[0] <= affine.low + 1 and limits[1] >= affine.high - 1:
            return codes
        inputs = [codes, *(self._constant(c, "limit") for c in limits)]
        node = self._node("Clip", inputs, unit.outputs, "clipped", ir.DataType.UINT8)
        self._insert(node, codes)
        return node.outputs[0]


def _picked(node: ir.Node) -> tuple[int, np.ndarray] | None:
    """The axis and indices of a Slice that takes every n-th element; None for others.

    onnxruntime's Slice copies such elements one by one, which Gather does several times as fast.
    """
    if not is_onnx(node, "Slice"):
        return None
    parts = [small_integers(input_of(node, place)) for place in (1, 2, 3, 4)]
    shape = static_shape(node.inputs[0])
    if shape is None or any(part is None or len(part) != 1 for part in parts):
        return None
    (start,), (end,), (axis,), (step,) = (part for part in parts if part is not None)
    if abs(step) == 1:
        return None
    return axis, np.arange(shape[axis], dtype=np.int32)[slice(start, end, step)]


def _drop_unread(graph: ir.Graph) -> None:
    """Remove the DequantizeLinear nodes whose numbers nothing reads."""
    for node in list(graph):
        if is_onnx(node, "DequantizeLinear") and not is_read(node):
            remove_node(node)
