"""Another element type for floating-point values: what widening and narrowing have in common."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache
from typing import TypeVar

import onnx
import onnx_ir as ir

from graphopt.operators import ONNX_DOMAINS, attributes_of, is_onnx, subgraphs
from graphopt.rewriting import Names, can_replace, remove_node, replace_value
from graphopt.runtime import Formal, Formals, formals_of

FIRST_OPSET = 6
"""Before it, Cast names its type by a string."""

T = TypeVar("T")

Types = Mapping[ir.Value, ir.TypeProtocol | None]

Convert = Callable[[ir.TensorProtocol], ir.TensorProtocol]


# ------------------------------------------------------------------ types of values


def types_of(graphs: Sequence[ir.Graph], opset: int) -> dict[ir.Value, ir.TypeProtocol | None]:
    """The types of all values; of what goes in and out of a body, which need not be stated, too.

    Inference knows nothing of operators outside the standard, nor of what is behind them: where an
    operator makes the type that it takes, that is looked up.
    """
    types: dict[ir.Value, ir.TypeProtocol | None] = {}
    for graph in graphs:
        for value in _values_in(graph):
            types[value] = types.get(value) or value.type
        for node in graph:
            bodies = subgraphs(node)
            for body in bodies:
                for inner, outer in _same_types(node, body):
                    kind = types.get(outer) if isinstance(outer, ir.Value) else outer
                    types[inner] = types.get(inner) or inner.type or kind
            for index, output in enumerate(node.outputs) if not bodies else ():
                if types.get(output) is None and output.name:
                    types[output] = _type_made(node, index, types, opset)
    return types


def _type_made(node: ir.Node, index: int, types: Types, opset: int) -> ir.TypeProtocol | None:
    """The type of an output, where it is that of an input by the operator's schema."""
    formals = schema_of(node.domain, node.op_type, opset)
    if formals is None or not formals[1]:
        return None
    inputs, outputs = formals
    variable = _at(outputs, index).variable
    for place, value in enumerate(node.inputs):
        if value is not None and _at(inputs, place).variable == variable and types.get(value):
            return types[value]
    return None


def _values_in(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from (output for output in node.outputs if output.name)


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


# ------------------------------------------------------------------ types that operators know


class Places:
    """Which inputs and outputs of an operator may be of an element type.

    Args:
        formals: of the operator.
        dtype: the element type.
    """

    def __init__(self, formals: Formals, dtype: ir.DataType) -> None:
        kind = f"tensor({dtype.name.lower()})"
        self._inputs, self._outputs = ([kind in formal.types for formal in f] for f in formals)

    def takes(self, index: int) -> bool:
        """The input at an index may be of the type."""
        return bool(self._inputs) and _at(self._inputs, index)

    def makes(self, index: int) -> bool:
        """The output at an index may be of the type."""
        return bool(self._outputs) and _at(self._outputs, index)


def _at(places: Sequence[T], index: int) -> T:
    return places[min(index, len(places) - 1)]


@cache
def places_of(domain: str, op_type: str, opset: int, dtype: ir.DataType) -> Places | None:
    """Where an operator allows an element type; None where nobody knows.

    Args:
        domain: of the operator.
        op_type: of the operator.
        opset: of the standard operators.
        dtype: the element type.
    """
    formals = schema_of(domain, op_type, opset)
    return None if formals is None else Places(formals, dtype)


@cache
def schema_of(domain: str, op_type: str, opset: int) -> Formals | None:
    """The inputs and outputs of an operator, by onnx or else by onnxruntime; None without both."""
    if domain not in ONNX_DOMAINS:
        return formals_of(domain, op_type)
    try:
        schema = onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        # onnxruntime has operators of its own in this domain, some of them before onnx.
        return formals_of("", op_type, opset)
    # In a BitCast the bits themselves are meant.
    known = op_type != "BitCast"
    inputs, outputs = (
        tuple(Formal(f.type_str, frozenset(f.types if known else ())) for f in side)
        for side in (schema.inputs, schema.outputs)
    )
    return inputs, outputs


# ------------------------------------------------------------------ rewriting


def retype_attributes(
    node: ir.Node, start: ir.DataType, end: ir.DataType, names: Collection[str], convert: Convert
) -> bool:
    """State another element type where a node states one; whether that is of a constant.

    Args:
        node: of the standard domain.
        start: the type that is replaced.
        end: by this one.
        names: of the attributes that state a type.
        convert: makes a tensor of type `end` of one of type `start`.
    """
    for attribute in list(attributes_of(node)):
        name = attribute.name
        if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == start:
            tensor = convert(attribute.as_tensor())
            node.attributes[name] = ir.AttrTensor(name, tensor, doc_string=attribute.doc_string)
            return True
        if name in names and attribute.as_int() == start:
            node.attributes[name] = ir.AttrInt64(name, end, doc_string=attribute.doc_string)
    return False


def retype(value: ir.Value, end: ir.DataType, convert: Convert) -> bool:
    """Let a value be of an element type; whether it is a constant.

    Args:
        value: a tensor.
        end: its type to be.
        convert: makes a tensor of that type.
    """
    if value.type is not None:
        value.type = ir.TensorType(end, denotation=value.type.denotation)
    if not value.is_initializer() or value.const_value is None:
        return False
    value.const_value = convert(value.const_value)
    return True


def cast_of(source: ir.Value, name: str, to: ir.DataType, names: Names) -> ir.Node:
    """A Cast, in no graph yet.

    Args:
        source: what it reads.
        name: of its output.
        to: the element type of that.
        names: gives the node a name.
    """
    output = ir.Value(name=name, type=ir.TensorType(to), shape=source.shape)
    label = names.new(f"Cast_{name}")
    return ir.Node("", "Cast", [source], [ir.AttrInt64("to", to)], outputs=[output], name=label)


def cast_under_its_name(value: ir.Value, to: ir.DataType, names: Names) -> ir.Node:
    """A Cast of a value whose output takes over the value's name, as that of an output.

    Args:
        value: gets another name.
        to: the element type of the Cast's output.
        names: gives the names.
    """
    name = value.name or ""
    value.name = names.new(f"{name}_uncast")
    return cast_of(value, name, to, names)


def drop_cast(node: ir.Node) -> bool:
    """Remove a Cast to the type that comes in, unless it gives a graph's output its name."""
    source, output = node.inputs[0], node.outputs[0]
    if source is None or source.dtype is None or node.attributes["to"].as_int() != source.dtype:
        return False
    if not can_replace(output, source):
        return False
    replace_value(output, source)
    remove_node(node)
    return True
