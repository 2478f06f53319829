"""merge-transposes: merge Transposes that follow one another, and cancel those that undo it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt.operators import BROADCASTING, all_graphs, is_onnx
from graphopt.rewriting import can_replace, only_reader, replace_value, static_shape, why_too_old
from graphopt.skeleton import known_shape

FIRST_OPSET = 7
"""Before it, operators broadcast by attributes that name an axis."""

LARGEST_REGION = 100
"""How many nodes between Transposes are looked at. It keeps the time linear in long graphs."""

Permutation = tuple[int, ...]


@dataclass(frozen=True)
class MergeTransposes(Pass):
    """Merge two Transposes into one, or into none where the second undoes the first.

    y = Transpose(Transpose(x, p), q) is Transpose(x, r) with r[i] = p[q[i]]. Between the two may
    be elementwise operators, of several operands when all are transposed by the same p or are
    scalars: the operators then work on what was there before. Only operators whose result for an
    element does not depend on where in the tensor it lies are taken, so that results stay
    bit-identical: the vector and scalar paths of onnxruntime differ for Log, Sin, Elu and others.

    A first Transpose that others read stays.
    """

    name: ClassVar[str] = "merge-transposes"
    effect: ClassVar[Effect] = Effect.EXACT
    operators: ClassVar[frozenset[str] | None] = frozenset({"Transpose"})

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Opsets below 7 broadcast along axes that an attribute names."""
        return why_too_old(model, FIRST_OPSET)

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Merge every Transpose with those before it, from the inputs onwards."""
        change = Change()
        for graph in all_graphs(model):
            _merge_in(graph, change)
        return change


def _merge_in(graph: ir.Graph, change: Change) -> None:
    """Until nothing is left to merge: a Transpose that went may have kept others apart."""
    skipped_before, merged = len(change.skips), -1
    while merged != change.counts.total():
        merged = change.counts.total()
        del change.skips[skipped_before:]
        for node in graph:
            if is_onnx(node, "Transpose"):
                _merge_into(node, change)


def _merge_into(node: ir.Node, change: Change) -> None:
    second = _permutation(node)
    region = _region_before(node)
    if second is None or region is None:
        return
    firsts = {_permutation(leaf) for leaf in region.leaves}
    if len(firsts) > 1:
        change.skip(node, "the operands before it are transposed in different ways")
        return
    first = firsts.pop()
    if first is None or len(first) != len(second):
        return
    merged = tuple(first[axis] for axis in second)
    cancels = merged == tuple(range(len(merged)))
    if (
        not cancels
        and region.nodes
        and all(_has_other_readers(leaf, region) for leaf in region.leaves)
    ):
        change.skip(node, "the Transposes before it stay, for other readers")
        return
    _lift(region, first)
    if cancels:
        _drop(node)
        change.count("Transposes cancelled")
    else:
        node.attributes["perm"] = ir.AttrInt64s("perm", merged)
        change.count("Transposes merged")
    for leaf in region.leaves:
        _remove_if_unread(leaf)


def _permutation(node: ir.Node) -> Permutation | None:
    """Axis i of the output is axis p[i] of the input; None when the rank is not known."""
    stated = node.attributes.get_ints("perm")
    if stated is not None:
        valid = sorted(stated) == list(range(len(stated)))
        return tuple(stated) if valid else None
    shape = known_shape(node.inputs[0])
    return None if shape is None else tuple(reversed(range(len(shape))))


def _drop(node: ir.Node) -> None:
    """Remove the node, whose input is its output; where it cannot go, it becomes Identity."""
    (output,) = node.outputs
    value = node.inputs[0]
    assert value is not None and isinstance(node.graph, ir.Graph)
    if not can_replace(output, value):
        node.op_type = "Identity"
        node.attributes.clear()
        return
    replace_value(output, value)
    node.graph.remove(node, safe=True)


def _remove_if_unread(node: ir.Node) -> None:
    if not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
        assert isinstance(node.graph, ir.Graph)
        node.graph.remove(node, safe=True)


# ------------------------------------------------------------------ between the Transposes


@dataclass
class _Region:
    """A tree of elementwise nodes over the outputs of Transposes.

    Attributes:
        nodes: the elementwise nodes; nothing outside reads what they make.
        leaves: the Transposes, each once.
        reads: the places, as node and input, where a leaf is read.
    """

    nodes: list[ir.Node] = field(default_factory=list)
    leaves: dict[ir.Node, None] = field(default_factory=dict)
    reads: list[tuple[ir.Node, int]] = field(default_factory=list)


def _region_before(node: ir.Node) -> _Region | None:
    """What lies between a Transpose and those before it; None when anything else reaches it."""
    region = _Region()
    waiting = [(node, 0)]
    while waiting:
        reader, index = waiting.pop()
        value = reader.inputs[index]
        maker = value.producer() if value is not None else None
        if value is None or maker is None or maker.graph is not node.graph:
            return None
        if is_onnx(maker, "Transpose"):
            region.leaves[maker] = None
            region.reads.append((reader, index))
            continue
        operands = _operands(maker)
        # Each value has one reader, so that no node is met twice.
        if not operands or only_reader(value) is None or len(region.nodes) == LARGEST_REGION:
            return None
        region.nodes.append(maker)
        waiting.extend((maker, operand) for operand in operands)
    return region


def _has_other_readers(leaf: ir.Node, region: _Region) -> bool:
    (output,) = leaf.outputs
    inside = sum(reader.inputs[index] is output for reader, index in region.reads)
    return output.is_graph_output() or len(output.uses()) > inside


def _lift(region: _Region, first: Permutation) -> None:
    """Let the region read what the leaves read, and correct the shapes of what it makes."""
    for reader, index in region.reads:
        value = reader.inputs[index]
        leaf = value.producer() if value is not None else None
        assert leaf is not None
        reader.replace_input_with(index, leaf.inputs[0])
    for node in region.nodes:
        (output,) = node.outputs
        if output.shape is None or len(output.shape) != len(first):
            output.shape = None
            continue
        sizes = list(output.shape)
        # Axis i was axis first[i].
        order = sorted(range(len(first)), key=first.__getitem__)
        output.shape = ir.Shape([sizes[i] for i in order])


# ------------------------------------------------------------------ elementwise operators


def _operands(node: ir.Node) -> list[int]:
    """The inputs that an elementwise node meets element by element; none for other nodes.

    Operands with a single element are left out: they meet every element.
    """
    if not is_onnx(node, node.op_type) or len(node.outputs) != 1:
        return []
    if node.op_type in BROADCASTING:
        return [i for i, value in enumerate(node.inputs) if not _is_single(value)]
    suits = _UNARY.get(node.op_type)
    return [0] if suits is not None and suits(node) else []


def _is_single(value: ir.Value | None) -> bool:
    shape = static_shape(value)
    return shape is not None and all(size == 1 for size in shape)


def _always(node: ir.Node) -> bool:
    return True


def _is_single_precision(node: ir.Node) -> bool:
    """For other types, onnxruntime computes the last few elements of a tensor in another way."""
    return node.inputs[0] is not None and node.inputs[0].dtype == ir.DataType.FLOAT


def _is_per_tensor(node: ir.Node) -> bool:
    """One scale and one zero point for all; otherwise they lie along an axis, or in blocks."""
    parameters = [value for value in node.inputs[1:] if value is not None]
    return all(static_shape(value) in ((), (1,)) for value in parameters)


_UNARY: dict[str, Callable[[ir.Node], bool]] = {
    "Abs": _always,
    "BitwiseNot": _always,
    "Cast": _always,
    "Ceil": _always,
    "Clip": _always,
    "DequantizeLinear": _is_per_tensor,
    "Erf": _is_single_precision,
    "Exp": _is_single_precision,
    "Floor": _always,
    "Identity": _always,
    "IsInf": _always,
    "IsNaN": _always,
    "LeakyRelu": _always,
    "Neg": _always,
    "Not": _always,
    "QuantizeLinear": _is_per_tensor,
    "Relu": _always,
    "Round": _always,
    "Sigmoid": _is_single_precision,
    "Sign": _always,
    "Sqrt": _always,
    "Tanh": _is_single_precision,
}
"""Operators that work on the first input element by element, and when."""
