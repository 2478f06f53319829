"""What rewrites of nodes that follow one another have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.contract import Change, Context
from graphopt.operators import NodeIndex, is_onnx, opset_of
from graphopt.rewriting import (
    Names,
    add_initializer,
    input_of,
    is_read,
    only_reader,
    replace_value,
    small_integers,
    stated_integers,
    why_too_old,
)
from graphopt.skeleton import known_shape

FIRST_OPSET = 13
"""From it on, axes, starts, pads and split sizes are inputs, and constants that a pass may make."""

FIRST_IR_VERSION = 4
"""Before it, every initializer is an input as well, and a pass adds no inputs."""


def why_refused(model: ir.Model, first_opset: int = FIRST_OPSET) -> str | None:
    """Why a pass that writes constants for this opset must not run; None when it may."""
    if model.ir_version < FIRST_IR_VERSION:
        return f"IR version {model.ir_version} has no constant initializers; raise it first"
    return why_too_old(model, first_opset)


Rule = Callable[[ir.Node, "Rewriter"], object]
"""Rewrites a node and counts it, or leaves it alone."""


class Rewriter:
    """Lets nodes of a model become other nodes, and records it in a Change."""

    def __init__(self, model: ir.Model, context: Context) -> None:
        self.opset = opset_of(model)
        self.change = Change()
        self._model = model
        self._index = context.index_of(model)
        self._indexed_changes = 0
        self._names: Names | None = None

    def nodes(self, *op_types: str) -> list[ir.Node]:
        """The nodes of these operators, in all graphs, each graph from its inputs onwards."""
        changes = self.change.counts.total()
        if changes != self._indexed_changes:
            self._index, self._indexed_changes = NodeIndex(self._model), changes
        return self._index.of(*op_types)

    def rewrite(self, rule: Rule, *op_types: str) -> None:
        """Apply a rule to every node of these operators, until it finds nothing any more."""
        done, skipped_before = -1, len(self.change.skips)
        while done != self.change.counts.total():
            done = self.change.counts.total()
            del self.change.skips[skipped_before:]
            for node in self.nodes(*op_types):
                if node.graph is not None:
                    rule(node, self)

    def constant(self, node: ir.Node, array: np.ndarray, what: str) -> ir.Value:
        """A new initializer beside a node."""
        assert isinstance(node.graph, ir.Graph)
        return add_initializer(node.graph, array, self._name(f"{node.outputs[0].name}_{what}"))

    def _name(self, hint: str) -> str:
        if self._names is None:
            self._names = Names(self._model)
        return self._names.new(hint)

    def integers(self, node: ir.Node, numbers: Sequence[int], what: str) -> ir.Value:
        """A new initializer of int64 beside a node."""
        return self.constant(node, np.asarray(numbers, np.int64), what)

    def become(
        self,
        node: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Sequence[ir.Attr] = (),
    ) -> None:
        """Let a node be another operator of the same outputs; what nothing reads any more goes."""
        before = [value.producer() for value in node.inputs if value is not None]
        node.op_type = op_type
        node.attributes.clear()
        node.attributes.update({attribute.name: attribute for attribute in attributes})
        node.resize_inputs(len(inputs))
        for index, value in enumerate(inputs):
            node.replace_input_with(index, value)
        for maker in before:
            remove_if_unread(maker)

    def insert(
        self,
        place: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Sequence[ir.Attr],
        values: Sequence[ir.Value],
    ) -> None:
        """Make a node before another, whose outputs take the place and the names of values."""
        assert isinstance(place.graph, ir.Graph)
        name = self._name(place.name or op_type)
        node = ir.Node("", op_type, inputs, attributes, num_outputs=len(values), name=name)
        place.graph.insert_before(place, node)
        makers = [value.producer() for value in values]
        for old, new in zip(values, node.outputs, strict=True):
            new.type, new.shape = old.type, known_shape(old)
            if not old.is_graph_output():
                new.name, old.name = old.name, None
            replace_value(old, new)
        for maker in makers:
            remove_if_unread(maker)


def remove_if_unread(node: ir.Node | None) -> None:
    """Remove a node of a graph that nothing reads, and those before it that only it read."""
    waiting = [node]
    while waiting:
        unread = waiting.pop()
        if unread is None or not isinstance(unread.graph, ir.Graph):
            continue
        if is_read(unread):
            continue
        waiting += [value.producer() for value in unread.inputs if value is not None]
        unread.graph.remove(unread, safe=True)


def maker_of(value: ir.Value | None, reader: ir.Node, *op_types: str) -> ir.Node | None:
    """The node of one of these operators that makes the value, beside its reader."""
    node = value.producer() if value is not None else None
    if node is None or node.graph is not reader.graph or not is_onnx(node, *op_types):
        return None
    return node


def maker_for(value: ir.Value | None, reader: ir.Node, *op_types: str) -> ir.Node | None:
    """As `maker_of`, when nothing else reads what it makes."""
    node = maker_of(value, reader, *op_types)
    return node if node is not None and value is not None and only_reader(value) else None


def rank_of(value: ir.Value | None) -> int | None:
    """How many dimensions a value has; None when that is not known."""
    shape = known_shape(value)
    return None if shape is None else len(shape)


def sizes_of(value: ir.Value | None) -> tuple[int | None, ...] | None:
    """The dimensions, None for each that is not known; None where not even the rank is."""
    shape = known_shape(value)
    return None if shape is None else tuple(d if isinstance(d, int) else None for d in shape)


def axes_of(axes: Sequence[int] | None, rank: int | None) -> tuple[int, ...] | None:
    """The axes counted from the front; None when one is not known, out of range or there twice."""
    if axes is None or rank is None:
        return None
    places = tuple(axis + rank if axis < 0 else axis for axis in axes)
    valid = len(set(places)) == len(places) and all(0 <= place < rank for place in places)
    return places if valid else None


def size_at(value: ir.Value | None, axis: int) -> int | None:
    """The size of a value along an axis that counts from the front; None when not known."""
    sizes = sizes_of(value)
    return sizes[axis] if sizes is not None and axis < len(sizes) else None


def axis_attribute(node: ir.Node, rank: int | None, default: int = 0) -> int | None:
    """The axis that an attribute states, counted from the front; None when it is not known."""
    axes = axes_of((node.attributes.get_int("axis", default),), rank)
    return None if axes is None else axes[0]


# ------------------------------------------------------------------ parts of a value

Bounds = tuple[int, int, int]
"""Start, end and step of a slice, as Python and ONNX understand them."""


def bounds_of(node: ir.Node) -> dict[int, Bounds] | None:
    """What a Slice takes, by axis; None when it is not all known, or runs backwards."""
    starts, ends = stated_integers(node, "starts", 1), stated_integers(node, "ends", 2)
    axes, steps = stated_integers(node, "axes", 3), stated_integers(node, "steps", 4)
    if not starts or ends is None or axes is None or steps is None:
        return None
    count = len(starts)
    places = axes_of(axes or range(count), rank_of(node.inputs[0]))
    steps = steps or (1,) * count
    if places is None or not count == len(ends) == len(places) == len(steps) or min(steps) < 1:
        return None
    return dict(zip(places, zip(starts, ends, steps, strict=True), strict=True))


@dataclass(frozen=True)
class Part:
    """All that lies between two places along one axis of a value."""

    source: ir.Value
    axis: int
    start: int
    end: int


def part_of(value: ir.Value | None, reader: ir.Node) -> Part | None:
    """The value as a part of another, if it is a Slice or an output of Split beside its reader."""
    node = maker_of(value, reader, "Slice", "Split")
    if node is None or node.inputs[0] is None:
        return None
    if is_onnx(node, "Slice"):
        return _sliced_part(node, node.inputs[0])
    axis = axis_attribute(node, rank_of(node.inputs[0]))
    sizes = None if axis is None else split_sizes(node, axis)
    if axis is None or sizes is None:
        return None
    place = next(i for i, output in enumerate(node.outputs) if output is value)
    start = sum(sizes[:place])
    return Part(node.inputs[0], axis, start, start + sizes[place])


def _sliced_part(node: ir.Node, source: ir.Value) -> Part | None:
    bounds = bounds_of(node)
    if bounds is None or len(bounds) != 1:
        return None
    ((axis, part),) = bounds.items()
    size = size_at(source, axis)
    taken = range(size)[slice(*part)] if size is not None else None
    if taken is None or taken.step != 1 or not taken:
        return None
    return Part(source, axis, taken.start, taken.stop)


def split_sizes(node: ir.Node, axis: int) -> tuple[int, ...] | None:
    """The sizes of all outputs of a Split; None when one is not known."""
    stated = small_integers(input_of(node, 1))
    if stated is not None:
        return stated if len(stated) == len(node.outputs) else None
    if input_of(node, 1) is not None:
        return None
    sizes = [size_at(output, axis) for output in node.outputs]
    return None if None in sizes else tuple(s for s in sizes if s is not None)
