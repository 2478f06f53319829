"""What becomes of the nodes that a pattern covers: one node in their place.

A pass states rules, each a pattern and what is made of it, and `fuse_all` does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt.contract import Change, Context
from graphopt.operators import NodeIndex
from graphopt.rewriting import Names, why_too_old
from graphopt.skeleton import known_shape
from graphopt_passes.fuse.misfit import Misfit
from graphopt_passes.fuse.pattern import STEPS_MAXIMUM, Match, Pattern

READERS_MAXIMUM = 4
"""No pattern has more readers of a value within."""


@dataclass(frozen=True)
class Permuted:
    """A value with its axes in another order, for which a Transpose is made."""

    value: ir.Value
    order: tuple[int, ...]


@dataclass(frozen=True)
class Fused:
    """The node that takes the place of all that a pattern covers.

    Attributes:
        op_type: of the standard domain.
        inputs: in order; an array becomes an initializer.
        attributes: numbers, texts, or what another node has, by name.
    """

    op_type: str
    inputs: Sequence[ir.Value | np.ndarray | Permuted]
    attributes: Mapping[str, float | int | str | ir.Attr] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """What is looked for, and what is made of it.

    Attributes:
        pattern: what is looked for.
        anchor: an operator that is in it for certain, or several apart by "|" one of which is. The
            rarer it is, the less is looked at.
        fused: the node in its place. None where the match is not what is meant; raises `Misfit`
            where it nearly is.
    """

    pattern: Pattern
    anchor: str
    fused: Callable[[Match], Fused | None]


def fuse_all(model: ir.Model, context: Context, first_opset: int, *rules: Rule) -> Change:
    """Apply rules wherever they fit, in subgraphs too, until none does.

    Nodes are met from the outputs backwards, so that of patterns that end in one another the
    largest is taken. At one node the first rule that fits counts.

    Args:
        model: rewritten in place.
        context: of the run.
        first_opset: that has the operators which the rules make.
        rules: in the order in which they are tried.

    Returns:
        What was fused, and with its reason what was not.
    """
    total, names, too_old = Change(), Names(model), why_too_old(model, first_opset)
    index = context.index_of(model)
    while True:
        change = Change()
        anchors = {rule.anchor: index.by_graph(*rule.anchor.split("|")) for rule in rules}
        graphs = {graph for by_graph in anchors.values() for graph in by_graph}
        for graph in filter(graphs.__contains__, index.graphs):
            starts = {anchor: by_graph.get(graph, ()) for anchor, by_graph in anchors.items()}
            for match, fused in _matches(graph, starts, rules, too_old, change):
                _replace(match, fused, names, context)
                change.count(f"{fused.op_type} fused")
        total.counts.update(change.counts)
        if not change:
            total.skips = change.skips
            return total
        index = NodeIndex(model)


def _matches(
    graph: ir.Graph,
    anchors: Mapping[str, Sequence[ir.Node]],
    rules: Sequence[Rule],
    too_old: str | None,
    change: Change,
) -> Iterator[tuple[Match, Fused]]:
    """What can be fused, one after the other; what nearly can is told once, at its largest."""
    told: set[ir.Node] = set()
    candidates = _candidates(graph, anchors, rules)
    if not candidates:
        return
    for node in [node for node in reversed(graph) if node in candidates]:
        if node.graph is None:
            # It was fused away.
            continue
        for rule in candidates[node]:
            found = rule.pattern.find(node.outputs[0], Match(node))
            match = next((match for match in found if match.is_sound()), None)
            if match is None:
                continue
            try:
                fused = rule.fused(match)
                if fused is None:
                    continue
                match.check_private()
                if too_old is not None:
                    raise Misfit(too_old)
            except Misfit as reason:
                if node not in told:
                    change.skip(node, str(reason))
                told.update(match.nodes)
                continue
            yield match, fused
            break


def _candidates(
    graph: ir.Graph, anchors: Mapping[str, Sequence[ir.Node]], rules: Sequence[Rule]
) -> dict[ir.Node, list[Rule]]:
    """The rules for which a node can be the last: those with an anchor not far before it."""
    candidates: dict[ir.Node, list[Rule]] = {}
    near = {anchor: _near(graph, starts) for anchor, starts in anchors.items()}
    for rule in rules:
        roots = rule.pattern.roots()
        for node in near[rule.anchor]:
            if node.op_type in roots and len(node.outputs) == 1:
                candidates.setdefault(node, []).append(rule)
    return candidates


def _near(graph: ir.Graph, starts: Iterable[ir.Node]) -> dict[ir.Node, None]:
    """The nodes themselves, and what a few steps lead to over values with few readers."""
    found = dict.fromkeys(starts)
    frontier = list(found)
    for _ in range(STEPS_MAXIMUM):
        outputs = [output for node in frontier for output in node.outputs]
        uses = [output.uses() for output in outputs]
        readers = {use.node: None for some in uses if len(some) <= READERS_MAXIMUM for use in some}
        frontier = [node for node in readers if node not in found and node.graph is graph]
        found.update(dict.fromkeys(frontier))
    return found


def _replace(match: Match, fused: Fused, names: Names, context: Context) -> None:
    """Let the last node compute it all; its output keeps its name, and the rest is removed."""
    root = match.root
    graph = root.graph
    assert isinstance(graph, ir.Graph)
    root.op_type, root.version = fused.op_type, None
    root.attributes.clear()
    for attribute in ir.convenience.convert_attributes(fused.attributes):
        root.attributes.add(attribute)
    root.resize_inputs(len(fused.inputs))
    for index, made in enumerate(fused.inputs):
        if isinstance(made, Permuted):
            made = _transpose_before(root, made, names)
        elif not isinstance(made, ir.Value):
            name = names.new(f"{root.outputs[0].name}_{index}")
            made = context.initializer(graph, made, name)
        root.replace_input_with(index, made)
    graph.remove(set(match.nodes) - {root}, safe=True)


def _transpose_before(node: ir.Node, permuted: Permuted, names: Names) -> ir.Value:
    value, graph = permuted.value, node.graph
    assert isinstance(graph, ir.Graph)
    made = ir.Value(name=names.new(f"{value.name}_permuted"), type=value.type)
    shape = known_shape(value)
    if shape is not None:
        made.shape = ir.Shape([shape[axis] for axis in permuted.order])
    order = ir.AttrInt64s("perm", permuted.order)
    name = names.new(f"{node.name or node.op_type}_transpose")
    graph.insert_before(node, ir.Node("", "Transpose", [value], [order], outputs=[made], name=name))
    return made
