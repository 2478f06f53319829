"""Weights with many zeros: stored without them, made dense, and dense while something is done."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.code_fields import Field
from graphopt.content import bits_of, read_array
from graphopt.contract import Change, Context
from graphopt.encoding import FIRST_OPSET, NODES_BYTES, Encoding, why_too_large
from graphopt.operators import ONNX_DOMAINS, all_graphs, is_onnx, opset_of
from graphopt.packing import is_packed, leads_to_places, nodes_behind, places_numbers
from graphopt.rewriting import (
    Names,
    become_initializer,
    constant_tensor,
    only_reader,
)
from graphopt.runtime import evaluate
from graphopt.sparse_encoding import Sparse, sparse_of
from graphopt.sparse_tensors import is_marked, mark_sparse, sparse_proto
from graphopt_passes.simplify.chains import remove_if_unread

MIN_ELEMENTS = 256

TYPES = frozenset(
    {
        ir.DataType.FLOAT,
        ir.DataType.FLOAT16,
        ir.DataType.BFLOAT16,
        ir.DataType.DOUBLE,
        ir.DataType.INT8,
    }
)

_READ_CODES = ("Cast", "DequantizeLinear")


# ------------------------------------------------------------------ packing


def packed_zeros(
    model: ir.Model, context: Context, change: Change, min_elements: int = MIN_ELEMENTS
) -> None:
    """Store weights without their zeros, bit for bit, where that takes fewer bytes.

    What is packed so already stays as it is.

    Args:
        model: rewritten in place; of opset 13 or later.
        context: keeps what is large.
        change: told what was done.
        min_elements: smaller weights stay.
    """
    found, negative = list[tuple[int, ir.Value]](), 0
    for value in _weights(model, min_elements):
        look = _look(value)
        negative += look.negative_zeros
        if look.gain_bytes > 0:
            found.append((look.gain_bytes, value))
    found.sort(key=lambda one: -one[0])
    if negative:
        change.note(f"{negative:,} zeros are -0.0 and are stored, so that weights stay bit for bit")
    names, tables = Names(model), defaultdict[ir.Graph, set[Field]](set)
    encodings: dict[ir.Graph, Encoding] = {}
    for gain, value in found:
        graph, sparse = value.graph, _sparse(value)
        assert isinstance(graph, ir.Graph) and sparse is not None
        used = sparse.placement.field
        needed = {used} if used is not None and used.digits > 1 else set()
        # The tables of digits are stored once for all of a graph.
        if gain <= sum(f.table().nbytes for f in needed - tables[graph]):
            continue
        tables[graph].update(needed)
        if graph not in encodings:
            encodings[graph] = Encoding(graph, names, context.tensor)
        context.progress(f"packing {value.name}")
        _pack(value, sparse, encodings[graph])
        change.count("weight stored without its zeros")
    for encoding in encodings.values():
        encoding.close()


def _weights(model: ir.Model, min_elements: int) -> Iterator[ir.Value]:
    """Initializers that nodes of the standard read, or that are codes which these widen."""
    for graph in all_graphs(model):
        for value in list(graph.initializers.values()):
            tensor = value.const_value
            if tensor is None or tensor.dtype not in TYPES or tensor.size < min_elements:
                continue
            if value.is_graph_input() or value.is_graph_output() or not value.uses():
                continue
            if why_too_large(tensor.size, ir.DataType.INT32) is not None:
                continue
            if all(_may_be_computed(use.node, use.idx) for use in value.uses()):
                yield value


def _may_be_computed(node: ir.Node, index: int) -> bool:
    """The input of a node may be what other nodes compute at load."""
    if node.domain not in ONNX_DOMAINS:
        return False
    if not any(map(is_packed, node.outputs)):
        return True
    return index == 0 and is_onnx(node, *_READ_CODES) and not leads_to_places(node.outputs[0])


@dataclass(frozen=True)
class _Look:
    """What is seen of a weight.

    Attributes:
        gain_bytes: by how much the file shrinks, tables left out.
        negative_zeros: how many numbers are -0.0.
    """

    gain_bytes: int
    negative_zeros: int


def _look(value: ir.Value) -> _Look:
    tensor = value.const_value
    assert tensor is not None
    array, kind = read_array(tensor), bits_of(tensor)
    bits = _bits(tensor, array)
    zeros = bits.size - int(np.count_nonzero(bits))
    negative = 0
    if tensor.dtype.is_floating_point():
        negative = int(np.count_nonzero(bits == kind.type(1 << (8 * kind.itemsize - 1))))
    # Most weights have no zeros, and a bit is needed for each number where a few have.
    sparse = sparse_of(array) if zeros * kind.itemsize > NODES_BYTES else None
    gain_bytes = 0 if sparse is None else tensor.nbytes - sparse.stored_bytes
    return _Look(gain_bytes, negative)


def _bits(tensor: ir.TensorProtocol, array: np.ndarray) -> np.ndarray:
    """The numbers as unsigned integers, in one row."""
    return np.ascontiguousarray(array).reshape(-1).view(bits_of(tensor))


def _sparse(value: ir.Value) -> Sparse | None:
    assert value.const_value is not None
    return sparse_of(read_array(value.const_value))


def _pack(value: ir.Value, sparse: Sparse, encoding: Encoding) -> None:
    tensor, name = value.const_value, value.name or ""
    assert tensor is not None
    del encoding.graph.initializers[name]
    value.name = None
    packed = encoding.sparse(sparse, tensor.dtype, name)
    packed.meta.update(value.meta)
    value.replace_all_uses_with(packed)


def marked_zeros(
    model: ir.Model, context: Context, change: Change, min_elements: int = MIN_ELEMENTS
) -> None:
    """Let the file hold weights as `sparse_initializer`, where that takes fewer bytes.

    Args:
        model: rewritten in place: weights of the main graph get another, equal tensor.
        context: keeps what is large.
        change: told what was done.
        min_elements: smaller weights stay.
    """
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.dtype not in TYPES or tensor.size < min_elements:
            continue
        if is_marked(tensor) or value.is_graph_input():
            continue
        array = read_array(tensor)
        stored = int(np.count_nonzero(_bits(tensor, array)))
        # An index takes a byte at least.
        least_bytes = stored * (tensor.dtype.itemsize + 1)
        if least_bytes >= tensor.nbytes or sparse_proto(tensor, "").ByteSize() >= tensor.nbytes:
            continue
        value.const_value = context.tensor(array, name, tensor.dtype)
        mark_sparse(value.const_value)
        change.count("weight written as sparse_initializer")


# ------------------------------------------------------------------ and back


def dense_zeros(model: ir.Model, context: Context) -> int:
    """Let plain initializers of the same names take the place of weights without zeros.

    Those of which the other numbers are codes stay packed.

    Args:
        model: rewritten in place.
        context: keeps what is large.

    Returns:
        How many there were.
    """
    found = 0
    for graph in all_graphs(model):
        ends = [_end(node) for node in graph if places_numbers(node) and _are_plain(node)]
        order = {node: place for place, node in enumerate(graph)} if ends else {}
        for end in ends:
            if end.is_graph_output():
                continue
            nodes = sorted(nodes_behind(end) or (), key=order.__getitem__)
            (array,) = evaluate(nodes, [end], model.opset_imports)
            node = end.producer()
            become_initializer(end, context.tensor(array, end.name or "", end.dtype))
            remove_if_unread(node)
            found += 1
    return found


def _are_plain(node: ir.Node) -> bool:
    """The numbers that a node puts in places are stored as they are, or in 16 bits."""
    numbers = node.inputs[2 if is_onnx(node, "ScatterElements") else 0]
    cast = numbers.producer() if numbers is not None else None
    if cast is not None and is_onnx(cast, "Cast"):
        numbers = cast.inputs[0]
    return constant_tensor(numbers) is not None


def _end(node: ir.Node) -> ir.Value:
    """The weight in its shape."""
    reader = only_reader(node.outputs[0])
    if reader is not None and reader.graph is node.graph and is_onnx(reader, "Reshape"):
        return reader.outputs[0]
    return node.outputs[0]


@contextmanager
def unpacked_zeros(model: ir.Model, context: Context) -> Iterator[bool]:
    """Have weights dense that are stored without zeros, and store them so again in the end.

    Whatever has become of them: floats, or codes.

    Args:
        model: rewritten in place.
        context: keeps what is large.

    Yields:
        Whether there are any.
    """
    found = dense_zeros(model, context)
    yield found > 0
    if found and opset_of(model) >= FIRST_OPSET:
        packed_zeros(model, context, Change())
