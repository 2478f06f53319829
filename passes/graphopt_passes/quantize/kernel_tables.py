"""Tables that onnxruntime's CPU provider looks up as they are stored, in 8, 4 or 2 bits.

Its GatherBlockQuantized widens the rows that are asked for, and no others. A table that is the head
of a language model too is stored once, in the blocks in which MatMulNBits reads it. The rows then
come in blocks, and get their shape by a Reshape. (A Reshape of the table would take its size once
more, as onnxruntime keeps what it reads and what it makes.) In memory there are two of it, both
narrow, as MatMulNBits has an order of its own.

One row of 512 numbers takes it as long as Gather, and a hundred or a thousand 3 times as long in 4
bits and 2 times in 8. For an index out of bounds it gives zeros, where Gather is an error.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.contract import Context
from graphopt.encoding import Encoding
from graphopt.operators import is_onnx
from graphopt.rewriting import add_initializer, input_of
from graphopt.skeleton import INFERRED
from graphopt_passes.quantize.codebooks import Rounded
from graphopt_passes.quantize.kernel_nodes import (
    DOMAIN,
    VERSION,
    lookup_node,
    packed_blocks,
    packed_rows,
    product_node,
    put_in_place,
)
from graphopt_passes.quantize.layers import is_scaled, stored_tensor
from graphopt_passes.quantize.narrow_weights import Target, graph_of
from graphopt_passes.simplify.chains import rank_of, remove_if_unread

TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
"""Of tables that the kernel widens to."""


def why_no_lookup(target: Target, bits: int, block: int) -> str | None:
    """Why GatherBlockQuantized, with MatMulNBits, cannot read a table; None where they can.

    Args:
        target: that a Gather reads.
        bits: of a code.
        block: of inputs.
    """
    value = target.value
    if target.in_body:
        return "it is of the body of an If, Loop or Scan"
    if len(target.shape) != 2:
        return "the table that is looked up has not two dimensions"
    if _dtype_of(value) not in TYPES:
        return "tables that are looked up in codes are float or float16"
    reasons = (_why_no_reader(use.node, use.idx, value) for use in value.uses())
    reason = next(filter(None, reasons), None)
    if reason is not None:
        return reason
    products = _products_of(value)
    if products and any(rank_of(node.inputs[1]) is None for node in _lookups_of(value)):
        return "its head shares the codes, and the rank of what looks them up is not known"
    if products and target.inputs % block:
        return f"its head shares the codes, and {target.inputs} inputs are no blocks of {block}"
    if target.inputs * bits % 8:
        return f"a row of {target.inputs} codes of {bits} bits is no whole number of bytes"
    return None


def scale_type_of(target: Target) -> type[np.floating]:
    """Of scales in the file.

    Those of a product are constants of its type: beside others, which nodes make and onnxruntime
    was told not to fold, MatMulNBits (1.32) gives wrong numbers at accuracy level 4.
    """
    is_wide = _dtype_of(target.value) == ir.DataType.FLOAT and _products_of(target.value)
    return np.float32 if is_wide else np.float16


def write_table(
    target: Target,
    part: Rounded,
    bits: int,
    block: int,
    accuracy_level: int,
    encoding: Encoding,
    context: Context,
) -> None:
    """Let all that reads a table read codes, which get its name.

    Args:
        target: that `why_no_lookup` finds nothing against.
        part: with scales of `scale_type_of`.
        bits: of a code.
        block: of inputs.
        accuracy_level: of products with the table.
        encoding: of the graph of the table.
        context: keeps what is large.
    """
    value, name, graph = target.value, target.name, encoding.graph
    maker, dtype, shape = value.producer(), _dtype_of(value), (target.rows, target.inputs)
    lookups, products = _lookups_of(value), _products_of(value)
    if maker is None:
        del graph.initializers[name]
    value.name = None
    packed = packed_blocks(part.codes, bits, block) if products else packed_rows(part.codes, bits)
    codes = context.initializer(graph, packed, name)
    if dtype == ir.DataType.FLOAT:
        scales = encoding.floats(part.scales)
    else:
        scales = context.initializer(graph, part.scales, encoding.names.new(f"{name}_scales"))
    if products:
        of_blocks = _scales_of_blocks(scales, part.scales.shape, encoding)
        for node in lookups:
            kernel = lookup_node(node, codes, of_blocks, bits, block)
            _put_blocks_in_place(node, kernel, shape, block, encoding)
    else:
        for node in lookups:
            put_in_place(node, lookup_node(node, codes, scales, bits, block))
    for node in products:
        head = node.inputs[1]
        kernel = product_node(node, codes, scales, shape, bits, block, accuracy_level)
        put_in_place(node, kernel)
        # It may be the table transposed.
        remove_if_unread(None if head is None else head.producer())
    remove_if_unread(maker)
    graph.opset_imports.setdefault(DOMAIN, VERSION)


def _dtype_of(value: ir.Value) -> ir.DataType | None:
    tensor = stored_tensor(value)
    return value.dtype if value.dtype is not None or tensor is None else tensor.dtype


# ------------------------------------------------------------------ what reads a table


def _why_no_reader(node: ir.Node, index: int, table: ir.Value) -> str | None:
    """Why a reader of the table cannot read codes; None where it can."""
    if is_onnx(node, "Gather") and index == 0:
        columns = node.attributes.get_int("axis", 0) % 2
        return "a Gather looks up columns of it" if columns else None
    if _turns(node):
        uses = list(node.outputs[0].uses())
        is_head = uses and not node.outputs[0].is_graph_output()
        if is_head and all(is_onnx(use.node, "MatMul") and use.idx == 1 for use in uses):
            reasons = (_why_no_product(use.node, table) for use in uses)
            return next(filter(None, reasons), None)
    if is_onnx(node, "Gemm") and index == 1 and node.attributes.get_int("transB", 0) != 0:
        return _why_no_product(node, table)
    return f"{node.op_type} reads it too"


def _turns(node: ir.Node) -> bool:
    """The node exchanges rows and columns of a matrix."""
    return is_onnx(node, "Transpose") and node.attributes.get_ints("perm", (1, 0)) == (1, 0)


def _why_no_product(node: ir.Node, table: ir.Value) -> str | None:
    """Why MatMulNBits is none for a product with the rows of the table; None where it is."""
    data, bias = node.inputs[0], input_of(node, 2)
    if node.graph is not graph_of(table):
        return "its head is in the body of an If, Loop or Scan"
    if is_scaled(node) or node.attributes.get_int("transA", 0) != 0:
        return "the Gemm of its head has transA, alpha or beta"
    if bias is not None and rank_of(bias) != 1:
        return "the bias of its head has more than one dimension"
    if (rank_of(data) or 0) < 2:
        return "its head multiplies a vector, or what has a rank that is not known"
    return None


def _products_of(table: ir.Value) -> list[ir.Node]:
    """The products with the rows of the table, each once."""
    found = dict.fromkeys(use.node for use in table.uses() if is_onnx(use.node, "Gemm"))
    for turned in (use.node.outputs[0] for use in table.uses() if _turns(use.node)):
        found.update(dict.fromkeys(use.node for use in turned.uses()))
    return list(found)


def _lookups_of(table: ir.Value) -> list[ir.Node]:
    return [use.node for use in table.uses() if is_onnx(use.node, "Gather")]


# ------------------------------------------------------------------ rows in blocks


def _scales_of_blocks(scales: ir.Value, shape: tuple[int, ...], encoding: Encoding) -> ir.Value:
    """Scales as rows in blocks have them, of shape [rows, blocks, 1]."""
    made = _reshaped(scales, (*shape, 1), encoding)
    encoding.graph.insert_before(encoding.graph[0], made)
    return made.outputs[0]


def _put_blocks_in_place(
    node: ir.Node, kernel: ir.Node, shape: tuple[int, int], block: int, encoding: Encoding
) -> None:
    """Let rows in blocks, put together, take the place of a lookup."""
    assert isinstance(node.graph, ir.Graph)
    node.graph.insert_before(node, kernel)
    (rows,), before = kernel.outputs, rank_of(node.inputs[1]) or 0
    rows.name = encoding.names.new(f"{node.outputs[0].name}_blocks")
    rows.type = node.outputs[0].type
    known = node.outputs[0].shape
    if known is not None:
        rows.shape = ir.Shape([*known.dims[:-1], shape[1] // block, block])
    # Each dimension of the index is taken over.
    put_in_place(node, _reshaped(rows, (0,) * before + (shape[1],), encoding))


def _reshaped(value: ir.Value, shape: tuple[int, ...], encoding: Encoding) -> ir.Node:
    """A Reshape, in no graph yet."""
    name = encoding.names.new(f"{value.name}_shaped")
    dims = np.array(shape, np.int64)
    to = add_initializer(encoding.graph, dims, encoding.names.new(f"{name}_shape"))
    made = ir.node("Reshape", [value, to], name=name)
    (output,) = made.outputs
    output.name, output.type = name, value.type
    output.meta[INFERRED] = True
    return made
