"""inline-branches: put the branch that an If always takes where the If is."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt.operators import all_graphs, is_onnx
from graphopt.rewriting import (
    Names,
    add_initializer,
    can_replace,
    constant_tensor,
    remove_node,
    replace_value,
)
from graphopt.skeleton import known_shape
from graphopt_passes.simplify.ranks import PossibleRanks, Ranks


@dataclass(frozen=True)
class InlineBranches(Pass):
    """Put the branch that an If always takes where the If is, in subgraphs too.

    That is where its condition is a constant, or where the other branch gives a tensor of a rank
    with which what follows cannot run (`squeeze` is exported like that). The initializers of the
    branch move along, and what has the name of another value gets a new one.
    """

    name: ClassVar[str] = "inline-branches"
    effect: ClassVar[Effect] = Effect.EXACT
    operators: ClassVar[frozenset[str] | None] = frozenset({"If"})

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Outer before inner, so that a branch is looked into once it is inlined."""
        change = Change()
        found = _constant_ifs(model)
        names, taken = Names(model), _names(model) if found else Counter[str]()
        while found:
            for node, branch in found:
                _inline(node, branch, names, taken)
                change.count("branch of If inlined")
            found = _constant_ifs(model)
        return change


def _constant_ifs(model: ir.Model) -> list[tuple[ir.Node, ir.Graph]]:
    """The Ifs of one level that always take the same branch, and that branch."""
    ranks = None
    for graph in all_graphs(model):
        found = []
        for node in graph:
            if not is_onnx(node, "If"):
                continue
            ranks = ranks or PossibleRanks(model)
            branch = _branch(node, ranks)
            if branch is not None:
                found.append((node, branch))
        if found:
            return found
    return []


def _branch(node: ir.Node, ranks: PossibleRanks) -> ir.Graph | None:
    """The branch that is always taken."""
    attributes = [node.attributes.get(name) for name in ("then_branch", "else_branch")]
    branches = [a.as_graph() for a in attributes if a is not None and not a.is_ref()]
    if len(branches) != 2:
        return None
    if any(b.inputs or len(b.outputs) != len(node.outputs) for b in branches):
        return None
    condition = constant_tensor(node.inputs[0])
    if condition is not None and condition.size == 1:
        return branches[0 if condition.numpy().reshape(()) else 1]
    accepted = [ranks.of(output) for output in node.outputs]
    possible = [b for b in branches if all(map(_fits, b.outputs, accepted))]
    return possible[0] if len(possible) == 1 else None


def _fits(result: ir.Value, accepted: Ranks) -> bool:
    """What reads the output of the If can run with this result of a branch."""
    shape = known_shape(result)
    return shape is None or accepted is None or len(shape) in accepted


def _names(model: ir.Model) -> Counter[str]:
    """How many values and nodes have each name; in two branches it may be the same."""
    return Counter(
        item.name
        for graph in all_graphs(model)
        for item in (*graph.initializers.values(), *graph, *(o for n in graph for o in n.outputs))
        if item.name
    )


def _inline(node: ir.Node, branch: ir.Graph, names: Names, taken: Counter[str]) -> None:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    results = list(branch.outputs)
    branch.outputs.clear()
    for name, value in list(branch.initializers.items()):
        del branch.initializers[name]
        _rename(value, names, taken)
        graph.register_initializer(value)
    for inner in list(branch):
        branch.remove(inner)
        items: list[ir.Node | ir.Value] = [inner, *inner.outputs]
        for item in items:
            _rename(item, names, taken)
        graph.insert_before(node, inner)
    for output, result in zip(node.outputs, results, strict=True):
        _state_scalars(output, result, names)
        if not can_replace(output, result):
            result = _passed_on(node, result, names)
        replace_value(output, result)
    remove_node(node)


def _state_scalars(output: ir.Value, result: ir.Value, names: Names) -> None:
    """Give each Range that reads the output the constant as a scalar.

    Of what an If gives it takes a tensor of one element too, of constants it does not.
    """
    while (maker := result.producer()) is not None and is_onnx(maker, "Identity"):
        (source,) = maker.inputs
        assert source is not None
        result = source
    tensor = constant_tensor(result)
    if tensor is None or tuple(tensor.shape.numpy()) != (1,):
        return
    for use in list(output.uses()):
        if is_onnx(use.node, "Range") and isinstance(use.node.graph, ir.Graph):
            name = names.new(f"{result.name}_scalar")
            scalar = add_initializer(use.node.graph, tensor.numpy().reshape(()), name)
            use.node.replace_input_with(use.idx, scalar)


def _rename(item: ir.Node | ir.Value, names: Names, taken: Counter[str]) -> None:
    if item.name and taken[item.name] > 1:
        taken[item.name] -= 1
        item.name = names.new(item.name)


def _passed_on(node: ir.Node, value: ir.Value, names: Names) -> ir.Value:
    """The output of a new Identity: a graph cannot return what is not made in it."""
    assert isinstance(node.graph, ir.Graph)
    made = ir.Node("", "Identity", [value], name=names.new(f"{value.name}_passed"))
    made.outputs[0].name = names.new(f"{value.name}_out")
    made.outputs[0].type, made.outputs[0].shape = value.type, value.shape
    node.graph.insert_before(node, made)
    return made.outputs[0]
