"""The float32 values of a model, and where operators and bodies let them have 16 bits instead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import onnx_ir as ir

from graphopt.operators import is_onnx, nodes_within, opset_of, subgraphs
from graphopt.packing import is_constant
from graphopt.rewriting import constant_tensor
from graphopt_passes.quantize.halves import Half, Role
from graphopt_passes.quantize.retyping import Places, Types, places_of

CONTROL = ("If", "Loop", "Scan")

SCAN_OPSET = 9
"""Before it, Scan has a batch axis and takes lengths first."""

WIDE_PLACES = {("Resize", 1), ("Resize", 2)}
"""Inputs that stay float32 though their schema knows float16: onnxruntime knows no such kernel."""


class Floats:
    """The float32 values of a model, and where its operators can have 16 bits instead.

    What is asked once is remembered: ask before the model is rewritten.

    Args:
        model: with types inferred.
        graphs: all of it.
        types: of all values.
        half: the type of 16 bits.
    """

    def __init__(
        self, model: ir.Model, graphs: Sequence[ir.Graph], types: Types, half: Half
    ) -> None:
        self.graphs, self.types, self.half = graphs, types, half
        self._values = {
            value
            for value, kind in types.items()
            if isinstance(kind, ir.TensorType) and kind.dtype == ir.DataType.FLOAT
        }
        self._takes: dict[ir.Node, list[int]] = {}
        self._lost: dict[tuple[ir.Value, Role], str | None] = {}
        self.opset = opset_of(model)
        self._others = {
            inner: node.op_type
            for graph in graphs
            for node in graph
            if subgraphs(node) and not is_control(node, self.opset)
            for inner in nodes_within(node)
        }

    def __contains__(self, value: ir.Value | None) -> bool:
        return value in self._values

    @cached_property
    def nodes(self) -> list[ir.Node]:
        """Those that compute, outer graphs first, each from its inputs onwards."""
        return [
            node
            for graph in self.graphs
            for node in graph
            if not is_onnx(node, "Constant") and not is_control(node, self.opset)
        ]

    def places(self, node: ir.Node) -> Places | None:
        """Where the node's operator may have the type of 16 bits; None where nobody knows."""
        return places_of(node.domain, node.op_type, self.opset, self.half.dtype)

    def takes(self, node: ir.Node) -> list[int]:
        """The indices of inputs that are float32 and may have 16 bits."""
        if node not in self._takes:
            places = self.places(node)
            self._takes[node] = [
                index
                for index, value in enumerate(node.inputs)
                if places is not None and value in self._values and places.takes(index)
                if (node.op_type, index) not in WIDE_PLACES
            ]
        return self._takes[node]

    def why_lost(self, value: ir.Value | None, role: Role) -> str | None:
        """Why 16 bits would not do for a value that is constant, or None."""
        tensor = constant_tensor(value)
        if value is None or tensor is None:
            return None
        if (value, role) not in self._lost:
            self._lost[value, role] = self.half.why_lost(tensor, role)
        return self._lost[value, role]

    def makes(self, node: ir.Node) -> list[ir.Value]:
        """The outputs that are float32 and may have 16 bits."""
        places = self.places(node)
        if places is None:
            return []
        outputs = enumerate(node.outputs)
        return [o for index, o in outputs if o in self and places.makes(index)]

    def other_body(self, node: ir.Node) -> str | None:
        """The operator, other than If, Loop and Scan, in whose body the node is, or which it is."""
        return self._others.get(node)

    def comes(self, node: ir.Node) -> list[ir.Value]:
        """The float32 inputs that are no constants."""
        return [v for v in node.inputs if v is not None and v in self and not is_constant(v)]

    def widens(self, node: ir.Node) -> bool:
        """A Cast from the type of 16 bits: what reads it can as well read what it reads."""
        source = node.inputs[0] if is_onnx(node, "Cast") else None
        kind = self.types.get(source) if source is not None else None
        return kind is not None and kind.dtype == self.half.dtype

    def is_indifferent(self, node: ir.Node) -> bool:
        """The node takes one value of floating point, of whichever type, and makes none."""
        floats = sum(v in self for v in node.inputs)
        return floats == len(self.takes(node)) == 1 and not any(o in self for o in node.outputs)


def is_control(node: ir.Node, opset: int) -> bool:
    """An If, Loop or Scan, through which values pass as they are."""
    return is_onnx(node, *CONTROL) and (node.op_type != "Scan" or opset >= SCAN_OPSET)


@dataclass(frozen=True)
class Tie:
    """Values that a control node hands on, which are of one type inside and outside.

    Attributes:
        node: an If, Loop or Scan.
        given: index of the node's input; None where nothing goes in.
        inner: inputs of bodies.
        made: bodies that give it out, each with the index of the output.
        outer: the node's output; None where nothing comes out.
        is_carried: what one round gives out, the next one takes in.
    """

    node: ir.Node
    given: int | None
    inner: ir.Value | None
    made: tuple[tuple[ir.Graph, int], ...]
    outer: ir.Value | None
    is_carried: bool = False

    @property
    def values(self) -> list[ir.Value]:
        """All of them but what goes in and what a body gives out."""
        return [v for v in (self.inner, self.outer) if v is not None]

    @property
    def last(self) -> list[ir.Value]:
        """What bodies give out."""
        return [body.outputs[index] for body, index in self.made]


def ties_of(node: ir.Node) -> Iterator[Tie]:
    """What an If, Loop or Scan hands on; not what it counts rounds and conditions by."""
    bodies = subgraphs(node)
    outputs: list[ir.Value | None] = [o if o.name else None for o in node.outputs]
    if node.op_type == "If":
        for index, output in enumerate(outputs):
            yield Tie(node, None, None, tuple((body, index) for body in bodies), output)
        return
    (body,) = bodies
    if node.op_type == "Loop":
        first_input, first_output, scanned = 2, 1, 0
    else:
        first_input, first_output = 0, 0
        scanned = node.attributes["num_scan_inputs"].as_int()
    carried = len(body.inputs) - first_input - scanned
    outputs += [None] * (carried - len(outputs))
    for index, inner in enumerate(body.inputs[first_input:]):
        given = first_input + index
        if index >= carried:
            yield Tie(node, given, inner, (), None)
            continue
        made = ((body, first_output + index),)
        yield Tie(node, given, inner, made, outputs[index], is_carried=True)
    for index in range(carried, len(outputs)):
        yield Tie(node, None, None, ((body, first_output + index),), outputs[index])
