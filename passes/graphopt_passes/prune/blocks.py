"""Residual blocks y = x + f(x), of which the branch f can be left out.

What a branch adds on the mean stays, as a constant. (Veit, Wilber and Belongie 2016,
arXiv 1605.06431: networks of residual blocks hardly miss one.)
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir

from graphopt.contract import Context, describe
from graphopt.observe import Question
from graphopt.operators import is_onnx, subgraphs
from graphopt.rewriting import Names, constant_tensor
from graphopt.statistics import Spread


@dataclass(frozen=True, eq=False)
class Block:
    """A residual block of the main graph.

    Attributes:
        add: the sum.
        branch: what is added and can be left out.
        nodes: that nothing but the branch needs.
        axis: of the channels of the branch.
    """

    add: ir.Node
    branch: ir.Value
    nodes: frozenset[ir.Node]
    axis: int

    @property
    def name(self) -> str:
        """By which a user finds it."""
        return describe(self.add)

    @cached_property
    def question(self) -> Question:
        """On what the branch adds."""
        return Question(self.branch.name or "", "spread", axis=self.axis)


def blocks_of(model: ir.Model, macs: Mapping[ir.Node, int | None]) -> list[Block]:
    """The residual blocks of a model, in order.

    Args:
        model: with inferred shapes.
        macs: multiply-accumulates by node. A branch without any is none.
    """
    found, places = [], places_of(model)
    for node in model.graph:
        if is_onnx(node, "Add"):
            found += _blocks_at(node, macs, places)
    return found


def _blocks_at(
    add: ir.Node, macs: Mapping[ir.Node, int | None], places: Mapping[ir.Node, int]
) -> list[Block]:
    """The branch of a sum whose other side is there without it."""
    sides = []
    for value, other in (add.inputs, tuple(reversed(add.inputs))):
        if value is None or other is None or value is other:
            return []
        nodes = _needed_by(value, add, places)
        sides.append((value, other, nodes, sum(macs.get(node) or 0 for node in nodes)))
    working = [side for side in sides if side[3]]
    if len(working) != 1:
        return []
    value, other, nodes, _ = working[0]
    if not _is_alike(value, other, add.outputs[0]) or constant_tensor(other) is not None:
        return []
    rank = value.shape.rank() if value.shape is not None else 0
    axis = 1 if rank > 3 or any(is_onnx(node, "Conv") for node in nodes) else rank - 1
    size = value.shape[axis] if value.shape is not None and rank else None
    return [Block(add, value, nodes, axis)] if isinstance(size, int) else []


def _is_alike(*values: ir.Value) -> bool:
    shapes = {tuple(map(str, v.shape)) if v.shape is not None else None for v in values}
    return (
        len(shapes) == 1
        and None not in shapes
        and all(v.dtype in (None, ir.DataType.FLOAT) for v in values)
    )


def _needed_by(
    value: ir.Value, reader: ir.Node, places: Mapping[ir.Node, int]
) -> frozenset[ir.Node]:
    """The nodes that nothing but a reader of the value needs.

    They are looked at from the last to the first, so that what reads one is decided before it.
    """
    found: set[ir.Node] = set()
    waiting: list[tuple[int, ir.Node]] = []
    seen: set[ir.Node] = set()

    def look_at(values: Iterable[ir.Value | None]) -> None:
        for node in dict.fromkeys(v.producer() for v in values if v is not None):
            if node is not None and node in places and node not in seen:
                seen.add(node)
                heapq.heappush(waiting, (-places[node], node))

    look_at([value])
    while waiting:
        _, node = heapq.heappop(waiting)
        readers = {u.node for o in node.outputs if o is not value for u in o.uses()}
        if value in node.outputs:
            readers |= {use.node for use in value.uses()} - {reader}
        if any(o.is_graph_output() for o in node.outputs) or not readers <= found:
            continue
        if not any(subgraphs(node)):
            found.add(node)
            look_at(node.inputs)
    return frozenset(found)


def places_of(model: ir.Model) -> dict[ir.Node, int]:
    """Where each node of the main graph stands."""
    return {node: place for place, node in enumerate(model.graph)}


def means_of(blocks: Iterable[Block], model: ir.Model, context: Context) -> dict[Block, np.ndarray]:
    """What each branch adds on the mean, float64 [channels]; without those that never ran."""
    asked = {block: block.question for block in blocks}
    answers = context.observe(model, asked.values(), remembers=False) if asked else {}
    found = {}
    for block, question in asked.items():
        spread = answers[question]
        assert isinstance(spread, Spread)
        if spread.channel_count:
            found[block] = spread.channel_sum / spread.channel_count
    return found


def drop_branch(
    model: ir.Model,
    output: ir.Value,
    branch: ir.Value,
    means: np.ndarray,
    axis: int,
    context: Context,
) -> None:
    """Let a sum add a constant in the place of a branch.

    Args:
        model: rewritten in place.
        output: of the sum.
        branch: of the model; what only it needs is removed.
        means: [channels], of the branch.
        axis: of the channels of the branch.
        context: keeps the constant.
    """
    add = output.producer()
    assert add is not None and branch.shape is not None and branch.dtype is not None
    shape = [1] * branch.shape.rank()
    shape[axis] = -1
    names = Names(model)
    constant = means.astype(branch.dtype.numpy()).reshape(shape)
    nodes = _needed_by(branch, add, places_of(model))
    mean = context.initializer(model.graph, constant, names.new(f"{branch.name}_mean"))
    add.replace_input_with(list(add.inputs).index(branch), mean)
    model.graph.remove(nodes, safe=True)
