"""Walks over onnx protos, for what must be looked at before onnx-ir can read them."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from graphopt.operators import ONNX_DOMAINS, WITH_BODIES


def describe_node(node: onnx.NodeProto) -> str:
    """The node, by its name if it has one."""
    return f"node {node.name!r} ({node.op_type})" if node.name else f"an unnamed {node.op_type}"


def inner_graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs in the attributes of a node."""
    if node.op_type not in WITH_BODIES and node.domain in ONNX_DOMAINS:
        return
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def nested_graphs(scope: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.GraphProto]:
    """The scope, if it is a graph, and the graphs nested in it."""
    if isinstance(scope, onnx.GraphProto):
        yield scope
    for node in scope.node:
        for inner in inner_graphs(node) if node.attribute else ():
            yield from nested_graphs(inner)


def scopes(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto | onnx.FunctionProto]:
    """Everything that has nodes: the graph, the functions, and the graphs nested in them."""
    yield from nested_graphs(proto.graph)
    for function in proto.functions:
        yield function
        yield from nested_graphs(function)


def is_map(kind: onnx.TypeProto) -> bool:
    """The type is a map, or a sequence or optional of such."""
    if kind.HasField("sequence_type"):
        return is_map(kind.sequence_type.elem_type)
    if kind.HasField("optional_type"):
        return is_map(kind.optional_type.elem_type)
    return bool(kind.HasField("map_type"))


def tensors_of(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All tensors: initializers of all graphs, and attributes of all nodes."""
    for scope in scopes(proto):
        if isinstance(scope, onnx.GraphProto):
            yield from scope.initializer
        for node in scope.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
