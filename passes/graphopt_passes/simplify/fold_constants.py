"""fold-constants: compute ahead what depends on constants only."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.contract import Bounds, Change, Context, Effect, Pass
from graphopt.errors import GraphoptError
from graphopt.operators import ONNX_DOMAINS, all_graphs, is_onnx, is_random, subgraphs
from graphopt.packing import is_constant, is_packed
from graphopt.rewriting import (
    become_initializer,
    constant_tensor,
    is_read_as_scalar,
    static_shape,
)
from graphopt.runtime import evaluate
from graphopt.stored_size import plain_node_bytes

INITIALIZER_OVERHEAD_BYTES = 24
"""What an initializer takes in the file beside its name and its data: tags, type, dimensions."""

BOUNDED = (
    "Compress",
    "ConcatFromSequence",
    "NonMaxSuppression",
    "NonZero",
    "SequenceAt",
    "SequenceConstruct",
    "SequenceErase",
    "SequenceInsert",
    "SplitToSequence",
    "Unique",
)
"""The sizes of their results depend on data, and are at most so many times those of the inputs:"""
BOUND = 32
"""(a bool of one byte becomes an int64 for each of its dimensions).

For every other operator the size is known once its inputs are constants, perhaps a round later.
"""

BATCH_BYTES = 1 << 20
"""Results that are computed together."""


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Compute ahead what depends on constants only, with onnxruntime's own kernels.

    Folding never makes the file larger: a group of nodes is folded only as far as the constants
    and nodes that become unnecessary take at least the bytes of the results. So a mask that three
    nodes make out of nothing is not written out. Packed weights (DequantizeLinear of constants)
    stay packed, random nodes stay random, and the shape of a value is a constant where all its
    dimensions are known.

    The results are bit-identical to what onnxruntime's CPU provider computes; on another provider
    they may differ by rounding.

    Attributes:
        max_bytes: nodes with a larger input or output are left alone, because computing them here
            would need that much memory.
    """

    name: ClassVar[str] = "fold-constants"
    effect: ClassVar[Effect] = Effect.ROUNDING

    max_bytes: Annotated[int, Bounds(0)] = 1 << 26

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Fold known shapes first, then every group of nodes that depends on constants only."""
        change = Change()
        for graph in all_graphs(model):
            _fold_shapes(graph, context, change)
            folds = []
            for region in _regions(_foldable(graph, self.max_bytes, change)):
                fold = _fold_of(region, model, change)
                if fold is not None:
                    folds.append(fold)
            for batch in _batches(folds):
                _evaluate_all(batch, model, change)
                for fold in batch:
                    _apply(graph, fold, context, change)
        return change


# ------------------------------------------------------------------ shapes


def _fold_shapes(graph: ir.Graph, context: Context, change: Change) -> None:
    for node in graph:
        if not is_onnx(node, "Shape", "Size") or node.outputs[0].is_graph_output():
            continue
        shape = static_shape(node.inputs[0])
        if shape is None or is_constant(node.inputs[0]):
            continue
        result = np.array(shape, np.int64)
        if node.op_type == "Size":
            result = result.prod(dtype=np.int64)
        else:
            start = node.attributes.get_int("start", 0)
            result = result[slice(start, node.attributes.get_int("end", len(shape)))]
        _replace(graph, [node], {node.outputs[0]: np.asarray(result)}, context)
        change.count(f"{node.op_type} of a known shape folded")


# ------------------------------------------------------------------ what can be folded


def _foldable(graph: ir.Graph, max_bytes: int, change: Change) -> list[ir.Node]:
    """Nodes whose inputs are constants or outputs of such nodes, in topological order."""
    known: set[ir.Value] = set()
    found = []
    for node in graph:
        inputs = [v for v in node.inputs if v is not None]
        if is_onnx(node, "Constant") or not inputs:
            continue
        if not all(v in known or is_constant(v) for v in inputs):
            continue
        reason = _why_not(node, inputs, max_bytes)
        if reason is not None:
            change.skip(node, reason)
            continue
        known.update(node.outputs)
        found.append(node)
    return found


def _why_not(node: ir.Node, inputs: Iterable[ir.Value], max_bytes: int) -> str | None:
    if is_packed(node.outputs[0]):
        return "it widens packed weights, which must stay packed"
    if is_random(node):
        return "it is random"
    if node.domain not in (*ONNX_DOMAINS, "com.microsoft"):
        return f"its domain {node.domain!r} is not known here"
    if any(True for _ in subgraphs(node)):
        return "it has subgraphs"
    if any(o.is_graph_output() for o in node.outputs):
        return "its result is an output of the graph, which a node must make"
    if any(is_read_as_scalar(o) and static_shape(o) != () for o in node.outputs):
        return "a Range reads it, which takes no constant but a scalar"
    bounded = is_onnx(node, *BOUNDED)
    if not bounded and any(_is_of_unknown_size(v) for v in node.outputs):
        return "how large its result would be is not known yet"
    largest = max((_bytes(v) or 0 for v in (*inputs, *node.outputs)), default=0)
    largest *= BOUND if bounded else 1
    if largest > max_bytes:
        return f"it would need {largest} bytes at once, over max-bytes"
    return None


def _is_of_unknown_size(value: ir.Value) -> bool:
    return bool(value.name) and static_shape(value) is None


def _bytes(value: ir.Value) -> int | None:
    tensor = constant_tensor(value)
    if tensor is not None and tensor.dtype == ir.DataType.STRING:
        return sum(map(len, tensor.numpy().reshape(-1).tolist()))
    if tensor is not None:
        return tensor.nbytes
    shape = static_shape(value)
    if shape is None or value.dtype is None or value.dtype == ir.DataType.STRING:
        return None
    return (int(np.prod(shape, dtype=np.int64)) * value.dtype.bitwidth + 7) // 8


# ------------------------------------------------------------------ regions


def _regions(nodes: list[ir.Node]) -> Iterator[list[ir.Node]]:
    """Split the foldable nodes into groups that share no computed value, each in order."""
    group: dict[ir.Node, list[ir.Node]] = {}
    for node in nodes:
        producers = (v.producer() for v in node.inputs if v is not None)
        joined = {id(group[p]): group[p] for p in producers if p is not None and p in group}
        merged = max(joined.values(), key=len, default=[])
        for other in joined.values():
            if other is not merged:
                merged += other
                group.update(dict.fromkeys(other, merged))
        merged.append(node)
        group[node] = merged
    order = {node: place for place, node in enumerate(nodes)}
    for region in {id(r): r for r in group.values()}.values():
        yield sorted(region, key=order.__getitem__)


@dataclass
class _Fold:
    """What is to be folded of a region.

    Attributes:
        region: the nodes that must be computed.
        nodes: those of them that go.
        results: what stays of them.
        total_bytes: of the results.
        arrays: the results, once they are computed.
    """

    region: list[ir.Node]
    nodes: list[ir.Node]
    results: list[ir.Value]
    total_bytes: int
    arrays: dict[ir.Value, np.ndarray] | None = None


def _fold_of(region: list[ir.Node], model: ir.Model, change: Change) -> _Fold | None:
    """As much of the region as can be folded without growing the file; None where that is nothing.

    Nodes whose result is too large are taken out of `folded` one by one, the largest first; they
    stay in the graph and are computed at run time, while what else depends on them is folded.
    """
    node_bytes = {node: plain_node_bytes(node) + 2 for node in region}
    folded = dict.fromkeys(region)
    while folded:
        results = [o for n in folded for o in n.outputs if _is_read_outside(o, folded)]
        if not results:
            # Nothing reads it: that is for drop-unused.
            return None
        sizes = {v: _bytes(v) for v in results}
        arrays = None
        if None in sizes.values():
            arrays = _evaluate(region, results, model, change)
            if arrays is None:
                return None
            sizes = {v: a.nbytes for v, a in arrays.items()}
        total = sum(sizes[v] or 0 for v in results)
        if total + sum(map(_label_bytes, results)) <= _removed_bytes(folded, node_bytes):
            return _Fold(region, list(folded), results, total, arrays)
        largest = max(results, key=lambda v: sizes[v] or 0).producer()
        assert largest is not None
        change.skip(largest, "writing its result out would make the file larger")
        del folded[largest]
    return None


def _batches(folds: list[_Fold]) -> Iterator[list[_Fold]]:
    """Starting onnxruntime takes longer than most folds, so that many are computed at once."""
    batch: list[_Fold] = []
    waiting_bytes = 0
    for fold in folds:
        if batch and waiting_bytes + fold.total_bytes > BATCH_BYTES:
            yield batch
            batch, waiting_bytes = [], 0
        batch.append(fold)
        waiting_bytes += fold.total_bytes
    if batch:
        yield batch


def _evaluate_all(batch: list[_Fold], model: ir.Model, change: Change) -> None:
    """Compute what is not yet computed: all at once, and where one fails, one by one."""
    batch = [fold for fold in batch if fold.arrays is None]
    nodes = [node for fold in batch for node in fold.region]
    results = [value for fold in batch for value in fold.results]
    if not batch:
        return
    try:
        arrays = dict(zip(results, evaluate(nodes, results, model.opset_imports), strict=True))
    except GraphoptError:
        for fold in batch:
            fold.arrays = _evaluate(fold.region, fold.results, model, change)
        return
    for fold in batch:
        fold.arrays = {value: arrays[value] for value in fold.results}


def _apply(graph: ir.Graph, fold: _Fold, context: Context, change: Change) -> None:
    if fold.arrays is None:
        return
    _replace(graph, fold.nodes, fold.arrays, context)
    # They are in the graph now, or in a file; here they would all be held until the last.
    fold.arrays = None
    change.count("node folded", len(fold.nodes))


def _is_read_outside(value: ir.Value, nodes: Container[ir.Node]) -> bool:
    return any(use.node not in nodes for use in value.uses())


def _removed_bytes(folded: Mapping[ir.Node, None], node_bytes: Mapping[ir.Node, int]) -> int:
    """What folding removes from the file: the nodes, and constants that only they read."""
    constants = {v for n in folded for v in n.inputs if v is not None and is_constant(v)}
    gone = [v for v in constants if not (_is_read_outside(v, folded) or v.is_graph_output())]
    return sum((_bytes(v) or 0) + _label_bytes(v) for v in gone) + sum(
        node_bytes[n] for n in folded
    )


def _label_bytes(value: ir.Value) -> int:
    return INITIALIZER_OVERHEAD_BYTES + len(value.name or "")


def _evaluate(
    region: list[ir.Node], results: list[ir.Value], model: ir.Model, change: Change
) -> dict[ir.Value, np.ndarray] | None:
    try:
        arrays = evaluate(region, results, model.opset_imports)
    except GraphoptError as error:
        change.skip(region[0], f"onnxruntime cannot compute it ahead: {error}")
        return None
    return dict(zip(results, arrays, strict=True))


def _replace(
    graph: ir.Graph, nodes: list[ir.Node], arrays: dict[ir.Value, np.ndarray], context: Context
) -> None:
    for value, array in arrays.items():
        become_initializer(value, context.tensor(array, value.name or "", value.dtype))
    for node in reversed(nodes):
        graph.remove(node, safe=True)
