"""What the constants of each layer take on disk, by element type."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.contract import describe
from graphopt.operators import graphs_and_functions, is_onnx, subgraphs
from graphopt.packing import is_constant
from graphopt.rewriting import constant_tensor
from graphopt.sparse_tensors import is_marked, sparse_proto

_PASS_ON = (
    "Cast",
    "CastLike",
    "Expand",
    "Identity",
    "Reshape",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)
"""Exporters put them between a weight and the node that it belongs to."""


@dataclass(frozen=True)
class LayerSize:
    """The constants of one node.

    Attributes:
        name: of the node, or of its first output.
        op_type: its operator, without its domain.
        dtype_bytes: bytes by element type, as ONNX calls it in lower case ("float", "int8"). What
            several nodes read counts for the first of them.
    """

    name: str
    op_type: str
    dtype_bytes: Mapping[str, int]


def layer_sizes(model: ir.Model) -> tuple[LayerSize, ...]:
    """The nodes that read constants, in order, outer graphs before their bodies.

    Constants that nodes make into a weight (codes, scales, a codebook) are of the node that reads
    the weight. What they take is their data: names and the graph are not in it.

    Args:
        model: not modified.
    """
    counted = set[ir.Value]()
    behind: dict[ir.Value, list[ir.Value]] = {}
    found = []
    for graph in graphs_and_functions(model):
        for node in graph:
            read = list(_constants(node, behind))
            if _is_step(node, behind):
                behind.update(dict.fromkeys(node.outputs, read))
                continue
            own = [value for value in dict.fromkeys(read) if value not in counted]
            counted.update(own)
            if own:
                found.append(LayerSize(describe(node), node.op_type, _dtype_bytes(own)))
    return tuple(found)


def bytes_by_name(layers: Iterable[LayerSize]) -> dict[str, dict[str, int]]:
    """The bytes of layers by name, then by element type; those of one name are one."""
    sums: dict[str, Counter[str]] = {}
    for layer in layers:
        sums.setdefault(layer.name, Counter()).update(layer.dtype_bytes)
    return {name: dict(found) for name, found in sums.items()}


def dtype_totals(layers: Iterable[LayerSize]) -> dict[str, int]:
    """The bytes of all layers by element type, most first."""
    totals: Counter[str] = Counter()
    for layer in layers:
        totals.update(layer.dtype_bytes)
    return dict(sorted(totals.items(), key=lambda item: (-item[1], item[0])))


def _constants(node: ir.Node, behind: Mapping[ir.Value, list[ir.Value]]) -> Iterator[ir.Value]:
    for value in node.inputs:
        if value is None:
            continue
        if value in behind:
            yield from behind[value]
        elif is_constant(value) or value.is_initializer():
            yield value


def _is_step(node: ir.Node, behind: Mapping[ir.Value, list[ir.Value]]) -> bool:
    """The node makes something of constants alone, or passes one on."""
    values = [value for value in node.inputs if value is not None]
    if subgraphs(node) or not values:
        return False
    if is_onnx(node, *_PASS_ON):
        values = values[:1]
    return all(value in behind or is_constant(value) for value in values)


def _dtype_bytes(constants: Iterable[ir.Value]) -> dict[str, int]:
    sums: Counter[str] = Counter()
    for value in constants:
        tensor = constant_tensor(value) if is_constant(value) else value.const_value
        if tensor is not None:
            sums[tensor.dtype.name.lower()] += _stored_bytes(tensor)
    return dict(sums)


def _stored_bytes(tensor: ir.TensorProtocol) -> int:
    return sparse_proto(tensor, "").ByteSize() if is_marked(tensor) else tensor.nbytes
