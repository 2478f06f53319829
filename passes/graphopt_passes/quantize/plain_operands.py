"""Standard operators in the place of those that read a weight in codes."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from graphopt.contract import Context
from graphopt.kernel_operands import KernelWeight
from graphopt.packing import is_constant, nodes_behind
from graphopt.rewriting import Names, input_of, static_shape
from graphopt.skeleton import INFERRED
from graphopt_passes.quantize.kernel_nodes import put_in_place
from graphopt_passes.simplify.chains import rank_of, remove_if_unread

ROUNDS_ACTIVATIONS = 4
"""The accuracy level of MatMulNBits at which it does."""

GROUPS = 4
"""The input of MatMulNBits that puts inputs into groups of another order than theirs."""


def why_codes_stay(weight: KernelWeight) -> str | None:
    """Why `write_plain` must not be asked; None where it may."""
    if not weight.dtype.is_integer():
        return "its codes are no integers"
    if weight.zero_points is not None:
        return "it has zero points"
    if not is_constant(weight.scales) and nodes_behind(weight.scales) is None:
        return "its scales are computed in every run"
    rows, inputs = weight.shape
    shape = static_shape(weight.scales)
    if not weight.block or shape is None or math.prod(shape) != rows * -(-inputs // weight.block):
        return "it has not one scale for each block"
    if weight.codes.producer() is not None:
        return "its codes are no initializer"
    if any(_is_in_blocks(node) and rank_of(node.inputs[1]) is None for node in weight.lookups):
        return "the rank of what looks it up is not known"
    if any(input_of(node, GROUPS) is not None for node in weight.products):
        return "its inputs are in groups of an order of their own"
    levels = {node.attributes.get_int("accuracy_level", 0) for node in weight.products}
    if ROUNDS_ACTIVATIONS in levels:
        return f"accuracy level {ROUNDS_ACTIVATIONS} rounds activations, which MatMul does not"
    return None


def write_plain(weight: KernelWeight, numbers: np.ndarray, context: Context, names: Names) -> None:
    """Let Gather and MatMul read the numbers, which get the name of the codes.

    Args:
        weight: that `why_codes_stay` finds nothing against.
        numbers: of shape [rows, inputs].
        context: keeps what is large.
        names: of the model.
    """
    codes = weight.codes
    graph, name = codes.graph, codes.name or "weight"
    assert isinstance(graph, ir.Graph)
    stored = numbers if weight.lookups else np.ascontiguousarray(numbers.T)
    plain = context.initializer(graph, stored, names.new(f"{name}_plain"))
    operands = [value for node in weight.nodes for value in node.inputs if value is not None]
    for node in weight.lookups:
        _put_lookup(node, plain, weight, context, names)
    if weight.products:
        factor = _transposed(plain, graph, names) if weight.lookups else plain
    for node in weight.products:
        _put_product(node, factor, names)
    for maker in dict.fromkeys(value.producer() for value in operands):
        remove_if_unread(maker)
    if not codes.uses():
        del graph.initializers[name]
        codes.name, plain.name = None, name


def _transposed(table: ir.Value, graph: ir.Graph, names: Names) -> ir.Value:
    """The table as a product reads it, made at the head of the graph."""
    made = ir.node("Transpose", [table], {"perm": [1, 0]})
    (output,) = made.outputs
    output.name = made.name = names.new(f"{table.name}_transposed")
    output.type = table.type
    output.meta[INFERRED] = True
    graph.insert_before(graph[0], made)
    return output


def _is_in_blocks(node: ir.Node) -> bool:
    """Rows come in blocks, as codes are stored."""
    return rank_of(node.inputs[0]) == 3


def _put_lookup(
    node: ir.Node, table: ir.Value, weight: KernelWeight, context: Context, names: Names
) -> None:
    """Gather, and Reshape where rows are in blocks."""
    gather = ir.node("Gather", [table, node.inputs[1]], name=node.name)
    if not _is_in_blocks(node):
        put_in_place(node, gather)
        return
    assert isinstance(node.graph, ir.Graph) and isinstance(table.graph, ir.Graph)
    (rows,), before = gather.outputs, rank_of(node.inputs[1]) or 0
    rows.name, rows.type = names.new(f"{node.outputs[0].name}_rows"), table.type
    rows.meta[INFERRED] = True
    node.graph.insert_before(node, gather)
    # Each dimension of the index is taken over.
    dims = np.array([*(0,) * before, weight.shape[1] // weight.block, weight.block], np.int64)
    to = context.initializer(table.graph, dims, names.new(f"{rows.name}_shape"))
    put_in_place(node, ir.node("Reshape", [rows, to], name=names.new(f"{rows.name}_blocks")))


def _put_product(node: ir.Node, factor: ir.Value, names: Names) -> None:
    """MatMul, and Add where there is a bias."""
    product, bias = ir.node("MatMul", [node.inputs[0], factor], name=node.name), input_of(node, 5)
    if bias is None:
        put_in_place(node, product)
        return
    assert isinstance(node.graph, ir.Graph)
    (output,) = product.outputs
    output.name, output.type = names.new(f"{node.name or 'product'}_product"), factor.type
    output.meta[INFERRED] = True
    node.graph.insert_before(node, product)
    put_in_place(node, ir.node("Add", [output, bias], name=names.new(f"{node.name or 'add'}_bias")))
