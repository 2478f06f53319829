"""merge-views: store once what is also stored reshaped, transposed, or in part."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.contract import Bounds, Change, Context, Effect, Pass
from graphopt.operators import all_graphs, is_onnx, opset_of
from graphopt.packing import FOLDED_BYTES_MAXIMUM
from graphopt.rewriting import (
    Names,
    add_initializer,
    only_reader,
    static_shape,
    why_too_old,
)
from graphopt.skeleton import known_shape
from graphopt_passes.share.lost_fusions import WEIGHT_ONLY, unshared_values
from graphopt_passes.share.views import View, find_views

FIRST_OPSET = 10
"""From here on, Slice takes its bounds as inputs."""

GEMM_OPSET = 11
"""From here on, Gemm does without C."""

TOO_LARGE = (
    "it holds the numbers of another initializer, but over 1 GiB onnxruntime would make it from "
    "that one at every inference"
)

_TYPES = frozenset(
    {
        ir.DataType.BFLOAT16,
        ir.DataType.BOOL,
        ir.DataType.DOUBLE,
        ir.DataType.FLOAT,
        ir.DataType.FLOAT16,
        ir.DataType.INT8,
        ir.DataType.INT16,
        ir.DataType.INT32,
        ir.DataType.INT64,
        ir.DataType.UINT8,
        ir.DataType.UINT16,
        ir.DataType.UINT32,
        ir.DataType.UINT64,
    }
)
"""Of the types of whole bytes, those that Reshape, Transpose and Slice all take."""


@dataclass(frozen=True)
class MergeViews(Pass):
    """Store a large initializer once that is there a second time in another form.

    So is the output head of a language model that is tied to its embedding: the same numbers,
    transposed. The other forms are a reshape, any order of up to four axes, and a range of rows. A
    Reshape, Transpose or Slice then makes the one from the other, which onnxruntime computes when
    it loads the model: what runs, and how fast, stays. Where all readers of a transposed matrix
    are Gemm, or MatMul of a matrix, no node is needed: a Gemm can transpose it.

    Attributes:
        min_bytes: smaller initializers are not worth a node.
    """

    name: ClassVar[str] = "merge-views"
    effect: ClassVar[Effect] = Effect.ROUNDING

    min_bytes: Annotated[int, Bounds(0)] = 1 << 16

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Refuse opsets before 10, which slice in another way."""
        return why_too_old(model, FIRST_OPSET)

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Find the views, then make each from its source."""
        change, names, unshared = Change(), Names(model), unshared_values(model, context)
        for view in find_views(_candidates(model, self.min_bytes)):
            reason = _why_not(view, model, unshared)
            if reason is not None:
                change.skip(view.value, reason)
            elif _is_transposed_product(view, opset_of(model)):
                _let_gemm_transpose(view, change)
            elif _bytes(view.value) > FOLDED_BYTES_MAXIMUM:
                change.skip(view.value, TOO_LARGE)
            else:
                _make(view, names, change)
        return change


def _candidates(model: ir.Model, min_bytes: int) -> list[ir.Value]:
    """Large constant initializers; those that had better stay as they are come first."""
    found = [
        value
        for graph in all_graphs(model)
        for value in graph.initializers.values()
        if _is_large(value.const_value, min_bytes)
        and not value.is_graph_input()
        and (value.uses() or value.is_graph_output())
    ]
    return sorted(
        found,
        key=lambda value: (
            not value.is_graph_output(),
            value.graph is not model.graph,
            all(_is_right_operand(node, index) for node, index in value.uses()),
        ),
    )


def _is_large(tensor: ir.TensorProtocol | None, min_bytes: int) -> bool:
    if tensor is None or tensor.dtype not in _TYPES:
        return False
    return tensor.nbytes >= max(1, min_bytes)


def _is_right_operand(node: ir.Node, index: int) -> bool:
    return is_onnx(node, "MatMul", "Gemm") and index == 1


def _bytes(value: ir.Value) -> int:
    assert value.const_value is not None
    return value.const_value.nbytes


def _why_not(view: View, model: ir.Model, unshared: Container[ir.Value]) -> str | None:
    if view.value.is_graph_output():
        return "it is an output of its graph"
    if view.value in unshared or view.source in unshared:
        return WEIGHT_ONLY
    if view.source.graph not in (model.graph, view.value.graph):
        return f"{view.source.name}, which holds its numbers, is in a subgraph of its own"
    return None


# ------------------------------------------------------------------ without a node


def _is_transposed_product(view: View, opset: int) -> bool:
    """All that reads the view are products that can transpose it themselves."""
    if view.permutation != (1, 0):
        return False
    return all(
        _is_right_operand(node, index) and (is_onnx(node, "Gemm") or _can_become_gemm(node, opset))
        for node, index in view.value.uses()
    )


def _can_become_gemm(node: ir.Node, opset: int) -> bool:
    """The MatMul is one of matrices, and onnxruntime makes nothing of it with its neighbours.

    An Add becomes part of a MatMul at load, and a Mul or Div by a number, before or after it; not
    so of a Gemm.
    """
    left, right = node.inputs
    assert left is not None and right is not None
    shape = known_shape(left)
    if opset < GEMM_OPSET or shape is None or len(shape) != 2:
        return False
    if right.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16):
        return False
    before, after = left.producer(), only_reader(node.outputs[0])
    return not (before is not None and is_onnx(before, "Mul", "Div")) and not (
        after is not None and is_onnx(after, "Add", "Mul", "Div")
    )


def _let_gemm_transpose(view: View, change: Change) -> None:
    for node, index in list(view.value.uses()):
        transposed = is_onnx(node, "Gemm") and node.attributes.get_int("transB", 0) != 0
        node.op_type = "Gemm"
        node.attributes["transB"] = ir.AttrInt64("transB", int(not transposed))
        node.replace_input_with(index, view.source)
    _remove(view.value)
    change.count("transposed copy left to Gemm")


# ------------------------------------------------------------------ with nodes that load folds


def _make(view: View, names: Names, change: Change) -> None:
    """Let nodes at the head of the graph make the view, under its name."""
    graph, name, tensor = view.value.graph, view.value.name, view.value.const_value
    assert isinstance(graph, ir.Graph) and name is not None and tensor is not None
    _remove(view.value)
    view.value.name = None
    nodes = _nodes(view, tuple(tensor.shape.numpy()), graph, name, names)
    made = nodes[-1].outputs[0]
    made.name, made.type = name, ir.TensorType(tensor.dtype)
    made.shape = ir.Shape(tensor.shape.numpy())
    graph.insert_before(graph[0], nodes)
    view.value.replace_all_uses_with(made)
    change.count(f"initializer made by {' and '.join(node.op_type for node in nodes)}")


def _nodes(
    view: View, shape: tuple[int, ...], graph: ir.Graph, name: str, names: Names
) -> list[ir.Node]:
    nodes: list[ir.Node] = []
    value, made = view.source, static_shape(view.source)

    def add(op_type: str, *inputs: ir.Value, **attributes: tuple[int, ...]) -> ir.Value:
        label = names.new(f"{op_type}_{name}")
        node = ir.node(op_type, inputs, attributes, name=label)
        node.outputs[0].name = label
        nodes.append(node)
        return node.outputs[0]

    def integers(what: str, *numbers: int) -> ir.Value:
        return add_initializer(graph, np.array(numbers, np.int64), names.new(f"{name}_{what}"))

    if view.permutation is not None:
        add("Transpose", value, perm=view.permutation)
        return nodes
    if view.rows is not None:
        start, stop = view.rows
        bounds = (integers("start", start), integers("stop", stop), integers("axis", 0))
        value = add("Slice", value, *bounds)
        made = (stop - start, *(made or ())[1:])
    if made != shape:
        add("Reshape", value, integers("shape", *shape))
    return nodes


def _remove(value: ir.Value) -> None:
    assert isinstance(value.graph, ir.Graph) and value.name is not None
    del value.graph.initializers[value.name]
