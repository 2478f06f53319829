"""Packed weights: constants that are stored narrow and widened by nodes of the graph.

A rewrite that folded such nodes would store the wide form again and undo what a user paid
accuracy for, so every rewrite of constants asks `is_packed` first. Today packed means:

- a DequantizeLinear of constants, or of a QuantizeLinear of constants;
- a Cast of integers of 8 bits and fewer to floating point, the product of such a Cast with a
  constant, and a Cast of that to another floating-point type. onnxruntime computes these when it
  loads the model, and a DequantizeLinear at each run.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt.operators import is_onnx

CODES_MINIMUM = 64
"""Fewer integers that a Cast widens are no weight, but arithmetic."""

_NARROW = frozenset(
    {
        ir.DataType.INT2,
        ir.DataType.UINT2,
        ir.DataType.INT4,
        ir.DataType.UINT4,
        ir.DataType.INT8,
        ir.DataType.UINT8,
    }
)
_WIDE = frozenset(
    {ir.DataType.BFLOAT16, ir.DataType.DOUBLE, ir.DataType.FLOAT, ir.DataType.FLOAT16}
)
_MOVES = ("Flatten", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")

FOLDED_BYTES_MAXIMUM = 1 << 30
"""onnxruntime computes no larger result at load (unless told to, by an option of the session)."""

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
    if node is None:
        return False
    if is_onnx(node, "Cast"):
        return _widens(node) and (_are_codes(node.inputs[0]) or _is_product(node.inputs[0]))
    if not is_onnx(node, "DequantizeLinear"):
        return _is_product(value)
    data, *parameters = node.inputs
    return _is_narrow(data) and all(p is None or is_constant(p) for p in parameters)


def _widens(cast: ir.Node) -> bool:
    to = cast.attributes.get("to")
    return to is not None and to.value in _WIDE


def _is_product(value: ir.Value | None) -> bool:
    """Codes as floating point, times a constant."""
    node = value.producer() if value is not None else None
    if node is None or not is_onnx(node, "Mul") or len(node.inputs) != 2:
        return False
    return any(
        is_constant(scale) and codes is not None and _is_cast_of_codes(codes.producer())
        for codes, scale in (node.inputs, node.inputs[::-1])
    )


def _is_cast_of_codes(node: ir.Node | None) -> bool:
    if node is None or not is_onnx(node, "Cast"):
        return False
    return _widens(node) and _are_codes(node.inputs[0])


def _are_codes(value: ir.Value | None) -> bool:
    """A constant of many narrow integers, or such a one reshaped, transposed or in part."""
    node = value.producer() if value is not None else None
    while node is not None and is_onnx(node, *_MOVES) and all(map(is_constant, node.inputs[1:])):
        value = node.inputs[0]
        node = value.producer() if value is not None else None
    if value is None or not is_constant(value):
        return False
    attribute = node.attributes.get("value") if node is not None else None
    tensor = value.const_value if attribute is None else attribute.as_tensor()
    return tensor is not None and tensor.dtype in _NARROW and tensor.size >= CODES_MINIMUM


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
