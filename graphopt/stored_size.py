"""How many bytes a model takes on disk, without writing it.

The size of a message of protobuf follows from those of its parts, and most parts of a model stay
from pass to pass: attributes and tensors never change, so theirs is computed once.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx
import onnx_ir as ir

from graphopt.operators import attributes_of
from graphopt.serializing import (
    UNANNOTATED,
    Tell,
    is_large,
    is_written_plainly,
    model_shell,
    stub_of,
    write_annotation,
    write_node,
    write_tensor,
    write_value,
)

_BYTES = "graphopt.bytes"
"""Key in the `meta` of an attribute or tensor: the bytes that it takes, its own name left out."""


def graph_file_bytes(model: ir.Model, tell: Tell, inline: bool) -> tuple[int, int]:
    """The bytes of the graph file, and of the large tensors beside it.

    Args:
        model: not modified.
        tell: of which values the file states type and shape; as for `serializing.stubbed`.
        inline: the large tensors are in the graph file; otherwise each leaves a reference, whose
            offset is counted roughly.
    """
    shell = model_shell(model)
    graph_bytes = shell.graph.ByteSize()
    outer_bytes = shell.ByteSize() - _field(graph_bytes)
    beside = 0
    parts = []
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            continue
        size = _text(name) + _tensor_bytes(tensor, inline)
        beside += tensor.nbytes if is_large(tensor) and not inline else 0
        parts.append(size)
    parts += [_node_bytes(node, model.ir_version, tell) for node in model.graph]
    parts += _value_bytes(model.graph, tell)
    total = graph_bytes + sum(map(_field, parts)) + _annotation_bytes(model.graph)
    return outer_bytes + _field(total), beside


def _varint(number: int) -> int:
    return max(1, (number.bit_length() + 6) // 7)


def _field(size: int) -> int:
    """A message or text as a field whose number is under 16."""
    return size + 2 if size < 128 else size + 1 + _varint(size)


def _text(text: str) -> int:
    size = len(text) if text.isascii() else len(text.encode())
    return size + 2 if size < 128 else size + 1 + _varint(size)


def _node_bytes(node: ir.Node, ir_version: int, tell: Tell) -> int:
    if not is_written_plainly(node):
        proto = onnx.NodeProto()
        write_node(proto, node, ir_version, tell)
        return proto.ByteSize()
    size = _text(node.op_type)
    if node.domain:
        size += _text(node.domain)
    if node.name:
        size += _text(node.name)
    for value in node.inputs:
        size += 2 if value is None or value.name is None else _text(value.name)
    outputs = [value.name or "" for value in node.outputs]
    while outputs and not outputs[-1]:
        outputs.pop()
    for name in outputs:
        size += _text(name)
    for attribute in attributes_of(node):
        size += _field(_attribute_bytes(attribute))
    return size


def _attribute_bytes(attribute: ir.Attr) -> int:
    known: int | None = attribute.meta.get(_BYTES)
    if known is None:
        proto = onnx.AttributeProto()
        if attribute.is_ref():
            ir.serde.serialize_reference_attribute_into(proto, attribute)
        else:
            ir.serde.serialize_attribute_into(proto, attribute)
        known = attribute.meta[_BYTES] = proto.ByteSize()
    return known


def _tensor_bytes(tensor: ir.TensorProtocol, inline: bool) -> int:
    if not is_large(tensor):
        known: int | None = tensor.meta.get(_BYTES)
        if known is None:
            known = tensor.meta[_BYTES] = _bare_bytes(tensor)
        return known
    if not inline:
        return _bare_bytes(stub_of(tensor))
    proto = onnx.TensorProto(data_type=tensor.dtype.value, dims=tensor.shape.numpy())
    return proto.ByteSize() + _field(tensor.nbytes)


def _bare_bytes(tensor: ir.TensorProtocol) -> int:
    proto = onnx.TensorProto()
    write_tensor(proto, tensor)
    proto.ClearField("name")
    return proto.ByteSize()


def _value_bytes(graph: ir.Graph, tell: Tell) -> Iterable[int]:
    for value in (*graph.inputs, *graph.outputs):
        yield _info_bytes(value)
    types: dict[tuple[int, int], int] = {}
    for node in graph:
        for value in node.outputs:
            if not value.name or value.is_graph_output() or not tell(value):
                continue
            if value.metadata_props or value.doc_string:
                yield _info_bytes(value)
            elif value.type is not None:
                kind = (id(value.type), id(value.shape))
                if kind not in types:
                    types[kind] = _info_bytes(value) - _text(value.name)
                yield types[kind] + _text(value.name)


def _info_bytes(value: ir.Value) -> int:
    proto = onnx.ValueInfoProto()
    write_value(proto, value)
    return proto.ByteSize()


def _annotation_bytes(graph: ir.Graph) -> int:
    proto = onnx.GraphProto()
    if not graph.meta.get(UNANNOTATED):
        made = (output for node in graph for output in node.outputs)
        for value in dict.fromkeys((*graph.inputs, *graph.initializers.values(), *made)):
            write_annotation(proto, value)
    return proto.ByteSize()
