"""Which nodes of a model the nodes of its optimized graph come from.

onnxruntime renames nodes and tensors, but what it makes of one carries its name: `x_nchwc`,
`InsertedPrecisionFreeCast_x`, `x/duplicated`. So every node and value of a copy gets a name with a
mark in it, and the marks are looked for in the names of the optimized graph.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.operators import ONNX_DOMAINS, all_graphs, graphs_and_functions

_MARK = re.compile(r"~(\d+)~")

CONVERSIONS = frozenset(
    {
        "Cast",
        "DequantizeLinear",
        "MemcpyFromHost",
        "MemcpyToHost",
        "QuantizeLinear",
        "ReorderInput",
        "ReorderOutput",
        "Reshape",
        "Transpose",
    }
)
"""Operators that onnxruntime inserts; they take over the name of the tensor that they convert."""

_VIEWS = frozenset({"Flatten", "Reshape", "Squeeze", "Unsqueeze"})
_TAILS = frozenset(
    {"Cast", "Clip", "Dropout", "Identity", "QuantizeLinear", "Relu", "Reshape", "Transpose"}
)
"""What is fused into the node before it, rather than into the one behind."""

_STATIC = frozenset({"Constant", "Shape", "Size"})


@dataclass(frozen=True)
class Origin:
    """A node of the model as it was given.

    Attributes:
        name: its name, or that of its first output where it has none of its own.
        operator: `Op`, or `domain.Op` outside the standard domain.
    """

    name: str
    operator: str


@dataclass(frozen=True)
class Marked:
    """A model whose names say which node they are of.

    Attributes:
        model: the copy.
        nodes: all its nodes; the mark is the index.
        origins: what each of them was called.
    """

    model: ir.Model
    nodes: tuple[ir.Node, ...]
    origins: tuple[Origin, ...]


@dataclass(frozen=True)
class Fates:
    """Where the nodes of a model went.

    Attributes:
        sources: of each node of the optimized graph, the indices of the nodes that it computes; ()
            for one that onnxruntime inserted.
        kernels: of the index of each node, the node of the optimized graph; the others were
            computed at load, or are not needed.
        own: the indices of nodes that are still there, if in another kernel; the others with a
            kernel were fused into it.
    """

    sources: Mapping[ir.Node, tuple[int, ...]]
    kernels: Mapping[int, ir.Node]
    own: frozenset[int]


def operator_of(node: ir.Node) -> str:
    """The operator, with the domain where it is not the standard one."""
    return node.op_type if node.domain in ONNX_DOMAINS else f"{node.domain}.{node.op_type}"


def mark(model: ir.Model) -> Marked:
    """A copy of the model with marks for names. Inputs and initializers keep theirs."""
    copy = model.clone()
    nodes = tuple(node for graph in graphs_and_functions(copy) for node in graph)
    names = Counter(node.name for node in nodes)
    origins = []
    for index, node in enumerate(nodes):
        output = next((o.name for o in node.outputs if o.name), "")
        own_name = node.name if node.name and names[node.name] == 1 else None
        origins.append(Origin(own_name or output or f"node {index}", operator_of(node)))
        node.name = f"~{index}~"
        for place, value in enumerate(node.outputs):
            # Types that onnx-ir cannot hold are known by the name of the output.
            if value.name and not (value.is_graph_output() and value.type is None):
                value.name = f"~{index}~{place or ''}"
    return Marked(copy, nodes, tuple(origins))


def trace_back(marked: Marked, optimized: ir.Model) -> Fates:
    """Find the nodes of a marked model in what onnxruntime made of it."""
    claims = _claims(marked, optimized)
    kernels = {index: _likest(marked.nodes[index], found) for index, found in claims.items()}
    own = frozenset(kernels)
    indices = {node: index for index, node in enumerate(marked.nodes)}
    folded = _folded(marked, optimized, own)
    _place_tails(marked, indices, folded, kernels)
    _place_rest(marked, indices, folded, kernels)
    sources: dict[ir.Node, list[int]] = {}
    for index, kernel in sorted(kernels.items()):
        sources.setdefault(kernel, []).append(index)
    _add_copies(claims, sources)
    _add_parts(optimized, sources)
    return Fates({k: tuple(found) for k, found in sources.items()}, kernels, own)


def _claims(marked: Marked, optimized: ir.Model) -> dict[int, list[ir.Node]]:
    """The nodes of the optimized graph that carry the mark of each node."""
    claims: dict[int, list[ir.Node]] = {}
    for kernel in _nodes(optimized):
        for index in _marks(kernel):
            if index < len(marked.nodes) and _may_be(kernel, marked.nodes[index]):
                claims.setdefault(index, []).append(kernel)
    return claims


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    for graph in all_graphs(model):
        yield from graph


def _marks(kernel: ir.Node) -> list[int]:
    names = [kernel.name or "", *(value.name or "" for value in kernel.outputs)]
    return list(dict.fromkeys(int(found) for name in names for found in _MARK.findall(name)))


def _may_be(kernel: ir.Node, node: ir.Node) -> bool:
    if kernel.op_type not in CONVERSIONS or kernel.op_type == node.op_type:
        return True
    if kernel.op_type == "Cast" and node.op_type == "CastLike":
        return True
    return kernel.op_type in _VIEWS and node.op_type in _VIEWS


def _likest(node: ir.Node, kernels: Sequence[ir.Node]) -> ir.Node:
    """Of nodes with the same mark, the one that is of the operator, or has it in its name."""

    def distance(kernel: ir.Node) -> int:
        return 0 if kernel.op_type == node.op_type else 2 - (node.op_type in kernel.op_type)

    return min(kernels, key=distance)


def _folded(marked: Marked, optimized: ir.Model, own: frozenset[int]) -> frozenset[int]:
    """The nodes that need no input of the model, or only the shape of one: computed at load."""
    constants = {name for graph in all_graphs(optimized) for name in graph.initializers}
    found: set[int] = set()
    known: set[ir.Value] = set()
    for index, node in enumerate(marked.nodes):
        if index in own or node.op_type == "DequantizeLinear":
            continue
        made = any(value.name in constants for value in node.outputs)
        read = [v for v in node.inputs if v is not None]
        if made or node.op_type in _STATIC or all(v in known or _is_given(v) for v in read):
            found.add(index)
            known.update(node.outputs)
    return frozenset(found)


def _is_given(value: ir.Value) -> bool:
    return value.const_value is not None and not value.is_graph_input()


def _place_tails(
    marked: Marked,
    indices: Mapping[ir.Node, int],
    folded: frozenset[int],
    kernels: dict[int, ir.Node],
) -> None:
    for index, node in enumerate(marked.nodes):
        if index in kernels or index in folded or node.op_type not in _TAILS or not node.inputs:
            continue
        before = node.inputs[0].producer() if node.inputs[0] is not None else None
        kernel = kernels.get(indices[before]) if before is not None else None
        if kernel is not None and kernel.op_type not in CONVERSIONS:
            kernels[index] = kernel


def _place_rest(
    marked: Marked,
    indices: Mapping[ir.Node, int],
    folded: frozenset[int],
    kernels: dict[int, ir.Node],
) -> None:
    """What has left no trace was fused into the first node behind it that has."""
    for index in range(len(marked.nodes) - 1, -1, -1):
        if index in kernels or index in folded:
            continue
        readers = (r for v in marked.nodes[index].outputs for r in v.consumers())
        found = (kernels.get(indices[reader]) for reader in readers if reader in indices)
        kernel = next((k for k in found if k is not None), None)
        if kernel is not None:
            kernels[index] = kernel


def _add_copies(claims: Mapping[int, Sequence[ir.Node]], sources: dict[ir.Node, list[int]]) -> None:
    """A DequantizeLinear with several readers becomes as many."""
    for index, found in claims.items():
        for kernel in found:
            if kernel not in sources and kernel.op_type == "DequantizeLinear":
                sources[kernel] = [index]


def _add_parts(optimized: ir.Model, sources: dict[ir.Node, list[int]]) -> None:
    """A node without a mark is a part of the one behind it, which was taken apart."""
    for graph in all_graphs(optimized):
        behind: dict[ir.Node, list[int]] = {}
        for kernel in reversed(graph):
            if kernel in sources:
                behind[kernel] = sources[kernel]
                continue
            readers = [r for value in kernel.outputs for r in value.consumers()]
            found = next((behind[r] for r in readers if r in behind), None)
            if found is None or _MARK.search(kernel.name or ""):
                continue
            behind[kernel] = found
            if kernel.op_type not in CONVERSIONS | _VIEWS:
                sources[kernel] = list(found)
