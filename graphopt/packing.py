"""Packed weights: constants that are stored narrow and widened by nodes of the graph.

A rewrite that folded such nodes would store the wide form again and undo what a user paid
accuracy for, so every rewrite of constants asks `is_packed` first. Today packed means: a
DequantizeLinear of constants, or of a QuantizeLinear of constants.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt.operators import is_onnx

_CONTENT = frozenset(
    {
        "value",
        "value_float",
        "value_floats",
        "value_int",
        "value_ints",
        "value_string",
        "value_strings",
    }
)


def holds_tensor(node: ir.Node) -> bool:
    """The node is a Constant whose content can be read: not sparse, and not by reference."""
    if not is_onnx(node, "Constant") or len(node.attributes) != 1:
        return False
    (attribute,) = node.attributes.values()
    return attribute.name in _CONTENT and not attribute.is_ref()


def is_packed(value: ir.Value | None) -> bool:
    """The value is the widened form of constants that are stored narrow."""
    node = value.producer() if value is not None else None
    if node is None or not is_onnx(node, "DequantizeLinear"):
        return False
    data, *parameters = node.inputs
    return _is_narrow(data) and all(p is None or is_constant(p) for p in parameters)


def _is_narrow(data: ir.Value | None) -> bool:
    """A constant, or one that is quantized where it is used and will be folded."""
    node = data.producer() if data is not None else None
    if node is not None and is_onnx(node, "QuantizeLinear"):
        return all(v is None or is_constant(v) for v in node.inputs)
    return is_constant(data)


def is_constant(value: ir.Value | None) -> bool:
    """The value is an initializer that no caller can override, or the output of a Constant node."""
    if value is None:
        return False
    node = value.producer()
    if node is not None:
        return holds_tensor(node)
    return value.is_initializer() and not value.is_graph_input()
