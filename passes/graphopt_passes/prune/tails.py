"""The last layers of a model of which only a mean over places is read, at a quarter of the places.

A classifier of images ends in a mean over all places. What the layers before it give at a place
hardly matters then: with the mean over each two by two places as their input they work on a quarter
of the image, which costs the outputs far less than as many channels. (Where to lower the resolution
is one of the questions of the search for architectures, RegNet, arXiv 2003.13678; pooling is moved
forward here in a model that is trained, and the layers behind it refitted.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.operators import is_onnx
from graphopt.rewriting import (
    Names,
    constant_tensor,
    input_of,
    only_reader,
    replace_value,
    small_array,
)
from graphopt.skeleton import infer_shapes, known_shape
from graphopt_passes.prune.blocks import places_of
from graphopt_passes.simplify.reductions import reduced_axes

SIDE = 2
"""Places along each axis of which the mean is taken."""

AT_ANY_SIZE = (
    "AveragePool",
    "BatchNormalization",
    "Conv",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "MaxPool",
)
AT_EACH_PLACE = (
    *("Add", "Celu", "Clip", "Div", "Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish", "Identity"),
    *("LeakyRelu", "Max", "Min", "Mish", "Mul", "Neg", "PRelu", "Relu", "Selu", "Sigmoid"),
    *("Softplus", "Sub", "Tanh"),
)
"""Operators that do the same wherever places are, and however many."""


@dataclass(frozen=True, eq=False)
class Tail:
    """Layers that could work on fewer places.

    Attributes:
        value: that they read; [batch, channels, places ...].
        nodes: that would work on the means of it.
        mean: over all places, of what they give; one of `nodes`.
    """

    value: ir.Value
    nodes: frozenset[ir.Node]
    mean: ir.Node


def tails_of(model: ir.Model) -> Iterator[Tail]:
    """The tails of a model, with inferred shapes: those of one mean from the shortest on."""
    places = places_of(model)
    for node in model.graph:
        if _is_mean_over_places(node):
            yield from _tails_before(node, places)


def _tails_before(mean: ir.Node, places: dict[ir.Node, int]) -> Iterator[Tail]:
    """Add one node after the other, the last first, as long as all that it makes stays within."""
    within = {mean}
    read = {value for value in mean.inputs[:1] if value is not None}
    while all(value.producer() in places for value in read):
        last = max(read, key=lambda value: places[value.producer()])  # type: ignore[index]
        node = last.producer()
        assert node is not None
        if len(read) == 1 and _has_places(last):
            yield Tail(last, frozenset(within), mean)
        if not _works_at_any_size(node) or not _is_read_only_by(node, within):
            return
        within.add(node)
        read.discard(last)
        read |= {v for v in node.inputs if v is not None and constant_tensor(v) is None}


def _is_mean_over_places(node: ir.Node) -> bool:
    value = node.inputs[0] if node.inputs else None
    if value is None or not _has_places(value):
        return False
    rank = len(known_shape(value) or ())
    if is_onnx(node, "GlobalAveragePool"):
        return True
    if is_onnx(node, "ReduceMean"):
        return sorted(reduced_axes(node) or ()) == list(range(2, rank))
    return _covers_all(node)


def _covers_all(node: ir.Node) -> bool:
    """An AveragePool whose only window is all of its input."""
    if not is_onnx(node, "AveragePool"):
        return False
    kernel = node.attributes.get_ints("kernel_shape", ())
    pads = node.attributes.get_ints("pads", ())
    return list(kernel) == _sides(node.inputs[0]) and not any(pads)


def _sides(value: ir.Value | None) -> list[int]:
    """How many places there are along each axis; none where that is not known."""
    sides = list(known_shape(value) or ())[2:]
    return [side for side in sides if isinstance(side, int)] if sides else []


def _has_places(value: ir.Value) -> bool:
    shape = known_shape(value)
    rank = 0 if shape is None else len(shape)
    sides = _sides(value)
    # Of other types onnxruntime has no AveragePool on the CPU.
    is_image = rank > 2 and len(sides) == rank - 2 and value.dtype == ir.DataType.FLOAT
    return is_image and min(sides) >= SIDE


def _works_at_any_size(node: ir.Node) -> bool:
    if is_onnx(node, *AT_ANY_SIZE):
        return len(node.outputs) == 1
    rank = len(known_shape(node.outputs[0]) or ())
    if is_onnx(node, "Concat"):
        return rank > 2 and node.attributes.get_int("axis", 0) in (1, 1 - rank)
    if not is_onnx(node, *AT_EACH_PLACE):
        return False
    return rank > 2 and all(_is_the_same_everywhere(v, rank) for v in node.inputs if v is not None)


def _is_the_same_everywhere(value: ir.Value, rank: int) -> bool:
    """A constant that differs by channel at most; or what is computed, with all axes."""
    tensor = constant_tensor(value)
    if tensor is None:
        return len(known_shape(value) or ()) == rank
    shape = tensor.shape.numpy()
    return all(size == 1 for size in shape[max(len(shape) - rank + 2, 0) :])


def _is_read_only_by(node: ir.Node, within: set[ir.Node]) -> bool:
    return all(
        not output.is_graph_output() and {use.node for use in output.uses()} <= within
        for output in node.outputs
    )


def pool(model: ir.Model, tail: Tail) -> frozenset[str] | None:
    """Let a tail read the mean over each two by two places.

    Args:
        model: of which the tail is; rewritten in place, and its shapes inferred again.
        tail: of the model.

    Returns:
        The names of the values of the tail that have half as many places along each axis. None
        where one has another number of places than the same value before, likewise pooled, so that
        the model is of no use.
    """
    before = {v: _sides(v) for node in tail.nodes - {tail.mean} for v in node.outputs}
    names, value, maker = Names(model), tail.value, tail.value.producer()
    assert maker is not None
    made = ir.Value(name=names.new(f"{value.name}_pooled"), type=value.type)
    attributes = _pooling(_sides(value))
    node = ir.Node("", "AveragePool", [value], attributes, outputs=[made], name=names.new("pool"))
    model.graph.insert_after(maker, node)
    for use in tuple(value.uses()):
        if use.node in tail.nodes:
            use.node.replace_input_with(use.idx, made)
    if is_onnx(tail.mean, "AveragePool"):
        _become_global(tail.mean)
    infer_shapes(model)
    pooled = {v: sides for v, sides in before.items() if max(sides, default=1) > 1}
    if any(_sides(v) != _halved(sides) for v, sides in pooled.items()):
        return None
    return frozenset(v.name or "" for v in pooled)


def quarter(node: ir.Node) -> float:
    """The share of the places of what a node of a tail makes that is left; 1 where it has none."""
    sides = _sides(node.outputs[0])
    return math.prod(_halved(sides)) / math.prod(sides)


def averaged(value: ir.Value, model: ir.Model, names: Names) -> ir.Value:
    """What a layer should give instead of a value, if it gives it for two by two places at once.

    That is the mean, or, where only a Relu (or ReLU6) reads the value, what becomes the mean of
    what that gives: the mean over places is taken of that in the end.

    Args:
        value: of the model.
        model: gets nodes, at its end.
        names: of the model.
    """

    def add(op_type: str, *inputs: ir.Value, attributes: Sequence[ir.Attr] = ()) -> ir.Value:
        made = ir.Value(name=names.new("aim"), type=value.type)
        model.graph.append(ir.Node("", op_type, inputs, attributes, outputs=[made]))
        return made

    reader, attributes = only_reader(value), _pooling(_sides(value))
    mean = add("AveragePool", value, attributes=attributes)
    if reader is None or not _is_rectifier(reader):
        return mean
    # Where none of the places is positive, all that counts is that the layer gives nothing either.
    positive = add("AveragePool", reader.outputs[0], attributes=attributes)
    where_positive = add("Mul", add("Sign", positive), mean)
    return add("Add", positive, add("Sub", mean, where_positive))


def _is_rectifier(node: ir.Node) -> bool:
    """A Relu, or a Clip from 0."""
    if is_onnx(node, "Clip"):
        least = small_array(input_of(node, 1))
        return least is not None and not least.any()
    return is_onnx(node, "Relu")


def _halved(sides: list[int]) -> list[int]:
    return [-(-side // SIDE) for side in sides]


def _pooling(sides: list[int]) -> list[ir.Attr]:
    # Of an odd number, the last place is by itself: padded places do not count.
    pads = [0] * len(sides) + [side % SIDE for side in sides]
    two = [SIDE] * len(sides)
    return [
        ir.AttrInt64s("kernel_shape", two),
        ir.AttrInt64s("strides", two),
        ir.AttrInt64s("pads", pads),
    ]


def _become_global(mean: ir.Node) -> None:
    """An AveragePool over all places, at any size."""
    (output,) = mean.outputs
    assert isinstance(mean.graph, ir.Graph)
    made = ir.Value(name=f"{output.name}_mean", type=output.type, shape=output.shape)
    node = ir.Node("", "GlobalAveragePool", [mean.inputs[0]], outputs=[made], name=mean.name)
    mean.graph.insert_before(mean, node)
    replace_value(output, made)
    mean.graph.remove(mean, safe=True)
    if not made.is_graph_output():
        made.name = output.name
