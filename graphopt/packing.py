"""Packed weights: constants that are stored narrow and widened by nodes of the graph.

A rewrite that folded such nodes would store the wide form again and undo what a user paid
accuracy for, so every rewrite of constants asks `is_packed` first. Packed is what nodes that move,
look up, add and scale make of constants alone, where narrow integers are among these: the forms
that `graphopt.encoding` writes and any other of the kind. onnxruntime computes them when it loads
the model, and a DequantizeLinear at each run. Packed is also a Gather that repeats the rows of a
constant, by an index that is stored narrow, and what puts numbers between zeros that are not stored
(`graphopt.sparse_encoding`).

Floats of 16 bits are packed where a Cast widens them, and numbers like others elsewhere.

Operators of onnxruntime's own read codes as they are stored; see `graphopt.kernel_operands`.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from graphopt.operators import is_onnx

CODES_MINIMUM = 64
"""Fewer integers that nodes widen are no weight, but arithmetic."""

NODES_MAXIMUM = 64
"""Nodes that widen one weight. What hangs on more is no packed weight, and is not followed."""

STEPS_MAXIMUM = 16
"""Values that are looked at behind a step that may lead to a node that puts numbers in places."""

_NARROW = frozenset(
    {
        ir.DataType.INT2,
        ir.DataType.UINT2,
        ir.DataType.INT4,
        ir.DataType.UINT4,
        ir.DataType.INT8,
        ir.DataType.UINT8,
        ir.DataType.FLOAT4E2M1,
        ir.DataType.FLOAT8E4M3FN,
        ir.DataType.FLOAT8E5M2,
    }
)
_HALVES = frozenset({ir.DataType.BFLOAT16, ir.DataType.FLOAT16})
_INDICES = frozenset({ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT32})
"""Types that no Gather takes as an index: a Cast widens what was stored narrow for it."""
_MOVES = (
    "Concat",
    "Expand",
    "Flatten",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)
_DECODES = (
    *_MOVES,
    "Add",
    "BitShift",
    "BitwiseAnd",
    "Cast",
    "CumSum",
    "DequantizeLinear",
    "Gather",
    "Mul",
    "QuantizeLinear",
    "ScatterElements",
    "Sub",
    "Where",
)

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
    """The value is the widened form of constants that are stored narrow, or a step on the way."""
    node = value.producer() if value is not None else None
    if value is None or node is None or not is_onnx(node, *_DECODES):
        return False
    if is_onnx(node, "Cast") and node.attributes.get_int("to", 0) == ir.DataType.BOOL:
        return False
    if is_onnx(node, "Cast") and _widens_half(node):
        return True
    if is_onnx(node, "DequantizeLinear") and _dequantizes_constants(node):
        # Of any size: a DequantizeLinear has no other purpose.
        return True
    if is_onnx(node, *_MOVES) and is_constant(node.inputs[0]):
        # What nothing widens is a constant in another shape.
        return any(is_packed(use.node.outputs[0]) for use in value.uses() if use.idx == 0)
    leaves = constants_behind(value)
    if leaves is None:
        return False
    if any(map(_are_codes, leaves)) or _is_row_index(value) or has_shared_rows(value):
        return True
    return bool(placing_nodes(value)) or leads_to_places(value)


def has_shared_rows(value: ir.Value) -> bool:
    """Nodes make the value of constants alone, and one of them repeats rows; `repeats_rows`."""
    return any(map(repeats_rows, nodes_behind(value) or ()))


def repeats_rows(node: ir.Node) -> bool:
    """A Gather of rows, by an index stored narrow, from a table smaller than what it makes.

    What looks up single numbers in a vector is a codebook, and of integers a table of digits.
    """
    if not is_onnx(node, "Gather"):
        return False
    data, index = node.inputs
    table, stored = _stored_table(data), _stored_index(index)
    if table is None or stored is None or table.size < CODES_MINIMUM:
        return False
    shape, axis = table.shape.numpy(), node.attributes.get_int("axis", 0)
    return 1 < len(shape) > axis >= -len(shape) and stored.size > shape[axis]


def placing_nodes(value: ir.Value) -> list[ir.Node]:
    """The nodes by which numbers are put between zeros, on the way to a value of constants alone.

    A sum of narrow weights may have several.
    """
    return list(filter(places_numbers, nodes_behind(value) or ()))


def places_numbers(node: ir.Node) -> bool:
    """A node puts the numbers of constants alone where a running sum of codes says."""
    if is_onnx(node, "ScatterElements"):
        ends = node.inputs[1]
    elif is_onnx(node, "Gather"):
        ends = _summed(node.inputs[1])
    else:
        return False
    if ends is None or not _is_made_by(ends, "CumSum") or nodes_behind(node.outputs[0]) is None:
        return False
    # Positions of tokens are such sums, too, of a mask that is no code.
    tensors = map(_tensor_of, constants_behind(ends) or ())
    return any(tensor is not None and tensor.dtype in _INDICES for tensor in tensors)


def _summed(index: ir.Value | None) -> ir.Value | None:
    """The running sum of bits in an index that is 0 where the bits are."""
    product = index.producer() if index is not None else None
    if product is None or not is_onnx(product, "Mul"):
        return None
    return next((v for v in product.inputs if _is_made_by(v, "CumSum")), None)


def _is_made_by(value: ir.Value | None, op_type: str) -> bool:
    node = value.producer() if value is not None else None
    return node is not None and is_onnx(node, op_type)


def leads_to_places(value: ir.Value) -> bool:
    """A step on the way to such a node, of which there are few."""
    waiting, seen = [value], {value}
    while waiting and len(seen) < STEPS_MAXIMUM:
        for use in waiting.pop().uses():
            if places_numbers(use.node):
                return True
            made = [v for v in use.node.outputs if v not in seen and is_onnx(use.node, *_DECODES)]
            seen.update(made)
            waiting += made
    return False


def _is_row_index(value: ir.Value) -> bool:
    """The index, stored narrow, of a Gather that makes a packed weight."""
    return _stored_index(value) is not None and any(
        is_packed(use.node.outputs[0])
        for use in value.uses()
        if use.idx == 1 and is_onnx(use.node, "Gather")
    )


def _stored_table(data: ir.Value | None) -> ir.TensorProtocol | None:
    """A constant of floating point, or what a Cast makes another type of; else None."""
    cast = data.producer() if data is not None else None
    if cast is not None and is_onnx(cast, "Cast"):
        data = cast.inputs[0]
    tensor = _tensor_of(data) if data is not None and is_constant(data) else None
    return tensor if tensor is not None and tensor.dtype.is_floating_point() else None


def _stored_index(index: ir.Value | None) -> ir.TensorProtocol | None:
    """The narrow integers that a Cast makes an index of; None for any other index."""
    cast = index.producer() if index is not None else None
    if cast is None or not is_onnx(cast, "Cast") or not is_constant(cast.inputs[0]):
        return None
    tensor = _tensor_of(cast.inputs[0])  # type: ignore[arg-type]
    return tensor if tensor is not None and tensor.dtype in _INDICES else None


def nodes_behind(value: ir.Value) -> list[ir.Node] | None:
    """The nodes that make a value of constants alone, the last one first.

    None where something else goes in, or where they are more than widen a weight.
    """
    found: dict[ir.Node, None] = {}
    waiting = [value]
    while waiting:
        current = waiting.pop()
        if is_constant(current):
            continue
        node = current.producer()
        if node in found:
            continue
        if node is None or not is_onnx(node, *_DECODES) or len(found) == NODES_MAXIMUM:
            return None
        found[node] = None
        waiting += [v for v in node.inputs if v is not None]
    return list(found)


def constants_behind(value: ir.Value) -> list[ir.Value] | None:
    """The constants of which nodes that widen make a value; None where something else goes in."""
    nodes = nodes_behind(value)
    if nodes is None:
        return None
    inputs = (v for node in nodes for v in node.inputs if v is not None)
    return list(dict.fromkeys(filter(is_constant, inputs)))


def coded_values(value: ir.Value) -> list[ir.Value]:
    """What DequantizeLinear reads on the way to a packed weight: integers that a kernel may take.

    Empty where no DequantizeLinear is on the way.
    """
    nodes = nodes_behind(value) or ()
    read = (node.inputs[0] for node in nodes if is_onnx(node, "DequantizeLinear"))
    return [v for v in read if v is not None]


def is_beside_codes(value: ir.Value) -> bool:
    """A node reads the value beside an activation that is quantized, as integer kernels do."""
    others = (v for use in value.uses() for v in use.node.inputs if v is not value)
    makers = (v.producer() for v in others if v is not None and not is_packed(v))
    return any(node is not None and is_onnx(node, "DequantizeLinear") for node in makers)


def _dequantizes_constants(node: ir.Node) -> bool:
    data, *parameters = node.inputs
    return _is_quantized_constant(data) and all(p is None or is_constant(p) for p in parameters)


def _is_quantized_constant(data: ir.Value | None) -> bool:
    """A constant, or one that is quantized where it is used and will be folded."""
    node = data.producer() if data is not None else None
    if node is not None and is_onnx(node, "QuantizeLinear"):
        return all(v is None or is_constant(v) for v in node.inputs)
    return is_constant(data)


def _are_codes(value: ir.Value) -> bool:
    """A constant of many narrow integers."""
    tensor = _tensor_of(value)
    return is_narrow(value) and tensor is not None and tensor.size >= CODES_MINIMUM


def _widens_half(cast: ir.Node) -> bool:
    """A constant of many numbers of 16 bits is cast to a wider type of floating point."""
    data = cast.inputs[0]
    tensor = _tensor_of(data) if data is not None and is_constant(data) else None
    if tensor is None or tensor.dtype not in _HALVES or tensor.size < CODES_MINIMUM:
        return False
    return cast.attributes.get_int("to", 0) in (ir.DataType.FLOAT, ir.DataType.DOUBLE)


def is_narrow(value: ir.Value) -> bool:
    """A constant of narrow integers, or of floats of 8 bits or fewer."""
    tensor = _tensor_of(value)
    return tensor is not None and tensor.dtype in _NARROW


def _tensor_of(value: ir.Value) -> ir.TensorProtocol | None:
    node = value.producer()
    if node is None:
        return value.const_value
    attribute = node.attributes.get("value")
    return None if attribute is None else attribute.as_tensor()


def is_constant(value: ir.Value | None) -> bool:
    """The value is an initializer that no caller can override, or the output of a Constant node."""
    if value is None:
        return False
    node = value.producer()
    if node is not None:
        return holds_tensor(node)
    return value.is_initializer() and not value.is_graph_input()


def packed_weights(graph: ir.Graph) -> Iterator[ir.Value]:
    """The packed weights of a graph, in order: what is widened to the end.

    What is read in codes is not among them; see `graphopt.kernel_operands`.
    """
    for node in graph:
        for output in node.outputs:
            if is_packed(output) and not _is_step(output):
                yield output


def _is_step(value: ir.Value) -> bool:
    """Only nodes that widen further read the value."""
    if value.is_graph_output() or not value.uses():
        return False
    return all(any(map(is_packed, use.node.outputs)) for use in value.uses())
