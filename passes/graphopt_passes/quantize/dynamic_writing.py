"""Writes layers in the form in which their activations are quantized at run time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt.operators import is_onnx
from graphopt.packing import is_constant
from graphopt.rewriting import Names, add_initializer, input_of, only_reader, remove_node
from graphopt_passes.quantize.columns import columns_of
from graphopt_passes.quantize.dynamic_layers import Candidate, Weight

DOMAIN, VERSION = "com.microsoft", 1
"""Where onnxruntime's own operators are."""

TensorMaker = Callable[[np.ndarray, str], ir.TensorProtocol]


@dataclass(frozen=True)
class Codes:
    """Activations as QuantizeLinear has them: uint8, with a scale and a zero point of the run."""

    codes: ir.Value
    scale: ir.Value
    zero_point: ir.Value


@dataclass
class DynamicWriting:
    """Rewrites the nodes of the main graph one after the other.

    Attributes:
        model: being rewritten.
        names: of it.
        tensor: makes a tensor of an array.
        code_maximum: of the codes of weights.
    """

    model: ir.Model
    names: Names
    tensor: TensorMaker
    code_maximum: int
    _sources: dict[ir.Value, Codes] = field(default_factory=dict)
    _weights: dict[tuple[ir.Value, bool], tuple[ir.Value, ir.Value]] = field(default_factory=dict)
    _zeros: dict[tuple[int, ...], ir.Value] = field(default_factory=dict)

    def product(self, layer: Candidate) -> None:
        """A MatMul or Gemm, in the standard operators that onnxruntime fuses into one.

        onnxruntime 1.32 makes DynamicQuantizeMatMul of

            codes, scale, zero_point = DynamicQuantizeLinear(source)
            Cast(MatMulInteger(codes, weight, zero_point)) * (scale * scales) + bias

        and MatMulIntegerToFloat where several such products share the first line. The order of
        operands counts: the scale of the activations comes first, and the bias second.
        """
        node, bias = layer.node, input_of(layer.node, 2)
        weight, scales = self._weight(layer.weights[0])
        source = self._source(layer)
        like = node.outputs[0]
        integers = self._node(
            "MatMulInteger", [source.codes, weight, source.zero_point], like, ir.DataType.INT32
        )
        numbers = self._node(
            "Cast",
            [integers],
            like,
            ir.DataType.FLOAT,
            [ir.AttrInt64("to", int(ir.DataType.FLOAT))],
        )
        units = self._node("Mul", [source.scale, scales], scales, ir.DataType.FLOAT)
        for made in (integers, numbers, units):
            self._insert(made, node)
        last, operands = "Mul", [numbers, units]
        if bias is not None:
            scaled = self._node("Mul", operands, like, ir.DataType.FLOAT)
            self._insert(scaled, node)
            last, operands = "Add", [scaled, bias]
        # The node itself becomes the last one: its output stays what it is, for all that read it.
        node.op_type = last
        node.attributes.clear()
        _set_inputs(node, operands)
        if bias is None:
            _put_bias_second(node)
        _drop_unread(layer.weights)

    def recurrent(self, layer: Candidate) -> None:
        """An LSTM, as DynamicQuantizeLSTM of onnxruntime."""
        node = layer.node
        operands = [input_of(node, index) for index in range(8)]
        operands[1], input_scales = self._weight(layer.weights[0])
        operands[2], state_scales = self._weight(layer.weights[1])
        directions, hidden, columns = layer.weights[1].shape
        zeros = self._zero_points((directions, columns))
        node.op_type, node.domain = "DynamicQuantizeLSTM", DOMAIN
        node.attributes.pop("layout", None)
        if "hidden_size" not in node.attributes:
            node.attributes["hidden_size"] = ir.AttrInt64("hidden_size", hidden)
        _set_inputs(node, [*operands, input_scales, zeros, state_scales, zeros])
        self.model.opset_imports.setdefault(DOMAIN, VERSION)
        _drop_unread(layer.weights)

    # -------------------------------------------------------------- values

    def _source(self, layer: Candidate) -> Codes:
        """The codes of what a layer reads; the same for all that read it."""
        value = layer.source
        if value not in self._sources:
            made = [
                ir.Value(
                    name=self.names.new(f"{value.name}_{what}"),
                    type=ir.TensorType(dtype),
                    shape=shape,
                )
                for what, dtype, shape in (
                    ("codes", ir.DataType.UINT8, value.shape),
                    ("scale", ir.DataType.FLOAT, ir.Shape([])),
                    ("zero_point", ir.DataType.UINT8, ir.Shape([])),
                )
            ]
            name = self.names.new(f"DynamicQuantizeLinear_{value.name}")
            node = ir.Node("", "DynamicQuantizeLinear", [value], outputs=made, name=name)
            self._insert(made[0], layer.node)
            assert node.graph is not None
            self._sources[value] = Codes(*made)
        return self._sources[value]

    def _weight(self, weight: Weight) -> tuple[ir.Value, ir.Value]:
        """Initializers of codes and scales; one pair for all that share the weight."""
        if weight.key not in self._weights:
            columns = columns_of(weight.array(), self.code_maximum)
            hint = weight.value.name or "weight"
            self._weights[weight.key] = (
                self._constant(columns.codes, f"{hint}_codes"),
                self._constant(columns.scales, f"{hint}_scales"),
            )
        return self._weights[weight.key]

    def _zero_points(self, shape: tuple[int, ...]) -> ir.Value:
        if shape not in self._zeros:
            self._zeros[shape] = self._constant(np.zeros(shape, np.int8), "zero_points")
        return self._zeros[shape]

    def _constant(self, array: np.ndarray, hint: str) -> ir.Value:
        name = self.names.new(hint)
        return add_initializer(self.model.graph, self.tensor(array, name), name)

    # -------------------------------------------------------------- nodes

    def _node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        like: ir.Value,
        dtype: ir.DataType,
        attributes: Sequence[ir.Attr] = (),
    ) -> ir.Value:
        """The output of a new node, of the shape of another value."""
        name = self.names.new(f"{like.name}_{op_type}")
        made = ir.Value(name=name, type=ir.TensorType(dtype), shape=like.shape)
        ir.Node("", op_type, inputs, attributes, outputs=[made], name=self.names.new(name))
        return made

    def _insert(self, made: ir.Value, before: ir.Node) -> None:
        producer = made.producer()
        assert producer is not None
        self.model.graph.insert_before(before, producer)


def _set_inputs(node: ir.Node, inputs: Sequence[ir.Value | None]) -> None:
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)


def _put_bias_second(node: ir.Node) -> None:
    """Let the Add of a constant that alone reads a product have it second, for the fusion."""
    add = only_reader(node.outputs[0])
    if add is None or not is_onnx(add, "Add") or add.graph is not node.graph:
        return
    first, second = add.inputs
    if second is node.outputs[0] and is_constant(first):
        _set_inputs(add, [second, first])


def _drop_unread(weights: Sequence[Weight]) -> None:
    """Remove Constant nodes of weights that nothing reads any more.

    Initializers the pipeline removes.
    """
    for weight in weights:
        node = weight.value.producer()
        if node is not None and not weight.value.uses() and not weight.value.is_graph_output():
            remove_node(node)
