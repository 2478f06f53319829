"""lift-constants: turn Constant nodes into initializers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt.operators import all_graphs, is_onnx
from graphopt.rewriting import add_initializer, node_tensor


@dataclass(frozen=True)
class LiftConstants(Pass):
    """Turn Constant nodes into initializers of their graph, in subgraphs too.

    onnxruntime does the same at load. In the file it brings all weights into one place, where they
    can be pruned, shared, memory-mapped and put into external data.
    """

    name: ClassVar[str] = "lift-constants"
    effect: ClassVar[Effect] = Effect.EXACT
    operators: ClassVar[frozenset[str] | None] = frozenset({"Constant"})

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Lift every Constant node whose value is not itself an output."""
        change = Change()
        for graph in all_graphs(model):
            for node in graph:
                if is_onnx(node, "Constant"):
                    _lift(graph, node, change)
        return change


def _lift(graph: ir.Graph, node: ir.Node, change: Change) -> None:
    tensor = node_tensor(node)
    (old,) = node.outputs
    if tensor is None:
        change.skip(node, "its value is sparse or given by a function's attribute")
        return
    if old.is_graph_output():
        change.skip(node, "its value is an output of the graph, which a node must make")
        return
    name = old.name
    assert name is not None
    # The initializer takes the name; the old value lets go of it first.
    old.name = None
    value = add_initializer(graph, tensor, name)
    old.replace_all_uses_with(value)
    graph.remove(node, safe=True)
    change.count("Constant lifted")
