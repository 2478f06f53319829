"""widen-halves: compute in float32 what a model computes in float16."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir

from graphopt.content import read_array
from graphopt.contract import Change, Context, Effect, Pass
from graphopt.operators import ONNX_DOMAINS, attributes_of, is_onnx, opset_of, subgraphs
from graphopt.rewriting import Names, can_replace, remove_node, replace_value, why_too_old
from graphopt_passes.fuse.misfit import Misfit

FIRST_OPSET = 6
"""Before it, Cast names its type by a string."""

HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT

TYPE_ATTRIBUTES = (
    "to",
    "dtype",
    "output_dtype",
    "output_datatype",
    "precision",
    "softmax_precision",
    "stash_type",
)
"""Attributes of standard operators that state an element type."""

Types = Mapping[ir.Value, ir.TypeProtocol | None]


@dataclass(frozen=True)
class WidenHalves(Pass):
    """Compute in float32 what a model computes in float16; the interface stays float16.

    onnxruntime's CPU provider has hardly a kernel for float16: it puts a Cast before and after
    nearly every node, computes in float32, and drops the Casts that meet. Here every value,
    constant and body becomes float32, with one Cast behind each float16 input and one before each
    float16 output.

    Alone this doubles the bytes of the weights, and is faster only where Casts did not meet. It is
    meant to be followed by passes that make integers of the weights: quantize-static and
    quantize-dynamic know float32 only.

    Every float16 is a float32, so that the same numbers come in and the same is computed, but for
    the roundings to float16 in between: those go, also where the model asks for them by a Cast to
    float16 and back. In real arithmetic nothing changes, which is why the gate judges by the limits
    of ROUNDING for float16. What real arithmetic does not know may differ, and is rolled back then:
    a number beyond 65504 is no longer infinity, and where a rounding decides (a comparison, a Cast
    to integers) something else may come out. Scales of QuantizeLinear and DequantizeLinear are
    widened as any value.

    The whole model stays as it is, with the reason, where a float16 value belongs to an operator
    outside the standard, to a sequence or an optional, or to an operator that has no float32 form,
    and where a type is not known. bfloat16 is left alone.
    """

    name: ClassVar[str] = "widen-halves"
    effect: ClassVar[Effect] = Effect.ROUNDING

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Only the CPU provider lacks the kernels."""
        if context.provider != "cpu":
            return f"the provider {context.provider} has kernels for float16"
        graphs = context.index_of(model).graphs
        if not any(_is_half(kind) for kind in _types_of(graphs).values()):
            return "no value is float16"
        if model.functions:
            return "functions are not looked into; run inline-functions first"
        return why_too_old(model, FIRST_OPSET)

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Widen the whole model, or nothing."""
        change = Change()
        graphs = context.index_of(model).graphs
        try:
            widening = Widening(model, graphs, _types_of(graphs))
        except Misfit as reason:
            change.skip(*reason.args)
            return change
        if widening.is_needed():
            widening.write(context, change)
        return change


# ------------------------------------------------------------------ types


def _is_half(kind: ir.TypeProtocol | None) -> bool:
    """float16, or a sequence or optional of it."""
    return kind is not None and kind.dtype == HALF


def _values_in(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from (output for output in node.outputs if output.name)


def _types_of(graphs: Sequence[ir.Graph]) -> dict[ir.Value, ir.TypeProtocol | None]:
    """The types of all values; of what goes in and out of a body, which need not be stated, too."""
    types: dict[ir.Value, ir.TypeProtocol | None] = {}
    for graph in graphs:
        for value in _values_in(graph):
            types[value] = types.get(value) or value.type
        for node in graph:
            for body in subgraphs(node):
                for inner, outer in _same_types(node, body):
                    kind = types.get(outer) if isinstance(outer, ir.Value) else outer
                    types[inner] = types.get(inner) or inner.type or kind
    return types


def _same_types(
    node: ir.Node, body: ir.Graph
) -> Iterator[tuple[ir.Value, ir.TypeProtocol | ir.Value | None]]:
    """Inputs and outputs of a body, each with its type or the value outside that has the same."""
    inputs: list[ir.TypeProtocol | ir.Value | None] = list(node.inputs)
    outputs: list[ir.TypeProtocol | ir.Value | None] = list(node.outputs)
    if is_onnx(node, "Loop"):
        inputs[:2] = ir.TensorType(ir.DataType.INT64), ir.TensorType(ir.DataType.BOOL)
        outputs.insert(0, ir.TensorType(ir.DataType.BOOL))
    # The bodies of an If have no inputs: there the first zip ends at once.
    yield from zip(body.inputs, inputs, strict=False)
    yield from zip(body.outputs, outputs, strict=False)


# ------------------------------------------------------------------ what stands in the way


def _check(graphs: Sequence[ir.Graph], types: Types, opset: int) -> None:
    """Look for what makes it impossible.

    Raises:
        Misfit: with the node or value, and the reason.
    """
    for value, kind in types.items():
        if kind is None and (value.uses() or value.is_graph_output()):
            raise Misfit(value, "its type is not known")
        if _is_half(kind) and not isinstance(kind, ir.TensorType):
            raise Misfit(value, "a sequence or optional of float16 is not widened")
    for graph in graphs:
        for output in graph.outputs:
            if output.graph is not graph and _is_half(types.get(output)):
                raise Misfit(output, "a body gives out what it does not make")
        for node in graph:
            reason = _obstacle(node, types, opset)
            if reason is not None:
                raise Misfit(node, reason)


def _obstacle(node: ir.Node, types: Types, opset: int) -> str | None:
    """Why a node would not do the same in float32; None when it would."""
    inputs = [i for i, v in enumerate(node.inputs) if v is not None and _is_half(types.get(v))]
    outputs = [i for i, v in enumerate(node.outputs) if _is_half(types.get(v))]
    if not inputs and not outputs:
        return None
    if node.domain not in ONNX_DOMAINS:
        return f"{node.domain}.{node.op_type} may do something else in float32"
    floats = _float_places(node.op_type, opset)
    if floats is None:
        return f"onnx has no schema of {node.op_type} at opset {opset}"
    for places, halves in zip(floats, (inputs, outputs), strict=True):
        if not all(places[min(index, len(places) - 1)] for index in halves):
            return f"{node.op_type} has no float32 form"
    return None


@cache
def _float_places(op_type: str, opset: int) -> tuple[list[bool], list[bool]] | None:
    """Which inputs and outputs of an operator may be float32; the last stands for all after it."""
    try:
        schema = onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return None
    if op_type == "BitCast":
        # The bits themselves are meant.
        return [False], [False]
    inputs = ["tensor(float)" in formal.types for formal in schema.inputs]
    return inputs, ["tensor(float)" in formal.types for formal in schema.outputs]


# ------------------------------------------------------------------ the rewrite


class Widening:
    """What is to be float32 in a model, and the rewrite that makes it so.

    Args:
        model: to be rewritten by `write`, and not before.
        graphs: all of it.
        types: of all values.

    Raises:
        Misfit: it cannot be done; with the node or value, and the reason.
    """

    def __init__(self, model: ir.Model, graphs: Sequence[ir.Graph], types: Types) -> None:
        _check(graphs, types, opset_of(model))
        self.model, self.graph = model, model.graph
        self.graphs = graphs
        halves = [value for value, kind in types.items() if _is_half(kind)]
        # What a caller gives or can override, and constants that the model gives out.
        self.held = [
            value
            for value in halves
            if value.graph is self.graph
            and value.producer() is None
            and (value.is_graph_input() or value.is_graph_output())
        ]
        last = [value for value in halves if self._is_last(value, types)]
        self.last = {value.producer() for value in last}
        apart = {*self.held, *last}
        self.inner = [value for value in halves if value not in apart]

    def _is_last(self, value: ir.Value, types: Types) -> bool:
        """An output of the model that a Cast makes of what is not float16."""
        node = value.producer()
        if node is None or value.graph is not self.graph or not is_onnx(node, "Cast"):
            return False
        source = node.inputs[0]
        return (
            source is not None
            and not _is_half(types.get(source))
            and value.is_graph_output()
            and not value.uses()
        )

    def is_needed(self) -> bool:
        """Something is float16 that need not be."""
        return bool(self.inner or any(map(_is_read_as_numbers, self.held)))

    def write(self, context: Context, change: Change) -> None:
        """Widen all that is float16 inside.

        Args:
            context: keeps the widened constants.
            change: counts what is done.
        """
        names = Names(self.model)
        casts = self._casts()
        for graph in self.graphs:
            for node in graph:
                if node not in self.last:
                    change.count("constant widened", _retype(node, context))
        for value in self.inner:
            change.count("constant widened", _widen(value, context))
        change.count("value made float32", len(self.inner))
        change.count("Cast at an input or output", self._add_casts(names))
        change.count("Cast dropped", sum(map(_drop_cast, casts)))

    def _casts(self) -> list[ir.Node]:
        """The Casts of a float16 value, or to one."""
        halves = {*self.inner, *self.held}
        return [
            node
            for graph in self.graphs
            for node in graph
            if is_onnx(node, "Cast")
            and node not in self.last
            and (node.inputs[0] in halves or node.outputs[0] in halves)
        ]

    def _add_casts(self, names: Names) -> int:
        """Put Casts behind what is held and before what is given out; how many."""
        first = [self._cast(value, names) for value in self.held if _is_read_as_numbers(value)]
        if first:
            self.graph.insert_before(self.graph[0], first)
        inner, made = set(self.inner), dict[ir.Value, ir.Node]()
        for index, output in enumerate(self.graph.outputs):
            if output in inner:
                made[output] = made.get(output) or self._cast_out(output, names)
                self.graph.outputs[index] = made[output].outputs[0]
        self.graph.extend(made.values())
        return len(first) + len(made)

    def _cast(self, value: ir.Value, names: Names) -> ir.Node:
        """A Cast to float32 for all that reads the value."""
        uses = list(value.uses())
        node = _cast_node(value, names.new(f"{value.name}_float"), FLOAT, names)
        for use in uses:
            use.node.replace_input_with(use.idx, node.outputs[0])
        return node

    def _cast_out(self, value: ir.Value, names: Names) -> ir.Node:
        """A Cast to float16 whose output has the value's name."""
        name = value.name or ""
        value.name = names.new(f"{name}_float")
        return _cast_node(value, name, HALF, names)


def _cast_node(source: ir.Value, name: str, to: ir.DataType, names: Names) -> ir.Node:
    output = ir.Value(name=name, type=ir.TensorType(to), shape=source.shape)
    label = names.new(f"Cast_{name}")
    return ir.Node("", "Cast", [source], [ir.AttrInt64("to", to)], outputs=[output], name=label)


def _is_read_as_numbers(value: ir.Value) -> bool:
    """Something reads the value that is no Cast to another type."""
    return any(
        not is_onnx(use.node, "Cast") or use.node.attributes["to"].as_int() == HALF
        for use in value.uses()
    )


def _retype(node: ir.Node, context: Context) -> bool:
    """State float32 where a node states float16; whether that is a constant."""
    if node.domain not in ONNX_DOMAINS:
        return False
    for attribute in list(attributes_of(node)):
        name = attribute.name
        if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == HALF:
            tensor = _widened(attribute.as_tensor(), context)
            node.attributes[name] = ir.AttrTensor(name, tensor, doc_string=attribute.doc_string)
            return True
        if name in TYPE_ATTRIBUTES and attribute.as_int() == HALF:
            node.attributes[name] = ir.AttrInt64(name, FLOAT, doc_string=attribute.doc_string)
    return False


def _widen(value: ir.Value, context: Context) -> bool:
    """Let a value be float32; whether it is a constant."""
    if value.type is not None:
        value.type = ir.TensorType(FLOAT, denotation=value.type.denotation)
    if not value.is_initializer() or value.const_value is None:
        return False
    value.const_value = _widened(value.const_value, context)
    return True


def _widened(tensor: ir.TensorProtocol, context: Context) -> ir.TensorProtocol:
    """The same numbers in float32, NaN and infinities too."""
    return context.tensor(read_array(tensor).astype(np.float32), tensor.name or "")


def _drop_cast(node: ir.Node) -> bool:
    """Remove a Cast from float32 to float32, unless it gives a graph's output its name."""
    source, output = node.inputs[0], node.outputs[0]
    if source is None or node.attributes["to"].as_int() != FLOAT or source.dtype != FLOAT:
        return False
    if not can_replace(output, source):
        return False
    replace_value(output, source)
    remove_node(node)
    return True
