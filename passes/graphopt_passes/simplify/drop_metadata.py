"""drop-metadata: remove what exporters note about nodes and values, and no runtime reads."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt.operators import ONNX_DOMAINS, graphs_and_functions
from graphopt.skeleton import INFERRED


class Noted(Protocol):
    """What can have notes."""

    doc_string: str | None

    @property
    def metadata_props(self) -> MutableMapping[str, str]:
        """Notes by key."""


@dataclass(frozen=True)
class DropMetadata(Pass):
    """Remove doc strings and metadata of graphs, nodes and values, and types that can be inferred.

    torch.onnx.export writes the stack trace of every node: in a small model that takes more bytes
    than 4-bit weights do. What the model as a whole says about itself stays, as do the inputs and
    outputs of the graph.
    """

    name: ClassVar[str] = "drop-metadata"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Drop all notes."""
        change = Change()
        for graph in graphs_and_functions(model):
            noted = sum(map(_drop_notes, _noted_in(graph)))
            change.count("note dropped", noted)
            change.count("type left to inference", sum(map(_leave_to_inference, _made_in(graph))))
        return change


def _noted_in(graph: ir.Graph | ir.Function) -> Iterator[Noted]:
    yield graph
    yield from graph.inputs
    for node in graph:
        yield node
        yield from node.outputs
    if isinstance(graph, ir.Graph):
        yield from graph.initializers.values()


def _drop_notes(noted: Noted) -> bool:
    if not noted.doc_string and not noted.metadata_props:
        return False
    noted.doc_string = None
    noted.metadata_props.clear()
    return True


def _made_in(graph: ir.Graph | ir.Function) -> Iterator[ir.Value]:
    for node in graph:
        if node.domain in ONNX_DOMAINS:
            yield from node.outputs


def _leave_to_inference(value: ir.Value) -> bool:
    """Do not write the type of a value inside the graph."""
    if value.is_graph_output() or value.type is None or value.meta.get(INFERRED):
        return False
    value.meta[INFERRED] = True
    return True
