"""Two models that run side by side as one, so that their values can be compared."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from graphopt.operators import all_graphs
from graphopt.rewriting import Names


def side_by_side(model: ir.Model, before: ir.Model) -> tuple[ir.Model, dict[str, ir.Value]]:
    """A model that computes what both do, of the same inputs.

    Args:
        model: not modified; its outputs are those of the twin.
        before: not modified; of the same inputs.

    Returns:
        The twin, and what nodes of `before` make in it, by the names that it had.
    """
    twin, other = model.clone(), before.clone()
    names = Names(twin)
    other.graph.outputs.clear()
    for given, own in zip(other.graph.inputs, twin.graph.inputs, strict=True):
        given.replace_all_uses_with(own)
    theirs = {output.name or "": output for node in other.graph for output in node.outputs}
    other.graph.inputs.clear()
    for graph in all_graphs(other):
        _rename(graph, names)
    for name, value in list(other.graph.initializers.items()):
        del other.graph.initializers[name]
        if not value.uses():
            # An input with a default, for which that of the twin stands.
            continue
        twin.graph.initializers.add(value)
    nodes = list(other.graph)
    other.graph.remove(nodes)
    twin.graph.extend(nodes)
    return twin, theirs


def values_of(model: ir.Model, names: Iterable[str]) -> list[ir.Value]:
    """The values of the main graph that are called so."""
    known = {value.name: value for value in model.graph.inputs}
    known.update((output.name, output) for node in model.graph for output in node.outputs)
    return [known[name] for name in names]


def _rename(graph: ir.Graph, names: Names) -> None:
    """Names that the other model has not; nodes need none."""
    made = [output for node in graph for output in node.outputs if output.name]
    for node in graph:
        node.name = ""
    for value in (*made, *graph.initializers.values()):
        value.name = names.new(f"{value.name}_before")
