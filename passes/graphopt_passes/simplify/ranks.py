"""Which ranks a value may have, by what is done with it afterwards.

Exporters write an If where the rank of a tensor depends on its sizes, as for squeeze, although what
follows accepts one rank only: with any other, the model does not run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir

from graphopt.operators import RECURRENT, all_graphs, is_onnx, subgraphs
from graphopt.rewriting import input_of, stated_integers
from graphopt.skeleton import known_shape

FARTHEST = 40
"""How many nodes are followed, one after the other."""

_SAME_RANK = frozenset(
    {
        "Abs",
        "Cast",
        "Clip",
        "Dropout",
        "Elu",
        "Erf",
        "Exp",
        "Identity",
        "LeakyRelu",
        "Log",
        "Neg",
        "Relu",
        "Sigmoid",
        "Softmax",
        "Sqrt",
        "Tanh",
    }
)
_CONVOLUTIONS = ("Conv", "ConvTranspose")
_POOLS = ("AveragePool", "LpPool", "MaxPool")

Ranks = frozenset[int] | None
"""The ranks that are possible; None for any."""


class PossibleRanks:
    """The ranks with which what reads a value can run, for the values of one model."""

    def __init__(self, model: ir.Model) -> None:
        self._owners = {
            body: node for graph in all_graphs(model) for node in graph for body in subgraphs(node)
        }

    def of(self, value: ir.Value, farthest: int = FARTHEST) -> Ranks:
        """The ranks that a value may have."""
        if farthest == 0 or not isinstance(value.graph, ir.Graph):
            return None
        found = self._of_result(value, farthest - 1)
        inside: dict[ir.Node, list[tuple[ir.Node, int]]] = {}
        for use in value.uses():
            if use.node.graph is value.graph:
                found = _both(found, self._at(use.node, use.idx, farthest - 1))
                continue
            owner = self._owner(use.node, value.graph)
            if owner is not None and is_onnx(owner, "If"):
                inside.setdefault(owner, []).append((use.node, use.idx))
        for owner, uses in inside.items():
            found = _both(found, self._in_branches(owner, uses, farthest - 1))
        return found

    def _in_branches(
        self, node: ir.Node, uses: Iterable[tuple[ir.Node, int]], farthest: int
    ) -> Ranks:
        """One branch of an If runs, so that what either accepts is possible."""
        possible: frozenset[int] = frozenset()
        for branch in subgraphs(node):
            accepted: Ranks = None
            for reader, index in uses:
                if reader.graph is branch:
                    accepted = _both(accepted, self._at(reader, index, farthest))
            if accepted is None:
                return None
            possible |= accepted
        return possible

    def _of_result(self, value: ir.Value, farthest: int) -> Ranks:
        """What the output of an If demands of a value that one of its branches gives."""
        graph = value.graph
        node = self._owners.get(graph) if isinstance(graph, ir.Graph) else None
        if not value.is_graph_output() or node is None or not is_onnx(node, "If"):
            return None
        assert isinstance(graph, ir.Graph)
        found: Ranks = None
        for output, result in zip(node.outputs, graph.outputs, strict=True):
            if result is value:
                found = _both(found, self.of(output, farthest))
        return found

    def _owner(self, node: ir.Node, graph: ir.Graph) -> ir.Node | None:
        """The node of a graph in one of whose bodies another node is."""
        while node.graph is not graph:
            parent = self._owners.get(node.graph) if isinstance(node.graph, ir.Graph) else None
            if parent is None:
                return None
            node = parent
        return node

    def _at(self, node: ir.Node, index: int, farthest: int) -> Ranks:
        """The ranks that a node accepts at an input."""
        stated = _stated_ranks(node, index)
        shift = _shift(node) if index == 0 else None
        if stated is not None or shift is None:
            return stated
        after = self.of(node.outputs[0], farthest)
        return None if after is None else frozenset(rank + shift for rank in after)


def _both(first: Ranks, second: Ranks) -> Ranks:
    if first is None or second is None:
        return second if first is None else first
    return first & second


def _stated_ranks(node: ir.Node, index: int) -> Ranks:
    """The ranks that onnxruntime accepts at an input; None where that depends."""
    if is_onnx(node, *RECURRENT):
        return frozenset({3}) if index in (0, 5, 6) else None
    if is_onnx(node, "Gemm") and index < 2:
        # The first may be a vector, the specification notwithstanding.
        return frozenset({1, 2}) if index == 0 else frozenset({2})
    if index != 0:
        return None
    if is_onnx(node, *_CONVOLUTIONS):
        weight = known_shape(input_of(node, 1))
        return None if weight is None else frozenset({len(weight)})
    if is_onnx(node, *_POOLS):
        kernel: Sequence[int] | None = node.attributes.get_ints("kernel_shape")
        return None if kernel is None else frozenset({2 + len(kernel)})
    if is_onnx(node, "Transpose"):
        order = node.attributes.get_ints("perm")
        return None if order is None else frozenset({len(order)})
    return None


def _shift(node: ir.Node) -> int | None:
    """By how much the rank of the first input is above that of the output."""
    if is_onnx(node, *_SAME_RANK):
        return 0
    if not is_onnx(node, "Squeeze", "Unsqueeze"):
        return None
    axes = stated_integers(node, "axes", 1)
    if not axes:
        return None
    return len(axes) if is_onnx(node, "Squeeze") else -len(axes)
