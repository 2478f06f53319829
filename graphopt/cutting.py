"""Stretches of a graph: what lies between some of its values, as a model of its own."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.operators import all_graphs, nodes_within
from graphopt.rewriting import remove_node


@dataclass(frozen=True)
class Given:
    """What takes the place of a value in a stretch: an input of the model.

    Attributes:
        name: of the input.
        dtype: element type.
        dims: dimensions; None leaves them open.
    """

    name: str
    dtype: ir.DataType
    dims: tuple[int, ...] | None = None


def given_like(name: str, array: np.ndarray) -> Given:
    """An input of the element type and dimensions of an array."""
    if array.dtype.kind in "OSU":
        return Given(name, ir.DataType.STRING, array.shape)
    return Given(name, ir.DataType.from_numpy(array.dtype), array.shape)


def values_of(graph: ir.Graph) -> dict[str, ir.Value]:
    """The inputs of a graph and what its nodes make, by name, in topological order."""
    values = {value.name: value for value in graph.inputs if value.name}
    values.update((o.name, o) for node in graph for o in node.outputs if o.name)
    return values


def names_in(model: ir.Model) -> set[str]:
    """The names of all values, those in bodies too."""
    return {
        value.name
        for graph in all_graphs(model)
        for value in _all_values(graph)
        if value.name is not None
    }


def _all_values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def reads(node: ir.Node) -> list[ir.Value]:
    """What a node reads of its graph, also from within its bodies."""
    read = [v for inner in nodes_within(node) for v in inner.inputs if v is not None]
    return list(dict.fromkeys(v for v in read if v.graph is node.graph))


def depend_on_inputs(graph: ir.Graph) -> set[ir.Value]:
    """The values that follow from an input of the graph; the others are the same for all inputs."""
    found = {value for value in graph.inputs if not value.is_initializer()}
    for node in graph:
        if any(value in found for value in reads(node)):
            found.update(node.outputs)
    return found


@dataclass(frozen=True)
class Stretch:
    """What leads to some values of a graph.

    Attributes:
        nodes: in no order.
        sources: where the walk back ended: values to stop at, and inputs of the graph.
    """

    nodes: frozenset[ir.Node]
    sources: tuple[ir.Value, ...]


def stretch_to(targets: Iterable[ir.Value], stops: Collection[ir.Value]) -> Stretch:
    """What leads to the targets from the nearest values to stop at.

    A target is never stopped at as long as nothing else reads it.
    """
    nodes: set[ir.Node] = set()
    sources: dict[ir.Value, None] = {}
    waiting = [node for t in targets if (node := t.producer()) is not None]
    while waiting:
        node = waiting.pop()
        if node in nodes:
            continue
        nodes.add(node)
        for value in reads(node):
            producer = value.producer()
            if value in stops or (producer is None and value.is_graph_input()):
                sources[value] = None
            elif producer is not None:
                waiting.append(producer)
    return Stretch(frozenset(nodes), tuple(sources))


def cut_out(model: ir.Model, given: Mapping[str, Given], wanted: Mapping[str, str]) -> ir.Model:
    """A model that computes some values from others.

    Inputs of the model that are not given stay inputs where they are read. The new names must be
    names of no other value of the model.

    Args:
        model: not modified.
        given: what is put in the place of values of the main graph, by their names; one input may
            be put in several places. The nodes that make them go, but for those of values that are
            wanted too.
        wanted: the values to compute, and the names of the outputs.
    """
    cut = model.clone()
    graph = cut.graph
    values = values_of(graph)
    graph.outputs.clear()
    inputs: dict[str, ir.Value] = {}
    for name, new in given.items():
        _put_in_place(inputs.setdefault(new.name, _input(new)), values[name], name in wanted)
    outputs = [values[name] for name in wanted]
    stretch = stretch_to(outputs, ())
    for node in reversed([node for node in graph if node not in stretch.nodes]):
        remove_node(node)
    open_inputs = [v for v in graph.inputs if v.name not in given and (v.uses() or v in outputs)]
    graph.inputs.clear()
    graph.inputs.extend([*inputs.values(), *open_inputs])
    for value in [v for v in graph.initializers.values() if not v.uses()]:
        del graph.initializers[value.name or ""]
    for node in graph:
        for output in node.outputs:
            # Of the whole model: what is given here may have other dimensions than were stated.
            output.shape = None
    for value, name in zip(outputs, wanted.values(), strict=True):
        value.name = name
        graph.outputs.append(value)
    return cut


def _input(new: Given) -> ir.Value:
    shape = None if new.dims is None else ir.Shape(new.dims)
    return ir.Value(name=new.name, type=ir.TensorType(new.dtype), shape=shape)


def _put_in_place(put: ir.Value, value: ir.Value, is_made: bool) -> None:
    """Let everything read an input instead of the value."""
    value.replace_all_uses_with(put)
    if not is_made and value.producer() is not None:
        value.name = None


def part_of(
    model: ir.Model, nodes: Collection[str], arrays: Mapping[str, np.ndarray]
) -> ir.Model | None:
    """The model of some nodes alone; None where what they read from others is not known.

    Args:
        model: not modified.
        nodes: the first named output of each node.
        arrays: values of the model by name, whose types and dimensions its inputs get.
    """
    graph = model.graph
    chosen = [node for node in graph if key_of(node) in nodes]
    inside = {o for node in chosen for o in node.outputs}
    outside = {v for node in graph if node not in set(chosen) for v in reads(node)}
    moving = depend_on_inputs(graph)
    read = dict.fromkeys(v for n in chosen for v in reads(n) if v not in inside and v in moving)
    names = [v.name for v in read if v.name and v.name in arrays]
    given = {name: given_like(name, arrays[name]) for name in names}
    wanted = {
        o.name: o.name
        for node in chosen
        for o in node.outputs
        if o.name and o in moving and (o in outside or o.is_graph_output())
    }
    if len(given) < len(read) or not wanted or not given:
        return None
    return cut_out(model, given, wanted)


def key_of(node: ir.Node) -> str:
    """The first name among the outputs of a node: they differ, and names of nodes need not."""
    return next((o.name for o in node.outputs if o.name), "")
