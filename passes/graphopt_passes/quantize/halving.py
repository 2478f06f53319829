"""The rewrite that lets nodes compute in 16 bits, and stores weights so, with few Casts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt.content import read_array
from graphopt.contract import Change, Context
from graphopt.operators import ONNX_DOMAINS, is_onnx
from graphopt.packing import is_constant
from graphopt.rewriting import (
    Names,
    add_initializer,
    constant_tensor,
    is_read,
    remove_node,
)
from graphopt_passes.quantize.half_places import Floats, Tie, is_control, ties_of
from graphopt_passes.quantize.half_ranges import Shown
from graphopt_passes.quantize.half_reasons import CODERS
from graphopt_passes.quantize.halves import Half
from graphopt_passes.quantize.retyping import (
    cast_of,
    cast_under_its_name,
    drop_cast,
    retype,
    retype_attributes,
)

TYPE_ATTRIBUTES = ("dtype", "to")
"""Attributes that state the type of what a node makes, of operators that are not kept in float32.

Those that state in which type it computes on the way stay.
"""

FLOAT = ir.DataType.FLOAT

STORED_ELEMENTS_MINIMUM = 64
"""A smaller constant is not worth the Cast that would widen it, which takes 28 bytes at least."""

Use = tuple[ir.Node, int]
"""A node that reads a value, and the index of the input."""

Output = tuple[ir.Graph, int]
"""A graph that gives a value out, and the index of the output."""


@dataclass
class Demand:
    """Where a value is wanted in one of the two types.

    Attributes:
        readers: nodes that read it.
        givers: the model and bodies that give it out.
    """

    readers: list[Use] = field(default_factory=list)
    givers: list[Output] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.readers or self.givers)


class Halving:
    """What is to be of 16 bits in a model, and the rewrite that makes it so.

    Args:
        model: to be rewritten by `write`, and not before.
        floats: its float32 values.
        nodes: those that are to compute in 16 bits.
        wide: those that are to compute in float32.
        shown: by samples: values out of range stay float32, and branches never taken as they are.
        outside: inputs and outputs of the model are to be of 16 bits too.
    """

    def __init__(
        self,
        model: ir.Model,
        floats: Floats,
        nodes: Collection[ir.Node],
        wide: Collection[ir.Node],
        shown: Shown,
        outside: bool,
    ) -> None:
        self.model, self.floats, self.half = model, floats, floats.half
        self.nodes, self.wide, self.shown = nodes, wide, shown
        # In the order of the graph: what is written must not depend on that of a set.
        self.halved = dict.fromkeys(value for node in nodes for value in floats.makes(node))
        self.handed: set[Use | Output] = set()
        for graph in reversed(floats.graphs):
            for node in graph:
                for tie in ties_of(node) if is_control(node, floats.opset) else ():
                    self._decide(tie)
        if outside:
            self._convert_outside()

    def _decide(self, tie: Tie) -> None:
        """Let a control node hand on in 16 bits what is made or read so; inner nodes come first."""
        values = [*tie.values, *tie.last]
        if any(v not in self.floats or v in self.shown.ranges for v in values):
            return
        given = () if tie.given is None else ((tie.node, tie.given),)
        if any(node.inputs[index] in self.shown.ranges for node, index in given):
            return
        made = [v in self.halved for v in tie.last if v.producer() and not is_constant(v)]
        read = (use.node in self.nodes for v in tie.values for use in v.uses())
        if any(made) or (not made and any(read)):
            self.halved.update(dict.fromkeys(tie.values))
            self.handed.update((*tie.made, *given))

    def _convert_outside(self) -> None:
        """Let the model take and give out 16 bits, but for what does not fit."""
        graph = self.model.graph
        free = [v for v in graph.inputs if v in self.floats and v not in self.shown.ranges]
        self.halved.update(dict.fromkeys(v for v in free if not v.is_initializer()))
        for index, output in enumerate(graph.outputs):
            if output in self.floats and output not in self.shown.ranges:
                self.handed.add((graph, index))

    def write(self, context: Context, change: Change) -> None:
        """Rewrite the model.

        Args:
            context: keeps the constants.
            change: counts what is done.
        """
        demands, casts = self._demands(), self._casts()
        self._retype(context, change)
        names = Names(self.model)
        constants = Constants(self.half, self.shown.idle, names, context, change)
        for value, (half, wide) in demands.items():
            if is_constant(value):
                constants.supply(value, half, wide)
            elif value in self.halved and wide:
                change.count("Cast added", _cast_for(wide, value, FLOAT, names))
            elif value not in self.halved and half:
                source = _source_in(value, self.half.dtype)
                if source is None or half.givers:
                    change.count("Cast added", _cast_for(half, value, self.half.dtype, names))
                else:
                    _let_read(half.readers, source)
        change.count("Cast dropped", sum(map(self._drop, casts)))

    def _demands(self) -> dict[ir.Value, tuple[Demand, Demand]]:
        """Of float32 values, in order, where they are wanted in 16 bits and where in float32."""
        found: dict[ir.Value, tuple[Demand, Demand]] = defaultdict(lambda: (Demand(), Demand()))
        for graph in self.floats.graphs:
            for node in graph:
                takes = self.floats.takes(node) if node in self.nodes else ()
                for index, value in enumerate(node.inputs) if self._demands_type(node) else ():
                    if value is not None and value in self.floats:
                        half, wide = found[value]
                        is_half = index in takes or (node, index) in self.handed
                        (half if is_half else wide).readers.append((node, index))
            for index, value in enumerate(graph.outputs):
                if value in self.floats:
                    half, wide = found[value]
                    demand = half if (graph, index) in self.handed else wide
                    demand.givers.append((graph, index))
        return found

    def _demands_type(self, node: ir.Node) -> bool:
        """Some nodes read a value in whichever type it is."""
        return node in self.wide or not self.floats.is_indifferent(node)

    def _casts(self) -> list[ir.Node]:
        """The Casts that are read."""
        casts = (n for graph in self.floats.graphs for n in graph if is_onnx(n, "Cast"))
        return [node for node in casts if is_read(node)]

    def _drop(self, node: ir.Node) -> bool:
        """Remove a Cast that has become one to the same type, or lost its last reader."""
        if not is_read(node):
            remove_node(node)
            return True
        touched = node.inputs[0] in self.halved or node.outputs[0] in self.halved
        return touched and drop_cast(node)

    def _retype(self, context: Context, change: Change) -> None:
        """State the new types of what nodes make and hand on."""
        end = self.half.dtype

        def narrowed(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
            return context.tensor(self.half.rounded(read_array(tensor)), tensor.name or "", end)

        for node in self.nodes:
            if is_onnx(node, "ConstantOfShape") and "value" not in node.attributes:
                zero = ir.tensor(np.zeros(1, np.float32))
                node.attributes["value"] = ir.AttrTensor("value", zero)
            retype_attributes(node, FLOAT, end, TYPE_ATTRIBUTES, narrowed)
        for value in self.halved:
            retype(value, end, narrowed)
        change.count(f"node made {self.half.name}", len(self.nodes))


class Constants:
    """Lets constants be of 16 bits where they are read so, and where they are stored so.

    Args:
        half: the type of 16 bits.
        idle: nodes whose constants stay as they are.
        names: gives names.
        context: keeps the tensors.
        change: counts what is done.
    """

    def __init__(
        self,
        half: Half,
        idle: Collection[ir.Node],
        names: Names,
        context: Context,
        change: Change,
    ) -> None:
        self.half, self.idle, self.names = half, idle, names
        self.context, self.change = context, change

    def supply(self, value: ir.Value, half: Demand, wide: Demand) -> None:
        """Convert a constant in its place, or beside it where some need it in float32.

        A large one that is wanted in float32 is stored in 16 bits and cast.

        Args:
            value: the constant.
            half: where it is wanted in 16 bits.
            wide: where it is wanted in float32.
        """
        stays = bool(wide) and not self._is_stored(value, wide)
        if stays and not half:
            return
        tensor = constant_tensor(value)
        assert tensor is not None
        name = self.names.new(f"{value.name}_{self.half.name}") if stays else value.name or ""
        array = self.half.rounded(read_array(tensor))
        narrow = self.context.tensor(array, name, self.half.dtype)
        self.change.count(f"constant made {self.half.name}")
        if stays:
            second = add_initializer(_graph_of(value), narrow, name)
            _let_read(half.readers, second)
            _give(half.givers, second)
            return
        _set_constant(value, narrow)
        if wide:
            self.change.count("Cast added", _cast_for(wide, value, FLOAT, self.names))

    def _is_stored(self, value: ir.Value, wide: Demand) -> bool:
        """The constant is worth a Cast, and loses only digits."""
        tensor = constant_tensor(value)
        if tensor is None or tensor.size < STORED_ELEMENTS_MINIMUM or wide.givers:
            return False
        readers = [node for node, _ in wide.readers]
        if any(n.domain not in ONNX_DOMAINS or n.op_type in CODERS for n in readers):
            return False
        if any(node in self.idle for node in readers):
            return False
        return self.half.holds(tensor)


def _set_constant(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    value.type = ir.TensorType(tensor.dtype)
    node = value.producer()
    if node is None:
        value.const_value = tensor
        return
    node.attributes.clear()
    node.attributes["value"] = ir.AttrTensor("value", tensor)


def _graph_of(value: ir.Value) -> ir.Graph:
    """The graph in which a value is made."""
    node = value.producer()
    graph = value.graph if node is None else node.graph
    assert isinstance(graph, ir.Graph)
    return graph


def _source_in(value: ir.Value, dtype: ir.DataType) -> ir.Value | None:
    """What a Cast made the value of, where that is of a type."""
    node = value.producer()
    if node is None or not is_onnx(node, "Cast"):
        return None
    source = node.inputs[0]
    return source if source is not None and source.dtype == dtype else None


def _cast_for(demand: Demand, value: ir.Value, to: ir.DataType, names: Names) -> int:
    """Give the value in another type to those who want it; how many Casts that takes.

    A Cast is right behind what makes the value; an output of a graph is cast in that graph, and one
    of the model keeps its name.
    """
    home = _graph_of(value)
    away = [(graph, index) for graph, index in demand.givers if graph is not home]
    here = [(graph, index) for graph, index in demand.givers if graph is home]
    for graph, index in away:
        graph.append(cast_of(value, names.new(f"{value.name}_{to.name.lower()}"), to, names))
        graph.outputs[index] = graph[-1].outputs[0]
    if not here and not demand.readers:
        return len(away)
    if here:
        node = cast_under_its_name(value, to, names)
    else:
        node = cast_of(value, names.new(f"{value.name}_{to.name.lower()}"), to, names)
    _place(node, value, home)
    _let_read(demand.readers, node.outputs[0])
    _give(here, node.outputs[0])
    return len(away) + 1


def _place(node: ir.Node, value: ir.Value, graph: ir.Graph) -> None:
    """Put a node right behind what makes the value that it reads."""
    maker = value.producer()
    if maker is not None:
        graph.insert_after(maker, node)
    elif len(graph):
        graph.insert_before(graph[0], node)
    else:
        graph.append(node)


def _give(givers: Sequence[Output], value: ir.Value) -> None:
    for graph, index in givers:
        graph.outputs[index] = value


def _let_read(uses: Sequence[Use], value: ir.Value) -> None:
    for node, index in uses:
        node.replace_input_with(index, value)
