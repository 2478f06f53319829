"""merge-duplicates: store equal initializers once."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.content import equal_groups
from graphopt.contract import Change, Context, Effect, Pass
from graphopt.operators import all_graphs
from graphopt.rewriting import Names, add_initializer
from graphopt_passes.share.lost_fusions import (
    BODY_CONV,
    WEIGHT_ONLY,
    feeds_conv_of_body,
    unshared_values,
)


@dataclass(frozen=True)
class MergeDuplicates(Pass):
    """Store initializers of equal type, shape and content once, whatever their size.

    Equal initializers of different subgraphs move to the main graph, where all of them see it.
    What onnxruntime fuses at load only while it is not shared stays as it is.
    Large tensors in external data are compared by a few probes first and hashed, a few MB at a
    time, only where those agree.
    """

    name: ClassVar[str] = "merge-duplicates"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Keep one of each group of equal initializers."""
        change = Change()
        names, unshared = Names(model), unshared_values(model, context)
        for group in equal_groups(_initializers(model), _tensor):
            for part in _mergeable(model, group, unshared, change):
                _merge(model, part, names, change)
        return change


def _initializers(model: ir.Model) -> list[ir.Value]:
    """The constant initializers of all graphs, outer before inner."""
    return [
        value
        for graph in all_graphs(model)
        for value in graph.initializers.values()
        if value.const_value is not None and not value.is_graph_input()
    ]


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value


def _mergeable(
    model: ir.Model, group: list[ir.Value], unshared: set[ir.Value], change: Change
) -> list[list[ir.Value]]:
    """The parts of a group that may be merged: one for all graphs, and those bound to theirs."""
    parts: dict[ir.Graph | None, list[ir.Value]] = defaultdict(list)
    for value in group:
        if value in unshared:
            change.skip(value, WEIGHT_ONLY)
        else:
            parts[value.graph if feeds_conv_of_body(value, model) else None].append(value)
    for graph, part in parts.items():
        if graph is not None and len(parts) > 1:
            change.skip(part[0], BODY_CONV)
    return list(parts.values())


def _merge(model: ir.Model, group: list[ir.Value], names: Names, change: Change) -> None:
    kept = next((v for v in group if v.graph is model.graph), group[0])
    if any(v.graph is not kept.graph for v in group) and kept.graph is not model.graph:
        assert kept.const_value is not None
        kept = add_initializer(model.graph, kept.const_value, names.new(kept.name or "shared"))
    for value in group:
        if value is kept:
            continue
        if value.is_graph_output():
            change.skip(value, "it is an output of its graph")
            continue
        value.replace_all_uses_with(kept)
        assert value.graph is not None and value.name is not None
        del value.graph.initializers[value.name]
        change.count("duplicate initializer merged")
