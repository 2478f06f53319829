"""merge-common-subexpressions: compute once what several nodes compute."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Container, Hashable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.content import digest
from graphopt.contract import Change, Context, Effect, Pass
from graphopt.operators import is_onnx, is_random, subgraphs
from graphopt.rewriting import can_replace, replace_value
from graphopt_passes.share.lost_fusions import WEIGHT_ONLY, unshared_values

COMMUTATIVE = frozenset(
    {
        "Add",
        "And",
        "BitwiseAnd",
        "BitwiseOr",
        "BitwiseXor",
        "Equal",
        "Mean",
        "Mul",
        "Or",
        "Sum",
        "Xor",
    }
)
"""Operators that give the same bits when two operands change places.

Max and Min do not: onnxruntime returns either of 0.0 and -0.0, by the order they come in.
"""

PURE_DOMAINS = ("", "ai.onnx.ml", "com.microsoft")
"""Their operators are functions of their inputs, but for `is_random` and `IMPURE`."""

IMPURE = frozenset(
    {
        "ATen",
        "NcclAllGather",
        "NcclAllReduce",
        "NcclReduceScatter",
        "PythonOp",
        "PythonOpGrad",
        "RecordEvent",
        "Recv",
        "Sampling",
        "Send",
        "WaitEvent",
        "YieldOp",
    }
)
"""Operators of onnxruntime that draw at random or act on something beside their outputs."""


@dataclass(frozen=True)
class MergeCommonSubexpressions(Pass):
    """Keep one of several nodes that compute the same from the same values.

    The same is: operator, attributes by value, inputs, and number of outputs; the order of two
    operands counts only where it could change a bit. A node of a subgraph also merges with one of
    an outer graph that comes before. Random operators, operators of unknown domains and nodes with
    subgraphs stay.
    """

    name: ClassVar[str] = "merge-common-subexpressions"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Merge in one walk in topological order, so that equal chains merge as a whole."""
        change = Change()
        _merge_in(model.graph, ChainMap(), model, unshared_values(model, context), change)
        return change


def _merge_in(
    graph: ir.Graph,
    seen: ChainMap[Hashable, ir.Node],
    model: ir.Model,
    unshared: Container[ir.Value],
    change: Change,
) -> None:
    """Merge the nodes of a graph.

    Args:
        graph: the graph.
        seen: the nodes that were met and stay, by what they compute: those of outer graphs that
            come before, and in a map of its own those of this graph.
        model: the model of the graph.
        unshared: what must get no further reader.
        change: where to record.
    """
    for node in graph:
        for inner in subgraphs(node):
            _merge_in(inner, seen.new_child(), model, unshared, change)
        key = _key(node)
        if key is None:
            continue
        first = seen.setdefault(key, node)
        if first is node:
            continue
        reason = _why_apart(node, first, model, unshared)
        if reason is not None:
            change.skip(node, reason)
            continue
        for output, kept in zip(node.outputs, first.outputs, strict=True):
            if _is_used(output):
                replace_value(output, kept)
        graph.remove(node, safe=True)
        change.count(f"{node.op_type} merged")


def _is_used(value: ir.Value) -> bool:
    return value.is_graph_output() or bool(value.uses())


def _why_apart(
    node: ir.Node, first: ir.Node, model: ir.Model, unshared: Container[ir.Value]
) -> str | None:
    """Why the node must stay although `first` computes the same; None when it may go."""
    if is_random(node):
        return "it draws at random, and two draws differ"
    if any(True for _ in subgraphs(node)):
        return "it has a subgraph, and those are not compared"
    if node.op_identifier() in model.functions:
        return "it calls a function of the model, and those are not looked into"
    if node.domain not in PURE_DOMAINS or node.op_type in IMPURE:
        return f"{node.domain or 'ai.onnx'}.{node.op_type} may do more than compute its outputs"
    if any(output in unshared for output in (*node.outputs, *first.outputs)):
        return WEIGHT_ONLY
    for output, kept in zip(node.outputs, first.outputs, strict=True):
        if not _is_used(output):
            continue
        if not kept.name:
            return "the node that computes the same leaves out an output that is read here"
        if not can_replace(output, kept):
            return "its output and that of the node that computes the same are both needed"
    return None


# ------------------------------------------------------------------ what a node computes


def _key(node: ir.Node) -> Hashable:
    """Equal for nodes that compute the same; None when that cannot be told."""
    attributes = []
    for name, attribute in sorted(node.attributes.items()):
        content = None if attribute.is_ref() else _content(attribute)
        if content is None:
            return None
        attributes.append((name, attribute.type, content))
    inputs = list(node.inputs)
    while inputs and inputs[-1] is None:
        inputs.pop()
    # Before opset 7, attributes say which operand is broadcast, and to which axis.
    if len(inputs) == 2 and not attributes and is_onnx(node, *COMMUTATIVE):
        inputs.sort(key=id)
    # Some kernels look for constants in their own graph only.
    place = node.graph if is_onnx(node, "Constant") else None
    return node.op_identifier(), tuple(inputs), len(node.outputs), tuple(attributes), place


def _content(attribute: ir.Attr) -> Hashable:
    """The value of an attribute, equal only for equal bits; None for kinds not compared."""
    kinds = ir.AttributeType
    if attribute.type in (kinds.FLOAT, kinds.FLOATS):
        return np.asarray(attribute.value, np.float64).tobytes()
    if attribute.type in (kinds.INT, kinds.INTS, kinds.STRING, kinds.STRINGS):
        value: Hashable = attribute.value
        return value
    if attribute.type == kinds.TENSOR:
        return _tensor(attribute.as_tensor())
    if attribute.type == kinds.TENSORS:
        return tuple(_tensor(tensor) for tensor in attribute.as_tensors())
    # Not compared; `_why_apart` says so where all else is equal.
    return "subgraph" if attribute.type in (kinds.GRAPH, kinds.GRAPHS) else None


def _tensor(tensor: ir.TensorProtocol) -> Hashable:
    shape = tuple(tensor.shape.numpy())
    if tensor.dtype == ir.DataType.STRING:
        return tensor.dtype, shape, tuple(tensor.numpy().reshape(-1).tolist())
    return tensor.dtype, shape, digest(tensor)
