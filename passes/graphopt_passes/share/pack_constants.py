"""pack-constants: store constants that hold few different numbers as codes, without loss."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.code_fields import Field, fields_of
from graphopt.content import bits_of, chunks
from graphopt.contract import Bounds, Change, Context, Effect, Pass
from graphopt.encoding import (
    FIELD_BYTES,
    FIRST_OPSET,
    NODES_BYTES,
    NUMPY_TYPES,
    Encoding,
    Narrow,
    why_too_large,
)
from graphopt.folded_nodes import CUT_BYTES
from graphopt.operators import ONNX_DOMAINS, all_graphs, is_onnx
from graphopt.packing import is_constant, is_packed
from graphopt.rewriting import Names
from graphopt_passes.quantize.granularity import WEIGHTS
from graphopt_passes.simplify.chains import why_refused

LEVELS_MAXIMUM = 256

FIRST_ELEMENTS = 1 << 10
"""So many are looked at first."""


@dataclass(frozen=True)
class PackConstants(Pass):
    """Store constants that hold few different numbers as codes of these numbers, bit for bit.

    A mask of -inf and 0 takes one bit for each element instead of 32, a table of positions eight,
    and so do the weights of a model that was trained with rounding and exported in float. Nodes
    widen the codes, which onnxruntime computes when it loads the model: it runs as it did before.

    Codes are told apart from numbers by their structure; passes that look for float weights find
    none in them. So this comes last, or leaves weights alone.

    Attributes:
        weights: also those of products, convolutions and tables.
        min_elements: smaller constants stay.
    """

    name: ClassVar[str] = "pack-constants"
    effect: ClassVar[Effect] = Effect.ROUNDING

    weights: bool = True
    min_elements: Annotated[int, Bounds(1)] = 256

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Refuse opsets before that of the nodes that are written."""
        return why_refused(model, FIRST_OPSET)

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Pack what takes fewer bytes packed, the largest gain first."""
        change = Change()
        found = []
        for value in _constants(model):
            left = not self.weights and _may_be_weight(value)
            levels = None if left else _levels(value, self.min_elements)
            if levels is not None and (gain := _gain_bytes(value, len(levels))) > 0:
                found.append((gain, value, levels))
        found.sort(key=lambda one: -one[0])
        names, tables = Names(model), defaultdict[ir.Graph, set[Field]](set)
        encodings: dict[ir.Graph, Encoding] = {}
        for gain, value, levels in found:
            fields = fields_of(len(levels))
            graph = value.graph
            assert isinstance(graph, ir.Graph)
            # The tables of digits are stored once for all of a graph.
            if gain <= sum(field.table().nbytes for field in {*fields} - tables[graph]):
                continue
            tables[graph].update(fields)
            if graph not in encodings:
                encodings[graph] = Encoding(graph, names, context.tensor)
            context.progress(f"packing {value.name}")
            _pack(value, levels, encodings[graph])
            change.count("constant packed in codes")
        for encoding in encodings.values():
            encoding.close()
        return change


def _constants(model: ir.Model) -> Iterator[ir.Value]:
    """Initializers that nodes of the standard read, and not to widen something with them."""
    for graph in all_graphs(model):
        for value in graph.initializers.values():
            if value.is_graph_input() or value.is_graph_output() or not value.uses():
                continue
            readers = [use.node for use in value.uses()]
            standard = all(node.domain in ONNX_DOMAINS for node in readers)
            if standard and not any(is_packed(o) for node in readers for o in node.outputs):
                yield value


def _may_be_weight(value: ir.Value) -> bool:
    """An operator that takes weights reads it, or what another makes of it and constants alone."""
    readers = [use.node for use in value.uses()]
    moves = [node for node in readers if all(v is None or is_constant(v) for v in node.inputs)]
    readers += [use.node for node in moves for output in node.outputs for use in output.uses()]
    return any(is_onnx(node, *WEIGHTS, "Einsum") for node in readers)


def _levels(value: ir.Value, min_elements: int) -> np.ndarray | None:
    """The different numbers of a constant, as bits, increasing; None where there are many."""
    tensor = value.const_value
    if tensor is None or tensor.dtype not in NUMPY_TYPES or tensor.size < min_elements:
        return None
    if tensor.dtype.itemsize == 1 or why_too_large(tensor.size, tensor.dtype) is not None:
        return None
    known = np.empty(0, bits_of(tensor))
    for chunk in _parts(tensor):
        # Most weights show in their first numbers that they hold too many.
        for part in (chunk[:FIRST_ELEMENTS], chunk[FIRST_ELEMENTS:]):
            known = np.union1d(known, part)
            if len(known) > LEVELS_MAXIMUM:
                return None
    return known


def _parts(tensor: ir.TensorProtocol) -> Iterator[np.ndarray]:
    """The elements as unsigned integers: 0 and -0 are two, as are two kinds of NaN."""
    kind, rest = bits_of(tensor), np.empty(0, np.uint8)
    for chunk in chunks(tensor):
        whole = np.concatenate([rest, chunk]) if rest.size else chunk
        end = whole.size - whole.size % kind.itemsize
        yield np.ascontiguousarray(whole[:end]).view(kind)
        rest = whole[end:]


def _gain_bytes(value: ir.Value, levels: int) -> int:
    tensor = value.const_value
    assert tensor is not None
    fields = fields_of(levels)
    codes = sum(field.stored_bytes(tensor.size) for field in fields)
    nodes = NODES_BYTES + FIELD_BYTES * (len(fields) - 1)
    nodes += CUT_BYTES * sum(tensor.size % field.digits > 0 for field in fields)
    return int(tensor.nbytes - codes - levels * tensor.dtype.itemsize - nodes)


def _pack(value: ir.Value, levels: np.ndarray, encoding: Encoding) -> None:
    tensor, name = value.const_value, value.name or ""
    assert tensor is not None
    parts = [np.searchsorted(levels, part).astype(np.uint8) for part in _parts(tensor)]
    codes = np.concatenate(parts)
    codebook = levels.view(NUMPY_TYPES[tensor.dtype])
    narrow = Narrow(codes.reshape(tensor.shape.numpy()), codebook)
    del encoding.graph.initializers[name]
    value.name = None
    packed = encoding.weight(narrow, tensor.dtype, name)
    packed.meta.update(value.meta)
    value.replace_all_uses_with(packed)
