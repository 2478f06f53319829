"""fold-shapes: shape arithmetic in its shortest form, also where dimensions are not known."""

from __future__ import annotations

from collections import ChainMap
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt.operators import ONNX_DOMAINS, is_onnx, opset_of, subgraphs
from graphopt.packing import is_constant
from graphopt.rewriting import (
    Names,
    add_initializer,
    can_replace,
    input_of,
    is_read_as_scalar,
    replace_value,
    why_too_old,
)
from graphopt.shape_facts import ShapeFacts
from graphopt.shape_rules import Shape, slice_bounds
from graphopt.sizes import difference, may_not_be_negative
from graphopt_passes.simplify.chains import remove_if_unread

FIRST_OPSET = 7
"""Before it, operators broadcast by attributes."""

FIRST_IR_VERSION = 4
"""Before it, every initializer is an input as well, and a pass adds no inputs."""

SHAPE_HAS_ENDS = 15
"""From this opset on, Shape can give a part of a shape."""

TO_THE_END = 2**63 - 1
"""A Slice that ends here ends with the dimension."""


@dataclass(frozen=True)
class FoldShapes(Pass):
    """Shorten the arithmetic of shapes, whose dimensions may be known or not.

    Dimensions are followed as symbols through Shape, Gather, Concat, arithmetic, comparisons and
    Where (see `graphopt.shape_facts`). Then

    - what is a constant for every input becomes one, as a comparison of two equal sizes;
    - what was computed before, from whichever tensor, is not computed again;
    - a vector of dimensions of one tensor becomes a Shape with start and end, and a Concat of such
      vectors takes one instead of several;
    - a Reshape gets a constant shape where each size is known or that of its input at the same
      place, with one -1 at most where no size beside it can be 0;
    - Reshape, Expand and Slice that keep the shape go, and Slice to the end of a dimension ends
      there without computing it.
    """

    name: ClassVar[str] = "fold-shapes"
    effect: ClassVar[Effect] = Effect.EXACT
    operators: ClassVar[frozenset[str] | None] = frozenset(
        {"Expand", "Reshape", "Shape", "Size", "Slice"}
    )

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Where constants cannot be initializers, or operators broadcast by attributes."""
        if model.ir_version < FIRST_IR_VERSION:
            return f"IR version {model.ir_version} has no constant initializers; raise it first"
        return why_too_old(model, FIRST_OPSET)

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Fold in one walk in topological order, so that each node sees its inputs folded."""
        change = Change()
        scope = _Scope(ChainMap(), ChainMap())
        _Folding(ShapeFacts(model), Names(model), opset_of(model), change).fold(model.graph, scope)
        return change


_Content = tuple[ir.DataType | None, int, Shape]
"""Element type, rank and elements of what a node computes."""


@dataclass(frozen=True)
class _Scope:
    """What can be taken instead of being computed: of this graph and of those around it.

    Attributes:
        computed: values by their content.
        dimensions: tensors whose shape is asked for, with start and end, by those dimensions.
    """

    computed: ChainMap[_Content, ir.Value]
    dimensions: ChainMap[Shape, tuple[ir.Value, int, int]]

    def inner(self) -> _Scope:
        return _Scope(self.computed.new_child(), self.dimensions.new_child())


@dataclass
class _Folding:
    """The work on one model.

    Attributes:
        facts: what is known of its values.
        names: for new values.
        opset: of the model.
        change: where to record.
    """

    facts: ShapeFacts
    names: Names
    opset: int
    change: Change

    def fold(self, graph: ir.Graph, scope: _Scope) -> None:
        """Fold in a graph and in the graphs in it."""
        for node in graph:
            for body in subgraphs(node):
                self.fold(body, scope.inner())
            op_type = node.op_type
            if node.domain not in ONNX_DOMAINS or op_type == "Constant":
                continue
            if op_type in ("Reshape", "Expand", "Slice") and self._keeps_shape(node):
                continue
            if op_type == "Reshape":
                self._state_target(node)
            elif op_type == "Slice":
                self._state_ends(node)
            elif op_type == "Shape":
                self._note_dimensions(node, scope)
            for value in node.outputs:
                content = self.facts.content(value)
                if content is not None and (value.uses() or value.is_graph_output()):
                    self._shorten(node, value, content, scope)

    # -------------------------------------------------------------- values

    def _shorten(self, node: ir.Node, value: ir.Value, content: Shape, scope: _Scope) -> None:
        """Find another way to a value: a constant, one that is there, dimensions of a tensor."""
        shape = self.facts.shape(value)
        if shape is None or len(shape) > 1 or value.dtype is None:
            return
        if all(isinstance(size, int) for size in content):
            if not value.is_graph_output() and not (shape and is_read_as_scalar(value)):
                self._replace_by_constant(node, value, content, len(shape))
            return
        key = (value.dtype, len(shape), content)
        first = scope.computed.get(key)
        if first is not None and _is_there(first):
            if can_replace(value, first):
                replace_value(value, first)
                remove_if_unread(node)
                self.change.count("value computed before taken again")
            return
        scope.computed[key] = value
        if value.dtype is ir.DataType.INT64 and len(shape) == 1 and len(node.outputs) == 1:
            self._take_dimensions(node, value, content, scope)

    def _replace_by_constant(
        self, node: ir.Node, value: ir.Value, content: Shape, rank: int
    ) -> None:
        graph, name = node.graph, value.name
        assert isinstance(graph, ir.Graph) and name is not None and value.dtype is not None
        array = np.array(content, value.dtype.numpy()).reshape((-1,) if rank else ())
        # The initializer takes the name; the old value lets go of it first.
        value.name = self.names.new(name)
        value.replace_all_uses_with(add_initializer(graph, array, name))
        remove_if_unread(node)
        self.change.count(f"{node.op_type} of known shapes folded")

    def _take_dimensions(
        self, node: ir.Node, value: ir.Value, content: Shape, scope: _Scope
    ) -> None:
        if self.opset < SHAPE_HAS_ENDS or is_onnx(node, "Shape"):
            return
        found = scope.dimensions.get(content)
        if found is not None and _is_there(found[0]):
            new = self._new_shape(node, *found)
            replace_value(value, new)
            scope.computed[value.dtype, 1, content] = new
            remove_if_unread(node)
            self.change.count(f"{node.op_type} of dimensions made a Shape")
        elif is_onnx(node, "Concat"):
            self._join(node, content, scope)

    def _new_shape(self, before: ir.Node, tensor: ir.Value, start: int, end: int) -> ir.Value:
        """A new node Shape(tensor) before another node; its output."""
        graph = before.graph
        assert isinstance(graph, ir.Graph)
        rank = len(self.facts.shape(tensor) or ())
        attributes = [("start", start, 0), ("end", end, rank)]
        name = self.names.new(f"{tensor.name}_shape_{start}_{end}")
        made = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64))
        made.shape = ir.Shape([end - start])
        node = ir.Node(
            "",
            "Shape",
            [tensor],
            [ir.AttrInt64(key, number) for key, number, default in attributes if number != default],
            outputs=[made],
            name=self.names.new(name),
        )
        graph.insert_before(before, node)
        return made

    def _note_dimensions(self, node: ir.Node, scope: _Scope) -> None:
        tensor = node.inputs[0]
        shape = self.facts.shape(tensor)
        if tensor is None or shape is None:
            return
        for start in range(len(shape)):
            for end in range(start + 1, len(shape) + 1):
                scope.dimensions.setdefault(shape[start:end], (tensor, start, end))

    # -------------------------------------------------------------- Concat

    def _join(self, node: ir.Node, content: Shape, scope: _Scope) -> None:
        """Let a Concat take longer parts: runs of constants, and of dimensions of one tensor."""
        parts = self._parts(node, content, scope)
        if parts is None:
            return
        old = [v for v in node.inputs if v is not None and not is_constant(v)]
        kept = {id(part) for part in parts}
        freed = sum(
            len(v.uses()) == 1 and v.producer() is not None and id(v) not in kept for v in old
        )
        made = sum(not isinstance(part, ir.Value | np.ndarray) for part in parts)
        if made >= freed:
            return
        inputs: list[ir.Value] = []
        for part in parts:
            if isinstance(part, np.ndarray):
                assert isinstance(node.graph, ir.Graph)
                name = self.names.new(f"{node.outputs[0].name}_part")
                inputs.append(add_initializer(node.graph, part, name))
            elif isinstance(part, ir.Value):
                inputs.append(part)
            else:
                tensor, start, end = part
                inputs.append(self._new_shape(node, tensor, start, end))
                key = (ir.DataType.INT64, 1, (self.facts.shape(tensor) or ())[start:end])
                scope.computed[key] = inputs[-1]
        node.resize_inputs(len(inputs))
        for index, value in enumerate(inputs):
            node.replace_input_with(index, value)
        for value in old:
            remove_if_unread(value.producer())
        self.change.count("Concat of dimensions joined")

    def _parts(
        self, node: ir.Node, content: Shape, scope: _Scope
    ) -> list[ir.Value | np.ndarray | tuple[ir.Value, int, int]] | None:
        operands = self._operands(node)
        parts: list[ir.Value | np.ndarray | tuple[ir.Value, int, int]] = []
        place = 0
        while place < len(content):
            end = place
            while end < len(content) and isinstance(content[end], int):
                end += 1
            if end > place:
                parts.append(np.array(content[place:end], np.int64))
                place = end
                continue
            part, end = self._longest_part(content, place, scope)
            if part is None:
                if place not in operands:
                    return None
                part, end = operands[place]
            parts.append(part)
            place = end
        return parts

    def _operands(self, node: ir.Node) -> dict[int, tuple[ir.Value, int]]:
        """By the place where it begins, each operand and the place where it ends."""
        operands, place = {}, 0
        for value in node.inputs:
            content = self.facts.content(value)
            assert value is not None and content is not None
            operands[place] = (value, place + len(content))
            place += len(content)
        return operands

    def _longest_part(
        self, content: Shape, start: int, scope: _Scope
    ) -> tuple[ir.Value | tuple[ir.Value, int, int] | None, int]:
        for end in range(len(content), start, -1):
            wanted = content[start:end]
            value = scope.computed.get((ir.DataType.INT64, 1, wanted))
            if value is not None and len(wanted) < len(content) and _is_there(value):
                return value, end
            found = scope.dimensions.get(wanted)
            if found is not None and _is_there(found[0]):
                return found, end
        return None, start

    # -------------------------------------------------------------- readers of shapes

    def _keeps_shape(self, node: ir.Node) -> bool:
        """Remove a node whose output is its input."""
        source, output = input_of(node, 0), node.outputs[0]
        shape = self.facts.shape(source)
        if source is None or shape is None or shape != self.facts.shape(output):
            return False
        if is_onnx(node, "Slice"):
            bounds = slice_bounds(self.facts, node)
            if bounds is None or any(step != 1 for _, _, step in bounds.values()):
                return False
        if not can_replace(output, source):
            return False
        replace_value(output, source)
        remove_if_unread(node)
        self.change.count(f"{node.op_type} to the same shape removed")
        return True

    def _state_target(self, node: ir.Node) -> None:
        """Give a Reshape a constant shape."""
        target = self.facts.content(input_of(node, 1))
        if target is None or is_constant(node.inputs[1]):
            return
        if node.attributes.get_int("allowzero", 0) != 0 and 0 in target:
            return
        stated = _stated(target, self.facts.shape(node.inputs[0]))
        if stated is None:
            self.change.skip(node, "its shape has sizes that are neither known nor in its input")
            return
        # A size that is copied is what it was, 0 or not.
        node.attributes.pop("allowzero", None)
        self._set_constant(node, 1, stated, "shape")
        self.change.count("shape of Reshape stated")

    def _state_ends(self, node: ir.Node) -> None:
        """Give a Slice constant ends where it takes all from its start on."""
        bounds = slice_bounds(self.facts, node)
        ends = self.facts.content(input_of(node, 2))
        shape = self.facts.shape(node.inputs[0])
        if bounds is None or ends is None or shape is None or is_constant(input_of(node, 2)):
            return
        stated = []
        for axis, (_, end, step) in bounds.items():
            if step > 0 and may_not_be_negative(difference(end, shape[axis])):
                stated.append(TO_THE_END)
            elif isinstance(end, int):
                stated.append(end)
            else:
                return
        self._set_constant(node, 2, stated, "ends")
        self.change.count("ends of Slice stated")

    def _set_constant(self, node: ir.Node, index: int, numbers: list[int], what: str) -> None:
        old = node.inputs[index]
        assert old is not None and old.dtype is not None and isinstance(node.graph, ir.Graph)
        array = np.array(np.clip(numbers, *_limits(old.dtype)), old.dtype.numpy())
        name = self.names.new(f"{node.outputs[0].name}_{what}")
        node.replace_input_with(index, add_initializer(node.graph, array, name))
        remove_if_unread(old.producer())


def _is_there(value: ir.Value) -> bool:
    """The value was not removed since it was noted."""
    node = value.producer()
    return node is None or node.graph is not None


def _limits(dtype: ir.DataType) -> tuple[int, int]:
    limits = np.iinfo(dtype.numpy())
    return int(limits.min), int(limits.max)


def _stated(target: Shape, shape: Shape | None) -> list[int] | None:
    """The constant shape for a Reshape to a target, or None.

    A 0 copies the size of the input at its place. A -1 is the size that is left, which is not
    defined beside a 0, so that all other sizes must be known; a -1 that stood there may stay.
    """
    stated: list[int | None] = []
    for place, size in enumerate(target):
        if isinstance(size, int):
            stated.append(size)
        else:
            copied = shape is not None and place < len(shape) and shape[place] == size
            stated.append(0 if copied else None)
    left = stated.count(None)
    if left > 1 or (left and (-1 in stated or 0 in stated)):
        return None
    return [-1 if size is None else size for size in stated]
