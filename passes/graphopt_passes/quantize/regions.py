"""Which of the nodes that can work on codes do, so that no value changes form for nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx_ir as ir

from graphopt_passes.quantize.units import Unit


def chosen_units(graph: ir.Graph, units: Mapping[ir.Node, Unit]) -> list[Unit]:
    """The products, and whatever lies between them.

    Arithmetic and movement join where all they read is in codes already, or is an input of the
    graph, and where a product reads what comes of them. What leads to outputs only stays float:
    a last Softmax or Sigmoid keeps its precision, and boxes and scores that a last Concat joins
    keep a scale each.

    Args:
        graph: in topological order.
        units: the candidates, in order; products among them are taken.
    """
    coded: set[ir.Value] = {v for v in graph.inputs if not v.is_initializer()}
    joined: list[Unit] = []
    for unit in units.values():
        if unit.kind == "product" or all(s in coded for s in unit.sources):
            joined.append(unit)
            coded.update(unit.outputs)
    wanted: set[ir.Value] = set()
    kept: list[Unit] = []
    for unit in reversed(joined):
        if unit.kind == "product" or any(o in wanted for o in unit.outputs):
            kept.append(unit)
            wanted.update(unit.sources)
    return kept[::-1]


class SameScale:
    """Values that share scale and zero point, because movement passes codes from one to the other.

    A union of disjoint sets; the first value of each set stands for it.
    """

    def __init__(self) -> None:
        self._parent: dict[ir.Value, ir.Value] = {}

    def of(self, value: ir.Value) -> ir.Value:
        """The value that stands for the set."""
        while (parent := self._parent.get(value, value)) is not value:
            value = parent
        return value

    def join(self, first: ir.Value, others: Iterable[ir.Value]) -> None:
        """Let all these values share."""
        root = self.of(first)
        for other in others:
            self._parent[self.of(other)] = root
