"""drop-unused: remove nodes, initializers and functions that no output needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt.operators import subgraphs
from graphopt.rewriting import is_read, remove_node


@dataclass(frozen=True)
class DropUnused(Pass):
    """Remove nodes and initializers that no output depends on, in subgraphs too.

    This is initializer pruning: weights that nothing reads take space on disk and in memory.
    Functions that nothing calls go as well. Inputs stay, used or not: they are the interface.
    """

    name: ClassVar[str] = "drop-unused"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Remove what is unused, from the outputs backwards."""
        change = Change()
        _drop_from(model.graph, change)
        for function in model.functions.values():
            _drop_from(function.graph, change)
        _drop_functions(model, change)
        return change


def _drop_from(graph: ir.Graph, change: Change) -> None:
    # Backwards, so that the readers of a node are gone before the node is looked at.
    for node in reversed(graph):
        if not is_read(node):
            remove_node(node)
            change.count("node removed")
            continue
        for inner in subgraphs(node):
            _drop_from(inner, change)
    for name, value in list(graph.initializers.items()):
        if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
            del graph.initializers[name]
            change.count("initializer removed")


def _drop_functions(model: ir.Model, change: Change) -> None:
    if not model.functions:
        return
    called: set[ir.OperatorIdentifier] = set()
    waiting = [model.graph]
    while waiting:
        for node in waiting.pop():
            waiting.extend(subgraphs(node))
            key = node.op_identifier()
            if key in model.functions and key not in called:
                called.add(key)
                waiting.append(model.functions[key].graph)
    for key in [k for k in model.functions if k not in called]:
        del model.functions[key]
        change.count("function removed")
