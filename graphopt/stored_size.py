"""How many bytes a model takes on disk, without writing it.

The size of a message of protobuf follows from those of its parts, and most parts of a model stay
from pass to pass: attributes and tensors never change, so theirs is computed once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from graphopt.operators import attributes_of
from graphopt.serializing import (
    UNANNOTATED,
    Tell,
    attribute_proto,
    is_large,
    is_written_plainly,
    model_shell,
    stub_of,
    write_annotation,
    write_node,
    write_tensor,
    write_value,
)
from graphopt.sparse_tensors import is_marked, sparse_proto

_BYTES = "graphopt.bytes"
"""Key in the `meta` of an attribute or tensor: the bytes that it takes as a field of what it is in.

Those of a tensor are a `_TensorSize`."""


@dataclass(frozen=True)
class StoredSize:
    """What a model takes on disk, in either form.

    Attributes:
        inline_bytes: of the graph file with all weights in it.
        reference_bytes: of the graph file where large tensors are beside it, and each leaves a
            reference, whose offset is counted roughly.
        large_bytes: of the large tensors.
        has_external: one of those is in external data already.
    """

    inline_bytes: int
    reference_bytes: int
    large_bytes: int
    has_external: bool


SHORT = 128
"""A text of fewer bytes has a length of one byte, and so has each of several that are as short."""


def stored_size(model: ir.Model, tell: Tell) -> StoredSize:
    """The bytes that a model takes.

    Args:
        model: not modified.
        tell: of which values the file states type and shape; as for `serializing.stubbed`.
    """
    shell = model_shell(model)
    graph_bytes = shell.graph.ByteSize()
    outer_bytes = shell.ByteSize() - _field(graph_bytes)
    inline, references, large, has_external = _initializers_bytes(model.graph)
    nodes = _nodes_bytes(model.graph, model.ir_version, tell)
    common = graph_bytes + nodes + _annotation_bytes(model.graph)
    common += sum(map(_field, _value_bytes(model.graph, tell)))
    return StoredSize(
        inline_bytes=outer_bytes + _field(common + inline),
        reference_bytes=outer_bytes + _field(common + references),
        large_bytes=large,
        has_external=has_external,
    )


def _varint(number: int) -> int:
    return max(1, (number.bit_length() + 6) // 7)


def _field(size: int) -> int:
    """A message or text as a field whose number is under 16."""
    return size + 2 if size < 128 else size + 1 + _varint(size)


def _text(text: str) -> int:
    size = len(text) if text.isascii() else len(text.encode())
    return size + 2 if size < 128 else size + 1 + _varint(size)


def _nodes_bytes(graph: ir.Graph, ir_version: int, tell: Tell) -> int:
    total = 0
    for node in graph:
        if is_written_plainly(node):
            size = plain_node_bytes(node)
        else:
            proto = onnx.NodeProto()
            write_node(proto, node, ir_version, tell)
            size = proto.ByteSize()
        total += size + 2 if size < SHORT else _field(size)
    return total


def plain_node_bytes(node: ir.Node) -> int:
    """The bytes of a node that has nothing but names and attributes, no graphs among those."""
    texts = [node.op_type]
    if node.domain:
        texts.append(node.domain)
    if node.name:
        texts.append(node.name)
    for read in node.inputs:
        texts.append("" if read is None else read.name or "")
    for made in node.outputs:
        texts.append(made.name or "")
    if not texts[-1]:
        _drop_unnamed_outputs(texts, len(node.outputs))
    joined = "".join(texts)
    if len(joined) < SHORT and joined.isascii():
        size = len(joined) + 2 * len(texts)
    else:
        size = sum(map(_text, texts))
    for attribute in attributes_of(node):
        known: int | None = attribute.meta.data.get(_BYTES)
        size += known if known is not None else _attribute_bytes(attribute)
    return size


def _drop_unnamed_outputs(texts: list[str], output_count: int) -> None:
    """Of the outputs at the end, those without a name are not written."""
    while output_count and not texts[-1]:
        texts.pop()
        output_count -= 1


def _attribute_bytes(attribute: ir.Attr) -> int:
    size = attribute.meta[_BYTES] = _field(attribute_proto(attribute).ByteSize())
    return size


@dataclass(frozen=True)
class _TensorSize:
    """Bytes of the message, its name left out: with its data, without, and those of the data.

    Of one without its zeros, bytes of the message of its numbers, and of what is around that.
    """

    inline: int
    reference: int
    beside: int
    around: int | None = None


def _initializers_bytes(graph: ir.Graph) -> tuple[int, int, int, bool]:
    """The sums of a graph's initializers; whether one of the large ones is external already."""
    inline = references = large = 0
    has_external = False
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            continue
        size: _TensorSize | None = tensor.meta.get(_BYTES)
        if size is None:
            size = tensor.meta[_BYTES] = _measured(tensor)
        name_bytes = _text(name)
        whole = _field(name_bytes + size.inline)
        if size.around is not None:
            whole = _field(whole + size.around)
        inline += whole
        if not size.beside:
            references += whole
            continue
        references += _field(name_bytes + size.reference)
        large += size.beside
        has_external |= isinstance(tensor, ir.ExternalTensor)
    return inline, references, large, has_external


def _measured(tensor: ir.TensorProtocol) -> _TensorSize:
    if is_marked(tensor):
        sparse = sparse_proto(tensor, "")
        sparse.values.ClearField("name")
        size = sparse.values.ByteSize()
        return _TensorSize(size, size, 0, sparse.ByteSize() - _field(size))
    if isinstance(tensor, ir.serde.TensorProtoTensor) and not tensor.metadata_props:
        # Written as it was read.
        raw = tensor.raw
        size = raw.ByteSize() - (_text(raw.name) if raw.name else 0)
        if not is_large(tensor):
            return _TensorSize(size, size, 0)
        return _TensorSize(size, _bare_bytes(stub_of(tensor)), tensor.nbytes)
    if not is_large(tensor):
        size = _bare_bytes(tensor)
        return _TensorSize(size, size, 0)
    proto = onnx.TensorProto(data_type=tensor.dtype.value, dims=tensor.shape.numpy())
    inline = proto.ByteSize() + _field(tensor.nbytes)
    return _TensorSize(inline, _bare_bytes(stub_of(tensor)), tensor.nbytes)


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
