"""The names of values in a proto: each is made once, before it is read."""

from __future__ import annotations

import onnx

from graphopt.errors import ModelError
from graphopt.protos import describe_node, inner_graphs

_Scopes = tuple[set[str], ...]
"""Names that a graph may read, its own first."""


def check_names(graph: onnx.GraphProto) -> bool:
    """Whether no node reads what a later one makes. The checker's word is of the first fault only.

    Raises:
        ModelError: a value is read that nothing makes, or is made twice.
    """
    if _is_sorted(graph):
        return True
    _check_made(graph)
    return False


def _is_sorted(graph: onnx.GraphProto, outer: _Scopes = ()) -> bool:
    known = _given_names(graph)
    scopes = (known, *outer)
    for node in graph.node:
        for name in node.input:
            if name and name not in known and not any(name in scope for scope in outer):
                return False
        if node.attribute and not all(_is_sorted(inner, scopes) for inner in inner_graphs(node)):
            return False
        _add_made_by(node, known)
    _check_outputs(graph, scopes)
    return True


def _check_made(graph: onnx.GraphProto, outer: _Scopes = ()) -> None:
    known = _given_names(graph)
    for node in graph.node:
        _add_made_by(node, known)
    scopes = (known, *outer)
    for node in graph.node:
        for name in node.input:
            if name and not any(name in scope for scope in scopes):
                raise ModelError(
                    f"{describe_node(node)} reads {name!r}, which nothing makes: no input, "
                    "initializer or node has that name"
                )
        for inner in inner_graphs(node) if node.attribute else ():
            _check_made(inner, scopes)
    _check_outputs(graph, scopes)


def _given_names(graph: onnx.GraphProto) -> set[str]:
    return {value.name for value in graph.input} | {t.name for t in graph.initializer}


def _add_made_by(node: onnx.NodeProto, known: set[str]) -> None:
    if not (type(node.name) is type(node.op_type) is type(node.domain) is str):
        # protobuf gives back as bytes what is not UTF-8, and nothing here could write it.
        raise ModelError(f"the model is damaged: {_not_text(node)!r} in a node is not text")
    for name in node.output:
        if name and name in known:
            raise ModelError(
                f"value {name!r} is made twice, the second time by {describe_node(node)}; "
                "values need different names"
            )
        known.add(name)


def _check_outputs(graph: onnx.GraphProto, scopes: _Scopes) -> None:
    for value in graph.output:
        if not any(value.name in scope for scope in scopes):
            raise ModelError(f"output {value.name!r} is made by nothing in the graph")


def _not_text(node: onnx.NodeProto) -> bytes:
    texts: tuple[object, ...] = (node.name, node.op_type, node.domain)
    return next(text for text in texts if isinstance(text, bytes))[:40]
