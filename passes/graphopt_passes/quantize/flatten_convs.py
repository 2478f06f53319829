"""flatten-convs: let a last Conv on a single place be the Gemm that it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.content import read_array
from graphopt.contract import Change, Context, Effect, Pass
from graphopt.operators import is_onnx
from graphopt.rewriting import Names, constant_tensor, input_of, replace_value
from graphopt.skeleton import known_shape
from graphopt_passes.quantize.layers import layer_of
from graphopt_passes.quantize.units import nodes_before_products


@dataclass(frozen=True)
class FlattenConvs(Pass):
    """Replace a Conv on an image of one place, after which no other product comes, by a Gemm.

    Classifiers end so: the mean over all places, a Conv of one place, Softmax. On 8-bit codes, the
    output of a Conv must be codes again, and those of a last layer are its scores: in steps of a
    256th of their range. A Gemm gives them as floats at the same cost.
    """

    name: ClassVar[str] = "flatten-convs"
    effect: ClassVar[Effect] = Effect.ROUNDING
    operators: ClassVar[frozenset[str] | None] = frozenset({"Conv"})

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Rewrite every such Conv of the main graph."""
        change, names = Change(), Names(model)
        before_products = nodes_before_products(model.graph)
        for node in list(model.graph):
            if not is_onnx(node, "Conv") or not _is_single_place(node):
                continue
            if node in before_products:
                change.skip(node, "another product comes after it")
                continue
            _flatten(node, names, context)
            change.count("Conv on one place became Gemm")
        return change


def _is_single_place(conv: ir.Node) -> bool:
    """Each output is a sum over the channels of the only place, with constant weights."""
    weight, shape = constant_tensor(conv.inputs[1]), known_shape(conv.inputs[0])
    bias, made = input_of(conv, 2), known_shape(conv.outputs[0])
    if weight is None or (bias is not None and constant_tensor(bias) is None):
        return False
    if weight.dtype != ir.DataType.FLOAT or layer_of(conv).group != 1:
        return False
    ones = [1] * (len(weight.shape) - 2)
    places = [None if s is None else list(s)[2:] for s in (shape, made)]
    return list(weight.shape)[2:] == ones and places == [ones, ones]


def _flatten(conv: ir.Node, names: Names, context: Context) -> None:
    graph, weight, tensor = conv.graph, conv.inputs[1], constant_tensor(conv.inputs[1])
    assert isinstance(graph, ir.Graph) and weight is not None and tensor is not None
    matrix = read_array(tensor).reshape(tensor.shape.numpy()[:2])
    flat = _node("Flatten", [conv.inputs[0]], names.new("flat"), {"axis": 1})
    name = names.new(f"{weight.name}_matrix")
    inputs = [flat.outputs[0], context.initializer(graph, matrix, name), *conv.inputs[2:]]
    gemm = _node("Gemm", inputs, names.new("scores"), {"transB": 1})
    places = [1] * (len(tensor.shape) - 2)
    shape = context.initializer(graph, np.array([0, -1, *places], np.int64), names.new("shape"))
    image = _node("Reshape", [gemm.outputs[0], shape], names.new("image"), {})
    image.outputs[0].shape = conv.outputs[0].shape
    graph.insert_before(conv, [flat, gemm, image])
    replace_value(conv.outputs[0], image.outputs[0])
    graph.remove(conv, safe=True)


def _node(
    op_type: str, inputs: list[ir.Value | None], output: str, attributes: dict[str, int]
) -> ir.Node:
    made = ir.Value(name=output, type=ir.TensorType(ir.DataType.FLOAT))
    stated = [ir.AttrInt64(name, number) for name, number in attributes.items()]
    return ir.Node("", op_type, inputs, stated, outputs=[made], name=f"{op_type}_{output}")
