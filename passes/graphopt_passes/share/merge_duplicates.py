"""merge-duplicates: store equal initializers once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt.model_io import digest
from graphopt.operators import all_graphs
from graphopt.rewriting import Names, add_initializer

PROBE_BYTES = 4096


@dataclass(frozen=True)
class MergeDuplicates(Pass):
    """Store initializers of equal type, shape and content once, whatever their size.

    Equal initializers of different subgraphs move to the main graph, where all of them see it.
    Large tensors in external data are compared by a few probes first and hashed, a few MB at a
    time, only where those agree.
    """

    name: ClassVar[str] = "merge-duplicates"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Keep one of each group of equal initializers."""
        change = Change()
        names = Names(model)
        for group in _equal(_initializers(model)):
            _merge(model, group, names, change)
        return change


def _initializers(model: ir.Model) -> list[ir.Value]:
    """The constant initializers of all graphs, outer before inner."""
    return [
        value
        for graph in all_graphs(model)
        for value in graph.initializers.values()
        if value.const_value is not None and not value.is_graph_input()
    ]


def _equal(values: list[ir.Value]) -> Iterator[list[ir.Value]]:
    """Groups of two and more with equal content, told apart by ever more expensive keys."""
    groups = [values]
    for key in (_kind, _probe, _content):
        groups = [part for group in groups for part in _split(group, key)]
    yield from groups


def _split(values: list[ir.Value], key: object) -> Iterator[list[ir.Value]]:
    parts: dict[Hashable, list[ir.Value]] = defaultdict(list)
    for value in values:
        assert callable(key) and value.const_value is not None
        parts[key(value.const_value)].append(value)
    yield from (part for part in parts.values() if len(part) > 1)


def _kind(tensor: ir.TensorProtocol) -> Hashable:
    return tensor.dtype, tuple(tensor.shape.numpy())


def _probe(tensor: ir.TensorProtocol) -> Hashable:
    """A few bytes from the beginning, middle and end of a tensor in external data."""
    if not isinstance(tensor, ir.ExternalTensor) or tensor.nbytes <= 3 * PROBE_BYTES:
        return None
    start = tensor.offset or 0
    with open(tensor.path, "rb") as file:
        pieces = []
        for offset in (0, tensor.nbytes // 2, tensor.nbytes - PROBE_BYTES):
            file.seek(start + offset)
            pieces.append(file.read(PROBE_BYTES))
    return tuple(pieces)


def _content(tensor: ir.TensorProtocol) -> Hashable:
    if tensor.dtype == ir.DataType.STRING:
        return tuple(tensor.numpy().reshape(-1).tolist())
    return digest(tensor)


def _merge(model: ir.Model, group: list[ir.Value], names: Names, change: Change) -> None:
    kept = next((v for v in group if v.graph is model.graph), group[0])
    if any(v.graph is not kept.graph for v in group) and kept.graph is not model.graph:
        assert kept.const_value is not None
        kept = add_initializer(model.graph, kept.const_value, names.new(kept.name or "shared"))
    for value in group:
        if value is kept:
            continue
        if value.is_graph_output():
            change.skip(value, "it is an output of its graph")
            continue
        value.replace_all_uses_with(kept)
        assert value.graph is not None and value.name is not None
        del value.graph.initializers[value.name]
        change.count("duplicate initializer merged")
