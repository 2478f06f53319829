"""widen-halves: compute in float32 what a model computes in float16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.content import read_array
from graphopt.contract import Change, Context, Effect, Pass
from graphopt.operators import ONNX_DOMAINS, is_onnx, opset_of
from graphopt.packing import is_constant
from graphopt.rewriting import Names, why_too_old
from graphopt_passes.fuse.misfit import Misfit
from graphopt_passes.quantize.retyping import (
    FIRST_OPSET,
    Types,
    cast_of,
    cast_under_its_name,
    drop_cast,
    places_of,
    retype,
    retype_attributes,
    types_of,
)

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
    widened as any value. What is only stored in float16, and cast wherever it is read, as are the
    scales of packed weights, stays as it is.

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
        if not any(_is_half(kind) for kind in types_of(graphs, opset_of(model)).values()):
            return "no value is float16"
        if model.functions:
            return "functions are not looked into; run inline-functions first"
        return why_too_old(model, FIRST_OPSET)

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Widen the whole model, or nothing."""
        change = Change()
        graphs = context.index_of(model).graphs
        try:
            widening = Widening(model, graphs, types_of(graphs, opset_of(model)))
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
    places = places_of("", node.op_type, opset, FLOAT)
    if places is None:
        return f"onnx has no schema of {node.op_type} at opset {opset}"
    if not (all(map(places.takes, inputs)) and all(map(places.makes, outputs))):
        return f"{node.op_type} has no float32 form"
    return None


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
        self.stored = {value for value in halves if _is_only_stored(value)}
        apart = {*self.held, *last, *self.stored}
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

        def widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
            """The same numbers in float32, NaN and infinities too."""
            return context.tensor(read_array(tensor).astype(np.float32), tensor.name or "")

        for graph in self.graphs:
            for node in graph:
                if node in self.last or not self.stored.isdisjoint(node.outputs):
                    continue
                if node.domain in ONNX_DOMAINS:
                    constant = retype_attributes(node, HALF, FLOAT, TYPE_ATTRIBUTES, widened)
                    change.count("constant widened", constant)
        for value in self.inner:
            change.count("constant widened", retype(value, FLOAT, widened))
        change.count("value made float32", len(self.inner))
        change.count("Cast at an input or output", self._add_casts(names))
        change.count("Cast dropped", sum(map(drop_cast, casts)))

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
                made[output] = made.get(output) or cast_under_its_name(output, HALF, names)
                self.graph.outputs[index] = made[output].outputs[0]
        self.graph.extend(made.values())
        return len(first) + len(made)

    def _cast(self, value: ir.Value, names: Names) -> ir.Node:
        """A Cast to float32 for all that reads the value."""
        uses = list(value.uses())
        node = cast_of(value, names.new(f"{value.name}_float"), FLOAT, names)
        for use in uses:
            use.node.replace_input_with(use.idx, node.outputs[0])
        return node


def _is_only_stored(value: ir.Value) -> bool:
    """A constant that is cast wherever it is read, so that nothing computes with it in float16."""
    if not is_constant(value) or value.is_graph_output() or not value.uses():
        return False
    return not _is_read_as_numbers(value)


def _is_read_as_numbers(value: ir.Value) -> bool:
    """Something reads the value that is no Cast to another type."""
    return any(
        not is_onnx(use.node, "Cast") or use.node.attributes["to"].as_int() == HALF
        for use in value.uses()
    )
